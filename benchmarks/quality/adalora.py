"""PEFT's AdaLoRA at 25 %, tuned in two settings, beside SoRA and LoRA.

    python benchmarks/quality/adalora.py [--workers 2] [--out FILE] [--runs FILE]

As many ranks in training as SoRA (init_r = 16, scale 1) and as many at the end (target_r = 4),
between the same steps (10 and 40 %), masked in every step of these; the same rows in the same order, loss, schedule of
rates, clipping and AdamW.  The weight of its orthogonality loss is tuned beside the learning rate: PEFT's default of
0.5 and 0.1, and while the best is at an edge the next one beyond it, each with the ladder of learning rates; the pair
with the lowest tuning loss is frozen.  Its budget counts ranks, not parameters (every line has both), and wide modules
keep more of them: so it runs again with fewer ranks, by what one costs it, for the others' parameters.  The others have
the rates that grid.py froze (--runs), and run here because machines round bfloat16 differently and pairs want the same
one.  Every run is a line of --out (default adalora.jsonl); one that is there is not made again.  Prints the numbers of
README.md.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from protocol import TEST, TUNING, WHOLE, Cell, Group, Protocol, Queue, R, best_rate, tuning_lines, wanted_rates
from statistics_of_pairs import PAIR_TABLE, pair_row
from tasks import HERE
from workers import Lines, add_options, lines_there, missing_data, too_few_workers, unusable, work_off

if TYPE_CHECKING:
    from runner import Runner

SIZE = 0.25
WEIGHTS = (0.003, 0.01, 0.03, 0.1, 0.5, 1.0)
"""The ladder of the orthogonality loss's weight."""
FIRST_WEIGHTS = (0.1, 0.5)
LORA = Group(WHOLE, "lora")
RIVALS = (Group(SIZE, "sora"), Group(SIZE, "uniform"), LORA)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser)
    parser.add_argument("--runs", type=Path, default=HERE / "runs.jsonl", help="where the others' rates were tuned")
    parser.add_argument("--out", type=Path, default=HERE / "adalora.jsonl")
    arguments = parser.parse_args()
    if wrong := too_few_workers(arguments.workers) or unusable(arguments.out) or missing_data():
        print(f"adalora.py: {wrong}", file=sys.stderr)
        return 2
    queue = AdaLoraQueue()
    lines = {**tuning_lines(arguments.runs), **lines_there(arguments.out, arguments.again)}
    if wrong := work_off(queue, lines, arguments.out, run, num_workers=arguments.workers):
        print(f"adalora.py: {wrong}", file=sys.stderr)
        return 1
    print(table(queue, lines))
    return 0


# ------------------------------------------------------------------------------------------------------------- tuning


@dataclass(frozen=True)
class AdaLoraRun:
    """One run of AdaLoRA."""

    orthogonality: float
    learning_rate: float
    seed: int
    rows: str
    ranks: int | None = None
    """Of all modules together, at the end; None: as many as SoRA."""

    def __str__(self) -> str:
        settings = f"weight {self.orthogonality:<6g} lr {self.learning_rate:<8g}"
        return f"adalora {settings} seed {self.seed:<4} {self.rows}{self._of_ranks}"

    @property
    def key(self) -> str:
        return f"adalora {self.orthogonality:g} {self.learning_rate:g} {self.seed} {self.rows}{self._of_ranks}"

    @property
    def fields(self) -> dict[str, Any]:
        """As its line says it."""
        return {name: value for name, value in asdict(self).items() if value is not None}

    @property
    def _of_ranks(self) -> str:
        return "" if self.ranks is None else f" {self.ranks} ranks"


@dataclass(frozen=True)
class AdaLoraQueue:
    """Tuning, then the seeds, then those with fewer ranks, and those of the others."""

    protocol: Protocol = field(default_factory=Protocol)

    @property
    def others(self) -> Queue:
        return Queue(self.protocol, [RIVALS])

    def missing(self, lines: Lines) -> Iterator[AdaLoraRun | Cell]:
        """What can be run now."""
        chosen = self.frozen(lines)
        if chosen is not None:
            runs = [*self.test_runs(*chosen), *self.smaller_runs(lines)]
        else:
            pairs = (
                (weight, rate)
                for weight in self._unfinished(lines)
                for rate in wanted_rates(self.tuning_losses(weight, lines), self.protocol.rates)
            )
            runs = [AdaLoraRun(*pair, seed, TUNING) for pair in pairs for seed in self.protocol.tuning_seeds]
        yield from (run for run in runs if run.key not in lines)
        yield from self.others.missing(lines)

    def frozen(self, lines: Lines) -> tuple[float, float] | None:
        """The weight of the orthogonality loss and the learning rate, None while they are being tuned."""
        if self._unfinished(lines):
            return None
        weight = best_rate(self.best_losses(lines))
        return weight, best_rate(self.tuning_losses(weight, lines))

    def test_runs(self, orthogonality: float, learning_rate: float) -> list[AdaLoraRun]:
        return [AdaLoraRun(orthogonality, learning_rate, seed, TEST) for seed in self.protocol.seeds]

    def smaller_runs(self, lines: Lines) -> list[AdaLoraRun]:
        """With so many ranks that it has about the parameters of the others: by those that it kept per rank."""
        chosen = self.frozen(lines)
        runs = [] if chosen is None else self.test_runs(*chosen)
        found = [lines[run.key] for run in runs if "kept_params" in lines.get(run.key, {})]
        if not runs or len(found) < len(runs):
            return []
        a_rank = sum(line["kept_params"] for line in found) / sum(line["kept_ranks"] for line in found)
        ranks = math.floor(found[0]["budget_params"] / a_rank)
        return [replace(run, ranks=ranks) for run in runs]

    def best_losses(self, lines: Lines) -> dict[float, float]:
        """{weight: tuning loss at its best learning rate} of the weights whose rates are tuned."""
        found = {weight: self.tuning_losses(weight, lines) for weight in WEIGHTS}
        rates = self.protocol.rates
        return {weight: min(own.values()) for weight, own in found.items() if own and not wanted_rates(own, rates)}

    def tuning_losses(self, orthogonality: float, lines: Lines) -> dict[float, float]:
        """{learning rate: mean loss} of the rates whose tuning seeds are all there."""
        found: dict[float, list[float]] = {}
        for line in lines.values():
            if line["cell"].get("orthogonality") == orthogonality and line["cell"]["rows"] == TUNING:
                found.setdefault(line["cell"]["learning_rate"], []).append(line.get("loss", math.inf))
        wanted = len(self.protocol.tuning_seeds)
        return {rate: statistics.mean(some) for rate, some in found.items() if len(some) == wanted}

    def _unfinished(self, lines: Lines) -> list[float]:
        """Weights whose learning rates are to be tuned next."""
        return wanted_rates(self.best_losses(lines), FIRST_WEIGHTS, WEIGHTS)


# -------------------------------------------------------------------------------------------------------------- a run


def run(runner: Runner, run: AdaLoraRun | Cell) -> dict[str, Any]:
    """The run's line."""
    if isinstance(run, Cell):
        return runner.run(run)
    described = {"key": run.key, "cell": run.fields, "protocol": runner.protocol.fields}
    return runner.line_of(described, lambda: trained(runner, run))


def trained(runner: Runner, run: AdaLoraRun) -> dict[str, Any]:
    """Losses, ranks and parameters of a run; the model is left as it was."""
    import torch
    from peft import AdaLoraConfig, get_peft_model

    from sora_llm.budget import params_of
    from sora_llm.causal_loss import causal_loss_sum

    protocol = runner.protocol
    base_loss = runner.base_loss(run.rows)
    job = runner.job(Cell(LORA, run.learning_rate, run.seed, run.rows, protocol))
    (stage,), train = job.plan.stages, job.config.train
    torch.manual_seed(run.seed)
    model = get_peft_model(
        runner.model,
        AdaLoraConfig(
            init_r=R,
            target_r=round(SIZE * R),
            lora_alpha=R,
            tinit=math.floor(0.1 * protocol.steps),
            tfinal=protocol.steps - math.floor(0.4 * protocol.steps),
            total_step=protocol.steps,
            orth_reg_weight=run.orthogonality,
            target_modules=sorted({name.rpartition(".")[2] for name in runner.shapes}),
        ),
    )
    adalora: Any = model.base_model
    if run.ranks is not None:  # its config has whole numbers per module
        adalora.rankallocator.target_bgt = run.ranks
    try:
        # Of PEFT 0.21 `ranknum`, the divisor of the scale, takes gradients too: it is left as it was made.
        parameters = {name: p for name, p in model.named_parameters() if ".lora_" in name}
        factors = [p if "lora_A" in name else p.T for name, p in parameters.items() if "lora_E" not in name]
        optimizer = torch.optim.AdamW(
            parameters.values(),
            lr=0.0,
            betas=(train.adam_beta1, train.adam_beta2),
            eps=train.adam_epsilon,
            weight_decay=train.weight_decay,
        )
        assert train.max_grad_norm is not None
        losses = []
        for step in range(protocol.steps):
            optimizer.param_groups[0]["lr"] = stage.rates(step)["learning_rate"]
            batches = job.batches(step)
            (batch,) = batches.micro_batches
            loss = causal_loss_sum(runner.model, **batch) / batches.weight
            apart = torch.stack([torch.linalg.norm(p @ p.T - torch.eye(len(p))) for p in factors]).mean()
            (loss + run.orthogonality * apart).backward()
            torch.nn.utils.clip_grad_norm_(parameters.values(), train.max_grad_norm)
            optimizer.step()
            adalora.update_and_allocate(step)
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        kept = {
            name.partition("base_model.model.")[2].partition(".lora_E")[0]: int((p != 0).sum())
            for name, p in parameters.items()
            if "lora_E" in name
        }
        final_loss = runner.loss(runner.rows[run.rows])
    finally:
        model.unload()
    costs = {name: sum(shape) for name, shape in runner.shapes.items()}
    return {
        "base_loss": base_loss,
        "loss": final_loss,
        "train_losses": [round(one, 4) for one in losses[::12]],
        "kept_ranks": sum(kept.values()),
        "kept_params": sum(rank * costs[name] for name, rank in kept.items()),
        "budget_params": params_of(SIZE * R, sum(costs.values())),
        "ranks": list(kept.values()),
    }


# -------------------------------------------------------------------------------------------------------------- table


def table(queue: AdaLoraQueue, lines: Lines) -> str:
    """Losses over test rows, and the pairs of one seed."""
    chosen = queue.frozen(lines)
    assert chosen is not None, "tuning has not ended"
    rows = [f"weight of the orthogonality loss {chosen[0]:g}, learning rate {chosen[1]:g}", ""]
    for weight in sorted(queue.best_losses(lines)):
        tried = sorted(queue.tuning_losses(weight, lines).items())
        rows.append(f"tuning loss with {weight:g}: " + ", ".join(f"{rate:g} {loss:.4f}" for rate, loss in tried))
    for part in (queue.test_runs(*chosen), queue.smaller_runs(lines)):
        runs = [lines[run.key] for run in part]
        own = [line.get("loss", math.inf) for line in runs]
        ranks, kept = ([line.get(key, 0) for line in runs] for key in ("kept_ranks", "kept_params"))
        rows += ["", f"{ranks[0]} ranks, {min(kept):,} to {max(kept):,} parameters (the others: "]
        rows[-1] += f"{runs[0].get('budget_params', 0):,})"
        rows += [f"test loss {statistics.mean(own):.4f}: " + ", ".join(f"{loss:.4f}" for loss in own), "", PAIR_TABLE]
        for group in RIVALS:
            theirs = [lines[cell.key].get("loss", math.inf) for cell in queue.others.test_cells(group, lines)]
            rows.append(pair_row(f"{group} − adalora", [a - b for a, b in zip(theirs, own, strict=True)]))
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
