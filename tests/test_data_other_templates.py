"""Other people's templates: whatever they do to earlier turns and ends of answers, masks are right or a row is bad."""

import pytest
from conversations import (
    ADD,
    CLOSING_EOS,
    MARKED,
    THINKING,
    TWO_TURNS,
    WITH_SYSTEM,
    WithoutOffsets,
    answers,
    byte_tokenizer,
    call,
    chat,
    tokens_and_weights,
    weighted_texts,
)

from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.data.formats import Message
from sora_llm.data.readers import BadRow

# As CLOSING_EOS, but eos begins like the next turn, so that the two have more in common than the turn before.
CLOSING_LIKE_OPENING = """{%- for m in messages -%}
{{ '<e' + m.role + '>' + m.content + '|' }}
{%- endfor -%}{{ '<euser>' if false else eos_token if not add_generation_prompt else '<eassistant>' }}"""
# Mistral's habit: the system message stands in the last question.
MOVED_SYSTEM = """{%- for m in messages if m.role != 'system' -%}
{{ '[' + messages[0].content + ']' if m.role == 'user' and loop.revindex <= 2 - (messages[-1].role == 'user') else '' }}
{{- m.content + '|' -}}
{%- endfor -%}"""
# A prompt is written differently from the same turns before an answer.
MARKED_LAST_QUESTION = """{%- for m in messages -%}
{{ '(now) ' if loop.last and m.role == 'user' else '' }}{{ m.content + '|' }}
{%- endfor -%}"""
# Qwen 3: thoughts stand in the answers since the last question, in the last one even when it has none.
QWEN_3 = """{%- if tools -%}
  {{- '<|im_start|>system\\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}{{ '<|im_end|>\\n' }}
{%- endif -%}
{%- set ns = namespace(searching=true, last_query=messages | length - 1) -%}
{%- for m in messages[::-1] -%}
  {%- set index = (messages | length - 1) - loop.index0 -%}
  {%- if ns.searching and m.role == 'user' and not m.content.startswith('<tool_response>') -%}
    {%- set ns.searching = false -%}{%- set ns.last_query = index -%}
  {%- endif -%}
{%- endfor -%}
{%- for m in messages -%}
  {%- if m.role in ('user', 'system') -%}
    {{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' -}}
  {%- elif m.role == 'assistant' -%}
    {%- set content, thoughts = m.content, m.reasoning_content or '' -%}
    {%- if not thoughts and '</think>' in content -%}
      {%- set thoughts = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') -%}
      {%- set content = m.content.split('</think>')[-1].lstrip('\\n') -%}
    {%- endif -%}
    {{- '<|im_start|>assistant\\n' -}}
    {%- if loop.index0 > ns.last_query and (loop.last or thoughts) -%}
      {{- '<think>\\n' + thoughts.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') -}}
    {%- else -%}{{- content -}}{%- endif -%}
    {%- for call in m.tool_calls or [] -%}
      {{- '\\n' if content or not loop.first else '' }}{{ '<tool_call>\\n{"name": "' + call.function.name -}}
      {{- '", "arguments": ' }}{{ call.function.arguments | tojson }}{{ '}\\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\\n' -}}
  {%- elif m.role == 'tool' -%}
    {{- '<|im_start|>user' if loop.first or messages[loop.index0 - 1].role != 'tool' else '' -}}
    {{- '\\n<tool_response>\\n' + m.content + '\\n</tool_response>' -}}
    {{- '<|im_end|>\\n' if loop.last or messages[loop.index0 + 1].role != 'tool' else '' -}}
  {%- endif -%}
{%- endfor -%}
{{- '<|im_start|>assistant\\n' if add_generation_prompt else '' -}}"""
# gpt-oss: the last answer ends with eos, the others with another token.
GPT_OSS = """{%- for m in messages -%}
  {{- '<|start|>' + m.role + '<|message|>' + m.content -}}
  {{- eos_token if loop.last and m.role == 'assistant' and not add_generation_prompt else '<|end|>' -}}
{%- endfor -%}
{{- '<|start|>assistant' if add_generation_prompt else '' -}}"""
# DeepSeek's habit: the prompt opens the thoughts, which the written answer need not have.
OPENED_THOUGHTS = TEMPLATES["chatml"] + "{{ '<think>' if add_generation_prompt else '' }}"
# SmolLM3's habit: thoughts and answer are marked each by itself.
MARKED_TWICE = MARKED.replace("{% generation %}", "{% generation %}{{ 'hm;' }}{% endgeneration %} {% generation %}")


@pytest.mark.parametrize("template", [CLOSING_EOS, CLOSING_LIKE_OPENING])
def test_tokens_that_close_every_text_do_not_disturb_the_masks(byte, template):
    first, second = answers(TWO_TURNS, byte, template)
    assert (first, second) == (
        ("Hello!<|im_end|>", "Yes.<|im_end|>\n<eos>") if template == CLOSING_EOS else ("Hello!|", "Yes.|<eos>")
    )


def test_a_prompt_that_opens_more_than_the_answer_has_does_not_disturb_the_masks(byte):
    assert answers(TWO_TURNS, byte, OPENED_THOUGHTS) == ["Hello!<|im_end|>", "Yes.<|im_end|>"]


@pytest.mark.parametrize("template", [MOVED_SYSTEM, MARKED_LAST_QUESTION])
def test_a_template_that_rewrites_earlier_turns_is_refused_and_not_masked_wrongly(byte, template):
    with pytest.raises(BadRow, match="renders a turn differently"):
        tokens_and_weights(WITH_SYSTEM, byte, template)


EMPTY = "<think>\n\n</think>\n\n"
CHATML_TOKENS = ("<|im_start|>", "<|im_end|>")


def test_an_answer_that_loses_its_empty_thoughts_when_others_follow_is_supervised_as_it_stands(byte):
    """Qwen 3's template writes them into the last answer alone; every row with two answers was refused."""
    assert answers(WITH_SYSTEM, byte, THINKING) == ["Hello!<|im_end|>", "<think></think>Yes.<|im_end|>"]
    for tokenizer in (byte, byte_tokenizer(special=CHATML_TOKENS), WithoutOffsets(byte)):
        assert answers(WITH_SYSTEM, tokenizer, QWEN_3) == ["Hello!<|im_end|>", f"{EMPTY}Yes.<|im_end|>"]
    for same in ("Two?", "<|im_end|>", "assistant\n", "Lorem ipsum"):  # nothing is found by what is written in it
        example = chat(("user", same), ("assistant", same), ("user", same), ("assistant", same))
        assert answers(example, byte, QWEN_3) == [f"{same}<|im_end|>", f"{EMPTY}{same}<|im_end|>"]
    opened = QWEN_3.replace("assistant\\n' if add_", "assistant\\n<think>' if add_")  # as Qwen 3's thinking models
    example = chat(("user", "Hi"), ("assistant", "<th>"), *TWO_TURNS.messages[2:])
    assert opened != QWEN_3 and answers(example, byte, opened)[0] == "<th><|im_end|>"
    with_closing = QWEN_3 + "{{ '' if add_generation_prompt else eos_token }}"
    assert answers(TWO_TURNS, byte, with_closing)[0] == "Hello!<|im_end|>"


@pytest.mark.parametrize("text", ["", "Wait."])
def test_calls_are_found_under_a_template_that_rewrites_them_when_their_results_follow(byte, text):
    def written(*numbers: int) -> str:
        calls = [f'<tool_call>\n{{"name": "add", "arguments": {{"a": {i}}}}}\n</tool_call>' for i in numbers]
        return "\n".join([*[text] * bool(text), *calls]) + "<|im_end|>"

    rounds = [
        Message("assistant", text, extra={"tool_calls": [call(1)]}),
        Message("tool", "3"),
        Message("assistant", text, extra={"tool_calls": [call(1), call(2)]}),
        Message("tool", "add"),
        Message("tool", text),
    ]
    example = chat(("user", "Q"), *rounds, ("assistant", "7"), ("user", "Q"), *rounds, ("assistant", "8"), tools=(ADD,))
    found = answers(example, byte, QWEN_3)
    assert found == [*[written(1), written(1, 2)], "7<|im_end|>", *[written(1), written(1, 2)], f"{EMPTY}8<|im_end|>"]


@pytest.mark.parametrize("thinks", ["in a field", "in the text"])
def test_an_earlier_answer_whose_thoughts_the_template_drops_is_refused_and_the_last_one_s_are_supervised(byte, thinks):
    def answer(text: str) -> Message:
        if thinks == "in a field":
            return Message("assistant", text, extra={"reasoning_content": "Hm"})
        return Message("assistant", f"<think>\nHm\n</think>\n\n{text}")

    last = chat(("user", "Q"), ("assistant", "A"), ("user", "Q"), answer("B"))
    assert answers(last, byte, QWEN_3) == ["A<|im_end|>", "<think>\nHm\n</think>\n\nB<|im_end|>"]
    both = chat(("user", "Q"), answer("A"), ("user", "Q"), answer("B"))
    with pytest.raises(BadRow, match="renders a turn differently"):
        tokens_and_weights(both, byte, QWEN_3)
    assert answers(both, byte, QWEN_3, train_on_last_turn_only=True) == ["<think>\nHm\n</think>\n\nB<|im_end|>"]


def test_an_answer_that_says_something_else_when_others_follow_is_refused(byte):
    for written in ("m.content | upper", "''", "m.content[:3]", "m.content + m.content"):
        ours = "{{ m.content if loop.last or m.role == 'user' else " + written + " }}"
        template = "{% for m in messages %}{{ '<|im_start|>' + m.role }}" + ours + "<|im_end|>{% endfor %}"
        template += "{{ '<|im_start|>assistant' if add_generation_prompt }}"
        with pytest.raises(BadRow, match="renders a turn differently"):
            tokens_and_weights(TWO_TURNS, byte, template)
    no_end = "{% for m in messages %}[{{ m.role }}]{{ '#' if loop.last and m.role == 'assistant' }}{{ m.content }}"
    no_end += "{{ eos_token if loop.last }}{% endfor %}"
    with pytest.raises(BadRow, match="renders a turn differently"):
        tokens_and_weights(TWO_TURNS, byte, no_end)


def test_the_token_that_ends_earlier_answers_is_supervised_where_another_ends_the_last():
    """gpt-oss: eos was taken off as what closes every text, and the model never learned to end an earlier answer."""
    tokenizer = byte_tokenizer(special=("<|start|>", "<|message|>", "<|end|>"))
    first, last = answers(WITH_SYSTEM, tokenizer, GPT_OSS)
    assert (first, last) == ("<|message|>Hello!<|end|>", "<|message|>Yes.<eos>")


def test_a_token_that_begins_the_next_turn_is_not_taken_for_the_end_of_an_answer():
    template = "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% endfor %}"
    template += "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
    tokenizer = byte_tokenizer(special=("<|user|>", "<|assistant|>"))
    assert answers(TWO_TURNS, tokenizer, template) == ["Hello!", "Yes.<eos>"]
    opens_alike = "{% for m in messages %}<|turn|>{{ m.role }}: {{ m.content }}{% endfor %}"
    opens_alike += "{{ '<|turn|>assistant: ' if add_generation_prompt else eos_token }}"
    assert answers(TWO_TURNS, byte_tokenizer(special=("<|turn|>",)), opens_alike) == ["Hello!", "Yes.<eos>"]


def test_the_last_turn_can_be_trained_on_under_a_template_that_rewrites_earlier_ones(byte):
    assert answers(TWO_TURNS, byte, THINKING, train_on_last_turn_only=True) == ["<think></think>Yes.<|im_end|>"]


def test_a_template_that_leaves_out_a_turn_to_train_on_is_refused(byte):
    template = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}|{% endfor %}"
    with pytest.raises(BadRow, match=r"renders nothing for messages\[1\] \(assistant\)"):
        tokens_and_weights(TWO_TURNS, byte, template)


def test_blanks_are_supervised_where_a_template_ends_answers_with_nothing_else(byte):
    """A model that never learns to write them would never stop."""
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}"
    template += "{{ 'assistant: ' if add_generation_prompt }}"
    assert answers(TWO_TURNS, byte, template) == ["Hello!\n\n", "Yes.\n\n"]


def test_generation_markers_are_used_where_a_template_has_them(byte):
    assert answers(TWO_TURNS, byte, MARKED) == ["Hello!;", "Yes.;"]
    assert answers(TWO_TURNS, byte, MARKED, train_on_last_turn_only=True) == ["Yes.;"]
    ids, _ = tokens_and_weights(TWO_TURNS, byte, MARKED)
    assert byte.decode(ids) == "<bos>> Hi;# Hello!;> Two?;# Yes.;"


def test_marked_answers_that_lose_their_thoughts_when_others_follow_are_trained_on_only_where_they_have_them(byte):
    """LFM2.5's, whose markers find every answer."""
    thoughts = "{{ '<' + m.reasoning_content + '>' if m.reasoning_content and loop.last }}"
    template = MARKED.replace("{% generation %}", "{% generation %}" + thoughts)
    assert thoughts in template
    thinking = [
        Message("assistant", text, extra={"reasoning_content": "Hm"}, weight=weight)
        for text, weight in (("Hello!", None), ("Hello!", 0.0), ("Yes.", None))
    ]
    first, unlearned = (chat(("user", "Hi"), one, ("user", "Two?"), thinking[2]) for one in thinking[:2])
    with pytest.raises(BadRow, match="leaves out the reasoning of an answer that others follow"):
        tokens_and_weights(first, byte, template)
    assert answers(first, byte, template, train_on_last_turn_only=True) == ["<Hm>Yes.;"]
    assert answers(unlearned, byte, template) == ["<Hm>Yes.;"]
    assert answers(chat(("user", "Hi"), ("assistant", "Ho"), ("user", "Two?"), thinking[2]), byte, template) == [
        "Ho;",
        "<Hm>Yes.;",
    ]


def test_spans_that_touch_are_one_answer_if_there_are_more_of_them_than_answers(byte):
    """Phi-3's last answer and its eos."""
    template = MARKED + "{% generation %}{{ eos_token }}{% endgeneration %}"
    assert answers(TWO_TURNS, byte, template) == ["Hello!;", "Yes.;<eos>"]
    assert answers(TWO_TURNS, byte, template, train_on_last_turn_only=True) == ["Yes.;<eos>"]


def test_weights_hold_under_generation_markers(byte):
    half = Message("assistant", "Hello!", weight=0.5)
    example = chat(Message("user", "Hi", weight=2.0), half, *TWO_TURNS.messages[2:])
    found = weighted_texts(byte, *tokens_and_weights(example, byte, MARKED))
    assert found == [(2.0, "> Hi;"), (0.5, "Hello!;"), (1.0, "Yes.;")]
    inputs_too = tokens_and_weights(example, byte, MARKED, train_on_inputs=True)
    assert weighted_texts(byte, *inputs_too) == [(2.0, "> Hi;"), (1.0, "# "), (0.5, "Hello!;"), (1.0, "> Two?;# Yes.;")]


def test_several_marked_spans_in_an_answer_have_its_weight_where_all_answers_have_the_same(byte):
    assert answers(TWO_TURNS, byte, MARKED_TWICE) == ["hm;", "Hello!;", "hm;", "Yes.;"]
    with pytest.raises(BadRow, match="give 4 spans for 2 assistant turns"):
        tokens_and_weights(TWO_TURNS, byte, MARKED_TWICE, train_on_last_turn_only=True)
    marks_nothing = MARKED.replace("m.role == 'assistant'", "m.role == 'nobody'")
    with pytest.raises(BadRow, match="give 0 spans for 2 assistant turns"):
        tokens_and_weights(TWO_TURNS, byte, marks_nothing)
