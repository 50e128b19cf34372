"""What templates write, and what they leave out: to the letter, as transformers renders it, and refused."""

from datetime import datetime
from pathlib import Path

import pytest
import yaml
from conversations import (
    ADD,
    CLOSING_EOS,
    MARKED,
    TOOL_TEXTS,
    TWO_TURNS,
    WITH_SYSTEM,
    WITH_TOOLS,
    answers,
    byte_tokenizer,
    call,
    chat,
    tokens_and_weights,
)

from sora_llm.data import templates
from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.data.formats import Message, to_examples
from sora_llm.data.prompts import has_visible_end
from sora_llm.data.readers import BadRow
from sora_llm.data.sources import DatasetSpec
from sora_llm.data.template_gaps import check_has_place
from sora_llm.data.templates import as_dicts, render, resolve_template
from sora_llm.data.tokenize import tokenize_examples
from sora_llm.errors import UserError

RENDERED = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello!<eos>"
    "\n\n### Instruction:\nTwo?\n\n### Response:\nYes.<eos>",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!"
    "<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
    "gemma": "<start_of_turn>user\nBe brief.\n\nHi<end_of_turn>\n<start_of_turn>model\nHello!<end_of_turn>\n"
    "<start_of_turn>user\nTwo?<end_of_turn>\n<start_of_turn>model\nYes.<end_of_turn>\n",
    "llama-2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! <eos>[INST] Two? [/INST] Yes. <eos>",
    "llama-3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>",
    "mistral": "[INST] Be brief.\n\nHi[/INST] Hello!<eos>[INST] Two?[/INST] Yes.<eos>",
    "vicuna": "Be brief. USER: Hi ASSISTANT: Hello!<eos>USER: Two? ASSISTANT: Yes.<eos>",
}
WITHOUT_SYSTEM = {
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nHi",
    "chatml": "<|im_start|>user\nHi",
    "gemma": "<start_of_turn>user\nHi",
    "llama-2": "[INST] Hi",
    "llama-3": "<|start_header_id|>user<|end_header_id|>\n\nHi",
    "mistral": "[INST] Hi",
    "vicuna": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. USER: Hi",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_built_in_template_writes_its_format_to_the_letter(byte, name):
    ids, _ = tokens_and_weights(WITH_SYSTEM, byte, TEMPLATES[name])
    assert byte.decode(ids) == "<bos>" + RENDERED[name]
    ids, _ = tokens_and_weights(TWO_TURNS, byte, TEMPLATES[name])
    assert byte.decode(ids).startswith("<bos>" + WITHOUT_SYSTEM[name])


TRIMMED = {"gemma": {"user", "assistant"}, "llama-2": {"system", "user", "assistant"}, "mistral": {"assistant"}}
TRIMMED["llama-3"] = TRIMMED["llama-2"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_blanks_around_texts_go_where_the_published_template_trims_them_and_stay_elsewhere(byte, name):
    padded = chat(("system", "\n S \n"), ("user", "\n U \n"), ("assistant", "\n A \n"))
    text = byte.decode(tokens_and_weights(padded, byte, TEMPLATES[name])[0])
    kept = {turn.role for turn in padded.messages if turn.content in text}
    assert kept == {"system", "user", "assistant"} - TRIMMED.get(name, set())


def test_calls_beside_text_and_several_calls_are_written_where_the_format_has_them_and_refused_elsewhere(byte):
    both = Message("assistant", "Wait.", extra={"tool_calls": [call(1), call(2)]})
    two_results = [Message("tool", "3"), Message("tool", "4")]
    example = chat(("user", "Q"), both, *two_results, ("assistant", "7"), tools=(ADD,))
    assert answers(example, byte, TEMPLATES["chatml"])[0] == (
        'Wait.\n<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>'
        '\n<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
    )
    assert answers(example, byte, TEMPLATES["mistral"])[0] == (
        ' Wait.[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}}, {"name": "add", "arguments": {"a": 2}}]<eos>'
    )
    text = byte.decode(tokens_and_weights(example, byte, TEMPLATES["mistral"])[0])
    assert '[TOOL_RESULTS] {"content": "3"}[/TOOL_RESULTS][TOOL_RESULTS] {"content": "4"}[/TOOL_RESULTS]' in text
    with pytest.raises(BadRow, match="one tool call per message"):
        tokens_and_weights(example, byte, TEMPLATES["llama-3"])
    greeting = chat(("assistant", "Welcome."), ("user", "Q"), ("assistant", "A"), tools=(ADD,))
    with pytest.raises(BadRow, match="writes the tools into the first question"):
        tokens_and_weights(greeting, byte, TEMPLATES["llama-3"])


@pytest.mark.parametrize("name", sorted(TEMPLATES.keys() - TOOL_TEXTS.keys()))
def test_what_a_template_would_pass_over_in_silence_is_a_bad_row(byte, name):
    for example, part in (
        (chat(*TWO_TURNS.messages, tools=(ADD,)), "tools"),
        (chat(("user", "Q"), Message("assistant", "", extra={"tool_calls": [call(1)]})), "tool calls"),
        (chat(("user", "Q"), Message("assistant", "A", extra={"reasoning_content": "Hm"})), "reasoning_content"),
    ):
        with pytest.raises(BadRow, match=f"the chat template cannot render {part}"):
            tokens_and_weights(example, byte, TEMPLATES[name])
    with pytest.raises(BadRow, match=f"the {name} template has no place for this tool message"):
        tokens_and_weights(chat(("user", "Q"), ("tool", "R"), ("assistant", "A")), byte, TEMPLATES[name])
    names_alone = chat(Message("user", "Q", extra={"name": "Ann", "tool_calls": None}), ("assistant", "A"))
    assert len(answers(names_alone, byte, TEMPLATES[name])) == 1


def test_arguments_are_json_text_for_a_template_that_takes_no_objects(byte):
    """DeepSeek-V3's puts them between two strings."""
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% for one in m.tool_calls or [] %}"
    template += "{{ '[' + one.function.name + ' ' + one.function.arguments + ']' }}{% endfor %}{% endfor %}"
    example = chat(("user", "Q"), Message("assistant", "", extra={"tool_calls": [call(1), call(2)]}))
    assert answers(example, byte, template) == ['<|assistant|>[add {"a": 1}][add {"a": 2}]']
    null = chat(("user", "Q"), Message("assistant", "", extra={"tool_calls": [call(1)]}, has_content=False))
    assert answers(null, byte, template.replace("{{ m.content }}", "{{ '' + m.content }}"))[-1].endswith('{"a": 1}]')


def test_a_template_that_writes_one_of_several_calls_is_refused_for_several(byte):
    """gpt-oss'."""
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ (m.tool_calls or [])[:1] }}{% endfor %}"
    calls = [call(1), call(2)]
    with pytest.raises(BadRow, match="cannot render several tool calls in one answer"):
        tokens_and_weights(chat(("user", "Q"), Message("assistant", "", extra={"tool_calls": calls})), byte, template)
    tokens_and_weights(chat(("user", "Q"), Message("assistant", "", extra={"tool_calls": calls[:1]})), byte, template)


def test_reasoning_reaches_a_template_under_each_of_its_names(byte):
    for given in ("reasoning_content", "thinking", "reasoning"):
        for read in ("reasoning_content", "thinking", "reasoning"):
            template = "{% for m in messages %}" + f"({{{{ m.{read} }}}})" + "{{ m.content }}|{% endfor %}"
            example = chat(("user", "Q"), Message("assistant", "A", extra={given: "Hm"}))
            assert byte.decode(tokens_and_weights(example, byte, template)[0]) == "<bos>()Q|(Hm)A|"


# The tools' texts of every format and the names of tokens, written by what others' templates read them with.
GENERAL = "{{ bos_token }}{{ tools | tojson }}{{ messages | tojson }}{{ documents }}{{ eos_token }}{{ pad_token }}"
PLAIN = "<|{{ m.role }}|>{{ m.content }}<|end|>"
LEAVES_OUT = {
    "the text of system messages": "{% if m.role != 'system' %}" + PLAIN + "{% endif %}",
    "the text of tool messages": "{% if m.role != 'tool' %}" + PLAIN + "{{ m.tool_calls }}{% endif %}",
    "the text that accompanies tool calls": "{% if m.tool_calls %}<|call|>{{ m.tool_calls }}<|end|>{% else %}"
    + PLAIN
    + "{% endif %}",
    "the thoughts before </think>": "<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}{{ m.tool_calls }}<|end|>",
}


@pytest.mark.parametrize("part", LEAVES_OUT)
def test_what_a_template_leaves_out_is_a_bad_row_and_what_it_writes_is_not(byte, part):
    examples = {
        "the text of system messages": WITH_SYSTEM,
        "the text of tool messages": chat(
            ("user", "Q"), Message("assistant", "", extra={"tool_calls": [call(1)]}), ("tool", "3"), ("assistant", "3")
        ),
        "the text that accompanies tool calls": chat(
            ("user", "Q"), Message("assistant", "Wait.", extra={"tool_calls": [call(1)]}), ("tool", "3")
        ),
        "the thoughts before </think>": chat(("user", "Q"), ("assistant", "<think>\nHm\n</think>\n\nA")),
    }
    template = "{% for m in messages %}" + LEAVES_OUT[part] + "{% endfor %}"
    with pytest.raises(BadRow, match=f"the chat template leaves out {part}"):
        tokens_and_weights(examples[part], byte, template)
    tokens_and_weights(TWO_TURNS, byte, template)
    for example in examples.values():
        tokens_and_weights(example, byte, "{% for m in messages %}" + PLAIN + "{{ m.tool_calls }}{% endfor %}")


def test_mentioning_tools_and_reasoning_is_not_writing_them(byte):
    mentions = "{# tools tool_calls reasoning_content #}{% if tools is defined %}{% endif %}" + MARKED
    for example, part in (
        (chat(*TWO_TURNS.messages, tools=(ADD,)), "tools"),
        (chat(("user", "Q"), Message("assistant", "", extra={"tool_calls": [call(1)]})), "tool calls"),
        (chat(("user", "Q"), Message("assistant", "A", extra={"reasoning_content": "Hm"})), "reasoning_content"),
    ):
        with pytest.raises(BadRow, match=f"the chat template cannot render {part}"):
            tokens_and_weights(example, byte, mentions)


def test_a_second_system_message_that_replaces_the_first_is_a_bad_row(byte):
    """The distillates of R1 write the last one, at the start."""
    template = "{% set ns = namespace(system='') %}{% for m in messages if m.role == 'system' %}"
    template += "{% set ns.system = m.content %}{% endfor %}{{ ns.system }}"
    template += "{% for m in messages if m.role != 'system' %}<{{ m.role }}>{{ m.content }}|{% endfor %}"
    assert answers(WITH_SYSTEM, byte, template) == ["<assistant>Hello!|", "<assistant>Yes.|"]
    second = chat(*WITH_SYSTEM.messages, ("system", "Be long."), ("user", "Three?"), ("assistant", "No."))
    with pytest.raises(BadRow, match="leaves out the text of system messages"):
        tokens_and_weights(second, byte, template, train_on_last_turn_only=True)


def test_what_a_template_leaves_out_is_asked_once_for_rows_alike(byte, monkeypatch):
    renderings = []
    counted = templates._render
    monkeypatch.setattr(templates, "_render", lambda *args, **kw: renderings.append(args) or counted(*args, **kw))
    rows = [chat(("system", "S"), *[("user", f"Q{i}"), ("assistant", f"A{i}")] * i) for i in range(1, 30)]
    template = TEMPLATES["chatml"] + "{# of this test #}"
    tokenize_examples(rows[:2], byte, template)
    renderings.clear()
    for row in rows:
        check_has_place(row, template)
    assert not renderings
    rounds = [Message("assistant", "", extra={"tool_calls": [call(1)]}), ("tool", "3")] * 200
    check_has_place(chat(("user", "Q"), *rounds, ("assistant", "A")), template)
    assert len(renderings) < 20  # of short conversations, however many rounds this one has


def test_rows_are_the_same_every_day(byte, monkeypatch):
    """Llama 3.2's template writes the date into the system message."""
    template = "{% if strftime_now is defined %}{% set date = strftime_now('%d %b %Y') %}{% endif %}\n  {% if true %}\n"
    template += "{{ date }}{% endif %}{{ strftime_now('%-d/%m') }}" + MARKED
    assert byte.decode(tokens_and_weights(TWO_TURNS, byte, template)[0]).startswith("<bos>26 Jul 202426/07> Hi;")
    assert answers(TWO_TURNS, byte, template) == ["Hello!;", "Yes.;"]
    now = datetime.now()
    expected = byte.apply_chat_template(as_dicts(TWO_TURNS.messages), chat_template=template, tokenize=False)
    found = render(as_dicts(TWO_TURNS.messages), template, byte.special_tokens_map)
    assert found == expected.replace(f"{now:%d %b %Y}", "26 Jul 2024").replace(f"{now:%-d/%m}", "26/07")


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("template", [*TEMPLATES.values(), MARKED, CLOSING_EOS, GENERAL])
def test_a_conversation_is_rendered_as_transformers_renders_it(byte, template, prompt):
    nulls = {"name": None, "tool_call_id": "x", "reasoning_content": "Hm"}
    with_nulls = chat(*WITH_SYSTEM.messages[:-1], Message("assistant", "é<", extra=nulls))
    for example in (TWO_TURNS, WITH_SYSTEM, WITH_TOOLS, with_nulls):
        dicts, tools = as_dicts(example.messages), list(example.tools) or None
        try:
            expected = byte.apply_chat_template(
                dicts, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt
            )
        except Exception as refused:
            with pytest.raises(BadRow, match="refuses the conversation") as bad:
                render(dicts, template, byte.special_tokens_map, tools=example.tools, prompt=prompt)
            assert str(refused) in str(bad.value)
        else:
            found = render(dicts, template, byte.special_tokens_map, tools=example.tools, prompt=prompt)
            assert found == expected


BRANCHING = """{%- for m in messages -%}
{{ m.role + ':' + (m.content if 'content' in m else '(none)') }}
{%- for c in m.tool_calls or [] %}{{ '<' + c.function.name + c.function.arguments | tojson + '>' }}{% endfor %}{{ '|' }}
{%- endfor -%}"""


@pytest.mark.parametrize(("content", "said"), [({"content": None}, "(none)"), ({}, "(none)"), ({"content": ""}, "")])
def test_a_null_content_beside_calls_is_left_out_as_transformers_leaves_it_out(byte, content, said):
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": [call(1)], **content}]
    (example,) = to_examples({"messages": turns}, DatasetSpec("a.jsonl", "messages"))
    text = render(as_dicts(example.messages), BRANCHING, byte.special_tokens_map)
    assert text == byte.apply_chat_template(turns, chat_template=BRANCHING, tokenize=False)
    assert f"assistant:{said}<" in text
    assert len(answers(example, byte, BRANCHING)) == 1
    for name in ("chatml", "llama-3", "mistral"):  # of these chatml fails at a message without content
        empty = chat(("user", "Q"), Message("assistant", "", extra={"tool_calls": [call(1)]}))
        assert tokens_and_weights(example, byte, TEMPLATES[name]) == tokens_and_weights(empty, byte, TEMPLATES[name])


@pytest.mark.parametrize(
    "program", ["{{ 1 / 0 }}", "{{ '{} {}'.format(1) }}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}"]
)
def test_a_template_that_fails_as_programs_do_refuses_the_row(byte, program):
    with pytest.raises(BadRow, match="refuses the conversation"):
        render(as_dicts(TWO_TURNS.messages), program, byte.special_tokens_map)


def test_the_tokenizer_s_own_template_comes_before_the_default(byte):
    assert resolve_template(byte, None) == TEMPLATES["alpaca"]
    own = byte_tokenizer()
    own.chat_template = MARKED
    assert resolve_template(own, None) == MARKED
    assert resolve_template(own, "chatml") == TEMPLATES["chatml"]


def test_a_template_can_be_a_file(byte, tmp_path):
    (tmp_path / "own.jinja").write_text(MARKED)
    assert resolve_template(byte, str(tmp_path / "own.jinja")) == MARKED


def test_the_example_config_of_mistral_uses_a_template_whose_answers_end_with_eos(byte):
    """Under chatml, which its base model has no tokens for, no eos was ever trained on."""
    config = Path(__file__).parent.parent / "configs/mistral7b.yaml"
    template = TEMPLATES[yaml.safe_load(config.read_text())["data"]["chat_template"]]
    assert has_visible_end(byte, template)
    assert answers(WITH_SYSTEM, byte, template) == [" Hello!<eos>", " Yes.<eos>"]


def test_a_template_that_does_not_exist_is_refused_with_the_names_that_do(byte):
    with pytest.raises(UserError, match=r"'chat-ml' is neither .* \(alpaca, chatml, gemma, llama-2, .*, vicuna\)"):
        resolve_template(byte, "chat-ml")


def test_a_template_that_is_no_jinja_is_refused(byte, tmp_path):
    for begin in ("", "{{ strftime_now('%d') }}"):
        (tmp_path / "own.jinja").write_text(begin + "{% for m in messages %}\n{{ m.content }")
        with pytest.raises(UserError, match=r"own.jinja:2 is not valid jinja"):
            resolve_template(byte, str(tmp_path / "own.jinja"))


def test_several_templates_without_a_default_are_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"tool_use": MARKED, "rag": MARKED}
    with pytest.raises(UserError, match="several chat templates"):
        resolve_template(tokenizer, None)
