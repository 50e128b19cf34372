"""What is compared, at which sizes, with which learning rates and seeds: README.md as code, without torch.

A *cell* is one run.  The rule that tunes an arm's learning rate is `wanted_rates` and `best_rate`.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tasks import GSM8K_ANSWERS, Task

CONFIG = "configs/llama7b.yaml"
R = 16
TUNING, TEST = "tuning", "test"
"""Which rows a cell is measured on."""


@dataclass(frozen=True)
class Arm:
    """A way to an adapter of some size; README.md says in words which is what.

    `sora` are keys of the config's section sora: the product's own run, which prunes and cuts as they say.  With None
    the adapter is a plain LoRA (its gates are folded away before the first step), whose budgeted size is that of its
    first step, or is reached by `cuts` (shares of the steps), each of which keeps the same share of what was left:
    singular components, slots at random, or with "all" every slot as it is, so that only the optimizer begins anew.
    """

    name: str
    sora: Mapping[str, Any] | None = None
    starts_small: bool = False
    cuts: tuple[float, ...] = ()
    keeps: str = "svd"
    is_whole: bool = False


NEVER_CUT: Mapping[str, Any] = {"sparse_lambda": 0.0, "target_rank": None, "consensus_at": 1.0}
CHANGES = (0.1, 0.4)
"""Where `sora` changes its adapters' form, as shipped."""

ARMS = {
    arm.name: arm
    for arm in (
        Arm("lora", is_whole=True),
        Arm("uniform", starts_small=True),
        Arm("svd", cuts=(0.4,)),
        Arm("svd4", cuts=(0.2, 0.3, 0.4, 0.5)),
        Arm("sora", sora={}),
        Arm("svd4early", cuts=(0.1, 0.2, 0.3, 0.4)),
        Arm("balanced", sora={}, is_whole=True),
        Arm("random", cuts=(0.4,), keeps="random"),
        Arm("decoupled", sora={"threshold": "decoupled"}),
        Arm("slots", sora={"consensus": "slots"}),
        Arm("late", sora={"consensus_at": 0.7}),
        Arm("end", sora={"consensus_at": 1.0}),
        Arm("gates", sora={**NEVER_CUT, "gate_lr": 1e-2}, is_whole=True),  # the rate that adaptive gates have
        Arm("restart", cuts=CHANGES, keeps="all", is_whole=True),
        Arm("components", cuts=CHANGES, is_whole=True),
    )
}
CONTROLS, PARTS, EXTRAS = (
    ("svd4early", "random", "decoupled"),
    ("gates", "restart", "components"),
    ("slots", "late", "end"),
)
"""The rest of the core, beside a task's rivals and `balanced`; `balanced` taken apart; if time is left."""
CORE_SIZES, EXTRA_SIZES = (0.25, 0.70), (0.10, 0.50)
WHOLE = 1.0  # the size of `lora`


@dataclass(frozen=True)
class Protocol:
    """What all cells of an experiment have in common."""

    steps: int = 125
    rows_per_step: int = 8
    num_train: int = GSM8K_ANSWERS.num_train
    num_tuning: int = GSM8K_ANSWERS.num_tuning
    num_test: int = GSM8K_ANSWERS.num_test
    rates: tuple[float, ...] = (4e-3, 5.66e-3, 8e-3, 1.13e-2)
    tuning_seeds: tuple[int, ...] = (101, 102)
    seeds: tuple[int, ...] = (11, 12, 13, 14, 15, 16, 17, 18)
    task: Task = GSM8K_ANSWERS

    @staticmethod
    def of(task: Task, steps: int) -> Protocol:
        """All rows of a task."""
        return Protocol(steps, num_train=task.num_train, num_tuning=task.num_tuning, num_test=task.num_test, task=task)

    @property
    def fields(self) -> dict[str, Any]:
        """What makes the result of a cell beside the cell itself.  The first task's lines do not name it: they were
        written before there was another."""
        names = ("steps", "rows_per_step", "num_train", "num_tuning", "num_test")
        named = {} if self.task.is_first else {"task": self.task.name}
        return {**{name: getattr(self, name) for name in names}, **named}


@dataclass(frozen=True, order=True)
class Group:
    """An arm at a size: what has one learning rate."""

    size: float
    arm: str

    def __str__(self) -> str:
        return self.arm if self.size == WHOLE else f"{self.arm} {self.size:.0%}"


@dataclass(frozen=True)
class Cell:
    """One run."""

    group: Group
    learning_rate: float
    seed: int
    rows: str
    protocol: Protocol = field(default_factory=Protocol)

    def __str__(self) -> str:
        return f"{self.group!s:<14} lr {self.learning_rate:<8g} seed {self.seed:<4} {self.rows}"

    @property
    def arm(self) -> Arm:
        return ARMS[self.group.arm]

    @property
    def fields(self) -> dict[str, Any]:
        """The cell as its line says it."""
        return {**asdict(self.group), "learning_rate": self.learning_rate, "seed": self.seed, "rows": self.rows}

    @property
    def key(self) -> str:
        return _key(self)

    @property
    def identity(self) -> str:
        """Hash of all that makes the result: the config of the run but for its paths, the rows, the arm's cuts."""
        arm = self.arm
        described = [self.fields, self.protocol.fields, self.overrides(), arm.starts_small, arm.cuts, arm.keeps]
        return hashlib.sha256(json.dumps(described, sort_keys=True).encode()).hexdigest()[:12]

    def overrides(self, folder: Path | None = None, base: Path | None = None) -> dict[str, Any]:
        """Of CONFIG; `folder` holds train.jsonl and tuning.jsonl, `base` is the model.  Without paths for the key."""
        sora = NEVER_CUT if self.arm.sora is None else {"target_rank": self.group.size * R, **self.arm.sora}
        paths: dict[str, Any] = {}
        task = self.protocol.task
        if folder is not None:
            paths = {
                "model.name_or_path": str(base),
                "data.datasets": [task.dataset(folder / "train.jsonl")],
                "data.val_datasets": [task.dataset(folder / f"{TUNING}.jsonl")],
                "data.cache_dir": str(folder / "cache"),
            }
        return {
            **paths,
            **{f"sora.{key}": value for key, value in sora.items()},
            # s = lora_alpha / r is 1 for every arm and size, so that one learning rate means the same everywhere
            "sora.r": R,
            "sora.lora_alpha": R,
            "sora.lora_dropout": 0.0,
            "model.dtype": "bfloat16",
            "model.attn_implementation": "eager",  # on a CPU and at this length the fastest
            "quantization.load_in_4bit": task.load_in_4bit,
            "data.val_set_size": None,
            "data.sequence_len": task.sequence_len,
            "data.sample_packing": False,
            "train.max_steps": self.protocol.steps,
            "train.num_train_epochs": None,
            "train.per_device_train_batch_size": self.protocol.rows_per_step,
            "train.gradient_accumulation_steps": 1,
            "train.gradient_checkpointing": False,
            "train.learning_rate": self.learning_rate,
            "train.seed": self.seed,
            "evaluation.per_device_eval_batch_size": EVAL_BATCH,
            "output.report_to": [],
        }


@functools.cache
def _key(cell: Cell) -> str:
    return cell.identity


EVAL_BATCH = 16


# --------------------------------------------------------------------------------------------------- learning rates

LADDER = tuple(float(f"{8e-3 * 2 ** (k / 2):.3g}") for k in range(-10, 11))
Losses = Mapping[float, float]  # learning rate → mean loss over the tuning seeds; infinite where a run failed


def wanted_rates(found: Losses, first: Sequence[float], ladder: Sequence[float] = LADDER) -> list[float]:
    """The learning rates (or values of another setting) that are still to be tried, none when tuning has ended.

    First those of `first`, a part of `ladder` (of rates: steps of √2).  While the best one lies at an edge of what was
    tried, the next one beyond it.
    """
    if missing := [rate for rate in first if rate not in found]:
        return missing
    place = ladder.index(best_rate(found))
    neighbours = [ladder[index] for index in (place - 1, place + 1) if 0 <= index < len(ladder)]
    return [rate for rate in neighbours if rate not in found]


def best_rate(found: Losses) -> float:
    """The rate of the lowest mean loss; of equal ones the lowest rate."""
    return min(found, key=lambda rate: (found[rate], rate))


# ------------------------------------------------------------------------------------------------------------ order


def core_blocks(task: Task = GSM8K_ANSWERS, sizes: Sequence[float] = CORE_SIZES) -> list[list[Group]]:
    """LoRA at r = 16 with the rivals at the first size; the rivals at the others; for the first task the controls, size
    by size."""
    first, *later = ([Group(size, name) for name in task.rivals] for size in sizes)
    blocks = [[Group(WHOLE, "lora"), *first], *later]
    if task.is_first:
        blocks += [[Group(WHOLE, "balanced")], *([Group(size, name) for name in CONTROLS] for size in sizes)]
    return blocks


def core_groups(task: Task = GSM8K_ANSWERS) -> list[Group]:
    """All of `core_blocks`."""
    return [group for block in core_blocks(task) for group in block]


def extra_groups(task: Task = GSM8K_ANSWERS) -> list[Group]:
    """By priority, for the time that is left."""
    if not task.is_first:
        return [Group(size, arm) for size, arm in task.extras]
    variants = [*(Group(WHOLE, name) for name in PARTS), *(Group(0.25, name) for name in EXTRAS)]
    sizes = [Group(size, name) for size in EXTRA_SIZES for name in ("uniform", "svd4", "sora")]
    return [*variants, *sizes]


class Queue:
    """Which cell comes next, from the results so far: tuning, then the fresh seeds size by size, then the extras.

    Seeds go through all arms one after the other, so that what is there when time runs out are whole pairs.
    """

    def __init__(self, protocol: Protocol, blocks: Sequence[Sequence[Group]]) -> None:
        """Block by block: first tuning, then seeds; what waits for runs under way does not hold up the next."""
        self.protocol, self.blocks = protocol, blocks

    def tuning_losses(self, group: Group, lines: Mapping[str, Mapping[str, Any]]) -> dict[float, float]:
        """{learning rate: mean loss} of the rates whose tuning seeds are all there."""
        found: dict[float, float] = {}
        for rate in LADDER:
            cells = self.tuning_cells(group, rate)
            if all(cell.key in lines for cell in cells):
                found[rate] = sum(lines[cell.key].get("loss", math.inf) for cell in cells) / len(cells)
        return found

    def tuning_cells(self, group: Group, rate: float) -> list[Cell]:
        return [Cell(group, rate, seed, TUNING, self.protocol) for seed in self.protocol.tuning_seeds]

    def tuned(self, group: Group, lines: Mapping[str, Mapping[str, Any]]) -> float | None:
        """The frozen learning rate, None while tuning has not ended (or where every rate failed)."""
        found = self.tuning_losses(group, lines)
        if not found or wanted_rates(found, self.protocol.rates):
            return None
        best = best_rate(found)
        return best if math.isfinite(found[best]) else None

    def test_cells(self, group: Group, lines: Mapping[str, Mapping[str, Any]]) -> list[Cell]:
        rate = self.tuned(group, lines)
        if rate is None:
            return []
        return [Cell(group, rate, seed, TEST, self.protocol) for seed in self.protocol.seeds]

    def missing(self, lines: Mapping[str, Mapping[str, Any]]) -> Iterator[Cell]:
        """All cells that can be run now, the most urgent first."""
        for block in self.blocks:
            for group in block:
                for rate in wanted_rates(self.tuning_losses(group, lines), self.protocol.rates):
                    yield from (cell for cell in self.tuning_cells(group, rate) if cell.key not in lines)
            cells = [cell for group in block for cell in self.test_cells(group, lines) if cell.key not in lines]
            yield from sorted(cells, key=lambda cell: cell.seed)


# ------------------------------------------------------------------------------------------------------- its results


def read_all(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of runs; one that was cut off by the end of a machine is passed over."""
    found = []
    for text in file.read_text().splitlines() if file.is_file() else ():
        try:
            found.append(json.loads(text))
        except ValueError:
            continue
    return found


def tuning_lines(file: Path) -> dict[str, dict[str, Any]]:
    """Those of `read_lines` that learning rates are chosen by."""
    return {key: line for key, line in read_lines(file).items() if line["cell"]["rows"] == TUNING}


def read_lines(file: Path) -> dict[str, dict[str, Any]]:
    """{key: line} of a file of runs.  Of two lines with one key the first counts that did not fail."""
    found: dict[str, dict[str, Any]] = {}
    for line in read_all(file):
        if line["key"] not in found or "failed" in found[line["key"]]:
            found[line["key"]] = line
    return found
