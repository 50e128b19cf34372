"""The folder of an export: replaced whole or not at all, whoever else writes there, and never somebody else's."""

import errno
import json
import os
import socket
import subprocess

import pytest
import torch
from exporting import trained_model
from spawn import spawn

from sora_llm import export, files
from sora_llm.artifacts import card
from sora_llm.artifacts.card import Provenance
from sora_llm.errors import RunFailed, UserError
from sora_llm.export import export_adapter
from sora_llm.files import file_sha256, staging_folder
from sora_llm.running.verified_export import export_verified


def test_an_older_folder_is_replaced_whole_and_nothing_else_is_left(stories, tmp_path):
    folder = tmp_path / "adapter"
    export_adapter(trained_model("float32", stories, seed=0), folder, "ragged")
    first = (folder / "adapter_model.safetensors").read_bytes()
    certificate = json.loads((folder / "certificate.json").read_text())
    (folder / "certificate.json").write_text(json.dumps({**certificate, "files": [*certificate["files"], "stale.txt"]}))
    (folder / "stale.txt").write_text("which that export wrote")
    export_adapter(trained_model("float32", stories, seed=50), folder, "padded")
    assert not (folder / "stale.txt").exists()
    assert (folder / "adapter_model.safetensors").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_with_something_else_in_it_is_not_replaced(stories, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="is not an export"):
        export_adapter(trained_model("float32", stories), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_what_somebody_put_beside_an_export_is_not_replaced_with_it(stories, tmp_path):
    model = trained_model("float32", stories)
    for _ in range(2):
        export_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"along with notes\.txt, which is not part of the export"):
        export_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "precious"


def test_what_came_into_the_folder_while_the_export_was_made_is_not_replaced_either(stories, tmp_path, monkeypatch):
    """A base with its checks takes minutes; by then somebody may have put notes beside the older export."""
    model, real = trained_model("float32", stories), export.reloaded
    export_adapter(model, tmp_path / "adapter")
    before = (tmp_path / "adapter" / "certificate.json").read_bytes()

    def while_checking(*arguments):
        (tmp_path / "adapter" / "notes.txt").write_text("precious")
        return real(*arguments)

    monkeypatch.setattr(export, "reloaded", while_checking)
    with pytest.raises(RunFailed, match=r"along with notes\.txt, which is not part of the export"):
        export_adapter(model, tmp_path / "adapter", "ragged")
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "precious"
    assert (tmp_path / "adapter" / "certificate.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_folder_that_another_process_is_replacing_is_not_taken_for_something_else(stories, tmp_path, monkeypatch):
    model, folder, real, looks = trained_model("float32", stories), tmp_path / "adapter", card.is_export, []
    export_adapter(model, folder)

    def between_two_renames(place):
        looks.append(place)
        return len(looks) != 2 and real(place)  # once before the export is made, then as it is published

    monkeypatch.setattr(card, "is_export", between_two_renames)
    export_adapter(model, folder)
    assert len(looks) == 3


def test_a_tilde_is_home_and_the_working_directory_is_never_replaced(stories, tmp_path, monkeypatch):
    model = trained_model("float32", stories)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    export_adapter(model, "~/there")
    assert (tmp_path / "there" / "certificate.json").is_file()
    (tmp_path / "link").symlink_to(tmp_path / "here")
    for folder in (".", "..", tmp_path / "link"):
        with pytest.raises(UserError, match="contains the working directory"):
            export_adapter(model, folder)


def test_a_disk_that_fills_up_while_the_adapter_is_published_is_said_in_a_sentence(stories, tmp_path, monkeypatch):
    """The older adapter stays, and nothing half-made."""
    model = trained_model("float32", stories)
    export_adapter(model, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "fsync", full)
    with pytest.raises(RunFailed, match=r"the adapter could not be written to .*No space left"):
        export_adapter(model, tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_copy_for_which_there_is_no_room_is_a_sentence_and_leaves_nothing(stories, tmp_path, monkeypatch):
    export_adapter(trained_model("float32", stories), tmp_path / "stage")

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "fsync", full)
    with pytest.raises(RunFailed, match=r"could not be copied to .*No space left"):
        export.copy_adapter(tmp_path / "stage", tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


def nothing_to_measure(model):
    raise RunFailed("the loss is nan")


def test_a_run_s_export_that_fails_leaves_nothing(stories, tmp_path):
    model = trained_model("float32", stories)
    probe = torch.arange(6)[None]
    with pytest.raises(RunFailed, match="the loss is nan"):
        export_verified(
            model,
            tmp_path / "adapter",
            "padded",
            provenance=Provenance("some/base"),
            allow_empty=False,
            probe_ids=probe,
            eval_loss_of=nothing_to_measure,
        )
    assert list(tmp_path.iterdir()) == []


def test_processes_that_export_to_one_place_at_once_do_not_disturb_each_other(stories, tmp_path):
    """Also those that no launcher has numbered: each writes beside the place under a name of its own."""
    places = {staging_folder(tmp_path / "adapter") for _ in range(8)}
    assert len(places) == 8
    dead = subprocess.Popen(["true"])
    dead.wait()
    prefix = f".adapter.{socket.gethostname()}"
    of_the_dead = tmp_path / f"{prefix}-{dead.pid}-1.tmp"
    of_the_container_before = tmp_path / f"{prefix}-{os.getpid()}-1.tmp"  # which had this process's number
    of_a_neighbour, own = tmp_path / f"{prefix}-{os.getppid()}-1.tmp", places.pop()
    for folder in (of_the_dead, of_the_container_before, of_a_neighbour, own):
        folder.mkdir()
        os.utime(folder, (1e9, 1e9) if folder == of_the_container_before else None)
    of_the_container_beside = tmp_path / f"{prefix}-{os.getpid()}-2.tmp"  # which began later than this process
    of_the_container_beside.mkdir()
    staging_folder(tmp_path / "adapter")
    assert of_the_container_beside.exists()
    assert not of_the_dead.exists() and not of_the_container_before.exists()
    assert of_a_neighbour.exists() and own.exists()


def test_processes_that_all_export_into_one_folder_leave_one_whole_export(tmp_path):
    hashes = spawn("worlds:export_everywhere", 2, {"folder": str(tmp_path / "adapter")})
    assert len({sha256 for own in hashes for sha256 in own}) == 1
    certificate = json.loads((tmp_path / "adapter" / "certificate.json").read_text())
    assert certificate["sha256"] == file_sha256(tmp_path / "adapter" / "adapter_model.safetensors") == hashes[0][0]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], "nothing is left beside it"
