"""The SoRA adapter in pure torch: LoRA with a gate per rank.

    y = W x + s · B (g ⊙ (A x))        A (R, I)   B (O, R)   g (R,)   s = lora_alpha / r

Shape suffixes: T tokens (batch and positions flattened), I in, O out, R rank.
Source: Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023, arXiv 2311.11696.
"""

from __future__ import annotations

import contextlib
import functools
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules import module as _of_all_modules
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from sora_llm.factors import live_slots
from sora_llm.values import is_integer, is_number

F = TypeVar("F", bound=Callable[..., Any])


def soft_threshold(z: Tensor, tau: float | Tensor) -> Tensor:
    """S_τ(z) = sign(z) · max(|z| − τ, 0), the proximal map of τ|·|; `tau` ≥ 0 is a number or broadcasts with `z`.

    Dead gates become +0, never −0: ZeRO's gathers would turn that into +0, and bits are compared between strategies.
    """
    return z - z.clamp(min=-tau, max=tau)  # type: ignore[arg-type]  # both bounds are of one type


def hard_threshold(z: Tensor, importance: Tensor, tau: float) -> Tensor:
    """z where |z| · importance > τ, else 0: the prox of an ℓ0 penalty.

    As a product, so that an importance of 0 is a threshold of infinity.
    """
    return z.masked_fill(z.abs() * importance <= tau, 0.0)


def _autocast_disabled(x: Tensor) -> AbstractContextManager[Any]:
    """Context without autocast, which would cast only some products of a branch; the base layer keeps it."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device):  # torch has no autocast of meta
        return torch.autocast(device, enabled=False)
    return contextlib.nullcontext()


def _differentiable_once(backward: F) -> F:
    """A backward pass that refuses to be differentiated itself, under `_autocast_disabled`: some users call it inside
    autocast.  torch's own decorator is used only with create_graph, as it takes time."""
    refusing = once_differentiable(backward)

    @functools.wraps(backward)
    def run(ctx, *gradients):
        chosen = refusing if torch.is_grad_enabled() else backward
        given = gradients[0] if gradients[0] is not None else next(one for one in gradients if one is not None)
        with _autocast_disabled(given):
            return chosen(ctx, *gradients)

    return run  # type: ignore[return-value]


def add_branch(
    base_layer: Callable[[Tensor], Tensor],
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    seed: int = 0,
) -> Tensor:
    """base_layer(x) + s · B (g ⊙ (A drop(x))), for a base layer that keeps neither x nor its output.

    Two autograd nodes, one on either side of the base layer.  The branch's output is added into the base layer's own,
    and its gradient into the base layer's gradient of x, so nothing as wide as x or y is allocated or summed for it.
    Saved for the backward pass are x itself (the tensor that its neighbours q/k/v or gate/up also hold, never a copy or
    a float32 cast) and the narrow u = A drop(x); the dropout mask is redrawn from its seed.  The factors are cast to
    x's dtype here and once more in backward, so float32 adapters serve a bf16 backbone.

    Args:
        base_layer: (…, I) → (…, O).
        x: (…, I).
        lora_A, lora_B, gate: (R, I), (O, R), and (R,) or None for ungated factors.
        scaling: s.
        dropout: probability of dropping an element of x before A; its mask is a function of `seed` alone.

    Returns: (…, O), in the dtype of the base layer's output.
    """
    x_to_base, u_RT = _down(x, dropout, seed, lora_A)
    return _between(base_layer, x, x_to_base, u_RT, lora_B, gate, scaling)


def _between(
    base_layer: Callable[[Tensor], Tensor],
    x: Tensor,
    x_to_base: Tensor,
    u_RT: Tensor,
    lora_B: Tensor,
    gate: Tensor | None,
    scaling: float,
) -> Tensor:
    """The base layer between the two nodes of its branch."""
    y = base_layer(x_to_base if x.requires_grad else x)  # x_to_base always requires a gradient
    hooks = getattr(base_layer, "_forward_hooks", None) or _of_all_modules._global_forward_hooks
    if hooks and not is_partitioned(getattr(base_layer, "weight", None)):
        y = y.clone()  # a hook may have kept it; ZeRO-3's, which are on every module, do not
    elif torch._C._len_torch_dispatch_stack() and _results_are_cached():
        y = y.clone()
    with _autocast_disabled(x):
        return _Up.apply(y, u_RT, lora_B, gate, scaling, x.dtype)


def _results_are_cached() -> bool:
    """Whether torch's selective activation checkpointing keeps results of operations.  Of y = x Wᵀ it may keep the
    product that y is a view of: adding the branch in place would go unnoticed, and be repeated when y is recomputed."""
    kinds = (kind for mode in _get_current_dispatch_mode_stack() for kind in type(mode).__mro__)
    return any(kind.__module__ == "torch.utils.checkpoint" for kind in kinds)


def _traced(
    base_layer: Callable[[Tensor], Tensor],
    x: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor | None,
    scaling: float,
    dropout: float,
) -> Tensor:
    """`add_branch` for torch.compile, which makes better kernels of the equation itself than of our backward pass, and
    torch.jit.trace, which would record an operation in place twice; its dropout masks are torch's."""
    y = base_layer(x)
    with _autocast_disabled(x):
        u_TR = nn.functional.dropout(x, dropout).reshape(-1, x.shape[-1]) @ lora_A.to(x.dtype).T
        B_OR = (lora_B if gate is None else lora_B * gate).to(x.dtype)
        if y.dtype != x.dtype:
            return y + (scaling * (u_TR @ B_OR.T)).to(y.dtype).view(y.shape)
        return torch.addmm(y.reshape(-1, y.shape[-1]), u_TR, B_OR.T, alpha=scaling).view(y.shape)


def is_partitioned(parameter: object) -> bool:
    """Whether ZeRO-3 holds a parameter, which then has its values only while its own module computes."""
    return hasattr(parameter, "ds_id")


def is_sharded(parameter: object) -> bool:
    """Whether fully_shard has left this process only a part of a parameter (a DTensor)."""
    return hasattr(parameter, "placements")


def _down(x: Tensor, dropout: float, seed: int, *factors: Tensor) -> tuple[Tensor, ...]:
    """x for the base layer, and u = A drop(x) as (R, T) for each A."""
    with _autocast_disabled(x):
        return _Down.apply(x, dropout, seed, *factors)


class _Down(torch.autograd.Function):
    """x, and u = A drop(x) as (R, T) for each A: with T last, every product reads rows as stored, even for a few odd
    ranks.  Several A form one product, which reads x once."""

    @staticmethod
    def forward(ctx, x, dropout, seed, *factors):
        x_TI = x.reshape(-1, x.shape[-1])
        A_RI = _stacked(factors, x.dtype)
        u_RT = A_RI @ x_TI.T if dropout == 0 else (A_RI @ (x_TI * _dropout_mask(x_TI, dropout, seed)).T) / (1 - dropout)
        ctx.save_for_backward(x, *factors)
        ctx.dropout, ctx.seed = dropout, seed
        ctx.set_materialize_grads(False)
        return x, *_split_rows(u_RT, factors)

    @staticmethod
    @_differentiable_once
    def backward(ctx, dx, *parts):
        x, *factors = ctx.saved_tensors
        need_x, need_A = ctx.needs_input_grad[0], any(ctx.needs_input_grad[3:])
        asked = [place for place, part in enumerate(parts) if part is not None]  # a u may not have reached a loss
        if not asked:
            return dx, *[None] * (2 + len(factors))
        factors = [factors[place] for place in asked]
        du_RT = torch.cat([parts[place] for place in asked]) if len(asked) > 1 else parts[asked[0]]
        x_TI = x.reshape(-1, x.shape[-1])
        kept_TI = None
        if ctx.dropout > 0:
            kept_TI = _dropout_mask(x_TI, ctx.dropout, ctx.seed)
            du_RT = du_RT / (1 - ctx.dropout)
        gradients: list[Tensor | None] = [None] * len(parts)
        if need_A:
            dA_RI = (du_RT @ (x_TI if kept_TI is None else x_TI * kept_TI)).to(factors[0].dtype)
            for place, dA in zip(asked, _split_rows(dA_RI, factors), strict=True):
                gradients[place] = dA
        if need_x:
            dx = _add_product(dx, du_RT.T, _stacked(factors, x.dtype), x.shape, kept_TI)
        return dx if need_x else None, None, None, *gradients


def _stacked(factors: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One (Σ R, I) in `dtype`."""
    return _cast(torch.cat(factors) if len(factors) > 1 else factors[0], dtype)  # type: ignore[arg-type]


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def _split_rows(rows: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """The rows of each factor."""
    return torch.split_with_sizes(rows, [factor.shape[0] for factor in factors]) if len(factors) > 1 else (rows,)


class _Up(torch.autograd.Function):
    """y + s · B (g ⊙ u), in place of y.

    g is folded into B and s into the products, which takes few kernels: at a few thousand tokens, their number is what
    an adapter costs on a GPU.
    """

    @staticmethod
    def forward(ctx, y, u_RT, lora_B, gate, scaling, dtype):
        ctx.save_for_backward(u_RT, lora_B, gate)
        ctx.scaling = scaling
        # Detached, y shares its memory and its version: if a base layer needs its output for its own gradient, the
        # backward pass fails with a message.
        return _add_product(y.detach(), u_RT.T, _gated(lora_B, gate, dtype).T, y.shape, alpha=scaling)

    @staticmethod
    @_differentiable_once
    def backward(ctx, dy):
        u_RT, lora_B, gate = ctx.saved_tensors
        need_y, need_u, need_B, need_g = ctx.needs_input_grad[:4]
        dy_TO = _cast(dy.reshape(-1, dy.shape[-1]), u_RT.dtype)
        dB = _gated(_product(u_RT, dy_TO, ctx.scaling).T, gate, lora_B.dtype) if need_B else None
        du_RT = dg = None
        if need_u or need_g:
            dh_RT = _product(_cast(lora_B, u_RT.dtype).T, dy_TO.T, ctx.scaling)
            if need_g:
                dg = _cast((dh_RT * u_RT).sum(1, dtype=torch.promote_types(gate.dtype, torch.float32)), gate.dtype)
            if need_u:
                du_RT = dh_RT if gate is None else dh_RT.mul_(gate[:, None])
        return dy if need_y else None, du_RT, dB, dg, None, None


def _gated(columns_OR: Tensor, gate: Tensor | None, dtype: torch.dtype) -> Tensor:
    """columns ⊙ g in `dtype`, computed in the widest of the three and rounded once, with contiguous rows."""
    if gate is None:
        return columns_OR.to(dtype, memory_format=torch.contiguous_format)
    out = torch.empty_like(columns_OR, dtype=dtype, memory_format=torch.contiguous_format)
    return torch.mul(columns_OR, _cast(gate, torch.promote_types(gate.dtype, dtype)), out=out)


def _product(left: Tensor, right: Tensor, alpha: float) -> Tensor:
    """alpha · left @ right."""
    return torch.addmm(left.new_empty(()), left, right, beta=0, alpha=alpha)


def _add_product(
    wide: Tensor | None,
    left: Tensor,
    right: Tensor,
    shape: torch.Size,
    mask: Tensor | None = None,
    alpha: float = 1.0,
) -> Tensor:
    """wide + mask ⊙ (alpha · left @ right), in place of `wide` if its memory allows it; None is 0."""
    if wide is not None and wide.dtype == left.dtype and wide.is_contiguous():
        rows = wide.view(-1, shape[-1])
        if mask is None:
            rows.addmm_(left, right, alpha=alpha)
        else:
            rows.addcmul_(_product(left, right, alpha), mask)
        return wide
    product = _product(left, right, alpha)
    product = (product if mask is None else product.mul_(mask)).view(shape)
    # A quantised layer's output may have a different dtype from its input.
    return product if wide is None else wide + product.to(wide.dtype)


def _dropout_mask(x_TI: Tensor, dropout: float, seed: int) -> Tensor:
    """1 where dropout keeps x, else 0: a function of `seed` alone, so backward redraws it instead of keeping it.

    Sixteen random bits decide per element (a third of the time of `bernoulli_` on a CPU).
    """
    generator = torch.Generator(device=x_TI.device)
    generator.manual_seed(seed)
    words = torch.empty((x_TI.numel() + 3) // 4, dtype=torch.int64, device=x_TI.device)
    draws_TI = words.random_(-(2**63), None, generator=generator).view(torch.int16)[: x_TI.numel()].view_as(x_TI)
    dropped = min(round(dropout * 2**16), 2**16 - 1)
    return torch.ge(draws_TI, dropped - 2**15, out=torch.empty_like(x_TI))  # casting booleans would take as long again


@torch._disable_dynamo  # torch.compiler.disable would import the compiler here and now, which takes a second
def _draw_seed() -> int:
    # From torch's own generator, which activation checkpointing restores before it recomputes.
    return int(torch.randint(2**62, (1,)).item())


class SoraLinear(nn.Module):
    """A frozen linear layer and its gated low-rank branch.

    Args:
        base_layer: nn.Linear or a bitsandbytes 4-bit / 8-bit linear, I = in_features, O = out_features; it is frozen.
        r: number of slots R at the start, an integer from 1.
        lora_alpha: a finite number above 0; s = lora_alpha / r, fixed for the layer's lifetime, also after cutting.
        lora_dropout: probability of dropping an element of x before A, in training mode only; from 0 to below 1.
        dtype: of `lora_A` (R, I), `lora_B` (O, R) and `gate` (R,); they are cast to x's dtype inside the forward.

    A starts Kaiming-uniform as in LoRA, B at 0, the gate at 1, so the wrapped layer starts as the base layer.
    After `cut`, `gate` is None (folded into the factors), and a layer cut to rank 0 has no branch at all.  `rank` is
    the number of slots, which a parameter partitioned by ZeRO-3 no longer shows.

    Raises:
        ValueError: an r that is not an integer from 1, a lora_alpha that is not a finite number above 0, a lora_dropout
            outside [0, 1), or a dtype that is not a floating-point torch.dtype.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    gate: nn.Parameter | None
    shared_input: SharedInput | None = None
    """The layers that read the same x, including this one."""

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if not is_integer(r) or r < 1:
            raise ValueError(f"r is {r!r}; it must be an integer >= 1")
        if not is_number(lora_alpha) or not 0 < lora_alpha < math.inf:
            raise ValueError(f"lora_alpha is {lora_alpha!r}; it must be a number above 0")
        if not is_number(lora_dropout) or not 0 <= lora_dropout < 1:
            raise ValueError(f"lora_dropout is {lora_dropout!r}; it must be a probability >= 0 and < 1")
        if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
            raise ValueError(f"dtype is {dtype!r}; adapters are floating-point numbers, such as torch.float32")
        r = int(r)
        self.in_features, self.out_features, self.rank = base_layer.in_features, base_layer.out_features, r
        self.scaling, self.lora_dropout = lora_alpha / r, lora_dropout
        device = base_layer.weight.device
        # Drawn on the CPU in float32, whatever the device and the dtype: a seed means the same adapter everywhere.
        lora_A = torch.empty(r, self.in_features, dtype=torch.float32, device="cpu")
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        self.lora_A = nn.Parameter(lora_A.to(device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device, dtype=dtype))
        self.gate = nn.Parameter(torch.ones(r, device=device, dtype=dtype))
        self.base_layer: nn.Linear = base_layer.requires_grad_(False)

    @property
    def weight(self) -> Tensor:
        """The frozen base weight: some models read `proj.weight.dtype`."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        """y = W x + b + s · B (g ⊙ (A x)) for x (…, I): (…, O), in the dtype of the base layer's output."""
        base_layer, lora_A, lora_B = self.base_layer, self.lora_A, self.lora_B  # each lookup in a module takes time
        if lora_A is None or lora_B is None:
            return base_layer(x)
        dropout = self.dropout
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            return _traced(base_layer, x, lora_A, lora_B, self.gate, self.scaling, dropout)
        if self.shared_input is not None:
            x_to_base, u_RT = self.shared_input.down(self, x)
            return _between(base_layer, x, x_to_base, u_RT, lora_B, self.gate, self.scaling)
        seed = _draw_seed() if dropout > 0 else 0
        return add_branch(base_layer, x, lora_A, lora_B, self.gate, self.scaling, dropout, seed)

    @property
    def dropout(self) -> float:
        """The current probability of dropping an element of x: 0 in eval mode."""
        return self.lora_dropout if self.training else 0.0

    def cut(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Replace the branch by plain factors A (R', I), B (O, R') without a gate; R' = 0 removes it. s stays, and
        frozen factors stay frozen.

        Raises:
            ValueError: shapes that do not fit.
        """
        rank = lora_A.shape[0]
        if lora_A.shape != (rank, self.in_features) or lora_B.shape != (self.out_features, rank):
            raise ValueError(
                f"factors of shape {tuple(lora_A.shape)} and {tuple(lora_B.shape)} do not fit a linear layer "
                f"{self.in_features} → {self.out_features}"
            )
        device = self.base_layer.weight.device
        # Contiguous: gradients are, and DDP's buckets take the layout of the parameter.
        own_A, own_B = (
            factor.detach().clone(memory_format=torch.contiguous_format).to(device) for factor in (lora_A, lora_B)
        )
        for old in self.parameters(recurse=False):
            old.was_cut = True  # type: ignore[attr-defined]  # an optimizer that still holds it trains nothing
        trained = [old is None or old.requires_grad for old in (self.lora_A, self.lora_B)]
        # New parameters, not new data in the old ones: ZeRO hangs its bookkeeping on the old objects.
        self.lora_A = nn.Parameter(own_A, requires_grad=trained[0]) if rank else None
        self.lora_B = nn.Parameter(own_B, requires_grad=trained[1]) if rank else None
        self.gate, self.rank = None, rank

    def replace(self, lora_A: Tensor, lora_B: Tensor, gate: Tensor) -> None:
        """Replace the branch by a gated one with A (R, I), B (O, R) and gate (R,), R ≥ 1, in their dtype; s stays.

        Raises:
            ValueError: shapes that do not fit, or no slot.
        """
        if gate.shape != lora_A.shape[:1] or len(gate) == 0:
            raise ValueError(f"a gate of shape {tuple(gate.shape)} does not fit A of shape {tuple(lora_A.shape)}")
        is_trained = self.gate is None or self.gate.requires_grad
        self.cut(lora_A, lora_B)
        self.gate = nn.Parameter(gate.detach().clone().to(self.base_layer.weight.device), requires_grad=is_trained)

    def extra_repr(self) -> str:
        return f"r={self.rank}, scaling={self.scaling:g}, gated={self.gate is not None}"


class SharedInput:
    """Layers that read one x, such as q, k and v: the first one called computes u = A x for all of them.

    One product reads x once instead of once per layer, forward, for dA and for dx; so they share one backward pass, and
    activation checkpointing treats them together.  A result for a neighbour waits until it is called with the very same
    tensor; anything else starts over, so layers called in another way are slower but not wrong.  Factors that ZeRO-3
    has partitioned are available one at a time and stay separate.

    All of them share one dropout mask of x, even if they stay separate, so that strategies drop the same elements
    (except under torch.compile, and in DataParallel's replicas, where each layer has its own).

    Copying one of the layers also copies the others, to which it refers.
    """

    def __init__(self, layers: Sequence[SoraLinear]) -> None:
        self._layers = [weakref.ref(layer) for layer in layers]  # no cycle: a model is freed with its last reference
        self._waiting: _Waiting | None = None
        self._seed, self._to_mask = 0, set[int]()
        self._masked: StorageWeakRef | None = None

    def down(self, layer: SoraLinear, x: Tensor) -> tuple[Tensor, Tensor]:
        """x for the base layer, and u = A drop(x) as (R, T) of `layer`."""
        own_A, dropout = layer.lora_A, layer.dropout
        assert own_A is not None
        seed = self._seed_for(layer, x) if dropout > 0 else 0
        if self._waiting is not None and self._waiting.x is not x:
            self._waiting = None  # nothing will ask for it
        waiting = self._waiting
        u_RT = None if waiting is None else waiting.take(layer, own_A, x, dropout, seed)
        if waiting is None or u_RT is None:
            # An inference-mode x counts no changes; merely looking at another layer's A makes ZeRO-3 gather it.
            factors = {} if x.is_inference() or is_partitioned(own_A) else self._factors(own_A, dropout)
            if id(layer) not in factors or len(factors) == 1:  # alone, or a replica that DataParallel makes for a pass
                x_to_base, u_RT = _down(x, dropout, seed, own_A)
                return x_to_base, u_RT
            waiting = _Waiting.compute(x, dropout, seed, factors)
            u_RT = waiting.parts.pop(id(layer))[-1]
        self._waiting = waiting if waiting.parts else None
        return waiting.x_to_base, u_RT

    def _seed_for(self, layer: SoraLinear, x: Tensor) -> int:
        """The seed of a layer's dropout mask: drawn when the first layer asks about an x, and given once to each other
        layer that asks about it.  ZeRO-3 gives each of them its own tensor, in the same memory."""
        memory = StorageWeakRef(x.untyped_storage())
        if id(layer) not in self._to_mask or memory != self._masked:
            ids = {id(other) for reference in self._layers if (other := reference()) is not None}
            if id(layer) not in ids:
                return _draw_seed()
            self._seed, self._masked, self._to_mask = _draw_seed(), memory, ids
        self._to_mask.discard(id(layer))
        return self._seed

    def _factors(self, own_A: Tensor, dropout: float) -> dict[int, Tensor]:
        """{id of a layer: its A} for the layers that share one product with `own_A`."""
        like, found = (own_A.dtype, own_A.device, own_A.shape[1]), dict[int, Tensor]()
        for reference in self._layers:
            layer = reference()
            if layer is None or layer.dropout != dropout or (A := layer.lora_A) is None:
                continue
            if (A.dtype, A.device, A.shape[1]) == like and not is_partitioned(A):
                found[id(layer)] = A
        return found

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the layers themselves, without waiting results."""
        return {"layers": [layer for reference in self._layers if (layer := reference()) is not None]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["layers"])  # type: ignore[misc]


def _state_of(tensor: Tensor) -> tuple[int, bool]:
    """The count of in-place changes, and whether a gradient is required.  A step of ZeRO-1/2, which writes through
    other views of the memory, is not counted: it happens between forward passes, whose x are different tensors."""
    return 0 if tensor.is_inference() else tensor._version, tensor.requires_grad and torch.is_grad_enabled()


@dataclass
class _Waiting:
    """Results from x for neighbours that have not asked yet: `parts` is {id of the layer: (A, its state, u (R, T))}."""

    x: Tensor
    state: tuple[Any, ...]
    x_to_base: Tensor
    parts: dict[int, tuple[Tensor, tuple[int, bool], Tensor]]

    @classmethod
    def compute(cls, x: Tensor, dropout: float, seed: int, factors: Mapping[int, Tensor]) -> _Waiting:
        """For all of `factors`, {id of the layer: its A}, in one product."""
        x_to_base, *us = _down(x, dropout, seed, *factors.values())
        parts = {one: (A, _state_of(A), u_RT) for (one, A), u_RT in zip(factors.items(), us, strict=True)}
        return cls(x, (dropout, seed, _state_of(x)), x_to_base, parts)

    def take(self, layer: SoraLinear, own_A: Tensor, x: Tensor, dropout: float, seed: int) -> Tensor | None:
        """The u of `layer`, which then has it; None if it would compute something else from x now."""
        if x is not self.x or id(layer) not in self.parts or self.state != (dropout, seed, _state_of(x)):
            return None
        A, state, u_RT = self.parts.pop(id(layer))
        return u_RT if A is own_A and state == _state_of(A) else None


def keep_live_slots(lora_A: Tensor, lora_B: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Drop the slots whose gate is exactly 0 and fold the other gates into the factors, half on each side.

    A ← diag(√|g|)·A, B ← B·diag(sign(g)·√|g|): B A is unchanged, and both factors continue training at one scale.
    Shapes (R, I), (O, R), (R,) → (R', I), (O, R').  Without a gate the factors come back as they are.
    """
    if gate is None:
        return lora_A, lora_B
    live = live_slots(lora_A, gate)
    root = gate[live].abs().sqrt()
    return root[:, None] * lora_A[live], lora_B[:, live] * (torch.sign(gate[live]) * root)


def fold(lora_A: Tensor, lora_B: Tensor, gate: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """Factors (A', B') of a plain LoRA of scale 1: ΔW = s · B diag(g) A = B' A', dead slots dropped.

    Computed in float64 and rounded once to float32.
    """
    gate64 = None if gate is None else gate.double()
    A64, B64 = keep_live_slots(lora_A.double(), lora_B.double(), gate64)
    return A64.float(), (scaling * B64).float()
