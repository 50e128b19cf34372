"""Whatever happens to a checkpoint's files: nothing damaged reaches a model, older ones stay, nothing is executed."""

from __future__ import annotations

import ast
import contextlib
import json
import os
import pickle
import random
import re
import resource
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from conftest import ROOT
from safetensors.torch import load_file
from small_runs import CONFIG, STEPS, Playground, checkpoints, overrides, result, status

from sora_llm import checkpoint, config
from sora_llm.config import yaml_text
from sora_llm.errors import UserError
from sora_llm.files import file_sha256, publish
from sora_llm.running.rundir import RunDirectory
from sora_llm.running.start import finished_before
from sora_llm.topology import ALONE
from sora_llm.train import main

FILES = ("COMPLETE", "state.json", "adapter.safetensors")
SHM = Path("/dev/shm")
"""In memory, where there is such a place."""


@pytest.fixture
def interrupted(undisturbed: dict[int, Path], tmp_path: Path) -> Path:
    """A run directory of a run that was interrupted after step 4, with checkpoints of steps 2, 3 and 4."""
    run_dir = tmp_path / "run"
    shutil.copytree(undisturbed[1], run_dir, ignore=shutil.ignore_patterns("adapter", "step-1", "step-5", "step-6"))
    left = status(run_dir) | {"state": "running", "step": 4, "checkpoint": "checkpoints/step-4", "adapter": None}
    (run_dir / "status.json").write_text(json.dumps(left))
    return run_dir


@pytest.fixture
def start(ground: Playground, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str]]:
    """The command on a run directory, in this process: exit code and everything it printed."""

    def command(run_dir: Path, **others: Any) -> tuple[int, str]:
        capsys.readouterr()
        code = main([CONFIG, *overrides(ground.folder, run_dir, **others)])
        return code, "".join(capsys.readouterr())

    return command


# ----- what is in it, and how it gets to the disk ---------------------------------------------------------------------


def test_a_checkpoint_holds_adapters_and_their_moments_and_nothing_of_the_frozen_model(
    undisturbed: dict[int, Path],
) -> None:
    for directory in undisturbed.values():
        folder = directory / "checkpoints" / "step-4"
        tensors = load_file(folder / "adapter.safetensors")
        modules = checkpoint.read_state(folder)["config"]["sora"], json.loads(_last_line(directory / "ranks.jsonl"))
        factors = {f"{name}.{part}" for name in modules[1]["ranks"] for part in ("lora_A", "lora_B", "gate")}
        assert tensors.keys() == factors | {f"{name}.{key}" for name in factors for key in ("exp_avg", "exp_avg_sq")}
        assert {path.name for path in folder.iterdir()} == set(FILES)
        assert all(tensor.dtype == torch.float32 for tensor in tensors.values())


def _last_line(path: Path) -> str:
    return path.read_text().splitlines()[-1]


TENSORS = {"a.lora_A": torch.arange(6.0).view(2, 3), "a.gate": torch.tensor([1.0, 0.0])}
STATE = {"phase": "dense", "tally": {"loss_sum": 0.5}}


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


# ----- disks ----------------------------------------------------------------------------------------------------------


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


def test_a_finished_run_whose_adapter_is_gone_exports_it_again(
    undisturbed: dict[int, Path], tmp_path: Path, start: Callable[..., tuple[int, str]]
) -> None:
    run_dir = Path(shutil.copytree(undisturbed[1], tmp_path / "run"))
    shutil.rmtree(run_dir / "adapter")
    code, output = start(run_dir, **{"output.save_steps": 1})
    assert code == 0 and "resuming from" in output
    assert result(run_dir) == result(undisturbed[1])


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
    assert code in (1, 2) and "No space" in output and "Traceback" not in output


# ----- flipped bits and torn files ------------------------------------------------------------------------------------


@pytest.fixture
def memory() -> Iterator[Path]:
    """A folder in memory."""
    with tempfile.TemporaryDirectory(dir=SHM if SHM.is_dir() else None) as name:
        yield Path(name)


def test_ten_thousand_flips_and_truncations_are_refused(memory: Path) -> None:
    """Of every file, COMPLETE too, whatever was hit: a space of its JSON as well as a digit."""
    folder = checkpoint.save(memory, 7, TENSORS, STATE)
    good = {name: (folder / name).read_bytes() for name in FILES}
    chooser = random.Random(0)
    for number in range(10_000):
        name = FILES[number % 3]
        damaged = bytearray(good[name])
        if number % 10:
            for _ in range(chooser.choice([1, 1, 1, 2, 8])):
                damaged[chooser.randrange(len(damaged))] ^= 1 << chooser.randrange(8)
        else:
            del damaged[chooser.randrange(len(damaged)) :]
        if damaged == good[name]:  # a bit was flipped twice
            continue
        (folder / name).write_bytes(damaged)
        with pytest.raises(UserError, match="step-7"):
            checkpoint.read_state(folder)
        if name == "adapter.safetensors":
            with pytest.raises(UserError, match="step-7"):
                checkpoint.read_tensors(folder)
        (folder / name).write_bytes(good[name])
    assert checkpoint.read_state(folder) == {**STATE, "step": 7}
    assert torch.equal(checkpoint.read_tensors(folder)["a.lora_A"], TENSORS["a.lora_A"])


def flip(path: Path, place: float) -> None:
    content = bytearray(path.read_bytes())
    content[int(place * len(content))] ^= 4
    path.write_bytes(content)


def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole_and_says_so(
    interrupted: Path, start: Callable[..., tuple[int, str]], undisturbed: dict[int, Path]
) -> None:
    """Torn lines at the ends of metrics and ranks are dropped as well."""
    folder = interrupted / "checkpoints"
    flip(folder / "step-4" / "adapter.safetensors", 0.7)
    (folder / "step-3" / "COMPLETE").write_text((folder / "step-3" / "COMPLETE").read_text().replace("\n", " "))
    with (interrupted / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 7, "loss": 3.\xff')
    with (interrupted / "ranks.jsonl").open("ab") as file:
        file.write(b'{"step": 7, "ranks": {"model.la')
    code, output = start(interrupted, **{"output.save_steps": 1, "output.save_total_limit": 3})
    assert code == 0
    for name, damaged in (("step-4", "adapter.safetensors"), ("step-3", "COMPLETE")):
        assert f"warning: passed over: the checkpoint {folder / name} is damaged: {damaged} is not what" in output
    assert f"resuming from {folder / 'step-2'}: step 2 of {STEPS}" in output
    assert result(interrupted) == result(undisturbed[1])
    kept = [f"step-{step}" for step in (4, 5, 6)]  # written anew: the damaged ones did not count
    assert checkpoints(interrupted) == ["damaged-step-3", "damaged-step-4", *kept]
    assert checkpoint.newest(interrupted) == (folder / "step-6", [])


def test_a_run_that_must_not_resume_does_not_take_up_one_that_began_while_it_waited(
    undisturbed: dict[int, Path],
) -> None:
    given = config.load_config(undisturbed[1] / "config.yaml", ["output.resume=never"])
    with pytest.raises(UserError, match="another run has begun"):
        finished_before(SimpleNamespace(config=given), undisturbed[1], ALONE)


def test_a_run_that_goes_back_to_an_older_checkpoint_leaves_the_later_ones_aside(
    interrupted: Path, start: Callable[..., tuple[int, str]], undisturbed: dict[int, Path]
) -> None:
    """They would count as the newest of those to keep, and the next start would go on from them."""
    folder, limit = interrupted / "checkpoints", {"output.save_steps": 1, "output.save_total_limit": 2}
    assert checkpoints(interrupted)[-1] == "step-4"
    code, output = start(interrupted, **{"output.resume": str(folder / "step-2"), **limit})
    assert code == 0 and f"resuming from {folder / 'step-2'}" in output
    assert result(interrupted) == result(undisturbed[1])
    assert checkpoints(interrupted) == ["abandoned-step-3", "abandoned-step-4", "step-5", "step-6"]
    shutil.copytree(folder / "step-5", folder / "step-3")
    checkpoint.set_aside(interrupted, 2)
    assert "abandoned-step-3.2" in checkpoints(interrupted), "none is deleted for another"


@pytest.mark.parametrize("limit", [pytest.param(None, marks=pytest.mark.matrix), 2])
def test_a_queued_job_that_goes_back_to_a_checkpoint_goes_on_when_it_is_started_again(
    interrupted: Path, start: Callable[..., tuple[int, str]], undisturbed: dict[int, Path], limit: int | None
) -> None:
    """It starts with the arguments that it had, and would never come further than its time limit."""
    folder, options = interrupted / "checkpoints", {"output.save_steps": 1, "output.save_total_limit": limit}
    options |= {"output.resume": str(folder / "step-2")}
    code, _ = start(interrupted, **options)
    assert code == 0 and (folder / "step-2").exists() == (limit is None)
    shutil.rmtree(folder / "step-6")  # as if it had been stopped at step 5
    (interrupted / "status.json").write_text('{"state": "preempted"}')
    shutil.rmtree(interrupted / "adapter")
    code, output = start(interrupted, **options)
    assert code == 0 and f"resuming from {folder / 'step-5'}" in output
    assert result(interrupted) == result(undisturbed[1])


def test_a_checkpoint_from_before_bases_and_dev_rows_were_compared_is_gone_on_from(
    interrupted: Path, start: Callable[..., tuple[int, str]], undisturbed: dict[int, Path]
) -> None:
    folder = interrupted / "checkpoints" / "step-4"
    state, tensors = json.loads((folder / "state.json").read_text()), checkpoint.read_tensors(folder)
    del state["base"], state["alarms"]["start_loss"]
    state["data"] = {name: part for name, part in state["data"].items() if not name.startswith("dev_")}
    checkpoint.save(interrupted, state.pop("step"), tensors, state)
    code, output = start(interrupted)
    assert code == 0 and f"resuming from {folder}" in output
    assert result(interrupted) == result(undisturbed[1])


@pytest.mark.parametrize("name", FILES)
def test_each_file_can_be_the_damaged_one(
    interrupted: Path, start: Callable[..., tuple[int, str]], undisturbed: dict[int, Path], name: str
) -> None:
    path = interrupted / "checkpoints" / "step-4" / name
    path.write_bytes(path.read_bytes()[:-1])
    code, output = start(interrupted)
    assert code == 0 and "passed over" in output and "step 3 of 6" in output
    assert result(interrupted) == result(undisturbed[1])


def test_without_a_whole_checkpoint_a_run_says_that_it_starts_again(
    interrupted: Path, start: Callable[..., tuple[int, str]], undisturbed: dict[int, Path]
) -> None:
    for folder in (interrupted / "checkpoints").iterdir():
        flip(folder / "state.json", 0.5)
    code, output = start(interrupted)
    assert code == 0 and output.count("passed over") == 3 and "starting again at step 0" in output
    assert result(interrupted) == result(undisturbed[1])


def test_the_tensors_are_checked_again_where_they_are_read(tmp_path: Path) -> None:
    """The main process has looked at the state; each process reads the tensors, perhaps from another disk."""
    folder = checkpoint.save(tmp_path, 7, TENSORS, STATE)
    checkpoint.read_state(folder)
    flip(folder / "adapter.safetensors", 0.99)
    with pytest.raises(UserError, match=r"adapter\.safetensors is not what was saved"):
        checkpoint.read_tensors(folder)


def test_a_checkpoint_with_other_tensors_is_refused_in_a_sentence(
    interrupted: Path, start: Callable[..., tuple[int, str]]
) -> None:
    """Hashes and all are right: somebody has written it."""
    folder = interrupted / "checkpoints" / "step-4"
    state, tensors = checkpoint.read_state(folder), checkpoint.read_tensors(folder)
    name = next(name for name in tensors if name.endswith(".gate"))
    tensors[name] = tensors[name][:-1]
    checkpoint.save(interrupted, state.pop("step"), tensors, state)
    code, output = start(interrupted)
    assert code == 2 and f"{name} is missing or of another shape" in output and "Traceback" not in output


# ----- pickles --------------------------------------------------------------------------------------------------------


class Payload:
    """Leaves a file behind when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.mark),))


LURES = (
    # what torch, transformers, peft, accelerate and deepspeed would look for in such folders
    "pytorch_model.bin",
    "model.pt",
    "adapter_model.bin",
    "adapter.pt",
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.bin",
    "scaler.pt",
    "random_states_0.pkl",
    "custom_checkpoint_0.pkl",
    "training_args.bin",
    "latest",
    "mp_rank_00_model_states.pt",
    "zero_pp_rank_0_mp_rank_00_optim_states.pt",
    "state.pkl",
    "dataset.npy",
    "zero_to_fp32.py",
    "__init__.py",
)


@pytest.fixture
def hostile(tmp_path: Path) -> Callable[[Path], None]:
    """Puts a pickle in a place; that it works is shown here."""
    pickle.loads(pickle.dumps(Payload(tmp_path / "unpickled")))
    (tmp_path / "unpickled").rmdir()

    def put(path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix in (".pt", ".bin"):
            torch.save(Payload(tmp_path / "unpickled"), path)
        elif path.suffix == ".py":
            path.write_text(f"import os\nos.mkdir({str(tmp_path / 'unpickled')!r})\n")
        else:
            path.write_bytes(pickle.dumps(Payload(tmp_path / "unpickled")))

    return put


def was_unpickled(tmp_path: Path) -> bool:
    return (tmp_path / "unpickled").exists()


def test_no_pickle_that_lies_in_a_run_directory_is_read(
    interrupted: Path,
    start: Callable[..., tuple[int, str]],
    hostile: Callable[[Path], None],
    tmp_path: Path,
    undisturbed: dict[int, Path],
) -> None:
    """In the newest checkpoint every file is one, and beside all others lie some that might be looked for."""
    newest = interrupted / "checkpoints" / "step-4"
    for name in FILES:
        hostile(newest / name)
    places = (newest, newest.with_name("step-3"), newest.parent, interrupted, interrupted / "adapter")
    for folder in (*places, newest.with_name("step-3") / "global_step3", interrupted / "trackers"):
        for name in LURES:
            if folder.name != "adapter":  # which must not look like somebody else's folder
                hostile(folder / name)
    code, output = start(interrupted)
    assert code == 0 and "passed over" in output and "step 3 of 6" in output
    assert not was_unpickled(tmp_path) and result(interrupted) == result(undisturbed[1])


@pytest.mark.parametrize("name", ["state.json", "adapter.safetensors"])
def test_not_even_with_the_right_hash(
    interrupted: Path, start: Callable[..., tuple[int, str]], hostile: Callable[[Path], None], tmp_path: Path, name: str
) -> None:
    folder = interrupted / "checkpoints" / "step-4"
    hostile(folder / name)
    hashes = {each: file_sha256(folder / each) for each in ("adapter.safetensors", "state.json")}
    (folder / "COMPLETE").write_text(json.dumps(hashes, indent=1))
    code, output = start(interrupted)
    # a state that is no JSON is a damaged checkpoint; tensors that are none are found when the adapters are loaded
    assert code == (0 if name == "state.json" else 2) and "step-4" in output and "Traceback" not in output
    assert not was_unpickled(tmp_path)


@pytest.mark.parametrize(
    ("name", "code"),
    [("config.yaml", 2), ("env.json", 2), ("status.json", 0), ("metrics.jsonl", 0), ("ranks.jsonl", 0), (".lock", 0)],
)
def test_nor_in_the_other_files_of_a_run(
    interrupted: Path,
    start: Callable[..., tuple[int, str]],
    hostile: Callable[[Path], None],
    tmp_path: Path,
    name: str,
    code: int,
) -> None:
    hostile(interrupted / name)
    found, output = start(interrupted)
    assert found == code and "Traceback" not in output, output
    assert not was_unpickled(tmp_path)


def test_nor_does_yaml_make_objects(interrupted: Path, start: Callable[..., tuple[int, str]], tmp_path: Path) -> None:
    (interrupted / "config.yaml").write_text(f"model: !!python/object/apply:os.mkdir ['{tmp_path / 'unpickled'}']\n")
    code, output = start(interrupted)
    assert code == 2 and "Traceback" not in output and not was_unpickled(tmp_path)


UNPICKLING = {
    "torch.load", "torch.jit.load", "pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load", "dill.load",
    "shelve.open", "marshal.loads", "pandas.read_pickle", "pd.read_pickle", "yaml.load", "yaml.unsafe_load",
    "yaml.full_load", "load_state", "load_checkpoint",
}  # fmt: skip


def test_nothing_in_the_package_reads_pickles() -> None:
    seen = 0
    for path in sorted((ROOT / "sora_llm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            seen += 1
            where, called = f"{path}:{node.lineno}", ast.unparse(node.func)
            if ast.unparse(node) == "yaml.load(text, Loader=Loader)":
                assert issubclass(yaml_text.Loader, yaml.SafeLoader)
                continue
            assert called not in UNPICKLING and called.rpartition(".")[2] not in UNPICKLING, where
            for keyword in node.keywords:
                is_true = isinstance(keyword.value, ast.Constant) and keyword.value.value is True
                assert not (keyword.arg == "allow_pickle" and is_true), where
                assert not (keyword.arg == "weights_only" and not is_true), where
    assert seen > 1000
