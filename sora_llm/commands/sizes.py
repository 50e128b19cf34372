"""Size options of `consensus`, `export` and `recommend-ranks`, and a check of what `--out` would replace."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from sora_llm.artifacts.card import refuse_other_contents
from sora_llm.budget import params_of
from sora_llm.errors import UserError
from sora_llm.factors import Shapes, costs_of
from sora_llm.files import nearest_existing
from sora_llm.running.run_folders import run_of_adapter


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --target-rank, --target-params or --tolerance, and --min-rank."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--target-rank", type=float, metavar="N", help="keep at most this mean rank, weighted by I + O")
    size.add_argument("--target-params", type=int, metavar="N", help="keep at most this many parameters")
    size.add_argument("--tolerance", type=float, metavar="T", help="drop what is below this relative error of ΔW")
    parser.add_argument("--min-rank", type=int, default=0, metavar="N", help="ranks that every module keeps")


def check_size(arguments: argparse.Namespace) -> None:
    """UserError for invalid numbers, before any file is read."""
    check_budget(arguments.target_rank, arguments.target_params)
    if arguments.tolerance is not None and not 0 <= arguments.tolerance < 1:
        raise UserError(f"--tolerance is {arguments.tolerance:g}; it is a relative error, 0 or more and below 1")
    has_budget = arguments.target_rank is not None or arguments.target_params is not None
    if arguments.min_rank < 0 or (arguments.min_rank and not has_budget):
        raise UserError(
            f"--min-rank is {arguments.min_rank}; it is 0 or more, and needs --target-rank or --target-params"
        )


def check_budget(target_rank: float | None, target_params: int | None) -> None:
    """UserError for an invalid mean rank or number of parameters."""
    if target_rank is not None and not 0 < target_rank < math.inf:
        raise UserError(f"--target-rank is {target_rank:g}; it is a mean rank above 0")
    if target_params is not None and target_params < 1:
        raise UserError(f"--target-params is {target_params}; it is a number of parameters above 0")


def budget_of(target_rank: float | None, target_params: int | None, shapes: Shapes) -> int | None:
    """The number of parameters that modules of these `shapes` {module: (I, O)} may keep; None without a budget."""
    return target_params if target_rank is None else params_of(target_rank, sum(costs_of(shapes).values()))


def refuse_empty_result(kept_params: int, energy: float, shapes: Shapes) -> None:
    """UserError if the size removed all of a nonzero adapter; `shapes` is {module: (I, O)}."""
    if kept_params == 0 and energy > 0:
        cheapest = min(costs_of(shapes).values())
        raise UserError(f"this size keeps nothing: the cheapest rank takes {cheapest:,} parameters; allow more")


def check_output_folder(out: Path, sources: Sequence[Path]) -> None:
    """UserError if a result would replace a source (an adapter, a base), the adapter of a run, or anything but an
    earlier export."""
    if out.resolve() in [folder.resolve() for folder in sources]:
        raise UserError(f"--out {out} is one of the inputs; name another folder")
    if run_of_adapter(out) is not None:
        raise UserError(f"--out {out} is a run's adapter and would be overwritten; name another folder")
    if not (existing := nearest_existing(out)).is_dir():
        raise UserError(f"--out {out}: {existing} is a file, not a folder; name another one")
    try:
        refuse_other_contents(out)
    except UserError as error:
        raise UserError(f"--out {error}") from None
