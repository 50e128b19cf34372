"""AdamW with the proximal step of the gates inside `step()`.

Inside, because only there does every strategy (one process, DDP, ZeRO-1/2/3) have both the reduced, clipped gradient
and the float32 master values: a threshold applied to `model.gate` afterwards is undone by ZeRO's master copy at the
next step.  The prox is elementwise, so it is exact on any shard of a flattened group.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sora_llm.inject import adapters
from sora_llm.sora import hard_threshold, is_sharded, soft_threshold
from sora_llm.values import is_number

THRESHOLDS = ("decoupled", "proxgen", "constant", "adaptive")
FACTORS, GATES = "factors", "gates"  # the "name" of the parameter groups
IMPORTANCE = "importance"
"""State of a gate under "adaptive": a tensor like a moment, so that it is sharded, read and saved by the same calls."""
IMPORTANCE_SUFFIX = f".gate.{IMPORTANCE}"
"""The suffix after a module's name in named states."""
TAU_SUM = "tau_sum"
"""State of a gate whose prox is deferred: Σ τ_t of the steps since then."""
STEPS_TAKEN = "rank_scheduler_steps"
"""Option of the gates' groups that a RankScheduler follows: the number of steps taken."""


class ProxAdamW(torch.optim.AdamW):
    """torch.optim.AdamW, then g ← S_τ(g) on every group with a "sparse_lambda" λ > 0 (proximal gradient as in SoRA,
    Ding et al. 2023).

    Give it `parameter_groups(model, …)`; its own arguments are AdamW's (lr, betas, eps, weight_decay, amsgrad, …) and
    are the defaults of the groups.  Weight decay shrinks gates too, unless their group sets it to 0.

    τ by the group's "threshold", lr being the group's learning rate at this step:
        decoupled   lr · λ                   λ is a signal-to-noise level, useful in (0, 1)
        proxgen     lr · λ / (√v̂ + ε)        the L1 prox in Adam's metric (Yun et al. 2021, "Adaptive proximal
                                             gradient methods for structured neural networks")
        constant    λ                        the released SoRA script's rule; not scaled by the learning rate
        adaptive    λ / importance, hard: gates above it are not shrunk (the prox of an ℓ0 penalty).  λ is a quantile
                    that the caller chooses (a run, or `RankScheduler`), importance a tensor of the gate's state.
    With λ = 0 the step is torch's AdamW bit for bit.  In a group with "deferred", nothing is cut: τ is summed in the
    state of each gate, for a caller that takes local updates and cuts when replicas synchronise.

    Parameters of lower precision than float32 (bf16 adapters without ZeRO) get float32 masters, kept in the state as
    "master": AdamW and the prox act on those, and the parameter is their rounded value (1 − 1e-3 is 1 in bf16).  A
    parameter whose values were written since (load_state_dict, a gate set by hand) continues from those.

    Before torch.distributed.checkpoint.state_dict loads into a fresh optimizer, it takes a step of rate 0, in which
    `constant` thresholds the gates and a RankScheduler counts: load the model's values after the optimizer's.

    Raises:
        ValueError: also from `step`, before anything is changed: an unknown threshold, a rate or λ that is not a number
            >= 0, adaptive gates that are deferred with a λ > 0, or that have no importance in their state; from `step`
            alone: parameters that fully_shard has sharded.
        RuntimeError: from `step`: the adapters have been cut, and this optimizer holds the parameters from before, or
            its state is from one with a RankScheduler, which this one lacks.
    """

    rank_scheduler: Any = None
    """The RankScheduler that follows its steps."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        param_group.setdefault("threshold", "decoupled")
        param_group.setdefault("sparse_lambda", 0.0)
        _check_group(param_group)
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure=None):
        """One AdamW step, then the prox.  Returns the closure's loss."""
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        else:
            loss = None
        self._check_groups()
        low_precision = self._swap_in_masters()
        try:
            _step_of_adamw()(self)
            found_inf = getattr(self, "found_inf", None)  # from a GradScaler, which leaves skipping to fused optimizers
            if found_inf is None or not bool(found_inf):
                for group in self.param_groups:
                    gates = [gate for gate in group["params"] if gate.grad is not None]
                    if group["sparse_lambda"] > 0 and gates:
                        self._prox(gates, group)
        finally:  # a loop that continues after an error (out of memory) would train only the masters
            self._swap_out_masters(low_precision)
        return loss

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Like torch's, which however casts the state to each parameter's dtype: here masters and moments stay float32.
        Group options missing from the state of another AdamW, such as λ, stay as they are; steps followed by a
        RankScheduler begin anew."""
        own = [{key: value for key, value in group.items() if key != "params"} for group in self.param_groups]
        super().load_state_dict(state_dict)
        for group, options in zip(self.param_groups, own, strict=True):
            for key, value in options.items():
                group.setdefault(key, 0 if key == STEPS_TAKEN else value)
        saved_keys = (key for group in state_dict["param_groups"] for key in group["params"])
        params = (param for group in self.param_groups for param in group["params"])
        for key, param in zip(saved_keys, params, strict=True):
            for name, value in state_dict["state"].get(key, {}).items():
                if name != "step" and _has_master(param):
                    self.state[param][name] = value.detach().to(param.device, copy=True)

    def master(self, param: Tensor) -> Tensor:
        """The float32 value of a parameter, from which the next step continues if nothing else writes it."""
        master: Tensor = self.state.get(param, {}).get("master", param)
        return master.detach().float()

    @torch.no_grad()
    def write(self, param: Tensor, value: Tensor) -> None:
        """Set the float32 value of a parameter, from which the next step continues; its state is kept."""
        param.copy_(value)
        if _has_master(param):
            self.state[param]["master"] = value.to(param.device, torch.float32, copy=True)
        else:
            self.state.get(param, {}).pop("master", None)  # from when it was lower

    @torch.no_grad()
    def restore(
        self,
        values: Mapping[Tensor, Tensor],
        state: Mapping[Tensor, Mapping[str, Tensor]],
        num_steps: int = 0,
    ) -> None:
        """Set float32 `values` of parameters and their state after `num_steps` steps; moments that `state` lacks are 0,
        as before the first step."""
        for group in self.param_groups:
            on_device = group["fused"] or group["capturable"]
            moments = ("exp_avg", "exp_avg_sq", *(("max_exp_avg_sq",) if group["amsgrad"] else ()))
            for param in (param for param in group["params"] if param in values):
                own = {key: value.to(param.device, copy=True) for key, value in state.get(param, {}).items()}
                for moment in moments:
                    if moment not in own:
                        dtype = torch.promote_types(param.dtype, torch.float32)
                        own[moment] = torch.zeros_like(param, dtype=dtype)
                own["step"] = torch.tensor(num_steps, dtype=torch.float32, device=param.device if on_device else None)
                self.state[param] = own
                self.write(param, values[param])

    def _check_groups(self) -> None:
        """ValueError for a group that was edited into an invalid state, RuntimeError for parameters that the model no
        longer has; before anything is changed."""
        for group in self.param_groups:
            _check_group(group)
            if any(map(is_sharded, group["params"])):
                raise ValueError(
                    "parameters are sharded by fully_shard, which the prox does not support: use DDP, or ZeRO"
                )
            if any(getattr(param, "was_cut", False) for param in group["params"]):
                raise RuntimeError(
                    "this optimizer holds the parameters from before the adapters were cut and would train nothing: "
                    "make a new one from parameter_groups(model, …)"
                )
            if STEPS_TAKEN in group and self.rank_scheduler is None:
                raise RuntimeError(
                    "this optimizer's state is from one with a RankScheduler, without which no threshold would be "
                    "chosen: make one for this optimizer, too (copies of an optimizer have none)"
                )
            if group["threshold"] == "adaptive" and group["sparse_lambda"] > 0:
                gates = [gate for gate in group["params"] if gate.grad is not None]
                if not all(IMPORTANCE in self.state.get(gate, {}) for gate in gates):
                    raise ValueError(
                        "adaptive thresholds need an importance in the state of each gate, and a λ for each step: "
                        "leave both to a RankScheduler"
                    )

    def _prox(self, gates: list[Tensor], group: dict[str, Any]) -> None:
        """The prox of a group's gates, one vector per device: separately, each would take several launches on a GPU."""
        if group.get("deferred", False):
            for gate in gates:
                self._defer(gate, self._tau(gate, group))
            return
        for device in dict.fromkeys(gate.device for gate in gates):
            self._prox_on_device([gate for gate in gates if gate.device == device], group)

    def _prox_on_device(self, gates: list[Tensor], group: dict[str, Any]) -> None:
        if group["threshold"] == "adaptive":
            importance = _together([self.state[gate][IMPORTANCE] for gate in gates])
            cut = hard_threshold(_together(gates), importance, group["sparse_lambda"])
        else:
            taus = [self._tau(gate, group) for gate in gates]
            tau = _together(taus) if isinstance(taus[0], Tensor) else taus[0]
            cut = soft_threshold(_together(gates), tau)
        parts = cut.split([gate.numel() for gate in gates])
        torch._foreach_copy_(gates, [part.view_as(gate) for part, gate in zip(parts, gates, strict=True)])

    def _defer(self, gate: Tensor, tau: float | Tensor) -> None:
        state = self.state[gate]
        state[TAU_SUM] = state.get(TAU_SUM, torch.zeros_like(gate)) + tau

    def _tau(self, gate: Tensor, group: dict[str, Any]) -> float | Tensor:
        lr, sparse_lambda = float(group["lr"]), float(group["sparse_lambda"])
        if group["threshold"] == "constant":
            return sparse_lambda
        if group["threshold"] == "decoupled":
            return lr * sparse_lambda
        assert group["threshold"] == "proxgen"
        state = self.state[gate]
        bias_correction = 1.0 - group["betas"][1] ** float(state["step"])
        second_moment = state["max_exp_avg_sq" if group["amsgrad"] else "exp_avg_sq"]
        denominator = second_moment.sqrt() / math.sqrt(bias_correction) + group["eps"]
        # A gate that never had a gradient (B is still 0) has no metric: over eps alone any λ would prune it, blindly.
        return torch.where(second_moment == 0, 0.0, lr * sparse_lambda / denominator)

    def _swap_in_masters(self) -> list[tuple[list[Tensor], int, Tensor, Tensor]]:
        """Put a float32 master in the place of each low-precision parameter; returns what to swap back."""
        swapped = []
        for group in self.param_groups:
            params = group["params"]
            for index, param in enumerate(params):
                if param.grad is None:
                    continue
                if not _has_master(param):
                    self.state[param].pop("master", None)  # from when it was lower
                    continue
                state = self.state.pop(param, {})
                master, value = state.pop("master", None), param.detach().float()
                # If a parameter is no longer its master rounded, something else has written to it.
                master = value if master is None else torch.where(master.to(param.dtype) == param, master, value)
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
            self.state[param] = {**self.state.pop(master, {}), "master": master}


def _has_master(param: Tensor) -> bool:
    """Whether a float32 master is kept of a parameter: its precision is lower."""
    return param.dtype not in (torch.float32, torch.float64)


def _check_group(group: Mapping[str, Any]) -> None:
    """ValueError for an unknown threshold, a rate, λ or decay that is not a number >= 0, or adaptive λ > 0 deferred."""
    if group["threshold"] not in THRESHOLDS:
        raise ValueError(f"threshold {group['threshold']!r} is not one of {', '.join(THRESHOLDS)}")
    for key in ("lr", "sparse_lambda", "weight_decay"):
        value = group.get(key, 0.0)  # torch checks the defaults
        if key == "lr" and isinstance(value, Tensor) and not value.is_cpu:
            continue  # for CUDA graphs: reading it would wait for the device
        if (not isinstance(value, Tensor) and not is_number(value)) or not 0 <= value < math.inf:
            of_group = f" of the group {group['name']}" if "name" in group else ""
            raise ValueError(f"{key}{of_group} is {value!r}; it must be a number >= 0")
    if group["threshold"] == "adaptive" and group["sparse_lambda"] > 0 and group.get("deferred", False):
        raise ValueError(
            "an adaptive threshold cannot be deferred: its τ is a quantile, not the sum of the steps' own; leave "
            "sparse_lambda at 0 and cut the gates when they are agreed, or use another threshold"
        )


def _step_of_adamw() -> Callable[..., Any]:
    """AdamW's step without the hooks that the first AdamW of a process puts around it: our own step has them."""
    step = torch.optim.AdamW.step
    return step.__wrapped__ if getattr(step, "hooked", False) else step  # type: ignore[attr-defined]


def _together(tensors: list[Any]) -> Tensor:
    return torch.cat([tensor.flatten() for tensor in tensors])


def importance_by_module(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """{module: (R,)}, the entries of `state` named "MODULE.gate.importance"."""
    return {
        name.removesuffix(IMPORTANCE_SUFFIX): values
        for name, values in state.items()
        if name.endswith(IMPORTANCE_SUFFIX)
    }


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    gate_lr: float,
    sparse_lambda: float = 0.0,
    weight_decay: float = 0.0,
    threshold: str = "decoupled",
    budgets: Mapping[str, Collection[str]] | None = None,
    deferred: bool = False,
) -> list[dict[str, Any]]:
    """Parameter groups of an injected model: the factors A and B, then the gates (own rate, λ, no weight decay).

    Args:
        learning_rate, gate_lr: of the factors and of the gates; "lr" of their groups, for a schedule to change.
        sparse_lambda: λ ≥ 0 of the gates, the "sparse_lambda" of their group.
        threshold: the meaning of λ, as listed in `ProxAdamW`.
        weight_decay: of the factors.
        budgets: {name: modules}; the gates of each form their own group, with its name as "budget".
        deferred: leave the prox to the caller (`ProxAdamW`).

    Returns: groups with "name" "factors" and "gates", for ProxAdamW.  After cutting there are no gates, so only the
    first group.  The order of parameters is that of the model's modules, the same on every process.
    Raises:
        ValueError: the model has no SoRA adapters, all their ranks were cut or all are frozen, or budgets that do not
            name every gated module exactly once.
    """
    layers = adapters(model)
    factors = [factor for layer in layers.values() for factor in (layer.lora_A, layer.lora_B) if factor is not None]
    if not layers:
        raise ValueError("the model has no SoRA adapters: call inject_sora(model) first")
    if not factors:
        raise ValueError("every rank of the adapters was cut: there is nothing left to train")
    if not any(parameter.requires_grad for layer in layers.values() for parameter in layer.parameters(recurse=False)):
        raise ValueError(
            "the adapters are frozen, so nothing would be trained: freeze the base (for example with "
            "prepare_model_for_kbit_training) before inject_sora"
        )
    groups: list[dict[str, Any]] = [
        {"name": FACTORS, "params": factors, "lr": learning_rate, "weight_decay": weight_decay}
    ]
    gate_options = {"lr": gate_lr, "weight_decay": 0.0, "sparse_lambda": sparse_lambda, "threshold": threshold}
    if deferred:
        gate_options["deferred"] = True
    if budgets is not None:
        times = Counter(name for members in budgets.values() for name in members)
        odd = [name for name, layer in layers.items() if layer.gate is not None and times.pop(name, 0) != 1]
        odd += [name for name in times if name not in layers]
        if odd:
            raise ValueError(
                f"budgets must name every gated module exactly once and nothing else; {odd[0]} breaks that"
            )
    everything: dict[str | None, Collection[str]] = {None: layers}
    for budget, members in (budgets or everything).items():
        gates = [layers[name].gate for name in layers if name in members and layers[name].gate is not None]
        if gates:
            named = {} if budget is None else {"budget": budget}
            groups.append({"name": GATES, **named, "params": gates, **gate_options})
    return groups
