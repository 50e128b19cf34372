"""What the numbers of a run say by themselves, each sentence once, also over an interruption."""

from __future__ import annotations

import json
from typing import Any

import pytest
from runs import CONFIG, TINY, gsm8k_overrides

from sora_llm import cli
from sora_llm.budget import RankBudget
from sora_llm.running.alarms import Alarms
from sora_llm.train import run

FULL = 1000
COSTS = {"a": 10, "b": 10}
"""So a mean rank of 30 is 600 parameters."""


def budget(params: int = 500, min_rank: int = 0) -> RankBudget:
    return RankBudget("all", COSTS, dict.fromkeys(COSTS, 50), params, min_rank)


def line(**fields: Any) -> dict[str, Any]:
    return {"step": 10, "phase": "sparsify", "kept_params": 600, "mean_rank": 30.0, "loss": 2.0, **fields}


def said(alarms: Alarms, progress: float | None = 0.6, **fields: Any) -> str:
    return " ".join(alarms.of_line(line(**fields), progress))


def after_losses(*losses: float, steps: int = 10) -> Alarms:
    """Lines of `steps` steps each, to step 100."""
    alarms = Alarms([], FULL)
    for number, loss in enumerate(losses, 1):
        assert said(alarms, 0.1, step=100 - steps * (len(losses) - number), loss=loss) == ""
    return alarms


def test_a_run_that_goes_well_says_nothing() -> None:
    alarms = Alarms([], FULL)
    for progress in (0.2, 0.5, 1.0):
        assert said(alarms, progress, **{"lambda": 0.5}) == ""
    assert said(alarms, None, phase="finetune", step=110, loss=2.1) == ""
    with_budget = Alarms([budget()], FULL)
    assert said(with_budget, target_mean_rank=29.0, budget_params=500, **{"lambda": 0.5}) == ""
    assert with_budget.of_cut({"a": 25, "b": 25}, 0) == []


def test_gates_that_all_die_or_none() -> None:
    assert "all gates are dying: 10 of 1,000" in said(Alarms([], FULL), kept_params=10)
    assert said(Alarms([budget(10)], FULL), kept_params=10) == "", "a budget wanted it"
    alarms = Alarms([], FULL)
    assert said(alarms, 0.4, kept_params=FULL) == ""
    assert "no gate has died by half of the sparsify phase at λ 0.1;" in said(
        alarms, kept_params=FULL, **{"lambda": 0.1}
    )
    assert said(alarms, 0.6, kept_params=FULL) == "", "once"
    assert said(Alarms([budget(FULL)], FULL), kept_params=FULL, budget_params=FULL) == "", "a full budget keeps all"
    by_feedback = said(Alarms([budget()], FULL), kept_params=FULL, budget_params=500, **{"lambda": 0.5})
    assert "raise sora.gate_lr, or" in by_feedback, "λ is not the user's there"
    assert said(Alarms([budget()], FULL), kept_params=FULL, budget_params=500, threshold=0.1) == "", "the quantile does"


def test_gates_that_died_and_came_back_have_died() -> None:
    alarms = Alarms([], FULL)
    assert said(alarms, 0.3, kept_params=FULL - 10) == said(alarms, 0.5, kept_params=FULL) == ""
    again = Alarms([], FULL)
    again.load(alarms.state())
    assert said(again, 1.0, kept_params=FULL) == ""


def test_a_budget_of_modules_in_which_nothing_was_learned_is_told_of_before_it_is_pruned_whole() -> None:
    blank = RankBudget("blank", {"c": 10, "d": 10}, {"c": 50, "d": 50}, 500)
    alarms = Alarms([budget(), blank], FULL)
    assert alarms.of_components({"a": True, "b": False, "c": False, "d": True}) == []
    (found,) = alarms.of_components({"a": True, "b": False, "c": False, "d": False})
    assert found.startswith("nothing was learned in c, d before the sparsify phase") and "'blank'" in found
    assert alarms.take() == [found]


def test_a_controller_at_its_bound_that_does_not_get_there() -> None:
    alarms = Alarms([budget()], FULL)
    behind = {"lambda": 1.0, "target_mean_rank": 20.0}
    assert said(alarms, **behind) == said(alarms, **behind) == ""
    assert "λ is at its bound of 1" in said(alarms, **behind)
    on_track = Alarms([budget()], FULL)
    for _ in range(5):
        assert said(on_track, **{"lambda": 1.0, "target_mean_rank": 29.0}) == ""
    interrupted = Alarms([budget()], FULL)
    for bound in (1.0, 1.0, 0.9, 1.0, 1.0):
        assert said(interrupted, **{"lambda": bound, "target_mean_rank": 20.0}) == "", "not three in a row"
    several = Alarms([budget()], FULL)
    for _ in range(3):
        last = said(several, lambdas={"x": 0.5, "y": 1.0}, target_mean_rank=20.0)
    assert "at its bound" in last
    assert "lower bound" in said(Alarms([budget()], FULL), **{"lambda": 1e-3, "target_mean_rank": 29.0})


@pytest.mark.parametrize(
    ("params", "min_rank", "expected"),
    [
        (500, 0, "a ended at rank 0 although the budget keeps 50% of all ranks; set sora.min_rank"),
        (100, 0, None),
        (100, 1, "a ended below sora.min_rank 1: fewer slots were alive there"),
        (500, 11, "a, b ended below sora.min_rank 11"),
    ],
)
def test_a_module_that_has_less_than_it_was_meant_to(params: int, min_rank: int, expected: str | None) -> None:
    found = Alarms([budget(params, min_rank)], FULL).of_cut({"a": 0, "b": 10}, 0)
    assert found == [] if expected is None else expected in found[0]


def test_a_budget_that_could_not_be_used_up() -> None:
    assert "120 parameters less" in Alarms([budget()], FULL).of_cut({"a": 19, "b": 19}, 120)[0]
    assert Alarms([budget()], FULL).of_cut({"a": 19, "b": 19}, min(COSTS.values()) - 1) == [], "no rank costs so little"


def after_cut(alarms: Alarms, *losses: float, steps: int = 10) -> str:
    """What lines of `steps` steps each, from step 100 on, raise."""
    lines = enumerate(losses, 1)
    return " ".join(said(alarms, None, phase="finetune", step=100 + steps * n, loss=loss) for n, loss in lines).strip()


def test_a_loss_that_jumps_when_the_adapters_are_cut() -> None:
    alarms = after_losses(2.0, 2.1, 1.9, 2.0, 2.0)
    assert after_cut(alarms, 2.6, 2.5) == "", "two lines may be noise"
    jump = "the train loss rose from 2.0000 to 2.5000 when the adapters were cut (means of 5 lines before it and 3"
    assert jump in said(alarms, None, phase="finetune", step=130, loss=2.4)
    assert said(alarms, None, phase="finetune", step=140, loss=9.0) == "", "later it has other reasons"


def test_a_loss_that_jumps_before_the_cut_or_long_after_it_is_no_jump_of_the_cut() -> None:
    alarms = after_losses(2.0, 2.0, 2.0, 2.0, 2.0)
    assert said(alarms, 0.2, step=100, loss=9.0) == ""
    assert after_cut(after_losses(*[2.0] * 8), 2.1, 2.1, 2.1, 20.0) == ""


def test_a_batch_of_a_noisy_loss_is_no_jump() -> None:
    """Losses of LoRA, never cut, on the rows and steps of two runs that were cut after the eighth."""
    noisy, outlier = (2.57, 2.95, 2.81, 3.05, 3.05, 2.48, 2.68, 2.72), (2.64, 2.4, 2.29, 2.27, 2.44, 2.63, 2.7, 2.5)
    assert after_cut(after_losses(*noisy, steps=1), 3.05, 2.8, 2.62, steps=1) == ""
    assert after_cut(after_losses(*outlier, steps=1), 3.0, 2.43, 2.81, steps=1) == ""
    assert "rose from" in after_cut(after_losses(*noisy), 3.4, 3.4, 3.4)
    assert after_cut(after_losses(*noisy[-4:]), 9.0, 9.0, 9.0) == "", "four lines say little of the noise"
    early_and_noisy = after_losses(9.0, 1.0, *[2.0] * 8)
    assert "rose from 2.0000" in after_cut(early_and_noisy, 2.3, 2.3, 2.3), "the last eight count"


def test_lines_of_few_steps_after_the_cut_count_for_few() -> None:
    alarms = after_losses(*[2.0] * 8)
    assert after_cut(alarms, 9.0, 2.0, 2.0, 2.0, steps=1) == "", "4 of 30 steps"
    assert "rose from 2.0000 to 2.5000" in said(alarms, None, phase="finetune", step=130, loss=(75 - 9 - 3 * 2) / 26)


def test_losses_around_the_cut_are_known_after_an_interruption() -> None:
    alarms = after_losses(*[2.0] * 8)
    assert after_cut(alarms, 2.4, 2.5) == ""
    again = Alarms([], FULL)
    again.load(json.loads(json.dumps(alarms.state())))
    assert "rose from 2.0000 to 2.5000" in said(again, None, phase="finetune", step=130, loss=2.6)


def test_skipped_steps_are_said_once() -> None:
    alarms = Alarms([], FULL)
    assert said(alarms, skipped_steps=0) == ""
    assert "steps are skipped (2 of the first 10)" in said(alarms, skipped_steps=2)
    assert said(alarms, skipped_steps=3) == ""


def test_an_adapter_that_is_worse_than_the_base() -> None:
    alarms = Alarms([], FULL)
    assert alarms.of_result(9.0, "the base") == [], "the base was not measured"
    alarms.start_loss = 2.0
    assert alarms.of_result(None, "the base") == alarms.of_result(2.0, "the base") == []
    assert alarms.of_result(2.001, "the base") == [], "rounding"
    again = Alarms([], FULL)
    again.load(alarms.state())
    said = "worse than the base: its dev loss is 2.5000, and was 2.0000 before training"
    (found,) = again.of_result(2.5, "the base")
    assert said in found and found.endswith("lower train.learning_rate, or train longer")
    assert again.of_result(2.6, "the base") == []
    with_budget = Alarms([budget()], FULL)
    with_budget.start_loss = 2.0
    assert with_budget.of_result(2.5, "the base")[0].endswith("train longer, or keep more ranks")
    assert again.of_result(2.5, "the base", stage_number=1), "of each stage"


def test_what_was_raised_waits_for_the_next_line_once_and_over_an_interruption() -> None:
    alarms, again = Alarms([budget()], FULL), Alarms([budget()], FULL)
    raised = alarms.of_cut({"a": 0, "b": 10}, 120) + alarms.of_line(line(skipped_steps=2), None)
    again.load(alarms.state())
    assert alarms.take() == again.take() == raised and len(raised) == 3
    assert alarms.take() == []


def test_an_interruption_changes_nothing() -> None:
    behind = {"lambda": 1.0, "target_mean_rank": 20.0}
    alarms = Alarms([budget()], FULL)
    said(alarms, **behind)
    said(alarms, **behind)
    again = Alarms([budget()], FULL)
    again.load(alarms.state())
    assert said(again, **behind) == said(alarms, **behind) != ""
    again.load(alarms.state())
    assert said(again, **behind) == "", "said before"


def test_a_run_that_made_the_base_worse_says_so(tmp_path, capsys):
    options = {**TINY, "train.learning_rate": 1.0, "data.val_set_size": 8}
    options |= {"quantization.load_in_4bit": False, "model.dtype": "float32"}
    result = run(CONFIG, *gsm8k_overrides(tmp_path / "run", **options))
    said = "the adapter is worse than the base: its dev loss is"
    assert result.status["state"] == "finished" and f"warning: {said}" in capsys.readouterr().out
    assert any(said in sentence for sentence in result.metrics["alarms"])
    card = (tmp_path / "run" / "adapter" / "README.md").read_text()
    assert "* dev loss of the base: " in card
    assert cli.main(["inspect", str(tmp_path / "run")]) == 0 and f"! {said}" in capsys.readouterr().out
