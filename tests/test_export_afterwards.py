"""An export in the middle of training changes nothing of it."""

import pytest
import torch
from exporting import IDS, logits, trained_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sora_llm import peft_check
from sora_llm.export import export_adapter
from sora_llm.inject import adapters, inject_sora


def gradients(model, mode=True):
    model.zero_grad()
    model.train(mode)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", ["float32", "nf4"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_exported_model_goes_on_training_as_if_nothing_had_happened(stories, tmp_path, kind, mode):
    model = trained_model(kind, stories)
    before, layers, names = gradients(model, mode), adapters(model), dict(model.named_parameters())
    export_adapter(model, tmp_path / "adapter")
    assert model.training is mode
    assert adapters(model) == layers
    after_names = dict(model.named_parameters())
    assert after_names.keys() == names.keys()
    assert all(after_names[name] is p and p.requires_grad == (name in before) for name, p in names.items())
    after = gradients(model, mode)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not hasattr(model, "peft_config") and not getattr(model, "_hf_peft_config_loaded", False)


def test_an_export_in_the_middle_changes_no_gradient_on_a_4_bit_base_of_ones_own(stories, tmp_path):
    """The base comes from transformers, not from our loader: bitsandbytes would repack its weights in eval mode."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(stories, quantization_config=quantization, dtype=torch.bfloat16)
    inject_sora(model, r=4)
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    before = gradients(model)
    export_adapter(model, tmp_path / "adapter")
    after = gradients(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_a_failed_export_leaves_the_model_training_too(stories, tmp_path, monkeypatch):
    model = trained_model("float32", stories)
    expected, layers = logits(model), adapters(model)
    model.train()

    def broken(peft_model, layers):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(peft_check, "_delta_errors", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        export_adapter(model, tmp_path / "adapter")
    assert adapters(model) == layers and model.training and not hasattr(model, "peft_config")
    assert torch.equal(logits(model), expected)


def test_every_module_comes_back_in_the_mode_it_was_in(stories, tmp_path):
    model = trained_model("float32", stories).train()
    model.model.norm.eval()
    export_adapter(model, tmp_path / "adapter")
    assert model.training and not model.model.norm.training


def test_an_export_leaves_the_random_state_alone(stories, tmp_path):
    model = trained_model("float32", stories)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    export_adapter(model, tmp_path / "adapter")
    assert torch.equal(torch.rand(3), expected)
