"""AdamW with the proximal step of the gates inside `step()`.

Inside, because that is the one place where every strategy (one process, DDP, ZeRO-1/2/3) has the reduced, clipped
gradient and the float32 master values in hand: a threshold applied to `model.gate` afterwards is undone by ZeRO's
master copy at the next step.  The prox is elementwise, so it is exact on any shard of a flattened group.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from sora_llm.sora import SoraLinear, soft_threshold

THRESHOLDS = ("decoupled", "proxgen", "constant")
FACTORS, GATES = "factors", "gates"  # the "name" of the parameter groups


class ProxAdamW(torch.optim.AdamW):
    """torch.optim.AdamW, then g ← S_τ(g) on every group that has a "sparse_lambda" λ > 0.

    τ by the group's "threshold", lr being the group's learning rate at this step:
        decoupled   lr · λ                   λ is a signal-to-noise level, useful in (0, 1)
        proxgen     lr · λ / (√v̂ + ε)        the L1 prox in Adam's metric (Yun et al. 2021, "Adaptive proximal
                                             gradient methods for structured neural networks")
        constant    λ                        the released SoRA script's rule; not scaled by the learning rate
    With λ = 0 the step is torch's AdamW bit for bit.

    Parameters of lower precision than float32 (bf16 adapters without ZeRO) get float32 masters, kept in the state as
    "master": AdamW and the prox act on those, and the parameter is their rounding (1 − 1e-3 is 1 in bf16).
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-3, **adamw: Any):
        super().__init__(params, lr=lr, **adamw)
        for group in self.param_groups:
            threshold = group.setdefault("threshold", "decoupled")
            if threshold not in THRESHOLDS:
                raise ValueError(f"threshold {threshold!r} is not one of {', '.join(THRESHOLDS)}")
            if group.setdefault("sparse_lambda", 0.0) < 0:
                raise ValueError(f"sparse_lambda is {group['sparse_lambda']}; it must not be negative")

    @torch.no_grad()
    def step(self, closure=None):
        """One AdamW step, then the prox.  Returns the closure's loss."""
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        else:
            loss = None
        low_precision = self._swap_in_masters()
        super().step()
        for group in self.param_groups:
            if group["sparse_lambda"] > 0:
                for gate in group["params"]:
                    if gate.grad is not None:
                        gate.copy_(soft_threshold(gate, self._tau(gate, group)))
        self._swap_out_masters(low_precision)
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which however casts the state to each parameter's dtype: masters and moments stay float32."""
        super().load_state_dict(state_dict)
        saved_keys = (key for group in state_dict["param_groups"] for key in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for key, param in zip(saved_keys, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name != "step" and param.dtype not in (torch.float32, torch.float64):
                    self.state[param][name] = value.detach().to(param.device, copy=True)

    def _tau(self, gate: Tensor, group: dict[str, Any]) -> float | Tensor:
        lr, sparse_lambda = float(group["lr"]), float(group["sparse_lambda"])
        if group["threshold"] == "constant":
            return sparse_lambda
        if group["threshold"] == "decoupled":
            return lr * sparse_lambda
        state = self.state[gate]
        bias_correction = 1.0 - group["betas"][1] ** float(state["step"])
        denominator = state["exp_avg_sq"].sqrt() / math.sqrt(bias_correction) + group["eps"]
        return lr * sparse_lambda / denominator

    def _swap_in_masters(self) -> list[tuple[list[Tensor], int, Tensor, Tensor]]:
        """Put a float32 master in the place of each low-precision parameter; returns what to put back."""
        swapped = []
        for group in self.param_groups:
            params = group["params"]
            for index, param in enumerate(params):
                if param.dtype in (torch.float32, torch.float64) or param.grad is None:
                    continue
                state = self.state.pop(param, {})
                master = state.pop("master", None)
                master = param.detach().float() if master is None else master
                master.grad = param.grad.float()
                if state:
                    self.state[master] = state
                params[index] = master
                swapped.append((params, index, param, master))
        return swapped

    def _swap_out_masters(self, swapped: list[tuple[list[Tensor], int, Tensor, Tensor]]) -> None:
        for params, index, param, master in swapped:
            master.grad = None
            param.copy_(master)
            params[index] = param
            self.state[param] = {**self.state.pop(master), "master": master}


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    gate_lr: float,
    sparse_lambda: float = 0.0,
    weight_decay: float = 0.0,
    threshold: str = "decoupled",
) -> list[dict[str, Any]]:
    """Parameter groups of an injected model: the factors A and B, then the gates (own rate, λ, no weight decay).

    After cutting there are no gates and only the first group is returned.  The order of parameters is that of the
    model's modules, the same on every process.

    Raises:
        ValueError: the model has no SoRA adapters.
    """
    layers = [module for module in model.modules() if isinstance(module, SoraLinear)]
    factors = [factor for layer in layers for factor in (layer.lora_A, layer.lora_B) if factor is not None]
    gates = [layer.gate for layer in layers if layer.gate is not None]
    if not factors:
        raise ValueError("the model has no SoRA adapters: call inject_sora(model) first")
    groups: list[dict[str, Any]] = [
        {"name": FACTORS, "params": factors, "lr": learning_rate, "weight_decay": weight_decay}
    ]
    if gates:
        gate_options = {"lr": gate_lr, "weight_decay": 0.0, "sparse_lambda": sparse_lambda, "threshold": threshold}
        groups.append({"name": GATES, "params": gates, **gate_options})
    return groups
