"""Rows of files: what is read from where, what counts as a bad row, what ends the run."""

import gzip
import json
import os
import pickle
import sys
from dataclasses import asdict
from pathlib import Path

import datasets
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from sora_llm.data.formats import Conversation, Message, PromptCompletion, Text, to_examples
from sora_llm.data.readers import BadRow
from sora_llm.data.sources import DatasetSpec, check_paths, load_function, read_rows, source_digest
from sora_llm.errors import UserError

SHARED = Path(os.environ.get("SORA_TEST_DATA") or Path(__file__).parents[2] / "shared")
needs_data = pytest.mark.skipif(
    not (SHARED / "data").is_dir(), reason=f"no test data in {SHARED} (set SORA_TEST_DATA to its folder)"
)

ALPACA = {"instruction": "Add.", "input": "1 2", "output": "3"}
CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return str(path)


def json_lines(*rows: object) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def rows_of(path: str, type_: str = "completion", **spec: object) -> list:
    return list(read_rows(DatasetSpec(path, type_, **spec)))  # type: ignore[arg-type]


def example_of(row: dict, type_: str, **spec: object):
    (example,) = to_examples(row, DatasetSpec("rows.jsonl", type_, **spec))  # type: ignore[arg-type]
    return example


def to_parquet(path: Path, rows: list[dict]) -> str:
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    return str(path)


def to_arrow_stream(path: Path, rows: list[dict]) -> str:
    table = datasets.Dataset.from_list(rows).data.table
    with pyarrow.ipc.new_stream(path, table.schema) as stream:
        stream.write_table(table)
    return str(path)


def to_arrow_file(path: Path, rows: list[dict]) -> str:
    table = datasets.Dataset.from_list(rows).data.table
    with pyarrow.ipc.new_file(path, table.schema) as file:
        file.write_table(table)
    return str(path)


# ----- files ----------------------------------------------------------------------------------------------------------

ROWS = [{"text": "one"}, {"text": "two\nlines"}, {"text": "zwölf"}]


@pytest.mark.parametrize(
    ("name", "content", "positions"),
    [
        ("a.jsonl", json_lines(*ROWS), [":1", ":2", ":3"]),
        ("a.jsonl", "\ufeff" + json_lines(ROWS[0]) + "\n\n" + json_lines(*ROWS[1:]), [":1", ":4", ":5"]),
        ("a.jsonl.gz", json_lines(*ROWS), [":1", ":2", ":3"]),
        ("a.json", json.dumps(ROWS, indent=2), ["#0", "#1", "#2"]),
        ("a.json.gz", json.dumps(ROWS), ["#0", "#1", "#2"]),
        ("a.json", json.dumps({"version": 1, "data": ROWS}), ["#0", "#1", "#2"]),
        ("a.json", json.dumps({"data": ROWS}, indent=1), ["#0", "#1", "#2"]),
        ("a.json", json_lines(*ROWS), [":1", ":2", ":3"]),
        ("a.csv", 'text\none\n"two\nlines"\nzwölf\n', [":2", ":3", ":5"]),
        ("a.csv", '\ufefftext\r\none\r\n"two\nlines"\r\nzwölf\r\n', [":2", ":3", ":5"]),
        ("a.csv", 'text\r\none\r\n"two\r\nlines"\r\nzwölf\r\n', [":2", ":3", ":5"]),
        ("a.txt", "one\n\n \n\ntwo\nlines\n\nzwölf", [":1", ":5", ":8"]),
    ],
)
def test_each_kind_of_file_gives_the_same_rows_with_their_locations(tmp_path, name, content, positions):
    path = write(tmp_path / name, content)
    assert rows_of(path) == [(path + position, row) for position, row in zip(positions, ROWS, strict=True)]


@pytest.mark.parametrize("write_table", [to_parquet, to_arrow_stream, to_arrow_file])
def test_rows_of_tables_are_read_with_nested_values(tmp_path, write_table):
    path = write_table(tmp_path / f"a.{'parquet' if write_table is to_parquet else 'arrow'}", [CHAT, CHAT])
    assert rows_of(path, "messages") == [(f"{path}#0", CHAT), (f"{path}#1", CHAT)]


def test_what_save_to_disk_left_is_read_in_its_order(tmp_path):
    saved = datasets.Dataset.from_list([{"text": f"row {i}"} for i in range(25)]).select([*range(20, 0, -1)])
    saved.save_to_disk(tmp_path / "saved", num_shards=3)
    assert [row for _, row in rows_of(str(tmp_path / "saved"))] == list(saved)
    datasets.load_from_disk(str(tmp_path / "saved")).map(lambda row: {"text": row["text"] * 2})
    assert list((tmp_path / "saved").glob("cache-*.arrow")), "map keeps its result beside the rows"
    assert [row for _, row in rows_of(str(tmp_path / "saved"))] == list(saved)


def test_what_save_to_disk_left_of_several_splits_asks_for_one(tmp_path):
    split = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": split, "test": split}).save_to_disk(tmp_path / "saved")
    with refused(r"saved has splits: name the folder of one \(test, train\)"):
        rows_of(str(tmp_path / "saved"))
    assert len(rows_of(str(tmp_path / "saved" / "train"))) == len(ROWS)


def test_a_single_json_object_on_one_line_is_one_row(tmp_path):
    assert rows_of(write(tmp_path / "a.json", json_lines(CHAT)), "messages")[0][1] == CHAT


def test_a_folder_gives_its_data_files_sorted_and_only_text_where_text_is_wanted(tmp_path):
    write(tmp_path / "b.jsonl", json_lines(ROWS[1]))
    write(tmp_path / "a" / "x.json", json.dumps(ROWS[:1]))
    write(tmp_path / "README.md", "not data")
    write(tmp_path / "notes.txt", "some text")
    write(tmp_path / ".cache" / "z.jsonl", "broken")
    locations = [Path(location).name for location, _ in rows_of(str(tmp_path))]
    assert locations == ["x.json#0", "b.jsonl:1", "notes.txt:1"]
    prompts = DatasetSpec(str(tmp_path), "prompt_completion", columns={"prompt": "text", "completion": "text"})
    assert [Path(location).name for location, _ in read_rows(prompts)] == ["x.json#0", "b.jsonl:1"]


def test_what_a_hub_repository_has_beside_its_rows_is_not_read(tmp_path):
    write(tmp_path / "data" / "train-00000-of-00001.jsonl", json_lines(*ROWS))
    for name in ("dataset_infos.json", "config.json"):
        write(tmp_path / name, json.dumps({"default": {"features": {}}}))
    assert [row for _, row in rows_of(str(tmp_path))] == ROWS


@pytest.mark.parametrize("pattern", ["", "*.jsonl*"])
def test_a_file_is_read_once_however_often_a_folder_has_it(tmp_path, pattern):
    path = str(tmp_path / pattern)
    for name, row in (("a.jsonl", ROWS[0]), ("b.jsonl", ROWS[1])):
        write(tmp_path / name, json_lines(row))
    (tmp_path / "c.jsonl").symlink_to("a.jsonl")
    assert rows_of(path) == [(f"{tmp_path / 'a.jsonl'}:1", ROWS[0]), (f"{tmp_path / 'b.jsonl'}:1", ROWS[1])]
    write(tmp_path / "b.jsonl.gz", json_lines(ROWS[1]))
    with refused(r"b.jsonl and .*b.jsonl.gz, which hold the same rows: name one of the two"):
        rows_of(path)
    assert len(rows_of(str(tmp_path / "b.jsonl.gz"))) == 1


@pytest.mark.parametrize("names", [("train.jsonl", "gsm8k_test.jsonl"), ("train/0.jsonl", "validation/0.jsonl")])
def test_a_folder_of_several_splits_is_not_all_trained_on(tmp_path, names):
    for name in names:
        write(tmp_path / name, json_lines(*ROWS))
    with refused(rf"has files of several splits \({names[0]}, {names[1]}\); name those to train on"):
        rows_of(str(tmp_path))
    assert len(rows_of(str(tmp_path / Path(names[0]).parent / "*[n0].jsonl"))) == len(ROWS), (
        "a pattern is taken at its word"
    )
    write(tmp_path / "one" / "training_tips.jsonl", json_lines(*ROWS))
    write(tmp_path / "one" / "contests.jsonl", json_lines(*ROWS))
    write(tmp_path / "one" / "math_train_test.jsonl", json_lines(*ROWS))
    assert len(rows_of(str(tmp_path / "one"))) == 3 * len(ROWS), "a word of its own, and of one split"


def test_a_glob_gives_the_matching_files_sorted(tmp_path):
    for name in ("part-2.jsonl", "part-1.jsonl", "other.jsonl"):
        write(tmp_path / name, json_lines({"text": name}))
    assert [row["text"] for _, row in rows_of(str(tmp_path / "part-*.jsonl"))] == ["part-1.jsonl", "part-2.jsonl"]


def test_a_file_in_the_home_folder_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.jsonl", json_lines(ROWS[0]))
    check_paths([DatasetSpec("~/a.jsonl", "completion")])
    assert rows_of("~/a.jsonl")[0][1] == ROWS[0]


def test_the_digest_changes_with_the_content_and_not_with_the_folder(tmp_path):
    first = source_digest(DatasetSpec(write(tmp_path / "x" / "a.jsonl", "1"), "completion"))
    assert source_digest(DatasetSpec(write(tmp_path / "y" / "a.jsonl", "1"), "completion")) == first
    assert source_digest(DatasetSpec(write(tmp_path / "y" / "a.jsonl", "2"), "completion")) != first


# ----- what ends the run ----------------------------------------------------------------------------------------------


def refused(match: str):
    return pytest.raises(UserError, match=match)


@pytest.mark.parametrize(
    ("spec", "match"),
    [
        (DatasetSpec("missing.jsonl", "completion"), "missing.jsonl does not exist"),
        (DatasetSpec("./missing", "completion"), "missing does not exist"),
        (DatasetSpec("a/b/c", "completion"), "does not exist"),
        (DatasetSpec("folder/missing", "completion"), "does not exist"),
        (DatasetSpec("none-*.jsonl", "completion"), "no file matches"),
        (DatasetSpec("folder", "completion"), "folder holds no .jsonl, .json"),
        (DatasetSpec("empty.jsonl", "completion"), "is empty"),
        (DatasetSpec("table.xlsx", "completion"), "unknown kind; known are .jsonl"),
        (DatasetSpec("text.txt", "alpaca"), "only type completion"),
        (DatasetSpec("good.jsonl", "chat"), "'chat' is unknown; known are alpaca, messages"),
        (DatasetSpec("good.jsonl", "completion", columns={"prompt": "x"}), "its fields are text"),
        (DatasetSpec("good.jsonl", "completion", split="test"), "no splits"),
        (DatasetSpec("good.jsonl", "completion", revision="main"), "revision is for hub"),
        (DatasetSpec("good.jsonl", "completion", separator="\n"), "separator is for type prompt_completion"),
        (DatasetSpec("good.jsonl", "custom"), "the type is custom; name the function"),
        (DatasetSpec("good.jsonl", "completion", function="json:loads"), "the type is completion; remove it"),
        (DatasetSpec("good.jsonl", "custom", function="json.loads"), "'json.loads' is not of the form module:function"),
        (DatasetSpec("good.jsonl", "custom", function="json:loads", columns={"text": "x"}), "columns maps 'text'"),
    ],
)
def test_a_wrong_path_or_setting_is_refused_before_reading(tmp_path, monkeypatch, spec, match):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    for name, content in [("empty.jsonl", ""), ("table.xlsx", "x"), ("text.txt", "x"), ("good.jsonl", "{}")]:
        write(tmp_path / name, content)
    with refused(match):
        check_paths([spec])


def test_no_data_set_at_all_is_refused():
    with refused("at least one"):
        check_paths([])


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines(ROWS[0]))
    Path(path).chmod(0)
    with refused("permission denied"):
        check_paths([DatasetSpec(path, "completion")])


@pytest.mark.parametrize(
    ("name", "content", "match"),
    [
        ("a.jsonl", "\n\n", r"a\.jsonl holds no rows"),
        ("a.json", "[]", r"a\.json holds no rows"),
        ("a.json", '[{"text": "x"},\n {"text": ]', r"a\.json:2 is not valid JSON: Expecting value"),
        ("a.json", '{"rows": [1]\n}', r"a\.json holds neither a list of rows"),
        ("a.json", '"text"', r"a\.json holds neither a list of rows"),
        ("a.json", b'[{"text":\n"\xff"}]', r"a\.json:2 is not UTF-8 text: it holds byte 0xff"),
        ("a.json", "[" * 100_000, r"a\.json is nested more than 100 levels deep"),
        ("a.csv", "text\n", r"a\.csv holds no rows"),
        ("a.csv", 'text\na\n"never closed\nmore\n', r"a\.csv:3 is not valid csv: a quote .* goes on to line 4"),
        ("a.csv", 'text\na\n"closed\nwrong"ly\nmore\n', r"a\.csv:3 is not valid csv: .* goes on to line 4"),
        ("a.csv", b"t\xe9xt\na\n", r"a\.csv:1 is no header for a csv file: .* not UTF-8 text: it holds byte 0xe9"),
        ("a.csv", '"te"xt\na\n', r"a\.csv:1 is no header for a csv file: not valid csv"),
        ("a.txt", "\n \n", r"a\.txt holds no rows"),
        ("a.parquet", "PAR1 not really", r"a\.parquet is not a readable parquet file"),
        ("a.arrow", "ARROW1 not really", r"a\.arrow is not a readable arrow file"),
        ("a.arrow", "no table", r"a\.arrow is not a readable arrow file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_line_that_was_reached(tmp_path, name, content, match):
    with refused(match):
        rows_of(write(tmp_path / name, content))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.json.gz", "a.csv.gz", "a.txt.gz"])
def test_a_gz_that_was_cut_off_or_is_none_is_refused_with_the_line_that_was_reached(tmp_path, name):
    noise = [os.urandom(1000).hex() for _ in range(500)]  # compressible to a half only: many blocks
    rows = [{"text": text} for text in noise]
    content = {"jsonl": json_lines(*rows), "csv": "text\n" + "\n".join(noise), "txt": "\n\n".join(noise)}
    content["json"] = json.dumps(rows, indent=0)
    path = tmp_path / name
    data = gzip.compress(content[name.split(".")[1]].encode())
    path.write_bytes(data[: len(data) // 2])
    with refused(rf"{name}:\d\d\d cannot be read: Compressed file ended"):
        rows_of(str(path))
    path.write_bytes(b"not gzip")
    with refused(rf"{name}:1 cannot be read: Not a gzipped file"):
        rows_of(str(path))


def test_a_cut_off_gz_gives_the_rows_before_the_damage(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    data = gzip.compress(json_lines(*({"text": os.urandom(1000).hex()} for _ in range(500))).encode())
    path.write_bytes(data[: len(data) // 2])
    rows, last = read_rows(DatasetSpec(str(path), "completion")), ""
    with refused("cannot be read") as failure:
        for location, row in rows:
            assert isinstance(row, dict)
            last = location
    reached = int(str(failure.value).split(".gz:")[1].split()[0])
    assert last == f"{path}:{reached - 1}" and reached > 100


def test_a_parquet_file_that_is_damaged_inside_is_refused_with_the_row_that_was_reached(tmp_path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"text": [os.urandom(500).hex() for _ in range(4000)]})
    pyarrow.parquet.write_table(table, path, compression="zstd", row_group_size=500)
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 100] = b"\xff" * 100
    path.write_bytes(content)
    with refused(r"a\.parquet is not a readable parquet file from row #\d+ on: "):
        rows_of(str(path))


def test_a_column_that_no_row_has_is_refused_with_the_columns_that_are_there(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines({"instruction": "x", "response": "y"}))
    with refused(r"no column 'output' .* it has instruction, response"):
        rows_of(path, "alpaca")
    with refused("no column 'context'"):
        rows_of(path, "alpaca", columns={"output": "response", "input": "context"})
    assert len(rows_of(path, "alpaca", columns={"output": "response"})) == 1


def test_a_column_that_only_some_rows_lack_is_no_mistake_of_the_config(tmp_path):
    path = write(tmp_path / "a.jsonl", json_lines({"other": 1}, {"text": "x"}))
    assert len(rows_of(path)) == 2


@pytest.mark.parametrize("failure", [FileNotFoundError("Dataset 'a/b' doesn't exist"), ConnectionError("no network")])
def test_a_hub_data_set_that_cannot_be_loaded_is_refused_with_the_reason(monkeypatch, failure):
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with refused(f"neither a file or folder here nor .* from the hub: {failure}"):
        rows_of(f"owner/{type(failure).__name__}")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_is_asked_for_with_split_and_revision_and_read_from_any_row(monkeypatch, streaming):
    asked = []

    def load_dataset(path: str, **kwargs: object):
        asked.append((path, kwargs))
        dataset = datasets.Dataset.from_list(ROWS)
        return dataset.to_iterable_dataset() if kwargs["streaming"] else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = DatasetSpec("owner/name", "completion", split="test", revision="v1", streaming=streaming)
    check_paths([spec])
    assert not asked
    whole = [(f"owner/name[test]#{i}", row) for i, row in enumerate(ROWS)]
    for skip in range(len(ROWS) + 2):
        assert list(read_rows(spec, skip)) == whole[skip:]
    assert asked == [("owner/name", {"split": "test", "revision": "v1", "streaming": streaming})]


def test_a_hub_stream_that_breaks_off_is_refused_with_the_row_that_was_reached(monkeypatch):
    def rows():
        yield from ROWS
        raise ConnectionError("no network")

    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: datasets.IterableDataset.from_generator(rows))
    read = read_rows(DatasetSpec("owner/breaks", "completion", streaming=True))
    with refused(r"owner/breaks\[train\]#3 cannot be read: no network"):
        list(read)


# ----- starting later -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.txt", "a.parquet", "a.arrow", "lines.json"]
)
def test_skipped_rows_leave_the_others_with_the_locations_they_had(tmp_path, name):
    texts = [f"row {i}" for i in range(250)]
    rows = [{"text": text} for text in texts]
    for folder, part in (("a", slice(0, 130)), ("b", slice(130, None))):
        path = tmp_path / folder / name
        path.parent.mkdir()
        if name in ("a.parquet", "a.arrow"):
            (to_parquet if name == "a.parquet" else to_arrow_stream)(path, rows[part])
            continue
        lines = json_lines(*rows[part]).replace("\n", "\n\n", 3)
        as_csv, as_text = "text\n" + "\n".join(texts[part]), "\n\n".join(texts[part])
        content = {"a.json": json.dumps(rows[part]), "a.csv": as_csv, "a.txt": as_text}.get(name, lines)
        write(path, content)
    spec = DatasetSpec(str(tmp_path), "completion")
    whole = list(read_rows(spec))
    assert [row for _, row in whole] == rows
    for skip in (1, 129, 130, 131, 249, 250, 300):
        assert list(read_rows(spec, skip)) == whole[skip:]
    streamed = DatasetSpec(str(tmp_path), "completion", streaming=True)
    assert list(read_rows(streamed, 131)) == whole[131:]


def test_bad_rows_count_among_the_skipped(tmp_path):
    path = write(tmp_path / "a.csv", 'text\ngood\n"ba"d\na,b\nlast\n')
    assert list(read_rows(DatasetSpec(path, "completion"), 3)) == [(f"{path}:5", {"text": "last"})]


def test_skipped_lines_of_json_are_not_parsed(tmp_path, monkeypatch):
    path, parsed = write(tmp_path / "a.jsonl", json_lines(*ROWS)), []
    parse = json.loads
    monkeypatch.setattr(json, "loads", lambda line: parsed.append(line) or parse(line))
    assert len(list(read_rows(DatasetSpec(path, "completion"), 2))) == 1
    assert len(parsed) == 1


# ----- bad rows -------------------------------------------------------------------------------------------------------


DEEP = '{"text": "x", "more": ' + "[" * 600 + "]" * 600 + "}"  # json reads it, sending it to a process would fail


@pytest.mark.parametrize(
    ("name", "content", "place", "num_rows", "reason"),
    [
        ("a.jsonl", '{"text": "x"}\n\n{"text": ', ":3", 2, "not valid JSON: Expecting value at column 10"),
        ("a.jsonl", '{"text": "x"}\n[1, 2]', ":2", 2, "the row is a list, not an object"),
        ("a.jsonl", '7\n{"text": "x"}', ":1", 2, "the row is a number"),
        ("a.jsonl", '{"text": "x"}\nnull', ":2", 2, "the row is null"),
        ("a.jsonl", b'{"text": "\xff"}\n{"text": "x"}', ":1", 2, "not UTF-8 text: it holds byte 0xff"),
        ("a.jsonl", '{"text": "x"}\n' + "[" * 100_000, ":2", 2, "nested more than 100 levels deep"),
        ("a.jsonl", '{"text": "x"}\n' + DEEP, ":2", 2, "nested more than 100 levels deep"),
        ("a.jsonl", '{"text": "x"}\n{"text": ' + "1" * 5000 + "}", ":2", 2, "not valid JSON: Exceeds the limit"),
        ("a.jsonl.gz", '{"text": "x"}\n{"text": ', ":2", 2, "not valid JSON"),
        ("a.json", '{"text": "x"}\n{"text": ', ":2", 2, "not valid JSON"),
        ("a.json", '[{"text": "x"}, "text"]', "#1", 2, "the row is text"),
        ("a.csv", "text\na\nb,c\nd\n", ":3", 3, "more fields than the header"),
        ("a.csv", 'text,more\na,b\n"c\nd"\ne,f\n', ":3", 3, "fewer fields than the header"),
        ("a.csv", 'text\na\n"b"c\nd\n', ":3", 3, "not valid csv: ',' expected after"),
        ("a.csv", 'text\na\n"never closed', ":3", 2, "not valid csv: unexpected end of data"),
        ("a.csv", b'text\na\n"b\n\xe9"\nc\n', ":3", 3, "line 4 is not UTF-8 text: it holds byte 0xe9"),
        ("a.txt", b"a\n\nb\nc\xff\n\nd", ":3", 3, "line 4 is not UTF-8 text: it holds byte 0xff"),
    ],
)
def test_a_line_that_is_no_row_is_bad_and_reading_goes_on(tmp_path, name, content, place, num_rows, reason):
    path = write(tmp_path / name, content)
    rows = rows_of(path)
    ((location, bad),) = [(location, row) for location, row in rows if isinstance(row, BadRow)]
    assert location == path + place and reason in str(bad)
    assert len(rows) == num_rows


def test_rows_that_parquet_cannot_give_as_text_are_bad(tmp_path):
    path = tmp_path / "a.parquet"
    bytes_ = pyarrow.array([b"good", b"b\xff", b"good"])
    text = pyarrow.StringArray.from_buffers(3, bytes_.buffers()[1], bytes_.buffers()[2])
    pyarrow.parquet.write_table(pyarrow.table({"text": text}), path)
    first, bad, last = rows_of(str(path))
    assert first[1] == last[1] == {"text": "good"}
    assert bad[0] == f"{path}#1" and "'utf-8' codec can't decode byte 0xff" in str(bad[1])


def message(**changes: object) -> dict:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", **changes}]}


@pytest.mark.parametrize(
    ("type_", "row", "reason"),
    [
        ("alpaca", {"instruction": "x"}, "output is missing"),
        ("alpaca", {"instruction": " ", "output": "y"}, "instruction is empty"),
        ("alpaca", {"instruction": "x", "output": ""}, "output is empty"),
        ("alpaca", {"instruction": "x", "output": 4}, "output is a number, not text"),
        ("alpaca", {"instruction": "x", "input": ["y"], "output": "z"}, "input is a list, not text"),
        ("completion", {"text": None}, "text is null, not text"),
        (
            "prompt_completion",
            {"prompt": [{"role": "user", "content": "x"}], "completion": "y"},
            "prompt is a list, not text; rows of messages are of type messages",
        ),
        ("completion", {"text": "\n"}, "text is empty"),
        ("prompt_completion", {"prompt": "x", "completion": True}, "completion is true or false"),
        ("messages", {"other": 1}, "messages is missing"),
        ("messages", {"messages": "Hi"}, "messages is text, not a list"),
        ("messages", {"messages": []}, "messages is empty"),
        ("messages", {"messages": ["Hi"]}, r"messages\[0\] is text, not an object"),
        ("messages", message(role="wizard"), r"messages\[1\].role is 'wizard'; known are system, user"),
        ("messages", message(role=None), "role is None"),
        ("messages", message(role=["user"]), "role is"),
        ("messages", message(content=None), r"messages\[1\].content is null"),
        ("messages", message(content=""), "assistant's turn, is empty"),
        ("messages", message(content=[{"type": "image_url", "image_url": {}}]), "'image_url'"),
        ("messages", message(content=[{"type": "text"}]), r"content\[0\] has no text"),
        ("messages", message(content=["x"]), "'x'"),
        ("messages", message(content="\ud83d"), r"messages\[1\].content holds half a surrogate pair, '\\ud83d'"),
        ("messages", message(content=[{"type": "tool_call", "value": "{}"}]), "'tool_call', and only parts of type"),
        ("messages", message(loss_weight=float("nan")), r"messages\[1\].loss_weight is nan; allowed are true, false"),
        ("messages", message(loss_weight=float("inf")), "loss_weight is inf"),
        ("messages", message(loss_weight=1e39), "loss_weight is 1e"),
        ("messages", message(loss_weight=10**400), "loss_weight is 1000"),
        ("messages", message(weight=-0.5), "weight is -0.5"),
        ("messages", message(train="no"), "train is 'no'"),
        ("messages", message(train=True, weight=0), r"messages\[1\] contradicts itself: .*'train': True"),
        ("messages", message(loss_weight=0.5, training=True), "contradicts itself"),
        ("messages", message(name=7), r"messages\[1\].name is a number, not text"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "from is 'alien'"),
        ("sharegpt", {"conversations": [{"value": "x"}]}, "from is None"),
        ("sharegpt", {"conversations": [{"from": "gpt", "value": " "}]}, r"conversations\[0\].value, an .* is empty"),
        ("sharegpt", {"system": 1, "conversations": [{"from": "gpt", "value": "x"}]}, "system is a number, not text"),
        (
            "sharegpt",
            {"system": "s", "conversations": [{"from": "system", "value": "t"}, {"from": "gpt", "value": "x"}]},
            "system is given twice: in a column of its own and in conversations",
        ),
        ("self_instruct", {"instruction": "x"}, "instances is missing"),
        ("self_instruct", {"instruction": "x", "instances": None}, "instances is null, not a list"),
        ("self_instruct", {"instruction": "x", "instances": []}, "instances is empty"),
        ("self_instruct", {"instruction": "x", "instances": ["y"]}, r"instances\[0\] is text, not an object"),
        ("self_instruct", {"instances": [{"input": "", "output": "y"}]}, "instruction is missing"),
        (
            "self_instruct",
            {"instruction": "x", "instances": [{"output": "y"}, {"output": "z"}, {"input": "", "output": ""}]},
            r"instances\[2\].output is empty",
        ),
        ("self_instruct", {"instruction": "x", "instances": [{"input": "y"}]}, r"instances\[0\].output is missing"),
    ],
)
def test_a_malformed_row_is_bad_with_a_reason_that_names_the_place(type_, row, reason):
    with pytest.raises(BadRow, match=reason):
        to_examples(row, DatasetSpec("rows.jsonl", type_))


# ----- good rows ------------------------------------------------------------------------------------------------------


def test_alpaca_rows_become_a_question_and_an_answer():
    question = Message("user", "Add.", input="1 2")
    assert example_of(ALPACA, "alpaca") == Conversation((question, Message("assistant", "3")))
    for missing in ({}, {"input": None}, {"input": ""}):
        row = {"instruction": "Hi.", "output": "Ho", **missing}
        assert example_of(row, "alpaca") == Conversation((Message("user", "Hi."), Message("assistant", "Ho")))


def test_columns_name_the_file_s_own_names():
    row = {"q": "1+1=", "a": "2"}
    assert example_of(row, "prompt_completion", columns={"prompt": "q", "completion": "a"}) == PromptCompletion(
        "1+1=", "2"
    )
    assert example_of({"body": "x"}, "completion", columns={"text": "body"}) == Text("x")
    assert example_of({"chat": CHAT["messages"]}, "messages", columns={"messages": "chat"}) == example_of(
        CHAT, "messages"
    )


def test_typed_parts_are_joined_and_nulls_of_tables_are_absent_keys():
    parts = [{"type": "text", "text": "Hel"}, {"type": "text", "value": "lo", "text": None}]
    row = message(content=parts, tool_calls=None, loss_weight=None)
    assert example_of(row, "messages") == example_of(CHAT, "messages")


@pytest.mark.parametrize(
    ("flags", "weight"),
    [
        ({}, None),
        ({"loss_weight": 0.0}, 0.0),
        ({"loss_weight": 1}, 1.0),
        ({"loss_weight": 0.25}, 0.25),
        ({"weight": 3}, 3.0),
        ({"weight": None, "train": False}, 0.0),
        ({"train": True, "weight": 1}, 1.0),
        ({"training": True}, 1.0),
    ],
)
def test_a_turn_s_own_weight_or_flag_is_kept_as_a_number(flags, weight):
    kept = example_of(message(**flags), "messages").messages[1].weight
    assert kept == weight and not isinstance(kept, bool | int)


def test_each_instance_of_a_self_instruct_row_is_a_conversation_of_its_own():
    instances = [{"input": "1 2", "output": "3"}, {"input": "", "output": "0"}, {"output": "1", "input": None}]
    examples = to_examples({"instruction": "Add.", "instances": instances}, DatasetSpec("a.jsonl", "self_instruct"))
    assert examples == [
        Conversation((Message("user", "Add.", input=input_), Message("assistant", output)))
        for input_, output in (("1 2", "3"), ("", "0"), ("", "1"))
    ]


def test_sharegpt_knows_the_names_that_are_in_use_and_openai_s_keys():
    names = {"system": "system", "human": "user", "user": "user", "tool": "tool", "observation": "tool"}
    names |= {"function": "tool"} | dict.fromkeys(("gpt", "assistant", "chatgpt", "bing", "bard", "model"), "assistant")
    turns, expected = [(name, f"{name}'s text") for name in names], list(names.values())
    for role_key, content_key in (("from", "value"), ("role", "content")):
        row = {"conversations": [{role_key: role, content_key: text} for role, text in turns]}
        conversation = example_of(row, "sharegpt")
        assert [turn.role for turn in conversation.messages] == expected
        assert [turn.content for turn in conversation.messages] == [text for _, text in turns]


def test_a_system_column_of_sharegpt_becomes_the_first_message():
    turns = [{"from": "human", "value": "h"}, {"from": "gpt", "value": "g"}]
    conversation = example_of({"conversations": turns, "system": "Be brief."}, "sharegpt")
    assert conversation.messages[0] == Message("system", "Be brief.")
    for absent in (None, ""):
        assert example_of({"conversations": turns, "system": absent}, "sharegpt").messages == conversation.messages[1:]


def test_a_developer_s_message_is_a_system_message():
    row = {"messages": [{"role": "developer", "content": "Be brief."}, *CHAT["messages"]]}
    assert example_of(row, "messages").messages[0] == Message("system", "Be brief.")


def test_what_templates_read_besides_the_content_is_kept():
    extra = {"name": "Ann", "reasoning_content": "Hm.", "thinking": "Hm?", "reasoning": "Hm!"}
    kept = example_of(message(**extra, tool_call_id=None, other=1), "messages").messages[1]
    assert kept == Message("assistant", "Hello", extra=extra)


# ----- tools ----------------------------------------------------------------------------------------------------------

SCHEMA = {"name": "weather", "description": "Of a city.", "parameters": {"properties": {"city": {"type": "string"}}}}
TOOL = {"type": "function", "function": SCHEMA}
CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Ulm"}}}
QUESTION, ANSWER = Message("user", "Rain?"), Message("assistant", "No.")


def calling(*calls: dict) -> Message:
    return Message("assistant", "", extra={"tool_calls": list(calls)}, has_content=False)


def openai_row(call: dict, result: dict, **row: object) -> dict:
    asked = {"role": "assistant", "content": None, **call}
    answered = {"content": "sunny", **result}
    turns = [{"role": "user", "content": "Rain?"}, asked, answered, {"role": "assistant", "content": "No."}]
    return {"messages": turns, **row}


def sharegpt_row(role: str, call: object, result_role: str, **row: object) -> dict:
    turns = [("human", "Rain?"), (role, call), (result_role, "sunny"), ("gpt", "No.")]
    return {"conversations": [{"from": role, "value": value} for role, value in turns], **row}


def test_a_conversation_in_two_lists_trains_on_the_second_alone(tmp_path):
    """TRL's conversational prompt and completion."""
    earlier = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    later = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Me"}]
    row = {"prompt": [*earlier, later[0]], "completion": later[1:]}
    path = write(tmp_path / "a.jsonl", json_lines(row, {**row, "messages": None}))
    for _, found in rows_of(path, "messages"):
        example = example_of(found, "messages")
        assert [message.content for message in example.messages] == ["Hi", "Hello", "Who?", "Me"]
        assert [message.is_context for message in example.messages] == [True, True, True, False]
    with pytest.raises(BadRow, match=r"completion\[0\].role is 'robot'"):
        example_of({**row, "completion": [{"role": "robot", "content": "x"}]}, "messages")
    with refused("no column 'turns'"):
        rows_of(path, "messages", columns={"messages": "turns"})


def test_openai_s_tool_calls_get_their_arguments_as_objects():
    call = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Ulm"}'}}
    row = openai_row(
        {"tool_calls": [call]}, {"role": "tool", "tool_call_id": "call_1", "name": "weather"}, tools=[TOOL]
    )
    result = Message("tool", "sunny", extra={"tool_call_id": "call_1", "name": "weather"})
    expected = Conversation((QUESTION, calling({"id": "call_1", **CALL}), result, ANSWER), (TOOL,))
    assert example_of(row, "messages") == expected


@pytest.mark.parametrize(
    "call",
    [
        {"tool_calls": [CALL]},
        {"tool_calls": json.dumps([CALL])},
        {"tool_calls": [CALL["function"]], "content": None},
        {"tool_calls": [CALL], "function_call": None},
        {"function_call": {"name": "weather", "arguments": '{"city": "Ulm"}'}, "tool_calls": []},
    ],
)
def test_every_form_of_a_call_becomes_the_same(call):
    expected = (QUESTION, calling(CALL), Message("tool", "sunny", extra={"name": "weather"}), ANSWER)
    assert example_of(openai_row(call, {"role": "function", "name": "weather"}), "messages").messages == expected


def test_an_assistant_may_speak_and_call_several_tools():
    turn = {"role": "assistant", "content": "Let me see.", "tool_calls": [CALL, {"function": {"name": "time"}}]}
    calls = [CALL, {"type": "function", "function": {"name": "time", "arguments": {}}}]
    expected = Message("assistant", "Let me see.", extra={"tool_calls": calls})
    assert example_of({"messages": [turn]}, "messages").messages == (expected,)


@pytest.mark.parametrize("call_role", ["function_call", "tool_call"])
@pytest.mark.parametrize("result_role", ["observation", "tool", "function"])
@pytest.mark.parametrize(
    "call", [json.dumps(CALL["function"]), json.dumps([CALL["function"]]), json.dumps(CALL), CALL["function"]]
)
def test_sharegpt_s_calls_and_observations_become_openai_s(call_role, result_role, call):
    row = sharegpt_row(call_role, call, result_role, tools=json.dumps([SCHEMA]))
    expected = Conversation((QUESTION, calling(CALL), Message("tool", "sunny"), ANSWER), (TOOL,))
    assert example_of(row, "sharegpt") == expected


@pytest.mark.parametrize("type_", ["alpaca", "messages", "sharegpt", "self_instruct"])
def test_a_system_and_a_tools_column_are_read_whatever_the_type_of_conversation(type_):
    row = {**ALPACA, **CHAT, "conversations": CHAT["messages"], "instances": [{"input": "1 2", "output": "3"}]}
    plain = example_of(row, type_)
    for empty in (None, "", []):
        assert example_of({**row, "system": empty or "", "tools": empty}, type_) == plain
    system = Message("system", "Be brief.")
    expected = Conversation((system, *plain.messages), (TOOL,))
    assert example_of({**row, "system": "Be brief.", "tools": [TOOL]}, type_) == expected


@pytest.mark.parametrize("type_", ["messages", "sharegpt"])
@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        (None, ()),
        ("", ()),
        ("[]", ()),
        ("null", ()),
        ([], ()),
        ([TOOL], (TOOL,)),
        ([SCHEMA, TOOL], (TOOL, TOOL)),
        ([{"function": SCHEMA}], (TOOL,)),
        ([{"type": "function", **SCHEMA}], (TOOL,)),
        (json.dumps([SCHEMA]), (TOOL,)),
    ],
)
def test_tools_are_a_list_or_its_text_with_or_without_the_outer_object(type_, tools, expected):
    row = {"tools": tools, "messages": CHAT["messages"], "conversations": CHAT["messages"]}
    assert example_of(row, type_).tools == expected


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (message(content=None, tool_calls=[{}]), r"messages\[1\].tool_calls\[0\]: name is missing"),
        (message(content=None, tool_calls="weather"), r"messages\[1\].tool_calls is not valid JSON"),
        (message(content=None, tool_calls=["weather"]), r"tool_calls\[0\] is text, not an object"),
        (message(tool_calls=[{"function": "weather"}]), r"tool_calls\[0\].function is text, not an object"),
        (message(tool_calls=[{"function": {"name": "f", "arguments": "Ulm"}}]), "arguments is not valid JSON"),
        (message(tool_calls=[{"function": {"name": "f", "arguments": "[1]"}}]), "arguments is a list, not an object"),
        (message(tool_calls=[{"function": {"name": "f", "arguments": ""}}]), "arguments is not valid JSON"),
        (message(tool_calls=[{"function": {"name": "f", "arguments": '"\\ud83d"'}}]), "surrogates not allowed"),
        (message(tool_calls="[" * 500 + "]" * 500), "tool_calls is nested more than 100 levels deep"),
        (message(tool_calls="[" * 99_000), "tool_calls is not valid JSON"),
        (message(tool_calls=[CALL], function_call=CALL["function"]), "both tool_calls and function_call"),
        (message(role="user", tool_calls=[CALL]), r"messages\[1\] calls a tool, which a turn of role user cannot"),
        (message(content=None, tool_calls=[]), r"messages\[1\].content is null"),
        ({**CHAT, "tools": "weather"}, "tools is not valid JSON"),
        ({**CHAT, "tools": TOOL}, "tools is an object, not a list"),
        ({**CHAT, "tools": ["weather"]}, r"tools\[0\] is text, not an object"),
        ({**CHAT, "tools": [{"description": "?"}]}, r"tools\[0\]: name is missing"),
    ],
)
def test_a_malformed_call_or_tool_makes_the_row_bad(row, reason):
    with pytest.raises(BadRow, match=reason):
        example_of(row, "messages")


def test_a_sharegpt_call_that_is_no_json_makes_the_row_bad():
    with pytest.raises(BadRow, match=r"conversations\[1\].value is not valid JSON"):
        example_of(sharegpt_row("function_call", "weather(Ulm)", "observation"), "sharegpt")
    with pytest.raises(BadRow, match=r"conversations\[1\].value holds no call"):
        example_of(sharegpt_row("function_call", "[]", "observation"), "sharegpt")


def test_the_nulls_that_parquet_fills_in_are_absent_keys(tmp_path):
    """One row calls a tool, the other none; one call has a city, the other a day: parquet gives every turn and every
    call all of these keys."""
    day = {"type": "function", "function": {"name": "time", "arguments": {"day": "Monday"}}}
    rows = [openai_row({"tool_calls": [CALL, day]}, {"role": "tool", "tool_call_id": "1"}, tools=[TOOL]), CHAT]
    path = to_parquet(
        tmp_path / "a.parquet", [{"messages": row["messages"], "tools": row.get("tools")} for row in rows]
    )
    (_, first), (_, second) = rows_of(path, "messages")
    assert "tool_calls" not in first["messages"][0] and second["tools"] is None, "columns stay, filled-in keys do not"
    assert [example_of(row, "messages") for row in (first, second)] == [example_of(row, "messages") for row in rows]


# ----- custom ---------------------------------------------------------------------------------------------------------

CUSTOM_MODULE = """
from helper_of_{name} import HELLO

NUMBER = 7

def chat(row):
    return [{{"role": "user", "content": row["q"]}}, {{"role": "assistant", "content": HELLO, "weight": 0.5}}]

def with_tools(row):
    return {{"messages": chat(row), "tools": [{{"name": "weather"}}]}}

def returns_text(row):
    return "text"

def returns_nothing(row):
    pass

def returns_wizard(row):
    return [{{"role": "wizard", "content": "x"}}]

def returns_nan(row):
    return [{{"role": "assistant", "content": "x", "weight": float("nan")}}]
"""


@pytest.fixture
def custom_module(tmp_path, monkeypatch):
    """The name of a module in the current folder, which is not on Python's path (as for a console script)."""
    name = f"module_of_{tmp_path.name}"
    write(tmp_path / f"{name}.py", CUSTOM_MODULE.format(name=name))
    write(tmp_path / f"helper_of_{name}.py", 'HELLO = "Hello"\n')
    write(tmp_path / "rows.jsonl", json_lines({"q": "Hi"}, {"question": "Hi"}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    return name


def test_a_custom_function_of_the_current_folder_makes_messages_of_rows(custom_module):
    spec = DatasetSpec("rows.jsonl", "custom", function=f"{custom_module}:chat")
    check_paths([spec])
    (_, good), (_, bad) = read_rows(spec)
    messages = (Message("user", "Hi"), Message("assistant", "Hello", weight=0.5))
    assert to_examples(good, spec) == [Conversation(messages)]
    with pytest.raises(BadRow, match=f"{custom_module}:chat raised KeyError: 'q'"):
        to_examples(bad, spec)
    with_tools = example_of(good, "custom", function=f"{custom_module}:with_tools")
    assert with_tools == Conversation(messages, ({"type": "function", "function": {"name": "weather"}},))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("returns_text", "returned text, neither a list of messages nor an object"),
        ("returns_nothing", "returned null, neither"),
        ("returns_wizard", r"returned cannot be used: messages\[0\].role is 'wizard'"),
        ("returns_nan", r"returned cannot be used: messages\[0\].weight is nan"),
    ],
)
def test_what_a_custom_function_returns_wrongly_makes_the_row_bad(custom_module, function, reason):
    with pytest.raises(BadRow, match=f"{custom_module}:{function} {reason}"):
        example_of({}, "custom", function=f"{custom_module}:{function}")


@pytest.mark.parametrize(
    ("code", "function", "reason"),
    [
        (None, "{}:f", r"module {} cannot be imported \(ModuleNotFoundError: No module named '{}'\); it is looked for"),
        ("import no_such_thing", "{}:f", r"cannot be imported \(ModuleNotFoundError: No module named 'no_such_thing'"),
        ("def f(:", "{}:f", r"cannot be imported \(SyntaxError"),
        ("raise SystemExit(3)", "{}:f", r"cannot be imported \(SystemExit: 3"),
        ("g = 1", "{}:f", r"module {} \(.*{}.py\) has no 'f'"),
        ("f = 1", "{}:f", r"f of module {} \(.*{}.py\) is a number, not a function"),
        ("f = 1", ":f", "':f' is not of the form module:function"),
        ("f = 1", "{}:", "'{}:' is not of the form module:function"),
    ],
)
def test_a_custom_function_that_cannot_be_had_is_refused_before_reading(tmp_path, monkeypatch, code, function, reason):
    name = f"faulty_{tmp_path.name}"
    monkeypatch.chdir(tmp_path)
    if code is not None:
        write(tmp_path / f"{name}.py", code)
    spec = DatasetSpec("missing.jsonl", "custom", function=function.replace("{}", name))
    with refused("data set missing.jsonl: function .*" + reason.replace("{}", name)):
        check_paths([spec])


def test_the_digest_changes_with_the_source_of_the_custom_function(custom_module):
    spec = DatasetSpec("rows.jsonl", "custom", function=f"{custom_module}:chat")
    first = source_digest(spec)
    assert source_digest(spec) == first
    with Path(f"{custom_module}.py").open("a") as module:
        module.write("# changed\n")
    with refused(rf"rows.jsonl: .*{custom_module}.py has changed since function '{custom_module}:chat' was loaded"):
        source_digest(spec)
    in_a_new_process(custom_module)
    assert source_digest(spec) != first


def test_another_function_of_a_module_that_has_changed_is_not_taken_for_the_new_one(custom_module):
    source_digest(DatasetSpec("rows.jsonl", "custom", function=f"{custom_module}:chat"))
    with Path(f"{custom_module}.py").open("a") as module:
        module.write("# changed\n")
    with refused("has changed since"):
        source_digest(DatasetSpec("rows.jsonl", "custom", function=f"{custom_module}:with_tools"))


def test_the_digest_changes_with_the_source_of_a_function_that_is_named_where_it_is_imported(tmp_path, monkeypatch):
    package = f"package_{tmp_path.name.replace('-', '_')}"
    monkeypatch.chdir(tmp_path)
    Path(package).mkdir()
    Path(package, "__init__.py").write_text("from .impl import chat\n")
    Path(package, "impl.py").write_text("def chat(row):\n    return []\n")
    spec = DatasetSpec("rows.jsonl", "custom", function=f"{package}:chat")
    write(tmp_path / "rows.jsonl", "{}")
    first = source_digest(spec)
    Path(package, "impl.py").write_text("def chat(row):\n    return [1]\n")
    with refused("impl.py has changed since"):
        source_digest(spec)
    in_a_new_process(package, f"{package}.impl")
    assert source_digest(spec) != first


def in_a_new_process(*modules: str) -> None:
    """Forget what was imported, as a new process has."""
    load_function.cache_clear()
    for module in modules:
        del sys.modules[module]


def test_a_spec_can_be_sent_to_another_process_and_written_as_json():
    spec = DatasetSpec("a.jsonl", "custom", columns={}, function="a:b", weight=0.5, streaming=True)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert DatasetSpec(**json.loads(json.dumps(asdict(spec)))) == spec


# ----- the real files -------------------------------------------------------------------------------------------------

REAL_FILES = [
    (("gsm8k_train.jsonl", "prompt_completion"), {"prompt": "question", "completion": "answer"}, 7473),
    (("gpteacher_roleplay.json", "alpaca"), {"output": "response"}, 1923),
    (("fastchat_dummy_conversation.json", "sharegpt"), {}, 500),
    (("lf_v1_sft_demo.jsonl", "messages"), {}, 500),
    (("self_instruct_seed_tasks.jsonl", "self_instruct"), {}, 175),
    (("mlx_wikisql_train.jsonl", "completion"), {}, 1000),
    (("wikitext2_valid.txt", "completion"), {}, None),
]


@needs_data
@pytest.mark.parametrize(("file", "columns", "count"), REAL_FILES)
def test_every_row_of_the_real_files_is_good(file, columns, count):
    spec = DatasetSpec(str(SHARED / "data" / file[0]), file[1], columns=columns)
    check_paths([spec])
    examples = [example for _, row in read_rows(spec) for example in to_examples(row, spec)]
    assert len(examples) == count if count else len(examples) > 1000


@needs_data
def test_the_weights_of_the_real_messages_are_respected():
    spec = DatasetSpec(str(SHARED / "data" / "lf_v1_sft_demo.jsonl"), "messages")
    for _, row in read_rows(spec):
        assert [turn.weight for turn in to_examples(row, spec)[0].messages] == [0.0, 1.0]


# ----- what is easily lost --------------------------------------------------------------------------------------------


def test_text_files_of_windows_teach_no_carriage_returns(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    assert [row["text"] for _, row in read_rows(DatasetSpec(str(path), "completion"))] == ["one\ntwo", "three"]


def test_a_csv_column_that_is_named_twice_is_refused(tmp_path):
    spec = DatasetSpec(write(tmp_path / "a.csv", "instruction,output,output\na,b,c\n"), "alpaca")
    with pytest.raises(UserError, match=r"a\.csv:1 names the column 'output' twice"):
        list(read_rows(spec))


def test_alpaca_rows_may_have_a_system_message_and_a_history():
    row = {"instruction": "c", "output": "d", "system": "Be brief.", "history": [["a", "b"]]}
    (conversation,) = to_examples(row, DatasetSpec("x", "alpaca"))
    assert [(message.role, message.content) for message in conversation.messages] == [
        ("system", "Be brief."),
        ("user", "a"),
        ("assistant", "b"),
        ("user", "c"),
        ("assistant", "d"),
    ]
    for history, reason in (
        ([["a"]], "history\\[0\\] is a list, not a pair"),
        (1, "history is a number, not a list of pairs"),
        ([["a", ""]], "history\\[0\\].text is empty"),
    ):
        with pytest.raises(BadRow, match=reason):
            to_examples({**row, "history": history}, DatasetSpec("x", "alpaca"))


def test_messages_may_have_their_system_message_and_openai_s_old_functions_in_columns_of_their_own():
    row = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "system": "Be brief.",
        "functions": [{"name": "f", "parameters": {}}],
    }
    (conversation,) = to_examples(row, DatasetSpec("x", "messages"))
    assert conversation.messages[0].content == "Be brief." and conversation.tools[0]["function"]["name"] == "f"


def test_a_null_that_json_gives_to_a_tool_is_kept():
    call = {"function": {"name": "f", "arguments": {"a": None, "b": 1}}}
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}
    (conversation,) = to_examples(row, DatasetSpec("x", "messages"))
    assert conversation.messages[1].extra["tool_calls"][0]["function"]["arguments"] == {"a": None, "b": 1}


def test_a_column_that_is_filled_at_the_start_only_does_not_stop_who_goes_on_in_the_middle(tmp_path):
    rows = [{"instruction": "a", "output": "b", **({"context": "c"} if i < 5 else {})} for i in range(300)]
    spec = DatasetSpec(write(tmp_path / "a.jsonl", json_lines(*rows)), "alpaca", columns={"input": "context"})
    assert len(list(read_rows(spec, skip=150))) == 150
