"""Where tests find the real data and models, and a DeepSpeed extension cache of their own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from spawn import EXTENSIONS

if TYPE_CHECKING:
    from small_runs import Playground
    from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SORA_TEST_DATA", ROOT.parent / "shared")).resolve()

# On a busy machine two threads that wait for each other cost 20 ms a product, and no tensor here is large.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(EXTENSIONS))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


def pytest_configure() -> None:
    """Let hypothesis draw the same examples in every run, however long one takes."""
    from hypothesis import settings

    settings.register_profile("sora", deadline=None, derandomize=True, database=None)
    settings.load_profile("sora")


def shared(relative: str) -> Path:
    """A file or folder of the shared test data; the test is skipped where it is missing."""
    path = SHARED / relative
    if not path.exists():
        pytest.skip(f"{path} is missing; set SORA_TEST_DATA to the folder that holds data/ and models/")
    return path


@pytest.fixture(scope="session")
def stories() -> Path:
    """The stories260k checkpoint."""
    return shared("models/stories260k")


@pytest.fixture(scope="session")
def base5m() -> Path:
    """The base5m checkpoint."""
    return shared("models/base5m")


@pytest.fixture(scope="session")
def byte() -> PreTrainedTokenizerFast:
    """A tokenizer of one token per byte."""
    from conversations import byte_tokenizer

    return byte_tokenizer()


@pytest.fixture(scope="session")
def gsm8k() -> Path:
    """GSM8K's training rows: question, answer."""
    return shared("data/gsm8k_train.jsonl")


@pytest.fixture(scope="session")
def ground(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Playground]:
    """Where small runs are started in real processes."""
    from nursery import Nursery
    from small_runs import MODULES, Playground, short_rows
    from spawn import warm_deepspeed

    warm_deepspeed()
    folder = tmp_path_factory.mktemp("ground")
    short_rows(folder)
    (folder / "processes").mkdir()
    with Nursery(folder / "processes", *MODULES) as nursery:
        yield Playground(folder, nursery)


@pytest.fixture(scope="session")
def undisturbed(ground: Playground) -> dict[int, Path]:
    """By number of processes (2: under zero2): the directory of a small run, with a checkpoint of every step."""
    from small_runs import WORLDS

    directories = {}
    for num_processes, options in WORLDS.items():
        name = f"undisturbed-{num_processes}"
        codes = ground.codes(name, num_processes, audit=True, **options, **{"output.save_steps": 1})
        assert codes == [0] * num_processes
        directories[num_processes] = ground.run_dir(name)
    return directories
