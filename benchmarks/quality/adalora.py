"""PEFT's AdaLoRA at 25 %, with a tuned learning rate, beside the product's runs of `repeated.jsonl`.

    python benchmarks/quality/adalora.py [--workers 2] [--out FILE] [--runs FILE]

As many ranks in training as SoRA (init_r = 16, scale 1) and as many at the end (target_r = 4),
between the same steps (10 and 40 %), masked in every step of these; the same rows in the same order, loss, schedule of
rates, clipping and AdamW.  Two weights of its orthogonality loss, PEFT's default of 0.5 and 0.1, each with the ladder
of learning rates; the pair with the lowest tuning loss is frozen.  Its budget counts ranks, not parameters: every line
has both.  Every run is a line of --out (default adalora.jsonl); one that is there is not made again.  Prints the
numbers of README.md.
"""

from __future__ import annotations

import argparse
import functools
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grid import append, missing_data, unusable
from protocol import TEST, TUNING, WHOLE, Cell, Group, Protocol, Queue, R, best_rate, read_lines, wanted_rates
from statistics_of_pairs import PAIR_TABLE, pair_row
from tasks import HERE

if TYPE_CHECKING:
    from runner import Runner

SIZE = 0.25
ORTHOGONALITY = (0.5, 0.1)
PROTOCOL = Protocol()
LORA = Group(WHOLE, "lora")
RIVALS = (Group(SIZE, "sora"), Group(SIZE, "uniform"), LORA)


@dataclass(frozen=True)
class Run:
    """One run of AdaLoRA."""

    orthogonality: float
    learning_rate: float
    seed: int
    rows: str

    @property
    def key(self) -> str:
        return f"adalora {self.orthogonality:g} {self.learning_rate:g} {self.seed} {self.rows}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE / "adalora.jsonl")
    parser.add_argument("--runs", type=Path, default=HERE / "repeated.jsonl", help="the product's, for the pairs")
    parser.add_argument("--rates-of", type=Path, default=HERE / "runs.jsonl", help="where their rates were tuned")
    arguments = parser.parse_args()
    if wrong := unusable(arguments.out) or missing_data():
        print(f"adalora.py: {wrong}", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        from runner import split

        split(PROTOCOL, Path(folder))
        spawn = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(arguments.workers, spawn, set_up, (Path(folder),)) as pool:
            while missing := list(missing_runs(read_lines(arguments.out))):
                for line in pool.map(functools.partial(run_and_write, out=arguments.out), missing):
                    print(f"{line['key']}: {line.get('loss', line.get('failed'))}", flush=True)
    tuned = {key: line for key, line in read_lines(arguments.rates_of).items() if line["cell"]["rows"] == TUNING}
    print(table(read_lines(arguments.out), {**tuned, **read_lines(arguments.runs)}))
    return 0


# ------------------------------------------------------------------------------------------------------------- tuning


def tuning_losses(orthogonality: float, lines: Mapping[str, Mapping[str, Any]]) -> dict[float, float]:
    """{learning rate: mean loss} of the rates whose tuning seeds are all there."""
    found: dict[float, list[float]] = {}
    for line in lines.values():
        if line["cell"]["orthogonality"] == orthogonality and line["cell"]["rows"] == TUNING:
            found.setdefault(line["cell"]["learning_rate"], []).append(line.get("loss", math.inf))
    return {rate: statistics.mean(some) for rate, some in found.items() if len(some) == len(PROTOCOL.tuning_seeds)}


def frozen(lines: Mapping[str, Mapping[str, Any]]) -> tuple[float, float] | None:
    """The weight of the orthogonality loss and the learning rate, None while they are being tuned."""
    losses = {weight: tuning_losses(weight, lines) for weight in ORTHOGONALITY}
    if any(not found or wanted_rates(found, PROTOCOL.rates) for found in losses.values()):
        return None
    weight = min(losses, key=lambda weight: losses[weight][best_rate(losses[weight])])
    return weight, best_rate(losses[weight])


def missing_runs(lines: Mapping[str, Mapping[str, Any]]) -> Iterator[Run]:
    """What can be run now: tuning, then the seeds."""
    chosen = frozen(lines)
    if chosen is None:
        for weight in ORTHOGONALITY:
            for rate in wanted_rates(tuning_losses(weight, lines), PROTOCOL.rates):
                runs = (Run(weight, rate, seed, TUNING) for seed in PROTOCOL.tuning_seeds)
                yield from (run for run in runs if run.key not in lines)
        return
    runs = (Run(*chosen, seed, TEST) for seed in PROTOCOL.seeds)
    yield from (run for run in runs if run.key not in lines)


# -------------------------------------------------------------------------------------------------------------- a run

_runner: Runner


def set_up(folder: Path) -> None:
    """Once per worker: import, load, tokenise."""
    global _runner
    os.environ["OMP_NUM_THREADS"] = "1"
    from runner import Runner

    _runner = Runner(PROTOCOL, folder, "cpu")


def run_and_write(run: Run, out: Path) -> dict[str, Any]:
    """The run's line, which is on disk when this returns."""
    described = {"key": run.key, "cell": asdict(run), "protocol": PROTOCOL.fields}
    line = _runner.line_of(described, lambda: trained(_runner, run))
    append(out, line)
    return line


def trained(runner: Runner, run: Run) -> dict[str, Any]:
    """Losses, ranks and parameters of a run; the model is left as it was."""
    import torch
    from peft import AdaLoraConfig, get_peft_model

    from sora_llm.budget import params_of
    from sora_llm.causal_loss import causal_loss_sum

    base_loss = runner.base_loss(run.rows)
    job = runner.job(Cell(LORA, run.learning_rate, run.seed, run.rows, PROTOCOL))
    (stage,), train = job.plan.stages, job.config.train
    torch.manual_seed(run.seed)
    model = get_peft_model(
        runner.model,
        AdaLoraConfig(
            init_r=R,
            target_r=round(SIZE * R),
            lora_alpha=R,
            tinit=math.floor(0.1 * PROTOCOL.steps),
            tfinal=PROTOCOL.steps - math.floor(0.4 * PROTOCOL.steps),
            total_step=PROTOCOL.steps,
            orth_reg_weight=run.orthogonality,
            target_modules=sorted({name.rpartition(".")[2] for name in runner.shapes}),
        ),
    )
    adalora: Any = model.base_model
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
        for step in range(PROTOCOL.steps):
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


def table(lines: Mapping[str, Mapping[str, Any]], others: Mapping[str, Mapping[str, Any]]) -> str:
    """Losses over test rows, and the pairs of one seed."""
    chosen = frozen(lines)
    assert chosen is not None, "tuning has not ended"
    runs = [lines[Run(*chosen, seed, TEST).key] for seed in PROTOCOL.seeds]
    own = [line.get("loss", math.inf) for line in runs]
    queue = Queue(PROTOCOL, [RIVALS])
    rows = [f"weight of the orthogonality loss {chosen[0]:g}, learning rate {chosen[1]:g}", ""]
    for weight in ORTHOGONALITY:
        tried = sorted(tuning_losses(weight, lines).items())
        rows.append(f"tuning loss with {weight:g}: " + ", ".join(f"{rate:g} {loss:.4f}" for rate, loss in tried))
    kept, budget = [line.get("kept_params", 0) for line in runs], runs[0].get("budget_params")
    rows += ["", f"parameters {min(kept):,} to {max(kept):,}, budget of the others {budget:,}", ""]
    rows += [f"test loss {statistics.mean(own):.4f}: " + ", ".join(f"{loss:.4f}" for loss in own), ""]
    rows.append(PAIR_TABLE)
    for group in RIVALS:
        theirs = [others[cell.key].get("loss", math.inf) for cell in queue.test_cells(group, others)]
        rows.append(pair_row(f"{group} − adalora", [a - b for a, b in zip(theirs, own, strict=True)]))
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
