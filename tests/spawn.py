"""Run a worker function in real processes of one process group and bring back what each of them returns.

    results = spawn("worlds:strategy_world", 2, {"strategy": "zero2"}, timeout=120)

The worker is a module-level function "module:function" of this folder, called with the keyword arguments (anything JSON
holds) in every process, after RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT have been set as a launcher
sets them.  What it returns is whatever torch.save takes and torch.load takes back with weights_only=True.

A worker that fails or hangs gives a WorkerError that quotes the end of every process's output, and everything that was
started is ended.  A worker whose pytest is gone ends itself.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

TESTS = Path(__file__).resolve().parent
REPOSITORY = TESTS.parent
EXTENSIONS = Path(tempfile.gettempdir()) / "sora_llm_test_extensions"
"""Where DeepSpeed's op is built unless TORCH_EXTENSIONS_DIR says: a killed build leaves a lock in the cache that all
share, on which later runs hang."""
GRACE_SECONDS = 20  # after one process failed: how long the others get to fail for their own, better reasons
QUOTED_LINES = 25
_LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


class WorkerError(AssertionError):
    """A spawned process failed or did not end in time."""


_held: list[socket.socket] = []


def free_port() -> int:
    """A TCP port that nobody listens on, and that the kernel gives to nobody else who asks for any: this process keeps
    it bound without listening, which lets whoever names it (and, as torch does, sets SO_REUSEADDR) listen there."""
    probe = socket.socket()
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    probe.bind(("127.0.0.1", 0))
    _held.append(probe)
    return probe.getsockname()[1]


def launched(num_processes: int) -> list[dict[str, str]]:
    """What a launcher puts into the environment of each process of a world."""
    port = str(free_port())
    return [
        {
            "RANK": str(index),
            "LOCAL_RANK": str(index),
            "WORLD_SIZE": str(num_processes),
            "LOCAL_WORLD_SIZE": str(num_processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        for index in range(num_processes)
    ]


def environment(**more: str) -> dict[str, str]:
    """This process's environment without what a launcher would have said, one thread per process."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in _LAUNCHER_VARIABLES and not name.startswith("ACCELERATE_")
    }
    path = os.pathsep.join(filter(None, [str(REPOSITORY), str(TESTS), os.environ.get("PYTHONPATH")]))
    return {**kept, "OMP_NUM_THREADS": "1", "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **more}


def spawn(
    worker: str, num_processes: int, arguments: Mapping[str, Any] | None = None, *, timeout: float = 400
) -> list[Any]:
    """What `worker(**arguments)` returned in each of `num_processes` processes, in their order.

    Raises:
        WorkerError: a process failed, or not all had ended after `timeout` seconds.
    """
    with tempfile.TemporaryDirectory(prefix="sora_llm_spawn_") as name:
        folder = Path(name)
        (folder / "call.json").write_text(json.dumps({"worker": worker, "arguments": dict(arguments or {})}))
        processes = []
        try:
            for index, variables in enumerate(launched(num_processes)):
                with (folder / f"output-{index}").open("w") as output:
                    process = subprocess.Popen(
                        [sys.executable, __file__, str(folder)],
                        env=environment(**variables),
                        stdout=output,
                        stderr=subprocess.STDOUT,
                        start_new_session=True,
                    )
                processes.append(process)
            verdict = _wait(processes, timeout)
        finally:
            for process in processes:
                end_group(process)
        if verdict is not None:
            outputs = [(folder / f"output-{index}").read_text(errors="replace") for index in range(num_processes)]
            raise WorkerError(f"{worker}: {verdict}\n" + "\n".join(map(_quote, range(num_processes), outputs)))

        import torch

        return [torch.load(folder / f"result-{index}.pt", weights_only=True) for index in range(num_processes)]


def _wait(processes: Sequence[subprocess.Popen], timeout: float) -> str | None:
    """None when all ended well, else what went wrong."""
    deadline, failed = time.monotonic() + timeout, False
    while any(process.poll() is None for process in processes):
        if not failed and any(process.poll() for process in processes):
            failed, deadline = True, min(deadline, time.monotonic() + GRACE_SECONDS)
        if time.monotonic() > deadline:
            break
        time.sleep(0.05)
    codes = {index: process.poll() for index, process in enumerate(processes)}
    if not any(code != 0 for code in codes.values()):
        return None
    bad = [
        f"process {i} {'did not end' if code is None else f'ended with {code}'}"
        for i, code in codes.items()
        if code != 0
    ]
    hung = not any(codes.values())  # nobody failed: time was up
    return ", ".join(bad) + (f" within {timeout:g} s" if hung else "")


def end_group(process: subprocess.Popen) -> None:
    """End a process that was started in a session of its own, and all it has started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _quote(index: int, output: str) -> str:
    lines = output.rstrip().splitlines()[-QUOTED_LINES:]
    return "\n".join([f"--- process {index}", *lines])


def run_command(command: Sequence[str], *, timeout: float = 180, **variables: str) -> tuple[int, str]:
    """(exit code, stdout and stderr) of a command in the repository's root; all it started is ended with it.

    Raises:
        WorkerError: it did not end in time.
    """
    with tempfile.TemporaryFile("w+") as output:
        code = _run(command, timeout, variables, output, output)
        return code, _whole(output)


def run_apart(command: Sequence[str], *, timeout: float = 180, **variables: str) -> tuple[int, str, str]:
    """As `run_command`, with stdout and stderr apart."""
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        code = _run(command, timeout, variables, output, errors)
        return code, _whole(output), _whole(errors)


def _run(command: Sequence[str], timeout: float, variables: Mapping[str, str], output: IO[str], errors: IO[str]) -> int:
    process = subprocess.Popen(
        list(command),
        cwd=REPOSITORY,
        env=environment(**variables),
        stdout=output,
        stderr=errors,
        start_new_session=True,
    )
    try:
        return process.wait(timeout)
    except subprocess.TimeoutExpired:
        said = _whole(output) if output is errors else _whole(output) + _whole(errors)
        raise WorkerError(f"{' '.join(command)} did not end within {timeout:g} s\n{_quote(0, said)}") from None
    finally:
        _end_family(process)


def _whole(file: IO[str]) -> str:
    file.seek(0)
    return file.read()


def _end_family(process: subprocess.Popen) -> None:
    """End a launcher and its workers, each of which has a session of its own."""
    import psutil

    try:
        family = psutil.Process(process.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    end_group(process)
    for child in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.kill()


@functools.cache
def warm_deepspeed(timeout: float = 540) -> None:
    """Build DeepSpeed's one CPU op into TORCH_EXTENSIONS_DIR, once, so that no test's timeout has to allow for it.

    A build that was killed leaves a lock file there on which every later process would wait for ever: it is removed.
    """
    folder = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))) / "deepspeed_shm_comm"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with (folder.parent / "warming.lock").open("w") as mine:
        fcntl.flock(mine, fcntl.LOCK_EX)  # one of pytest-xdist's workers builds; to the others its lock would look old
        if not (folder / "deepspeed_shm_comm.so").exists():
            (folder / "lock").unlink(missing_ok=True)
            spawn("spawn:build_deepspeed_op", 1, timeout=timeout)


def build_deepspeed_op() -> None:
    """Worker of `warm_deepspeed`."""
    from deepspeed.ops.op_builder.cpu import ShareMemCommBuilder

    ShareMemCommBuilder().load()


def _end_with_parent() -> None:
    parent = os.getppid()
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _main(folder: Path) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    call = json.loads((folder / "call.json").read_text())
    module, function = call["worker"].split(":")

    import torch

    result = getattr(importlib.import_module(module), function)(**call["arguments"])
    temporary = folder / f"result-{os.environ['RANK']}.tmp"
    torch.save(result, temporary)
    temporary.rename(temporary.with_suffix(".pt"))
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may still hold the connection of a group whose other members are gone


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
