"""A plain, verified LoRA on disk: padded or ragged layout, certificate, model card.

The gate and the scale s are folded into the factors, so 1 is the right scale in every engine; which of them apply it
to which layout is computed from their rules (`artifacts/consumers.py`).
"""

from __future__ import annotations

import math
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
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
from sora_llm.artifacts.consumers import PEFT, TRANSFORMERS, Verdict, read_folder, verdicts_for_folder
from sora_llm.artifacts.logit_check import (
    check_probe,
    default_probe,
)
from sora_llm.artifacts.lora_files import tensor_name
from sora_llm.backbone import from_pretrained_args, module_names, spec_from_model
from sora_llm.errors import RunFailed, UserError
from sora_llm.factors import PlainFactors, Shapes, empty_factors, slot_params
from sora_llm.files import copy_folder, file_sha256, staging_folder, user_path
from sora_llm.inject import adapter_parameters, adapters, layer_shapes, warn_if_untrained, without_adapters
from sora_llm.peft_check import Errors, reloaded
from sora_llm.run_files import ADAPTER_WEIGHTS, CHAT_TEMPLATE
from sora_llm.sora import fold, is_sharded
from sora_llm.targets import matches
from sora_llm.wrappers import unwrapped

LAYOUTS = ("padded", "ragged")


def folded_factors(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """The adapters of a model as plain LoRA factors of scale 1, float32 on the CPU, dead slots dropped."""
    folded = {}
    for name, layer in adapters(model).items():
        if layer.lora_A is None or layer.lora_B is None:
            folded[name] = empty_factors(layer.in_features, layer.out_features)
            continue
        tensors = (layer.lora_A, layer.lora_B, layer.gate)
        A, B, gate = (None if t is None else t.detach().float().cpu() for t in tensors)
        assert A is not None and B is not None
        folded[name] = fold(A, B, gate, layer.scaling)
    return folded


def export_adapter(
    model: nn.Module,
    folder: str | Path,
    layout: str = "padded",
    *,
    allow_empty: bool = False,
    provenance: Provenance | None = None,
    probe_ids: Tensor | None = None,
) -> dict[str, Any]:
    """Write the adapters of `model` as a plain LoRA that PEFT reloads with the same ΔW and logits.

    Not a collective: one process of several is enough; if all call it, each checks for itself and the last one stays.

    `layout` is "padded" (every target module at one rank, for engines that read PEFT folders) or "ragged" (own ranks,
    pruned modules left out).  `probe_ids` (B, T) are the tokens of the logits check (default: fixed random ones).  The
    folder appears complete or not at all; an older export of the same name is replaced.  How the base was loaded is
    read off the model unless `provenance` says it.  Warns "nothing was learned yet" if every ΔW is 0 (unless
    `allow_empty`).

    Returns: the certificate.
    Raises:
        UserError: a `folder` that is not a path or holds anything other than an export; unknown layout; no adapters, or
            sharded ones (gather them first); a model that is not a causal language model, trains more than the adapters
            or has module names that differ from the base's; `probe_ids` that are not integers (B, T) within its
            vocabulary.
        RunFailed: every rank was pruned (unless `allow_empty`), the self-check found a difference or values that are
            not finite, or the disk is full or read-only; nothing is left.
    """
    if not isinstance(folder, str | os.PathLike):
        raise UserError(f"{folder!r} is not a path: name the folder to write the adapter to")
    folder = user_path(str(folder), "the folder")
    model = unwrapped(model)
    _check_model(model)
    probe_ids = default_probe(model) if probe_ids is None else probe_ids
    check_probe(model, probe_ids)
    provenance = _as_loaded(provenance or Provenance(base_model=str(getattr(model, "name_or_path", ""))), model)
    temporary = write_adapter(model, folder, layout, allow_empty=allow_empty, provenance=provenance)
    try:
        if not allow_empty:
            warn_if_untrained(model)
        with reloaded(model, temporary, probe_ids) as check:
            pass
        return certify_and_publish(model, temporary, folder, layout, check.errors, provenance)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _check_model(model: nn.Module) -> None:
    """UserError for a model whose training a LoRA of a causal language model would not fully capture, or could not be
    matched to the base."""
    layers = adapters(model)
    if not layers:
        raise UserError("the model has no SoRA adapters to export: call inject_sora(model) first")
    for name, layer in layers.items():
        if layer.lora_A is not None and (is_sharded(layer.lora_A) or layer.lora_A.ndim != 2):
            raise UserError(f"the adapter of {name} is sharded: gather it first (FSDP.summon_full_params)")
    for needed in ("get_input_embeddings", "prepare_inputs_for_generation"):
        if not callable(getattr(model, needed, None)):
            raise UserError(
                f"{type(model).__name__} is not a transformers causal language model, which PEFT requires "
                f"(it has no {needed})"
            )
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UserError(
            f"{type(model).__name__} is an encoder-decoder model; only adapters of causal language models can be "
            "exported"
        )
    known = module_names(model)
    if known is not None and (odd := next((name for name in layers if name not in known), None)) is not None:
        raise UserError(
            f"{odd} is not a module of a freshly loaded {type(model).__name__}, so its adapter would not be found: its "
            "path contains a wrapper (torch.compile of a layer renames it, layer.compile() does not), or a layer was "
            "added; remove it before the export"
        )
    branches = {id(parameter) for parameter in adapter_parameters(model).values()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in branches]
    if others:
        raise UserError(
            f"{others[0]} is trainable, and an exported LoRA would leave it out ({len(others)} tensors outside the "
            "adapters require gradients); freeze it if it is unchanged from the base"
        )


def _as_loaded(provenance: Provenance, model: Any) -> Provenance:
    """`provenance` with how the base was loaded, read off the model itself, unless the caller gave it."""
    spec = None if provenance.base_loading is not None or provenance.load_options else spec_from_model(model)
    if spec is None:
        return provenance
    has_quantised_files = bool(getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False))
    return replace(
        provenance,
        base_loading=spec.loading,
        load_options=from_pretrained_args(spec, model.config if has_quantised_files else None),
        is_base_quantised=provenance.is_base_quantised or has_quantised_files,
    )


# --------------------------------------------------------------------------------------------------------- writing


def write_adapter(model: nn.Module, folder: Path, layout: str, *, allow_empty: bool, provenance: Provenance) -> Path:
    """Write config, factors and tokenizer files into a temporary folder next to `folder`; returns that folder."""
    if layout not in LAYOUTS:
        others = "; gguf and merged are made from an export: sora-llm export FOLDER --layout … --out …"
        raise UserError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}{others}")
    refuse_other_contents(folder)
    factors = folded_factors(model)
    if all(A.shape[0] == 0 for A, _ in factors.values()) and not allow_empty:
        raise RunFailed(
            "every rank of the adapter was pruned, so it would change nothing: prune less (sora.sparse_lambda, "
            "sora.max_lambda or the budget), train longer, or allow it (output.allow_empty_adapter: true; in Python "
            "allow_empty=True)"
        )
    temporary = staging_folder(folder)
    config = _peft_config(model, factors, layout, provenance)
    tensors = _padded(factors, config.r) if layout == "padded" else _ragged(factors)
    try:
        temporary.mkdir(parents=True)
        config.save_pretrained(str(temporary))
        save_file(tensors, temporary / ADAPTER_WEIGHTS, metadata={"format": "pt"})
        for path in provenance.tokenizer_files:
            shutil.copyfile(path, temporary / path.name)
        if provenance.chat_template is not None:
            (temporary / CHAT_TEMPLATE).write_text(provenance.chat_template, encoding="utf-8")
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunFailed(f"the adapter could not be written to {folder.parent}: {error}") from error
    return temporary


def _peft_config(model: nn.Module, factors: PlainFactors, layout: str, provenance: Provenance) -> Any:
    from peft import LoraConfig

    ranks = {name: A.shape[0] for name, (A, _) in factors.items()}
    r = max(1, *ranks.values())
    options: dict[str, Any] = {"target_modules": _target_names(model, list(factors))}
    if layout == "ragged":
        live = {name: rank for name, rank in ranks.items() if rank}
        # Full names, also as pattern keys: a suffix would match the pruned modules too.
        options["target_modules"] = sorted(live) or [next(iter(factors))]
        options |= {"rank_pattern": live, "alpha_pattern": dict(live)}
    config = LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=provenance.base_model,
        revision=provenance.revision,
        r=r,
        lora_alpha=r,  # with the scale folded into B, alpha / r = 1 is right under every engine's rule
        lora_dropout=0.0,
        bias="none",
        use_rslora=False,
        inference_mode=True,
        **options,
    )
    config.target_modules = options["target_modules"]  # PEFT turns it into a set, whose order is random
    return config


def _target_names(model: nn.Module, names: list[str]) -> list[str]:
    """Plain suffixes ("q_proj") if, among all modules, they match these alone; else the full names: the suffix 0 of
    experts.0 would also name layers.0."""
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    with without_adapters(model):
        matched = {name for name, _ in model.named_modules() if matches(name, suffixes)}
    return suffixes if matched == set(names) else names


def _padded(factors: PlainFactors, r: int) -> dict[str, Tensor]:
    tensors = {}
    for name, (A, B) in factors.items():
        padding = r - A.shape[0]
        tensors[tensor_name(name, "A")] = torch.cat([A, A.new_zeros(padding, A.shape[1])])
        tensors[tensor_name(name, "B")] = torch.cat([B, B.new_zeros(B.shape[0], padding)], dim=1)
    return tensors


def _ragged(factors: PlainFactors) -> dict[str, Tensor]:
    live = {name: pair for name, pair in factors.items() if pair[0].shape[0]}
    if not live:  # PEFT refuses rank 0: an empty adapter is one slot of zeros
        name, (A, B) = next(iter(factors.items()))
        live = {name: (A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1))}
    return {
        tensor_name(name, kind): t.contiguous()
        for name, pair in live.items()
        for kind, t in zip("AB", pair, strict=True)
    }


def _ragged_params(ranks: Mapping[str, int], shapes: Shapes) -> int:
    """The number of values that `_ragged` stores for factors of these ranks."""
    return slot_params(ranks, shapes) or sum(next(iter(shapes.values())))


def copy_adapter(source: Path, folder: Path) -> None:
    """Put a copy of an exported adapter into `folder`; UserError if that holds anything else, RunFailed if the disk is
    full or read-only."""
    refuse_other_contents(folder)
    try:
        copy_folder(source, folder)
    except OSError as error:
        raise RunFailed(f"the adapter {source} could not be copied to {folder}: {error}") from error


# -------------------------------------------------------------------------------------------------------- publishing


def certify_and_publish(
    model: nn.Module,
    temporary: Path,
    folder: Path,
    layout: str,
    errors: Errors,
    provenance: Provenance,
) -> dict[str, Any]:
    """Write certificate and model card and rename `temporary` to `folder`.

    Raises:
        RunFailed: the self-check did not pass, or the disk is full or read-only.
    """
    import peft

    ranks = {name: A.shape[0] for name, (A, _) in folded_factors(model).items()}
    if problems := errors.problems:
        raise self_check_failed(problems)
    shapes = layer_shapes(adapters(model))
    kinds = {_of_any_layer(name) for name in ranks}
    in_base = [name for name, _ in model.named_modules() if _of_any_layer(name) in kinds]
    verdicts = verdicts_for_folder(
        read_folder(temporary, in_base),
        base=provenance.base_model or "BASE",
        is_base_quantised=provenance.is_base_quantised,
    )
    weights = temporary / ADAPTER_WEIGHTS
    checks = {
        "stored_params": _stored_params(weights),
        "logits_error": errors.logits,
        "peft_version": peft.__version__,
    }
    certificate = certificate_of(
        provenance, layout, ranks, errors.delta, file_sha256(weights), checks=checks, verdicts=verdicts
    )
    card = _card(layout, ranks, shapes, certificate, verdicts, provenance)
    return publish_export(temporary, folder, certificate, card)


def _stored_params(weights: Path) -> int:
    """The number of values in a file of factors, padding zeros included."""
    with safe_open(weights, framework="pt") as file:
        return sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118


def stored_in_words(certificate: Mapping[str, Any], shapes: Shapes, said: int) -> str:
    """The suffix for a stated number of parameters, `said`: " (N stored …)" with the reason if the file stores a
    different number, else ""."""
    ranks = {name: module["rank"] for name, module in certificate["modules"].items()}
    stored, ragged = certificate["stored_params"], _ragged_params(ranks, shapes)
    if stored > ragged:
        return f" ({stored:,} stored, padded with zeros to one rank; layout ragged stores {ragged:,})"
    return "" if stored == said else f" ({stored:,} stored)"


def _of_any_layer(name: str) -> str:
    """A module's name without the number of its layer."""
    return re.sub(r"\.\d+\.", ".*.", name)


def _card(
    layout: str,
    ranks: Mapping[str, int],
    shapes: Shapes,
    certificate: Mapping[str, Any],
    verdicts: Mapping[str, Verdict],
    provenance: Provenance,
) -> str:
    worst = worst_delta_error(certificate)
    stored = stored_in_words(certificate, shapes, slot_params(ranks, shapes))
    return model_card(
        f"layout `{layout}`{stored}, scale folded into the factors (`lora_alpha == r`)",
        ranks,
        shapes,
        f"PEFT {certificate['peft_version']} reloads it with the ΔW of every module (largest relative difference "
        f"{worst:.1e}) and logits (relative difference {certificate['logits_error']:.1e}).",
        verdicts,
        provenance,
        in_python=verdicts[PEFT].works and verdicts[TRANSFORMERS].works,
    )
