"""How long an action takes and how much memory, for benchmarks that compare arms within one process."""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import itertools
import os
import platform
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def seconds_of(action: Callable[[], None], device: torch.device, clock: Callable[[], float]) -> float:
    """How long an action takes by the clock, on CUDA by its events."""
    if device.type == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        action()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end) / 1e3
    started = clock()
    action()
    return clock() - started


def keep_freed_memory() -> None:
    """Let glibc keep freed memory, as CUDA's caching allocator does: else page faults are a tenth of a step, and more
    in any arm that happens to cross a threshold."""
    with contextlib.suppress(OSError):
        libc = ctypes.CDLL("libc.so.6")
        m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3
        libc.mallopt(m_mmap_threshold, 2**25)  # the maximum it accepts
        libc.mallopt(m_trim_threshold, 2**31 - 1)
        libc.mallopt(m_top_pad, 2**28)


def peak_bytes(action: Callable[[], None], device: torch.device) -> int:
    """Peak of allocated memory during an action, above the start: of torch's allocator, on a CPU by its profiler."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        action()
        return torch.cuda.max_memory_allocated() - before
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        action()
    events = profile.profiler.kineto_results.events()
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    return max(itertools.accumulate(change for _, change in changes))


def rss_bytes(action: Callable[[], None]) -> int | None:
    """Peak of resident memory during an action, above the start; None if the kernel does not report it."""

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key + ":"))

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # resets the peak
        before = status("VmRSS")
    except OSError:
        return None
    action()
    return status("VmHWM") - before


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """First quartile, median, third quartile."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    q1, q2, q3 = statistics.quantiles(values, n=4, method="inclusive")
    return q1, q2, q3


def machine(device: str) -> dict[str, Any]:
    """The date, the machine and its load: what a number needs beside it."""
    is_cuda = device.startswith("cuda")
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if is_cuda else f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "load_average": round(os.getloadavg()[0], 1),
    }
