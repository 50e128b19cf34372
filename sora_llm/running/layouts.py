"""Exports next to adapter/: gguf/ for llama.cpp, or merged/, the whole model (output.export_layout)."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from sora_llm.artifacts.card import Provenance, refuse_other_contents, worst_delta_error
from sora_llm.artifacts.gguf_export import export_gguf
from sora_llm.artifacts.gguf_lora import architecture_of
from sora_llm.artifacts.merged import Merge, plan_merge, refuse_small_disk
from sora_llm.artifacts.merged_export import export_merged, rounding_in_words
from sora_llm.errors import UserError
from sora_llm.export import LAYOUTS
from sora_llm.factors import PlainFactors
from sora_llm.run_files import ADAPTER
from sora_llm.running.inputs import Inputs
from sora_llm.running.plan import Plan


def extra_layout(layout: str) -> str | None:
    """The layout to write next to adapter/ if output.export_layout is `layout`: gguf or merged; None if it is one of
    adapter/ itself."""
    return None if layout in LAYOUTS else layout


def adapter_layout(layout: str) -> str:
    """The layout of adapter/ itself, which is always a PEFT folder, regardless of other exports next to it."""
    return layout if extra_layout(layout) is None else "padded"


def check_layout(layout: str, inputs: Inputs, targets: Mapping[str, tuple[int, int]], run_dir: Path) -> None:
    """Check from the config and file headers of the run's base that it can be written in `layout`.

    Raises:
        UserError: an architecture or a module that llama.cpp lacks, files that cannot be merged into, 8-bit layers, or
            a folder of that name in the run directory with other contents.
    """
    if extra_layout(layout) is None:
        return
    try:
        if layout == "gguf":
            architecture_of(inputs.skeleton.config).check_modules(targets)
        elif inputs.backbone.load_in_8bit:
            raise UserError("8-bit layers also round activations, so no weights reproduce them")
        else:
            _planned(inputs)
        refuse_other_contents(run_dir / layout, may_have_additions=True)
    except UserError as error:
        raise UserError(f"output.export_layout {layout}: {error}") from None


def check_place(plan: Plan, inputs: Inputs, run_dir: Path) -> None:
    """UserError if the exports of a run that is about to train would replace files that somebody added to older ones,
    or if the disk currently has no room for its layout."""
    layout = plan.config.output.export_layout
    for folder in filter(None, (ADAPTER, extra_layout(layout))):
        refuse_other_contents(run_dir / folder)
    for stage in plan.stages:  # earlier stages' folders stay, including anything added to them
        refuse_other_contents(run_dir / plan.folder_of(stage), may_have_additions=True)
    if layout != "merged":
        return
    try:
        refuse_small_disk(_planned(inputs), run_dir / layout)
    except UserError as error:
        raise UserError(f"output.export_layout {layout}: {error}") from None


def _planned(inputs: Inputs) -> Merge:
    """The plan of a merge without an adapter: which files it would read and write."""
    dequantise = inputs.backbone.load_in_4bit
    return plan_merge({}, inputs.backbone, inputs.skeleton, dequantise=dequantise, device="cpu")


def export_beside(
    layout: str,
    inputs: Inputs,
    factors: PlainFactors,
    run_dir: Path,
    *,
    provenance: Provenance,
    device: torch.device | str,
) -> str:
    """Write run_dir/`layout`, verified, from the factors of the run's adapter; one process.  Returns a line to print.

    A merged model uses the base exactly as it was trained on, including the values that 4-bit layers hold.  The trained
    model is not needed and should have been freed, since the base is loaded again.

    Raises:
        UserError: no room on the disk.
        RunFailed: the files read back differ from what was trained; nothing is left behind.
    """
    folder, base = run_dir / layout, inputs.backbone
    certificate: dict[str, Any]
    if layout == "gguf":
        if not any(A.shape[0] for A, _ in factors.values()):
            return f"{folder} is not written: every rank was pruned, so there is nothing for llama.cpp to apply"
        certificate = export_gguf(factors, inputs.skeleton.config, folder, provenance=provenance)
    else:
        merge = plan_merge(factors, base, inputs.skeleton, dequantise=base.load_in_4bit, device=device)
        certificate = export_merged(merge, inputs.skeleton.config, folder, provenance=provenance)
    how = f"ΔW to {worst_delta_error(certificate):.1e}" if layout == "gguf" else rounding_in_words(certificate)
    return f"self-check of {layout} passed ({how}): {folder}"
