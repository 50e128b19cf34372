"""How a checkpoint gets to the disk: whole or not there whenever a process dies, a sentence where there is no room."""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpointed import FILES, STATE, TENSORS
from checkpointed import interrupted as interrupted
from checkpointed import start as start
from safetensors.torch import load_file
from small_runs import checkpoints, result, status

from sora_llm import checkpoint
from sora_llm.files import publish
from sora_llm.running.rundir import RunDirectory

# ----- what is in it, and how it gets there ---------------------------------------------------------------------------


def test_a_checkpoint_holds_adapters_and_their_moments_and_nothing_of_the_frozen_model(
    undisturbed: dict[int, Path],
) -> None:
    for directory in undisturbed.values():
        folder = directory / "checkpoints" / "step-4"
        tensors = load_file(folder / "adapter.safetensors")
        modules = json.loads(_last_line(directory / "ranks.jsonl"))["ranks"]
        factors = {f"{name}.{part}" for name in modules for part in ("lora_A", "lora_B", "gate")}
        assert tensors.keys() == factors | {f"{name}.{key}" for name in factors for key in ("exp_avg", "exp_avg_sq")}
        assert {path.name for path in folder.iterdir()} == set(FILES)
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def _last_line(path: Path) -> str:
    return path.read_text().splitlines()[-1]


@pytest.fixture
def on_disk(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Path]]:
    """Every fsync and rename from here on, in order, each rename with its target; a file is its name at that time."""
    calls: list[tuple[str, Path]] = []
    plain_fsync = os.fsync

    def fsync(descriptor: int) -> None:
        plain_fsync(descriptor)
        calls.append(("fsync", Path(f"/proc/self/fd/{descriptor}").readlink()))

    def renaming(plain: Callable[[Path, Path], Path]) -> Callable[[Path, Path], Path]:
        def rename(source: Path, target: Path) -> Path:
            calls.append((f"rename {source.name}", target))
            return plain(source, target)

        return rename

    monkeypatch.setattr(os, "fsync", fsync)
    for name in ("rename", "replace"):  # of Path: those of os, Python 3.10's pathlib has kept since it was imported
        monkeypatch.setattr(Path, name, renaming(getattr(Path, name)))
    return calls


def test_files_are_on_the_disk_before_complete_says_so_and_all_before_the_folder_has_its_name(
    tmp_path: Path, on_disk: list[tuple[str, Path]]
) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    folder = checkpoint.save(run_dir, 7, TENSORS, STATE)
    temporary = folder.with_name(".step-7.tmp")
    renames = [index for index, (what, _) in enumerate(on_disk) if what.startswith("rename")]
    assert [on_disk[index][1] for index in renames] == [temporary / "COMPLETE", folder]
    complete, published = renames
    files = [("fsync", temporary / name) for name in ("adapter.safetensors", "state.json")]
    assert set(files) <= set(on_disk[:complete])
    what, path = on_disk[complete - 1]
    assert what == "fsync" and path.name.startswith(".COMPLETE.") and path.parent == temporary  # its content
    assert {*files, ("fsync", temporary / "COMPLETE"), ("fsync", temporary)} <= set(on_disk[complete:published])
    assert on_disk[published + 1 :] == [("fsync", folder.parent)]
    assert ("fsync", run_dir) in on_disk[:complete]  # which has got a folder checkpoints/


def test_a_folder_is_published_with_all_its_names_on_the_disk(tmp_path: Path, on_disk: list[tuple[str, Path]]) -> None:
    """An exported adapter's too."""
    temporary, folder = tmp_path / ".adapter.tmp", tmp_path / "adapter"
    temporary.mkdir()
    (temporary / "weights").write_text("x")
    publish(temporary, folder)
    before = {("fsync", temporary / "weights"), ("fsync", temporary)}
    assert set(on_disk[:2]) == before and on_disk[2:] == [("rename .adapter.tmp", folder), ("fsync", tmp_path)]


def test_what_a_killed_process_had_moved_aside_is_deleted_when_the_folder_is_published_again(tmp_path: Path) -> None:
    """A second export is killed while it deletes the first one; the third one must not leave that lying about."""
    temporary, left = tmp_path / ".adapter.tmp", tmp_path / ".adapter.old.4711"
    for folder in (temporary, left):
        folder.mkdir()
        (folder / "weights").write_text("x")
    publish(temporary, tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_old_checkpoint_that_was_half_deleted_by_the_last_save_is_gone_after_the_next_start(tmp_path: Path) -> None:
    """Which saves nothing any more, and so does not come to it that way."""
    folder = checkpoint.save(tmp_path, 6, TENSORS, STATE)
    (folder.parent / ".step-2.old").mkdir()
    (folder.parent / ".step-2.old" / "state.json").write_text("{}")
    directory = RunDirectory(tmp_path, is_main=True)
    directory.begin(config_yaml="", env={}, total_steps=6, first_step=6, resumed_from=folder)
    assert checkpoints(tmp_path) == ["step-6"]


@pytest.mark.parametrize("step", [2, 1], ids=["a new step", "a step that is there already"])
def test_a_crash_before_any_fsync_and_rename_leaves_a_whole_checkpoint(tmp_path: Path, step: int) -> None:
    """A process that dies there, each time in a fresh directory, and then one that saves and is not disturbed."""
    for operations in range(100):
        run_dir = tmp_path / str(operations)
        checkpoint.save(run_dir, 1, {"x": torch.zeros(2)}, STATE)
        pid = os.fork()
        if not pid:
            _save_and_die(run_dir, step, operations)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found, warnings = checkpoint.newest(run_dir)
        assert warnings == []
        if code == 0:
            break
        # Only where a step is saved again there is a moment in which neither has the name, but both are on the disk.
        names = {path.name for path in (run_dir / "checkpoints").iterdir()}
        assert found is not None or (step == 1 and ".step-1.tmp" in names and any(".old" in name for name in names))
        checkpoint.drop_older(checkpoint.save(run_dir, 3, TENSORS, STATE), 1)
        assert checkpoints(run_dir) == ["step-3"]  # nothing half-made is left lying about
    assert operations > 8 and found is not None and found.name == f"step-{step}"
    assert checkpoint.read_tensors(found).keys() == TENSORS.keys()


def _save_and_die(run_dir: Path, step: int, operations: int) -> None:
    left = operations

    def counted(plain: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os._exit(9)
            left -= 1
            return plain(*arguments, **options)

        return operation

    os.fsync = counted(os.fsync)
    Path.rename, Path.replace = map(counted, (Path.rename, Path.replace))  # type: ignore[assignment]
    checkpoint.drop_older(checkpoint.save(run_dir, step, TENSORS, STATE), 2)
    os._exit(0)


# ----- no room --------------------------------------------------------------------------------------------------------


def is_root() -> bool:
    return os.geteuid() == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that has room for one checkpoint (of 290 KiB) and the small files of a run."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=480k", "tmpfs", str(folder)]
    if not is_root() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to mount a tmpfs")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_full_disk_fails_the_run_with_a_sentence_and_with_room_it_goes_on(
    small_disk: Path, start: Callable[..., tuple[int, str]], undisturbed: dict[int, Path]
) -> None:
    run_dir = small_disk / "run"
    code, output = start(run_dir, **{"output.save_steps": 2})
    assert code == 1 and "Traceback" not in output
    assert re.search(
        r"sora_llm: the checkpoint of step 4 could not be saved in .*No space.*earlier checkpoints", output
    )
    found = status(run_dir)
    assert (found["state"], found["checkpoint"]) == ("failed", "checkpoints/step-2") and "step 4" in found["error"]
    assert checkpoints(run_dir) == ["step-2"]
    subprocess.run(["mount", "-o", "remount,size=8m", str(small_disk)], check=True)
    code, output = start(run_dir, **{"output.save_steps": 2})
    assert code == 0 and "step-2: step 2 of 6" in output
    assert result(run_dir) == result(undisturbed[1])


def test_a_file_that_may_not_grow_fails_the_run_in_the_same_way(
    interrupted: Path, start: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a quota does; this needs no root."""
    plain = checkpoint.save_file

    def limited(*arguments: Any) -> None:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
        try:
            plain(*arguments)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(checkpoint, "save_file", limited)
    code, output = start(interrupted, **{"output.save_steps": 1})
    assert code == 1 and "the checkpoint of step 5 could not be saved" in output and "Traceback" not in output
    assert (status(interrupted)["state"], status(interrupted)["checkpoint"]) == ("failed", "checkpoints/step-4")
    assert checkpoints(interrupted) == ["step-2", "step-3", "step-4"]
    assert checkpoint.newest(interrupted)[1] == []


def test_a_folder_that_becomes_read_only_fails_the_run_in_the_same_way(
    interrupted: Path, start: Callable[..., tuple[int, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, folder = checkpoint.save, interrupted / "checkpoints"

    def save(*arguments: Any) -> Path:
        with read_only(folder):
            return plain(*arguments)

    monkeypatch.setattr(checkpoint, "save", save)
    code, output = start(interrupted, **{"output.save_steps": 1})
    assert code == 1 and "Traceback" not in output
    assert re.search(r"step 5 could not be saved in .*(Read-only|Permission)", output)
    assert (status(interrupted)["state"], status(interrupted)["checkpoint"]) == ("failed", "checkpoints/step-4")
    assert checkpoint.newest(interrupted) == (folder / "step-4", [])


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """For root, whom no permission stops, by a mount."""
    if not is_root():
        folder.chmod(0o555)
        yield
        folder.chmod(0o755)
        return
    if subprocess.run(["mount", "--bind", str(folder), str(folder)], capture_output=True).returncode:
        pytest.skip("root may not mount here")
    try:
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_from_the_start_is_a_sentence_too(small_disk: Path, start: Callable[..., Any]) -> None:
    filler = small_disk / "filler"
    with contextlib.suppress(OSError), filler.open("wb") as file:
        while True:
            file.write(b"\0" * 4096)
    code, output = start(small_disk / "run")
    assert code == 2 and "cannot be written or locked: No space" in output and "Traceback" not in output
