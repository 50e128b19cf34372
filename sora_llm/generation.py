"""Text generation: prompt tokens in, text out, at once or streamed."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from sora_llm.backbone import num_embeddings, pad_token_id
from sora_llm.errors import UserError
from sora_llm.inject import evaluating, without_adapters


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest at temperature 0, else drawn from the `top_p` likeliest share."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0


@dataclass(frozen=True)
class Stop:
    """What ends an answer besides eos: tokens, and a text that is not a single token ("": none)."""

    ids: Sequence[int] = ()
    text: str = ""


@dataclass(frozen=True)
class Answer:
    """An answer; `is_whole`: it reached its end, rather than the token limit or an interruption."""

    text: str
    is_whole: bool


@torch.no_grad()
def answer(
    model: nn.Module,
    tokenizer: Any,
    ids: Sequence[int],
    sampling: Sampling,
    stop: Stop | None = None,
    *,
    on_text: Callable[[str], None] | None = None,
    is_interrupted: Callable[[], bool] = lambda: False,
) -> Answer:
    """Generate the answer of `model`, in eval mode, after the token `ids`.

    `on_text` receives the answer in pieces as it is generated, `is_interrupted` is called after every token.  Draws
    from torch's global generator: seed it for a repeatable answer.

    Raises:
        UserError: a token that the model has no embedding for.
    """
    if (largest := max(ids)) >= num_embeddings(model):
        raise UserError(
            f"the prompt's token {tokenizer.convert_ids_to_tokens(largest)!r} is number {largest}, and the base has "
            f"only {num_embeddings(model)} embeddings; leave it out"
        )
    stop = stop or Stop()
    tokens = torch.tensor([list(ids)], device=next(model.parameters()).device)
    ends = _ends(model, tokenizer, stop)
    options: dict[str, Any] = {"do_sample": False, "repetition_penalty": 1.0}
    if sampling.temperature > 0:
        options |= {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
    with _without_own_options(model):
        output = model.generate(  # type: ignore[operator]
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            generation_config=GenerationConfig(
                max_new_tokens=sampling.max_new_tokens,
                use_cache=True,
                pad_token_id=pad_token_id(tokenizer, model),
                eos_token_id=ends or None,
                stop_strings=[stop.text] if stop.text else None,
                **options,
            ),
            stopping_criteria=StoppingCriteriaList([_Interrupted(is_interrupted)]),
            streamer=None if on_text is None else _Pieces(tokenizer, stop.text, on_text),
            tokenizer=tokenizer if stop.text else None,
        )
    new = output[0, len(ids) :].tolist()
    text, is_stopped = _said(tokenizer, new, stop.text)
    return Answer(text, is_stopped or new[-1] in ends)


@contextlib.contextmanager
def _without_own_options(model: nn.Module) -> Iterator[None]:
    """Without the base's generation_config.json, from which transformers takes every option that is left open: beams,
    suppressed tokens, a shortest length, …"""
    find_base = getattr(model, "get_base_model", None)
    holders = [model, *([find_base()] if callable(find_base) else [])]  # PEFT hands its own on to the base
    own = [holder.generation_config for holder in holders]
    model.generation_config = GenerationConfig()  # type: ignore[assignment]
    try:
        yield
    finally:
        for holder, options in zip(holders, own, strict=True):
            holder.generation_config = options


def _ends(model: nn.Module, tokenizer: Any, stop: Stop) -> list[int]:
    """All tokens that end an answer: the model's own, the tokenizer's, the template's."""
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    own = own if isinstance(own, list) else [own]
    return sorted({int(token) for token in (*own, tokenizer.eos_token_id, *stop.ids) if token is not None})


class _Interrupted(StoppingCriteria):
    """Ends an answer between two tokens."""

    def __init__(self, is_interrupted: Callable[[], bool]):
        self._is_interrupted = is_interrupted

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self._is_interrupted(), device=input_ids.device)


class _Pieces(BaseStreamer):
    """Passes on the new part of the answer after every token.

    The whole answer is decoded each time: decoding from the middle drops spaces (of indented code) and splits
    multi-byte characters.  Text that may begin the stop string is held back until it cannot.
    """

    def __init__(self, tokenizer: Any, stop_text: str, on_text: Callable[[str], None]):
        self._tokenizer, self._stop_text, self._on_text = tokenizer, stop_text, on_text
        self._ids: list[int] = []
        self._said, self._prompt_is_next = "", True

    def put(self, value: torch.Tensor) -> None:
        if self._prompt_is_next:
            self._prompt_is_next = False
            return
        self._ids += value.flatten().tolist()
        text = _said(self._tokenizer, self._ids, self._stop_text)[0].rstrip("\N{REPLACEMENT CHARACTER}")
        self._hand_on(text[: len(text) - _overlap(text, self._stop_text)].rstrip())

    def end(self) -> None:
        self._hand_on(_said(self._tokenizer, self._ids, self._stop_text)[0])

    def _hand_on(self, text: str) -> None:
        if text != self._said and text.startswith(self._said):
            self._on_text(text[len(self._said) :])
            self._said = text


def _said(tokenizer: Any, ids: Sequence[int], stop_text: str) -> tuple[str, bool]:
    """The answer in some new tokens, and whether the stop text follows it."""
    text = tokenizer.decode(ids, skip_special_tokens=True)
    said, found, _ = text.partition(stop_text) if stop_text else (text, "", "")
    return said.strip(), bool(found)


def _overlap(text: str, stop_text: str) -> int:
    """How many characters at the end of `text` may be the beginning of `stop_text`."""
    longest = min(len(text), len(stop_text))
    return next((length for length in range(longest, 0, -1) if text.endswith(stop_text[:length])), 0)


def sample_answers(
    model: nn.Module, tokenizer: Any, prompts: Mapping[str, Sequence[int]], stop: Stop | None = None
) -> list[dict[str, str]]:
    """Greedy answers of the base and of the adapted model: [{"prompt", "base", "adapted"}]; one process.

    `prompts` maps each prompt to its token ids.
    """
    sampling = Sampling(max_new_tokens=64)
    with evaluating(model):
        adapted = {prompt: answer(model, tokenizer, ids, sampling, stop).text for prompt, ids in prompts.items()}
        with without_adapters(model):
            base = {prompt: answer(model, tokenizer, ids, sampling, stop).text for prompt, ids in prompts.items()}
    return [{"prompt": prompt, "base": base[prompt], "adapted": adapted[prompt]} for prompt in prompts]
