"""Memorisation and generalisation along the paper's sparsity path, and what is left where later stages only prune.

    python benchmarks/quality/path.py [--seeds 1 2 3] [--workers 2] [--out FOLDER]

Every run is `python -m sora_llm.train configs/paper.yaml` on base5m and 300 rows of GSM8K, one thread: six stages of 75
steps of 8 rows, each from the uncut weights of the one before.  *retrained* is the path as shipped; *control* learns in
its first stage alone, as the released script does (threshold constant, retrain false).  After each stage the pruned
adapter's loss over 200 of the rows trained on (memorisation) and over 200 others (generalisation).  Stages become lines
of path.jsonl; a run whose lines are there is not made again.  Draws path.png and prints the table of README.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from protocol import EVAL_BATCH, TUNING, Protocol, R, read_all
from tasks import BASE, GSM8K_ANSWERS, HERE, ROOT
from workers import append, missing_data, too_few_workers, unusable

CONFIG = "configs/paper.yaml"
ROWS = Protocol(num_train=300, num_tuning=200, num_test=8)
STAGES, STEPS, ROWS_PER_STEP, LEARNING_RATE = 6, 75, 8, 8e-3
ARMS: dict[str, dict[str, Any]] = {
    "retrained": {},
    "control": {
        "sora.threshold": "constant",
        "sora.retrain": False,
        "sora.sparse_lambda": 0.0005,
        "sora.max_lambda": 0.008,
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=HERE)
    arguments = parser.parse_args()
    file = arguments.out / "path.jsonl"
    if wrong := too_few_workers(arguments.workers) or unusable(file) or missing_data():
        print(f"path.py: {wrong}", file=sys.stderr)
        return 2
    there = {(line["arm"], line["seed"]) for line in read_all(file)}
    missing = [(arm, seed) for seed in arguments.seeds for arm in ARMS if (arm, seed) not in there]
    if missing:
        from runner import split

        with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(arguments.workers) as pool:
            split(ROWS, Path(name))
            for lines in pool.map(lambda run: stages_of(run[0], run[1], Path(name)), missing):
                for line in lines:
                    append(file, line)
    lines = read_all(file)
    draw(lines, arguments.out / "path.png")
    print(table(lines))
    return 0


def overrides(arm: str, seed: int, folder: Path) -> dict[str, Any]:
    """Of CONFIG; `folder` holds train.jsonl and tuning.jsonl."""
    return {
        **ARMS[arm],
        "sora.r": R,
        "sora.lora_alpha": R,
        "sora.lora_dropout": 0.0,
        "sora.lambda_num": STAGES,
        "model.name_or_path": str(BASE),
        "model.attn_implementation": "eager",
        "quantization.load_in_4bit": False,
        "data.datasets": [GSM8K_ANSWERS.dataset(folder / "train.jsonl")],
        "data.val_datasets": [GSM8K_ANSWERS.dataset(folder / f"{TUNING}.jsonl")],
        "data.val_set_size": None,
        "data.sequence_len": GSM8K_ANSWERS.sequence_len,
        "data.sample_packing": False,
        "data.cache_dir": str(folder / "cache"),
        "train.max_steps": STEPS,
        "train.num_train_epochs": None,
        "train.per_device_train_batch_size": ROWS_PER_STEP,
        "train.gradient_accumulation_steps": 1,
        "train.gradient_checkpointing": False,
        "train.learning_rate": LEARNING_RATE,
        "train.seed": seed,
        "evaluation.per_device_eval_batch_size": EVAL_BATCH,
        "output.output_dir": str(folder / f"{arm}-{seed}"),
        "output.report_to": [],
    }


def stages_of(arm: str, seed: int, folder: Path) -> list[dict[str, Any]]:
    """Train it; a line per stage, the first of which says the loss before training."""
    values = overrides(arm, seed, folder)
    command = [sys.executable, "-m", "sora_llm.train", CONFIG]
    command += [f"{key}={json.dumps(value)}" for key, value in values.items()]
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    if done.returncode:
        said = (done.stdout + done.stderr)[-2000:]
        raise SystemExit(f"path.py: {arm}, seed {seed}, ended with {done.returncode}: {said}")
    metrics = read_all(Path(values["output.output_dir"]) / "metrics.jsonl")
    keys = ("stage", "sparse_lambda", "kept_params", "mean_rank", "train_loss", "eval_loss")
    stages = [{key: line[key] for key in keys} for line in metrics if line["phase"] == "export"]
    return [{"arm": arm, "seed": seed, "base_loss": metrics[0]["eval_loss"], **stage} for stage in stages]


def by_stage(lines: Sequence[dict[str, Any]], arm: str) -> list[list[dict[str, Any]]]:
    """The lines of every seed, stage by stage."""
    own = [line for line in lines if line["arm"] == arm]
    return [[line for line in own if line["stage"] == stage] for stage in sorted({line["stage"] for line in own})]


def mean(lines: Sequence[dict[str, Any]], key: str) -> float:
    return statistics.mean(line[key] for line in lines)


def table(lines: Sequence[dict[str, Any]]) -> str:
    rows = [
        "| arm | λ | kept parameters | mean rank | loss on rows trained on | on others |",
        "|---|---|---|---|---|---|",
    ]
    for arm in ARMS:
        for stage in by_stage(lines, arm):
            losses = []
            for key in ("train_loss", "eval_loss"):
                found = [line[key] for line in stage]
                spread = f" ({min(found):.3f}–{max(found):.3f})" if len(found) > 1 else ""
                losses.append(f"{mean(stage, key):.3f}{spread}")
            rows.append(
                f"| {arm} | {stage[0]['sparse_lambda']:.4g} | {mean(stage, 'kept_params'):,.0f} | "
                f"{mean(stage, 'mean_rank'):.2f} | {' | '.join(losses)} |"
            )
    return "\n".join(rows)


def draw(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Both losses against kept parameters: means over seeds as lines, every seed as a dot; whole, and where the path
    lies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (whole, near) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    names = {"train_loss": "rows trained on", "eval_loss": "other rows"}
    for axes in (whole, near):
        for index, (key, name) in enumerate(names.items()):
            for arm, style in zip(ARMS, ("-", "--"), strict=True):
                stages = by_stage(lines, arm)
                kept, losses = [mean(stage, "kept_params") for stage in stages], [mean(stage, key) for stage in stages]
                axes.plot(kept, losses, style, color=f"C{index}", marker="o", label=f"{arm}, {name}")
                for stage in stages:
                    dots = [line["kept_params"] for line in stage], [line[key] for line in stage]
                    axes.scatter(*dots, s=8, color=f"C{index}", alpha=0.4)
        axes.set(xlabel="kept parameters")
    whole.axhline(mean(lines, "base_loss"), color="0.7", linewidth=0.8, zorder=0)
    whole.set(ylabel="loss (grey: other rows before training)")
    path = [line for line in lines if line["arm"] == "retrained"]
    losses = [line[key] for line in path for key in names]
    near.set(xlim=(0.9 * min(line["kept_params"] for line in path), None))
    near.set(ylim=(min(losses) - 0.05, max(losses) + 0.2))
    whole.legend()
    figure.savefig(file, dpi=150)


if __name__ == "__main__":
    sys.exit(main())
