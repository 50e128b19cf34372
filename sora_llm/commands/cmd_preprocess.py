"""`sora-llm preprocess CONFIG`: fill the token cache, so that training starts at once, and report what is in it."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sora_llm import run_files
from sora_llm.arguments import Parser
from sora_llm.commands.common import config_parser, run_command
from sora_llm.config import Config, load_config
from sora_llm.data.prepare import sample
from sora_llm.data.show import table
from sora_llm.errors import UserError
from sora_llm.files import user_path, write_text_atomically
from sora_llm.running.data_summary import form_warnings
from sora_llm.running.inputs import Inputs, check_inputs
from sora_llm.running.run_state import read_status
from sora_llm.running.training_data import (
    TrainingData,
    data_report,
    load_data,
    prepare_rows,
    tokenizing,
)
from sora_llm.terminal import is_terminal
from sora_llm.topology import ALONE

_STREAM_SAMPLE_ROWS = 1000


def make_parser(prog: str) -> Parser:
    """The command's arguments."""
    parser = config_parser(
        prog,
        "Tokenise a config's data into the cache, where training finds it, and report rows, lengths, masks and losses.",
    )
    parser.add_argument(
        "--report", metavar="FILE", help="default: data_report.json in output.output_dir, if no run is there yet"
    )
    parser.add_argument("--color", action="store_true", help="dim masked text also where the output is no terminal")
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm preprocess") -> int:
    """The command; returns its exit code."""
    arguments = make_parser(prog).parse_intermixed_args(argv)
    colour = arguments.color or (is_terminal(sys.stdout) and "NO_COLOR" not in os.environ)
    return run_command(lambda: prepared(arguments), arguments.json, lambda content: as_text(content, colour))


def prepared(arguments: argparse.Namespace) -> dict[str, Any]:
    """Fill the cache and write the report on it; UserError for an invalid config or invalid data."""
    config = load_config(arguments.config, arguments.overrides)
    file = report_file(config, arguments.report)
    inputs = check_inputs(config, "none")
    found = report_on_data(config, inputs)
    content = {
        **found,
        "warnings": form_warnings(config, inputs),
        "report": None if file is None else str(file),
    }
    if file is not None:
        _write(file, content)
    return content


def report_file(config: Config, named: str | None) -> Path | None:
    """Where the report goes; None if no file is named and a run keeps a report on its own training data there.

    Raises:
        UserError: a folder is named.
    """
    if named is not None:
        file = user_path(named, "--report")
        if file.is_dir():
            raise UserError(f"--report {named} is a folder; name a file, which may be a new one in it")
        return file
    run_dir = user_path(config.output.output_dir, "output.output_dir")
    return run_dir / run_files.DATA_REPORT if read_status(run_dir) is None else None


def report_on_data(config: Config, inputs: Inputs) -> dict[str, Any]:
    """Prepare a config's data, or the first rows of streamed data, and report on its contents."""
    if not inputs.datasets[0].streaming:  # then none of them is
        return data_report(config, inputs, load_data(config, inputs, ALONE))
    dev = prepare_rows(config, inputs, inputs.val_datasets, ALONE) if inputs.val_datasets else (None, None)
    work = tokenizing(config, inputs, inputs.datasets)
    rows, report = sample(work, _STREAM_SAMPLE_ROWS, config.data.max_bad_row_fraction)
    content = data_report(config, inputs, TrainingData(rows, dev[0], report, dev[1]))
    content["train"]["sample_rows"] = _STREAM_SAMPLE_ROWS
    return content


def _write(file: Path, content: dict[str, Any]) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text_atomically(file, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        raise UserError(f"the report {file} cannot be written ({error.strerror}): name another --report") from None


def as_text(content: dict[str, Any], colour: bool) -> str:
    """The tables of train and dev data, and where everything is."""
    parts = [table(name, content[name], colour=colour) for name in ("train", "dev") if content[name] is not None]
    ends = [f"chat template   {content['chat_template'] or 'none is used'}"]
    if content.get("held_out"):
        ends.append(
            f"dev rows        {content['held_out']:,} of the train rows, drawn by train.seed (data.val_set_size)"
        )
    report = content["report"] or "the run there keeps its own; --report FILE names another"
    ends += [f"cache           {content['cache']}", f"report          {report}"]
    return "\n\n".join([*parts, "\n".join(ends), *content.get("warnings", ())])
