"""The upload of a finished adapter: to a stand-in for the hub, and every way in which it can fail."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT
from hub_standin import TOKEN, USER, StandIn, standin
from huggingface_hub import ModelCard, constants
from small_runs import Playground, status
from spawn import free_port

from sora_llm import hub


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[StandIn]:
    """A stand-in for the hub, to which somebody is logged in."""
    with standin() as server:
        for name, value in environ(server, tmp_path).items():
            monkeypatch.setenv(name, value)
        yield server


def environ(server: StandIn, home: Path) -> dict[str, str]:
    return {"HF_ENDPOINT": server.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0", "HF_HOME": str(home / "hf")}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    folder = tmp_path / "an adapter"
    folder.mkdir()
    (folder / "README.md").write_text(f"---\n{hub.card_metadata('a/base')}\n---\n# Card\n")
    (folder / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 40)
    return folder


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def later(folder: Path, repo_id: str = "me/mine") -> str:
    return f"To do it later: hf upload {repo_id} '{folder}'"


@pytest.mark.parametrize(("asked", "made"), [("them/mine", "them/mine"), ("mine", f"{USER}/mine")])
def test_every_file_arrives_in_a_repository_that_is_made_where_it_is_missing(online, adapter, asked, made):
    assert hub.push(adapter, asked) == f"uploaded {adapter} to {online.url}/{made}"
    assert hub.push(adapter, asked) == f"uploaded {adapter} to {online.url}/{made}", "again, into the same one"
    assert online.repositories == {made: files(adapter)}


@pytest.mark.parametrize(("code", "said"), [(401, "401 Unauthorized"), (403, "403 Forbidden"), (500, "500 Internal")])
def test_a_hub_that_refuses_is_a_sentence_with_the_command_for_later(online, adapter, code, said):
    online.refuse = code
    sentence = hub.push(adapter, "me/mine")
    assert sentence.startswith(f"warning: {adapter} is complete but was not uploaded: {online.url} answered {said}")
    assert "(no room here)" in sentence and sentence.endswith(later(adapter)) and "\n" not in sentence
    assert TOKEN not in sentence


def test_no_network_is_a_sentence(online, adapter, monkeypatch):
    nobody = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("HF_ENDPOINT", nobody)
    sentence = hub.push(adapter, "me/mine")
    assert f"{nobody}: " in sentence and "refused" in sentence and sentence.endswith(later(adapter))


def test_no_token_is_a_sentence_and_nothing_is_asked(online, adapter, monkeypatch):
    monkeypatch.setattr(hub, "get_token", lambda: None)
    assert "hf auth login" in hub.push(adapter, "me/mine")
    assert not online.asked.is_set()


def test_a_hub_that_never_answers_is_not_waited_for_for_ever(online, adapter, monkeypatch):
    online.hang.set()
    clock = SimpleNamespace(monotonic=lambda: 2 * hub.UPLOAD_SECONDS * online.asked.is_set())
    monkeypatch.setattr(hub, "time", clock)  # its time is up as soon as it is on its way, however long that takes
    assert "it took over" in hub.push(adapter, "me/mine")
    assert online.asked.is_set(), "it was on its way"


def test_a_request_to_stop_ends_the_upload(online, adapter):
    online.hang.set()
    assert "asked to stop" in hub.push(adapter, "me/mine", online.asked.is_set)


def test_an_upload_whose_process_dies_is_a_sentence(online, adapter, monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    assert "its process ended with 1" in hub.push(adapter, "me/mine")
    monkeypatch.setattr(sys, "executable", "/nowhere")
    assert "FileNotFoundError" in hub.push(adapter, "me/mine")


@pytest.mark.parametrize("base", ["/models/llama", "models/of/mine", "tests", "C: x", ""])
def test_a_base_that_is_no_repository_is_not_named_to_the_hub_as_one(base, monkeypatch):
    monkeypatch.chdir(ROOT)
    data = ModelCard(f"---\n{hub.card_metadata(base)}\n---\n").data
    assert data.base_model is None and data.library_name == "peft"
    data = ModelCard(f"---\n{hub.card_metadata('huggyllama/llama-7b')}\n---\n").data
    assert data.base_model == "huggyllama/llama-7b" and data.tags == ["lora", "sora"]


def online_trainer(variables: dict[str, str], **call) -> int:
    """Worker: a trainer for which the hub is switched on, and whoever has logged in on this machine has not."""
    from faults import trainer

    os.environ.update(variables)
    constants.HF_HUB_OFFLINE, constants.HF_TOKEN_PATH = False, "/nowhere"
    return trainer(**call)


def test_a_run_ends_as_it_would_without_the_upload_which_the_same_command_tries_again(ground: Playground, online):
    """On two processes, of which one uploads when the other has ended its part."""

    def run(token: str) -> list[str]:
        options = {"distributed.strategy": "ddp", "output.push_to_hub": True, "output.hub_model_id": "me/mine"}
        variables = environ(online, ground.folder) | {"HF_TOKEN": token}
        call = ground.call("pushed", 2, **options) | {"variables": variables}
        children = ground.nursery.world("test_hub:online_trainer", 2, call)
        assert [child.wait() for child in children] == [0, 0], children[0].output
        return [child.output for child in children]

    run_dir = ground.run_dir("pushed")
    output, other_output = run(token="")
    assert status(run_dir)["state"] == "finished"
    assert "needs a hub token by the end of the run" in output.partition("step 0/")[0], "before any work"
    assert output.count("was not uploaded") == 1 and "hf upload me/mine" in output
    assert "upload" not in other_output and not online.asked.is_set()

    before = files(run_dir / "adapter")
    output, other_output = run(TOKEN)
    assert f"uploaded {run_dir / 'adapter'} to {online.url}/me/mine" in output and "upload" not in other_output
    assert online.repositories["me/mine"] == before == files(run_dir / "adapter")
    assert ModelCard.load(run_dir / "adapter" / "README.md").data.base_model is None, "a local folder"
    assert not any(TOKEN.encode() in path.read_bytes() for path in run_dir.rglob("*") if path.is_file())
