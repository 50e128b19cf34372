"""A base is known by a digest of its weights: nothing goes on beside another one in silence."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from conftest import shared
from helpers import perturb
from runs import CONFIG, gsm8k_overrides
from safetensors.torch import save_file

from sora_llm import cli
from sora_llm.artifacts.certificate import Certificate
from sora_llm.base_files import base_digest
from sora_llm.base_spec import BackboneSpec
from sora_llm.errors import UserError
from sora_llm.train import run
from sora_llm.weights_digest import weights_digest

TINY = {"train.max_steps": 4, "sora.r": 2, "quantization.load_in_4bit": False, "model.dtype": "float32"}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of a real base."""
    folder = tmp_path_factory.mktemp("base") / "stories"
    shutil.copytree(shared("models/stories260k"), folder)
    return folder


def test_nothing_goes_on_beside_another_base_in_silence(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Neither a resumed run nor an export; a measurement, an answer and a warm start say so."""
    options = {**TINY, "model.name_or_path": str(base), "output.save_steps": 2, "output.save_total_limit": None}
    run(CONFIG, *gsm8k_overrides(tmp_path / "run", **options))
    before, other = weights_digest([base / "model.safetensors"]), tmp_path / "other"
    perturb(base)
    assert weights_digest([base / "model.safetensors"]) != before
    start = {"output.resume": str(tmp_path / "run" / "checkpoints" / "step-2")}
    with pytest.raises(UserError, match=r"are not those that .*step-2 was trained on"):
        run(CONFIG, *gsm8k_overrides(other, **options, **start))
    assert not other.exists()

    adapter, checkpoint = str(tmp_path / "run" / "adapter"), str(tmp_path / "run" / "checkpoints" / "step-2")
    capsys.readouterr()
    for source in (adapter, checkpoint):
        said = f"the weights of {base} are not those that {source} was trained on"
        out, merged = ["--out", str(tmp_path / "out")], ["--layout", "merged", "--skip-dev-loss"]
        assert cli.main(["export", source, *merged, *out]) == 2 and said in capsys.readouterr().err
        assert cli.main(["consensus", source, source, *out]) == 2 and said in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
        assert cli.main(["generate", source, "--prompt", "Tim", "--max-new-tokens", "1"]) == 0
        assert f"warning: {said}" in capsys.readouterr().err
    assert cli.main(["export", adapter, *merged, *out, "--base-model", str(base)]) == 0
    assert f"warning: {said.replace(checkpoint, adapter)}" in capsys.readouterr().err
    restored = ["--base", str(shared("models/stories260k"))]
    assert cli.main(["generate", adapter, "--prompt", "Tim", "--max-new-tokens", "1", *restored]) == 0
    assert "warning" not in capsys.readouterr().err
    run(CONFIG, *gsm8k_overrides(other, **options, **{"model.adapter": adapter}))
    assert f"model.adapter was trained on different weights than those of {base}" in capsys.readouterr().out


def test_what_is_merged_was_trained_beside_what_its_sources_were(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where they all were trained beside the same, whatever base it is verified on, and that is said."""
    run(CONFIG, *gsm8k_overrides(tmp_path / "run", **TINY, **{"model.name_or_path": str(base)}))
    adapter, before = str(tmp_path / "run" / "adapter"), weights_digest([base / "model.safetensors"])
    perturb(base)
    out = ["--out", str(tmp_path / "out"), "--base", str(base)]
    assert cli.main(["consensus", adapter, adapter, *out]) == 0 and "are not those that" in capsys.readouterr().err
    assert Certificate.read(tmp_path / "out").base_digest == before


def test_weights_are_the_same_however_they_lie_in_files(tmp_path: Path) -> None:
    weights = {f"layer.{index}": torch.randn(40, 33) for index in range(5)}
    save_file(weights, tmp_path / "whole.safetensors")
    names = sorted(weights)
    for index, part in enumerate((names[:2], names[2:])):
        save_file({name: weights[name] for name in part}, tmp_path / f"{index}.safetensors")
    whole = weights_digest([tmp_path / "whole.safetensors"])
    assert weights_digest([tmp_path / "1.safetensors", tmp_path / "0.safetensors"]) == whole
    for change in ("dtype", "shape", "name", "value"):
        other = dict(weights)
        if change == "dtype":
            other["layer.3"] = weights["layer.3"].view(torch.int32)
        elif change == "shape":
            other["layer.3"] = weights["layer.3"].reshape(33, 40)
        elif change == "name":
            other["layer.9"] = other.pop("layer.3")
        else:
            other["layer.3"] = weights["layer.3"].clone()
            other["layer.3"][-1, -1] += 1e-3
        save_file(other, tmp_path / "other.safetensors")
        assert weights_digest([tmp_path / "other.safetensors"]) != whole, change


LFS_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"


@pytest.mark.parametrize(
    "content", [LFS_POINTER, b"", (8).to_bytes(8, "little") + b"no json!", (2).to_bytes(8, "little") + b"[]"]
)
def test_what_is_no_file_of_safetensors_has_no_digest(content: bytes, tmp_path: Path) -> None:
    """The first letters of a pointer of git-lfs, as a length, are more bytes than any memory has."""
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"is no safetensors file.*git lfs pull"):
        weights_digest([tmp_path / "model.safetensors"])
    with pytest.raises(UserError, match=r"cannot be read: .*is no safetensors file"):
        base_digest(BackboneSpec(str(tmp_path)))
