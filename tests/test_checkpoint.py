"""What a checkpoint holds comes back bit for bit or is refused."""

import errno
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from sora_llm import checkpoint
from sora_llm.errors import RunFailed, UserError

TENSORS = {
    "a.lora_A": torch.randn(3, 5, generator=torch.Generator().manual_seed(0)),
    "a.lora_B": torch.tensor([[float("inf"), -0.0, 1e-45]]),
    "a.gate": torch.tensor([1.0, 0.0, 0.5]),
    "a.lora_A.exp_avg": torch.randn(5, 3, generator=torch.Generator().manual_seed(1)).T,  # not contiguous
    "empty.lora_A": torch.zeros(0, 7),
    "half": torch.tensor([1.0, 1 / 3]).bfloat16(),
}
STATE = {"phase": "sparsify", "config": {"sora": {"r": 4}}, "tally": {"loss_sum": 0.1 + 0.2}, "text": "λ ≤ 1"}


def saved(tmp_path, step=7, keep=None, **options):
    folder = checkpoint.save(tmp_path, step, TENSORS, STATE, **options)
    checkpoint.drop_older(folder, keep)
    return folder


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes, so that −0 is not 0."""
    return tensor.contiguous().flatten().view(torch.uint8)


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# ----- round trip -----------------------------------------------------------------------------------------------------


def test_a_checkpoint_comes_back_bit_for_bit(tmp_path):
    folder = saved(tmp_path)
    assert folder == tmp_path / "checkpoints" / "step-7"
    assert checkpoint.read_state(folder) == {**STATE, "step": 7}
    read = checkpoint.read_tensors(folder)
    assert read.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert read[name].dtype == tensor.dtype and read[name].shape == tensor.shape
        assert torch.equal(bits(read[name]), bits(tensor)), name
    assert not list(tmp_path.rglob("*.tmp"))


def test_saving_a_step_again_replaces_it(tmp_path):
    saved(tmp_path)
    folder = checkpoint.save(tmp_path, 7, {"x": torch.ones(2)}, {"phase": "dense"})
    assert checkpoint.read_state(folder) == {"phase": "dense", "step": 7}
    assert list(checkpoint.read_tensors(folder)) == ["x"]


def test_only_the_newest_are_kept_by_number_not_by_name(tmp_path):
    for step in (2, 9, 10, 100):
        saved(tmp_path, step, keep=2)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"step-10", "step-100"}


def test_everything_is_kept_without_a_limit(tmp_path):
    for step in (1, 2, 3):
        saved(tmp_path, step)
    assert len(list((tmp_path / "checkpoints").iterdir())) == 3


# ----- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["COMPLETE", "state.json", "adapter.safetensors"])
def test_truncated_grown_and_missing_files_are_refused(tmp_path, name):
    folder = saved(tmp_path)
    content = (folder / name).read_bytes()
    grown = content + b"}"
    for damaged in (b"", content[: len(content) // 2], content[:-1], grown):
        (folder / name).write_bytes(damaged)
        with pytest.raises(UserError, match="step-7"):
            checkpoint.read_state(folder)
    (folder / name).unlink()
    with pytest.raises(UserError, match="step-7"):
        checkpoint.read_state(folder)


@pytest.mark.parametrize("content", [b"[]", b"null", b"{}", b'{"state.json": 1}', b"\xff\xfe"])
def test_a_complete_file_that_says_something_else_is_refused(tmp_path, content):
    folder = saved(tmp_path)
    (folder / "COMPLETE").write_bytes(content)
    with pytest.raises(UserError, match="step-7"):
        checkpoint.read_state(folder)


def test_files_of_another_checkpoint_are_refused(tmp_path):
    one, two = saved(tmp_path, 1), saved(tmp_path, 2)
    shutil.copy(one / "state.json", two / "state.json")
    with pytest.raises(UserError, match=r"state\.json is not what was saved"):
        checkpoint.read_state(two)


def test_the_newest_whole_checkpoint_is_found_and_damaged_ones_are_named(tmp_path):
    assert checkpoint.newest(tmp_path) == (None, [])
    for step in (8, 9, 10, 11):
        saved(tmp_path, step)
    newest = tmp_path / "checkpoints"
    (newest / "step-11" / "COMPLETE").unlink()  # killed while it was written: no claim, no warning
    (newest / "step-10" / "state.json").write_text("{}")
    (newest / "step-9" / "adapter.safetensors").unlink()
    found, warnings = checkpoint.newest(tmp_path)
    assert found == newest / "step-8"
    assert len(warnings) == 2
    assert "step-10" in warnings[0] and "state.json" in warnings[0]
    assert "step-9" in warnings[1] and "adapter.safetensors" in warnings[1]


def test_strangers_among_the_checkpoints_do_no_harm(tmp_path):
    folder = saved(tmp_path)
    (tmp_path / "checkpoints" / ".step-9.tmp").mkdir()
    (tmp_path / "checkpoints" / ".step-9.tmp" / "COMPLETE").write_text("{}")
    copy = tmp_path / "checkpoints" / "step-7-copy"
    shutil.copytree(folder, copy)
    assert checkpoint.newest(tmp_path) == (folder, [])


# ----- failing disks --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "failure", [OSError(errno.ENOSPC, "No space left on device"), SafetensorError("I/O error: no space")]
)
@pytest.mark.parametrize("step", [2, 1])
def test_a_full_disk_fails_the_run_and_leaves_older_checkpoints_whole(tmp_path, monkeypatch, failure, step):
    folder = saved(tmp_path, 1)
    before = files(tmp_path)

    def full(tensors, path):
        Path(path).write_bytes(b"half of it")
        raise failure

    monkeypatch.setattr(checkpoint, "save_file", full)
    with pytest.raises(RunFailed, match=f"step {step} could not be saved.*space.*earlier checkpoints are intact"):
        saved(tmp_path, step, keep=1)
    assert files(tmp_path) == before
    assert checkpoint.newest(tmp_path) == (folder, [])


@pytest.mark.parametrize("failing", ["write_text_atomically", "fsync", "file_sha256"])
def test_a_disk_that_fails_at_any_later_moment_does_no_more_harm(tmp_path, monkeypatch, failing):
    folder = saved(tmp_path, 1)
    before = files(tmp_path)
    real = getattr(checkpoint, failing)

    def fail(*arguments):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(checkpoint, failing, fail)
    with pytest.raises(RunFailed, match="Input/output error"):
        saved(tmp_path, 2, keep=1)
    monkeypatch.setattr(checkpoint, failing, real)
    assert files(tmp_path) == before
    assert checkpoint.newest(tmp_path) == (folder, [])


def test_a_place_that_is_no_folder_is_a_failed_run(tmp_path):
    (tmp_path / "checkpoints").write_text("a file")
    with pytest.raises(RunFailed, match="step 7 could not be saved"):
        saved(tmp_path)
