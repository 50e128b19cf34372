"""`sora-llm evaluate`: the loss that transformers and PEFT have on the same tokens, whatever names model and data."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from evaluating import COLUMNS, FORM, ROWS, evaluated, numbers_run
from evaluating import rows as rows
from peft import PeftModel
from peft_loras import lora as lora
from run_dirs import run_dir
from runs import CONFIG, gsm8k_overrides
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sora_llm import cli
from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.data.prompts import served_template


@torch.no_grad()
def reference(stories: Path, lora: Path) -> dict[str, float]:
    """Mean cross-entropy of base and adapter over the completions and their eos."""
    tokenizer = AutoTokenizer.from_pretrained(stories)
    base = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)

    def loss(model: Any) -> float:
        total, count = 0.0, 0
        for prompt, completion in ROWS:
            ids = [*tokenizer(prompt + completion).input_ids, tokenizer.eos_token_id]
            start = len(tokenizer(prompt).input_ids)
            logits = model(torch.tensor([ids])).logits[0, start - 1 : -1]
            total += float(torch.nn.functional.cross_entropy(logits, torch.tensor(ids[start:]), reduction="sum"))
            count += len(ids) - start
        return total / count

    return {"base": loss(base), "adapter": loss(PeftModel.from_pretrained(base, str(lora)).eval())}


def test_any_lora_is_measured_on_any_data_set(stories, lora, rows, capsys):
    found, expected = evaluated(capsys, lora, "--data", rows, *FORM), reference(stories, lora)
    assert expected["base"] != pytest.approx(expected["adapter"], rel=1e-3)
    for name, loss in expected.items():
        assert found[name]["loss"] == pytest.approx(loss, rel=1e-5)
    assert found["rows"] == 3


def test_the_first_rows_alone_are_measured_where_that_is_asked_for(lora, rows, tmp_path, capsys):
    head = tmp_path / "head.jsonl"
    head.write_text("".join(rows.read_text().splitlines(keepends=True)[:2]))
    whole = evaluated(capsys, lora, "--data", head, *FORM)
    found = evaluated(capsys, lora, "--data", rows, *FORM, "--max-rows", 2)
    assert found.pop("rows_in_all") == 3 and found == whole
    assert evaluated(capsys, lora, "--data", head, *FORM, "--max-rows", 3) == whole
    assert cli.main(["evaluate", str(lora), "--data", str(rows), *FORM, "--max-rows", "2"]) == 0
    assert "the first 2 of 3 rows" in capsys.readouterr().out


def test_a_run_is_measured_with_its_adapter_on_its_rows_or_others(stories, lora, rows, tmp_path, capsys):
    expected = reference(stories, lora)
    own = {"path": str(rows), "type": "prompt_completion", "columns": {"prompt": "q", "completion": "a"}}
    run = run_dir(tmp_path / "run", **{"data.datasets": [own], "data.val_datasets": [own], "data.val_set_size": None})
    assert cli.main(["evaluate", str(run)]) == 2
    assert "has no adapter yet" in capsys.readouterr().err
    assert "adapter" not in evaluated(capsys, run / "config.yaml"), "a config may be of a run that is still to come"
    (run / "adapter").symlink_to(lora)
    for place in (run, run / "config.yaml", run / "adapter"):
        found = evaluated(capsys, place)
        assert found["adapter"]["loss"] == pytest.approx(expected["adapter"], rel=1e-5), place
    assert "adapter" not in evaluated(capsys, run, "--no-adapter")
    moved = rows.rename(rows.with_name("moved.jsonl"))
    try:  # the form is that of the run's own rows, which are gone
        found = evaluated(capsys, run, "--data", moved)
    finally:
        moved.rename(rows)
    assert found["adapter"]["loss"] == pytest.approx(expected["adapter"], rel=1e-5)


def test_the_separator_is_known_of_an_exported_adapter_whatever_its_first_data_set_was(lora, rows, tmp_path, capsys):
    own = {"path": str(rows), "type": "prompt_completion", "columns": COLUMNS, "separator": " =>"}
    text = {"path": str(tmp_path / "text.jsonl"), "type": "completion"}
    (tmp_path / "text.jsonl").write_text(json.dumps({"text": "Once upon a time"}) + "\n")
    run = numbers_run(tmp_path, lora, **{"data.datasets": [text, own], "data.val_set_size": None})
    assert cli.main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    expected = evaluated(capsys, lora, "--data", rows, *FORM, "--separator", " =>")
    found = evaluated(capsys, tmp_path / "out", "--data", rows, *FORM)["adapter"]
    assert found == pytest.approx(expected["adapter"], rel=1e-5)  # float32 sums; perplexity is the loss's exponential
    assert evaluated(capsys, lora, "--data", rows, *FORM)["adapter"] != pytest.approx(expected["adapter"], rel=1e-4)


def test_what_became_of_the_rows_of_a_file_is_said(lora, rows, tmp_path, capsys):
    longer = tmp_path / "longer.jsonl"
    longer.write_text(rows.read_text() + json.dumps({"q": "Once upon", "a": " a time" * 400}) + "\n")
    found = evaluated(capsys, lora, "--data", longer, *FORM)
    assert found["rows"] == 3 and found["not_as_written"] == ["left out 1 too long"]
    assert cli.main(["evaluate", str(lora), "--data", str(longer), *FORM]) == 0
    assert "of the rows of the files: left out 1 too long" in capsys.readouterr().out
    assert evaluated(capsys, lora, "--data", rows, *FORM)["not_as_written"] == []


def test_a_run_is_spoken_to_as_in_training_whatever_became_of_its_template_file(stories, lora, tmp_path, capsys):
    rows, template = tmp_path / "rows.jsonl", tmp_path / "mine.jinja"
    rows.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in ROWS))
    template.write_text(TEMPLATES["vicuna"].replace("USER", "CHILD"))
    data = {"data.datasets": [{"path": str(rows), "type": "alpaca"}], "data.val_set_size": 1}
    run = run_dir(tmp_path / "run", **data, **{"data.chat_template": str(template)})
    shutil.copytree(lora, run / "adapter")
    before = evaluated(capsys, run)  # nothing lies beside the adapter yet: the file is read
    beside = served_template(AutoTokenizer.from_pretrained(stories), template.read_text())
    (run / "adapter" / "chat_template.jinja").write_text(beside)
    template.write_text(TEMPLATES["chatml"])
    for place in (run, run / "adapter", run / "config.yaml"):
        assert evaluated(capsys, place) == before, place
    assert evaluated(capsys, run, f"data.chat_template={template}") != before, "asked for by name"
    template.unlink()
    assert evaluated(capsys, run) == before


@pytest.mark.filterwarnings("ignore")
def test_a_loss_that_is_no_number_is_said_and_not_printed_as_one(lora, rows, tmp_path, capsys):
    broken = Path(shutil.copytree(lora, tmp_path / "broken"))
    tensors = load_file(broken / "adapter_model.safetensors")
    save_file({name: tensor * 1e30 for name, tensor in tensors.items()}, broken / "adapter_model.safetensors")
    assert cli.main(["evaluate", str(broken), "--data", str(rows), *FORM, "--json"]) == 1
    heard = capsys.readouterr()
    assert "the loss is nan" in heard.err and not heard.out


@pytest.mark.parametrize(
    ("kept", "said"),
    [
        (lambda name: False, "holds no tensors"),
        (lambda name: "layers.1.mlp.down_proj.lora_B" not in name, "layers.1.mlp.down_proj has lora_A and no lora_B"),
        (lambda name: "layers.1.mlp.down_proj.lora_A" not in name, "layers.1.mlp.down_proj has lora_B and no lora_A"),
    ],
)
def test_an_adapter_without_all_its_factors_is_not_measured_as_if_it_were_whole(
    lora, rows, tmp_path, capsys, kept, said
):
    """PEFT leaves what a file lacks as it was initialised, so that the loss is the base's, or nearly."""
    folder = Path(shutil.copytree(lora, tmp_path / "part"))
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({name: t for name, t in tensors.items() if kept(name)}, folder / "adapter_model.safetensors")
    assert cli.main(["evaluate", str(folder), "--data", str(rows), *FORM]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"target_modules": "("}, "is not the config of a LoRA"),
        ({"target_modules": 5}, "target_modules is 5"),
        ({"layers_to_transform": "x"}, "layers_to_transform is 'x'"),
    ],
)
def test_targets_that_cannot_be_compared_with_a_name_are_a_sentence_of_every_command(
    lora, rows, tmp_path, capsys, options, said
):
    folder = Path(shutil.copytree(lora, tmp_path / "edited"))
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | options))
    run = numbers_run(tmp_path, folder)
    for command in (["evaluate", "--data", str(rows), *FORM], ["generate", "--prompt", "Once", "--raw"], ["inspect"]):
        assert cli.main([command[0], str(folder), *command[1:]]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["generate", str(run), "--prompt", "Once"]) == 2, "a run's own as well"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("certificate", "said"),
    [
        ('{"sha256": "0000"}', "is not what its certificate.json was written for"),
        ('{"sha256": ', "certificate.json is damaged"),
        ("[]", "certificate.json is damaged"),
        ("[" * 100_000, "certificate.json is damaged"),
    ],
)
def test_an_adapter_is_not_measured_beside_a_certificate_of_another_or_one_that_cannot_be_read(
    lora, rows, tmp_path, capsys, certificate, said
):
    folder = Path(shutil.copytree(lora, tmp_path / "changed"))
    (folder / "certificate.json").write_text(certificate)
    for command in (["evaluate", "--data", str(rows), *FORM], ["generate", "--prompt", "Once", "--raw"]):
        assert cli.main([command[0], str(folder), *command[1:]]) == 2
        assert said in capsys.readouterr().err


def test_another_adapter_is_any_of_the_same_base(stories, lora, rows, tmp_path, capsys):
    own = {"path": str(rows), "type": "prompt_completion", "columns": {"prompt": "q", "completion": "a"}}
    gone = {**own, "path": str(tmp_path / "gone.jsonl")}  # what a run trained on need not be there any more
    data = {"data.datasets": [gone], "data.val_datasets": [own], "data.val_set_size": None}
    first, second = (run_dir(tmp_path / name, **data) for name in ("first", "second"))
    assert cli.main(["evaluate", str(first), "--adapter", str(second)]) == 2
    assert "has no adapter yet" in capsys.readouterr().err
    shutil.copytree(lora, second / "adapter")
    expected = evaluated(capsys, second)
    for other in (second, second / "adapter", lora):
        assert evaluated(capsys, first, "--adapter", other) == expected, other
    copy = shutil.copytree(stories, tmp_path / "copy")
    settings = json.loads((lora / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(copy)}
    stranger = Path(shutil.copytree(lora, tmp_path / "stranger"))
    (stranger / "adapter_config.json").write_text(json.dumps(settings))
    assert cli.main(["evaluate", str(first), "--adapter", str(stranger)]) == 2
    assert f"is for the base {copy}, {first} for {stories}" in capsys.readouterr().err
    assert evaluated(capsys, first, "--adapter", stranger, "--base", stories) == expected


def test_other_rows_are_written_as_the_run_wrote_its_own_unless_told_otherwise(lora, rows, tmp_path, capsys):
    """A separator changes the tokens of a prompt, and so the loss."""
    own = {"path": str(rows), "type": "prompt_completion", "columns": {"prompt": "q", "completion": "a"}}
    data = {"data.datasets": [{**own, "separator": "\n"}], "data.val_set_size": None}
    run = run_dir(tmp_path / "run", **data, **{"data.val_datasets": [{**own, "separator": "\n"}]})
    (run / "adapter").symlink_to(lora)
    expected = evaluated(capsys, run)
    assert evaluated(capsys, run, "--data", rows, *FORM) == expected == evaluated(capsys, run, "--data", rows)
    plain = evaluated(capsys, lora, "--data", rows, *FORM)
    assert plain["adapter"]["loss"] != pytest.approx(expected["adapter"]["loss"], rel=1e-3)
    for form in ([], FORM):
        assert evaluated(capsys, run, "--data", rows, *form, "--separator", "") == plain
    assert evaluated(capsys, lora, "--data", rows, *FORM, "--separator", "\n") == expected
    assert cli.main(["evaluate", str(lora), "--data", str(rows), *FORM, "--separator", "\\n", "--json"]) == 0
    assert "a backslash and an n, not a line break" in capsys.readouterr().err
    exported = shutil.copytree(lora, tmp_path / "exported")
    (exported / "certificate.json").write_text(json.dumps({"separator": "\n"}))  # as an export of that run has it
    assert evaluated(capsys, exported, "--data", rows, *FORM)["adapter"]["loss"] == expected["adapter"]["loss"]


def test_a_function_of_ones_own_makes_the_rows_of_another_data_set(lora, tmp_path, capsys, monkeypatch):
    other, alpaca = tmp_path / "other.jsonl", tmp_path / "alpaca.jsonl"
    other.write_text("".join(json.dumps({"ask": q, "say": a}) + "\n" for q, a in ROWS[:2]))
    alpaca.write_text("".join(json.dumps({"instruction": q, "output": a}) + "\n" for q, a in ROWS[:2]))
    (tmp_path / "turns_of_rows.py").write_text(
        "def turns(row):\n"
        "    return [{'role': 'user', 'content': row['ask']}, {'role': 'assistant', 'content': row['say']}]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    template = ["--chat-template", "vicuna"]
    expected = evaluated(capsys, lora, "--data", alpaca, "--type", "alpaca", *template)
    custom = ["--type", "custom", "--function", "turns_of_rows:turns"]
    assert evaluated(capsys, lora, "--data", other, *custom, *template) == expected and expected["rows"] == 2


def test_the_split_of_a_hub_data_set_is_the_one_that_is_named(lora, capsys, monkeypatch):
    def load_dataset(path: str, name: str | None, *, split: str, **_: object) -> datasets.Dataset:
        assert (path, name) == ("owner/rows", "small")
        count = {"train": 1, "test": 2}[split]
        return datasets.Dataset.from_list([dict(zip("qa", row, strict=True)) for row in ROWS[:count]])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = ["--data", "owner/rows", "--name", "small", *FORM]
    assert evaluated(capsys, lora, *hub, "--split", "test")["rows"] == 2
    assert evaluated(capsys, lora, *hub)["rows"] == 1, "train, if none is named"


def test_a_lora_from_elsewhere_is_spoken_to_through_what_it_brings(stories, lora, tmp_path, capsys):
    """As in `generate`: its tokenizer and template before the base's, and no template that nobody named."""
    rows = tmp_path / "alpaca.jsonl"
    rows.write_text(json.dumps({"instruction": "Tell a story.", "output": "Once upon a time."}) + "\n")
    arguments = ["--data", rows, "--type", "alpaca"]
    assert cli.main(["evaluate", str(lora), *map(str, arguments)]) == 2
    assert "comes without one" in capsys.readouterr().err
    expected = evaluated(capsys, lora, *arguments, "--chat-template", "vicuna")
    for kind in ("beside", "tokenizer"):
        folder = Path(shutil.copytree(lora, tmp_path / kind))
        if kind == "tokenizer":
            for name in ("tokenizer.json", "tokenizer_config.json"):
                shutil.copyfile(stories / name, folder / name)
            settings = json.loads((folder / "tokenizer_config.json").read_text())
            settings["chat_template"] = TEMPLATES["vicuna"]
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        else:
            (folder / "chat_template.jinja").write_text(TEMPLATES["vicuna"])
        assert evaluated(capsys, folder, *arguments) == expected
    assert evaluated(capsys, lora, *arguments, "--chat-template", "alpaca") != expected


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give --data FILE"),
        (["--separator", ""], "describe the data set that --data names"),
        (["--data", "{rows}", "--type", "completion", "--separator", " "], "--type prompt_completion only"),
        (
            ["--data", "{rows}", *FORM, "--chat-template", "vicuna"],
            "rows of type prompt_completion are measured without",
        ),
        (
            ["--data", "{rows}", "--type", "completion", "--chat-template", "vicuna"],
            "type completion are measured without",
        ),
        (["--data", "{rows}", *FORM, "--max-rows", "0"], "--max-rows is 0; it must be at least 1"),
        (["--data", "{rows}"], "say what its rows are with --type"),
        (["--type", "alpaca"], "describe the data set that --data names"),
        (["--name", "main"], "describe the data set that --data names"),
        (["--split", "test"], "describe the data set that --data names"),
        (["--function", "module:function"], "describe the data set that --data names"),
        (["--data", "{rows}", *FORM, "--function", "module:function"], "goes with --type custom only"),
        (["--data", "{rows}", *FORM, "--split", "test"], "split 'test' is for hub data sets"),
        (["--data", "{rows}", "--type", "alpaca", "--name", "main"], "name is for hub data sets"),
        (["--data", "{rows}", "--type", "alpaca", "--column", "prompt=q"], "instruction, input, output"),
        (["--data", "{rows}", "--type", "custom"], "--type custom needs --function"),
        (["--data", "/nope.jsonl", "--type", "alpaca"], "/nope.jsonl"),
        (["--data", "{rows}", *FORM, "--adapter", "/nope"], "/nope does not exist"),
        (["--data", "{rows}", *FORM, "--adapter", "/nope", "--no-adapter"], "are mutually exclusive"),
    ],
)
def test_bad_input_is_a_sentence(lora, rows, capsys, arguments, said):
    assert cli.main(["evaluate", str(lora), *(argument.replace("{rows}", str(rows)) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error


def test_evaluate_refuses_an_adapter_that_is_none(tmp_path, capsys):
    assert cli.main(["evaluate", CONFIG, *gsm8k_overrides(tmp_path / "run"), "--adapter", str(tmp_path)]) == 2
    assert "adapter_config.json" in capsys.readouterr().err
