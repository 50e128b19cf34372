"""Small models and layers that several test files need."""

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from sora_llm.inject import adapters
from sora_llm.sora import SoraLinear


def tiny_llama(seed: int = 0, **overrides) -> LlamaForCausalLM:
    """A random LLaMA of two layers with grouped-query attention; `overrides` change its config."""
    torch.manual_seed(seed)
    options = {
        "vocab_size": 48,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 64,
        "initializer_range": 0.3,  # logits far from uniform, so that gradients are of order 1
    }
    return LlamaForCausalLM(LlamaConfig(**(options | overrides))).eval()


def saved_tiny_llama(folder: Path) -> Path:
    """A random LLaMA on disk, in float32, with a tokenizer's file that is never read."""
    tiny_llama().save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}")
    return folder


def linear4bit(weight_OI: torch.Tensor, compute_dtype: torch.dtype = torch.float32, device: str = "cpu") -> nn.Linear:
    """A bitsandbytes NF4 layer of this weight."""
    import bitsandbytes as bnb

    num_out, num_in = weight_OI.shape
    layer = bnb.nn.Linear4bit(num_in, num_out, bias=False, compute_dtype=compute_dtype, quant_type="nf4")
    layer.load_state_dict({"weight": weight_OI})
    return layer.to(device)  # quantises


def linear8bit(weight_OI: torch.Tensor) -> nn.Linear:
    """A bitsandbytes 8-bit layer of this weight on the CPU."""
    import bitsandbytes as bnb

    num_out, num_in = weight_OI.shape
    layer = bnb.nn.Linear8bitLt(num_in, num_out, bias=False, has_fp16_weights=False)
    layer.load_state_dict({"weight": weight_OI})
    return layer.to("cpu")  # quantises


@torch.no_grad()
def randomise(layer: SoraLinear, seed: int, dead: int = 0, size: float = 0.3) -> SoraLinear:
    """Give an adapter random factors and gates of both signs, the first `dead` gates exactly 0; returns it."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in (layer.lora_A, layer.lora_B):
        parameter.copy_(size * torch.randn(parameter.shape, generator=generator))
    signs = torch.randint(2, layer.gate.shape, generator=generator) * 2 - 1
    layer.gate.copy_(signs * (0.5 + torch.rand(layer.gate.shape, generator=generator)))
    layer.gate[:dead] = 0
    return layer


def randomise_all(model: nn.Module, seed: int = 0, size: float = 0.3) -> nn.Module:
    """As `randomise`, for every adapter: one is all dead, one all alive, the others between; returns the model."""
    for index, layer in enumerate(adapters(model).values()):
        rank = layer.gate.numel()
        randomise(layer, seed + index, dead=rank if index == 1 else index % rank, size=size)
    return model


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """‖found − expected‖ / ‖expected‖ in float64; 0 where both are 0."""
    found, expected = found.detach().double(), expected.detach().double()
    difference = float((found - expected).norm())
    return difference / float(expected.norm()) if difference else 0.0


def dense_delta(layer: SoraLinear) -> torch.Tensor:
    """ΔW (O, I) = s · B diag(g) A of a layer in float64, formed densely."""
    if layer.lora_A is None:
        return torch.zeros(layer.out_features, layer.in_features, dtype=torch.float64)
    A_RI, B_OR = layer.lora_A.detach().double(), layer.lora_B.detach().double()
    g_R = torch.ones(A_RI.shape[0]).double() if layer.gate is None else layer.gate.detach().double()
    return layer.scaling * torch.einsum("or,r,ri->oi", B_OR, g_R, A_RI)


def token_row(ids, weights=None):
    """A row as data sets give it; without `weights` all but the first token is supervised."""
    default = np.arange(len(ids)) > 0
    return np.array(ids, dtype=np.int32), np.array(default if weights is None else weights, dtype=np.float32)


def random_factors(seed: int, modules: dict[str, tuple[int, int, int]], dead: float = 0.3) -> dict:
    """{name: (A (R, I), B (O, R), g (R,))} in float64 for {name: (R, I, O)}; a share `dead` of the gates is 0.

    Gates have both signs, modules different sizes.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    factors = {}
    for name, (rank, num_in, num_out) in modules.items():
        gate = randn(rank) * (torch.rand(rank, generator=generator) >= dead)
        factors[name] = (randn(rank, num_in), randn(num_out, rank), gate * float(torch.exp(randn(1))))
    return factors


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    """Float64 draws of that shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def perturb(base: Path) -> None:
    """As if the weights of a base had been trained on: one number of one layer is another."""
    file = base / "model.safetensors"
    weights = load_file(file)
    name = next(name for name in weights if "mlp" in name)
    weights[name][0, 0] += 1.0
    save_file(weights, file, metadata={"format": "pt"})
