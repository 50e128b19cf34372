"""The loss of an adapter cut to several smaller sizes, without further training."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import nn

from sora_llm.allocation import components
from sora_llm.commands.model_ref import ModelRef, factors_on, load_base
from sora_llm.commands.sizes import Size, refuse_empty_result
from sora_llm.consensus import CutReport, keep_components
from sora_llm.factors import PlainFactors, kept_params, mean_rank, shapes_of
from sora_llm.inject import with_factors
from sora_llm.terminal import aligned


def add_size_list(parser: argparse.ArgumentParser) -> None:
    """Add --target-rank and --target-params, each for one or more sizes."""
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument(
        "--target-rank",
        type=float,
        nargs="+",
        metavar="N",
        help="measure the adapter cut to each of these mean ranks as well (weighted by I + O; nothing is written); "
        "goes after RUN and its overrides",
    )
    sizes.add_argument("--target-params", type=int, nargs="+", metavar="N", help="the same, by numbers of parameters")


def sizes_in(arguments: argparse.Namespace) -> list[Size]:
    """The sizes that a command line asks for, from the largest down; UserError for invalid numbers."""
    sizes = [Size(target_rank=rank) for rank in sorted(set(arguments.target_rank or ()), reverse=True)]
    sizes += [Size(target_params=params) for params in sorted(set(arguments.target_params or ()), reverse=True)]
    return sizes


def losses_by_size(
    ref: ModelRef, sizes: Sequence[Size], loss_of: Callable[[nn.Module, str], Mapping[str, float]]
) -> dict[str, Any]:
    """What `loss_of` (a model, its name) finds for the base, for the adapter of `ref` on it, and for the adapter cut to
    each of `sizes`.

    A cut keeps the largest singular components of all modules together, as `sora-llm export --target-rank` does.

    Raises:
        UserError: a base that cannot be loaded, an adapter for another base, or a size below one rank.
    """
    model = load_base(ref)
    whole = factors_on(model, ref)
    cuts = _cuts(whole, sizes)
    result: dict[str, Any] = {"base": loss_of(model, "base")}
    with with_factors(model, whole):
        result |= {"adapter": loss_of(model, "adapter"), **_size_of(whole), "cuts": []}
    for size, (factors, report) in zip(sizes, cuts, strict=True):
        asked = {name: value for name, value in asdict(size).items() if value is not None}
        with with_factors(model, factors):
            losses = loss_of(model, _name_of(asked))
        result["cuts"].append({**asked, **_size_of(factors), "relative_error": report.relative_error, **losses})
    return result


def _cuts(whole: PlainFactors, sizes: Sequence[Size]) -> list[tuple[PlainFactors, CutReport]]:
    """An adapter cut to each size; UserError for a size below one rank."""
    shapes, dtypes = shapes_of(whole), {name: A.dtype for name, (A, _) in whole.items()}
    parts = {name: components(A, B, None, 1.0, name) for name, (A, B) in whole.items()}
    cuts = []
    for size in sizes:
        cut = keep_components(parts, shapes, 1.0, dtypes, budget=size.params(shapes), tolerance=None, min_rank=0)
        refuse_empty_result(cut[1].kept_params, cut[1].energy, shapes)
        cuts.append(cut)
    return cuts


def _name_of(cut: Mapping[str, Any]) -> str:
    """By the size that was asked for."""
    return f"cut to rank {cut['target_rank']:g}" if "target_rank" in cut else f"cut to {cut['target_params']:,} params"


def _size_of(factors: PlainFactors) -> dict[str, Any]:
    ranks, shapes = {name: A.shape[0] for name, (A, _) in factors.items()}, shapes_of(factors)
    return {"mean_rank": mean_rank(ranks, shapes), "kept_params": kept_params(ranks, shapes)}


def curve_as_text(result: Mapping[str, Any]) -> list[str]:
    """The losses of base, adapter and cuts in the result of `evaluate`, as lines of text."""
    rows = [("", "mean rank", "parameters", "error of ΔW", "loss", "perplexity")]
    whole = {key: result[key] for key in ("mean_rank", "kept_params")}
    lines = [("base", result["base"]), ("adapter", whole | result["adapter"])]
    for cut in result["cuts"]:
        lines.append((_name_of(cut), cut))
    for name, measured in lines:
        rank, params, error = (measured.get(key) for key in ("mean_rank", "kept_params", "relative_error"))
        rows.append(
            (
                name,
                "" if rank is None else f"{rank:.2f}",
                "" if params is None else f"{params:,}",
                "" if error is None else f"{error:.1%}",
                f"{measured['loss']:.4f}",
                f"{measured['perplexity']:.2f}",
            )
        )
    return [line.rstrip() for line in aligned(rows, left=1)]
