"""Token ids and weights: whole sequences against golden ones, and what must hold for all.

tests/test_data_masks.py looks for exceptions among random conversations.
"""

import itertools
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import SHARED
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, ByT5Tokenizer, PreTrainedTokenizerFast

from sora_llm.data import templates
from sora_llm.data.formats import Conversation, Message, PromptCompletion, Text, to_examples
from sora_llm.data.readers import BadRow
from sora_llm.data.sources import DatasetSpec, read_rows
from sora_llm.data.templates import TEMPLATES, as_dicts, render, resolve_template
from sora_llm.data.tokenize import (
    encode_prompt,
    ends_visibly,
    joins_a_prompt_s_end,
    opened_for_asking,
    served_template,
    special_tokens_written,
    tokenize_examples,
    untaught_end,
)
from sora_llm.errors import UserError

needs_models = pytest.mark.skipif(not (SHARED / "models").is_dir(), reason=f"no test models in {SHARED}")
needs_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason=f"no test data in {SHARED}")


def byte_tokenizer(
    *,
    adds_bos: bool = True,
    special: tuple[str | AddedToken, ...] = (),
    merges: tuple[tuple[str, str], ...] = (),
    trim_offsets: bool = False,
    use_regex: bool = False,
) -> PreTrainedTokenizerFast:
    """One token per byte, but for `special` tokens and `merges` (of two characters each); with `use_regex` within the
    words of GPT-2's pattern."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    added = [token if isinstance(token, AddedToken) else AddedToken(token, special=True) for token in special]
    backend.add_special_tokens([*(AddedToken(token, special=True) for token in ("<bos>", "<eos>")), *added])
    trims = [processors.ByteLevel(trim_offsets=True)] if trim_offsets else []
    if adds_bos:
        bos = backend.token_to_id("<bos>")
        backend.post_processor = processors.Sequence(
            [*trims, processors.TemplateProcessing("<bos> $A", None, [("<bos>", bos)])]
        )
    elif trims:
        backend.post_processor = trims[0]
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def byte() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def base5m():
    return AutoTokenizer.from_pretrained(SHARED / "models" / "base5m")


def chat(*turns: tuple[str, str] | Message, tools: tuple[dict[str, Any], ...] = ()) -> Conversation:
    return Conversation(tuple(turn if isinstance(turn, Message) else Message(*turn) for turn in turns), tools)


TWO_TURNS = chat(("user", "Hi"), ("assistant", "Hello!"), ("user", "Two?"), ("assistant", "Yes."))
WITH_SYSTEM = chat(("system", "Be brief."), *TWO_TURNS.messages)


def tokens_and_weights(example, tokenizer, template: str, **options) -> tuple[list[int], list[float]]:
    """Of one example; raises the `BadRow` that it gives."""
    (row,) = tokenize_examples([example], tokenizer, template, **options)
    if isinstance(row, BadRow):
        raise row
    ids, weights = row
    assert ids.dtype.name == "int32" and weights.dtype.name == "float32" and ids.shape == weights.shape
    return ids.tolist(), weights.tolist()


def weighted_texts(tokenizer, ids: list[int], weights: list[float]) -> list[tuple[float, str]]:
    """Of each run of tokens with one weight above 0, the weight and the text."""
    runs = itertools.groupby(range(len(ids)), key=lambda i: weights[i])
    return [(weight, tokenizer.decode([ids[i] for i in run])) for weight, run in runs if weight]


def answers(example, tokenizer, template: str, **options: object) -> list[str]:
    """The texts that are supervised, all with weight 1."""
    found = weighted_texts(tokenizer, *tokens_and_weights(example, tokenizer, template, **options))
    assert {weight for weight, _ in found} <= {1.0}
    return [text for _, text in found]


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


class WithoutOffsets:
    """A tokenizer that gives ids alone, as slow ones do."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self.tokenizer, name)

    def __call__(self, *args, **kwargs):
        encoded = self.tokenizer(*args, **kwargs)
        encoded._encodings = None
        return encoded


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


def test_the_prompt_of_a_sample_is_what_an_answer_follows_in_training(byte):
    for name in TEMPLATES:
        ids, weights = tokens_and_weights(chat(("user", "Hi"), ("assistant", "Ho")), byte, TEMPLATES[name])
        assert encode_prompt(byte, "Hi", TEMPLATES[name]) == ids[: weights.index(1)]
    assert byte.decode(encode_prompt(byte, "Hi", None)) == "<bos>Hi"


def joining_tokenizer() -> PreTrainedTokenizerFast:
    """Joins line breaks, and a blank with the letter behind it."""
    return byte_tokenizer(merges=(("Ċ", "Ċ"), ("Ġ", "f"), ("Ġ", "Ġ")), use_regex=True)


@needs_models
@pytest.mark.parametrize("end", [":", " ", ": ", "\n", "\n\n", " \n", ":  "])
@pytest.mark.parametrize("model", ["base5m", "stories260k", "joining"])
def test_a_prompt_has_the_tokens_that_it_has_before_an_answer(model, end):
    """A blank at its end is a token of its own only where nothing follows."""
    tokenizer = joining_tokenizer() if model == "joining" else AutoTokenizer.from_pretrained(SHARED / "models" / model)
    asked = encode_prompt(tokenizer, f"Answer{end}", None)
    for answer in ("four", "Four", "4"):
        ids, _ = tokens_and_weights(PromptCompletion("Answer", answer), tokenizer, "", separator=end)
        assert ids[: len(asked)] == asked
        assert tokenizer.decode(ids[len(asked) :]).lstrip().lower().startswith(("four", "4"))


@needs_models
def test_a_template_that_ends_prompts_with_blanks_asks_with_the_tokens_of_training():
    tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / "base5m")
    ids, _ = tokens_and_weights(chat(("user", "Hi"), ("assistant", "four")), tokenizer, BLANK_FIRST)
    asked = encode_prompt(tokenizer, "Hi", BLANK_FIRST)
    assert ids[: len(asked)] == asked and tokenizer.convert_ids_to_tokens(asked)[-1] == ":"
    assert joins_a_prompt_s_end(tokenizer, BLANK_FIRST) and not joins_a_prompt_s_end(tokenizer, TEMPLATES["llama-3"])
    assert joins_a_prompt_s_end(joining_tokenizer(), TEMPLATES["llama-3"]), "of two line breaks"


def test_what_a_template_opens_an_answer_with_for_asking_alone_is_found(byte):
    thinking = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}{{ PROMPT }}".replace(
        "{{ PROMPT }}", "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
    )
    assert opened_for_asking(byte, thinking) == "<think>"
    assert [opened_for_asking(byte, template) for template in TEMPLATES.values()] == [""] * len(TEMPLATES)


BLANK_FIRST = (
    "  {% for message in messages %}{{ message.role }}: {{ message.content }}{{ eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@needs_models
@pytest.mark.parametrize("name", [*TEMPLATES, "one of the tokenizer", "blanks before it"])
@pytest.mark.parametrize("model", ["base5m", "stories260k", "bytes", "bytes without bos"])
def test_the_template_to_serve_with_gives_clients_the_prompt_of_training(model, name):
    """Clients add no BOS to what it renders (and, under sentencepiece, no blank before it)."""
    if model.startswith("bytes"):
        tokenizer = byte_tokenizer(adds_bos=model == "bytes")
    else:
        tokenizer = AutoTokenizer.from_pretrained(SHARED / "models" / model)
    template = {**TEMPLATES, "blanks before it": BLANK_FIRST}.get(name, THINKING)
    served = served_template(tokenizer, template)
    for question in ("Hi", " two\n", "\n# x"):
        ids = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}],
            chat_template=served,
            tokenize=True,
            add_generation_prompt=True,
            return_dict=False,
        )
        asked = encode_prompt(tokenizer, question, template)
        assert ids[: len(asked)] == asked
        assert len(ids) == len(asked) or joins_a_prompt_s_end(tokenizer, template), "which a run warns of"
    assert served_template(tokenizer, served) == served
    writes_bos = name in ("gemma", "llama-2", "llama-3", "mistral")
    assert (served == template) == (writes_bos or model == "bytes without bos")


def test_a_template_says_whether_generation_finds_the_end_of_an_answer():
    base = byte_tokenizer()
    visible = {name for name in TEMPLATES if ends_visibly(base, TEMPLATES[name])}
    assert visible == {"alpaca", "llama-2", "mistral", "vicuna"}
    assert ends_visibly(byte_tokenizer(special=("<|im_end|>",)), TEMPLATES["chatml"])
    assert not ends_visibly(base, "{% for m in messages %}{{ m.content }}\n\n{% endfor %}")


# ----- tools ----------------------------------------------------------------------------------------------------------

ADD = {"type": "function", "function": {"name": "add", "parameters": {"a": "ü"}}}


def call(a: int, **more: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "add", "arguments": {"a": a}}, **more}


WITH_TOOLS = chat(
    ("system", "Sys"),
    ("user", "Q"),
    Message("assistant", "", extra={"tool_calls": [call(1, id="c1")]}),
    Message("tool", '{"sum": 3}', extra={"tool_call_id": "c1", "name": "add"}),
    ("assistant", "3"),
    tools=(ADD,),
)
TOOL_TEXTS = {
    "chatml": "<|im_start|>system\nSys\n\n"
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n"
    "You are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
    '{"type": "function", "function": {"name": "add", "parameters": {"a": "ü"}}}\n</tools>\n\n'
    "For each function call, return a json object with function name and arguments within <tool_call></tool_call> XML "
    'tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    '[[<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call><|im_end|>]]\n'
    '<|im_start|>tool\n<tool_response>\n{"sum": 3}\n</tool_response><|im_end|>\n'
    "<|im_start|>assistant\n[[3<|im_end|>]]\n",
    "llama-3": "<|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\n\nSys<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nGiven the following functions, please respond with a JSON for a "
    "function call with its proper arguments that best answers the given prompt.\n\n"
    'Respond in the format {"name": function name, "parameters": dictionary of argument name and its value}.'
    'Do not use variables.\n\n{\n    "type": "function",\n    "function": {\n        "name": "add",\n'
    '        "parameters": {\n            "a": "ü"\n        }\n    }\n}\n\nQ<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n"
    '[[{"name": "add", "parameters": {"a": 1}}<|eot_id|>]]'
    '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"sum\\": 3}"<|eot_id|>'
    "<|start_header_id|>assistant<|end_header_id|>\n\n[[3<|eot_id|>]]",
    "mistral": '[AVAILABLE_TOOLS] [{"type": "function", "function": {"name": "add", "parameters": {"a": "ü"}}}]'
    "[/AVAILABLE_TOOLS][INST] Sys\n\nQ[/INST]"
    '[[[TOOL_CALLS] [{"name": "add", "arguments": {"a": 1}, "id": "c1"}]<eos>]]'
    '[TOOL_RESULTS] {"content": {"sum": 3}, "call_id": "c1"}[/TOOL_RESULTS][[ 3<eos>]]',
}


@pytest.mark.parametrize("name", TOOL_TEXTS)
def test_tools_are_written_to_the_letter_and_calls_are_supervised_like_answers(byte, name):
    ids, weights = tokens_and_weights(WITH_TOOLS, byte, TEMPLATES[name])
    runs = itertools.groupby(range(len(ids)), key=lambda i: weights[i])
    texts = [(weight, byte.decode([ids[i] for i in run])) for weight, run in runs]
    assert "".join(f"[[{text}]]" if weight else text for weight, text in texts) == "<bos>" + TOOL_TEXTS[name]


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
        with pytest.raises(BadRow, match=f"the chat template has no place for {part}"):
            tokens_and_weights(example, byte, TEMPLATES[name])
    with pytest.raises(BadRow, match=f"the {name} template has no place for this tool message"):
        tokens_and_weights(chat(("user", "Q"), ("tool", "R"), ("assistant", "A")), byte, TEMPLATES[name])
    names_alone = chat(Message("user", "Q", extra={"name": "Ann", "tool_calls": None}), ("assistant", "A"))
    assert len(answers(names_alone, byte, TEMPLATES[name])) == 1


def test_reasoning_reaches_a_template_under_each_of_its_names(byte):
    for given in ("reasoning_content", "thinking", "reasoning"):
        for read in ("reasoning_content", "thinking", "reasoning"):
            template = "{% for m in messages %}" + f"({{{{ m.{read} }}}})" + "{{ m.content }}|{% endfor %}"
            example = chat(("user", "Q"), Message("assistant", "A", extra={given: "Hm"}))
            assert byte.decode(tokens_and_weights(example, byte, template)[0]) == "<bos>()Q|(Hm)A|"


# ----- other people's templates ---------------------------------------------------------------------------------------

# Phi-3's habit: eos after the last turn, whatever it is.
CLOSING_EOS = TEMPLATES["chatml"] + "{{ '' if add_generation_prompt else eos_token }}"
# The same where eos begins like the next turn, so that the two have more in common than the turn before.
CLOSING_LIKE_OPENING = """{%- for m in messages -%}
{{ '<e' + m.role + '>' + m.content + '|' }}
{%- endfor -%}{{ '<euser>' if false else eos_token if not add_generation_prompt else '<eassistant>' }}"""
# Qwen3's habit: the last answer has an (empty) block of thoughts, earlier ones have none.
THINKING = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif -%}
{{ m.content + '<|im_end|>' }}
{%- endfor -%}{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}"""
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
MARKED = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{ '# ' }}{% generation %}{{ m.content + ';' }}{% endgeneration %}
{%- else -%}{{ '> ' + m.content + ';' }}{%- endif -%}
{%- endfor -%}"""
# SmolLM3's habit: thoughts and answer are marked each by itself.
MARKED_TWICE = MARKED.replace("{% generation %}", "{% generation %}{{ 'hm;' }}{% endgeneration %} {% generation %}")
# The tools' texts of every format and the names of tokens, written by what others' templates read them with.
GENERAL = "{{ bos_token }}{{ tools | tojson }}{{ messages | tojson }}{{ documents }}{{ eos_token }}{{ pad_token }}"


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
    with pytest.raises(BadRow, match="writes a turn differently"):
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
    with pytest.raises(BadRow, match="writes a turn differently"):
        tokens_and_weights(both, byte, QWEN_3)
    assert answers(both, byte, QWEN_3, train_on_last_turn_only=True) == ["<think>\nHm\n</think>\n\nB<|im_end|>"]


def test_an_answer_that_says_something_else_when_others_follow_is_refused(byte):
    for written in ("m.content | upper", "''", "m.content[:3]", "m.content + m.content"):
        ours = "{{ m.content if loop.last or m.role == 'user' else " + written + " }}"
        template = "{% for m in messages %}{{ '<|im_start|>' + m.role }}" + ours + "<|im_end|>{% endfor %}"
        template += "{{ '<|im_start|>assistant' if add_generation_prompt }}"
        with pytest.raises(BadRow, match="writes a turn differently"):
            tokens_and_weights(TWO_TURNS, byte, template)
    no_end = "{% for m in messages %}[{{ m.role }}]{{ '#' if loop.last and m.role == 'assistant' }}{{ m.content }}"
    no_end += "{{ eos_token if loop.last }}{% endfor %}"
    with pytest.raises(BadRow, match="writes a turn differently"):
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


# ----- what templates leave out ---------------------------------------------------------------------------------------

PLAIN = "<|{{ m.role }}|>{{ m.content }}<|end|>"
LEAVES_OUT = {
    "the text of system messages": "{% if m.role != 'system' %}" + PLAIN + "{% endif %}",
    "the text of tool messages": "{% if m.role != 'tool' %}" + PLAIN + "{{ m.tool_calls }}{% endif %}",
    "the text beside tool calls": "{% if m.tool_calls %}<|call|>{{ m.tool_calls }}<|end|>{% else %}"
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
        "the text beside tool calls": chat(
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
        with pytest.raises(BadRow, match=f"the chat template has no place for {part}"):
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
        templates.check_has_place(row, template)
    assert not renderings
    rounds = [Message("assistant", "", extra={"tool_calls": [call(1)]}), ("tool", "3")] * 200
    templates.check_has_place(chat(("user", "Q"), *rounds, ("assistant", "A")), template)
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


def test_the_last_turn_can_be_trained_on_under_a_template_that_rewrites_earlier_ones(byte):
    assert answers(TWO_TURNS, byte, THINKING, train_on_last_turn_only=True) == ["<think></think>Yes.<|im_end|>"]


def test_a_template_that_leaves_out_a_turn_to_train_on_is_refused(byte):
    template = "{% for m in messages if m.role != 'assistant' %}{{ m.content }}|{% endfor %}"
    with pytest.raises(BadRow, match=r"writes nothing in the place of messages\[1\] \(assistant\)"):
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
    """(and one call that asks for the BOS)"""
    exchanges = [("user", "Why is that so?"), ("assistant", "Because it is.")]
    chunk = [chat(*exchanges * number) for number in (1, 40, 80)]
    counting = Counting(byte)
    rows = tokenize_examples(chunk, counting, template)
    assert len(counting.calls) <= 2
    seen = sum(len(text) for texts in counting.calls for text in texts)
    assert seen <= sum(len(byte.decode(ids)) for ids, _ in rows) + 1
    one, forty, eighty = (int((weights > 0).sum()) for _, weights in rows)
    assert (eighty - forty) / 40 == (forty - one) / 39 > 0


# ----- which template -------------------------------------------------------------------------------------------------


def test_the_tokenizer_s_own_template_comes_before_the_default(byte):
    assert resolve_template(byte, None) == TEMPLATES["alpaca"]
    own = byte_tokenizer()
    own.chat_template = MARKED
    assert resolve_template(own, None) == MARKED
    assert resolve_template(own, "chatml") == TEMPLATES["chatml"]


def test_markers_that_leave_out_the_token_behind_an_answer_are_noticed():
    tokenizer = byte_tokenizer(special=("<|im_end|>",))
    taught = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    untaught = taught.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    assert untaught_end(tokenizer, taught) is None and ends_visibly(tokenizer, taught)
    assert untaught_end(tokenizer, untaught) == "<|im_end|>" and not ends_visibly(tokenizer, untaught)
    later = taught.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}{{ '\\n' }}<|im_end|>")
    assert untaught_end(tokenizer, later) == "<|im_end|>"
    assert untaught_end(tokenizer, TEMPLATES["chatml"]) is None
    assert untaught_end(byte_tokenizer(), TEMPLATES["chatml"]) is None, "text that is no token"


def test_a_template_can_be_a_file(byte, tmp_path):
    (tmp_path / "own.jinja").write_text(MARKED)
    assert resolve_template(byte, str(tmp_path / "own.jinja")) == MARKED


def test_the_example_config_of_mistral_uses_a_template_whose_answers_end_with_eos(byte):
    """Under chatml, which its base model has no tokens for, no eos was ever trained on."""
    config = Path(__file__).parent.parent / "configs/mistral7b.yaml"
    template = TEMPLATES[yaml.safe_load(config.read_text())["data"]["chat_template"]]
    assert ends_visibly(byte, template)
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
