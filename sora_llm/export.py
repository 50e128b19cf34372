"""A plain, verified LoRA on disk: padded or ragged layout, self-check by PEFT, certificate, model card.

The gate and the scale s are folded into the factors, so the right scale is 1 in every engine whatever its rule.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sora_llm.consensus import empty_factors, product_distance
from sora_llm.errors import RunFailed, UserError
from sora_llm.files import copy_folder, file_sha256, publish
from sora_llm.hub import card_metadata
from sora_llm.inject import adapters, bare, target_linears
from sora_llm.lora_files import CERTIFICATE, CONFIG, WEIGHTS
from sora_llm.sora import SoraLinear, fold

LAYOUTS = ("padded", "ragged")
MAX_DELTA_ERROR = 1e-5  # relative; float32 factors of the same product differ by about 1e-7
# Relative, by the dtype that activations have: PEFT computes the branch in float32, the trained model in this dtype.
MAX_LOGITS_ERROR = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 5e-3}
MIN_EFFECT, MAX_GAIN_ERROR = 1e-3, 0.5

PlainFactors = Mapping[str, tuple[Tensor, Tensor]]  # module → A' (R', I), B' (O, R') of scale 1


@dataclass(frozen=True)
class Provenance:
    """What the model card says about where an adapter comes from."""

    base_model: str = ""
    data: Sequence[str] = ()
    metrics: Mapping[str, float] = field(default_factory=dict)
    tokenizer_files: Sequence[Path] = ()
    chat_template: str | None = None
    load_options: str = ""
    """How the base was loaded: the other arguments of from_pretrained, as Python text."""
    story: str = "Trained with SoRA (a gate per rank, pruned by proximal gradient)"
    """How it was made: the beginning of a sentence."""
    beside: str = "trained and evaluated"
    """What was done beside the base as `load_options` load it."""
    notes: Mapping[str, Any] = field(default_factory=dict)
    """What the certificate says beside the self-check, as JSON."""
    details: str = ""
    """A section of the model card, in Markdown."""


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
    """Write the adapters of `model` as a plain LoRA that PEFT reloads with the same ΔW and logits; one process.

    `layout` is "padded" (every target module at one rank: every engine loads it) or "ragged" (own ranks, pruned
    modules left out).  `probe_ids` (B, T) are the tokens of the logits check (default: fixed random ones).  The
    folder appears complete or not at all; an older one of the same name is replaced.

    Returns: the certificate.
    Raises:
        UserError: unknown layout, no adapters, or a `folder` that holds something else than an adapter.
        RunFailed: every rank was pruned (unless `allow_empty`), or the self-check found a difference; nothing is left.
    """
    folder = Path(folder)
    provenance = provenance or Provenance(base_model=str(getattr(model, "name_or_path", "")))
    temporary = write_adapter(model, folder, layout, allow_empty=allow_empty, provenance=provenance)
    try:
        with reloaded(model, temporary, default_probe(model) if probe_ids is None else probe_ids) as check:
            pass
        return certify_and_publish(model, temporary, folder, layout, check.errors, provenance)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# --------------------------------------------------------------------------------------------------------- writing


def write_adapter(model: nn.Module, folder: Path, layout: str, *, allow_empty: bool, provenance: Provenance) -> Path:
    """Write config, factors and tokenizer files into a temporary folder beside `folder`; returns that folder."""
    if layout not in LAYOUTS:
        raise UserError(f"layout {layout!r} is not one of {', '.join(LAYOUTS)}")
    if folder.exists() and not (folder / CONFIG).is_file() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and holds no adapter; name another folder, this one would be replaced")
    factors = folded_factors(model)
    if not factors:
        raise UserError("the model has no SoRA adapters to export: call inject_sora(model) first")
    if all(A.shape[0] == 0 for A, _ in factors.values()) and not allow_empty:
        raise RunFailed(
            "every rank of the adapter was pruned, so it would change nothing: prune less (sora.sparse_lambda, "
            "sora.max_lambda or the budget), train longer, or set output.allow_empty_adapter: true"
        )
    temporary = folder.with_name(f".{folder.name}.tmp")
    config = _peft_config(model, factors, layout, provenance.base_model)
    tensors = _padded(factors, config.r) if layout == "padded" else _ragged(factors)
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        config.save_pretrained(str(temporary))
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        for path in provenance.tokenizer_files:
            shutil.copyfile(path, temporary / path.name)
        if provenance.chat_template is not None:
            (temporary / "chat_template.jinja").write_text(provenance.chat_template)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunFailed(f"the adapter could not be written to {folder.parent}: {error}") from error
    return temporary


def _peft_config(model: nn.Module, factors: PlainFactors, layout: str, base_model: str) -> Any:
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
        base_model_name_or_path=base_model,
        r=r,
        lora_alpha=r,  # with the scale folded into B, alpha / r = 1 is right under every engine's rule
        lora_dropout=0.0,
        bias="none",
        use_rslora=False,
        inference_mode=True,
        **options,
    )
    config.target_modules = options["target_modules"]  # PEFT makes a set of it, whose order is random
    return config


def _target_names(model: nn.Module, names: list[str]) -> list[str]:
    """Plain suffixes ("q_proj") if they match exactly these modules, else the full names."""
    suffixes = sorted({name.rpartition(".")[2] for name in names})
    with bare(model):
        matched = target_linears(model, suffixes)
    return suffixes if set(matched) == set(names) else names


def _padded(factors: PlainFactors, r: int) -> dict[str, Tensor]:
    tensors = {}
    for name, (A, B) in factors.items():
        padding = r - A.shape[0]
        tensors[_key(name, "A")] = torch.cat([A, A.new_zeros(padding, A.shape[1])])
        tensors[_key(name, "B")] = torch.cat([B, B.new_zeros(B.shape[0], padding)], dim=1)
    return tensors


def _ragged(factors: PlainFactors) -> dict[str, Tensor]:
    live = {name: pair for name, pair in factors.items() if pair[0].shape[0]}
    if not live:  # PEFT refuses rank 0: an empty adapter is one slot of zeros
        name, (A, B) = next(iter(factors.items()))
        live = {name: (A.new_zeros(1, A.shape[1]), B.new_zeros(B.shape[0], 1))}
    return {_key(name, kind): t.contiguous() for name, pair in live.items() for kind, t in zip("AB", pair, strict=True)}


def _key(name: str, kind: str) -> str:
    return f"base_model.model.{name}.lora_{kind}.weight"


def copy_adapter(source: Path, folder: Path) -> None:
    """Put a copy of an exported adapter into `folder`; RunFailed where the disk is full or read-only."""
    try:
        copy_folder(source, folder)
    except OSError as error:
        raise RunFailed(f"the adapter {source} could not be copied to {folder}: {error}") from error


# -------------------------------------------------------------------------------------------------------- checking


@dataclass(frozen=True)
class Errors:
    """How far an adapter, as PEFT loads it from disk, is from the trained one.

    `delta`: by module, ‖ΔW − ΔW_PEFT‖ / ‖ΔW‖ in float64, PEFT's own scale included.
    `logits`: ‖PEFT − trained‖ / max(‖trained‖, ‖trained − base‖) over all logits of some token ids.
    `gain`: how much of the adapter's effect on these logits PEFT reproduces, ⟨PEFT − base, trained − base⟩ /
    ‖trained − base‖²: 1 if all, 0 if its forward leaves the adapter out, however small the effect is beside rounding;
    None if the effect is below MIN_EFFECT of the logits.
    """

    delta: dict[str, float]
    logits: float
    gain: float | None


def worst_of(errors: Sequence[Errors]) -> Errors:
    """What the least favourable of several processes saw (each reloads and compares for itself)."""

    def worst(values: Sequence[float]) -> float:
        return next((value for value in values if value != value), max(values))  # NaN is the worst

    gains = [e.gain for e in errors if e.gain is not None]
    return Errors(
        delta={name: worst([e.delta[name] for e in errors]) for name in errors[0].delta},
        logits=worst([e.logits for e in errors]),
        gain=max(gains, key=lambda gain: abs(gain - 1)) if gains else None,
    )


@dataclass(frozen=True)
class Reloaded:
    """A finished adapter as PEFT loads it from disk, on the base that it was trained on."""

    peft_model: nn.Module
    errors: Errors


@contextlib.contextmanager
def reloaded(model: nn.Module, folder: Path, probe_ids: Tensor) -> Iterator[Reloaded]:
    """The adapter in `folder` on the base inside `model`, whose own adapters step aside meanwhile.

    `probe_ids` (B, T) are the tokens that logits are compared on.
    """
    training, layers = model.training, adapters(model)
    model.eval()
    try:
        trained = _logits(model, probe_ids)
        with bare(model):
            base = _logits(model, probe_ids)
            try:
                peft_model = load_adapter(model, folder)
            except UserError as error:
                raise RunFailed(
                    f"the exported adapter is not the trained one: {error}; nothing was exported"
                ) from error
            try:
                logits = _logits(peft_model, probe_ids)
                effect = trained - base
                off = float((logits - trained).norm() / torch.maximum(trained.norm(), effect.norm()))
                gain = float((logits - base).flatten() @ effect.flatten() / effect.norm() ** 2)
                seen = float(effect.norm() / trained.norm()) >= MIN_EFFECT
                yield Reloaded(peft_model, Errors(_delta_errors(peft_model, layers), off, gain if seen else None))
            finally:
                peft_model.unload()
    finally:
        model.train(training)


def load_adapter(model: nn.Module, folder: Path) -> Any:
    """A plain base model with the PEFT adapter of `folder` on it, in eval mode.

    Raises:
        UserError: the adapter does not fit this base (PEFT itself drops tensors without a module silently).
    """
    from peft import PeftModel, get_peft_model_state_dict

    device = next(model.parameters()).device
    # PEFT draws its initial factors from the global generator; a loop that exports in the middle must not notice.
    devices = [device] if device.type == "cuda" else []
    with warnings.catch_warnings(), torch.random.fork_rng(devices):
        warnings.simplefilter("ignore")
        try:
            loaded = PeftModel.from_pretrained(model, str(folder), torch_device=str(device)).eval()
        except (RuntimeError, ValueError, OSError) as error:
            raise UserError(f"the adapter {folder} does not fit this base: {str(error).splitlines()[0]}") from error
    missing = set(load_file(folder / WEIGHTS)) - set(get_peft_model_state_dict(loaded, save_embedding_layers=False))
    if missing:
        raise UserError(f"the adapter {folder} has tensors for modules that this base lacks: {sorted(missing)[0]}")
    return loaded


@torch.no_grad()
def _logits(model: nn.Module, ids: Tensor) -> Tensor:
    device = next(model.parameters()).device
    return model(input_ids=ids.to(device), use_cache=False).logits.float().cpu()


def _delta_errors(peft_model: nn.Module, layers: Mapping[str, SoraLinear]) -> dict[str, float]:
    base = peft_model.get_base_model()  # type: ignore[operator]
    errors = {}
    for name, trained in layers.items():
        A, B = _trained_product(trained)
        layer = base.get_submodule(name)
        if hasattr(layer, "lora_A") and "default" in layer.lora_A:
            peft_A = layer.lora_A["default"].weight.detach().cpu()
            peft_B = layer.lora_B["default"].weight.detach().cpu().double() * layer.scaling["default"]
        else:
            peft_A, peft_B = A.new_zeros(0, A.shape[1]), B.new_zeros(B.shape[0], 0)
        errors[name] = product_distance(A, B, peft_A, peft_B)
    return errors


def _trained_product(layer: SoraLinear) -> tuple[Tensor, Tensor]:
    """ΔW = B A of a layer as it is trained, in float64: A (R, I) and s · B diag(g) (O, R)."""
    if layer.lora_A is None or layer.lora_B is None:
        return torch.zeros(0, layer.in_features).double(), torch.zeros(layer.out_features, 0).double()
    gate = 1.0 if layer.gate is None else layer.gate.detach().cpu().double()
    return layer.lora_A.detach().cpu().double(), layer.scaling * layer.lora_B.detach().cpu().double() * gate


def default_probe(model: nn.Module) -> Tensor:
    """Fixed random token ids (2, 32) within the model's vocabulary."""
    vocabulary = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    return torch.randint(vocabulary, (2, 32), generator=torch.Generator().manual_seed(0))


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
    dtype = model.get_input_embeddings().weight.dtype  # type: ignore[operator]
    limit = MAX_LOGITS_ERROR.get(dtype, max(MAX_LOGITS_ERROR.values()))
    problems = [f"ΔW of {name} is off by {e:.2e}" for name, e in errors.delta.items() if not e <= MAX_DELTA_ERROR]
    if not errors.logits <= limit:
        problems.append(f"logits are off by {errors.logits:.2e} (allowed {limit:g})")
    if errors.gain is not None and not abs(errors.gain - 1) <= MAX_GAIN_ERROR:
        problems.append(f"PEFT's forward shows {errors.gain:.2f} of the adapter's effect on the logits")
    if problems:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunFailed(f"the exported adapter is not the trained one: {'; '.join(problems[:3])}; nothing was exported")
    certificate = {
        **provenance.notes,
        "passed": True,
        "layout": layout,
        "modules": {name: {"rank": ranks[name], "delta_error": errors.delta[name]} for name in ranks},
        "logits_error": errors.logits,
        "peft_version": peft.__version__,
        "sha256": file_sha256(temporary / WEIGHTS),
    }
    shapes = {name: (layer.in_features, layer.out_features) for name, layer in adapters(model).items()}
    try:
        (temporary / CERTIFICATE).write_text(json.dumps(certificate, indent=1) + "\n")
        (temporary / "README.md").write_text(model_card(layout, ranks, shapes, certificate, provenance))
        publish(temporary, folder)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunFailed(f"the adapter could not be written to {folder.parent}: {error}") from error
    return certificate


# ------------------------------------------------------------------------------------------------------ model card


def _trained_beside(provenance: Provenance) -> str:
    if not provenance.load_options:
        return ""
    return (
        f"The adapter was {provenance.beside} beside the base loaded with (`import torch`, "
        f"`from transformers import BitsAndBytesConfig`)\n\n    {provenance.load_options}\n"
    )


def _template_line(provenance: Provenance) -> str:
    if provenance.chat_template is None:
        return ""
    return "Prompts were rendered with the template in chat_template.jinja; use the same (the tokenizer here does).\n"


def _section(title: str, body: str) -> str:
    return f"## {title}\n{body}\n" if body else ""


def model_card(
    layout: str,
    ranks: Mapping[str, int],
    shapes: Mapping[str, tuple[int, int]],
    certificate: Mapping[str, Any],
    provenance: Provenance,
) -> str:
    """README.md of an adapter: what it is, its ranks, how to load it."""
    base = provenance.base_model or "the base model"
    costs = {name: i + o for name, (i, o) in shapes.items()}
    mean = sum(ranks[n] * c for n, c in costs.items()) / sum(costs.values())
    parameters = sum(ranks[n] * c for n, c in costs.items())
    served_rank = next((limit for limit in (8, 16, 32, 64, 128, 256, 320, 512) if limit >= max(ranks.values())), 512)
    metrics = "".join(f"* {name}: {value:.4f}\n" for name, value in provenance.metrics.items())
    data = "".join(f"* {path}\n" for path in provenance.data)
    table = "\n".join(f"| {name} | {rank} |" for name, rank in ranks.items())
    return f"""---
{card_metadata(provenance.base_model)}
---
# LoRA adapter for {base}

{provenance.story} and exported as a plain LoRA: layout `{layout}`, scale folded into the factors
(`lora_alpha == r`). Mean rank {mean:.2f} over {len(ranks)} modules (weighted by their size),
{parameters:,} parameters in them.

{metrics}
{_template_line(provenance)}
Self-check: PEFT {certificate["peft_version"]} reloads it with the ΔW of every module (largest relative
difference {max(m["delta_error"] for m in certificate["modules"].values()):.1e}) and logits (relative difference
{certificate["logits_error"]:.1e}).

## Load it
```python
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "path/to/this/folder")
```
{_trained_beside(provenance)}
vLLM: `vllm serve {base} --enable-lora --max-lora-rank {served_rank} --lora-modules adapter=path/to/this/folder`

{_section("Data", data)}{provenance.details}## Ranks
| module | rank |
|---|---|
{table}
"""
