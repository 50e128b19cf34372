"""Work shared among processes, with results in order: `map_in_order`."""

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
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import wait
from typing import Any, TypeVar

from sora_llm.errors import RunFailed

T = TypeVar("T")
R = TypeVar("R")

TERM_GRACE_SECONDS = 5
"""How long a worker outlives a TERM, so that its parent can stop in order."""


def map_in_order(function: Callable[[T], R], items: Iterable[T], num_processes: int) -> Generator[R]:
    """`function` of every item, in order, computed by `num_processes` processes (1: by this one).

    Few items are in flight at any time, so memory does not grow with their number.  `function` reaches the workers
    without being pickled.  Closing the generator ends them.

    Raises:
        RunFailed: a worker was killed.
    """
    if num_processes == 1:
        yield from map(function, items)
        return
    with ExitStack() as stack:
        stack.enter_context(_single_threaded_tokenizers())
        # Forked, not spawned: a spawned worker imports the caller's main module again, which costs seconds of
        # imports and breaks scripts without a __main__ guard.  The workers run no torch and no collective.
        context = multiprocessing.get_context("fork")
        pool = ProcessPoolExecutor(num_processes, context, _start_worker, (function,))
        stack.callback(pool.shutdown, cancel_futures=True)
        waiting: deque[Future[R]] = deque()
        remaining = iter(items)
        try:
            for item in itertools.islice(remaining, 2 * num_processes):
                waiting.append(pool.submit(_apply, item))
            while waiting:
                result = waiting.popleft().result()
                for item in itertools.islice(remaining, 1):
                    waiting.append(pool.submit(_apply, item))
                yield result
        except BrokenProcessPool:
            raise RunFailed(
                "a tokenising process was killed, perhaps for lack of memory: start again with data.num_proc=1"
            ) from None


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
