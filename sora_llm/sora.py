"""The SoRA adapter in pure torch: LoRA with a gate per rank.

    y = W x + s · B (g ⊙ (A x))        A (R, I)   B (O, R)   g (R,)   s = lora_alpha / r

Shape suffixes: T tokens (batch and positions flattened), I in, O out, R rank.
Source: Ding et al., "Sparse Low-rank Adaptation of Pre-trained Language Models", EMNLP 2023, arXiv 2311.11696.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def soft_threshold(z: Tensor, tau: float | Tensor) -> Tensor:
    """S_τ(z) = sign(z) · max(|z| − τ, 0), the proximal map of τ|·|; `tau` ≥ 0 is a number or broadcasts with `z`.

    What dies becomes +0, never −0: ZeRO's gathers would turn that into +0, and bits are compared between strategies.
    """
    return z - z.clamp(min=-tau, max=tau)  # type: ignore[arg-type]  # both bounds are of one type


def hard_threshold(z: Tensor, importance: Tensor, tau: float) -> Tensor:
    """z where |z| · importance > τ, else 0: the prox of an ℓ0 penalty.

    As a product, so that an importance of 0 is a threshold of infinity.
    """
    return z.masked_fill(z.abs() * importance <= tau, 0.0)


class SoraBranch(torch.autograd.Function):
    """y + s · B (g ⊙ (A drop(x))) in one autograd node.

    Saved for the backward pass are x itself (the tensor its neighbours q/k/v or gate/up also hold, never a copy or a
    float32 cast of it) and the narrow u = A drop(x); the dropout mask is drawn again from its seed.  The factors are
    cast to x's dtype here and once more in backward, so float32 adapters serve a bf16 backbone.
    """

    @staticmethod
    def forward(ctx, y, x, lora_A, lora_B, gate, scaling, dropout, seed):
        x_TI = x.reshape(-1, x.shape[-1])
        u_TR = _drop(x_TI, dropout, seed) @ lora_A.to(x.dtype).T
        h_TR = u_TR if gate is None else u_TR * gate.to(x.dtype)
        ctx.save_for_backward(x, u_TR, lora_A, lora_B, gate)
        ctx.scaling, ctx.dropout, ctx.seed, ctx.y_dtype = scaling, dropout, seed, y.dtype
        if y.dtype != x.dtype:  # a quantised layer may answer in another dtype than it was asked in
            return y + (scaling * (h_TR @ lora_B.to(x.dtype).T)).to(y.dtype).view(y.shape)
        y_TO = y.reshape(-1, y.shape[-1])
        return torch.addmm(y_TO, h_TR, lora_B.to(x.dtype).T, alpha=scaling).view(y.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, u_TR, lora_A, lora_B, gate = ctx.saved_tensors
        need_y, need_x, need_A, need_B, need_g = ctx.needs_input_grad[:5]
        x_TI = x.reshape(-1, x.shape[-1])
        dy_TO = dy.reshape(-1, dy.shape[-1]).to(x.dtype)
        g_R = None if gate is None else gate.to(x.dtype)

        h_TR = u_TR if g_R is None else u_TR * g_R
        dB = (ctx.scaling * (dy_TO.T @ h_TR)).to(lora_B.dtype) if need_B else None
        dh_TR = ctx.scaling * (dy_TO @ lora_B.to(x.dtype))
        dg = (dh_TR * u_TR).sum(0, dtype=torch.promote_types(gate.dtype, torch.float32)) if need_g else None
        du_TR = dh_TR if g_R is None else dh_TR * g_R
        dA = (du_TR.T @ _drop(x_TI, ctx.dropout, ctx.seed)).to(lora_A.dtype) if need_A else None
        dx = _drop(du_TR @ lora_A.to(x.dtype), ctx.dropout, ctx.seed).view(x.shape) if need_x else None
        dg = None if dg is None else dg.to(gate.dtype)
        return dy if need_y else None, dx, dA, dB, dg, None, None, None


def _drop(x_TI: Tensor, dropout: float, seed: int) -> Tensor:
    """Inverted dropout whose mask is a function of `seed` alone (so backward draws it again instead of keeping it)."""
    if dropout == 0.0:
        return x_TI
    generator = torch.Generator(device=x_TI.device)
    generator.manual_seed(seed)
    keep_TI = torch.empty_like(x_TI).bernoulli_(1.0 - dropout, generator=generator)
    return x_TI * keep_TI.div_(1.0 - dropout)


@torch.compiler.disable
def _branch_with_dropout(y, x, lora_A, lora_B, gate, scaling, dropout):
    # The seed comes from torch's own generator, which activation checkpointing restores before it recomputes.
    seed = int(torch.randint(2**62, (1,)).item())
    return SoraBranch.apply(y, x, lora_A, lora_B, gate, scaling, dropout, seed)


class SoraLinear(nn.Module):
    """A frozen linear layer and its gated low-rank branch.

    Args:
        base_layer: nn.Linear or a bitsandbytes 4-bit / 8-bit linear, I = in_features, O = out_features; it is frozen.
        r: number of slots R at the start.
        lora_alpha: s = lora_alpha / r, fixed for the layer's life, also after cutting.
        lora_dropout: probability of dropping an element of x before A, in training mode only.
        dtype: of `lora_A` (R, I), `lora_B` (O, R) and `gate` (R,); they are cast to x's dtype inside the forward.

    A starts Kaiming-uniform as in LoRA, B at 0, the gate at 1, so the wrapped layer starts as the base layer.
    After `cut`, `gate` is None (folded into the factors), and a layer cut to rank 0 has no branch at all.  `rank` is
    the number of slots, which a parameter that ZeRO-3 has partitioned no longer tells.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None
    gate: nn.Parameter | None

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ):
        super().__init__()
        if r < 1:
            raise ValueError(f"r is {r}; a SoRA layer starts with at least one slot")
        self.base_layer: nn.Linear = base_layer.requires_grad_(False)
        self.in_features, self.out_features, self.rank = base_layer.in_features, base_layer.out_features, r
        self.scaling, self.lora_dropout = lora_alpha / r, lora_dropout
        device = base_layer.weight.device
        # Drawn on the CPU whatever the device, so that a seed means the same adapter everywhere.
        lora_A = torch.empty(r, self.in_features)
        nn.init.kaiming_uniform_(lora_A, a=math.sqrt(5))
        self.lora_A = nn.Parameter(lora_A.to(device, dtype))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, device=device, dtype=dtype))
        self.gate = nn.Parameter(torch.ones(r, device=device, dtype=dtype))

    @property
    def weight(self) -> Tensor:
        """The frozen base weight: some models look at `proj.weight.dtype`."""
        return self.base_layer.weight

    @property
    def bias(self) -> Tensor | None:
        return self.base_layer.bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.base_layer(x)
        if self.lora_A is None:
            return y
        if self.training and self.lora_dropout > 0:
            return _branch_with_dropout(y, x, self.lora_A, self.lora_B, self.gate, self.scaling, self.lora_dropout)
        return SoraBranch.apply(y, x, self.lora_A, self.lora_B, self.gate, self.scaling, 0.0, 0)

    def cut(self, lora_A: Tensor, lora_B: Tensor) -> None:
        """Replace the branch by plain factors A (R', I), B (O, R') without a gate; R' = 0 removes it. s stays."""
        rank = lora_A.shape[0]
        if lora_A.shape != (rank, self.in_features) or lora_B.shape != (self.out_features, rank):
            raise ValueError(
                f"factors of shape {tuple(lora_A.shape)} and {tuple(lora_B.shape)} do not fit a linear layer "
                f"{self.in_features} → {self.out_features}"
            )
        device = self.base_layer.weight.device
        self.gate, self.rank = None, rank
        # New parameters, not new data in the old ones: ZeRO hangs its bookkeeping on the old objects.
        self.lora_A = nn.Parameter(lora_A.detach().clone().to(device)) if rank else None
        self.lora_B = nn.Parameter(lora_B.detach().clone().to(device)) if rank else None

    def replace(self, lora_A: Tensor, lora_B: Tensor, gate: Tensor) -> None:
        """Replace the branch by a gated one of A (R, I), B (O, R) and gate (R,), in their dtype; s stays."""
        self.cut(lora_A, lora_B)
        self.gate = nn.Parameter(gate.detach().clone().to(self.base_layer.weight.device))

    def extra_repr(self) -> str:
        return f"r={self.rank}, scaling={self.scaling:g}, gated={self.gate is not None}"


def keep_live_slots(lora_A: Tensor, lora_B: Tensor, gate: Tensor | None) -> tuple[Tensor, Tensor]:
    """Drop the slots whose gate is exactly 0 and fold the other gates into the factors, half on either side.

    A ← diag(√|g|)·A, B ← B·diag(sign(g)·√|g|): B A is unchanged, and both factors go on training at one scale.
    Shapes (R, I), (O, R), (R,) → (R', I), (O, R').  Without a gate the factors come back as they are.
    """
    if gate is None:
        return lora_A, lora_B
    live = gate != 0
    root = gate[live].abs().sqrt()
    return root[:, None] * lora_A[live], lora_B[:, live] * (torch.sign(gate[live]) * root)


def fold(lora_A: Tensor, lora_B: Tensor, gate: Tensor | None, scaling: float) -> tuple[Tensor, Tensor]:
    """Factors (A', B') of a plain LoRA of scale 1: ΔW = s · B diag(g) A = B' A', dead slots dropped.

    Computed in float64 and rounded once to float32.
    """
    gate64 = None if gate is None else gate.double()
    A64, B64 = keep_live_slots(lora_A.double(), lora_B.double(), gate64)
    return A64.float(), (scaling * B64).float()
