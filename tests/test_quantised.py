"""A base whose files bitsandbytes quantised already is the same base as one that is quantised while it is loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from helpers import linear4bit, relative_error
from peft import LoraConfig, PeftModel, get_peft_model
from peft_loras import save_random
from safetensors.torch import load_file, save_file
from small_runs import CONFIG, Playground, overrides, result, status
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sora_llm import cli
from sora_llm.backbone import from_pretrained_args, load_backbone, load_model_config, skeleton
from sora_llm.base_files import tokenizer_files
from sora_llm.base_spec import BackboneSpec
from sora_llm.config import load_config
from sora_llm.errors import UserError
from sora_llm.estimates.memory import BatchShape, estimate
from sora_llm.export import export_adapter
from sora_llm.inject import inject_sora
from sora_llm.quantised import match_loading_format
from sora_llm.reread_weights import keep_weights, reread_weights_in_backward
from sora_llm.running.unpack import backbone_spec
from sora_llm.targets import target_linears
from sora_llm.train import main

IDS = torch.arange(3, 60)[None]
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
FILES: dict[str, dict[str, Any]] = {
    "nf4": NF4 | {"bnb_4bit_compute_dtype": torch.bfloat16},
    "nf4, stored as bfloat16": NF4 | {"bnb_4bit_quant_storage": torch.bfloat16},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4"},
    "nf4, two skipped": NF4 | {"llm_int8_skip_modules": ["lm_head", "down_proj", "model.layers.1.mlp.up_proj"]},
    "int8": {"load_in_8bit": True},
}
"""By name: the BitsAndBytesConfig that the files were made with."""

SPECS: dict[str, dict[str, Any]] = {
    "nf4": {"load_in_4bit": True},
    "fp4": {"load_in_4bit": True, "quant_type": "fp4", "double_quant": False},
    "int8": {"load_in_8bit": True},
}


@pytest.fixture(scope="module")
def quantised(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of stories260k, saved by transformers as one of FILES, in a dtype."""
    made: dict[tuple[str, str], Path] = {}

    def make(kind: str, dtype: str = "bfloat16") -> Path:
        if (kind, dtype) not in made:
            folder = tmp_path_factory.mktemp("quantised") / "base"
            options = {"quantization_config": BitsAndBytesConfig(**FILES[kind]), "dtype": getattr(torch, dtype)}
            # shards so small that a weight and its constants lie in several
            model = AutoModelForCausalLM.from_pretrained(stories, **options)
            model.save_pretrained(folder, max_shard_size="10KB")
            for path in tokenizer_files(BackboneSpec(str(stories))):
                shutil.copyfile(path, folder / path.name)
            made[kind, dtype] = folder
        return made[kind, dtype]

    return make


def with_config(base: Path, folder: Path, without: str | None = None, **settings: Any) -> Path:
    """A copy of a base whose config.json says other settings of its quantisation (None takes one out), and lacks the
    key `without`."""
    shutil.copytree(base, folder)
    content = json.loads((folder / "config.json").read_text())
    said = content["quantization_config"] | settings
    content["quantization_config"] = {key: value for key, value in said.items() if value is not None}
    content.pop(without, None)
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().flatten().view(torch.uint8)


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits


def test_an_adapter_of_somebody_s_own_loop_beside_files_that_are_quantised_says_so(quantised, tmp_path):
    base = quantised("nf4")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16, device_map={"": "cpu"})
    certificate = export_adapter(inject_sora(model, 2), tmp_path / "adapter", allow_empty=True)
    assert certificate["base_loading"]["load_in_4bit"] and certificate["base_loading"]["bnb_4bit_use_double_quant"]
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert "BitsAndBytesConfig" not in card, "the files say it"
    assert "ORIGINAL is the unquantised model" in card, "for llama.cpp's converter"


@pytest.mark.parametrize("storage", ["uint8", "bfloat16", "float32"])
@pytest.mark.parametrize(
    ("files", "kind"), [("nf4", "nf4"), ("nf4, stored as bfloat16", "nf4"), ("fp4", "fp4"), ("int8", "int8")]
)
def test_what_is_loaded_is_the_base_that_is_quantised_while_it_is_loaded(quantised, stories, files, kind, storage):
    spec = BackboneSpec(str(stories), **SPECS[kind], compute_dtype="float32", quant_storage=storage)
    expected = load_backbone(spec, "cpu")
    found = load_backbone(replace(spec, name_or_path=str(quantised(files))), "cpu")
    parameters = dict(found.named_parameters())
    assert parameters.keys() == dict(expected.named_parameters()).keys()
    for name, parameter in expected.named_parameters():
        assert parameters[name].dtype == parameter.dtype and not parameters[name].requires_grad, name
        assert torch.equal(bits(parameters[name]), bits(parameter)), name
    for name, module in expected.named_modules():
        for attribute in ("compute_dtype", "quant_storage"):
            assert getattr(found.get_submodule(name), attribute, 0) == getattr(module, attribute, 0), name
    assert torch.equal(logits(found), logits(expected))


@pytest.mark.parametrize(
    ("storage", "strategy", "dtype"),
    [
        ("auto", "zero2", torch.uint8),
        ("auto", "zero3", torch.float16),
        ("bfloat16", "zero2", torch.bfloat16),
        ("uint8", "zero3", torch.uint8),
    ],
)
def test_4_bit_weights_are_stored_as_the_config_says_or_as_the_strategy_needs(storage, strategy, dtype, tmp_path):
    options = {"load_in_4bit": True, "bnb_4bit_quant_storage": storage, "bnb_4bit_compute_dtype": "float16"}
    options = {f"quantization.{key}": value for key, value in options.items()}
    spec = backbone_spec(load_config(CONFIG, overrides(tmp_path, tmp_path / "run", **options)), strategy)
    layers = [module for module in load_backbone(spec, "cpu").modules() if isinstance(module, Linear4bit)]
    assert layers and {layer.weight.dtype for layer in layers} == {dtype}


@pytest.mark.parametrize(
    ("kind", "files", "num_processes", "options"),
    [
        ("nf4", "nf4", 1, {"quantization.bnb_4bit_compute_dtype": "float32", "output.export_layout": "merged"}),
        ("int8", "int8", 1, {}),
        pytest.param(  # float32 storage under ZeRO-3, made of bytes
            "nf4",
            "nf4",
            2,
            {"quantization.bnb_4bit_compute_dtype": "float32", "distributed.strategy": "zero3"},
            marks=pytest.mark.matrix,
        ),
    ],
    ids=["nf4", "int8", "nf4 under zero3"],
)
def test_a_run_beside_it_is_the_run_beside_the_original(
    ground: Playground, quantised, kind, files, num_processes, options
):
    loading = {f"quantization.load_in_{bits}bit": SPECS[kind].get(f"load_in_{bits}bit", False) for bits in (4, 8)}
    options = {**options, **loading, "model.dtype": "float32"}
    runs = {"original": {}, "quantised": {"model.name_or_path": str(quantised(files, "float32"))}}
    for name, base in runs.items():
        name = f"{kind}-{num_processes}-{name}"
        assert ground.codes(name, num_processes, **options, **base) == [0] * num_processes
    own, other = (ground.run_dir(f"{kind}-{num_processes}-{name}") for name in runs)
    assert result(own) == result(other) and status(other)["state"] == "finished"
    for path in (own / "merged").glob("*.safetensors"):
        expected, found = load_file(path), load_file(other / "merged" / path.name)
        assert expected.keys() == found.keys() and all(torch.equal(expected[key], found[key]) for key in expected)
    assert (own / "merged").is_dir() == (other / "merged").is_dir() == ("output.export_layout" in options)


@pytest.mark.parametrize(
    ("files", "spec", "keys"),
    [
        ("nf4", {}, "quantization.load_in_4bit: true"),
        ("nf4", SPECS["int8"], "quantization.load_in_4bit: true, quantization.load_in_8bit: false"),
        ("nf4", SPECS["fp4"], "quantization.bnb_4bit_quant_type: nf4, quantization.bnb_4bit_use_double_quant: true"),
        ("int8", SPECS["nf4"], "quantization.load_in_4bit: false, quantization.load_in_8bit: true"),
    ],
)
def test_another_form_than_that_of_the_files_is_a_sentence_with_the_keys_to_set(quantised, files, spec, keys):
    with pytest.raises(UserError, match=rf"already quantised \([48] bits.*; set {keys}, or"):
        load_model_config(BackboneSpec(str(quantised(files)), **spec))


def test_a_run_refuses_it_before_anything_is_written(quantised, tmp_path, ground, capsys):
    base = {"model.name_or_path": str(quantised("nf4"))}
    assert main([CONFIG, *overrides(ground.folder, tmp_path / "run", **base)]) == 2
    assert "set quantization.load_in_4bit: true" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_other_quantisers_are_refused_by_name(quantised, tmp_path):
    base = with_config(quantised("nf4"), tmp_path / "base", quant_method="gptq")
    with pytest.raises(UserError, match="is quantised by gptq"):
        load_model_config(BackboneSpec(str(base), load_in_4bit=True))


def test_4_bit_files_without_a_word_of_it_in_their_config_are_refused(quantised, tmp_path):
    base = with_config(quantised("nf4"), tmp_path / "base", without="quantization_config")
    with pytest.raises(UserError, match="holds bitsandbytes 4-bit weights, but"):
        load_model_config(BackboneSpec(str(base), load_in_4bit=True))


def test_an_old_config_that_names_no_quantiser_is_bitsandbytes(quantised, tmp_path):
    base = with_config(quantised("nf4"), tmp_path / "base", quant_method=None)
    load_model_config(BackboneSpec(str(base), load_in_4bit=True))


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_what_is_not_quantised_is_brought_into_the_dtype_of_the_run(quantised, tmp_path, dtype):
    """Also where the files have it in several; transformers 5.23 leaves it as it is, whatever it is told."""
    base = with_config(quantised("nf4"), tmp_path / "base", without="dtype")
    for path in base.glob("*.safetensors"):
        tensors = load_file(path)
        odd = {name: tensor.float() for name, tensor in tensors.items() if "layernorm" in name}
        save_file(tensors | odd, path, metadata={"format": "pt"})
    model = load_backbone(BackboneSpec(str(base), dtype=dtype, load_in_4bit=True, compute_dtype="float32"), "cpu")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.uint8, getattr(torch, dtype)}
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight, "they stay tied"
    assert (
        relative_error(logits(model), logits(load_backbone(BackboneSpec(str(base), load_in_4bit=True), "cpu"))) < 0.02
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"llm_int8_threshold": "high"}, "not valid for bitsandbytes"),
        ({"bnb_4bit_compute_dtype": "auto"}, "not valid for bitsandbytes"),
        ({"bnb_4bit_quant_type": "int4"}, "int4 computed in bfloat16"),
        ({"llm_int8_skip_modules": ["layers.(1"]}, "not valid for bitsandbytes"),
        ({"load_in_8bit": True}, "not valid for bitsandbytes"),
        ({"llm_int8_skip_modules": []}, "its head both quantised and tied"),
    ],
    ids=["threshold", "dtype", "type", "pattern", "both", "head"],
)
def test_a_config_that_says_what_cannot_be_is_a_sentence(quantised, tmp_path, settings, said):
    base = with_config(quantised("nf4"), tmp_path / "base", **settings)
    with pytest.raises(UserError, match=said):
        load_model_config(BackboneSpec(str(base), load_in_4bit=True))


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"compute_dtype": torch.float32, "compress_statistics": False}),
        (torch.bfloat16, {"compute_dtype": torch.bfloat16, "quant_storage": torch.bfloat16}),
        (torch.float32, {"compute_dtype": torch.bfloat16, "quant_type": "fp4"}),
        (torch.float16, {"compute_dtype": None, "bias": True}),
    ],
    ids=["float32", "bfloat16 in bfloat16", "computes in another", "no compute dtype"],
)
def test_a_layer_that_reads_its_weight_again_answers_bit_for_bit(dtype, options):
    """Its backward pass computes with what the parameter holds then, which is how ZeRO-3 gives it a weight."""
    layer = Linear4bit(48, 40, **{"bias": False, "quant_type": "nf4"} | options).requires_grad_(False)
    layer.load_state_dict({name: torch.randn(p.shape, dtype=dtype) for name, p in layer.named_parameters()})
    layer = layer.to("cpu")
    x, dy = torch.randn(2, 5, 48).to(dtype), torch.randn(2, 5, 40).to(dtype)
    answers = []
    for reads_again in (False, True):
        if reads_again:
            reread_weights_in_backward(layer)
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        if reads_again:
            gathered = StorageWeakRef(layer.weight.untyped_storage())
            shard, layer.weight.data = layer.weight.data.clone(), torch.empty(0, dtype=layer.weight.dtype)
            assert gathered.expired(), "the graph holds what the forward pass read"
            layer.weight.data = shard
        y.backward(dy)
        with torch.no_grad():
            answers.append([y.detach(), leaf.grad, layer(x)])
    assert isinstance(layer, Linear4bit) and target_linears(torch.nn.Sequential(layer)), "it can still be adapted"
    keep_weights(layer)
    assert type(layer) is Linear4bit
    assert all(torch.equal(bits(one), bits(other)) for one, other in zip(*answers, strict=True))


def test_a_weight_that_was_put_away_and_not_fetched_is_no_gradient():
    layer = linear4bit(torch.randn(40, 48))
    reread_weights_in_backward(layer)
    y = layer(torch.randn(3, 48, requires_grad=True))
    layer.weight.data = torch.empty(0, dtype=layer.weight.dtype)
    with pytest.raises(AssertionError, match="put away before its backward pass"):
        y.sum().backward()


def test_a_layer_whose_bias_is_trained_keeps_its_own_way():
    layer = Linear4bit(48, 40)
    layer.bias.requires_grad_()
    reread_weights_in_backward(layer)
    assert type(layer) is Linear4bit


def test_bytes_that_do_not_fill_the_storage_are_a_sentence():
    model = torch.nn.Sequential(linear4bit(torch.randn(3, 6)))
    with pytest.raises(UserError, match="9 bytes of a weight cannot be stored"):
        match_loading_format(model, torch.bfloat16, torch.float32)


@pytest.mark.parametrize("files", ["nf4", "fp4", "nf4, two skipped"])
def test_the_estimate_counts_the_layers_that_the_files_quantise(quantised, files):
    kind = "fp4" if files == "fp4" else "nf4"
    spec = BackboneSpec(str(quantised(files)), **SPECS[kind])
    model, config = load_backbone(spec, "cpu"), load_model_config(spec)
    options = {"r": 4, "target_modules": "all-linear", "adapter_bytes_each": 4}
    options |= {"batch": BatchShape(1, 8, False, False), "live_elements": 0, "bucket_elements": 0, "round_copies": 0}
    memory = estimate(skeleton(config, spec), spec, **options, strategy="none", num_processes=1)
    states = [module.weight.quant_state for module in model.modules() if hasattr(module, "quant_state")]
    held = sum(parameter.nbytes for parameter in model.parameters())
    held += sum(state.absmax.nbytes for state in states)  # constants of constants and code books aside
    assert memory.weight_bytes == held and len(states) == {"nf4, two skipped": 35 - 6}.get(files, 35)


@pytest.mark.parametrize("compute_dtype", ["bfloat16", "float32"])
def test_the_model_card_says_how_it_is_loaded(quantised, compute_dtype):
    spec = BackboneSpec(str(quantised("nf4")), load_in_4bit=True, compute_dtype=compute_dtype)
    call, _, afterwards = from_pretrained_args(spec, load_model_config(spec)).partition("\n\n")
    model = eval(f"AutoModelForCausalLM.from_pretrained(spec.name_or_path, {call})")
    assert ("compute_dtype = torch.float32" in afterwards) == (compute_dtype == "float32")
    assert model.model.layers[0].mlp.up_proj.compute_dtype == torch.bfloat16


@pytest.fixture(params=["nf4", "nf4, two skipped"])
def lora(request: pytest.FixtureRequest, quantised: Callable[..., Path], tmp_path: Path) -> Path:
    """A LoRA as PEFT saves it, of 4-bit files: nothing but their name says how the base is loaded."""
    model = AutoModelForCausalLM.from_pretrained(quantised(request.param), dtype=torch.bfloat16)
    adapted = get_peft_model(model, LoraConfig(r=4, lora_alpha=9, target_modules=["q_proj", "down_proj"]))
    return save_random(adapted, tmp_path / "adapter", 0)


def test_a_lora_of_it_is_asked_measured_and_merged_without_a_word_on_the_base(lora, tmp_path, capsys):
    base = LoraConfig.from_pretrained(lora).base_model_name_or_path
    assert cli.main(["generate", str(lora), "--prompt", "Once upon", "--max-new-tokens", "4", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["base_model"] == base
    (tmp_path / "rows.jsonl").write_text('{"text": "Once upon a time there was a dog."}\n')
    assert cli.main(["evaluate", str(lora), "--data", str(tmp_path / "rows.jsonl"), "--type", "completion"]) == 0
    assert cli.main(["export", str(lora), "--layout", "merged", "--out", str(tmp_path / "merged")]) == 0
    spec = BackboneSpec(base, load_in_4bit=True)
    adapted = PeftModel.from_pretrained(load_backbone(spec, "cpu"), str(lora))
    merged = load_backbone(BackboneSpec(str(tmp_path / "merged")), "cpu")
    # bfloat16 roundings of every weight and of what five layers say
    assert relative_error(logits(merged), logits(adapted)) < 2e-2
    assert relative_error(logits(load_backbone(spec, "cpu")), logits(adapted)) > 0.2, "the adapter must matter"


@pytest.mark.parametrize("lora", ["nf4", "int8"], indirect=True)
def test_there_are_no_original_weights_to_merge_into_unless_they_are_named(lora, stories, tmp_path, capsys):
    command = ["export", str(lora), "--layout", "merged", "--base", "original", "--out", str(tmp_path / "merged")]
    assert cli.main(command) == 2
    assert "hold quantised weights alone; name the original model" in capsys.readouterr().err
    assert not (tmp_path / "merged").exists()
    assert cli.main([*command, "--base-model", str(stories)]) == 0


def test_constants_that_are_damaged_are_a_sentence(lora, tmp_path, capsys):
    base = shutil.copytree(LoraConfig.from_pretrained(lora).base_model_name_or_path, tmp_path / "base")
    path, key = next(
        (path, key) for path in base.glob("*.safetensors") for key in load_file(path) if ".quant_state." in key
    )
    tensors = load_file(path)
    save_file(tensors | {key: tensors[key][:-9]}, path, metadata={"format": "pt"})
    command = ["export", str(lora), "--base-model", str(base), "--layout", "merged", "--out", str(tmp_path / "merged")]
    assert cli.main(command) == 2
    assert "are damaged" in capsys.readouterr().err


def test_a_run_is_measured_on_quantised_files_where_it_is_said_so(ground: Playground, quantised, capsys):
    assert ground.codes("unquantised") == [0]
    run_dir, base = str(ground.run_dir("unquantised")), str(quantised("nf4", "float32"))
    assert cli.main(["evaluate", run_dir, "--base", base]) == 2
    assert "set quantization.load_in_4bit: true" in capsys.readouterr().err
    assert cli.main(["evaluate", run_dir, "--base", base, "--load-in-4bit"]) == 0


def test_the_flag_of_4_bits_is_refused_for_8_bit_files(quantised, lora, capsys):
    command = ["generate", str(lora), "--base", str(quantised("int8")), "--load-in-4bit", "--prompt", "x"]
    assert cli.main(command) == 2
    assert "quantised in 8 bits; leave it out" in capsys.readouterr().err
