"""The whole model with the adapter merged in, W' = W + ΔW: written shard by shard, checked from disk.

The sum is made in float32 and rounded once to the model's dtype.  W is as in the base's files, or after a round trip
through 4-bit layers (`dequantise`): those are the numbers that the adapter was trained on, in every quantised layer,
not only in adapted ones.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from sora_llm.artifacts.card import Provenance
from sora_llm.backbone import dequantised
from sora_llm.base_files import INDEX, SINGLE, base_files, weight_files
from sora_llm.base_spec import DTYPES, BackboneSpec
from sora_llm.errors import UserError
from sora_llm.factors import PlainFactors
from sora_llm.files import nearest_existing
from sora_llm.quantised import PackedWeight, packed_weights, quantised_files, quantised_linears, unpacked
from sora_llm.run_files import CHAT_TEMPLATE
from sora_llm.targets import linear_layers

MAX_SHARD_BYTES = 4 * 2**30
MIN_KEPT = 0.5
"""Share of the adapter left after rounding: ⟨W' − W, ΔW⟩ / ‖ΔW‖² over all layers.  In a base of the model's own dtype,
numbers that ΔW moves by less than half their spacing do not change."""
_ITEM_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "I16": 2, "I32": 4, "I64": 8}


@dataclass(frozen=True)
class Difference:
    """The difference between a written tensor, W', and W + ΔW.

    `worst`: the largest of any number, in units of the allowed rounding; correct if 1 or less.
    `error_norm`, `delta_norm`, `product`: ‖W' − W − ΔW‖, ‖ΔW‖ and ⟨W' − W, ΔW⟩, 0 if there is no ΔW.
    """

    worst: float
    error_norm: float = 0.0
    delta_norm: float = 0.0
    product: float = 0.0


@dataclass(frozen=True)
class Merge:
    """How a tensor of the base becomes one of the merged model.

    `files` maps every tensor to its file; `quantised` are the linear layers that are 4-bit in `spec`, and with
    `dequantise` their weights are quantised and dequantised first.  `packed` are the weights stored in 4 bits in the
    files; their constants are not part of the merged model.
    """

    factors: PlainFactors
    spec: BackboneSpec
    files: Mapping[str, Path]
    quantised: frozenset[str]
    dequantise: bool
    device: torch.device | str
    packed: Mapping[str, PackedWeight] = field(default_factory=dict)

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.spec.dtype]

    def base(self, key: str) -> Tensor:
        """A tensor of the base, before anything is added."""
        if key in self.packed:
            return unpacked(self.files, key, self.packed[key], torch.device(self.device))
        with safe_open(self.files[key], framework="pt") as file:
            tensor: Tensor = file.get_tensor(key)
        if self.dequantise and key.endswith(".weight") and key.removesuffix(".weight") in self.quantised:
            return dequantised(tensor, self.spec, self.device)
        return tensor

    def merged(self, key: str) -> Tensor:
        """The tensor of the merged model."""
        tensor = self.base(key)
        if not tensor.is_floating_point():
            return tensor
        delta = self._factors_of(key)
        if delta is not None:
            A, B = delta
            tensor = torch.addmm(tensor.float(), B.float(), A.float())
        return tensor.to(self.dtype)

    def difference(self, key: str, found: Tensor) -> Difference:
        """How far `found` is from base + ΔW, in float64.

        Rounding once moves a number x by u |x| at most; the float32 sum before it, of R + 1 terms, by (R + 2) 2⁻²⁴
        times the sum of their magnitudes.
        """
        base = self.base(key)
        if found.shape != base.shape or (base.is_floating_point() and found.dtype != self.dtype):
            return Difference(math.inf)
        if not base.is_floating_point():
            return Difference(0.0 if torch.equal(found, base) else math.inf)
        expected, terms, delta = base.double(), base.double().abs(), None
        factors = self._factors_of(key)
        if factors is not None:
            A, B = (factor.double() for factor in factors)
            delta, terms = B @ A, terms + B.abs() @ A.abs()
            expected = expected + delta
        rank = 0 if factors is None else factors[0].shape[0]
        info = torch.finfo(self.dtype)
        allowed = info.eps / 2 * expected.abs() + (rank + 2) * 2.0**-24 * terms + info.smallest_normal * info.eps
        off = found.double() - expected
        worst = float((off.abs() / allowed).max()) if off.numel() else 0.0
        worst = math.inf if math.isnan(worst) else worst
        if delta is None:
            return Difference(worst)
        return Difference(worst, float(off.norm()), float(delta.norm()), float(((off + delta) * delta).sum()))

    def _factors_of(self, key: str) -> tuple[Tensor, Tensor] | None:
        found = self.factors.get(key.removesuffix(".weight")) if key.endswith(".weight") else None
        return found if found is not None and found[0].shape[0] else None


def plan_merge(
    factors: PlainFactors, spec: BackboneSpec, skeleton: nn.Module, *, dequantise: bool, device: torch.device | str
) -> Merge:
    """Plan the merge from the headers of the base's files, before anything is loaded.

    Raises:
        UserError: weights that are not safetensors, are damaged, lack a layer's weight by its name or shape, or are
            quantised when the original ones are asked for.
    """
    files: dict[str, Path] = {}
    shapes: dict[str, list[int]] = {}
    for path in weight_files(spec):
        try:
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    files[key], shapes[key] = path, file.get_slice(key).get_shape()
        except (OSError, SafetensorError) as error:
            raise UserError(f"the weights {path} are damaged: {error}") from None
    if not dequantise and quantised_files(skeleton.config) is not None:
        raise UserError(
            f"the files of {spec.name_or_path} hold quantised weights alone; name the original model to merge into it "
            "(sora-llm export: --base-model)"
        )
    packed = packed_weights(files)
    shapes |= {key: weight.shape for key, weight in packed.items()}
    for name, linear in linear_layers(skeleton).items():
        shape = [linear.out_features, linear.in_features]
        if shapes.get(f"{name}.weight") != shape:
            raise UserError(
                f"the files of {spec.name_or_path} hold no {name}.weight of shape {shape}: tensor names do not match "
                "the layers; load and save the model with transformers, and name that folder"
            )
    quantised = frozenset(quantised_linears(skeleton))
    return Merge(factors, spec, files, quantised, dequantise, device, packed)


# --------------------------------------------------------------------------------------------------------- writing


def merged_size(merge: Merge, key: str) -> int:
    """Bytes of a tensor of the merged model."""
    if key in merge.packed:
        return math.prod(merge.packed[key].shape) * merge.dtype.itemsize
    with safe_open(merge.files[key], framework="pt") as file:
        part = file.get_slice(key)
        is_float = part.get_dtype() in ("F64", "F32", "F16", "BF16")
        item = merge.dtype.itemsize if is_float else _ITEM_BYTES.get(part.get_dtype(), 8)
        return math.prod(part.get_shape()) * item


def planned_shards(merge: Merge) -> list[list[str]]:
    """The tensors of each file to write, in the order of the base's files."""
    shards: list[list[str]] = [[]]
    room = MAX_SHARD_BYTES
    left_out = {name for weight in merge.packed.values() for name in weight.constants}
    for key in merge.files:
        if key in left_out:
            continue
        size = merged_size(merge, key)
        if size > room and shards[-1]:
            shards.append([])
            room = MAX_SHARD_BYTES
        shards[-1].append(key)
        room -= size
    return shards


def refuse_small_disk(merge: Merge, folder: Path) -> None:
    """UserError if there is no room for the merged model in `folder`, which need not exist yet."""
    size = sum(merged_size(merge, key) for keys in planned_shards(merge) for key in keys)
    existing = nearest_existing(folder.parent)
    free = shutil.disk_usage(existing).free
    if size > free:
        raise UserError(
            f"the merged model takes {size / 2**20:,.1f} MiB, and {existing} has {free / 2**20:,.1f} MiB free"
        )


def write_shards(merge: Merge, shards: Sequence[Sequence[str]], folder: Path) -> list[str]:
    """Write one file per shard; returns the names of the files."""
    count = len(shards)
    names = [SINGLE if count == 1 else f"model-{index:05}-of-{count:05}.safetensors" for index in range(1, count + 1)]
    where: dict[str, str] = {}
    size = 0
    for name, keys in zip(names, shards, strict=True):
        tensors = {key: merge.merged(key).contiguous() for key in keys}
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where |= dict.fromkeys(keys, name)
        size += sum(tensor.nbytes for tensor in tensors.values())
    if count > 1:
        index = {"metadata": {"total_size": size}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")
    return names


def write_small_files(spec: BackboneSpec, config: Any, folder: Path, provenance: Provenance) -> None:
    """Write config, generation config, tokenizer, chat template and the base's own code, if it has any."""
    source = base_files(spec, ["config.json"])[0]
    content = json.loads(source.read_text(encoding="utf-8"))
    content.pop("quantization_config", None)
    content["torch_dtype" if "torch_dtype" in content else "dtype"] = spec.dtype
    (folder / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    code = [path.name for path in source.parent.glob("*.py")] if getattr(config, "auto_map", None) else []
    for path in [*base_files(spec, ["generation_config.json", *code]), *provenance.tokenizer_files]:
        shutil.copyfile(path, folder / path.name)
    if provenance.chat_template is not None:
        (folder / CHAT_TEMPLATE).write_text(provenance.chat_template, encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- checking


def check_shards(
    merge: Merge, shards: Sequence[Sequence[str]], names: Sequence[str], folder: Path
) -> tuple[dict[str, float], list[str]]:
    """{module: share of ΔW lost to rounding}, and a sentence about each tensor that is off by more than rounding, or
    about an adapter of which rounding left less than MIN_KEPT."""
    lost, problems, product, energy = dict.fromkeys(merge.factors, 0.0), [], 0.0, 0.0
    for keys, tensors in zip(shards, _read(folder, names), strict=True):
        if sorted(keys) != sorted(tensors):
            problems.append("a shard holds other tensors than were written")
        for key in keys:
            found = tensors[key]() if key in tensors else torch.empty(0)
            difference = merge.difference(key, found)
            if not difference.worst <= 1:
                worst = f"{difference.worst:.2g}"
                problems.append(f"{key} is off by {worst} times what rounding to {merge.spec.dtype} allows")
            if difference.delta_norm:
                lost[key.removesuffix(".weight")] = difference.error_norm / difference.delta_norm
            product, energy = product + difference.product, energy + difference.delta_norm**2
    if not problems and product < MIN_KEPT * energy:
        kept = max(0.0, product / energy)
        problems.append(f"the merged weights hold {kept:.3f} of the adapter's ΔW (allowed {MIN_KEPT:g} or more)")
    return lost, problems


def _read(folder: Path, names: Sequence[str]) -> Iterator[dict[str, Callable[[], Tensor]]]:
    """{tensor: function that reads it} for one file after the other."""
    for name in names:
        with safe_open(folder / name, framework="pt") as file:
            yield {key: _reader(file, key) for key in file.keys()}  # noqa: SIM118


def _reader(file: Any, key: str) -> Callable[[], Tensor]:
    return lambda: file.get_tensor(key)
