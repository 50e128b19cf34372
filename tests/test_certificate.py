"""A certificate reads back what was written, and believes nothing that is not of its type."""

import json
from pathlib import Path
from typing import Any

import pytest

from sora_llm.artifacts.card import Provenance, certificate_of, publish_export
from sora_llm.artifacts.certificate import Certificate
from sora_llm.artifacts.lora_files import by_module, tensor_name
from sora_llm.base_spec import BackboneSpec
from sora_llm.errors import UserError

FACTS = ("layout", "modules", "files", "base_digest", "base_loading", "separator", "data", "sha256")


def test_every_fact_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    spec = BackboneSpec("some/base", dtype="float16", load_in_4bit=True)
    data = [{"path": "rows.jsonl", "type": "alpaca", "split": "train"}]
    provenance = Provenance(separator="\n", base_loading=spec.loading, base_digest="d1", data=data)
    content = certificate_of(provenance, "ragged", {"q": 2, "k": 0}, {"q": 1e-7, "k": 0.0}, "0" * 64, checks={})
    (tmp_path / "new").mkdir()
    publish_export(tmp_path / "new", tmp_path / "out", content, "# card")
    read = Certificate.read(tmp_path / "out")
    assert (read.modules, read.files) == ({"q", "k"}, {"README.md", "certificate.json"})
    assert (read.separator, read.base_digest, read.data, read.is_of_export) == ("\n", "d1", data, True)
    assert BackboneSpec("some/base").loaded_as(read.base_loading) == spec


@pytest.mark.parametrize("value", [None, 7, True, 0.5, [7], [{"path": 7}], {"a": 1}, "text"])
def test_a_fact_of_another_type_is_not_believed(value: Any, tmp_path: Path) -> None:
    (tmp_path / "certificate.json").write_text(json.dumps(dict.fromkeys(FACTS, value)))
    read = Certificate.read(tmp_path)
    assert read.modules == (value.keys() if isinstance(value, dict) else set())
    assert read.files == (set() if isinstance(value, list) else None)
    assert read.base_loading == (value if isinstance(value, dict) else None)
    assert {read.separator, read.base_digest} == {value if isinstance(value, str) else None}
    assert read.data == []


def test_without_a_certificate_nothing_is_known(tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "absent"):
        assert Certificate.read(folder) == Certificate()
    assert not Certificate().is_of_export and Certificate().files is None
    (tmp_path / "certificate.json").write_text("[]")
    with pytest.raises(UserError, match="is damaged"):
        Certificate.read(tmp_path)


def test_factors_are_found_under_the_names_that_they_are_given() -> None:
    names = ("model.layers.0.self_attn.q_proj", "experts.lora_A.weight.1")
    held = {tensor_name(name, kind): (name, kind) for name in names for kind in "AB"}
    assert by_module(held, Path()) == {name: {kind: (name, kind) for kind in "AB"} for name in names}
