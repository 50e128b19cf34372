"""Sections of the config as the plain arguments that the modules below take."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from sora_llm.base_spec import DTYPES, BackboneSpec, resolve_quant_storage
from sora_llm.config import Config, Dataset, Distributed
from sora_llm.data.sources import DatasetSpec
from sora_llm.estimates.activations import sizes_of
from sora_llm.estimates.memory import LIVE_ELEMENTS, BatchShape, MemoryEstimate, estimate
from sora_llm.estimates.step_time import Work
from sora_llm.inject import layer_shapes
from sora_llm.targets import ALL_LINEAR, linear_layers, target_linears
from sora_llm.topology import read_deepspeed_config, reduce_bucket_elements


def dataset_spec(dataset: Dataset) -> DatasetSpec:
    """One entry of data.datasets as the plain description that the loader takes."""
    return DatasetSpec(
        path=dataset.path,
        type=dataset.type,
        split=dataset.split,
        name=dataset.name,
        revision=dataset.revision,
        columns=dataset.columns,
        separator=dataset.separator,
        function=dataset.function,
        weight=dataset.weight,
        streaming=dataset.streaming,
    )


def backbone_spec(config: Config, strategy: str) -> BackboneSpec:
    """The sections model and quantization as the plain description of the backbone."""
    model, quantization = config.model, config.quantization
    return BackboneSpec(
        name_or_path=model.name_or_path,
        revision=model.revision,
        dtype=model.dtype,
        attn_implementation=model.attn_implementation,
        trust_remote_code=model.trust_remote_code,
        load_in_4bit=quantization.load_in_4bit,
        load_in_8bit=quantization.load_in_8bit,
        quant_type=quantization.bnb_4bit_quant_type,
        double_quant=quantization.bnb_4bit_use_double_quant,
        compute_dtype=quantization.bnb_4bit_compute_dtype,
        quant_storage=resolve_quant_storage(
            quantization.bnb_4bit_quant_storage, quantization.bnb_4bit_compute_dtype, strategy
        ),
    )


def adapter_dtype(config: Config) -> str:
    """sora.dtype with `auto` resolved: float32 adapters, cast inside the forward."""
    return "float32" if config.sora.dtype == "auto" else config.sora.dtype


def target_modules(config: Config) -> str | list[str]:
    """sora.target_modules as inject_sora takes it: "all-linear", or a list of suffixes."""
    targets = config.sora.target_modules
    if isinstance(targets, str):
        return targets if targets == ALL_LINEAR else [targets]
    return list(targets)


def target_shapes(config: Config, skeleton: nn.Module) -> dict[str, tuple[int, int]]:
    """{target module: (I, O)}."""
    return layer_shapes(target_linears(skeleton, target_modules(config)))


def estimate_memory(
    config: Config, spec: BackboneSpec, skeleton: nn.Module, strategy: str, num_processes: int
) -> MemoryEstimate:
    """Memory per process."""
    file = config.distributed.deepspeed_config
    deepspeed = {} if file is None else read_deepspeed_config(file)
    return estimate(
        skeleton,
        spec,
        r=config.sora.r,
        target_modules=target_modules(config),
        adapter_bytes_each=DTYPES[adapter_dtype(config)].itemsize,
        strategy=strategy,
        num_processes=num_processes,
        batch=BatchShape(
            config.train.per_device_train_batch_size,
            config.data.sequence_len,
            config.data.sample_packing,
            config.train.gradient_checkpointing,
            config.sora.lora_dropout > 0,
            config.evaluation.per_device_eval_batch_size if config.data.has_dev_rows else 0,
        ),
        live_elements=_live_elements(deepspeed),
        bucket_elements=reduce_bucket_elements(deepspeed),
        round_copies=_round_copies(config.distributed),
    )


def _round_copies(settings: Distributed) -> int:
    """How many copies of the adapter local updates keep from round to round: what was agreed on, and its momentum."""
    return 0 if settings.sync_every == 1 else 1 + (settings.outer_momentum > 0)


def _live_elements(deepspeed: Mapping[str, Any]) -> int:
    """How many elements of frozen weights ZeRO-3 keeps gathered from one use to the next, by the run's DeepSpeed
    config; stage3_max_live_parameters bounds its prefetching, not these."""
    section = deepspeed.get("zero_optimization")
    limit = section.get("stage3_max_reuse_distance") if isinstance(section, dict) else None
    return int(limit) if isinstance(limit, int | float) else LIVE_ELEMENTS


def step_work(config: Config, spec: BackboneSpec, skeleton: nn.Module) -> Work | None:
    """The work of one process in a full step before anything is cut, with all sequences of `data.sequence_len` tokens.

    None for a model whose sizes `activations.sizes_of` does not know: with experts, a token does not pass every linear.
    """
    if sizes_of(skeleton.config.get_text_config()) is None:  # type: ignore[union-attr, operator]
        return None
    train, whole = config.train, estimate_memory(config, spec, skeleton, "none", 1)
    head = skeleton.get_output_embeddings()  # type: ignore[operator]
    per_micro_batch = train.per_device_train_batch_size * config.data.sequence_len
    return Work(
        tokens=per_micro_batch * train.gradient_accumulation_steps,
        linear_parameters=sum(layer.in_features * layer.out_features for layer in linear_layers(skeleton).values()),
        head_parameters=0 if head is None else head.weight.numel(),
        adapter_parameters=whole.trainable_parameters,
        num_layers=skeleton.config.get_text_config().num_hidden_layers,  # type: ignore[union-attr, operator]
        frozen_bytes=whole.weight_bytes,
        adapter_itemsize=DTYPES[adapter_dtype(config)].itemsize,
        checkpointing=train.gradient_checkpointing,
        micro_batches=train.gradient_accumulation_steps,
        sync_every=config.distributed.sync_every,
        is_machine_a_replica=config.distributed.replica == "node",
    )
