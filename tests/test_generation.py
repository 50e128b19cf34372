"""An answer ends where its template ends answers, and its pieces are the answer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from conversations import HEADINGS
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from sora_llm.data.builtin_templates import TEMPLATES
from sora_llm.data.prompts import answer_end
from sora_llm.errors import UserError
from sora_llm.generation import Sampling, Stop, answer
from sora_llm.prompt_format import format_of_template


class Scripted(LlamaForCausalLM):
    """A LLaMA that says the same tokens whatever it is asked."""

    script: tuple[int, ...]

    def forward(self, *arguments: Any, **options: Any) -> Any:
        output = super().forward(*arguments, **options)
        output.logits[:, -1] = -1e4
        output.logits[:, -1, self.script[self.said]] = 0
        self.said += 1
        return output


def scripted(stories: Path, text: str, special: Sequence[str] = ()) -> tuple[Any, Any]:
    """It and a tokenizer, which has these special tokens besides its own."""
    model, tokenizer = (
        Scripted.from_pretrained(stories, dtype=torch.float32).eval(),
        AutoTokenizer.from_pretrained(stories),
    )
    if special:
        tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.script, model.said = tokenizer(text, add_special_tokens=False).input_ids, 0
    return model, tokenizer


@pytest.mark.parametrize(
    ("text", "stop", "said", "is_whole"),
    [
        ("def f(x):\n    return x\n", Stop(), "def f(x):\n    return x", False),  # blanks of code are kept
        ("She said hi.<|im_end|>\n<|im", Stop(text="<|im_end|>"), "She said hi.", True),
        ("a < b <| c <|im_start|>", Stop(text="<|im_end|>"), "a < b <| c <|im_start|>", False),
        ("naïve 数学 🙂 ok", Stop(), "naïve 数学 🙂 ok", False),
        ("</s>", Stop(), "", True),
    ],
)
def test_the_pieces_of_an_answer_are_the_answer_without_what_ends_it(stories, text, stop, said, is_whole):
    model, tokenizer = scripted(stories, text)
    pieces: list[str] = []
    found = answer(model, tokenizer, [1], Sampling(len(model.script)), stop, on_text=pieces.append)
    assert (found.text, "".join(pieces), found.is_whole) == (said, said, is_whole)
    assert len(pieces) > 3 or not said


def test_draws_are_repeatable_and_the_bases_own_options_are_not_used(stories):
    model = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(stories)
    plain = answer(model, tokenizer, [1, 403], Sampling(16)).text
    model.generation_config.update(temperature=50.0, do_sample=True, repetition_penalty=9.0, top_k=1)
    model.generation_config.update(num_beams=4, no_repeat_ngram_size=1, suppress_tokens=[403], min_p=0.9, max_time=0.0)

    def said(sampling: Sampling, seed: int) -> str:
        torch.manual_seed(seed)
        return answer(model, tokenizer, [1, 403], sampling).text

    assert plain == said(Sampling(16), 0) == said(Sampling(16), 1) == said(Sampling(16, 1.0, 1e-6), 2)
    drawn = [said(Sampling(16, 1.0), seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert model.generation_config.num_beams == 4, "they stay the model's"
    pieces: list[str] = []
    answer(model, tokenizer, [1, 403], Sampling(16), on_text=pieces.append)  # transformers streams no beams
    assert "".join(pieces) == plain


def test_a_prompt_with_a_token_that_the_base_lacks_is_refused(stories):
    model, tokenizer = scripted(stories, "Yes.")
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    with pytest.raises(UserError, match=r"token '\[PAD\]' is number 512, and the base has only 512 embeddings"):
        answer(model, tokenizer, tokenizer("a [PAD]").input_ids, Sampling(4))


HUMAN = HEADINGS.replace("m.role }}", "'Human' if m.role == 'user' else m.role }}")
SHOUTED = HEADINGS.replace("m.content", "m.content | upper")
HOST = "{% for m in messages %}{{ m.role }}: {{ m.content }} [Host, go on]\n{% endfor %}"
ONCE = "{% if messages | length > 2 %}{{ raise_exception('no further question') }}{% endif %}" + HEADINGS
BLANKS = "{% for m in messages %}{{ m.content }}\n\n{% endfor %}"


@pytest.mark.parametrize(
    ("template", "token", "text"),
    [
        (TEMPLATES["alpaca"], 2, ""),
        (TEMPLATES["llama-2"], 2, ""),
        (TEMPLATES["chatml"], None, "<|im_end|>"),
        (TEMPLATES["llama-3"], None, "<|eot_id|>"),
        (HEADINGS, None, "\n### user:"),
        (HUMAN, None, "\n### Human:"),
        (SHOUTED, None, "\n### user:"),
        (HOST, None, " [Host, go on]"),
        (ONCE, None, ""),
        (BLANKS, None, ""),
    ],
    ids=["alpaca", "llama-2", "chatml", "llama-3", "headings", "human", "shouted", "host", "once", "blanks"],
)
def test_an_answer_ends_with_what_its_template_writes_behind_answers(stories, template, token, text):
    """An answer may have lines and paragraphs: blanks do not end it."""
    assert answer_end(AutoTokenizer.from_pretrained(stories), template) == (token, text)


@pytest.mark.parametrize(
    ("template", "text", "said", "is_whole"),
    [
        (HUMAN, "One ### two.\n\nThree.\n### Human:\nMore", "One ### two.\n\nThree.", True),
        (BLANKS, "One.\n\nTwo.\n\nThree.", "One.\n\nTwo.\n\nThree.", False),
        (HEADINGS.replace("### {{ m.role }}:", "<|{{ m.role }}|>"), "One.\nTwo.\n<|user|>\nMore", "One.\nTwo.", True),
    ],
    ids=["human", "blanks", "special"],
)
def test_blanks_do_not_end_an_answer_but_the_next_question_does(stories, template, text, said, is_whole):
    """That may begin with a special token, whose name is not in the decoded answer."""
    model, tokenizer = scripted(stories, text, special=("<|user|>",))
    pieces: list[str] = []
    stop = format_of_template(tokenizer, template).stop
    found = answer(model, tokenizer, [1], Sampling(len(model.script)), stop, on_text=pieces.append)
    assert (found.text, "".join(pieces), found.is_whole) == (said, said, is_whole)
