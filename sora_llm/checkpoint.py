"""Canonical checkpoints.

A checkpoint holds the adapter's float32 masters and Adam moments by name in safetensors, the rest in JSON: nothing
about processes or strategies, nothing from the frozen backbone, nothing that is unpickled.

    checkpoints/step-N/adapter.safetensors     "<module>.lora_A", "<module>.lora_A.exp_avg", …
    checkpoints/step-N/replica-K.safetensors   with local updates: each replica's own; the adapter is the agreed one
    checkpoints/step-N/best.safetensors        the masters at the lowest dev loss so far, if patience is used
    checkpoints/step-N/state.json              step, counters, the resolved config
    checkpoints/step-N/COMPLETE                SHA-256 of the others, written last
"""

from __future__ import annotations

import contextlib
import itertools
import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sora_llm import run_files
from sora_llm.errors import RunFailed, UserError
from sora_llm.files import file_sha256, fsync, make_folder, publish, write_text_atomically

TENSORS, BEST, COMPLETE = "adapter.safetensors", "best.safetensors", "COMPLETE"
STATE = run_files.CHECKPOINT_STATE


def save(
    run_dir: Path,
    step: int,
    tensors: Mapping[str, Tensor],
    state: Mapping[str, Any],
    num_replicas: int = 0,
    best: Mapping[str, Tensor] | None = None,
) -> Path:
    """Write checkpoints/step-N under a temporary name, complete, and rename it.  Call it on one process; if replicas
    differ, after `begin_replicas` and each replica's `save_replica`.

    Raises:
        RunFailed: the disk is full or read-only, or a replica's file is not visible; older checkpoints are untouched.
    """
    folder = run_dir / run_files.CHECKPOINTS / f"step-{step}"
    temporary = _temporary(run_dir, step)
    with _or_fail(run_dir, step):
        if num_replicas == 0:
            begin_replicas(run_dir, step)
        _save_tensors(tensors, temporary / TENSORS)
        (temporary / STATE).write_text(json.dumps({**state, "step": step}, indent=1), encoding="utf-8")
        fsync(temporary / STATE)
        names = [TENSORS, STATE, *(replica_file(index) for index in range(num_replicas))]
        if best is not None:
            _save_tensors(best, temporary / BEST)
            names.append(BEST)
        hashes = {name: file_sha256(temporary / name) for name in names}
        write_text_atomically(temporary / COMPLETE, _complete(hashes))
        publish(temporary, folder)
    return folder


def drop_older(folder: Path, keep: int | None) -> None:
    """Drop all checkpoints of a run except this one and the newest `keep` − 1 others; None keeps them all."""
    if keep is None:
        return
    others = [other for other in _folders(folder.parent.parent) if other != folder]
    for old in others[keep - 1 :]:
        with contextlib.suppress(OSError):
            shutil.rmtree(old.rename(old.with_name(f".{old.name}.old")), ignore_errors=True)


def begin_replicas(run_dir: Path, step: int) -> None:
    """Make the folder in which a checkpoint is assembled.  Call it on one process.

    Raises:
        RunFailed: as `save`.
    """
    with _or_fail(run_dir, step):
        make_folder(run_dir / run_files.CHECKPOINTS)
        remove_leftovers(run_dir)
        _temporary(run_dir, step).mkdir()


def save_replica(run_dir: Path, step: int, index: int, tensors: Mapping[str, Tensor]) -> None:
    """Write the own state of replica `index` into the folder made by `begin_replicas`.

    Raises:
        RunFailed: as `save`.
    """
    with _or_fail(run_dir, step):
        folder = _temporary(run_dir, step)
        if not folder.is_dir():
            raise OSError(
                f"{folder}, created by the main process, is not visible here: output.output_dir must be on a file "
                "system that all machines share"
            )
        _save_tensors(tensors, folder / replica_file(index))


def replica_file(index: int) -> str:
    """The name of a replica's file in a checkpoint."""
    return f"replica-{index}.safetensors"


def _temporary(run_dir: Path, step: int) -> Path:
    return run_dir / run_files.CHECKPOINTS / f".step-{step}.tmp"


def _save_tensors(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
    fsync(path)


@contextlib.contextmanager
def _or_fail(run_dir: Path, step: int) -> Iterator[None]:
    """RunFailed, with nothing left behind, if a checkpoint cannot be written."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        shutil.rmtree(_temporary(run_dir, step), ignore_errors=True)
        earlier = "earlier checkpoints are intact: " if _folders(run_dir) else ""
        raise RunFailed(
            f"the checkpoint of step {step} could not be saved in {run_dir / run_files.CHECKPOINTS} ({error}); "
            f"{earlier}free some space and run the same command again"
        ) from error


def remove_leftovers(run_dir: Path) -> None:
    """Remove checkpoints that a killed process left half written or half deleted."""
    for leftover in (run_dir / run_files.CHECKPOINTS).glob(".step-*"):
        shutil.rmtree(leftover, ignore_errors=True)


def _complete(hashes: Mapping[str, str]) -> str:
    """The content of COMPLETE."""
    return json.dumps(hashes, indent=1)


def _folders(run_dir: Path) -> list[Path]:
    """Checkpoint folders that claim to be complete, newest first."""
    found = [path.parent for path in (run_dir / run_files.CHECKPOINTS).glob(f"step-*/{COMPLETE}")]
    return sorted((folder for folder in found if _step_of(folder) >= 0), key=_step_of, reverse=True)


def _step_of(folder: Path) -> int:
    """The step that a folder is named after; −1 for another name."""
    number = folder.name.removeprefix("step-")
    return int(number) if number.isdecimal() else -1


def check_complete(folder: Path) -> None:
    """UserError for a folder that holds no checkpoint, or an unfinished one."""
    if not (folder / COMPLETE).exists():
        raise UserError(f"{folder} is not a complete checkpoint: it has no {COMPLETE}, which is written last")


def read_state(folder: Path) -> dict[str, Any]:
    """The verified state.json of a checkpoint (every file's hash is checked first).

    Raises:
        UserError: not a complete checkpoint, or its files are not the ones that were written.
    """
    check_complete(folder)
    try:
        said = (folder / COMPLETE).read_text(encoding="utf-8")
        hashes = json.loads(said)
        names = [TENSORS, STATE, *(name for name in hashes if name not in (TENSORS, STATE))]
        if any(Path(name).name != name for name in names):
            raise ValueError("files outside the folder")
        found = {name: file_sha256(folder / name) for name in names}
        damaged = [name for name in found if found[name] != hashes[name]]
        if said == _complete(found):
            state: dict[str, Any] = json.loads((folder / STATE).read_text(encoding="utf-8"))
            return state
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is not a complete checkpoint ({type(error).__name__}: {error})") from None
    raise UserError(f"the checkpoint {folder} is damaged: {', '.join(damaged) or COMPLETE} is not what was saved")


def read_tensors(folder: Path, file: str = TENSORS) -> dict[str, Tensor]:
    """The tensors of a checkpoint that `read_state` has accepted, perhaps on another machine, so checked again.

    Raises:
        UserError: they cannot be read, for example on a machine that does not see the folder.
    """
    try:
        if file_sha256(folder / file) == json.loads((folder / COMPLETE).read_text(encoding="utf-8"))[file]:
            return load_file(folder / file)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the checkpoint {folder} cannot be read: {error}") from None
    raise UserError(f"the checkpoint {folder} is damaged: {file} is not what was saved")


def newest(run_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest complete, undamaged checkpoint of a run, and why newer ones were skipped."""
    warnings = []
    for folder in _folders(run_dir):
        try:
            read_state(folder)
        except UserError as error:
            warnings.append(str(error))
        else:
            return folder, warnings
    return None, warnings


def set_aside(run_dir: Path, step: int) -> None:
    """Rename checkpoints of later steps when a run continues from `step`, so that they count neither as the newest nor
    as ones to keep.

    A later one, which the run has abandoned, becomes abandoned-step-N, or abandoned-step-N.2 and so on if that exists;
    an incomplete one becomes damaged-step-N.  Earlier ones are not read.
    """
    for folder in _folders(run_dir):
        if _step_of(folder) <= step:
            break
        try:
            read_state(folder)
            aside = f"abandoned-{folder.name}"
        except UserError:
            aside = f"damaged-{folder.name}"
        names = itertools.chain([aside], (f"{aside}.{number}" for number in itertools.count(2)))
        folder.rename(next(place for name in names if not (place := folder.with_name(name)).exists()))
