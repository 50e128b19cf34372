"""`sora-llm inspect RUN`: what became of a run, in short; the long form is its report.html, refreshed here."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sora_llm.commands.common import exit_code, visible
from sora_llm.config import load_config, to_dict
from sora_llm.errors import UserError
from sora_llm.files import user_path
from sora_llm.report_page import read_record, write_page
from sora_llm.report_page.record import (
    MARKERS,
    Grid,
    Record,
    grids_of,
    is_run_directory,
    short_names,
    summary,
)

_TALL = 24  # layers; more of them stand beside each other where the terminal is wide enough


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm inspect") -> int:
    parser = argparse.ArgumentParser(
        prog=prog, description="State, losses, ranks, alarms and adapter of a run, whether it has finished or not."
    )
    parser.add_argument("run", help="a run directory (output.output_dir)")
    parser.add_argument("--plots", action="store_true", help="also draw the charts as plots/*.png")
    parser.add_argument("--json", action="store_true", help="print one JSON object and write nothing")
    arguments = parser.parse_args(argv)

    def command() -> dict[str, Any]:
        run_dir = user_path(arguments.run, "RUN")
        if not run_dir.is_dir():
            raise UserError(f"{run_dir} is not a folder; name a run directory (output.output_dir of a run)")
        if not is_run_directory(run_dir):
            missing = ", ".join(MARKERS)
            raise UserError(
                f"{run_dir} is not a run directory: it has none of {missing}; name output.output_dir of a run"
            )
        record = read_record(run_dir, _config(run_dir))
        content = summary(record)
        if not arguments.json:
            content["report"] = _refreshed(record, plots=arguments.plots)
        return content

    width = shutil.get_terminal_size((100, 24)).columns
    return exit_code(command, arguments.json, lambda content: as_text(content, width))


def _config(run_dir: Path) -> dict[str, Any] | None:
    """The run's config; None where it cannot be read, for example because another version wrote it."""
    try:
        return to_dict(load_config(run_dir / "config.yaml"))
    except (UserError, OSError):
        return None


def _refreshed(record: Record, *, plots: bool) -> str:
    """Where the report is; an old one where the folder is somebody else's and cannot be written."""
    try:
        return str(write_page(record, plots=plots))
    except OSError as error:
        return f"not written ({error.strerror})"


def as_text(content: Mapping[str, Any], width: int) -> str:
    """The summary for a terminal of `width` columns."""
    lines = [f"{content['run']}: {content['state']}", ""]
    lines += [f"{name:<12} {value}" for name, value in _facts(content) if value]
    table = rank_table(content["ranks"], width)
    if table:
        lines += ["", "rank of each module ('-' is 0: no adapter there)", *table]
    alarms = [content["error"]] if content["error"] else []
    for alarm in content["alarms"]:
        more = f", {alarm['count']} times until step {alarm['last_step']}" if alarm["count"] > 1 else ""
        alarms.append(f"{alarm['sentence']} (step {alarm['first_step']}{more})")
    if content["skipped_steps"]:
        alarms.append(f"{content['skipped_steps']} steps skipped: loss or gradient was not finite")
    alarms += [f"the end of {name} is torn" for name in content["torn"]]
    lines += ["", *(f"! {alarm}" for alarm in alarms)] if alarms else ["", "no alarms"]
    if "report" in content:
        lines += ["", f"{'report':<12} {content['report']}"]
    return "\n".join(visible(line) for line in lines)


def _facts(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    total = f" of {content['total_steps']:,}" if content["total_steps"] is not None else ""
    phase = f", phase {content['phase']}" if content["phase"] else ""
    yield "step", f"{content['step']:,}{total}{phase}"
    yield "train loss", _number(content["loss"], ".4f")
    if content["eval_loss"] is None:
        yield "dev loss", "not measured"
    else:
        exported = content["eval_loss_exported"]
        reloaded = "" if exported is None else f", reloaded from disk {exported:.4f}"
        yield "dev loss", f"{content['eval_loss_before']:.4f} → {content['eval_loss']:.4f}{reloaded}"
    if content["mean_rank"] is not None:
        yield "mean rank", f"{content['mean_rank_before']:.2f} → {content['mean_rank']:.2f}"
    if content["kept_params"] is not None and content["all_params"]:
        share = content["kept_params"] / content["all_params"]
        yield "kept", f"{content['kept_params']:,} of {content['all_params']:,} parameters ({share:.1%})"
    for cost in content["phases"]:
        speed, memory = cost["median_tokens_per_second"], cost["peak_memory_gib"]
        parts = [f"{cost['steps']:,} steps"]
        parts += [] if speed is None else [f"{speed:,.0f} tokens/s"]
        parts += [] if memory is None else [f"peak {memory:.2f} GiB"]
        yield cost["phase"], ", ".join(parts)
    for stage in content["path"]:
        parts = [] if stage["kept_params"] is None else [f"{stage['kept_params']:,} parameters"]
        parts += [] if stage["eval_loss"] is None else [f"dev loss {stage['eval_loss']:.4f}"]
        parts += ["best dev loss"] if stage["sparse_lambda"] == content["best_lambda"] else []
        parts += ["adapter/"] if stage["is_adapter"] else []
        yield f"λ {stage['sparse_lambda']:.4g}", ", ".join(parts)
    yield "checkpoint", content["checkpoint"] or ""
    if content["adapter"]:
        size = content["adapter_bytes"]
        yield "adapter", f"{content['adapter']}{'' if size is None else f' ({size:,} bytes)'}"
    yield "self-check", _self_check(content["self_check"])


def _number(value: float | None, form: str) -> str:
    return "" if value is None else f"{value:{form}}"


def _self_check(found: Mapping[str, Any] | None) -> str:
    if found is None:
        return ""
    errors = [
        f"{name} to {error:.1e}"
        for name, error in (("ΔW", found["delta_error"]), ("logits", found["logits_error"]))
        if error is not None
    ]
    return ", ".join(["passed" if found["passed"] else "not passed", *errors])


def rank_table(ranks: Mapping[str, int], width: int) -> list[str]:
    """Layer × projection in plain text."""
    grids, others = grids_of(ranks)
    lines: list[str] = []
    for grid in grids:
        if len(grids) > 1:
            lines += ["", grid.stack]
        lines += _beside(_grid_lines(grid, ranks), width)
    lines += [f"{name}  {rank or '-'}" for name, rank in others.items()]
    return lines


def _grid_lines(grid: Grid, ranks: Mapping[str, int]) -> list[str]:
    """A line of names, then a line per layer, all of one length."""
    names = [short.removesuffix("_proj") for short in short_names(grid.projections).values()]
    rows = [["layer", *names]]
    for layer in grid.layers:
        found = [grid.cells.get((layer, projection)) for projection in grid.projections]
        rows.append([str(layer), *("" if name is None else str(ranks[name] or "-") for name in found)])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [" ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _beside(lines: Sequence[str], width: int) -> list[str]:
    """A tall table as blocks beside each other, as many as there is room for, each under the line of names."""
    head, *rows = lines
    gap = "   |  "
    room = max(1, (width + len(gap)) // (len(head) + len(gap)))
    num_blocks = min(room, -(-len(rows) // _TALL))
    size = -(-len(rows) // num_blocks)
    blocks = [rows[start : start + size] for start in range(0, len(rows), size)]
    found = [gap.join([head] * len(blocks))]
    for i in range(size):
        found.append(gap.join(block[i] if i < len(block) else " " * len(head) for block in blocks).rstrip())
    return [line.rstrip(" |") if line.endswith("|") else line for line in found]
