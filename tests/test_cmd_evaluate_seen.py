"""Whether an adapter, or what it started from, has seen the rows that `sora-llm evaluate` measures it on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from evaluating import COLUMNS, FORM, NUMBERS, evaluated, numbers_run
from evaluating import rows as rows
from peft_loras import lora as lora
from run_dirs import run_dir

from sora_llm import cli


def test_other_rows_in_the_file_that_dev_rows_were_held_out_of_are_said(lora, rows, tmp_path, capsys):
    """Others are held out then, and the adapter may have seen them."""
    changed = tmp_path / "rows.jsonl"
    changed.write_text(rows.read_text() * 4)
    dataset = {"path": str(changed), "type": "prompt_completion", "columns": {"prompt": "q", "completion": "a"}}
    directory = run_dir(tmp_path / "run", **{"data.datasets": [dataset], "data.val_set_size": 3})
    shutil.copytree(lora, directory / "adapter")
    said = "the rows of data.datasets are not those that"
    assert cli.main(["preprocess", str(directory / "config.yaml"), "--json"]) == 0
    (directory / "data_report.json").write_text(capsys.readouterr().out)
    assert cli.main(["evaluate", str(directory)]) == 0 and said not in capsys.readouterr().err
    changed.write_text(rows.read_text() * 5)
    moved = directory.rename(tmp_path / "moved")
    assert cli.main(["evaluate", str(moved)]) == 0 and f"{said} {moved} was trained on" in capsys.readouterr().err
    (moved / "status.json").write_text("{}")
    alike = Path(shutil.copytree(moved, tmp_path / "alike"))
    for options, is_said in ((["--adapter", str(alike)], True), (["--no-adapter"], False)):
        assert cli.main(["evaluate", str(moved), *options]) == 0
        assert (said in capsys.readouterr().err) == is_said, options


def test_other_rows_in_the_file_of_the_dev_rows_are_said(lora, rows, tmp_path, capsys):
    """Their loss is not to be compared with those of the training."""
    form = {"type": "prompt_completion", "columns": {"prompt": "q", "completion": "a"}}
    dev, train = ({"path": str(tmp_path / name), **form} for name in ("dev.jsonl", "train.jsonl"))
    for dataset in (dev, train):
        Path(dataset["path"]).write_text(rows.read_text())
    options = {"data.datasets": [train], "data.val_datasets": [dev], "data.val_set_size": None}
    directory = run_dir(tmp_path / "run", **options)
    shutil.copytree(lora, directory / "adapter")
    assert cli.main(["preprocess", str(directory / "config.yaml"), "--json"]) == 0
    (directory / "data_report.json").write_text(capsys.readouterr().out)
    assert cli.main(["evaluate", str(directory)]) == 0 and capsys.readouterr().err == ""
    Path(dev["path"]).write_text(rows.read_text() * 2)
    assert cli.main(["evaluate", str(directory)]) == 0
    assert f"the rows of data.val_datasets are not those that {directory} was evaluated on" in capsys.readouterr().err
    assert cli.main(["evaluate", str(directory), "--data", str(rows)]) == 0 and capsys.readouterr().err == ""


def test_under_other_options_those_rows_are_measured_that_the_run_held_out(lora, tmp_path, capsys):
    """Any that others would hold out it may have been trained on."""
    run = numbers_run(tmp_path, lora)
    own = evaluated(capsys, run)
    assert own["rows"] == 4 and own["not_as_written"] == []
    for option in ("train.seed=7", "data.val_set_size=6", "data.train_on_inputs=true"):
        assert cli.main(["evaluate", str(run), option, "--json"]) == 0
        output = capsys.readouterr()
        found = json.loads(output.out)
        assert found["rows"] == 4, option
        assert (found["adapter"]["loss"] == own["adapter"]["loss"]) == (option != "data.train_on_inputs=true")
        assert (f"evaluating the rows that {run} held out" in output.err) == (option != "data.train_on_inputs=true")
    shorter = evaluated(capsys, run, "data.sequence_len=28")
    assert shorter["rows"] == 2 and shorter["not_as_written"] == ["left out 2 that were held out"]
    other = {"path": str(tmp_path / "other.jsonl"), "type": "prompt_completion"}
    (tmp_path / "other.jsonl").write_text(
        "".join(json.dumps({"prompt": f"{text} is", "completion": text}) + "\n" for text in NUMBERS)
    )
    assert cli.main(["evaluate", str(run), f"data.datasets=[{json.dumps(other)}]"]) == 0
    assert f"warning: {run} did not hold these rows out" in capsys.readouterr().err


def test_an_adapter_that_may_have_seen_the_rows_is_said(lora, tmp_path, capsys):
    run = numbers_run(tmp_path, lora)
    alike, all_rows = (numbers_run(tmp_path, lora, name) for name in ("alike", "all"))
    (all_rows / "config.yaml").write_text(
        (all_rows / "config.yaml").read_text().replace("val_set_size: 4", "val_set_size: null")
    )

    def warning(*arguments: object) -> str:
        assert cli.main(["evaluate", *map(str, arguments)]) == 0
        return capsys.readouterr().err

    assert warning(run) == "" and warning(run, "--adapter", alike) == "" and warning(run, "--no-adapter") == ""
    said = f"warning: {all_rows} was also trained on {tmp_path / 'numbers.jsonl'},"
    assert said in warning(run, "--adapter", all_rows)
    assert said in warning(run, "--adapter", all_rows, "train.seed=7")
    pattern = {"path": str(tmp_path / "number?.jsonl"), "split": "train", "type": "prompt_completion"}
    found = warning(run, "--adapter", all_rows, f"data.datasets=[{json.dumps({**pattern, 'columns': COLUMNS})}]")
    assert f"warning: {all_rows} was also trained on {pattern['path']}," in found
    (tmp_path / "copy.jsonl").write_text((tmp_path / "numbers.jsonl").read_text())
    elsewhere = {"path": str(tmp_path / "copy.jsonl"), "type": "prompt_completion", "columns": COLUMNS}
    told = f"data.datasets=[{json.dumps(elsewhere)}]"
    assert f"{run} did not hold these rows out" in warning(run, told), "its own adapter is measured on them"
    assert warning(run, told, "--no-adapter") == "" and warning(run, told, "--adapter", alike) == ""
    other = numbers_run(tmp_path, lora, "other", **{"data.datasets": [elsewhere], "data.val_set_size": None})
    assert f"warning: {other} was also trained on {elsewhere['path']}," in warning(run, told, "--adapter", other)
    seen = ["--data", tmp_path / "numbers.jsonl"]
    assert f"warning: {run} was also trained on" in warning(run, *seen) and warning(run, *seen, "--no-adapter") == ""
    (tmp_path / "others.jsonl").write_text((tmp_path / "numbers.jsonl").read_text())
    assert warning(run, "--data", tmp_path / "others.jsonl", "--adapter", all_rows) == ""
    quantised = numbers_run(tmp_path, lora, "quantised", **{"quantization.load_in_4bit": True})
    assert "on the base as " in warning(run, "--adapter", quantised)


def test_what_an_adapter_was_before_it_was_trained_on_may_have_seen_the_rows_too(lora, tmp_path, capsys):
    """The adapter that a run started from, the one that that started from, and what was exported or merged of them."""
    run = numbers_run(tmp_path, lora)
    data = {"path": str(tmp_path / "numbers.jsonl"), "type": "prompt_completion", "columns": COLUMNS}
    others = {**data, "path": str(tmp_path / "others.jsonl")}
    (tmp_path / "others.jsonl").write_text((tmp_path / "numbers.jsonl").read_text())

    def warning(place: Path, *options: object) -> bool:
        assert cli.main(["evaluate", str(place), *map(str, options)]) == 0
        return f"warning: {place} was also trained on {data['path']}," in capsys.readouterr().err

    alike = numbers_run(tmp_path, lora, "alike", **{"model.adapter": str(run / "adapter")})
    assert not warning(alike), "the same rows were held out both times"
    again = numbers_run(tmp_path, lora, "again", **{"model.adapter": str(run / "adapter"), "train.seed": 7})
    assert warning(again) and not warning(again, "--no-adapter")
    options = {"model.adapter": str(alike / "adapter"), "data.datasets": [others], "data.val_set_size": None}
    grandchild = numbers_run(tmp_path, lora, "grandchild", **options)
    measured = ("--data", data["path"])
    assert warning(grandchild, *measured)
    for layout in ("ragged", "merged"):
        out = tmp_path / layout
        assert cli.main(["export", str(grandchild), "--out", str(out), "--layout", layout]) == 0
        named = [{"path": one["path"], "type": one["type"]} for one in (others, data)]
        assert json.loads((out / "certificate.json").read_text())["data"] == named
        assert f"* {others['path']}\n* {data['path']}\n" in (out / "README.md").read_text()
    shutil.rmtree(grandchild)
    for place in ("ragged", "merged"):
        more = ("--type", "prompt_completion", "--column", "prompt=q", "--column", "completion=a")
        assert warning(tmp_path / place, *measured, *more), place
        (tmp_path / "copy.jsonl").write_text((tmp_path / "numbers.jsonl").read_text())
        assert not warning(tmp_path / place, "--data", tmp_path / "copy.jsonl", *more), place
    run_config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(run_config.replace("adapter: null", f"adapter: {alike / 'adapter'}"))
    assert not warning(alike), "each started from what the other one is now"


def test_what_is_gone_is_remembered_by_certificates_and_what_was_merged_into_a_base_counts_too(
    stories, lora, tmp_path, capsys
):
    run = numbers_run(tmp_path, lora)
    data = {"path": str(tmp_path / "numbers.jsonl"), "type": "prompt_completion", "columns": COLUMNS}
    others = {**data, "path": str(tmp_path / "others.jsonl")}
    (tmp_path / "others.jsonl").write_text((tmp_path / "numbers.jsonl").read_text())
    form = ("--type", "prompt_completion", "--column", "prompt=q", "--column", "completion=a")

    def warning(place: Path, *options: object) -> bool:
        assert cli.main(["evaluate", str(place), *map(str, options)]) == 0
        return "numbers.jsonl, so it may have seen" in capsys.readouterr().err

    options = {"model.adapter": str(run / "adapter"), "data.datasets": [others], "data.val_set_size": None}
    child = numbers_run(tmp_path, lora, "child", **options)
    assert cli.main(["export", str(child), "--out", str(tmp_path / "out")]) == 0
    shutil.rmtree(child / "adapter")
    shutil.copytree(tmp_path / "out", child / "adapter")
    shutil.rmtree(run)
    assert warning(child, "--data", data["path"]), "by its own certificate"
    alike = numbers_run(tmp_path, lora, "alike")
    shutil.rmtree(alike / "adapter")
    shutil.copytree(child / "adapter", alike / "adapter")
    own = json.loads((alike / "adapter" / "certificate.json").read_text())
    own["data"] = [one for one in own["data"] if "numbers" in one["path"]]
    (alike / "adapter" / "certificate.json").write_text(json.dumps(own))
    assert not warning(alike), "of its own data set it held these rows out"
    later = numbers_run(tmp_path, lora, "later", **{**options, "model.adapter": str(alike / "adapter")})
    claims = [{"path": one["path"], "type": one["type"]} for one in (others, data)]
    (later / "adapter" / "certificate.json").write_text(json.dumps({"data": claims}))
    again = numbers_run(tmp_path, lora, "again", **{"model.adapter": str(later / "adapter")})
    assert not warning(alike, "--adapter", later) and not warning(again), "it is known that each held these rows out"
    weighted = numbers_run(tmp_path, lora, "weighted", **{"data.datasets": [{**data, "weight": 1.0}]})
    assert not warning(alike, "--adapter", weighted), "a weight decides how often a row is trained on"
    elsewhere = numbers_run(tmp_path, lora, "elsewhere", **{"model.name_or_path": "~nobody/base"})
    assert not warning(elsewhere, "--base", stories), "a home that is nobody's here"
    merged = tmp_path / "merged"
    assert cli.main(["export", str(alike), "--out", str(merged), "--layout", "merged"]) == 0
    beside = numbers_run(tmp_path, lora, "beside", **{"model.name_or_path": str(merged), "data.datasets": [others]})
    assert warning(beside, "--data", data["path"]) and warning(merged, "--data", data["path"], *form)
    assert cli.main(["evaluate", str(beside)]) == 0 and "may have seen" not in capsys.readouterr().err
    assert cli.main(["export", str(beside), "--out", str(tmp_path / "beside-out")]) == 0
    taught = json.loads((tmp_path / "beside-out" / "certificate.json").read_text())["data"]
    assert [one["path"] for one in taught] == [others["path"], data["path"]], "its base's too"


def test_a_chat_template_that_each_run_kept_is_one_if_it_says_the_same(lora, tmp_path, capsys):
    (tmp_path / "form.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"instruction": text, "output": text}) + "\n" for text in NUMBERS))
    options = {
        "data.datasets": [{"path": str(rows), "type": "alpaca"}],
        "data.chat_template": str(tmp_path / "form.jinja"),
    }
    one = numbers_run(tmp_path, lora, "one", **options)
    two = numbers_run(tmp_path, lora, "two", **options, **{"model.adapter": str(one / "adapter")})
    for run in (one, two):
        shutil.copyfile(tmp_path / "form.jinja", run / "chat_template.jinja")

    def warning(*arguments: object) -> str:
        assert cli.main(["evaluate", *map(str, arguments)]) == 0
        return capsys.readouterr().err

    assert warning(two) == "" and warning(one, "--adapter", two) == ""
    (one / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }} {{ eos_token }}{% endfor %}")
    assert "may have seen" in warning(two), "other rows may have been too long under it"


def test_a_run_of_another_version_where_a_config_goes_hides_only_what_it_was_trained_on(lora, tmp_path, capsys):
    run = numbers_run(tmp_path, lora)
    own = tmp_path / "my.yaml"
    own.write_text((run / "config.yaml").read_text())
    expected = evaluated(capsys, own)
    (run / "config.yaml").write_text(own.read_text() + "of_another_version: 1\n")
    assert cli.main(["evaluate", str(own), "--json"]) == 0
    output = capsys.readouterr()
    assert json.loads(output.out)["adapter"] == expected["adapter"]
    assert output.err.count("unknown which rows") == 1 and "of_another_version" in output.err
    assert cli.main(["generate", str(own), "--prompt", "Count", "--max-new-tokens", "2"]) == 0
    assert "of_another_version" not in capsys.readouterr().err


@pytest.mark.parametrize(
    "data",
    [
        [{"path": "/**/*.jsonl", "type": ["alpaca"]}],
        [{"path": "\ud800.jsonl", "type": "alpaca"}],
        [{"path": "a\0b.jsonl", "type": "alpaca"}, {"path": "a\n# b", "type": "alpaca"}],
        [{"path": "a" * 5000, "type": "alpaca"}],
        [{"path": "~nobody/x.jsonl", "type": "alpaca"}],
        [{"path": "{rows}", "type": "alpaca", "split": 3}],
        [{"path": "{rows}", "type": "prompt_completion", "separator": 3}],
        [None, 3, {"path": 3, "type": "alpaca"}, {"type": "alpaca"}, {"path": "x"}, {"path": "x", "type": "y"}],
        {"path": "x"},
    ],
)
def test_a_certificate_that_claims_nonsense_is_not_listened_to(data, lora, rows, tmp_path, capsys):
    adapter = Path(shutil.copytree(lora, tmp_path / "lora"))
    (adapter / "certificate.json").write_text(json.dumps({"data": data}).replace("{rows}", str(rows)))
    assert cli.main(["evaluate", str(adapter), "--data", str(rows), *FORM]) == 0
    assert "warning" not in capsys.readouterr().err
    out = tmp_path / "out"
    assert cli.main(["export", str(adapter), "--out", str(out)]) == 0
    passed_on = json.loads((out / "certificate.json").read_text()).get("data", [])
    assert all(one["path"].isprintable() and one["type"] == "alpaca" for one in passed_on), "what is text alone"
    assert "# b" not in (out / "README.md").read_text()


@pytest.mark.parametrize(
    ("claim", "is_meant"),
    [
        ("{folder}", True),
        ("{folder}/rows.jsonl", True),
        ("{folder}/*.jsonl", True),
        ("/**/*.jsonl", True),
        ("/etc", False),
    ],
)
def test_a_claim_is_compared_and_never_looked_for(claim, is_meant, lora, rows, tmp_path, capsys, monkeypatch):
    adapter = Path(shutil.copytree(lora, tmp_path / "lora"))
    named = {"path": claim.format(folder=rows.parent), "type": "alpaca"}
    (adapter / "certificate.json").write_text(json.dumps({"data": [named]}))
    listed: list[str] = []
    monkeypatch.setattr("glob.glob", lambda pattern, **_: listed.append(pattern) or [])
    assert cli.main(["evaluate", str(adapter), "--data", str(rows), *FORM]) == 0
    assert ("may have seen rows" in capsys.readouterr().err) == is_meant and not listed
