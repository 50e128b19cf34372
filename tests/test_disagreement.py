"""Processes of one run that were given different things: a sentence before anything is trained, and nothing written;
or that drifted apart: a sentence at the next check, and nothing saved from there on."""

from __future__ import annotations

import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared
from runs import gsm8k_overrides
from safetensors.torch import load_file, save_file
from small_runs import CONFIG, Playground, checkpoints, overrides, status
from spawn import launched, spawn

from sora_llm import cli, train
from sora_llm.artifacts.certificate import Certificate
from sora_llm.base_files import base_digest
from sora_llm.base_spec import BackboneSpec
from sora_llm.distributed.collectives import gather_objects, is_timeout
from sora_llm.errors import RunFailed, UserError
from sora_llm.running import processes
from sora_llm.train import run
from sora_llm.weights_digest import weights_digest

TINY = {"train.max_steps": 4, "sora.r": 2, "quantization.load_in_4bit": False, "model.dtype": "float32"}


def said_by_two(ground: Playground, name: str, *options: dict[str, Any]) -> str:
    """What the main one of two processes with options of their own says, which both have to end with bad input."""
    calls = [ground.call(name, 2, **own) for own in options]
    children = [ground.nursery.start("faults:trainer", *call) for call in zip(calls, launched(2), strict=True)]
    assert [child.wait() for child in children] == [2, 2], children[0].output
    assert not ground.run_dir(name).exists()
    return children[0].output


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a real base."""
    folder = tmp_path_factory.mktemp("base") / "stories"
    shutil.copytree(shared("models/stories260k"), folder)
    return folder


def perturb(base: Path) -> None:
    """As if its weights had been trained on: one number of one layer is another."""
    file = base / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "mlp" in name)
    weights[name][0, 0] += 1.0
    save_file(weights, file, metadata={"format": "pt"})


def test_another_config_on_one_process_is_refused(ground: Playground) -> None:
    """Under ZeRO every process would step its shard by its own learning rate, and the adapter pass its self-check."""
    said = said_by_two(ground, "configs", {}, {"train.learning_rate": 1e-4, "sora.dense_ratio": 0.2})
    assert "the config of process 1 differs from the main process's in sora.dense_ratio, train.learning_rate" in said


def test_other_shares_of_a_mixture_on_one_process_are_refused(ground: Playground) -> None:
    """The rows are the same, their order would not be; files may lie elsewhere on another machine."""
    rows = {"path": str(ground.folder / "rows.jsonl"), "type": "prompt_completion", "weight": 1}
    rows |= {"columns": {"prompt": "question", "completion": "answer"}}
    other = ground.folder / "elsewhere.jsonl"
    shutil.copyfile(rows["path"], other)
    ours, theirs = (
        {"data.datasets": [rows, {**rows, "path": path, "weight": weight}]}
        for path, weight in ((rows["path"], 1), (str(other), 3))
    )
    said = said_by_two(ground, "mixtures", ours, theirs)
    assert "the main process's in data.datasets.1.weight;" in said


def test_another_base_on_one_process_is_refused(ground: Playground, base: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(base, other)
    perturb(other)
    said = said_by_two(ground, "bases", {"model.name_or_path": str(base)}, {"model.name_or_path": str(other)})
    assert "model.name_or_path is not the same everywhere: process 1 differs from process 0" in said


def test_a_run_directory_that_machines_do_not_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would train to its end, and fail there: what is exported is read back by all."""
    processes.require_shared(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(processes, "_VISIBLE_SECONDS", 0.3)
    monkeypatch.setattr(processes, "on_main", lambda action: ".what-another-machine-wrote.tmp")
    with pytest.raises(UserError, match="is not the folder that the main process writes"):
        processes.require_shared(tmp_path)


def test_nothing_goes_on_beside_another_base_in_silence(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a resumed run nor an export; a measurement, an answer and a warm start say so."""
    options = {**TINY, "model.name_or_path": str(base), "output.save_steps": 2, "output.save_total_limit": None}
    run(CONFIG, *gsm8k_overrides(tmp_path / "run", **options))
    before, other = weights_digest([base / "model.safetensors"]), tmp_path / "other"
    perturb(base)
    assert weights_digest([base / "model.safetensors"]) != before
    start = {"output.resume": str(tmp_path / "run" / "checkpoints" / "step-2")}
    with pytest.raises(UserError, match=r"are not those that .*step-2 was trained on"):
        run(CONFIG, *gsm8k_overrides(other, **options, **start))
    assert not other.exists()

    adapter, checkpoint = str(tmp_path / "run" / "adapter"), str(tmp_path / "run" / "checkpoints" / "step-2")
    capsys.readouterr()
    for source in (adapter, checkpoint):
        said = f"the weights of {base} are not those that {source} was trained on"
        out, merged = ["--out", str(tmp_path / "out")], ["--layout", "merged", "--skip-dev-loss"]
        assert cli.main(["export", source, *merged, *out]) == 2 and said in capsys.readouterr().err
        assert cli.main(["consensus", source, source, *out]) == 2 and said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert cli.main(["generate", source, "--prompt", "Tim", "--max-new-tokens", "1"]) == 0
        assert f"warning: {said}" in capsys.readouterr().err
    assert cli.main(["export", adapter, *merged, *out, "--base-model", str(base)]) == 0
    assert f"warning: {said.replace(checkpoint, adapter)}" in capsys.readouterr().err
    restored = ["--base", str(shared("models/stories260k"))]
    assert cli.main(["generate", adapter, "--prompt", "Tim", "--max-new-tokens", "1", *restored]) == 0
    assert "warning" not in capsys.readouterr().err
    run(CONFIG, *gsm8k_overrides(other, **options, **{"model.adapter": adapter}))
    assert f"model.adapter was trained on different weights than those of {base}" in capsys.readouterr().out


def test_what_is_merged_was_trained_beside_what_its_sources_were(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they all were trained beside the same, whatever base it is verified on, and that is said."""
    run(CONFIG, *gsm8k_overrides(tmp_path / "run", **TINY, **{"model.name_or_path": str(base)}))
    adapter, before = str(tmp_path / "run" / "adapter"), weights_digest([base / "model.safetensors"])
    perturb(base)
    out = ["--out", str(tmp_path / "out"), "--base", str(base)]
    assert cli.main(["consensus", adapter, adapter, *out]) == 0 and "are not those that" in capsys.readouterr().err
    assert Certificate.read(tmp_path / "out").base_digest == before


def test_weights_are_the_same_however_they_lie_in_files(tmp_path: Path) -> None:
    weights = {f"layer.{index}": torch.randn(40, 33) for index in range(5)}
    save_file(weights, tmp_path / "whole.safetensors")
    names = sorted(weights)
    for index, part in enumerate((names[:2], names[2:])):
        save_file({name: weights[name] for name in part}, tmp_path / f"{index}.safetensors")
    whole = weights_digest([tmp_path / "whole.safetensors"])
    assert weights_digest([tmp_path / "1.safetensors", tmp_path / "0.safetensors"]) == whole
    for change in ("dtype", "shape", "name", "value"):
        other = dict(weights)
        if change == "dtype":
            other["layer.3"] = weights["layer.3"].view(torch.int32)
        elif change == "shape":
            other["layer.3"] = weights["layer.3"].reshape(33, 40)
        elif change == "name":
            other["layer.9"] = other.pop("layer.3")
        else:
            other["layer.3"] = weights["layer.3"].clone()
            other["layer.3"][-1, -1] += 1e-3
        save_file(other, tmp_path / "other.safetensors")
        assert weights_digest([tmp_path / "other.safetensors"]) != whole, change


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    "content", [LFS_POINTER, b"", (8).to_bytes(8, "little") + b"no json!", (2).to_bytes(8, "little") + b"[]"]
)
def test_what_is_no_file_of_safetensors_has_no_digest(content: bytes, tmp_path: Path) -> None:
    """The first letters of a pointer of git-lfs, as a length, are more bytes than any memory has."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"is no safetensors file.*git lfs pull"):
        weights_digest([tmp_path / "model.safetensors"])
    with pytest.raises(UserError, match=r"cannot be read: .*is no safetensors file"):
        base_digest(BackboneSpec(str(tmp_path)))


@pytest.mark.parametrize(("strategy", "at"), [("ddp", 3), ("zero2", 4)])
def test_processes_that_drift_apart_are_stopped_at_the_next_check(ground: Playground, strategy: str, at: int) -> None:
    """Between two checks it goes on under DDP; under ZeRO-2 the step that is checked would overwrite the wrong copy."""
    name, faults = f"drift {strategy}", [{"place": "step", "nth": at, "process": 1, "do": "corrupt"}]
    options = {"distributed.strategy": strategy, "distributed.check_every": 2, "output.save_steps": 1}
    children = ground.start(name, 2, faults, **options)
    assert [child.wait() for child in children] == [1, 1], children[0].output
    said = status(ground.run_dir(name))["error"]
    assert "process 1" in said and "model.layers.0.self_attn.q_proj.lora_A" in said
    assert children[0].output.count(f"sora_llm: {said}") == 1
    assert checkpoints(ground.run_dir(name)) == ["step-1", "step-2", "step-3"]


def meet(seconds: float) -> str | None:
    """What the first process makes of a second one that comes so late, where two seconds are waited for."""
    torch.distributed.init_process_group("gloo", timeout=timedelta(seconds=2))
    if torch.distributed.get_rank() == 1:
        time.sleep(seconds)
        return None
    assert not is_timeout(RunFailed("the checkpoint could not be saved (Connection timed out)"))
    try:
        gather_objects(1)
    except Exception as error:
        return str(processes.timeout_failure(1, 0.5)) if is_timeout(error) else repr(error)
    return "nothing"


def test_processes_that_do_not_come_are_told_in_a_sentence() -> None:
    assert "process 1 waited 0.5 minutes" in spawn("test_disagreement:meet", 2, {"seconds": 8})[0]


def test_the_sentence_has_the_timeout_of_the_config(
    ground: Playground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait_in_vain(*_: object) -> None:
        raise RuntimeError("Timed out waiting 420000ms for recv operation to complete")

    monkeypatch.setattr(train, "load_and_inject", wait_in_vain)
    monkeypatch.setattr(train, "is_timeout", lambda error: "Timed out" in str(error))  # a process alone has no group
    with pytest.raises(RunFailed, match=r"process 0 waited 7 minutes \(distributed\.timeout_minutes\)"):
        run(CONFIG, *overrides(ground.folder, tmp_path / "run", **{"distributed.timeout_minutes": 7}))
    assert "waited 7 minutes" in status(tmp_path / "run")["error"]
