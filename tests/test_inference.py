"""What `generate` and `chat` share: options that sampling cannot use are refused."""

from __future__ import annotations

import pytest

from sora_llm.commands.inference import generation_parser, sampling_of
from sora_llm.errors import UserError
from sora_llm.generation import Sampling


def sampling(*options: str) -> Sampling:
    default = Sampling()
    return sampling_of(generation_parser("test", "", default).parse_args(["place", *options]), default)


@pytest.mark.parametrize("temperature", ["1e-5", "1e-300", "-1", "nan", "inf"])
def test_a_temperature_that_logits_cannot_be_divided_by_is_a_sentence(temperature: str) -> None:
    with pytest.raises(UserError, match=r"--temperature is .*; it is 0, or 0\.0001 or more"):
        sampling(f"--temperature={temperature}")
    assert sampling("--temperature", "1e-4").temperature == 1e-4 and sampling("--temperature", "0").temperature == 0


@pytest.mark.parametrize("seed", [str(-(2**63) - 1), str(2**64), "9" * 30])
def test_a_seed_that_torch_does_not_take_is_a_sentence(seed: str) -> None:
    with pytest.raises(UserError, match=f"--seed is {seed}; it is a whole number from −2"):
        sampling("--temperature", "1", f"--seed={seed}")
    for taken in (-1, 2**64 - 1):
        sampling("--temperature", "1", f"--seed={taken}")
