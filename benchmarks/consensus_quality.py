"""Does infrequent synchronisation cost quality, and what is a final merge worth?

    python benchmarks/consensus_quality.py [--steps 160] [--seeds 1 2 3] [--out benchmarks/consensus_quality]
        [--arms ddp H30 H30:0.7:0.9 merge]                                         a selection of arms, or others

Four replicas train base5m (LLaMA, 5 M parameters; SORA_TEST_DATA, default ../shared) on GSM8K answers, r = 16 on all
linears, to a quarter of the parameters; every arm takes the same number of steps and rows:

    ddp                   gradients are averaged at every step
    H8, H30, H100         local updates: adapters are averaged every H steps and at the ends of phases
    H30:1:0.5             the same with an outer optimizer, outer_learning_rate 1 and outer_momentum 0.5
    merge                 four runs, each on its own shard, merged at the end by the mean of their products
    average               the same four, their factors averaged slot by slot (ranks padded with zeros)
    votes                 four runs with gates to the end (decoupled, slots as they began); slots are kept by votes,
                          then by size, and averaged

The last three end at the budget too.  One learning rate for all, tuned for one process (sparsity.md).  Every run leaves
one line in <out>.jsonl; an existing one is not rerun.  Finally the table of consensus_quality.md is printed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from gsm8k import BASE, GSM8K, ROOT, dataset
from torch import Tensor

from sora_llm.artifacts.lora_files import read_lora
from sora_llm.backbone import load_backbone
from sora_llm.budget import params_of
from sora_llm.checkpoint import TENSORS
from sora_llm.config import load_config
from sora_llm.consensus import cut_svd
from sora_llm.distributed.group import local_device
from sora_llm.factors import kept_params, shapes_of
from sora_llm.inject import attach_factors
from sora_llm.local_updates import round_bytes
from sora_llm.merge import WeightedAdapter, merge
from sora_llm.running.evaluation import evaluate
from sora_llm.running.inputs import check_inputs
from sora_llm.running.training_data import load_data
from sora_llm.topology import ALONE

CONFIG = "configs/llama7b.yaml"
R, RANK, K, LEARNING_RATE, DEV_ROWS = 16, 4, 4, 8e-3, 128
TOGETHER = ("ddp", "H8", "H30", "H100")
MERGED = ("merge", "average", "votes")

Plain = Mapping[str, tuple[Tensor, Tensor]]


def split(folder: Path) -> None:
    """dev.jsonl and shard-K.jsonl of GSM8K."""
    rows = GSM8K.read_text().splitlines()
    (folder / "dev.jsonl").write_text("\n".join(rows[:DEV_ROWS]))
    for shard in range(K):
        (folder / f"shard-{shard}.jsonl").write_text("\n".join(rows[DEV_ROWS + shard :: K]))


def overrides(folder: Path, shards: Sequence[int], seed: int, steps: int, **others: Any) -> list[str]:
    """Of configs/llama7b.yaml; every process takes two rows a step."""
    values = {
        "sora.r": R,
        "sora.lora_alpha": R,
        "sora.lora_dropout": 0.0,
        "sora.target_rank": RANK,
        "model.name_or_path": str(BASE),
        "model.dtype": "float32",
        "quantization.load_in_4bit": False,
        "data.datasets": [dataset(folder / f"shard-{shard}.jsonl") for shard in shards],
        "data.val_datasets": [dataset(folder / "dev.jsonl")],
        "data.val_set_size": None,
        "data.sequence_len": 256,
        "data.sample_packing": False,
        "data.cache_dir": str(folder / "cache"),
        "train.max_steps": steps,
        "train.num_train_epochs": None,
        "train.per_device_train_batch_size": 2,
        "train.gradient_accumulation_steps": 1,
        "train.gradient_checkpointing": False,
        "train.learning_rate": LEARNING_RATE,
        "train.seed": seed,
        "output.logging_steps": 20,
        "output.report_to": [],
        **others,
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


def train(arguments: Sequence[str], run_dir: Path, num_processes: int = 1) -> list[dict[str, Any]]:
    """Run it; returns its lines of metrics."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}", "-m"]
    command = [sys.executable, *(launcher if num_processes > 1 else ["-m"]), "sora_llm.train", CONFIG, *arguments]
    command.append(f"output.output_dir={json.dumps(str(run_dir))}")
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr)[-3000:])
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# ------------------------------------------------------------------------------------------------------------- arms


def together(arm: str, folder: Path, seed: int, steps: int) -> dict[str, Any]:
    """Four processes in one group; `arm` is ddp, H30 or H30:<outer learning rate>:<outer momentum>."""
    chosen: dict[str, Any] = {"distributed.strategy": "ddp"}
    if arm != "ddp":
        every, *outer = arm.removeprefix("H").split(":")
        chosen["distributed.sync_every"] = int(every)
        keys = ("distributed.outer_learning_rate", "distributed.outer_momentum")
        chosen |= dict(zip(keys, map(float, outer), strict=False))
    with tempfile.TemporaryDirectory() as place:
        lines = train(overrides(folder, range(K), seed, steps, **chosen), Path(place) / "run", K)
    rounds = [line for line in lines if "sync_bytes" in line]
    result = {
        "eval_loss": lines[-1]["eval_loss"],
        "kept_params": lines[-1]["kept_params"],
        "sent_bytes": sum(line["sync_bytes"] for line in rounds) if rounds else ddp_bytes(lines, steps),
    }
    if rounds:
        result |= {
            "rounds": len(rounds),
            "merge_error": max(line["merge_error"] for line in rounds),
            "support_overlap": min(line.get("support_overlap", 1.0) for line in rounds),
        }
    return result


def ddp_bytes(lines: Sequence[Mapping[str, Any]], steps: int) -> int:
    """Bytes that all-reducing the gradients moves in all steps: every slot until the cut, the kept ones after."""
    cut = int(0.4 * steps)
    return cut * round_bytes(lines[0]["kept_params"], K) + (steps - cut) * round_bytes(lines[-1]["kept_params"], K)


def apart(folder: Path, seed: int, steps: int) -> list[dict[str, Any]]:
    """Four runs on a shard each, and three ways to make one adapter from them."""
    with_gates = {"sora.consensus_at": 1.0, "sora.consensus": "slots", "sora.threshold": "decoupled"}
    with tempfile.TemporaryDirectory() as place, ThreadPoolExecutor(2) as pool:

        def run(kind: str, shard: int, others: dict[str, Any]) -> list[dict[str, Any]]:
            arguments = overrides(folder, [shard], seed, steps, **others, **{"output.save_steps": steps})
            return train(arguments, Path(place) / f"{kind}-{shard}")

        kinds = {"cut": {}, "gated": with_gates}
        jobs = {(kind, k): pool.submit(run, kind, k, others) for kind, others in kinds.items() for k in range(K)}
        lines = {key: job.result() for key, job in jobs.items()}
        adapters = [read_lora(Path(place) / f"cut-{shard}" / "adapter") for shard in range(K)]
        replicas = [WeightedAdapter(1.0, adapter.factors, adapter.scaling) for adapter in adapters]
        gated = [Path(place) / f"gated-{shard}" / "checkpoints" / f"step-{steps}" for shard in range(K)]
        ways = {"merge": by_products(replicas), "average": by_factors(replicas), "votes": by_votes(gated)}
    own = [lines[("cut", shard)][-1]["eval_loss"] for shard in range(K)]
    results = []
    for arm, (factors, more) in ways.items():
        size = kept_params(
            {name: len(A) for name, (A, _) in factors.items()},
            shapes_of({n: (A, B, None) for n, (A, B) in factors.items()}),
        )
        loss = dev_loss(folder, factors)
        results.append({"arm": arm, "eval_loss": loss, "kept_params": size, "sent_bytes": 4 * size, **more})
    results[0]["own_losses"] = own
    return results


def budget_of(shapes: Mapping[str, tuple[int, int]]) -> int:
    return params_of(RANK, sum(sum(shape) for shape in shapes.values()))


def by_products(replicas: Sequence[WeightedAdapter]) -> tuple[Plain, dict[str, Any]]:
    """The best adapter of the size for the mean of products."""
    shapes = shapes_of(replicas[0].factors)
    found = merge(replicas, budget_of(shapes))
    report = found.report
    return found.factors, {"merge_error": (report.dropped_energy / report.energy) ** 0.5}


def by_factors(replicas: Sequence[WeightedAdapter]) -> tuple[Plain, dict[str, Any]]:
    """A and B averaged, as if slots with the same number belonged together; cut to the size."""
    averaged = {}
    for name in replicas[0].factors:
        rank = max(len(replica.factors[name][0]) for replica in replicas)
        A, B = replicas[0].factors[name][:2]
        A, B = torch.zeros(rank, A.shape[1]), torch.zeros(B.shape[0], rank)
        for replica in replicas:
            own_A, own_B, _ = replica.factors[name]
            A[: len(own_A)] += own_A / K
            B[:, : len(own_A)] += own_B / K
        averaged[name] = (A, B, None)
    return cut_svd(averaged, 1.0, budget_of(shapes_of(averaged)))[0], {}


def by_votes(checkpoints: Sequence[Path]) -> tuple[Plain, dict[str, Any]]:
    """Slots that most replicas keep, larger ones first among equals; A, B, g averaged over those replicas."""
    from safetensors.torch import load_file

    replicas = [load_file(folder / TENSORS) for folder in checkpoints]
    names = [name.removesuffix(".gate") for name in replicas[0] if name.endswith(".gate")]
    slots, averaged = [], {}
    for name in names:
        gate_KR = torch.stack([replica[f"{name}.gate"] for replica in replicas])
        live_KR = (gate_KR != 0).float()
        votes_R = live_KR.sum(0)
        share_KR = live_KR / votes_R.clamp(min=1)
        A = (share_KR[:, :, None] * torch.stack([replica[f"{name}.lora_A"] for replica in replicas])).sum(0)
        B = (share_KR[:, None, :] * torch.stack([replica[f"{name}.lora_B"] for replica in replicas])).sum(0)
        gate = (share_KR * gate_KR).sum(0)
        averaged[name] = (gate[:, None] * A, B)
        size_R = gate.abs() * A.norm(dim=1) * B.norm(dim=0)
        cost = A.shape[1] + B.shape[0]
        slots += [
            (-int(votes_R[i]), -(float(size_R[i]) ** 2) / cost, name, i, cost) for i in range(len(gate)) if votes_R[i]
        ]
    left = budget_of(shapes_of({name: (A, B, None) for name, (A, B) in averaged.items()}))
    kept: dict[str, list[int]] = {name: [] for name in names}
    for _, _, name, i, cost in sorted(slots):
        if cost <= left:
            kept[name].append(i)
            left -= cost
    return {name: (A[kept[name]], B[:, kept[name]]) for name, (A, B) in averaged.items()}, {}


def dev_loss(folder: Path, factors: Plain) -> float:
    """The loss of base5m with plain factors of scale 1 on the dev rows."""
    config = load_config(ROOT / CONFIG, [*overrides(folder, [0], 1, 1), "output.output_dir=unused"])
    inputs = check_inputs(config, "none")
    rows = load_data(config, inputs, ALONE).dev
    assert rows is not None
    device = local_device()
    model = attach_factors(load_backbone(inputs.backbone, device), factors)
    return evaluate(model, rows, inputs.batch, batch_size=8, world=ALONE, device=device)


# ------------------------------------------------------------------------------------------------------------ tables


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=160)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--arms", nargs="+", default=[*TOGETHER, *MERGED])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/consensus_quality")
    arguments = parser.parse_args()
    file = arguments.out.with_suffix(".jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    done = {(line["arm"], line["seed"], line["steps"]): line for line in lines}

    def keep(arm: str, seed: int, result: dict[str, Any]) -> None:
        line = {"arm": arm, "seed": seed, "steps": arguments.steps, **result}
        done[(arm, seed, arguments.steps)] = line
        with file.open("a") as out:
            out.write(json.dumps(line) + "\n")
        print(f"{arm:<8} seed {seed}  dev loss {line['eval_loss']:.4f}", flush=True)

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        split(folder)
        for seed in arguments.seeds:
            for arm in (arm for arm in arguments.arms if arm not in MERGED):
                if (arm, seed, arguments.steps) not in done:
                    keep(arm, seed, together(arm, folder, seed, arguments.steps))
            merged = [arm for arm in arguments.arms if arm in MERGED]
            if any((arm, seed, arguments.steps) not in done for arm in merged):
                for result in apart(folder, seed, arguments.steps):
                    keep(result.pop("arm"), seed, result)
    print(
        table([line for line in done.values() if line["steps"] == arguments.steps and line["seed"] in arguments.seeds])
    )
    return 0


def table(lines: Sequence[Mapping[str, Any]]) -> str:
    """Per arm: dev loss by seed, the mean difference to ddp, bytes sent, errors."""
    seeds = sorted({line["seed"] for line in lines})
    loss = {(line["arm"], line["seed"]): line["eval_loss"] for line in lines}
    rows = [
        "| arm | " + " | ".join(f"seed {seed}" for seed in seeds) + " | − ddp | MB sent | merge error | overlap |",
        "|---|" + "---|" * (len(seeds) + 4),
    ]
    others = sorted({line["arm"] for line in lines} - {*TOGETHER, *MERGED})
    for arm in (*TOGETHER, *others, *MERGED):
        own = [line for line in lines if line["arm"] == arm]
        if not own:
            continue
        both = [seed for seed in seeds if (arm, seed) in loss and ("ddp", seed) in loss]
        gap = statistics.mean(loss[arm, seed] - loss["ddp", seed] for seed in both) if both else math.nan
        errors = [line["merge_error"] for line in own if line.get("merge_error") is not None]
        overlaps = [line["support_overlap"] for line in own if line.get("support_overlap") is not None]
        rows.append(
            f"| {arm} | "
            + " | ".join(f"{loss[arm, seed]:.4f}" if (arm, seed) in loss else "" for seed in seeds)
            + f" | {gap:+.4f} | {statistics.mean(line['sent_bytes'] for line in own) / 1e6:.2f}"
            + f" | {f'{max(errors):.1%}' if errors else ''} | {f'{min(overlaps):.2f}' if overlaps else ''} |"
        )
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
