"""A complete run at a LLaMA's real size, started as a user would: tokens/s of the loop, peak memory, seconds.

    python benchmarks/gpu_run.py --shape 7b --folder outputs/gpu_run [--steps 16] [section.key=value ...]

Writes a checkpoint of random bfloat16 weights (kept for the next run) with base5m's tokenizer, and trains it on GSM8K
(both from SORA_TEST_DATA, default ../shared) with configs/llama7b.yaml, packed: dense steps, pruning, the cut, steps
with the smaller adapter, the export and its check; a quarter of the steps is dense, the cut is halfway.  Prints
one JSON line: medians of the logged steps of every phase, except the first; the peak, and that of `sora-llm estimate`
for the same config.  Overrides are those of a run, whose directory is kept if it fails.
"""

from __future__ import annotations

import argparse
import gc
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from gsm8k import BASE, ROOT, dataset
from step import SHAPES, circumstances, make_backbone

CONFIG = "configs/llama7b.yaml"


def make_checkpoint(folder: Path, shape: str, layers: int | None, device: torch.device) -> Path:
    """A LLaMA with random weights on disk, with a real tokenizer."""
    if not (folder / "config.json").exists():
        vocabulary = json.loads((BASE / "config.json").read_text())["vocab_size"]
        model = make_backbone(shape, layers, "bf16", device, vocabulary_of_at_least=vocabulary)
        model.save_pretrained(folder)
    for file in BASE.glob("*token*"):
        shutil.copy(file, folder)
    return folder


def overrides(checkpoint: Path, run_dir: Path, steps: int) -> dict[str, Any]:
    return {
        "model.name_or_path": str(checkpoint),
        "data.datasets": [dataset()],
        "data.val_set_size": 64,
        "train.num_train_epochs": None,
        "train.max_steps": steps,
        "sora.dense_ratio": 0.25,  # the config's tenth would be one step here, and a phase's first is left out
        "sora.consensus_at": 0.5,
        "output.output_dir": str(run_dir),
        "output.logging_steps": 1,
        "output.report_to": [],
    }


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run([sys.executable, "-m", *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments[:2])} ended with {done.returncode}:\n{done.stdout}{done.stderr}")
    return done


def phases(metrics: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians over the logged steps of a phase, its first left out."""
    found = {}
    for phase in ("dense", "sparsify", "finetune"):
        lines = [line for line in metrics if line["phase"] == phase and "step_seconds" in line][1:]
        if not lines:
            raise SystemExit(f"no step of the phase {phase} was logged but its first; raise --steps")
        keys = ("step_seconds", "tokens_per_second", "grad_norm")
        found[phase] = {key: statistics.median(line[key] for line in lines) for key in keys}
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="tiny", choices=[name for name in SHAPES if name != "small"])
    parser.add_argument("--layers", type=int)
    parser.add_argument("--folder", type=Path, required=True, help="of the checkpoint; and of the run, while it lasts")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    options = parser.parse_intermixed_args(argv)
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    started = time.perf_counter()
    place = options.folder / f"model-{options.shape}-{options.layers or 'all'}"
    checkpoint = make_checkpoint(place, options.shape, options.layers, torch.device(options.device))
    gc.collect()
    torch.cuda.empty_cache()  # the run is another process
    made = time.perf_counter()
    run_dir = Path(tempfile.mkdtemp(prefix="run-", dir=options.folder))
    values = overrides(checkpoint.resolve(), run_dir.resolve(), options.steps)
    arguments = [*(f"{key}={json.dumps(value)}" for key, value in values.items()), *options.overrides]
    estimate = json.loads(call("sora_llm", "estimate", CONFIG, *arguments, "--json").stdout)
    before = time.perf_counter()
    call("sora_llm.train", CONFIG, *arguments)
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    certificate = json.loads((run_dir / "adapter" / "certificate.json").read_text())
    found = {
        "overrides": options.overrides,
        "checkpoint_seconds": round(made - started, 1),
        "run_seconds": round(time.perf_counter() - before, 1),
        "phases": phases(metrics),
        "peak_memory_gib": max(line.get("peak_memory_gib", 0) for line in metrics),
        "estimate": estimate,
        "eval_loss": [metrics[0]["eval_loss"], metrics[-1]["eval_loss"], metrics[-1]["eval_loss_exported"]],
        "mean_rank": metrics[-1]["mean_rank"],
        "verified": certificate["passed"],
    }
    print(json.dumps({**found, **circumstances(options)}))
    shutil.rmtree(run_dir)
    return 0


if __name__ == "__main__":
    sys.exit(main())
