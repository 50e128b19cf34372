"""What a run promises, whatever its settings: drawn at random from all over the schema, on stories260k.

    SORA_TEST_SEEDS=100-200 python -m pytest -m matrix tests/test_random_runs.py

Each case is a run, and the same run again: in other processes, strategies and batches, ended by a fault and restarted.
Both must give one adapter (to the bit, where the split is the same), and its files must agree with each other.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest
from nursery import Nursery
from random_settings import Case, Settings, World, draw_case, draw_commands, write_rows
from safetensors.torch import load_file
from small_runs import MODULES, PREEMPTED, delta_error, lines, result, start_trainers, status, trainer_call

pytestmark = pytest.mark.matrix

FIRST, LAST = map(int, os.environ.get("SORA_TEST_SEEDS", "1-16").split("-"))
COMPARED = {
    *("loss", "eval_loss", "grad_norm", "learning_rate", "gate_learning_rate", "lambda", "mean_rank", "kept_params"),
    *("threshold", "thresholds", "epoch"),
}
TOLERANCE = 1e-3
"""Relative error of ΔW: float32 sums in another order, through up to twelve steps."""
FAILED, REFUSED, KILLED = 1, 2, -9


class Ground:
    """Where the cases run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.datasets = write_rows(folder)
        self.refused: dict[int, bool] = {}
        """Seed → whether its settings do not go together."""
        (folder / "nursery").mkdir()
        self.nursery = Nursery(folder / "nursery", *MODULES, "sora_llm.cli", "sora_llm.commands.cmd_evaluate")

    def train(self, case: Case, run_dir: Path, world: World, fault: Settings | None = None) -> tuple[set[int], str]:
        """Exit codes and output of a run's processes."""
        values = {
            **case.settings,
            **world.settings,
            "data.cache_dir": str(self.folder / "cache"),
            "output.output_dir": str(run_dir),
            "output.logging_steps": 1,
            "output.save_total_limit": None,
            "output.report_to": [],
        }
        overrides = [f"{key}={json.dumps(value)}" for key, value in values.items()]
        call = trainer_call(overrides, run_dir, [] if fault is None else [fault])
        children = start_trainers(self.nursery, world.processes, call)
        codes = {child.wait() for child in children}
        return codes, "\n".join(child.output for child in children)

    def command(self, *arguments: str) -> tuple[int, str]:
        """Exit code and output of `sora-llm arguments… --json`, which may refuse to, but not fail."""
        child = self.nursery.start("sora_llm.cli:main", {"argv": [*arguments, "--json"]})
        code = child.wait()
        assert code in (0, REFUSED) and "Traceback" not in child.output, (arguments, child.output)
        if code:
            print(f"refused: {' '.join(arguments)}: {child.output}")
        return code, child.output

    def answer(self, *arguments: str) -> Any:
        """What a command that must succeed prints."""
        code, output = self.command(*arguments)
        assert code == 0, output
        return json.loads(output[output.index("{\n") :])


@pytest.fixture(scope="module")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ground]:
    ground = Ground(tmp_path_factory.mktemp("random"))
    with ground.nursery:
        yield ground


@pytest.mark.parametrize("seed", range(FIRST, LAST + 1))
def test_a_run_keeps_its_promises(seed: int, ground: Ground, tmp_path: Path) -> None:
    case = draw_case(seed, ground.datasets)
    straight, broken = tmp_path / "straight" / "run", tmp_path / "broken" / "run"
    for run_dir in (straight, broken):
        run_dir.parent.mkdir()
    codes, output = ground.train(case, straight, case.straight)
    ground.refused[seed] = codes == {REFUSED}
    if ground.refused[seed]:
        sentence = output.strip().splitlines()[-1]
        assert "Traceback" not in output, output
        assert not (straight / "checkpoints").exists()
        print(f"| {seed} | refused: {sentence} |")
        pytest.skip(sentence)  # settings may be drawn that do not go together: there is nothing more to compare
    assert codes == {0}, output
    assert_files_agree(straight)
    for world, fault in zip(case.worlds, [*case.faults, None], strict=True):
        codes, output = ground.train(case, broken, world, fault)
        ends = {KILLED, FAILED} if fault is not None and fault["do"] == "KILL" else {PREEMPTED}
        assert codes == {0} or codes <= ends, output
    assert codes == {0}, output
    assert_files_agree(broken)
    assert_same(case, straight, broken)
    assert_evaluated(ground, case, broken)
    for arguments in draw_commands(Random(seed), straight, broken, tmp_path):
        ground.command(*arguments)


def test_few_draws_are_refused(ground: Ground) -> None:
    """Where all were, nothing would have been compared above: of 1-48, ten are.  (Of those of this process.)"""
    if len(ground.refused) < 8:
        pytest.skip("too few were drawn")
    assert sum(ground.refused.values()) <= 0.75 * len(ground.refused), ground.refused


def assert_files_agree(run_dir: Path) -> None:
    """Adapter, certificate, metrics and ranks of a finished run tell one story."""
    metrics, ranks = lines(run_dir, "metrics.jsonl"), lines(run_dir, "ranks.jsonl")
    steps = [line["step"] for line in metrics]
    assert steps == sorted(steps) and status(run_dir)["state"] == "finished"
    factors = load_file(run_dir / "adapter" / "adapter_model.safetensors")
    kept = {
        re.sub(r"^base_model\.model\.|\.lora_A\.weight$", "", name): int(tensor.any(dim=1).sum())
        for name, tensor in factors.items()
        if name.endswith("lora_A.weight")
    }
    assert {name: rank for name, rank in ranks[-1]["ranks"].items() if rank} == {k: v for k, v in kept.items() if v}
    size = 0
    for name, rank in kept.items():
        A, B = (factors[f"base_model.model.{name}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
        size += rank * (A.shape[1] + B.shape[0])
    assert size == metrics[-1]["kept_params"]
    if (budget := metrics[-1].get("budget_params")) is not None:
        assert size <= budget


def assert_same(case: Case, straight: Path, broken: Path) -> None:
    one, other = result(straight), result(broken)
    if case.is_same_split:
        assert other == one
        return
    assert lines(broken, "ranks.jsonl")[-1]["ranks"] == lines(straight, "ranks.jsonl")[-1]["ranks"]
    assert [line["step"] for line in other["metrics"]] == [line["step"] for line in one["metrics"]]
    for theirs, ours in zip(one["metrics"], other["metrics"], strict=True):
        assert ours.keys() == theirs.keys()
        for key in COMPARED & theirs.keys():
            assert ours[key] == pytest.approx(theirs[key], rel=TOLERANCE, abs=1e-6), (key, ours, theirs)
    if any(lines(straight, "ranks.jsonl")[-1]["ranks"].values()):
        assert delta_error(broken, straight) < TOLERANCE


def assert_evaluated(ground: Ground, case: Case, run_dir: Path) -> None:
    """`evaluate` finds the loss that the run has reported."""
    losses = [line["eval_loss"] for line in lines(run_dir, "metrics.jsonl") if "eval_loss" in line]
    assert ground.answer("inspect", str(run_dir))["state"] == "finished"
    if losses:
        found = ground.answer("evaluate", str(run_dir))
        assert found["adapter"]["loss"] == pytest.approx(losses[-1], rel=case.loss_tolerance)
        assert found["base"]["loss"] == pytest.approx(losses[0], rel=case.loss_tolerance)
