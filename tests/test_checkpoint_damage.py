"""Nothing damaged of a checkpoint reaches a model, and a run goes on from the newest one that is whole."""

from __future__ import annotations

import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from checkpointed import FILES, STATE, TENSORS
from checkpointed import interrupted as interrupted
from checkpointed import start as start
from small_runs import STEPS, checkpoints, result

from sora_llm import checkpoint
from sora_llm.errors import UserError

SHM = Path("/dev/shm")
"""In memory, where there is such a place."""


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
        assert f"warning: skipped: the checkpoint {folder / name} is damaged: {damaged} is not what" in output
    assert f"resuming from {folder / 'step-2'}: step 2 of {STEPS}" in output
    assert result(interrupted) == result(undisturbed[1])
    kept = [f"step-{step}" for step in (4, 5, 6)]  # written anew: the damaged ones did not count
    assert checkpoints(interrupted) == ["damaged-step-3", "damaged-step-4", *kept]
    assert checkpoint.newest(interrupted) == (folder / "step-6", [])


@pytest.mark.parametrize("name", FILES)
def test_each_file_can_be_the_damaged_one(
    interrupted: Path, start: Callable[..., tuple[int, str]], undisturbed: dict[int, Path], name: str
) -> None:
    path = interrupted / "checkpoints" / "step-4" / name
    path.write_bytes(path.read_bytes()[:-1])
    code, output = start(interrupted)
    assert code == 0 and "warning: skipped" in output and "step 3 of 6" in output
    assert result(interrupted) == result(undisturbed[1])


def test_without_a_whole_checkpoint_a_run_says_that_it_starts_again(
    interrupted: Path, start: Callable[..., tuple[int, str]], undisturbed: dict[int, Path]
) -> None:
    for folder in (interrupted / "checkpoints").iterdir():
        flip(folder / "state.json", 0.5)
    code, output = start(interrupted)
    assert code == 0 and output.count("warning: skipped") == 3 and "starting again at step 0" in output
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
