"""The loss of a frozen head in parts is cross-entropy over whole logits; heads that do not allow it are left alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import shared
from helpers import linear4bit, randomise_all, relative_error, tiny_llama
from torch import Tensor, nn
from transformers import CohereConfig, Gemma2Config, GraniteConfig
from transformers.modeling_outputs import CausalLMOutput
from transformers.models.cohere import CohereForCausalLM
from transformers.models.gemma2 import Gemma2ForCausalLM
from transformers.models.granite import GraniteForCausalLM

from sora_llm import causal_loss, head_loss
from sora_llm.backbone import load_backbone
from sora_llm.base_spec import BackboneSpec
from sora_llm.causal_loss import causal_loss_sum
from sora_llm.head_loss import IGNORED, frozen_head, head_losses, try_head
from sora_llm.inject import adapter_parameters, inject_sora

TOKENS = 24


def batch(vocabulary: int, weighted: bool = False, packed: bool = False) -> dict[str, Tensor]:
    """Two rows of random tokens, a third of which are not trained on, the end of one row padded."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocabulary, (2, TOKENS), generator=generator)
    labels = torch.where(torch.rand(ids.shape, generator=generator) < 0.3, IGNORED, ids)
    labels[1, -5:] = IGNORED
    found = {"input_ids": ids, "labels": labels}
    if weighted:
        found["loss_weights"] = torch.rand(ids.shape, generator=generator)
    if packed:
        found["position_ids"] = (torch.arange(TOKENS) % (TOKENS // 2)).expand_as(ids)
    return found


def gradients(model: nn.Module, inputs: dict[str, Tensor], scale: float = 0.37) -> tuple[float, dict[str, Tensor]]:
    """The loss, and its gradient by every adapter tensor, multiplied by `scale`."""
    model.zero_grad(set_to_none=True)
    loss = causal_loss_sum(model, **inputs)
    (loss * scale).backward()
    return loss.item(), {name: p.grad.clone() for name, p in adapter_parameters(model).items() if p.grad is not None}


@pytest.fixture
def whole_logits(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Makes every head one that is left."""
    return lambda: monkeypatch.setattr(causal_loss, "frozen_head", lambda model: None)


@pytest.mark.parametrize("options", [{}, {"weighted": True}, {"packed": True}], ids=["plain", "weighted", "packed"])
@pytest.mark.parametrize("at_once", [1, 7, 1000])
def test_loss_and_gradients_are_those_of_whole_logits(
    options: dict[str, bool], at_once: int, whole_logits: Callable[[], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama().requires_grad_(False)
    randomise_all(inject_sora(model, r=4), size=0.1)
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", at_once * vocabulary)
    assert frozen_head(model) is model.lm_head
    loss, ours = gradients(model, batch(vocabulary, **options))
    assert frozen_head(model) is model.lm_head, "LLaMA hands logits on as they are"
    whole_logits()
    expected, theirs = gradients(model, batch(vocabulary, **options))
    assert loss == pytest.approx(expected, rel=1e-6)
    assert ours.keys() == theirs.keys()
    assert max(relative_error(ours[name], theirs[name]) for name in theirs) < 2e-6


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [(torch.bfloat16, 0.37), (torch.float16, 2.0**10), (torch.float16, 2.0**-4)],  # float16: a loss scale over tokens
)
def test_in_16_bits_gradients_are_as_near_to_those_in_float32(
    dtype: torch.dtype, scale: float, whole_logits: Callable[[], None]
) -> None:
    model = tiny_llama(hidden_size=64, vocab_size=512).to(dtype).requires_grad_(False)
    randomise_all(inject_sora(model, r=4), size=0.1)
    assert frozen_head(model) is model.lm_head
    inputs = batch(512)
    _, ours = gradients(model, inputs, scale)
    whole_logits()
    _, theirs = gradients(model, inputs, scale)
    _, exact = gradients(model.float(), inputs, scale)
    errors = [sum(relative_error(found[name], exact[name]) for name in exact) / len(exact) for found in (ours, theirs)]
    assert errors[0] < 1.1 * errors[1]


def test_a_compiled_model_has_the_loss_and_the_gradients_of_the_model_inside() -> None:
    """Its head's forward is another function in every call, and the numbers of tokens change."""
    model = tiny_llama(num_hidden_layers=1).requires_grad_(False)
    randomise_all(inject_sora(model, r=4), size=0.1)
    torch.compiler.reset()
    compiled: Any = torch.compile(model, backend="eager")
    assert frozen_head(compiled) is model.lm_head
    first = batch(model.config.vocab_size)
    second = {**first, "labels": first["labels"].roll(1, dims=0)}
    shorter = {name: tensor[:, :17] for name, tensor in first.items()}
    for inputs in (first, second, shorter, first):
        expected, theirs = gradients(model, inputs)
        model.zero_grad(set_to_none=True)
        loss = causal_loss_sum(compiled, **inputs)
        (loss * 0.37).backward()
        assert loss.item() == pytest.approx(expected, rel=1e-6)  # the branch is computed in another order
        ours = {name: parameter.grad for name, parameter in adapter_parameters(model).items()}
        assert max(relative_error(ours[name], theirs[name]) for name in theirs) < 2e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_real_checkpoint_has_the_same_loss_in_an_evaluation(dtype: str, whole_logits: Callable[[], None]) -> None:
    model = load_backbone(BackboneSpec(str(shared("models/base5m")), dtype=dtype), "cpu")
    with torch.no_grad():
        ours = causal_loss_sum(model, **batch(4096))
        whole_logits()
        torch.testing.assert_close(ours, causal_loss_sum(model, **batch(4096)), rtol=1e-6, atol=0)


@pytest.mark.parametrize("at_once", [5, 1000])
def test_logits_never_exist_in_full(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    widest = 0

    class Note(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal widest
            out = function(*args, **(kwargs or {}))
            if isinstance(out, Tensor) and out.ndim > 1 and out.shape[-1] == vocabulary:
                widest = max(widest, out.numel() // vocabulary)
            return out

    model = inject_sora(tiny_llama(vocab_size=91).requires_grad_(False), r=2)
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(head_loss, "LOGITS_AT_ONCE", at_once * vocabulary)
    inputs = batch(vocabulary)
    num_supervised = int((inputs["labels"][:, 1:] != IGNORED).sum())
    with Note():
        causal_loss_sum(model, **inputs).backward()
    assert widest == min(at_once, num_supervised)


SIZES: dict[str, Any] = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 0,
    "initializer_range": 0.3,
}


@pytest.mark.parametrize(
    "make",
    [
        lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, final_logit_softcapping=2.0)),
        lambda: CohereForCausalLM(CohereConfig(**SIZES, logit_scale=0.5)),
        lambda: GraniteForCausalLM(GraniteConfig(**SIZES, logits_scaling=3.0)),
    ],
    ids=["caps", "multiplies", "divides"],
)
def test_a_model_that_changes_its_logits_is_noticed_and_keeps_them(
    make: Callable[[], nn.Module], whole_logits: Callable[[], None]
) -> None:
    torch.manual_seed(0)
    model: Any = make().eval().requires_grad_(False)
    randomise_all(inject_sora(model, r=2), size=0.1)
    assert frozen_head(model) is not None
    loss, ours = gradients(model, batch(48))
    assert frozen_head(model) is None, "known from then on"
    whole_logits()
    expected, theirs = gradients(model, batch(48))
    assert loss == expected and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def in_place(model: Any, hidden: Tensor) -> Tensor:
    return model.lm_head(hidden).mul_(0.5)


def cut_to_fewer_words(model: Any, hidden: Tensor) -> Tensor:
    return model.lm_head(hidden)[..., :40]


def in_the_memory_of_the_first(model: Any, hidden: Tensor) -> Tensor:
    logits = model.lm_head(hidden) * 0.5
    logits = logits * 0.5
    return logits.clamp_(-1, 1)


def of_flat_tokens(model: Any, hidden: Tensor) -> Tensor:
    return model.lm_head(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)


def token_by_token(model: Any, hidden: Tensor) -> Tensor:
    return torch.cat([model.lm_head(one) for one in hidden.split(1, dim=1)], dim=1)


def under_autocast(model: Any, hidden: Tensor) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return model.lm_head(hidden)


def with_a_hook(model: Any, hidden: Tensor) -> Tensor:
    hook = model.lm_head.register_forward_hook(lambda _head, _inputs, logits: logits * 0.5)
    logits = model.lm_head(hidden)
    hook.remove()
    return logits


@pytest.mark.parametrize(
    "answer",
    [
        in_place,
        cut_to_fewer_words,
        in_the_memory_of_the_first,
        of_flat_tokens,
        token_by_token,
        under_autocast,
        with_a_hook,
    ],
)
def test_whatever_a_model_does_to_its_head_its_loss_is_that_of_its_logits(
    answer: Callable[[Any, Tensor], Tensor], whole_logits: Callable[[], None]
) -> None:
    model = inject_sora(tiny_llama().requires_grad_(False), r=2)
    model.forward = lambda input_ids, use_cache: CausalLMOutput(
        logits=answer(model, model.model(input_ids).last_hidden_state)
    )
    inputs = batch(40)
    head = frozen_head(model)
    assert head is not None and not try_head(model, head)
    loss, ours = gradients(model, inputs)
    whole_logits()
    expected, theirs = gradients(model, inputs)
    assert loss == expected and all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_what_changes_after_it_was_tried_is_noticed_too(whole_logits: Callable[[], None]) -> None:
    model = tiny_llama().requires_grad_(False)
    plain, inputs = model.forward, batch(48)
    causal_loss_sum(model, **inputs)

    def halved(*arguments: Any, **options: Any) -> Any:
        out = plain(*arguments, **options)
        out.logits.mul_(0.5)
        return out

    model.forward = halved
    loss = causal_loss_sum(model, **inputs)
    assert frozen_head(model) is None
    whole_logits()
    assert loss == causal_loss_sum(model, **inputs)


def test_trying_a_head_draws_no_random_number() -> None:
    model = inject_sora(tiny_llama().requires_grad_(False), r=2, lora_dropout=0.5).train()
    before = torch.get_rng_state()
    assert try_head(model, model.lm_head)
    assert torch.equal(torch.get_rng_state(), before)


def trained(model: Any) -> None:
    model.lm_head.weight.requires_grad_(True)


def quantised(model: Any) -> None:
    model.lm_head = linear4bit(model.lm_head.weight.detach())


def replaced(model: Any) -> None:
    model.lm_head = nn.Sequential(model.lm_head)


@pytest.mark.parametrize("change", [trained, quantised, replaced])
def test_heads_that_are_left(change: Callable[[Any], None]) -> None:
    model = tiny_llama().requires_grad_(False)
    assert frozen_head(model) is model.lm_head
    change(model)
    assert frozen_head(model) is None


@pytest.mark.parametrize("mode", [lambda: torch.autocast("cpu", torch.bfloat16), torch.inference_mode])
def test_under_autocast_and_in_inference_mode_a_head_is_left(mode: Callable[[], Any]) -> None:
    model = tiny_llama().requires_grad_(False)
    with mode():
        assert frozen_head(model) is None
        assert causal_loss_sum(model, **batch(model.config.vocab_size)).isfinite()


def test_a_gradient_of_a_gradient_is_refused_instead_of_wrong() -> None:
    hidden = torch.randn(5, 32, requires_grad=True)
    losses = head_losses(hidden, tiny_llama().lm_head.requires_grad_(False), torch.arange(5), torch.arange(5))
    (gradient,) = torch.autograd.grad((losses**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_after_an_error_in_the_model_its_head_gives_logits_again() -> None:
    model = tiny_llama().requires_grad_(False)
    inputs = batch(model.config.vocab_size)
    with pytest.raises(IndexError):
        causal_loss_sum(model, **{**inputs, "input_ids": inputs["input_ids"] + 1000})
    assert model(input_ids=inputs["input_ids"]).logits.shape == (2, TOKENS, model.config.vocab_size)
    assert not model.lm_head._forward_hooks
