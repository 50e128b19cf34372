"""`model.adapter`: a run begins where a saved LoRA ended, whoever made it, or is refused before weights load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import shared
from helpers import dense_delta, relative_error, tiny_llama
from peft_loras import KINDS, deltas, peft_lora, ranks_of
from safetensors.torch import load_file, save_file
from small_runs import Playground, lines

from sora_llm.artifacts.lora_files import read_lora
from sora_llm.inject import adapters, init_from_lora, inject_sora


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_begin_with_the_product_of_the_saved_one(tmp_path: Path, kind: str) -> None:
    folder = peft_lora(tmp_path / "base", tmp_path / "lora", 1, **KINDS[kind])
    lora, expected = read_lora(folder), deltas(folder)
    model = inject_sora(tiny_llama(), r=6, lora_alpha=4)
    init_from_lora(model, lora.factors, lora.scaling)
    for name, layer in adapters(model).items():
        assert relative_error(dense_delta(layer), expected[name]) < 1e-6, name  # float32 factors
        rank = ranks_of(lora)[name]
        assert bool((layer.gate == 1).all()) and not bool(layer.lora_B[:, rank:].any())
        assert bool(layer.lora_A[rank:].any()), "slots that are left can still learn"


def test_a_lora_that_has_learned_nothing_yet_gives_its_first_factor(tmp_path: Path) -> None:
    """As those that are initialised by data: B is 0, and what there is of them is in A."""
    folder = peft_lora(tmp_path / "base", tmp_path / "lora", 1)
    tensors = load_file(folder / "adapter_model.safetensors")
    blank = {key: tensor * 0 if ".lora_B." in key else tensor for key, tensor in tensors.items()}
    save_file(blank, folder / "adapter_model.safetensors")
    assert not any(ranks_of(read_lora(folder)).values()), "to all others its slots add nothing"
    assert set(ranks_of(read_lora(folder, blank_up_to=2)).values()) == {2}, "as far as there is room"
    lora = read_lora(folder, blank_up_to=8)
    model = inject_sora(tiny_llama(), r=8, lora_alpha=4)
    init_from_lora(model, lora.factors, lora.scaling)
    for name, (A, _, _) in lora.factors.items():
        layer = adapters(model)[name]
        assert len(A) and torch.equal(layer.lora_A[: len(A)], A) and not bool(layer.lora_B.any()), name


@pytest.mark.parametrize(("num_processes", "strategy"), [(1, "none"), (2, "zero2")])
def test_a_run_starts_at_the_loss_where_the_other_ended(
    undisturbed: dict[int, Path], ground: Playground, tmp_path: Path, num_processes: int, strategy: str
) -> None:
    before = undisturbed[1]
    name = f"warm-{strategy}"
    adapter = Path(shutil.copytree(before / "adapter", tmp_path / "adapter"))
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "some/other-base"}))
    certificate = json.loads((adapter / "certificate.json").read_text())
    own, earlier = certificate["data"], [{"path": "earlier/rows", "type": "alpaca", "split": "test"}]
    (adapter / "certificate.json").write_text(json.dumps(certificate | {"data": earlier}))
    options: dict[str, Any] = {"model.adapter": str(adapter), "distributed.strategy": strategy}
    children = ground.start(name, num_processes, **options)
    assert [child.wait() for child in children] == [0] * num_processes, children[0].output
    assert children[0].output.count("model.adapter is for the base some/other-base") == 1
    ended, metrics = lines(before, "metrics.jsonl")[-1], lines(ground.run_dir(name), "metrics.jsonl")
    assert metrics[0]["step"] == 0 and metrics[0]["eval_loss"] == pytest.approx(ended["eval_loss_exported"], rel=1e-5)
    assert abs(lines(before, "metrics.jsonl")[0]["eval_loss"] - metrics[0]["eval_loss"]) > 1e-3, "it had learned"
    assert metrics[-1]["eval_loss"] < metrics[0]["eval_loss"]
    taught = json.loads((ground.run_dir(name) / "adapter" / "certificate.json").read_text())["data"]
    assert own and taught == own + earlier, "what it was trained on, before and now"


def test_dev_rows_that_the_saved_adapter_may_have_seen_are_said(
    undisturbed: dict[int, Path], ground: Playground, tmp_path: Path
) -> None:
    def said(name: str, **others: Any) -> bool:
        (child,) = ground.start(
            name, **{"model.adapter": str(undisturbed[1] / "adapter"), "train.max_steps": 3, **others}
        )
        assert child.wait() == 0, child.output
        return "model.adapter was trained on " in child.output

    assert not said("same-held-out")
    assert said("others-held-out", **{"train.seed": 7})


def test_what_does_not_fit_is_a_sentence_before_the_model_is_loaded(
    undisturbed: dict[int, Path], ground: Playground, tmp_path: Path
) -> None:
    adapter = undisturbed[1] / "adapter"
    rank = max(module["rank"] for module in json.loads((adapter / "certificate.json").read_text())["modules"].values())
    refusals = {
        "there is no folder": {"model.adapter": str(tmp_path / "nowhere")},
        "holds no adapter_config.json": {"model.adapter": str(tmp_path)},
        "is a checkpoint; make a LoRA of it": {"model.adapter": str(adapter.parent / "checkpoints/step-2")},
        "is a whole model; name it as model.name_or_path": {"model.adapter": str(shared("models/base5m"))},
        "is a run directory; its LoRA is": {"model.adapter": str(adapter.parent)},
        "more than sora.r": {"model.adapter": str(adapter), "sora.r": rank - 1},
        "add it to sora.target_modules": {"model.adapter": str(adapter), "sora.target_modules": ["q_proj"]},
        "for another base": {"model.adapter": str(adapter), "model.name_or_path": str(shared("models/base5m"))},
    }
    for number, (expected, options) in enumerate(refusals.items()):
        (child,) = ground.start(f"refused-{number}", **options)
        assert child.wait() == 2, child.output
        assert expected in child.output and not ground.run_dir(f"refused-{number}").exists(), child.output
