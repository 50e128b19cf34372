"""Token ids and loss masks: whole sequences against golden ones, and what must hold for all."""

import random

import pytest
from test_data_formats import SHARED, needs_data
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sora_llm.data.formats import BadRow, Conversation, DatasetSpec, Message, PromptCompletion, Text, read_rows
from sora_llm.data.tokenize import TEMPLATES, resolve_template, tokenize_example
from sora_llm.errors import UserError

needs_models = pytest.mark.skipif(not (SHARED / "models").is_dir(), reason=f"no test models in {SHARED}")


def byte_tokenizer(
    *, adds_bos: bool = True, special: tuple[str, ...] = (), merges: tuple[tuple[str, str], ...] = ()
) -> PreTrainedTokenizerFast:
    """One token per byte, but for `special` tokens and `merges` (of two characters each)."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in ("<bos>", "<eos>", *special)])
    if adds_bos:
        bos = backend.token_to_id("<bos>")
        backend.post_processor = processors.TemplateProcessing("<bos> $A", None, [("<bos>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


@pytest.fixture(scope="module")
def byte() -> PreTrainedTokenizerFast:
    return byte_tokenizer()


@pytest.fixture(scope="module")
def base5m():
    return AutoTokenizer.from_pretrained(SHARED / "models" / "base5m")


def chat(*turns: tuple[str, str] | Message) -> Conversation:
    return Conversation(tuple(turn if isinstance(turn, Message) else Message(*turn) for turn in turns))


TWO_TURNS = chat(("user", "Hi"), ("assistant", "Hello!"), ("user", "Two?"), ("assistant", "Yes."))
WITH_SYSTEM = chat(("system", "Be brief."), *TWO_TURNS.messages)


def supervised_texts(tokenizer, ids: list[int], supervised: list[bool]) -> list[str]:
    """The decoded runs of supervised tokens."""
    runs: list[list[int]] = []
    for i, (token, wanted) in enumerate(zip(ids, supervised, strict=True)):
        if wanted:
            if i == 0 or not supervised[i - 1]:
                runs.append([])
            runs[-1].append(token)
    return [tokenizer.decode(run) for run in runs]


def answers(example, tokenizer, template: str, **options: object) -> list[str]:
    return supervised_texts(tokenizer, *tokenize_example(example, tokenizer, template, **options))


# ----- golden sequences: pieces of base5m, supervised ones in brackets; checked by reading them ---------------------

GOLDEN = {
    "alpaca": """
        <s> ▁Be ▁bri ef . <0x0A> <0x0A> <0x23> <0x23> <0x23> ▁In st ruction : <0x0A> H i <0x0A> <0x0A> <0x23>
        <0x23> <0x23> ▁R es pon se : <0x0A> [H] [ell] [o] [!] [</s>] <0x0A> <0x0A> <0x23> <0x23> <0x23> ▁In st
        ruction : <0x0A> T w o ? <0x0A> <0x0A> <0x23> <0x23> <0x23> ▁R es pon se : <0x0A> [Yes] [.] [</s>]
    """,
    "chatml": """
        <s> ▁ <0x3C> <0x7C> im _ st art <0x7C> <0x3E> s y stem <0x0A> B e ▁bri ef . <0x3C> <0x7C> im _ end
        <0x7C> <0x3E> <0x0A> <0x3C> <0x7C> im _ st art <0x7C> <0x3E> us er <0x0A> H i <0x3C> <0x7C> im _ end
        <0x7C> <0x3E> <0x0A> <0x3C> <0x7C> im _ st art <0x7C> <0x3E> ass ist ant <0x0A> [H] [ell] [o] [!]
        [<0x3C>] [<0x7C>] [im] [_] [end] [<0x7C>] [<0x3E>] <0x0A> <0x3C> <0x7C> im _ st art <0x7C> <0x3E> us er
        <0x0A> T w o ? <0x3C> <0x7C> im _ end <0x7C> <0x3E> <0x0A> <0x3C> <0x7C> im _ st art <0x7C> <0x3E> ass
        ist ant <0x0A> [Yes] [.] [<0x3C>] [<0x7C>] [im] [_] [end] [<0x7C>] [<0x3E>] <0x0A>
    """,
    "llama-2": """
        <s> <0x5B> IN S T <0x5D> ▁ <0x3C> <0x3C> S Y S <0x3E> <0x3E> <0x0A> B e ▁bri ef . <0x0A> <0x3C> <0x3C>
        <0x2F> S Y S <0x3E> <0x3E> <0x0A> <0x0A> H i ▁ <0x5B> <0x2F> IN S T <0x5D> [▁He] [ll] [o] [!] [▁] [</s>]
        <0x5B> IN S T <0x5D> ▁Two ? ▁ <0x5B> <0x2F> IN S T <0x5D> [▁Yes] [.] [▁] [</s>]
    """,
    "llama-3": """
        <s> <0x3C> <0x7C> st art _ head er _ id <0x7C> <0x3E> s y stem <0x3C> <0x7C> end _ head er _ id <0x7C>
        <0x3E> <0x0A> <0x0A> B e ▁bri ef . <0x3C> <0x7C> e ot _ id <0x7C> <0x3E> <0x3C> <0x7C> st art _ head er
        _ id <0x7C> <0x3E> us er <0x3C> <0x7C> end _ head er _ id <0x7C> <0x3E> <0x0A> <0x0A> H i <0x3C> <0x7C>
        e ot _ id <0x7C> <0x3E> <0x3C> <0x7C> st art _ head er _ id <0x7C> <0x3E> ass ist ant <0x3C> <0x7C> end
        _ head er _ id <0x7C> <0x3E> <0x0A> <0x0A> [H] [ell] [o] [!] [<0x3C>] [<0x7C>] [e] [ot] [_] [id]
        [<0x7C>] [<0x3E>] <0x3C> <0x7C> st art _ head er _ id <0x7C> <0x3E> us er <0x3C> <0x7C> end _ head er _
        id <0x7C> <0x3E> <0x0A> <0x0A> T w o ? <0x3C> <0x7C> e ot _ id <0x7C> <0x3E> <0x3C> <0x7C> st art _ head
        er _ id <0x7C> <0x3E> ass ist ant <0x3C> <0x7C> end _ head er _ id <0x7C> <0x3E> <0x0A> <0x0A> [Yes] [.]
        [<0x3C>] [<0x7C>] [e] [ot] [_] [id] [<0x7C>] [<0x3E>]
    """,
}
GOLDEN_ALPACA_INPUT = """
    <s> ▁B el ow ▁is ▁an ▁inst ruction ▁that ▁describ es ▁a ▁t ask , ▁pa ired ▁with ▁an ▁in p ut ▁that ▁prov ides
    ▁further ▁cont e xt . ▁W r ite ▁a ▁res pon se ▁that ▁appro p ri ately ▁comple t es ▁the ▁requ est . <0x0A>
    <0x0A> <0x23> <0x23> <0x23> ▁In st ruction : <0x0A> A dd . <0x0A> <0x0A> <0x23> <0x23> <0x23> ▁In p ut :
    <0x0A> 1 ▁ 2 <0x0A> <0x0A> <0x23> <0x23> <0x23> ▁R es pon se : <0x0A> [3] [</s>]
"""


def pieces(tokenizer, ids: list[int], supervised: list[bool]) -> str:
    return " ".join(
        f"[{piece}]" if wanted else piece
        for piece, wanted in zip(tokenizer.convert_ids_to_tokens(ids), supervised, strict=True)
    )


@needs_models
@pytest.mark.parametrize("name", GOLDEN)
def test_a_conversation_gives_the_golden_sequence(base5m, name):
    assert pieces(base5m, *tokenize_example(WITH_SYSTEM, base5m, TEMPLATES[name])).split() == GOLDEN[name].split()


@needs_models
def test_alpaca_s_input_gives_the_golden_sequence(base5m):
    example = chat(Message("user", "Add.", input="1 2"), ("assistant", "3"))
    sequence = pieces(base5m, *tokenize_example(example, base5m, TEMPLATES["alpaca"]))
    assert sequence.split() == GOLDEN_ALPACA_INPUT.split()


RENDERED = {
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello!<eos>"
    "\n\n### Instruction:\nTwo?\n\n### Response:\nYes.<eos>",
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello!"
    "<|im_end|>\n<|im_start|>user\nTwo?<|im_end|>\n<|im_start|>assistant\nYes.<|im_end|>\n",
    "llama-2": "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nHi [/INST] Hello! <eos>[INST] Two? [/INST] Yes. <eos>",
    "llama-3": "<|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nHello!<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nTwo?<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\nYes.<|eot_id|>",
}


@pytest.mark.parametrize("name", RENDERED)
def test_a_built_in_template_writes_its_format_to_the_letter(byte, name):
    ids, _ = tokenize_example(WITH_SYSTEM, byte, TEMPLATES[name])
    assert byte.decode(ids) == "<bos>" + RENDERED[name]


# ----- what is supervised ---------------------------------------------------------------------------------------------

END_OF_TURN = {"alpaca": "<eos>", "chatml": "<|im_end|>", "llama-2": " <eos>", "llama-3": "<|eot_id|>"}


def random_conversations(seed: int, count: int) -> list[Conversation]:
    """Texts full of what masks are lost by: markers of the templates, role names, line breaks, other scripts."""
    rng = random.Random(seed)
    words = [
        "### Response:",
        "\n\n",
        "<|im_end|>",
        "assistant\n",
        "[/INST]",
        "user",
        " ",
        "x",
        "né",
        "数",
        "🙂",
        "12",
        ".",
    ]

    def text() -> str:
        return rng.choice("aQ1") + "".join(rng.choices(words, k=rng.randrange(6))) + rng.choice("bZ?")

    return [
        chat(
            *[("system", text())] * rng.randrange(2),
            *[turn for _ in range(rng.randrange(1, 4)) for turn in (("user", text()), ("assistant", text()))],
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("adds_bos", [True, False])
def test_supervised_tokens_are_exactly_the_answers_with_their_end_of_turn(name, adds_bos):
    tokenizer = byte_tokenizer(adds_bos=adds_bos, special=("<|eot_id|>",))
    for conversation in random_conversations(seed=1, count=40):
        lead = " " if name == "llama-2" else ""
        expected = [
            lead + turn.content + END_OF_TURN[name] for turn in conversation.messages if turn.role == "assistant"
        ]
        assert answers(conversation, tokenizer, TEMPLATES[name]) == expected


@needs_models
@pytest.mark.parametrize("name", TEMPLATES)
def test_the_prompt_of_every_answer_is_what_the_model_will_see_when_it_has_to_answer(base5m, name):
    """For real BPE merges: the unsupervised tokens before an answer are the rendered prompt's own tokens."""
    for conversation in random_conversations(seed=2, count=20):
        ids, supervised = tokenize_example(conversation, base5m, TEMPLATES[name])
        prompt = base5m.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in conversation.messages[:-1]],
            chat_template=TEMPLATES[name],
            add_generation_prompt=True,
            tokenize=False,
        )
        prompt_ids = base5m(prompt, add_special_tokens=False)["input_ids"]
        prompt_ids = prompt_ids if prompt_ids[0] == base5m.bos_token_id else [base5m.bos_token_id, *prompt_ids]
        last_answer = max(i for i in range(1, len(ids)) if supervised[i] and not supervised[i - 1])
        assert ids[:last_answer] == prompt_ids


def test_the_end_of_turn_is_supervised_where_the_tokenizer_merges_it_with_the_line_break():
    """With GPT-like merges ">\\n" is one token; a mask that stops before the line break would lose the marker's end."""
    tokenizer = byte_tokenizer(merges=((">", "Ċ"),))
    assert answers(TWO_TURNS, tokenizer, TEMPLATES["chatml"]) == ["Hello!<|im_end|>\n", "Yes.<|im_end|>\n"]


def test_position_0_is_never_supervised(byte):
    for tokenizer in (byte, byte_tokenizer(adds_bos=False)):
        for example in (Text("ab"), PromptCompletion("", "ab"), chat(("user", "a"), ("assistant", "b"))):
            _, supervised = tokenize_example(example, tokenizer, TEMPLATES["chatml"], train_on_inputs=True)
            assert supervised == [False] + [True] * (len(supervised) - 1)


def test_only_the_last_answer_is_supervised_on_request(byte):
    for name in TEMPLATES:
        texts = answers(TWO_TURNS, byte, TEMPLATES[name], train_on_last_turn_only=True)
        assert len(texts) == 1 and texts[0].strip().startswith("Yes.")


def test_messages_say_for_themselves_whether_to_train_on_them(byte):
    skip_first = chat(("user", "Hi"), Message("assistant", "Hello!", False), ("user", "Two?"), ("assistant", "Yes."))
    assert answers(skip_first, byte, TEMPLATES["chatml"]) == ["Yes.<|im_end|>"]
    user_too = chat(Message("user", "Hi"), ("assistant", "Ho"), Message("user", "Two?", True), ("assistant", "Yes."))
    asked = "<|im_start|>user\nTwo?<|im_end|>"
    assert answers(user_too, byte, TEMPLATES["chatml"]) == ["Ho<|im_end|>", asked, "Yes.<|im_end|>"]
    no_user = chat(Message("user", "Hi", False), ("assistant", "Ho"))
    for name in TEMPLATES:
        whole, part = (answers(no_user, byte, TEMPLATES[name], train_on_inputs=inputs) for inputs in (True, False))
        assert part[0] in whole[0] and "Hi" not in whole[0]


def test_a_turn_that_follows_no_question_is_supervised_where_the_template_can_render_it(byte):
    greeting = chat(("assistant", "Welcome."), ("user", "Hi"), ("assistant", "Ho"))
    assert answers(greeting, byte, TEMPLATES["chatml"]) == ["Welcome.<|im_end|>", "Ho<|im_end|>"]
    with pytest.raises(BadRow, match=r"refuses|begins with the assistant"):
        tokenize_example(greeting, byte, TEMPLATES["llama-2"])


@pytest.mark.parametrize("name", ["alpaca", "llama-2"])
def test_a_conversation_that_the_template_refuses_is_a_bad_row(byte, name):
    with pytest.raises(BadRow, match=r"refuses the conversation: the .* template"):
        tokenize_example(chat(("user", "a"), ("tool", "b"), ("assistant", "c")), byte, TEMPLATES[name])


def test_alpaca_s_input_is_part_of_the_question_under_other_templates(byte):
    ids, _ = tokenize_example(chat(Message("user", "Add.", input="1 2"), ("assistant", "3")), byte, TEMPLATES["chatml"])
    assert "<|im_start|>user\nAdd.\n\n1 2<|im_end|>" in byte.decode(ids)


# ----- other people's templates ---------------------------------------------------------------------------------------

# Phi-3's habit: eos after the last turn, whatever it is.
CLOSING_EOS = TEMPLATES["chatml"] + "{{ '' if add_generation_prompt else eos_token }}"
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
# DeepSeek's habit: the prompt opens the thoughts, which the written answer need not have.
OPENED_THOUGHTS = TEMPLATES["chatml"] + "{{ '<think>' if add_generation_prompt else '' }}"
MARKED = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{ '# ' }}{% generation %}{{ m.content + ';' }}{% endgeneration %}
{%- else -%}{{ '> ' + m.content + ';' }}{%- endif -%}
{%- endfor -%}"""


def test_tokens_that_close_every_text_do_not_disturb_the_masks(byte):
    assert answers(TWO_TURNS, byte, CLOSING_EOS) == ["Hello!<|im_end|>", "Yes.<|im_end|>\n<eos>"]


def test_a_prompt_that_opens_more_than_the_answer_has_does_not_disturb_the_masks(byte):
    assert answers(TWO_TURNS, byte, OPENED_THOUGHTS) == ["Hello!<|im_end|>", "Yes.<|im_end|>"]


@pytest.mark.parametrize("template", [THINKING, MOVED_SYSTEM, MARKED_LAST_QUESTION])
def test_a_template_that_rewrites_earlier_turns_is_refused_and_not_masked_wrongly(byte, template):
    with pytest.raises(BadRow, match="writes a turn differently"):
        tokenize_example(WITH_SYSTEM, byte, template)


def test_the_last_turn_can_be_trained_on_under_a_template_that_rewrites_earlier_ones(byte):
    assert answers(TWO_TURNS, byte, THINKING, train_on_last_turn_only=True) == ["<think></think>Yes.<|im_end|>"]


def test_generation_markers_are_used_where_a_template_has_them(byte):
    assert answers(TWO_TURNS, byte, MARKED) == ["Hello!;", "Yes.;"]
    assert answers(TWO_TURNS, byte, MARKED, train_on_last_turn_only=True) == ["Yes.;"]
    ids, _ = tokenize_example(TWO_TURNS, byte, MARKED)
    assert byte.decode(ids) == "<bos>> Hi;# Hello!;> Two?;# Yes.;"


# ----- one BOS --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", TEMPLATES)
def test_there_is_exactly_one_bos(byte, name):
    for template in (TEMPLATES[name], "{{ bos_token }}" + TEMPLATES["chatml"]):
        ids, _ = tokenize_example(TWO_TURNS, byte, template)
        assert ids[0] == byte.bos_token_id and ids.count(byte.bos_token_id) == 1
    for example in (Text("ab"), PromptCompletion("a", "b"), Text("<bos>ab")):
        ids, _ = tokenize_example(example, byte, "")
        assert ids[0] == byte.bos_token_id and ids.count(byte.bos_token_id) == 1


def test_there_is_no_bos_where_neither_tokenizer_nor_template_wants_one():
    tokenizer = byte_tokenizer(adds_bos=False)
    ids, _ = tokenize_example(TWO_TURNS, tokenizer, TEMPLATES["chatml"])
    assert tokenizer.bos_token_id not in ids


# ----- prompt and completion, text ------------------------------------------------------------------------------------


@needs_models
def test_prompt_and_completion_are_tokenised_together_and_supervised_after_the_common_prefix(base5m):
    """ "ab" + "cd" as one text: where the pieces merge over the border, the merged piece belongs to the completion."""
    for row in read_rows(DatasetSpec(str(SHARED / "data/gsm8k_train.jsonl"), "completion", columns={"text": "answer"})):
        text = row[1]["answer"]
        for cut in (len(text) // 3, len(text) // 2):
            prompt, completion = text[:cut], text[cut:]
            ids, supervised = tokenize_example(PromptCompletion(prompt, completion), base5m, "")
            prompt_ids = base5m(prompt)["input_ids"]
            start = supervised.index(True)
            assert ids == [*base5m(text)["input_ids"], base5m.eos_token_id]
            assert ids[:start] == prompt_ids[:start] and all(supervised[start:])
            assert start == len(prompt_ids) or ids[start] != prompt_ids[start]
        if row[0].endswith(":60"):
            break


def test_the_separator_belongs_to_the_prompt(byte):
    pair = PromptCompletion("Q", "A")
    assert answers(pair, byte, "", separator="\n") == ["A<eos>"]
    assert byte.decode(tokenize_example(pair, byte, "", separator="\n")[0]) == "<bos>Q\nA<eos>"
    assert answers(pair, byte, "", separator="\n", train_on_inputs=True) == ["Q\nA<eos>"]


def test_a_text_is_supervised_as_a_whole_and_ends_with_one_eos(byte):
    for text in ("ab", "ab<eos>"):
        ids, supervised = tokenize_example(Text(text), byte, "")
        assert byte.decode(ids) == "<bos>ab<eos>" and supervised == [False, True, True, True]


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
        ids, _ = tokenize_example(PromptCompletion(row["question"] + "\n", row["answer"]), tokenizer, "")
        assert ids == [1, *reference.encode(row["question"] + "\n" + row["answer"]), 2]
        conversation = chat(("system", "Think."), ("user", row["question"]), ("assistant", row["answer"]))
        ids, _ = tokenize_example(conversation, tokenizer, TEMPLATES["alpaca"])
        text = f"Think.\n\n### Instruction:\n{row['question']}\n\n### Response:\n{row['answer']}"
        assert ids == [1, *reference.encode(text), 2]


# ----- which template -------------------------------------------------------------------------------------------------


def test_the_tokenizer_s_own_template_comes_before_the_default(byte):
    assert resolve_template(byte, None) == TEMPLATES["alpaca"]
    own = byte_tokenizer()
    own.chat_template = MARKED
    assert resolve_template(own, None) == MARKED
    assert resolve_template(own, "chatml") == TEMPLATES["chatml"]


def test_a_template_can_be_a_file(byte, tmp_path):
    (tmp_path / "own.jinja").write_text(MARKED)
    assert resolve_template(byte, str(tmp_path / "own.jinja")) == MARKED


def test_a_template_that_does_not_exist_is_refused_with_the_names_that_do(byte):
    with pytest.raises(UserError, match=r"'chat-ml' is neither .* \(alpaca, chatml, llama-2, llama-3\)"):
        resolve_template(byte, "chat-ml")


def test_a_template_that_is_no_jinja_is_refused(byte, tmp_path):
    (tmp_path / "own.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    with pytest.raises(UserError, match=r"own.jinja:\d is not valid jinja"):
        resolve_template(byte, str(tmp_path / "own.jinja"))


def test_several_templates_without_a_default_are_refused():
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"tool_use": MARKED, "rag": MARKED}
    with pytest.raises(UserError, match="several chat templates"):
        resolve_template(tokenizer, None)
