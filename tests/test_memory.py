"""The memory of a process as calculated is what its tensors weigh, and is divided by what ZeRO shards."""

from __future__ import annotations

import pytest
import torch
from conftest import shared
from transformers import LlamaConfig, LlamaForCausalLM

from sora_llm.backbone import load_backbone, load_model_config, skeleton
from sora_llm.base_spec import BackboneSpec
from sora_llm.estimates.memory import LIVE_ELEMENTS, BatchShape, estimate, memory_table
from sora_llm.inject import adapter_parameters, inject_sora
from sora_llm.targets import linear_layers
from sora_llm.topology import REDUCE_BUCKET_ELEMENTS

OF_A_STEP = {
    "batch": BatchShape(1, 8, False, False),
    "live_elements": LIVE_ELEMENTS,
    "bucket_elements": REDUCE_BUCKET_ELEMENTS,
    "round_copies": 0,
}


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"load_in_4bit": True}, 0.02),  # bitsandbytes keeps a code book of 16 floats and an offset per weight as well
        ({"load_in_4bit": True, "double_quant": False}, 0.02),
        ({"load_in_8bit": True}, 0.02),
        ({}, 0.0),
        ({"dtype": "float32"}, 0.0),
    ],
)
def test_the_estimate_is_what_the_tensors_weigh(options, tolerance):
    spec = BackboneSpec(str(shared("models/base5m")), **options)
    memory = estimate(
        skeleton(load_model_config(spec), spec),
        spec,
        r=8,
        target_modules="all-linear",
        adapter_bytes_each=4,
        strategy="none",
        num_processes=1,
        **OF_A_STEP,
    )
    model = load_backbone(spec, "cpu")
    assert memory.weight_bytes == pytest.approx(_weight_bytes(model), rel=tolerance)
    inject_sora(model, r=8)
    adapters = list(adapter_parameters(model).values())
    assert memory.trainable_parameters == sum(p.numel() for p in adapters)
    assert memory.adapter_bytes == memory.gradient_bytes == sum(p.nbytes for p in adapters)
    assert memory.optimizer_bytes == 2 * memory.adapter_bytes  # two float32 moments


def _weight_bytes(model: torch.nn.Module) -> int:
    total = 0
    for parameter in model.parameters():
        total += parameter.nbytes
        state = getattr(parameter, "quant_state", None)
        while state is not None:
            total += state.absmax.nbytes
            state = getattr(state, "state2", None)
        scales = getattr(parameter, "SCB", None)
        total += 0 if scales is None else scales.nbytes
    return total


def test_zero_divides_what_it_shards():
    spec = BackboneSpec(str(shared("models/base5m")), load_in_4bit=True)
    bones = skeleton(load_model_config(spec), spec)

    def of(strategy: str):
        options = {"r": 8, "target_modules": ["q_proj"], "adapter_bytes_each": 4, **OF_A_STEP}
        return estimate(bones, spec, strategy=strategy, num_processes=2, **options)

    alone, ddp, zero1, zero2, zero3 = (of(strategy) for strategy in ("none", "ddp", "zero1", "zero2", "zero3"))
    assert ddp == alone
    assert zero1.optimizer_bytes == alone.trainable_parameters * 12 // 2  # with the float32 master
    assert zero1.bucket_bytes == zero3.bucket_bytes == 4 * REDUCE_BUCKET_ELEMENTS and ddp.bucket_bytes == 0
    assert zero1.gradient_bytes == alone.gradient_bytes and zero2.gradient_bytes == alone.gradient_bytes // 2
    constants = sum(linear.weight.numel() // 64 for linear in linear_layers(bones).values())  # which ZeRO does not know
    assert zero2.weight_bytes == alone.weight_bytes
    assert zero3.weight_bytes == constants + -(-(alone.weight_bytes - constants) // 2)
    assert zero3.gathered_bytes == alone.weight_bytes - zero3.weight_bytes, "a small model may be whole in a step"
    assert zero3.total_bytes - zero3.gathered_bytes < zero2.total_bytes


def test_zero3_leaves_so_many_weights_whole_and_not_more():
    """DeepSpeed's 10⁹ elements, of two bytes where 4-bit weights are stored as bfloat16."""
    with torch.device("meta"):
        bones = LlamaForCausalLM(LlamaConfig(hidden_size=5120, intermediate_size=13824, num_hidden_layers=40))
    spec = BackboneSpec("x", load_in_4bit=True, quant_storage="bfloat16")
    options = {"r": 8, "target_modules": "all-linear", "adapter_bytes_each": 4, "strategy": "zero3", **OF_A_STEP}
    two, eight = (estimate(bones, spec, num_processes=number, **options) for number in (2, 8))
    assert two.gathered_bytes == eight.gathered_bytes == 2 * 10**9
    assert eight.weight_bytes < two.weight_bytes / 3
    assert "gathered, at most     1.86 GiB per process" in memory_table(two)
    embeddings = bones.get_input_embeddings().weight.numel() * 2
    for live, expected in ((3 * 10**8, 6 * 10**8), (0, embeddings)):
        found = estimate(bones, spec, num_processes=2, **{**options, "live_elements": live})
        assert found.gathered_bytes == expected, live
