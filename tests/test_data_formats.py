"""Rows of files: what is read from where, what counts as a bad row, what ends the run."""

import gzip
import json
import os
from pathlib import Path

import pytest

from sora_llm.data.formats import (
    BadRow,
    Conversation,
    DatasetSpec,
    Message,
    PromptCompletion,
    Text,
    check_paths,
    read_rows,
    source_digest,
    to_example,
)
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


def example_of(row: dict, type_: str, **spec: object) -> object:
    return to_example(row, DatasetSpec("rows.jsonl", type_, **spec))  # type: ignore[arg-type]


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
        ("a.txt", "one\n\n \n\ntwo\nlines\n\nzwölf", [":1", ":5", ":8"]),
    ],
)
def test_each_kind_of_file_gives_the_same_rows_with_their_locations(tmp_path, name, content, positions):
    path = write(tmp_path / name, content)
    assert rows_of(path) == [(path + position, row) for position, row in zip(positions, ROWS, strict=True)]


def test_parquet_rows_are_read_with_nested_values(tmp_path):
    datasets = pytest.importorskip("datasets")
    path = str(tmp_path / "a.parquet")
    datasets.Dataset.from_list([CHAT, CHAT]).to_parquet(path)
    assert rows_of(path, "messages") == [(f"{path}#0", CHAT), (f"{path}#1", CHAT)]


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
        ("a.jsonl", "\n\n", "holds no rows"),
        ("a.json", "[]", "holds no rows"),
        ("a.json", '[{"text": "x"},\n {"text": ]', r"a\.json:2 is not valid JSON"),
        ("a.json", '{"rows": [1]\n}', "neither a list of rows"),
        ("a.json", '"text"', "neither a list of rows"),
        ("a.json", b'[{"text": "\xff"}]', "not UTF-8"),
        ("a.csv", "text\n", "holds no rows"),
        ("a.csv", 'text\n"never closed\nmore\n', "not valid csv"),
        ("a.csv", b"text\n\xff\xfe\n", "not UTF-8"),
        ("a.txt", "\n \n", "holds no rows"),
        ("a.txt", b"\xff\xfe\x00x", "not UTF-8"),
        ("a.parquet", "PAR1 not really", "not a readable parquet file"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path, name, content, match):
    with refused(match):
        rows_of(write(tmp_path / name, content))


@pytest.mark.parametrize("damage", [lambda data: data[: len(data) // 2], lambda data: b"not gzip"])
def test_a_damaged_gz_is_refused(tmp_path, damage):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(damage(gzip.compress(json_lines(*ROWS * 100).encode())))
    with refused("cannot be read"):
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


def test_a_hub_data_set_is_asked_for_with_split_and_revision(monkeypatch):
    import datasets

    asked = []

    def load_dataset(path: str, **kwargs: object) -> datasets.Dataset:
        asked.append((path, kwargs))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    spec = DatasetSpec("owner/name", "completion", split="test", revision="v1")
    check_paths([spec])
    assert list(read_rows(spec)) == [(f"owner/name[test]#{i}", row) for i, row in enumerate(ROWS)]
    assert asked == [("owner/name", {"split": "test", "revision": "v1"})]


# ----- bad rows -------------------------------------------------------------------------------------------------------


def test_lines_that_are_no_rows_come_as_bad_rows_with_their_line(tmp_path):
    lines = [b'{"text": "good"}', b'{"text": ', b"[1, 2]", b"7", b'{"text": "\xff"}', b"null", b"[" * 100_000]
    path = write(tmp_path / "a.jsonl", b"\n".join(lines))
    rows = rows_of(path)
    assert [location for location, _ in rows] == [f"{path}:{n}" for n in range(1, 8)]
    assert rows[0][1] == {"text": "good"} and all(isinstance(row, BadRow) for _, row in rows[1:])
    assert "not valid JSON" in str(rows[1][1]) and "a list, not an object" in str(rows[2][1])


def test_csv_rows_with_too_few_or_too_many_fields_are_bad(tmp_path):
    path = write(tmp_path / "a.csv", "prompt,completion\na,b\nc\nd,e,f\n")
    reasons = [str(row) for _, row in rows_of(path, "prompt_completion")]
    assert "fewer fields" in reasons[1] and "more fields" in reasons[2]


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
        ("completion", {"text": "\n"}, "text is empty"),
        ("prompt_completion", {"prompt": "x", "completion": True}, "completion is true or false"),
        ("messages", {"other": 1}, "messages is missing"),
        ("messages", {"messages": "Hi"}, "messages is text, not a list"),
        ("messages", {"messages": []}, "messages is empty"),
        ("messages", {"messages": ["Hi"]}, r"messages\[0\] is text, not an object"),
        ("messages", {**CHAT, "tools": [{"name": "f"}]}, "tools are not supported"),
        ("messages", message(role="wizard"), r"messages\[1\].role is 'wizard'; known are system, user"),
        ("messages", message(role=None), "role is None"),
        ("messages", message(role=["user"]), "role is"),
        ("messages", message(content=None), r"messages\[1\].content is null"),
        ("messages", message(content=""), "assistant's turn, is empty"),
        ("messages", message(content=None, tool_calls=[{}]), "calls a tool"),
        ("messages", message(content=[{"type": "image_url", "image_url": {}}]), "'image_url'"),
        ("messages", message(content=[{"type": "text"}]), r"content\[0\] has no text"),
        ("messages", message(content=["x"]), "'x'"),
        ("messages", message(loss_weight=0.5), r"loss_weight is 0.5; only 0 and 1"),
        ("messages", message(train="no"), "train is 'no'"),
        ("messages", message(train=True, weight=0), "contradicts itself"),
        ("sharegpt", {"conversations": [{"from": "alien", "value": "x"}]}, "from is 'alien'"),
        ("sharegpt", {"conversations": [{"value": "x"}]}, "from is None"),
    ],
)
def test_a_malformed_row_is_bad_with_a_reason_that_names_the_place(type_, row, reason):
    with pytest.raises(BadRow, match=reason):
        example_of(row, type_)


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
    ("flags", "supervise"),
    [
        ({}, None),
        ({"loss_weight": 0.0}, False),
        ({"loss_weight": 1}, True),
        ({"weight": 0}, False),
        ({"train": True, "weight": 1}, True),
        ({"train": False}, False),
    ],
)
def test_weights_of_0_and_1_and_flags_say_what_to_train_on(flags, supervise):
    assert example_of(message(**flags), "messages").messages[1].supervise is supervise


def test_sharegpt_knows_the_names_that_are_in_use_and_openai_s_keys():
    turns = [("system", "s"), ("human", "h"), ("gpt", "g"), ("user", "u"), ("chatgpt", "c"), ("model", "m")]
    expected = ["system", "user", "assistant", "user", "assistant", "assistant"]
    for role_key, content_key in (("from", "value"), ("role", "content")):
        row = {"conversations": [{role_key: role, content_key: text} for role, text in turns]}
        conversation = example_of(row, "sharegpt")
        assert [turn.role for turn in conversation.messages] == expected
        assert [turn.content for turn in conversation.messages] == [text for _, text in turns]


# ----- the real files -------------------------------------------------------------------------------------------------

REAL_FILES = [
    (("gsm8k_train.jsonl", "prompt_completion"), {"prompt": "question", "completion": "answer"}, 7473),
    (("gpteacher_roleplay.json", "alpaca"), {"output": "response"}, 1923),
    (("fastchat_dummy_conversation.json", "sharegpt"), {}, 500),
    (("lf_v1_sft_demo.jsonl", "messages"), {}, 500),
    (("mlx_wikisql_train.jsonl", "completion"), {}, 1000),
    (("wikitext2_valid.txt", "completion"), {}, None),
]


@needs_data
@pytest.mark.parametrize(("file", "columns", "count"), REAL_FILES)
def test_every_row_of_the_real_files_is_good(file, columns, count):
    spec = DatasetSpec(str(SHARED / "data" / file[0]), file[1], columns=columns)
    check_paths([spec])
    examples = [to_example(row, spec) for _, row in read_rows(spec)]
    assert len(examples) == count if count else len(examples) > 1000


@needs_data
def test_the_weights_of_the_real_messages_are_respected():
    spec = DatasetSpec(str(SHARED / "data" / "lf_v1_sft_demo.jsonl"), "messages")
    for _, row in read_rows(spec):
        assert [turn.supervise for turn in to_example(row, spec).messages] == [False, True]
