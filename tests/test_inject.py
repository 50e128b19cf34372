"""Any decoder's linears are found and wrapped, the model starts as it was, and everything else is frozen."""

import math

import pytest
import torch
from helpers import linear4bit, randomise_all, tiny_llama
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from transformers import AutoConfig, AutoModelForCausalLM

from sora_llm.errors import UserError
from sora_llm.inject import (
    adapter_parameters,
    adapters,
    cut_adapters,
    inject_sora,
    without_adapters,
)
from sora_llm.sora import SoraLinear, keep_live_slots
from sora_llm.targets import target_linears

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]
IDS = torch.arange(20).reshape(2, 10)


def tiny(family, tied=False):
    """A random model of two layers of this family."""
    config = AutoConfig.for_model(
        family,
        vocab_size=48,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS, use_cache=False).logits


@pytest.mark.parametrize("tied", [False, True], ids=["own-head", "tied-head"])
@pytest.mark.parametrize("family", FAMILIES)
def test_all_linear_is_every_projection_under_its_own_name_and_never_the_head(family, tied):
    model = tiny(family, tied)
    expected = [name for name, m in model.named_modules() if name.rpartition(".")[2] in PROJECTIONS]
    assert len(expected) == 14 and isinstance(model.lm_head, nn.Linear)
    assert list(target_linears(model)) == expected
    before = {name: model.get_submodule(name) for name in expected}
    inject_sora(model, r=2)
    assert list(adapters(model)) == expected
    assert all(layer.base_layer is before[name] for name, layer in adapters(model).items())
    assert type(model.lm_head) is nn.Linear and (model.lm_head.weight is model.model.embed_tokens.weight) == tied


@pytest.mark.parametrize("family", FAMILIES)
def test_an_injected_model_starts_bit_identical_to_its_base_and_then_learns(family):
    model = tiny(family)
    expected = logits(model)
    assert inject_sora(model, r=3) is model
    assert model.training, "from_pretrained returns a model in eval mode"
    assert torch.equal(logits(model), expected)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == sum(1 for _ in tiny(family).parameters())
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trainable == set(adapter_parameters(model)) and len(trainable) == 3 * 14
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    assert all(p.grad is None for p in model.parameters() if not p.requires_grad)
    # with B = 0 the gradient is B's alone
    assert all(layer.lora_B.grad.any() for layer in adapters(model).values())
    randomise_all(model)
    assert not torch.equal(logits(model), expected)


def test_a_4_bit_model_starts_bit_identical_too():
    model = tiny("llama")
    for name in target_linears(model):
        model.set_submodule(name, linear4bit(model.get_submodule(name).weight.detach()))
    expected = logits(model)
    assert not torch.equal(expected, logits(tiny("llama"))), "the layers are quantised"
    inject_sora(model, r=2)
    assert torch.equal(logits(model), expected)
    assert len(adapters(model)) == 14


def test_no_target_module_is_a_mistake_and_no_model_without_adapters() -> None:
    with pytest.raises(UserError, match="names no module"):
        inject_sora(tiny_llama(), target_modules=[])


def test_a_model_without_linears_is_refused():
    with pytest.raises(UserError, match="no linear layers"):
        inject_sora(nn.Sequential(nn.Embedding(3, 4), nn.LayerNorm(4)))


def test_injecting_twice_is_refused_and_changes_nothing():
    model = inject_sora(tiny("llama"), r=2, target_modules=["q_proj"])
    with pytest.raises(ValueError, match="already has SoRA adapters"):
        inject_sora(model, r=2)
    assert len(adapters(model)) == 2 and not any(isinstance(m.base_layer, SoraLinear) for m in adapters(model).values())


def test_the_start_is_determined_by_torchs_seed_and_not_by_the_adapters_dtype():
    def start(seed, dtype=torch.float32):
        model = tiny("llama")
        torch.manual_seed(seed)
        return [layer.lora_A.detach() for layer in adapters(inject_sora(model, r=2, dtype=dtype)).values()]

    assert all(torch.equal(a, b) for a, b in zip(start(1), start(1), strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(start(1), start(2), strict=True))
    for low, full in zip(start(1, torch.bfloat16), start(1), strict=True):
        assert low.dtype == torch.bfloat16 and torch.equal(low, full.bfloat16())


def test_options_reach_every_layer():
    model = inject_sora(tiny("llama"), r=4, lora_alpha=10, lora_dropout=0.25, dtype=torch.bfloat16)
    for layer in adapters(model).values():
        assert (layer.scaling, layer.lora_dropout) == (2.5, 0.25)
        assert {p.dtype for p in (layer.lora_A, layer.lora_B, layer.gate)} == {torch.bfloat16}
        assert layer.lora_A.shape == (4, layer.in_features) and layer.lora_B.shape == (layer.out_features, 4)


def test_adapter_parameters_are_named_by_module_and_kind_also_after_a_cut():
    model = randomise_all(inject_sora(tiny("llama"), r=3, target_modules=["q_proj"]))
    names = ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert list(adapter_parameters(model)) == [f"{n}.{kind}" for n in names for kind in ("lora_A", "lora_B", "gate")]
    before = logits(model)
    factors = {n: keep_live_slots(m.lora_A, m.lora_B, m.gate) for n, m in adapters(model).items()}
    cut_adapters(model, factors)
    # the second module was all dead: no parameter is left of it
    assert list(adapter_parameters(model)) == [f"{names[0]}.lora_A", f"{names[0]}.lora_B"]
    assert list(adapters(model)) == names
    torch.testing.assert_close(logits(model), before, rtol=1e-4, atol=1e-5)  # float32, √|g| on either side


def test_bare_shows_the_base_model_and_puts_the_adapters_back_whatever_happens():
    model = tiny_llama()
    expected, names = logits(model), [name for name, _ in model.named_modules()]
    layers = adapters(randomise_all(inject_sora(model, r=2)))
    adapted = logits(model)
    with pytest.raises(KeyError), without_adapters(model) as base:
        assert base is model and not adapters(model)
        assert [name for name, _ in model.named_modules()] == names
        assert torch.equal(logits(model), expected)
        raise KeyError
    assert all(adapters(model)[name] is layer for name, layer in layers.items())
    assert torch.equal(logits(model), adapted)


# ----- what cannot be adapted -----------------------------------------------------------------------------------------


def test_models_that_would_not_be_adapted_as_a_whole_are_refused():
    from peft import LoraConfig, get_peft_model

    with pytest.raises(UserError, match="another library's adapters"):
        inject_sora(get_peft_model(tiny_llama(), LoraConfig(target_modules=["q_proj"])))
    shared = tiny_llama()
    shared.model.layers[1].mlp.up_proj = shared.model.layers[0].mlp.up_proj
    with pytest.raises(UserError, match=r"0.mlp.up_proj and model.layers.1.mlp.up_proj are the same layer"):
        inject_sora(shared)
    assert not adapters(shared)
    twice = tiny_llama()
    twice.model.layers[1] = twice.model.layers[0]
    assert len(adapters(inject_sora(twice, r=2))) == len(PROJECTIONS), "a block that stands twice is one module"
    with pytest.raises(UserError, match="Linear has no linear layers"):
        inject_sora(nn.Linear(3, 4))


@pytest.mark.parametrize(
    "options",
    [
        *({"lora_dropout": value} for value in (1.0, 5, "0.1")),
        *({"lora_alpha": value} for value in (0, -16, math.inf, math.nan, None)),
        *({"r": value} for value in (0, 2.5, "8", True)),
        *({"dtype": value} for value in ("float32", torch.int8, None)),
    ],
)
def test_a_rank_dropout_or_scale_that_cannot_be_is_an_error(options):
    model = tiny_llama()
    with pytest.raises(ValueError, match=f"^{next(iter(options))} is"):
        inject_sora(model, **{"r": 2, **options})
    assert all(parameter.requires_grad for parameter in model.parameters()), "nothing was frozen for nothing"


def test_a_compiled_model_is_injected_under_the_names_of_the_base():
    inner = tiny_llama()
    compiled = torch.compile(inner)
    assert inject_sora(compiled, r=2) is compiled
    assert list(adapters(inner)) == list(target_linears(tiny_llama()))


# ----- what others have done to a model before ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (lambda layer: torch.compile(layer, backend="eager"), "torch.compile"),
        (checkpoint_wrapper, "checkpoint_wrapper"),
    ],
    ids=["compiled", "checkpointed"],
)
def test_a_wrapped_part_of_a_model_is_refused_by_what_wraps_it(wrap, said):
    """Its modules have names that nobody who loads the base would find."""
    model = tiny_llama()
    model.model.layers[1] = wrap(model.model.layers[1])
    with pytest.raises(
        UserError, match=rf"model\.layers\.1\.\S+ is inside a {said}, which changes its name from the base's"
    ):
        inject_sora(model)
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


def test_a_base_that_is_offloaded_in_part_is_refused():
    model = tiny_llama()
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(UserError, match=r"the weight of model\.layers\.1\.mlp\.gate_proj is offloaded \(3 of 14"):
        inject_sora(model)
    inject_sora(tiny_llama().to("meta"))  # a skeleton has no weights at all


@pytest.mark.parametrize("bad", [None, 3, [3], ["q_proj", None]])
def test_targets_that_are_no_text_are_a_sentence(bad):
    with pytest.raises(UserError, match=r"target_modules is .*; it must be all-linear or suffixes"):
        inject_sora(tiny_llama(), target_modules=bad)


def test_what_is_no_model_is_a_sentence():
    with pytest.raises(UserError, match=r"takes a torch\.nn\.Module, not 'llama'"):
        inject_sora("llama")


def test_a_seed_means_the_same_adapter_under_any_default_dtype_and_device():
    def drawn():
        torch.manual_seed(0)
        return next(iter(adapters(inject_sora(model, r=2)).values())).lora_A

    model = tiny_llama()
    expected = drawn().clone()
    for setting in (lambda: torch.set_default_dtype(torch.bfloat16), lambda: torch.set_default_device("meta")):
        model = tiny_llama()
        setting()
        try:
            found = drawn()
        finally:
            torch.set_default_dtype(torch.float32)
            torch.set_default_device(None)
        assert torch.equal(found, expected)
