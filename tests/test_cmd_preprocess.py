"""`sora-llm preprocess`: fills the cache that training reads, and tells what is in it."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from conftest import shared
from data_files import json_lines, write
from runs import CONFIG, gsm8k_overrides
from transformers import AutoTokenizer

from sora_llm import cli
from sora_llm.commands import cmd_preprocess
from sora_llm.config import load_config
from sora_llm.data import prepare
from sora_llm.data.show import decoded, table, with_marks
from sora_llm.running.inputs import check_inputs
from sora_llm.running.training_data import load_data
from sora_llm.topology import ALONE

CHAT = [{"role": "user", "content": "Hi\x1b[31m"}, {"role": "assistant", "content": "Hello"}]


@pytest.fixture
def overrides(tmp_path):
    """A function of what differs from GSM8K with base5m at 1,024 tokens."""

    def of(**others: object) -> list[str]:
        settings = {
            "model.name_or_path": str(shared("models/base5m")),
            "data.val_set_size": None,
            "data.sequence_len": 1024,
            "data.cache_dir": str(tmp_path / "cache"),
            **others,
        }
        return gsm8k_overrides(tmp_path / "run", **settings)

    return of


def chats(folder: Path, *conversations: list) -> list[dict[str, str]]:
    """data.datasets of some conversations."""
    rows = [{"messages": messages} for messages in conversations]
    return [{"path": write(folder / "chats.jsonl", json_lines(*rows)), "type": "messages"}]


def test_gsm8k_is_told_in_full_and_its_sequences_are_filled(overrides, tmp_path, capsys):
    assert cli.main(["preprocess", CONFIG, *overrides(), "--json"]) == 0
    printed = capsys.readouterr().out
    assert printed == (tmp_path / "run" / "data_report.json").read_text()
    content = json.loads(printed)
    train = content["train"]
    assert (train["rows_read"], train["rows_kept"], train["num_bad_rows"], train["too_long"]) == (7473, 7473, 0, 0)
    assert train["fill_rate"] >= 0.97 and 0.6 < train["supervised_fraction"] < 0.7
    assert content["dev"] is None and content["sequence_len"] == 1024 and content["chat_template"] is None
    assert sum(rows for _, _, rows in train["length_histogram"]) == 7473
    assert [sample["row"] for sample in train["samples"]] == [0, 3736, 7472]
    (question, first), (answer, second) = train["samples"][0]["segments"]
    assert (first, second) == (0, 1)
    assert question.startswith("<s> Natalia sold clips") and answer.startswith("Natalia sold 48/2") and "</s>" in answer
    assert Path(content["cache"]) == tmp_path / "cache" and Path(train["cache_folder"]).parent == tmp_path / "cache"


def test_the_table_of_gsm8k(overrides, tmp_path, capsys):
    for origin in ("prepared now", "from the cache"):
        assert cli.main(["preprocess", CONFIG, *overrides(**{"data.val_set_size": 73})]) == 0
        shown = capsys.readouterr().out
        assert f"━━ train  {origin} ━" in shown and "dev  " not in shown
    assert re.search(r"gsm8k_train.jsonl +prompt_completion +7,473 +7,473 +1,781,936 +66.4%", shown)
    assert re.search(
        r"mean 238, median 222, longest 697 tokens; packed into sequences of 1,024 they fill 9[789]", shown
    )
    assert re.search(r"  193 – 256  █{40} +2,232   29.9%", shown), "the longest bar is full"
    assert "│ <s> Natalia sold clips" in shown and "│ #### 72</s>⟧" in shown and "\x1b" not in shown
    assert "dev rows        73 of the train rows" in shown and str(tmp_path / "run" / "data_report.json") in shown


def test_training_finds_what_was_prepared_and_tokenises_nothing(overrides, tmp_path, capsys, monkeypatch):
    assert cli.main(["preprocess", CONFIG, *overrides(), "--json"]) == 0
    folder = Path(json.loads(capsys.readouterr().out)["train"]["cache_folder"])
    written = {file: file.stat().st_mtime_ns for file in folder.iterdir()}
    monkeypatch.setattr(prepare, "_fill", None)  # whoever would tokenise fails
    config = load_config(CONFIG, overrides(**{"train.learning_rate": 1e-4, "train.max_steps": 7}))
    data = load_data(config, check_inputs(config, "none"), ALONE)
    assert data.train is not None and len(data.train) == 7473
    assert {file: file.stat().st_mtime_ns for file in folder.iterdir()} == written


def test_the_output_folder_gets_the_report_and_loses_nothing(overrides, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "notes.txt").write_text("{}")
    (tmp_path / "run" / "data_report.json").write_text("an older one")
    datasets = {"data.datasets": chats(tmp_path, CHAT)}
    assert cli.main(["preprocess", CONFIG, *overrides(**datasets)]) == 0
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == ["data_report.json", "notes.txt"]
    assert json.loads((tmp_path / "run" / "data_report.json").read_text())["train"]["rows_kept"] == 1
    elsewhere = tmp_path / "reports" / "mine.json"
    assert cli.main(["preprocess", CONFIG, *overrides(**datasets), "--report", str(elsewhere)]) == 0
    assert json.loads(elsewhere.read_text())["chat_template"] == "alpaca"
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert cli.main(["preprocess", CONFIG, *overrides(**datasets), "--report", str(tmp_path / "file" / "x")]) == 2
    assert "--report" in capsys.readouterr().err


def test_a_template_that_teaches_no_end_is_a_warning(overrides, tmp_path, capsys):
    """As in training: here rows are looked at before it."""
    (tmp_path / "marked.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{{ eos_token }}{% endfor %}"
    )
    datasets = {"data.datasets": chats(tmp_path, CHAT)}
    for template, said in (
        (
            str(tmp_path / "marked.jinja"),
            "warning: the chat template's {% generation %} markers exclude the </s> after an answer",
        ),
        ("chatml", "warning: answers end with text that is not a single token of this tokenizer"),
    ):
        assert cli.main(["preprocess", CONFIG, *overrides(**datasets, **{"data.chat_template": template})]) == 0
        assert said in capsys.readouterr().out
    assert cli.main(["preprocess", CONFIG, *overrides(**datasets, **{"data.chat_template": "alpaca"})]) == 0
    assert "warning" not in capsys.readouterr().out


def test_bad_rows_losses_and_dev_rows_are_told(overrides, tmp_path, capsys):
    silent, struck = [CHAT[0], {**CHAT[1], "weight": 0}], [CHAT[0], {**CHAT[1], "content": "<s>Hello</s>"}]
    long = [CHAT[0], {**CHAT[1], "content": "a" * 2000}]
    settings = {
        "data.datasets": chats(tmp_path, CHAT, [], CHAT, silent, long, struck),
        "data.val_datasets": [{"path": write(tmp_path / "dev.txt", "One.\n\nTwo."), "type": "completion"}],
        "data.max_bad_row_fraction": 0.5,
        "data.sequence_len": 256,
    }
    assert cli.main(["preprocess", CONFIG, *overrides(**settings)]) == 0
    shown = capsys.readouterr().out
    train, dev = shown.split("━━ dev")
    assert re.search(r"read +kept +malformed +too long +untrained +repeated +tokens +supervised", train)
    assert re.search(r"messages +6 +3 +1 +1 +1 +1 ", train)
    assert f"    {tmp_path}/chats.jsonl:2: messages is empty" in train
    assert re.search(rf"1 dropped at sequence_len = 256, the first {tmp_path}/chats.jsonl:5 with [\d,]+ tokens", train)
    assert "untrained   1 dropped: every token to train on has weight 0" in train
    assert "repeated    1 the same as earlier rows (kept; data.drop_duplicates drops them)" in train
    assert (
        f"special     1 with a special token written in a message, the first {tmp_path}/chats.jsonl:6 with <s>" in train
    )
    assert re.search(r"dev.txt +completion +2 +2 ", dev) and "malformed" not in dev
    assert "Hi␛[31m↵" in train, "what is in the data cannot command the terminal"


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"data.datasets": [{"path": "/nowhere/a.jsonl", "type": "messages"}]}, "/nowhere/a.jsonl does not exist"),
        ({"data.sequence_len": 8}, "none of the 7473 rows is kept"),
        ({"data.excess_length": "error", "data.sequence_len": 64}, "gsm8k_train.jsonl:1 has 139 tokens"),
        ({"data.cache_dir": "/proc/nowhere"}, "data.cache_dir"),
    ],
)
def test_what_cannot_be_prepared_is_a_sentence_and_leaves_no_run_directory(overrides, tmp_path, capsys, settings, said):
    assert cli.main(["preprocess", CONFIG, *overrides(**settings)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and len(error.strip().splitlines()) == 1
    assert not (tmp_path / "run").exists()


def test_a_folder_is_no_file_for_the_report(overrides, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(cmd_preprocess, "check_inputs", lambda *_: pytest.fail("the work began"))
    assert cli.main(["preprocess", CONFIG, *overrides(), "--report", str(tmp_path)]) == 2
    assert f"--report {tmp_path} is a folder; name a file" in capsys.readouterr().err


def test_streamed_data_is_not_prepared_but_looked_at(overrides, tmp_path, capsys, monkeypatch):
    rows = [{"text": f"Row {i}."} for i in range(1500)]
    dataset = {"path": write(tmp_path / "a.jsonl", json_lines(*rows)), "type": "completion", "streaming": True}
    settings = {"data.datasets": [dataset]}
    assert cli.main(["preprocess", CONFIG, *overrides(**settings), "--json"]) == 0
    train = json.loads(capsys.readouterr().out)["train"]
    assert (train["rows_read"], train["sample_rows"], train["cache_folder"]) == (1000, 1000, "")
    assert not (tmp_path / "cache").exists()
    assert cli.main(["preprocess", CONFIG, *overrides(**settings)]) == 0
    assert "train  a sample: at most 1,000 rows of each data set, nothing is prepared" in capsys.readouterr().out


# ----- what is drawn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["base5m", "stories260k"])
def test_the_stretches_of_a_row_make_up_its_text(model):
    tokenizer = AutoTokenizer.from_pretrained(shared(f"models/{model}"))
    ids = tokenizer(" Well… naïve 日本語 🙂\n\tyes  no")["input_ids"]
    text = tokenizer.decode(ids, skip_special_tokens=False)
    for cut in range(1, len(ids)):
        weights = [0.0] * cut + [0.5] * (len(ids) - cut)
        (before, _), (after, weight) = decoded((ids, weights), tokenizer)
        assert before + after == text and weight == 0.5
        assert before == tokenizer.decode(ids[:cut]).rstrip("�"), "a torn character belongs to what follows"


def section(segments: list, **others: object) -> dict:
    sample = {"row": 0, "tokens": 3, "supervised_tokens": 1, "segments": segments}
    counts = dict.fromkeys(("rows_read", "rows_kept", "tokens", "max_length", "mean_length", "median_length"), 1)
    losses = dict.fromkeys(("num_bad_rows", "too_long", "truncated", "split", "no_supervised", "duplicates"), 0)
    return {
        **counts,
        **losses,
        "supervised_fraction": 0.5,
        "fill_rate": 0.5,
        "sequence_len": 8,
        "length_histogram": [[1, 1, 1]],
        "first_too_long": None,
        "first_special_written": None,
        "bad_rows": [],
        "datasets": [],
        "from_cache": False,
        "samples": [sample],
        **others,
    }


def sample_text(segments: list, colour: bool) -> str:
    """The framed lines of a sample."""
    shown = table("train", section(segments), colour=colour)
    return "\n".join(line.removeprefix("  │ ") for line in shown.splitlines() if line.startswith("  │ "))


def test_masked_text_is_dim_in_colour_and_trained_text_is_in_brackets_without():
    segments = [["Hi\nthere ", 0.0], ["you", 1.0], ["!", 0.5]]
    assert sample_text(segments, colour=False) == "Hi↵\nthere ⟦you⟧×0.5 ⟦!⟧"
    dim, plain = "\x1b[2m", "\x1b[0m"
    assert sample_text(segments, colour=True) == f"{dim}Hi↵{plain}\n{dim}there {plain}you×0.5 !"


def test_long_lines_are_wrapped_and_long_texts_are_cut_in_their_middle():
    lines = sample_text([["word " * 100, 1.0]], colour=False).splitlines()
    assert len(lines) == 6 and max(len(line.rstrip()) for line in lines) <= 96
    shown = sample_text([["a" * 50_000 + "z" * 50_000, 1.0]], colour=False)
    assert len(shown) < 3000 and "[…97,600 characters…]" in shown.replace("\n", "")
    assert max(map(len, shown.splitlines())) <= 97, "a word that is longer than a line is broken"
    assert shown.startswith("⟦a") and shown.endswith("z⟧")


def test_control_and_invisible_characters_are_made_visible():
    assert with_marks("a\tb\x00\x1b\x7f\u200b\u202e\U000e0001é🙂 ") == "a⇥b␀␛\\u007f\\u200b\\u202e\\U000e0001é🙂 "


def test_the_colour_flag_reaches_the_table(overrides, tmp_path, capsys):
    settings = {"data.datasets": chats(tmp_path, CHAT)}
    for flags, expected in (([], False), (["--color"], True)):
        assert cli.main(["preprocess", CONFIG, *overrides(**settings), *flags]) == 0
        assert ("\x1b[2m" in capsys.readouterr().out) is expected


def test_the_report_of_a_run_is_of_what_it_trained_on(overrides, tmp_path, capsys):
    """Looking at other settings of a run that is there does not rewrite it."""
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "status.json").write_text('{"state": "finished"}')
    (run_dir / "data_report.json").write_text("its own")
    assert cli.main(["preprocess", CONFIG, *overrides()]) == 0
    assert "the run there keeps its own" in capsys.readouterr().out
    assert (run_dir / "data_report.json").read_text() == "its own"
    assert cli.main(["preprocess", CONFIG, *overrides(), "--report", str(tmp_path / "other.json")]) == 0
    assert (tmp_path / "other.json").is_file()
