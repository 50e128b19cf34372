"""The merged model, verified from disk: its weights are base + ΔW, and its logits those of the base with adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from sora_llm.artifacts.card import (
    Provenance,
    certificate_of,
    model_card,
    publish_export,
    refuse_other_contents,
    self_check_failed,
    worst_delta_error,
)
from sora_llm.artifacts.logit_check import coarsest_dtype, default_probe, logit_errors, logit_problems, logits_of
from sora_llm.artifacts.merged import (
    Merge,
    check_shards,
    planned_shards,
    refuse_small_disk,
    write_shards,
    write_small_files,
)
from sora_llm.backbone import free_unused, load_backbone
from sora_llm.base_spec import BackboneSpec
from sora_llm.errors import RunFailed
from sora_llm.factors import shapes_of
from sora_llm.files import file_sha256, staging
from sora_llm.inject import attach_factors, without_adapters
from sora_llm.quantised import dequantised_weight

MERGED = {True: "merged, dequantized", False: "merged, original"}  # by Merge.dequantise


def adapted(spec: BackboneSpec) -> str:
    """The name of base + adapter, by the form in which the base is loaded."""
    form = "4-bit" if spec.load_in_4bit else "8-bit" if spec.load_in_8bit else "original"
    return f"{form} base + adapter"


def export_merged(
    merge: Merge,
    config: Any,
    folder: Path,
    *,
    provenance: Provenance,
    dev_loss_of: Callable[[nn.Module], float] | None = None,
) -> dict[str, Any]:
    """Write the merged model to `folder`, verified from disk; returns the certificate.

    `config` is the base's transformers config.  Memory: the base with the adapter, as it was trained; then a shard of
    MAX_SHARD_BYTES and a few copies of one weight; then the merged model.  With `dev_loss_of`, dev losses are measured:
    of base with adapter, as it was trained and, if different, on the base that is merged; of the merged model; of one
    merged from the other form of a 4-bit base.

    Raises:
        UserError: no room on the disk, or a folder that holds anything other than an export.
        RunFailed: the merged weights or logits are not base + ΔW, or the disk is full; nothing is left.
    """
    refuse_other_contents(folder)
    shards = planned_shards(merge)
    refuse_small_disk(merge, folder)
    expected, losses = _beside_the_base(merge, dev_loss_of)
    with staging(folder) as temporary:
        try:
            temporary.mkdir(parents=True)
            names = write_shards(merge, shards, temporary)
            write_small_files(merge.spec, config, temporary, provenance)
        except (OSError, SafetensorError) as error:
            raise RunFailed(f"the merged model could not be written to {folder.parent}: {error}") from error
        lost, problems = check_shards(merge, shards, names, temporary)
        off, gain = math.nan, None
        if not problems:
            off, gain, found = _reload(merge, temporary, expected, dev_loss_of)
            losses |= found
            problems = logit_problems(off, gain, expected.dtype, "the merged model shows")
        if problems:
            hint = f" (an adapter that is small relative to {merge.spec.dtype} rounding is better served unmerged)"
            raise self_check_failed(problems, what="the merged model is not base + adapter", hint=hint)
        ranks = {name: A.shape[0] for name, (A, _) in merge.factors.items()}
        certificate = certificate_of(
            provenance,
            "merged",
            ranks,
            lost,
            {name: file_sha256(temporary / name) for name in names},
            form={"base": "dequantized" if merge.dequantise else "original", "dtype": merge.spec.dtype},
            checks={"logits_error": off, "dev_loss": losses},
        )
        return publish_export(temporary, folder, certificate, _card(merge, ranks, certificate, provenance))


# ---------------------------------------------------------------------------------------------------------- logits


@dataclass(frozen=True)
class _Logits:
    """Logits of the base and of base + adapter on the same tokens; `dtype` is the coarsest they were computed in."""

    ids: Tensor
    base: Tensor
    adapted: Tensor
    dtype: torch.dtype


def _beside_the_base(
    merge: Merge, dev_loss_of: Callable[[nn.Module], float] | None
) -> tuple[_Logits, dict[str, float]]:
    """Logits of base + adapter for the base that is merged; its dev loss there, and as it was trained."""
    spec = merge.spec if merge.dequantise else _unquantised(merge.spec)
    model = load_backbone(spec, merge.device)
    if merge.dequantise:
        _prove_dequantised(merge, model)
    attach_factors(model, merge.factors).eval()
    ids = default_probe(model)
    with without_adapters(model):
        base = logits_of(model, ids)
    logits = _Logits(ids, base, logits_of(model, ids), coarsest_dtype(model))
    losses = {} if dev_loss_of is None else {adapted(spec): dev_loss_of(model)}
    del model
    free_unused()
    if dev_loss_of is not None and spec != merge.spec:
        trained = attach_factors(load_backbone(merge.spec, merge.device), merge.factors).eval()
        losses = {adapted(merge.spec): dev_loss_of(trained), **losses}
        del trained
        free_unused()
    return logits, losses


def _prove_dequantised(merge: Merge, model: nn.Module) -> None:
    """RunFailed unless the 4-bit layers of a loaded base are those that are dequantised, with the same numbers in the
    first of them."""
    held = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    quantised = [name for name, module in held.items() if getattr(module.weight, "quant_state", None) is not None]
    if frozenset(quantised) != merge.quantised:
        odd = sorted(merge.quantised.symmetric_difference(quantised))
        raise RunFailed(f"{odd[0]} is not quantised as it was expected ({len(odd)} layers differ); use --base original")
    held_weight = dequantised_weight(held[quantised[0]])
    assert held_weight is not None
    if not torch.equal(held_weight, merge.base(f"{quantised[0]}.weight")):
        raise RunFailed(f"{quantised[0]} is quantised to other numbers than those of its file; use --base original")


def _reload(
    merge: Merge, folder: Path, expected: _Logits, dev_loss_of: Callable[[nn.Module], float] | None
) -> tuple[float, float | None, dict[str, float]]:
    """Error and gain of the logits of the model in `folder`, and dev losses of it and of the other form."""
    model = load_backbone(replace(_unquantised(merge.spec), name_or_path=str(folder), revision=None), merge.device)
    off, gain = logit_errors(logits_of(model, expected.ids), expected.adapted, expected.base)
    losses = {}
    if dev_loss_of is not None:
        losses[MERGED[merge.dequantise]] = dev_loss_of(model)
        if merge.spec.load_in_4bit and not merge.packed:  # those have only one form
            other = replace(merge, dequantise=not merge.dequantise)
            with torch.no_grad():
                for name in merge.quantised:
                    layer = model.get_submodule(name)
                    layer.weight.copy_(other.merged(f"{name}.weight"))  # type: ignore[operator]
            losses[MERGED[not merge.dequantise]] = dev_loss_of(model)
    del model
    free_unused()
    return off, gain, losses


def rounding_in_words(certificate: Mapping[str, Any]) -> str:
    """How far the merged weights of the worst layer are from the sum, in which the base's weights were rounded too."""
    worst, dtype = worst_delta_error(certificate), certificate["dtype"]
    return f"rounding base + ΔW to {dtype} moved the weights of a layer by {worst:.1e} ‖ΔW‖ at most"


def _unquantised(spec: BackboneSpec) -> BackboneSpec:
    return replace(spec, load_in_4bit=False, load_in_8bit=False)


def _card(merge: Merge, ranks: Mapping[str, int], certificate: Mapping[str, Any], provenance: Provenance) -> str:
    shapes = shapes_of(merge.factors)
    base = "the base as 4-bit layers hold it" if merge.dequantise else "the base as its files hold it"
    forms = {
        adapted(_unquantised(merge.spec)): "dev loss of original base + adapter",
        adapted(merge.spec): f"dev loss of {adapted(merge.spec)}, as it was trained",
        MERGED[merge.dequantise]: "dev loss of this model",
        MERGED[not merge.dequantise]: "dev loss, had it been merged into the other form of the base",
    }
    losses = {forms[name]: loss for name, loss in certificate["dev_loss"].items()}
    return model_card(
        f"{base} plus ΔW, summed in float32 and rounded once to {merge.spec.dtype}",
        ranks,
        shapes,
        f"every weight is base + ΔW to that rounding ({rounding_in_words(certificate)}), and logits are those "
        f"of base with adapter (relative difference {certificate['logits_error']:.1e}).",
        {},
        replace(provenance, metrics=losses or provenance.metrics),
    )
