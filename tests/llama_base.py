"""A LLaMA of transformers as llama.cpp's base file, without its tokenizer: enough to compare logits of token ids."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import torch
from torch import nn

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def rotary_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """Rows as llama.cpp rotates them: in every head the two halves in turn."""
    size = weight.shape[0] // num_heads
    half = size // 2
    order = [head * size + index + part for head in range(num_heads) for index in range(half) for part in (0, half)]
    return weight[order]


def write_base(model: nn.Module, path: Path) -> Path:
    """`model` in float32, with whatever norms, heads and ties it has."""
    config: Any = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    for add in (writer.add_key_length, writer.add_value_length, writer.add_rope_dimension_count):
        add(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    tensors = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}
    if not config.tie_word_embeddings:
        tensors["output"] = "lm_head"
    for layer in range(config.num_hidden_layers):
        tensors |= {f"blk.{layer}.{there}": f"model.layers.{layer}.{here}" for here, there in NAMES.items()}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for there, here in tensors.items():
        weight = model.get_submodule(here).weight.detach().float()
        kind = there.rpartition(".")[2]
        values = rotary_order(weight, heads[kind]) if kind in heads else weight
        writer.add_tensor(f"{there}.weight", values.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
