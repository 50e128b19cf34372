"""A model and its optimizer under one strategy: float32 masters, reduced and clipped gradients, sharded state."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sora_llm.compiled import CompiledBlocks
from sora_llm.distributed.collectives import ALL, gather_objects, in_process_group, require_agreement
from sora_llm.distributed.replicas import Replicas, within
from sora_llm.distributed.zero import ZeroShards, gathered
from sora_llm.errors import RunFailed
from sora_llm.factors import on_cpu
from sora_llm.hashes import fingerprints
from sora_llm.inject import adapter_parameters, adapters
from sora_llm.loss_scale import LossScale
from sora_llm.optim import GATES, IMPORTANCE, TAU_SUM, ProxAdamW
from sora_llm.reread_weights import keep_weights, reread_weights_in_backward
from sora_llm.topology import ZERO_STAGES

MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepOutcome:
    """A step's outcome: `grad_norm` is the global L2 norm before clipping; if it is not finite, the step is skipped."""

    grad_norm: float
    skipped: bool


class Engine:
    """A model and its ProxAdamW under one strategy: the same four calls for one process, DDP and ZeRO-1/2/3.

    `model` is the callable for the loop, `module` the same without wrappers, `optimizer` the ProxAdamW itself, whose
    `param_groups` carry lr and λ.  With `replicas` (only none and ddp) it belongs to this replica: values, moments and
    gradients are its own until `write` makes them equal everywhere.  Gradients are accumulated, reduced and clipped
    without the `loss_scale`.  `compiled_blocks` are those of `model`, for micro-batches.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: ProxAdamW,
        strategy: str,
        max_grad_norm: float | None,
        replicas: Replicas | None = None,
        loss_scale: LossScale | None = None,
        compiled_blocks: CompiledBlocks | None = None,
    ):
        gates_before = {
            name: p.detach().clone() for name, p in adapter_parameters(model).items() if name.endswith(".gate")
        }
        self.accelerator, self.strategy, self.max_grad_norm = accelerator, strategy, max_grad_norm
        self.module, self.optimizer, self.replicas = model, optimizer, replicas
        self._has_importance = self.is_closed = False
        self._zero: ZeroShards | None = None
        self._adapter_parameters = adapter_parameters(model)
        self.loss_scale = LossScale(is_needed=False) if loss_scale is None else loss_scale
        self._compiled_blocks = compiled_blocks
        self._unscaling: list[Any] = []
        if self.loss_scale.is_needed:
            self._unscaling = [p.register_hook(self.loss_scale.unscale) for p in self._adapter_parameters.values()]
        if strategy == "zero3":
            reread_weights_in_backward(model)
        if replicas is None:
            self.model, prepared_optimizer = accelerator.prepare(model, optimizer)
        else:  # gradients stay inside the replica, and accelerate only knows the whole world
            self.model, prepared_optimizer = within(replicas, model), accelerator.prepare(optimizer)
        inner = prepared_optimizer.optimizer
        if self.is_zero:
            sharding, inner = inner, inner.optimizer  # DeepSpeed's sharding optimizer wraps ours
            parameters, is_stage_3 = self._adapter_parameters, strategy == "zero3"
            self._zero = ZeroShards(accelerator, sharding, optimizer, parameters, is_stage_3=is_stage_3)
            assert self.model.zero_optimization_stage() == ZERO_STAGES[strategy]
        assert inner is optimizer, f"the optimizer was replaced by {type(inner).__name__}: the prox would be gone"
        self._assert_gates_untouched(gates_before)

    @property
    def is_zero(self) -> bool:
        return self.strategy in ZERO_STAGES

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def zero_stage(self) -> int | None:
        """The stage that DeepSpeed's engine runs, None without DeepSpeed."""
        return int(self.model.zero_optimization_stage()) if self.is_zero else None

    def set_rates(self, learning_rate: float, gate_lr: float, sparse_lambda: float | Mapping[str, float]) -> None:
        """Write this step's learning rates and λ (one, or one per budget) into the optimizer's groups."""
        for group in self.optimizer.param_groups:
            gated = group["name"] == GATES
            group["lr"] = gate_lr if gated else learning_rate
            own = sparse_lambda[group["budget"]] if gated and isinstance(sparse_lambda, Mapping) else sparse_lambda
            group["sparse_lambda"] = own if gated else 0.0

    @contextlib.contextmanager
    def micro_batch(self, last: bool) -> Iterator[None]:
        """Context of one forward and backward pass; gradients are reduced after the `last` one of a step."""
        with contextlib.ExitStack() as contexts:
            if self._compiled_blocks is not None:
                contexts.enter_context(self._compiled_blocks.active())
            if self.is_zero:
                self.model.set_gradient_accumulation_boundary(is_boundary=last)
            elif not last:
                contexts.enter_context(self.accelerator.no_sync(self.model))
            yield

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of `loss`; they are averaged over processes."""
        if self.loss_scale.is_needed:
            loss = loss * self.loss_scale.factor
        if self.is_zero:
            self.model.backward(loss)
        else:
            loss.backward()

    def step(self) -> StepOutcome:
        """Clip, step, prox, zero the gradients; only the last of these if the global gradient norm is not finite."""
        if self._zero is not None:
            self.model.step()
            return StepOutcome(float(self.model.get_global_grad_norm()), skipped=self._zero.is_skipped)
        norm = self._clip()
        finite = norm not in (float("inf"), float("-inf")) and norm == norm
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutcome(norm, skipped=not finite)

    def _clip(self) -> float:
        """Scale the gradients down to `max_grad_norm`; returns their norm before.  Computed in at least float32:
        torch's own clipping uses bfloat16 gradients' dtype for norm and factor, which are then off by up to 0.4 %."""
        gradients = self._gradients()
        fine = [gradient.to(torch.promote_types(gradient.dtype, torch.float32)) for gradient in gradients]
        norm = float(torch.nn.utils.get_total_norm(fine))
        factor = (self.max_grad_norm or float("inf")) / (norm + 1e-6)  # as in torch and DeepSpeed
        if factor < 1:
            for gradient in gradients:
                gradient.mul_(factor)  # `_foreach_mul_` rounds the factor to the gradients' dtype
        return norm

    def _gradients(self) -> list[Tensor]:
        """Every adapter tensor's gradient; 0 if no token has passed it, as under ZeRO: its gate is pruned, too."""
        gradients = []
        for p in self._adapter_parameters.values():
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            gradients.append(p.grad)
        return gradients

    # ------------------------------------------------------------------------------------------ reading and writing

    def gates(self) -> dict[str, Tensor]:
        """{module: gate (R,)} on the CPU, as the model uses them (collective under ZeRO-3)."""
        gates = {name: layer.gate for name, layer in adapters(self.module).items() if layer.gate is not None}
        with self._whole(list(gates.values())):
            return on_cpu(gates)

    def values(self) -> dict[str, Tensor]:
        """The float32 values of every adapter tensor by name, on the device, as the optimizer holds them; not ZeRO."""
        assert not self.is_zero
        return {name: self.optimizer.master(p) for name, p in self._adapter_parameters.items()}

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Set float32 values of adapter tensors; lower-precision tensors get them rounded; not ZeRO."""
        assert not self.is_zero
        for name, value in values.items():
            self.optimizer.write(self._adapter_parameters[name], value)

    def take_thresholds(self) -> dict[str, Tensor]:
        """{module: Σ τ_t (R,)} of the proxes deferred since the last call, float32."""
        taken = {}
        for name, layer in adapters(self.module).items():
            if layer.gate is not None:
                deferred = self.optimizer.state.get(layer.gate, {}).pop(TAU_SUM, None)
                taken[name] = torch.zeros_like(layer.gate, dtype=torch.float32) if deferred is None else deferred
        return taken

    def masters(self) -> dict[str, Tensor]:
        """The float32 value of every adapter tensor, by "<module>.lora_A|lora_B|gate", on the CPU (collective)."""
        if self.is_closed:
            return {name: p.detach().float().cpu().clone() for name, p in adapter_parameters(self.module).items()}
        if self._zero is not None:
            return self._zero.masters()
        return {name: value.cpu().clone() for name, value in self.values().items()}

    def optimizer_state(self) -> tuple[dict[str, Tensor], int]:
        """The optimizer's tensors for every adapter tensor as "<tensor>.exp_avg", ".exp_avg_sq" and, for gates under
        "adaptive", ".importance", for gates whose prox is deferred ".tau_sum"; and its number of steps (collective).
        Empty before the first step."""
        if not any(MOMENTS[0] in state for state in self.optimizer.state.values()):
            return {}, 0
        found = {}
        if self._zero is not None:
            self._zero.link()
        for name, p in self._adapter_parameters.items():
            deferred = (TAU_SUM,) if TAU_SUM in self.optimizer.state.get(p, {}) else ()
            for key in (*self._state_of(name), *deferred):
                found[f"{name}.{key}"] = self._read_state(p, key).cpu().clone()
        return found, self.num_optimizer_steps

    def _state_of(self, name: str) -> tuple[str, ...]:
        return self._state_of_gates if name.endswith(".gate") else MOMENTS

    @property
    def _state_of_gates(self) -> tuple[str, ...]:
        return (*MOMENTS, IMPORTANCE) if self._has_importance else MOMENTS

    def _read_state(self, p: nn.Parameter, key: str) -> Tensor:
        if self._zero is not None:
            return self._zero.state(p, key)
        state: Tensor = self.optimizer.state[p][key].detach()
        return state

    @property
    def num_optimizer_steps(self) -> int:
        """Steps taken by the optimizer (skipped ones are not counted)."""
        steps = {int(state["step"]) for state in self.optimizer.state.values() if "step" in state}
        assert len(steps) <= 1, f"parameters disagree about the number of steps: {steps}"
        return steps.pop() if steps else 0

    def load(self, masters: Mapping[str, Tensor], state: Mapping[str, Tensor], num_steps: int) -> None:
        """Restore the results of `masters` and `optimizer_state` (collective under ZeRO).

        Under ZeRO the module must have held `masters` before it was prepared: writing masters alone would leave the
        model's copies stale until the next step.  Moments missing from `state` are zero, as in a fresh optimizer.
        """
        self._has_importance = any(name.endswith(f".{IMPORTANCE}") for name in state)
        if self._zero is not None:
            for name, p in self._adapter_parameters.items():
                self._zero.write(p, masters[name])
            if state:
                self._zero.begin_state(num_steps, MOMENTS, self._state_of_gates)
            for name, p in self._adapter_parameters.items():
                for key in self._state_of(name):
                    if f"{name}.{key}" in state:
                        self._zero.write(p, state[f"{name}.{key}"], key)
            return
        if not state:
            self.write(masters)
            return
        saved: dict[Tensor, dict[str, Tensor]] = {
            p: {key: state[f"{name}.{key}"] for key in (*self._state_of(name), TAU_SUM) if f"{name}.{key}" in state}
            for name, p in self._adapter_parameters.items()
        }
        self.optimizer.restore({p: masters[name] for name, p in self._adapter_parameters.items()}, saved, num_steps)

    def _whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Context in which ZeRO-3's partitioned parameters are gathered."""
        return gathered(parameters) if self.strategy == "zero3" else contextlib.nullcontext()

    # --------------------------------------------------------------------------------------------------- agreement

    def check_agreement(self) -> None:
        """Compare the state that this strategy replicates; call it between steps, before the next all-gather overwrites
        a corrupt copy.

        DDP: parameters and moments (with replicas: within each of them).  ZeRO-1/2: the model copies, and each
        process's master shard, cast, against its slice of the copy, bit for bit.  ZeRO-3 replicates nothing, so there
        is nothing to compare.

        Raises:
            RunFailed: naming tensors and processes.
        """
        if self.strategy in ("none", "zero3") or self.is_closed:
            return
        members = ALL if self.replicas is None else self.replicas.members
        require_agreement(fingerprints(self._adapter_parameters), "the adapter", members)
        if self.strategy == "ddp":
            moments = {
                f"{name}.{key}": state[key]
                for name, p in self._adapter_parameters.items()
                if MOMENTS[0] in (state := self.optimizer.state.get(p, {}))
                for key in (*MOMENTS, "master")
                if key in state
            }
            require_agreement(fingerprints(moments), "the optimizer state", members)
        if self._zero is not None:
            found = [one for per_process in gather_objects(self._zero.mismatches_with_model()) for one in per_process]
            if found:
                raise RunFailed(
                    f"a master shard differs from the model ({'; '.join(found[:3])}); nothing was written: "
                    "restart from the last checkpoint"
                )

    def _assert_gates_untouched(self, before: dict[str, Tensor]) -> None:
        after = self.gates()
        for name, gate in before.items():
            module = name.removesuffix(".gate")
            assert torch.equal(after[module], gate.float().cpu()), (
                f"preparing the optimizer changed the gate of {module}"
            )

    # ----------------------------------------------------------------------------------------------------- release

    @contextlib.contextmanager
    def released(self, whole: bool = True) -> Iterator[nn.Module]:
        """The module without wrappers and hooks; the engine is closed and has freed its memory (collective).

        Inside, adapters may be given other parameters; afterwards the module may go to another engine.  Under ZeRO-3
        with `whole`, the frozen weights are gathered for the duration: as much memory as when the model was loaded.
        """
        module = self.module
        if not self.is_closed:
            self._spend()
        with self._whole(list(module.parameters()) if whole else []):
            yield module

    def _spend(self) -> None:
        self.is_closed = True
        for hook in self._unscaling:
            hook.remove()
        if self.strategy == "zero3":
            keep_weights(self.module)
        self.optimizer.zero_grad(set_to_none=True)
        if self._zero is not None:
            self._zero.leave(self.model, self.module)
        _keep_frozen_at_home(self.module)
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group["params"] = []
        self.model = self._zero = None
        self._adapter_parameters = {}
        self.accelerator.free_memory()  # it holds every model and optimizer it has prepared


def _keep_frozen_at_home(model: nn.Module) -> None:
    """Leave frozen weights out of what DDP and DeepSpeed broadcast when they wrap `model` again: the first wrapper has
    made them equal everywhere, and nothing has changed them since."""
    frozen = {name: p for name, p in model.named_parameters() if not p.requires_grad}
    model._ddp_params_and_buffers_to_ignore = list(frozen)  # type: ignore[assignment]  # DDP's own name for the list
    for p in frozen.values():
        p.ds_optim_param = True  # type: ignore[attr-defined]  # how DeepSpeed's own layers say so


def refuse_old_wrappers(model: nn.Module) -> None:
    """With several processes, make the forward pass of `model` an error inside a DistributedDataParallel that was
    created before its parameters."""
    if in_process_group():
        model.register_forward_pre_hook(_refuse_old_wrapper)


def _refuse_old_wrapper(model: nn.Module, _inputs: Any) -> None:
    wrapper = nn.parallel.DistributedDataParallel._active_ddp_module
    if wrapper is None:
        return
    known = {id(parameter) for parameter in wrapper._module_parameters}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not all(id(parameter) in known for parameter in trained):
        raise RuntimeError(
            "this DistributedDataParallel was created before the adapters were cut and would not reduce their "
            "gradients: wrap the model again"
        )
