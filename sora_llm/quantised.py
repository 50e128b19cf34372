"""Bases already quantised by bitsandbytes: their settings, and the values in their files; and what quantised layers
compute with.

The files of such a base hold, for a 4-bit weight (O, I), its codes under the weight's own name and, next to it, the
constants of its blocks, as <weight>.absmax, <weight>.quant_map, <weight>.quant_state.bitsandbytes__nf4, …
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import BitsAndBytesConfig
from transformers.quantizers.quantizers_utils import should_convert_module

from sora_llm.base_spec import COMPUTE_DTYPES, QUANT_TYPES
from sora_llm.errors import UserError, first_line
from sora_llm.targets import linear_layers

STATE = ".quant_state.bitsandbytes__"


@dataclass(frozen=True)
class QuantisedFiles:
    """The quantisation settings in a base's config.json; dtypes by name.

    `skipped` names the unquantised modules, as transformers matches them; None: only the head.
    """

    bits: int
    quant_type: str
    double_quant: bool
    compute_dtype: str
    skipped: tuple[str, ...] | None

    def __str__(self) -> str:
        if self.bits == 8:
            return "8 bits"
        return f"4 bits, {self.quant_type}, with{'' if self.double_quant else 'out'} double quantisation"


def quantised_files(config: Any) -> QuantisedFiles | None:
    """The settings of a base's files from its transformers config, as it was read; None if they are not quantised.

    Raises:
        UserError: it is quantised by anything other than bitsandbytes, or in a way that cannot be loaded.
    """
    said = quantization_config_of(config)
    if said is None:
        return None
    method = said.get("quant_method") or ("bitsandbytes" if {"load_in_4bit", "load_in_8bit"} & said.keys() else None)
    if getattr(method, "value", method) != "bitsandbytes":
        raise UserError(
            f"model.name_or_path: {config.name_or_path} is quantised by {method}, but only bitsandbytes is supported; "
            "name the unquantised model, which is quantised on loading"
        )
    try:
        settings = BitsAndBytesConfig.from_dict(said)
        files = QuantisedFiles(
            bits=4 if settings.load_in_4bit else 8,
            quant_type=settings.bnb_4bit_quant_type,
            double_quant=settings.bnb_4bit_use_double_quant,
            compute_dtype=str(settings.bnb_4bit_compute_dtype).removeprefix("torch."),
            skipped=None if settings.llm_int8_skip_modules is None else tuple(settings.llm_int8_skip_modules),
        )
        if files.quant_type not in QUANT_TYPES or files.compute_dtype not in COMPUTE_DTYPES:
            raise ValueError(f"{files.quant_type} computed in {files.compute_dtype}")
        takes_head = files.skipped is not None and should_convert_module("lm_head", list(files.skipped))
    except (ValueError, TypeError, AttributeError, re.error) as error:
        raise UserError(
            f"model.name_or_path: the quantization_config in the config.json of {config.name_or_path} is not valid for "
            f"bitsandbytes ({first_line(error)})"
        ) from None
    if takes_head and getattr(config.get_text_config(), "tie_word_embeddings", False):
        raise UserError(
            f"model.name_or_path: the config.json of {config.name_or_path} has its head both quantised and tied to "
            "the embeddings, which is impossible; add lm_head to its llm_int8_skip_modules"
        )
    return files


def is_quantised(config: Any) -> bool:
    """Whether a base's files are quantised, by any method, from its transformers config as it was read."""
    return quantization_config_of(config) is not None


def quantization_config_of(config: Any) -> dict[str, Any] | None:
    """The quantization_config of a transformers config, as a dict; None if there is none."""
    said = getattr(config, "quantization_config", None)
    return said if said is None or isinstance(said, dict) else dict(said.to_dict())


def quantised_linears(skeleton: Any) -> dict[str, nn.Linear]:
    """{name: layer} of a quantised base's quantised layers: all but the head, or those that its files do not skip."""
    files = quantised_files(skeleton.config)
    if files is None or files.skipped is None:
        return linear_layers(skeleton)
    linears = {name: module for name, module in skeleton.named_modules() if isinstance(module, nn.Linear)}
    return {name: linear for name, linear in linears.items() if should_convert_module(name, list(files.skipped))}


def has_4bit_weights(file: Any) -> bool:
    """Whether an open safetensors file has 4-bit weights, by its header."""
    return any(STATE in key for key in file.keys())  # noqa: SIM118


@dataclass(frozen=True)
class PackedWeight:
    """A weight stored in the files in 4 bits: its shape [O, I] and the names of the constants stored with it."""

    shape: list[int]
    constants: tuple[str, ...]


def packed_weights(files: Mapping[str, Path]) -> dict[str, PackedWeight]:
    """{name: weight} of the packed weights in a base's files, given as {tensor name: file}.

    Raises:
        UserError: constants that are damaged.
    """
    found: dict[str, list[str]] = {key.partition(STATE)[0]: [] for key in files if STATE in key}
    for key in files:
        weight = f"{key.rpartition('.weight.')[0]}.weight"
        if weight in found:
            found[weight].append(key)
    return {weight: PackedWeight(_shape(files, names), tuple(names)) for weight, names in found.items()}


def _shape(files: Mapping[str, Path], constants: Sequence[str]) -> list[int]:
    from bitsandbytes.utils import unpack_tensor_to_dict

    state = next(name for name in constants if STATE in name)
    try:
        return [int(size) for size in unpack_tensor_to_dict(_read(files, state))["shape"]]
    except (ValueError, TypeError, KeyError, RuntimeError) as error:
        raise UserError(
            f"the weights {files[state]} are damaged: {state} cannot be read ({first_line(error)})"
        ) from None


def unpacked(files: Mapping[str, Path], key: str, packed: PackedWeight, device: torch.device) -> Tensor:
    """The numbers (O, I) that a 4-bit layer multiplies with, on the CPU, from its codes and constants in the files."""
    from bitsandbytes import functional

    constants = {name: _read(files, name).to(device) for name in packed.constants}
    state = functional.QuantState.from_dict(constants, device)
    return functional.dequantize_4bit(_read(files, key).to(device), state).cpu()


def dequantised_weight(layer: nn.Linear) -> Tensor | None:
    """The numbers that a loaded 4-bit layer multiplies with; None for any other layer."""
    state = getattr(layer.weight, "quant_state", None)
    if state is None:
        return None
    from bitsandbytes import functional

    return functional.dequantize_4bit(layer.weight.data, state).cpu()


def _read(files: Mapping[str, Path], key: str) -> Tensor:
    with safe_open(files[key], framework="pt") as file:
        tensor: Tensor = file.get_tensor(key)
    return tensor


def compute_dtypes(model: nn.Module) -> list[torch.dtype]:
    """The dtypes that a model's quantised layers compute in, whatever the activations between them are.  8-bit layers,
    which round their inputs to 8 bits, count as bfloat16."""
    from bitsandbytes.nn import Linear4bit, Linear8bitLt

    dtypes = []
    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            dtypes.append(torch.bfloat16)
        elif isinstance(module, Linear4bit) and module.compute_dtype is not None:
            dtypes.append(module.compute_dtype)
    return dtypes


def match_loading_format(model: nn.Module, dtype: torch.dtype, storage: torch.dtype) -> None:
    """Convert a model from quantised files to the form of one quantised on loading: unquantised tensors in `dtype`, the
    same bits of every 4-bit weight in tensors of `storage` (ZeRO-3 shards only one dtype).

    transformers does neither: 5.23 leaves everything in the dtypes of the files, whatever is requested, and with
    another storage in the config it converts the codes as if they were numbers.

    Raises:
        UserError: a weight whose bytes do not fill tensors of `storage`.
    """
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            if getattr(parameter, "quant_state", None) is not None:
                _store_as(module, parameter, storage)
            elif parameter.is_floating_point():
                parameter.data = parameter.data.to(dtype)


def _store_as(module: nn.Module, weight: Any, storage: torch.dtype) -> None:
    codes = weight.data.flatten()
    if codes.nbytes % storage.itemsize:
        raise UserError(
            f"quantization.bnb_4bit_quant_storage: {codes.nbytes} bytes of a weight cannot be stored as {storage}; set "
            "it to uint8"
        )
    weight.data = codes.view(storage)[:, None]
    weight.quant_storage = module.quant_storage = storage  # type: ignore[assignment]
