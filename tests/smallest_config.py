"""The smallest config that is one, loaded with overrides: for tests of reading configs."""

import pytest

from sora_llm.config import Config, load_config
from sora_llm.errors import UserError

SMALLEST = """
model: {name_or_path: some/model}
data: {datasets: [{path: rows.jsonl}]}
train: {max_steps: 10}
sora: {sparse_lambda: 0.3}
output: {output_dir: runs/a}
"""
TWO = "data.datasets=[{path: a.jsonl, %s}, {path: b.jsonl%s}]"
"""Two data sets, with settings of each."""


@pytest.fixture
def load(tmp_path):
    """Loads SMALLEST, or another text, with overrides."""

    def load(*overrides: str, text: str = SMALLEST) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return load_config(path, overrides)

    return load


def message_of(load, *overrides: str, text: str = SMALLEST) -> str:
    """What is said of a config that is refused."""
    with pytest.raises(UserError) as caught:
        load(*overrides, text=text)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400, "a sentence or two"
    return message
