"""Work shared among processes, with results in order: `map_in_order`, and `Workers` that stay for several calls."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from multiprocessing.connection import wait
from typing import Any, Generic, TypeVar

from sora_llm.errors import RunFailed

T = TypeVar("T")
R = TypeVar("R")

TERM_GRACE_SECONDS = 5
"""How long a worker outlives a TERM, so that its parent can stop in order."""


def own_cores() -> int:
    """The number of cores this process may use; not every system can restrict it or report it."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def map_in_order(function: Callable[[T], R], items: Iterable[T], num_processes: int) -> Generator[R]:
    """`function` of every item, in order, computed by `num_processes` processes (1: by this one).

    Few items are in flight at any time, so memory does not grow with their number.  Closing the generator ends them.

    Raises:
        RunFailed: a worker was killed.
    """
    if num_processes == 1:
        yield from map(function, items)
        return
    with closing(Workers(function, num_processes)) as workers:
        yield from workers.map_in_order(items)


class Workers(Generic[T, R]):
    """Processes that compute `function`, until `close`, or until nobody refers to this any more.

    All are forked here and now: later this process has threads and devices that a fork does not copy.  `function`
    reaches them without being pickled.
    """

    def __init__(self, function: Callable[[T], R], num_processes: int) -> None:
        self._num_processes = num_processes
        # Forked, not spawned: a spawned worker imports the caller's main module again, which costs seconds of
        # imports and breaks scripts without a __main__ guard.  The workers run no torch and no collective.
        context = multiprocessing.get_context("fork")
        self._pool = ProcessPoolExecutor(num_processes, context, _start_worker, (function,))
        with _single_threaded_tokenizers():
            self._pool.submit(int)  # the first item forks all of them

    def map_in_order(self, items: Iterable[T]) -> Generator[R]:
        """The function of every item, in order; few items are in flight at any time.

        Raises:
            RunFailed: a worker was killed.
        """
        waiting: deque[Future[R]] = deque()
        remaining = iter(items)
        try:
            for item in itertools.islice(remaining, 2 * self._num_processes):
                waiting.append(self._pool.submit(_apply, item))
            while waiting:
                result = waiting.popleft().result()
                for item in itertools.islice(remaining, 1):
                    waiting.append(self._pool.submit(_apply, item))
                yield result
        except BrokenProcessPool:
            with_fewer = ": start again with data.num_proc=1" if self._num_processes > 1 else ""
            raise RunFailed(f"a tokenising process was killed, perhaps for lack of memory{with_fewer}") from None

    def close(self) -> None:
        """End the processes, after the items that they are working on."""
        self._pool.shutdown(cancel_futures=True)


@contextmanager
def _single_threaded_tokenizers() -> Iterator[None]:
    """Keep the tokenizers library from warning about threads lost in a fork."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


_function: Callable[[Any], Any]  # in a worker: inherited once, not sent with every item


def _start_worker(function: Callable[[Any], Any]) -> None:
    global _function
    _function = function
    # Replace the trainer's handlers, which a fork inherits.  A scheduler that wants a job to stop sends these signals
    # to all its processes, and the parent decides what to do; the pool itself sends TERM to those that should end.
    signal.set_wakeup_fd(-1)  # the parent's: it would mistake a signal sent here for its own
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(TERM_GRACE_SECONDS))
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """End with the parent: otherwise a worker would wait forever for items and keep the parent's lock."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


def _apply(item: Any) -> Any:
    return _function(item)
