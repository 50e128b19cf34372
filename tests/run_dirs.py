"""Run directories as a run leaves them, made up: for tests of what reads them."""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from runs import CONFIG, gsm8k_overrides

from sora_llm import cli
from sora_llm.config import load_config, to_yaml

SHAPES = {
    "self_attn.q_proj": (64, 64),
    "self_attn.k_proj": (64, 32),
    "self_attn.v_proj": (64, 32),
    "self_attn.o_proj": (64, 64),
    "mlp.gate_proj": (64, 172),
    "mlp.up_proj": (64, 172),
    "mlp.down_proj": (172, 64),
}
FULL_RANK = 16


def module_names(num_layers: int) -> dict[str, tuple[int, int]]:
    """A LLaMA's linears and their shapes."""
    return {f"model.layers.{i}.{name}": shape for i in range(num_layers) for name, shape in SHAPES.items()}


class MadeUpRun:
    """Writes the files of a run directory, a step at a time, from a seed."""

    def __init__(
        self,
        path: Path,
        num_layers: int = 2,
        steps: int = 100,
        every: int = 5,
        *,
        has_dev: bool = True,
        has_budget: bool = False,
        seed: int = 0,
    ):
        self.path, self.steps, self.every, self.has_dev, self.has_budget = path, steps, every, has_dev, has_budget
        self.shapes = module_names(num_layers)
        self.random = random.Random(seed)
        self.keep = {name: self.random.choice([0, 1, 2, 3, 5, 8, 12, 16]) for name in self.shapes}
        self.full = self.params(dict.fromkeys(self.shapes, FULL_RANK))
        self.metrics: list[dict[str, Any]] = []
        self.rank_lines: list[dict[str, Any]] = []
        path.mkdir(parents=True, exist_ok=True)
        self.json(
            "env.json",
            {
                "versions": {"sora_llm": "0.1.0", "python": "3.11.2", "torch": "2.13.0"},
                "hardware": {"machine": "x86_64", "cpu_cores": 2, "memory_gib": 23.4, "gpus": ["NVIDIA H200"]},
                "num_processes": 2,
                "strategy": "zero2",
                "git_commit": "9ec0e4d" * 5,
            },
        )
        (path / "config.yaml").write_text("model:\n  name_or_path: made/up\n")

    def json(self, name: str, content: Any) -> None:
        """One file."""
        file = self.path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(content))

    def params(self, ranks: dict[str, int]) -> int:
        return sum(rank * sum(self.shapes[name]) for name, rank in ranks.items())

    def ranks_at(self, place: float) -> dict[str, int]:
        """`place` of the way through the sparsify phase, from 0 to 1."""
        left = (1 - place) ** 3
        return {name: round(kept + (FULL_RANK - kept) * left) for name, kept in self.keep.items()}

    def sizes(self, ranks: dict[str, int]) -> dict[str, Any]:
        kept = self.params(ranks)
        return {"mean_rank": FULL_RANK * kept / self.full, "kept_params": kept}

    def train(
        self, until: float = 1.0, alarms: Sequence[tuple[int, str]] = (), dense: float = 0.1, consensus: float = 0.6
    ) -> MadeUpRun:
        """Log the steps up to `until` of all."""
        ranks = self.ranks_at(0)
        if self.has_dev:
            self.metrics.append({"step": 0, "phase": "dense", "eval_loss": 3.9, **self.sizes(ranks)})
        for step in range(self.every, int(until * self.steps) + 1, self.every):
            place = step / self.steps
            phase = "dense" if place <= dense else "sparsify" if place <= consensus else "finetune"
            within = min(max((place - dense) / (consensus - dense), 0.0), 1.0)
            ranks = self.ranks_at(within)
            line = {
                "step": step,
                "phase": phase,
                "tokens_per_second": 900 + 80 * self.random.random() + (300 if phase == "finetune" else 0),
                "step_seconds": 0.4,
                "loss": 1.4 + 2.4 * math.exp(-4 * place) + 0.12 * self.random.gauss(0, 1),
                "learning_rate": 2e-4 * (1 - place),
                "gate_learning_rate": 1e-2 * (1 - place),
                "lambda": 0.0 if phase != "sparsify" else 0.1 + 0.5 * within,
                "grad_norm": 0.8,
                "supervised_tokens": 1161,
                "skipped_steps": 0,
                "peak_memory_gib": 5.4 if phase != "finetune" else 4.1,
                **self.sizes(ranks),
            }
            if self.has_budget and phase == "sparsify":
                goal = self.sizes(self.ranks_at(within * 0.97))
                line |= {"target_mean_rank": goal["mean_rank"], "threshold": 2e-3 * within}
            if self.has_budget:
                line["budget_params"] = self.params(self.keep)
            if self.has_dev and step % (4 * self.every) == 0:
                line["eval_loss"] = 1.55 + 2.3 * math.exp(-4 * place)
            said = [sentence for at, sentence in alarms if at == step]
            if said:
                line["alarms"] = said
            self.metrics.append(line)
            if phase == "sparsify":
                self.rank_lines.append({"step": step, "ranks": ranks})
        return self

    def export(self, folder: str = "adapter", ranks: dict[str, int] | None = None) -> str:
        """An adapter's folder; returns the digest of its weights."""
        ranks = self.ranks_at(1) if ranks is None else ranks
        weights = b"w" * self.params(ranks)
        (self.path / folder).mkdir(parents=True, exist_ok=True)
        (self.path / folder / "adapter_model.safetensors").write_bytes(weights)
        modules = {name: {"rank": rank, "delta_error": 1e-16 * (1 + i)} for i, (name, rank) in enumerate(ranks.items())}
        digest = hashlib.sha256(weights).hexdigest()
        self.json(
            f"{folder}/certificate.json",
            {
                "passed": True,
                "layout": "padded",
                "modules": modules,
                "logits_error": 5.6e-3,
                "peft_version": "0.21.2",
                "sha256": digest,
            },
        )
        return digest

    def finish(self, **others: Any) -> Path:
        """The last lines, the adapter, the status; `others` are in the last line of metrics.jsonl."""
        ranks = self.ranks_at(1)
        last = {"step": self.steps, "phase": "export", **self.sizes(ranks), **others}
        if self.has_dev:
            last |= {"eval_loss": 1.5913, "eval_loss_exported": 1.5915}
        self.metrics.append(last)
        self.rank_lines.append({"step": self.steps, "ranks": ranks})
        self.export()
        return self.write("finished", phase="done", adapter="adapter")

    def path_of(self, lambdas: Sequence[float]) -> Path:
        """A path of stages, all its lines."""
        ranks = {}
        for stage, sparse_lambda in enumerate(lambdas):
            for index in range(self.every, self.steps + 1, self.every):
                place = (stage + index / self.steps) / len(lambdas)
                step = stage * self.steps + index
                ranks = {name: round(FULL_RANK - (FULL_RANK - kept) * place) for name, kept in self.keep.items()}
                phase = "dense" if stage == 0 and index <= 0.1 * self.steps else "sparsify"
                self.metrics.append(
                    {
                        "step": step,
                        "phase": phase,
                        "stage": stage,
                        "sparse_lambda": sparse_lambda,
                        "lambda": sparse_lambda,
                        "loss": 1.5 + 2 * math.exp(-3 * place * len(lambdas)),
                        "tokens_per_second": 800.0,
                        **self.sizes(ranks),
                    }
                )
                self.rank_lines.append({"step": step, "stage": stage, "ranks": ranks})
            self.metrics.append(
                {
                    "step": (stage + 1) * self.steps,
                    "phase": "export",
                    "stage": stage,
                    "sparse_lambda": sparse_lambda,
                    "train_loss": 1.3 + 0.06 * stage,
                    "eval_loss": 1.7 + 0.02 * (stage - 2) ** 2,
                    **self.sizes(ranks),
                }
            )
            self.export(f"path/{sparse_lambda:.6g}", ranks)
        self.export("adapter", ranks)
        return self.write("finished", phase="done", adapter="adapter", step=len(lambdas) * self.steps)

    def write(
        self,
        state: str,
        *,
        phase: str | None = None,
        adapter: str | None = None,
        error: str | None = None,
        step: int | None = None,
    ) -> Path:
        """metrics.jsonl, ranks.jsonl and status.json as they are now."""
        for name, lines in (("metrics.jsonl", self.metrics), ("ranks.jsonl", self.rank_lines)):
            (self.path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
        last = self.metrics[-1] if self.metrics else {"step": 0, "phase": "prepare"}
        self.json(
            "status.json",
            {
                "state": state,
                "step": last["step"] if step is None else step,
                "phase": phase or last["phase"],
                "checkpoint": None,
                "adapter": adapter,
                "error": error,
            },
        )
        return self.path


def data_report(path: str = "data/gsm8k_train.jsonl") -> dict[str, Any]:
    """data_report.json as `sora-llm preprocess` writes it, without samples."""
    counts = {
        "rows_read": 7473,
        "rows_kept": 7401,
        "num_bad_rows": 2,
        "too_long": 70,
        "truncated": 0,
        "split": 0,
        "no_supervised": 0,
        "duplicates": 0,
        "tokens": 1781936,
        "supervised_tokens": 1183205,
        "supervised_fraction": 0.664,
    }
    dataset = {"path": path, "type": "prompt_completion", "unsupervised": {}, **counts}
    train = {
        **counts,
        "datasets": [dataset, {**dataset, "path": "data/dolly.jsonl", "rows_read": 1000}],
        "sequence_len": 1024,
        "excess_length": "drop",
        "drop_duplicates": False,
        "bad_rows": [],
        "bad_reasons": {},
        "first_too_long": None,
        "first_special_written": None,
        "max_length": 697,
        "mean_length": 238.4,
        "median_length": 222.0,
        "fill_rate": 0.983,
        "length_histogram": [
            [65, 96, 120],
            [97, 128, 611],
            [129, 192, 2010],
            [193, 256, 2232],
            [257, 384, 1900],
            [385, 512, 500],
            [513, 768, 28],
        ],
    }
    return {
        "chat_template": None,
        "sequence_len": 1024,
        "sample_packing": True,
        "cache": "/tmp/cache",
        "train": train,
        "dev": None,
        "held_out": 73,
    }


def run_dir(folder: Path, **others: Any) -> Path:
    """A run directory that has a config and a status, and no adapter yet."""
    folder.mkdir(parents=True)
    float32 = {"model.dtype": "float32", "quantization.load_in_4bit": False, **others}
    config = load_config(CONFIG, gsm8k_overrides(folder, **float32))
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "status.json").write_text("{}")
    return folder


def inspected(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """What `sora-llm inspect` prints."""
    assert cli.main(["inspect", *map(str, arguments)]) == 0
    return capsys.readouterr().out
