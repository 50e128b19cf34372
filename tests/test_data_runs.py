"""Whole runs on every kind of data: what a few lines of YAML train on, and that a resume meets the very next row."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import re
import shutil
from pathlib import Path

import pytest
from conftest import shared
from runs import CONFIG, QUESTIONS, gsm8k_overrides

from sora_llm import cli
from sora_llm.config import load_config
from sora_llm.config.schema import Dataset
from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.errors import UserError
from sora_llm.running.held_out import sharing_rows
from sora_llm.running.inputs import check_inputs
from sora_llm.running.training_data import load_data
from sora_llm.topology import ALONE
from sora_llm.train import main, run

IN_4_BITS = {
    "quantization.load_in_4bit": True,
    "model.dtype": "bfloat16",
    "train.gradient_checkpointing": True,
}
QUICK = {
    "quantization.load_in_4bit": False,  # 4-bit weights cost most of the time, and data does not meet them
    "model.dtype": "float32",
    "train.gradient_checkpointing": False,
    "train.max_steps": 2,
    "train.per_device_train_batch_size": 1,
    "sora.r": 2,
    "sora.lora_dropout": 0.05,
    "data.val_set_size": None,
    "output.report_to": [],
}

FILES = {
    "gsm8k_train.jsonl": {"type": "alpaca", "columns": {"instruction": "question", "output": "answer"}},
    "self_instruct_seed_tasks.jsonl": {"type": "self_instruct"},
    "gpteacher_roleplay.json": {"type": "alpaca", "columns": {"output": "response"}},
    "fastchat_dummy_conversation.json": {"type": "sharegpt"},
    "lf_v1_sft_demo.jsonl": {"type": "messages"},
    "mlx_wikisql_train.jsonl": {"type": "completion"},
    "mlx_wikisql_valid.jsonl": {"type": "completion"},
    "wikitext2_valid.txt": {"type": "completion"},
    "gutenberg_sherlock_holmes.txt": {"type": "completion"},
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache of prepared data for all runs here."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.mark.parametrize("name", FILES)
def test_every_file_trains_through_a_few_lines_of_yaml(name, tmp_path, cache):
    dataset = {"path": str(shared(f"data/{name}")), **FILES[name]}
    options = {**QUICK, "data.datasets": [dataset], "data.cache_dir": cache, "data.excess_length": "truncate"}
    result = run(CONFIG, *gsm8k_overrides(tmp_path / "run", **options))
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert result.status["state"] == "finished" and (result.adapter / "adapter_model.safetensors").exists()
    assert all(line["loss"] > 0 and line["supervised_tokens"] > 0 for line in lines if "loss" in line)


# ----- resume in the middle of an epoch -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Two files of short rows, 30 and 12."""
    folder = tmp_path_factory.mktemp("rows")
    lines = [line for line in shared("data/gsm8k_train.jsonl").read_text().splitlines() if len(line) < 240]
    (folder / "a.jsonl").write_text("\n".join(lines[:30]))
    (folder / "b.jsonl").write_text("\n".join(lines[30:42]))
    return [{"path": str(folder / name), **QUESTIONS} for name in ("a.jsonl", "b.jsonl")]


MODES = {
    "packed": (IN_4_BITS, {}),
    "one row a sequence": ({"data.sample_packing": False}, {}),
    "accumulated": ({"train.gradient_accumulation_steps": 2}, {}),
    "a packed mixture": ({}, {"weight": 1}),
    "streamed": ({}, {"streaming": True}),
    "a streamed mixture, not packed": ({"data.sample_packing": False}, {"streaming": True, "weight": 2}),
}


IN_THE_ORDINARY_RUN = ("packed",)  # accumulated: test_resume.py


@pytest.mark.parametrize(
    "mode",
    [pytest.param(mode, marks=() if mode in IN_THE_ORDINARY_RUN else pytest.mark.matrix) for mode in MODES],
)
def test_a_run_resumed_in_the_middle_of_an_epoch_is_the_uninterrupted_one_bit_by_bit(mode, small, tmp_path, cache):
    """Seven steps at once, and the same from the checkpoint of step 3 on, under dropout."""
    overrides, dataset = MODES[mode]
    options = {
        **QUICK,
        "data.datasets": [{**one, **dataset} for one in small],
        "data.cache_dir": cache,
        "train.max_steps": 7,
        "train.per_device_train_batch_size": 2,
        "output.save_steps": 3,
        "output.save_total_limit": None,
        "output.logging_steps": 1,
        **overrides,
    }
    run(CONFIG, *gsm8k_overrides(tmp_path / "straight", **options))
    start = {"output.resume": str(tmp_path / "straight" / "checkpoints" / "step-3")}
    run(CONFIG, *gsm8k_overrides(tmp_path / "resumed", **options, **start))

    def files(name: str) -> tuple[bytes, list]:
        folder = tmp_path / name
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        kept = ("step", "loss", "grad_norm", "supervised_tokens", "mean_rank")
        return (
            (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
            [{key: line.get(key) for key in kept} for line in lines if line["step"] > 3],
        )

    assert files("resumed") == files("straight")


def test_streamed_rows_that_cannot_be_used_stop_before_the_model_is_loaded(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sora_llm.running.assembly.load_backbone", lambda *_a, **_o: pytest.fail("a model was loaded"))
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n' * 5 + "{broken\n")
    options = {**QUICK, "data.datasets": [{"path": str(rows), "type": "alpaca", "streaming": True}]}
    assert main([CONFIG, *gsm8k_overrides(tmp_path / "run", **options)]) == 2
    message = capsys.readouterr().err
    assert "1 of 6 rows cannot be used" in message and f"{rows}:6" in message and message.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_stream_is_saved_and_resumed_after_its_first_window(small, tmp_path):
    """In its second epoch: what was counted of the rows before is part of the position."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(Path(small[0]["path"]).read_text().splitlines()[:5]))
    options = {**QUICK, "data.datasets": [{**small[0], "path": str(path), "streaming": True}], "output.save_steps": 1}
    options |= {"train.max_steps": 12, "data.sample_packing": False, "output.save_total_limit": None}
    run(CONFIG, *gsm8k_overrides(tmp_path / "run", **options))
    start = {"output.resume": str(tmp_path / "run" / "checkpoints" / "step-8")}
    cursor = json.loads((tmp_path / "run" / "checkpoints" / "step-8" / "state.json").read_text())["order"]["cursor"]
    assert cursor["window"] >= 1 and cursor["counts"][0]["rows_read"] >= 5, "or the test shows nothing"
    run(CONFIG, *gsm8k_overrides(tmp_path / "again", **options, **start))
    assert multiprocessing.active_children() == [], "those that tokenise end with their run"
    weights = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("run", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()


def test_another_stream_under_a_checkpoint_is_refused(small, tmp_path):
    path = tmp_path / "rows.jsonl"
    lines = Path(small[0]["path"]).read_text().splitlines()
    path.write_text("\n".join(lines))
    options = {**QUICK, "data.datasets": [{**small[0], "path": str(path), "streaming": True}], "output.save_steps": 1}
    run(CONFIG, *gsm8k_overrides(tmp_path / "run", **options))
    path.write_text("\n".join([lines[1], lines[0], *lines[2:]]))
    start = {"output.resume": str(tmp_path / "run" / "checkpoints" / "step-1")}
    with pytest.raises(UserError, match=r"the rows of data\.datasets are not those that .* was trained on"):
        run(CONFIG, *gsm8k_overrides(tmp_path / "other", **options, **start))
    assert not (tmp_path / "other").exists()


def test_a_mixture_says_the_shares_of_its_data_sets(small, tmp_path, capsys):
    few = tmp_path / "few.jsonl"
    lines = Path(small[0]["path"]).read_text().splitlines()[:10]
    short = [{**json.loads(line), "question": "How many?", "answer": "1"} for line in lines]
    few.write_text("\n".join(map(json.dumps, short)))  # shares of rows are not those of tokens
    datasets = [{**small[0], "weight": 1}, {**small[0], "path": str(few), "weight": 1}]
    overrides = gsm8k_overrides(tmp_path / "run", **QUICK, **{"data.datasets": datasets})
    assert main([CONFIG, *overrides, "--dry-run"]) == 0
    said = capsys.readouterr().out
    rows = load_data(config := load_config(CONFIG, overrides), check_inputs(config, "none"), ALONE).train
    twice = [rows.lengths[rows.sources == source].mean() * 20 for source in (0, 1)]
    (tokens,) = re.findall(r"tokens +about ([\d,]+), of which [\d,]+ supervised \((\d.\d\d) epochs\)", said)
    # 20 of 40 rows from each of a file of 30 and one of 10
    assert int(tokens[0].replace(",", "")) == pytest.approx(sum(twice) * float(tokens[1]), rel=0.1)
    assert re.search(
        r"mixture: \S+ 50.0% \(each row 0.67 times an epoch\), \S+few.jsonl 50.0% \(each row 2 times", said
    )


def test_dev_rows_that_say_nothing_and_settings_that_change_nothing_are_warned_of(small, tmp_path, capsys):
    file = Path(small[0]["path"])
    dev = {**small[0], "path": f"{file.parent}/./{file.name[:-1]}?", "split": "train", "separator": "\n"}
    options = {**QUICK, "data.datasets": small, "data.val_datasets": [dev], "data.chat_template": "chatml"}
    options |= {"data.train_on_last_turn_only": True}
    assert main([CONFIG, *gsm8k_overrides(tmp_path / "run", **options), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert f"warning: rows of data.val_datasets {dev['path']} are also trained on" in said
    assert "has the separator '\\n' after prompts; the training rows have ''" in said
    for key in ("chat_template", "train_on_last_turn_only"):
        assert f"warning: data.{key} is for conversations, but no data set has any" in said


def test_data_sets_share_rows_where_they_share_a_file_however_it_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("data/a.jsonl", "data/b.jsonl", "other/a.jsonl"):
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text('{"text": "a"}\n')
    Path("link.jsonl").symlink_to("data/a.jsonl")
    same = [str(tmp_path / "data/a.jsonl"), "./data/a.jsonl", "data", "data/*.jsonl", "link.jsonl"]
    for one, other in itertools.product(same, repeat=2):
        assert sharing_rows([Dataset(one)], [Dataset(other, split="train")])
    for other in ("data/b.jsonl", "other", "data/gone.jsonl", "nothing/*.jsonl", "owner/name"):
        assert not sharing_rows([Dataset("data/a.jsonl")], [Dataset(other)])
    assert sharing_rows([Dataset("owner/name")], [Dataset("owner/name", split="train")])
    assert not sharing_rows([Dataset("owner/name")], [Dataset("owner/name", split="test")])


def test_a_checkpoint_and_a_run_without_an_adapter_are_asked_with_the_template_that_the_run_kept(tmp_path, capsys):
    rows, template, directory = tmp_path / "rows.jsonl", tmp_path / "mine.jinja", tmp_path / "run"
    rows.write_text("\n".join(json.dumps({"instruction": f"Say {i}", "output": f"{i}"}) for i in range(8)))
    template.write_text(TEMPLATES["vicuna"])
    options = {**QUICK, "data.datasets": [{"path": str(rows), "type": "alpaca"}], "data.val_set_size": 2}
    options |= {"data.chat_template": str(template), "output.save_steps": 1}
    assert main([CONFIG, *gsm8k_overrides(directory, **options), f"data.cache_dir={tmp_path / 'cache'}"]) == 0
    assert (directory / "chat_template.jinja").read_text() == TEMPLATES["vicuna"]
    shutil.rmtree(directory / "adapter")

    def losses() -> list[dict[str, float]]:
        found = []
        for arguments in ([directory / "checkpoints" / "step-1"], [directory, "--no-adapter"]):
            capsys.readouterr()
            assert cli.main(["evaluate", *map(str, arguments), "--json"]) == 0
            found.append(json.loads(capsys.readouterr().out))
        return found

    before = losses()
    template.write_text(TEMPLATES["chatml"])
    assert losses() == before
    template.unlink()
    assert losses() == before


def test_the_instances_of_an_instruction_are_not_parted(tmp_path):
    """What is measured on one of them says little if the others were trained on."""
    rows = [
        {"instruction": f"Say {i}", "instances": [{"input": c, "output": f"{i}{c}"} for c in "abc"]} for i in range(20)
    ]
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    options = {**QUICK, "data.datasets": [{"path": str(file), "type": "self_instruct"}], "data.val_set_size": 4}
    config = load_config(
        CONFIG, [*gsm8k_overrides(tmp_path / "run", **options), f"data.cache_dir={tmp_path / 'cache'}"]
    )
    data = load_data(config, check_inputs(config, "none"), ALONE)
    assert len(data.train) + len(data.dev) == 60 and len(data.dev) == 6
    assert not set(data.train.origins) & set(data.dev.origins)


def test_instances_that_are_too_long_are_a_share_of_all_instances(tmp_path, capsys):
    """And not of the rows of the file, which would be 200 %."""
    instances = [{"input": "", "output": "a"}] * 2 + [{"input": "", "output": "a b " * 400}] * 2
    file = tmp_path / "rows.jsonl"
    file.write_text("\n".join(json.dumps({"instruction": f"Say {i}", "instances": instances}) for i in range(20)))
    options = {**QUICK, "data.datasets": [{"path": str(file), "type": "self_instruct"}], "data.val_set_size": None}
    assert main([CONFIG, *gsm8k_overrides(tmp_path / "run", **options), "--dry-run"]) == 0
    assert "warning: 50% of the rows are longer than data.sequence_len" in capsys.readouterr().out


def test_a_long_text_is_split_on_one_side_of_the_dev_rows(tmp_path):
    file = tmp_path / "texts.jsonl"
    file.write_text("\n".join(json.dumps({"text": f"{i} and on and on " * 40}) for i in range(12)))
    options = {**QUICK, "data.datasets": [{"path": str(file), "type": "completion"}], "data.val_set_size": 3}
    options |= {"data.sequence_len": 64, "data.excess_length": "split", "data.cache_dir": str(tmp_path / "cache")}
    config = load_config(CONFIG, gsm8k_overrides(tmp_path / "run", **options))
    data = load_data(config, check_inputs(config, "none"), ALONE)
    assert len(set(data.dev.origins)) < len(data.dev) and not set(data.train.origins) & set(data.dev.origins)


def test_a_mixture_that_loses_a_data_set_to_the_dev_rows_is_refused(small, tmp_path, capsys):
    short = tmp_path / "short.jsonl"
    short.write_text("\n".join(Path(small[0]["path"]).read_text().splitlines()[:2]))
    datasets = [{**small[0], "weight": 1}, {**small[0], "path": str(short), "weight": 1}]
    for seed in range(8):  # some seed holds both rows out
        options = {**QUICK, "data.datasets": datasets, "data.val_set_size": 20, "train.seed": seed}
        if main([CONFIG, *gsm8k_overrides(tmp_path / "run", **options), "--dry-run"]) == 2:
            assert "has a weight but no row of it is left to train on" in capsys.readouterr().err
            return
    pytest.fail("no seed holds both rows out")


def test_a_sample_prompt_that_the_template_refuses_is_said_before_training(small, tmp_path, capsys):
    template = tmp_path / "strict.jinja"
    template.write_text("{{ raise_exception('a system message, please') if messages[0].role != 'system' else 'x' }}")
    options = {**QUICK, "data.chat_template": str(template), "evaluation.sample_prompts": ["Who?"]}
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n')
    options["data.datasets"] = [{"path": str(rows), "type": "alpaca"}]
    assert main([CONFIG, *gsm8k_overrides(tmp_path / "run", **options)]) == 2
    assert "'Who?' cannot be asked" in capsys.readouterr().err


@pytest.mark.parametrize("streaming", [False, True])
def test_special_tokens_written_into_messages_are_warned_of(streaming, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n' * 4 + '{"instruction": "a", "output": "<s>old</s> new"}\n')
    dataset = {"path": str(rows), "type": "alpaca", "streaming": streaming}
    assert main([CONFIG, *gsm8k_overrides(tmp_path / "run", **QUICK, **{"data.datasets": [dataset]}), "--dry-run"]) == 0
    where = "" if streaming else f" (the first is {rows}:5 with <s>)"
    assert f"warning: rows with a special token written out in a message: 1{where};" in capsys.readouterr().out


def test_dev_rows_drawn_from_repeated_rows_are_warned_of(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n' * 3 + '{"instruction": "b", "output": "c"}\n' * 3)
    data = {"data.datasets": [{"path": str(rows), "type": "alpaca"}], "data.val_set_size": 1}
    for drop, is_warned_of in ((False, True), (True, False)):
        options = {**QUICK, **data, "data.drop_duplicates": drop}
        assert main([CONFIG, *gsm8k_overrides(tmp_path / "run", **options), "--dry-run"]) == 0
        assert ("warning: 4 duplicate rows" in capsys.readouterr().out) == is_warned_of


def test_a_template_whose_end_of_turn_is_ordinary_text_is_warned_of(tmp_path, capsys):
    """chatml under a base model: the model would learn to write <|im_end|>, and no client stops at it by itself."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "a", "output": "b"}\n' * 4)
    for template, is_warned_of in (("chatml", True), ("alpaca", False)):
        options = {**QUICK, "data.chat_template": template, "data.datasets": [{"path": str(rows), "type": "alpaca"}]}
        assert main([CONFIG, *gsm8k_overrides(tmp_path / template, **options), "--dry-run"]) == 0
        assert ("answers end with text that is not a single token" in capsys.readouterr().out) == is_warned_of


def test_a_template_that_nobody_named_is_said(tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"instruction": "Say a.", "output": "a"}\n' * 9)
    for template, said in ((None, True), ("chatml", False)):
        options = {**QUICK, "data.datasets": [{"path": str(rows), "type": "alpaca"}], "data.chat_template": template}
        options |= {"data.val_set_size": None, "evaluation.eval_steps": None}
        assert main([CONFIG, *gsm8k_overrides(tmp_path / "run", **options), "--dry-run"]) == 0
        out = capsys.readouterr().out
        assert ("chat template: alpaca, as the tokenizer has none" in out) == said
        assert "frozen (float32)" in out
