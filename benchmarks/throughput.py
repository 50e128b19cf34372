"""End-to-end jobs: supervised tokens/s against TRL with PEFT, the loop's overhead, memory over many steps.

    python benchmarks/throughput.py [--rounds 3] [--steps 30]      jobs in turn (A B C D A B C D ...), then the others
    python benchmarks/throughput.py --only jobs|loop|memory

base5m (LLaMA, 5 M parameters, NF4, bfloat16) on GSM8K, answers supervised, r = 16 on all linears, dropout 0.05, one
thread (SORA_TEST_DATA, default ../shared; TRL: pip install 'sora_llm[examples]').  Every job is a process:

    packed, padded            this package: configs/llama7b.yaml, packed sequences of 512 tokens, or 8 padded rows
    trl_packed, trl_padded    TRL's SFTTrainer on PEFT's LoRA of the same size: no gates, nothing is cut

A job's rate is its supervised tokens over the seconds from the end of step 2 to the end of the last, including data,
without evaluation and checkpoints; this package's before and after the cut.

*loop*: the share of `sora_llm.train`'s step time spent outside forward, backward and optimizer; a bare step takes the
same batches with the same model.  Who takes a batch first has to bring it into the caches, so they take turns; a second
bare step beside the first shows the comparison's own error.  *memory*: resident memory over 2,000 steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gsm8k import BASE, COLUMNS, DATA, GSM8K, ROOT, dataset

CONFIG = "configs/llama7b.yaml"
JOBS = ("packed", "padded", "trl_packed", "trl_padded")
R, SEQUENCE, PACKED_ROWS, PADDED_ROWS, WARM_UP = 16, 512, 2, 8, 2


def overrides(run_dir: Path, steps: int, packed: bool, **others: Any) -> list[str]:
    """Of CONFIG."""
    values = {
        "model.name_or_path": str(BASE),
        "sora.r": R,
        "sora.target_rank": R / 4,
        "data.datasets": [dataset()],
        "data.val_set_size": 16,
        "data.sequence_len": SEQUENCE,
        "data.sample_packing": packed,
        "train.num_train_epochs": None,
        "train.max_steps": steps,
        "train.per_device_train_batch_size": PACKED_ROWS if packed else PADDED_ROWS,
        "train.gradient_accumulation_steps": 1,
        "train.gradient_checkpointing": False,
        "output.output_dir": str(run_dir),
        "output.logging_steps": 1,
        "output.report_to": [],
        **others,
    }
    return [f"{key}={json.dumps(value)}" for key, value in values.items()]


# --------------------------------------------------------------------------------------------------------------- jobs


def run_ours(packed: bool, steps: int, folder: Path) -> dict[str, float]:
    from sora_llm.train import run

    run(CONFIG, *overrides(folder, steps, packed))
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    counted = [line for line in lines if "step_seconds" in line and line["step"] > WARM_UP]
    found = {}
    for name, phases in (("before", ("dense", "sparsify")), ("after", ("finetune",))):
        part = [line for line in counted if line["phase"] in phases]
        found[name] = sum(line["supervised_tokens"] for line in part) / sum(line["step_seconds"] for line in part)
    return {**found, "peak_gib": max(line["peak_memory_gib"] for line in counted)}


def run_trl(packed: bool, steps: int, folder: Path) -> dict[str, float]:
    import torch
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from sora_llm.inject import forbid_cpu_repack
    from sora_llm.running.optimizer_step import peak_memory_gib

    seen: list[tuple[float, int]] = []

    class Counting(SFTTrainer):
        def training_step(self, model: Any, inputs: Any, *arguments: Any, **options: Any) -> Any:
            loss = super().training_step(model, inputs, *arguments, **options)
            seen.append((time.perf_counter(), int((inputs["labels"] != -100).sum())))
            return loss

    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.bfloat16, quantization_config=quantization)
    forbid_cpu_repack(model)
    rows = [json.loads(line) for line in GSM8K.read_text().splitlines()]
    options = SFTConfig(
        output_dir=str(folder),
        max_length=SEQUENCE,
        packing=packed,
        max_steps=steps + 1,  # a step is counted when the next one's gradients are there
        per_device_train_batch_size=PACKED_ROWS if packed else PADDED_ROWS,
        learning_rate=2e-4,
        lr_scheduler_type="cosine",
        max_grad_norm=1.0,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        seed=42,
    )
    trainer = Counting(
        model,
        options,
        train_dataset=Dataset.from_list([{key: row[name] for key, name in COLUMNS.items()} for row in rows]),
        processing_class=AutoTokenizer.from_pretrained(BASE),
        peft_config=LoraConfig(r=R, lora_alpha=16, lora_dropout=0.05, target_modules="all-linear"),
    )
    trainer.train()
    # Between the ends of two backward passes there is a whole number of steps.
    tokens = sum(count for _, count in seen[WARM_UP:-1])
    return {"rate": tokens / (seen[-1][0] - seen[WARM_UP][0]), "peak_gib": peak_memory_gib(torch.device("cpu"))}


def job(name: str, steps: int) -> dict[str, float]:
    """Run one in this process."""
    import torch

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        run = run_trl if name.startswith("trl") else run_ours
        return run(name.endswith("packed"), steps, Path(folder) / "run")


def jobs(rounds: int, steps: int) -> None:
    """All of them in turn, each in its own process; prints a line for each and the table."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in JOBS}
    environ = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    for _ in range(rounds):
        for name in JOBS:
            command = [sys.executable, __file__, "--job", name, "--steps", str(steps)]
            done = subprocess.run(command, cwd=ROOT, env=environ, capture_output=True, text=True)
            if done.returncode:
                raise SystemExit(f"{name} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}")
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
            print(json.dumps({"job": name, "load": round(os.getloadavg()[0], 1), **found[name][-1]}), flush=True)
    print("\n| job | supervised tokens/s | beside TRL in the same round | peak memory, GiB |\n|---|---|---|---|")
    for name in JOBS:
        peak = statistics.median(run["peak_gib"] for run in found[name])
        for key in ("rate",) if name.startswith("trl") else ("before", "after"):
            rates = [run[key] for run in found[name]]
            ratios = []
            if not name.startswith("trl"):
                ratios = [own / other["rate"] for own, other in zip(rates, found[f"trl_{name}"], strict=True)]
            beside = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} … {max(ratios):.2f})" if ratios else ""
            label = name if key == "rate" else f"{name}, {key} the cut"
            print(f"| {label} | {statistics.median(rates):.0f} | {beside} | {peak:.2f} |")


# --------------------------------------------------------------------------------------------------------------- loop


def loop(steps: int) -> None:
    """Time complete and bare steps of `sora_llm.train` on the same batches."""
    import torch

    from sora_llm import train
    from sora_llm.causal_loss import causal_loss_sum
    from sora_llm.running import training_loop

    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {"whole": [], "bare": [], "again": []}
    real = training_loop.train_step
    state = {"ended": time.thread_time()}

    def bare(engine: Any, batches: Any) -> None:
        for batch in batches.micro_batches:
            loss = causal_loss_sum(engine.model, **batch)
            (loss / batches.weight).backward()
        parameters = [p for group in engine.optimizer.param_groups for p in group["params"]]
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        engine.optimizer.step()
        engine.optimizer.zero_grad()

    def timed(engine: Any, batches: Any, *arguments: Any, **options: Any) -> Any:
        """A step of the loop and two bare ones, whose seconds are not charged to the loop."""
        around = time.thread_time() - state["ended"]
        result = None
        first, order = len(seconds["bare"]) % 3, ("whole", "bare", "again")
        for name in (*order[first:], *order[:first]):
            started = time.thread_time()
            if name == "whole":
                result = real(engine, batches, *arguments, **options)
            else:
                bare(engine, batches)
            seconds[name].append(time.thread_time() - started + (around if name == "whole" else 0.0))
        state["ended"] = time.thread_time()
        return result

    training_loop.train_step = timed
    with tempfile.TemporaryDirectory() as folder:
        values = {"output.logging_steps": 10, "sora.consensus_at": 1.0}
        train.run(CONFIG, *overrides(Path(folder) / "run", steps, True, **values))
    training_loop.train_step = real
    bare_ms = statistics.median(seconds["bare"][WARM_UP:]) * 1e3
    for name, label in (("whole", "a step of the run"), ("again", "a second bare step")):
        pairs = list(zip(seconds[name][WARM_UP:], seconds["bare"][WARM_UP:], strict=True))
        q1, median, q3 = statistics.quantiles([own / other - 1 for own, other in pairs], n=4, method="inclusive")
        total = sum(own for own, _ in pairs) / sum(other for _, other in pairs) - 1
        print(
            f"loop: {label} takes {median:+.1%} ({q1:+.1%} … {q3:+.1%}) beside the bare one, {total:+.1%} in sum over "
            f"{len(pairs)} steps of {bare_ms:.0f} ms (CPU time, load {os.getloadavg()[0]:.1f})"
        )


# ------------------------------------------------------------------------------------------------------------- memory


def memory(steps: int) -> None:
    """Resident memory of a run of many short steps on stories260k, after each tenth of it."""
    import psutil
    import torch

    from sora_llm import train
    from sora_llm.running import training_loop

    torch.set_num_threads(1)
    real, seen, me = training_loop.train_step, [], psutil.Process()

    def noted(*arguments: Any, **options: Any) -> Any:
        result = real(*arguments, **options)
        seen.append(me.memory_info().rss / 2**20)
        return result

    training_loop.train_step = noted
    with tempfile.TemporaryDirectory() as folder:
        values = {
            "model.name_or_path": str(DATA / "models/stories260k"),
            "data.sequence_len": 256,
            "data.excess_length": "truncate",
            "train.per_device_train_batch_size": 1,
            "output.logging_steps": 10,
            "output.save_steps": 500,
            "evaluation.eval_steps": 500,
        }
        train.run(CONFIG, *overrides(Path(folder) / "run", steps, True, **values))
    training_loop.train_step = real
    places = [round(steps * tenth / 10) - 1 for tenth in range(1, 11)]
    print(f"memory over {steps} steps, MiB at every tenth: {', '.join(f'{seen[place]:.0f}' for place in places)}")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=30, help="of a job, and of the loop")
    parser.add_argument("--memory-steps", type=int, default=2000)
    parser.add_argument("--only", choices=("jobs", "loop", "memory"))
    parser.add_argument("--job", choices=JOBS, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.steps < 20:
        parser.error("--steps starts at 20: before and after the cut some have to be counted")
    if options.job:
        print(json.dumps(job(options.job, options.steps)))
        return 0
    if options.only in (None, "jobs"):
        jobs(options.rounds, options.steps)
    if options.only in (None, "loop"):
        loop(options.steps)
    if options.only in (None, "memory"):
        memory(options.memory_steps)
    return 0


if __name__ == "__main__":
    sys.exit(main())
