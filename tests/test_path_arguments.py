"""What a path names is the same for every command: the run's adapter is the run's, by whichever path it is reached."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from peft_loras import peft_lora
from run_dirs import run_dir

from sora_llm.backbone import load_model_config
from sora_llm.base_spec import BackboneSpec
from sora_llm.commands.model_ref import resolve_model, with_base_options
from sora_llm.commands.path_arguments import resolve_path
from sora_llm.commands.sources import base_of, is_one_base, read_source
from sora_llm.errors import UserError
from sora_llm.files import file_sha256


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run with an adapter and a stage whose files name another base than the run does."""
    folder = run_dir(tmp_path / "run", **{"model.trust_remote_code": True})
    lora = peft_lora(Path("/some/base"), tmp_path / "lora", 1, r=2)
    shutil.copytree(lora, folder / "adapter")
    shutil.copytree(lora, folder / "path" / "0.5")
    return folder


@pytest.mark.parametrize("inside", ["", "adapter", "path/0.5", "path/../adapter"])
def test_the_adapter_of_a_run_is_the_runs_for_every_command(run, stories, inside):
    source, ref = read_source(run / inside), resolve_model(str(run / inside))
    assert source.config is not None and source.config == ref.config
    assert source.base == str(stories) and source.spec == ref.spec
    assert source.folder == ref.adapter and source.folder.samefile(run / (inside or "adapter"))
    assert resolve_path(run / inside).stage == ("0.5" if "0.5" in inside else None)


def test_a_lora_elsewhere_or_beside_a_config_of_something_else_is_nobodys(run, tmp_path):
    (tmp_path / "project").mkdir()
    (tmp_path / "project" / "config.yaml").write_text("port: 8080\n")
    other = shutil.copytree(run / "adapter", tmp_path / "project" / "adapter")
    for folder in (other, tmp_path / "lora"):
        source, ref = read_source(folder), resolve_model(str(folder))
        assert source.config is ref.config is None
        assert source.base == ref.spec.name_or_path == "/some/base"


def test_a_run_with_relative_paths_is_the_same_from_another_folder(stories, tmp_path, monkeypatch):
    """Its base was looked for on the hub, under the name of a local folder."""
    start, elsewhere = tmp_path / "start", tmp_path / "elsewhere"
    (start / "models").mkdir(parents=True)
    (elsewhere / "data").mkdir(parents=True)
    (start / "models" / "base").symlink_to(stories)
    for name in ("a.jsonl", "b.jsonl"):
        (start / name).write_text("{}\n")
    paths = [{"path": path, "type": "completion"} for path in ("a.jsonl", "[ab].jsonl", "owner/name")]
    (start / "mistral").mkdir()  # which the name of a built-in template is not
    options = {"model.name_or_path": "models/base", "data.datasets": paths, "model.adapter": "~nobody/nowhere"}
    options["data.chat_template"] = "mistral"
    run = run_dir(start / "outputs/run", **options)
    (run / "config.yaml").write_text((run / "config.yaml").read_text().replace(str(run), "outputs/run"))
    monkeypatch.chdir(start)
    there = resolve_path("outputs/run").config
    assert there is not None and there.model.name_or_path == "models/base"
    monkeypatch.chdir(elsewhere)
    found = resolve_path(start / "outputs/run").config
    assert found is not None and found.model.name_or_path == str(start / "models/base")
    assert found.model.adapter == "~nobody/nowhere", "which does not exist either"
    assert found.data.chat_template == "mistral"
    expected = [str(start / "a.jsonl"), str(start / "[ab].jsonl"), "owner/name"]
    assert [dataset.path for dataset in found.data.datasets] == expected
    (elsewhere / "link").symlink_to(start / "outputs/run")
    linked = resolve_path(elsewhere / "link").config
    assert linked is not None and linked.data == found.data and linked.model == found.model
    (elsewhere / "a.jsonl").write_text("{}\n")
    found = resolve_path(start / "outputs/run").config
    assert found is not None and found.data.datasets[0].path == "a.jsonl", "what is here is meant"
    moved = (start / "outputs/run").rename(tmp_path / "moved")
    found = resolve_path(moved).config
    assert found is not None and found.model.name_or_path == "models/base", "nothing says where it was started"


def test_an_adapter_s_certificate_says_how_its_base_was_loaded(tmp_path, stories):
    """So that it is asked and exported again beside the numbers that it was trained beside; no certificate, no word."""
    folder = peft_lora(Path("/some/base"), tmp_path / "lora", 1, r=2)
    config = folder / "adapter_config.json"
    config.write_text(config.read_text().replace("/some/base", str(stories)))
    spec_from_files = BackboneSpec(str(stories), dtype="float32")
    trained = replace(spec_from_files, dtype="bfloat16", load_in_4bit=True, compute_dtype="float32")
    for said, expected in (
        (trained.loading, trained),
        ({**trained.loading, "dtype": "int3"}, spec_from_files),
        ({**trained.loading, "dtype": "uint8"}, spec_from_files),
        ({**trained.loading, "dtype": ["bfloat16"]}, spec_from_files),
        ({**trained.loading, "bnb_4bit_quant_type": {}}, spec_from_files),
        ({"dtype": "float16"}, spec_from_files),
        (None, spec_from_files),
    ):
        weights = file_sha256(folder / "adapter_model.safetensors")
        certificate = {"layout": "padded", "modules": {}, "sha256": weights, "base_loading": said}
        (folder / "certificate.json").write_text(json.dumps(certificate))
        assert with_base_options(resolve_model(str(folder)), None, False, False).spec == expected
        assert base_of([read_source(folder)], None, False) == expected


def test_a_config_is_of_its_output_dir_whatever_adapter_lies_beside_it(run, tmp_path):
    project = tmp_path / "project"
    project.mkdir()
    shutil.copytree(tmp_path / "lora", project / "adapter")
    for name in ("my.yaml", "config.yaml"):
        file = Path(shutil.copyfile(run / "config.yaml", project / name))
        assert resolve_path(file, [f"output.output_dir={tmp_path / 'new'}"]).adapter is None
        assert resolve_path(file).adapter == run / "adapter"
    shutil.copyfile(run / "config.yaml", run / "next.yaml")
    assert resolve_path(run / "next.yaml", [f"output.output_dir={tmp_path / 'new'}"]).adapter is None
    moved = Path(shutil.move(run, tmp_path / "moved"))
    assert resolve_path(moved / "config.yaml").run_dir == moved == resolve_path(moved).run_dir


def test_a_link_to_an_adapter_is_the_runs_in_whose_directory_it_lies(run, stories):
    shutil.move(run / "adapter", run.parent / "moved")
    (run / "adapter").symlink_to(run.parent / "moved")
    assert read_source(run / "adapter").base == str(stories)
    assert read_source(run.parent / "moved").base == "/some/base"


def test_a_folder_does_not_consent_to_running_code_and_the_command_line_does(run):
    def consents(path: Path, *overrides: str, flag: bool = False) -> bool:
        ref = with_base_options(resolve_model(str(path), overrides), None, False, flag)
        assert overrides or ref.spec == base_of([read_source(path)], None, flag)
        return ref.spec.trust_remote_code

    assert not consents(run) and not consents(run / "adapter")
    assert not consents(run, "data.cache_dir=trust_remote_code"), "that word elsewhere is no consent"
    assert consents(run, flag=True) and consents(run / "adapter", "model.trust_remote_code=true")
    assert consents(run / "config.yaml"), "a config that is named says what its owner wants, as in training"


def test_a_base_that_comes_with_code_is_refused_with_the_word_that_runs_it(stories, tmp_path):
    base = shutil.copytree(stories, tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    own = {"auto_map": {"AutoConfig": "mine.Config"}, "model_type": "mine"}
    (base / "config.json").write_text(json.dumps(config | own))
    (base / "mine.py").write_text("raise SystemExit('the code ran')\n")
    with pytest.raises(UserError, match=r"comes with its own Python code.*--trust-remote-code"):
        load_model_config(BackboneSpec(str(base)))


def test_bases_are_one_by_place_or_by_revision():
    def one(first: tuple[str, str | None], second: tuple[str, str | None]) -> bool:
        return is_one_base(BackboneSpec(*first), BackboneSpec(*second))

    assert one(("a/b", None), ("a/b", "main")) and one(("/tmp", None), ("/tmp/../tmp", None))
    assert not one(("a/b", None), ("a/b", "v2")) and not one(("a/b", None), ("a/c", None))


def test_what_is_nothing_is_said_in_the_same_words(run, tmp_path):
    shutil.rmtree(run / "adapter")
    assert resolve_model(str(run)).adapter is None, "a base alone can be asked"
    for path, said in (
        (run, "has no adapter yet"),
        (tmp_path / "no", "does not exist"),
        (tmp_path, "is not a run directory"),
    ):
        with pytest.raises(UserError, match=said):
            read_source(path)
