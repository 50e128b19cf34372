"""The adapters' shards in DeepSpeed's optimizer; the only code that relies on its internals."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from sora_llm.optim import GATES, ProxAdamW


class ZeroShards:
    """This process's part of the float32 masters and optimizer state of `parameters` {name: p} under ZeRO-1/2/3.

    `sharding` is DeepSpeed's optimizer around ours, `optimizer` is ours, whose state is keyed by shard, not parameter.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        sharding: Any,
        optimizer: ProxAdamW,
        parameters: Mapping[str, nn.Parameter],
        *,
        is_stage_3: bool,
    ) -> None:
        self.sharding, self._optimizer, self._parameters = sharding, optimizer, parameters
        self._accelerator, self._is_stage_3 = accelerator, is_stage_3

    @property
    def is_skipped(self) -> bool:
        """Whether the last step was skipped because of a non-finite gradient norm."""
        return bool(self.sharding.overflow)

    def masters(self) -> dict[str, Tensor]:
        """The float32 value of every parameter, on the CPU (collective)."""
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: safe_get_full_fp32_param(p).float().cpu().clone() for name, p in self._parameters.items()}

    def state(self, p: nn.Parameter, key: str) -> Tensor:
        """The optimizer's state of `p` under `key`, float32; call `link` first (collective)."""
        from deepspeed.utils import safe_get_full_optimizer_state

        return safe_get_full_optimizer_state(p, key).float()

    def link(self) -> None:
        """Make the states of all parameters accessible.  DeepSpeed 0.19.8 links the fragments of ZeRO-1/2 once, after
        the first group's step, so the moments of later groups (the gates) are not found; linking again is harmless."""
        if not self._is_stage_3:
            self.sharding._hp_optimizer_states_linked = False
            self.sharding._lazy_init_hp_params_optimizer_state()

    def begin_state(self, num_steps: int, keys: Sequence[str], keys_of_gates: Sequence[str]) -> None:
        """Give every shard the state of an optimizer that has taken `num_steps` steps, all of it zero."""
        for shard, has_gates in zip(self.flat(), self._hold_gates(), strict=True):
            self._optimizer.state[shard] = {
                "step": torch.tensor(float(num_steps)),
                **{key: torch.zeros_like(shard) for key in (keys_of_gates if has_gates else keys)},
            }
        self.link()

    def write(self, p: nn.Parameter, value: Tensor, key: str | None = None) -> None:
        """Write this process's part of the float32 value of `p`, or of its optimizer state under `key`."""
        from deepspeed import utils

        value, of_key = value.to(self._accelerator.device), () if key is None else (key,)
        if self._is_stage_3:
            # DeepSpeed 0.19.8's safe_set_full_* reads past the end if the number of processes does not divide the size.
            size = p.ds_tensor.numel()  # type: ignore[attr-defined]  # ceil(size / number of processes)
            process, num_processes = self._accelerator.process_index, self._accelerator.num_processes
            # Shards span all processes: anything else (MiCS) would be zeros here.
            assert 0 <= size * num_processes - value.numel() < num_processes, (size, num_processes, value.shape)
            whole = nn.functional.pad(value.flatten(), (0, size * num_processes - value.numel()))
            own = whole[process * size : (process + 1) * size]
            write = utils.safe_set_local_fp32_param if key is None else utils.safe_set_local_optimizer_state
            write(p, own, *of_key)
        else:
            write = utils.safe_set_full_fp32_param if key is None else utils.safe_set_full_optimizer_state
            write(p, value, *of_key)

    def flat(self) -> list[Tensor]:
        """This process's flat float32 shards, one per group (ZeRO-3: per sub-group)."""
        if self._is_stage_3:
            return list(self.sharding.fp32_partitioned_groups_flat)
        return list(self.sharding.single_partition_of_fp32_groups)

    def _hold_gates(self) -> list[bool]:
        """Which of the flat shards hold gates."""
        names = [group["name"] for group in self._optimizer.param_groups]
        groups = list(range(len(names)))
        if self._is_stage_3:
            groups = [self.sharding.sub_group_to_group_id[index] for index in range(len(self.flat()))]
        return [names[group] == GATES for group in groups]

    def mismatches_with_model(self) -> list[str]:
        """Where this process's masters, cast, differ bitwise from the model's tensors, in words (ZeRO-1/2)."""
        process, problems = self._accelerator.process_index, []
        for index, master in enumerate(self.flat()):
            copy = self.sharding.parallel_partitioned_bit16_groups[index][process]
            if not torch.equal(master.detach().to(copy.dtype), copy.detach()):
                problems.append(f"group {index} of process {process}: {self._names_in_shard(index, master, copy)}")
        return problems

    def _names_in_shard(self, index: int, master: Tensor, copy: Tensor) -> str:
        """The tensors of group `index` in whose range master and copy differ, on this process."""
        differs = (master.detach().to(copy.dtype) != copy.detach()).nonzero().flatten()
        start = self._accelerator.process_index * master.numel()
        names, offset = [], 0
        by_parameter = {id(p): name for name, p in self._parameters.items()}
        for p in self.sharding.bit16_groups[index]:
            low, high = offset - start, offset + p.numel() - start
            if bool(((differs >= low) & (differs < high)).any()):
                names.append(by_parameter.get(id(p), "?"))
            offset += p.numel()
        return ", ".join(names[:3]) or "padding"

    def leave(self, engine: Any, module: nn.Module) -> None:
        """Remove the leftovers of DeepSpeed 0.19.8: on the root, two hooks that hold the engine; on every module,
        ZeRO-3's backward functions, which the next engine would keep: the old one would gather its parameters in
        backward."""
        engine.module_forward_pre_hook.remove()
        engine.module_forward_post_hook.remove()
        engine.destroy()
        for part in module.modules():
            for attribute in ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt"):
                part.__dict__.pop(attribute, None)
        self._accelerator.deepspeed_engine_wrapped = None
        vars(self.sharding).clear()  # closures on frozen parameters hold it, and it holds masters and buffers


def gathered(parameters: list[nn.Parameter]) -> AbstractContextManager[Any]:
    """Context in which ZeRO-3's partitioned parameters are gathered."""
    if not parameters:
        return contextlib.nullcontext()
    from deepspeed.runtime.zero import GatheredParameters

    return GatheredParameters(parameters)
