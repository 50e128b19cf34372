"""`sora-llm consensus`: adapters of every kind read as PEFT applies them, merged as dense algebra says, or refused."""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers import randomise_all, relative_error, saved_tiny_llama, tiny_llama
from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft_loras import KINDS, deltas, peft_lora, ranks_of
from safetensors.torch import load_file, save_file
from small_runs import checkpoints

from sora_llm import cli
from sora_llm.artifacts.lora_files import OTHER_BASES, OTHER_METHODS, is_target, read_lora
from sora_llm.commands import cmd_consensus
from sora_llm.commands.sources import base_of, own_tokenizer, read_source
from sora_llm.errors import UserError
from sora_llm.export import export_adapter
from sora_llm.files import file_sha256
from sora_llm.inject import inject_sora


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved_tiny_llama(tmp_path_factory.mktemp("base") / "model")


def consensus(capsys: pytest.CaptureFixture[str], *arguments: Any) -> dict[str, Any]:
    assert cli.main(["consensus", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("kind", KINDS)
def test_a_lora_is_read_as_peft_applies_it(base: Path, tmp_path: Path, kind: str) -> None:
    folder = peft_lora(base, tmp_path / "lora", 1, **KINDS[kind])
    lora, expected = read_lora(folder), deltas(folder)
    assert lora.factors.keys() == expected.keys() == lora.targets and lora.base_model == str(base)
    for name, (A, B, _) in lora.factors.items():
        assert relative_error(lora.scaling[name] * B.double() @ A.double(), expected[name]) < 1e-12, name


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj"]},
        {"target_modules": ["q_proj", "model.layers.1.mlp.up_proj"], "layers_to_transform": [0]},
        {"target_modules": ["q_proj", "up_proj"], "layers_to_transform": 1, "layers_pattern": "layers"},
        {"target_modules": ["up_proj"], "layers_to_transform": [1], "layers_pattern": ["blocks", "(experts|h)"]},
        {"target_modules": r".*\.(0|3)\..*up_proj", "exclude_modules": ["experts.3.up_proj"]},
        {"target_modules": ["q_proj", "up_proj"], "exclude_modules": r".*layers\.1\..*", "layers_to_transform": [0, 1]},
    ],
)
def test_the_modules_that_a_lora_is_for_are_those_that_peft_puts_it_on(options: dict[str, Any]) -> None:
    names = [
        "layers.0.q_proj",
        "model.layers.1.self_attn.q_proj",
        "head.q_proj",
        "q_proj",
        "model.layers.1.mlp.up_proj",
    ]
    names += [f"model.layers.{i}.mlp.experts.{j}.up_proj" for i in (0, 1) for j in (0, 1, 3)]
    config = LoraConfig(**options)
    found = {name: is_target(name, options) for name in names}
    assert found == {name: bool(check_target_module_exists(config, name)) for name in names}
    assert len(set(found.values())) == 2


def test_adapters_of_every_kind_become_the_mean_of_their_products(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [peft_lora(base, tmp_path / kind, seed, **options) for seed, (kind, options) in enumerate(KINDS.items())]
    taught = [{"path": f"{name}.jsonl", "type": "alpaca"} for name in ("one", "two", "three")]
    for folder, data in zip(folders, (taught[:2], taught[1:]), strict=False):
        (folder / "certificate.json").write_text(json.dumps({"data": data}))
    weights = [1.0, 2.0, 0.5, 1.5]
    result = consensus(capsys, *folders, "--weights", *weights, "--out", tmp_path / "merged")
    found, each = deltas(tmp_path / "merged"), [deltas(folder) for folder in folders]
    for name, delta in found.items():
        mean = sum(w * of[name] for w, of in zip(weights, each, strict=True)) / sum(weights)
        assert relative_error(delta, mean) < 1e-6, name  # float32 factors
        assert result["modules"][name]["merge_error"] < 1e-6
    assert result["merge_error"] == 0.0 and result["certificate"]["passed"]
    certificate = json.loads((tmp_path / "merged" / "certificate.json").read_text())
    assert certificate["merge"]["modules"] == result["modules"] and len(certificate["merge"]["sources"]) == 4
    assert certificate["data"] == taught, "of all that were merged, each once"
    assert "Ranks of each source" in (tmp_path / "merged" / "README.md").read_text()


def test_a_budget_is_met_and_its_error_is_that_of_the_best_choice(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folders = [peft_lora(base, tmp_path / str(seed), seed, r=4, lora_alpha=4) for seed in range(3)]
    result = consensus(capsys, *folders, "--target-rank", "2.5", "--out", tmp_path / "merged", "--layout", "ragged")
    each = [deltas(folder) for folder in folders]
    mean = {name: sum(of[name] for of in each) / 3 for name in each[0]}
    costs = {name: sum(delta.shape) for name, delta in mean.items()}
    budget = 2.5 * sum(costs.values())
    assert budget - max(costs.values()) < result["kept_params"] <= budget
    kept = {name: module["rank"] for name, module in result["modules"].items()}
    merged = deltas(tmp_path / "merged")
    assert merged.keys() == {name for name, rank in kept.items() if rank}, "pruned modules are left out"
    dropped = {name: float((torch.linalg.svdvals(delta)[kept[name] :] ** 2).sum()) for name, delta in mean.items()}
    for name, delta in mean.items():
        expected = (dropped[name] / float(delta.norm() ** 2)) ** 0.5
        assert result["modules"][name]["merge_error"] == pytest.approx(expected, abs=1e-6)
        off = float((merged.get(name, torch.zeros_like(delta)) - delta).norm() / delta.norm())
        assert off == pytest.approx(expected, abs=1e-6)
    whole = (sum(dropped.values()) / sum(float(delta.norm() ** 2) for delta in mean.values())) ** 0.5
    assert result["merge_error"] == pytest.approx(whole, rel=1e-6)


def test_copies_of_one_adapter_are_said_to_be_that(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, other = (peft_lora(base, tmp_path / str(seed), seed, r=4, lora_alpha=4) for seed in range(2))
    for sources, said in (
        ([one], "one adapter of positive weight"),
        ([one, one], "bit for bit the same adapter"),
        ([one, other], None),
    ):
        assert cli.main(["consensus", *map(str, sources), "--out", str(tmp_path / "merged")]) == 0
        text = capsys.readouterr().out
        assert "nothing was averaged" in text if said else "nothing was averaged" not in text
        assert said is None or said in text


def test_a_tolerance_bounds_the_error(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folders = [peft_lora(base, tmp_path / str(seed), seed, r=4, lora_alpha=4) for seed in range(2)]
    result = consensus(capsys, *folders, "--tolerance", "0.3", "--out", tmp_path / "merged")
    assert 0.1 < result["merge_error"] <= 0.3


def test_what_a_ragged_export_left_out_is_a_target_all_the_same(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = randomise_all(inject_sora(tiny_llama(), r=4, lora_alpha=8), seed=3)
    model.name_or_path = str(base)
    for layout in ("ragged", "padded"):
        export_adapter(model, tmp_path / layout, layout)
    ragged, padded = read_lora(tmp_path / "ragged"), read_lora(tmp_path / "padded")
    assert ranks_of(ragged) == ranks_of(padded) and 0 in ranks_of(ragged).values()
    result = consensus(capsys, tmp_path / "ragged", tmp_path / "padded", "--out", tmp_path / "merged")
    assert {name: module["rank"] for name, module in result["modules"].items()} == ranks_of(padded)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("merged", "padded")]
    assert files[0].keys() == files[1].keys(), "every target has its tensors in the padded layout"
    found, expected = deltas(tmp_path / "merged"), deltas(tmp_path / "padded")
    assert all(relative_error(found[name], expected[name]) < 1e-6 for name in expected)


def test_runs_and_checkpoints_are_sources(
    undisturbed: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = undisturbed[1]
    last, earlier = (run_dir / "checkpoints" / checkpoints(run_dir)[index] for index in (-1, 0))
    weights = ("--weights", 1e308, 1e308, 0)
    result = consensus(capsys, run_dir, last, earlier, *weights, "--out", tmp_path / "merged")
    adapter = read_lora(run_dir / "adapter")
    ranks = json.loads((run_dir / "ranks.jsonl").read_text().splitlines()[-1])["ranks"]
    assert {name: module["ranks"][0] for name, module in result["modules"].items()} == ranks == ranks_of(adapter)
    assert [part["weight"] for part in result["sources"]] == [0.5, 0.5, 0.0]
    assert result["sources"][0]["cosine"] == pytest.approx(1.0), "the run's adapter is its last checkpoint, cut"
    merged = read_lora(tmp_path / "merged")
    for name, (A, B, _) in adapter.factors.items():
        found_A, found_B, _ = merged.factors[name]
        assert relative_error(found_B.double() @ found_A.double(), B.double() @ A.double()) < 1e-6, name
    assert {path.name for path in (run_dir / "adapter").iterdir()} == {p.name for p in (tmp_path / "merged").iterdir()}


@contextlib.contextmanager
def of_another_config(run_dir: Path, folder: Path) -> Iterator[dict[str, Any]]:
    """Make `folder` a copy of a run's last checkpoint that says another config: what the block makes of it."""
    shutil.copytree(run_dir / "checkpoints" / checkpoints(run_dir)[-1], folder)
    state = json.loads((folder / "state.json").read_text())
    yield state["config"]
    (folder / "state.json").write_text(json.dumps(state))
    hashes = {name: file_sha256(folder / name) for name in ("adapter.safetensors", "state.json")}
    (folder / "COMPLETE").write_text(json.dumps(hashes, indent=1))


def test_a_checkpoint_is_read_where_its_base_lies_elsewhere(
    undisturbed: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = undisturbed[1]
    folder = tmp_path / "checkpoint"
    with of_another_config(run_dir, folder) as config:
        moved, config["model"]["name_or_path"] = config["model"]["name_or_path"], "/another/machine/model"
    refused(capsys, "only adapters for one base", run_dir, folder, "--out", tmp_path / "merged")
    lora = peft_lora_of(run_dir, tmp_path / "lora")
    result = consensus(capsys, lora, folder, run_dir, "--base", moved, "--out", tmp_path / "merged")
    assert [part["cosine"] for part in result["sources"]] == [pytest.approx(1.0)] * 3
    assert (tmp_path / "merged" / "tokenizer.json").exists(), "of the first source that has one"


def test_checkpoints_keep_the_template_that_they_were_trained_with(
    undisturbed: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nothing lies beside a checkpoint: its config says it.  Where two differ the first counts, the other is named."""
    run_dir, folders = undisturbed[1], {}
    rows = {"path": "rows.jsonl", "type": "alpaca", "columns": {}}
    for name in ("chatml", "vicuna"):
        folders[name] = tmp_path / name
        with of_another_config(run_dir, folders[name]) as config:
            data = config["data"]
            data["datasets"] = [data["datasets"][0] | rows]
            data["chat_template"] = name
        assert cli.main(["export", str(folders[name]), "--out", str(tmp_path / f"{name}-exported")]) == 0
    capsys.readouterr()
    completions = run_dir / "adapter"  # trained without a template, and brings tokenizer files
    result = consensus(capsys, completions, folders["chatml"], folders["chatml"], "--out", tmp_path / "merged")
    found, expected = (tmp_path / name / "chat_template.jinja" for name in ("merged", "chatml-exported"))
    assert found.read_text() == expected.read_text() != (tmp_path / "vicuna-exported" / found.name).read_text()
    assert (result["chat_template_of"], result["other_chat_templates"]) == (str(folders["chatml"]), [])
    assert cli.main(["consensus", str(completions), str(folders["chatml"]), "--out", str(tmp_path / "merged")]) == 0
    said = f"the chat template is that of {folders['chatml']}; {completions} was trained on plain prompts"
    assert f"warning: {said}" in capsys.readouterr().out and said in (tmp_path / "merged" / "README.md").read_text()

    assert cli.main(["consensus", *map(str, folders.values()), "--out", str(tmp_path / "merged")]) == 0
    said = f"the chat template is that of {folders['chatml']}; {folders['vicuna']} was trained with another one"
    assert f"warning: {said}" in capsys.readouterr().out and said in (tmp_path / "merged" / "README.md").read_text()
    assert found.read_text() == expected.read_text()


def test_a_run_that_rendered_nothing_brings_no_template_whatever_its_base_has(
    undisturbed: dict[int, Path], tmp_path: Path
) -> None:
    run_dir = Path(shutil.copytree(undisturbed[1], tmp_path / "run"))  # trained on completions
    (run_dir / "adapter" / "chat_template.jinja").write_text("a file of the base's tokenizer")
    source = read_source(run_dir)
    files, template = own_tokenizer(source, base_of([source], None, False))
    assert template is None and run_dir / "adapter" / "chat_template.jinja" in files


def peft_lora_of(run_dir: Path, folder: Path) -> Path:
    """The run's adapter as weights and config alone, as a plain PEFT folder has them."""
    folder.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copyfile(run_dir / "adapter" / name, folder / name)
    return folder


def edited(folder: Path, **options: Any) -> None:
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | options))


def other_weights(folder: Path, change: Any) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")


def without_a_factor(tensors: dict[str, torch.Tensor]) -> None:
    del tensors[next(key for key in tensors if "lora_A" in key)]


def not_finite(tensors: dict[str, torch.Tensor]) -> None:
    next(iter(tensors.values()))[0, 0] = float("nan")


def more_than_lora(tensors: dict[str, torch.Tensor]) -> None:
    tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)


def pickled(folder: Path) -> None:
    (folder / "adapter_model.safetensors").rename(folder / "adapter_model.bin")


def stale(folder: Path) -> None:
    (folder / "certificate.json").write_text(json.dumps({"modules": {}, "sha256": "0" * 64}))


BROKEN = {
    "DoRA": (lambda folder: edited(folder, use_dora=True), "DoRA rescales"),
    "a bias": (lambda folder: edited(folder, bias="lora_only"), "biases"),
    "targets of fewer": (lambda folder: edited(folder, target_modules=["q_proj"]), "PEFT would ignore"),
    "targets but one": (lambda folder: edited(folder, exclude_modules=["q_proj"]), "PEFT would ignore"),
    "layers of fewer": (lambda folder: edited(folder, layers_to_transform=[0]), "PEFT would ignore"),
    "an alpha that is none": (lambda folder: edited(folder, lora_alpha=float("nan")), "not the config"),
    "an alpha beyond float32": (lambda folder: edited(folder, lora_alpha=1e308), "not finite in float32"),
    "targets that are no pattern": (lambda folder: edited(folder, target_modules="("), "not the config"),
    "targets that are a number": (lambda folder: edited(folder, target_modules=5), "target_modules is 5, neither"),
    "layers that are a word": (lambda folder: edited(folder, layers_to_transform="x"), "layers_to_transform is 'x'"),
    "a config too deep to read": (
        lambda folder: (folder / "adapter_config.json").write_text("[" * 100_000),
        "not the config",
    ),
    "a certificate too deep to read": (
        lambda folder: (folder / "certificate.json").write_text("[" * 100_000),
        "certificate.json is damaged",
    ),
    "a base that is none": (lambda folder: edited(folder, base_model_name_or_path=5), "not the config"),
    "an option of the future": (lambda folder: edited(folder, use_magic=True), "use_magic is set"),
    "no factors": (lambda folder: other_weights(folder, dict.clear), "holds no factors"),
    "weights of another certificate": (stale, "is not what its certificate.json was written for"),
    "another base inside": (lambda folder: edited(folder, init_lora_weights="pissa_niter_4"), "pissa_niter_4"),
    "another method": (lambda folder: edited(folder, peft_type="IA3"), "IA3"),
    "ranks of other files": (lambda folder: edited(folder, r=9), "the files do not match"),
    "a pattern that is none": (lambda folder: edited(folder, alpha_pattern={"(": 2}), "not the config"),
    "rank 0": (lambda folder: edited(folder, rank_pattern={"q_proj": 0}), "not the config"),
    "a config that is none": (lambda folder: (folder / "adapter_config.json").write_text("[]"), "not the config"),
    "half a pair": (lambda folder: other_weights(folder, without_a_factor), "has only lora_B"),
    "not finite": (lambda folder: other_weights(folder, not_finite), "not finite"),
    "whole layers": (lambda folder: other_weights(folder, more_than_lora), "lm_head"),
    "a pickle": (pickled, "is a pickle"),
    "no such base": (
        lambda folder: edited(folder, base_model_name_or_path="/no/such/model"),
        "only adapters for one base",
    ),
}


@pytest.mark.parametrize("how", BROKEN)
def test_a_broken_or_foreign_adapter_is_a_sentence(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], how: str
) -> None:
    good = peft_lora(base, tmp_path / "good", 1, r=3)
    bad = Path(shutil.copytree(good, tmp_path / "bad"))
    break_it, expected = BROKEN[how]
    break_it(bad)
    refused(capsys, expected, good, bad, "--out", tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("option", [*OTHER_METHODS, *OTHER_BASES])
def test_what_is_more_than_a_lora_is_refused_by_name(base: Path, tmp_path: Path, option: str) -> None:
    folder = peft_lora(base, tmp_path / "lora", 1, r=2)
    edited(folder, **({"init_lora_weights": option} if option in OTHER_BASES else {option: {"some": 1}}))
    with pytest.raises(UserError, match=option):
        read_lora(folder)


def refused(capsys: pytest.CaptureFixture[str], expected: str, *arguments: Any) -> None:
    assert cli.main(["consensus", *map(str, arguments)]) == 2
    error = capsys.readouterr().err
    assert expected in error and len(error.strip().splitlines()) == 1, error


def test_combinations_that_cannot_be_are_a_sentence(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (peft_lora(base, tmp_path / name, 1, r=3) for name in "ab")
    out = ("--out", tmp_path / "merged")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").write_text("mine")
    refused(capsys, "2 numbers for 3 sources", a, b, a, "--weights", 1, 2, *out)
    refused(capsys, "not all 0", a, b, "--weights", 0, 0, *out)
    refused(capsys, "--weights -1 1", a, b, "--weights", -1, 1, *out)
    refused(capsys, "--target-rank is 0", a, b, "--target-rank", 0, *out)
    refused(capsys, "--tolerance is 1", a, b, "--tolerance", 1, *out)
    refused(capsys, "--min-rank is 1", a, b, "--min-rank", 1, *out)
    refused(capsys, "more than the budget", a, b, "--min-rank", 2, "--target-rank", 1, *out)
    refused(capsys, f"{tmp_path}/nowhere does not exist", a, tmp_path / "nowhere", *out)
    refused(capsys, "is not a run directory", a, base, *out)
    refused(capsys, "is not an export", a, b, "--out", tmp_path / "full")
    refused(capsys, "this size keeps nothing", a, b, "--target-params", 1, *out)
    refused(capsys, "is not an export", a, a, "--out", b)  # somebody's training output, checkpoints and all
    refused(capsys, "one of the inputs", a, b, "--out", b)
    assert (tmp_path / "full" / "notes.txt").read_text() == "mine" and not (tmp_path / "merged").exists()


def test_other_targets_are_merged_on_request_alone(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = peft_lora(base, tmp_path / "whole", 1, r=3, lora_alpha=3)
    part = peft_lora(base, tmp_path / "part", 2, r=3, lora_alpha=3, target_modules=["q_proj", "v_proj"])
    refused(capsys, "--allow-missing", whole, part, "--out", tmp_path / "merged")
    consensus(capsys, whole, part, "--allow-missing", "--out", tmp_path / "merged")
    found, first, second = (deltas(folder) for folder in (tmp_path / "merged", whole, part))
    for name, delta in found.items():
        assert relative_error(delta, (first[name] + second.get(name, torch.zeros_like(delta))) / 2) < 1e-6, name


def test_copies_of_one_base_are_merged_when_it_is_named(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = Path(shutil.copytree(base, tmp_path / "copy"))
    a, b = peft_lora(base, tmp_path / "a", 1, r=2), peft_lora(copy, tmp_path / "b", 2, r=2)
    refused(capsys, "--base MODEL", a, b, "--out", tmp_path / "merged")
    result = consensus(capsys, a, b, "--base", copy, "--out", tmp_path / "merged")
    config = json.loads((tmp_path / "merged" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(copy) and result["certificate"]["passed"]


def test_code_that_comes_with_a_base_is_run_on_request_alone(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only the form of the base's files is asked for."""
    import sora_llm.commands.sources as sources

    plain, trusted = sources.spec_from_files, []

    def seen(spec: Any) -> Any:
        trusted.append(spec.trust_remote_code)
        return plain(spec)

    monkeypatch.setattr(sources, "spec_from_files", seen)
    a = peft_lora(base, tmp_path / "a", 1, r=2)
    for number, flags in enumerate([(), ("--trust-remote-code",)]):
        consensus(capsys, a, a, *flags, "--out", tmp_path / f"merged-{number}")
    assert trusted == [False, True]


def test_an_adapter_of_another_shape_is_refused_before_the_base_is_loaded(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import sora_llm.commands.cmd_consensus as command

    monkeypatch.setattr(command, "load_backbone", lambda *_: pytest.fail("the base was loaded"))
    a = peft_lora(base, tmp_path / "a", 1, r=2)
    tensors = load_file(a / "adapter_model.safetensors")
    key = next(key for key in tensors if key.endswith("down_proj.lora_A.weight"))
    tensors[key] = tensors[key][:, :-1].contiguous()
    b = Path(shutil.copytree(a, tmp_path / "b"))
    save_file(tensors, b / "adapter_model.safetensors")
    refused(capsys, "an adapter for another base", a, b, "--out", tmp_path / "merged")


def test_sources_trained_beside_other_numbers_are_named(
    undisturbed: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = undisturbed[1]
    folder = tmp_path / "step"
    with of_another_config(run_dir, folder) as config:
        config["quantization"]["load_in_4bit"] = True
    result = consensus(capsys, run_dir, folder, "--out", tmp_path / "merged")
    assert (result["base_form"], result["of_other_base_forms"]) == ("float32", [str(folder)])
    assert "was trained on another form of it" in (tmp_path / "merged" / "README.md").read_text()
    assert consensus(capsys, run_dir, run_dir, "--out", tmp_path / "same")["of_other_base_forms"] == []


@pytest.mark.parametrize(
    ("separators", "shared", "said"),
    [
        ({"a": "\n", "b": "\n"}, "\n", ""),
        ({"a": "\n", "b": ""}, None, "the separators after prompts differ (a '\\n', b '')"),
        ({"a": "\n", "b": None}, None, "the separators after prompts differ (a '\\n', b none known)"),
        ({"a": None, "b": None}, None, ""),
    ],
)
def test_a_separator_is_certified_if_all_sources_had_it(separators, shared, said) -> None:
    result = {"separators": separators, "chat_template_of": None, "other_chat_templates": [], "of_other_base_forms": []}
    assert cmd_consensus.shared_separator(result) == shared
    assert said in " ".join(cmd_consensus._warnings(result)) and (said or not cmd_consensus._warnings(result))
