"""Size options of `consensus`, `export` and `recommend-ranks`."""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass

from sora_llm.budget import params_of
from sora_llm.errors import UserError
from sora_llm.factors import Shapes, costs_of


@dataclass(frozen=True)
class Size:
    """A budget for an adapter, as a mean rank (weighted by I + O) or as a number of parameters; with neither, there is
    no budget.

    Raises:
        UserError: a number that cannot be one.
    """

    target_rank: float | None = None
    target_params: int | None = None

    def __post_init__(self) -> None:
        if self.target_rank is not None and not 0 < self.target_rank < math.inf:
            raise UserError(f"--target-rank is {self.target_rank:g}; it is a mean rank above 0")
        if self.target_params is not None and self.target_params < 1:
            raise UserError(f"--target-params is {self.target_params}; it is a number of parameters above 0")

    def params(self, shapes: Shapes) -> int | None:
        """The number of parameters that modules of these `shapes` {module: (I, O)} may keep; None without a budget."""
        if self.target_rank is None:
            return self.target_params
        return params_of(self.target_rank, sum(costs_of(shapes).values()))


def add_size_arguments(parser: argparse.ArgumentParser) -> None:
    """Add --target-rank, --target-params or --tolerance, and --min-rank."""
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--target-rank", type=float, metavar="N", help="keep at most this mean rank, weighted by I + O")
    size.add_argument("--target-params", type=int, metavar="N", help="keep at most this many parameters")
    size.add_argument("--tolerance", type=float, metavar="T", help="drop what is below this relative error of ΔW")
    parser.add_argument("--min-rank", type=int, default=0, metavar="N", help="ranks that every module keeps")


def size_in(arguments: argparse.Namespace) -> Size:
    """The size that a command line asks for; UserError for invalid numbers, before any file is read."""
    size = Size(arguments.target_rank, arguments.target_params)
    if arguments.tolerance is not None and not 0 <= arguments.tolerance < 1:
        raise UserError(f"--tolerance is {arguments.tolerance:g}; it is a relative error, 0 or more and below 1")
    is_cut = size != Size() or arguments.tolerance is not None
    if arguments.min_rank < 0 or (arguments.min_rank and not is_cut):
        raise UserError(
            f"--min-rank is {arguments.min_rank}; it is 0 or more, and needs --target-rank, --target-params or "
            "--tolerance"
        )
    return size


def refuse_empty_result(kept_params: int, energy: float, shapes: Shapes) -> None:
    """UserError if the size removed all of a nonzero adapter; `shapes` is {module: (I, O)}."""
    if kept_params == 0 and energy > 0:
        cheapest = min(costs_of(shapes).values())
        raise UserError(f"this size keeps nothing: the cheapest rank takes {cheapest:,} parameters; allow more")
