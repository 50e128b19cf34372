"""One run after the other in a process that imports, loads and tokenises once.

The loop is that of `sora_llm.train` without its run directory: the same functions in the same order (changes of form,
rates and λ or threshold of the step, rows, forward and backward, AdamW with the prox).  `same_as_train.py` proves that
it gives the numbers of `python -m sora_llm.train`.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import math
import os
import random
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from plain import cut_plain, make_plain, with_cuts
from protocol import (
    CONFIG,
    EVAL_BATCH,
    TEST,
    TUNING,
    WHOLE,
    Cell,
    Group,
    Protocol,
    R,
)
from tasks import BASE, ROOT

from sora_llm.backbone import load_backbone, load_tokenizer
from sora_llm.base_spec import DTYPES
from sora_llm.budget import params_of
from sora_llm.config import Config, Dataset, load_config
from sora_llm.data.dataset import TokenDataset
from sora_llm.distributed.group import make_accelerator
from sora_llm.errors import RunFailed
from sora_llm.inject import adapters, inject_sora
from sora_llm.pipeline import full_params
from sora_llm.running.alarms import Alarms
from sora_llm.running.assembly import cut_adapter, make_engine
from sora_llm.running.early_stopping import EarlyStopping
from sora_llm.running.evaluation import evaluate
from sora_llm.running.inputs import check_inputs
from sora_llm.running.job import Job
from sora_llm.running.metrics import current_ranks
from sora_llm.running.optimizer_step import Tally, seed_step, train_step
from sora_llm.running.plan import make_plan, rows_in_step
from sora_llm.running.training import Training, make_controller
from sora_llm.running.training_data import load_data, prepare_rows, training_order
from sora_llm.running.training_loop import change_form, refuse_more_skipping, set_rates
from sora_llm.running.unpack import (
    backbone_spec,
    dataset_spec,
    target_modules,
    target_shapes,
)
from sora_llm.topology import ALONE

NUM_POINTS = 10
"""Of a run's curve."""


# ------------------------------------------------------------------------------------------------------------- rows


def split(protocol: Protocol, folder: Path) -> None:
    """Write train.jsonl, tuning.jsonl and test.jsonl: disjoint rows of the protocol's task.  The rows of a smaller
    protocol are the first of a larger one's."""
    task = protocol.task
    assert protocol.num_train <= task.num_train and protocol.num_tuning <= task.num_tuning, "parts would overlap"
    spec = backbone_spec(load_config(ROOT / CONFIG, [f"model.name_or_path={BASE}"]), "none")
    rows, texts = zip(*task.rows(), strict=True)
    tokens = load_tokenizer(spec)(list(texts))["input_ids"]
    short = [row for row, ids in zip(rows, tokens, strict=True) if len(ids) < task.max_tokens]  # and the answer's end
    random.Random(0).shuffle(short)
    tuning, test = task.num_train, task.num_train + task.num_tuning
    starts = {"train": (0, protocol.num_train), TUNING: (tuning, protocol.num_tuning), TEST: (test, protocol.num_test)}
    for name, (start, count) in starts.items():
        part = short[start : start + count]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))


# -------------------------------------------------------------------------------------------------------------- runs


class Runner:
    """Runs cells of one protocol; `folder` holds what `split` wrote, `device` is cpu (one thread) or cuda."""

    def __init__(self, protocol: Protocol, folder: Path, device: str) -> None:
        if device == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"
        torch.set_num_threads(1)
        self.protocol, self.folder = protocol, folder
        with contextlib.redirect_stdout(io.StringIO()):
            config = self.config(Cell(Group(WHOLE, "lora"), protocol.rates[0], 0, TUNING, protocol))
            self.inputs = check_inputs(config, "none")
            self.data = load_data(config, self.inputs, ALONE)
            test_rows = dataset_spec(Dataset(**protocol.task.dataset(folder / f"{TEST}.jsonl")))
            assert self.data.dev is not None
            self.rows = {TUNING: self.data.dev, TEST: prepare_rows(config, self.inputs, [test_rows], ALONE)[0]}
            self.accelerator = make_accelerator("none", ALONE)
            self.model = load_backbone(self.inputs.backbone, self.accelerator.device)
        assert self.data.train is not None
        found = len(self.data.train), len(self.rows[TUNING]), len(self.rows[TEST])
        assert found == (protocol.num_train, protocol.num_tuning, protocol.num_test), f"rows were left out: {found}"
        self.shapes = target_shapes(config, self.inputs.skeleton)
        self.device_name = device_name(self.accelerator.device)
        self.about = {"device": self.device_name, "sources": source_hash(), "commit": commit()}

    def config(self, cell: Cell) -> Config:
        """The config that `python -m sora_llm.train` would be given."""
        values = {**cell.overrides(self.folder, BASE), "output.output_dir": str(self.folder / "run")}
        return load_config(ROOT / CONFIG, [f"{key}={json.dumps(value)}" for key, value in values.items()])

    def run(self, cell: Cell, curve_rows: int = 0, num_points: int = NUM_POINTS) -> dict[str, Any]:
        """The line of a cell, also where it failed.  With `curve_rows` the points of its curve have the loss over so
        many of its rows, measured while the clock stands still."""
        line = {"key": cell.key, "cell": cell.fields, "protocol": cell.protocol.fields}
        try:
            return self.line_of(line, lambda: self._run(cell, curve_rows, num_points))
        finally:
            self._clear()

    def line_of(self, described: Mapping[str, Any], run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `run` finds, or why it failed, with what it was, where and when."""
        started, line = time.perf_counter(), dict(described)
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found = run()
            line |= found if math.isfinite(found["loss"]) else {"failed": f"the loss is {found['loss']}"}
        except Exception as error:
            line |= {"failed": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()[-2000:]}
        finished = {"wall_seconds": round(time.perf_counter() - started, 2), "at": time.strftime("%Y-%m-%dT%H:%M:%S")}
        return {**line, **self.about, **finished}

    def _run(self, cell: Cell, curve_rows: int, num_points: int) -> dict[str, Any]:
        base_loss = self.base_loss(cell.rows)
        budget = params_of(cell.group.size * R, sum(i + o for i, o in self.shapes.values()))
        training = self._begin(cell, budget)
        change = change_form
        if cell.arm.sora is None:
            change = functools.partial(cut_plain, cell=cell, budget=budget)
        rows = self.rows[cell.rows]
        some = rows.select(range(curve_rows))
        curve = train(training, change, num_points, (lambda: self.loss(some)) if curve_rows else None)
        masters = training.engine.masters()
        with training.engine.released() as model:
            cut = cut_adapter(training, model, masters, dtype=torch.float32)
        if cut.ranks.kept_params > budget:
            raise RunFailed(f"{cut.ranks.kept_params:,} parameters are left, of a budget of {budget:,}")
        return {
            "base_loss": base_loss,
            "loss": self.loss(rows),
            "kept_params": cut.ranks.kept_params,
            "budget_params": budget,
            "seconds": curve[-1]["seconds"],
            "curve": curve,
            "ranks": list(cut.ranks.ranks.values()),
            "alarms": training.alarms.take(),
        }

    def _begin(self, cell: Cell, budget: int) -> Training:
        """What `sora_llm.train` holds before its first step, but for a run directory."""
        job = self.job(cell)
        config = job.config
        sora = config.sora
        torch.manual_seed(config.train.seed)
        targets = target_modules(config)
        inject_sora(self.model, sora.r, sora.lora_alpha, sora.lora_dropout, targets, DTYPES[sora.dtype])
        if cell.arm.sora is None:
            make_plain(self.model, cell, budget)
        alarms = Alarms(job.plan.budgets, full_params(adapters(self.model)))
        engine = make_engine(job, self.model)
        tally = Tally.start(engine.device)
        nowhere: Any = None  # there is no run directory
        return Training(job, nowhere, engine, tally, make_controller(job, 0), alarms, EarlyStopping(None))

    def job(self, cell: Cell) -> Job:
        """The rows of its steps and the plan of its rates."""
        config = self.config(cell)
        with training_order(config, self.inputs, self.data, rows_in_step(config, ALONE)) as order:
            plan = make_plan(config, "none", ALONE, order.steps_in, self.shapes)  # (only a stream's order ends here)
        if cell.arm.sora is None:
            plan = with_cuts(plan, cell)
        nobody: Any = None  # no one to stop it, and no other process that could die
        return Job(self.inputs, plan, ALONE, self.accelerator, self.data, order, {}, stop=nobody, liveness=nobody)

    def loss(self, rows: TokenDataset) -> float:
        """Of the model as it is now."""
        device = self.accelerator.device
        return evaluate(self.model, rows, self.inputs.batch, batch_size=EVAL_BATCH, world=ALONE, device=device)

    @functools.cache  # noqa: B019  # a runner lives as long as its process
    def base_loss(self, rows: str) -> float:
        """Of the model without an adapter, measured the first time."""
        return self.loss(self.rows[rows])

    def _clear(self) -> None:
        """Leave the base, and no engine."""
        self.accelerator.free_memory()
        for name, layer in adapters(self.model).items():
            self.model.set_submodule(name, layer.base_layer)


def train(
    training: Training,
    change: Callable[[Training, int], None],
    num_points: int,
    measure: Callable[[], float] | None,
) -> list[dict[str, float]]:
    """All steps; `change` puts the adapters into another form before some.

    Returns: `num_points` points of step, seconds (of steps and changes of form), loss (of the rows trained on since the
    point before), mean_rank, and as eval_loss what `measure` says, where it is given.
    """
    job, tally, total = training.job, training.tally, training.stage.total_steps
    due = {round(point * total / num_points) for point in range(1, num_points + 1)}
    curve: list[dict[str, float]] = []
    seconds, since = 0.0, time.perf_counter()
    for step in range(total):
        change(training, step)
        if training.engine.is_closed:  # the cut left nothing to train
            break
        set_rates(training, step)
        seed_step(job.config.train.seed, step, 0)
        batches = job.batches(step)
        training.done = step + 1
        loss_sum, outcome = train_step(training.engine, batches, 1)
        tally.add(loss_sum, outcome, batches)
        refuse_more_skipping(training)
        if training.done in due:
            loss = tally.flush()["loss"]  # waits for the device
            seconds += time.perf_counter() - since
            point = {"step": training.done, "seconds": round(seconds, 3), "loss": loss}
            point["mean_rank"] = current_ranks(training).mean_rank
            curve.append(point if measure is None else {**point, "eval_loss": measure()})
            since = time.perf_counter()
    return curve


# ------------------------------------------------------------------------------------------------------------- origin


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, 1 thread"


def source_hash() -> str:
    """Of the package's sources and of those of the runs here: says also where there is no git which code ran."""
    digest = hashlib.sha256()
    here = Path(__file__).resolve().parent
    for file in [*sorted((ROOT / "sora_llm").rglob("*.py")), here / "runner.py", here / "plain.py"]:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str | None:
    """None where this is no git checkout."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    try:
        found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    except OSError:
        return None
    return found.stdout.strip() or None
