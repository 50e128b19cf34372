"""Token ids and weights: whole sequences against golden ones, and what must hold for all.

tests/test_data_masks.py looks for exceptions among random conversations.
"""

import itertools
from dataclasses import replace

import pytest
from conftest import SHARED
from conversations import (
    CLOSING_EOS,
    MARKED,
    TOOL_TEXTS,
    TWO_TURNS,
    WITH_SYSTEM,
    WITH_TOOLS,
    WithoutOffsets,
    answers,
    byte_tokenizer,
    chat,
    needs_data,
    needs_models,
    tokens_and_weights,
    weighted_texts,
)
from tokenizers import AddedToken
from transformers import AutoTokenizer, ByT5Tokenizer

from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.data.formats import Message, PromptCompletion, Text
from sora_llm.data.readers import BadRow
from sora_llm.data.sources import DatasetSpec, read_rows
from sora_llm.data.tokenize import special_tokens_written, tokenize_examples


@pytest.fixture(scope="module")
def base5m():
    return AutoTokenizer.from_pretrained(SHARED / "models" / "base5m")


# ----- golden sequences, checked by reading: tokens with weight 1 stand in brackets, those with 0.5 as 0.5[...] -------

GOLDEN = {
    ("base5m", "alpaca"): """
        <s> ▁Be ▁bri ef . <0x0A> <0x0A> <0x23> <0x23> <0x23> ▁In st ruction : <0x0A> H i <0x0A> <0x0A> <0x23>
        <0x23> <0x23> ▁R es pon se : <0x0A> [H] [ell] [o] [!] [</s>] <0x0A> <0x0A> <0x23> <0x23> <0x23> ▁In st
        ruction : <0x0A> T w o ? <0x0A> <0x0A> <0x23> <0x23> <0x23> ▁R es pon se : <0x0A>
        0.5[Yes] 0.5[.] 0.5[</s>]
    """,
    ("base5m", "chatml"): """
        <s> ▁ <0x3C> <0x7C> im _ st art <0x7C> <0x3E> s y stem <0x0A> B e ▁bri ef . <0x3C> <0x7C> im _ end
        <0x7C> <0x3E> <0x0A> <0x3C> <0x7C> im _ st art <0x7C> <0x3E> us er <0x0A> H i <0x3C> <0x7C> im _ end
        <0x7C> <0x3E> <0x0A> <0x3C> <0x7C> im _ st art <0x7C> <0x3E> ass ist ant <0x0A> [H] [ell] [o] [!]
        [<0x3C>] [<0x7C>] [im] [_] [end] [<0x7C>] [<0x3E>] <0x0A> <0x3C> <0x7C> im _ st art <0x7C> <0x3E> us er
        <0x0A> T w o ? <0x3C> <0x7C> im _ end <0x7C> <0x3E> <0x0A> <0x3C> <0x7C> im _ st art <0x7C> <0x3E> ass
        ist ant <0x0A> 0.5[Yes] 0.5[.] 0.5[<0x3C>] 0.5[<0x7C>] 0.5[im] 0.5[_] 0.5[end] 0.5[<0x7C>] 0.5[<0x3E>] <0x0A>
    """,
    ("base5m", "gemma"): """
        <s> <0x3C> st art _ of _ t urn <0x3E> us er <0x0A> B e ▁bri ef . <0x0A> <0x0A> H i <0x3C> end _ of _ t
        urn <0x3E> <0x0A> <0x3C> st art _ of _ t urn <0x3E> m od el <0x0A> [H] [ell] [o] [!] [<0x3C>] [end] [_]
        [of] [_] [t] [urn] [<0x3E>] <0x0A> <0x3C> st art _ of _ t urn <0x3E> us er <0x0A> T w o ? <0x3C> end _
        of _ t urn <0x3E> <0x0A> <0x3C> st art _ of _ t urn <0x3E> m od el <0x0A> 0.5[Yes] 0.5[.] 0.5[<0x3C>]
        0.5[end] 0.5[_] 0.5[of] 0.5[_] 0.5[t] 0.5[urn] 0.5[<0x3E>] <0x0A>
    """,
    ("base5m", "llama-2"): """
        <s> <0x5B> IN S T <0x5D> ▁ <0x3C> <0x3C> S Y S <0x3E> <0x3E> <0x0A> B e ▁bri ef . <0x0A> <0x3C> <0x3C>
        <0x2F> S Y S <0x3E> <0x3E> <0x0A> <0x0A> H i ▁ <0x5B> <0x2F> IN S T <0x5D> [▁He] [ll] [o] [!] [▁] [</s>]
        <0x5B> IN S T <0x5D> ▁Two ? ▁ <0x5B> <0x2F> IN S T <0x5D> 0.5[▁Yes] 0.5[.] 0.5[▁] 0.5[</s>]
    """,
    ("base5m", "llama-3"): """
        <s> <0x3C> <0x7C> st art _ head er _ id <0x7C> <0x3E> s y stem <0x3C> <0x7C> end _ head er _ id <0x7C>
        <0x3E> <0x0A> <0x0A> B e ▁bri ef . <0x3C> <0x7C> e ot _ id <0x7C> <0x3E> <0x3C> <0x7C> st art _ head er
        _ id <0x7C> <0x3E> us er <0x3C> <0x7C> end _ head er _ id <0x7C> <0x3E> <0x0A> <0x0A> H i <0x3C> <0x7C>
        e ot _ id <0x7C> <0x3E> <0x3C> <0x7C> st art _ head er _ id <0x7C> <0x3E> ass ist ant <0x3C> <0x7C> end
        _ head er _ id <0x7C> <0x3E> <0x0A> <0x0A> [H] [ell] [o] [!] [<0x3C>] [<0x7C>] [e] [ot] [_] [id]
        [<0x7C>] [<0x3E>] <0x3C> <0x7C> st art _ head er _ id <0x7C> <0x3E> us er <0x3C> <0x7C> end _ head er _
        id <0x7C> <0x3E> <0x0A> <0x0A> T w o ? <0x3C> <0x7C> e ot _ id <0x7C> <0x3E> <0x3C> <0x7C> st art _ head
        er _ id <0x7C> <0x3E> ass ist ant <0x3C> <0x7C> end _ head er _ id <0x7C> <0x3E> <0x0A> <0x0A> 0.5[Yes]
        0.5[.] 0.5[<0x3C>] 0.5[<0x7C>] 0.5[e] 0.5[ot] 0.5[_] 0.5[id] 0.5[<0x7C>] 0.5[<0x3E>]
    """,
    ("base5m", "mistral"): """
        <s> <0x5B> IN S T <0x5D> ▁Be ▁bri ef . <0x0A> <0x0A> H i <0x5B> <0x2F> IN S T <0x5D> [▁He] [ll] [o] [!]
        [</s>] <0x5B> IN S T <0x5D> ▁Two ? <0x5B> <0x2F> IN S T <0x5D> 0.5[▁Yes] 0.5[.] 0.5[</s>]
    """,
    ("base5m", "vicuna"): """
        <s> ▁Be ▁bri ef . ▁US ER : ▁H i ▁A S S IS T AN T : [▁He] [ll] [o] [!] [</s>] US ER : ▁Two ? ▁A S S IS T
        AN T : 0.5[▁Yes] 0.5[.] 0.5[</s>]
    """,
    ("stories260k", "alpaca"): """
        <s> ▁B e ▁b ri e f . <0x0A> <0x0A> <0x23> <0x23> <0x23> ▁I n st r u c t i on : <0x0A> H i <0x0A> <0x0A>
        <0x23> <0x23> <0x23> ▁ R es p on se : <0x0A> [H] [e] [ll] [o] [!] [</s>] <0x0A> <0x0A> <0x23> <0x23>
        <0x23> ▁I n st r u c t i on : <0x0A> T w o ? <0x0A> <0x0A> <0x23> <0x23> <0x23> ▁ R es p on se : <0x0A>
        0.5[Y] 0.5[es] 0.5[.] 0.5[</s>]
    """,
    ("stories260k", "llama-2"): """
        <s> [ I N S T ] ▁ < < S Y S > > <0x0A> B e ▁b ri e f . <0x0A> < < / S Y S > > <0x0A> <0x0A> H i ▁ [ / I
        N S T ] [▁He] [ll] [o] [!] [▁] [</s>] [ I N S T ] ▁T w o ? ▁ [ / I N S T ] 0.5[▁] 0.5[Y] 0.5[es] 0.5[.]
        0.5[▁] 0.5[</s>]
    """,
    ("stories260k", "mistral"): """
        <s> [ I N S T ] ▁B e ▁b ri e f . <0x0A> <0x0A> H i [ / I N S T ] [▁He] [ll] [o] [!] [</s>] [ I N S T ] ▁T
        w o ? [ / I N S T ] 0.5[▁] 0.5[Y] 0.5[es] 0.5[.] 0.5[</s>]
    """,
    ("stories260k", "vicuna"): """
        <s> ▁B e ▁b ri e f . ▁ U S E R : ▁H i ▁ A S S I S T A N T : [▁He] [ll] [o] [!] [</s>] U S E R : ▁T w o ? ▁
        A S S I S T A N T : 0.5[▁] 0.5[Y] 0.5[es] 0.5[.] 0.5[</s>]
    """,
}
GOLDEN_ALPACA_INPUT = """
    <s> ▁B el ow ▁is ▁an ▁inst ruction ▁that ▁describ es ▁a ▁t ask , ▁pa ired ▁with ▁an ▁in p ut ▁that ▁prov ides
    ▁further ▁cont e xt . ▁W r ite ▁a ▁res pon se ▁that ▁appro p ri ately ▁comple t es ▁the ▁requ est . <0x0A>
    <0x0A> <0x23> <0x23> <0x23> ▁In st ruction : <0x0A> A dd . <0x0A> <0x0A> <0x23> <0x23> <0x23> ▁In p ut :
    <0x0A> 1 ▁ 2 <0x0A> <0x0A> <0x23> <0x23> <0x23> ▁R es pon se : <0x0A> [3] [</s>]
"""


def pieces(tokenizer, ids: list[int], weights: list[float]) -> list[str]:
    named = {0.0: "{}", 1.0: "[{}]"}
    tokens = tokenizer.convert_ids_to_tokens(ids)
    return [named.get(w, f"{w:g}[{{}}]").format(token) for token, w in zip(tokens, weights, strict=True)]


@needs_models
@pytest.mark.parametrize(("model", "name"), GOLDEN)
def test_a_conversation_gives_the_golden_sequence(model, name):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / model)
    example = chat(*WITH_SYSTEM.messages[:-1], Message("assistant", "Yes.", weight=0.5))
    sequence = pieces(tokenizer, *tokens_and_weights(example, tokenizer, TEMPLATES[name]))
    assert sequence == GOLDEN[model, name].split()


@needs_models
def test_alpaca_s_input_gives_the_golden_sequence(base5m):
    example = chat(Message("user", "Add.", input="1 2"), ("assistant", "3"))
    sequence = pieces(base5m, *tokens_and_weights(example, base5m, TEMPLATES["alpaca"]))
    assert sequence == GOLDEN_ALPACA_INPUT.split()


# ----- what is supervised ---------------------------------------------------------------------------------------------

END_OF_TURN = {
    "alpaca": "<eos>",
    "chatml": "<|im_end|>",
    "gemma": "<end_of_turn>",
    "llama-2": " <eos>",
    "llama-3": "<|eot_id|>",
    "mistral": "<eos>",
    "vicuna": "<eos>",
}
LEAD = {"llama-2": " ", "mistral": " ", "vicuna": " "}


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_supervised_are_the_answers_with_their_end_of_turn(name, adds_bos):
    tokenizer = byte_tokenizer(adds_bos=adds_bos, special=("<|eot_id|>", "<end_of_turn>"))
    expected = [LEAD.get(name, "") + text + END_OF_TURN[name] for text in ("Hello!", "Yes.")]
    assert answers(WITH_SYSTEM, tokenizer, TEMPLATES[name]) == expected


def test_the_end_of_turn_is_supervised_where_the_tokenizer_merges_it_with_the_line_break():
    """With GPT-like merges ">\\n" is one token; a mask that stops before the line break would lose the marker's end."""
    tokenizer = byte_tokenizer(merges=((">", "Ċ"),))
    assert answers(TWO_TURNS, tokenizer, TEMPLATES["chatml"]) == ["Hello!<|im_end|>\n", "Yes.<|im_end|>\n"]


def test_a_token_that_lies_across_the_start_of_an_answer_belongs_to_it():
    """Two line breaks are one token, the template writes one and the answer begins with another."""
    tokenizer = byte_tokenizer(merges=(("Ċ", "Ċ"),))
    example = chat(("user", "Hi"), ("assistant", "\nHo"))
    assert answers(example, tokenizer, TEMPLATES["chatml"]) == ["\n\nHo<|im_end|>"]


def test_a_marker_that_swallows_the_blanks_after_it_stays_with_the_prompt():
    """Phi-3's <|assistant|> stands for the line break after it as well, and for blanks that begin an answer."""
    marker = AddedToken("<|assistant|>", special=True, rstrip=True)
    template = "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}{% endfor %}"
    template += "{{ '<|assistant|>\n' if add_generation_prompt }}"
    for content in ("Ho", " \n Ho"):
        example = chat(("user", "Hi"), ("assistant", content))
        assert answers(example, byte_tokenizer(special=(marker,)), template) == ["Ho<eos>"]


def test_masks_are_right_where_the_tokenizer_leaves_blanks_out_of_its_offsets():
    """GPT-NeoX's does (trim_offsets): a token of blanks then says that it is nowhere."""
    tokenizer = byte_tokenizer(trim_offsets=True, merges=(("Ġ", "Ġ"), ("Ġ", "x")))
    assert tokenizer("  x", return_offsets_mapping=True)["offset_mapping"] == [(0, 0), (2, 2), (2, 3)]
    example = chat(("user", " Hi "), ("assistant", "  x"), ("user", " x "), ("assistant", "  "), ("user", "  "))
    assert answers(example, tokenizer, TEMPLATES["vicuna"]) == ["   x<eos>", "   <eos>"]
    assert answers(example, tokenizer, TEMPLATES["chatml"]) == ["  x<|im_end|>", "  <|im_end|>"]


def test_a_tokenizer_that_does_not_say_where_its_tokens_come_from_gives_the_same_masks():
    tokenizer = ByT5Tokenizer()
    assert not tokenizer.is_fast
    assert answers(WITH_SYSTEM, tokenizer, TEMPLATES["chatml"]) == ["Hello!<|im_end|>", "Yes.<|im_end|>"]
    assert answers(PromptCompletion("ab", "cd"), tokenizer, "") == ["cd</s>"]


def test_a_tokenizer_without_offsets_that_joins_the_end_of_turn_with_the_line_break_keeps_it_supervised():
    fast = byte_tokenizer(merges=((">", "Ċ"),))
    assert answers(TWO_TURNS, WithoutOffsets(fast), TEMPLATES["chatml"]) == ["Hello!<|im_end|>\n", "Yes.<|im_end|>\n"]


def test_position_0_is_never_supervised(byte):
    for tokenizer in (byte, byte_tokenizer(adds_bos=False)):
        for example in (Text("ab"), PromptCompletion("", "ab"), chat(("user", "a"), ("assistant", "b"))):
            _, weights = tokens_and_weights(example, tokenizer, TEMPLATES["chatml"], train_on_inputs=True)
            assert weights == [0] + [1] * (len(weights) - 1)


def test_only_the_last_answer_is_supervised_on_request(byte):
    for name in TEMPLATES:
        expected = [LEAD.get(name, "") + "Yes." + END_OF_TURN[name]]
        unanswered = chat(*TWO_TURNS.messages, ("user", "Bye"))
        for example in (TWO_TURNS, unanswered):
            assert answers(example, byte, TEMPLATES[name], train_on_last_turn_only=True) == expected


def test_a_message_s_weight_says_how_much_to_train_on_it(byte):
    first, second = Message("assistant", "Hello!", weight=0.0), Message("assistant", "Yes.", weight=0.5)
    example = chat(("user", "Hi"), first, ("user", "Two?"), second)
    assert weighted_texts(byte, *tokens_and_weights(example, byte, TEMPLATES["chatml"])) == [(0.5, "Yes.<|im_end|>")]
    example = chat(("user", "Hi"), ("assistant", "Ho"), Message("user", "Two?", weight=2.0), second)
    found = weighted_texts(byte, *tokens_and_weights(example, byte, TEMPLATES["chatml"]))
    asked = "<|im_start|>user\nTwo?<|im_end|>"
    assert found == [(1.0, "Ho<|im_end|>"), (2.0, asked), (0.5, "Yes.<|im_end|>")]


def test_what_the_assistant_said_in_a_prompt_is_trained_on_like_the_rest_of_the_prompt(byte):
    before = Message("assistant", "Ho", is_context=True)
    example = chat(Message("user", "Hi", is_context=True), before, ("user", "Two?"), ("assistant", "Yes."))
    template = TEMPLATES["chatml"]
    assert answers(example, byte, template) == ["Yes.<|im_end|>"]
    _, weights = tokens_and_weights(example, byte, template, train_on_inputs=True)
    assert weights == [0] + [1] * (len(weights) - 1)
    weighed = chat(("user", "Hi"), replace(before, weight=1.0), ("user", "Two?"), ("assistant", "Yes."))
    assert answers(weighed, byte, template) == ["Ho<|im_end|>", "Yes.<|im_end|>"]


def test_a_message_s_weight_comes_before_the_options(byte):
    last = Message("assistant", "Yes.", weight=0.5)
    example = chat(Message("user", "Hi", weight=0.0), ("assistant", "Ho"), ("user", "Two?"), last)
    options = {"train_on_inputs": True}
    found = weighted_texts(byte, *tokens_and_weights(example, byte, TEMPLATES["llama-3"], **options))
    header = "<|start_header_id|>{}<|end_header_id|>\n\n"
    between = header.format("assistant") + "Ho<|eot_id|>" + header.format("user") + "Two?<|eot_id|>"
    assert found == [(1.0, between + header.format("assistant")), (0.5, "Yes.<|eot_id|>")]
    only_last = weighted_texts(
        byte, *tokens_and_weights(example, byte, TEMPLATES["llama-3"], train_on_last_turn_only=True)
    )
    assert only_last == [(0.5, "Yes.<|eot_id|>")]


def test_an_early_answer_is_not_trained_on_whatever_its_weight_where_only_the_last_one_is_asked_for(byte):
    early = Message("assistant", "Hello!", weight=1.0)
    example = chat(("user", "Hi"), early, ("user", "Two?"), ("assistant", "Yes."))
    assert answers(example, byte, TEMPLATES["chatml"], train_on_last_turn_only=True) == ["Yes.<|im_end|>"]


@pytest.mark.parametrize("name", ["gemma", "llama-2", "mistral"])
def test_a_system_message_inside_the_first_question_has_its_own_weight(byte, name):
    example = chat(Message("system", "Sys", weight=0.25), Message("user", "Q", weight=0.5), ("assistant", "A"))
    found = weighted_texts(byte, *tokens_and_weights(example, byte, TEMPLATES[name]))
    assert [weight for weight, _ in found] == [0.25, 0.5, 1.0]
    assert "Sys" in found[0][1] and "Q" not in found[0][1] and found[1][1].startswith("Q")


def test_a_turn_that_follows_no_question_is_supervised_where_the_template_can_render_it(byte):
    greeting = chat(("assistant", "Welcome."), ("user", "Hi"), ("assistant", "Ho"))
    assert answers(greeting, byte, TEMPLATES["chatml"]) == ["Welcome.<|im_end|>", "Ho<|im_end|>"]
    with pytest.raises(BadRow, match="the alpaca template"):
        tokens_and_weights(chat(("system", "a"), ("system", "b"), ("assistant", "c")), byte, TEMPLATES["alpaca"])
    with pytest.raises(BadRow, match="begins with the assistant"):
        tokens_and_weights(greeting, byte, TEMPLATES["alpaca"])


OUT_OF_TURN = {
    "two questions": ("user", "user", "assistant"),
    "two answers": ("user", "assistant", "assistant"),
    "an answer first": ("assistant", "user", "assistant"),
    "a second system message": ("user", "assistant", "system", "user", "assistant"),
    "a tool": ("user", "tool", "assistant"),
}


@pytest.mark.parametrize("roles", OUT_OF_TURN.values(), ids=OUT_OF_TURN)
@pytest.mark.parametrize("name", ["gemma", "llama-2", "mistral", "vicuna"])
def test_turns_in_an_order_that_the_model_has_never_seen_are_a_bad_row(byte, name, roles):
    with pytest.raises(BadRow, match=f"refuses the conversation: the {name} template has no place for this"):
        tokens_and_weights(chat(*[(role, "x") for role in roles]), byte, TEMPLATES[name])


def test_one_bad_row_leaves_the_others_of_a_chunk_alone(byte):
    bad = chat(("user", "a"), ("tool", "b"), ("assistant", "c"))
    rows = tokenize_examples([Text("ab"), bad, TWO_TURNS, bad], byte, TEMPLATES["alpaca"])
    assert [isinstance(row, BadRow) for row in rows] == [False, True, False, True]
    assert byte.decode(rows[0][0]) == "<bos>ab<eos>" and "Hello!" in byte.decode(rows[2][0])
    assert tokenize_examples([], byte, "") == []


def test_alpaca_s_input_is_part_of_the_question_under_other_templates(byte):
    example = chat(Message("user", "Add.", input="1 2"), ("assistant", "3"))
    ids, _ = tokens_and_weights(example, byte, TEMPLATES["chatml"])
    assert "<|im_start|>user\nAdd.\n\n1 2<|im_end|>" in byte.decode(ids)


# ----- tools ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TOOL_TEXTS)
def test_tools_are_written_to_the_letter_and_calls_are_supervised_like_answers(byte, name):
    ids, weights = tokens_and_weights(WITH_TOOLS, byte, TEMPLATES[name])
    runs = itertools.groupby(range(len(ids)), key=lambda i: weights[i])
    texts = [(weight, byte.decode([ids[i] for i in run])) for weight, run in runs]
    assert "".join(f"[[{text}]]" if weight else text for weight, text in texts) == "<bos>" + TOOL_TEXTS[name]


# ----- one BOS --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_there_is_exactly_one_bos(byte, name):
    for template in (TEMPLATES[name], "{{ bos_token }}" + TEMPLATES["chatml"]):
        ids, _ = tokens_and_weights(TWO_TURNS, byte, template)
        assert ids[0] == byte.bos_token_id and ids.count(byte.bos_token_id) == 1
    for example in (Text("ab"), PromptCompletion("a", "b"), PromptCompletion("", "b"), Text("<bos>ab")):
        ids, _ = tokens_and_weights(example, byte, "")
        assert ids[0] == byte.bos_token_id and ids.count(byte.bos_token_id) == 1


@needs_models
@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("model", ["base5m", "stories260k"])
def test_there_is_exactly_one_bos_under_the_real_tokenizers(model, name):
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / model)
    for example in (TWO_TURNS, WITH_SYSTEM):
        ids, _ = tokens_and_weights(example, tokenizer, TEMPLATES[name])
        assert ids[0] == 1 and ids.count(1) == 1


@pytest.mark.parametrize("opening", [("<g>", "<sop>"), ("<sop>",)])
def test_a_tokenizer_that_opens_texts_with_other_tokens_than_one_bos_does_so_in_rows(opening):
    """GLM's has two, of which neither is called bos; rows began without them, and servers asked with them."""
    tokenizer = byte_tokenizer(special=("<g>", "<sop>"), opening=opening)
    begin = tokenizer.convert_tokens_to_ids(list(opening))
    ids, _ = tokens_and_weights(Text("<g>ab"), tokenizer, "")
    assert ids[: len(begin) + 1] == [*begin, tokenizer.convert_tokens_to_ids("<g>")], "which is not all of an opening"
    for example in (Text("ab"), PromptCompletion("a", "b"), Text("".join(opening) + "ab"), TWO_TURNS):
        ids, weights = tokens_and_weights(example, tokenizer, TEMPLATES["chatml"], train_on_inputs=True)
        assert ids[: len(begin) + 1] == [*begin, ids[len(begin)]] and not set(ids[len(begin) :]) & set(begin)
        assert ids[: len(begin)] == tokenizer("a")["input_ids"][: len(begin)]
        is_written = isinstance(example, Text) and example.text.startswith(opening)
        assert weights[: len(begin)] == [0.0, *[float(is_written)] * (len(begin) - 1)] and weights[len(begin)] == 1


def test_a_special_token_that_somebody_wrote_into_a_message_is_told_of():
    """The tokenizer takes it for the token: here an answer has a second BOS, and an eos in its middle."""
    tokenizer = byte_tokenizer(special=("<|end|>", "<|end|>ing"))
    struck = chat(("user", "Hi"), ("assistant", "<bos>x<eos> y"))
    ids, weights = tokens_and_weights(struck, tokenizer, TEMPLATES["alpaca"])
    assert ids.count(tokenizer.bos_token_id) == 2 and ids.count(tokenizer.eos_token_id) == 2
    assert weights[ids.index(tokenizer.eos_token_id)] == 1
    written = {
        "<bos>": struck,
        "<|end|>ing": chat(("user", "the <|end|>ing"), ("assistant", "Hello")),
        "<eos>": chat(Message("user", "a", input="<eos>"), ("assistant", "b")),
        "<|end|>": chat(("user", "a"), Message("assistant", "b", extra={"reasoning_content": "<|end|>"})),
    }
    plain = [chat(("user", "<|im_end|>"), ("assistant", "< eos>")), Text("<bos>a"), PromptCompletion("<bos>a", "<eos>")]
    assert special_tokens_written([*written.values(), *plain], tokenizer) == [*written, None, None, None]
    tokenizer.split_special_tokens = True
    assert special_tokens_written([struck], tokenizer) == [None]


def test_there_is_no_bos_where_neither_tokenizer_nor_template_wants_one():
    tokenizer = byte_tokenizer(adds_bos=False)
    ids, _ = tokens_and_weights(TWO_TURNS, tokenizer, TEMPLATES["chatml"])
    assert tokenizer.bos_token_id not in ids


# ----- prompt and completion, text ------------------------------------------------------------------------------------


@needs_models
@needs_data
def test_prompt_and_completion_are_tokenised_together_and_supervised_after_the_common_prefix(base5m):
    """ "ab" + "cd" as one text: where the pieces merge over the border, the merged piece belongs to the completion."""
    for row in read_rows(DatasetSpec(str(SHARED / "data/gsm8k_train.jsonl"), "completion", columns={"text": "answer"})):
        text = row[1]["answer"]
        for cut in (len(text) // 3, len(text) // 2):
            prompt, completion = text[:cut], text[cut:]
            ids, weights = tokens_and_weights(PromptCompletion(prompt, completion), base5m, "")
            prompt_ids = base5m(prompt)["input_ids"]
            start = weights.index(1)
            assert ids == [*base5m(text)["input_ids"], base5m.eos_token_id]
            assert ids[:start] == prompt_ids[:start] and all(weights[start:])
            assert start == len(prompt_ids) or ids[start] != prompt_ids[start]
        if row[0].endswith(":60"):
            break


def test_the_separator_belongs_to_the_prompt(byte):
    pair = PromptCompletion("Q", "A")
    assert answers(pair, byte, "", separator="\n") == ["A<eos>"]
    assert byte.decode(tokens_and_weights(pair, byte, "", separator="\n")[0]) == "<bos>Q\nA<eos>"
    assert answers(pair, byte, "", separator="\n", train_on_inputs=True) == ["Q\nA<eos>"]


def test_a_text_is_supervised_as_a_whole_and_ends_with_one_eos(byte):
    for text in ("ab", "ab<eos>"):
        ids, weights = tokens_and_weights(Text(text), byte, "")
        assert byte.decode(ids) == "<bos>ab<eos>" and weights == [0, 1, 1, 1]


@needs_models
@needs_data
@pytest.mark.parametrize("model", ["base5m", "stories260k"])
def test_texts_and_conversations_are_tokenised_as_sentencepiece_does(model):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = SHARED / "models" / model
    tokenizer = AutoTokenizer.from_pretrained(folder)
    reference = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    columns = {"prompt": "question", "completion": "answer"}
    rows = read_rows(DatasetSpec(str(SHARED / "data/gsm8k_train.jsonl"), "prompt_completion", columns=columns))
    for _, (_, row) in zip(range(300), rows, strict=False):
        ids, _ = tokens_and_weights(PromptCompletion(row["question"] + "\n", row["answer"]), tokenizer, "")
        assert ids == [1, *reference.encode(row["question"] + "\n" + row["answer"]), 2]
        conversation = chat(("system", "Think."), ("user", row["question"]), ("assistant", row["answer"]))
        ids, _ = tokens_and_weights(conversation, tokenizer, TEMPLATES["alpaca"])
        text = f"Think.\n\n### Instruction:\n{row['question']}\n\n### Response:\n{row['answer']}"
        assert ids == [1, *reference.encode(text), 2]


# ----- cost -----------------------------------------------------------------------------------------------------------


class Counting(WithoutOffsets):
    """A tokenizer that notes the texts of every call."""

    def __init__(self, tokenizer):
        super().__init__(tokenizer)
        self.calls: list[list[str]] = []

    def __call__(self, texts, **kwargs):
        self.calls.append([texts] if isinstance(texts, str) else list(texts))
        return self.tokenizer(texts, **kwargs)


@pytest.mark.parametrize("template", [TEMPLATES["chatml"], TEMPLATES["llama-2"], MARKED, CLOSING_EOS])
def test_the_cost_of_a_chunk_is_one_call_that_sees_every_character_once_however_many_turns_there_are(byte, template):
    """(and two calls that ask for the BOS)"""
    exchanges = [("user", "Why is that so?"), ("assistant", "Because it is.")]
    chunk = [chat(*exchanges * number) for number in (1, 40, 80)]
    counting = Counting(byte)
    rows = tokenize_examples(chunk, counting, template)
    assert len(counting.calls) <= 3
    seen = sum(len(text) for texts in counting.calls for text in texts)
    assert seen <= sum(len(byte.decode(ids)) for ids, _ in rows) + 2
    one, forty, eighty = (int((weights > 0).sum()) for _, weights in rows)
    assert (eighty - forty) / 40 == (forty - one) / 39 > 0
