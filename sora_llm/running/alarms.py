"""Alarms that the numbers of a run raise."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from sora_llm.budget import LAMBDA_MAX, LAMBDA_MIN, RankBudget
from sora_llm.schedule import FINETUNE, SPARSIFY

DYING_SHARE = 0.02
"""Share of the parameters before pruning; with a fixed λ, gates are reported as dying below it."""
SATURATED_LINES = 3
OFF_TRACK = 1.2
"""Ratio of kept parameters to the schedule's target above which λ at its bound is reported as too weak."""
LINES_BEFORE, FEWEST_LINES, LINES_AFTER = 8, 5, 3
"""The last lines before the cut with whose train loss that after it is compared, how many of them it takes to know how
much lines differ anyway, and how many lines' steps are awaited after it."""
WORSE = 1.001
"""Ratio of the dev loss to that before training from which an adapter is called worse; rounding is less."""
LOSS_JUMP, SPREADS = 1.1, 3
"""By what ratio and how many standard errors the loss rises if the cut is to blame.  (A ratio of single lines blamed it
for batches of eight rows in 8 of 24 runs: benchmarks/LOG.md.)"""
NAMES_SHOWN = 3
"""Number of modules that an alarm names."""


class Alarms:
    """Checks each line of metrics.  Alarms are also queued for the next line (`take`); checkpoints store `state`."""

    def __init__(self, budgets: Sequence[RankBudget], full_params: int) -> None:
        self._budgets, self._full_params = tuple(budgets), full_params
        self._raised: list[str] = []
        self._waiting: list[str] = []
        self._saturated_lines = 0
        self._before: list[tuple[float, int]] = []  # losses, and how many steps each is the mean of
        self._after: list[tuple[float, int]] = []
        self._last_step = 0
        self._cut_is_judged = self._has_pruned = False
        self.start_loss: float | None = None
        """Dev loss before training."""

    def of_line(self, line: Mapping[str, Any], progress: float | None) -> list[str]:
        """The alarms that this line of metrics raises; `progress` ∈ (0, 1] through the sparsify window is None if no
        gate is cut."""
        found: dict[str, str] = {}
        if line.get("skipped_steps"):
            found["skipped"] = (
                f"steps are skipped ({line['skipped_steps']} of the first {line['step']}), because the loss or a "
                "gradient is not finite; lower train.learning_rate if there are more (metrics.jsonl has their number)"
            )
        if line["phase"] == SPARSIFY and progress is not None:
            self._has_pruned |= line["kept_params"] < self._full_params
            found |= self._of_gates(line, progress)
        if "loss" in line:
            num_steps, self._last_step = line["step"] - self._last_step, line["step"]
            if line["phase"] != FINETUNE:
                self._before = [*self._before, (line["loss"], num_steps)][-LINES_BEFORE:]
            elif not self._cut_is_judged:
                self._after.append((line["loss"], num_steps))
                found |= self._of_jump()
        return self._new(found)

    def _of_jump(self) -> dict[str, str]:
        losses, count = [loss for loss, _ in self._before], len(self._before)
        if count < FEWEST_LINES:
            self._cut_is_judged = True  # nothing can be said of it
            return {}
        steps_after = sum(num_steps for _, num_steps in self._after)
        if steps_after < LINES_AFTER * statistics.median(num_steps for _, num_steps in self._before):
            return {}
        self._cut_is_judged = True
        before = statistics.fmean(losses)
        after = sum(loss * num_steps for loss, num_steps in self._after) / steps_after
        error = statistics.stdev(losses) * math.sqrt(1 / count + 1 / LINES_AFTER)
        if after <= max(LOSS_JUMP * before, before + SPREADS * error):
            return {}
        return {
            "jump": f"the train loss rose from {before:.4f} to {after:.4f} when the adapters were cut (means of "
            f"{count} lines before it and {len(self._after)} after it); keep more ranks, or cut later "
            "(sora.consensus_at)"
        }

    def _of_gates(self, line: Mapping[str, Any], progress: float) -> dict[str, str]:
        found = {}
        kept = line["kept_params"]
        if not self._budgets and kept < DYING_SHARE * self._full_params:
            found["dying"] = (
                f"all gates are dying: {kept:,} of {self._full_params:,} parameters are left at step {line['step']}; "
                "lower sora.sparse_lambda or sora.gate_lr"
            )
        is_by_quantile = "threshold" in line or "thresholds" in line
        if (
            progress >= 0.5
            and not self._has_pruned
            and line.get("budget_params", 0) < self._full_params
            and not is_by_quantile
            and line.get("lambda") != 0  # λ = 0 asks for no pruning
        ):
            stronger = "sora.gate_lr" if self._budgets else "sora.sparse_lambda or sora.gate_lr"
            at = "" if self._budgets or "lambda" not in line else f" at λ {line['lambda']:g}"
            found["alive"] = f"no gate has died by half of the sparsify phase{at}; raise {stronger}, or train longer"
        lambdas = line.get("lambdas", {"": line.get("lambda")})
        wanted = line.get("target_mean_rank")
        at_bound = wanted is not None and any(v is not None and v >= LAMBDA_MAX for v in lambdas.values())
        cost = sum(sum(budget.costs.values()) for budget in self._budgets)
        is_behind = wanted is not None and kept > OFF_TRACK * wanted * cost
        self._saturated_lines = self._saturated_lines + 1 if at_bound and is_behind else 0
        if at_bound:
            assert wanted is not None
            if self._saturated_lines >= SATURATED_LINES:
                found["saturated"] = (
                    f"λ is at its bound of {LAMBDA_MAX:g} and the mean rank of {line['mean_rank']:.2f} stays above the "
                    f"{wanted:.2f} that the schedule requires at this step: consensus will have to cut the rest at "
                    "once; raise sora.gate_lr, widen the sparsify phase, or use sora.threshold adaptive"
                )
        elif wanted is not None and any(value is not None and value == LAMBDA_MIN for value in lambdas.values()):
            found["idle"] = (
                f"λ is at its lower bound of {LAMBDA_MIN:g}: gates die although the schedule would let them live; "
                "lower sora.gate_lr"
            )
        return found

    def of_components(self, has_learned: Mapping[str, bool]) -> list[str]:
        """The alarms that the modules' ΔW raise before the sparsify phase; {module: whether its ΔW is nonzero}."""
        found = {}
        for budget in self._budgets:
            if not any(has_learned[name] for name in budget.costs):
                found[f"blank {budget.name}"] = (
                    f"nothing was learned in {_listed(budget.costs)} before the sparsify phase: all that shares the "
                    f"budget {budget.name!r} is pruned entirely and cannot come back; check that gradients reach it, "
                    "or lengthen the dense phase"
                )
        return self._new(found)

    def of_cut(self, ranks: Mapping[str, int], shortfall: int | None) -> list[str]:
        """The alarms raised by the ranks that consensus kept."""
        found = {}
        one_rank = min((cost for budget in self._budgets for cost in budget.costs.values()), default=0)
        if shortfall and shortfall >= one_rank:  # a smaller shortfall has no room for another rank
            found["shortfall"] = (
                f"the budget could not be used up: all live components cost {shortfall:,} parameters less; lower "
                "sora.gate_lr or lengthen the dense phase"
            )
        for budget in self._budgets:
            below = [name for name, cap in budget.caps.items() if ranks[name] < min(budget.min_rank, cap)]
            unasked = [name for name in budget.costs if ranks[name] == 0 and 2 * budget.params >= budget.full]
            if below:
                found[f"below {budget.name}"] = (
                    f"{_listed(below)} ended below sora.min_rank {budget.min_rank}: fewer slots were alive there when "
                    "the adapters were cut; lengthen the dense phase, or lower sora.gate_lr"
                )
            elif unasked:
                found[f"zero {budget.name}"] = (
                    f"{_listed(unasked)} ended at rank 0 although the budget keeps "
                    f"{budget.params / budget.full:.0%} of all ranks; set sora.min_rank if every module should keep one"
                )
        return self._new(found)

    def of_result(self, eval_loss: float | None, start: str, stage_number: int = 0) -> list[str]:
        """The alarms raised by the adapter about to be exported; `start` describes what it started from."""
        if eval_loss is None or self.start_loss is None or eval_loss <= WORSE * self.start_loss:
            return []
        advice = "train longer, or keep more ranks" if self._budgets else "or train longer"
        said = (
            f"the adapter is worse than {start}: its dev loss is {eval_loss:.4f}, and was {self.start_loss:.4f} "
            f"before training; lower train.learning_rate, {advice}"
        )
        return self._new({f"worse {stage_number}": said})

    def _new(self, found: Mapping[str, str]) -> list[str]:
        new = {key: sentence for key, sentence in found.items() if key not in self._raised}
        self._raised += new
        self._waiting += new.values()
        return list(new.values())

    def take(self) -> list[str]:
        """Return the alarms queued for the next line of metrics and empty the queue."""
        taken, self._waiting = self._waiting, []
        return taken

    def state(self) -> dict[str, Any]:
        """The state that a checkpoint stores."""
        return {
            "raised": list(self._raised),
            "saturated_lines": self._saturated_lines,
            "before": list(self._before),
            "after": list(self._after),
            "last_step": self._last_step,
            "cut_is_judged": self._cut_is_judged,
            "has_pruned": self._has_pruned,
            "start_loss": self.start_loss,
            "waiting": list(self._waiting),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Restore `state`."""
        self._raised = list(state["raised"])
        self._saturated_lines = int(state["saturated_lines"])
        self._before, self._after = ([(loss, n) for loss, n in state[key]] for key in ("before", "after"))
        self._last_step = int(state["last_step"])
        self._cut_is_judged, self._has_pruned = bool(state["cut_is_judged"]), bool(state["has_pruned"])
        self.start_loss = state["start_loss"]
        self._waiting = list(state["waiting"])


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - NAMES_SHOWN} more modules" if len(names) > NAMES_SHOWN else ""
    return ", ".join(names[:NAMES_SHOWN]) + more
