"""Reading of files and of the hub: what is read from where, from which row on, what is no row, what ends the run."""

import gzip
import json
import os
import pickle
from dataclasses import asdict
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from data_files import CHAT, json_lines, refused, rows_of, to_arrow_file, to_arrow_stream, to_parquet, write

from sora_llm.data.readers import BadRow
from sora_llm.data.sources import DatasetSpec, check_paths, read_rows, source_digest
from sora_llm.errors import UserError

ROWS = [{"text": "one"}, {"text": "two\nlines"}, {"text": "zwölf"}]


# ----- files ----------------------------------------------------------------------------------------------------------


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


def test_text_files_of_windows_teach_no_carriage_returns(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    assert [row["text"] for _, row in read_rows(DatasetSpec(str(path), "completion"))] == ["one\ntwo", "three"]


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
    with refused(r"b.jsonl and .*b.jsonl.gz, which hold the same rows: name one of them"):
        rows_of(path)
    assert len(rows_of(str(tmp_path / "b.jsonl.gz"))) == 1


def test_links_are_followed_and_one_that_leads_nowhere_is_refused(tmp_path):
    write(tmp_path / "elsewhere" / "a.jsonl", json_lines(ROWS[0]))
    write(tmp_path / "rows" / "b.jsonl", json_lines(ROWS[1]))
    (tmp_path / "rows" / "more").symlink_to("../elsewhere")
    (tmp_path / "elsewhere" / "back").symlink_to("../rows")
    assert sorted(row["text"] for _, row in rows_of(str(tmp_path / "rows"))) == ["one", "two\nlines"]
    (tmp_path / "rows" / "gone.jsonl").symlink_to("nowhere.jsonl")
    for path in ("rows", "rows/*.jsonl", "rows/gone.jsonl"):
        with refused("gone.jsonl is a link to nowhere.jsonl, which does not exist"):
            rows_of(str(tmp_path / path))


@pytest.mark.parametrize("name", ["b.jsonl.zst", "b.ndjson", "part/b.TSV"])
def test_rows_in_a_folder_that_cannot_be_read_are_not_left_out_in_silence(tmp_path, name):
    write(tmp_path / "a.jsonl", json_lines(ROWS[0]))
    write(tmp_path / "notes.md", "about the rows")
    write(tmp_path / "images.zip", "x")
    assert len(rows_of(str(tmp_path))) == 1
    write(tmp_path / name, "x")
    with refused(f"holds {name}, whose rows cannot be read: convert it"):
        rows_of(str(tmp_path))


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


def test_a_spec_can_be_sent_to_another_process_and_written_as_json():
    spec = DatasetSpec("a.jsonl", "custom", columns={}, function="a:b", weight=0.5, streaming=True)
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert DatasetSpec(**json.loads(json.dumps(asdict(spec)))) == spec


# ----- what ends the run ----------------------------------------------------------------------------------------------


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
        (DatasetSpec("good.jsonl", "custom"), "the type is custom: name the function"),
        (DatasetSpec("good.jsonl", "completion", function="json:loads"), "the type is completion: remove it"),
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
        ("a.csv", 'text\na\n"never closed\nmore\n', r"a\.csv:3 is not valid csv: a quote .* continues to line 4"),
        ("a.csv", 'text\na\n"closed\nwrong"ly\nmore\n', r"a\.csv:3 is not valid csv: .* continues to line 4"),
        ("a.csv", b"t\xe9xt\na\n", r"a\.csv:1 is not a csv header: .* not UTF-8 text: it holds byte 0xe9"),
        ("a.csv", '"te"xt\na\n', r"a\.csv:1 is not a csv header: not valid csv"),
        ("a.txt", "\n \n", r"a\.txt holds no rows"),
        ("a.parquet", "PAR1 not really", r"a\.parquet is not a readable parquet file"),
        ("a.arrow", "ARROW1 not really", r"a\.arrow is not a readable arrow file"),
        ("a.arrow", "no table", r"a\.arrow is not a readable arrow file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_with_the_line_that_was_reached(tmp_path, name, content, match):
    with refused(match):
        rows_of(write(tmp_path / name, content))


def test_a_csv_column_that_is_named_twice_is_refused(tmp_path):
    spec = DatasetSpec(write(tmp_path / "a.csv", "instruction,output,output\na,b,c\n"), "alpaca")
    with pytest.raises(UserError, match=r"a\.csv:1 names the column 'output' twice"):
        list(read_rows(spec))


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


@pytest.mark.parametrize(
    "failure",
    [
        FileNotFoundError("Dataset 'a/b' doesn't exist"),
        ConnectionError("no network"),
        ValueError("Config name is missing. Please pick one among the available configs: 'main', 'socratic'"),
    ],
)
def test_a_hub_data_set_that_cannot_be_loaded_is_refused_with_the_reason(monkeypatch, failure):
    def load_dataset(*args: object, **kwargs: object) -> None:
        raise failure

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with refused(f"neither a file or folder here nor .* from the hub: {failure}"):
        rows_of(f"owner/{type(failure).__name__}")


@pytest.mark.parametrize("streaming", [False, True])
def test_a_hub_data_set_is_asked_for_with_split_name_and_revision_and_read_from_any_row(monkeypatch, streaming):
    asked = []

    def load_dataset(path: str, name: str | None, **kwargs: object):
        asked.append((path, name, kwargs))
        dataset = datasets.Dataset.from_list(ROWS)
        return dataset.to_iterable_dataset() if kwargs["streaming"] else dataset

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = DatasetSpec("owner/name", "completion", split="test", name="main", revision="v1", streaming=streaming)
    check_paths([spec])
    assert not asked
    whole = [(f"owner/name/main[test]#{i}", row) for i, row in enumerate(ROWS)]
    for skip in range(len(ROWS) + 2):
        assert list(read_rows(spec, skip)) == whole[skip:]
    assert asked == [("owner/name", "main", {"split": "test", "revision": "v1", "streaming": streaming})]


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


def test_a_column_that_is_filled_at_the_start_only_does_not_stop_who_goes_on_in_the_middle(tmp_path):
    rows = [{"instruction": "a", "output": "b", **({"context": "c"} if i < 5 else {})} for i in range(300)]
    spec = DatasetSpec(write(tmp_path / "a.jsonl", json_lines(*rows)), "alpaca", columns={"input": "context"})
    assert len(list(read_rows(spec, skip=150))) == 150


# ----- lines that are no rows -----------------------------------------------------------------------------------------

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
