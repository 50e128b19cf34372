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
from helpers import perturb
from runs import QUESTIONS
from small_runs import CONFIG, Playground, checkpoints, overrides, status
from spawn import launched, spawn

from sora_llm import train
from sora_llm.distributed.collectives import gather_objects, is_timeout
from sora_llm.errors import RunFailed, UserError
from sora_llm.running import processes
from sora_llm.train import run


def said_by_two(ground: Playground, name: str, *options: dict[str, Any]) -> str:
    """What the main one of two processes with options of their own says, which both have to end with bad input."""
    calls = [ground.call(name, 2, **own) for own in options]
    children = [ground.nursery.start("faults:trainer", *call) for call in zip(calls, launched(2), strict=True)]
    assert [child.wait() for child in children] == [2, 2], children[0].output
    assert not ground.run_dir(name).exists()
    return children[0].output


def test_another_config_on_one_process_is_refused(ground: Playground) -> None:
    """Under ZeRO every process would step its shard by its own learning rate, and the adapter pass its self-check."""
    said = said_by_two(ground, "configs", {}, {"train.learning_rate": 1e-4, "sora.dense_ratio": 0.2})
    assert "the config of process 1 differs from the main process's in sora.dense_ratio, train.learning_rate" in said


def test_other_shares_of_a_mixture_on_one_process_are_refused(ground: Playground) -> None:
    """The rows are the same, their order would not be; files may lie elsewhere on another machine."""
    rows = {"path": str(ground.folder / "rows.jsonl"), "weight": 1, **QUESTIONS}
    other = ground.folder / "elsewhere.jsonl"
    shutil.copyfile(rows["path"], other)
    ours, theirs = (
        {"data.datasets": [rows, {**rows, "path": path, "weight": weight}]}
        for path, weight in ((rows["path"], 1), (str(other), 3))
    )
    said = said_by_two(ground, "mixtures", ours, theirs)
    assert "the main process's in data.datasets.1.weight;" in said


def test_another_base_on_one_process_is_refused(ground: Playground, stories: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(stories, other)
    perturb(other)
    said = said_by_two(ground, "bases", {"model.name_or_path": str(stories)}, {"model.name_or_path": str(other)})
    assert "model.name_or_path is not the same everywhere: process 1 differs from process 0" in said


def test_a_run_directory_that_machines_do_not_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would train to its end, and fail there: what is exported is read back by all."""
    processes.require_shared(tmp_path)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(processes, "_VISIBLE_SECONDS", 0.3)
    monkeypatch.setattr(processes, "on_main", lambda action: ".what-another-machine-wrote.tmp")
    with pytest.raises(UserError, match="is not the folder that the main process writes"):
        processes.require_shared(tmp_path)


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
