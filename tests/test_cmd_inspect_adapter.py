"""`sora-llm inspect` of adapters: the singular values are those of the dense ΔW, whatever form the factors have."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import dense_delta, randomise_all, saved_tiny_llama, tiny_llama
from peft_loras import KINDS, deltas, peft_lora
from runs import CONFIG, gsm8k_overrides

from sora_llm import checkpoint, cli
from sora_llm.config import load_config, to_dict
from sora_llm.export import export_adapter
from sora_llm.inject import adapter_parameters, adapters, inject_sora
from sora_llm.spectrum import Spectrum

BASE = Path("/some/base")


def inspected(capsys: pytest.CaptureFixture[str], folder: Path) -> dict[str, Any]:
    assert cli.main(["inspect", str(folder), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def agree(modules: dict[str, Any], expected: dict[str, torch.Tensor]) -> None:
    """All that is said of each module against its dense ΔW."""
    assert modules.keys() == expected.keys()
    for name, delta in expected.items():
        found, sigma = modules[name], torch.linalg.svdvals(delta)
        rank = int((sigma > 1e-9 * sigma[0]).sum())
        assert (found["rank"], found["shape"]) == (rank, [delta.shape[1], delta.shape[0]]), name
        torch.testing.assert_close(torch.tensor(found["sigma"]).double(), sigma[:rank], rtol=1e-6, atol=0.0)
        assert found["norm"] == pytest.approx(float(delta.norm()), rel=1e-9)
        energy = (sigma**2).cumsum(0) / (sigma**2).sum()
        for count, share in found["energy_of_first"].items():
            assert share == pytest.approx(float(energy[int(count) - 1]), rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_of_any_kind_has_the_singular_values_of_its_product(tmp_path, capsys, kind):
    folder = peft_lora(BASE, tmp_path / "lora", 1, **KINDS[kind])
    found, expected = inspected(capsys, folder), deltas(folder)
    agree(found["modules"], expected)
    ranks = {name: module["rank"] for name, module in found["modules"].items()}
    costs = {name: sum(delta.shape) for name, delta in expected.items()}
    assert found["kept_params"] == sum(ranks[name] * cost for name, cost in costs.items())
    assert found["mean_rank"] == pytest.approx(found["kept_params"] / sum(costs.values()))
    assert (found["base_model"], found["left_out"], found["kind"]) == (str(BASE), [], "lora")
    assert found["bytes"] == (folder / "adapter_model.safetensors").stat().st_size
    scales = {name: module["scaling"] for name, module in found["modules"].items()}
    if kind == "rslora":
        assert set(scales.values()) == {3 / 4**0.5}
    if kind == "patterns":
        assert scales["model.layers.0.self_attn.q_proj"] == 11 / 5, "the first one wins, and PEFT sorts them"


def test_a_checkpoint_is_read_with_its_gates(tmp_path, capsys):
    model = tiny_llama()
    inject_sora(model, r=6, lora_alpha=9)
    randomise_all(model)
    masters = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    config = load_config(CONFIG, gsm8k_overrides(tmp_path, **{"sora.r": 6, "sora.lora_alpha": 9}))
    folder = checkpoint.save(tmp_path / "run", 3, masters, {"config": to_dict(config)})
    found = inspected(capsys, folder)
    expected = {name: dense_delta(layer) for name, layer in adapters(model).items()}
    dead = [name for name, delta in expected.items() if not delta.any()]
    assert dead and all(
        found["modules"][name]["effective_rank"] == found["modules"][name]["rank"] == 0 for name in dead
    )
    agree(
        {name: module for name, module in found["modules"].items() if name not in dead},
        {name: delta for name, delta in expected.items() if name not in dead},
    )
    for name, layer in adapters(model).items():
        assert found["modules"][name]["slots"] == int(layer.gate.count_nonzero())
    assert found["kind"] == "checkpoint"


def test_modules_that_a_cut_left_without_factors_count_in_the_mean_rank_of_a_checkpoint(tmp_path, capsys):
    """Their sizes come from the base's config; where that is not on this disk, the mean says of which modules it is."""
    base = saved_tiny_llama(tmp_path / "base")
    model = inject_sora(tiny_llama(), r=4)
    *live, pruned = adapters(model)
    masters = {name: p.detach() for name, p in adapter_parameters(model).items() if not name.endswith("gate")}
    masters = {name: tensor + 0.1 for name, tensor in masters.items() if not name.startswith(f"{pruned}.")}
    for place, is_whole in ((base, True), ("somewhere/else", False)):
        overrides = gsm8k_overrides(tmp_path, **{"sora.r": 4, "model.name_or_path": str(place)})
        config = to_dict(load_config(CONFIG, overrides))
        capsys.readouterr()  # what libraries said while the base was saved
        found = inspected(capsys, checkpoint.save(tmp_path / f"run {is_whole}", 3, masters, {"config": config}))
        cost = {name: layer.in_features + layer.out_features for name, layer in adapters(model).items()}
        counted = cost if is_whole else {name: cost[name] for name in live}
        rank_of = {name: found["modules"][name]["rank"] for name in live}
        assert found["mean_rank"] == pytest.approx(sum(rank_of[n] * cost[n] for n in live) / sum(counted.values()))
        assert found["mean_rank_is_of_all_targets"] is is_whole and found["left_out"] == ([pruned] if is_whole else [])


def test_a_checkpoint_without_factors_or_with_values_that_are_none_is_a_sentence(tmp_path, stories, capsys):
    model = tiny_llama()
    inject_sora(model, r=6)
    randomise_all(model)
    masters = {name: p.detach().clone() for name, p in adapter_parameters(model).items()}
    config = {"config": to_dict(load_config(CONFIG, gsm8k_overrides(tmp_path)))}
    pruned = checkpoint.save(tmp_path / "pruned", 3, {}, config)
    assert cli.main(["inspect", str(pruned)]) == 2 and "was pruned" in capsys.readouterr().err
    assert cli.main(["recommend-ranks", str(pruned)]) == 2 and "changes nothing" in capsys.readouterr().err
    for kind, value in (("lora_A", float("nan")), ("lora_B", float("inf")), ("gate", float("nan"))):
        name = f"model.layers.0.mlp.up_proj.{kind}"
        broken = {**masters, name: torch.full_like(masters[name], value)}
        folder = checkpoint.save(tmp_path / kind, 3, broken, config)
        for command in (["inspect"], ["recommend-ranks"], ["export", "--target-rank", "1", "--out", f"{tmp_path}/out"]):
            assert cli.main([command[0], str(folder), *command[1:]]) == 2, command
            assert "not finite; name an earlier checkpoint" in capsys.readouterr().err


def test_energy_is_told_as_the_mean_rank_that_holds_it(tmp_path, capsys):
    folder = peft_lora(BASE, tmp_path / "lora", 1, r=8, lora_alpha=8, target_modules=["q_proj"])
    found = inspected(capsys, folder)["mean_rank_for_energy"]
    sigma = torch.cat([torch.linalg.svdvals(delta) for delta in deltas(folder).values()])
    energy = (sigma**2).sort(descending=True).values.cumsum(0) / (sigma**2).sum()
    for share, mean in found.items():  # two modules of one size
        assert mean == (int((energy < float(share)).sum()) + 1) / 2


def test_the_effective_rank_is_between_one_and_the_rank():
    equal, steep = torch.ones(5).double(), torch.tensor([1.0, 1e-7]).double()
    assert Spectrum((9, 9), 5, 1.0, equal).effective_rank == pytest.approx(5)
    assert Spectrum((9, 9), 2, 1.0, steep).effective_rank == pytest.approx(1, abs=1e-5)
    assert Spectrum((9, 9), 5, 1.0, equal).share_of_first(2) == pytest.approx(0.4)


def test_a_terminal_gets_ranks_by_layer_and_spectra_by_projection_or_by_module(tmp_path, capsys):
    model = tiny_llama()
    inject_sora(model, r=6)
    randomise_all(model)  # one module is dead
    export_adapter(model, tmp_path / "lora", "ragged")
    assert cli.main(["inspect", str(tmp_path / "lora")]) == 0
    shown = capsys.readouterr().out
    assert "1 more are left out as 0" in shown and re.search(r"^ +0 .*-", shown, re.M)
    assert re.search(r"^q_proj +[\d.]+ +[\d.]+ +[\d.]+( +[\d.]+%)+$", shown, re.M)
    assert cli.main(["inspect", str(tmp_path / "lora"), "--modules"]) == 0
    assert "\nmodel.layers.1.self_attn.q_proj " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "said"),
    [({"peft_type": "LOHA"}, "LOHA"), ({"use_dora": True}, "DoRA"), ({"r": 7}, "the files do not match")],
)
def test_what_is_no_plain_lora_is_refused(tmp_path, capsys, config, said):
    folder = peft_lora(BASE, tmp_path / "lora", 1, r=4, lora_alpha=8)
    saved = folder / "adapter_config.json"
    saved.write_text(json.dumps(json.loads(saved.read_text()) | config))
    assert cli.main(["inspect", str(folder)]) == 2
    assert said in capsys.readouterr().err


def test_options_belong_to_runs_or_to_adapters(tmp_path, capsys):
    folder = peft_lora(BASE, tmp_path / "lora", 1, r=4, lora_alpha=8)
    assert cli.main(["inspect", str(folder), "--plots"]) == 2
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "status.json").write_text("{}")
    assert cli.main(["inspect", str(tmp_path / "run"), "--modules"]) == 2
    error = capsys.readouterr().err
    assert "--plots" in error and "--modules" in error
