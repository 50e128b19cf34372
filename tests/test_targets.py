"""Which layers take an adapter; those where it would be dead or could not be reloaded are left out, and named."""

import json

import pytest
import torch
from conftest import shared
from helpers import randomise_all, tiny_llama
from small_runs import CONFIG, overrides, short_rows
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from sora_llm.config import load_config
from sora_llm.errors import UserError
from sora_llm.export import export_adapter
from sora_llm.inject import adapters, inject_sora
from sora_llm.running.config_warnings import config_warnings
from sora_llm.running.plan import make_plan
from sora_llm.running.routing_check import check_routing
from sora_llm.running.unpack import target_modules, target_shapes
from sora_llm.targets import left_out, linear_layers, stacked_weights, target_linears
from sora_llm.topology import ALONE
from sora_llm.train import run

SIZES = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
EXPERTS_TOO = {"gate_proj", "up_proj", "down_proj"}
EVERY_SECOND = {
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
ODD = {  # family: (options, last names of targets, last names of what is left out)
    "qwen3_moe": (
        {"mlp_only_layers": [0], "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        ATTENTION,
        EXPERTS_TOO,
    ),
    "qwen2_moe": (
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
        ATTENTION | EXPERTS_TOO | {"shared_expert_gate"},
        set(),
    ),
    "mixtral": ({"num_local_experts": 4}, ATTENTION, set()),
    "mamba": ({"state_size": 4}, {"in_proj"}, {"x_proj", "dt_proj", "out_proj"}),
    "jamba": (
        {"num_experts": 4, "mamba_d_state": 4, "use_mamba_kernels": False, **EVERY_SECOND},
        ATTENTION | EXPERTS_TOO | {"in_proj", "x_proj", "out_proj"},
        {"dt_proj"},
    ),
    "falcon": ({}, {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}, set()),
    "llama4_text": ({"num_local_experts": 4, "head_dim": 8}, ATTENTION | EXPERTS_TOO, {"router"}),
}


def of_family(family, **options):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**SIZES, **ODD[family][0], **options}))


class Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


def with_an_odd_up_proj():
    """A LLaMA of two layers, in one of which up_proj takes no adapter."""
    model = tiny_llama()
    model.model.layers[0].mlp.up_proj.__class__ = Doubled
    return model


def last_names(names):
    return {name.rpartition(".")[2] for name in names}


def test_suffixes_choose_and_keep_the_models_order():
    model = tiny_llama()
    chosen = list(target_linears(model, ["mlp.down_proj", "q_proj"]))
    assert chosen == [
        f"model.layers.{layer}.{part}" for layer in (0, 1) for part in ("self_attn.q_proj", "mlp.down_proj")
    ]
    assert list(target_linears(model, "v_proj")) == [f"model.layers.{layer}.self_attn.v_proj" for layer in (0, 1)]
    full = "model.layers.1.mlp.up_proj"
    assert list(target_linears(model, [full])) == [full]
    inject_sora(model, r=2, target_modules=["k_proj"])
    assert list(adapters(model)) == [f"model.layers.{layer}.self_attn.k_proj" for layer in (0, 1)]


def test_names_in_one_text_are_told_to_be_a_list():
    with pytest.raises(UserError, match=r"several are a list: \[q_proj, v_proj\]"):
        inject_sora(tiny_llama(), target_modules="q_proj, v_proj")


@pytest.mark.parametrize("suffix", ["query", "proj", "_proj", "lm_head", "layers", "q_proj.weight"])
def test_a_suffix_that_matches_no_linear_is_refused_with_those_that_exist(suffix):
    model = tiny_llama()
    with pytest.raises(UserError, match=rf"'{suffix}' matches no linear layer.*down_proj.*q_proj"):
        inject_sora(model, target_modules=["q_proj", suffix])
    assert not adapters(model) and all(p.requires_grad for p in model.parameters())


# ----- what is left out -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ODD)
def test_all_linear_is_what_learns_and_can_be_reloaded_and_the_rest_has_a_reason(family, tmp_path):
    _, targets, without = ODD[family]
    model = of_family(family)
    assert last_names(left_out(model)) == without
    may_be = {"router"} if family == "jamba" else set()  # a linear layer in transformers 5.17
    assert last_names(target_linears(model)) - may_be == targets
    for last in without:
        with pytest.raises(UserError, match=rf"target module '{last}' is \S+{last}, (whose|which|a) "):
            target_linears(model, [last])

    inject_sora(model, r=2)
    model(input_ids=torch.arange(40).reshape(2, 20), labels=torch.arange(40).reshape(2, 20)).loss.backward()
    assert all(layer.lora_B.grad is not None and layer.lora_B.grad.any() for layer in adapters(model).values())
    randomise_all(model)
    assert export_adapter(model, tmp_path / "adapter")["passed"]


def test_linear_layers_that_their_parents_do_not_call_are_no_targets():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.block = nn.MultiheadAttention(8, 2), nn.TransformerEncoderLayer(8, 2, 16)
            self.proj = nn.Linear(8, 8)

    assert list(target_linears(Mixed())) == ["proj"]
    with pytest.raises(UserError, match=r"'linear1' is block.linear1, whose weight TransformerEncoderLayer reads"):
        target_linears(Mixed(), ["linear1"])


def test_a_layer_that_is_called_outside_of_training_alone_is_no_target():
    options = {"vocab_size_per_layer_input": 48, "hidden_size_per_layer_input": 8, "laurel_rank": 4, "head_dim": 8}
    options |= {"layer_types": ["sliding_attention", "full_attention"], "num_kv_shared_layers": 0}
    config = AutoConfig.for_model("gemma3n_text", **SIZES, **options, activation_sparsity_pattern=[0.0, 0.0])
    model = AutoModelForCausalLM.from_config(config)
    assert last_names(left_out(model)) == {"correction_coefs"}
    check_routing(inject_sora(model, r=2))  # in training, a token passes all the others


def test_layers_that_no_text_passes_are_no_targets():
    """Gemma 3 loads as a model of texts and images: the gates of its vision tower would never have a gradient."""
    vision = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes = {"image_size": 32, "patch_size": 8}
    config = AutoConfig.for_model("gemma3", text_config=SIZES | {"head_dim": 8}, vision_config=vision | sizes)
    model = AutoModelForCausalLM.from_config(config)
    found = linear_layers(model)
    images = {name for name in found if "vision" in name}
    assert images and left_out(model).keys() == images
    for targets in ("all-linear", ["q_proj", "v_proj"]):
        assert all(name.startswith("model.language_model.layers.") for name in target_linears(model, targets))
    with pytest.raises(UserError, match=r"target module 'out_proj' is \S+, which no text passes"):
        target_linears(model, ["out_proj"])


def test_a_model_of_text_that_calls_something_else_its_decoder_keeps_its_targets():
    """The output head, in ModernBERT's."""
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("modernbert-decoder", **SIZES, **tokens))
    assert not left_out(model) and {"q_proj", "v_proj"} <= last_names(target_linears(model))


def test_experts_that_are_one_tensor_are_named_as_what_no_adapter_is_put_on():
    assert stacked_weights(of_family("mixtral")) == ["experts.gate_up_proj", "experts.down_proj"]
    assert stacked_weights(tiny_llama()) == []


def test_where_only_some_layers_of_a_name_are_left_out_the_export_names_the_others_in_full(tmp_path):
    model = with_an_odd_up_proj()
    inject_sora(model, r=2, target_modules=["up_proj", "q_proj"])
    randomise_all(model)
    assert export_adapter(model, tmp_path / "adapter")["passed"]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == [
        "model.layers.0.self_attn.q_proj",
        "model.layers.1.self_attn.q_proj",
        "model.layers.1.mlp.up_proj",
    ]


@pytest.mark.parametrize(
    ("written", "taken"),
    [("all-linear", "all-linear"), ("q_proj", ["q_proj"]), ("[q_proj, o_proj]", ["q_proj", "o_proj"])],
)
def test_one_suffix_is_a_list_of_one(written, taken, tmp_path):
    """Its letters are no suffixes."""
    config = load_config(CONFIG, [f"sora.target_modules={written}", f"output.output_dir={tmp_path}"])
    assert target_modules(config) == taken


@pytest.mark.parametrize(("suffix", "is_warned_of"), [("up_proj", True), ("q_proj", False)])
def test_a_run_warns_of_one_suffix_as_of_a_list_of_it(suffix, is_warned_of, tmp_path):
    def said(written):
        config = load_config(CONFIG, [f"sora.target_modules={written}", f"output.output_dir={tmp_path}"])
        skeleton = with_an_odd_up_proj()
        plan = make_plan(config, "none", ALONE, lambda _: 100, target_shapes(config, skeleton))
        return list(config_warnings(plan, skeleton))

    assert said(suffix) == said(f"[{suffix}]")
    assert any("no adapter on up_proj, a Doubled" in line for line in said(suffix)) == is_warned_of


def test_a_run_says_what_it_leaves_out(tmp_path, capsys):
    base = of_family("qwen3_moe", vocab_size=512)
    base.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(shared("models/stories260k")).save_pretrained(tmp_path / "base")
    short_rows(tmp_path)
    options = {"model.name_or_path": str(tmp_path / "base"), "data.sequence_len": 128}
    run(CONFIG, *overrides(tmp_path, tmp_path / "run", **options))
    said = capsys.readouterr().out
    assert "no adapter on experts.gate_up_proj, experts.down_proj, which are not linear layers" in said
    assert "no adapter on gate_proj, up_proj, down_proj, which PEFT takes for stacked experts" in said
    assert "self-check passed" in said
