"""Settings of a small run, drawn at random from all over the schema, for tests of what must hold for all of them."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from conftest import shared

Settings = dict[str, Any]

ROWS_OF_A_FILE = 40
CONTEXT = 512
"""Of stories260k."""


def write_rows(folder: Path) -> list[Settings]:
    """Small files of every type of row but custom, the shortest of each; returns them as entries of data.datasets."""
    alpaca = json.loads(shared("data/gpteacher_roleplay.json").read_text())
    sharegpt = json.loads(shared("data/fastchat_dummy_conversation.json").read_text())
    text = shared("data/wikitext2_valid.txt").read_text()[:12_000]
    (folder / "text.txt").write_text(text.rpartition("\n")[0])
    sources = {
        "alpaca": (alpaca, {"columns": {"output": "response"}}),
        "sharegpt": (sharegpt, {}),
        "messages": (_lines("lf_v1_sft_demo.jsonl"), {}),
        "prompt_completion": (
            _lines("gsm8k_train.jsonl"),
            {"columns": {"prompt": "question", "completion": "answer"}, "separator": "\n"},
        ),
        "completion": (_lines("mlx_wikisql_train.jsonl"), {}),
        "self_instruct": (_lines("self_instruct_seed_tasks.jsonl"), {}),
    }
    entries = []
    for name, (rows, options) in sources.items():
        path = folder / f"{name}.jsonl"
        path.write_text("".join(f"{line}\n" for line in sorted(map(json.dumps, rows), key=len)[:ROWS_OF_A_FILE]))
        entries.append({"path": str(path), "type": name, **options})
    return [*entries, {"path": str(folder / "text.txt"), "type": "completion"}]


def _lines(name: str) -> list[Any]:
    with shared(f"data/{name}").open() as file:
        return [json.loads(line) for line in file]


@dataclass(frozen=True)
class World:
    """How a run is split: its processes, their strategy and batches."""

    processes: int
    strategy: str
    batch_size: int
    accumulation: int

    @property
    def settings(self) -> Settings:
        return {
            "distributed.strategy": self.strategy,
            "train.per_device_train_batch_size": self.batch_size,
            "train.gradient_accumulation_steps": self.accumulation,
        }


@dataclass(frozen=True)
class Case:
    """A run, and how it is run a second time: `worlds` one after another, each but the last ended by a fault."""

    settings: Settings
    straight: World
    worlds: list[World]
    faults: list[Settings] = field(default_factory=list)

    @property
    def loss_tolerance(self) -> float:
        """Relative, of a loss computed again from the exported adapter."""
        return 1e-4 if self.settings["model.dtype"] == "float32" else 1e-2

    @property
    def is_same_split(self) -> bool:
        """All worlds are split as the straight one, so that every bit must be the same."""
        return all(world == self.straight for world in self.worlds)


def draw_case(seed: int, datasets: list[Settings]) -> Case:
    """The case of a seed."""
    random = Random(seed)
    rows_per_step = random.choice([2, 4, 6])
    settings = _draw_model(random) | _draw_sora(random) | _draw_data(random, datasets) | _draw_train(random)
    settings |= _draw_evaluation(random, settings)
    settings |= {
        "output.save_steps": random.choice([1, 1, 2, 3]),
        "output.export_layout": random.choice(["padded", "padded", "ragged", "merged", "gguf"]),
        "distributed.check_every": random.choice([1, 3, 100]),
    }
    if not any(dataset.get("streaming") for dataset in settings["data.datasets"]) and random.random() < 0.3:
        del settings["train.max_steps"]
        settings["train.num_train_epochs"] = random.choice([0.2, 0.5, 1.0])
    by_replica = random.random() < 0.1
    if by_replica:
        settings |= {
            "distributed.sync_every": random.choice([2, 3]),
            "distributed.outer_learning_rate": random.choice([1.0, 0.7]),
            "distributed.outer_momentum": random.choice([0.0, 0.5]),
        }
        straight = World(2, "ddp", 1, rows_per_step // 2)
    else:
        straight = random.choice([World(1, "none", 1, rows_per_step), _draw_world(random, rows_per_step)])
    is_exact = settings["model.dtype"] == "float32" and settings["sora.lora_dropout"] == 0 and not by_replica
    same_split = not is_exact or random.random() < 0.3
    num_worlds = random.choice([1, 2, 2, 3]) if not same_split else random.choice([2, 2, 3])
    worlds = [straight if same_split else _draw_world(random, rows_per_step) for _ in range(num_worlds)]
    return Case(settings, straight, worlds, [_draw_fault(random) for _ in worlds[1:]])


def _draw_world(random: Random, rows_per_step: int) -> World:
    processes, strategy = random.choice(
        [(1, "none"), (1, "ddp"), (1, "zero2"), (2, "ddp"), (2, "zero1"), (2, "zero2"), (2, "zero2"), (2, "zero3")]
    )
    rows = rows_per_step // processes
    batch_size = random.choice([size for size in range(1, rows + 1) if rows % size == 0])
    return World(processes, strategy, batch_size, rows // batch_size)


def _draw_fault(random: Random) -> Settings:
    place, most = random.choice([("step", 9), ("step", 9), ("step", 9), ("save", 4), ("rename", 4), ("cut", 1)])
    do = random.choice(["KILL", "TERM", "stop file"])
    process = None if do == "KILL" else 0
    return {"place": place, "nth": random.randint(1, most), "do": do, "process": process}


def draw_commands(random: Random, straight: Path, broken: Path, out: Path) -> list[list[str]]:
    """A few commands on two finished runs."""
    size = random.choice([["--target-rank", str(random.choice([0.5, 1, 3]))], ["--tolerance", "0.2"], []])
    source = random.choice([broken, broken / "adapter", broken / "checkpoints"])
    if source.name == "checkpoints":
        steps = (int(path.name.removeprefix("step-")) for path in source.iterdir() if path.name[5:].isdecimal())
        source = source / f"step-{max(steps)}"
    layout = random.choice(["padded", "ragged", "gguf", "merged"])
    base = [] if layout != "merged" else ["--base", random.choice(["original", "dequantized"])]
    commands = [
        ["inspect", str(source)],
        ["inspect", str(straight), str(broken)],
        ["export", str(source), "--out", str(out / "export"), "--layout", layout, *size, *base],
        ["recommend-ranks", str(source), *size],
        ["evaluate", str(broken), "--target-rank", "1"],
        ["evaluate", str(source)],
        ["consensus", str(straight), str(source), "--out", str(out / "merged"), *size],
        ["generate", str(source), "--prompt", "Who?", "--max-new-tokens", "3"],
        ["estimate", str(broken / "config.yaml"), "--num-processes", str(random.choice([1, 2, 8]))],
        ["preprocess", str(broken / "config.yaml")],
    ]
    return random.sample(commands, 4)


def _draw_model(random: Random) -> Settings:
    four_bit, dtype = random.random() < 0.3, random.choice(["float32"] * 6 + ["bfloat16", "bfloat16", "float16"])
    settings: Settings = {
        "model.name_or_path": str(shared("models/stories260k")),
        "model.dtype": dtype,
        "model.attn_implementation": random.choice(["sdpa", "sdpa", "eager"]),
        "quantization.load_in_4bit": four_bit,
    }
    if four_bit:
        settings["quantization.bnb_4bit_compute_dtype"] = dtype
        settings["quantization.bnb_4bit_quant_type"] = random.choice(["nf4", "fp4"])
        settings["quantization.bnb_4bit_use_double_quant"] = random.choice([True, False])
    if dtype == "bfloat16":
        settings["sora.dtype"] = random.choice(["auto", "bfloat16"])
    return settings


def _draw_sora(random: Random) -> Settings:
    r = random.choice([2, 4, 8])
    settings: Settings = {
        "sora.r": r,
        "sora.lora_alpha": random.choice([4.0, 16.0]),
        "sora.lora_dropout": random.choice([0.0, 0.0, 0.0, 0.1]),
        "sora.target_modules": random.choice(
            ["all-linear", "all-linear", ["q_proj", "v_proj"], ["gate_proj", "up_proj", "q_proj"], "down_proj"]
        ),
        "sora.target_rank": None,
        "sora.dense_ratio": random.choice([0.0, 0.1, 0.3]),
        "sora.consensus_at": random.choice([0.4, 0.7, 1.0]),
        "sora.consensus": random.choice(["svd", "svd", "slots"]),
        "output.allow_empty_adapter": True,
    }
    strength = random.choice(["target_rank", "target_rank", "target_params", "budgets", "lambda", "lambda", "path"])
    if strength in ("target_rank", "budgets"):
        settings["sora.target_rank"] = round(random.uniform(0.2, r), 2)
    if strength == "target_params":
        settings["sora.target_params"] = random.randint(600, 6000)
    if strength == "budgets":
        settings["sora.budgets"] = {"layers.[01]\\.": round(random.uniform(0.5, r), 1)}
    if strength in ("target_rank", "target_params", "budgets"):
        settings["sora.threshold"] = random.choice(["auto", "adaptive", "decoupled"])
        settings["sora.min_rank"] = random.choice([0, 0, 0, 1])
        settings["sora.gate_lr"] = random.choice(["auto", "auto", 0.2])
    else:
        threshold = random.choice(["auto", "decoupled", "proxgen", "constant"])
        most = {"constant": 0.05, "proxgen": 0.5}.get(threshold, 0.9)
        settings["sora.threshold"] = threshold
        settings["sora.sparse_lambda"] = round(random.uniform(0.0, most), 3)
        settings["sora.gate_lr"] = random.choice(["auto", 0.3])
    if strength == "path":
        settings["sora.consensus_at"] = 1.0
        settings["sora.lambda_schedule"] = random.choice(["linear", "log_linear"])
        settings["sora.max_lambda"] = round(settings["sora.sparse_lambda"] + random.uniform(0.01, 0.3), 3)
        settings["sora.lambda_num"] = random.choice([2, 3])
        settings["sora.retrain"] = threshold != "constant" or random.choice([True, False])
    return settings


def _draw_data(random: Random, datasets: list[Settings]) -> Settings:
    chosen = random.sample(datasets, random.choice([1, 1, 2, 3]))
    streaming = random.random() < 0.2
    weighted = len(chosen) > 1 and random.random() < 0.5
    chosen = [
        dataset
        | ({"streaming": True} if streaming else {})
        | ({"weight": random.choice([0.5, 1.0, 2.0])} if weighted else {})
        for dataset in chosen
    ]
    excess = ["drop", "truncate", "truncate"] + ["split"] * any(dataset["type"] == "completion" for dataset in chosen)
    settings: Settings = {
        "data.datasets": chosen,
        "data.val_set_size": None,
        "data.sequence_len": random.choice([192, 256, CONTEXT]),
        "data.sample_packing": random.choice([True, False]),
        "data.excess_length": random.choice(excess),
        "data.max_bad_row_fraction": 1.0,
        "data.drop_duplicates": not streaming and random.random() < 0.2,
        "data.chat_template": random.choice([None, "chatml", "llama-2", "vicuna"]),
    }
    settings["data.num_proc"] = {192: None, 256: 1}.get(settings["data.sequence_len"], 2)
    settings[random.choice(["data.train_on_inputs", "data.train_on_last_turn_only"])] = random.choice([True, False])
    if streaming or random.random() < 0.3:
        settings["data.val_datasets"] = [random.choice(datasets)]
    elif random.random() < 0.9:
        settings["data.val_set_size"] = random.choice([5, 0.2])
    return settings


def _draw_train(random: Random) -> Settings:
    warmup = random.choice([{"train.warmup_ratio": 0.2}, {"train.warmup_steps": random.randint(0, 4)}, {}])
    settings = {
        "train.num_train_epochs": None,
        "train.max_steps": random.choice([1, 3, *range(4, 13)]),
        "train.learning_rate": random.choice([1e-3, 5e-3]),
        "train.lr_scheduler_type": random.choice(["linear", "cosine", "constant", "constant_with_warmup"]),
        "train.weight_decay": random.choice([0.0, 0.1]),
        "train.adam_beta1": random.choice([0.9, 0.8]),
        "train.adam_beta2": random.choice([0.999, 0.95]),
        "train.max_grad_norm": random.choice([1.0, 0.05, None]),
        "train.gradient_checkpointing": random.choice([True, False]),
        "train.seed": random.randint(0, 2**32 - 1),
        **warmup,
    }
    if settings["train.lr_scheduler_type"] in ("linear", "cosine") and settings["train.seed"] % 2:
        settings["train.min_lr_ratio"] = 0.3
    return settings


def _draw_evaluation(random: Random, settings: Settings) -> Settings:
    if settings.get("data.val_set_size") is None and "data.val_datasets" not in settings:
        return {}
    chosen: Settings = {"evaluation.eval_steps": random.choice([None, 2, 3])}
    if chosen["evaluation.eval_steps"] and settings["sora.consensus_at"] < 1 and random.random() < 0.5:
        chosen["evaluation.early_stopping_patience"] = random.choice([1, 2])
    return chosen
