"""Preparation: files → tokens, and a report that says what became of every row."""

import json
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import shared
from conversations import byte_tokenizer
from data_files import ALPACA, json_lines, write
from preparing import TEXTS, decoded, run, texts
from preparing import fills as fills
from preparing import prepared as prepared
from transformers import AutoTokenizer

from sora_llm.data import chunks, prepare
from sora_llm.data.chunks import Tokenizing
from sora_llm.data.order import fill_rate
from sora_llm.data.report import DataReport, length_histogram
from sora_llm.data.sources import DatasetSpec
from sora_llm.errors import UserError

QUESTION = {"role": "user", "content": "Hi"}
ANSWER = {"role": "assistant", "content": "Hello"}


def chats(folder: Path, *conversations: list, name: str = "chats.jsonl") -> DatasetSpec:
    rows = [{"messages": messages} for messages in conversations]
    return DatasetSpec(write(folder / name, json_lines(*rows)), "messages")


# ----- rows -----------------------------------------------------------------------------------------------------------


def test_rows_come_back_in_order_with_weights_lengths_and_counts(prepared, byte):
    dataset, report = prepared({"text": "ab"}, {"text": "cdef"})
    assert decoded(dataset, byte) == ["<bos>ab<eos>", "<bos>cdef<eos>"]
    ids, weights = dataset[1]
    assert ids.dtype == np.int32 and weights.dtype == np.float32 and weights.tolist() == [0, 1, 1, 1, 1, 1]
    assert dataset.lengths.tolist() == [4, 6] and dataset.num_tokens == 10 and dataset.num_supervised == 8
    assert dataset.supervised_lengths.tolist() == [3, 5] and dataset.weight_sums.tolist() == [3, 5]
    assert (report.rows_read, report.rows_kept, report.tokens, report.supervised_tokens) == (2, 2, 10, 8)
    assert report.supervised_fraction == 0.8


def test_several_data_sets_follow_each_other_each_read_in_its_own_way(tmp_path, byte):
    specs = [
        texts(tmp_path, {"text": "ab"}),
        DatasetSpec(write(tmp_path / "b.json", json.dumps([ALPACA])), "alpaca"),
        DatasetSpec(write(tmp_path / "c.csv", "prompt,completion\nx,y\nx,\nx,z\n"), "prompt_completion", separator=":"),
    ]
    dataset, report = run(specs, byte, chat_template="llama-2", cache_dir=tmp_path / "cache", max_bad_row_fraction=0.5)
    assert decoded(dataset, byte) == [
        "<bos>ab<eos>",
        "<bos>[INST] Add.\n\n1 2 [/INST] 3 <eos>",
        "<bos>x:y<eos>",
        "<bos>x:z<eos>",
    ]
    assert dataset.sources.tolist() == [0, 1, 2, 2] and dataset.supervised_lengths.tolist() == [3, 4, 2, 2]
    of_each = [(one.type, one.rows_read, one.rows_kept, one.num_bad_rows, one.tokens) for one in report.datasets]
    assert of_each == [("completion", 1, 1, 0, 4), ("alpaca", 1, 1, 0, 29), ("prompt_completion", 3, 2, 1, 10)]
    assert [one.path for one in report.datasets] == [spec.path for spec in specs]
    assert (report.rows_read, report.rows_kept, report.num_bad_rows, report.tokens) == (5, 4, 1, 43)


def test_a_row_may_hold_several_examples_and_is_left_out_whole_if_one_is_bad(tmp_path, byte):
    good = {"instruction": "Add.", "instances": [{"input": "1", "output": "2"}, {"input": "3", "output": "4"}]}
    bad = {"instruction": "Add.", "instances": [{"input": "1", "output": "2"}, {"input": "3"}]}
    spec = DatasetSpec(write(tmp_path / "a.jsonl", json_lines(good, bad)), "self_instruct")
    dataset, report = run([spec], byte, cache_dir=tmp_path, max_bad_row_fraction=0.5)
    assert (len(dataset), report.rows_read, report.rows_kept, report.num_bad_rows) == (2, 2, 2, 1)
    refused = {"instruction": "Add.", "instances": [{"input": "", "output": "2"}, {"input": "", "output": "bad"}]}
    template = (
        "{%- for m in messages -%}{{ raise_exception('bad') if m.content == 'bad' else m.content }}{%- endfor -%}"
    )
    spec = DatasetSpec(write(tmp_path / "b.jsonl", json_lines(good, refused)), "self_instruct")
    options = {"chat_template": write(tmp_path / "own.jinja", template), "max_bad_row_fraction": 0.5}
    dataset, report = run([spec], byte, cache_dir=tmp_path, **options)
    assert (len(dataset), report.num_bad_rows, report.bad_rows[0][0]) == (2, 1, f"{spec.path}:2")


def test_options_reach_the_weights(tmp_path, byte):
    spec = chats(tmp_path, [QUESTION, ANSWER] * 2)
    counts = {}
    for option in (None, "train_on_last_turn_only", "train_on_inputs"):
        options = {} if option is None else {option: True}
        dataset, _ = run([spec], byte, cache_dir=tmp_path, **options)
        counts[option] = dataset.num_supervised
    assert counts[None] == 2 * counts["train_on_last_turn_only"] == 12
    assert counts["train_on_inputs"] == dataset.num_tokens - 1


def test_rows_that_are_too_long_are_dropped_or_truncated_or_the_first_is_named(prepared, byte, fills, tmp_path):
    rows = {"text": "abc"}, {"text": "abcdefgh"}, {"text": "abcdefghi"}
    place = f"{tmp_path / 'a.jsonl'}:2"
    dataset, report = prepared(*rows, sequence_len=5)
    assert decoded(dataset, byte) == ["<bos>abc<eos>"] and (report.too_long, report.truncated) == (2, 0)
    assert report.first_too_long == (place, 10)
    dataset, report = prepared(*rows, sequence_len=5, excess_length="truncate")
    assert decoded(dataset, byte) == ["<bos>abc<eos>", "<bos>abcd", "<bos>abcd"]
    assert (report.too_long, report.truncated, report.first_too_long) == (0, 2, (place, 10))
    for _ in range(2):
        with pytest.raises(UserError, match=r"a.jsonl:2 has 10 tokens, more than data.sequence_len = 5"):
            prepared(*rows, sequence_len=5, excess_length="error")
    assert len(fills) == 3, "the second time the error is in the report"


def test_long_plain_text_is_split_so_that_every_token_is_predicted_once(prepared, byte, tmp_path):
    dataset, report = prepared({"text": "abc"}, {"text": "abcdefgh"}, sequence_len=5, excess_length="split")
    assert decoded(dataset, byte) == ["<bos>abc<eos>", "<bos>abcd", "defgh", "h<eos>"]
    assert [list(dataset[i][1]) for i in range(len(dataset))] == [[0, 1, 1, 1, 1]] * 3 + [[0, 1]]
    assert (report.rows_kept, report.split, report.too_long, report.truncated) == (4, 1, 0, 0)
    rows = json_lines({"prompt": "abcdef", "completion": "g"}, {"prompt": "a", "completion": "b"})
    spec = DatasetSpec(write(tmp_path / "b.jsonl", rows), "prompt_completion")
    dataset, report = run([spec], byte, sequence_len=5, excess_length="split", cache_dir=tmp_path)
    assert len(dataset) == 1 and (report.split, report.too_long) == (0, 1), "a prompt is not torn from its answer"


def test_the_first_row_too_long_ends_the_reading_where_that_is_an_error(prepared, monkeypatch, tmp_path):
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 2)
    with pytest.raises(UserError, match=r"a\.jsonl:3 has 10 tokens"):
        prepared(*TEXTS[:2], {"text": "abcdefgh"}, *TEXTS, sequence_len=5, excess_length="error")
    report = DataReport.load(next((tmp_path / "cache").glob("*/")), from_cache=True)
    assert report.rows_read == 4


def test_a_row_that_truncation_leaves_without_an_answer_is_dropped_and_counted(tmp_path, byte):
    rows = json_lines({"prompt": "abcdef", "completion": "g"}, {"prompt": "a", "completion": "b"})
    spec = DatasetSpec(write(tmp_path / "a.jsonl", rows), "prompt_completion")
    dataset, report = run([spec], byte, sequence_len=5, excess_length="truncate", cache_dir=tmp_path)
    assert len(dataset) == 1 and report.no_supervised == 1 and (dataset.supervised_lengths > 0).all()
    assert report.datasets[0].unsupervised == {"the answer begins after sequence_len": 1}


def test_repeated_rows_are_counted_and_dropped_on_request_over_all_data_sets(tmp_path, byte):
    specs = [
        texts(tmp_path, {"text": "a"}, {"text": "b"}, {"text": "a"}),
        texts(tmp_path, {"text": "c"}, {"text": "b"}, name="b.jsonl"),
    ]
    dataset, report = run(specs, byte, cache_dir=tmp_path)
    assert len(dataset) == 5 and report.duplicates == 2
    dataset, report = run(specs, byte, cache_dir=tmp_path, drop_duplicates=True)
    assert decoded(dataset, byte) == ["<bos>a<eos>", "<bos>b<eos>", "<bos>c<eos>"] and report.duplicates == 2
    assert [(one.rows_kept, one.duplicates) for one in report.datasets] == [(2, 1), (1, 1)]


def test_equal_tokens_with_other_weights_are_no_duplicates(tmp_path, byte):
    silent = {**QUESTION, "weight": 0}
    spec = chats(tmp_path, [QUESTION, ANSWER, QUESTION, ANSWER], [QUESTION, {**ANSWER, "weight": 0}, silent, ANSWER])
    assert run([spec], byte, cache_dir=tmp_path)[1].duplicates == 0


def test_what_has_come_before_is_known_whatever_the_chunks():
    hashes = np.random.default_rng(0).integers(0, 300, 1000).astype(np.uint64)
    expected = [value in hashes[:i] for i, value in enumerate(hashes)]
    for size in (1, 7, 300, 1000):
        seen = prepare._SeenBefore()
        found = np.concatenate([seen.add(hashes[i : i + size]) for i in range(0, 1000, size)])
        assert found.tolist() == expected
        assert sum(map(len, seen._runs)) == len(set(hashes)), "each is kept once"
        assert len(seen._runs) <= 10, "so that looking one up stays cheap"


def test_a_chunk_is_cut_where_its_rows_are_long(monkeypatch):
    monkeypatch.setattr(chunks, "CHUNK_CHARACTERS", 100)
    rows = [(str(i), {"messages": [{"content": "x" * size}]}) for i, size in enumerate((10, 20, 80, 5, 200, 1))]
    assert [[place for place, _ in chunk] for chunk in chunks.in_chunks(rows)] == [["0", "1", "2"], ["3", "4"], ["5"]]


@pytest.mark.parametrize("num_proc", [pytest.param(1, marks=pytest.mark.matrix), 2])
def test_memory_grows_by_the_arrays_alone(tmp_path, byte, monkeypatch, num_proc):
    """A row costs 40 bytes while it is written (length, table, hash) and some while the report is made; a list of
    Python's numbers for each would take several times that."""
    spec = texts(tmp_path, *TEXTS)
    count = 0
    monkeypatch.setattr(prepare, "read_rows", lambda spec: ((f"a.jsonl:{i}", {"text": f"{i:x}"}) for i in range(count)))
    peaks = []
    for count in (4_000, 4_000, 20_000):  # noqa: B007 - the rows that are read; the first time warms caches up
        tracemalloc.start()
        run([spec], byte, num_proc=num_proc, cache_dir=tmp_path / f"{len(peaks)}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[2] - peaks[1]) / 16_000 < 150, peaks


# ----- rows that cannot be used ---------------------------------------------------------------------------------------


def test_few_bad_rows_are_reported_with_file_and_line_and_many_stop_the_run(prepared, tmp_path):
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


def test_the_list_of_bad_rows_is_bounded_and_their_count_is_not(prepared, tmp_path):
    lines = [json.dumps({"text": ""})] * 50 + ["{" + " " * i for i in range(1, 31)] + [json.dumps({"text": "a"})]
    (tmp_path / "b.jsonl").write_text("\n".join(lines))
    spec = DatasetSpec(str(tmp_path / "b.jsonl"), "completion")
    _, report = run([spec], byte_tokenizer(), cache_dir=tmp_path, max_bad_row_fraction=1.0)
    assert report.num_bad_rows == 80 and len(report.bad_rows) == 20
    with pytest.raises(UserError, match=r"\.\.\. \(sora-llm preprocess CONFIG data.max_bad_row_fraction=1 counts them"):
        run([spec], byte_tokenizer(), cache_dir=tmp_path)
    assert sorted(report.bad_reasons.values()) == [30, 50], "columns in a message do not make it another reason"


def test_nothing_left_to_train_on_is_refused_with_the_counts(prepared):
    with pytest.raises(UserError, match=r"none of the 10 rows .*: 10 are longer than data.sequence_len = 4"):
        prepared(*TEXTS, sequence_len=4)


@pytest.mark.parametrize(
    ("conversation", "why"),
    [
        ([QUESTION], "no assistant turn"),
        ([QUESTION, {**ANSWER, "weight": 0}], "every token to train on has weight 0"),
    ],
)
def test_a_data_set_without_a_supervised_token_is_named_with_the_reason(tmp_path, byte, fills, conversation, why):
    specs = [texts(tmp_path, *TEXTS), chats(tmp_path, conversation, conversation)]
    for _ in range(2):
        with pytest.raises(UserError, match=rf"chats.jsonl: none of the 2 rows .*2 × {why}"):
            run(specs, byte, cache_dir=tmp_path)
    assert len(fills) == 1


def test_a_data_set_of_which_only_repeated_rows_are_left_is_named(tmp_path, byte):
    specs = [texts(tmp_path, *TEXTS), texts(tmp_path, *TEXTS[:2], name="b.jsonl")]
    with pytest.raises(UserError, match=r"b.jsonl: none of the 2 rows .*2 are the same as earlier ones"):
        run(specs, byte, cache_dir=tmp_path, drop_duplicates=True)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"train_on_inputs": True, "train_on_last_turn_only": True}, "are mutually exclusive"),
        ({"sequence_len": 1}, "at least 2 tokens"),
        ({"excess_length": "cut"}, "known are drop, truncate, split, error"),
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
        run([texts(tmp_path, *TEXTS)], tokenizer, cache_dir=tmp_path)


# ----- the report -----------------------------------------------------------------------------------------------------


def test_the_report_describes_the_rows_that_are_left(prepared):
    dataset, report = prepared(*[{"text": "a" * n} for n in (1, 2, 3, 8, 30)], sequence_len=32)
    assert (report.max_length, report.mean_length, report.median_length) == (32, 10.8, 5.0)
    assert report.length_histogram == (
        (3, 3, 1),
        (4, 4, 1),
        (5, 6, 1),
        (7, 8, 0),
        (9, 12, 1),
        (13, 16, 0),
        (17, 24, 0),
        (25, 32, 1),
    )
    assert report.fill_rate == fill_rate(dataset, 32) == 54 / 64
    assert report.samples == (0, 2, 4)


def test_every_length_is_in_its_bin():
    lengths = np.arange(1, 3000)
    bins = length_histogram(lengths)
    assert all(rows == sum(low <= n <= high for n in lengths) for low, high, rows in bins)
    assert sum(rows for _, _, rows in bins) == len(lengths)
    assert [high for _, high, _ in bins][-3:] == [1536, 2048, 3072] and length_histogram(lengths[:0]) == ()


def test_a_report_survives_json(prepared):
    _, report = prepared({"text": ""}, *TEXTS, {"text": "a" * 99}, sequence_len=50, max_bad_row_fraction=1.0)
    assert DataReport.from_json(json.loads(json.dumps(report.to_json()))) == report


def test_the_digest_is_of_the_rows_however_they_were_cut_into_chunks(prepared, monkeypatch, tmp_path):
    _, report = prepared(*TEXTS)
    monkeypatch.setattr(chunks, "CHUNK_ROWS", 3)
    assert prepared(*TEXTS, cache_dir=tmp_path / "other")[1].digest == report.digest
    _, changed = prepared(*TEXTS[:-1], {"text": "jjx"})
    assert (changed.rows_kept, changed.tokens) == (report.rows_kept, report.tokens)
    assert changed.digest != report.digest
    assert prepared(*TEXTS[1:], TEXTS[0])[1].digest != report.digest, "another order is other training data"
    chunk = Tokenizing((texts(tmp_path, *TEXTS),), byte_tokenizer(), "").tokenize((0, [("a:1", TEXTS[0])] * 2))
    digests = set()
    for lengths in (chunk.lengths, chunk.lengths + np.array([1, -1])):
        digest = prepare._Digest()
        digest.add(replace(chunk, lengths=lengths))
        digests.add(digest.hex())
    assert len(digests) == 2, "the same tokens cut into other rows"


def test_a_row_with_a_token_that_the_base_lacks_is_bad(tmp_path):
    tokenizer = byte_tokenizer(special=("<new>",))
    work = Tokenizing((texts(tmp_path, *TEXTS),), tokenizer, "", num_embeddings=len(tokenizer) - 1)
    chunk = work.tokenize((0, [("a:1", TEXTS[0]), ("a:2", {"text": "a<new>b"})]))
    number = len(tokenizer) - 1
    assert len(chunk.lengths) == 1
    assert chunk.bad_rows == [
        ("a:2", f"its token '<new>' is number {number}, and the base has only {number} embeddings")
    ]


def test_the_digest_knows_from_which_data_set_a_row_comes(tmp_path, byte):
    """In a mixture the same rows under another weight are other training data."""
    digests = set()
    for cut in (1, 2):
        folder = tmp_path / str(cut)
        folder.mkdir()
        specs = [
            DatasetSpec(write(folder / f"{i}.jsonl", json_lines(*rows)), "completion")
            for i, rows in enumerate((TEXTS[:cut], TEXTS[cut:4]))
        ]
        digests.add(prepare.prepare(Tokenizing(tuple(specs), byte, ""), cache_dir=tmp_path / "cache")[1].digest)
    assert len(digests) == 2


def test_a_sample_takes_the_first_rows_of_each_data_set(tmp_path, byte):
    specs = [texts(tmp_path, *TEXTS), texts(tmp_path, *TEXTS[5:], name="b.jsonl")]
    dataset, report = prepare.sample(Tokenizing(tuple(specs), byte, ""), 2)
    assert decoded(dataset, byte) == [f"<bos>{letter * 3}<eos>" for letter in "abfg"]
    assert report.rows_read == 4
    with pytest.raises(UserError, match="1 of 3 rows"):
        prepare.sample(Tokenizing((texts(tmp_path, {"text": "a"}, {"text": ""}, *TEXTS),), byte, ""), 3, 0.1)


# ----- the real files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "type_", "columns", "num_rows"),
    [
        ("self_instruct_seed_tasks.jsonl", "self_instruct", {}, 175),
        ("gpteacher_roleplay.json", "alpaca", {"output": "response"}, 1923),
        ("fastchat_dummy_conversation.json", "sharegpt", {}, 500),
        ("lf_v1_sft_demo.jsonl", "messages", {}, 500),
        ("mlx_wikisql_train.jsonl", "completion", {}, 1000),
    ],
)
@pytest.mark.parametrize("model", ["base5m", "stories260k"])
def test_the_real_files_are_prepared_whole(tmp_path, name, type_, columns, num_rows, model):
    tokenizer = AutoTokenizer.from_pretrained(shared(f"models/{model}"))
    spec = DatasetSpec(str(shared(f"data/{name}")), type_, columns=columns)
    dataset, report = run([spec], tokenizer, sequence_len=8192, cache_dir=tmp_path)
    assert report.num_bad_rows == report.no_supervised == report.too_long == 0
    assert report.rows_read == num_rows <= report.rows_kept == len(dataset)
    for row in range(0, len(dataset), 50):
        ids, weights = dataset[row]
        assert ids[0] == tokenizer.bos_token_id and (ids == tokenizer.bos_token_id).sum() == 1
        assert ids[-1] == tokenizer.eos_token_id and weights[-1] > 0 and weights[0] == 0


def test_gsm8k_has_the_known_number_of_tokens_and_fills_its_sequences(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(shared("models/base5m"))
    columns = {"prompt": "question", "completion": "answer"}
    spec = DatasetSpec(str(shared("data/gsm8k_train.jsonl")), "prompt_completion", columns=columns)
    dataset, report = run([spec], tokenizer, sequence_len=1024, cache_dir=tmp_path)
    assert len(dataset) == 7473 and round(dataset.num_tokens / len(dataset)) == 238  # its README: 237 and our eos
    assert report.fill_rate >= 0.97
