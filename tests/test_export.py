"""What is exported is what was trained: in PEFT and in transformers, from disk, on a base that never saw training."""

import pytest
import torch
from exporting import LOGITS_TOLERANCE, LORA_ALPHA, R, config_of, cut, in_peft, kill, logits, spec_of, trained_model
from helpers import randomise_all, relative_error, tiny_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sora_llm.backbone import load_backbone
from sora_llm.errors import RunFailed, UserError
from sora_llm.export import export_adapter
from sora_llm.inject import adapters, inject_sora, without_adapters

# ----- the same model elsewhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "cut"])
@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("kind", ["float32", "nf4", "bfloat16"])
def test_peft_and_transformers_give_the_trained_logits_on_a_fresh_base(stories, tmp_path, kind, layout, gated):
    model = trained_model(kind, stories)
    if not gated:
        cut(model)
    expected = logits(model)
    with without_adapters(model):
        base = logits(model)
    assert relative_error(base, expected) > 0.2, "the adapter must matter"
    export_adapter(model, tmp_path / "adapter", layout)

    assert relative_error(logits(in_peft(kind, stories, tmp_path / "adapter")), expected) < LOGITS_TOLERANCE[kind]
    fresh = load_backbone(spec_of(kind, stories), "cpu")
    fresh.load_adapter(str(tmp_path / "adapter"))
    assert relative_error(logits(fresh), expected) < LOGITS_TOLERANCE[kind]


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_a_merged_export_is_the_base_weight_plus_delta(stories, tmp_path, layout):
    """Every module's ΔW, the pruned ones' 0 included, by PEFT's own merge."""
    model = trained_model("float32", stories)
    export_adapter(model, tmp_path / "adapter", layout)
    merged = in_peft("float32", stories, tmp_path / "adapter").merge_and_unload()
    for name, layer in adapters(model).items():
        A, B, g = (t.detach().double() for t in (layer.lora_A, layer.lora_B, layer.gate))
        expected = layer.weight.double() + LORA_ALPHA / R * B @ torch.diag(g) @ A
        # the merged weight is rounded to float32 once
        torch.testing.assert_close(merged.get_submodule(name).weight.double(), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_a_fully_pruned_adapter_is_explained_unless_it_is_allowed(stories, tmp_path, layout):
    model = kill(trained_model("float32", stories))
    with pytest.raises(RunFailed, match=r"every rank .* was pruned.*sparse_lambda.*allow_empty_adapter"):
        export_adapter(model, tmp_path / "adapter", layout)
    assert not list(tmp_path.iterdir())
    certificate = export_adapter(cut(model), tmp_path / "adapter", layout, allow_empty=True)
    assert certificate["passed"] and {entry["rank"] for entry in certificate["modules"].values()} == {0}
    base = load_backbone(spec_of("float32", stories), "cpu")
    expected = logits(base)
    assert torch.equal(logits(in_peft("float32", stories, tmp_path / "adapter")), expected)


# ----- layouts --------------------------------------------------------------------------------------------------------


def test_padded_has_every_target_module_at_one_rank_and_nothing_to_interpret(stories, tmp_path):
    model = trained_model("float32", stories)
    export_adapter(model, tmp_path / "adapter", "padded")
    config = config_of(tmp_path / "adapter")
    assert config["r"] == config["lora_alpha"] == R
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False and config["use_dora"] is False and config["bias"] == "none"
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(config["target_modules"]) == projections
    assert config["base_model_name_or_path"] == str(stories)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert set(tensors) == {
        f"base_model.model.{name}.lora_{kind}.weight" for name in adapters(model) for kind in ("A", "B")
    }
    assert all(t.dtype == torch.float32 for t in tensors.values())
    for name, layer in adapters(model).items():
        A, B = (tensors[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
        assert A.shape == (R, layer.in_features) and B.shape == (layer.out_features, R)
        live = int((layer.gate != 0).sum())
        assert (A[:live] != 0).any(dim=1).all() and not A[live:].any() and not B[:, live:].any()


def test_the_padded_rank_is_the_largest_kept_one(stories, tmp_path):
    model = inject_sora(load_backbone(spec_of("float32", stories), "cpu"), R, LORA_ALPHA, target_modules=["q_proj"])
    randomise_all(model)
    for layer in adapters(model).values():
        with torch.no_grad():
            layer.gate[2:] = 0
    export_adapter(model, tmp_path / "adapter")
    config = config_of(tmp_path / "adapter")
    assert config["r"] == config["lora_alpha"] == 2
    assert config["target_modules"] == ["q_proj"]


def test_ragged_has_the_live_modules_at_their_own_rank(stories, tmp_path):
    model = trained_model("float32", stories)
    ranks = {name: int((layer.gate != 0).sum()) for name, layer in adapters(model).items()}
    assert min(ranks.values()) == 0 and len(set(ranks.values())) > 3
    certificate = export_adapter(model, tmp_path / "adapter", "ragged")
    config = config_of(tmp_path / "adapter")
    live = {name: rank for name, rank in ranks.items() if rank}
    assert config["rank_pattern"] == config["alpha_pattern"] == live
    assert config["r"] == config["lora_alpha"] == max(live.values())
    assert set(config["target_modules"]) == set(live)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    expected = {}
    for name, rank in live.items():
        layer = adapters(model)[name]
        expected[f"base_model.model.{name}.lora_A.weight"] = (rank, layer.in_features)
        expected[f"base_model.model.{name}.lora_B.weight"] = (layer.out_features, rank)
    assert shapes == expected
    assert {name: entry["rank"] for name, entry in certificate["modules"].items()} == ranks


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_a_selection_that_no_suffix_describes_hits_exactly_its_modules(tmp_path, layout):
    """q_proj of layer 1 alone: the suffix "q_proj" would make PEFT adapt layer 0 as well."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    target = "model.layers.1.self_attn.q_proj"
    model = randomise_all(inject_sora(base, 3, 3, target_modules=[target]))
    export_adapter(model, tmp_path / "adapter", layout)
    assert config_of(tmp_path / "adapter")["target_modules"] == [target]


def test_an_unknown_layout_and_a_model_without_adapters_are_refused(tmp_path):
    with pytest.raises(UserError, match="'flat' is not one of padded, ragged"):
        export_adapter(inject_sora(tiny_llama(), 2), tmp_path / "adapter", "flat")
    with pytest.raises(UserError, match="inject_sora"):
        export_adapter(tiny_llama(), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())
