"""The quality benchmark: its learning rates, its order of runs, its tests; its runs are the product's."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
import time
from concurrent.futures import Future
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, SHARED

from sora_llm.config import Config, Train
from sora_llm.running.plan import Plan, Stage
from sora_llm.schedule import phases

QUALITY = ROOT / "benchmarks/quality"
with pytest.MonkeyPatch.context() as patch:  # names as general as theirs are for no other file of tests
    patch.setattr(sys, "path", [str(QUALITY), *sys.path])
    from adalora import AdaLoraQueue, AdaLoraRun
    from plain import with_cuts
    from protocol import (
        ARMS,
        CORE_SIZES,
        LADDER,
        TEST,
        TUNING,
        Cell,
        Group,
        Protocol,
        Queue,
        best_rate,
        core_blocks,
        core_groups,
        extra_groups,
        read_lines,
        wanted_rates,
    )
    from speed import seconds_to, speed_pairs, speed_section
    from statistics_of_pairs import bootstrap_interval, holm, sign_flip_p, sign_test_p
    from tasks import GSM8K_ANSWERS, ROLE_PLAY, TASKS, Task
    from verdicts import Found, difference_table, found_in, hypotheses, results, verdict_table
    from workers import Scheduler, append
for imported in ("adalora", "plain", "protocol", "speed", "statistics_of_pairs", "tasks", "verdicts", "workers"):
    del sys.modules[imported]

FIRST = Protocol.rates
Lines = dict[str, dict[str, Any]]


def tuned_by_the_rule(loss_of: Any) -> dict[float, float]:
    found: dict[float, float] = {}
    while rates := wanted_rates(found, FIRST):
        found |= {rate: loss_of(rate) for rate in rates}
    return found


@pytest.mark.parametrize("best", [6e-4, 3e-3, 8e-3, 1.1e-2, 4e-2, 0.15])
def test_tuning_ends_with_a_best_rate_that_has_tried_rates_on_both_sides(best: float) -> None:
    found = tuned_by_the_rule(lambda rate: math.log2(rate / best) ** 2)
    chosen = best_rate(found)
    assert min(found) < chosen < max(found)
    assert abs(math.log2(chosen / best)) <= 0.26, "rungs are √2 apart"
    assert set(FIRST) <= set(found)


def test_a_rate_that_fails_is_never_chosen_and_does_not_stop_the_tuning() -> None:
    found = tuned_by_the_rule(lambda rate: math.inf if rate > 5e-3 else -rate)
    assert best_rate(found) == max(rate for rate in found if rate <= 5e-3)


def made(cell: Cell, loss: float) -> dict[str, Any]:
    kept = round(443_904 * cell.group.size)
    about = {"protocol": cell.protocol.fields, "device": "none", "sources": "these"}
    return {"key": cell.key, "cell": cell.fields, "base_loss": 5.0, "loss": loss, "kept_params": kept, **about}


def worked_off(queue: Queue, loss_of: Any) -> tuple[Lines, list[Cell]]:
    """Every cell that the queue asks for, one after the other."""
    lines: Lines = {}
    order = []
    while (cell := next(queue.missing(lines), None)) is not None:
        lines[cell.key] = made(cell, loss_of(cell))
        order.append(cell)
    return lines, order


def plain_loss(cell: Cell) -> float:
    return 2.0 + math.log2(cell.learning_rate / 8e-3) ** 2 + 0.001 * cell.seed


def test_each_block_is_tuned_as_a_whole_and_then_confirmed_seed_by_seed() -> None:
    blocks = core_blocks()
    lines, order = worked_off(Queue(Protocol(), blocks), plain_loss)
    assert len(order) == len(lines), "no cell comes twice"
    assert {cell.learning_rate for cell in order if cell.rows == TEST} == {8e-3}
    assert not {cell.seed for cell in order if cell.rows == TEST} & set(Protocol.tuning_seeds)
    for block in blocks:
        cells = [cell for cell in order if cell.group in block]
        assert cells == order[: len(cells)], "nothing of a later block comes before the end of an earlier one"
        order = order[len(cells) :]
        confirmed = [cell for cell in cells if cell.rows == TEST]
        assert cells[-len(confirmed) :] == confirmed, "tuning comes first"
        assert [cell.seed for cell in confirmed] == sorted(cell.seed for cell in confirmed), "pairs are whole, in time"
        assert len(confirmed) == len(block) * len(Protocol.seeds)


def test_other_tasks_have_the_blocks_that_their_hypotheses_need_and_extras_that_decide_none() -> None:
    blocks = core_blocks(ROLE_PLAY)
    assert [str(group) for block in blocks for group in block] == [
        "lora", "uniform 25%", "sora 25%", "uniform 70%", "sora 70%",
    ]  # fmt: skip
    asked = hypotheses(ROLE_PLAY)
    assert [h.name for h in asked] == ["H1", "H2 at 25%", "H2 at 70%"], "SVD arms are among its extras"
    assert {group for h in asked for group in (*h.rivals, Group(h.size, "sora"))} <= set(core_groups(ROLE_PLAY))
    extras = extra_groups(ROLE_PLAY)
    assert [str(group) for group in extras] == ["balanced", "components", "svd4early 25%", "svd4 25%"]
    assert not {group for h in asked for group in h.rivals} & set(extras)
    assert extra_groups(TASKS["gsm8k_nf4"]) == []


@pytest.mark.parametrize("arm", [name for name, arm in ARMS.items() if arm.cuts])
def test_a_plain_lora_changes_its_form_where_its_arm_says_and_its_rate_ramps_up_again(arm: str) -> None:
    settings = Train(warmup_ratio=0.1, lr_scheduler_type="constant")
    whole = Stage(None, phases(100, 0.1, 1.0), Fraction(1, 10), settings, 1e-2, is_adaptive=False)
    cell = Cell(Group(0.25, arm), 8e-3, 11, TEST)
    (stage,) = with_cuts(Plan(Config(), "none", 1, (whole,), ()), cell).stages
    assert stage.form_changes == tuple(round(100 * share) for share in ARMS[arm].cuts)
    rates = [stage.rates(step)["learning_rate"] for step in range(100)]
    assert all(rates[step] < 0.5 * rates[step - 1] for step in stage.form_changes)


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_committed_runs_have_the_keys_of_their_cells(task: Task) -> None:
    lines = read_lines(task.runs)
    assert len(lines) > 80
    for key, line in lines.items():
        cell = dict(line["cell"])
        group = Group(cell.pop("size"), cell.pop("arm"))
        assert Cell(group, **cell, protocol=Protocol.of(task, line["protocol"]["steps"])).key == key


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_committed_results_are_what_the_committed_runs_say(task: Task) -> None:
    found = found_in(read_lines(task.runs), task, Protocol.steps)
    assert results(found, task.runs, QUALITY / "speed.jsonl") == (task.folder / "results.md").read_text()


def test_the_first_block_answers_what_is_asked_at_its_size() -> None:
    first = set(core_blocks()[0])
    assert all({*h.rivals, Group(h.size, "sora")} <= first for h in hypotheses() if h.size == CORE_SIZES[0])


def scheduled(line_of: Any, deadline: float | None, num_workers: int) -> tuple[Scheduler, Lines]:
    """A scheduler whose workers answer at once, after it has come to its end."""
    lines: Lines = {}

    def submit(cell: Cell) -> Future[dict[str, Any]]:
        future: Future[dict[str, Any]] = Future()
        future.set_result(line_of(cell))
        return future

    scheduler = Scheduler(Queue(Protocol(), [core_groups()]), lines, deadline, submit)
    scheduler.go(num_workers)
    return scheduler, lines


def test_the_scheduler_makes_every_run_once_with_any_number_of_workers() -> None:
    def line_of(cell: Cell) -> dict[str, Any]:
        return {**made(cell, plain_loss(cell)), "wall_seconds": 1.0}

    _, alone = scheduled(line_of, None, 1)
    _, together = scheduled(line_of, None, 12)
    assert alone.keys() == together.keys() and len(alone) > 200


def test_no_run_is_begun_that_would_not_end_in_time() -> None:
    soon = time.monotonic() + 100
    _, lines = scheduled(lambda cell: {**made(cell, 1.0), "wall_seconds": 90.0}, soon, 4)
    assert len(lines) == 4, "the first of each worker, then 1.3 · 90 s is more than 100 s"


def test_a_machine_on_which_everything_fails_is_not_given_all_cells() -> None:
    broken, lines = scheduled(lambda cell: {"key": cell.key, "failed": "CUDA error", "wall_seconds": 0.1}, None, 2)
    assert broken.has_given_up and len(lines) < 12


def test_a_cell_is_another_one_when_anything_that_makes_its_result_is() -> None:
    base = Cell(Group(0.25, "svd"), 8e-3, 1, TUNING)
    others = [
        Cell(Group(0.70, "svd"), 8e-3, 1, TUNING),
        Cell(Group(0.25, "svd4"), 8e-3, 1, TUNING),
        Cell(Group(0.25, "random"), 8e-3, 1, TUNING),
        Cell(Group(0.25, "svd"), 4e-3, 1, TUNING),
        Cell(Group(0.25, "svd"), 8e-3, 2, TUNING),
        Cell(Group(0.25, "svd"), 8e-3, 1, TEST),
        Cell(Group(0.25, "svd"), 8e-3, 1, TUNING, Protocol(steps=100)),
    ]
    assert len({cell.key for cell in [base, *others]}) == 8
    assert base.key == Cell(Group(0.25, "svd"), 8e-3, 1, TUNING, Protocol(seeds=(1, 2))).key


def test_a_cell_is_another_one_when_its_arm_is_made_another_way(monkeypatch: pytest.MonkeyPatch) -> None:
    cell, ways = Cell(Group(0.25, "svd"), 8e-3, 1, TUNING), [{}, {"cuts": (0.5,)}, {"keeps": "random"}, {"sora": {}}]
    svd, found = ARMS["svd"], set()
    for way in ways:
        monkeypatch.setitem(ARMS, "svd", replace(svd, **way))
        found.add(cell.identity)
    assert len(found) == len(ways)


def test_a_cell_of_another_task_is_another_one() -> None:
    cells = [Cell(Group(0.25, "sora"), 8e-3, 1, TUNING, Protocol.of(task, 125)) for task in TASKS.values()]
    assert len({cell.key for cell in cells}) == len(TASKS)


@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_rows_of_a_task_come_with_the_text_of_its_columns(tmp_path: Path, suffix: str) -> None:
    rows = [{"q": "one ", "a": "two", "more": 1}, {"q": "three ", "a": "four", "more": 2}]
    file = tmp_path / f"rows{suffix}"
    file.write_text(json.dumps(rows) if suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    task = replace(GSM8K_ANSWERS, file=file, columns=(("instruction", "q"), ("output", "a")))
    assert list(task.rows()) == list(zip(rows, ["one two", "three four"], strict=True))


def test_adaloras_weight_and_rate_are_tuned_until_both_lie_between_what_was_tried() -> None:
    def loss_of(run: AdaLoraRun | Cell) -> float:
        if isinstance(run, Cell):
            return plain_loss(run)
        return 2.0 + math.log10(run.orthogonality / 0.02) ** 2 + math.log2(run.learning_rate / 2e-2) ** 2

    queue = AdaLoraQueue()
    lines: Lines = {}
    order: list[AdaLoraRun | Cell] = []
    while (run := next(queue.missing(lines), None)) is not None:
        lines[run.key] = {"cell": run.fields, "loss": loss_of(run)}
        if isinstance(run, AdaLoraRun):
            ranks = run.ranks or 168
            lines[run.key] |= {"kept_params": 800 * ranks, "kept_ranks": ranks, "budget_params": 110_976}
        order.append(run)
    own = [run for run in order if isinstance(run, AdaLoraRun)]
    assert order[: len(own)] == own, "the others come last"
    tuning = [run for run in own if run.rows == TUNING]
    assert own[: len(tuning)] == tuning
    assert {run.orthogonality for run in tuning} == {0.5, 0.1, 0.03, 0.01}, "0.03 lies between the last ones"
    assert queue.frozen(lines) == (0.03, 0.0226)
    assert [(run.orthogonality, run.learning_rate, run.seed, run.ranks) for run in own[len(tuning) :]] == [
        (0.03, 0.0226, seed, ranks) for ranks in (None, 138) for seed in Protocol.seeds
    ], "138 ranks of 800 parameters are the largest number within the others' 110,976"
    for weight in queue.best_losses(lines):
        rates = queue.tuning_losses(weight, lines)
        assert min(rates) < best_rate(rates) < max(rates)


def test_a_line_that_was_cut_off_is_passed_over_and_a_run_that_was_made_again_counts(tmp_path: Path) -> None:
    file = tmp_path / "runs.jsonl"
    lines = [{"key": "a", "failed": "x"}, {"key": "a", "loss": 1.0}, {"key": "a", "loss": 2.0}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"key": "b", "lo')
    append(file, {"key": "c"})
    append(file, {"key": "d"})
    assert read_lines(file) == {"a": {"key": "a", "loss": 1.0}, "c": {"key": "c"}, "d": {"key": "d"}}


def test_the_sign_flip_test_counts_sign_patterns() -> None:
    assert sign_flip_p([-0.1 * n for n in range(1, 9)]) == 1 / 256
    assert sign_flip_p([0.1] * 8) == 1.0
    values = [-0.5, 0.2, -0.3, 0.1]
    flipped = [
        sum(s * abs(v) for s, v in zip(signs, values, strict=True)) for signs in itertools.product((1, -1), repeat=4)
    ]
    assert sign_flip_p(values) == sum(total <= sum(values) + 1e-9 for total in flipped) / 16


def test_holm_corrects_step_by_step_and_a_binomial_tail_is_that_of_fair_coins() -> None:
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "b": 0.06, "c": 0.06})
    assert sign_test_p(8, 8) == 1 / 256 and sign_test_p(7, 8) == 9 / 256 and sign_test_p(0, 8) == 1.0


def test_a_bootstrap_interval_is_the_same_every_time_and_holds_the_mean() -> None:
    values = [1.0, 2.0, 4.0, 3.0, 2.5, 1.5, 2.0, 3.5]
    low, high = bootstrap_interval(values)
    assert (low, high) == bootstrap_interval(values)
    assert min(values) < low < sum(values) / 8 < high < max(values)


SHIFT = {"lora": 0.0, "sora": 0.03, "uniform": 0.04, "svd": 0.05, "svd4": 0.02, "svd4early": 0.06}
"""SoRA 0.01 better than uniform and 0.02 than one SVD cut, 0.01 worse than four; the gap is about 3 nats."""


def shifted_lines() -> tuple[Queue, Lines]:
    queue = Queue(Protocol(), [core_groups()])
    return queue, worked_off(queue, lambda cell: plain_loss(cell) + SHIFT.get(cell.group.arm, 0.1))[0]


def verdicts_of(queue: Queue, lines: Lines) -> dict[str, str]:
    """{hypothesis: its verdict}."""
    rows = [[cell.strip() for cell in row.split("|")] for row in verdict_table(Found(queue, lines)).splitlines()[2:]]
    return {row[1]: row[-2] for row in rows}


def test_verdicts_follow_the_losses_seed_by_seed() -> None:
    found = verdicts_of(*shifted_lines())
    assert found["H1"] == "**holds**", "0.03 of 3 nats is within the margin of 2 %"
    for size in CORE_SIZES:
        assert found[f"H2 at {size:.0%}"] == "**holds**"
        assert found[f"H3 at {size:.0%}"] == "**the opposite**", "one of two rivals is better than SoRA"


@pytest.mark.parametrize(
    ("spoil", "verdict"),
    [
        (lambda line: None, "open: runs are missing"),
        (lambda line: {key: line[key] for key in line if key != "loss"} | {"failed": "x"}, "not shown: 1 of its runs"),
        (lambda line: line | {"sources": "others"}, "open: its runs are of several devices or sources"),
        (lambda line: line | {"device": "another"}, "open: its runs are of several devices or sources"),
    ],
)
def test_runs_that_are_missing_failed_or_made_otherwise_decide_nothing(spoil: Any, verdict: str) -> None:
    queue, lines = shifted_lines()
    seed = queue.protocol.seeds[-1]
    (key,) = (cell.key for cell in queue.test_cells(Group(0.25, "uniform"), lines) if cell.seed == seed)
    spoiled = lines | {key: spoil(lines[key])}
    found = verdicts_of(queue, {key: line for key, line in spoiled.items() if line is not None})
    assert found["H2 at 25%"].startswith(verdict)
    assert found["H2 at 70%"] == "**holds**"


def test_every_arm_is_held_to_the_margin_too() -> None:
    rows = difference_table(Found(*shifted_lines())).splitlines()
    (uniform,) = (row for row in rows if row.startswith("| uniform 70% | lora |"))
    *_, better, within, _ = (cell.strip() for cell in uniform.split("|"))
    assert float(better) == 1.0 and float(within) == 0.0039, "0.04 of 3 nats: a rival passes as well"


def speed_lines(pairs: Any, seconds: Any, tmp_path: Path) -> Path:
    """Runs whose loss falls from 5 to 2 in a straight line, `seconds(arm)` long; None where the run failed."""
    tmp_path.mkdir(exist_ok=True)
    file = tmp_path / "speed.jsonl"
    for pair in pairs:
        for cell in pair:
            line = {"key": cell.key, "cell": cell.fields, "device": "none", "base_loss": 5.0}
            took = seconds(cell)
            if took is None:
                append(file, {**line, "failed": "x"})
                continue
            curve = [{"seconds": took * k / 10, "eval_loss": 5.0 - 0.3 * k} for k in range(1, 11)]
            append(file, {**line, "seconds": took, "curve": curve})
    return file


def test_who_is_first_at_the_loss_decides_h4_and_a_failed_run_loses(tmp_path: Path) -> None:
    queue, lines = shifted_lines()
    pairs = speed_pairs(queue, lines)
    assert len(pairs) == 8 and all(a.seed == b.seed for a, b in pairs)
    file = speed_lines(pairs, lambda cell: 10.0 if cell.group.arm == "lora" else 9.0, tmp_path)
    assert "| 8 of 8 | 0.0039 | **holds** |" in speed_section(file, pairs)
    assert "| open: 7 of 8 pairs |" in speed_section(
        speed_lines(pairs[:7], lambda cell: 9.0, tmp_path / "seven"), pairs
    )

    def two_fail(cell: Cell) -> float | None:
        return 10.0 if cell.group.arm == "lora" else None if cell.seed in (11, 12) else 9.0

    assert "| 6 of 8 | 0.1445 | not shown |" in speed_section(speed_lines(pairs, two_fail, tmp_path / "failed"), pairs)


def test_the_time_to_a_loss_lies_between_the_points_around_it() -> None:
    curve = [{"seconds": 1.0, "eval_loss": 4.0}, {"seconds": 3.0, "eval_loss": 3.0}]
    assert seconds_to(curve, 3.5) == 2.0
    assert seconds_to(curve, 2.9) == math.inf


def test_all_rates_of_the_protocol_are_rungs_of_the_ladder() -> None:
    assert set(FIRST) <= set(LADDER)


@pytest.mark.matrix  # and in benchmarks/quality/smoke.sh
@pytest.mark.skipif(not (SHARED / "models/base5m").exists(), reason="base5m is missing; set SORA_TEST_DATA")
def test_a_run_of_the_benchmark_is_bit_for_bit_that_of_the_command() -> None:
    command = [sys.executable, str(QUALITY / "same_as_train.py"), "--steps", "10"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bit for bit" in done.stdout
