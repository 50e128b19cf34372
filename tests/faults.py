"""A trainer to which something happens at a given moment, and the small runs that it happens to.

    trainer([CONFIG, ...], faults=[{"place": "step", "nth": 4, "do": "TERM", "process": 1}], folder=…)

A place is a function of the run; a fault happens when it is called for the nth time (1), on the given process (0; null:
on all).  What it may do:

    signals' names    the process sends them to itself (KILL: it dies; STOP: it hangs, as one that swaps)
    stop file         a file STOP appears in the run directory
    raise             the function raises the error that a GPU without memory gives
    report            leaves a file `<place>-<nth>.<process>` in `folder`, and goes on
    wait              the same, and goes on when there is a file `go` there
    until asked       the same, and goes on when this process has been asked to stop
    count state       leaves there how many numbers all optimizers in memory keep
    timeouts          leaves there the timeouts of all process groups, in seconds
    corrupt           one bit of the first adapter tensor of the engine that the function takes is flipped
    deepspeed config  leaves there what DeepSpeed's engine inside that engine was given
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

PLACES = {
    "prepare": "sora_llm.train:load_data",
    "lock": "sora_llm.running.run_state:run_lock",
    "rows": "sora_llm.data.chunks:Tokenizing.tokenize",
    "group": "sora_llm.distributed.group:make_accelerator",
    "connect": "sora_llm.running.liveness:LivenessMonitor.connect",
    "load": "sora_llm.running.assembly:load_backbone",
    "step": "sora_llm.running.training_loop:train_step",
    "evaluation": "sora_llm.running.evaluation:causal_loss_sum",  # a batch of it
    "save": "sora_llm.checkpoint:save_file",
    "rename": "sora_llm.checkpoint:publish",
    "cut": "sora_llm.pipeline:cut_by_consensus",
    "reload": "sora_llm.peft_check:load_adapter",
    "publish": "sora_llm.export:certify_and_publish",
}
END = "end"
"""The place after `main` has returned."""


def trainer(
    arguments: Sequence[str],
    faults: Sequence[dict[str, Any]] = (),
    folder: str = "",
    run_dir: str = "",
    audit: bool = False,
) -> int:
    """`python -m sora_llm.train arguments…` with faults.

    `audit` leaves in `folder`/writes.<process> what the process has written, renamed or removed in the run directory.
    """
    from sora_llm.train import main

    for place in {fault["place"] for fault in faults} - {END}:
        _patch(place, [fault for fault in faults if fault["place"] == place], folder, run_dir)
    writes: set[str] = set()
    if audit:
        _audit(run_dir, writes)
    code = main(list(arguments))
    if audit:
        (Path(folder) / f"writes.{_process()}").write_text(json.dumps(sorted(writes)))
    for fault in faults:
        if fault["place"] == END and _is_here(fault):
            _happen(fault["do"], Path(folder) / END, Path(run_dir))
    return code


def _patch(place: str, faults: Sequence[dict[str, Any]], folder: str, run_dir: str) -> None:
    module, path = PLACES[place].split(":")
    owner: Any = importlib.import_module(module)
    *classes, name = path.split(".")
    for part in classes:
        owner = getattr(owner, part)
    plain, calls = getattr(owner, name), 0

    def faulty(*positional: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        for fault in faults:
            if fault.get("nth", 1) == calls and _is_here(fault):
                _happen(fault["do"], Path(folder) / f"{place}-{calls}.{_process()}", Path(run_dir), positional)
        return plain(*positional, **named)

    setattr(owner, name, faulty)


def _audit(run_dir: str, writes: set[str]) -> None:
    import safetensors.torch

    plain = safetensors.torch.serialize_file  # written in Rust, which Python's auditing does not see

    def serialize_file(tensors: Any, path: Any, *more: Any, **named: Any) -> None:
        writes.add(str(path))
        plain(tensors, path, *more, **named)

    def note(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            is_write = arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            paths = arguments[:1] if is_write else ()
        else:
            changes = ("os.rename", "os.mkdir", "os.rmdir", "os.remove", "os.truncate", "os.link", "os.symlink")
            paths = arguments[:2] if event in changes else ()
        writes.update(str(path) for path in paths if str(path).startswith(run_dir))

    safetensors.torch.serialize_file = serialize_file
    sys.addaudithook(note)


def _process() -> int:
    return int(os.environ.get("RANK", "0"))


def _is_here(fault: dict[str, Any]) -> bool:
    return fault.get("process", 0) in (None, _process())


def _happen(what: str, report: Path, run_dir: Path, arguments: Sequence[Any] = ()) -> None:
    if what == "stop file":
        run_dir.mkdir(parents=True, exist_ok=True)
        (run_dir / "STOP").touch()
    elif what == "raise":
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
    elif what == "count state":
        report.write_text(str(_numbers_of_optimizers()))
    elif what == "timeouts":
        report.write_text(json.dumps(_timeouts_of_groups()))
    elif what == "corrupt":
        _flip_a_bit(arguments[0])
    elif what == "deepspeed config":
        report.write_text(json.dumps(arguments[0].model.config))
    elif what in ("report", "wait", "until asked"):
        report.touch()
        while what == "wait" and not (report.parent / "go").exists():
            time.sleep(0.01)
        while what == "until asked" and signal.getsignal(signal.SIGTERM).__self__.reason(False) is None:
            time.sleep(0.01)
    else:
        for name in what.split():
            os.kill(os.getpid(), getattr(signal, f"SIG{name}"))


def _timeouts_of_groups() -> list[float]:
    import torch

    groups = torch.distributed.distributed_c10d._world.pg_map
    return [group._get_backend(torch.device("cpu")).options._timeout.total_seconds() for group in groups]


def _flip_a_bit(engine: Any) -> None:
    import torch

    from sora_llm.inject import adapter_parameters

    tensor = next(iter(adapter_parameters(engine.module).values())).detach()
    tensor.view(-1).view(torch.int32)[0] ^= 1


def _numbers_of_optimizers() -> int:
    from sora_llm.optim import ProxAdamW

    gc.collect()
    optimizers = [thing for thing in gc.get_objects() if isinstance(thing, ProxAdamW)]
    states = [state for optimizer in optimizers for state in optimizer.state.values()]
    return sum(tensor.numel() for state in states for tensor in state.values() if tensor.dim())


if __name__ == "__main__":  # for launchers: `… faults.py '{"arguments": …}'`
    sys.exit(trainer(**json.loads(sys.argv[1])))
