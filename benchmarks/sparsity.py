"""Rank budgets from 5 % to 90 %: are they met, how closely is the schedule followed, and what does the size cost?

    python benchmarks/sparsity.py [--workers 2] [--steps 100] [--out benchmarks/sparsity]
        [--arms svd slots lora] [--shares 0.05 …] [--rates 0.004 …]                  a part of the grid

Trains base5m (LLaMA, 5 M parameters; SORA_TEST_DATA, default ../shared) on GSM8K answers, r = 16 on all linears:

    svd     SoRA with a budget as shipped: adaptive, cut by singular components at 40 % of the steps, finetuned
    slots   the same, but complete slots are kept
    lora    LoRA of that size: the same rank everywhere, gates frozen, nothing pruned

Learning rates are tuned once at 25 % on a separate seed (slots uses svd's).  Every run is a process and leaves one
line in <out>/runs.jsonl; an existing run is not repeated, so the command can be stopped and restarted.  At the end
it prints the tables of sparsity.md and draws <out>/loss.png and <out>/tracking.png.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any

from gsm8k import BASE, ROOT, dataset

R = 16
ARMS = ("svd", "slots", "lora")
RATES = (4e-3, 8e-3, 1.6e-2, 3.2e-2)
TUNED_AT, TUNING_SEED = 0.25, 100
TUNED = ("svd", "lora")
SEEDS = {0.05: (1,), 0.10: (1, 2, 3), 0.25: (1, 2, 3), 0.50: (1,), 0.70: (1, 2, 3), 0.90: (1,)}


@dataclass(frozen=True)
class Cell:
    """One run."""

    arm: str
    share: float
    learning_rate: float
    seed: int
    steps: int

    @property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def overrides(self, run_dir: Path) -> dict[str, Any]:
        """Of configs/llama7b.yaml."""
        rank = max(1, round(self.share * R))
        # s = lora_alpha / r is 1 for every arm and size, so that one learning rate serves all sizes
        plain = {
            "r": rank,
            "lora_alpha": rank,
            "sparse_lambda": 0.0,
            "target_rank": None,
            "gate_lr": 1e-30,
            "consensus_at": 1.0,
        }
        budget = {"r": R, "lora_alpha": R, "target_rank": self.share * R, "consensus": self.arm}
        sora = plain | {"consensus": "slots"} if self.arm == "lora" else budget
        return {
            **{f"sora.{key}": value for key, value in sora.items()},
            "sora.lora_dropout": 0.0,
            "model.name_or_path": str(BASE),
            "model.dtype": "float32",
            "quantization.load_in_4bit": False,
            "data.datasets": [dataset()],
            "data.val_set_size": 128,
            "data.sequence_len": 256,
            "data.sample_packing": False,
            "train.max_steps": self.steps,
            "train.num_train_epochs": None,
            "train.per_device_train_batch_size": 8,
            "train.gradient_accumulation_steps": 1,
            "train.gradient_checkpointing": False,
            "train.learning_rate": self.learning_rate,
            "train.seed": self.seed,
            "output.output_dir": str(run_dir),
            "output.logging_steps": 1,
            "output.report_to": [],
        }

    def run(self) -> dict[str, Any]:
        """Train it; returns its record."""
        with tempfile.TemporaryDirectory() as folder:
            run_dir = Path(folder) / "run"
            values = [f"{key}={json.dumps(value)}" for key, value in self.overrides(run_dir).items()]
            command = [sys.executable, "-m", "sora_llm.train", "configs/llama7b.yaml", *values]
            environ = {**os.environ, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
            if done.returncode:
                return {"cell": asdict(self), "key": self.key, "failed": (done.stdout + done.stderr)[-2000:]}
            lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
        window = [line for line in lines if "target_mean_rank" in line]
        return {
            "cell": asdict(self),
            "key": self.key,
            "base_loss": lines[0]["eval_loss"],
            "eval_loss": lines[-1]["eval_loss"],
            "kept_params": lines[-1]["kept_params"],
            "budget_params": window[0]["budget_params"] if window else None,
            "wanted": [line["target_mean_rank"] for line in window],
            "kept": [line["mean_rank"] for line in window],
            "alarms": [sentence for line in lines for sentence in line.get("alarms", [])],
        }


class Results:
    """<out>/runs.jsonl: one line per run, appended as runs end."""

    def __init__(self, file: Path) -> None:
        self._file, self._lock = file, Lock()
        lines = file.read_text().splitlines() if file.exists() else []
        self.by_key = {line["key"]: line for line in map(json.loads, lines)}

    def of(self, cells: Sequence[Cell], workers: int) -> list[dict[str, Any]]:
        """The results of `cells`, run if missing; failed ones are reported and left out."""
        missing = [cell for cell in cells if cell.key not in self.by_key]
        with ThreadPoolExecutor(workers) as pool:
            try:
                list(pool.map(self._make, missing))
            except KeyboardInterrupt:
                pool.shutdown(cancel_futures=True)
                raise
        return [self.by_key[cell.key] for cell in cells if cell.key in self.by_key]

    def _make(self, cell: Cell) -> None:
        result = cell.run()
        with self._lock:
            if "failed" not in result:
                self.by_key[cell.key] = result
                with self._file.open("a") as file:
                    file.write(json.dumps(result) + "\n")
            said = result.get("failed", f"dev loss {result.get('eval_loss', float('nan')):.4f}")
            print(f"{cell.arm:<6}{cell.share:>5.0%}  lr {cell.learning_rate:g}  seed {cell.seed}  {said}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/sparsity")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=ARMS)
    parser.add_argument("--shares", nargs="+", type=float, choices=SEEDS, default=tuple(SEEDS))
    parser.add_argument("--rates", nargs="+", type=float, default=RATES)
    arguments = parser.parse_args()
    arms, shares, rates = arguments.arms, arguments.shares, sorted(arguments.rates)
    arguments.out.mkdir(parents=True, exist_ok=True)
    results = Results(arguments.out / "runs.jsonl")
    to_tune = [arm for arm in TUNED if arm in arms or (arm == "svd" and "slots" in arms)]
    tuning = [Cell(arm, TUNED_AT, rate, TUNING_SEED, arguments.steps) for arm in to_tune for rate in rates]
    tuned = results.of(tuning, arguments.workers)
    best = {}
    for arm in to_tune:
        of_arm = {
            r["cell"]["learning_rate"]: r["eval_loss"] for r in tuned if r["cell"]["arm"] == arm and "eval_loss" in r
        }
        if len(of_arm) < len(rates):
            return complain(f"runs of {arm} at {TUNED_AT:.0%} failed; start the command again")
        best[arm] = min(of_arm, key=lambda rate: of_arm[rate])
        if best[arm] in (rates[0], rates[-1]):
            print(f"note: the best rate of {arm}, {best[arm]:g}, is at the edge of those that were tried")
    if "slots" in arms:
        best["slots"] = best["svd"]
    cells = [
        Cell(arm, share, best[arm], seed, arguments.steps) for share in shares for arm in arms for seed in SEEDS[share]
    ]
    found = results.of(cells, arguments.workers)
    if len(found) < len(cells):
        return complain(f"{len(cells) - len(found)} of {len(cells)} runs failed; start the command again")
    print(tuning_table(tuned, best, rates) + "\n\n" + loss_table(found, arms, shares))
    pruned = [arm for arm in arms if arm != "lora"]
    if not pruned:
        return 0
    print("\n" + budget_table(found, pruned, shares))
    draw(found, arms, shares, arguments.out)
    return 0


def complain(sentence: str) -> int:
    print(sentence, file=sys.stderr)
    return 1


def tuning_table(tuned: Sequence[dict[str, Any]], best: dict[str, float], rates: Sequence[float]) -> str:
    rows = ["| arm | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---|" + "---|" * len(rates)]
    for arm in (arm for arm in TUNED if arm in best):
        losses = {r["cell"]["learning_rate"]: r.get("eval_loss") for r in tuned if r["cell"]["arm"] == arm}
        shown = [f"**{losses[rate]:.3f}**" if rate == best[arm] else f"{losses[rate]:.3f}" for rate in rates]
        rows.append(f"| {arm} | " + " | ".join(shown) + " |")
    return "\n".join(rows)


def loss_table(found: Sequence[dict[str, Any]], arms: Sequence[str], shares: Sequence[float]) -> str:
    header = "| share of r | " + " | ".join(arms) + f" | parameters of {', '.join(arms)} |"
    rows = [header, "|---|" + "---|" * (len(arms) + 1)]
    for share in shares:
        shown, sizes = [], []
        for arm in arms:
            cells = [r for r in found if r["cell"]["arm"] == arm and r["cell"]["share"] == share and "eval_loss" in r]
            losses = [r["eval_loss"] for r in cells]
            spread = f" ({min(losses):.3f}–{max(losses):.3f})" if len(losses) > 1 else ""
            shown.append(f"{statistics.mean(losses):.3f}{spread}")
            sizes.append(f"{statistics.mean(r['kept_params'] for r in cells):,.0f}")
        rows.append(f"| {share:.0%} | " + " | ".join(shown) + f" | {', '.join(sizes)} |")
    return "\n".join(rows)


def budget_table(found: Sequence[dict[str, Any]], arms: Sequence[str], shares: Sequence[float]) -> str:
    kept_by = " | ".join(f"kept ({arm})" for arm in arms)
    header = f"| share of r | budget | {kept_by} | largest error of tracking |"
    rows = [header, "|---|" + "---|" * (len(arms) + 2)]
    for share in shares:
        cells = [r for r in found if r["cell"]["share"] == share and r.get("budget_params")]
        kept = {arm: {r["kept_params"] for r in cells if r["cell"]["arm"] == arm} for arm in arms}
        error = max(abs(k - w) / R for r in cells for k, w in zip(r["kept"], r["wanted"], strict=True))
        shown = [", ".join(f"{size:,}" for size in sorted(kept[arm])) for arm in arms]
        rows.append(f"| {share:.0%} | {cells[0]['budget_params']:,} | {' | '.join(shown)} | {error:.2%} of r |")
    return "\n".join(rows)


def draw(found: Sequence[dict[str, Any]], arms: Sequence[str], shares: Sequence[float], out: Path) -> None:
    """loss.png: dev loss against kept parameters; tracking.png: actual and target mean rank over the window, and their
    difference."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for arm, marker in zip(arms, "os^", strict=False):
        cells = [r for r in found if r["cell"]["arm"] == arm and "eval_loss" in r]
        points: dict[float, list[dict[str, Any]]] = {}
        for r in cells:
            points.setdefault(r["cell"]["share"], []).append(r)
        xs = [statistics.mean(r["kept_params"] for r in rs) for rs in points.values()]
        ys = [statistics.mean(r["eval_loss"] for r in rs) for rs in points.values()]
        (line,) = axes.plot(xs, ys, marker=marker, label=arm)
        axes.scatter(
            [r["kept_params"] for r in cells], [r["eval_loss"] for r in cells], s=8, color=line.get_color(), alpha=0.6
        )
    axes.set(xlabel="kept parameters", ylabel="dev loss (GSM8K answers, base5m)", xscale="log")
    axes.legend()
    figure.savefig(out / "loss.png", dpi=150)
    figure, (above, below) = plt.subplots(2, figsize=(7, 6.5), sharex=True, height_ratios=(2, 1), layout="constrained")
    for share in shares:
        r = next(r for r in found if r["cell"]["share"] == share and r["cell"]["arm"] != "lora" and "kept" in r)
        places = [(index + 1) / len(r["kept"]) for index in range(len(r["kept"]))]
        (line,) = above.plot(places, r["kept"], label=f"{share:.0%}")
        above.plot(places, r["wanted"], linestyle=":", color=line.get_color())
        errors = [100 * (kept - wanted) / R for kept, wanted in zip(r["kept"], r["wanted"], strict=True)]
        below.plot(places, errors, color=line.get_color())
    above.set(ylabel="mean rank (dotted: wanted)")
    above.legend(title="budget")
    below.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    below.set(xlabel="place in the sparsify window", ylabel="kept − wanted, % of r")
    figure.savefig(out / "tracking.png", dpi=150)


if __name__ == "__main__":
    sys.exit(main())
