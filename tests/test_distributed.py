"""One algorithm under every strategy, with real processes: equal results, sharded state, agreed steps, proven copies.

Each strategy has one world of processes (`worlds.strategy_world`), started once for all tests of this file; the tests
read its report.  The full matrix of strategy × phase × precision is in test_matrix.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared
from spawn import WorkerError, spawn, warm_deepspeed
from strategies import (
    ACCELERATE,
    DELTA_TOLERANCE,
    EVALUATIONS,
    SEVERAL,
    SHORT_RUN,
    STRATEGIES,
    ZERO,
    delta_error,
    train_under,
    whole_error,
    zero_pattern,
)
from strategies import folder as folder
from strategies import run_config as run_config
from worlds import NUM_STEPS, SHORT

IN_THE_ORDINARY_RUN = STRATEGIES[:4]  # zero1 is zero2's code but for who adds gradients up
IN_NF4 = ("none", "zero2")  # the others: test_matrix.py
WORLD_TIMEOUT = 900  # seconds; about 60 on an idle machine with 2 cores
pytestmark = pytest.mark.timeout(3 * WORLD_TIMEOUT)  # a test may be the first to ask for two of them

Worlds = Callable[[str], list[dict[str, Any]]]


def cases(cells: Iterable[Any]) -> list[Any]:
    """Parameters of a test, strategies or tuples with some; what is not in the ordinary run goes to the matrix."""

    def ordinary(cell: tuple[Any, ...]) -> bool:
        return not set(STRATEGIES).difference(IN_THE_ORDINARY_RUN).intersection(cell)

    values = [(cell,) if isinstance(cell, str) else cell for cell in cells]
    return [pytest.param(*value, marks=[] if ordinary(value) else pytest.mark.matrix) for value in values]


@pytest.fixture(scope="module")
def worlds(folder: Path, run_config: Path) -> Worlds:
    """The report of each process of a strategy's world, which runs when it is first asked for, after `none`'s."""
    models, data = str(shared("models/base5m").parent), str(shared("data/gsm8k_train.jsonl"))
    reports: dict[str, list[dict[str, Any]]] = {}
    failed: dict[str, WorkerError] = {}

    def report(strategy: str) -> list[dict[str, Any]]:
        if strategy in failed:
            raise failed[strategy]  # not a minute for each of its tests
        if strategy not in reports:
            earlier = STRATEGIES[: STRATEGIES.index(strategy)]
            for name in earlier:
                report(name)
            if strategy in ZERO:
                warm_deepspeed()
            try:
                reports[strategy] = spawn(
                    "worlds:strategy_world",
                    1 if strategy == "none" else 2,
                    {
                        "strategy": strategy,
                        "models": models,
                        "data": data,
                        "folder": str(folder),
                        "precisions": ["fp32", "nf4"] if strategy in IN_NF4 else ["fp32"],
                        "evaluations": EVALUATIONS[-1:],
                        "load_from": earlier,
                        "run_config": None if strategy == "zero1" else str(run_config),
                    },
                    timeout=WORLD_TIMEOUT,
                )
            except WorkerError as error:
                failed[strategy] = error
                raise
            print(strategy, reports[strategy][0]["seconds"])
        return reports[strategy]

    return report


CELLS = [(strategy, precision) for strategy in SEVERAL for precision in ("fp32", "nf4")]
CELLS = [(strategy, precision) for strategy, precision in CELLS if precision == "fp32" or strategy in IN_NF4]


# ---------------------------------------------------------------------------------------------------------- equivalence


@pytest.mark.parametrize(("strategy", "precision"), cases(CELLS))
def test_two_processes_train_what_one_process_trains(worlds: Worlds, strategy: str, precision: str) -> None:
    one, several = worlds("none")[0]["runs"][precision], worlds(strategy)[0]["runs"][precision]
    assert NUM_STEPS >= 20 and several["num_steps"] == one["num_steps"] == NUM_STEPS
    error = delta_error(several["masters"], one["masters"])
    print(f"relative ΔW error {error:.1e}")
    assert error < DELTA_TOLERANCE
    assert several["losses"] == pytest.approx(one["losses"], rel=1e-5)  # float32 sums in another order
    assert one["losses"][-1] < one["losses"][0] / 2, "nothing was learned, so nothing was compared"


@pytest.mark.parametrize(("strategy", "precision"), cases(CELLS))
def test_the_same_gates_are_zero_and_not_all(worlds: Worlds, strategy: str, precision: str) -> None:
    one, several = worlds("none")[0]["runs"][precision], worlds(strategy)[0]["runs"][precision]
    pattern = zero_pattern(one["gates"])
    assert zero_pattern(several["gates"]) == pattern
    dead = [is_zero for gates in pattern.values() for is_zero in gates]
    assert any(dead) and not all(dead)


@pytest.mark.parametrize(("strategy", "precision"), cases(CELLS))
def test_every_process_holds_the_same_gates_and_masters(worlds: Worlds, strategy: str, precision: str) -> None:
    first, second = (report["runs"][precision] for report in worlds(strategy))
    for kind in ("gates", "masters"):
        assert all(torch.equal(first[kind][name], second[kind][name]) for name in first[kind])
    assert first["losses"] == second["losses"]


def test_the_compared_steps_were_uneven(worlds: Worlds) -> None:
    """What was compared has accumulation, processes without rows, and steps of different sizes."""
    (one,), (first, second) = worlds("none"), worlds("ddp")
    for step in range(NUM_STEPS):
        whole = sorted(row for micro_batch in one["rows"][step] for row in micro_batch)
        halves = [row for report in (first, second) for micro_batch in report["rows"][step] for row in micro_batch]
        assert sorted(halves) == whole, "every row in exactly one process"
        assert len(first["rows"][step]) == len(second["rows"][step]), "as many collectives on each"
    assert max(len(step) for step in first["rows"]) > 1, "gradient accumulation"
    assert any(not any(step) for step in second["rows"]), "a process without rows in the last step of an epoch"


# ------------------------------------------------------------------------------------------------------------- sharding


@pytest.mark.parametrize("strategy", cases(ZERO))
def test_deepspeed_runs_the_stage_that_was_asked_for(worlds: Worlds, strategy: str) -> None:
    for report in worlds(strategy):
        layout = report["runs"]["fp32"]["layout"]
        assert layout["stage"] == layout["stage_of_config"] == int(strategy[-1])
        assert layout["sharding_optimizer"] == {"zero3": "DeepSpeedZeroOptimizer_Stage3"}.get(
            strategy, "DeepSpeedZeroOptimizer"
        )
        assert layout["partitions_gradients"] is (strategy != "zero1")


@pytest.mark.parametrize("strategy", cases(SEVERAL))
def test_a_process_keeps_its_share_of_the_optimizer_state(worlds: Worlds, strategy: str) -> None:
    shares = [report["runs"]["fp32"]["shares"] for report in worlds(strategy)]
    whole = worlds("none")[0]["runs"]["fp32"]["shares"]["kept"]
    assert all(share["whole"] == whole for share in shares)
    if strategy == "ddp":
        assert [share["kept"] for share in shares] == [whole, whole]
        return
    padding = sum(share["kept"] for share in shares) - whole
    assert 0 <= padding < 0.01 * whole
    assert all(share["kept"] == pytest.approx(whole / 2, rel=0.01) for share in shares)


def test_zero3_shards_every_weight_and_the_others_none(worlds: Worlds) -> None:
    for report in worlds("zero3"):
        layout = report["runs"]["fp32"]["layout"]
        assert layout["resident"] == 0, "whole weights are left in memory"
        for name, (held, whole) in layout["held"].items():
            assert held == (whole + 1) // 2, name
    for report in worlds("zero2"):
        assert all(held == whole for held, whole in report["runs"]["fp32"]["layout"]["held"].values())


def test_zero3_holds_no_whole_4_bit_weight_from_the_forward_to_the_backward_pass(worlds: Worlds) -> None:
    """bitsandbytes kept what the forward pass had read, so every process had the whole packed model; with and without
    gradient checkpointing."""
    for report in worlds("zero3"):
        for found in report["packed"]:
            assert found["whole"] == found["packed"] > 0, "every layer was seen with its whole weight"
            assert found["held"] == 0
            assert found["restored"] == found["layers"], "layers that an engine let go are bitsandbytes' own"


# ---------------------------------------------------------------------------------------------------------------- traps


def test_thresholding_outside_the_optimizer_is_undone_by_zero2(worlds: Worlds) -> None:
    """The naive way: soft-threshold model.gate after the step. ZeRO's masters never hear of it."""
    alone, zero2 = worlds("none")[0]["naive"], worlds("zero2")[0]["naive"]
    reference = alone["ours"]
    assert delta_error(zero2["ours"], reference) < DELTA_TOLERANCE
    assert delta_error(alone["naive"], reference) < DELTA_TOLERANCE, "with one process the naive way is right"
    naive_error = whole_error(zero2["naive"], reference)
    print(f"error of ΔW: naive {naive_error:.2g}, ours {whole_error(zero2['ours'], reference):.1e}")
    assert naive_error > 0.05
    gates = [name for name in reference if name.endswith(".gate")]
    assert any(bool((reference[name] == 0).any()) for name in gates)
    assert all(bool((zero2["naive"][name] != 0).all()) for name in gates), "not one gate stays at zero"


@pytest.mark.parametrize("strategy", cases(STRATEGIES))
def test_an_evaluation_in_the_middle_changes_no_bit(worlds: Worlds, strategy: str) -> None:
    """Masters and moments; in NF4 on a CPU, bitsandbytes would repack the weights at the first forward in eval mode."""
    for report in worlds(strategy):
        assert report["evaluation"] and all(report["evaluation"])


@pytest.mark.parametrize("strategy", cases(STRATEGIES))
def test_preparing_changes_no_gate(worlds: Worlds, strategy: str) -> None:
    for report in worlds(strategy):
        assert report["prepared"] == {"model": True, "masters": True}


@pytest.mark.parametrize("strategy", cases(STRATEGIES))
def test_the_head_gives_losses_under_every_wrapper(worlds: Worlds, strategy: str) -> None:
    """Hooks of DeepSpeed hand on another tensor; without the guard the loss would be right, of logits in full."""
    assert all(report["saved"]["from_head"] for report in worlds(strategy))


# --------------------------------------------------------------------------------------------------- agreeing on a step


@pytest.mark.parametrize("strategy", cases(STRATEGIES))
def test_the_graph_of_a_micro_batch_is_gone_before_the_next_one(worlds: Worlds, strategy: str) -> None:
    for report in worlds(strategy):
        assert len(report["graphs"]) > 2, "one micro-batch alone has no next one"
        assert not any(report["graphs"]), report["graphs"]


@pytest.mark.parametrize("strategy", cases(STRATEGIES))
def test_a_loss_that_is_not_finite_on_one_process_skips_the_step_on_all(worlds: Worlds, strategy: str) -> None:
    for report in worlds(strategy):
        skipped = report["skipped"]
        assert skipped["skipped"] == [True, True], "NaN, then infinity"
        assert skipped["state_unchanged"] and skipped["model_unchanged"]
        assert skipped["steps"][0] == skipped["steps"][1]
        assert skipped["moved"] and skipped["goes_on_as_if_nothing_happened"]


@pytest.mark.parametrize("strategy", cases(STRATEGIES))
def test_a_float16_step_that_overflows_is_taken_again_by_all(worlds: Worlds, strategy: str) -> None:
    reports = [report["scaled"] for report in worlds(strategy)]
    for scaled in reports:
        high, fallen, then = scaled["exponents"]
        assert fallen < high and then == fallen and scaled["same"]
        assert fallen == reports[0]["exponents"][1]
    one = worlds("none")[0]["scaled"]
    assert whole_error(reports[0]["masters"], one["masters"]) < 0.05
    assert reports[0]["norms"] == pytest.approx(one["norms"], rel=0.01), "what clipping would hide"


@pytest.mark.parametrize("strategy", IN_THE_ORDINARY_RUN)
def test_a_run_stops_after_max_skipped_steps_in_a_row(worlds: Worlds, folder: Path, strategy: str) -> None:
    for report in worlds(strategy):
        assert report["stopped"]["steps"] == 5, "two good ones and three that were skipped"
        assert "3 steps in a row" in report["stopped"]["error"]
    status = json.loads((folder / f"stopped-{strategy}" / "status.json").read_text())
    assert status["state"] == "failed" and "non-finite" in status["error"]
    assert not (folder / f"stopped-{strategy}" / "adapter").exists()


# ------------------------------------------------------------------------------------------------------------ agreement


@pytest.mark.parametrize("strategy", cases(["ddp", "zero1", "zero2"]))
def test_one_flipped_bit_is_found_and_named_on_every_process(worlds: Worlds, strategy: str) -> None:
    kinds = {"ddp": ("copy", "exp_avg", "exp_avg_sq")}.get(strategy, ("copy", "master"))
    for process, report in enumerate(worlds(strategy)):
        flips = dict(report["flips"])
        assert flips.pop("nothing") == flips.pop("nothing any more") == {"error": None}
        assert {flip.split(" of ")[0] for flip in flips} == set(kinds)
        for what, flip in flips.items():
            # Under a master's name the processes know their own shards: process 1's is the one that was hit.
            name = worlds(strategy)[1]["flips"][what]["name"]
            assert flip["error"] is not None, f"{what} went unseen on process {process}"
            assert name in flip["error"] and "process 1" in flip["error"]


# ----------------------------------------------------------------------------------------------------- saving, resuming


@pytest.mark.parametrize(("source", "target"), cases((a, b) for i, b in enumerate(STRATEGIES) for a in STRATEGIES[:i]))
def test_a_state_saved_under_one_strategy_goes_on_under_another(worlds: Worlds, source: str, target: str) -> None:
    """Read back bit for bit, and a step further equal to rounding whoever takes them."""
    for report in worlds(target):
        loaded = report["loaded"][source]
        assert loaded["masters"] and loaded["moments"] and loaded["gates"]
        assert loaded["num_steps"] == (SHORT, SHORT)
    assert 0 < worlds(source)[0]["saved"]["zero"] < worlds(source)[0]["saved"]["all"]
    if source != "none":
        here, there = worlds(target)[0]["loaded"][source], worlds(target)[0]["loaded"]["none"]
        assert delta_error(here["further"], there["further"]) < DELTA_TOLERANCE


# ------------------------------------------------------------------------------------------------------------ launchers


@pytest.mark.matrix  # where runs are launched in every way; test_train.py launches one
def test_the_shipped_cpu_topology_runs_zero2_on_two_processes(run_config: Path, tmp_path: Path) -> None:
    code, output = train_under([*ACCELERATE, "--config_file", "launch/cpu.yaml"], run_config, tmp_path, *SHORT_RUN)
    assert code == 0, output
    env, status = (json.loads((tmp_path / name).read_text()) for name in ("env.json", "status.json"))
    assert (env["strategy"], env["zero_stage"], env["num_processes"]) == ("zero2", 2, 2)
    assert (status["state"], status["phase"], status["adapter"]) == ("finished", "done", "adapter")


def test_a_launcher_that_states_another_stage_is_refused_once(run_config: Path, tmp_path: Path) -> None:
    launcher = [*ACCELERATE, "--use_deepspeed", "--num_processes", "2", "--num_machines", "1", "--zero_stage", "3"]
    run = tmp_path / "run"
    code, output = train_under(
        [*launcher, "--mixed_precision", "no", "--dynamo_backend", "no"],
        run_config,
        run,
        "distributed.strategy=zero2",
        ACCELERATE_DEEPSPEED_ZERO_STAGE="3",
    )
    assert code != 0  # launchers make 1 of every exit code
    assert output.count("sora_llm: distributed.strategy is zero2 but the launcher sets ZeRO stage 3") == 1
    assert 'sora_llm/train.py", line' not in output, "a traceback of ours"
    assert not run.exists()
