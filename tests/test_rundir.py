"""metrics.jsonl, ranks.jsonl and status.json as a run writes them, and what becomes of them when something dies."""

from __future__ import annotations

import contextlib
import json
import shutil
import threading
from types import SimpleNamespace

import pytest
import torch

from sora_llm import checkpoint
from sora_llm.config import load_config
from sora_llm.errors import RunFailed
from sora_llm.report import read_json_lines
from sora_llm.running import rundir, snapshot
from sora_llm.running.run_state import read_status, run_lock
from sora_llm.running.rundir import RunDirectory, environment


def test_a_tracker_that_fails_costs_its_curves_and_not_the_run(tmp_path, capsys):
    told = []

    def tracker(values, step):
        told.append(step)
        if step == 2:
            raise OSError("no space left on device\nand more")

    directory = RunDirectory(tmp_path, is_main=True, tracker=tracker)
    directory.begin(config_yaml="a: 1\n", env={}, total_steps=3)
    for step in (1, 2, 3):
        directory.metrics(step, "dense", {"loss": 1.0})
    assert told == [1, 2] and [line["step"] for line in read_json_lines(tmp_path / "metrics.jsonl")] == [1, 2, 3]
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning:")]
    assert warnings == ["warning: output.report_to: nothing is logged there any more: no space left on device"]


def test_only_the_main_process_writes(tmp_path):
    directory = RunDirectory(tmp_path, is_main=False)
    directory.metrics(1, "dense", {"loss": 1.0})
    directory.ranks(1, {"q": 1}, {})
    directory.status("running")
    assert list(tmp_path.iterdir()) == []


def test_status_follows_the_metrics_with_paths_relative_to_the_directory(tmp_path):
    checkpoint = tmp_path / "checkpoints" / "step-3"
    checkpoint.mkdir(parents=True)
    directory = RunDirectory(tmp_path, is_main=True)
    directory.begin(config_yaml="a: 1\n", env={}, total_steps=9, first_step=3, resumed_from=checkpoint)
    directory.metrics(4, "sparsify", {"loss": 1.0})
    status = json.loads((tmp_path / "status.json").read_text())
    assert (status["state"], status["step"], status["phase"]) == ("running", 4, "sparsify")
    assert status["checkpoint"] == "checkpoints/step-3" and status["adapter"] is None


def test_a_checkpoint_of_another_directory_is_not_in_the_status_but_the_lines_before_it_are(tmp_path):
    elsewhere, here = tmp_path / "a" / "checkpoints" / "step-3", tmp_path / "b"
    elsewhere.mkdir(parents=True)
    lines = [json.dumps({"step": step, "phase": "dense"}) + "\n" for step in range(6)]
    here.mkdir()
    for name in ("metrics.jsonl", "ranks.jsonl"):
        (tmp_path / "a" / name).write_text("".join(lines))
        (here / name).write_text(lines[0] + json.dumps({"step": 1, "phase": "dense", "loss": 9.0}) + "\n")
    directory = RunDirectory(here, is_main=True)
    directory.begin(config_yaml="a: 1\n", env={}, total_steps=9, first_step=3, resumed_from=elsewhere)
    assert json.loads((here / "status.json").read_text())["checkpoint"] is None
    for name in ("metrics.jsonl", "ranks.jsonl"):
        assert (here / name).read_text() == "".join(lines[:4])
        assert (tmp_path / "a" / name).read_text() == "".join(lines)
    copied = shutil.copytree(elsewhere, tmp_path / "backup")
    RunDirectory(here, is_main=True).begin(
        config_yaml="a: 1\n", env={}, total_steps=9, first_step=2, resumed_from=copied
    )
    assert (here / "metrics.jsonl").read_text() == "".join(lines[:3]), "a copy has none of its own"
    RunDirectory(here, is_main=True).begin(config_yaml="a: 1\n", env={}, total_steps=9)
    assert (here / "metrics.jsonl").read_text() == "", "a run that starts over has none"


def test_env_holds_no_secret(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    assert "hf_secret" not in json.dumps(environment(num_processes=1, strategy="none", zero_stage=None))


def test_a_loss_is_told_also_where_the_lock_of_the_dead_is_freed_a_little_later(tmp_path):
    """The kernel closes the files of a killed process one by one: others may hear of it before its lock is free."""
    main = RunDirectory(tmp_path, is_main=True)
    main.begin(config_yaml="a: 1\n", env={}, total_steps=3)
    survivor = RunDirectory(tmp_path, is_main=False)
    with contextlib.ExitStack() as dying:
        dying.enter_context(run_lock(tmp_path))
        threading.Timer(0.5, dying.pop_all().close).start()
        assert survivor.record_lost_process("process 0 died")
    assert read_status(tmp_path)["error"] == "process 0 died"


def test_a_directory_that_was_replaced_is_not_written_any_more(tmp_path):
    """By a run that goes on where another one has begun meanwhile, it would hand out its adapter as the other's."""
    mine, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with run_lock(mine) as lock:
        directory = RunDirectory(mine, is_main=True, lock=lock)
        directory.begin(config_yaml="a: 1\n", env={}, total_steps=3)
        directory.metrics(1, "dense", {"loss": 1.0})
        mine.rename(elsewhere)
        with run_lock(mine) as other:
            for write in (
                lambda: directory.metrics(2, "dense", {"loss": 1.0}),
                lambda: directory.status("finished"),
                directory.require_held,
            ):
                with pytest.raises(RunFailed, match="is no longer the file that this run locked"):
                    write()
            directory.report({})
            assert [path.name for path in mine.iterdir()] == [".lock"] and other.is_held()
    assert read_status(elsewhere)["step"] == 1


def test_the_number_of_processes_never_lies_beside_the_config_of_another_one(tmp_path, monkeypatch):
    """Of a run that went on elsewhere and died between the two files no launch could have gone on."""
    RunDirectory(tmp_path, is_main=True).begin(config_yaml="a: 1\n", env={"num_processes": 1}, total_steps=3)
    real = rundir.write_text_atomically

    def full(path, text):
        if path.name == "env.json":
            raise OSError(28, "No space left on device")
        real(path, text)

    monkeypatch.setattr(rundir, "write_text_atomically", full)
    with pytest.raises(RunFailed, match="free some space and run the same command again"):
        RunDirectory(tmp_path, is_main=True).begin(config_yaml="a: 2\n", env={"num_processes": 2}, total_steps=3)
    assert not (tmp_path / "env.json").exists()


def test_a_finished_run_stays_finished_whoever_dies_afterwards(tmp_path):
    directory = RunDirectory(tmp_path, is_main=True)
    directory.begin(config_yaml="a: 1\n", env={}, total_steps=3)
    directory.status("finished", phase="done")
    assert directory.is_finished and not directory.record_lost_process("process 1 died")
    assert read_status(tmp_path)["state"] == "finished"


def test_the_status_never_names_a_checkpoint_that_was_dropped(tmp_path, monkeypatch):
    """Also where the process dies just then."""
    named = []
    monkeypatch.setattr(checkpoint, "drop_older", lambda folder, _: named.append((folder, read_status(tmp_path))))
    training = SimpleNamespace(
        job=SimpleNamespace(config=load_config("configs/llama7b.yaml"), world=None),
        directory=RunDirectory(tmp_path, is_main=True),
        rounds=None,
        done=4,
        phase="dense",
        tally=SimpleNamespace(pause_clock=lambda: None),
        engine=SimpleNamespace(optimizer_state=lambda: ({}, 4), masters=lambda: {"x": torch.ones(2)}),
        best=None,
    )
    monkeypatch.setattr(snapshot, "state_of", lambda *_: {})
    snapshot.save_checkpoint(training)
    ((folder, status),) = named
    assert folder == tmp_path / "checkpoints/step-4" and status["checkpoint"] == "checkpoints/step-4"
