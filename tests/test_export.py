"""What is exported is what was trained: in PEFT and in transformers, from disk, on a base that never saw training."""

import errno
import hashlib
import json
import os
import socket
import subprocess

import pytest
import torch
from exporting import (
    IDS,
    LOGITS_TOLERANCE,
    LORA_ALPHA,
    R,
    config_of,
    cut,
    in_peft,
    kill,
    logits,
    spec_of,
    trained_model,
)
from helpers import randomise_all, relative_error, tiny_llama
from safetensors.torch import load_file
from spawn import spawn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from sora_llm import backbone, export, files, peft_check
from sora_llm.artifacts import logit_check
from sora_llm.artifacts.lora_files import read_lora
from sora_llm.backbone import load_backbone, load_call
from sora_llm.base_files import tokenizer_files
from sora_llm.base_spec import BackboneSpec
from sora_llm.commands.subject import find_subject
from sora_llm.errors import RunFailed, UserError
from sora_llm.export import Provenance, export_adapter
from sora_llm.files import file_sha256, staging_folder
from sora_llm.inject import adapters, bare, inject_sora
from sora_llm.quantised import coarsest_dtype
from sora_llm.running.verified_export import export_verified

# ----- the same model elsewhere ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("gated", [True, False], ids=["gated", "cut"])
@pytest.mark.parametrize("layout", ["padded", "ragged"])
@pytest.mark.parametrize("kind", ["float32", "nf4", "bfloat16"])
def test_peft_and_transformers_give_the_trained_logits_on_a_fresh_base(stories, tmp_path, kind, layout, gated):
    model = trained_model(kind, stories)
    if not gated:
        cut(model)
    expected = logits(model)
    with bare(model):
        base = logits(model)
    assert relative_error(base, expected) > 0.2, "the adapter must matter"
    export_adapter(model, tmp_path / "adapter", layout)

    assert relative_error(logits(in_peft(kind, stories, tmp_path / "adapter")), expected) < LOGITS_TOLERANCE[kind]
    fresh = load_backbone(spec_of(kind, stories), "cpu")
    fresh.load_adapter(str(tmp_path / "adapter"))
    assert relative_error(logits(fresh), expected) < LOGITS_TOLERANCE[kind]


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_a_merged_export_is_the_base_weight_plus_delta(stories, tmp_path, layout):
    """Every module's ΔW, the pruned ones' 0 included, by PEFT's own merge."""
    model = trained_model("float32", stories)
    export_adapter(model, tmp_path / "adapter", layout)
    merged = in_peft("float32", stories, tmp_path / "adapter").merge_and_unload()
    for name, layer in adapters(model).items():
        A, B, g = (t.detach().double() for t in (layer.lora_A, layer.lora_B, layer.gate))
        expected = layer.weight.double() + LORA_ALPHA / R * B @ torch.diag(g) @ A
        # the merged weight is rounded to float32 once
        torch.testing.assert_close(merged.get_submodule(name).weight.double(), expected, rtol=1e-6, atol=1e-6)


# ----- layouts --------------------------------------------------------------------------------------------------------


def test_padded_has_every_target_module_at_one_rank_and_nothing_to_interpret(stories, tmp_path):
    model = trained_model("float32", stories)
    export_adapter(model, tmp_path / "adapter", "padded")
    config = config_of(tmp_path / "adapter")
    assert config["r"] == config["lora_alpha"] == R
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["use_rslora"] is False and config["use_dora"] is False and config["bias"] == "none"
    assert config["peft_type"] == "LORA" and config["task_type"] == "CAUSAL_LM"
    projections = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert set(config["target_modules"]) == projections
    assert config["base_model_name_or_path"] == str(stories)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert set(tensors) == {
        f"base_model.model.{name}.lora_{kind}.weight" for name in adapters(model) for kind in ("A", "B")
    }
    assert all(t.dtype == torch.float32 for t in tensors.values())
    for name, layer in adapters(model).items():
        A, B = (tensors[f"base_model.model.{name}.lora_{kind}.weight"] for kind in "AB")
        assert A.shape == (R, layer.in_features) and B.shape == (layer.out_features, R)
        live = int((layer.gate != 0).sum())
        assert (A[:live] != 0).any(dim=1).all() and not A[live:].any() and not B[:, live:].any()


def test_the_padded_rank_is_the_largest_kept_one(stories, tmp_path):
    model = inject_sora(load_backbone(spec_of("float32", stories), "cpu"), R, LORA_ALPHA, target_modules=["q_proj"])
    randomise_all(model)
    for layer in adapters(model).values():
        with torch.no_grad():
            layer.gate[2:] = 0
    export_adapter(model, tmp_path / "adapter")
    config = config_of(tmp_path / "adapter")
    assert config["r"] == config["lora_alpha"] == 2
    assert config["target_modules"] == ["q_proj"]


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


def test_ragged_has_the_live_modules_at_their_own_rank(stories, tmp_path):
    model = trained_model("float32", stories)
    ranks = {name: int((layer.gate != 0).sum()) for name, layer in adapters(model).items()}
    assert min(ranks.values()) == 0 and len(set(ranks.values())) > 3
    certificate = export_adapter(model, tmp_path / "adapter", "ragged")
    config = config_of(tmp_path / "adapter")
    live = {name: rank for name, rank in ranks.items() if rank}
    assert config["rank_pattern"] == config["alpha_pattern"] == live
    assert config["r"] == config["lora_alpha"] == max(live.values())
    assert set(config["target_modules"]) == set(live)
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    shapes = {key: tuple(t.shape) for key, t in tensors.items()}
    expected = {}
    for name, rank in live.items():
        layer = adapters(model)[name]
        expected[f"base_model.model.{name}.lora_A.weight"] = (rank, layer.in_features)
        expected[f"base_model.model.{name}.lora_B.weight"] = (layer.out_features, rank)
    assert shapes == expected
    assert {name: entry["rank"] for name, entry in certificate["modules"].items()} == ranks


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_a_selection_that_no_suffix_describes_hits_exactly_its_modules(tmp_path, layout):
    """q_proj of layer 1 alone: the suffix "q_proj" would make PEFT adapt layer 0 as well."""
    tiny_llama().save_pretrained(tmp_path / "base")
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    target = "model.layers.1.self_attn.q_proj"
    model = randomise_all(inject_sora(base, 3, 3, target_modules=[target]))
    export_adapter(model, tmp_path / "adapter", layout)
    assert config_of(tmp_path / "adapter")["target_modules"] == [target]


def test_an_unknown_layout_and_a_model_without_adapters_are_refused(tmp_path):
    with pytest.raises(UserError, match="'flat' is not one of padded, ragged"):
        export_adapter(inject_sora(tiny_llama(), 2), tmp_path / "adapter", "flat")
    with pytest.raises(UserError, match="inject_sora"):
        export_adapter(tiny_llama(), tmp_path / "adapter")
    assert not list(tmp_path.iterdir())


# ----- the certificate ------------------------------------------------------------------------------------------------


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


def test_processes_that_export_to_one_place_at_once_do_not_disturb_each_other(stories, tmp_path):
    """Also those that no launcher has numbered: each writes beside the place under a name of its own."""
    places = {staging_folder(tmp_path / "adapter") for _ in range(8)}
    assert len(places) == 8
    dead = subprocess.Popen(["true"])
    dead.wait()
    prefix = f".adapter.{socket.gethostname()}"
    of_the_dead = tmp_path / f"{prefix}-{dead.pid}-1.tmp"
    of_the_container_before = tmp_path / f"{prefix}-{os.getpid()}-1.tmp"  # which had this process's number
    of_a_neighbour, own = tmp_path / f"{prefix}-{os.getppid()}-1.tmp", places.pop()
    for folder in (of_the_dead, of_the_container_before, of_a_neighbour, own):
        folder.mkdir()
        os.utime(folder, (1e9, 1e9) if folder == of_the_container_before else None)
    of_the_container_beside = tmp_path / f"{prefix}-{os.getpid()}-2.tmp"  # which began later than this process
    of_the_container_beside.mkdir()
    staging_folder(tmp_path / "adapter")
    assert of_the_container_beside.exists()
    assert not of_the_dead.exists() and not of_the_container_before.exists()
    assert of_a_neighbour.exists() and own.exists()


def gradients(model, mode=True):
    model.zero_grad()
    model.train(mode)
    model(input_ids=IDS, labels=IDS, use_cache=False).loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


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


def nothing_to_measure(model):
    raise RunFailed("the loss is nan")


def test_a_run_s_export_that_fails_leaves_nothing(stories, tmp_path):
    model = trained_model("float32", stories)
    probe = torch.arange(6)[None]
    with pytest.raises(RunFailed, match="the loss is nan"):
        export_verified(
            model,
            tmp_path / "adapter",
            "padded",
            provenance=Provenance("some/base"),
            allow_empty=False,
            probe_ids=probe,
            eval_loss_of=nothing_to_measure,
        )
    assert list(tmp_path.iterdir()) == []


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


def test_a_folder_with_something_else_in_it_is_not_replaced(stories, tmp_path):
    (tmp_path / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="holds no export"):
        export_adapter(trained_model("float32", stories), tmp_path)
    assert (tmp_path / "thesis.txt").read_text() == "precious"


def test_what_somebody_put_beside_an_export_is_not_replaced_with_it(stories, tmp_path):
    model = trained_model("float32", stories)
    for _ in range(2):
        export_adapter(model, tmp_path / "adapter")
    (tmp_path / "adapter" / "notes.txt").write_text("precious")
    with pytest.raises(UserError, match=r"and with it notes\.txt, which is no part of the export there"):
        export_adapter(model, tmp_path / "adapter")
    assert (tmp_path / "adapter" / "notes.txt").read_text() == "precious"


def test_an_export_in_the_middle_changes_no_gradient_on_a_4_bit_base_of_ones_own(stories, tmp_path):
    """The base comes from transformers, not from our loader: bitsandbytes would repack its weights in eval mode."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)
    model = AutoModelForCausalLM.from_pretrained(stories, quantization_config=quantization, dtype=torch.bfloat16)
    inject_sora(model, r=4)
    for layer in adapters(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.05)
    before = gradients(model)
    export_adapter(model, tmp_path / "adapter")
    after = gradients(model)
    assert all(torch.equal(after[name], before[name]) for name in before)


# ----- empty adapters -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_a_fully_pruned_adapter_is_explained_unless_it_is_allowed(stories, tmp_path, layout):
    model = kill(trained_model("float32", stories))
    with pytest.raises(RunFailed, match=r"every rank .* was pruned.*sparse_lambda.*allow_empty_adapter"):
        export_adapter(model, tmp_path / "adapter", layout)
    assert not list(tmp_path.iterdir())
    certificate = export_adapter(cut(model), tmp_path / "adapter", layout, allow_empty=True)
    assert certificate["passed"] and {entry["rank"] for entry in certificate["modules"].values()} == {0}
    base = load_backbone(spec_of("float32", stories), "cpu")
    expected = logits(base)
    assert torch.equal(logits(in_peft("float32", stories, tmp_path / "adapter")), expected)


# ----- the folder -----------------------------------------------------------------------------------------------------


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
    assert f"Behind every prompt stood {separator!r} (a Python string): end yours {how}" in card


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
    found = find_subject(str(tmp_path / "adapter"))
    assert found.is_loading_known and found.spec.loading == spec.loading
    assert load_call(spec, None) in (tmp_path / "adapter" / "README.md").read_text()


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
    assert backbone.spec_of(model) is None and backbone.spec_of(inject_sora(model, R, LORA_ALPHA)) is None


def test_what_a_caller_says_of_the_base_s_loading_stands(stories, tmp_path):
    provenance = Provenance("some/base", load_options="dtype=torch.float16")
    certificate = export_adapter(trained_model("float32", stories), tmp_path / "adapter", provenance=provenance)
    assert "base_loading" not in certificate and "torch.float32" not in (tmp_path / "adapter/README.md").read_text()


def test_an_older_folder_is_replaced_whole_and_nothing_else_is_left(stories, tmp_path):
    folder = tmp_path / "adapter"
    export_adapter(trained_model("float32", stories, seed=0), folder, "ragged")
    first = (folder / "adapter_model.safetensors").read_bytes()
    certificate = json.loads((folder / "certificate.json").read_text())
    (folder / "certificate.json").write_text(json.dumps({**certificate, "files": [*certificate["files"], "stale.txt"]}))
    (folder / "stale.txt").write_text("which that export wrote")
    export_adapter(trained_model("float32", stories, seed=50), folder, "padded")
    assert not (folder / "stale.txt").exists()
    assert (folder / "adapter_model.safetensors").read_bytes() != first
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_disk_that_fills_up_while_the_adapter_is_published_is_said_in_a_sentence(stories, tmp_path, monkeypatch):
    """The older adapter stays, and nothing half-made."""
    model = trained_model("float32", stories)
    export_adapter(model, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "fsync", full)
    with pytest.raises(RunFailed, match=r"the adapter could not be written to .*No space left"):
        export_adapter(model, tmp_path / "adapter")
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_copy_for_which_there_is_no_room_is_a_sentence_and_leaves_nothing(stories, tmp_path, monkeypatch):
    export_adapter(trained_model("float32", stories), tmp_path / "stage")

    def full(path):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "fsync", full)
    with pytest.raises(RunFailed, match=r"could not be copied to .*No space left"):
        export.copy_adapter(tmp_path / "stage", tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["stage"]


# ----- the model afterwards -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["float32", "nf4"])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_exported_model_goes_on_training_as_if_nothing_had_happened(stories, tmp_path, kind, mode):

    model = trained_model(kind, stories)
    before, layers, names = gradients(model, mode), adapters(model), dict(model.named_parameters())
    export_adapter(model, tmp_path / "adapter")
    assert model.training is mode
    assert adapters(model) == layers
    after_names = dict(model.named_parameters())
    assert after_names.keys() == names.keys()
    assert all(after_names[name] is p and p.requires_grad == (name in before) for name, p in names.items())
    after = gradients(model, mode)
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not hasattr(model, "peft_config") and not getattr(model, "_hf_peft_config_loaded", False)


def test_a_failed_export_leaves_the_model_training_too(stories, tmp_path, monkeypatch):
    model = trained_model("float32", stories)
    expected, layers = logits(model), adapters(model)
    model.train()

    def broken(peft_model, layers):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(peft_check, "_delta_errors", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        export_adapter(model, tmp_path / "adapter")
    assert adapters(model) == layers and model.training and not hasattr(model, "peft_config")
    assert torch.equal(logits(model), expected)


def test_an_export_leaves_the_random_state_alone(stories, tmp_path):
    model = trained_model("float32", stories)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    export_adapter(model, tmp_path / "adapter")
    assert torch.equal(torch.rand(3), expected)


def test_a_tilde_is_home_and_the_working_directory_is_never_replaced(stories, tmp_path, monkeypatch):
    model = trained_model("float32", stories)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    export_adapter(model, "~/there")
    assert (tmp_path / "there" / "certificate.json").is_file()
    for folder in (".", ".."):
        with pytest.raises(UserError, match="is where this process works"):
            export_adapter(model, folder)


def test_every_module_comes_back_in_the_mode_it_was_in(stories, tmp_path):
    model = trained_model("float32", stories).train()
    model.model.norm.eval()
    export_adapter(model, tmp_path / "adapter")
    assert model.training and not model.model.norm.training


def test_processes_that_all_export_into_one_folder_leave_one_whole_export(tmp_path):
    hashes = spawn("worlds:export_everywhere", 2, {"folder": str(tmp_path / "adapter")})
    assert len({sha256 for own in hashes for sha256 in own}) == 1
    certificate = json.loads((tmp_path / "adapter" / "certificate.json").read_text())
    assert certificate["sha256"] == file_sha256(tmp_path / "adapter" / "adapter_model.safetensors") == hashes[0][0]
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"], "nothing is left beside it"
