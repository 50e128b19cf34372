"""A LoRA as llama.cpp's adapter file: its architectures, names and row order; writing it and reading it back.

llama.cpp adds  scale · B (A x)  to W x, with scale = alpha / (rank of the tensor), and 1 if `adapter.lora.alpha` is 0;
so factors of scale 1 keep a rank of their own in every module.  A module without tensors is not adapted.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor

from sora_llm.errors import RunFailed, UserError
from sora_llm.factors import PlainFactors, product_distance, product_norm

# transformers' class → llama.cpp's architecture, and whether its base converter reorders the rows of q_proj and k_proj.
ARCHITECTURES = {
    "LlamaForCausalLM": ("llama", True),
    "MistralForCausalLM": ("llama", True),
    "Qwen2ForCausalLM": ("qwen2", False),
    "Qwen3ForCausalLM": ("qwen3", False),
    "GemmaForCausalLM": ("gemma", False),
    "Gemma2ForCausalLM": ("gemma2", False),
}
OUTTYPES = {
    "f32": gguf.GGMLQuantizationType.F32,
    "f16": gguf.GGMLQuantizationType.F16,
    "bf16": gguf.GGMLQuantizationType.BF16,
}
ROUNDOFF = {"f32": 2.0**-24, "f16": 2.0**-11, "bf16": 2.0**-8}  # relative, of one number
ALPHA_KEY, TYPE_KEY = gguf.Keys.Adapter.LORA_ALPHA, gguf.Keys.Adapter.TYPE
KINDS = ("lora_a", "lora_b")


@dataclass(frozen=True)
class Architecture:
    """A model in llama.cpp's terms: its name there, its layers, and the heads of the projections whose rows it reorders
    ({} if none)."""

    name: str
    num_layers: int
    reordered_heads: Mapping[str, int]

    def heads_of(self, module: str) -> int | None:
        """The number of heads by which the rows of a module's B are reordered; None if they are not."""
        return self.reordered_heads.get(module.rpartition(".")[2])

    def tensor_names(self, modules: Collection[str]) -> dict[str, str]:
        """{module: llama.cpp's name of its weight}.

        Raises:
            UserError: a module that this architecture does not have there.
        """
        known = gguf.get_tensor_name_map(_arch(self.name), self.num_layers)
        names = {module: known.get_name(f"{module}.weight", try_suffixes=(".weight",)) for module in modules}
        unknown = next((module for module, name in names.items() if name is None), None)
        if unknown is not None:
            raise UserError(
                f"llama.cpp has no tensor for {unknown} in its architecture {self.name!r}; use another layout"
            )
        return {module: name for module, name in names.items() if name is not None}

    def check_modules(self, modules: Collection[str]) -> None:
        """UserError for a module that this architecture does not have there."""
        self.tensor_names(modules)


def architecture_of(config: Any) -> Architecture:
    """The llama.cpp architecture of a base, from its transformers config.

    Raises:
        UserError: an architecture whose names or row order in llama.cpp are not known here.
    """
    # A config need not name its class; LlamaConfig is LlamaForCausalLM's.
    classes = getattr(config, "architectures", None) or [type(config).__name__.replace("Config", "ForCausalLM")]
    if classes[0] not in ARCHITECTURES:
        raise UserError(
            f"layout gguf knows llama.cpp's names and order of rows for {', '.join(ARCHITECTURES)}, not for "
            f"{classes[0]}; use padded and llama.cpp's own convert_lora_to_gguf.py, or merged"
        )
    name, is_reordered = ARCHITECTURES[classes[0]]
    heads = {}
    if is_reordered:
        num_heads = int(config.num_attention_heads)
        heads = {"q_proj": num_heads, "k_proj": int(getattr(config, "num_key_value_heads", None) or num_heads)}
    return Architecture(name, int(config.num_hidden_layers), heads)


def permute_rope_rows(rows: Tensor, num_heads: int) -> Tensor:
    """Rows (O, …) of q_proj or k_proj in llama.cpp's order.

    transformers rotates row i of a head with row i + d/2, llama.cpp with the next one: its rows are 0, d/2, 1, …
    """
    pairs = rows.reshape(num_heads, 2, rows.shape[0] // num_heads // 2, *rows.shape[1:])
    return pairs.transpose(1, 2).reshape(rows.shape)


def unpermute_rope_rows(rows: Tensor, num_heads: int) -> Tensor:
    """The inverse of `permute_rope_rows`: rows (O, …) in the order of transformers."""
    order = permute_rope_rows(torch.arange(rows.shape[0]), num_heads)
    restored = torch.empty_like(rows)
    restored[order] = rows
    return restored


def write_gguf(path: Path, factors: PlainFactors, architecture: Architecture, outtype: str, name: str) -> None:
    """Write the live modules of `factors` to the file `path`; llama.cpp prints `name`.

    Raises:
        UserError: a module that llama.cpp does not have.
        OSError: the disk is full or read-only.
    """
    live = {module: pair for module, pair in factors.items() if pair[0].shape[0]}
    names = architecture.tensor_names(live)
    writer = gguf.GGUFWriter(path, architecture.name)
    try:
        writer.add_type(gguf.GGUFType.ADAPTER)
        writer.add_string(TYPE_KEY, "lora")
        writer.add_float32(ALPHA_KEY, 0.0)
        writer.add_name(name)
        for module, (A, B) in live.items():
            heads = architecture.heads_of(module)
            in_order = B if heads is None else permute_rope_rows(B, heads)
            for kind, tensor in zip(KINDS, (A, in_order), strict=True):
                values = gguf.quants.quantize(tensor.detach().float().contiguous().numpy(), OUTTYPES[outtype])
                writer.add_tensor(f"{names[module]}.{kind}", values, raw_dtype=OUTTYPES[outtype])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


@dataclass(frozen=True)
class GgufFile:
    """The content of a GGUF file: its keys, and its tensors in float32, shapes as in torch."""

    keys: dict[str, Any]
    tensors: dict[str, Tensor]


def read_gguf(path: Path) -> GgufFile:
    """Everything in a GGUF file.

    Raises:
        UserError: it is not a GGUF file, or cannot be read.
    """
    try:
        reader = gguf.GGUFReader(path)
        keys = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {
            str(found.name): torch.from_numpy(np.array(gguf.quants.dequantize(found.data, found.tensor_type)))
            for found in reader.tensors
        }
    except (OSError, ValueError, IndexError, KeyError, NotImplementedError) as error:
        raise UserError(f"{path} is no GGUF file that can be read: {error}") from None
    return GgufFile(keys, tensors)


def factors_in(
    file: GgufFile, architecture: Architecture, modules: Collection[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """{module: A (R, I), B (O, R)} of the adapter in a file, in the order and scale of transformers.

    Raises:
        RunFailed: tensors of other modules, or half a pair.
    """
    names = architecture.tensor_names(modules)
    pairs = {module: [file.tensors.get(f"{name}.{kind}") for kind in KINDS] for module, name in names.items()}
    found, alpha = {}, file.keys.get(ALPHA_KEY, 0.0)
    for module, (A, B) in pairs.items():
        if A is None and B is None:
            continue
        if A is None or B is None:
            raise RunFailed(f"the file has only one factor of {module}")
        heads = architecture.heads_of(module)
        scale = alpha / B.shape[1] if alpha else 1.0
        found[module] = (A, scale * (B if heads is None else unpermute_rope_rows(B, heads)))
    if len(file.tensors) != 2 * len(found):
        raise RunFailed("the file has tensors of other modules")
    return found


def compare(written: PlainFactors, read: PlainFactors, outtype: str) -> tuple[dict[str, float], list[str]]:
    """{module: ‖ΔW − ΔW_file‖ / ‖ΔW‖} in float64, and a sentence about each error beyond rounding.

    Rounding either factor of b aᵀ changes it by a relative u at most, so ΔW by (2u + u²) Σ ‖a_i‖‖b_i‖; 3u leaves room
    for the arithmetic of the comparison.
    """
    errors, problems = {}, []
    for module, (A, B) in written.items():
        nothing = (A.new_zeros(0, A.shape[1]), B.new_zeros(B.shape[0], 0))
        file_A, file_B = read.get(module, nothing)
        if (file_A.shape[1], file_B.shape[0], len(file_A)) != (A.shape[1], B.shape[0], file_B.shape[1]):
            problems.append(f"{module} has a different shape")
            continue
        errors[module] = error = product_distance(A, B, file_A, file_B)
        slots = float((A.double().norm(dim=1) * B.double().norm(dim=0)).sum())
        size = product_norm(A.double(), B.double())
        limit = 3 * ROUNDOFF[outtype] * slots / size if size else 0.0
        if not error <= limit:
            problems.append(f"ΔW of {module} is off by {error:.2e} (rounding to {outtype}: {limit:.2e})")
    return errors, problems


def _arch(name: str) -> gguf.MODEL_ARCH:
    return next(arch for arch, known in gguf.MODEL_ARCH_NAMES.items() if known == name)
