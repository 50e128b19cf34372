"""`sora-llm inspect` of several runs: their results beside each other, and what differs in their settings."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from run_dirs import MadeUpRun, inspected

from sora_llm import cli
from sora_llm.config import load_config, to_yaml


def configure(run: MadeUpRun, *overrides: str) -> None:
    """Let it have been a run of configs/llama7b.yaml with these overrides."""
    config = load_config("configs/llama7b.yaml", [f"output.output_dir={run.path}", *overrides])
    (run.path / "config.yaml").write_text(to_yaml(config))


@pytest.fixture
def sweep(tmp_path: Path) -> list[MadeUpRun]:
    """Two finished runs."""
    runs = [MadeUpRun(tmp_path / "sweep" / name, seed=seed).train() for name, seed in (("low", 0), ("high", 1))]
    for run in runs:
        run.finish()
        configure(run)
    return runs


@pytest.fixture
def table(sweep: list[MadeUpRun], capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """What is printed of the two."""
    return lambda *options: inspected(capsys, *(run.path for run in sweep), *options)


def test_several_runs_are_told_beside_each_other_and_nothing_is_written(sweep, table, tmp_path):
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    head, *lines = table().splitlines()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    assert head.split() == ["run", "state", "step", "dev", "loss", "mean", "rank", "kept", "tokens/s", "peak", "GiB"]
    for number, (line, run) in enumerate(zip(lines[:2], sweep, strict=True), 1):
        last = run.metrics[-1]
        assert line.split()[:3] == [str(number), run.path.name, "finished"]
        assert f"3.9000 → {last['eval_loss']:.4f}  " in line and f" {last['kept_params']:,} " in line


def test_settings_that_differ_are_listed_but_for_the_folder(sweep, table):
    for run, rate, modules in zip(sweep, (1e-4, 5e-4), ("all-linear", ["q_proj", "v_proj"]), strict=True):
        configure(run, f"train.learning_rate={rate}", f"sora.target_modules={modules}")
    settings = {line.split()[0]: line.split()[1:] for line in table().splitlines()[5:]}
    assert settings == {
        "train.learning_rate": ["0.0001", "0.0005"],
        "sora.target_modules": ["all-linear", "-"],
        "sora.target_modules.0": ["-", "q_proj"],
        "sora.target_modules.1": ["-", "v_proj"],
    }
    content = json.loads(table("--json"))
    assert [run["run"] for run in content["runs"]] == [str(run.path) for run in sweep]
    assert content["settings"]["train.learning_rate"] == [1e-4, 5e-4]
    assert content["of_other_dev_rows"] == [] and "not of the same rows" not in table()


def test_a_run_differs_in_no_setting_from_itself(sweep, capsys):
    assert "no setting differs" in inspected(capsys, sweep[0].path, sweep[0].path)


def test_dev_losses_of_other_rows_are_told_of(sweep, table):
    configure(sweep[0], "data.val_set_size=9")
    configure(sweep[1], "data.val_set_size=8", "train.seed=7")
    said = "dev losses are not of the same rows or tokens: data.val_set_size, train.seed"
    assert said in table().splitlines()


def test_dev_rows_of_a_file_of_their_own_are_the_same_whatever_is_trained_on(sweep, table):
    for run, number in zip(sweep, (1, 2), strict=True):
        dev = ["data.val_set_size=null", "data.val_datasets=[{path: dev.jsonl}]"]
        rest = [f"train.seed={number}", f"data.datasets.0.path={number}.jsonl", f"data.num_proc={number}"]
        more = ["data.datasets=[{path: a.jsonl}, {path: b.jsonl}]"] * (number - 1)
        configure(run, *dev, *rest, *more)
    shown = table()
    assert "not of the same rows" not in shown
    assert "data.datasets.1.path" in shown and "data.datasets.1.split" not in shown, "neither says one"


def test_losses_for_different_bases_are_told_of_and_shares_of_a_mixture_change_no_row(sweep, table):
    for run, number in zip(sweep, (1, 2), strict=True):
        configure(run, "data.val_set_size=9", f"model.name_or_path=base/{number}", f"data.datasets.0.weight={number}")
    shown = table()
    assert "losses for different bases are over different tokens if their tokenizers differ" in shown.splitlines()
    assert "not of the same rows" not in shown


def test_a_config_that_cannot_be_read_is_not_called_the_same(sweep, table):
    (sweep[1].path / "config.yaml").write_text("of: another version")
    shown = table()
    assert "no setting differs" not in shown and "the config of run 2 cannot be read" in shown


@pytest.mark.parametrize("beside", [[], ["sweep/low"]], ids=["alone", "beside a run"])
def test_what_is_no_run_directory_is_refused_and_left_alone(beside, sweep, tmp_path, capsys):
    somebodys = tmp_path / "somebodys"
    somebodys.mkdir()
    (somebodys / "config.yaml").write_text("a: 1")
    (somebodys / "report.html").write_text("of somebody's")
    assert cli.main(["inspect", *(str(tmp_path / run) for run in beside), str(somebodys)]) == 2
    assert "is not a run directory" in capsys.readouterr().err
    assert (somebodys / "report.html").read_text() == "of somebody's"


def test_plots_are_of_one_run(sweep, capsys):
    assert cli.main(["inspect", *(str(run.path) for run in sweep), "--plots"]) == 2
    assert "name it alone" in capsys.readouterr().err
