"""`sora-llm inspect`: a summary of a run (the long form is its report.html, refreshed), a comparison of several, or a
view of an adapter."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

from sora_llm import run_files
from sora_llm.arguments import Parser
from sora_llm.commands import run_table
from sora_llm.commands.common import printable, run_command
from sora_llm.commands.rank_table import rank_table
from sora_llm.config import load_config, to_dict
from sora_llm.errors import UserError
from sora_llm.files import user_path
from sora_llm.report import duration
from sora_llm.report_page import read_record, write_page
from sora_llm.report_page.reading import MARKERS, is_run_directory
from sora_llm.report_page.record import Record, summary
from sora_llm.running.run_state import lost_holder, read_status
from sora_llm.terminal import plural


def make_parser(prog: str) -> Parser:
    """The command's arguments."""
    parser = Parser(
        prog=prog,
        description="State, losses, ranks, alarms and adapter of a run, whether it has finished or not; ranks, sizes, "
        "scales and singular values of a checkpoint or of any plain LoRA, without its base. Several runs are compared: "
        "a line of results for each, and the settings that differ.",
    )
    parser.add_argument(
        "places",
        nargs="+",
        metavar="RUN|CHECKPOINT|ADAPTER",
        help="run directory, config, checkpoint or LoRA folder; or several runs",
    )
    parser.add_argument("--plots", action="store_true", help="of a run: also draw the charts as plots/*.png")
    parser.add_argument("--modules", action="store_true", help="of an adapter: a line of its spectrum for every module")
    parser.add_argument("--json", action="store_true", help="print one JSON object and write nothing")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm inspect") -> int:
    """The command; returns its exit code."""
    arguments = make_parser(prog).parse_args(argv)
    width = shutil.get_terminal_size((100, 24)).columns

    def text(content: dict[str, Any]) -> str:
        if "runs" in content:
            return printable(run_table.as_text(content))
        if "run" in content:
            return as_text(content, width)
        return adapter_view().as_text(content, width, arguments.modules)

    return run_command(lambda: inspected(arguments), arguments.json, text)


def inspected(arguments: argparse.Namespace) -> dict[str, Any]:
    """The content to show about a run, several runs or an adapter; UserError for a place that is none of these."""
    if len(arguments.places) > 1:
        return _of_runs(arguments)
    folder = folder_of(arguments.places[0])
    if any((folder / name).is_file() for name in ADAPTER_MARKERS):
        if arguments.plots:
            raise UserError(f"{folder} is not a run directory; --plots draws those of runs")
        content: dict[str, Any] = adapter_view().view(folder)
        return content
    refuse_other_folder(folder)
    if arguments.modules:
        raise UserError(f"{folder} is a run; --modules is of adapters: {folder / run_files.ADAPTER}")
    return _of_run(folder, arguments)


def folder_of(name: str) -> Path:
    """The folder that a path names, or for a config that of its run; UserError if there is none."""
    folder = user_path(name, "the path")
    if folder.is_file():
        folder = run_of_config(name)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist; name a run directory (output.output_dir of a run) or an adapter")
    return folder


def refuse_other_folder(folder: Path) -> None:
    """UserError unless a folder is a run directory."""
    if not is_run_directory(folder):
        is_model = (folder / "config.json").is_file()
        if is_model or any(folder.glob("*.gguf")):
            kind = "a whole model" if is_model else "an adapter for llama.cpp"
            is_told = (folder / run_files.CERTIFICATE).is_file()
            told = f"see its README.md and {run_files.CERTIFICATE}; " if is_told else ""
            raise UserError(f"{folder} holds {kind}; {told}name a run, a checkpoint or a LoRA")
        raise UserError(
            f"{folder} is not a run directory: it has none of {', '.join(MARKERS)}; name output.output_dir of a "
            f"run, a checkpoint ({ADAPTER_MARKERS[1]}) or a LoRA ({ADAPTER_MARKERS[0]})"
        )


def run_of_config(name: str) -> Path:
    """The directory of the run whose config a file is, as for every command; UserError if it is not a config."""
    places = import_module("sora_llm.commands.path_arguments")  # imports torch, which a run directory does not need
    run_dir: Path = places.resolve_path(name).run_dir
    return run_dir


ADAPTER_MARKERS = (run_files.ADAPTER_CONFIG, run_files.CHECKPOINT_STATE)


def adapter_view() -> Any:
    """The module that views adapters; it needs torch, which viewing a run does not."""
    return import_module("sora_llm.commands.adapter_view")


def _of_run(run_dir: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """The summary; unless JSON is requested, the report is refreshed too."""
    record = _record(run_dir)
    content = summary(record)
    if not arguments.json:
        content["report"] = _refreshed(record, plots=arguments.plots)
    return content


def _of_runs(arguments: argparse.Namespace) -> dict[str, Any]:
    """A comparison of several runs; nothing is written."""
    if arguments.plots or arguments.modules:
        raise UserError("--plots and --modules apply to one run or adapter; name it alone")
    folders = [folder_of(name) for name in arguments.places]
    for folder in folders:
        if any((folder / name).is_file() for name in ADAPTER_MARKERS):
            raise UserError(f"{folder} is not a run directory; only runs are compared")
        refuse_other_folder(folder)
    records = [_record(folder) for folder in folders]
    return run_table.compared([summary(record) for record in records], [record.config or None for record in records])


def _record(run_dir: Path) -> Record:
    """The run as its files record it, but failed if they record a killed one as running."""
    record = read_record(run_dir, _config(run_dir))
    holder = lost_holder(run_dir) if record.state == "running" else None
    if holder is not None and (read_status(run_dir) or {}).get("state") == "running":  # it may just have ended
        error = _killed_sentence(holder, record.status)
        record = replace(record, status={**record.status, "state": "failed", "error": error})
    return record


def _killed_sentence(holder: str, status: Mapping[str, Any]) -> str:
    """The error of a run whose status says running although it was killed."""
    whence = "its newest checkpoint" if status.get("checkpoint") else "step 0"
    return f"{holder}, which ran it, was killed; the same command resumes from {whence}"


def _config(run_dir: Path) -> dict[str, Any] | None:
    """The run's config; None if it cannot be read, for example because another version wrote it."""
    try:
        return to_dict(load_config(run_dir / run_files.CONFIG))
    except (UserError, OSError):
        return None


def _refreshed(record: Record, *, plots: bool) -> str:
    """Write the report and return its path, or a note if the folder cannot be written."""
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
    alarms += [f"the end of {name} is truncated" for name in content["torn"]]
    lines += ["", *(f"! {alarm}" for alarm in alarms)] if alarms else ["", "no alarms"]
    if "report" in content:
        lines += ["", f"{'report':<12} {content['report']}"]
    return "\n".join(printable(line) for line in lines)


def _facts(content: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    total = f" of {content['total_steps']:,}" if content["total_steps"] is not None else ""
    phase = f", phase {content['phase']}" if content["phase"] else ""
    yield "step", f"{content['step']:,}{total}{phase}"
    if content["seconds_in_steps"] is not None:
        left = "" if content["seconds_left"] is None else f", about {duration(content['seconds_left'])} left"
        yield "time", f"{duration(content['seconds_in_steps'])} in steps{left}"
    yield "train loss", _number(content["loss"], ".4f")
    if content["eval_loss"] is None:
        yield "dev loss", "not measured"
    elif content["eval_step"] == 0:
        yield "dev loss", f"{content['eval_loss_before']:.4f} before; not measured since"
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
        parts = [plural(cost["steps"], "step")]
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
        size, stored = content["adapter_bytes"], content["stored_params"]
        best = content["best_step"]
        parts = [f"of step {best:,}, the best dev loss"] if best is not None and best < content["step"] else []
        parts += [] if size is None else [f"{size:,} bytes"]
        if stored is not None and stored > (content["kept_params"] or stored):
            has_padding = len(set(content["ranks"].values())) > 1 and content["self_check"]["layout"] == "padded"
            parts.append(f"{stored:,} numbers{', padded with zeros to one rank' if has_padding else ''}")
        said = f" ({', '.join(parts)})" if parts else ""
        yield "adapter", f"{content['adapter']}{said}"
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
