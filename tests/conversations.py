"""Conversations, what is found in their rows, and tokenizers of a few bytes: for tests of what becomes of rows."""

import itertools
from typing import Any

import pytest
from conftest import SHARED
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.data.formats import Conversation, Message
from sora_llm.data.readers import BadRow
from sora_llm.data.tokenize import tokenize_examples

needs_models = pytest.mark.skipif(not (SHARED / "models").is_dir(), reason=f"no test models in {SHARED}")
needs_data = pytest.mark.skipif(not (SHARED / "data").is_dir(), reason=f"no test data in {SHARED}")


def byte_tokenizer(
    *,
    adds_bos: bool = True,
    special: tuple[str | AddedToken, ...] = (),
    merges: tuple[tuple[str, str], ...] = (),
    trim_offsets: bool = False,
    use_regex: bool = False,
    opening: tuple[str, ...] = ("<bos>",),
) -> PreTrainedTokenizerFast:
    """One token per byte, but for `special` tokens and `merges` (of two characters each); with `use_regex` within the
    words of GPT-2's pattern.  `opening` are the tokens that it puts before a text where it `adds_bos`."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(a + b for a, b in merges)]
    backend = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, list(merges)))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    backend.decoder = decoders.ByteLevel()
    added = [token if isinstance(token, AddedToken) else AddedToken(token, special=True) for token in special]
    backend.add_special_tokens([*(AddedToken(token, special=True) for token in ("<bos>", "<eos>")), *added])
    trims = [processors.ByteLevel(trim_offsets=True)] if trim_offsets else []
    if adds_bos:
        known = [(token, backend.token_to_id(token)) for token in opening]
        template = processors.TemplateProcessing(f"{' '.join(opening)} $A", None, known)
        backend.post_processor = processors.Sequence([*trims, template])
    elif trims:
        backend.post_processor = trims[0]
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>")


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
# Phi-3's habit: eos after the last turn, whatever it is.
CLOSING_EOS = TEMPLATES["chatml"] + "{{ '' if add_generation_prompt else eos_token }}"
# Qwen3's habit: the last answer has an (empty) block of thoughts, earlier ones have none.
THINKING = """{%- for m in messages -%}
{{ '<|im_start|>' + m.role + '\\n' }}
{%- if m.role == 'assistant' and loop.last %}{{ '<think></think>' }}{% endif -%}
{{ m.content + '<|im_end|>' }}
{%- endfor -%}{{ '<|im_start|>assistant\\n' if add_generation_prompt else '' }}"""
MARKED = """{%- for m in messages -%}
{%- if m.role == 'assistant' -%}{{ '# ' }}{% generation %}{{ m.content + ';' }}{% endgeneration %}
{%- else -%}{{ '> ' + m.content + ';' }}{%- endif -%}
{%- endfor -%}"""

HEADINGS = (
    "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}### assistant:\n{% endif %}"
)
