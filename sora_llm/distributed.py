"""Processes: the accelerator and its guards, every collective, float32 masters.  The only file that knows deepspeed.

A collective must be called by all processes; with one process it is the identity.  None stands inside a
main-process branch.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import (
    DeepSpeedPlugin,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
    ProjectConfiguration,
)
from torch import Tensor, nn

from sora_llm.errors import RunFailed, UserError, first_line
from sora_llm.extensions import await_build
from sora_llm.hashes import disagreements, fingerprints, tensor_hash
from sora_llm.inject import adapter_parameters, adapters
from sora_llm.loss_scale import LossScale
from sora_llm.optim import GATES, IMPORTANCE, TAU_SUM, ProxAdamW
from sora_llm.terminal import say
from sora_llm.topology import ALONE, ZERO_STAGES, World

T = TypeVar("T")
MOMENTS = ("exp_avg", "exp_avg_sq")


# ---------------------------------------------------------------------------------------------------- accelerator


def local_device() -> torch.device:
    """That of a command which is one process by itself."""
    return make_accelerator("none", ALONE).device


def make_accelerator(
    strategy: str,
    world: World,
    *,
    deepspeed_config: dict[str, Any] | None = None,
    timeout_minutes: float = 30,
    trackers: list[str] | None = None,
    project_dir: str | None = None,
) -> Accelerator:
    """The Accelerator of a strategy, on CPU (gloo) or CUDA (nccl), with what goes wrong silently asserted.

    Named backend: without it accelerate under DeepSpeed on a CPU reports one process on every process.
    `mixed_precision` is always "no": the config sets dtypes, nothing runs under autocast.
    """
    cuda = torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"
    if cuda and world.local_process_index >= torch.cuda.device_count():
        raise UserError(
            f"process {world.local_process_index} of this machine has no GPU of its own (there are "
            f"{torch.cuda.device_count()}); launch that many processes, or hide the GPUs with CUDA_VISIBLE_DEVICES="
        )
    if world.num_processes == 1 and strategy != "none":
        _announce_single_process_world()
    handlers: list[Any] = []
    if strategy != "none":
        backend = "nccl" if cuda else "gloo"
        handlers.append(InitProcessGroupKwargs(backend=backend, timeout=timedelta(minutes=timeout_minutes)))
        handlers.append(DistributedDataParallelKwargs(broadcast_buffers=False))
    options: dict[str, Any] = {"mixed_precision": "no", "log_with": trackers or None, "kwargs_handlers": handlers}
    if project_dir is not None:
        options["project_config"] = ProjectConfiguration(project_dir=project_dir, logging_dir=project_dir)
    if strategy in ZERO_STAGES:
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"
        # What the launcher says of DeepSpeed: accelerate refuses it beside a config like ours, or cannot read it, and
        # `resolve_strategy` and `refuse_other_step` have compared what of it counts.
        for name in ("CONFIG_DS_FIELDS", "GRADIENT_ACCUMULATION_STEPS", "GRADIENT_CLIPPING"):
            os.environ.pop(f"ACCELERATE_{name}", None)
        _quiet_deepspeed(cuda)
        if not cuda:  # where it compiles an operator
            await_build(lambda text: say(text, sys.stderr) if world.is_main else None)
        # Not zero.Init: transformers skips it for quantised models, so every process loads the whole model anyway.
        options["deepspeed_plugin"] = DeepSpeedPlugin(hf_ds_config=deepspeed_config, zero3_init_flag=False)
    else:
        os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        options["cpu"] = not cuda  # without it several CPU processes are never synchronised
    if strategy == "none":
        os.environ.pop("LOCAL_RANK", None)  # of torchrun with one process: accelerate would make a group of one
    with contextlib.nullcontext() if world.is_main else contextlib.redirect_stdout(io.StringIO()):
        accelerator = _join(world, options)  # DeepSpeed says on every process what it compiled
    _assert_world(accelerator, strategy, world)
    return accelerator


def _join(world: World, options: Mapping[str, Any]) -> Accelerator:
    """The Accelerator, whose making forms the process group.

    Raises:
        RunFailed: another process has left meanwhile, or cannot be reached.
    """
    try:
        return Accelerator(**options)
    except RuntimeError as error:  # torch's DistError is one, gloo raises plain ones
        if not isinstance(error, dist.DistError) and not _UNREACHABLE.search(str(error)):
            raise
        where = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise RunFailed(
            f"process {world.process_index} on {socket.gethostname()} could not form a group of {world.num_processes} "
            f"with the others at {where} ({str(error).splitlines()[0]}); one of them has ended (see what it says), or "
            "machines do not reach each other there"
        ) from error


_UNREACHABLE = re.compile(r"connect|closed by peer|timed out|timeout|rendezvous|Broken pipe|reset by", re.IGNORECASE)


def _quiet_deepspeed(cuda: bool) -> None:
    if not cuda:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    with contextlib.redirect_stdout(sys.stderr):  # it prints while it is imported
        from deepspeed.utils import logger
    logger.setLevel("ERROR")


def _announce_single_process_world() -> None:
    """DDP and ZeRO with one process and no launcher: give torch.distributed the environment it wants."""
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    if "MASTER_PORT" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            os.environ["MASTER_PORT"] = str(probe.getsockname()[1])
    for name, value in (("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1")):
        os.environ.setdefault(name, value)


def _assert_world(accelerator: Accelerator, strategy: str, world: World) -> None:
    kinds = {
        "none": {DistributedType.NO},
        "ddp": {DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.NO},
    }.get(strategy, {DistributedType.DEEPSPEED})
    group_size = dist.get_world_size() if dist.is_initialized() else 1
    assert accelerator.num_processes == group_size == world.num_processes, (
        f"accelerate sees {accelerator.num_processes} processes, torch {group_size}, the launcher {world.num_processes}"
    )
    assert accelerator.distributed_type in kinds, f"strategy {strategy} was prepared as {accelerator.distributed_type}"
    assert world.num_processes == 1 or accelerator.distributed_type != DistributedType.NO


# ---------------------------------------------------------------------------------------------------- collectives


def _several() -> bool:
    return dist.is_initialized() and dist.get_world_size() > 1


def in_process_group() -> bool:
    """Whether this process belongs to a group with others."""
    return _several()


def gather_objects(value: T) -> list[T]:
    """Every process's (small, picklable) value, in the order of processes, on every process."""
    if not _several():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_integers(values: Sequence[int], device: torch.device | str = "cpu") -> list[list[int]]:
    """Every process's integers, as many on each, in the order of processes; cheap enough for every step."""
    own = torch.tensor(list(values), dtype=torch.int64, device=device)
    if not _several():
        return [own.tolist()]
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return [other.tolist() for other in found]


def sum_over_processes(*values: float | Tensor, device: torch.device | str = "cpu") -> list[float]:
    """The float64 sums of some scalars over all processes."""
    local = torch.stack([torch.as_tensor(value, dtype=torch.float64).detach().to(device) for value in values])
    if _several():
        dist.all_reduce(local)
    return local.tolist()


def any_process(flag: bool, device: torch.device | str = "cpu") -> bool:
    """Whether `flag` is true on some process; every process has to ask."""
    return sum_over_processes(float(flag), device=device)[0] > 0


def broadcast_tensors(tensors: dict[str, Tensor], device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The main process's named tensors on every process, on the CPU; the others' argument is ignored.

    Their bits are hashed on every process afterwards.

    Raises:
        RunFailed: the bits that arrived differ.
    """
    if not _several():
        return tensors
    description = gather_objects({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})[0]
    received = {}
    for name, (shape, dtype) in description.items():
        buffer = (
            tensors[name].to(device).contiguous()
            if dist.get_rank() == 0
            else torch.empty(shape, dtype=dtype, device=device)
        )
        if buffer.numel():
            dist.broadcast(buffer, src=0)
        received[name] = buffer.cpu()
    require_agreement({name: tensor_hash(tensor) for name, tensor in received.items()}, "the broadcast adapter")
    return received


ALL: tuple[tuple[int, ...], ...] = ()
"""Every process, where groups of them are asked for."""


def require_agreement(
    hashes: Mapping[str, str],
    what: str,
    groups: Sequence[Sequence[int]] = ALL,
    remedy: str = "restart from the last checkpoint and look at the memory of the machine named",
) -> None:
    """Raise RunFailed on every process, naming tensors and processes, unless all processes (of each of `groups`) hold
    the same hashes."""
    found = gather_objects(dict(hashes))
    odd: dict[str, list[int]] = {}
    for group in groups or [range(len(found))]:
        for name, places in disagreements([found[process] for process in group]).items():
            odd.setdefault(name, []).extend(group[place] for place in places)
    if odd:
        shown = "; ".join(f"{name} on process {', '.join(map(str, who))}" for name, who in list(odd.items())[:5])
        raise RunFailed(
            f"{what} differs between processes: {shown}{' …' if len(odd) > 5 else ''} ({len(odd)} tensors); nothing "
            f"was written: {remedy}"
        )


def refuse_old_wrappers(model: nn.Module) -> None:
    """Among several processes, let the forward pass of `model` be an error inside a DistributedDataParallel that was
    made before its parameters were."""
    if _several():
        model.register_forward_pre_hook(_refuse_old_wrapper)


def _refuse_old_wrapper(model: nn.Module, _inputs: Any) -> None:
    wrapper = nn.parallel.DistributedDataParallel._active_ddp_module
    if wrapper is None:
        return
    known = {id(parameter) for parameter in wrapper._module_parameters}
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not all(id(parameter) in known for parameter in trained):
        raise RuntimeError(
            "this DistributedDataParallel was made before the adapters were cut and would not reduce their gradients: "
            "wrap the model anew"
        )


def machines(local_indices: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The processes of each machine, from every process's index on its own: a machine begins where that is 0.

    Raises:
        UserError: they are not numbered machine by machine.
    """
    starts = [process for process, local in enumerate(local_indices) if local == 0]
    found = tuple(
        tuple(range(start, end)) for start, end in zip(starts, [*starts[1:], len(local_indices)], strict=True)
    )
    if [place for own in found for place in range(len(own))] != list(local_indices):
        raise UserError(
            f"distributed.replica is node, but the launcher did not number processes machine by machine: their indices "
            f"on their machines are {list(local_indices)}; launch them in blocks, or use replica process"
        )
    return found


@dataclass(frozen=True)
class Replicas:
    """Who takes local steps together, and how adapters travel between those who do not.

    `members` are the processes of every replica, the first of which speaks for it (its lead); `index` is this process's
    replica.  Inside a replica gradients are averaged at every step.  `own_group` is None where it is one process.
    """

    members: tuple[tuple[int, ...], ...] = ((0,),)
    index: int = 0
    own_group: Any = None
    lead_group: Any = None

    @classmethod
    def make(
        cls, replica: str, world: World, device: torch.device | str = "cpu", timeout_minutes: float = 30
    ) -> Replicas:
        """Every process a replica ("process"), or those of a machine together ("node") (collective).

        Raises:
            UserError: the launcher did not number the processes machine by machine.
        """
        if not _several():
            return cls()
        local_indices = [found[0] for found in gather_integers([world.local_process_index], device)]
        members = machines(local_indices) if replica == "node" else tuple((p,) for p in range(world.num_processes))
        index = next(k for k, processes in enumerate(members) if world.process_index in processes)
        timeout = timedelta(minutes=timeout_minutes)  # a new group takes its backend's, not that of the world
        # Every process takes part in the making of every group, its own or not.
        groups = [dist.new_group(list(own), timeout=timeout) if len(own) > 1 else None for own in members]
        lead_group = dist.new_group([own[0] for own in members], timeout=timeout)
        return cls(members, index, groups[index], lead_group)

    @property
    def num(self) -> int:
        return len(self.members)

    @property
    def stride(self) -> int:
        """By how many processes shares of rows move on from step to step, the same number everywhere: those of a
        replica where all have as many, so that replicas pass whole shares on; else 1."""
        sizes = {len(own) for own in self.members}
        return sizes.pop() if len(sizes) == 1 else 1

    @property
    def own_members(self) -> tuple[int, ...]:
        """The processes of this one."""
        return self.members[self.index]

    @property
    def is_lead(self) -> bool:
        return not _several() or dist.get_rank() == self.own_members[0]

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Part k of every replica, in their order, on the lead of replica k; [] on who leads none (collective).

        Part k has one shape and dtype everywhere.
        """
        received = [self._gather(part, owner) for owner, part in enumerate(parts)]
        return received[self.index] if self.index < len(parts) else []

    def spread(self, own: Tensor | None, like: Sequence[Tensor]) -> list[Tensor]:
        """What each lead has, on every process (collective); `like` has the shapes and dtypes, leads give their own."""
        if not _several():
            assert own is not None
            return [own]
        spread = []
        for owner, template in enumerate(like):
            mine = self.is_lead and owner == self.index
            buffer = own.contiguous() if mine and own is not None else torch.empty_like(template)
            dist.broadcast(buffer, src=self.members[owner][0])
            spread.append(buffer)
        return spread

    def gather_on_main(self, tensor: Tensor) -> list[Tensor]:
        """Every replica's tensor, of one shape and dtype, in their order on the main process; [] elsewhere
        (collective)."""
        return self._gather(tensor, 0)

    def _gather(self, tensor: Tensor, owner: int) -> list[Tensor]:
        """Every replica's tensor on the lead of replica `owner`, process 0 being that of the first; [] elsewhere."""
        if not _several():
            return [tensor]
        if not self.is_lead:
            return []
        found = [torch.empty_like(tensor) for _ in self.members] if owner == self.index else None
        dist.gather(tensor.contiguous(), found, dst=self.members[owner][0], group=self.lead_group)
        return found or []


def on_main(action: Callable[[], T], world: World) -> T:
    """Run `action` on the main process and give its (small, picklable) result to all (collective).

    What it raises is raised on every process: a main process that failed alone would leave the others waiting.
    """
    outcome, failure = _attempt(action) if world.is_main else (None, None)
    outcomes = gather_objects((outcome, failure))
    return _unless_failed(outcomes[0][0], [outcomes[0][1]])


def on_every(action: Callable[[], T]) -> T:
    """Run `action` on every process; what it raises on any of them is raised on all (collective)."""
    outcome, failure = _attempt(action)
    return _unless_failed(outcome, gather_objects(failure))


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result or the error of an action; an error that is not ours goes to the others as a RunFailed."""
    try:
        return action(), None
    except (UserError, RunFailed) as error:
        return None, error
    except Exception as error:
        if not _several():
            raise
        traceback.print_exc()
        process = dist.get_rank()
        return None, RunFailed(f"process {process} failed with {type(error).__name__}: {error}")


def _unless_failed(outcome: Any, failures: Sequence[Exception | None]) -> Any:
    for failure in failures:
        if failure is not None:
            raise failure
    return outcome


# --------------------------------------------------------------------------------------------------------- engine


def _within(replicas: Replicas, model: nn.Module) -> nn.Module:
    """`model` as its replica trains it: in DDP over the replica's processes, where they are several."""
    if replicas.own_group is None:
        return model
    return nn.parallel.DistributedDataParallel(model, process_group=replicas.own_group, broadcast_buffers=False)


@dataclass(frozen=True)
class StepOutcome:
    """`grad_norm` is the global L2 norm before clipping; a step with a non-finite one is skipped."""

    grad_norm: float
    skipped: bool


class Engine:
    """A model and its ProxAdamW under one strategy: the same four calls for one process, DDP and ZeRO-1/2/3.

    `model` is what to call in the loop, `module` the same without wrappers, `optimizer` the ProxAdamW itself, whose
    `param_groups` carry lr and λ.  With `replicas` (none and ddp alone) it is this replica's: values, moments and
    gradients are its own until `write` makes them equal everywhere.  What is accumulated, reduced and clipped are
    gradients without the `loss_scale`.
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
    ):
        gates_before = {
            name: p.detach().clone() for name, p in adapter_parameters(model).items() if name.endswith(".gate")
        }
        self.accelerator, self.strategy, self.max_grad_norm = accelerator, strategy, max_grad_norm
        self.module, self.optimizer, self.replicas = model, optimizer, replicas
        self._has_importance = self.is_spent = False
        self._zero: Any = None
        self._adapter_parameters = adapter_parameters(model)
        self.loss_scale = LossScale(is_needed=False) if loss_scale is None else loss_scale
        self._unscaling: list[Any] = []
        if self.loss_scale.is_needed:
            self._unscaling = [p.register_hook(self.loss_scale.unscale) for p in self._adapter_parameters.values()]
        if replicas is None:
            self.model, prepared_optimizer = accelerator.prepare(model, optimizer)
        else:  # gradients stay inside the replica, and accelerate only knows the whole world
            self.model, prepared_optimizer = _within(replicas, model), accelerator.prepare(optimizer)
        if self.is_zero:
            self._zero = prepared_optimizer.optimizer  # DeepSpeed's sharding optimizer around ours
            inner = self._zero.optimizer
            assert self.model.zero_optimization_stage() == ZERO_STAGES[strategy]
        else:
            inner = prepared_optimizer.optimizer
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
        """The stage DeepSpeed's engine runs, None without it."""
        return int(self.model.zero_optimization_stage()) if self.is_zero else None

    def set_rates(self, learning_rate: float, gate_lr: float, sparse_lambda: float | Mapping[str, float]) -> None:
        """Write this step's learning rates and λ, one or one per budget, into the optimizer's groups."""
        for group in self.optimizer.param_groups:
            gated = group["name"] == GATES
            group["lr"] = gate_lr if gated else learning_rate
            own = sparse_lambda[group["budget"]] if gated and isinstance(sparse_lambda, Mapping) else sparse_lambda
            group["sparse_lambda"] = own if gated else 0.0

    def micro_batch(self, last: bool) -> AbstractContextManager[None]:
        """Context of one forward and backward; gradients are reduced after the `last` one of a step."""
        if self.is_zero:
            self.model.set_gradient_accumulation_boundary(is_boundary=last)
            return contextlib.nullcontext()
        return contextlib.nullcontext() if last else self.accelerator.no_sync(self.model)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; over processes they are averaged."""
        if self.loss_scale.is_needed:
            loss = loss * self.loss_scale.factor
        if self.is_zero:
            self.model.backward(loss)
        else:
            loss.backward()

    def step(self) -> StepOutcome:
        """Clip, step, prox, zero the gradients; if the global gradient norm is not finite only the last of these."""
        if self.is_zero:
            self.model.step()
            norm = float(self.model.get_global_grad_norm())
            return StepOutcome(norm, skipped=bool(self._zero.overflow))
        limit = self.max_grad_norm or float("inf")
        norm = float(torch.nn.utils.clip_grad_norm_(list(self._adapter_parameters.values()), limit))
        finite = norm not in (float("inf"), float("-inf")) and norm == norm
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepOutcome(norm, skipped=not finite)

    # ------------------------------------------------------------------------------------------ reading and writing

    def gates(self) -> dict[str, Tensor]:
        """{module: gate (R,)} on the CPU, as the model uses them (collective under ZeRO-3)."""
        parameters = {name: layer.gate for name, layer in adapters(self.module).items() if layer.gate is not None}
        if not parameters:
            return {}
        with self._whole(list(parameters.values())):
            together = torch.stack([gate.detach().float() for gate in parameters.values()]).cpu()
        return dict(zip(parameters, together.unbind(), strict=True))

    def values(self) -> dict[str, Tensor]:
        """The float32 values of every adapter tensor by name, on the device, as the optimizer holds them; not ZeRO."""
        assert not self.is_zero
        return {
            name: self.optimizer.state.get(p, {}).get("master", p).detach().float()
            for name, p in self._adapter_parameters.items()
        }

    def write(self, values: Mapping[str, Tensor]) -> None:
        """Give adapter tensors other float32 values, and lower precision its rounding of them; not ZeRO."""
        assert not self.is_zero
        with torch.no_grad():
            for name, value in values.items():
                p = self._adapter_parameters[name]
                p.copy_(value)
                if "master" in (state := self.optimizer.state.get(p, {})):
                    state["master"].copy_(value)
                elif p.dtype not in (torch.float32, torch.float64):
                    # Before its first step, which would take the rounding for the value.
                    self.optimizer.state[p] = {**state, "master": value.detach().float().clone()}

    def take_thresholds(self) -> dict[str, Tensor]:
        """{module: Σ τ_t (R,)} of the deferred proxes since it was called last, float32."""
        taken = {}
        for name, layer in adapters(self.module).items():
            if layer.gate is not None:
                deferred = self.optimizer.state.get(layer.gate, {}).pop(TAU_SUM, None)
                taken[name] = torch.zeros_like(layer.gate, dtype=torch.float32) if deferred is None else deferred
        return taken

    def masters(self) -> dict[str, Tensor]:
        """The float32 value of every adapter tensor, by "<module>.lora_A|lora_B|gate", on the CPU (collective)."""
        if self.is_spent:
            return {name: p.detach().float().cpu().clone() for name, p in adapter_parameters(self.module).items()}
        if not self.is_zero:
            return {name: value.cpu().clone() for name, value in self.values().items()}
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).float().cpu().clone() for name, p in self._adapter_parameters.items()}

    def optimizer_state(self) -> tuple[dict[str, Tensor], int]:
        """The optimizer's tensors of every adapter tensor as "<tensor>.exp_avg", ".exp_avg_sq" and, of gates under
        "adaptive", ".importance", of gates whose prox is deferred ".tau_sum"; and the number of its steps (collective).
        Empty before there are any."""
        if not any(MOMENTS[0] in state for state in self.optimizer.state.values()):
            return {}, 0
        found = {}
        if self.is_zero:
            self._link_optimizer_state()
        for name, p in self._adapter_parameters.items():
            deferred = (TAU_SUM,) if TAU_SUM in self.optimizer.state.get(p, {}) else ()
            for key in (*self._state_of(name), *deferred):
                found[f"{name}.{key}"] = self._read_state(p, key).cpu().clone()
        return found, self.num_optimizer_steps

    def _state_of(self, name: str) -> tuple[str, ...]:
        return (*MOMENTS, IMPORTANCE) if self._has_importance and name.endswith(".gate") else MOMENTS

    def _read_state(self, p: nn.Parameter, key: str) -> Tensor:
        if not self.is_zero:
            state: Tensor = self.optimizer.state[p][key].detach()
            return state
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(p, key).float()

    @property
    def num_optimizer_steps(self) -> int:
        """Steps taken by the optimizer (skipped ones are not counted)."""
        steps = {int(state["step"]) for state in self.optimizer.state.values() if "step" in state}
        assert len(steps) <= 1, f"parameters disagree about the number of steps: {steps}"
        return steps.pop() if steps else 0

    def load(self, masters: Mapping[str, Tensor], state: Mapping[str, Tensor], num_steps: int) -> None:
        """Put back what `masters` and `optimizer_state` gave (collective under ZeRO).

        Under ZeRO the module must have held `masters` before it was prepared: writing masters alone would leave the
        model's copies old until the next step.  What `state` lacks is zero, as in a fresh optimizer.
        """
        self._has_importance = any(name.endswith(f".{IMPORTANCE}") for name in state)
        if self.is_zero:
            self._load_zero(masters, state, num_steps)
            return
        with torch.no_grad():
            for name, p in self._adapter_parameters.items():
                p.copy_(masters[name])
                if not state and p.dtype == torch.float32:
                    continue
                zeros = torch.zeros_like(masters[name])
                own = {key: state.get(f"{name}.{key}", zeros).to(p.device).clone() for key in self._state_of(name)}
                if p.dtype != torch.float32:
                    own["master"] = masters[name].to(p.device).clone()
                if f"{name}.{TAU_SUM}" in state:
                    own[TAU_SUM] = state[f"{name}.{TAU_SUM}"].to(p.device).clone()
                self.optimizer.state[p] = {"step": torch.tensor(float(num_steps)), **own}

    def _load_zero(self, masters: Mapping[str, Tensor], state: Mapping[str, Tensor], num_steps: int) -> None:
        for name, p in self._adapter_parameters.items():
            self._write_zero(p, masters[name])
        if not state:
            return
        for shard, has_gates in zip(self.master_shards(), self._shards_of_gates(), strict=True):
            keys = (*MOMENTS, IMPORTANCE) if self._has_importance and has_gates else MOMENTS
            self.optimizer.state[shard] = {
                "step": torch.tensor(float(num_steps)),
                **{key: torch.zeros_like(shard) for key in keys},
            }
        self._link_optimizer_state()
        for name, p in self._adapter_parameters.items():
            for key in self._state_of(name):
                if f"{name}.{key}" in state:
                    self._write_zero(p, state[f"{name}.{key}"], key)

    def _write_zero(self, p: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Give this process its part of the float32 value of `p`, or of what the optimizer has of it under `key`."""
        from deepspeed import utils

        value, of_key = value.to(self.device), () if key is None else (key,)
        if self.strategy == "zero3":
            # DeepSpeed 0.19.8's safe_set_full_* reads past the end of a size that the processes do not divide.
            size = p.ds_tensor.numel()  # type: ignore[attr-defined]  # ceil(size / number of processes)
            process, num_processes = self.accelerator.process_index, self.accelerator.num_processes
            # Shards are those of all processes: anything else (MiCS) would be zeros here.
            assert 0 <= size * num_processes - value.numel() < num_processes, (size, num_processes, value.shape)
            whole = nn.functional.pad(value.flatten(), (0, size * num_processes - value.numel()))
            own = whole[process * size : (process + 1) * size]
            write = utils.safe_set_local_fp32_param if key is None else utils.safe_set_local_optimizer_state
            write(p, own, *of_key)
        else:
            write = utils.safe_set_full_fp32_param if key is None else utils.safe_set_full_optimizer_state
            write(p, value, *of_key)

    def _shards_of_gates(self) -> list[bool]:
        """Which of `master_shards` hold gates."""
        names = [group["name"] for group in self.optimizer.param_groups]
        groups = list(range(len(names)))
        if self.strategy == "zero3":
            groups = [self._zero.sub_group_to_group_id[index] for index in range(len(self.master_shards()))]
        return [names[group] == GATES for group in groups]

    def master_shards(self) -> list[Tensor]:
        """This process's flat float32 shards under ZeRO, one per group (ZeRO-3: per sub-group)."""
        if self.strategy == "zero3":
            return list(self._zero.fp32_partitioned_groups_flat)
        return list(self._zero.single_partition_of_fp32_groups)

    def _link_optimizer_state(self) -> None:
        # DeepSpeed 0.19.8 links the fragments of ZeRO-1/2 once, after the first group's step, so the moments of later
        # groups (the gates) are not found; linking again is harmless.
        if self.strategy != "zero3":
            self._zero._hp_optimizer_states_linked = False
            self._zero._lazy_init_hp_params_optimizer_state()

    def _whole(self, parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
        """Context in which ZeRO-3's partitioned parameters are whole."""
        if self.strategy != "zero3" or not parameters:
            return contextlib.nullcontext()
        from deepspeed.runtime.zero import GatheredParameters

        return GatheredParameters(parameters)

    # --------------------------------------------------------------------------------------------------- agreement

    def prove_agreement(self) -> None:
        """Compare what this strategy replicates; call it between steps, before the next one heals a copy.

        DDP: parameters and moments (with replicas: within each of them).  ZeRO-1/2: the model copies, and each
        process's master shard, cast, against its slice of the copy, bit for bit.  ZeRO-3 keeps no replica: nothing can
        be compared here.

        Raises:
            RunFailed: naming tensors and processes.
        """
        if self.strategy in ("none", "zero3") or self.is_spent:
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
        if self.is_zero:
            self._prove_masters()

    def _prove_masters(self) -> None:
        process = self.accelerator.process_index
        problems = []
        for index, master in enumerate(self._zero.single_partition_of_fp32_groups):
            copy = self._zero.parallel_partitioned_bit16_groups[index][process]
            if not torch.equal(master.detach().to(copy.dtype), copy.detach()):
                problems.append(f"group {index} of process {process}: {self._names_in_shard(index, master, copy)}")
        found = [problem for per_process in gather_objects(problems) for problem in per_process]
        if found:
            raise RunFailed(
                f"a master shard is not what the model holds ({'; '.join(found[:3])}); nothing was written: restart "
                "from the last checkpoint"
            )

    def _names_in_shard(self, index: int, master: Tensor, copy: Tensor) -> str:
        """The adapter tensors of group `index` in whose range master and copy differ, on this process."""
        differs = (master.detach().to(copy.dtype) != copy.detach()).nonzero().flatten()
        start = self.accelerator.process_index * master.numel()
        names, offset = [], 0
        by_parameter = {id(p): name for name, p in self._adapter_parameters.items()}
        for p in self._zero.bit16_groups[index]:
            low, high = offset - start, offset + p.numel() - start
            if bool(((differs >= low) & (differs < high)).any()):
                names.append(by_parameter.get(id(p), "?"))
            offset += p.numel()
        return ", ".join(names[:3]) or "padding"

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
        """The module without wrappers and hooks; the engine is spent, and holds no memory any more (collective).

        Adapters may be given other parameters meanwhile, and the module to another engine afterwards.  Under ZeRO-3
        and with `whole` the frozen weights are gathered for the duration: as much memory as when the model was loaded.
        """
        module = self.module
        if not self.is_spent:
            self._spend()
        with self._whole(list(module.parameters()) if whole else []):
            yield module

    def _spend(self) -> None:
        self.is_spent = True
        for hook in self._unscaling:
            hook.remove()
        self.optimizer.zero_grad(set_to_none=True)
        if self.is_zero:
            # What DeepSpeed 0.19.8 leaves behind.  On the root two hooks that hold the engine; on every module ZeRO-3's
            # backward functions, which the next engine would keep: the old one would gather its parameters in backward.
            self.model.module_forward_pre_hook.remove()
            self.model.module_forward_post_hook.remove()
            self.model.destroy()
            for part in self.module.modules():
                for attribute in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"):
                    part.__dict__.pop(attribute, None)
            self.accelerator.deepspeed_engine_wrapped = None
            vars(self._zero).clear()  # closures on frozen parameters hold it, and it holds masters and buffers
        self.optimizer.state.clear()
        for group in self.optimizer.param_groups:
            group["params"] = []
        self.model = self._zero = None
        self._adapter_parameters = {}
        self.accelerator.free_memory()  # it keeps every model and optimizer that it has prepared


def end(accelerator: Accelerator, environ: Mapping[str, str]) -> None:
    """Close trackers and the process group, and forget both, so that this process can run again.

    `environ` is what os.environ held before `make_accelerator`.
    """
    for tracker in accelerator.trackers:
        try:
            tracker.finish()
        except Exception as error:  # of whatever library: what is finished stays finished
            say(f"warning: output.report_to: {tracker.name} could not be ended: {first_line(error)}")
    if dist.is_initialized():
        dist.destroy_process_group()
    if "deepspeed" in sys.modules:  # its groups belong to the process group that is gone
        import deepspeed

        deepspeed.comm.comm.cdb = None
        deepspeed.utils.groups._WORLD_GROUP = None
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    for name in set(os.environ) - set(environ):
        del os.environ[name]
    os.environ.update(environ)
