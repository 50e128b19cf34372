"""What each engine would make of an adapter: every rule is broken once, and only those who have it say no."""

from __future__ import annotations

import ast
import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise_all, tiny_llama
from safetensors.torch import load_file, save_file

from sora_llm.artifacts.consumers import (
    CONSUMERS,
    PEFT,
    TRANSFORMERS,
    VLLM_RANKS,
    read_folder,
    verdicts_for_folder,
    verdicts_for_gguf,
)
from sora_llm.artifacts.gguf_lora import Architecture, GgufFile
from sora_llm.artifacts.lora_files import OTHER_METHODS, read_lora
from sora_llm.errors import UserError
from sora_llm.export import export_adapter
from sora_llm.inject import adapters, inject_sora

FOLDERS = set(CONSUMERS) - {"Ollama", "MLX-LM"}  # who read PEFT folders at all, or a file converted from one
ONE_RANK = {"SGLang", "TGI", "LoRAX"}
PATTERNS = {"PEFT", "transformers", "vLLM ≥ 0.32"}
RANK, FIRST = 4, "model.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A folder with one adapter in both layouts, and its targets."""
    folder = tmp_path_factory.mktemp("lora")
    model = randomise_all(inject_sora(tiny_llama(), r=RANK, lora_alpha=RANK))
    for layout in ("padded", "ragged"):
        export_adapter(model, folder / layout, layout)
    return folder, list(adapters(model))


@pytest.fixture
def padded(exported: tuple[Path, list[str]], tmp_path: Path) -> tuple[Path, list[str]]:
    """A copy to doctor."""
    folder, targets = exported
    return Path(shutil.copytree(folder / "padded", tmp_path / "adapter")), targets


def working(folder: Path, targets: list[str]) -> set[str]:
    return {name for name, verdict in verdicts_for_folder(read_folder(folder, targets)).items() if verdict.works}


@pytest.mark.parametrize(("layout", "expected"), [("padded", FOLDERS), ("ragged", PATTERNS | {"vLLM ≤ 0.31"})])
def test_padded_works_wherever_folders_are_read_and_ragged_where_ranks_are(
    exported: tuple[Path, list[str]], layout: str, expected: set[str]
) -> None:
    folder, targets = exported[0] / layout, exported[1]
    assert working(folder, targets) == expected
    said = json.loads((folder / "certificate.json").read_text())["consumers"]
    assert {name for name, reason in said.items() if reason == "exact"} == expected
    card = (folder / "README.md").read_text()
    for name, verdict in verdicts_for_folder(read_folder(folder, targets)).items():
        assert (f"| {name} | yes |" in card) == verdict.works and (f"# {name}\n" in card) == verdict.works


def config(**options: Any) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        file = folder / "adapter_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | options))

    return change


def tensors(edit: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        found = load_file(folder / "adapter_model.safetensors")
        edit(found)
        save_file(found, folder / "adapter_model.safetensors")

    return change


def narrower(found: dict[str, torch.Tensor]) -> None:
    A, B = (f"base_model.model.{FIRST}.lora_{kind}.weight" for kind in "AB")
    found[A], found[B] = found[A][:2].contiguous(), found[B][:, :2].contiguous()


def wider(found: dict[str, torch.Tensor]) -> None:
    for key in [key for key in found if "q_proj" in key]:
        found[key] = torch.cat([found[key]] * 2, dim=0 if "lora_A" in key else 1)


def absent(found: dict[str, torch.Tensor]) -> None:
    for kind in "AB":
        del found[f"base_model.model.{FIRST}.lora_{kind}.weight"]


def half(found: dict[str, torch.Tensor]) -> None:
    del found[f"base_model.model.{FIRST}.lora_A.weight"]


DOCTORED = {
    "a scale for all": (config(lora_alpha=2 * RANK), set()),
    "rsLoRA": (config(use_rslora=True), {"SGLang", "llama.cpp"}),
    "a scale for one": (config(alpha_pattern={"q_proj": 8}), FOLDERS - PATTERNS),
    "a rank in the config alone": (
        config(rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 2}),
        FOLDERS - {"PEFT", "transformers"},
    ),
    "targets of fewer": (config(target_modules=["k_proj"]), FOLDERS - {"PEFT", "transformers"}),
    "biases": (config(bias="all"), set()),
    "DoRA": (config(use_dora=True), set()),
    "whole layers": (config(modules_to_save=["lm_head"]), set()),
    "a narrower module": (tensors(narrower), {"vLLM ≥ 0.32", "vLLM ≤ 0.31"}),
    "a wider projection": (tensors(wider), {"TGI", "LoRAX"}),
    "a module left out": (tensors(absent), FOLDERS - ONE_RANK),
    "half a pair": (tensors(half), set()),
    "more than vLLM has room for": (config(r=513, lora_alpha=513), {"TGI", "LoRAX"}),
}


@pytest.mark.parametrize("how", DOCTORED)
def test_a_broken_rule_is_named_by_those_who_have_it(padded: tuple[Path, list[str]], how: str) -> None:
    folder, targets = padded
    change, expected = DOCTORED[how]
    change(folder)
    verdicts = verdicts_for_folder(read_folder(folder, targets))
    assert {name for name, verdict in verdicts.items() if verdict.works} == expected
    assert all(bool(verdict.reason) != bool(verdict.serve) for verdict in verdicts.values())


def test_a_projection_that_only_some_layers_have_is_not_for_engines_that_stack_layers(tmp_path: Path) -> None:
    model = randomise_all(
        inject_sora(tiny_llama(), r=RANK, lora_alpha=RANK, target_modules=["layers.0.self_attn.q_proj"])
    )
    export_adapter(model, tmp_path / "adapter")
    said = json.loads((tmp_path / "adapter" / "certificate.json").read_text())["consumers"]
    assert {name for name, reason in said.items() if reason == "exact"} == FOLDERS - ONE_RANK
    assert all("layers.1.self_attn.q_proj has no tensors" in said[name] for name in ONE_RANK)


@pytest.mark.parametrize("option", [*OTHER_METHODS, "of_next_year"])
def test_what_is_more_than_a_plain_lora_is_no_engines(padded: tuple[Path, list[str]], option: str) -> None:
    config(**{option: {"some": "thing"}})(padded[0])
    verdicts = verdicts_for_folder(read_folder(*padded))
    assert not any(verdict.works for verdict in verdicts.values())
    assert option in verdicts["PEFT"].reason
    with pytest.raises(UserError, match=f"more than a plain LoRA: {option}"):
        read_lora(padded[0])


def test_the_right_scale_may_be_another_than_1(padded: tuple[Path, list[str]]) -> None:
    folder, targets = padded
    config(lora_alpha=2 * RANK)(folder)
    verdicts = verdicts_for_folder(read_folder(folder, targets), 2.0)
    assert {name for name, verdict in verdicts.items() if verdict.works} == FOLDERS


def test_vllm_is_started_with_a_rank_that_it_takes(padded: tuple[Path, list[str]]) -> None:
    lora = read_folder(*padded)
    serve = verdicts_for_folder(lora, base="some/base", place="there")["vLLM ≥ 0.32"].serve
    assert serve == "vllm serve some/base --enable-lora --max-lora-rank 8 --lora-modules adapter=there"
    assert RANK not in VLLM_RANKS


@pytest.mark.parametrize("is_quantised", [False, True])
def test_llama_cpp_converts_the_model_that_a_quantised_base_was_made_from(
    padded: tuple[Path, list[str]], is_quantised: bool
) -> None:
    given = "ORIGINAL" if is_quantised else "some/base"
    folder = verdicts_for_folder(read_folder(*padded), base="some/base", is_base_quantised=is_quantised)[
        "llama.cpp"
    ].serve
    file = verdicts_for_gguf(gguf_file(), LLAMA, {Q: (8, 8), K: (8, 4)}, "some/base", is_base_quantised=is_quantised)
    assert f"convert_lora_to_gguf.py --base {given} " in folder
    assert f"convert_hf_to_gguf.py {given} " in file["llama.cpp"].serve
    for serve in (folder, file["llama.cpp"].serve):
        assert ("ORIGINAL is the unquantised model that some/base was made from" in serve) is is_quantised


def test_a_base_with_blanks_and_quotes_in_its_path_is_one_argument_of_each_command(
    padded: tuple[Path, list[str]],
) -> None:
    base, place = "/data/o'neill/my base", "/data/my adapter"
    verdicts = verdicts_for_folder(read_folder(*padded), base=base, place=place)
    commands = {name: verdict.serve for name, verdict in verdicts.items() if verdict.works}
    for name in (PEFT, TRANSFORMERS):
        call = ast.parse(commands.pop(name)).body[0]
        assert isinstance(call, ast.Expr) and place in [
            node.value for node in ast.walk(call) if isinstance(node, ast.Constant)
        ]
    assert len(commands) > 3
    for command in commands.values():
        words = shlex.split(command)
        assert base in words and {place, f"adapter={place}"} & set(words), command
    file = verdicts_for_gguf(gguf_file(), LLAMA, {Q: (8, 8), K: (8, 4)}, base)
    assert base in shlex.split(file["llama.cpp"].serve)


def test_files_that_are_no_lora_are_a_sentence(padded: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, _ = padded
    with pytest.raises(UserError, match="cannot be read"):
        read_folder(tmp_path)
    config(r=0)(folder)
    with pytest.raises(UserError, match="r is 0"):
        read_folder(folder)


# ----- GGUF -----------------------------------------------------------------------------------------------------------

LLAMA = Architecture("llama", 1, {})
Q, K = "model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"


def gguf_file() -> GgufFile:
    keys = {"general.type": "adapter", "adapter.type": "lora", "general.architecture": "llama"}
    sizes = {"attn_q": (3, 8, 8), "attn_k": (1, 8, 4)}
    found = {}
    for name, (rank, num_in, num_out) in sizes.items():
        found[f"blk.0.{name}.weight.lora_a"] = torch.ones(rank, num_in)
        found[f"blk.0.{name}.weight.lora_b"] = torch.ones(num_out, rank)
    return GgufFile(keys | {"adapter.lora.alpha": 0.0}, found)


GGUF_DAMAGE: dict[str, Callable[[GgufFile], Any]] = {
    "general.type": lambda file: file.keys.pop("general.type"),
    "adapter.type": lambda file: file.keys.update({"adapter.type": "control"}),
    "general.architecture": lambda file: file.keys.update({"general.architecture": "qwen2"}),
    "the base has no tensor for blk.7": lambda file: file.tensors.update(
        {"blk.7.attn_q.weight.lora_a": torch.ones(1, 8)}
    ),
    "has only its lora_a": lambda file: file.tensors.pop("blk.0.attn_q.weight.lora_b"),
    "does not fit the base": lambda file: file.tensors.update({"blk.0.attn_k.weight.lora_b": torch.ones(5, 1)}),
    "it would scale blk.0.attn_q.weight by 0.3333": lambda file: file.keys.update({"adapter.lora.alpha": 1.0}),
}


@pytest.mark.parametrize("said", GGUF_DAMAGE)
def test_llama_cpp_has_rules_too(said: str) -> None:
    shapes = {Q: (8, 8), K: (8, 4)}
    whole = verdicts_for_gguf(gguf_file(), LLAMA, shapes)
    assert all(verdict.works and "adapter.gguf" in verdict.serve for verdict in whole.values())
    damaged = gguf_file()
    GGUF_DAMAGE[said](damaged)
    assert all(said in verdict.reason for verdict in verdicts_for_gguf(damaged, LLAMA, shapes).values())
