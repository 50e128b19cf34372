"""Comparing a reloaded model with the trained one: logits, and the adapter's effect on them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sora_llm.errors import UserError
from sora_llm.quantised import compute_dtypes

# Relative, by the dtype of the activations: PEFT computes the branch in float32, the trained model in this dtype.
MAX_LOGITS_ERROR = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-3}
MIN_EFFECT = 1e-3
# A missing adapter gives exactly the base's logits, a gain of 0.  If the effect drowns in rounding, both sides of the
# quotient contain the base's error and one the trained model's: a gain of about 1/2 for a correct adapter (seen: 0.54).
MIN_GAIN, MAX_GAIN = 0.25, 1.5


def logit_errors(found: Tensor, trained: Tensor, base: Tensor) -> tuple[float, float | None]:
    """How far the logits `found` are from the expected ones, and how much of the adapter's effect they show.

    off = ‖found − trained‖ / max(‖trained‖, ‖trained − base‖)
    gain = ⟨found − base, trained − base⟩ / ‖trained − base‖²

    The gain is 1 if all of the effect is there, 0 if the adapter is missing, however small the effect is relative to
    rounding; None if the effect is below `MIN_EFFECT` of the logits.
    """
    effect = trained - base
    off = float((found - trained).norm() / torch.maximum(trained.norm(), effect.norm()))
    gain = float((found - base).flatten() @ effect.flatten() / effect.norm() ** 2)
    return off, gain if float(effect.norm() / trained.norm()) >= MIN_EFFECT else None


def logit_problems(off: float, gain: float | None, dtype: torch.dtype, who: str) -> list[str]:
    """Problems of logits that are `off`; `dtype` is the coarsest they were computed in, and `who` (with its verb)
    begins the sentence about the adapter's effect."""
    limit = MAX_LOGITS_ERROR.get(dtype, max(MAX_LOGITS_ERROR.values()))
    problems = [] if off <= limit else [f"logits are off by {off:.2e} (allowed {limit:g})"]
    if gain is not None and not MIN_GAIN <= gain <= MAX_GAIN:
        problems.append(f"{who} {gain:.2f} of the adapter's effect on the logits")
    return problems


def coarsest_dtype(model: nn.Module) -> torch.dtype:
    """The coarsest dtype that a model computes in: that of its embeddings, or of quantised layers."""
    embeddings = model.get_input_embeddings()  # type: ignore[operator]
    return coarser(embeddings.weight.dtype, *compute_dtypes(model))


def coarser(*dtypes: torch.dtype) -> torch.dtype:
    """The coarsest of some dtypes."""
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


@torch.no_grad()
def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """Logits (B, T, V) in float32 on the CPU."""
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False).logits.float().cpu()


def check_probe(model: nn.Module, ids: object) -> None:
    """UserError unless `ids` are valid token ids (B, T) of a model."""
    size = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    is_ids = isinstance(ids, Tensor) and ids.ndim == 2 and ids.numel() > 0 and ids.dtype in (torch.int32, torch.int64)
    if not is_ids or int(ids.min()) < 0 or int(ids.max()) >= size:  # type: ignore[attr-defined]
        raise UserError(f"probe_ids are token ids (B, T) from 0 to {size - 1}, as one tensor of integers")


def default_probe(model: nn.Module) -> Tensor:
    """Fixed random token ids (2, 32) within the model's vocabulary."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return torch.randint(vocabulary, (2, 32), generator=torch.Generator().manual_seed(0))
