"""Workers that train a small model for a few steps under a strategy and report what they saw.

`strategy_world` does everything that the tests want to know about one strategy in one world of processes, because each
start costs ten seconds of imports.  It returns plain tensors, numbers and strings; the tests judge them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from helpers import randomise_all, tiny_llama
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from sora_llm import causal_loss, train
from sora_llm.backbone import load_backbone
from sora_llm.base_spec import DTYPES, BackboneSpec, computes_in_float16, resolve_quant_storage
from sora_llm.data.batches import collate
from sora_llm.data.dataset import TokenDataset
from sora_llm.data.order import EpochOrder, share
from sora_llm.distributed import group
from sora_llm.distributed.collectives import gather_objects, sum_over_processes
from sora_llm.distributed.engine import Engine
from sora_llm.distributed.group import make_accelerator
from sora_llm.errors import RunFailed
from sora_llm.export import export_adapter
from sora_llm.hashes import tensor_hash
from sora_llm.inject import adapter_parameters, adapters, inject_sora
from sora_llm.loss_scale import LossScale
from sora_llm.optim import ProxAdamW, parameter_groups
from sora_llm.running import optimizer_step, training_loop
from sora_llm.running.evaluation import evaluate
from sora_llm.running.optimizer_step import StepBatches, seed_step, step_batches, train_step
from sora_llm.sora import soft_threshold
from sora_llm.topology import ZERO_STAGES, World, deepspeed_config, launched_world

NUM_ROWS, ROWS_PER_STEP, MICRO_BATCH = 18, 8, 2
"""Steps of 8, 8 and 2 rows: with micro-batches of 2 the last step of an epoch leaves a second process without rows."""
NUM_STEPS, DENSE_STEPS, SHORT = 21, 3, 6
MAX_TOKENS = {"base5m": 100, "stories260k": 170}  # of a row: short, so that a step takes a fraction of a second
R, LORA_ALPHA = 8, 16
LEARNING_RATE, GATE_LR, SPARSE_LAMBDA, WEIGHT_DECAY, MAX_GRAD_NORM = 2e-3, 0.15, 0.5, 0.01, 1.0

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "nf4": {"dtype": "float32", "load_in_4bit": True, "compute_dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "nf4bf16": {"dtype": "bfloat16", "load_in_4bit": True, "compute_dtype": "bfloat16"},
}

Adapter = dict[str, Tensor]


# ------------------------------------------------------------------------------------------------------- a small world


@functools.cache
def gsm8k_rows(model: str, data: str) -> TokenDataset:
    """The first short rows of GSM8K: question and answer as they are, the answer supervised."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    rows: list[tuple[np.ndarray, np.ndarray]] = []
    with Path(data).open() as file:
        for row in map(json.loads, file):
            question = tokenizer(row["question"]).input_ids
            answer = tokenizer(row["answer"], add_special_tokens=False).input_ids
            if len(question) + len(answer) <= MAX_TOKENS[Path(model).name]:
                rows.append((np.array(question + answer), np.array([0.0] * len(question) + [1.0] * len(answer))))
            if len(rows) == NUM_ROWS:
                break
    return TokenDataset.of(rows)


@dataclasses.dataclass
class Place:
    """One process of a world under a strategy, and the rows it trains on."""

    strategy: str
    model: str
    rows: TokenDataset
    world: World
    accelerator: Any

    @classmethod
    def make(cls, strategy: str, model: str, data: str, adapter_dtype: str = "float32") -> Place:
        """Join the world that the environment announces."""
        world = launched_world(os.environ)
        options = None
        if strategy in ZERO_STAGES:
            # The default threshold would never shard weights as small as these.
            sharded = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if strategy == "zero3" else None
            options = deepspeed_config(
                strategy, max_grad_norm=MAX_GRAD_NORM, adapter_dtype=adapter_dtype, user_config=sharded
            )
        # As `accelerate launch` says it of a config file with keys of DeepSpeed.
        os.environ["ACCELERATE_CONFIG_DS_FIELDS"] = "zero_stage,gradient_clipping,mixed_precision"
        accelerator = make_accelerator(strategy, world, deepspeed_config=options, timeout_minutes=2)
        return cls(strategy, model, gsm8k_rows(model, data), world, accelerator)

    def with_model(self, model: str, data: str) -> Place:
        """The same process with another model and its rows."""
        return dataclasses.replace(self, model=model, rows=gsm8k_rows(model, data))

    def engine(
        self,
        precision: str = "fp32",
        *,
        adapter_dtype: str = "float32",
        checkpointing: bool = False,
        start: Adapter | None = None,
        exponent: int | None = None,
    ) -> Engine:
        """A fresh model with adapters from seed 0, or from the masters of `start`, under its engine; `exponent` is that
        of the loss scale in float16."""
        options = PRECISIONS[precision]
        storage = resolve_quant_storage("auto", options.get("compute_dtype", "float32"), self.strategy)
        spec = BackboneSpec(self.model, **options, quant_storage=storage)
        model = load_backbone(spec, self.accelerator.device, gradient_checkpointing=checkpointing)
        torch.manual_seed(0)
        inject_sora(model, R, LORA_ALPHA, dtype=DTYPES[adapter_dtype])
        if start is not None:
            with torch.no_grad():
                for name, parameter in adapter_parameters(model).items():
                    parameter.copy_(start[name])
        groups = parameter_groups(model, LEARNING_RATE, GATE_LR, weight_decay=WEIGHT_DECAY)
        loss_scale = LossScale(computes_in_float16(spec))
        if exponent is not None:
            loss_scale.load([exponent, 0])
        optimizer = ProxAdamW(groups)
        return Engine(self.accelerator, model, optimizer, self.strategy, MAX_GRAD_NORM, loss_scale=loss_scale)

    def row_numbers(self, step: int) -> list[list[int]]:
        """This process's rows of a step, by micro-batch."""
        sequences = EpochOrder(self.rows, ROWS_PER_STEP, seed=0).step(step)
        mine = share(sequences, self.world.process_index, self.world.num_processes, MICRO_BATCH)
        return [[int(sequence.rows[0]) for sequence in micro_batch] for micro_batch in mine]

    def batches(self, step: int, micro_batch: int = MICRO_BATCH) -> StepBatches:
        """What a step trains on."""
        sequences = EpochOrder(self.rows, ROWS_PER_STEP, seed=0).step(step)
        return step_batches(sequences, self.world, micro_batch, functools.partial(collate, pad_id=0))

    def train(
        self,
        engine: Engine,
        steps: Sequence[int],
        *,
        evaluate_after: int | None = None,
        after_step: Callable[[float, float], None] | None = None,
        sparse_lambda: float = SPARSE_LAMBDA,
        micro_batch: int = MICRO_BATCH,
    ) -> list[float]:
        """The losses of some steps of the run; λ is 0 in its first DENSE_STEPS."""
        losses = []
        for step in steps:
            applied = sparse_lambda if step >= DENSE_STEPS else 0.0
            engine.set_rates(LEARNING_RATE, GATE_LR, applied)
            seed_step(0, step, self.world.process_index)
            batches = self.batches(step, micro_batch)
            loss_sum, outcome = train_step(engine, batches, self.world.num_processes)
            assert not outcome.skipped
            losses.append(sum_over_processes(loss_sum, device=engine.device)[0] / batches.weight)
            if after_step is not None:
                after_step(step, GATE_LR)
            if step == evaluate_after:
                self.evaluate(engine)
        return losses

    def evaluate(self, engine: Engine) -> float:
        pad = functools.partial(collate, pad_id=0)
        return evaluate(engine.model, self.rows, pad, batch_size=4, world=self.world, device=engine.device)


def state_of(engine: Engine) -> dict[str, Any]:
    """Masters, moments and the number of steps (collective)."""
    moments, num_steps = engine.optimizer_state()
    return {"masters": engine.masters(), "moments": moments, "num_steps": num_steps}


def delta_weights(masters: Adapter) -> Adapter:
    """ΔW = s · B diag(g) A of every module, in float64."""
    names = [name.removesuffix(".gate") for name in masters if name.endswith(".gate")]
    return {
        name: (LORA_ALPHA / R)
        * (masters[f"{name}.lora_B"].double() * masters[f"{name}.gate"].double())
        @ masters[f"{name}.lora_A"].double()
        for name in names
    }


def copies(engine: Engine) -> Adapter:
    """The adapter as the model holds it on this process; under ZeRO-3 this process's shard of it."""
    held = adapter_parameters(engine.module)
    return {name: getattr(p, "ds_tensor", p).detach().clone() for name, p in held.items()}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    """Equal names and bits."""
    return one.keys() == other.keys() and all(tensor_hash(one[name]) == tensor_hash(other[name]) for name in one)


def finish(engine: Engine) -> None:
    """Let go of an engine, so that the next one of this process has the memory."""
    with engine.released():
        pass


# ----------------------------------------------------------------------------------------------------------- questions


def strategy_world(
    strategy: str,
    models: str,
    data: str,
    folder: str,
    precisions: Sequence[str],
    evaluations: Sequence[Sequence[Any]],
    load_from: Sequence[str],
    run_config: str | None = None,
) -> dict[str, Any]:
    """Everything about one strategy: long runs on base5m, the rest on stories260k, which is fast.

    The final state of a stories260k run is left in `folder`/<strategy>.pt for the worlds that come later.
    """
    place = Place.make(strategy, f"{models}/base5m", data)
    small = place.with_model(f"{models}/stories260k", data)
    report: dict[str, Any] = {"rows": [place.row_numbers(step) for step in range(NUM_STEPS)], "seconds": {}}
    run_folder = f"{folder}/{{}}-{strategy}"
    questions: dict[str, Callable[[], Any]] = {
        "runs": lambda: {precision: long_run(place, precision) for precision in precisions},
        "saved": lambda: short_run_saved(small, Path(folder) / f"{strategy}.pt"),
        "evaluation": lambda: [evaluation_bits(small, *cell) for cell in evaluations],
        "skipped": lambda: skipped_step(small),
        "scaled": lambda: falling_scale(small),
        "loaded": lambda: {source: load_and_go_on(small, Path(folder) / f"{source}.pt") for source in load_from},
        "prepared": lambda: gates_after_prepare(small),
        "graphs": lambda: graphs_alive(small),
    }
    if strategy in ("none", "zero2"):
        questions["naive"] = lambda: naive_thresholding(small)
    if strategy in ("ddp", "zero1", "zero2"):
        questions["flips"] = lambda: flipped_bits(small)
    if strategy == "zero3":
        questions["packed"] = lambda: [packed_bytes_held(small, checkpointing) for checkpointing in (False, True)]
    if run_config is not None:
        questions["stopped"] = lambda: never_finite(small, run_config, run_folder.format("stopped"))
    for name, ask in questions.items():
        started = time.monotonic()
        report[name] = ask()
        report["seconds"][name] = round(time.monotonic() - started, 1)
    return report


def short_run_saved(place: Place, path: Path) -> dict[str, Any]:
    """Leave the state of a short run in `path`; λ is large, so that some gates are zero in it.  Returns how many are,
    and whether all of its losses came from the head (`head_loss`)."""
    engine, plain, from_head = place.engine(), causal_loss.token_losses, list[bool]()

    def noted_losses(*arguments: Any, **options: Any) -> Tensor | None:
        losses = plain(*arguments, **options)
        from_head.append(losses is not None)
        return losses

    causal_loss.token_losses = noted_losses
    try:
        place.train(engine, range(SHORT), sparse_lambda=2.0)
    finally:
        causal_loss.token_losses = plain
    state = state_of(engine)
    finish(engine)
    if place.world.is_main:
        torch.save(state, path)
    gates = [tensor for name, tensor in state["masters"].items() if name.endswith(".gate")]
    num_zero = sum(int((gate == 0).sum()) for gate in gates)
    return {
        "zero": num_zero,
        "all": sum(gate.numel() for gate in gates),
        "from_head": len(from_head) > SHORT and all(from_head),
    }


def long_run(place: Place, precision: str, *, adapter_dtype: str = "float32", micro_batch: int = MICRO_BATCH) -> Any:
    """NUM_STEPS steps with an evaluation in the middle: losses, gates, state, and how it is laid out."""
    engine = place.engine(precision, adapter_dtype=adapter_dtype)
    run: dict[str, Any] = {"losses": place.train(engine, range(DENSE_STEPS), micro_batch=micro_batch)}
    run["dense_masters"] = engine.masters()
    sparsify = range(DENSE_STEPS, NUM_STEPS)
    run["losses"] += place.train(engine, sparsify, evaluate_after=NUM_STEPS // 2, micro_batch=micro_batch)
    run |= {"layout": layout(engine)}  # after training: ZeRO-3 keeps what is below its threshold whole from then on
    run |= state_of(engine) | {"gates": engine.gates(), "shares": shares(engine)}
    finish(engine)
    return run


def layout(engine: Engine) -> dict[str, Any]:
    """What DeepSpeed itself says it does, and how many elements of each weight this process holds."""
    if not engine.is_zero:
        return {"stage": None}
    held = {
        name: (p.ds_tensor.numel() if hasattr(p, "ds_tensor") else p.numel(), getattr(p, "ds_numel", p.numel()))
        for name, p in engine.module.named_parameters()
    }
    return {
        "stage": engine.model.zero_optimization_stage(),
        "stage_of_config": engine.model.config["zero_optimization"]["stage"],
        "sharding_optimizer": type(engine._zero.sharding).__name__,
        "partitions_gradients": bool(getattr(engine._zero.sharding, "partition_gradients", True)),
        "held": held,
        "resident": sum(p.numel() for p in engine.module.parameters()),
    }


def shares(engine: Engine) -> dict[str, int]:
    """Elements of Adam's first moment that this process keeps, and those of the whole adapter."""
    kept = sum(state["exp_avg"].numel() for state in engine.optimizer.state.values() if "exp_avg" in state)
    whole = sum(getattr(p, "ds_numel", p.numel()) for p in adapter_parameters(engine.module).values())
    return {"kept": kept, "whole": whole}


def packed_bytes_held(place: Place, checkpointing: bool) -> dict[str, int]:
    """Bytes of the 4-bit weights that were whole in a forward pass, of those that still are before the backward pass,
    and how many layers have their own class again when the engine is spent.

    In the first pass of an engine: later on DeepSpeed keeps, by its defaults, up to 10⁹ elements whole, which is all of
    a small model.
    """
    from bitsandbytes.nn import Linear4bit

    engine = place.engine("nf4", checkpointing=checkpointing)
    read: dict[str, tuple[int, StorageWeakRef]] = {}

    def note(name: str, layer: torch.nn.Module, _inputs: Any) -> None:
        storage = layer.weight.untyped_storage()  # type: ignore[operator]
        read[name] = (storage.nbytes(), StorageWeakRef(storage))

    layers = {name: layer for name, layer in engine.module.named_modules() if isinstance(layer, Linear4bit)}
    hooks = [layer.register_forward_pre_hook(functools.partial(note, name)) for name, layer in layers.items()]
    loss = optimizer_step.causal_loss_sum(engine.model, **place.batches(0).micro_batches[0])
    found = {
        "whole": sum(size for size, _ in read.values()),
        "held": sum(size for size, storage in read.values() if not storage.expired()),
        "packed": sum(layer.weight.ds_numel * layer.weight.ds_tensor.itemsize for layer in layers.values()),
    }
    for hook in hooks:
        hook.remove()
    engine.backward(loss)
    del loss
    finish(engine)
    return {**found, "restored": sum(type(layer) is Linear4bit for layer in layers.values()), "layers": len(layers)}


def evaluation_bits(place: Place, precision: str, checkpointing: bool) -> bool:
    """Whether a short run ends with the same bits with and without an evaluation in its middle."""
    ends = []
    for evaluate_after in (None, DENSE_STEPS - 1):
        engine = place.engine(precision, checkpointing=checkpointing)
        place.train(engine, range(DENSE_STEPS + 1), evaluate_after=evaluate_after)
        ends.append({**engine.masters(), **engine.optimizer_state()[0]})
        finish(engine)
    return same(*ends)


@contextlib.contextmanager
def poisoned(place: Place, factor: float, from_call: int = 0) -> Iterator[None]:
    """The last process's losses are multiplied by `factor` after its first `from_call` micro-batches."""
    plain, calls = optimizer_step.causal_loss_sum, 0

    def poisoned_loss(*arguments: Any, **options: Any) -> Tensor:
        nonlocal calls
        calls += 1
        loss = plain(*arguments, **options)
        last = place.world.process_index == place.world.num_processes - 1
        return loss * factor if last and calls > from_call else loss

    optimizer_step.causal_loss_sum = poisoned_loss
    try:
        yield
    finally:
        optimizer_step.causal_loss_sum = plain


class Traced(torch.autograd.Function):
    """Identity, whose node in the graph holds a `Token`."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, token: Token) -> Tensor:
        ctx.token = token
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class Token:
    """Lives as long as somebody holds it."""


def graphs_alive(place: Place) -> list[int]:
    """How many graphs of earlier micro-batches are there when the forward pass of one begins, and after the last."""
    engine = place.engine()
    plain, tokens, alive = optimizer_step.causal_loss_sum, list[weakref.ref[Token]](), list[int]()

    def traced_loss(*arguments: Any, **options: Any) -> Tensor:
        alive.append(sum(token() is not None for token in tokens))
        token = Token()
        tokens.append(weakref.ref(token))
        return Traced.apply(plain(*arguments, **options), token)  # type: ignore[no-any-return,no-untyped-call]

    batches = place.batches(0)
    optimizer_step.causal_loss_sum = traced_loss
    try:
        optimizer_step.accumulate(engine, batches, place.world.num_processes)
    finally:
        optimizer_step.causal_loss_sum = plain
    alive.append(sum(token() is not None for token in tokens))
    engine.step()
    finish(engine)
    return alive


def falling_scale(place: Place) -> dict[str, Any]:
    """A short float16 run whose loss scale overflows at first, and one that begins with the scale it falls to."""
    far_too_high, num_steps = 28, 4
    exponents, masters, norms = [far_too_high], [], []
    for _ in range(2):
        engine = place.engine("fp16", exponent=exponents[-1])
        engine.set_rates(LEARNING_RATE, GATE_LR, 0.0)
        norms.append(train_step(engine, place.batches(0), place.world.num_processes)[1].grad_norm)
        exponents.append(engine.loss_scale.state()[0])
        place.train(engine, range(1, num_steps))
        masters.append(engine.masters())
        finish(engine)
    return {"exponents": exponents, "same": same(*masters), "masters": masters[0], "norms": norms}


def skipped_step(place: Place) -> dict[str, Any]:
    """Step 4, whose loss is first NaN, then infinite on the last process alone, then as it should be."""
    poisoned_step = 4  # not the last one of an epoch, in which that process has no rows and its loss no gradient
    engine = place.engine()
    place.train(engine, range(poisoned_step))
    before = state_of(engine), copies(engine)
    outcomes = []
    for factor in (float("nan"), float("inf")):
        with poisoned(place, factor, from_call=1):
            outcomes.append(train_step(engine, place.batches(poisoned_step), place.world.num_processes)[1].skipped)
    after = state_of(engine), copies(engine)
    place.train(engine, range(poisoned_step, SHORT))
    with_skips = engine.masters()
    finish(engine)
    engine = place.engine()
    place.train(engine, range(SHORT))
    without_skips = engine.masters()
    finish(engine)
    return {
        "skipped": outcomes,
        "state_unchanged": all(same(before[0][key], after[0][key]) for key in ("masters", "moments")),
        "steps": (before[0]["num_steps"], after[0]["num_steps"]),
        "model_unchanged": same(before[1], after[1]),
        "goes_on_as_if_nothing_happened": same(with_skips, without_skips),
        "moved": not same(before[0]["masters"], with_skips),
    }


def load_and_go_on(place: Place, path: Path) -> dict[str, Any]:
    """A saved state put into a new engine, read back, and trained on for a step."""
    saved = torch.load(path, weights_only=True)
    engine = place.engine(start=saved["masters"])
    engine.load(saved["masters"], saved["moments"], saved["num_steps"])
    read = state_of(engine)
    gates = engine.gates()
    expected = {name.removesuffix(".gate"): t for name, t in saved["masters"].items() if name.endswith(".gate")}
    place.train(engine, range(SHORT, SHORT + 1))
    further = engine.masters()
    finish(engine)
    return {
        "masters": same(read["masters"], saved["masters"]),
        "moments": same(read["moments"], saved["moments"]),
        "num_steps": (read["num_steps"], saved["num_steps"]),
        "gates": same(gates, expected),
        "further": further,
    }


def naive_thresholding(place: Place) -> dict[str, Adapter]:
    """Masters of a run that soft-thresholds the model's gates after the step, outside the optimizer, and of ours."""
    engine = place.engine()

    def threshold(step: int, gate_lr: float) -> None:
        with torch.no_grad():
            for layer in adapters(engine.module).values():
                if step >= DENSE_STEPS:
                    layer.gate.copy_(soft_threshold(layer.gate, gate_lr * SPARSE_LAMBDA))

    place.train(engine, range(NUM_STEPS), sparse_lambda=0.0, after_step=threshold)
    naive = engine.masters()
    finish(engine)
    engine = place.engine()
    place.train(engine, range(NUM_STEPS))
    ours = engine.masters()
    finish(engine)
    return {"naive": naive, "ours": ours}


def flip(tensor: Tensor, index: int) -> None:
    """Flip the lowest bit of one float32 element, in place; a second time restores it."""
    flat = tensor.detach().view(-1)
    flat.view(torch.int32)[index] ^= 1


def flipped_bits(place: Place) -> dict[str, dict[str, Any]]:
    """What check_agreement says when one bit of process 1 is wrong, and that it says nothing before and after."""
    engine = place.engine()
    place.train(engine, range(SHORT))
    on_process_1 = place.world.process_index == 1
    found = {"nothing": verdict(engine)}

    def try_flip(what: str, name: str, tensor: Tensor, index: int) -> None:
        if on_process_1:
            flip(tensor, index)
        found[what] = {"name": name, **verdict(engine)}
        if on_process_1:
            flip(tensor, index)

    parameters = adapter_parameters(engine.module)
    for kind in ("lora_A", "gate"):
        name = [name for name in parameters if name.endswith(kind)][-1]
        try_flip(f"copy of {kind}", name, parameters[name], 3)
        if place.strategy == "ddp":
            for key in ("exp_avg", "exp_avg_sq"):
                try_flip(f"{key} of {kind}", name, engine.optimizer.state[parameters[name]][key], 3)
    if engine.is_zero:
        for group, kind in enumerate(("factors", "gates")):
            name, index = first_in_shard(engine, group)
            try_flip(f"master of {kind}", name, engine._zero.flat()[group], index)
    found["nothing any more"] = verdict(engine)
    finish(engine)
    return found


def first_in_shard(engine: Engine, group: int) -> tuple[str, int]:
    """A parameter that lies wholly in this process's shard of a group, and where it begins there."""
    names = {id(p): name for name, p in adapter_parameters(engine.module).items()}
    start = engine.accelerator.process_index * engine._zero.flat()[group].numel()
    offset = 0
    for p in engine._zero.sharding.bit16_groups[group]:
        if offset >= start:
            return names[id(p)], offset - start
        offset += p.numel()
    raise AssertionError("no parameter starts in this shard")


def verdict(engine: Engine) -> dict[str, Any]:
    """What check_agreement raised on this process, None if nothing."""
    try:
        engine.check_agreement()
    except RunFailed as error:
        return {"error": str(error)}
    return {"error": None}


def gates_after_prepare(place: Place) -> dict[str, bool]:
    """Whether gates of odd values come through `Engine(...)` bit for bit, in the model and in the masters."""
    engine = place.engine()
    generator = torch.Generator().manual_seed(5)
    start = {
        name: torch.randn(p.shape, generator=generator) if name.endswith(".gate") else p
        for name, p in engine.masters().items()
    }
    finish(engine)
    engine = place.engine(start=start)
    gates = {f"{name}.gate": gate for name, gate in engine.gates().items()}
    masters = engine.masters()
    found = {
        "model": same(gates, {name: start[name] for name in gates}),
        "masters": same(masters, start),
    }
    finish(engine)
    return found


# --------------------------------------------------------------------------------------------------- whole runs, twice


@contextlib.contextmanager
def one_process_group(place: Place) -> Iterator[None]:
    """`sora_llm.train.run` several times in one world: all runs share this process group and its accelerator."""
    plain_make, plain_end = group.make_accelerator, group.end
    group.make_accelerator = lambda *arguments, **options: place.accelerator
    group.end = lambda *arguments: None
    try:
        yield
    finally:
        group.make_accelerator, group.end = plain_make, plain_end


def run_overrides(place: Place, folder: str) -> list[str]:
    """Steps of ROWS_PER_STEP rows whatever the number of processes, under this strategy, into `folder`."""
    return [
        f"distributed.strategy={place.strategy}",
        accumulation(place.world.num_processes),
        f"output.output_dir={folder}",
    ]


def never_finite(place: Place, config: str, folder: str) -> dict[str, Any]:
    """A run whose loss turns non-finite in its third step, on the last process alone, and stays so."""
    steps, plain_step = 0, training_loop.train_step

    def counted_step(*arguments: Any, **options: Any) -> Any:
        nonlocal steps
        steps += 1
        with poisoned(place, float("nan") if steps > 2 else 1.0):
            return plain_step(*arguments, **options)

    training_loop.train_step = counted_step
    error = None
    try:
        with one_process_group(place):
            train.run(config, *run_overrides(place, folder), "train.max_skipped_steps=3")
    except RunFailed as failure:
        error = str(failure)
    finally:
        training_loop.train_step = plain_step
    return {"error": error, "steps": steps}


# ------------------------------------------------------------------------------------------------------ the full matrix


def matrix_world(
    strategy: str, models: str, data: str, precisions: Sequence[str], adapter_dtype: str, micro_batches: Sequence[int]
) -> dict[str, Any]:
    """Long runs on base5m in every precision, and with several micro-batch sizes."""
    place = Place.make(strategy, f"{models}/base5m", data, adapter_dtype)
    return {
        f"{precision} {micro_batch}": long_run(place, precision, adapter_dtype=adapter_dtype, micro_batch=micro_batch)
        for precision in precisions
        for micro_batch in micro_batches
    }


def killed_run(config: str, overrides: Sequence[str], at: int) -> None:
    """`sora_llm.train.run`, ended without a word on every process once the checkpoint of step `at` is complete."""
    plain_save = training_loop.save_checkpoint

    def save_and_die(training: train.Training) -> None:
        plain_save(training)
        if training.done == at:
            gather_objects(None)
            os._exit(9)

    training_loop.save_checkpoint = save_and_die
    train.run(config, *overrides)


def whole_run(config: str, overrides: Sequence[str]) -> None:
    """`sora_llm.train.run`."""
    train.run(config, *overrides)


def accumulation(num_processes: int) -> str:
    """The override that makes steps of ROWS_PER_STEP rows."""
    return f"train.gradient_accumulation_steps={ROWS_PER_STEP // MICRO_BATCH // num_processes}"


def export_everywhere(folder: str) -> list[Any]:
    """Every process exports the same adapter into one folder, several times, as a loop does that does not look who it
    is."""
    model = randomise_all(inject_sora(tiny_llama(num_hidden_layers=1), r=2, lora_alpha=4), seed=1)
    return [export_adapter(model, folder)["sha256"] for _ in range(4)]
