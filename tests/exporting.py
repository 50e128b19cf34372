"""Models with adapters to export, and what a fresh base with the exported one says."""

import json
import warnings

import torch
from helpers import randomise_all

from sora_llm.backbone import load_backbone
from sora_llm.base_spec import BackboneSpec
from sora_llm.inject import adapters, cut_adapters, inject_sora
from sora_llm.sora import keep_live_slots

R, LORA_ALPHA = 6, 9.0  # s = 1.5
# Relative, of an adapter that changes the logits by more than a fifth.
# float32 rounds at 6e-8; in bf16 PEFT computes its branch in float32 and the trained model in bf16 (2⁻⁸, five layers)
LOGITS_TOLERANCE = {"float32": 2e-5, "nf4": 2e-5, "bfloat16": 2e-2}


def spec_of(kind, stories):
    if kind == "nf4":
        return BackboneSpec(str(stories), dtype="float32", load_in_4bit=True, compute_dtype="float32")
    return BackboneSpec(str(stories), dtype=kind)


def trained_model(kind, stories, seed=0):
    """stories260k with adapters of uneven ranks, one module fully pruned, one fully alive."""
    model = inject_sora(load_backbone(spec_of(kind, stories), "cpu"), R, LORA_ALPHA)
    return randomise_all(model, seed, size=0.1)


def kill(model):
    for layer in adapters(model).values():
        torch.nn.init.zeros_(layer.gate)
    return model


def cut(model):
    factors = {n: keep_live_slots(m.lora_A, m.lora_B, m.gate) for n, m in adapters(model).items()}
    cut_adapters(model, factors)
    return model


IDS = torch.randint(512, (3, 17), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model):
    model.eval()
    return model(input_ids=IDS, use_cache=False).logits.float()


def in_peft(kind, stories, folder):
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(load_backbone(spec_of(kind, stories), "cpu"), str(folder))


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())
