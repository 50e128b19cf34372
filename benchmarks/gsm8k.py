"""GSM8K's answers and the small base that benchmarks train on them; both are in the folder SORA_TEST_DATA."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
DATA = Path(os.environ.get("SORA_TEST_DATA", ROOT.parent / "shared")).resolve()
BASE, GSM8K = DATA / "models/base5m", DATA / "data/gsm8k_train.jsonl"
COLUMNS = {"prompt": "question", "completion": "answer"}


def dataset(path: Path = GSM8K) -> dict[str, Any]:
    """Rows of `path`, which has GSM8K's columns, as `data.datasets` takes them; the loss is on the answer."""
    return {"path": str(path), "type": "prompt_completion", "columns": COLUMNS}
