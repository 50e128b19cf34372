"""Prepared data: counts and cache, order and shares, batches."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from test_data_formats import ALPACA, REAL_FILES, SHARED, json_lines, needs_data, write
from test_data_tokenize import byte_tokenizer, needs_models
from transformers import AutoTokenizer

from sora_llm.data import loader
from sora_llm.data.formats import DatasetSpec
from sora_llm.data.loader import (
    DataReport,
    TokenDataset,
    collate,
    default_cache_dir,
    epoch_order,
    prepare,
    share,
    split_validation,
    step_rows,
    steps_per_epoch,
)
from sora_llm.errors import RunFailed, UserError

TEXTS = [{"text": letter * 3} for letter in "abcdefghij"]  # 5 tokens each with BOS and eos


@pytest.fixture(scope="module")
def byte():
    return byte_tokenizer()


def texts(folder: Path, *rows: object, name: str = "a.jsonl") -> DatasetSpec:
    return DatasetSpec(write(folder / name, json_lines(*rows)), "completion")


@pytest.fixture
def prepared(tmp_path, byte):
    """Ten rows, their report, and the function to prepare others with the same cache."""

    def prepare_texts(*rows: object, **options: object) -> tuple[TokenDataset, DataReport]:
        return prepare([texts(tmp_path, *rows)], byte, cache_dir=tmp_path / "cache", **options)  # type: ignore[arg-type]

    return prepare_texts


def decoded(dataset: TokenDataset, tokenizer) -> list[str]:
    return [tokenizer.decode(dataset[i][0]) for i in range(len(dataset))]


# ----- preparation ----------------------------------------------------------------------------------------------------


def test_rows_come_back_in_order_with_masks_lengths_and_counts(prepared, byte):
    dataset, report = prepared({"text": "ab"}, {"text": "cdef"})
    assert decoded(dataset, byte) == ["<bos>ab<eos>", "<bos>cdef<eos>"]
    ids, supervised = dataset[1]
    assert ids.dtype == np.int32 and supervised.tolist() == [False, True, True, True, True, True]
    assert dataset.lengths.tolist() == [4, 6] and dataset.num_tokens == 10 and dataset.num_supervised == 8
    assert dataset.supervised_lengths.tolist() == [3, 5]
    assert (report.rows_read, report.rows_kept, report.tokens, report.supervised_tokens) == (2, 2, 10, 8)
    assert report.max_length == 6 and json.loads(json.dumps(report.to_json()))["tokens"] == 10


def test_several_data_sets_follow_each_other_each_read_in_its_own_way(tmp_path, byte):
    specs = [
        texts(tmp_path, {"text": "ab"}),
        DatasetSpec(write(tmp_path / "b.json", json.dumps([ALPACA])), "alpaca"),
        DatasetSpec(write(tmp_path / "c.csv", "prompt,completion\nx,y\n"), "prompt_completion", separator=":"),
    ]
    dataset, _ = prepare(specs, byte, chat_template="llama-2", cache_dir=tmp_path / "cache")
    assert decoded(dataset, byte) == ["<bos>ab<eos>", "<bos>[INST] Add.\n\n1 2 [/INST] 3 <eos>", "<bos>x:y<eos>"]
    assert dataset.supervised_lengths.tolist() == [3, 4, 2]


def test_options_reach_the_masks(tmp_path, byte):
    turns = [{"role": role, "content": "x"} for role in ("user", "assistant") * 2]
    spec = DatasetSpec(write(tmp_path / "a.jsonl", json_lines({"messages": turns})), "messages")
    cases = {(): 4, ("train_on_last_turn_only",): 2}
    for options, count in cases.items():
        dataset, _ = prepare([spec], byte, cache_dir=tmp_path, **dict.fromkeys(options, True))
        assert dataset.num_supervised == count
    dataset, _ = prepare([spec], byte, cache_dir=tmp_path, train_on_inputs=True)
    assert dataset.num_supervised == dataset.num_tokens - 1


def test_rows_that_are_too_long_are_dropped_truncated_or_named(prepared, byte, tmp_path):
    rows = {"text": "abc"}, {"text": "abcdefgh"}
    dataset, report = prepared(*rows, sequence_len=5)
    assert decoded(dataset, byte) == ["<bos>abc<eos>"] and report.too_long == 1
    dataset, report = prepared(*rows, sequence_len=5, excess_length="truncate")
    assert decoded(dataset, byte) == ["<bos>abc<eos>", "<bos>abcd"] and report.truncated == 1
    with pytest.raises(UserError, match=r"a.jsonl:2 has 10 tokens, more than data.sequence_len = 5"):
        prepared(*rows, sequence_len=5, excess_length="error")
    assert [path for path in (tmp_path / "cache").iterdir() if ".tmp-" in path.name] == []


def test_a_row_that_truncation_leaves_without_an_answer_is_dropped_and_counted(tmp_path, byte):
    rows = json_lines({"prompt": "abcdef", "completion": "g"}, {"prompt": "a", "completion": "b"})
    spec = DatasetSpec(write(tmp_path / "a.jsonl", rows), "prompt_completion")
    dataset, report = prepare([spec], byte, sequence_len=5, excess_length="truncate", cache_dir=tmp_path)
    assert len(dataset) == 1 and report.no_supervised == 1 and (dataset.supervised_lengths > 0).all()


def test_repeated_rows_are_counted_and_dropped_on_request(prepared, byte):
    rows = {"text": "a"}, {"text": "b"}, {"text": "a"}, {"text": "a"}
    dataset, report = prepared(*rows)
    assert len(dataset) == 4 and report.duplicates == 2
    dataset, report = prepared(*rows, drop_duplicates=True)
    assert decoded(dataset, byte) == ["<bos>a<eos>", "<bos>b<eos>"] and report.duplicates == 2


def test_few_bad_rows_are_reported_and_many_stop_the_run(prepared, tmp_path):
    rows = {"text": "a"}, {"other": 1}, {"text": "b"}, {"text": 3}
    path = tmp_path / "a.jsonl"
    dataset, report = prepared(*rows, max_bad_row_fraction=0.5)
    assert len(dataset) == 2 and report.num_bad_rows == 2
    assert report.bad_rows == ((f"{path}:2", "text is missing"), (f"{path}:4", "text is a number, not text"))
    with pytest.raises(UserError, match=r"2 of 4 rows .*a.jsonl:2: text is missing; .*a.jsonl:4: text is a number"):
        prepared(*rows, max_bad_row_fraction=0.49)


def test_no_bad_row_is_allowed_at_fraction_0(prepared):
    with pytest.raises(UserError, match="1 of 301 rows"):
        prepared({"text": ""}, *TEXTS * 30, max_bad_row_fraction=0.0)
    assert prepared({"text": ""}, *TEXTS * 30)[1].num_bad_rows == 1


def test_the_list_of_bad_rows_is_bounded_and_their_count_is_not(prepared):
    _, report = prepared(*[{"text": ""}] * 50, {"text": "a"}, max_bad_row_fraction=1.0)
    assert report.num_bad_rows == 50 and len(report.bad_rows) == 20


def test_nothing_left_to_train_on_is_refused_with_the_counts(prepared, tmp_path, byte):
    with pytest.raises(UserError, match=r"none of the 10 rows .*: 10 are longer than data.sequence_len = 4"):
        prepared(*TEXTS, sequence_len=4)
    rows = json_lines({"messages": [{"role": "user", "content": "a"}]})
    spec = DatasetSpec(write(tmp_path / "chat.jsonl", rows), "messages")
    with pytest.raises(UserError, match="1 have no supervised token"):
        prepare([spec], byte, cache_dir=tmp_path)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"train_on_inputs": True, "train_on_last_turn_only": True}, "exclude each other"),
        ({"sequence_len": 1}, "at least 2 tokens"),
        ({"excess_length": "cut"}, "known are drop, truncate and error"),
        ({"num_proc": 0}, "at least 1"),
        ({"chat_template": "vicunja"}, "neither a built-in template"),
    ],
)
def test_options_that_make_no_sense_are_refused(prepared, options, match):
    with pytest.raises(UserError, match=match):
        prepared(*TEXTS, **options)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no eos token"):
        prepare([texts(tmp_path, *TEXTS)], tokenizer, cache_dir=tmp_path)


# ----- the cache ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fills(monkeypatch):
    """How often tokens were made rather than taken from the cache."""
    calls = []
    fill = loader._fill_cache
    monkeypatch.setattr(loader, "_fill_cache", lambda *args: (calls.append(args), fill(*args)))
    return calls


def test_the_same_is_prepared_once(prepared, fills):
    first, report = prepared(*TEXTS)
    second, report_again = prepared(*TEXTS)
    assert len(fills) == 1 and report_again == report
    assert all((first[i][0] == second[i][0]).all() for i in range(10))


def test_whatever_changes_the_tokens_prepares_anew(prepared, fills, tmp_path, byte):
    prepared(*TEXTS)
    prepared(*TEXTS[:-1], {"text": "jjx"})
    prepared(*TEXTS, sequence_len=100)
    prepared(*TEXTS, train_on_inputs=True)
    prepared(*TEXTS, chat_template="chatml")
    prepared(*TEXTS, drop_duplicates=True)
    spec = texts(tmp_path, *TEXTS)
    for tokenizer in (byte_tokenizer(adds_bos=False), byte_tokenizer(merges=(("a", "a"),))):
        prepare([spec], tokenizer, cache_dir=tmp_path / "cache")
    assert len(fills) == 8
    prepared(*TEXTS, num_proc=2, max_bad_row_fraction=0.5)
    assert len(fills) == 8, "neither processes nor the bound on bad rows change a token"


def test_cached_data_is_still_checked_for_bad_rows(prepared):
    rows = {"text": "a"}, {"text": ""}
    prepared(*rows, max_bad_row_fraction=0.5)
    with pytest.raises(UserError, match="1 of 2 rows"):
        prepared(*rows, max_bad_row_fraction=0.1)


@pytest.mark.parametrize("file", ["tokens.bin", "supervised.bin", "lengths.npy", "report.json"])
def test_a_damaged_cache_is_named_and_not_trained_on(prepared, tmp_path, file):
    prepared(*TEXTS)
    damaged = next((tmp_path / "cache").glob(f"*/{file}"))
    damaged.write_bytes(damaged.read_bytes()[: damaged.stat().st_size // 2])
    with pytest.raises(UserError, match=r"is damaged: delete this folder"):
        prepared(*TEXTS)


def test_a_cache_that_cannot_be_written_is_refused(tmp_path, byte):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot be written .*: set data.cache_dir"):
        prepare([texts(tmp_path, *TEXTS)], byte, cache_dir=tmp_path / "file")


def test_the_cache_is_in_the_user_s_cache_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / "sora_llm" / "data"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert default_cache_dir() == tmp_path / ".cache" / "sora_llm" / "data"


def test_the_slower_of_two_processes_takes_what_the_faster_has_written(prepared, tmp_path, monkeypatch):
    fill = loader._fill_cache

    def overtaken(*args: object) -> None:
        monkeypatch.setattr(loader, "_fill_cache", fill)
        prepared(*TEXTS)
        fill(*args)

    monkeypatch.setattr(loader, "_fill_cache", overtaken)
    assert len(prepared(*TEXTS)[0]) == 10
    assert len(list((tmp_path / "cache").iterdir())) == 1


def _prepare_in_process(folder: Path, barrier, results) -> None:
    barrier.wait(timeout=60)
    spec = DatasetSpec(str(folder / "a.jsonl"), "completion")
    dataset, _ = prepare([spec], byte_tokenizer(), cache_dir=folder / "cache", num_proc=1)
    results.put(decoded(dataset, byte_tokenizer()))


def test_many_processes_may_prepare_the_same_at_once(tmp_path):
    texts(tmp_path, *TEXTS * 20)
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    processes = [context.Process(target=_prepare_in_process, args=(tmp_path, barrier, results)) for _ in range(4)]
    for process in processes:
        process.start()
    rows = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(timeout=60)
        assert process.exitcode == 0
    assert all(row == rows[0] and len(row) == 200 for row in rows)
    assert len(list((tmp_path / "cache").iterdir())) == 1, "one finished folder and no temporary ones"


# ----- several processes that tokenise --------------------------------------------------------------------------------


def test_the_number_of_processes_changes_nothing(tmp_path, byte, monkeypatch):
    monkeypatch.setattr(loader, "_SERIAL_ROWS", 100)
    monkeypatch.setattr(loader, "_CHUNK_ROWS", 7)
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    spec = texts(tmp_path, *[{"text": str(i)} if i % 9 else {"text": ""} for i in range(500)])
    options = {"max_bad_row_fraction": 1.0}
    one, report_one = prepare([spec], byte, num_proc=1, cache_dir=tmp_path / "1", **options)
    two, report_two = prepare([spec], byte, num_proc=2, cache_dir=tmp_path / "2", **options)
    assert report_one == report_two and report_one.num_bad_rows == 56
    assert decoded(one, byte) == decoded(two, byte)
    assert "TOKENIZERS_PARALLELISM" not in os.environ


def test_a_row_that_stops_the_run_ends_the_processes_as_well(tmp_path, byte, monkeypatch):
    monkeypatch.setattr(loader, "_SERIAL_ROWS", 10)
    monkeypatch.setattr(loader, "_CHUNK_ROWS", 3)
    spec = texts(tmp_path, *TEXTS * 10)
    with pytest.raises(UserError, match=r"a\.jsonl:1 has 5 tokens") as stopped:
        prepare([spec], byte, num_proc=2, sequence_len=4, excess_length="error", cache_dir=tmp_path / "cache")
    assert stopped.tb is not None, "a caller who keeps the traceback keeps the generators"
    assert multiprocessing.active_children() == []


def test_a_killed_process_ends_the_run_with_a_sentence(tmp_path, byte, monkeypatch):
    monkeypatch.setattr(loader, "_SERIAL_ROWS", 10)
    monkeypatch.setattr(loader, "_tokenize_chunk", _die)
    with pytest.raises(RunFailed, match=r"was killed.*data.num_proc=1"):
        prepare([texts(tmp_path, *TEXTS * 2)], byte, num_proc=2, cache_dir=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []


def _die(chunk: list) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


# ----- train and dev --------------------------------------------------------------------------------------------------


def test_train_and_dev_are_disjoint_complete_and_drawn_by_the_seed(prepared, byte):
    dataset, _ = prepared(*TEXTS)
    train, dev = split_validation(dataset, 3, seed=1)
    assert (len(train), len(dev)) == (7, 3)
    assert sorted(decoded(train, byte) + decoded(dev, byte)) == decoded(dataset, byte)
    assert decoded(split_validation(dataset, 3, seed=1)[1], byte) == decoded(dev, byte)
    assert any(decoded(split_validation(dataset, 3, seed=seed)[1], byte) != decoded(dev, byte) for seed in (2, 3))
    assert dev.num_tokens == 15 and dev.num_supervised == 12 and dev.lengths.tolist() == [5, 5, 5]


@pytest.mark.parametrize(("size", "count"), [(0.2, 2), (0.25, 2), (0.01, 1), (1, 1), (9, 9), (3.0, 3)])
def test_below_1_the_dev_set_is_a_fraction_and_else_a_count(prepared, size, count):
    assert len(split_validation(prepared(*TEXTS)[0], size, seed=0)[1]) == count


@pytest.mark.parametrize("size", [0, -1, 1.5, 10, 11, 0.99])
def test_a_dev_set_of_an_impossible_size_is_refused(prepared, size):
    with pytest.raises(UserError, match="val_set_size"):
        split_validation(prepared(*TEXTS)[0], size, seed=0)


# ----- order ----------------------------------------------------------------------------------------------------------


def test_an_epoch_s_order_is_a_permutation_that_depends_on_seed_and_epoch_alone():
    order = epoch_order(100, 1, 0)
    assert sorted(order) == list(range(100))
    epoch_order.cache_clear()
    assert (epoch_order(100, 1, 0) == order).all()
    assert (epoch_order(100, 1, 1) != order).any() and (epoch_order(100, 2, 0) != order).any()
    # Fixed for ever: a run that is resumed with another version must not see other rows.
    assert epoch_order(10, 42, 3).tolist() == [4, 3, 7, 2, 5, 1, 9, 8, 0, 6]


def test_the_steps_of_an_epoch_cover_it_and_never_cross_it():
    assert steps_per_epoch(10, 4) == 3 and steps_per_epoch(8, 4) == 2 and steps_per_epoch(3, 8) == 1
    for epoch in range(3):
        steps = [step_rows(10, 4, seed=5, step=3 * epoch + i) for i in range(3)]
        assert [len(rows) for rows in steps] == [4, 4, 2]
        assert sum(steps, []) == epoch_order(10, 5, epoch).tolist()  # noqa: RUF017
    assert sorted(step_rows(3, 8, seed=0, step=7)) == [0, 1, 2], "a batch larger than the data is no error"


@pytest.mark.parametrize("num_rows", [*range(1, 18), 64])
@pytest.mark.parametrize(("num_processes", "micro_batch_size"), [(1, 8), (2, 4), (4, 2), (8, 1), (1, 1), (3, 2)])
def test_the_shares_of_a_step_hold_every_row_once_in_equally_many_micro_batches(
    num_rows, num_processes, micro_batch_size
):
    rows = list(range(100, 100 + num_rows))
    shares = [share(rows, process, num_processes, micro_batch_size) for process in range(num_processes)]
    assert sorted(row for micro_batches in shares for batch in micro_batches for row in batch) == rows
    assert len({len(micro_batches) for micro_batches in shares}) == 1
    assert len(shares[0]) == -(-num_rows // (num_processes * micro_batch_size))
    assert all(len(batch) <= micro_batch_size for micro_batches in shares for batch in micro_batches)


@pytest.mark.parametrize(("num_processes", "micro_batch_size"), [(1, 8), (2, 4), (4, 2)])
def test_a_full_step_has_the_configured_micro_batches_whatever_the_split(num_processes, micro_batch_size):
    gradient_accumulation_steps = 3
    rows = step_rows(100, num_processes * micro_batch_size * gradient_accumulation_steps, seed=0, step=1)
    for process in range(num_processes):
        sizes = [len(batch) for batch in share(rows, process, num_processes, micro_batch_size)]
        assert sizes == [micro_batch_size] * gradient_accumulation_steps


@pytest.mark.parametrize("num_rows", [24, 21, 3])
def test_summed_loss_over_any_split_is_that_of_one_process(prepared, num_rows):
    """1 × 8 ≡ 2 × 4 ≡ 4 × 2: cross-entropy of a fixed next-token table, summed over all micro-batches."""
    dataset, _ = prepared(*[{"text": "ab" * (i % 5 + 1)} for i in range(24)])
    table = torch.randn(300, 300, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss_and_targets(num_processes: int, micro_batch_size: int) -> tuple[float, int]:
        loss, targets = 0.0, 0
        for process in range(num_processes):
            for rows in share(range(num_rows), process, num_processes, micro_batch_size):
                batch = collate([dataset[row] for row in rows], pad_id=0)
                labels = batch["labels"][:, 1:].flatten()
                logits = table[batch["input_ids"][:, :-1].flatten()]
                loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
                targets += int((labels != -100).sum())
        return loss, targets

    loss, targets = loss_and_targets(1, 8)
    assert targets == dataset.supervised_lengths[:num_rows].sum()
    for split in ((2, 4), (4, 2), (8, 1)):
        assert loss_and_targets(*split) == (pytest.approx(loss, rel=1e-12), targets)  # the order of a float64 sum


# ----- batches --------------------------------------------------------------------------------------------------------


def test_a_batch_is_padded_on_the_right_and_masked_by_position():
    pad = eos = 2
    batch = collate([([1, 5, eos], [False, True, True]), ([1, eos], [False, True])], pad_id=pad)
    assert batch["input_ids"].tolist() == [[1, 5, 2], [1, 2, 2]]
    assert batch["labels"].tolist() == [[-100, 5, 2], [-100, 2, -100]], "eos is supervised, padding is not"
    assert set(batch) == {"input_ids", "labels"}
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.int64


def test_a_batch_can_be_padded_to_a_given_length():
    batch = collate([([1, 5], [False, True])], pad_id=0, pad_to=4)
    assert batch["input_ids"].tolist() == [[1, 5, 0, 0]] and batch["labels"].tolist() == [[-100, 5, -100, -100]]
    with pytest.raises(AssertionError, match="does not fit"):
        collate([([1, 5], [False, True])], pad_id=0, pad_to=1)


def test_no_rows_give_a_batch_of_zero_weight():
    batch = collate([], pad_id=7)
    assert batch["input_ids"].tolist() == [[7, 7]] and batch["labels"].tolist() == [[-100, -100]]


# ----- the real files -------------------------------------------------------------------------------------------------


@needs_data
@needs_models
@pytest.mark.parametrize(("file", "columns", "count"), REAL_FILES[1:])
@pytest.mark.parametrize("model", ["base5m", "stories260k"])
def test_the_real_files_are_prepared_whole(tmp_path, file, columns, count, model):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / model)
    spec = DatasetSpec(str(SHARED / "data" / file[0]), file[1], columns=columns)
    dataset, report = prepare([spec], tokenizer, sequence_len=8192, cache_dir=tmp_path)
    assert report.num_bad_rows == report.no_supervised == report.too_long == 0
    assert len(dataset) == report.rows_read and report.tokens == dataset.num_tokens > 0
    for row in range(0, len(dataset), 50):
        ids, supervised = dataset[row]
        assert ids[0] == tokenizer.bos_token_id and (ids == tokenizer.bos_token_id).sum() == 1
        assert ids[-1] == tokenizer.eos_token_id and supervised[-1] and not supervised[0]


@needs_data
@needs_models
def test_gsm8k_has_the_known_number_of_tokens(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "base5m")
    columns = {"prompt": "question", "completion": "answer"}
    spec = DatasetSpec(str(SHARED / "data" / "gsm8k_train.jsonl"), "prompt_completion", columns=columns)
    dataset, _ = prepare([spec], tokenizer, sequence_len=1024, cache_dir=tmp_path)
    assert len(dataset) == 7473 and round(dataset.num_tokens / len(dataset)) == 238  # its README: 237 and our eos
