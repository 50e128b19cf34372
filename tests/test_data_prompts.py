"""How a model is asked is how it was trained, and what ends its answers is found: by whatever chat template."""

from types import SimpleNamespace

import pytest
from conftest import SHARED
from conversations import THINKING, byte_tokenizer, chat, needs_models, tokens_and_weights
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sora_llm.config import Config, Data, Dataset
from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.data.formats import PromptCompletion
from sora_llm.data.prompts import (
    encode_prompt,
    generation_prefix,
    has_visible_end,
    is_served_as_trained,
    merges_trailing_whitespace,
    served_template,
    untrained_eos,
)
from sora_llm.running.data_summary import separator_warnings, template_warnings


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
    assert merges_trailing_whitespace(tokenizer, BLANK_FIRST) and not merges_trailing_whitespace(
        tokenizer, TEMPLATES["llama-3"]
    )
    assert merges_trailing_whitespace(joining_tokenizer(), TEMPLATES["llama-3"]), "of two line breaks"


def test_what_a_template_opens_an_answer_with_for_asking_alone_is_found(byte):
    thinking = "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}{{ PROMPT }}".replace(
        "{{ PROMPT }}", "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
    )
    assert generation_prefix(byte, thinking) == "<think>"
    assert [generation_prefix(byte, template) for template in TEMPLATES.values()] == [""] * len(TEMPLATES)


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
        assert len(ids) == len(asked) or merges_trailing_whitespace(tokenizer, template), "which a run warns of"
    assert served_template(tokenizer, served) == served
    writes_bos = name in ("gemma", "llama-2", "llama-3", "mistral")
    assert (served == template) == (writes_bos or model == "bytes without bos")


def test_the_template_to_serve_with_writes_the_tokens_that_the_tokenizer_opens_texts_with():
    tokenizer = byte_tokenizer(special=("<g>", "<sop>"), opening=("<g>", "<sop>"))
    assert served_template(tokenizer, TEMPLATES["chatml"]) == '{{- "<g><sop>" }}' + TEMPLATES["chatml"]
    assert is_served_as_trained(tokenizer, TEMPLATES["chatml"])
    written = served_template(tokenizer, TEMPLATES["chatml"])
    assert served_template(tokenizer, written) == written


def test_a_template_that_no_server_can_ask_with_as_trained_is_known():
    joins_its_opening = byte_tokenizer(opening=("x",), merges=(("x", "<"),))
    assert not is_served_as_trained(joins_its_opening, TEMPLATES["chatml"])
    assert is_served_as_trained(joins_its_opening, TEMPLATES["vicuna"])


THINKS_FIRST = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
)

CLOSES_EMPTY_THOUGHTS = (  # Nemotron-3
    "{% for m in messages %}{{ m.role + ': ' + ('<think></think>' if m.role == 'assistant' else '') + m.content }}"
    "{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant: <think>\n{% endif %}"
)
BREAKS_AFTER_THE_END = (  # LFM2.5: the markers include a line break, which a client does not wait for
    "{% for m in messages %}{{ m.role + ':' }}{% generation %}{{ m.content + '<|im_end|>\n' }}{% endgeneration %}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)


@pytest.mark.parametrize(
    ("template", "options", "said"),
    [
        (TEMPLATES["alpaca"], {}, None),
        (TEMPLATES["chatml"], {}, "answers end with text that is not a single token of this tokenizer"),
        (
            TEMPLATES["vicuna"],
            {"opening": ("x",), "merges": (("x", "A"),)},
            "servers, which tokenise the rendered chat template",
        ),
        (THINKS_FIRST, {}, "the chat template opens the answer with '<think>'"),
        (CLOSES_EMPTY_THOUGHTS, {}, r"the chat template opens the answer with 'assistant: <think>\n'"),
        (BREAKS_AFTER_THE_END, {"special": ("<|im_end|>",)}, None),
        (TEMPLATES["alpaca"], {"merges": (("Ċ", "a"),)}, "the chat template ends prompts with whitespace"),
    ],
)
def test_a_run_is_warned_of_what_a_template_does_to_those_who_ask(template, options, said):
    config = Config(data=Data(datasets=(Dataset(path="a.jsonl", type="alpaca"),)))
    inputs = SimpleNamespace(tokenizer=byte_tokenizer(**options), chat_template=template)
    found = template_warnings(config, inputs)
    assert len(found) == (said is not None) and all(said in line for line in found)
    plain = Config(data=Data(datasets=(Dataset(path="a.jsonl", type="completion"),)))
    assert template_warnings(plain, inputs) == [], "nothing is rendered"


def test_a_separator_whose_line_break_is_two_characters_is_a_warning():
    names = {r"\nanswer: ": "a.jsonl", "\n": "b.jsonl", r"$\nu \neq 0$": "d.jsonl", r" \n\n": "c.jsonl"}
    given = [Dataset(path=name, type="prompt_completion", separator=text) for text, name in names.items()]
    found = separator_warnings(Config(data=Data(datasets=tuple(given[:3]), val_datasets=tuple(given[3:]))))
    assert [line.partition(" holds ")[0] for line in found] == [
        "warning: the separator of data.datasets a.jsonl",
        "warning: the separator of data.val_datasets c.jsonl",
    ]
    assert found[0].endswith(r"""write "\n" in double quotes in YAML, $'\n' in bash""")


def test_a_template_says_whether_generation_finds_the_end_of_an_answer():
    base = byte_tokenizer()
    visible = {name for name in TEMPLATES if has_visible_end(base, TEMPLATES[name])}
    assert visible == {"alpaca", "llama-2", "mistral", "vicuna"}
    assert has_visible_end(byte_tokenizer(special=("<|im_end|>",)), TEMPLATES["chatml"])
    assert not has_visible_end(base, "{% for m in messages %}{{ m.content }}\n\n{% endfor %}")


def test_markers_that_leave_out_the_token_behind_an_answer_are_noticed():
    tokenizer = byte_tokenizer(special=("<|im_end|>",))
    taught = (
        "{% for m in messages %}{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
        "<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    )
    untaught = taught.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    assert untrained_eos(tokenizer, taught) is None and has_visible_end(tokenizer, taught)
    assert untrained_eos(tokenizer, untaught) == "<|im_end|>" and not has_visible_end(tokenizer, untaught)
    later = taught.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}{{ '\\n' }}<|im_end|>")
    assert untrained_eos(tokenizer, later) == "<|im_end|>"
    assert untrained_eos(tokenizer, TEMPLATES["chatml"]) is None
    assert untrained_eos(byte_tokenizer(), TEMPLATES["chatml"]) is None, "text that is no token"
