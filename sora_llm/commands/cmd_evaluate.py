"""`sora-llm evaluate RUN|CONFIG|ADAPTER`: the loss of base and adapter, on the run's dev rows or others."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import Any

from torch import nn

from sora_llm.arguments import Parser
from sora_llm.commands.common import config_parser, options_for_keys, run_command
from sora_llm.commands.eval_data import DevRows, dev_rows
from sora_llm.commands.eval_plan import plan_evaluation, refuse_guessed_template
from sora_llm.commands.eval_progress import EvalProgress
from sora_llm.commands.model_ref import add_base_arguments, load
from sora_llm.commands.size_curve import add_size_list, curve_as_text, losses_by_size, sizes_in
from sora_llm.config import Config
from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.data.dataset import TokenDataset
from sora_llm.errors import RunFailed, UserError
from sora_llm.row_types import FIELDS
from sora_llm.running.data_summary import row_outcomes
from sora_llm.running.evaluation import evaluate
from sora_llm.running.inputs import Inputs, check_inputs
from sora_llm.topology import ALONE


def make_parser(prog: str) -> Parser:
    """The command's arguments."""
    parser = config_parser(
        prog,
        "Loss and perplexity of a base and of an adapter on it: over a run's dev rows (data.val_datasets or "
        "val_set_size), or over any data set with --data.",
        metavar="RUN|CONFIG|ADAPTER|MODEL",
        what="run directory, config, checkpoint, LoRA folder or a whole model",
    )
    parser.add_argument(
        "--adapter",
        metavar="RUN|ADAPTER",
        help="another adapter for the same base",
    )
    parser.add_argument("--no-adapter", action="store_true", help="measure the base alone")
    add_base_arguments(parser)
    parser.add_argument("--data", metavar="FILE", help="another data set: a file, a folder, a glob or a hub id")
    parser.add_argument("--type", choices=tuple(FIELDS), help="of --data; default: as the run's first data set")
    parser.add_argument("--column", action="append", metavar="OURS=THEIRS", help="of --data, where names differ")
    parser.add_argument("--function", metavar="MODULE:FUNCTION", help="of --data, with --type custom")
    parser.add_argument(
        "--separator",
        metavar="TEXT",
        help="of --data, between prompt and completion; default: the run's, where it trained on prompt_completion rows",
    )
    parser.add_argument("--chat-template", metavar="NAME", help=f"{', '.join(TEMPLATES)} or a jinja file")
    parser.add_argument("--split", help="of a hub data set")
    parser.add_argument("--name", help="of a hub data set that has several configurations: which one")
    parser.add_argument(
        "--max-rows", type=int, metavar="N", help="measure the first N rows only, in the files' order; all are read"
    )
    add_size_list(parser)
    return parser


def main(argv: Sequence[str] | None = None, prog: str = "sora-llm evaluate") -> int:
    """The command; returns its exit code."""
    arguments = make_parser(prog).parse_intermixed_args(argv)
    return run_command(lambda: evaluated(arguments), arguments.json, as_text, options_for_keys(arguments))


def evaluated(arguments: argparse.Namespace) -> dict[str, Any]:
    """Loss and perplexity of the base and of its adapter, if there is one, and the rows they were measured on.

    Raises:
        UserError: nothing to measure, or no rows to measure it on.
        RunFailed: a loss that is not finite.
    """
    sizes = sizes_in(arguments)
    if arguments.max_rows is not None and arguments.max_rows < 1:
        raise UserError(f"--max-rows is {arguments.max_rows}; it must be at least 1")
    measured = plan_evaluation(arguments)
    if sizes and measured.ref.adapter is None:
        raise UserError("--target-rank and --target-params measure an adapter cut to a size, and there is none here")
    ref, config = measured.ref, measured.config
    inputs = check_inputs(config, "none", measured.tokenizer)
    if ref.config is None:
        refuse_guessed_template(arguments.config, config, inputs)
    found_rows = dev_rows(config, inputs, measured.trained, measured.tokenizer)
    rows = found_rows.rows
    if arguments.max_rows is not None:
        rows = rows.select(range(min(len(rows), arguments.max_rows)))
    if measured.held_out_alike:
        found_rows.warn_of_leak()
    result: dict[str, Any] = {"base_model": ref.spec.name_or_path, "base_form": ref.spec.form}
    result |= {"rows": len(rows), "supervised_tokens": rows.num_supervised, "not_as_written": outcomes_of(found_rows)}
    if len(rows) < len(found_rows.rows):
        result["rows_in_all"] = len(found_rows.rows)
    if sizes:
        return result | losses_by_size(ref, sizes, lambda model, name: loss_of(model, name, rows, inputs, config))
    loaded = load(ref)
    with loaded.as_base():
        is_alone = ref.is_whole_model and ref.adapter is None
        name = "model" if is_alone else "base"
        result[name] = loss_of(loaded.model, name, rows, inputs, config)
    if ref.adapter is not None:
        result["adapter"] = loss_of(loaded.model, "adapter", rows, inputs, config)
    return result


def loss_of(model: nn.Module, name: str, rows: TokenDataset, inputs: Inputs, config: Config) -> dict[str, float]:
    """Loss in nats per supervised token and perplexity of `model` over `rows`; RunFailed if it is not finite.  Progress
    calls it by its `name`."""
    batch_size = config.evaluation.per_device_eval_batch_size
    progress = EvalProgress(name, rows, batch_size)
    loss = evaluate(
        model,
        rows,
        inputs.batch,
        batch_size=batch_size,
        world=ALONE,
        device=next(model.parameters()).device,
        before_batch=progress,
    )
    progress.end()
    if not math.isfinite(loss):
        raise RunFailed(
            f"the loss is {loss}: base or adapter have values that are not finite, or too large for their dtype"
        )
    return {"loss": loss, "perplexity": math.exp(min(loss, 700.0))}


def as_text(result: dict[str, Any]) -> str:
    """The result as text for a terminal."""
    rows = f"{result['rows']:,}"
    if "rows_in_all" in result:
        rows = f"the first {rows} of {result['rows_in_all']:,}"
    lines = [
        f"{result['base_model']} ({result['base_form']}), {rows} rows, "
        f"{result['supervised_tokens']:,} supervised tokens"
    ]
    lines += [f"of the rows of the files: {'; '.join(said)}"] if (said := result["not_as_written"]) else []
    if "cuts" in result:
        return "\n".join([*lines, *curve_as_text(result)])
    for name in ("model", "base", "adapter"):
        if name in result:
            lines.append(f"{name:<8} loss {result[name]['loss']:.4f}  perplexity {result[name]['perplexity']:.2f}")
    return "\n".join(lines)


def outcomes_of(measured: DevRows) -> list[str]:
    """Phrases about the rows that are not measured, or not as they are written."""
    left_out = [f"left out {measured.missing:,} that were held out"] if measured.missing else []
    return left_out if measured.report is None else row_outcomes(measured.report)
