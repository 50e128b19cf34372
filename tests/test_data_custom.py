"""Functions of one's own that make messages of rows: how they are found, what they give back, and that they changed."""

import sys
from pathlib import Path

import pytest
from data_files import example_of, json_lines, refused, write

from sora_llm.data.formats import Conversation, Message, to_examples
from sora_llm.data.readers import BadRow
from sora_llm.data.sources import DatasetSpec, check_paths, load_function, read_rows, source_digest

CUSTOM_MODULE = """
from helper_of_{name} import HELLO

NUMBER = 7

def chat(row):
    return [{{"role": "user", "content": row["q"]}}, {{"role": "assistant", "content": HELLO, "weight": 0.5}}]

def with_tools(row):
    return {{"messages": chat(row), "tools": [{{"name": "weather"}}]}}

def with_system(row):
    return {{"messages": chat(row), "system": "Be brief.", "source": "a"}}

def leaves(row):
    raise SystemExit(3)

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
    with_system = example_of(good, "custom", function=f"{custom_module}:with_system")
    assert with_system == Conversation((Message("system", "Be brief."), *messages))


@pytest.mark.parametrize(
    ("function", "reason"),
    [
        ("returns_text", "returned text, neither a list of messages nor an object"),
        ("returns_nothing", "returned null, neither"),
        ("leaves", "raised SystemExit: 3"),
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
