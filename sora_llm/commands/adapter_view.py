"""The view that `inspect` gives of an adapter on disk, any LoRA or a checkpoint: ranks, sizes, scales, spectra."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from sora_llm import checkpoint
from sora_llm.backbone import load_model_config, quiet_libraries, skeleton
from sora_llm.base_spec import BackboneSpec
from sora_llm.commands.common import printable
from sora_llm.commands.rank_table import rank_table
from sora_llm.commands.sources import SavedAdapter, base_of, read_source, shapes_in
from sora_llm.errors import NotFinite, UserError
from sora_llm.factors import kept_params, mean_rank, shapes_of
from sora_llm.run_files import ADAPTER_WEIGHTS
from sora_llm.spectrum import Spectrum, ranks_within, spectra
from sora_llm.terminal import aligned

SHARES = (1, 2, 4, 8, 16, 32)
ENERGIES = (0.9, 0.99, 0.999)


def view(folder: Path) -> dict[str, Any]:
    """The adapter in `folder`, as JSON; its base is not needed, and the base's config is read only if it is on disk.

    Raises:
        UserError: no adapter, or one with more than factors of linear layers.
    """
    source = read_source(folder)
    found = spectra_of(source)
    if not found:
        raise UserError(f"{folder} has no factors to look at: every module of it was pruned")
    is_checkpoint = (folder / checkpoint.STATE).is_file()
    shapes, pruned, is_whole = _shapes_on_disk(source)
    nothing = dict.fromkeys(shapes, 0)
    ranks = nothing | {name: spectrum.rank for name, spectrum in found.items()}
    energy = sum(spectrum.energy for spectrum in found.values())
    return {
        "adapter": str(folder),
        "kind": "checkpoint" if is_checkpoint else "lora",
        "base_model": source.base,
        "bytes": (folder / (checkpoint.TENSORS if is_checkpoint else ADAPTER_WEIGHTS)).stat().st_size,
        "mean_rank": mean_rank(ranks, shapes),
        "mean_rank_is_of_all_targets": is_whole,
        "kept_params": kept_params(ranks, shapes),
        "norm": energy**0.5,
        "mean_rank_for_energy": {
            str(share): mean_rank(nothing | ranks_within(found, tolerance=(1 - share) ** 0.5), shapes)
            for share in ENERGIES
        },
        "left_out": pruned,
        "modules": {name: _module(spectrum) for name, spectrum in found.items()},
    }


def _shapes_on_disk(source: SavedAdapter) -> tuple[dict[str, tuple[int, int]], list[str], bool]:
    """{target: (I, O)}, the targets without factors, and whether these are all targets; never downloads a base."""
    if not source.may_lack_targets or BackboneSpec(source.base).folder.is_dir():
        with contextlib.suppress(UserError):
            return *target_shapes_of(source), True
    return *shapes_in_files(source), False


def shapes_in_files(source: SavedAdapter) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """{module: (I, O)} of those with factors, and the targets known to have none."""
    return shapes_of(source.factors), sorted(source.targets - source.factors.keys())


def target_shapes_of(
    source: SavedAdapter, base: str | None = None, trust_remote_code: bool = False
) -> tuple[dict[str, tuple[int, int]], list[str]]:
    """{target: (I, O)} and the targets without factors: pruned ones may have none in the files, but still count in a
    mean rank.  Their sizes come from the config of the base, which is always read if `base` names it.

    Raises:
        UserError: a base that cannot be read, or does not fit.
    """
    if not source.may_lack_targets and base is None:
        return shapes_of(source.factors), []
    quiet_libraries()
    spec = base_of([source], base, trust_remote_code)
    base_skeleton = skeleton(load_model_config(spec), spec)
    shapes = shapes_in(spec, base_skeleton, [source.on(base_skeleton)])
    return shapes, sorted(shapes.keys() - source.factors.keys())


def spectra_of(source: SavedAdapter) -> dict[str, Spectrum]:
    """The spectrum of every module in the files.

    Raises:
        UserError: values that are not finite.
    """
    try:
        return spectra(source.factors, source.scaling)
    except NotFinite as error:
        raise UserError(f"{source.name}: {error}") from None


def _module(spectrum: Spectrum) -> dict[str, Any]:
    return {
        "shape": list(spectrum.shape),
        "slots": spectrum.slots,
        "rank": spectrum.rank,
        "scaling": spectrum.scaling,
        "norm": spectrum.energy**0.5,
        "effective_rank": spectrum.effective_rank,
        "energy_of_first": {str(count): spectrum.share_of_first(count) for count in SHARES if count < spectrum.rank},
        "sigma": spectrum.sigma.tolist(),
    }


def as_text(content: Mapping[str, Any], width: int, every_module: bool) -> str:
    """For a terminal of `width` columns: facts, ranks, the spectra by projection or of every module."""
    modules = content["modules"]
    ranks = {name: module["rank"] for name, module in modules.items()} | dict.fromkeys(content["left_out"], 0)
    kind = "a checkpoint" if content["kind"] == "checkpoint" else "a LoRA"
    lines = [f"{content['adapter']}: {kind} for {content['base_model'] or 'a base that it does not name'}", ""]
    lines += [f"{name:<12} {value}" for name, value in _facts(content)]
    lines += ["", "rank of each module ('-' is 0: nothing there)", *rank_table(ranks, width)]
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for name, module in modules.items():
        groups.setdefault(name if every_module else name.rpartition(".")[2], []).append(module)
    lines += ["", "singular values of ΔW" + ("" if every_module else ", by projection (means; --modules shows each)")]
    lines += _spectrum_table(groups)
    return "\n".join(printable(line) for line in lines)


def _facts(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    modules = content["modules"].values()
    yield "weights", f"{content['bytes']:,} bytes"
    left_out = f", {len(content['left_out'])} more are left out as 0" if content["left_out"] else ""
    yield "modules", f"{len(content['modules'])}{left_out}"
    largest = max(module["rank"] for module in modules)
    slots = max(module["slots"] for module in modules)
    of = "" if content["mean_rank_is_of_all_targets"] else " (of the modules in the files)"
    yield "mean rank", f"{content['mean_rank']:.2f}{of}, at most {largest} in {slots} slots"
    yield "live", f"{content['kept_params']:,} parameters"
    scales = sorted({module["scaling"] for module in modules})
    yield "scale", f"{scales[0]:.4g}" + (f" to {scales[-1]:.4g}" if len(scales) > 1 else "")
    yield "‖ΔW‖", f"{content['norm']:.4g}"
    into = [f"{float(share):.3g} in mean rank {rank:.2f}" for share, rank in content["mean_rank_for_energy"].items()]
    yield "energy", f"of ‖ΔW‖², {', '.join(into)}"


def _spectrum_table(groups: Mapping[str, Sequence[Mapping[str, Any]]]) -> list[str]:
    """A line per group: rank, effective rank, largest σ, and the first components' shares of the energy."""
    largest = max((module["rank"] for modules in groups.values() for module in modules), default=0)
    counts = [count for count in SHARES if count < largest]
    rows = [["", "rank", "effective", "largest σ", *(f"first {count}" for count in counts)]]
    for name, modules in groups.items():
        cells = [f"{fmean(m['rank'] for m in modules):.4g}", f"{fmean(m['effective_rank'] for m in modules):.2f}"]
        cells.append(f"{max((m['sigma'][0] for m in modules if m['sigma']), default=0.0):.3g}")
        shares = (fmean(m["energy_of_first"].get(str(count), 1.0) for m in modules) for count in counts)
        rows.append([name, *cells, *(f"{share:.1%}" for share in shares)])
    return aligned(rows, left=1)
