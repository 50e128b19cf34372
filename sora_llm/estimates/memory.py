"""Memory of a process, calculated from the model's shapes before any weight is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sora_llm.base_spec import DTYPES, BackboneSpec
from sora_llm.estimates.activations import KNOWN_NORMS, PROJECTIONS, activation_bytes, forward_bytes, sizes_of
from sora_llm.quantised import quantised_linears
from sora_llm.targets import linear_layers, target_linears

LIVE_ELEMENTS = 10**9
"""Number of frozen weights that ZeRO-3 may keep gathered on a process, however many processes there are: DeepSpeed's
default (0.19) for stage3_max_reuse_distance."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per process.  `activation_bytes` is None if it is not known for the architecture."""

    trainable_parameters: int
    frozen_parameters: int
    weight_bytes: int
    adapter_bytes: int
    gradient_bytes: int
    optimizer_bytes: int
    activation_bytes: int | None = None
    gathered_bytes: int = 0
    """For sharded weights that are temporarily gathered, in addition to the process's own part of them."""
    bucket_bytes: int = 0
    """Of the buffer from which ZeRO reduces gradients."""
    round_bytes: int = 0
    """What local updates keep from one round to the next."""

    @property
    def total_bytes(self) -> int:
        """The sum, without the activations if they are not known."""
        fixed = self.weight_bytes + self.gathered_bytes
        fixed += self.adapter_bytes + self.gradient_bytes + self.bucket_bytes + self.optimizer_bytes + self.round_bytes
        return fixed + (self.activation_bytes or 0)


def estimate(
    skeleton: nn.Module,
    spec: BackboneSpec,
    *,
    r: int,
    target_modules: str | Sequence[str],
    adapter_bytes_each: int,
    strategy: str,
    num_processes: int,
    batch: BatchShape,
    live_elements: int,
    bucket_elements: int,
    round_copies: int,
) -> MemoryEstimate:
    """Memory per process of weights, adapters, gradients, optimizer state and the activations of a `batch`, from the
    model's shapes alone.

    `skeleton` is the model on the meta device.  4-bit weights count half a byte each plus their block constants (64
    weights per block; 4 bytes per block, or 1 with double quantisation), 8-bit weights one byte plus 4 per row;
    unquantised parts (embeddings, head, norms) count in spec.dtype.  Adam keeps two float32 moments, and under ZeRO or
    with bf16 adapters a float32 master; ZeRO divides them by the number of processes (gradients from stage 2, weights
    and adapters in stage 3, except the constants of 4-bit weights).  In a step of stage 3, weights in use or soon to be
    used (again) are gathered: at most `live_elements`, counted in storage elements for 4-bit weights, but at least the
    largest tensor.  ZeRO reduces gradients from a buffer of `bucket_elements`.  Local updates keep `round_copies` of
    the adapter between rounds, in float32.
    """
    targets = target_linears(skeleton, target_modules)
    quantised = quantised_linears(skeleton) if spec.is_quantised else {}
    num_quantised = sum(linear.weight.numel() for linear in quantised.values())
    num_frozen = sum(parameter.numel() for parameter in skeleton.parameters())
    if spec.load_in_4bit:
        quantised_bytes = num_quantised // 2
        constant_bytes = num_quantised // 64 * (1 if spec.double_quant else 4)
    else:
        quantised_bytes = num_quantised
        constant_bytes = 4 * sum(linear.out_features for linear in quantised.values())
    tensor_bytes = quantised_bytes + (num_frozen - num_quantised) * DTYPES[spec.dtype].itemsize
    num_trainable = sum(r * (1 + linear.in_features + linear.out_features) for linear in targets.values())
    zero = int(strategy.removeprefix("zero")) if strategy.startswith("zero") else 0
    master_bytes = 4 if zero or adapter_bytes_each < 4 else 0

    def share(size: int, from_stage: int) -> int:
        return -(-size // num_processes) if zero >= from_stage else size

    own_bytes, gathered_bytes = share(tensor_bytes, 3), 0
    if zero == 3:
        storage = DTYPES[spec.quant_storage if spec.load_in_4bit else spec.dtype]
        divisor = 2 if spec.load_in_4bit else 1
        sizes = {id(linear.weight): linear.weight.numel() // divisor for linear in quantised.values()}
        largest = max(sizes.get(id(p), p.numel() * DTYPES[spec.dtype].itemsize) for p in skeleton.parameters())
        gathered_bytes = min(tensor_bytes - own_bytes, max(largest, live_elements * storage.itemsize))
    return MemoryEstimate(
        trainable_parameters=num_trainable,
        frozen_parameters=num_frozen,
        weight_bytes=own_bytes + constant_bytes,
        gathered_bytes=gathered_bytes,
        adapter_bytes=share(num_trainable * adapter_bytes_each, 3),
        gradient_bytes=share(num_trainable * adapter_bytes_each, 2),
        bucket_bytes=bucket_elements * adapter_bytes_each if zero else 0,
        optimizer_bytes=share(num_trainable * (8 + master_bytes), 1),
        round_bytes=round_copies * num_trainable * 4,
        activation_bytes=_activation_bytes(skeleton, spec, r, targets, batch),
    )


@dataclass(frozen=True)
class BatchShape:
    """The input of one forward pass of a process, and how many rows it evaluates at a time, as long, not packed."""

    batch_size: int
    sequence_len: int
    is_packed: bool
    checkpointing: bool
    has_dropout: bool = False
    eval_batch_size: int = 0
    """0 if a run evaluates nothing."""


def _activation_bytes(
    skeleton: Any, spec: BackboneSpec, r: int, targets: Mapping[str, nn.Linear], batch: BatchShape
) -> int | None:
    sizes = sizes_of(skeleton.config.get_text_config())
    linears, norms = linear_layers(skeleton), _layer_norms(skeleton)
    if sizes is None or sizes.caps_scores or norms not in KNOWN_NORMS:
        return None
    if {name.rpartition(".")[2] for name in linears} != PROJECTIONS:
        return None
    largest = max(linear.in_features * linear.out_features for linear in linears.values())
    common: dict[str, Any] = {
        "sequence_len": batch.sequence_len,
        "itemsize": DTYPES[spec.dtype].itemsize,
        "norms": norms,
        "attn_implementation": spec.attn_implementation,
        "dequantised_bytes": largest * DTYPES[spec.compute_dtype].itemsize if spec.is_quantised else 0,
        "whole_logits": sizes.changes_logits,
    }
    training = activation_bytes(
        sizes,
        batch_size=batch.batch_size,
        targets={name.rpartition(".")[2] for name in targets},
        total_rank=r * len(targets) // sizes.num_layers,
        is_packed=batch.is_packed,
        checkpointing=batch.checkpointing,
        keeps_inputs=spec.load_in_8bit,
        has_dropout=batch.has_dropout,
        **common,
    )
    if batch.eval_batch_size == 0:
        return training
    return max(training, forward_bytes(sizes, batch_size=batch.eval_batch_size, **common))


def _layer_norms(skeleton: nn.Module) -> set[str]:
    """The names of the norms in decoder layers: of modules below a numbered one."""
    paths = (name.split(".") for name, _ in skeleton.named_modules())
    return {path[-1] for path in paths if path[-1].endswith("norm") and any(part.isdigit() for part in path)}


def memory_table(memory: MemoryEstimate) -> str:
    """The estimate as indented lines."""
    parts = (
        ("frozen weights", memory.weight_bytes),
        *([("gathered, at most", memory.gathered_bytes)] if memory.gathered_bytes else []),
        ("adapters", memory.adapter_bytes),
        ("gradients", memory.gradient_bytes),
        *([("gradients in flight", memory.bucket_bytes)] if memory.bucket_bytes else []),
        ("optimizer state", memory.optimizer_bytes),
        *([("kept between rounds", memory.round_bytes)] if memory.round_bytes else []),
        *([] if memory.activation_bytes is None else [("activations, at most", memory.activation_bytes)]),
        ("sum, + activations" if memory.activation_bytes is None else "sum", memory.total_bytes),
    )
    lines = [f"  {name:<21} {_readable(size)} per process" for name, size in parts]
    if memory.activation_bytes is None:
        lines.append(
            "  activations           not known: the formula is for decoders with separate q, k, v, o, gate, up and "
            "down projections and with norms as in LLaMA, Qwen3, OLMo 2 or Gemma 3; measure a step with train --dry-run"
        )
    return "\n".join(lines)


def _readable(size: int) -> str:
    return f"{size / 2**30:.2f} GiB" if size >= 2**30 else f"{size / 2**20:.2f} MiB"
