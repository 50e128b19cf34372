"""`sora-llm evaluate --target-rank 1 2 4`: what an adapter would lose by being smaller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from evaluating import FORM, evaluated
from evaluating import rows as rows
from peft_loras import lora as lora

from sora_llm import cli


def loss_and_size(measured: dict[str, Any]) -> tuple[float, float, int]:
    return measured["loss"], measured["mean_rank"], measured["kept_params"]


def test_a_size_has_the_loss_of_the_adapter_that_is_exported_at_it(stories, lora, rows, tmp_path, capsys):
    data = ["--data", rows, *FORM]
    found = evaluated(capsys, lora, *data, "--target-rank", 1, 0.5, 1, 8)
    assert [cut["target_rank"] for cut in found["cuts"]] == [8, 1, 0.5], "from the largest down, each once"
    whole, *cuts = found["cuts"]
    assert whole["loss"] == pytest.approx(found["adapter"]["loss"], abs=1e-5), "all of it fits"
    assert whole["relative_error"] == 0 and whole["kept_params"] == found["kept_params"]
    assert found["adapter"]["loss"] == pytest.approx(evaluated(capsys, lora, *data)["adapter"]["loss"], abs=1e-5)
    for cut in cuts:
        out = tmp_path / f"cut{cut['target_rank']}"
        arguments = [str(lora), "--out", str(out), "--target-rank", str(cut["target_rank"]), "--json"]
        assert cli.main(["export", *arguments]) == 0
        exported = json.loads(capsys.readouterr().out)
        assert cut["kept_params"] == exported["kept_params"] < found["kept_params"]
        assert cut["relative_error"] == pytest.approx(exported["relative_error"])
        assert cut["loss"] == pytest.approx(evaluated(capsys, out, *data)["adapter"]["loss"], abs=1e-5)
    by_params = evaluated(capsys, lora, *data, "--target-params", cuts[1]["kept_params"])
    assert loss_and_size(by_params["cuts"][0]) == loss_and_size(cuts[1])


def test_the_table_has_a_line_of_each_size(lora, rows, capsys):
    arguments = [str(lora), "--data", str(rows), *FORM, "--target-rank", "0.5", "1"]
    assert cli.main(["evaluate", *arguments]) == 0
    head, names, *lines = capsys.readouterr().out.splitlines()
    assert "3 rows" in head and names.split() == [
        "mean",
        "rank",
        "parameters",
        "error",
        "of",
        "ΔW",
        "loss",
        "perplexity",
    ]
    assert [line.split("  ")[0] for line in lines] == ["base", "adapter", "cut to rank 1", "cut to rank 0.5"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--target-rank", "0"], "--target-rank is 0; it is a mean rank above 0"),
        (["--target-params", "0", "5"], "--target-params is 0; it is a number of parameters above 0"),
        (["--target-params", "5"], "this size keeps nothing: the cheapest rank takes"),
        (["--target-rank", "1", "--target-params", "5"], "not allowed with argument"),
        (["--target-rank", "1", "--no-adapter"], "measure an adapter cut to a size, and there is none here"),
    ],
)
def test_a_size_that_cannot_be_is_a_sentence(lora: Path, rows: Path, capsys, options: list[str], sentence: str) -> None:
    try:
        code = cli.main(["evaluate", str(lora), "--data", str(rows), *FORM, *options])
    except SystemExit as end:
        code = end.code
    assert code == 2 and sentence in capsys.readouterr().err
