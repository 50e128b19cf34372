"""Bad input ends with one sentence and exit code 2, and nothing is written."""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import shared
from runs import ACCELERATE, CONFIG, gsm8k_overrides, start
from transformers.modeling_flash_attention_utils import FLASH_ATTENTION_COMPATIBILITY_MATRIX

from sora_llm.data.sources import DatasetSpec, check_paths, read_rows
from sora_llm.errors import UserError
from sora_llm.files import path_errors_as_user_errors
from sora_llm.running import run_state
from sora_llm.train import main


def _dataset(path: Path | str, type_: str = "alpaca", **others: object) -> str:
    return f"data.datasets={json.dumps([{'path': str(path), 'type': type_, **others}])}"


def _file(tmp: Path, name: str, text: str) -> Path:
    path = tmp / name
    path.write_text(text)
    return path


def _dangling(tmp: Path) -> Path:
    link = tmp / "link"
    link.symlink_to("/nowhere")
    return link


def _model(tmp: Path, change: Callable[[Path], object]) -> str:
    """A copy of the small checkpoint that something was done to."""
    folder = tmp / "model"
    shutil.copytree(shared("models/stories260k"), folder)
    folder.chmod(0o755)
    for path in folder.iterdir():
        path.chmod(0o644)
    change(folder)
    return f"model.name_or_path={folder}"


ALPACA_ROW = '{"instruction": "a", "output": "b"}\n'

# what is wrong → (overrides from a scratch folder, what the sentence says)
CASES: dict[str, tuple[Callable[[Path], list[str]], str]] = {
    "unknown key": (lambda tmp: ["sora.rr=3"], "did you mean sora.r"),
    "wrong type": (lambda tmp: ["sora.r=three"], "must be an integer"),
    "rank zero": (lambda tmp: ["sora.r=0"], "must be an integer >= 1"),
    "budget and lambda": (lambda tmp: ["sora.target_rank=4"], "only one of"),
    "neither budget nor lambda": (lambda tmp: ["sora.sparse_lambda=null"], "set exactly one"),
    "negative lambda": (lambda tmp: ["sora.sparse_lambda=-1"], "must be a number >= 0"),
    "too few steps": (
        lambda tmp: ["sora.sparse_lambda=null", "sora.target_rank=4", "sora.consensus_at=0.4", "train.max_steps=4"],
        "train for 8 steps",
    ),
    "cut before anything is learned": (
        lambda tmp: ["sora.dense_ratio=0", "sora.consensus_at=0.25", "train.max_steps=4", "train.warmup_ratio=0.03"],
        "nothing is learned before the cut: 4 steps, cut at 1 (sora.consensus_at 0.25), and the learning "
        "rate is 0 in the first; train for 12 steps",
    ),
    "a last step that learns nothing": (
        lambda tmp: ["sora.dense_ratio=0", "sora.consensus_at=1", "train.max_steps=1", "train.warmup_ratio=0.03"],
        "nothing is learned before the cut: 1 step, cut at 1 (sora.consensus_at 1.0), and the learning rate is 0 in "
        "the first; train for 3 steps",
    ),
    "no such layout": (lambda tmp: ["output.export_layout=onnx"], "padded, ragged, gguf"),
    "4-bit and 8-bit": (lambda tmp: ["quantization.load_in_8bit=true"], "are mutually exclusive"),
    "8-bit under ZeRO-3": (
        lambda tmp: ["quantization.load_in_4bit=false", "quantization.load_in_8bit=true", "distributed.strategy=zero3"],
        "quantization.load_in_8bit under zero3 gives wrong losses; use zero2, or load_in_4bit",
    ),
    "override without a value": (lambda tmp: ["train.max_steps"], "section.key=value"),
    "missing data file": (lambda tmp: [_dataset("nope.jsonl")], "nope.jsonl does not exist"),
    "empty data file": (lambda tmp: [_dataset(_file(tmp, "empty.jsonl", ""))], "is empty"),
    "malformed row": (lambda tmp: [_dataset(_file(tmp, "bad.jsonl", ALPACA_ROW + "{broken\n"))], "bad.jsonl:2"),
    "unknown column": (
        lambda tmp: [_dataset(_file(tmp, "c.jsonl", ALPACA_ROW), columns={"instruction": "frage"})],
        "has no column 'frage'",
    ),
    "every row too long": (lambda tmp: ["data.sequence_len=8"], "are longer than data.sequence_len"),
    "sequence beyond the model": (lambda tmp: ["data.sequence_len=4096"], "has 512 positions"),
    "dev set takes all": (lambda tmp: ["data.val_set_size=100000"], "leaves none to train on"),
    "unknown template": (lambda tmp: ["data.chat_template=nope"], "neither a built-in template"),
    "unknown module": (lambda tmp: ["sora.target_modules=[q_prj]"], "it has down_proj, gate_proj"),
    "no model folder": (lambda tmp: [f"model.name_or_path={tmp / 'nope'}"], "there is no folder"),
    "folder without a model": (lambda tmp: [f"model.name_or_path={tmp}"], "has no config.json"),
    "broken model config": (
        lambda tmp: [_model(tmp, lambda m: (m / "config.json").write_text("{"))],
        "config of model.name_or_path",
    ),
    "damaged weights": (
        lambda tmp: [_model(tmp, lambda m: (m / "model.safetensors").write_bytes(b"x" * 999))],
        "model.safetensors are damaged",
    ),
    "truncated weights": (
        lambda tmp: [_model(tmp, lambda m: _truncate(m / "model.safetensors"))],
        "model.safetensors are damaged",
    ),
    "a layer without weights": (
        lambda tmp: [
            _model(tmp, lambda m: _replace(m / "config.json", '"num_hidden_layers": 5', '"num_hidden_layers": 6'))
        ],
        "lack model.layers.5.input_layernorm.weight and 8 more, which would be random",
    ),
    "no weights": (lambda tmp: [_model(tmp, lambda m: (m / "model.safetensors").unlink())], "holds no weights"),
    "no tokenizer": (
        lambda tmp: [_model(tmp, lambda m: [path.unlink() for path in m.glob("tokenizer*")])],
        "has no tokenizer",
    ),
    "not a decoder": (
        lambda tmp: [_model(tmp, lambda m: (m / "config.json").write_text('{"model_type": "vit"}'))],
        "not a decoder",
    ),
    "revision of a local folder": (lambda tmp: ["model.revision=v2"], "leave it null"),
    "hub id that is not there": (lambda tmp: ["model.name_or_path=nobody/nothing"], "cannot be loaded"),
    "attention that is not installed": (
        lambda tmp: ["model.attn_implementation=flash_attention_2"],
        "attn_implementation flash_attention_2 cannot be used: FlashAttention2 has been toggled on",
    ),
    "tracker that is not installed": (lambda tmp: ["output.report_to=[wandb]"], "pip install wandb"),
    "no name for a repository": (
        lambda tmp: ["output.push_to_hub=true", "output.hub_model_id=a/b/c"],
        "a/b/c' is not a valid name",
    ),
    "a folder that names no repository": (
        lambda tmp: ["output.push_to_hub=true", f"output.output_dir={tmp / 'run--1'}"],
        "set output.hub_model_id",
    ),
    "a repository without an upload": (lambda tmp: ["output.hub_model_id=me/mine"], "set output.push_to_hub to true"),
    "an upload without the hub": (lambda tmp: ["output.push_to_hub=true"], "HF_HUB_OFFLINE"),
    "attention without a backward pass here": (
        lambda tmp: ["model.attn_implementation=flex_attention"],
        "no backward pass of it without a GPU",
    ),
    "output that is not a path": (lambda tmp: ['output.output_dir="a\\0b"'], "cannot contain a NUL character"),
    "an empty text for none": (lambda tmp: ["model.adapter=''"], "is an empty text on the command line"),
    "output behind a dangling link": (
        lambda tmp: [f"output.output_dir={_dangling(tmp)}"],
        "is a link to /nowhere, which does not exist",
    ),
    "output below a file": (lambda tmp: [f"output.output_dir={_file(tmp, 'f', '')}/run"], "is a file"),
    "output on a read-only place": (lambda tmp: ["output.output_dir=/proc/run"], "cannot be written"),
    "a folder without a checkpoint": (lambda tmp: [f"output.resume={tmp}"], "has no COMPLETE"),
    "no such checkpoint": (lambda tmp: [f"output.resume={tmp / 'nope'}"], "folder of a checkpoint"),
    "no step to prune in": (
        lambda tmp: ["sora.consensus_at=1.0", "sora.dense_ratio=0.99999999999999999"],
        "dense_ratio",
    ),
    "deepspeed config without ZeRO": (lambda tmp: ["distributed.deepspeed_config=x.json"], "the strategy is none"),
    "missing deepspeed config": (
        lambda tmp: ["distributed.strategy=zero2", "distributed.deepspeed_config=x.json"],
        "x.json cannot be read",
    ),
    "contradicting deepspeed config": (
        lambda tmp: [
            "distributed.strategy=zero2",
            f"distributed.deepspeed_config={_file(tmp, 'd.json', json.dumps({'zero_optimization': {'stage': 3}}))}",
        ],
        "zero_optimization.stage to 3",
    ),
}


TOO_LONG = f"/{'x' * 300}/y"
"""A path that the file system refuses to look at, also for root."""

CASES |= {
    f"{key} out of reach": (lambda tmp, key=key: [f"{key}={TOO_LONG}"], "File name too long")  # type: ignore[misc]
    for key in (
        *("model.name_or_path", "model.adapter", "data.chat_template", "data.cache_dir"),
        *("output.output_dir", "output.resume", "data.datasets.0.path"),
    )
}


def _replace(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.unlink()  # perhaps a link
    path.write_text(text.replace(old, new))


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("case", CASES)
def test_bad_input_is_a_sentence_and_exit_code_2(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a machine without a GPU, wandb or flash-attn, whatever this one has."""
    overrides, expected = CASES[case]
    monkeypatch.setattr("sora_llm.running.assembly.load_backbone", _must_not_load)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("sora_llm.running.inputs.find_spec", lambda name: None if name == "wandb" else find_spec(name))
    monkeypatch.setitem(FLASH_ATTENTION_COMPATIBILITY_MATRIX[2], "general_availability_check", lambda: False)
    monkeypatch.setitem(FLASH_ATTENTION_COMPATIBILITY_MATRIX[2], "pkg_availability_check", lambda: False)
    directory = tmp_path / "run"
    assert main([CONFIG, *gsm8k_overrides(directory), *overrides(tmp_path)]) == UserError.exit_code
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1 and "Traceback" not in message
    assert not directory.exists()


def _must_not_load(*_args: object, **_options: object) -> None:
    raise AssertionError("a model was loaded before the input was found to be bad")


def test_a_config_cannot_run_code(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trap = tmp_path / "trap"
    config = _file(tmp_path, "evil.yaml", f"model: !!python/object/apply:os.system ['touch {trap}']\n")
    assert main([str(config)]) == UserError.exit_code
    assert "can run code" in capsys.readouterr().err and not trap.exists()


@pytest.mark.parametrize("config", ["configs/nope.yaml", "configs"])
def test_a_config_that_is_no_file(config: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([config]) == UserError.exit_code
    assert "config file" in capsys.readouterr().err


def test_nothing_in_an_existing_folder_is_touched(tmp_path: Path) -> None:
    directory = tmp_path / "mine"
    directory.mkdir()
    (directory / "notes.txt").write_text("mine")
    assert main([CONFIG, *gsm8k_overrides(directory), "data.sequence_len=8"]) == UserError.exit_code
    assert [path.name for path in directory.iterdir()] == ["notes.txt"]


@pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's place for a moment, which root alone may")
def test_a_folder_of_data_that_may_not_be_listed_is_no_empty_one(tmp_path: Path) -> None:
    """Nor is one with such a folder in it: its rows would be missing in silence."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)
        _file(folder, "rows.jsonl", ALPACA_ROW).chmod(0o644)
        (folder / "more").mkdir(mode=0o700)
        os.seteuid(65534)
        try:
            for place in (folder, folder / "more", folder / "more" / "rows.jsonl"):
                with (
                    pytest.raises(UserError, match=r"more cannot be used: Permission denied|rows.jsonl cannot be used"),
                    path_errors_as_user_errors(),
                ):
                    check_paths([DatasetSpec(str(place), "alpaca")])
        finally:
            os.seteuid(0)


def test_a_wrong_flag_is_said_by_one_of_several_processes(capsys, monkeypatch) -> None:
    """The others wait meanwhile, and their launcher ends them."""
    waited: list[str] = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setattr("sora_llm.train.defer_to_main", functools.partial(waited.append, rank))
        assert main(["--max-steps", "5"]) == UserError.exit_code
        assert "see " in capsys.readouterr().err
    assert waited == ["1"]


def test_a_directory_in_use_is_refused_with_its_holder(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_state, "LOCK_WAIT_SECONDS", 1.5)
    monkeypatch.setattr("sora_llm.running.assembly.load_backbone", _must_not_load)
    with run_state.run_lock(tmp_path / "run"):
        assert main([CONFIG, *gsm8k_overrides(tmp_path / "run")]) == UserError.exit_code
    said = capsys.readouterr()
    assert "in use by process" in said.err and "waiting up to 1.5 s" in said.out


@pytest.mark.parametrize(
    ("made", "said"),
    [
        ("adapter_config.json", "holds adapter_config.json, so it belongs to an adapter"),
        ("model.safetensors", "holds model.safetensors, so it belongs to an adapter"),
        ("COMPLETE", "holds COMPLETE, so it belongs to an adapter"),
        ("metrics.jsonl/", r"metrics.jsonl is a folder there"),
        ("checkpoints", "checkpoints is a file there, but a run writes a folder of that name"),
    ],
)
def test_a_run_is_not_mixed_with_what_lies_in_its_directory(tmp_path, capsys, monkeypatch, made, said) -> None:
    monkeypatch.setattr("sora_llm.running.assembly.load_backbone", _must_not_load)
    path = tmp_path / "run" / made
    path.parent.mkdir()
    path.mkdir() if made.endswith("/") else path.write_text("{}")
    assert main([CONFIG, *gsm8k_overrides(tmp_path / "run")]) == UserError.exit_code
    assert said in capsys.readouterr().err
    assert [other.name for other in (tmp_path / "run").iterdir()] == [path.name]


def test_a_run_does_not_write_into_its_data(tmp_path, capsys) -> None:
    """The folder is read whole: what the run writes there would be rows the next time."""
    _file(tmp_path, "rows.jsonl", ALPACA_ROW)
    assert main([CONFIG, *gsm8k_overrides(tmp_path / "run"), _dataset(str(tmp_path))]) == UserError.exit_code
    assert "is in" in (said := capsys.readouterr().err) and "all of which is read as data" in said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference data is not supported"),
        ({"messages": []}, "type messages fits"),
        ({" instruction": "a", "answer": "b"}, "it has ' instruction', answer: name the right one in columns"),
        ({"instruction": "a", "answer": "b"}, "it has answer, instruction: name the right one in columns"),
    ],
)
def test_rows_of_another_type_are_told_which_one_fits(tmp_path, row, said) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row))
    with pytest.raises(UserError, match=re.escape(said)):
        list(read_rows(DatasetSpec(str(file), "alpaca")))


def test_several_processes_print_it_once(tmp_path: Path) -> None:
    """More processes than rows, found only when the data has been read: every process stops, one speaks."""
    rows = _file(tmp_path, "one.jsonl", ALPACA_ROW)
    launcher = (*ACCELERATE, "--num_processes", "2", "--multi_gpu", "-m", "sora_llm.train")
    arguments = [CONFIG, *gsm8k_overrides(tmp_path / "run", **{"data.val_set_size": None}), _dataset(rows)]
    stopped = start(launcher, arguments, tmp_path / "run")
    assert stopped.returncode != 0
    assert stopped.stderr.count("fewer than the 2 processes") == 1
    assert "sora_llm/train.py" not in stopped.stderr  # no traceback of ours; the launcher prints its own
    assert not (tmp_path / "run").exists()


def test_a_launcher_that_starts_one_of_two_processes_is_refused(tmp_path: Path) -> None:
    """As accelerate does on a machine without a GPU: the run would be half as wide as its config says, in silence."""
    launcher = (*ACCELERATE, "--cpu", "--num_processes", "2", "-m", "sora_llm.train")
    stopped = start(launcher, [CONFIG, *gsm8k_overrides(tmp_path / "run")], tmp_path / "run")
    assert stopped.returncode != 0 and "started only this one" in stopped.stderr
    assert not (tmp_path / "run").exists()


def test_a_machine_with_other_data_is_refused(tmp_path, capsys, monkeypatch) -> None:
    """Each machine reads its own files: other rows there would be another run, in silence."""
    monkeypatch.setattr("sora_llm.running.assembly.load_backbone", _must_not_load)
    monkeypatch.setattr(
        "sora_llm.running.processes.gather_objects",
        lambda value: [value, value | {"digest": "other"} if "digest" in value else value],
    )
    assert main([CONFIG, *gsm8k_overrides(tmp_path / "run")]) == UserError.exit_code
    message = capsys.readouterr().err
    assert "data.datasets is not the same everywhere: process 1 differs" in message and message.count("\n") == 1


def test_what_only_another_process_finds_is_said_by_it(tmp_path, capsys, monkeypatch) -> None:
    """A file that is missing on the second machine only: the main process waits for it in vain."""
    waited = []
    monkeypatch.setattr("sora_llm.train.defer_to_main", lambda: waited.append(True))
    for name, value in {"RANK": "1", "LOCAL_RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert main([CONFIG, *gsm8k_overrides(tmp_path / "run"), _dataset("nope.jsonl")]) == UserError.exit_code
    assert waited and "nope.jsonl does not exist" in capsys.readouterr().err
