"""The memory of activations is what a forward and backward pass takes at its peak, within 5 % (seen: 4.9)."""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from conftest import shared
from helpers import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPTNeoXConfig,
    GraniteConfig,
    HunYuanDenseV1Config,
    LlamaConfig,
    MixtralConfig,
    Olmo2Config,
    Phi3Config,
    Qwen3Config,
)

from sora_llm import head_loss
from sora_llm.backbone import load_backbone
from sora_llm.base_spec import BackboneSpec
from sora_llm.causal_loss import causal_loss_sum
from sora_llm.estimates.activations import sizes_of
from sora_llm.estimates.memory import BatchShape, estimate, memory_table
from sora_llm.inject import inject_sora

IN_ONE_PROCESS: dict[str, Any] = {
    "adapter_bytes_each": 4,
    "strategy": "none",
    "num_processes": 1,
    "live_elements": 0,
    "bucket_elements": 0,
    "round_copies": 0,
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors that operations make, for as long as they live."""

    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.peak = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        given = {
            tensor.untyped_storage()._cdata for tensor in tree_iter((args, kwargs)) if isinstance(tensor, torch.Tensor)
        }
        for tensor in tree_iter(out):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if storage._cdata in self.known or storage._cdata in given:  # a view, or written in place
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._free, storage._cdata, storage.nbytes())
        return out

    def _free(self, key: int, size: int) -> None:
        self.known.discard(key)
        self.now -= size


def measured(model: Any, batch_size: int, sequence_len: int, is_packed: bool) -> int:
    """The peak of a forward and backward pass, without the adapters' gradients, which are counted apart."""
    ids = torch.randint(model.config.vocab_size, (batch_size, sequence_len), generator=torch.Generator().manual_seed(0))
    positions = (torch.arange(sequence_len) % (sequence_len // 3)).expand_as(ids) if is_packed else None
    with LiveBytes() as live:
        (causal_loss_sum(model, ids, ids, positions) / ids.numel()).backward()
    return live.peak


FORMS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "float32"},
    "bf16": {"dtype": "bfloat16"},
    "fp16": {"dtype": "float16"},
    "nf4": {"dtype": "bfloat16", "load_in_4bit": True},
    "int8": {"dtype": "bfloat16", "load_in_8bit": True},
    "eager": {"dtype": "bfloat16", "attn_implementation": "eager"},
}


@pytest.mark.parametrize(
    ("name", "form", "batch", "targets"),
    [
        *(
            (name, form, (1, length, False, checkpointing), "all-linear")
            for name in ("base5m", "stories260k")
            for form in ("fp32", "bf16")
            for length, checkpointing in ((64, False), (384, False), (384, True))
        ),
        ("base5m", "fp16", (1, 384, False, False), "all-linear"),
        ("base5m", "nf4", (1, 384, False, False), "all-linear"),
        ("stories260k", "nf4", (1, 384, False, True), "all-linear"),
        ("base5m", "int8", (1, 384, False, False), "all-linear"),
        ("base5m", "int8", (1, 384, False, True), "all-linear"),
        ("stories260k", "int8", (1, 384, False, True), "all-linear"),
        ("stories260k", "int8", (1, 384, False, True), ["q_proj"]),
        ("stories260k", "int8", (2, 192, False, False), ["q_proj"]),
        ("base5m", "bf16", (3, 96, True, False), "all-linear"),
        ("base5m", "fp32", (1, 384, True, True), "all-linear"),
        ("base5m", "eager", (2, 192, False, False), "all-linear"),
        ("base5m", "bf16", (2, 192, False, False), ["q_proj", "v_proj"]),
        ("stories260k", "fp32", (2, 192, False, True), ["gate_proj", "down_proj"]),
    ],
)
def test_the_estimate_is_the_measured_peak(name, form, batch, targets):
    spec, shape = BackboneSpec(str(shared(f"models/{name}")), **FORMS[form]), BatchShape(*batch)
    model = load_backbone(spec, "cpu", gradient_checkpointing=shape.checkpointing)
    expected = estimate_of(model, spec, shape, targets)
    inject_sora(model, r=8, target_modules=targets)
    found = measured(model, shape.batch_size, shape.sequence_len, shape.is_packed)
    assert expected == pytest.approx(found, rel=0.05), f"{expected / found - 1:+.1%}"


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("form", ["fp32", "bf16"])
def test_so_it_is_where_the_loss_is_taken_in_parts(
    form: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", 96 * 4096)
    test_the_estimate_is_the_measured_peak("base5m", form, (1, 384, False, checkpointing), "all-linear")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_where_the_vocabulary_is_small_the_layers_decide(dtype, checkpointing):
    model: Any = tiny_llama(hidden_size=64, intermediate_size=256, num_hidden_layers=4, max_position_embeddings=256).to(
        dtype
    )
    spec, shape = BackboneSpec("", dtype=str(dtype).removeprefix("torch.")), BatchShape(1, 256, False, checkpointing)
    expected = estimate_of(model, spec, shape, "all-linear")
    model.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    inject_sora(model, r=8)
    assert expected == pytest.approx(measured(model, 1, 256, False), rel=0.05)


def random_model(kind: Any, dtype: torch.dtype, checkpointing: bool = False, **overrides: Any) -> Any:
    """Four layers of another architecture, frozen."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "vocab_size": 512, "head_dim": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "pad_token_id": 0}
    attention = overrides.pop("attn_implementation", "sdpa")
    config = kind(**(sizes | overrides))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=attention).requires_grad_(False)
    if checkpointing:
        model.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", [Qwen3Config, Olmo2Config, Gemma3TextConfig, GraniteConfig])
def test_norms_of_queries_and_keys_and_of_outputs_are_counted(kind: Any, dtype: str, checkpointing: bool) -> None:
    """Without them the estimate was 7 to 24 % too low in bfloat16; Granite has none, but changes its logits."""
    model, shape = random_model(kind, getattr(torch, dtype), checkpointing), BatchShape(1, 384, False, checkpointing)
    expected = estimate_of(model, BackboneSpec("", dtype=dtype), shape, "all-linear")
    inject_sora(model, r=8)
    found = measured(model, 1, 384, False)
    assert expected == pytest.approx(found, rel=0.05), f"{expected / found - 1:+.1%}"


@pytest.mark.parametrize("is_packed", [False, True])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_masked_input_of_a_recomputed_layer_is_counted(dtype: str, is_packed: bool) -> None:
    """With dropout, which the estimate did not know of, it was 7 to 10 % too low."""
    model = random_model(LlamaConfig, getattr(torch, dtype), checkpointing=True)
    shape = BatchShape(1, 384, is_packed, checkpointing=True, has_dropout=True)
    expected = estimate_of(model, BackboneSpec("", dtype=dtype), shape, "all-linear")
    inject_sora(model, r=8, lora_dropout=0.05)
    model.train()
    found = measured(model, 1, 384, is_packed)
    assert expected == pytest.approx(found, rel=0.05), f"{expected / found - 1:+.1%}"


@pytest.mark.parametrize("overrides", [{}, {"num_attention_heads": 8, "num_key_value_heads": 8}])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("kind", [LlamaConfig, Qwen3Config, Olmo2Config, Gemma3TextConfig, GraniteConfig])
def test_evaluation_takes_no_more_than_the_estimate(
    kind: Any, dtype: str, attention: str, overrides: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight rows at a time took four times what was estimated for training on one; within 15 % if it decides."""
    monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", 32 * 512)
    model = random_model(kind, getattr(torch, dtype), attn_implementation=attention, **overrides)
    spec, batch = BackboneSpec("", dtype=dtype, attn_implementation=attention), BatchShape(1, 96, False, True)
    expected = estimate_of(model, spec, replace(batch, eval_batch_size=8), "all-linear")
    assert expected > estimate_of(model, spec, batch, "all-linear")
    inject_sora(model, r=8)
    ids = torch.randint(512, (8, 96), generator=torch.Generator().manual_seed(0))
    with LiveBytes() as live, torch.no_grad():
        causal_loss_sum(model, ids, ids)
    assert 0.95 < expected / live.peak < 1.15, f"{expected / live.peak - 1:+.1%}"


def test_a_short_row_needs_the_dequantised_weight_above_all(tmp_path):
    sizes = {"hidden_size": 128, "intermediate_size": 512, "max_position_embeddings": 256}
    tiny_llama(**sizes).save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    spec = BackboneSpec(str(tmp_path), dtype="float32", load_in_4bit=True, compute_dtype="float32")
    model, shape = load_backbone(spec, "cpu"), BatchShape(1, 12, False, False)
    expected = estimate_of(model, spec, shape, "all-linear")
    inject_sora(model, r=8)
    assert expected == pytest.approx(measured(model, 1, 12, False), rel=0.05)


def estimate_of(model: Any, spec: BackboneSpec, shape: BatchShape, targets: Any) -> int:
    options: dict[str, Any] = {"r": 8, "target_modules": targets, **IN_ONE_PROCESS}
    found = estimate(model, spec, batch=shape, **options).activation_bytes
    assert found is not None
    return found


def test_other_architectures_are_not_guessed_at():
    assert sizes_of(LlamaConfig()) is not None
    assert sizes_of(MixtralConfig()) is None and sizes_of(GPTNeoXConfig()) is None


@pytest.mark.parametrize(
    ("kind", "is_known"),
    [
        (LlamaConfig, True),
        (Qwen3Config, True),
        (Phi3Config, False),
        (Gemma2Config, False),
        (HunYuanDenseV1Config, False),
    ],
)
def test_what_the_formula_does_not_cover_gets_a_sentence_and_no_number(kind: Any, is_known: bool) -> None:
    """Fused projections, capped attention scores, and norms of other names."""
    options = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = kind(**options, num_key_value_heads=2, head_dim=16, vocab_size=128, pad_token_id=0)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    options = {"r": 4, "target_modules": "all-linear", **IN_ONE_PROCESS}
    memory = estimate(model, BackboneSpec("x"), batch=BatchShape(1, 64, False, False), **options)
    assert (memory.activation_bytes is not None) == is_known == ("not known" not in memory_table(memory))
