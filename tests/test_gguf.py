"""llama.cpp's adapter file says what the factors say: names, order of rows, scale, numbers; or it is not published."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from helpers import relative_error
from transformers import GemmaConfig, LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config

from sora_llm.artifacts import gguf_export
from sora_llm.artifacts.card import Provenance
from sora_llm.artifacts.gguf_export import export_gguf
from sora_llm.artifacts.gguf_lora import OUTTYPES, architecture_of, permute_rope_rows, read_gguf, unpermute_rope_rows
from sora_llm.errors import RunFailed, UserError

HIDDEN, HEADS, KV_HEADS, HEAD_DIM, LAYERS = 24, 4, 2, 8, 2  # heads of another size than hidden / heads
SHAPES = {
    "self_attn.q_proj": (HIDDEN, HEADS * HEAD_DIM),
    "self_attn.k_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
    "self_attn.v_proj": (HIDDEN, KV_HEADS * HEAD_DIM),
    "self_attn.o_proj": (HEADS * HEAD_DIM, HIDDEN),
    "mlp.gate_proj": (HIDDEN, 40),
    "mlp.up_proj": (HIDDEN, 40),
    "mlp.down_proj": (40, HIDDEN),
}
LLAMA_CPP_NAMES = ["attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down"]


def config_of(kind: Any = LlamaConfig, architecture: str = "LlamaForCausalLM", **options: Any) -> Any:
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "num_attention_heads": HEADS}
    sizes |= {"num_key_value_heads": KV_HEADS, "intermediate_size": 40, "head_dim": HEAD_DIM}
    return kind(architectures=[architecture], **{**sizes, **options})


def random_adapter(seed: int = 0) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Every target of every layer, ranks 0 to 4."""
    generator = torch.Generator().manual_seed(seed)
    names = [f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in SHAPES]
    factors = {}
    for index, name in enumerate(names):
        num_in, num_out = SHAPES[name.split(".", 3)[3]]
        rank = index % 5
        factors[name] = (
            torch.randn(rank, num_in, generator=generator),
            torch.randn(num_out, rank, generator=generator),
        )
    return factors


def export(factors: Any, folder: Path, config: Any = None, outtype: str = "f32") -> dict[str, Any]:
    return export_gguf(factors, config or config_of(), folder, outtype=outtype, provenance=Provenance("some/base"))


def test_the_card_names_the_template_that_lies_there_and_no_other(tmp_path: Path) -> None:
    for template in (None, "{{ messages }}"):
        provenance = Provenance("some/base", chat_template=template)
        export_gguf(random_adapter(), config_of(), tmp_path / "out", provenance=provenance)
        names = {path.name for path in (tmp_path / "out").iterdir()} - {"chat_template.jinja"}
        assert names == {"adapter.gguf", "README.md", "certificate.json"}
        card = (tmp_path / "out" / "README.md").read_text()
        assert ("chat_template.jinja" in card) == (tmp_path / "out" / "chat_template.jinja").is_file() == bool(template)
        assert "tokenizer" not in card


# ----- order of rows --------------------------------------------------------------------------------------------------


def test_rows_of_a_head_are_its_two_halves_in_turn() -> None:
    rows = torch.arange(2 * 6)
    assert permute_rope_rows(rows, 2).tolist() == [0, 3, 1, 4, 2, 5, 6, 9, 7, 10, 8, 11]
    assert torch.equal(unpermute_rope_rows(permute_rope_rows(rows, 2), 2), rows)


def test_attention_of_llama_cpp_on_reordered_rows_is_that_of_transformers() -> None:
    """One rotates entry i of a head with entry i + d/2, the other permute_rope_rows: scores q·k must be the same."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(HEADS * HEAD_DIM, generator=generator, dtype=torch.float64) for _ in range(2))
    angles = 7 / 10000 ** (torch.arange(0, HEAD_DIM, 2).double() / HEAD_DIM)  # at position 7; k stays at 0

    def rotated(first: torch.Tensor, second: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()

    q_heads, k_heads = q.view(HEADS, HEAD_DIM), k.view(HEADS, HEAD_DIM)
    of_transformers = torch.cat(rotated(*q_heads.chunk(2, dim=1)), dim=1)
    q_there, k_there = (permute_rope_rows(rows, HEADS).view(HEADS, HEAD_DIM) for rows in (q, k))
    of_llama_cpp = torch.stack(rotated(q_there[:, ::2], q_there[:, 1::2]), dim=2).flatten(1)
    torch.testing.assert_close((of_llama_cpp * k_there).sum(1), (of_transformers * k_heads).sum(1))


def test_which_architectures_reorder_which_heads() -> None:
    assert dict(architecture_of(config_of()).reordered_heads) == {"q_proj": HEADS, "k_proj": KV_HEADS}
    mistral = architecture_of(config_of(MistralConfig, "MistralForCausalLM"))
    assert (mistral.name, mistral.heads_of("model.layers.0.self_attn.k_proj")) == ("llama", KV_HEADS)
    assert mistral.heads_of("model.layers.0.self_attn.v_proj") is None
    for kind, name, there in ((Qwen2Config, "Qwen2ForCausalLM", "qwen2"), (GemmaConfig, "GemmaForCausalLM", "gemma")):
        found = architecture_of(config_of(kind, name))
        assert (found.name, dict(found.reordered_heads)) == (there, {})


# ----- the file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outtype", OUTTYPES)
def test_the_file_has_what_llama_cpp_looks_for(tmp_path: Path, outtype: str) -> None:
    """Read by gguf's reader alone; numbers to the rounding of their type."""
    factors = random_adapter()
    export(factors, tmp_path / "out", outtype=outtype)
    reader = gguf.GGUFReader(tmp_path / "out" / "adapter.gguf")
    keys = {name: field.contents() for name, field in reader.fields.items()}
    assert keys["general.type"] == "adapter" and keys["adapter.type"] == "lora"
    assert keys["general.architecture"] == "llama" and keys["adapter.lora.alpha"] == 0.0
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    there = [f"blk.{layer}.{name}.weight" for layer in range(LAYERS) for name in LLAMA_CPP_NAMES]
    live = {name: pair for name, pair in zip(there, factors.values(), strict=True) if len(pair[0])}
    assert tensors.keys() == {f"{name}.lora_{kind}" for name in live for kind in "ab"}
    for name, (A, B) in live.items():
        a, b = tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"]
        assert a.shape.tolist() == [A.shape[1], A.shape[0]] and b.shape.tolist() == [B.shape[1], B.shape[0]]
        assert a.tensor_type == b.tensor_type == OUTTYPES[outtype]
        heads = {"attn_q": HEADS, "attn_k": KV_HEADS}.get(name.split(".")[2], 0)
        order = [h * HEAD_DIM + i + j for h in range(heads) for i in range(HEAD_DIM // 2) for j in (0, HEAD_DIM // 2)]
        for found, expected in ((a, A), (b, B[order] if order else B)):
            values = torch.from_numpy(np.array(gguf.quants.dequantize(found.data, found.tensor_type)))
            step = {"f32": 0.0, "f16": 2.0**-11, "bf16": 2.0**-8}[outtype]
            assert bool(((values - expected).abs() <= step * expected.abs()).all()), name


def test_the_certificate_names_every_module_and_the_error_of_its_numbers(tmp_path: Path) -> None:
    factors = random_adapter()
    f32, bf16 = (export(factors, tmp_path / outtype, outtype=outtype) for outtype in ("f32", "bf16"))
    assert json.loads((tmp_path / "f32" / "certificate.json").read_text()) == f32
    assert {name: module["rank"] for name, module in f32["modules"].items()} == {
        n: len(A) for n, (A, _) in factors.items()
    }
    errors = [[module["delta_error"] for module in found["modules"].values()] for found in (f32, bf16)]
    assert max(errors[0]) < 1e-14 and 1e-4 < max(errors[1]) < 2.0**-7
    assert f32["consumers"] == {"llama.cpp": "exact", "Ollama": "exact"}
    card = (tmp_path / "f32" / "README.md").read_text()
    assert "llama-server -m base.gguf --lora adapter.gguf" in card and "ADAPTER ./adapter.gguf" in card


def test_qwen2_keeps_its_rows(tmp_path: Path) -> None:
    factors = random_adapter()
    export(factors, tmp_path / "out", config_of(Qwen2Config, "Qwen2ForCausalLM"))
    _, B = factors["model.layers.1.self_attn.k_proj"]
    assert torch.equal(read_gguf(tmp_path / "out" / "adapter.gguf").tensors["blk.1.attn_k.weight.lora_b"], B)


# ----- what is not right is not published -----------------------------------------------------------------------------


def flipped(values: np.ndarray) -> np.ndarray:
    return values[::-1].copy()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda values: values * np.float32(1.001), r"ΔW of .* is off by"),
        (flipped, r"ΔW of .* is off by"),
        (np.zeros_like, r"ΔW of .* is off by"),
        (lambda values: values[:, :-1].copy(), "has a different shape"),
    ],
    ids=["scaled", "reordered", "zeroed", "cut"],
)
def test_a_file_that_says_something_else_is_never_published(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Any, said: str
) -> None:
    real = gguf.GGUFWriter.add_tensor

    def damaged(writer: Any, name: str, values: np.ndarray, **options: Any) -> None:
        real(writer, name, damage(values) if name == "blk.1.ffn_up.weight.lora_b" else values, **options)

    monkeypatch.setattr(gguf.GGUFWriter, "add_tensor", damaged)
    with pytest.raises(RunFailed, match=rf"(?s)is not the trained one.*{said}"):
        export(random_adapter(), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_scale_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        gguf.GGUFWriter, "add_float32", lambda w, key, _: w.add_key_value(key, 4.0, gguf.GGUFValueType.FLOAT32)
    )
    with pytest.raises(RunFailed, match="is off by"):
        export(random_adapter(), tmp_path / "out")


def test_numbers_that_f16_cannot_hold_are_refused(tmp_path: Path) -> None:
    factors = random_adapter()
    name = "model.layers.0.mlp.gate_proj"
    A, B = factors[name]
    factors[name] = (A * 1e-7, B)
    with pytest.raises(RunFailed, match=r"ΔW of model.layers.0.mlp.gate_proj is off .*; f32 loses nothing"):
        export(factors, tmp_path / "out", outtype="f16")
    assert export(factors, tmp_path / "out", outtype="bf16")["passed"]


def test_what_llama_cpp_does_not_have_is_a_sentence_and_writes_nothing(tmp_path: Path) -> None:
    factors = random_adapter()
    with pytest.raises(UserError, match=r"not for MixtralForCausalLM; use padded"):
        export(factors, tmp_path / "out", config_of(MixtralConfig, "MixtralForCausalLM"))
    with pytest.raises(UserError, match=r"no tensor for model.layers.0.adapter.dense"):
        export({**factors, "model.layers.0.adapter.dense": factors["model.layers.0.mlp.up_proj"]}, tmp_path / "out")
    with pytest.raises(UserError, match="no rank of the adapter is left"):
        export({name: (A[:0], B[:, :0]) for name, (A, B) in factors.items()}, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    (tmp_path / "text.gguf").write_text("not one")
    with pytest.raises(UserError, match="is no GGUF file"):
        read_gguf(tmp_path / "text.gguf")


def test_a_config_that_names_no_class_is_its_kind_s() -> None:
    for kind, name in ((LlamaConfig, "LlamaForCausalLM"), (Qwen2Config, "Qwen2ForCausalLM")):
        config = config_of(kind, name)
        expected, config.architectures = architecture_of(config), None
        assert architecture_of(config) == expected
    with pytest.raises(UserError, match=r"not for MixtralForCausalLM"):
        architecture_of(MixtralConfig())


def test_a_full_disk_keeps_the_older_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(random_adapter(), tmp_path / "out")
    before = (tmp_path / "out" / "adapter.gguf").read_bytes()

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(gguf_export, "write_gguf", full)
    with pytest.raises(RunFailed, match="No space left"):
        export(random_adapter(1), tmp_path / "out")
    assert (tmp_path / "out" / "adapter.gguf").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_was_read_back_is_the_adapter(tmp_path: Path) -> None:
    from sora_llm.artifacts.gguf_lora import factors_in

    factors = random_adapter()
    export(factors, tmp_path / "out")
    found = factors_in(read_gguf(tmp_path / "out" / "adapter.gguf"), architecture_of(config_of()), list(factors))
    for name, (A, B) in factors.items():
        if len(A):
            assert relative_error(found[name][1] @ found[name][0], B @ A) < 1e-6
        else:
            assert name not in found
