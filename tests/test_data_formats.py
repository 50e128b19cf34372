"""Forms of rows: what becomes of each type of data set, and which rows are bad."""

import json

import pytest
from conftest import SHARED
from conversations import needs_data
from data_files import ALPACA, CHAT, example_of, json_lines, refused, rows_of, to_parquet, write

from sora_llm.data.formats import Conversation, Message, PromptCompletion, Text, to_examples
from sora_llm.data.readers import BadRow
from sora_llm.data.sources import DatasetSpec, check_paths, read_rows


def message(**changes: object) -> dict:
    return {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello", **changes}]}


# ----- good rows ------------------------------------------------------------------------------------------------------


def test_alpaca_rows_become_a_question_and_an_answer():
    question = Message("user", "Add.", input="1 2")
    assert example_of(ALPACA, "alpaca") == Conversation((question, Message("assistant", "3")))
    for missing in ({}, {"input": None}, {"input": ""}):
        row = {"instruction": "Hi.", "output": "Ho", **missing}
        assert example_of(row, "alpaca") == Conversation((Message("user", "Hi."), Message("assistant", "Ho")))


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


def test_what_templates_read_besides_the_content_is_kept():
    extra = {"name": "Ann", "reasoning_content": "Hm.", "thinking": "Hm?", "reasoning": "Hm!"}
    kept = example_of(message(**extra, tool_call_id=None, other=1), "messages").messages[1]
    assert kept == Message("assistant", "Hello", extra=extra)


# ----- bad rows -------------------------------------------------------------------------------------------------------


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
        ("messages", message(loss_weight=float("nan")), r"messages\[1\].loss_weight is nan; it must be true, false"),
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


def test_messages_may_have_their_system_message_and_openai_s_old_functions_in_columns_of_their_own():
    row = {
        "messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}],
        "system": "Be brief.",
        "functions": [{"name": "f", "parameters": {}}],
    }
    (conversation,) = to_examples(row, DatasetSpec("x", "messages"))
    assert conversation.messages[0].content == "Be brief." and conversation.tools[0]["function"]["name"] == "f"


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
        (message(role="user", tool_calls=[CALL]), r"messages\[1\] calls a tool, but a turn of role user cannot"),
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


def test_a_null_that_json_gives_to_a_tool_is_kept():
    call = {"function": {"name": "f", "arguments": {"a": None, "b": 1}}}
    row = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [call]}]}
    (conversation,) = to_examples(row, DatasetSpec("x", "messages"))
    assert conversation.messages[1].extra["tool_calls"][0]["function"]["arguments"] == {"a": None, "b": 1}


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
