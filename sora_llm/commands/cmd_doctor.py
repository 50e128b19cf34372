"""`sora-llm doctor`: check whether this machine can train, with remedies for what fails."""

from __future__ import annotations

import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

from sora_llm.arguments import Parser
from sora_llm.commands.common import run_command
from sora_llm.errors import UserError
from sora_llm.extensions import (
    COMPILER,
    HEADERS,
    NINJA,
    NOT_BUILT,
    STALE_LOCK_SECONDS,
    extensions_folder,
    locks,
    locks_by_existence,
    missing_tools,
)
from sora_llm.files import cache_home, nearest_existing

OK, WARNING, FAILED = "ok", "warning", "failed"
LITTLE_DISK_GIB, NO_DISK_GIB, LITTLE_SHM_MIB = 20, 1, 256
_LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


REMEDIES = {
    "group": "processes of this machine must reach each other at 127.0.0.1: check firewalls and the NCCL_ and GLOO_ "
    "variables, or train with one process",
    "nf4": "install the versions of constraints.txt, or train with quantization.load_in_4bit: false",
    "packing": "install the versions of constraints.txt, or set data.sample_packing: false",
    "zero2": "fix the problems above, or train with distributed.strategy: ddp",
}
"""What to do if a check fails, by its name."""
BETWEEN_TWO = ("group", "zero2")
"""The checks that run in two processes."""


@dataclass(frozen=True)
class CheckResult:
    """The result of a check; `remedy` says what to do if `state` is not ok."""

    name: str
    state: str
    said: str
    remedy: str = ""


def make_parser(prog: str) -> Parser:
    """The command's arguments."""
    parser = Parser(
        prog=prog,
        description="Try out what training needs: versions, devices, compiler, disk, a process group, 4-bit kernels, "
        "packing, a step under ZeRO-2.  The exit code is 1 if something needed fails.",
    )
    parser.add_argument(
        "--time-limit", type=float, default=300.0, metavar="SECONDS", help="of every check; default %(default)g"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm doctor") -> int:
    """The command; returns its exit code."""
    parser = make_parser(prog)
    arguments = parser.parse_args(argv)
    if not arguments.time_limit > 0:
        parser.error(f"--time-limit is {arguments.time_limit:g}; it is a number of seconds above 0")
    results: list[CheckResult] = []

    def command() -> dict[str, Any]:
        for result in examine(arguments.time_limit):
            results.append(result)
            if not arguments.json:
                print(as_text(result), flush=True)
        ready = all(result.state != FAILED for result in results)
        return {"ready": ready, "findings": [asdict(result) for result in results]}

    code = run_command(command, arguments.json, lambda _: f"\n{verdict(results)}")
    return code or int(any(result.state == FAILED for result in results))


def verdict(results: Sequence[CheckResult]) -> str:
    """Whether this machine is ready, in one line."""
    failed = [result.name for result in results if result.state == FAILED]
    if failed:
        return f"not ready: {', '.join(failed)}"
    if any(result.name == "zero2" and result.state == WARNING for result in results):
        return "ready to train with one process or under distributed.strategy: ddp; not under ZeRO on the CPU"
    return "ready to train"


def as_text(result: CheckResult) -> str:
    """A line for the result, and one more for its remedy, if any."""
    line = f"{result.state:<8} {result.name:<14} {result.said}"
    return f"{line}\n{'':<24}→ {result.remedy}" if result.remedy else line


def examine(time_limit: float) -> Iterator[CheckResult]:
    """All results, cheap ones first; checks that cannot succeed are skipped."""
    found = list(versions())
    yield from found
    if any(result.state == FAILED for result in found):
        return
    yield run_check(
        "devices", time_limit, "install a torch and a driver that fit each other, or set CUDA_VISIBLE_DEVICES="
    )
    compiles = compiler()
    yield compiles
    try:
        yield build_lock(extensions_folder())
        yield from disks()
    except UserError as error:
        yield CheckResult("caches", FAILED, str(error))
    for name, remedy in REMEDIES.items():
        tried = run_check(name, time_limit, remedy)
        yield without_compiler(tried, compiles) if name == "zero2" and compiles.state != OK else tried


def without_compiler(found: CheckResult, compiles: CheckResult) -> CheckResult:
    """The result of the ZeRO check if a compiler is missing: a warning if that is why it failed, since the installation
    is fine and all other strategies train.  Any other failure stays one."""
    if found.state != FAILED or not found.said.startswith(NOT_BUILT):
        return found
    return CheckResult(found.name, WARNING, found.said, compiles.remedy)


# ------------------------------------------------------------------------------------------------ without a process


def versions() -> Iterator[CheckResult]:
    """Check the versions of Python and of the packages that this one requires."""
    python = platform.python_version()
    if (3, 10) <= sys.version_info[:2] <= (3, 13):
        yield CheckResult("python", OK, python)
    else:
        yield CheckResult("python", FAILED, python, "use Python 3.10, 3.11, 3.12 or 3.13")
    try:
        required = [Requirement(text) for text in metadata.requires("sora_llm") or ()]
    except metadata.PackageNotFoundError:
        yield CheckResult("packages", WARNING, "sora_llm itself is not installed", "pip install -c constraints.txt .")
        return
    wrong, seen = [], []
    for requirement in required:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, not {requirement.specifier}")
        seen.append(f"{requirement.name} {version}")
    if wrong:
        yield CheckResult("packages", FAILED, ", ".join(wrong), "pip install -c constraints.txt .")
    else:
        yield CheckResult("packages", OK, ", ".join(seen[:6]))


def compiler() -> CheckResult:
    """Check for a compiler: DeepSpeed compiles one small operator when it runs on the CPU, train.torch_compile blocks
    everywhere."""
    missing = missing_tools(COMPILER, NINJA, HEADERS)
    if not missing:
        return CheckResult("compiler", OK, "a C++ compiler, ninja and Python's headers")
    return CheckResult(
        "compiler",
        WARNING,
        f"no {' and no '.join(missing)}, needed for ZeRO on a CPU and for train.torch_compile",
        f"{' and '.join(missing.values())}, or use distributed.strategy: ddp there",
    )


def build_lock(folder: Path) -> CheckResult:
    """Check for the lock that a killed build leaves, on which every later one waits forever."""
    for lock, age in locks(folder) if locks_by_existence() else ():
        if age > STALE_LOCK_SECONDS:
            said = f"{lock} is {age / 60:,.0f} minutes old, left by a killed build: later builds wait for it"
            return CheckResult("build lock", FAILED, said, f"rm {lock}")
    return CheckResult("build lock", OK, f"none left in {folder}")


def disks() -> Iterator[CheckResult]:
    """Check the room for tokens, models and runs, and that in /dev/shm, which processes share."""
    places = {
        "disk: data": cache_home() / "sora_llm",
        "disk: models": Path(os.environ.get("HF_HOME") or cache_home() / "huggingface"),
        "disk: runs": Path.cwd(),
    }
    for name, place in places.items():
        existing = nearest_existing(place)
        free = shutil.disk_usage(existing).free / 2**30
        said = f"{free:,.1f} GiB free for {place}"
        if not os.access(existing, os.W_OK):
            yield CheckResult(name, FAILED, f"{existing} cannot be written", "give this user write permission")
        elif free < NO_DISK_GIB:
            yield CheckResult(name, FAILED, said, "make room, or move it: data.cache_dir, HF_HOME, output.output_dir")
        elif free < LITTLE_DISK_GIB:
            yield CheckResult(
                name, WARNING, said, "a 7B model takes 14 GB; HF_HOME and data.cache_dir can be moved elsewhere"
            )
        else:
            yield CheckResult(name, OK, said)
    shm = Path("/dev/shm")
    if shm.is_dir():
        size = shutil.disk_usage(shm).total / 2**20
        if size < LITTLE_SHM_MIB:
            said = f"{size:,.0f} MiB, little for several processes"
            yield CheckResult("/dev/shm", WARNING, said, "start the container with --shm-size=1g or --ipc=host")


# --------------------------------------------------------------------------------------------------------- in others


def run_check(name: str, time_limit: float, remedy: str, module: str = "sora_llm.commands.checks") -> CheckResult:
    """The result of a check in processes of its own, which are killed when its time is up."""
    count = 2 if name in BETWEEN_TWO else 1
    with tempfile.TemporaryDirectory(prefix="sora_llm_doctor_") as folder:
        outputs = [Path(folder) / str(index) for index in range(count)]
        port = _free_port()
        processes = [_start([module, name], i, count, port, output) for i, output in enumerate(outputs)]
        try:
            in_time = _wait(processes, time_limit)
        finally:
            for process in processes:
                _end(process)
        texts = [output.read_text(encoding="utf-8", errors="replace") for output in outputs]
    ended = [(process.returncode, text) for process, text in zip(processes, texts, strict=True)]
    if not in_time:
        return CheckResult(name, FAILED, f"no result within {time_limit:g} s", remedy)
    # A process that was killed here because another one failed says nothing.
    for code, text in sorted(ended, key=lambda end: end[0] <= 0):
        if code != 0:
            return CheckResult(name, FAILED, _last_line(text) or f"ended with exit code {code}", remedy)
    return CheckResult(name, OK, json.loads(_last_line(texts[0]))["said"])


def _start(command: Sequence[str], index: int, count: int, port: int, output: Path) -> subprocess.Popen[bytes]:
    environ = {k: v for k, v in os.environ.items() if k not in _LAUNCHER and not k.startswith("ACCELERATE_")}
    if count > 1:
        environ |= {"RANK": str(index), "LOCAL_RANK": str(index), "WORLD_SIZE": str(count)}
        environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    with output.open("wb") as file:
        return subprocess.Popen(
            [sys.executable, "-m", *command],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _wait(processes: Sequence[subprocess.Popen[bytes]], time_limit: float) -> bool:
    """Whether all processes ended, or one failed, before the time was up."""
    deadline = time.monotonic() + time_limit
    while time.monotonic() < deadline:
        codes = [process.poll() for process in processes]
        if all(code == 0 for code in codes) or any(code not in (0, None) for code in codes):
            return True
        time.sleep(0.05)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and everything it started (compilers, for example)."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _last_line(text: str) -> str:
    """The last line that a process printed."""
    return next((line.strip() for line in reversed(text.splitlines()) if line.strip()), "")
