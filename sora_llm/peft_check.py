"""Reloading an adapter with PEFT on the base it was trained on, and measuring how far it is from the trained one."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sora_llm.artifacts.card import self_check_failed
from sora_llm.artifacts.logit_check import (
    MAX_GAIN,
    MIN_GAIN,
    coarser,
    coarsest_dtype,
    logit_errors,
    logit_problems,
    logits_of,
)
from sora_llm.errors import RunFailed, UserError, first_line
from sora_llm.factors import product_distance
from sora_llm.inject import adapters, evaluating, without_adapters
from sora_llm.run_files import ADAPTER_WEIGHTS
from sora_llm.sora import SoraLinear

_PAIRS = {"lora_A": "lora_B", "lora_embedding_A": "lora_embedding_B"}
_OTHER_FACTOR = {**_PAIRS, **{B: A for A, B in _PAIRS.items()}}
MAX_DELTA_ERROR = 1e-5  # relative; float32 factors of the same product differ by about 1e-7


@dataclass(frozen=True)
class Errors:
    """How far an adapter, as PEFT loads it from disk, is from the trained one.

    `delta`: by module, ‖ΔW − ΔW_PEFT‖ / ‖ΔW‖ in float64, PEFT's own scale included.
    `logits`, `gain`: `logit_errors` over all logits of some token ids; `dtype` is the coarsest that they were computed
    in.
    """

    delta: dict[str, float]
    logits: float
    gain: float | None
    dtype: torch.dtype

    @property
    def problems(self) -> list[str]:
        """The problems of the adapter, in words."""
        off = [f"ΔW of {name} is off by {e:.2e}" for name, e in self.delta.items() if not e <= MAX_DELTA_ERROR]
        return off + logit_problems(self.logits, self.gain, self.dtype, "PEFT's forward shows")


def worst_of(errors: Sequence[Errors]) -> Errors:
    """The worst errors over several processes (each reloads and compares for itself)."""

    def worst(values: Sequence[float]) -> float:
        return next((value for value in values if value != value), max(values))  # NaN is the worst

    gains = [e.gain for e in errors if e.gain is not None]
    return Errors(
        delta={name: worst([e.delta[name] for e in errors]) for name in errors[0].delta},
        logits=worst([e.logits for e in errors]),
        gain=max(gains, key=lambda gain: max(MIN_GAIN - gain, gain - MAX_GAIN)) if gains else None,
        dtype=coarser(*(e.dtype for e in errors)),
    )


@dataclass(frozen=True)
class Reloaded:
    """A finished adapter as PEFT loads it from disk, on the base that it was trained on."""

    peft_model: nn.Module
    errors: Errors


@contextlib.contextmanager
def reloaded(model: nn.Module, folder: Path, probe_ids: Tensor) -> Iterator[Reloaded]:
    """The adapter in `folder` on the base inside `model`, whose own adapters are removed for the duration.

    `probe_ids` (B, T) are the tokens that logits are compared on.
    """
    layers = adapters(model)
    with evaluating(model), _hooks_kept(model):
        trained, dtype = _logits_and_dtype(model, layers, probe_ids)
        with without_adapters(model):
            base = logits_of(model, probe_ids)
            _refuse_not_finite(base, trained)
            try:
                peft_model = load_adapter(model, folder)
            except UserError as error:
                raise self_check_failed([str(error)]) from error
            try:
                logits = logits_of(peft_model, probe_ids)
                off, gain = logit_errors(logits, trained, base)
                yield Reloaded(peft_model, Errors(_delta_errors(peft_model, layers), off, gain, dtype))
            finally:
                peft_model.unload()


def _logits_and_dtype(
    model: nn.Module, layers: Mapping[str, SoraLinear], probe_ids: Tensor
) -> tuple[Tensor, torch.dtype]:
    """Logits of the trained model, and the coarsest dtype that it computed them in: under autocast, which accelerate
    puts into a model's forward and leaves there, it differs from that of the weights."""
    seen: list[torch.dtype] = []
    watched = next(iter(layers.values()))
    hook = watched.register_forward_hook(lambda _module, _inputs, output: seen.append(output.dtype))
    try:
        logits = logits_of(model, probe_ids)
    finally:
        hook.remove()
    return logits, coarser(coarsest_dtype(model), *seen)


@contextlib.contextmanager
def _hooks_kept(model: nn.Module) -> Iterator[None]:
    """Restore the forward hooks of all modules afterwards: under checkpointing, PEFT adds one that makes the output of
    embeddings require gradients each time it wraps a model, and transformers would remove only the last."""
    hooks = {module: module._forward_hooks.copy() for module in model.modules()}
    names = ("_require_grads_hook", "_require_grads_hooks")
    handles = {name: vars(model)[name] for name in names if name in vars(model)}
    try:
        yield
    finally:
        for module, own in hooks.items():
            if module._forward_hooks.keys() != own.keys():
                module._forward_hooks.clear()
                module._forward_hooks.update(own)
        for name in names:
            vars(model).pop(name, None)
        vars(model).update(handles)


def _refuse_not_finite(base: Tensor, trained: Tensor) -> None:
    """RunFailed for logits that cannot be compared."""
    if not bool(base.isfinite().all()):
        raise RunFailed("the base's logits are not finite, so no adapter can be checked; nothing was exported")
    if not bool(trained.isfinite().all()):
        raise RunFailed(
            "the adapted model's logits are not finite: the adapter has diverged; nothing was exported; lower the "
            "learning rate"
        )


def load_adapter(model: nn.Module, folder: Path) -> Any:
    """A plain base model with the PEFT adapter of `folder` on it, in eval mode.

    Raises:
        UserError: the adapter is incomplete or does not fit this base (PEFT itself drops tensors without a module
            silently, and leaves a factor that is missing as it was initialised).
    """
    from peft import PeftModel, get_peft_model_state_dict

    device = next(model.parameters()).device
    # PEFT draws its initial factors from the global generator; a loop that exports in the middle must not notice.
    devices = [device] if device.type == "cuda" else []
    with warnings.catch_warnings(), torch.random.fork_rng(devices):
        warnings.simplefilter("ignore")
        if not (folder / ADAPTER_WEIGHTS).is_file():  # PEFT would unpickle another file
            raise UserError(f"{folder} holds no {ADAPTER_WEIGHTS}; adapters are read from safetensors alone")
        try:
            names = set(load_file(folder / ADAPTER_WEIGHTS))
            loaded = PeftModel.from_pretrained(model, str(folder), torch_device=str(device)).eval()
        except SafetensorError as error:
            raise UserError(f"{folder / ADAPTER_WEIGHTS} is damaged: {error}") from error
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"the adapter {folder} does not fit this base: {first_line(error)}") from error
    _refuse_incomplete(names, folder / ADAPTER_WEIGHTS)
    missing = names - set(get_peft_model_state_dict(loaded, save_embedding_layers=False))
    if missing:
        raise UserError(f"the adapter {folder} has tensors for modules that this base lacks: {sorted(missing)[0]}")
    return loaded


def _refuse_incomplete(names: Set[str], file: Path) -> None:
    """UserError for a file without tensors, or with one factor of a pair: `names` are those of its tensors."""
    if not names:
        raise UserError(f"{file} holds no tensors, so there is no adapter in it; export it again")
    held = {name.removesuffix(".weight") for name in names}
    for name in sorted(held):
        module, _, kind = name.rpartition(".")
        other = _OTHER_FACTOR.get(kind)
        if other is not None and f"{module}.{other}" not in held:
            raise UserError(f"{file} is incomplete: {module} has {kind} and no {other}; export it again")


def _delta_errors(peft_model: nn.Module, layers: Mapping[str, SoraLinear]) -> dict[str, float]:
    base = peft_model.get_base_model()  # type: ignore[operator]
    errors = {}
    for name, trained in layers.items():
        A, B = _trained_product(trained)
        layer = base.get_submodule(name)
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            peft_A = layer.lora_A["default"].weight.detach().cpu()
            peft_B = layer.lora_B["default"].weight.detach().cpu().double() * layer.scaling["default"]
        else:
            peft_A, peft_B = A.new_zeros(0, A.shape[1]), B.new_zeros(B.shape[0], 0)
        errors[name] = product_distance(A, B, peft_A, peft_B)
    return errors


def _trained_product(layer: SoraLinear) -> tuple[Tensor, Tensor]:
    """ΔW = B A of a layer as it is trained, in float64: A (R, I) and s · B diag(g) (O, R)."""
    if layer.lora_A is None or layer.lora_B is None:
        return torch.zeros(0, layer.in_features).double(), torch.zeros(layer.out_features, 0).double()
    gate = 1.0 if layer.gate is None else layer.gate.detach().cpu().double()
    return layer.lora_A.detach().cpu().double(), layer.scaling * layer.lora_B.detach().cpu().double() * gate
