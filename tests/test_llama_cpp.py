"""llama.cpp itself, on the file that we write: its logits of base and adapter are ours (CONTRIBUTING.md: clients)."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise_all, relative_error, tiny_llama
from llama_base import write_base

from sora_llm.artifacts.card import Provenance
from sora_llm.artifacts.gguf_export import export_gguf
from sora_llm.backbone import load_backbone
from sora_llm.base_spec import BackboneSpec
from sora_llm.export import folded_factors
from sora_llm.inject import inject_sora, without_adapters

pytestmark = pytest.mark.clients
IDS = torch.randint(48, (1, 24), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def llama_cpp() -> Any:
    return pytest.importorskip("llama_cpp", reason="pip install llama-cpp-python (CONTRIBUTING.md)")


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits[0].float()


@contextmanager
def loaded(library: Any, base: Path) -> Iterator[tuple[Any, Any]]:
    """llama.cpp's model and context of a base file, in float32."""
    options = library.llama_model_default_params()
    options.n_gpu_layers = 0
    model = library.llama_model_load_from_file(str(base).encode(), options)
    assert model, "the base file was refused"
    settings = library.llama_context_default_params()
    settings.n_ctx = settings.n_batch = settings.n_ubatch = 64
    settings.n_threads = settings.n_threads_batch = 1
    settings.type_k = settings.type_v = 0  # float32
    settings.flash_attn_type = library.LLAMA_FLASH_ATTN_TYPE_DISABLED
    context = library.llama_init_from_model(model, settings)
    assert context
    try:
        yield model, context
    finally:
        library.llama_free(context)
        library.llama_model_free(model)


def logits_there(library: Any, base: Path, adapter: Path | None) -> torch.Tensor:
    """Of IDS (T, V)."""
    with loaded(library, base) as (model, context):
        if adapter is not None:
            lora = library.llama_adapter_lora_init(model, str(adapter).encode())
            assert lora, "the adapter file was refused"
            adapters = (library.llama_adapter_lora_p_ctypes * 1)(lora)
            assert library.llama_set_adapters_lora(context, adapters, 1, (ctypes.c_float * 1)(1.0)) == 0
        num_tokens, size = IDS.shape[1], library.llama_vocab_n_tokens(library.llama_model_get_vocab(model))
        batch = library.llama_batch_init(num_tokens, 0, 1)
        batch.n_tokens = num_tokens
        for position, token in enumerate(IDS[0].tolist()):
            batch.token[position], batch.pos[position] = token, position
            batch.n_seq_id[position], batch.seq_id[position][0], batch.logits[position] = 1, 0, 1
        assert library.llama_decode(context, batch) == 0
        found = library.llama_get_logits(context)
        values = torch.tensor([found[index] for index in range(num_tokens * size)]).view(num_tokens, size)
        library.llama_batch_free(batch)
        return values


def small_models(stories: Path) -> dict[str, Any]:
    """Grouped heads; tied and untied embeddings; a head size of its own."""
    return {
        "stories260k": load_backbone(BackboneSpec(str(stories), dtype="float32"), "cpu"),
        "untied": tiny_llama(head_dim=16, rope_parameters={"rope_type": "default", "rope_theta": 500.0}),
    }


@pytest.mark.parametrize("name", ["stories260k", "untied"])
@pytest.mark.parametrize(("outtype", "tolerance"), [("f32", 1e-5), ("f16", 2e-3), ("bf16", 2e-2)])
def test_llama_cpp_has_our_logits(
    stories: Path, tmp_path: Path, llama_cpp: Any, name: str, outtype: str, tolerance: float
) -> None:
    """Ragged ranks, one module pruned; float32 sums in another order, or factors rounded to 2⁻¹¹ and 2⁻⁸."""
    model = randomise_all(inject_sora(small_models(stories)[name], 6, 9.0), size=0.1)
    with without_adapters(model):
        base_file = write_base(model, tmp_path / "base.gguf")
        base = logits(model)
    trained, factors = logits(model), folded_factors(model)
    assert len({len(A) for A, _ in factors.values()}) > 3 and not all(len(A) for A, _ in factors.values())
    model.config.architectures = ["LlamaForCausalLM"]
    export_gguf(factors, model.config, tmp_path / "out", outtype=outtype, provenance=Provenance())
    assert relative_error(logits_there(llama_cpp, base_file, None), base) < 1e-5, "the base files are the same model"
    assert relative_error(base, trained) > 0.05, "the adapter must matter"
    assert relative_error(logits_there(llama_cpp, base_file, tmp_path / "out" / "adapter.gguf"), trained) < tolerance
