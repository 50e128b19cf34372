"""Activation memory of a LLaMA-like decoder with adapters, by arithmetic on its sizes, before anything is loaded.

A layer keeps for its backward pass, in bytes per token, with b bytes per element of the activations:

    what each norm takes, float32                    4 · H (LLaMA: 2 norms, Gemma: 4)
    what norms of queries and keys take, float32     4 · (A + K) + 4 · (heads + key-value heads)
    inputs of attention and MLP, if adapted          b · H each
    queries and the output of attention              2 · b · A
    keys and values                                  2 · b · K, or 2 · b · A if they are repeated for every head
    attention itself                                 4 · heads (sdpa, flash), heads · S · (4, + b under b < 4) (eager)
    mask of packed rows under sdpa                   b · S
    gate, silu(gate), up; their product              3 · b · F; b · F if an adapter reads it
    A x of every adapter                             b · Σ r

(H hidden, F intermediate, A heads · head_dim, K key-value heads · head_dim, S sequence length, V vocabulary.)  The loss
takes b · H while all layers are alive, and another b · H + 8 · V for the tokens whose logits exist at a time
(`head_loss`), or 12 · V for all of them if the head does not allow that.  A layer's own backward pass takes about
2 · b · F + 4 · H, with b · F for x ⊙ mask if the adapter of the down projection drops elements of x; or, if a norm
follows the MLP, 5 · 4 · H + b · H for that norm's; plus the weight that it dequantises.  With gradient checkpointing
the layers keep b · H each, and one at a time keeps everything.  8-bit layers keep their inputs, even if no adapter
reads them, and checkpointing does not free them (bitsandbytes 0.50 holds them outside autograd): then every layer also
keeps b · (2 · H + A + F).

A forward pass without gradients takes the most in one of these places, in bytes per token, in addition to 4 · b · H for
the residual stream, the inputs of the layer and of the model, and a norm's output:

    gate or its silu, up and their product           3 · b · F, or 2 · b · F and the weight that is dequantised
    queries' norm                                    b · A + 8 · (A + heads)
    rotation (c = 4 bytes in OLMo 2, else b)         b · (A + 2 · K) + c · max(3 · A, A + 3 · K)
    scores, in float32 their softmax (eager)         b · (A + 2 · K + S) + heads · S · (8, + b under b < 4),
                                                     + 2 · b · A if keys and values are repeated for every head

Eager attention's weights, b · S · (heads + 1) with their mask, live on beside the MLP.  The loss takes 8 · V + b · H
for the tokens whose logits exist at a time, or (8, + b under b < 4) · V for all.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from sora_llm.head_loss import tokens_at_once


@dataclass(frozen=True)
class DecoderSizes:
    """The sizes that determine the activations of a model whose layers are attention and a gated MLP."""

    num_layers: int
    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocabulary: int
    changes_logits: bool = False
    """After the output head."""
    caps_scores: bool = False
    """Of attention (Gemma 2), which keeps tensors that the arithmetic does not count."""


PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"})
"""The linear layers that the arithmetic covers: fused ones (qkv_proj, gate_up_proj) keep other tensors."""

PRE_NORMS = frozenset({"input_layernorm", "post_attention_layernorm"})
"""A decoder layer's norms of the inputs of attention and MLP (LLaMA, Mistral, Qwen2)."""

POST_NORMS = frozenset({"post_attention_layernorm", "post_feedforward_layernorm"})
"""Those of the outputs (OLMo 2)."""

SANDWICH_NORMS = PRE_NORMS | POST_NORMS | {"pre_feedforward_layernorm"}
"""Those of both (Gemma 2 and 3)."""

HEAD_NORMS = frozenset({"q_norm", "k_norm"})
"""Those of queries and keys (Qwen3, Gemma 3, OLMo 2)."""

KNOWN_NORMS = tuple(
    norms | of_heads for norms in (PRE_NORMS, POST_NORMS, SANDWICH_NORMS) for of_heads in (frozenset(), HEAD_NORMS)
)
"""The sets of norms in a layer that the arithmetic covers."""

LOGIT_CHANGES = ("final_logit_softcapping", "logit_scale", "logits_scaling")
"""Names in transformers configs of what is done to logits (Gemma 2, Cohere, Granite)."""


def sizes_of(text_config: Any) -> DecoderSizes | None:
    """Sizes from a transformers config; None for other kinds of architecture (experts, no gate, other names)."""
    names = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")
    found: list[Any] = [getattr(text_config, name, None) for name in names]
    experts = [getattr(text_config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")]
    gated = getattr(text_config, "hidden_act", getattr(text_config, "hidden_activation", None))
    if not all(isinstance(value, int) for value in found) or any(experts) or gated is None:
        return None
    layers, hidden, intermediate, heads, vocabulary = found
    if not hasattr(text_config, "rms_norm_eps"):  # GPT's kind: norms with biases, an MLP without a gate
        return None
    return DecoderSizes(
        layers,
        hidden,
        intermediate,
        heads,
        getattr(text_config, "num_key_value_heads", None) or heads,
        getattr(text_config, "head_dim", None) or hidden // heads,
        vocabulary,
        any(getattr(text_config, name, None) for name in LOGIT_CHANGES),
        getattr(text_config, "attn_logit_softcapping", None) is not None,
    )


def activation_bytes(
    sizes: DecoderSizes,
    *,
    batch_size: int,
    sequence_len: int,
    itemsize: int,
    targets: Collection[str],
    total_rank: int,
    norms: Collection[str],
    attn_implementation: str,
    is_packed: bool,
    checkpointing: bool,
    dequantised_bytes: int,
    keeps_inputs: bool,
    whole_logits: bool,
    has_dropout: bool,
) -> int:
    """The peak of one forward and backward pass over `batch_size` sequences, as if every token were supervised.

    Args:
        itemsize: bytes per element of the activations.
        targets: last parts of the names of the adapted modules ("q_proj", …); `total_rank` is Σ r in a layer.
        norms: names of the norms in a layer, one of `KNOWN_NORMS`.
        dequantised_bytes: of the largest weight that is dequantised for its product.
        keeps_inputs: the linear layers are 8-bit ones.
        whole_logits: the loss takes all logits at once.
        has_dropout: adapters drop elements of their inputs.
    """
    tokens, H, b = batch_size * sequence_len, sizes.hidden, itemsize
    attention, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    is_eager, has_mask = attn_implementation == "eager", is_packed and attn_implementation == "sdpa"
    inputs_read = bool({"q_proj", "k_proj", "v_proj"} & set(targets)) + bool({"gate_proj", "up_proj"} & set(targets))
    if keeps_inputs:
        inputs_read = 2
    probabilities = sizes.num_heads * (sequence_len * (4 + (b if b < 4 else 0)) if is_eager else 4)
    layer = (
        (4 * H + 4) * len(set(norms) - HEAD_NORMS)
        + b * H * inputs_read
        + 2 * b * attention
        + 2 * b * (attention if is_eager or has_mask else keys)
        + probabilities
        + (b * sequence_len if has_mask else 0)
        + b * sizes.intermediate * (3 + (keeps_inputs or "down_proj" in targets))
        + b * total_rank
    )
    if set(norms) >= HEAD_NORMS:
        layer += 4 * (attention + keys) + 4 * (sizes.num_heads + sizes.num_kv_heads)
    if whole_logits:
        loss = tokens * 12 * sizes.vocabulary
    else:
        loss = tokens * b * H + min(tokens, tokens_at_once(sizes.vocabulary)) * (8 * sizes.vocabulary + b * H)
    passing = (3 if has_dropout and "down_proj" in targets else 2) * b * sizes.intermediate + 4 * H
    if "post_feedforward_layernorm" in norms:
        passing = max(passing, 20 * H + b * H)
    if checkpointing:
        kept, passing, loss = sizes.num_layers * b * H, passing + layer, loss + tokens * 4 * H
        if keeps_inputs:
            kept += sizes.num_layers * b * (2 * H + attention + sizes.intermediate)
    else:
        kept = sizes.num_layers * layer
    return tokens * kept + max(loss, tokens * passing + dequantised_bytes)


def forward_bytes(
    sizes: DecoderSizes,
    *,
    batch_size: int,
    sequence_len: int,
    itemsize: int,
    norms: Collection[str],
    attn_implementation: str,
    dequantised_bytes: int,
    whole_logits: bool,
) -> int:
    """The peak of a forward pass without gradients over `batch_size` sequences that are not packed; at most, where
    attention decides.  Arguments as in `activation_bytes`."""
    tokens, H, b = batch_size * sequence_len, sizes.hidden, itemsize
    queries, keys = sizes.num_heads * sizes.head_dim, sizes.num_kv_heads * sizes.head_dim
    float32_and_copy = 8 + (b if b < 4 else 0)
    rotated_itemsize = 4 if set(norms) - HEAD_NORMS == POST_NORMS else b
    attention = b * (queries + 2 * keys) + rotated_itemsize * max(3 * queries, queries + 3 * keys)
    if set(norms) >= HEAD_NORMS:
        attention = max(attention, b * queries + 8 * (queries + sizes.num_heads))
    weights = 0
    if attn_implementation == "eager":
        scores = sizes.num_heads * sequence_len * float32_and_copy
        repeated = 2 * queries if sizes.num_heads > sizes.num_kv_heads else 0
        attention = max(attention, b * (queries + 2 * keys + repeated + sequence_len) + scores)
        weights = b * sequence_len * (sizes.num_heads + 1)
    gated = tokens * 2 * b * sizes.intermediate + max(tokens * b * sizes.intermediate, dequantised_bytes)
    layer = tokens * 4 * b * H + max(tokens * attention, tokens * weights + gated)
    if whole_logits:
        loss = tokens * float32_and_copy * sizes.vocabulary
    else:
        loss = tokens * 3 * b * H + min(tokens, tokens_at_once(sizes.vocabulary)) * (8 * sizes.vocabulary + b * H)
    return max(layer, loss)
