"""`output.export_layout: gguf` and `merged`: a verified folder beside adapter/, and what it cannot be is said first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from helpers import relative_error
from safetensors.torch import load_file
from small_runs import CONFIG, Playground, overrides, status
from transformers import AutoModelForCausalLM

from sora_llm.artifacts.gguf_lora import Architecture, factors_in, read_gguf
from sora_llm.artifacts.lora_files import read_lora
from sora_llm.backbone import dequantised
from sora_llm.base_spec import BackboneSpec
from sora_llm.commands.cmd_inspect import main as inspect
from sora_llm.running.start import what_is_missing
from sora_llm.train import main

CUT = {
    "sora.consensus_at": 0.6,
    "sora.consensus": "svd",
    "sora.sparse_lambda": None,
    "sora.target_rank": 0.5,  # little enough to leave modules without a rank
}


def deltas(run_dir: Path) -> dict[str, torch.Tensor]:
    """ΔW of adapter/, as PEFT reads it."""
    lora = read_lora(run_dir / "adapter")
    return {name: lora.scaling[name] * (B.double() @ A.double()) for name, (A, B, _) in lora.factors.items()}


def test_gguf_lies_beside_the_adapter_and_is_the_same_under_zero2(ground: Playground) -> None:
    options = {"distributed.strategy": "zero2", "output.export_layout": "gguf", **CUT}
    assert ground.codes("gguf", 2, **options) == [0, 0]
    run_dir = ground.run_dir("gguf")
    expected = deltas(run_dir)
    architecture = Architecture("llama", 5, {"q_proj": 8, "k_proj": 4})
    file = factors_in(read_gguf(run_dir / "gguf" / "adapter.gguf"), architecture, list(expected))
    assert 0 < len(file) < len(expected), "some modules were pruned away, or the test says nothing of them"
    for name, delta in expected.items():
        A, B = file.get(name, (torch.zeros(0, delta.shape[1]), torch.zeros(delta.shape[0], 0)))
        assert relative_error(B.double() @ A.double(), delta) < 1e-6, name
    certificate = json.loads((run_dir / "gguf" / "certificate.json").read_text())
    assert certificate["passed"] and certificate["layout"] == "gguf"
    assert json.loads((run_dir / "adapter" / "certificate.json").read_text())["layout"] == "padded"
    assert (status(run_dir)["state"], status(run_dir)["adapter"]) == ("finished", "adapter")


def test_merged_is_the_dequantised_base_with_the_adapter_inside(ground: Playground, stories: Path) -> None:
    quantized = {"quantization.load_in_4bit": True, "quantization.bnb_4bit_compute_dtype": "float32"}
    assert ground.codes("merged", 1, **{"output.export_layout": "merged", **quantized, **CUT}) == [0]
    run_dir = ground.run_dir("merged")
    spec = BackboneSpec(str(stories), dtype="float32", load_in_4bit=True, compute_dtype="float32")
    base = AutoModelForCausalLM.from_pretrained(stories, dtype=torch.float32)
    merged = AutoModelForCausalLM.from_pretrained(run_dir / "merged")
    for name, delta in deltas(run_dir).items():
        weight = dequantised(base.get_submodule(name).weight.detach(), spec, "cpu").double()
        assert relative_error(merged.get_submodule(name).weight, weight + delta) < 1e-6, name
    card = (run_dir / "merged" / "README.md").read_text()
    assert "the base as 4-bit layers hold it plus ΔW" in card and "dev loss of the trained adapter" in card
    assert (run_dir / "adapter" / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize("layout", ["padded", "ragged"])
def test_a_run_and_inspect_say_what_the_layout_stores_of_slots_beyond_a_layers_width(
    layout: str, ground: Playground, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A budget counts as many slots as ΔW can have ranks; files hold them all, and zeros where they are padded."""
    slots = {"sora.r": 48, "sora.consensus": "slots", "sora.threshold": "decoupled"}
    budget = {"sora.target_rank": 30, "sora.sparse_lambda": None, "output.export_layout": layout}
    assert main([CONFIG, *overrides(ground.folder, tmp_path / "run", **slots, **budget)]) == 0
    said = capsys.readouterr().out
    kept = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])["kept_params"]
    ranks = json.loads((tmp_path / "run" / "ranks.jsonl").read_text().splitlines()[-1])["ranks"]
    tensors = load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    stored = sum(tensor.numel() for tensor in tensors.values())
    sizes = {name.removeprefix("base_model.model."): tensor.shape for name, tensor in tensors.items()}
    ragged = sum(
        rank * (sizes[f"{name}.lora_A.weight"][1] + sizes[f"{name}.lora_B.weight"][0])
        for name, rank in ranks.items()
        if rank
    )
    assert kept < ragged and (stored == ragged) == (layout == "ragged")
    padding = f", padded with zeros to one rank; layout ragged stores {ragged:,}" if layout == "padded" else ""
    assert f"{kept:,} parameters kept ({stored:,} stored{padding}); " in said
    assert inspect([str(tmp_path / "run")]) == 0
    assert f" bytes, {stored:,} numbers{padding.partition(';')[0]})\n" in capsys.readouterr().out


def test_a_disk_that_filled_up_meanwhile_fails_the_run_and_leaves_its_adapter(
    ground: Playground, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = overrides(ground.folder, tmp_path / "run", **{"output.export_layout": "merged", **CUT})
    with monkeypatch.context() as patch:
        usage = (shutil._ntuple_diskusage(1, 1, free) for free in (10**12, 0))  # type: ignore[attr-defined]
        patch.setattr("sora_llm.artifacts.merged.shutil.disk_usage", lambda _: next(usage))
        assert main([CONFIG, *arguments]) == 1
    assert "merged could not be written next to the adapter, which is complete: " in capsys.readouterr().err
    assert status(tmp_path / "run")["state"] == "failed" and (tmp_path / "run" / "adapter").is_dir()
    assert main([CONFIG, *arguments]) == 0
    assert status(tmp_path / "run")["state"] == "finished" and (tmp_path / "run" / "merged").is_dir()
    monkeypatch.setattr("sora_llm.artifacts.merged.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
    assert main([CONFIG, *arguments]) == 0, "it may be what filled the disk"


def test_a_finished_run_says_how_to_get_what_it_did_not_leave_unless_there_is_nothing_to_leave(tmp_path: Path) -> None:
    some, nothing = {"kept_params": 5}, {"kept_params": 0}
    (line,) = what_is_missing("gguf", tmp_path, some)
    assert line == f"it has no gguf: sora-llm export {tmp_path} --layout gguf --out {tmp_path / 'gguf'}"
    (line,) = what_is_missing("gguf", Path("my run"), some)
    assert line.endswith("sora-llm export 'my run' --layout gguf --out 'my run/gguf'"), "as a shell reads it"
    assert what_is_missing("gguf", tmp_path, nothing) == [], "export would refuse it"
    assert what_is_missing("merged", tmp_path, nothing), "the base can be written all the same"
    (tmp_path / "gguf").mkdir()
    for layout in ("padded", "gguf"):
        assert what_is_missing(layout, tmp_path, some) == []


def test_what_cannot_be_written_is_said_before_anything_is_trained(
    ground: Playground,
    stories: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(layout: str, **options: object) -> str:
        arguments = overrides(ground.folder, tmp_path / "run", **{"output.export_layout": layout, **options})
        assert main([CONFIG, *arguments]) == 2
        return capsys.readouterr().err

    other = Path(shutil.copytree(stories, tmp_path / "other"))
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"architectures": ["PhiForCausalLM"]}))
    said = refused("gguf", **{"model.name_or_path": str(other)})
    assert "output.export_layout gguf: " in said and "not for PhiForCausalLM" in said
    assert "8-bit layers also round activations" in refused("merged", **{"quantization.load_in_8bit": True})
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    assert "pickles (*.bin) are not read" in refused("merged", **{"model.name_or_path": str(other)})
    with monkeypatch.context() as patch:
        patch.setattr("sora_llm.artifacts.merged.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
        assert "output.export_layout merged: the merged model takes" in refused("merged")
    assert not (tmp_path / "run").exists()
    (tmp_path / "run" / "gguf").mkdir(parents=True)
    (tmp_path / "run" / "gguf" / "base.gguf").write_text("mine")
    assert "gguf exists and is not an export" in refused("gguf")
    assert [path.name for path in (tmp_path / "run").rglob("*")] == ["gguf", "base.gguf"]
    (tmp_path / "run" / "adapter").mkdir()
    (tmp_path / "run" / "adapter" / "adapter_config.json").write_text("{}")  # somebody's LoRA, not the run's
    assert "output.output_dir: " in (said := refused("padded")) and "adapter exists and is not an export" in said
    certificate = {"layout": "padded", "modules": {}, "files": ["adapter_config.json", "certificate.json"]}
    (tmp_path / "run" / "adapter" / "certificate.json").write_text(json.dumps(certificate))
    (tmp_path / "run" / "adapter" / "notes.txt").write_text("mine")
    shutil.rmtree(tmp_path / "run" / "gguf")
    with monkeypatch.context() as patch:
        patch.setattr("sora_llm.train.run_in", lambda *_: pytest.fail("a model was loaded"))
        assert "along with notes.txt, which is not part of the export" in refused("padded")
