"""Trainers in real processes, in a second instead of fifteen: forked from a process that has imported everything.

    with Nursery(folder) as nursery:
        one = nursery.start("faults:trainer", {"arguments": [CONFIG, ...]})
        two = nursery.world("faults:trainer", 2, {"arguments": [CONFIG, ...]})
        assert one.wait(60) == 75 and [process.wait(60) for process in two] == [75, 75]

The function is called with the keyword arguments (anything JSON holds) in a process that has a session and an output
file of its own; what it returns is the exit code, and the interpreter ends as it does after any program.  Whoever
started a process is its parent, as with a launcher: `launcher` puts a process between, which can be killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spawn import TESTS, environment, launched

QUOTED_LINES = 40
POLL_SECONDS = 0.02
PR_SET_CHILD_SUBREAPER = 36


@dataclass(frozen=True)
class Child:
    """A process that the nursery has started; its folder holds output, pid and exit code."""

    folder: Path
    nursery: subprocess.Popen[bytes]

    @property
    def pid(self) -> int:
        return int(self._said("pid", 300))

    @property
    def output(self) -> str:
        path = self.folder / "output"
        return path.read_text(errors="replace") if path.exists() else ""

    def wait(self, timeout: float = 300) -> int:
        """The exit code, −N after signal N.  Raises AssertionError with the output if it takes longer."""
        return int(self._said("exit", timeout))

    def is_alive(self) -> bool:
        return not (self.folder / "exit").exists()

    def kill(self, number: int = signal.SIGKILL) -> None:
        os.kill(self.pid, number)

    def _said(self, name: str, timeout: float) -> str:
        deadline = time.monotonic() + timeout
        while not (self.folder / name).exists():
            if self.nursery.poll() is not None:
                raise AssertionError(f"the nursery has ended:\n{(self.folder.parent / 'nursery').read_text()}")
            if time.monotonic() > deadline:
                lines = "\n".join(self.output.splitlines()[-QUOTED_LINES:])
                raise AssertionError(f"no {name} of {self.folder.name} after {timeout:g} s; its output ends:\n{lines}")
            time.sleep(POLL_SECONDS)
        return (self.folder / name).read_text()


class Nursery:
    """Use it as a context: what is left of its children is killed at its end."""

    def __init__(self, folder: Path, *modules: str) -> None:
        """`modules` are imported once, before any process is started."""
        self.folder = folder
        self._children: list[Child] = []
        with (folder / "nursery").open("w") as output:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(folder), *modules],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                env=environment(),
                cwd=TESTS.parent,
                start_new_session=True,
            )

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_error: object) -> None:
        for child in self._children:
            if child.is_alive() and (child.folder / "pid").exists():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(60)

    def start(self, function: str, arguments: Mapping[str, Any], environ: Mapping[str, str] | None = None) -> Child:
        """Call `function` ("module:function") in a new process."""
        folder = self.folder / f"{len(self._children)}"
        folder.mkdir()
        child = Child(folder, self._process)
        self._children.append(child)
        call = {
            "function": function,
            "arguments": dict(arguments),
            "environ": dict(environ or {}),
            "folder": str(folder),
        }
        assert self._process.stdin is not None
        self._process.stdin.write((json.dumps(call) + "\n").encode())
        self._process.stdin.flush()
        return child

    def world(self, function: str, num_processes: int, arguments: Mapping[str, Any]) -> list[Child]:
        """The same call in several processes, which find each other as those of a launcher do."""
        return [self.start(function, arguments, environ) for environ in launched(num_processes)]

    def launcher(
        self, function: str, num_processes: int, arguments: Mapping[str, Any], *, marks: bool = True
    ) -> tuple[Child, list[Child]]:
        """A process that does nothing but to start such a world and to wait for it, and the world.

        Without `marks` it leaves none in their environment: it is a shell.
        """
        start = len(self._children) + 1
        workers = [Child(self.folder / f"{start + index}", self._process) for index in range(num_processes)]
        calls = [
            {"function": function, "arguments": dict(arguments), "environ": environ, "folder": str(child.folder)}
            for environ, child in zip(launched(num_processes) if marks else [{}], workers, strict=True)
        ]
        for worker in workers:
            worker.folder.mkdir()
        parent = self.start("nursery:launch", {"calls": calls})
        self._children += workers
        return parent, workers


# ----- in the forked processes ----------------------------------------------------------------------------------------


def launch(calls: list[dict[str, Any]]) -> int:
    """Worker of `Nursery.launcher`: as launchers do, it ends the others when one fails."""
    pids = {_fork(call): call for call in calls}
    failed = False
    while pids:
        pid, status = os.wait()
        _leave(Path(pids.pop(pid)["folder"]), "exit", os.waitstatus_to_exitcode(status))
        if status and not failed:
            failed = True
            for other in pids:
                os.kill(other, signal.SIGTERM)
    return int(failed)


def _fork(call: Mapping[str, Any]) -> int:
    pid = os.fork()
    if pid:
        _leave(Path(call["folder"]), "pid", pid)
        return pid
    os.setsid()
    output = os.open(Path(call["folder"]) / "output", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((nothing, output, output)):
        os.dup2(descriptor, number)
    os.environ.update(call["environ"])
    module, function = call["function"].split(":")
    sys.exit(getattr(importlib.import_module(module), function)(**call["arguments"]))


def _leave(folder: Path, name: str, number: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        (folder / f".{name}").write_text(str(number))
        (folder / f".{name}").rename(folder / name)


def _serve(folder: Path) -> None:
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)  # children of a killed launcher come to this process
    buffer = b""
    while True:
        if select.select([0], [], [], POLL_SECONDS)[0]:
            received = os.read(0, 65536)
            if not received:
                return
            *lines, buffer = (buffer + received).split(b"\n")
            for call in map(json.loads, lines):
                _fork(call)
        with contextlib.suppress(ChildProcessError):
            while (found := os.waitpid(-1, os.WNOHANG))[0]:
                for pid in folder.glob("*/pid"):
                    if int(pid.read_text()) == found[0]:
                        _leave(pid.parent, "exit", os.waitstatus_to_exitcode(found[1]))


if __name__ == "__main__":
    sys.modules["nursery"] = sys.modules["__main__"]
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # the collector would write to every page, and so copy all of them into every child
    _serve(Path(sys.argv[1]))
