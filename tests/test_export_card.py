"""What lies beside exported weights: the tokenizer, the model card, how the base was loaded."""

import ast

import pytest
import torch
from exporting import LORA_ALPHA, R, config_of, trained_model
from helpers import randomise_all, tiny_llama
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sora_llm import backbone
from sora_llm.artifacts.card import Provenance
from sora_llm.artifacts.lora_files import read_lora
from sora_llm.backbone import from_pretrained_args
from sora_llm.base_files import tokenizer_files
from sora_llm.base_spec import BackboneSpec
from sora_llm.commands.model_ref import resolve_model
from sora_llm.export import export_adapter
from sora_llm.inject import adapters, inject_sora


def test_tokenizer_files_are_copied_byte_for_byte(stories, tmp_path):
    files = tokenizer_files(BackboneSpec(str(stories)))
    assert {"tokenizer.json", "tokenizer.model", "tokenizer_config.json"} <= {path.name for path in files}
    provenance = Provenance(base_model="some/base", tokenizer_files=files, chat_template="{{ messages }}")
    export_adapter(trained_model("float32", stories), tmp_path / "adapter", provenance=provenance)
    for path in files:
        assert (tmp_path / "adapter" / path.name).read_bytes() == path.read_bytes()
    assert (tmp_path / "adapter" / "chat_template.jinja").read_text() == "{{ messages }}"
    assert config_of(tmp_path / "adapter")["base_model_name_or_path"] == "some/base"


@pytest.mark.parametrize(
    ("separator", "how"),
    [("\n", "with it."), (": ", "with ':', as the last blank begins"), (" ", "without it, as the last blank begins")],
)
def test_the_model_card_says_what_ended_a_prompt(separator, how, stories, tmp_path):
    """Asked without the separator the adapter would go on with the question."""
    provenance = Provenance("some/base", separator=separator)
    export_adapter(trained_model("float32", stories), tmp_path / "adapter", provenance=provenance)
    card = (tmp_path / "adapter" / "README.md").read_text()
    assert f"Every prompt ended with {separator!r} (a Python string): end yours {how}" in card


def test_the_model_card_names_base_data_metrics_and_ranks(stories, tmp_path):
    model = trained_model("float32", stories)
    provenance = Provenance(
        "some/base", revision="v2", data=[{"path": "train.jsonl", "type": "alpaca"}], metrics={"dev loss": 1.25}
    )
    export_adapter(model, tmp_path / "adapter", provenance=provenance)
    card = (tmp_path / "adapter" / "README.md").read_text()
    header = card.split("---")[1]
    assert "base_model: some/base" in header and "library_name: peft" in header
    assert 'from_pretrained("some/base", revision="v2")' in card
    assert config_of(tmp_path / "adapter")["revision"] == "v2" == read_lora(tmp_path / "adapter").revision
    assert "train.jsonl" in card and "dev loss: 1.2500" in card
    for name, layer in adapters(model).items():
        assert f"| {name} | {int((layer.gate != 0).sum())} |" in card


def test_the_python_of_the_card_names_any_base(stories, tmp_path):
    base = 'C:\\models\\"my" bäse'
    export_adapter(trained_model("float32", stories), tmp_path / "adapter", provenance=Provenance(base))
    code = (tmp_path / "adapter" / "README.md").read_text().partition("```python\n")[2].partition("```")[0]
    assert base in [node.value for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Constant)]


@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("kept", [{}, {"layers.0": 2}, {"layers": 0}], ids=["all", "some", "none"])
def test_the_card_says_what_the_files_of_both_layouts_store(tmp_path, kept, layout):
    """Also with more slots than a layer is wide, of which a budget counts only as many; and of padding only where
    there is some."""
    model = inject_sora(tiny_llama(), r=40, dtype=torch.float32)
    randomise_all(model)
    for name, layer in adapters(model).items():
        layer.gate.data.fill_(0.5)
        for part, rank in kept.items():
            if part in name:
                layer.gate.data[rank:] = 0
    live = any(bool(layer.gate.any()) for layer in adapters(model).values())
    stored = {}
    for written in ("padded", "ragged"):
        export_adapter(model, tmp_path / written, written, allow_empty=True)
        tensors = load_file(tmp_path / written / "adapter_model.safetensors").values()
        stored[written] = sum(tensor.numel() for tensor in tensors)
    padded, ragged = (f"{stored[written]:,}" for written in ("padded", "ragged"))
    card = (tmp_path / layout / "README.md").read_text()
    assert f" {ragged if live else 0} parameters in them." in card
    if layout == "padded" and kept:
        assert f"`padded` ({padded} stored, padded with zeros to one rank; layout ragged stores {ragged}), " in card
    else:
        assert f"layout `{layout}`, " in card or (not live and f"layout `ragged` ({ragged} stored), " in card)
        assert "padded with zeros" not in card


@pytest.mark.parametrize(
    ("form", "loaded"),
    [
        ({"dtype": torch.float32}, {"dtype": "float32"}),
        ({"dtype": torch.bfloat16}, {"dtype": "bfloat16"}),
        (
            {
                "dtype": torch.float32,
                "quantization_config": BitsAndBytesConfig(
                    load_in_4bit=True, bnb_4bit_quant_type="fp4", bnb_4bit_compute_dtype=torch.float16
                ),
            },
            {
                "dtype": "float32",
                "load_in_4bit": True,
                "quant_type": "fp4",
                "double_quant": False,
                "compute_dtype": "float16",
            },
        ),
        (
            {"dtype": torch.bfloat16, "quantization_config": BitsAndBytesConfig(load_in_8bit=True)},
            {"dtype": "bfloat16", "load_in_8bit": True},
        ),
    ],
    ids=["float32", "bfloat16", "fp4", "8-bit"],
)
def test_how_somebody_loaded_the_base_is_kept_for_the_commands_and_the_card(form, loaded, stories, tmp_path):
    """Else they would take the form of its files, and measure another base than the adapter was trained beside."""
    spec = BackboneSpec(str(stories), **loaded)
    model = AutoModelForCausalLM.from_pretrained(str(stories), device_map={"": "cpu"}, **form)
    export_adapter(randomise_all(inject_sora(model, R, LORA_ALPHA), 0, size=0.1), tmp_path / "adapter")
    found = resolve_model(str(tmp_path / "adapter"))
    assert found.is_loading_known and found.spec.loading == spec.loading
    assert from_pretrained_args(spec, None) in (tmp_path / "adapter" / "README.md").read_text()


def mixed(stories, form):
    if form == "float64":
        return AutoModelForCausalLM.from_pretrained(str(stories), dtype=torch.float64)
    if form == "of another quantiser":
        model = AutoModelForCausalLM.from_pretrained(str(stories), dtype=torch.float32)
        model.config.quantization_config = {"quant_method": "gptq", "bits": 4}
        return model
    skipped = ["lm_head", *(["up_proj"] if form == "in part 4-bit" else [])]
    quantised = BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=skipped)
    options = {"quantization_config": quantised} if "4-bit" in form else {}
    model = AutoModelForCausalLM.from_pretrained(str(stories), dtype=torch.float32, device_map={"": "cpu"}, **options)
    if form == "two 4-bit forms":
        model.model.layers[0].mlp.up_proj.compute_dtype = torch.bfloat16
    if form == "linears in bfloat16":
        for layer in model.model.layers:
            layer.mlp.to(torch.bfloat16)
    return model


@pytest.mark.parametrize(
    "form", ["float64", "of another quantiser", "in part 4-bit", "two 4-bit forms", "linears in bfloat16"]
)
def test_a_base_in_a_form_that_no_run_loads_is_not_said_to_be_in_another(stories, form):
    model = mixed(stories, form)
    assert (
        backbone.spec_from_model(model) is None and backbone.spec_from_model(inject_sora(model, R, LORA_ALPHA)) is None
    )


def test_what_a_caller_says_of_the_base_s_loading_stands(stories, tmp_path):
    provenance = Provenance("some/base", load_options="dtype=torch.float16")
    certificate = export_adapter(trained_model("float32", stories), tmp_path / "adapter", provenance=provenance)
    assert "base_loading" not in certificate and "torch.float32" not in (tmp_path / "adapter/README.md").read_text()
