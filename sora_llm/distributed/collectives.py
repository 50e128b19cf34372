"""Collectives, and running an action on one or on every process."""

from __future__ import annotations

import re
import traceback
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sora_llm.errors import RunFailed, UserError
from sora_llm.hashes import disagreements, tensor_hash

T = TypeVar("T")

ALL: tuple[tuple[int, ...], ...] = ()
"""All processes, as an argument that lists groups of them."""


def in_process_group() -> bool:
    """Whether this process belongs to a group with others."""
    return dist.is_initialized() and dist.get_world_size() > 1


def is_main() -> bool:
    """Whether this is the main process."""
    return not dist.is_initialized() or dist.get_rank() == 0


def is_timeout(error: BaseException) -> bool:
    """Whether a collective ended because other processes did not take part in it."""
    is_ours = isinstance(error, UserError | RunFailed)
    said = re.search("[Tt]imed out (waiting|after)|wait timeout|collective operation timeout", str(error))
    return in_process_group() and isinstance(error, RuntimeError) and not is_ours and said is not None


def gather_objects(value: T) -> list[T]:
    """Every process's (small, picklable) value, in the order of processes, on every process (collective)."""
    if not in_process_group():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_integers(values: Sequence[int], device: torch.device | str) -> list[list[int]]:
    """Every process's integers, equally many each, in process order: cheap enough for every step (collective)."""
    own = torch.tensor(list(values), dtype=torch.int64, device=device)
    if not in_process_group():
        return [own.tolist()]
    found = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(found, own)
    return [other.tolist() for other in found]


def sum_over_processes(*values: float | Tensor, device: torch.device | str) -> list[float]:
    """The float64 sums of some scalars over all processes (collective)."""
    local = torch.stack([torch.as_tensor(value, dtype=torch.float64).detach().to(device) for value in values])
    if in_process_group():
        dist.all_reduce(local)
    return local.tolist()


def any_process(flag: bool, device: torch.device | str) -> bool:
    """Whether `flag` is true on any process (collective)."""
    return sum_over_processes(float(flag), device=device)[0] > 0


def broadcast_tensors(tensors: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """The main process's named tensors on every process, on the CPU; the others' argument is ignored (collective).

    Their bits are then hashed and compared across processes.

    Raises:
        RunFailed: the bits that arrived differ.
    """
    if not in_process_group():
        return tensors
    description = gather_objects({name: (tuple(t.shape), t.dtype) for name, t in tensors.items()})[0]
    received = {}
    for name, (shape, dtype) in description.items():
        buffer = tensors[name].to(device).contiguous() if is_main() else torch.empty(shape, dtype=dtype, device=device)
        if buffer.numel():
            dist.broadcast(buffer, src=0)
        received[name] = buffer.cpu()
    require_agreement({name: tensor_hash(tensor) for name, tensor in received.items()}, "the broadcast adapter")
    return received


def require_agreement(
    hashes: Mapping[str, str],
    what: str,
    groups: Sequence[Sequence[int]] = ALL,
    remedy: str = "restart from the last checkpoint and check the memory of the machine named",
) -> None:
    """Raise RunFailed on every process, naming tensors and processes, unless all processes (of each of `groups`) hold
    the same hashes (collective)."""
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


def on_main(action: Callable[[], T]) -> T:
    """Run `action` on the main process and give its (small, picklable) result to all (collective).

    Its exception is raised on every process: a main process that failed alone would leave the others waiting.
    """
    outcome, failure = _attempt(action) if is_main() else (None, None)
    outcomes = gather_objects((outcome, failure))
    return _unless_failed(outcomes[0][0], [outcomes[0][1]])


def on_every(action: Callable[[], T]) -> T:
    """Run `action` on every process; an exception on any of them is raised on all (collective)."""
    outcome, failure = _attempt(action)
    return _unless_failed(outcome, gather_objects(failure))


def _attempt(action: Callable[[], T]) -> tuple[T | None, Exception | None]:
    """The result or the error of an action; an error that is not ours is passed to the others as a RunFailed."""
    try:
        return action(), None
    except (UserError, RunFailed) as error:
        return None, error
    except Exception as error:
        if not in_process_group():
            raise
        traceback.print_exc()
        process = dist.get_rank()
        return None, RunFailed(f"process {process} failed with {type(error).__name__}: {error}")


def _unless_failed(outcome: Any, failures: Sequence[Exception | None]) -> Any:
    for failure in failures:
        if failure is not None:
            raise failure
    return outcome
