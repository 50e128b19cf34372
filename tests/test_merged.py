"""The merged model is base + ΔW, weight by weight and in what it says, whatever the base is stored as; or it is not
published."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise_all, relative_error
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sora_llm.artifacts import merged, merged_export
from sora_llm.artifacts.card import Provenance
from sora_llm.artifacts.merged import Merge, plan_merge
from sora_llm.artifacts.merged_export import export_merged
from sora_llm.backbone import load_backbone, load_model_config, skeleton
from sora_llm.base_files import base_digest, tokenizer_files
from sora_llm.base_spec import BackboneSpec
from sora_llm.errors import RunFailed, UserError
from sora_llm.export import export_adapter, folded_factors
from sora_llm.inject import adapters, inject_sora

SHARD_BYTES = 100_000
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "nf4": {"dtype": "bfloat16", "load_in_4bit": True},
    "nf4 in float32": {"dtype": "float32", "load_in_4bit": True, "compute_dtype": "float32", "double_quant": False},
}
IDS = torch.randint(512, (3, 17), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def base(stories: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """stories260k in bfloat16 and in shards; its embeddings are tied."""
    folder = tmp_path_factory.mktemp("base") / "model"
    AutoModelForCausalLM.from_pretrained(stories, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size=f"{SHARD_BYTES // 1000}KB"
    )
    for path in tokenizer_files(BackboneSpec(str(stories))):
        shutil.copyfile(path, folder / path.name)
    assert len(list(folder.glob("*.safetensors"))) > 3
    return folder


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(merged, "MAX_SHARD_BYTES", SHARD_BYTES)


def trained(spec: BackboneSpec) -> Any:
    """Adapters of uneven ranks, one of them pruned; s = 1.5."""
    return randomise_all(inject_sora(load_backbone(spec, "cpu"), 6, 9.0), size=0.1)


def planned(spec: BackboneSpec, factors: Any, dequantise: bool) -> Merge:
    return plan_merge(factors, spec, skeleton(load_model_config(spec), spec), dequantise=dequantise, device="cpu")


def export(merge: Merge, out: Path, **options: Any) -> dict[str, Any]:
    files = tokenizer_files(merge.spec)
    provenance = Provenance(merge.spec.name_or_path, tokenizer_files=files, chat_template="{{ messages }}")
    return export_merged(merge, load_model_config(merge.spec), out, provenance=provenance, **options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in folder.glob("*.safetensors"):
        found |= load_file(path)
    return found


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(input_ids=IDS, use_cache=False).logits.float()


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_says_the_same_with_the_merged_model_as_peft_with_the_adapter(
    base: Path, tmp_path: Path, kind: str
) -> None:
    spec = BackboneSpec(str(base), **KINDS[kind])
    model = trained(spec)
    export_adapter(model, tmp_path / "adapter")
    adapted = logits(PeftModel.from_pretrained(load_backbone(spec, "cpu"), str(tmp_path / "adapter")))
    plain = logits(load_backbone(spec, "cpu"))
    certificate = export(planned(spec, folded_factors(model), spec.load_in_4bit), tmp_path / "merged")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")  # in the dtype that its config names
    assert loaded.dtype == getattr(torch, spec.dtype) and not hasattr(loaded.config, "quantization_config")
    assert relative_error(plain, adapted) > 0.2, "the adapter must matter"
    # rounding of every weight to bf16 (2⁻⁸) through five layers; float32 sums in another order
    assert relative_error(logits(loaded), adapted) < (1e-5 if spec.dtype == "float32" else 2e-2)
    assert certificate["logits_error"] < (1e-5 if spec.dtype == "float32" else 2e-2)
    expected_base = "dequantized" if spec.load_in_4bit else "original"
    assert (certificate["base"], certificate["dtype"], certificate["dev_loss"]) == (expected_base, spec.dtype, {})


@pytest.mark.parametrize(
    ("kind", "dequantise"),
    [("float32", False), ("bfloat16", False), ("nf4", False), ("nf4", True), ("nf4 in float32", True)],
)
def test_every_weight_is_the_sum_rounded_once(base: Path, kind: str, dequantise: bool) -> None:
    """In float64 from what a loaded base holds: also layers without an adapter are dequantised."""
    spec = BackboneSpec(str(base), **KINDS[kind])
    model = inject_sora(load_backbone(spec, "cpu"), 6, 9.0, target_modules=["q_proj", "down_proj"])
    randomise_all(model, size=0.1)
    factors = folded_factors(model)
    merge = planned(spec, factors, dequantise)
    held = load_backbone(spec, "cpu")
    for key, tensor in weights(base).items():
        name = key.removesuffix(".weight")
        if dequantise and name in merge.quantised:
            from bitsandbytes.functional import dequantize_4bit

            layer = held.get_submodule(name)
            tensor = dequantize_4bit(layer.weight.data, layer.weight.quant_state)
        expected = tensor.double()
        if name in factors:
            expected = expected + factors[name][1].double() @ factors[name][0].double()
        found = merge.merged(key)
        assert found.dtype == getattr(torch, spec.dtype)
        # half a unit in the last place of the dtype, and a float32 sum of seven terms of at most 1
        step = torch.finfo(found.dtype).eps / 2
        assert bool(((found.double() - expected).abs() <= step * expected.abs() + 1e-6).all()), key
        if name not in factors and not (dequantise and name in merge.quantised):
            assert torch.equal(found, tensor.to(found.dtype)), key


def test_the_folder_is_a_checkpoint_like_any_other(base: Path, tmp_path: Path) -> None:
    spec = BackboneSpec(str(base))
    certificate = export(planned(spec, folded_factors(trained(spec)), False), tmp_path / "merged")
    folder = tmp_path / "merged"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in folder.glob("*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == shards == sorted(certificate["sha256"]) and len(shards) > 3
    for name in shards:
        with safe_open(folder / name, framework="pt") as file:
            assert {key for key, where in index["weight_map"].items() if where == name} == set(file.keys())
        assert (folder / name).stat().st_size < SHARD_BYTES + 10_000
    assert "lm_head.weight" not in index["weight_map"], "tied, as in the base"
    for path in (*tokenizer_files(spec), base / "generation_config.json"):
        assert (folder / path.name).read_bytes() == path.read_bytes()
    assert AutoTokenizer.from_pretrained(folder).chat_template == "{{ messages }}"
    card = (folder / "README.md").read_text()
    assert "LoRA merged into" in card and "Where it works" not in card
    assert certificate["modules"]["model.layers.0.self_attn.k_proj"] == {"rank": 0, "delta_error": 0.0}
    assert 0 < certificate["modules"]["model.layers.1.mlp.up_proj"]["delta_error"] < 0.1


def test_both_forms_of_a_quantised_base_are_measured(base: Path, tmp_path: Path) -> None:
    spec = BackboneSpec(str(base), **KINDS["nf4"])
    factors = folded_factors(trained(spec))
    sums = {}
    for dequantise in (True, False):
        out = tmp_path / str(dequantise)
        losses = export(planned(spec, factors, dequantise), out, dev_loss_of=lambda model: float(logits(model).sum()))
        sums[dequantise] = losses["dev_loss"]
        assert next(iter(sums[dequantise])) == "4-bit base + adapter", "as it was trained, whatever it is merged into"
    names = ("merged, dequantized", "merged, original")
    assert all(sums[True][name] == sums[False][name] for name in names) and sums[True][names[0]] != sums[True][names[1]]
    assert sums[True]["4-bit base + adapter"] == sums[False]["4-bit base + adapter"]
    assert "original base + adapter" not in sums[True]
    assert sums[False]["original base + adapter"] == pytest.approx(sums[False][names[1]], rel=1e-2)
    assert sums[False]["original base + adapter"] != pytest.approx(sums[False]["4-bit base + adapter"], rel=1e-2)
    assert sums[True]["4-bit base + adapter"] == pytest.approx(sums[True][names[0]], rel=1e-2)


# ----- what is not right is not published -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("model.layers.2.mlp.up_proj.weight", lambda t: t * 1.02, "model.layers.2.mlp.up_proj.weight is off by"),
        ("model.layers.2.mlp.up_proj.weight", lambda t: t.float(), "is off by inf"),
        ("model.norm.weight", lambda t: t.flip(0), "model.norm.weight is off by"),
        ("model.embed_tokens.weight", lambda t: torch.full_like(t, float("nan")), "embed_tokens.weight is off by inf"),
    ],
    ids=["scaled", "wider", "norm", "nan"],
)
def test_weights_that_are_not_the_sum_are_never_published(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str, change: Any, said: str
) -> None:
    spec = BackboneSpec(str(base))
    merge = planned(spec, folded_factors(trained(spec)), False)

    def damaged(tensors: dict[str, torch.Tensor], path: Path, **options: Any) -> None:
        save_file({name: change(t) if name == key else t for name, t in tensors.items()}, path, **options)

    monkeypatch.setattr(merged, "save_file", damaged)
    with pytest.raises(RunFailed, match=rf"is not base \+ adapter: .*{said}"):
        export(merge, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_logits_decide_too(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A config that makes another model of the right weights."""
    spec = BackboneSpec(str(base))
    merge = planned(spec, folded_factors(trained(spec)), False)
    real = merged_export.write_small_files

    def other(spec: Any, config: Any, folder: Path, provenance: Any) -> None:
        real(spec, config, folder, provenance)
        content = json.loads((folder / "config.json").read_text())
        content["rope_parameters"]["rope_theta"] = 100.0
        (folder / "config.json").write_text(json.dumps(content))

    monkeypatch.setattr(merged_export, "write_small_files", other)
    with pytest.raises(RunFailed, match="logits are off by"):
        export(merge, tmp_path / "merged")
    assert not list(tmp_path.iterdir())


def test_an_adapter_that_rounding_swallows_is_not_merged(base: Path, tmp_path: Path) -> None:
    spec = BackboneSpec(str(base))
    model = trained(spec)
    for name, layer in adapters(model).items():
        layer.lora_B.data.mul_(5e-4 if "layers.0.self_attn" in name else 0)
    with pytest.raises(RunFailed, match=r"hold 0\.1\d\d of the adapter's ΔW \(allowed 0.5 or more\).*served unmerged"):
        export(planned(spec, folded_factors(model), False), tmp_path / "merged")


def test_a_base_that_changed_since_is_noticed(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4-bit layers hold other numbers than those that are merged."""
    spec = BackboneSpec(str(base), **KINDS["nf4"])
    merge = planned(spec, folded_factors(trained(spec)), True)
    monkeypatch.setattr(merged, "dequantised", lambda weight, spec, device: weight)
    with pytest.raises(RunFailed, match="is quantised to other numbers"):
        export(merge, tmp_path / "merged")


def test_a_base_without_safetensors_or_with_other_names_is_a_sentence(base: Path, tmp_path: Path) -> None:
    model = trained(BackboneSpec(str(base)))
    factors = folded_factors(model)
    pickled, renamed, short, torn = (Path(shutil.copytree(base, tmp_path / name)) for name in ("p", "r", "s", "t"))
    for path in pickled.glob("*.safetensors*"):
        path.unlink()
    (pickled / "pytorch_model.bin").write_bytes(b"")
    for path in renamed.glob("*.safetensors"):
        tensors = {key.removeprefix("model."): tensor for key, tensor in load_file(path).items()}
        save_file(tensors, path, metadata={"format": "pt"})
    next(iter(sorted(short.glob("*.safetensors")))).unlink()
    (torn / "model.safetensors.index.json").write_text("[]")
    for folder, said in (
        (pickled, r"pickles \(\*.bin\) are not read"),
        (renamed, "tensor names do not match the layers"),
    ):
        with pytest.raises(UserError, match=said):
            planned(BackboneSpec(str(folder)), factors, False)
    for folder, said in ((short, "lacks model-00001"), (torn, "is damaged")):
        with pytest.raises(UserError, match=said):
            merged.weight_files(BackboneSpec(str(folder)))


def test_an_index_that_is_left_beside_a_whole_file_is_not_read(base: Path, tmp_path: Path) -> None:
    whole = Path(shutil.copytree(base, tmp_path / "whole"))
    tensors: dict[str, torch.Tensor] = {}
    for path in whole.glob("*.safetensors"):
        tensors |= load_file(path)
        path.unlink()
    save_file(tensors, whole / "model.safetensors", metadata={"format": "pt"})
    assert (whole / "model.safetensors.index.json").is_file()
    assert merged.weight_files(BackboneSpec(str(whole))) == [whole / "model.safetensors"], "as transformers loads it"
    assert base_digest(BackboneSpec(str(whole))) is not None
    (whole / "model.safetensors").unlink()
    with pytest.raises(UserError, match="lacks model-00001"):
        base_digest(BackboneSpec(str(whole)))


def test_a_disk_that_is_too_small_is_said_before_anything_is_loaded(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = BackboneSpec(str(base))
    merge = planned(spec, folded_factors(trained(spec)), False)
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(merged.shutil, "disk_usage", lambda _: usage)
    monkeypatch.setattr(merged_export, "load_backbone", lambda *_: pytest.fail("the base was loaded"))
    with pytest.raises(UserError, match="the merged model takes"):
        export(merge, tmp_path / "merged")
