"""Which processes form a replica, and how adapters are exchanged between replicas."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from sora_llm.distributed.collectives import gather_integers, in_process_group
from sora_llm.errors import UserError
from sora_llm.topology import DDP_OPTIONS, World


def machines(local_indices: Sequence[int]) -> tuple[tuple[int, ...], ...]:
    """The processes of each machine, from every process's index on its machine: a machine begins wherever that is 0.

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
    """Which processes form a replica, and how adapters are exchanged between replicas.

    `members` are the processes of every replica, the first of which represents it (its lead); `index` is this process's
    replica.  Inside a replica gradients are averaged at every step.  `own_group` is None if it is a single process.
    """

    members: tuple[tuple[int, ...], ...] = ((0,),)
    index: int = 0
    own_group: Any = None
    lead_group: Any = None

    @classmethod
    def make(
        cls, replica: str, world: World, device: torch.device | str = "cpu", timeout_minutes: float = 30
    ) -> Replicas:
        """Make a replica of every process ("process"), or of the processes of each machine ("node") (collective).

        Raises:
            UserError: the launcher did not number the processes machine by machine.
        """
        if not in_process_group():
            return cls()
        local_indices = [found[0] for found in gather_integers([world.local_process_index], device)]
        members = machines(local_indices) if replica == "node" else tuple((p,) for p in range(world.num_processes))
        index = next(k for k, processes in enumerate(members) if world.process_index in processes)
        timeout = timedelta(minutes=timeout_minutes)  # a new group uses its backend's default, not the world's timeout
        # Every process takes part in creating every group, its own or not.
        groups = [dist.new_group(list(own), timeout=timeout) if len(own) > 1 else None for own in members]
        lead_group = dist.new_group([own[0] for own in members], timeout=timeout)
        return cls(members, index, groups[index], lead_group)

    @property
    def num(self) -> int:
        return len(self.members)

    @property
    def stride(self) -> int:
        """The number of processes by which shares of rows move on from step to step, the same everywhere: the size of a
        replica if all are equal, so that replicas pass on whole shares; else 1."""
        sizes = {len(own) for own in self.members}
        return sizes.pop() if len(sizes) == 1 else 1

    @property
    def own_members(self) -> tuple[int, ...]:
        """The processes of this process's replica."""
        return self.members[self.index]

    @property
    def is_lead(self) -> bool:
        return not in_process_group() or dist.get_rank() == self.own_members[0]

    def gather(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Part k of every replica, in their order, on the lead of replica k; [] on other processes (collective).

        Part k has the same shape and dtype everywhere.
        """
        received = [self._gather(part, owner) for owner, part in enumerate(parts)]
        return received[self.index] if self.index < len(parts) else []

    def spread(self, own: Tensor | None, like: Sequence[Tensor]) -> list[Tensor]:
        """Each lead's tensor, on every process (collective); `like` has the shapes and dtypes, leads pass `own`."""
        if not in_process_group():
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
        """Every replica's tensor (same shape and dtype), in replica order, on the main process; [] elsewhere
        (collective)."""
        return self._gather(tensor, 0)

    def _gather(self, tensor: Tensor, owner: int) -> list[Tensor]:
        """Every replica's tensor on the lead of replica `owner` (process 0 leads the first); [] elsewhere."""
        if not in_process_group():
            return [tensor]
        if not self.is_lead:
            return []
        found = [torch.empty_like(tensor) for _ in self.members] if owner == self.index else None
        dist.gather(tensor.contiguous(), found, dst=self.members[owner][0], group=self.lead_group)
        return found or []


def within(replicas: Replicas, model: nn.Module) -> nn.Module:
    """`model` as its replica trains it: in DDP over the replica's processes, if there are several."""
    if replicas.own_group is None:
        return model
    with warnings.catch_warnings():  # torch 2.13 has another name for the option, which older ones do not know
        warnings.filterwarnings("ignore", ".*broadcast_buffers", FutureWarning)
        return nn.parallel.DistributedDataParallel(model, process_group=replicas.own_group, **DDP_OPTIONS)
