"""`sora-llm export`: every source in every layout is the adapter that it was; a smaller one is the best of its size."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import relative_error, saved_tiny_llama
from peft_loras import KINDS, deltas, peft_lora
from safetensors.torch import load_file
from small_runs import checkpoints, lines
from transformers import AutoModelForCausalLM

from sora_llm import cli
from sora_llm.artifacts.gguf_lora import Architecture, factors_in, read_gguf
from sora_llm.artifacts.lora_files import read_lora
from sora_llm.commands import cmd_export


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tiny_llama(tmp_path_factory.mktemp("base") / "model")


def export(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert cli.main(["export", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refused(capsys: pytest.CaptureFixture[str], expected: str, *arguments: Any) -> None:
    assert cli.main(["export", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert expected in error and len(error.strip().splitlines()) == 1, error


def in_gguf(folder: Path, architecture: Architecture, modules: list[str]) -> dict[str, torch.Tensor]:
    found = factors_in(read_gguf(folder / "adapter.gguf"), architecture, modules)
    return {name: B.double() @ A.double() for name, (A, B) in found.items()}


@pytest.mark.parametrize("kind", ["plain", "patterns and rslora"])
def test_any_lora_is_what_peft_makes_of_it_in_every_layout(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    expected = deltas(peft_lora(base, tmp_path / "lora", 1, **KINDS[kind]))
    result = export(capsys, tmp_path / "lora", "--layout", "ragged", "--out", tmp_path / "ragged")
    found = deltas(tmp_path / "ragged")
    export(capsys, tmp_path / "lora", "--layout", "gguf", "--out", tmp_path / "gguf")
    file = in_gguf(tmp_path / "gguf", Architecture("llama", 2, {"q_proj": 4, "k_proj": 2}), list(expected))
    export(capsys, tmp_path / "lora", "--layout", "merged", "--out", tmp_path / "merged")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(base)
    for name, delta in expected.items():
        assert relative_error(found[name], delta) < 1e-6 and relative_error(file[name], delta) < 1e-6, name
        difference = merged.get_submodule(name).weight.double() - plain.get_submodule(name).weight.double()
        assert relative_error(difference, delta) < 1e-5, name  # of weights in float32
    assert "energy_dropped" not in result and result["certificate"]["source"] == str(tmp_path / "lora")


def test_a_run_and_its_last_checkpoint_are_the_same_adapter(
    undisturbed: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = undisturbed[1]
    last, first = (run_dir / "checkpoints" / checkpoints(run_dir)[index] for index in (-1, 0))
    adapter = read_lora(run_dir / "adapter")
    architecture = Architecture("llama", 5, {"q_proj": 8, "k_proj": 4})
    found = {}
    for name, source in {"run": run_dir, "adapter": run_dir / "adapter", "last": last, "first": first}.items():
        result = export(capsys, source, "--layout", "gguf", "--out", tmp_path / name)
        found[name] = in_gguf(tmp_path / name, architecture, list(adapter.targets))
        assert len(result["certificate"]["modules"]) == len(adapter.targets), "pruned ones count"
    for name in ("run", "adapter", "last"):
        for module, (A, B, _) in adapter.factors.items():
            delta = B.double() @ A.double()
            assert relative_error(found[name].get(module, torch.zeros_like(delta)), delta) < 1e-6, module
    assert any(relative_error(found["first"][module], delta) > 0.1 for module, delta in found["run"].items())
    ranks = lines(run_dir, "ranks.jsonl")[-1]["ranks"]
    assert found["run"].keys() == {module for module, rank in ranks.items() if rank}


def test_a_merged_run_is_measured_on_its_dev_rows(
    undisturbed: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = undisturbed[1]
    result = export(capsys, run_dir, "--layout", "merged", "--out", tmp_path / "merged")
    losses, line = result["certificate"]["dev_loss"], lines(run_dir, "metrics.jsonl")[-1]
    assert list(losses) == ["original base + adapter", "merged, original"]
    assert losses["original base + adapter"] == pytest.approx(line["eval_loss"])
    assert losses["merged, original"] == pytest.approx(line["eval_loss"], rel=1e-5)
    assert f"dev loss of this model: {line['eval_loss']:.4f}" in (tmp_path / "merged" / "README.md").read_text()
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json", "certificate.json"}
    silent = export(capsys, run_dir, "--layout", "merged", "--skip-dev-loss", "--out", tmp_path / "merged")
    assert silent["certificate"]["dev_loss"] == {}, "and its own folder is replaced"
    assert cli.main(["export", str(run_dir), "--layout", "merged", "--out", str(tmp_path / "merged")]) == 0
    shown = capsys.readouterr().out
    assert "self-check passed" in shown and f"dev loss {line['eval_loss']:.4f}  merged, original" in shown


@pytest.mark.parametrize("size", [("--target-rank", "1.5"), ("--target-params", "1000"), ("--tolerance", "0.4")])
def test_a_smaller_adapter_is_the_dense_truncation_that_fits(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: tuple[str, str]
) -> None:
    """Components of all modules compete by σ²/(I + O); each module keeps its largest."""
    folder = peft_lora(base, tmp_path / "lora", 1, r=4, lora_alpha=6)
    result = export(capsys, folder, *size, "--layout", "ragged", "--out", tmp_path / "small")
    whole, found = deltas(folder), deltas(tmp_path / "small")
    ranks = {name: module["rank"] for name, module in result["certificate"]["modules"].items()}
    svds = {name: torch.linalg.svd(delta, full_matrices=False) for name, delta in whole.items()}
    costs = {name: sum(delta.shape) for name, delta in whole.items()}
    for name, (U, sigma, Vt) in svds.items():
        truncated = (U[:, : ranks[name]] * sigma[: ranks[name]]) @ Vt[: ranks[name]]
        assert relative_error(found.get(name, torch.zeros_like(truncated)), truncated) < 1e-6, name
    energies = [(float(s**2), name) for name, (_, sigma, _) in svds.items() for s in sigma[:4]]
    dropped = sum(float((sigma[ranks[name] :] ** 2).sum()) for name, (_, sigma, _) in svds.items())
    share = dropped / sum(energy for energy, _ in energies)
    assert result["energy_dropped"] == pytest.approx(share)
    best_first = sorted(energies, key=lambda part: -part[0] / costs[part[1]])
    expected = dict.fromkeys(costs, 0)
    if size[0] == "--tolerance":
        assert 0.3 < result["relative_error"] <= 0.4
        for _, name in best_first[: sum(ranks.values())]:
            expected[name] += 1
    else:
        left = 1000 if size[0] == "--target-params" else int(1.5 * sum(costs.values()))
        for _, name in best_first:
            if costs[name] <= left:
                expected[name] += 1
                left -= costs[name]
    assert ranks == expected and result["kept_params"] == sum(rank * costs[name] for name, rank in ranks.items())
    card = (tmp_path / "small" / "README.md").read_text()
    assert f"{result['energy_dropped']:.2%} of Σ ‖ΔW‖² was dropped" in card


def test_engines_that_cannot_take_it_are_named_with_their_reason(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = peft_lora(base, tmp_path / "lora", 1, **KINDS["patterns"])
    assert cli.main(["export", str(folder), "--layout", "ragged", "--out", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "applied exactly by PEFT, transformers, vLLM ≥ 0.32, vLLM ≤ 0.31;" in shown
    assert "not by SGLang: " in shown and "it takes one rank" in shown


def test_what_cannot_be_is_a_sentence_before_the_base_is_loaded(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cmd_export, "load_backbone", lambda *_: pytest.fail("the base was loaded"))
    monkeypatch.setattr(cmd_export, "export_merged", lambda *_, **__: pytest.fail("the base was loaded"))
    lora, out = peft_lora(base, tmp_path / "lora", 1, r=2), ("--out", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refused(capsys, f"{tmp_path}/nowhere does not exist", tmp_path / "nowhere", *out)
    refused(capsys, "is not a run directory", base, *out)
    refused(capsys, "--outtype is for --layout gguf", lora, "--outtype", "f16", *out)
    refused(capsys, "--base-model", lora, "--base", "original", *out)
    refused(capsys, "--skip-dev-loss is for --layout merged", lora, "--skip-dev-loss", *out)
    refused(
        capsys,
        "--base dequantized: the adapter is not known",
        lora,
        "--layout",
        "merged",
        "--base",
        "dequantized",
        *out,
    )
    refused(capsys, "is not a sparsity path", lora, "--stage", 0.5, *out)
    refused(capsys, "--target-rank is 0", lora, "--target-rank", 0, *out)
    refused(capsys, "this size keeps nothing", lora, "--target-params", 1, *out)
    refused(capsys, "--min-rank is 1", lora, "--min-rank", 1, *out)
    refused(capsys, "is one of the inputs", lora, "--out", lora)
    refused(capsys, "is not an export", lora, "--out", tmp_path / "full")
    (tmp_path / "outer" / "inner").mkdir(parents=True)
    for folder in (tmp_path / "outer", tmp_path / "outer" / "inner"):
        (folder / "certificate.json").write_text('{"layout": "padded", "modules": {}}')
    refused(capsys, f"with it the export in {tmp_path / 'outer' / 'inner'}", lora, "--out", tmp_path / "outer")
    merged = Path(shutil.copytree(base, tmp_path / "merged"))  # an earlier export that is the base of a later one
    (merged / "certificate.json").write_text('{"layout": "merged", "modules": {}}')
    onto = ("--layout", "merged", "--base-model", merged, "--out", merged)
    refused(capsys, "is one of the inputs", lora, *onto)
    refused(capsys, "is a file", lora, "--out", tmp_path / "full" / "notes.txt")
    refused(capsys, "there is no folder /no/such", lora, "--base-model", "/no/such", *out)
    moved = Path(shutil.copytree(base, tmp_path / "moved"))
    config = json.loads((moved / "config.json").read_text())
    (moved / "config.json").write_text(json.dumps(config | {"architectures": ["MixtralForCausalLM"]}))
    refused(capsys, "not for MixtralForCausalLM", lora, "--layout", "gguf", "--base-model", moved, *out)
    (moved / "model.safetensors").rename(moved / "pytorch_model.bin")
    refused(capsys, "pickles (*.bin) are not read", lora, "--layout", "merged", "--base-model", moved, *out)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine" and not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_said_before_the_work(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the nearest folder that exists; root, as whom tests may run, can write everywhere."""
    monkeypatch.setattr(cmd_export, "prepared", lambda *_: pytest.fail("the work began"))
    lora, locked = peft_lora(base, tmp_path / "lora", 1, r=2), tmp_path / "locked"
    locked.mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != locked)
    for out in (locked / "out", locked / "deep" / "out"):
        refused(capsys, f"you may not write in {locked}", lora, "--out", out)


def test_a_run_keeps_its_own_adapter_and_its_data_is_needed_to_measure(
    undisturbed: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = undisturbed[1]
    refused(capsys, "is one of the inputs", run_dir, "--layout", "gguf", "--out", run_dir / "adapter")
    copy = Path(shutil.copytree(run_dir, tmp_path / "run", ignore=shutil.ignore_patterns("checkpoints")))
    (tmp_path / "link").symlink_to(copy / "adapter")
    for out in (copy / "adapter", tmp_path / "link"):
        refused(capsys, "is a run's adapter", run_dir, "--out", out)
    text = (copy / "config.yaml").read_text()
    (copy / "config.yaml").write_text(text.replace("rows.jsonl", "gone.jsonl"))
    refused(capsys, "--skip-dev-loss skips the measurement", copy, "--layout", "merged", "--out", tmp_path / "out")
    (copy / "config.yaml").write_text(text.replace("load_in_8bit: false", "load_in_8bit: true"))
    refused(capsys, "8-bit layers also round activations", copy, "--layout", "merged", "--out", tmp_path / "out")
    shutil.rmtree(copy / "adapter")
    refused(capsys, "has no adapter yet", copy, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_export_takes_the_place_of_any_other_export_and_of_nothing_else(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whatever the layouts: what is refused is refused before the base is loaded."""
    lora, out = peft_lora(base, tmp_path / "lora", 1, r=2), tmp_path / "out"
    (lora / "chat_template.jinja").write_text("{{ messages }}")
    files = {"gguf": "adapter.gguf", "merged": "config.json", "padded": "adapter_config.json", "ragged": "README.md"}
    for layout, file in [*files.items(), ("gguf", "adapter.gguf")]:
        export(capsys, lora, "--layout", layout, "--out", out)
        assert (out / file).is_file() and (out / "adapter.gguf").is_file() == (layout == "gguf")
        assert (out / "chat_template.jinja").read_text() == "{{ messages }}"
        assert (out / "tokenizer.json").is_file() == (layout != "gguf"), "the base's, where it brings a template alone"
    foreign = peft_lora(base, tmp_path / "foreign", 1, r=2)
    for certificate in (None, "[]", "{}", "torn"):
        if certificate is not None:
            (foreign / "certificate.json").write_text(certificate)
        for layout in files:
            refused(capsys, "is not an export", lora, "--layout", layout, "--out", foreign)


@pytest.mark.parametrize("layout", ["padded", "gguf", "merged"])
def test_a_link_stays_one_and_leads_to_the_export(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str
) -> None:
    """Twice: to a folder that is not there yet, and to an older export."""
    lora, place, link = peft_lora(base, tmp_path / "lora", 1, r=2), tmp_path / "disk" / "out", tmp_path / "link"
    place.parent.mkdir()
    link.symlink_to(place)
    for _ in range(2):
        export(capsys, lora, "--layout", layout, "--out", link)
        assert link.is_symlink() and (place / "certificate.json").is_file()
        assert [path.name for path in place.parent.iterdir()] == ["out"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "link", "lora"]


@pytest.mark.parametrize("layout", ["padded", "gguf", "merged"])
def test_the_working_directory_is_never_replaced(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, layout: str
) -> None:
    """The shell that is in it would be in no folder any more."""
    lora = peft_lora(base, tmp_path / "lora", 1, r=2)
    export(capsys, lora, "--layout", "gguf", "--out", tmp_path / "out")
    monkeypatch.chdir(tmp_path / "out")
    for out in (".", tmp_path / "out"):
        refused(capsys, "contains the working directory", lora, "--layout", layout, "--out", out)
    assert (tmp_path / "out" / "adapter.gguf").is_file()


def test_what_a_run_left_beside_its_adapter_is_an_export_too(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its certificate is like that of a command, but for the source."""
    lora, out = peft_lora(base, tmp_path / "lora", 1, r=2), tmp_path / "gguf"
    export(capsys, lora, "--layout", "gguf", "--out", out)
    certificate = json.loads((out / "certificate.json").read_text())
    del certificate["source"]
    (out / "certificate.json").write_text(json.dumps(certificate))
    export(capsys, lora, "--layout", "gguf", "--out", out)
    assert json.loads((out / "certificate.json").read_text())["source"] == str(lora)


def test_the_padded_layout_has_every_target_of_the_run(
    undisturbed: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = undisturbed[1]
    export(capsys, run_dir / "checkpoints" / checkpoints(run_dir)[-1], "--out", tmp_path / "out")
    files = [folder / "adapter_model.safetensors" for folder in (tmp_path / "out", run_dir / "adapter")]
    assert load_file(files[0]).keys() == load_file(files[1]).keys()
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == (run_dir / "adapter" / "tokenizer.json").read_bytes()


def test_a_home_written_with_a_tilde_is_that_home(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    peft_lora(base, tmp_path / "lora", 1)
    export(capsys, tmp_path / "lora", "--layout", "gguf", "--out=~/exported")
    assert (tmp_path / "home" / "exported" / "adapter.gguf").is_file()


def test_lines_of_metrics_without_the_usual_fields_are_passed_over(
    undisturbed: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = shutil.copytree(undisturbed[1], tmp_path / "run")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99}\n{"step": 99, "phase": "export", "stage": 0}\n')
    export(capsys, run_dir, "--layout", "gguf", "--out", tmp_path / "gguf")
    refused(capsys, "is not a sparsity path", run_dir, "--stage", 0.5, "--out", tmp_path / "stage")
