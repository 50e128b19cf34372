"""Log lines and warnings about a run's data."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from sora_llm.config import Config
from sora_llm.data.builtin_templates import DEFAULT_TEMPLATE, TEMPLATES
from sora_llm.data.order import EpochOrder, Order
from sora_llm.data.prompts import (
    generation_prefix,
    has_visible_end,
    is_served_as_trained,
    merges_trailing_whitespace,
    untrained_eos,
)
from sora_llm.data.report import DataReport
from sora_llm.data.stream import StreamOrder
from sora_llm.prompt_format import has_conversations, has_unread_line_break, template_is_named
from sora_llm.running.inputs import Inputs
from sora_llm.running.training_data import TrainingData
from sora_llm.terminal import plural


def describe_data(config: Config, inputs: Inputs, data: TrainingData, order: Order) -> list[str]:
    """The data of a run, one line per source."""
    if isinstance(order, StreamOrder):
        lines = describe_stream(config, order)
    else:
        assert data.train_report is not None
        assert isinstance(order, EpochOrder)
        packing = "" if order.first_fill_rate is None else f"; packed sequences are {order.first_fill_rate:.1%} full"
        lines = [f"data: {describe(data.train_report)}{packing}"]
        drops_duplicates = data.train_report.drop_duplicates
        lines += too_long_warning(vars(data.train_report), config.data.sequence_len, drops_duplicates=drops_duplicates)
        lines += special_warning(data.train_report.special_written, data.train_report.first_special_written)
    if data.dev_report is not None:
        lines.append(f"dev data: {describe(data.dev_report)}")
    elif data.dev is not None:
        lines.append(f"dev data: {len(data.dev)} of these rows are held out")
        lines += repetition_warning(data.train_report)
    return [*lines, *mixture(config, data), *assumed_template(config, inputs), *form_warnings(config, inputs)]


def mixture(config: Config, data: TrainingData) -> list[str]:
    """A line about the share of each data set, if they have weights, and how often an epoch takes each of its rows."""
    weights = [dataset.weight for dataset in config.data.datasets]
    if any(weight is None for weight in weights):
        return []
    parts = []
    for number, dataset in enumerate(config.data.datasets):
        assert dataset.weight is not None
        share = dataset.weight / sum(weight for weight in weights if weight is not None)
        times = ""
        if data.train is not None and (own := int((data.train.sources == number).sum())):
            times = f" (each row {share * len(data.train) / own:.2g} times an epoch)"
        parts.append(f"{dataset.path} {share:.1%}{times}")
    return [f"mixture: {', '.join(parts)}"]


def assumed_template(config: Config, inputs: Inputs) -> list[str]:
    """A line if rows are rendered with a chat template that nobody named."""
    if template_is_named(config, inputs.tokenizer) or not has_conversations(config.data.datasets):
        return []
    return [
        f"chat template: {DEFAULT_TEMPLATE}, as the tokenizer has none; data.chat_template selects another "
        f"({', '.join(TEMPLATES)}, or a jinja file)"
    ]


def form_warnings(config: Config, inputs: Inputs) -> list[str]:
    """A line for everything about the form of prompts that is probably unintended."""
    return separator_warnings(config) + template_warnings(config, inputs)


def separator_warnings(config: Config) -> list[str]:
    """A line for each separator with a line break that a shell or YAML has left in two characters."""
    named = {"data.datasets": config.data.datasets, "data.val_datasets": config.data.val_datasets or ()}
    return [
        f"warning: the separator of {key} {one.path} holds a backslash and an n, not a line break: "
        r'write "\n" in double quotes in YAML, '
        r"$'\n' in bash"
        for key, datasets in named.items()
        for one in datasets
        if has_unread_line_break(one.separator)
    ]


def template_warnings(config: Config, inputs: Inputs) -> list[str]:
    """A line for each way in which the chat template makes a model answer differently from how it was trained."""
    if not has_conversations(config.data.datasets):
        return []
    tokenizer, template = inputs.tokenizer, inputs.chat_template
    return [
        *_ending_warning(tokenizer, template),
        *_opening_warning(tokenizer, template),
        *_blank_warning(tokenizer, template),
        *_serving_warning(tokenizer, template),
    ]


def _ending_warning(tokenizer: Any, template: str) -> list[str]:
    """A line if training does not teach a model to stop where a client notices."""
    if has_visible_end(tokenizer, template):
        return []
    if (token := untrained_eos(tokenizer, template)) is not None:
        return [
            f"warning: the chat template's {{% generation %}} markers exclude the {token} after an answer, so the "
            "model is not taught to stop: move it inside the markers, or use another data.chat_template"
        ]
    return [
        "warning: answers end with text that is not a single token of this tokenizer, so clients must match it as a "
        "stop string; data.chat_template: alpaca, mistral, llama-2 or vicuna end answers with eos"
    ]


def _opening_warning(tokenizer: Any, template: str) -> list[str]:
    """A line if the model is prompted with an opening of the answer that training rows lack."""
    if not (opened := generation_prefix(tokenizer, template)):
        return []
    return [
        f"warning: at inference the chat template opens the answer with {opened!r}, which it does not write before "
        "answers that lack it (mostly reasoning): add it to the answers, or use another data.chat_template"
    ]


def _blank_warning(tokenizer: Any, template: str) -> list[str]:
    """A line if a client that tokenises a prompt alone sends different tokens than in training."""
    if not merges_trailing_whitespace(tokenizer, template):
        return []
    return [
        "warning: the chat template ends prompts with whitespace that this tokenizer merges with what follows, so "
        "servers, which tokenise prompts alone, send different tokens than in training (the commands here do not): "
        "remove that whitespace"
    ]


def _serving_warning(tokenizer: Any, template: str) -> list[str]:
    """A line if no template gives servers the tokens of training."""
    if is_served_as_trained(tokenizer, template):
        return []
    return [
        "warning: servers, which tokenise the rendered chat template and add nothing, will send different tokens than "
        "in training, whatever template is saved with the adapter (the commands here do not); use another "
        "data.chat_template"
    ]


def describe(report: DataReport) -> str:
    """A data report in one line."""
    kept = f"{report.rows_kept:,} rows, {report.tokens:,} tokens ({report.supervised_tokens:,} supervised)"
    return "; ".join([kept, *row_outcomes(report)])


def row_outcomes(report: DataReport) -> list[str]:
    """How many rows were left out or changed, one phrase per reason."""
    parts = _phrases(vars(report), drops_duplicates=report.drop_duplicates)
    if report.num_bad_rows:
        parts.append(f"the first malformed one is {report.bad_rows[0][0]}: {report.bad_rows[0][1]}")
    return parts


def _phrases(counts: Mapping[str, int], *, drops_duplicates: bool) -> list[str]:
    """How many rows were left out or changed, a phrase per reason; `counts` has the keys of `Counts`."""
    left_out = [("num_bad_rows", "malformed"), ("too_long", "too long"), ("no_supervised", "without an answer")]
    left_out += [("duplicates", "repeated")] * drops_duplicates
    return [
        *(f"left out {counts[key]:,} {why}" for key, why in left_out if counts[key]),
        *(f"{outcome} {counts[outcome]:,}" for outcome in ("truncated", "split") if counts[outcome]),
    ]


def describe_stream(config: Config, order: StreamOrder) -> list[str]:
    """How many streamed rows were kept and left out so far, one line per data set."""
    lines = []
    for dataset, counts in zip(config.data.datasets, order.counts, strict=True):
        if not counts.get("rows_read"):  # none of its rows has been read yet
            continue
        read = f"data: {dataset.path}: {counts['rows_kept']:,} of the {counts['rows_read']:,} rows read so far"
        lines += ["; ".join([read, *_phrases(counts, drops_duplicates=False)])]
        lines += too_long_warning(counts, config.data.sequence_len, drops_duplicates=False)
        lines += special_warning(counts["special_written"])
    return lines


def too_long_warning(counts: Mapping[str, Any], sequence_len: int, *, drops_duplicates: bool) -> list[str]:
    """A line if more than a twentieth of the rows (of those that a data set's rows make) were left out as too long;
    `counts` has the keys of `Counts`."""
    made = sum(counts[key] for key in ("rows_kept", "too_long", "no_supervised", *["duplicates"] * drops_duplicates))
    if counts["too_long"] <= 0.05 * made:
        return []
    return [
        f"warning: {counts['too_long'] / made:.0%} of the rows are longer than data.sequence_len {sequence_len} and "
        "were left out; raise it, or set data.excess_length: truncate (or, for plain text, split)"
    ]


def repetition_warning(report: DataReport | None) -> list[str]:
    """A line if dev rows were drawn from rows that contain duplicates."""
    if report is None or not report.duplicates or report.drop_duplicates:
        return []
    return [
        f"warning: {plural(report.duplicates, 'duplicate row')}, and dev rows are drawn from all rows, so that some "
        "may also be trained on; set data.drop_duplicates: true"
    ]


def special_warning(num_written: int, first: tuple[str, str] | None = None) -> list[str]:
    """A line if special tokens are written out in messages; `first`: (location, token)."""
    if not num_written:
        return []
    where = f" (the first is {first[0]} with {first[1]})" if first else ""
    return [
        f"warning: rows with a special token written out in a message: {num_written:,}{where}; the tokenizer takes "
        "it for the token itself, and an end of turn inside an answer teaches the model to stop there: remove them"
    ]
