"""Which base is loaded and how, in words and as recorded in certificates."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from sora_llm.files import user_path

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32, "uint8": torch.uint8}
COMPUTE_DTYPES = DTYPES.keys() - {"uint8"}
"""Those in which a model's numbers can be; uint8 only stores the bytes of 4-bit ones."""
QUANT_TYPES = ("nf4", "fp4")


@dataclass(frozen=True)
class BackboneSpec:
    """What to load and how; dtypes by name.  `quant_storage` is resolved ("uint8", "bfloat16", …), never "auto"."""

    name_or_path: str
    revision: str | None = None
    dtype: str = "bfloat16"
    attn_implementation: str = "sdpa"
    trust_remote_code: bool = False
    load_in_4bit: bool = False
    load_in_8bit: bool = False
    quant_type: str = "nf4"
    double_quant: bool = True
    compute_dtype: str = "bfloat16"
    quant_storage: str = "uint8"

    @property
    def folder(self) -> Path:
        """The local folder, which exists unless this is a hub id."""
        return user_path(self.name_or_path, "model.name_or_path")

    @property
    def is_quantised(self) -> bool:
        return self.load_in_4bit or self.load_in_8bit

    @property
    def form(self) -> str:
        """How the weights are held, in words: "NF4, computing in bfloat16", "8-bit", "float32"."""
        if self.load_in_4bit:
            return f"{self.quant_type.upper()}, computing in {self.compute_dtype}"
        return "8-bit" if self.load_in_8bit else self.dtype

    @property
    def loading(self) -> dict[str, Any]:
        """How the weights are loaded, for a certificate, under the names of our config."""
        return {name: getattr(self, field) for name, field in _LOADING.items()}

    def loaded_as(self, loading: Mapping[str, Any] | None) -> BackboneSpec | None:
        """This base, loaded as a certificate says; None if `loading` is invalid or not known."""
        if loading is None or loading.keys() != _LOADING.keys():
            return None
        spec = replace(self, **{field: loading[name] for name, field in _LOADING.items()})
        flags = (spec.load_in_4bit, spec.load_in_8bit, spec.double_quant)
        names = (spec.dtype, spec.compute_dtype, spec.quant_type)
        if not all(isinstance(flag, bool) for flag in flags) or not all(isinstance(name, str) for name in names):
            return None
        is_known = {spec.dtype, spec.compute_dtype} <= COMPUTE_DTYPES and spec.quant_type in QUANT_TYPES
        return spec if is_known else None

    @property
    def source(self) -> dict[str, Any]:
        """The arguments of every `from_pretrained` of this base."""
        return {"revision": self.revision, "trust_remote_code": self.trust_remote_code}


_LOADING = {
    "dtype": "dtype",
    "load_in_4bit": "load_in_4bit",
    "load_in_8bit": "load_in_8bit",
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
}


def resolve_quant_storage(quant_storage: str, compute_dtype: str, strategy: str) -> str:
    """`auto`: the compute dtype under ZeRO-3 (which shards only storage of one dtype on GPUs), else uint8."""
    if quant_storage != "auto":
        return quant_storage
    return compute_dtype if strategy == "zero3" else "uint8"


def computes_in_float16(spec: BackboneSpec) -> bool:
    """Whether gradients pass through float16 on their way to the adapters."""
    return spec.dtype == "float16" or (spec.load_in_4bit and spec.compute_dtype == "float16")
