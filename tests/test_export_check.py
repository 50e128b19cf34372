"""The check of an export: what is not the trained adapter is never published, and what is passes whatever rounds."""

import hashlib
import json

import pytest
import torch
from exporting import LORA_ALPHA, R, logits, spec_of, trained_model
from helpers import randomise_all, tiny_llama
from peft import LoraConfig, get_peft_model
from peft_loras import save_random
from safetensors.torch import load_file

from sora_llm import export, peft_check
from sora_llm.artifacts import logit_check
from sora_llm.artifacts.logit_check import coarsest_dtype
from sora_llm.backbone import load_backbone
from sora_llm.base_spec import BackboneSpec
from sora_llm.errors import RunFailed, UserError
from sora_llm.export import export_adapter
from sora_llm.inject import adapters, inject_sora


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_the_certificate_says_what_was_checked_and_which_file(stories, tmp_path, layout):
    import peft

    model = trained_model("float32", stories)
    certificate = export_adapter(model, tmp_path / "adapter", layout)
    assert json.loads((tmp_path / "adapter" / "certificate.json").read_text()) == certificate
    weights = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
    assert certificate.keys() == {
        *("passed", "layout", "modules", "stored_params", "logits_error", "peft_version", "sha256"),
        *("consumers", "files", "base_loading"),
    }
    assert certificate["passed"] is True and certificate["layout"] == layout
    stored = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    assert certificate["stored_params"] == sum(tensor.numel() for tensor in stored)
    modes = {path.stat().st_mode & 0o777 for path in (tmp_path / "adapter").iterdir()}
    assert modes == {(tmp_path / "adapter").stat().st_mode & 0o666}, "a server under another user reads them"
    assert certificate["sha256"] == hashlib.sha256(weights).hexdigest()
    assert certificate["peft_version"] == peft.__version__
    assert list(certificate["modules"]) == list(adapters(model))
    # float32 factors of a float64 product; and two float32 forward passes
    assert max(entry["delta_error"] for entry in certificate["modules"].values()) < 1e-6
    assert certificate["logits_error"] < 2e-5


def damage_tensors(change):
    def tampered(tensors, path, **options):
        name = next(name for name, t in tensors.items() if ".lora_B." in name and t.any())
        real_save({**tensors, name: change(tensors[name])}, path, **options)

    real_save = export.save_file
    return tampered


def damage_config(**changes):
    def tampered(model, factors, layout, base_model):
        config = real(model, factors, layout, base_model)
        for key, value in changes.items():
            setattr(config, key, value)
        return config

    real = export._peft_config
    return tampered


@pytest.mark.parametrize(
    ("what", "damage"),
    [
        ("save_file", lambda: damage_tensors(lambda t: t * 1.001)),
        ("save_file", lambda: damage_tensors(lambda t: t.flip(1))),
        ("save_file", lambda: damage_tensors(lambda t: -t)),
        ("save_file", lambda: damage_tensors(torch.zeros_like)),
        ("_peft_config", lambda: damage_config(lora_alpha=2 * R)),
        ("_peft_config", lambda: damage_config(use_rslora=True)),
        ("_peft_config", lambda: damage_config(target_modules=["q_proj", "down_proj"])),
        ("_peft_config", lambda: damage_config(alpha_pattern={"q_proj": 1})),
    ],
    ids=["scaled", "reordered", "negated", "zeroed", "alpha", "rslora", "targets", "pattern"],
)
@pytest.mark.parametrize("older", [False, True], ids=["new", "over-an-older-one"])
def test_a_file_that_is_not_the_trained_adapter_is_never_published(stories, tmp_path, monkeypatch, what, damage, older):
    folder = tmp_path / "adapter"
    if older:
        folder.mkdir()
        (folder / "certificate.json").write_text('{"layout": "padded", "modules": {}}')
    model = trained_model("float32", stories)
    expected = logits(model)
    monkeypatch.setattr(export, what, damage())
    with pytest.raises(RunFailed, match=r"the exported adapter is not the trained one: .*nothing was exported"):
        export_adapter(model, folder)
    assert [path.name for path in tmp_path.rglob("*")] == (["adapter", "certificate.json"] if older else [])
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"target_modules": ["embed_tokens", "q_proj"]},
        {"modules_to_save": ["lm_head"]},
    ],
    ids=lambda options: next(iter(options)),
)
def test_adapters_with_more_than_factors_are_loaded_as_peft_saved_them(stories, tmp_path, options):
    config = LoraConfig(**{"task_type": "CAUSAL_LM", "target_modules": ["q_proj"], **options})
    saved = get_peft_model(load_backbone(spec_of("float32", stories), "cpu"), config)
    save_random(saved, tmp_path / "lora", 0)
    saved.save_pretrained(tmp_path / "lora", save_embedding_layers=False)
    loaded = peft_check.load_adapter(load_backbone(spec_of("float32", stories), "cpu"), tmp_path / "lora")
    assert torch.equal(logits(loaded), logits(saved))


def test_an_adapter_for_a_base_of_another_size_is_refused_with_the_reason(stories, tmp_path):
    """PyTorch says it in its second line."""
    export_adapter(trained_model("float32", stories), tmp_path / "adapter")
    with pytest.raises(UserError, match=r"does not fit this base: Error.*: size mismatch for .*q_proj"):
        peft_check.load_adapter(tiny_llama(), tmp_path / "adapter")


def test_logits_that_differ_are_refused_even_where_every_delta_agrees(stories, tmp_path, monkeypatch):
    """The model that PEFT sees may differ elsewhere, where no ΔW shows it."""
    model = trained_model("float32", stories)
    real = peft_check.logits_of

    def skewed(of_model, ids):
        return real(of_model, ids) * (1.01 if type(of_model).__name__.startswith("Peft") else 1.0)

    monkeypatch.setattr(peft_check, "logits_of", skewed)
    with pytest.raises(RunFailed, match="logits are off by"):
        export_adapter(model, tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


def test_a_forward_that_leaves_the_adapter_out_is_noticed_even_if_its_effect_is_small(stories, tmp_path, monkeypatch):
    """Beside bf16 rounding a young adapter's effect on the logits is small; its direction still tells."""
    model = trained_model("bfloat16", stories)
    for layer in adapters(model).values():
        layer.lora_B.data.mul_(0.02)
    real = peft_check.load_adapter

    def inactive(base, folder):
        loaded = real(base, folder)
        loaded.disable_adapter_layers()
        return loaded

    monkeypatch.setattr(peft_check, "load_adapter", inactive)
    with pytest.raises(RunFailed, match=r"PEFT's forward shows -?0\.00 of the adapter's effect"):
        export_adapter(model, tmp_path / "adapter")
    monkeypatch.setattr(peft_check, "load_adapter", real)
    export_adapter(model, tmp_path / "adapter")


def test_logits_may_be_off_by_what_4_bit_layers_compute_in(stories, tmp_path):
    """Activations in float32 and products in bfloat16, as `model.dtype: float32` alone makes them."""
    spec = BackboneSpec(str(stories), dtype="float32", load_in_4bit=True, compute_dtype="bfloat16")
    model = randomise_all(inject_sora(load_backbone(spec, "cpu"), R, LORA_ALPHA), seed=3)
    assert coarsest_dtype(model) == torch.bfloat16
    assert export_adapter(model, tmp_path / "adapter")["logits_error"] > logit_check.MAX_LOGITS_ERROR[torch.float32]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"dtype": "float32"}, torch.float32),
        ({"dtype": "float32", "load_in_4bit": True, "compute_dtype": "float16"}, torch.float16),
        ({"dtype": "bfloat16", "load_in_4bit": True, "compute_dtype": "float32"}, torch.bfloat16),
        ({"dtype": "float32", "load_in_8bit": True}, torch.bfloat16),
    ],
)
def test_the_coarsest_dtype_is_that_of_activations_or_of_quantised_layers(options, expected, stories):
    assert coarsest_dtype(load_backbone(BackboneSpec(str(stories), **options), "cpu")) == expected


def test_an_effect_that_drowns_in_rounding_is_not_taken_for_an_adapter_that_is_left_out():
    """The base, the trained model and PEFT's forward each round in their own way; the effect is far smaller."""
    for seed in range(20):
        torch.manual_seed(seed)
        base, trained, found = (torch.ones(1000) + 4e-3 * torch.randn(1000) for _ in range(3))
        off, gain = logit_check.logit_errors(found, trained, base)
        assert not logit_check.logit_problems(off, gain, torch.bfloat16, "it shows"), gain
        off, gain = logit_check.logit_errors(base, trained, base)
        assert logit_check.logit_problems(off, gain, torch.bfloat16, "it shows")
