"""Whose checkpoint a run goes on from, that it goes on exactly, and that a process can run more than once."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from checkpointed import interrupted as interrupted
from checkpointed import start as start
from conftest import shared
from runs import CONFIG, QUESTIONS, TINY, gsm8k_overrides
from small_runs import DENSE_STEPS, STEPS, Playground, checkpoints, delta_weights, interrupt, overrides, result

from sora_llm import checkpoint, config
from sora_llm.errors import UserError
from sora_llm.report import read_json_lines
from sora_llm.running import run_state, training_loop
from sora_llm.running.rundir import RunDirectory
from sora_llm.running.start import finished_before
from sora_llm.topology import ALONE
from sora_llm.train import run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of four steps with checkpoints at 2 and 4; tests work on copies."""
    directory = tmp_path_factory.mktemp("finished") / "run"
    run(CONFIG, *gsm8k_overrides(directory, **TINY))
    return directory


def _copy(source: Path, target: Path) -> Path:
    shutil.copytree(source, target)
    return target


def test_a_checkpoint_of_another_config_is_refused_even_without_the_files_beside_it(finished, tmp_path):
    directory = _copy(finished, tmp_path / "run")
    for name in ("config.yaml", "env.json", "status.json"):
        (directory / name).unlink()
    adapter = (directory / "adapter" / "adapter_model.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"sora\.lora_alpha"):
        run(CONFIG, *gsm8k_overrides(directory, **TINY, **{"sora.lora_alpha": 99}))
    assert (directory / "adapter" / "adapter_model.safetensors").read_bytes() == adapter


def test_who_dies_while_it_goes_back_to_an_older_checkpoint_has_lost_no_line(finished, tmp_path, monkeypatch):
    """Later checkpoints are set aside before the lines of their steps are dropped, or the next start would find the
    ones without the others."""
    directory = _copy(finished, tmp_path / "run")
    (directory / "status.json").unlink()
    shutil.rmtree(directory / "adapter")
    lines = (directory / "metrics.jsonl").read_text()
    monkeypatch.setattr(RunDirectory, "begin", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        run(CONFIG, *gsm8k_overrides(directory, **TINY, **{"output.resume": str(directory / "checkpoints/step-2")}))
    assert sorted(path.name for path in (directory / "checkpoints").iterdir()) == ["abandoned-step-4", "step-2"]
    assert (directory / "metrics.jsonl").read_text() == lines


def test_a_checkpoint_of_other_data_is_refused(finished, tmp_path):
    directory = _copy(finished, tmp_path / "run")
    (directory / "status.json").unlink()
    for folder in (directory / "checkpoints").iterdir():
        state = json.loads((folder / "state.json").read_text())
        tensors = checkpoint.read_tensors(folder)
        state["data"]["rows"] += 1
        checkpoint.save(directory, state.pop("step"), tensors, state)
    with pytest.raises(UserError, match=r"the rows of data\.datasets \([\d,]+ now, [\d,]+ then\) are not those that"):
        run(CONFIG, *gsm8k_overrides(directory, **TINY))


def test_a_run_takes_what_a_file_would_hold(finished, tmp_path):
    content = yaml.safe_load((finished / "config.yaml").read_text())
    result = run(content, f"output.output_dir={tmp_path / 'run'}")
    assert result.status["state"] == "finished"
    first, second = (folder / "adapter" / "adapter_model.safetensors" for folder in (finished, tmp_path / "run"))
    assert first.read_bytes() == second.read_bytes()
    with pytest.raises(UserError, match=r"sora\.rr in the config that was given is not a key"):
        run({**content, "sora": {"rr": 8}})


def test_a_run_does_not_go_on_with_other_dev_rows(tmp_path):
    """EarlyStopping would compare the losses of two data sets, and choose the adapter by them."""
    lines = shared("data/gsm8k_train.jsonl").read_text().splitlines()
    dev = {"path": str(tmp_path / "dev.jsonl"), **QUESTIONS}
    options = {**TINY, "data.val_set_size": None, "data.val_datasets": [dev], "output.save_total_limit": None}
    Path(dev["path"]).write_text("\n".join(lines[:6]))
    run(CONFIG, *gsm8k_overrides(tmp_path / "run", **options))
    Path(dev["path"]).write_text("\n".join(lines[6:12]))
    start = {"output.resume": str(tmp_path / "run" / "checkpoints" / "step-2")}
    with pytest.raises(UserError, match=r"the rows of data\.val_datasets are not those that .*step-2 was trained on"):
        run(CONFIG, *gsm8k_overrides(tmp_path / "other", **options, **start))


def test_a_checkpoint_of_another_format_is_refused_in_a_sentence(finished, tmp_path):
    directory = _copy(finished, tmp_path / "run")
    (directory / "status.json").unlink()
    for folder in (directory / "checkpoints").iterdir():
        state, tensors = json.loads((folder / "state.json").read_text()), checkpoint.read_tensors(folder)
        del state["format"]
        checkpoint.save(directory, state.pop("step"), tensors, state)
    with pytest.raises(UserError, match="written by another version"):
        run(CONFIG, *gsm8k_overrides(directory, **TINY))


def test_a_checkpoint_from_before_a_key_existed_was_made_with_its_default(finished, tmp_path):
    directory = _copy(finished, tmp_path / "run")
    for name in ("status.json", "config.yaml"):
        (directory / name).unlink()
    for folder in (directory / "checkpoints").iterdir():
        state, tensors = json.loads((folder / "state.json").read_text()), checkpoint.read_tensors(folder)
        del state["config"]["train"]["adam_beta2"]
        checkpoint.save(directory, state.pop("step"), tensors, state)
    with pytest.raises(
        UserError, match=r"belongs to a run with another config: train\.adam_beta2 \(0\.999 there, 0\.95 here\);"
    ):
        run(CONFIG, *gsm8k_overrides(directory, **TINY, **{"train.adam_beta2": 0.95}))
    assert run(CONFIG, *gsm8k_overrides(directory, **TINY)).status["state"] == "finished"


def test_a_run_that_waited_for_the_lock_of_one_that_finished_changes_nothing(finished, tmp_path, monkeypatch):
    """The second start looks at the directory before the first has written anything, then waits."""
    waits = threading.Event()

    def sleep(seconds: float) -> None:
        waits.set()
        time.sleep(seconds)

    monkeypatch.setattr(run_state, "time", SimpleNamespace(monotonic=time.monotonic, sleep=sleep))
    directory = tmp_path / "run"
    lock = run_state.run_lock(directory)
    lock.__enter__()
    results: list[object] = []
    second = threading.Thread(target=lambda: results.append(run(CONFIG, *gsm8k_overrides(directory, **TINY))))
    second.start()
    assert waits.wait(timeout=120), "it has found the lock held"
    shutil.copytree(finished, directory, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
    before = {path: path.stat().st_mtime_ns for path in directory.rglob("*") if path.is_file() and path.name != ".lock"}
    lock.__exit__(None, None, None)
    second.join(timeout=120)
    assert results and results[0].status["state"] == "finished"
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_an_explicit_checkpoint_is_where_the_run_starts(finished, tmp_path):
    directory = tmp_path / "branch"
    start = finished / "checkpoints" / "step-2"
    result = run(CONFIG, *gsm8k_overrides(directory, **TINY, **{"output.resume": str(start)}))
    first, second = (folder / "adapter" / "adapter_model.safetensors" for folder in (finished, directory))
    assert first.read_bytes() == second.read_bytes() and result.metrics["step"] == 4
    for name in ("metrics.jsonl", "ranks.jsonl"):
        ours, theirs = ([line["step"] for line in read_json_lines(folder / name)] for folder in (directory, finished))
        assert ours == theirs, "with those before the checkpoint"
    assert "resume: auto" in (directory / "config.yaml").read_text()  # repeating it does not need that checkpoint


def test_a_run_that_goes_back_to_an_older_checkpoint_leaves_the_later_ones_aside(
    interrupted: Path, start: Callable[..., tuple[int, str]], undisturbed: dict[int, Path]
) -> None:
    """They would count as the newest of those to keep, and the next start would go on from them."""
    folder, limit = interrupted / "checkpoints", {"output.save_steps": 1, "output.save_total_limit": 2}
    assert checkpoints(interrupted)[-1] == "step-4"
    code, output = start(interrupted, **{"output.resume": str(folder / "step-2"), **limit})
    assert code == 0 and f"resuming from {folder / 'step-2'}" in output
    assert result(interrupted) == result(undisturbed[1])
    assert checkpoints(interrupted) == ["abandoned-step-3", "abandoned-step-4", "step-5", "step-6"]
    shutil.copytree(folder / "step-5", folder / "step-3")
    checkpoint.set_aside(interrupted, 2)
    assert "abandoned-step-3.2" in checkpoints(interrupted), "none is deleted for another"


@pytest.mark.parametrize("limit", [pytest.param(None, marks=pytest.mark.matrix), 2])
def test_a_queued_job_that_goes_back_to_a_checkpoint_goes_on_when_it_is_started_again(
    interrupted: Path, start: Callable[..., tuple[int, str]], undisturbed: dict[int, Path], limit: int | None
) -> None:
    """It starts with the arguments that it had, and would never come further than its time limit."""
    folder, options = interrupted / "checkpoints", {"output.save_steps": 1, "output.save_total_limit": limit}
    options |= {"output.resume": str(folder / "step-2")}
    code, _ = start(interrupted, **options)
    assert code == 0 and (folder / "step-2").exists() == (limit is None)
    code, output = start(interrupted, **options)
    assert code == 0 and "already finished" in output and "resuming" not in output
    shutil.rmtree(folder / "step-6")  # as if it had been stopped at step 5
    (interrupted / "status.json").write_text('{"state": "preempted"}')
    shutil.rmtree(interrupted / "adapter")
    code, output = start(interrupted, **options)
    assert code == 0 and f"resuming from {folder / 'step-5'}" in output
    assert result(interrupted) == result(undisturbed[1])


def test_a_run_that_must_not_resume_does_not_take_up_one_that_began_while_it_waited(
    undisturbed: dict[int, Path],
) -> None:
    given = config.load_config(undisturbed[1] / "config.yaml", ["output.resume=never"])
    with pytest.raises(UserError, match="already holds a run"):
        finished_before(SimpleNamespace(config=given), undisturbed[1], ALONE)


def test_a_finished_run_whose_adapter_is_gone_exports_it_again(
    undisturbed: dict[int, Path], tmp_path: Path, start: Callable[..., tuple[int, str]]
) -> None:
    run_dir = Path(shutil.copytree(undisturbed[1], tmp_path / "run"))
    shutil.rmtree(run_dir / "adapter")
    code, output = start(run_dir, **{"output.save_steps": 1})
    assert code == 0 and "resuming from" in output
    assert result(run_dir) == result(undisturbed[1])


@pytest.mark.matrix
def test_the_environment_is_as_it_was_after_a_run_and_other_strategies_can_follow(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # torch leaves it set where it was not
    before = dict(os.environ)
    for number, strategy in enumerate(("zero2", "none", "zero2", "ddp")):
        options = {**TINY, "train.max_steps": 2, "distributed.strategy": strategy}
        run(CONFIG, *gsm8k_overrides(tmp_path / str(number), **options))
        assert dict(os.environ) == before
        assert json.loads((tmp_path / str(number) / "env.json").read_text())["strategy"] == strategy


# ----- exactly the uninterrupted run ----------------------------------------------------------------------------------

INTERRUPTED_AT = (1, DENSE_STEPS + 2, STEPS)
"""In the dense phase, in the sparsify phase, before the export."""

MODES = {
    "a row a sequence": {},
    "packed, accumulated": {
        "output.logging_steps": 2,  # a checkpoint between two lines holds half of the next one's loss
        "data.sample_packing": True,
        "train.per_device_train_batch_size": 1,
        "train.gradient_accumulation_steps": 2,
    },
    "packed": {"data.sample_packing": True},
    "accumulated": {"train.per_device_train_batch_size": 1, "train.gradient_accumulation_steps": 2},
}
QUICK_MODES = ("packed, accumulated",)
DROPOUT = {"sora.lora_dropout": 0.1}
EVERY_STEP = {"output.save_steps": 1, "output.logging_steps": 2}
NO_DROPOUT = {"sora.lora_dropout": 0.0}
"""Where runs with different numbers of processes are compared, whose draws are their own."""


@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=[] if mode in QUICK_MODES else pytest.mark.matrix) for mode in MODES]
)
def test_a_run_interrupted_in_any_phase_ends_with_the_bits_of_one_that_was_not(
    mode: str, ground: Playground, tmp_path: Path
) -> None:
    options = {**MODES[mode], **DROPOUT, "output.save_steps": 1}
    run(CONFIG, *overrides(ground.folder, tmp_path / "straight", **options))
    whole = result(tmp_path / "straight")
    assert {line["phase"] for line in whole["metrics"]} == {"dense", "sparsify", "export"}
    for step in INTERRUPTED_AT:
        run_dir = interrupt(tmp_path / "straight", tmp_path / f"from {step}", step)
        run(CONFIG, *overrides(ground.folder, run_dir, **options))
        assert result(run_dir) == whole, step
        for later in range(step + 1, STEPS + 1):
            name = Path("checkpoints", f"step-{later}", "adapter.safetensors")
            assert (run_dir / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_the_status_of_a_resumed_run_is_that_of_the_steps_it_takes(
    undisturbed: dict[int, Path], ground: Playground, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It said "prepare" until the next line was logged, which may be an hour later."""
    run_dir, found = interrupt(undisturbed[1], tmp_path / "run", DENSE_STEPS + 2), []
    take = training_loop.train_step

    def looking(*arguments: Any, **options: Any) -> Any:
        status = json.loads((run_dir / "status.json").read_text())
        found.append((status["state"], status["step"], status["phase"]))
        return take(*arguments, **options)

    monkeypatch.setattr(training_loop, "train_step", looking)
    run(CONFIG, *overrides(ground.folder, run_dir, **{"output.save_steps": 1, "output.logging_steps": 100}))
    assert found[0] == ("running", DENSE_STEPS + 2, "sparsify")
    assert json.loads((run_dir / "env.json").read_text())["total_steps"] == STEPS


@pytest.fixture(scope="module")
def straight(ground: Playground) -> Callable[[str, int], Path]:
    """The directory of an undisturbed run under a strategy, with a checkpoint of every step."""
    made: dict[tuple[str, int], Path] = {}

    def make(strategy: str, num_processes: int) -> Path:
        if (strategy, num_processes) not in made:
            name = f"straight {strategy}"
            options = {"distributed.strategy": strategy, **EVERY_STEP, **NO_DROPOUT}
            assert ground.codes(name, num_processes, **options) == [0] * num_processes
            made[strategy, num_processes] = ground.run_dir(name)
        return made[strategy, num_processes]

    return make


SEVERAL = [(strategy, step) for strategy in ("ddp", "zero1", "zero2", "zero3") for step in INTERRUPTED_AT]
QUICK = [("ddp", 1), ("zero3", DENSE_STEPS + 2)]  # zero2: test_budget_runs.py


@pytest.mark.parametrize(
    ("strategy", "step"), [pytest.param(*cell, marks=[] if cell in QUICK else pytest.mark.matrix) for cell in SEVERAL]
)
def test_so_does_one_of_several_processes(
    strategy: str, step: int, ground: Playground, straight: Callable[[str, int], Path]
) -> None:
    name = f"resumed {strategy} {step}"
    options = {"distributed.strategy": strategy, **EVERY_STEP, **NO_DROPOUT}
    whole = straight(strategy, 2)
    run_dir = interrupt(whole, ground.run_dir(name), step)
    assert ground.codes(name, 2, **options) == [0, 0]
    assert result(run_dir) == result(whole)


SWITCHES = [
    # the strategy and the number of processes before, and after
    (("ddp", 2), ("zero2", 2)),
    (("zero3", 2), ("none", 1)),
    (("none", 1), ("zero2", 2)),
]


@pytest.mark.parametrize(("before", "after"), SWITCHES, ids=["ddp to zero2", "zero3 to none", "none to zero2"])
def test_a_run_goes_on_with_the_next_sample_under_another_strategy_and_number_of_processes(
    before: tuple[str, int], after: tuple[str, int], ground: Playground, straight: Callable[[str, int], Path]
) -> None:
    step, name = DENSE_STEPS + 1, f"{before[0]} then {after[0]}"
    options = {"distributed.strategy": after[0], **EVERY_STEP, **NO_DROPOUT}
    whole = straight(*before)
    run_dir = interrupt(whole, ground.run_dir(name), step)
    assert ground.codes(name, after[1], **options) == [0] * after[1]
    assert json.loads((run_dir / "env.json").read_text())["strategy"] == after[0]
    ours, theirs = result(run_dir), result(whole)
    assert [line["step"] for line in ours["metrics"]] == [line["step"] for line in theirs["metrics"]]
    for one, other in zip(ours["metrics"], theirs["metrics"], strict=True):
        assert one.get("supervised_tokens") == other.get("supervised_tokens")  # the same rows in every step
        for key in ("loss", "eval_loss", "grad_norm"):
            # float32 sums in another order, of weights that differ by up to DELTA_TOLERANCE after some steps
            assert one.get(key) == (other.get(key) and pytest.approx(other[key], rel=DELTA_TOLERANCE)), (one, other)
    assert ours["ranks"][-1] == theirs["ranks"][-1]
    for module, delta in delta_weights(run_dir).items():
        error = (delta - delta_weights(whole)[module]).norm() / delta.norm().clamp(min=1e-30)
        assert error < DELTA_TOLERANCE, (module, error)


DELTA_TOLERANCE = 1e-5
"""Relative error of a module's ΔW after the last steps: another split of a batch sums in another order (seen: 2e-6)."""
