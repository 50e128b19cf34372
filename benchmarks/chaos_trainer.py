"""A trainer that records when it is where, and dies at a given file operation.

    trainer([CONFIG, ...], folder=…, run_dir=…, crash={"operation": "save fsync checkpoints #1", "when": "before"})

`folder`/trace.<process> gets a JSON line [seconds, what, value] per event, by the machine's monotonic clock: "pid";
"begin" and "end" of one of `PLACES`; "resume", the step it resumes from; "done", a step; "operation", a file operation
that the main process is about to carry out in the run directory; "crash"; "exit", with the code.
"""

from __future__ import annotations

import builtins
import errno
import importlib
import io
import json
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

PLACES = {
    "prepare": "sora_llm.train:load_data",
    "group": "sora_llm.distributed.group:make_accelerator",
    "load": "sora_llm.train:load_and_inject",
    "begin": "sora_llm.running.rundir:RunDirectory.begin",
    "training": "sora_llm.train:train_stage",
    "step": "sora_llm.running.training_loop:train_step",
    "line": "sora_llm.running.training_loop:log_step",
    "evaluation": "sora_llm.running.metrics:dev_loss",
    "save": "sora_llm.running.training_loop:save_checkpoint",
    "export": "sora_llm.train:cut_and_export",
    "balance": "sora_llm.pipeline:balance",
    "cut": "sora_llm.pipeline:cut_by_consensus",
    "reload": "sora_llm.peft_check:load_adapter",
    "publish": "sora_llm.export:certify_and_publish",
}
RESUME = "sora_llm.train:resume_point"
CHANGES = ("mkdir", "fsync", "rename", "replace", "unlink", "remove", "rmdir")
"""Functions of `os` that change files on disk."""


def without_numbers(path: str) -> str:
    """A path without what differs between starts: numbers, and the tokens of staging folders."""
    return re.sub("[0-9]+", "N", re.sub(r"-[0-9a-f]{8}(?=\.tmp)", "-N", path))


def trainer(arguments: Sequence[str], folder: str, run_dir: str, crash: dict[str, Any] | None = None) -> int:
    """`python -m sora_llm.train arguments…`; `crash` is for the main process: see `Files`."""
    process = os.environ.get("RANK", "0")
    trace = Trace(Path(folder) / f"trace.{process}")
    trace.note("pid", os.getpid())
    import torch

    from sora_llm.train import main

    torch.set_num_threads(1)
    for name, where in PLACES.items():
        _patch(where, partial(trace.watched, name))
    _patch(RESUME, trace.resuming)
    if process == "0":
        Files(trace, run_dir, crash).watch()
    code = main(list(arguments))
    trace.note("exit", code)
    return code


class Trace:
    """A file of events, each on disk when `note` returns, even if the process is killed right afterwards."""

    def __init__(self, path: Path) -> None:
        self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
        self.step = 0
        self.places: list[tuple[str, Counter[str]]] = []
        """Where the program is, innermost last, each with the operations there so far."""

    def note(self, what: str, value: Any) -> None:
        os.write(self._file, (json.dumps([time.monotonic(), what, value]) + "\n").encode())

    def watched(self, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def function(*positional: Any, **named: Any) -> Any:
            self.note("begin", name)
            self.places.append((name, Counter()))
            try:
                result = plain(*positional, **named)
            finally:
                self.places.pop()
                self.note("end", name)
            if name == "step":
                self.step += 1
                self.note("done", self.step)
            return result

        return function

    def resuming(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def resume_point(*positional: Any) -> Any:
            start = plain(*positional)
            self.step = start.step
            self.note("resume", start.step)
            return start

        return resume_point


class Files:
    """The operations on files below `run_dir`, by name: "<place> <what> <path, numbers as N> #<nth in this place>".

    `crash` is {"operation": such a name, "when": …, "visit": 1}.  "before", "after" and "torn": the process kills
    itself before or after it, or when half of the bytes are written; "no space": the operation fails.  It happens when
    the process reaches the operation for the visit-th time.
    """

    def __init__(self, trace: Trace, run_dir: str, crash: dict[str, Any] | None) -> None:
        self._trace, self._run_dir, self._crash = trace, run_dir, crash or {"operation": None, "when": None}
        self._visits = 0

    def watch(self) -> None:
        """Patch `os`, `open` and the writer of safetensors, which does not use Python's."""
        import safetensors.torch

        for name in CHANGES:
            setattr(os, name, self._operation(name, getattr(os, name)))
        builtins.open = io.open = self._opening(io.open)
        safetensors.torch.serialize_file = self._writing_tensors(safetensors.torch.serialize_file)

    def _operation(self, what: str, plain: Callable[..., Any]) -> Callable[..., Any]:
        def operation(target: Any, *more: Any, **named: Any) -> Any:
            when = self._at(what, _path(target, named.get("dir_fd")))
            self._hurt_before(when)
            result = plain(target, *more, **named)
            if when == "after":
                self._die()
            return result

        return operation

    def _opening(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def opening(target: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            if mode in ("r", "rb"):
                return plain(target, mode, *more, **named)
            path = _path(target)
            file = opened(target, mode, *more, **named)
            if path.startswith(self._run_dir):
                file.write = self._writing(path, file, file.write)
            return file

        opened = self._operation("open", plain)
        return opening

    def _writing(self, path: str, file: Any, plain: Callable[..., Any]) -> Callable[..., Any]:
        def write(content: Any) -> Any:
            when = self._at("write", path)
            self._hurt_before(when)
            result = plain(content[: len(content) // 2] if when == "torn" else content)
            if when in ("torn", "after"):
                file.flush()
                self._die()
            return result

        return write

    def _writing_tensors(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        def serialize_file(tensors: Any, target: Any, *more: Any, **named: Any) -> None:
            when = self._at("write", _path(target))
            self._hurt_before(when)
            plain(tensors, target, *more, **named)
            if when == "torn":
                os.truncate(target, Path(target).stat().st_size // 2)
            if when in ("torn", "after"):
                self._die()

        return serialize_file

    def _at(self, what: str, path: str) -> str | None:
        """Notes the operation; returns when to die in it, if at all."""
        if not (self._trace.places and path.startswith(self._run_dir)):
            return None
        place, seen = self._trace.places[-1]
        name = f"{place} {what} {without_numbers(path.removeprefix(self._run_dir).lstrip('/') or '.')}"
        seen[name] += 1
        name = f"{name} #{seen[name]}"
        self._trace.note("operation", name)
        if name != self._crash["operation"]:
            return None
        self._visits += 1
        return self._crash["when"] if self._visits == self._crash["visit"] else None

    def _hurt_before(self, when: str | None) -> None:
        if when == "before":
            self._die()
        elif when == "no space":
            self._trace.note("crash", self._crash["operation"])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def _die(self) -> None:
        self._trace.note("crash", self._crash["operation"])
        os.kill(os.getpid(), signal.SIGKILL)


def _path(target: Any, folder: int | None = None) -> str:
    """Of a path, a descriptor, or a name in the folder of a descriptor."""
    if isinstance(target, int):
        return str(Path(f"/proc/self/fd/{target}").readlink())
    if folder is not None:
        return str(Path(f"/proc/self/fd/{folder}").readlink() / os.fspath(target))
    return os.fspath(target)


def _patch(where: str, replaced: Callable[[Callable[..., Any]], Callable[..., Any]]) -> None:
    module, path = where.split(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    setattr(owner, name, replaced(getattr(owner, name)))


if __name__ == "__main__":  # for launchers
    sys.exit(trainer(**json.loads(sys.argv[1])))
