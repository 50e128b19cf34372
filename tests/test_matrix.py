"""The full matrix of strategy × phase × precision, every launcher, and runs that are really killed.

Slow, and not part of the ordinary run:  python -m pytest -m matrix -rP  (the lines that begin with | are the tables of
benchmarks/matrix.md).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
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
    assert_same_run,
    delta_error,
    train_under,
    whole_error,
    zero_pattern,
)
from strategies import folder as folder
from strategies import run_config as run_config
from worlds import NUM_STEPS, PRECISIONS, accumulation

pytestmark = [pytest.mark.matrix, pytest.mark.timeout(1200)]

EXACT = ("fp32", "nf4")
SPREAD = (1, 2, 4, 8)  # micro-batch sizes of the same steps in one process

Run = dict[str, Any]
Runs = Callable[[str, str], dict[str, Run]]


@pytest.fixture(scope="module")
def runs() -> Runs:
    """The long runs of the main process of a strategy with adapters of a dtype, by "<precision> <micro-batch>"."""
    found: dict[tuple[str, str], dict[str, Run]] = {}

    def report(strategy: str, adapter_dtype: str) -> dict[str, Run]:
        if (strategy, adapter_dtype) not in found:
            warm_deepspeed()
            found[strategy, adapter_dtype] = spawn(
                "worlds:matrix_world",
                1 if strategy == "none" else 2,
                {
                    "strategy": strategy,
                    "models": str(shared("models/base5m").parent),
                    "data": str(shared("data/gsm8k_train.jsonl")),
                    "precisions": list(PRECISIONS) if adapter_dtype == "float32" else ["bf16"],
                    "adapter_dtype": adapter_dtype,
                    "micro_batches": SPREAD if strategy == "none" else (2,),
                },
                timeout=900,
            )[0]
        return found[strategy, adapter_dtype]

    return report


def flipped_gates(run: Run, reference: Run) -> int:
    """Gates that are zero in one of the two alone."""
    ours, theirs = zero_pattern(run["gates"]), zero_pattern(reference["gates"])
    return sum(a != b for name in theirs for a, b in zip(ours[name], theirs[name], strict=True))


def num_zero(run: Run) -> str:
    gates = zero_pattern(run["gates"])
    return f"{sum(map(sum, gates.values()))}/{sum(map(len, gates.values()))}"


@pytest.mark.parametrize("precision", list(PRECISIONS))
@pytest.mark.parametrize("strategy", SEVERAL)
def test_every_strategy_in_every_precision(runs: Runs, strategy: str, precision: str) -> None:
    """fp32 and NF4 in float32: equal. Others: within what one process shows under another micro-batch split."""
    reference, ours = runs("none", "float32")[f"{precision} 2"], runs(strategy, "float32")[f"{precision} 2"]
    dense = whole_error(ours["dense_masters"], reference["dense_masters"])
    sparsify = whole_error(ours["masters"], reference["masters"])
    flipped = flipped_gates(ours, reference)
    splits = [runs("none", "float32")[f"{precision} {micro_batch}"] for micro_batch in SPREAD]
    spread = max(whole_error(one["masters"], other["masters"]) for one in splits for other in splits)
    print(
        f"| {strategy} ×2 | {precision} | {dense:.1e} | {sparsify:.1e} | {spread:.1e} | {num_zero(ours)} | {flipped} |"
    )
    if precision in EXACT:
        assert delta_error(ours["masters"], reference["masters"]) < DELTA_TOLERANCE
        assert delta_error(ours["dense_masters"], reference["dense_masters"]) < DELTA_TOLERANCE
        assert flipped == 0
    else:
        assert sparsify <= 1.5 * spread  # the spread is the largest of six pairs, a sample of what rounding does
        worst_flip = max(flipped_gates(one, other) for one in splits for other in splits)
        assert flipped <= 1.5 * worst_flip + 2


@pytest.mark.parametrize("strategy", ["ddp", "zero2", "zero3"])
def test_bf16_adapters_with_float32_masters(runs: Runs, strategy: str) -> None:
    """Gradients are reduced and accumulated in bf16: loosely equal, and the gates still die by float32 steps."""
    reference, ours = runs("none", "bfloat16")["bf16 2"], runs(strategy, "bfloat16")["bf16 2"]
    error, flipped = whole_error(ours["masters"], reference["masters"]), flipped_gates(ours, reference)
    splits = [runs("none", "bfloat16")[f"bf16 {micro_batch}"] for micro_batch in SPREAD]
    spread = max(whole_error(one["masters"], other["masters"]) for one in splits for other in splits)
    dense = whole_error(ours["dense_masters"], reference["dense_masters"])
    print(
        f"| {strategy} ×2 | bf16, bf16 adapters | {dense:.1e} | {error:.1e} | {spread:.1e} | {num_zero(ours)} "
        f"| {flipped} |"
    )
    assert error < 2 * spread + 0.05
    assert flipped < 0.1 * sum(gate.numel() for gate in ours["gates"].values())
    assert ours["losses"][-1] == pytest.approx(reference["losses"][-1], rel=0.05)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_evaluation_and_loading_in_every_cell(strategy: str, tmp_path: Path) -> None:
    """An evaluation changes no bit in any precision, with and without gradient checkpointing."""
    warm_deepspeed()
    reports = spawn(
        "worlds:strategy_world",
        1 if strategy == "none" else 2,
        {
            "strategy": strategy,
            "models": str(shared("models/base5m").parent),
            "data": str(shared("data/gsm8k_train.jsonl")),
            "folder": str(tmp_path),
            "precisions": [],
            "evaluations": [*EVALUATIONS, ("bf16", True), ("nf4bf16", True)],
            "load_from": [],
        },
        timeout=600,
    )
    for report in reports:
        assert report["evaluation"] == [True] * 6


def overrides(strategy: str, num_processes: int, run: Path) -> list[str]:
    return [
        f"output.output_dir={run}",
        f"distributed.strategy={strategy}",
        "output.save_steps=1",
        accumulation(num_processes),
    ]


@pytest.mark.parametrize("at", [1, 4], ids=["dense", "sparsify"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_killed_run_goes_on_to_the_same_bits(strategy: str, at: int, run_config: Path, tmp_path: Path) -> None:
    """All processes end without a word after step `at`; new processes go on from its checkpoint."""
    warm_deepspeed()
    num = 1 if strategy == "none" else 2
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    spawn("worlds:whole_run", num, {"config": str(run_config), "overrides": overrides(strategy, num, straight)})
    with pytest.raises(WorkerError, match="ended with 9"):
        spawn(
            "worlds:killed_run",
            num,
            {"config": str(run_config), "overrides": overrides(strategy, num, broken), "at": at},
        )
    status = json.loads((broken / "status.json").read_text())
    assert (status["state"], status["checkpoint"]) == ("running", f"checkpoints/step-{at}")
    spawn("worlds:whole_run", num, {"config": str(run_config), "overrides": overrides(strategy, num, broken)})
    assert_same_run(straight, broken)
    print(f"| {strategy} | killed after step {at} | equal bytes |")


# ------------------------------------------------------------------------------------------------------------ launchers

PLAIN = ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
DEEPSPEED = [*ACCELERATE, "--use_deepspeed", *PLAIN]
TORCHRUN = ["torch.distributed.run", "--standalone"]


@pytest.mark.parametrize(
    ("launcher", "strategy", "variables", "expected"),
    [
        (ACCELERATE, "auto", {}, ("none", 1)),
        ([*ACCELERATE, "--multi_gpu", "--num_processes", "2", *PLAIN], "auto", {}, ("zero2", 2)),
        ([*ACCELERATE, "--multi_gpu", "--num_processes", "2", *PLAIN], "ddp", {}, ("ddp", 2)),
        ([*ACCELERATE, "--multi_gpu", "--num_processes", "2", *PLAIN], "zero3", {}, ("zero3", 2)),
        ([*DEEPSPEED, "--num_processes", "2"], "auto", {}, ("zero2", 2)),
        ([*DEEPSPEED, "--num_processes", "2"], "zero1", {}, ("zero1", 2)),
        ([*DEEPSPEED, "--num_processes", "2"], "auto", {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}, ("zero3", 2)),
        ([*DEEPSPEED, "--num_processes", "2", "--zero_stage", "2"], "zero2", {}, ("zero2", 2)),
        ([*DEEPSPEED, "--num_processes", "1"], "auto", {}, ("zero2", 1)),
        ([*ACCELERATE, "--config_file", "launch/cpu.yaml", "--use_deepspeed"], "auto", {}, ("zero2", 2)),
        ([*TORCHRUN, "--nproc_per_node", "2"], "auto", {}, ("zero2", 2)),
        ([*TORCHRUN, "--nproc_per_node", "2"], "ddp", {}, ("ddp", 2)),
        ([*TORCHRUN, "--nproc_per_node", "1"], "auto", {}, ("none", 1)),
        ([*TORCHRUN, "--nproc_per_node", "1"], "zero3", {}, ("zero3", 1)),
        ([*ACCELERATE, "--config_file", "launch/cpu.yaml"], "zero3", {}, ("zero3", 2)),
        ([], "auto", {}, ("none", 1)),
        ([], "ddp", {}, ("ddp", 1)),
        ([], "zero1", {}, ("zero1", 1)),
        ([], "zero2", {}, ("zero2", 1)),
        ([], "zero3", {}, ("zero3", 1)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_launched_in_every_way(
    run_config: Path,
    tmp_path: Path,
    launcher: list[str],
    strategy: str,
    variables: dict[str, str],
    expected: tuple[str, int],
) -> None:
    options = (f"distributed.strategy={strategy}", *SHORT_RUN)
    code, output = train_under(launcher, run_config, tmp_path, *options, **variables)
    assert code == 0, output
    env, status = (json.loads((tmp_path / name).read_text()) for name in ("env.json", "status.json"))
    assert (env["strategy"], env["num_processes"], status["state"]) == (*expected, "finished")
    assert env.get("zero_stage") == (int(expected[0][-1]) if expected[0] in ZERO else None)
    shown = " ".join(launcher).replace("accelerate.commands.launch", "accelerate launch") or "python"
    shown = shown.replace("torch.distributed.run", "torchrun").replace(" ".join(PLAIN), "…")
    said = " ".join(f"{name}={value}" for name, value in variables.items())
    print(f"| {said} {shown} | {strategy} | {expected[0]} ×{expected[1]} |")


@pytest.mark.parametrize(
    ("launcher", "strategy", "variables", "sentence"),
    [
        ([*DEEPSPEED, "--num_processes", "2"], "ddp", {}, "distributed.strategy is ddp but the launcher was given"),
        ([*DEEPSPEED, "--num_processes", "2"], "none", {}, "distributed.strategy is none but the launcher was given"),
        ([*TORCHRUN, "--nproc_per_node", "2"], "none", {}, "the launcher started 2 processes"),
        (
            [*ACCELERATE, "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "bf16"],
            "zero2",
            {},
            "the launcher sets --mixed_precision bf16 but model.dtype is float32",
        ),
        (
            [*DEEPSPEED, "--num_processes", "2", "--offload_optimizer_device", "cpu"],
            "zero2",
            {},
            "optimizer offload",
        ),
        (
            [*DEEPSPEED, "--num_processes", "2"],
            "zero2",
            {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
            "the launcher sets ZeRO stage 1",
        ),
    ],
)
def test_a_conflict_with_the_launcher_is_said_once(
    run_config: Path, tmp_path: Path, launcher: list[str], strategy: str, variables: dict[str, str], sentence: str
) -> None:
    run = tmp_path / "run"
    code, output = train_under(launcher, run_config, run, f"distributed.strategy={strategy}", **variables)
    assert code != 0
    assert output.count(sentence) == 1, output
    assert 'sora_llm/train.py", line' not in output, "a traceback of ours"
    assert not run.exists()


@pytest.mark.parametrize("strategy", ZERO)
def test_zero_with_one_process_trains_what_none_trains(runs: Runs, strategy: str) -> None:
    warm_deepspeed()
    (ours,) = spawn(
        "worlds:matrix_world",
        1,
        {
            "strategy": strategy,
            "models": str(shared("models/base5m").parent),
            "data": str(shared("data/gsm8k_train.jsonl")),
            "precisions": ["fp32"],
            "adapter_dtype": "float32",
            "micro_batches": (2,),
        },
        timeout=300,
    )
    run, reference = ours["fp32 2"], runs("none", "float32")["fp32 2"]
    assert run["layout"]["stage"] == int(strategy[-1]) and run["num_steps"] == NUM_STEPS
    error = delta_error(run["masters"], reference["masters"])
    print(f"| {strategy} ×1 | fp32 | | {error:.1e} | | {num_zero(run)} | {flipped_gates(run, reference)} |")
    assert error < DELTA_TOLERANCE and flipped_gates(run, reference) == 0
