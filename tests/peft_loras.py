"""Random LoRAs as PEFT saves them, of every kind it has, and what PEFT makes of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import tiny_llama
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from sora_llm.artifacts.lora_files import LoraFiles

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
KINDS: dict[str, dict[str, Any]] = {
    "plain": {"r": 3, "lora_alpha": 5},
    "rslora": {"r": 4, "lora_alpha": 3, "use_rslora": True},
    "patterns": {
        "r": 2,
        "lora_alpha": 3,
        "rank_pattern": {"layers.0.self_attn.q_proj": 5, "q_proj": 4, r"layers\.\d+\.mlp\.down_proj": 1},
        "alpha_pattern": {"q_proj": 7, "layers.0.self_attn.q_proj": 11, "v_proj": 0.5},
    },
    "patterns and rslora": {"r": 2, "lora_alpha": 3, "use_rslora": True, "rank_pattern": {"o_proj": 3}},
}


def peft_lora(base: Path, folder: Path, seed: int, **options: Any) -> Path:
    """A random LoRA as PEFT saves it."""
    config = LoraConfig(**{"target_modules": PROJECTIONS, "task_type": "CAUSAL_LM"} | options)
    model = tiny_llama()
    model.name_or_path = model.config._name_or_path = str(base)
    return save_random(get_peft_model(model, config), folder, seed)


def save_random(adapted: PeftModel, folder: Path, seed: int) -> Path:
    """Give the LoRA of a PEFT model random factors, A too, which PEFT draws from the global generator, and save it."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    adapted.save_pretrained(str(folder))
    return folder


@pytest.fixture(scope="module")
def lora(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LoRA of stories260k as PEFT saves it."""
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "down_proj"]))
    return save_random(adapted, tmp_path_factory.mktemp("lora") / "adapter", 0)


def deltas(folder: Path) -> dict[str, torch.Tensor]:
    """ΔW of every module as PEFT applies it, dense, in float64."""
    adapted = PeftModel.from_pretrained(tiny_llama(), str(folder))
    found = {}
    for name, module in adapted.get_base_model().named_modules():
        if hasattr(module, "lora_A") and "default" in module.lora_A:
            A, B = module.lora_A["default"].weight.double(), module.lora_B["default"].weight.double()
            found[name] = (module.scaling["default"] * B @ A).detach()
    return found


def ranks_of(lora: LoraFiles) -> dict[str, int]:
    """{module: slots that are not 0}, modules that were left out as 0."""
    return {name: lora.factors[name][0].shape[0] if name in lora.factors else 0 for name in sorted(lora.targets)}
