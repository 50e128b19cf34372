"""Wrapping the linear layers of a decoder with SoRA, iterating over the adapters, cutting them to their rank."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor, nn

from sora_llm.errors import UserError
from sora_llm.sora import SharedInput, SoraLinear, is_partitioned, is_sharded
from sora_llm.targets import ALL_LINEAR, parent_of, target_linears
from sora_llm.wrappers import layers_of, unwrapped

SHARED_INPUT_LAYERS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Names of sibling layers in transformers' decoders that read the same input."""
WRAPPERS = {
    "_orig_mod": ("torch.compile", "compile layers in place, layer.compile()"),
    "_checkpoint_wrapped_module": ("checkpoint_wrapper", "use model.gradient_checkpointing_enable()"),
}
"""{attribute that holds the wrapped module: (name of the wrapper, what to do instead)}."""


def inject_sora(
    model: nn.Module,
    r: int = 64,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    target_modules: str | Sequence[str] = ALL_LINEAR,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Wrap the target linears of `model` with SoRA adapters in place, freeze everything else and set train mode.

    y = W x + s · B (g ⊙ (A x)), s = lora_alpha / r (SoRA, Ding et al. 2023); A (r, I) is drawn as in PEFT, B (O, r) is
    0, g (r,) is 1.  A comes from torch's global generator in the order of the modules: seed it for a repeatable start.

    Args:
        r: slots of each adapter at the start, an integer from 1.
        lora_alpha: a finite number above 0.
        target_modules: "all-linear" (all but the output head and the layers in `targets.left_out`), one suffix of
            module names such as "q_proj", or a sequence of them, each of which must match a layer.
        lora_dropout: probability of dropping an element of x before A, in train mode only; from 0 to below 1.
        dtype: of A, B and g, a floating-point torch.dtype; products are computed in the dtype of x.

    Returns: the same model.
    Raises:
        UserError: not a torch.nn.Module; no such target modules; a model that DistributedDataParallel or FSDP has
            wrapped (torch.compile may have), that is partly offloaded, has another library's adapters, or adapters that
            a ZeRO engine holds; target modules inside a layer that torch.compile or checkpoint_wrapper has wrapped; one
            layer in two places; a call in inference_mode.
        ValueError: there already are adapters, or r, lora_alpha, lora_dropout or dtype is invalid, as in `SoraLinear`.

    Adapters of any model with linear layers can be trained; `export_adapter` writes only those of transformers' causal
    language models.
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"inject_sora takes a torch.nn.Module, not {model!r}")
    refuse_new_parameters(model, "inject_sora")
    inner = unwrapped(model)
    if adapters(inner):
        raise ValueError("this model already has SoRA adapters")
    if any(name.endswith(".base_layer") for name, _ in inner.named_modules()):
        raise UserError("the model has another library's adapters: pass inject_sora the base model without them")
    targets = target_linears(inner, target_modules)
    _refuse_shared(inner, targets)
    _refuse_wrapped_or_offloaded(targets)
    layers = {name: SoraLinear(linear, r, lora_alpha, lora_dropout, dtype) for name, linear in targets.items()}
    inner.requires_grad_(False)
    forbid_cpu_repack(inner)
    for name, layer in layers.items():
        parent_name, _, child = name.rpartition(".")
        setattr(inner.get_submodule(parent_name), child, layer)
    link_shared_inputs(inner)
    model.train()  # from_pretrained returns a model in eval mode
    return model


def refuse_new_parameters(model: nn.Module, who: str) -> None:
    """UserError if parameters that `who` makes would not be trained: in inference_mode, or in place of adapters that a
    DistributedDataParallel or a ZeRO engine reduces, since those keep their original parameters."""
    if torch.is_inference_mode_enabled():
        raise UserError(f"{who} creates parameters, which cannot be trained if created in inference_mode")
    if any(isinstance(layer, nn.parallel.DistributedDataParallel) for layer in layers_of(model)):
        raise UserError(
            f"{who} creates new parameters, which DistributedDataParallel would not know: pass model.module, and "
            "wrap it again afterwards"
        )
    refuse_sharded(model, f"{who} creates new parameters")


def refuse_sharded(model: nn.Module, who_does_what: str) -> None:
    """UserError for parameters held by FSDP or by a ZeRO engine, where others cannot replace or write them."""
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()) or any(
        map(is_sharded, model.parameters())
    ):
        raise UserError(
            f"{who_does_what}, but FSDP has sharded the current ones; train under DDP, or with sora_llm.train under "
            "ZeRO, which takes the model out of its engine"
        )
    if any(map(_is_of_zero, adapter_parameters(model).values())):
        raise UserError(
            f"{who_does_what}, but DeepSpeed's ZeRO holds the current ones; sora_llm.train rebuilds the engine around "
            "the model, which a loop of your own cannot"
        )


def _is_of_zero(parameter: object) -> bool:
    """Whether a ZeRO engine holds a parameter: in stage 3, or in stages 1 and 2, by DeepSpeed's mark of those."""
    return is_partitioned(parameter) or hasattr(parameter, "_hp_mapping")


def _refuse_wrapped_or_offloaded(targets: Mapping[str, nn.Linear]) -> None:
    """UserError for targets whose names differ from the base's, or some of whose weights are not in memory."""
    for name in targets:
        for inner in WRAPPERS.keys() & set(name.split(".")):
            wrapper, instead = WRAPPERS[inner]
            raise UserError(f"{name} is inside a {wrapper}, which changes its name from the base's; {instead}")
    absent = [name for name, linear in targets.items() if linear.weight.is_meta]
    if 0 < len(absent) < len(targets):
        raise UserError(
            f"the weight of {absent[0]} is offloaded ({len(absent)} of {len(targets)} target modules): load the whole "
            "base, in 4 bits if it has to be smaller"
        )


def _refuse_shared(model: nn.Module, targets: Mapping[str, nn.Linear]) -> None:
    """UserError for a target that is in two modules: its adapter would be in only one of them.  A whole block in two
    places is one module."""
    first_name = {id(linear): name for name, linear in targets.items()}
    for name, module in model.named_modules(remove_duplicate=False):
        first = first_name.get(id(module), name)
        if first != name and parent_of(model, first) is not parent_of(model, name):
            raise UserError(f"{first} and {name} are the same layer; leave it out of target_modules")


def link_shared_inputs(model: nn.Module) -> None:
    """Let adapters that read the same x read it together."""
    for path, parent in model.named_modules():
        for names in SHARED_INPUT_LAYERS:
            layers = [getattr(parent, name, None) for name in names]
            found = [layer for layer in layers if isinstance(layer, SoraLinear)]
            reads_two = "cross" in path or "encoder" in path  # there, k and v read a different input from q
            if len({layer.in_features for layer in found}) == 1 and len(found) > 1 and not reads_two:
                shared_input = SharedInput(found)
                for layer in found:
                    layer.shared_input = shared_input


def forbid_cpu_repack(model: nn.Module) -> None:
    """bitsandbytes repacks 4-bit weights in place at the first CPU forward in eval mode (AVX512-BF16 machines):
    outputs change, and gradients of later training are silently wrong.  Its layers can be told not to."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False  # type: ignore[assignment]


def adapters(model: nn.Module) -> dict[str, SoraLinear]:
    """The SoRA layers by their modules' names in the base model."""
    return {name: module for name, module in model.named_modules() if isinstance(module, SoraLinear)}


def layer_shapes(layers: Mapping[str, nn.Linear | SoraLinear]) -> dict[str, tuple[int, int]]:
    """{module: (I, O)}."""
    return {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}


def adapter_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Every adapter tensor as "<module>.lora_A", "<module>.lora_B", "<module>.gate", in the model's order."""
    return {
        f"{name}.{kind}": parameter
        for name, layer in adapters(model).items()
        for kind, parameter in layer.named_parameters(recurse=False)
    }


def warn_if_untrained(model: nn.Module) -> None:
    """A warning, at the line that called our caller, if every ΔW of a model with branches is 0: none of its B has
    learned anything."""
    branches = [layer.lora_B for layer in adapters(model).values() if layer.lora_B is not None]
    if branches and not any(bool(lora_B.any()) for lora_B in branches):
        warnings.warn("nothing was learned yet: every ΔW is 0", stacklevel=3)


def cut_adapters(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Give every adapter its plain factors {module: (A (R', I), B (O, R'))}; R' = 0 removes the branch.

    Optimizers made before this hold the old parameters: make a new one.
    """
    layers = adapters(model)
    assert layers.keys() == factors.keys(), "factors must name exactly the model's adapters"
    for name, layer in layers.items():
        layer.cut(*factors[name])


def attach_factors(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> nn.Module:
    """Put plain factors of scale 1 {module: (A (R, I), B (O, R))} on the base, in place; returns it.

    They keep their own dtype and ranks; R = 0 is a module without a branch.
    """
    if not factors:
        return model.requires_grad_(False)
    inject_sora(model, r=1, lora_alpha=1, target_modules=list(factors))
    cut_adapters(model, factors)
    return model


@contextlib.contextmanager
def with_factors(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]]) -> Iterator[nn.Module]:
    """The base with plain factors on it (see `attach_factors`), in eval mode, for the duration."""
    attach_factors(model, factors).eval()
    layers = adapters(model)
    try:
        yield model
    finally:
        _put_bases_back(model, layers)


def init_from_lora(
    model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor, Tensor | None]], scaling: Mapping[str, float]
) -> None:
    """Initialise fresh adapters from a saved LoRA {module: (A (R', I), B (O, R'), None)}, ΔW = scaling · B A.

    Its factors become the first R' slots, with gates of 1: A as it is, B · scaling / s.  The remaining slots, and
    modules it does not name, stay fresh (B = 0).

    Raises:
        UserError: as in `check_init_factors`.
    """
    layers = adapters(model)
    check_init_factors(factors, layer_shapes(layers), max(layer.rank for layer in layers.values()))
    with torch.no_grad():
        for name, (A, B, _) in factors.items():
            layer, rank = layers[name], A.shape[0]
            assert layer.lora_A is not None and layer.lora_B is not None
            layer.lora_A[:rank] = A.to(layer.lora_A)
            layer.lora_B[:, :rank] = (B.double() * (scaling[name] / layer.scaling)).to(layer.lora_B)


def check_init_factors(
    factors: Mapping[str, tuple[Tensor, Tensor, Tensor | None]], shapes: Mapping[str, tuple[int, int]], r: int
) -> None:
    """UserError unless saved factors fit target modules {name: (I, O)} of r slots each."""
    for name, (A, B, _) in factors.items():
        if name not in shapes:
            raise UserError(f"the adapter changes {name}, which is not a target module; add it to sora.target_modules")
        check_shape("the adapter", name, (A.shape[1], B.shape[0]), shapes[name])
        if A.shape[0] > r:
            raise UserError(f"the adapter has rank {A.shape[0]} in {name}, more than sora.r {r}; raise sora.r")


def check_shape(who: str, name: str, found: tuple[int, int], expected: tuple[int, int]) -> None:
    """UserError if the shape (I, O) of module `name` in the adapter `who` differs from that in the base."""
    if found != expected:
        raise UserError(
            f"{name} is {found[0]} → {found[1]} in {who} but {expected[0]} → {expected[1]} in the base; it is an "
            "adapter for another base"
        )


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """`model` in eval mode for the duration; every module returns to its previous mode."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def _put_bases_back(model: nn.Module, layers: Mapping[str, SoraLinear]) -> None:
    for name, layer in layers.items():
        model.set_submodule(name, layer.base_layer)


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[nn.Module]:
    """The model with its base layers back in place of the adapters, for the duration."""
    layers = adapters(model)
    _put_bases_back(model, layers)
    try:
        yield model
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)
