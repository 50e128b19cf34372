"""A run's rows: tokenised or read from the cache, split into train and dev, ordered by step."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sora_llm.backbone import num_embeddings
from sora_llm.config import Config
from sora_llm.data.builtin_templates import DEFAULT_TEMPLATE
from sora_llm.data.chunks import Tokenizing
from sora_llm.data.dataset import TokenDataset
from sora_llm.data.order import EpochOrder, Order, split_validation
from sora_llm.data.prepare import default_cache_dir, prepare
from sora_llm.data.report import DataReport
from sora_llm.data.show import decoded
from sora_llm.data.sources import DatasetSpec, read_rows
from sora_llm.data.stream import StreamOrder, WindowTokenizer
from sora_llm.errors import UserError
from sora_llm.row_types import WITHOUT_TEMPLATE
from sora_llm.running.inputs import Inputs
from sora_llm.topology import World

_HEAD_START_SECONDS = 2.0  # for a machine's first process, so that the one whose output is shown prepares the data


@dataclass(frozen=True)
class TrainingData:
    """Train and dev rows as tokens, and reports on how the files' rows were processed.

    `train` and its report are None if rows are streamed, `dev` if there are no dev rows, its report also if dev rows
    were held out.
    """

    train: TokenDataset | None
    dev: TokenDataset | None
    train_report: DataReport | None
    dev_report: DataReport | None

    def fingerprint(self, order: Order) -> dict[str, int | str]:
        """What a checkpoint records about the rows: training on other rows would be another run, and dev losses over
        other rows are not comparable.  For a stream it is the current window, the first one before a run has begun."""
        if self.train is None or self.train_report is None:
            assert isinstance(order, StreamOrder)
            found: dict[str, int | str] = {"digest": order.digest}
        else:
            found = {"rows": len(self.train), "tokens": self.train.num_tokens, "digest": self.train_report.digest}
        if self.dev_report is not None:
            found["dev_digest"] = self.dev_report.digest
        elif self.dev is not None:
            found |= {"dev_rows": len(self.dev), "dev_tokens": self.dev.num_tokens}
        return found


def differing_parts(one: Mapping[str, int | str], other: Mapping[str, int | str]) -> str:
    """How two fingerprints differ, in words: "rows of data.datasets (24 now, 25 then) are"; "" if they do not.  Keys
    that only one of them has are not compared."""
    odd = [key for key in one.keys() & other.keys() if one[key] != other[key]]
    if not odd:
        return ""
    is_dev = all(key.startswith("dev_") for key in odd)
    counted = "dev_rows" if is_dev else "rows"
    numbers = f" ({other[counted]:,} now, {one[counted]:,} then)" if counted in odd else ""
    return f"rows of {'data.val_datasets' if is_dev else 'data.datasets'}{numbers} are"


def load_data(config: Config, inputs: Inputs, world: World) -> TrainingData:
    """Tokenise, or read the cache.  Not a collective: processes wait for the one that writes, however long it takes.

    Raises:
        UserError: bad rows, nothing to train on, fewer rows than processes.
    """
    train, report = None, None
    if not config.data.datasets[0].streaming:  # all are streamed or none is
        train, report = prepare_rows(config, inputs, inputs.datasets, world)
    dev, dev_report = None, None
    if inputs.val_datasets:
        dev, dev_report = prepare_rows(config, inputs, inputs.val_datasets, world)
    elif train is not None and config.data.val_set_size is not None:
        train, dev = split_validation(train, config.data.val_set_size, config.train.seed)
    if train is not None:
        _check_sources(config, train)
    if train is not None and len(train) < world.num_processes:
        raise UserError(
            f"data.datasets has {len(train)} rows to train on, fewer than the {world.num_processes} processes; "
            "launch fewer processes, or add data"
        )
    return TrainingData(train, dev, report, dev_report)


def _check_sources(config: Config, train: TokenDataset) -> None:
    """UserError if a data set of a mixture has no row left once dev rows are held out."""
    for index, dataset in enumerate(config.data.datasets):
        if dataset.weight is not None and not (train.sources == index).any():
            raise UserError(
                f"data.datasets.{index} ({dataset.path}) has a weight but no row of it is left to train on; add rows, "
                "or make data.val_set_size smaller"
            )


def prepare_rows(
    config: Config, inputs: Inputs, specs: Sequence[DatasetSpec], world: World
) -> tuple[TokenDataset, DataReport]:
    """The rows of some data sets with the config's options; a machine's first process goes first."""
    return prepare(
        tokenizing(config, inputs, specs),
        max_bad_row_fraction=config.data.max_bad_row_fraction,
        num_proc=config.data.num_proc,
        cache_dir=config.data.cache_dir,
        wait_first=_HEAD_START_SECONDS if world.local_process_index else 0.0,
    )


def tokenizing(config: Config, inputs: Inputs, specs: Sequence[DatasetSpec]) -> Tokenizing:
    """How the config turns the rows of `specs` into tokens, in the form that `prepare` takes."""
    data = config.data
    return Tokenizing(
        tuple(specs),
        inputs.tokenizer,
        inputs.chat_template,
        train_on_inputs=data.train_on_inputs,
        train_on_last_turn_only=data.train_on_last_turn_only,
        sequence_len=data.sequence_len,
        excess_length=data.excess_length,
        drop_duplicates=data.drop_duplicates,
        num_embeddings=num_embeddings(inputs.skeleton),
    )


@contextlib.contextmanager
def training_order(config: Config, inputs: Inputs, data: TrainingData, rows_per_step: int) -> Iterator[Order]:
    """Context with the order of training: which rows each optimizer step takes.  At its end the processes end that
    tokenise a stream; they are forked at its beginning, so that is to come before devices and process groups.

    Raises:
        UserError: a stream that cannot be read, or whose first rows cannot be used.
    """
    weights = [dataset.weight for dataset in config.data.datasets if dataset.weight is not None]
    mixture = weights or None
    pack_to = config.data.sequence_len if config.data.sample_packing else None
    if data.train is not None:
        yield EpochOrder(data.train, rows_per_step, config.train.seed, pack_to, mixture)
        return
    work, options = tokenizing(config, inputs, inputs.datasets), config.data
    with contextlib.closing(WindowTokenizer(work, options.max_bad_row_fraction, options.num_proc)) as tokenizer:
        sources = [functools.partial(read_rows, spec) for spec in inputs.datasets]
        order = StreamOrder(sources, tokenizer, rows_per_step, config.train.seed, pack_to, mixture)
        order.sample()  # so that errors in the first window are raised now
        yield order


def data_report(config: Config, inputs: Inputs, data: TrainingData) -> dict[str, Any]:
    """A human-readable report on the data, as JSON: rows, lengths, masks, losses, some rows decoded."""

    def section(rows: TokenDataset | None, report: DataReport | None) -> dict[str, Any] | None:
        if report is None:
            return None
        whole = TokenDataset.load(Path(report.cache_folder)) if report.cache_folder else rows
        assert whole is not None
        samples = [
            {
                "row": row,
                "tokens": int(whole.lengths[row]),
                "supervised_tokens": int(whole.supervised_lengths[row]),
                "segments": decoded(whole[row], inputs.tokenizer),
            }
            for row in report.samples
        ]
        return report.to_json() | {"samples": samples}

    return {
        "chat_template": _template_name(config, inputs),
        "sequence_len": config.data.sequence_len,
        "sample_packing": config.data.sample_packing,
        "cache": config.data.cache_dir or str(default_cache_dir()),
        "train": section(data.train, data.train_report),
        "dev": section(data.dev, data.dev_report),
        "held_out": None if data.dev is None or data.dev_report else len(data.dev),
    }


def is_of_other_rows(
    saved: Mapping[str, Any], config: Config, inputs: Inputs, now: DataReport, name: str = "train"
) -> bool:
    """Whether a `data_report`'s section `name`, train or dev, describes rows that differ from the present ones; False
    if the report was made with another template or length."""
    told = {"chat_template": _template_name(config, inputs), "sequence_len": config.data.sequence_len}
    section = saved.get(name)
    digest = section.get("digest") if isinstance(section, dict) else None
    return digest not in (None, now.digest) and told.items() <= saved.items()


def _template_name(config: Config, inputs: Inputs) -> str | None:
    """The name of the chat template; None if no data set needs one."""
    if all(spec.type in WITHOUT_TEMPLATE for spec in (*inputs.datasets, *inputs.val_datasets)):
        return None
    own = "the tokenizer's" if inputs.chat_template == inputs.tokenizer.chat_template else DEFAULT_TEMPLATE
    return config.data.chat_template or own
