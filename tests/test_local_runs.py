"""Whole runs with local updates: what they log and leave, and that interrupted ones end with the same bits."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers import relative_error
from runs import CONFIG
from safetensors.torch import load_file
from small_runs import (
    DENSE_STEPS,
    PREEMPTED,
    STEPS,
    Playground,
    checkpoints,
    delta_weights,
    interrupt,
    lines,
    overrides,
    result,
    status,
)
from spawn import launched

from sora_llm.budget import GAIN, LAMBDA_MAX, LAMBDA_MIN, next_lambda
from sora_llm.errors import UserError
from sora_llm.train import run

LOCAL = {"distributed.sync_every": 3, "output.save_steps": 1, "sora.lora_dropout": 0.1}
BUDGET, SLOTS = "budget, cut by svd", "slots, an outer optimizer"
CASES: dict[str, dict[str, Any]] = {
    # rounds end after steps 2, 4 and 6: with every phase
    BUDGET: {
        **LOCAL,
        "sora.sparse_lambda": None,
        "sora.target_rank": 2,
        "sora.consensus_at": 0.67,
        "sora.consensus": "svd",
    },
    # after 2, 5 and 6
    SLOTS: {
        **LOCAL,
        "distributed.outer_learning_rate": 0.7,
        "distributed.outer_momentum": 0.9,
        "sora.threshold": "proxgen",
        "sora.sparse_lambda": 0.02,
    },
}
ROUND_ENDS = {BUDGET: [2, 4, 6], SLOTS: [2, 5, 6]}
WEIGHTS = "adapter.safetensors"
TIMEOUT_MINUTES = 7


@pytest.fixture(scope="module")
def straight(ground: Playground) -> Callable[[str], Path]:
    """The directory of an undisturbed run of a case, with a checkpoint of every step."""

    @functools.cache
    def make(case: str) -> Path:
        name = f"local {case}"
        options = {"distributed.strategy": "auto", "distributed.timeout_minutes": TIMEOUT_MINUTES}
        faults = [{"place": "step", "process": None, "do": "timeouts"}]
        assert ground.codes(name, 2, faults, **options, **CASES[case]) == [0, 0]
        return ground.run_dir(name)

    return make


@pytest.mark.parametrize("case", CASES)
def test_a_run_takes_ddp_and_says_at_every_round_what_it_saw(case: str, straight: Callable[[str], Path]) -> None:
    run_dir = straight(case)
    assert json.loads((run_dir / "env.json").read_text())["strategy"] == "ddp"
    logged = [line for line in lines(run_dir, "metrics.jsonl") if line["phase"] != "export"]
    rounds = [line for line in logged if "sync_bytes" in line]
    assert [line["step"] for line in rounds] == ROUND_ENDS[case]
    assert all(line["sync_seconds"] > 0 for line in rounds)
    assert rounds[0]["merge_error"] == 0, "from B = 0 one step moves B alone, and then it is linear"
    assert all(0 < line["merge_error"] < 0.5 for line in rounds[1:])
    assert ["support_overlap" in line for line in rounds] == [line["phase"] == "sparsify" for line in rounds]
    ranks = {line["step"]: line["mean_rank"] for line in logged if line["step"] > 0}
    held = {step: max([end for end in ROUND_ENDS[case] if end <= step], default=0) for step in ranks}
    after_cut = [] if case == SLOTS else [step for step in ranks if step > ROUND_ENDS[case][1]]
    for step, rank in ranks.items():  # inside a round no gate dies: what counts is what was agreed on last
        if step not in after_cut:
            assert rank == (ranks[held[step]] if held[step] else 4.0), step
    last = lines(run_dir, "metrics.jsonl")[-1]
    assert 0 < last["mean_rank"] < 4 and last["eval_loss_exported"] == pytest.approx(last["eval_loss"], rel=1e-5)


def test_every_group_of_its_processes_has_the_timeout_of_the_config(straight: Callable[[str], Path]) -> None:
    """All processes, and the leads of replicas: a new group has its backend's timeout, not that of the first."""
    for process in (0, 1):
        timeouts = json.loads((straight(BUDGET).parent / f"step-1.{process}").read_text())
        assert timeouts == [60 * TIMEOUT_MINUTES] * 2


def test_a_budget_is_kept_by_the_merge_of_products(straight: Callable[[str], Path]) -> None:
    logged = lines(straight(BUDGET), "metrics.jsonl")
    last = logged[-1]
    budget = next(line["budget_params"] for line in logged if "budget_params" in line)
    shapes = [64 + 64, 64 + 32, 64 + 172]  # of q and o, k and v, the MLP
    assert budget - min(shapes) < last["kept_params"] <= budget


STEPS_OF = {BUDGET: (3, 4, 5), SLOTS: (4,)}
"""Inside a round, at the round whose factors are merged by the cut, after the cut; inside a round."""


@pytest.mark.parametrize("case", CASES)
def test_one_that_was_interrupted_ends_with_the_bits_of_one_that_was_not(
    case: str, straight: Callable[[str], Path], ground: Playground
) -> None:
    undisturbed = straight(case)
    whole = result(undisturbed)
    for step in STEPS_OF[case]:
        name = f"local {case} from {step}"
        run_dir = interrupt(undisturbed, ground.run_dir(name), step)
        assert ground.codes(name, 2, **CASES[case]) == [0, 0]
        assert result(run_dir) == whole, step
        for later in range(step + 1, STEPS + 1):
            for file in (WEIGHTS, "replica-0.safetensors", "replica-1.safetensors"):
                ours, theirs = (folder / "checkpoints" / f"step-{later}" / file for folder in (run_dir, undisturbed))
                assert ours.read_bytes() == theirs.read_bytes(), (later, file)


def test_so_does_one_that_was_asked_to_stop_inside_a_round(straight: Callable[[str], Path], ground: Playground) -> None:
    name = "local stopped"
    fault = {"place": "step", "nth": 3, "do": "TERM", "process": 1}
    children = ground.start(name, 2, [fault], **CASES[BUDGET])
    assert [child.wait() for child in children] == [PREEMPTED, PREEMPTED], children[0].output
    found = status(ground.run_dir(name))
    assert (found["state"], found["checkpoint"]) == ("preempted", "checkpoints/step-3")
    assert ground.codes(name, 2, **CASES[BUDGET]) == [0, 0]
    assert result(ground.run_dir(name)) == result(straight(BUDGET))


def test_another_number_of_replicas_is_refused_and_changes_nothing(
    straight: Callable[[str], Path], ground: Playground
) -> None:
    run_dir = interrupt(straight(BUDGET), ground.run_dir("local alone"), 3)
    before = checkpoints(run_dir)
    with pytest.raises(UserError, match=r"holds 2 replicas .* this launch has 1; launch as many"):
        run(CONFIG, *overrides(ground.folder, run_dir, **CASES[BUDGET]))
    assert checkpoints(run_dir) == before


def test_a_damaged_replica_is_a_damaged_checkpoint(straight: Callable[[str], Path], ground: Playground) -> None:
    name = "local damaged"
    run_dir = interrupt(straight(BUDGET), ground.run_dir(name), 4)
    file = run_dir / "checkpoints" / "step-4" / "replica-1.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\x01")
    children = ground.start(name, 2, **CASES[BUDGET])
    assert [child.wait() for child in children] == [0, 0]
    assert "replica-1.safetensors is not what was saved" in children[0].output
    assert "resuming from" in children[0].output and "step 3 of 6" in children[0].output
    assert result(run_dir) == result(straight(BUDGET))


def test_one_process_may_take_rounds_too(ground: Playground, tmp_path: Path) -> None:
    found = run(CONFIG, *overrides(ground.folder, tmp_path / "run", **CASES[BUDGET]))
    assert found.status["state"] == "finished"
    logged = lines(tmp_path / "run", "metrics.jsonl")
    rounds = [line for line in logged if "sync_bytes" in line]
    assert [line["step"] for line in rounds] == [2, 4, 6]
    assert all(line["sync_bytes"] == 0 and line["merge_error"] == 0 for line in rounds)
    assert rounds[0]["step"] == DENSE_STEPS


def test_a_dry_run_of_several_replicas_keeps_nothing(ground: Playground) -> None:
    call = ground.call("local dry", 2, **CASES[BUDGET])
    call["arguments"].append("--dry-run")
    children = ground.nursery.world("faults:trainer", 2, call)
    assert [child.wait() for child in children] == [0, 0], children[0].output
    assert "dry run: one step and one save worked, nothing was kept" in children[0].output
    assert "local updates: 2 replicas, averaged every 3 steps; a round moves" in children[0].output
    assert list(ground.run_dir("local dry").parent.iterdir()) == []


def test_feedback_moves_lambda_once_a_round(ground: Playground, tmp_path: Path) -> None:
    changed = {"sora.threshold": "decoupled", "sora.consensus_at": 1.0, "distributed.sync_every": 2}
    run(CONFIG, *overrides(ground.folder, tmp_path / "run", **{**CASES[BUDGET], **changed}))
    strengths = {line["step"]: line["lambda"] for line in lines(tmp_path / "run", "metrics.jsonl") if "lambda" in line}
    assert strengths[3] == strengths[4] != strengths[5] == strengths[6]


def test_lambda_stays_within_its_bounds_however_long_a_round_is() -> None:
    assert next_lambda(0.1, 1000, 34.0, 1000, num_steps=500) == LAMBDA_MAX
    assert next_lambda(0.1, 0, 1000.0, 1000, num_steps=5000) == LAMBDA_MIN
    assert next_lambda(0.1, 600, 500.0, 1000, num_steps=3) == pytest.approx(0.1 * math.exp(3 * GAIN * 0.1))


@pytest.mark.matrix
def test_two_machines_of_two_processes_train_as_two_processes_of_twice_the_rows(ground: Playground) -> None:
    """replica: node, from the launcher's numbers to the exported adapter."""
    options = {**CASES[BUDGET], "sora.lora_dropout": 0.0}
    rows = {"train.per_device_train_batch_size": 2}
    assert ground.codes("local pair", 2, **options, **rows) == [0, 0]
    rows = {"train.per_device_train_batch_size": 1, "evaluation.per_device_eval_batch_size": 1}
    call = ground.call("local nodes", 4, **options, **rows, **{"distributed.replica": "node"})
    places = [
        {**environ, "LOCAL_RANK": f"{rank % 2}", "LOCAL_WORLD_SIZE": "2"} for rank, environ in enumerate(launched(4))
    ]
    children = [ground.nursery.start("faults:trainer", call, place) for place in places]
    assert [child.wait() for child in children] == [0] * 4, children[0].output
    pair, nodes = ground.run_dir("local pair"), ground.run_dir("local nodes")
    found = delta_weights(nodes)
    for name, delta in delta_weights(pair).items():
        assert relative_error(found[name], delta) < 1e-3, name  # float32 sums in another order, then Adam
    sent = [[line["sync_bytes"] for line in lines(d, "metrics.jsonl") if "sync_bytes" in line] for d in (pair, nodes)]
    assert sent[0] == sent[1] and len(sent[0]) == 3


def test_machines_may_have_different_numbers_of_processes(ground: Playground) -> None:
    """What replicas decide by their own size they decide together: a collective on one of them alone is another's."""
    options = {**CASES[BUDGET], "distributed.replica": "node", "train.per_device_train_batch_size": 1}
    call = ground.call("local uneven", 3, **options, **{"evaluation.per_device_eval_batch_size": 1})
    places = [("0", "2"), ("1", "2"), ("0", "1")]
    children = [
        ground.nursery.start("faults:trainer", call, {**environ, "LOCAL_RANK": local, "LOCAL_WORLD_SIZE": size})
        for environ, (local, size) in zip(launched(3), places, strict=True)
    ]
    assert [child.wait() for child in children] == [0] * 3, children[0].output
    run_dir = ground.run_dir("local uneven")
    assert status(run_dir)["state"] == "finished"
    rounds = [line for line in lines(run_dir, "metrics.jsonl") if "sync_bytes" in line]
    assert [line["step"] for line in rounds] == [2, 4, 6] and all(line["sync_bytes"] > 0 for line in rounds)
    names = (WEIGHTS, "replica-0.safetensors", "replica-1.safetensors")
    agreed, *own = (load_file(run_dir / f"checkpoints/step-{STEPS}" / name) for name in names)
    assert any(name.endswith("lora_B") for name in agreed)
    for name, tensor in agreed.items():
        assert all(replica[name].equal(tensor) for replica in own), name


@pytest.mark.matrix
def test_patience_ends_a_stage_inside_a_round(ground: Playground) -> None:
    options = {
        **CASES[BUDGET],
        "distributed.sync_every": 100,  # so that every step of the finetune phase lies inside its one round
        "sora.consensus_at": 0.5,
        "train.max_steps": 24,
        "train.learning_rate": 1.0,  # so that the dev loss does not fall twelve times in a row
        "train.lr_scheduler_type": "constant_with_warmup",
        "evaluation.eval_steps": 1,
        "evaluation.early_stopping_patience": 1,
    }
    assert ground.codes("local patience", 2, **options) == [0, 0]
    *_, stopped, last = logged = lines(ground.run_dir("local patience"), "metrics.jsonl")
    assert 12 < stopped["step"] < 24 and stopped["phase"] == "finetune"
    assert not any("sync_bytes" in line for line in logged[:-1] if line["phase"] == "finetune")
    assert last["sync_bytes"] > 0, "what came after the last round is merged too"
    assert last["step"] == stopped["step"]
    best = min((line for line in logged[:-1] if line["phase"] == "finetune"), key=lambda line: line["eval_loss"])
    assert last["best_step"] == best["step"] < stopped["step"]
    assert last["eval_loss_exported"] == pytest.approx(best["eval_loss"], rel=1e-4)
    interrupt(ground.run_dir("local patience"), ground.run_dir("local patience again"), stopped["step"])
    assert ground.codes("local patience again", 2, **options) == [0, 0]
    assert result(ground.run_dir("local patience again")) == result(ground.run_dir("local patience"))


@pytest.mark.matrix
def test_every_budget_is_kept_where_there_are_several(ground: Playground) -> None:
    options = {**CASES[BUDGET], "sora.budgets": {"self_attn": 1, "mlp": 3}}
    assert ground.codes("local budgets", 2, **options) == [0, 0]
    ranks = lines(ground.run_dir("local budgets"), "ranks.jsonl")[-1]["ranks"]
    costs = {
        "q_proj": 128,
        "o_proj": 128,
        "k_proj": 96,
        "v_proj": 96,
        "gate_proj": 236,
        "up_proj": 236,
        "down_proj": 236,
    }
    for pattern, target in options["sora.budgets"].items():
        own = {name: rank for name, rank in ranks.items() if pattern in name}
        spent = sum(rank * costs[name.rpartition(".")[2]] for name, rank in own.items())
        whole = sum(target * costs[name.rpartition(".")[2]] for name in own)
        assert whole - min(costs[name.rpartition(".")[2]] for name in own) < spent <= whole, pattern


def test_a_cut_that_leaves_nothing_ends_the_run_with_the_empty_adapter_that_was_allowed(ground: Playground) -> None:
    options = {
        **CASES[BUDGET],
        "sora.target_rank": 0.001,
        "output.allow_empty_adapter": True,
    }
    assert ground.codes("empty", 2, **options) == [0, 0]
    run_dir = ground.run_dir("empty")
    assert status(run_dir)["state"] == "finished"
    assert set(lines(run_dir, "ranks.jsonl")[-1]["ranks"].values()) == {0}
