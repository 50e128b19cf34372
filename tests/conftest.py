"""Where tests find the real data and models, and a DeepSpeed extension cache of their own."""

import os
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED = Path(os.environ.get("SORA_TEST_DATA", ROOT.parent / "shared")).resolve()

# A killed build leaves a lock in the shared cache that hangs later runs: tests keep theirs apart.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(tempfile.gettempdir()) / "sora_llm_test_extensions"))
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")


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
def gsm8k() -> Path:
    """GSM8K's training rows: question, answer."""
    return shared("data/gsm8k_train.jsonl")
