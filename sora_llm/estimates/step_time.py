"""Step time on GPUs, calculated from sizes and assumed hardware; nothing is measured.

    compute   T (4 W, or 6 W with gradient checkpointing; 4 V H of the head; 6 N or 8 N of the adapters) / (flops ·
              utilisation): a product with W costs 2 T W forward and 2 T W for the gradient of its input, and once
              more if it is recomputed.  Attention is left out.
    reduce    the adapters' gradients, 2 (K − 1)/K · bytes / bandwidth (a ring all-reduce): once per step, under
              ZeRO-2 once per micro-batch, under ZeRO-3 half of it once per micro-batch.  With local updates, once in
              sync_every steps, and inside a machine at every step if its processes are one replica
    gather    ZeRO-1/2: (K − 1)/K of the adapters.  ZeRO-3: of adapters and frozen weights, in the forward and
              backward pass of every micro-batch

T tokens of a process in a step, W Σ I·O of the frozen linears, N parameters of the adapters, V·H of the head, K
processes.  A gather or a scatter adds a latency for every doubling of K, under ZeRO-3 for each layer; an all-reduce is
one of each.  Nothing overlaps with anything else.  Use it to compare strategies; measurements are in benchmarks/gpu.md.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Machines:
    """Assumptions about the hardware; the defaults are for machines with eight H100 SXM."""

    flops: float = 989e12
    """bf16 peak of a GPU, 1/s (data sheet)."""
    utilisation: float = 0.35
    """Share of that peak that a step reaches when the GPU, not the CPU, is the bottleneck."""
    gpus_per_node: int = 8
    inside: float = 300e9
    """Bytes per second from and to a GPU inside a machine (NVLink)."""
    between: float = 25e9
    """The same between machines (200 Gbit/s per GPU)."""
    latency: float = 20e-6
    """Seconds of one collective for every doubling of the processes."""


@dataclass(frozen=True)
class Work:
    """A step of one process."""

    tokens: int
    linear_parameters: int
    """Σ I·O of all frozen linears except the head."""
    head_parameters: int
    adapter_parameters: int
    num_layers: int
    frozen_bytes: int
    """Of the whole backbone, as stored."""
    adapter_itemsize: int = 4
    checkpointing: bool = True
    micro_batches: int = 1
    sync_every: int = 1
    is_machine_a_replica: bool = False
    """Whether processes of a machine average their gradients at every step when sync_every is more than 1."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by what they are spent on."""

    compute: float
    reduce: float
    gather: float

    @property
    def seconds(self) -> float:
        return self.compute + self.reduce + self.gather


def step_time(work: Work, strategy: str, num_processes: int, machines: Machines) -> StepTime:
    """The time of a step under none, ddp, zero1, zero2 or zero3, by the formulas of the module."""
    again = 1 if work.checkpointing else 0
    per_token = (
        (4 + 2 * again) * work.linear_parameters + 4 * work.head_parameters + (6 + 2 * again) * work.adapter_parameters
    )
    compute = work.tokens * per_token / (machines.flops * machines.utilisation)
    adapter_bytes = work.adapter_itemsize * work.adapter_parameters
    gather = _ring(num_processes, adapter_bytes, machines)
    reduce = 2 * gather
    if strategy in ("none", "ddp"):
        reduce /= work.sync_every
        if work.sync_every > 1 and work.is_machine_a_replica:
            reduce += 2 * _ring(min(num_processes, machines.gpus_per_node), adapter_bytes, machines)
        return StepTime(compute, reduce, 0.0)
    if strategy == "zero1":
        return StepTime(compute, reduce, gather)
    if strategy == "zero2":
        return StepTime(compute, reduce * work.micro_batches, gather)
    layers = _ring(num_processes, work.frozen_bytes + adapter_bytes, machines, calls=work.num_layers)
    return StepTime(compute, gather * work.micro_batches, 2 * work.micro_batches * layers)


def _ring(num_processes: int, size: int, machines: Machines, calls: int = 1) -> float:
    """Seconds for `size` bytes to go once around, in `calls` calls: a gather or a scatter, half of an all-reduce."""
    bandwidth = machines.inside if num_processes <= machines.gpus_per_node else machines.between
    share, doublings = (num_processes - 1) / num_processes, (num_processes - 1).bit_length()
    return share * size / bandwidth + calls * machines.latency * doublings
