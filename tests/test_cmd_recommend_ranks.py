"""`sora-llm recommend-ranks`: PEFT built with what it prints has exactly those ranks and scales, also once reloaded."""

from __future__ import annotations

import json
from argparse import Namespace
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from helpers import randomise_all, saved_tiny_llama, tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from peft_loras import KINDS, deltas, peft_lora
from runs import CONFIG, gsm8k_overrides
from small_runs import checkpoints

from sora_llm import cli
from sora_llm.commands import cmd_recommend_ranks
from sora_llm.commands.sources import read_source
from sora_llm.config import load_config, to_yaml
from sora_llm.export import export_adapter
from sora_llm.inject import inject_sora

BASE = Path("/some/base")


def recommended(capsys: pytest.CaptureFixture[str], folder: Path | str, *arguments: object) -> dict[str, Any]:
    assert cli.main(["recommend-ranks", str(folder), *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def built(model: Any) -> dict[str, tuple[int, float]]:
    """{module: (rank, scale)} as PEFT made them."""
    return {
        name: (module.r["default"], module.scaling["default"])
        for name, module in model.get_base_model().named_modules()
        if hasattr(module, "lora_A") and "default" in module.lora_A
    }


def peft_made(options: dict[str, Any], folder: Path) -> dict[str, tuple[int, float]]:
    """By a LoraConfig of these options, and once more from its files, which say the same."""
    model = get_peft_model(tiny_llama(), LoraConfig(**options))
    found = built(model)
    model.save_pretrained(str(folder))
    assert built(PeftModel.from_pretrained(tiny_llama(), str(folder))) == found
    return found


@pytest.mark.parametrize(
    ("kind", "size"),
    [
        *((kind, ()) for kind in KINDS),
        ("plain", ("--tolerance", 0.4)),
        ("patterns", ("--tolerance", 0.9, "--min-rank", 1)),
        ("rslora", ("--target-params", 700)),
        ("patterns", ("--target-rank", 1.3)),
        ("patterns", ("--target-rank", 1.3, "--min-rank", 1)),
    ],
)
def test_peft_has_the_ranks_that_the_size_allows_and_the_adapters_scales(tmp_path, capsys, kind, size):
    folder = peft_lora(BASE, tmp_path / "lora", 1, **KINDS[kind])
    result = recommended(capsys, folder, *size)
    trained, products = built(PeftModel.from_pretrained(tiny_llama(), str(folder))), deltas(folder)
    made = peft_made(result["lora_config"], tmp_path / "made")
    assert not made.keys() & set(result["pruned"]) and made.keys() | set(result["pruned"]) == trained.keys()
    for name, (_, scale) in made.items():
        assert scale == pytest.approx(trained[name][1], rel=1e-12)
    ranks = {name: made[name][0] if name in made else 0 for name in trained}
    sigma = {name: torch.linalg.svdvals(delta) for name, delta in products.items()}
    energy = sum(float((s**2).sum()) for s in sigma.values())
    kept = sum(float((s[: ranks[name]] ** 2).sum()) for name, s in sigma.items())
    params = sum(ranks[name] * sum(delta.shape) for name, delta in products.items())
    assert (result["energy_kept"], result["kept_params"]) == (pytest.approx(kept / energy), params)
    if not size:
        assert ranks == {name: rank for name, (rank, _) in trained.items()}
    cheapest = min(sum(delta.shape) for delta in products.values())
    if "--target-params" in size:
        assert params <= 700 < params + cheapest or kept == pytest.approx(energy)
    if "--target-rank" in size:
        assert result["mean_rank"] <= 1.3
    if "--tolerance" in size:
        assert 1 - size[1] ** 2 <= kept / energy < 1
    if "--min-rank" in size:
        assert not result["pruned"]
    elif not size or "--tolerance" in size:  # a budget passes over what does not fit
        worth = [
            (float(v) ** 2 / sum(products[n].shape), i < ranks[n]) for n, s in sigma.items() for i, v in enumerate(s)
        ]
        least = min(value for value, is_kept in worth if is_kept)
        assert all(value < least for value, is_kept in worth if not is_kept)


def test_a_run_is_recommended_at_the_scale_that_it_was_trained_with(tmp_path, capsys):
    run = tmp_path / "run"
    model = tiny_llama()
    inject_sora(model, r=8, lora_alpha=12)
    randomise_all(model)
    export_adapter(model, run / "adapter", "ragged")
    options = gsm8k_overrides(run, **{"sora.r": 8, "sora.lora_alpha": 12})
    (run / "config.yaml").write_text(to_yaml(load_config(CONFIG, options)))
    result = recommended(capsys, run)
    certificate = json.loads((run / "adapter" / "certificate.json").read_text())["modules"]
    made = peft_made(result["lora_config"], tmp_path / "made")
    assert made == {name: (module["rank"], 1.5) for name, module in certificate.items() if module["rank"]}
    assert result["pruned"] == [name for name, module in certificate.items() if not module["rank"]] != []
    assert recommended(capsys, run / "adapter")["lora_config"] == result["lora_config"], "it is the run's"
    (run / "adapter").rename(tmp_path / "elsewhere")
    folded = peft_made(recommended(capsys, tmp_path / "elsewhere")["lora_config"], tmp_path / "folded")
    assert folded == {name: (rank, 1.0) for name, (rank, _) in made.items()}


def test_pruned_targets_count_in_the_mean_whatever_the_files_leave_out(undisturbed, tmp_path, capsys):
    """The same adapter with zeros where it was pruned, without these modules, and as a checkpoint after the cut."""
    run, size = undisturbed[1], ("--target-rank", "0.3")
    last = run / "checkpoints" / checkpoints(run)[-1]
    for layout in ("padded", "ragged"):
        arguments = [str(last), "--target-rank", "0.6", "--layout", layout, "--out", str(tmp_path / layout)]
        assert cli.main(["export", *arguments]) == 0
    capsys.readouterr()
    padded, ragged = (recommended(capsys, tmp_path / layout, *size) for layout in ("padded", "ragged"))
    lora = read_source(tmp_path / "ragged")
    assert lora.factors.keys() < lora.targets, "or the test says nothing"
    assert padded["lora_config"] == ragged["lora_config"] and sorted(padded["pruned"]) == sorted(ragged["pruned"])
    assert padded["mean_rank"] == ragged["mean_rank"] <= 0.3
    was_cut = replace(read_source(last), factors=lora.factors, targets=frozenset(lora.factors), scaling=lora.scaling)
    options = Namespace(target_rank=0.3, target_params=None, tolerance=None, min_rank=0, scaling=1.0)
    found = cmd_recommend_ranks.recommended(was_cut, Namespace(**vars(options), base=None, trust_remote_code=False))
    assert found["lora_config"] == ragged["lora_config"] and found["pruned"] == ragged["pruned"]

    file = tmp_path / "ragged" / "adapter_config.json"
    base = json.loads(file.read_text())["base_model_name_or_path"]
    file.write_text(file.read_text().replace(base, "/gone"))
    assert not recommended(capsys, tmp_path / "ragged")["mean_rank_is_of_all_targets"]
    assert cli.main(["recommend-ranks", str(tmp_path / "ragged"), *size]) == 2
    assert "name it with --base MODEL, or use --target-params" in capsys.readouterr().err
    assert recommended(capsys, tmp_path / "ragged", *size, "--base", base)["lora_config"] == padded["lora_config"]


def test_a_base_that_is_named_has_to_fit_though_the_files_say_all(tmp_path, capsys):
    folder, fits = peft_lora(BASE, tmp_path / "lora", 1, r=2), saved_tiny_llama(tmp_path / "fits")
    capsys.readouterr()  # what libraries print while they save
    expected = recommended(capsys, folder, "--target-rank", "1.5")
    found = recommended(capsys, folder, "--target-rank", "1.5", "--base", fits)
    assert found == {**expected, "base_model": str(fits)}
    other = saved_tiny_llama(tmp_path / "other")
    (other / "config.json").write_text((other / "config.json").read_text().replace('_size": 48', '_size": 64'))
    for base, said in ((other, "it is an adapter for another base"), ("/no/such", "/no/such")):
        assert cli.main(["recommend-ranks", str(folder), "--base", str(base)]) == 2
        assert said in capsys.readouterr().err


def test_the_snippets_say_the_same(tmp_path, capsys):
    folder = peft_lora(BASE, tmp_path / "lora", 1, **KINDS["patterns"])
    arguments = [str(folder), "--target-rank", "2", "--scaling", "2"]
    expected = recommended(capsys, *arguments)["lora_config"]
    assert cli.main(["recommend-ranks", *arguments]) == 0
    scope: dict[str, Any] = {}
    exec(capsys.readouterr().out, scope)  # the printed Python, as its reader would run it
    assert built(get_peft_model(tiny_llama(), scope["config"])) == peft_made(expected, tmp_path / "made")
    assert cli.main(["recommend-ranks", *arguments, "--format", "axolotl"]) == 0
    shown = capsys.readouterr().out
    assert "scales are off" not in shown
    found = yaml.safe_load(shown)
    assert (found["adapter"], found["lora_r"], found["lora_alpha"]) == ("lora", expected["r"], expected["lora_alpha"])
    assert found["lora_target_modules"] == expected["target_modules"]
    assert found["lora_rank_pattern"] == expected["rank_pattern"]
    assert found["lora_alpha_pattern"] == expected["alpha_pattern"]


def test_axolotls_whole_alphas_are_said_to_be_off(tmp_path, capsys):
    folder = peft_lora(BASE, tmp_path / "lora", 1, r=3, lora_alpha=4)  # alpha of rank 2: 2.67
    assert cli.main(["recommend-ranks", str(folder), "--target-rank", "2.2", "--format", "axolotl"]) == 0
    shown = capsys.readouterr().out
    found = yaml.safe_load(shown)
    ranks = {name: found["lora_rank_pattern"].get(name, found["lora_r"]) for name in found["lora_target_modules"]}
    off = 0.0
    for name, rank in ranks.items():
        alpha = found["lora_alpha_pattern"].get(name, found["lora_alpha"])
        assert isinstance(alpha, int) and alpha >= 1
        off = max(off, abs(alpha / rank / (4 / 3) - 1))
    assert f"off by up to {off:.0%}" in shown


def test_a_tiny_scale_is_a_scale(tmp_path, capsys):
    """It was rounded to 0, which is none and cannot be divided by."""
    folder = peft_lora(BASE, tmp_path / "lora", 1, r=4, lora_alpha=8)
    found = recommended(capsys, folder, "--scaling", "1e-12")["lora_config"]
    assert found["lora_alpha"] == pytest.approx(found["r"] * 1e-12)
    assert cli.main(["recommend-ranks", str(folder), "--scaling", "1e-12", "--format", "axolotl"]) == 0
    assert yaml.safe_load(capsys.readouterr().out)["lora_alpha"] == 1


def test_weights_that_may_not_be_read_are_not_said_to_be_missing(tmp_path, capsys, monkeypatch):
    folder = peft_lora(BASE, tmp_path / "lora", 1, r=4, lora_alpha=8)
    real = Path.open

    def guarded(path, *arguments, **options):  # root, as whom tests may run, can read everything
        if path.name == "adapter_model.safetensors":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(Path, "open", guarded)
    assert cli.main(["recommend-ranks", str(folder)]) == 2
    assert "Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--target-rank", "0"], "--target-rank"),
        (["--target-params", "3"], "this size keeps nothing"),
        (["--tolerance", "1"], "--tolerance"),
        (["--scaling", "0"], "--scaling"),
        (["--min-rank", "3", "--target-params", "100"], "min_rank"),
    ],
)
def test_a_size_that_cannot_be_is_bad_input(tmp_path, capsys, arguments, said):
    folder = peft_lora(BASE, tmp_path / "lora", 1, **KINDS["plain"])
    assert cli.main(["recommend-ranks", str(folder), *arguments]) == 2
    assert said in capsys.readouterr().err
