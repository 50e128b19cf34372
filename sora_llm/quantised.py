"""Bases whose files are quantised already, by bitsandbytes: what they say of themselves, and how they are read.

The files of such a base hold, for a 4-bit weight (O, I), its codes under the weight's own name and the constants of its
blocks beside it, as <weight>.absmax, <weight>.quant_map, <weight>.quant_state.bitsandbytes__nf4, …
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from sora_llm.errors import UserError
from sora_llm.inject import target_linears

STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class QuantisedFiles:
    """What a base's config.json says of its quantised weights; dtypes by name.

    `skipped` names the modules that are left as they were, as transformers matches them; None: the head alone.
    """

    bits: int
    quant_type: str
    double_quant: bool
    compute_dtype: str
    skipped: tuple[str, ...] | None


def quantised_files(config: Any) -> QuantisedFiles | None:
    """Of a base's transformers config, as it was read; None for a base that is not quantised.

    Raises:
        UserError: it is quantised by something else than bitsandbytes.
    """
    said = getattr(config, "quantization_config", None)
    if said is None:
        return None
    said = said if isinstance(said, dict) else said.to_dict()
    method = said.get("quant_method") or ("bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & said.keys() else "?")
    if getattr(method, "value", method) != "bitsandbytes":
        raise UserError(
            f"model.name_or_path: {config.name_or_path} is quantised by {method}, and adapters are trained here beside "
            "weights of bitsandbytes alone; name the unquantised model, it is quantised while it is loaded"
        )
    settings = BitsAndBytesConfig.from_dict(said)
    return QuantisedFiles(
        bits=4 if settings.load_in_4bit else 8,
        quant_type=settings.bnb_4bit_quant_type,
        double_quant=settings.bnb_4bit_use_double_quant,
        compute_dtype=str(settings.bnb_4bit_compute_dtype).removeprefix("torch."),
        skipped=None if settings.llm_int8_skip_modules is None else tuple(settings.llm_int8_skip_modules),
    )


def quantised_linears(skeleton: Any) -> dict[str, nn.Linear]:
    """{name: layer} of those that are quantised in a base that is: all but the head, or what its files do not skip."""
    files = quantised_files(skeleton.config)
    if files is None or files.skipped is None:
        return target_linears(skeleton)
    linears = {name: module for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    return {name: linear for name, linear in linears.items() if should_convert_module(name, list(files.skipped))}


def constants_in(files: Mapping[str, Path]) -> dict[str, str]:
    """{constant: the weight it belongs to} of tensors by name: empty where nothing is 4-bit."""
    weights = {key.partition(STATE)[0] for key in files if STATE in key}
    return {key: weight for key in files for weight in _owners(key) if weight in weights}


def _owners(key: str) -> list[str]:
    """The weight that a tensor could be a constant of: "layer.weight" of "layer.weight.absmax"."""
    weight, found, rest = key.rpartition(".weight.")
    return [f"{weight}.weight"] if found and rest else []


def packed_shape(files: Mapping[str, Path], key: str) -> list[int]:
    """[O, I] of a weight that lies in the files in 4 bits, from its constants."""
    from bitsandbytes.utils import unpack_tensor_to_dict

    state = next(name for name in files if name.startswith(key + STATE))
    return list(unpack_tensor_to_dict(_read(files, state))["shape"])


def unpacked(files: Mapping[str, Path], key: str, device: torch.device) -> Tensor:
    """The numbers (O, I) that a 4-bit layer multiplies with, on the CPU, from its codes and constants in the files."""
    from bitsandbytes import functional

    constants = {name: _read(files, name).to(device) for name in files if name.startswith(f"{key}.")}
    state = functional.QuantState.from_dict(constants, device)
    return functional.dequantize_4bit(_read(files, key).to(device), state).cpu()


def _read(files: Mapping[str, Path], key: str) -> Tensor:
    with safe_open(files[key], framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor


def store_as(model: nn.Module, storage: torch.dtype) -> None:
    """The same bits of every 4-bit weight, in tensors of another dtype: ZeRO-3 shards storage of one dtype only.

    Not while it is loaded: transformers would convert the codes as if they were numbers.
    """
    for module in model.modules():
        weight: Any = getattr(module, "weight", None)
        if getattr(weight, "quant_state", None) is None or weight.dtype == storage:
            continue
        codes = weight.data.flatten()
        if codes.nbytes % storage.itemsize:
            raise UserError(
                f"quantization.bnb_4bit_quant_storage: {codes.nbytes} bytes of a weight cannot be stored as {storage}; "
                "set it to uint8"
            )
        weight.data = codes.view(storage)[:, None]
        weight.quant_storage = module.quant_storage = storage  # type: ignore[assignment]
