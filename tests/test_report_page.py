"""report.html: what the files say is on the page, whatever state they are in, and a browser has nothing to complain."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_dirs import FULL_RANK, MadeUpRun, data_report

from sora_llm.report_page import read_record, write_report
from sora_llm.report_page.charts import (
    Chart,
    Panel,
    Series,
    colour_of,
    is_dark,
    lambda_chart,
    smooth,
    thin,
    tick_labels,
    ticks,
)
from sora_llm.report_page.grids import grids_of, split_name
from sora_llm.report_page.reading import _MAX_RANK_LINES
from sora_llm.report_page.svg import chart_svg
from sora_llm.running.rundir import RunDirectory

VOID = {"meta", "br", "hr", "img", "link", "input"}
REFERENCES = {"src", "href", "xlink:href", "srcset", "action", "data", "poster", "background"}
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """A page taken apart; every tag must be closed by its own end tag, and nothing may lie elsewhere."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.words: list[str] = []
        self.cells: dict[str, str] = {}
        """Of the heat map: "module: rank N" → what its cell says."""
        self._title: str | None = None
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attributes = {name: value or "" for name, value in attrs}
        self.tags.append((tag, attributes))
        if tag not in VOID and not self.get_starttag_text().endswith("/>"):
            self.open.append(tag)
        self._title = attributes.get("title") if tag == "td" else None

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data):
        if "style" not in self.open:
            self.words.append(data)
        if self._title:
            self.cells[self._title] = data

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def opened(run_dir: Path, config: dict | None = None) -> Page:
    """The page of a run directory; it holds no script and no reference to anything outside."""
    text = write_report(run_dir, config).read_text(encoding="utf-8")
    page = Page(text)
    for tag, attributes in page.tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base", "form")
        assert not any(name.startswith("on") for name in attributes), attributes
        for name in REFERENCES & attributes.keys():
            assert attributes[name].startswith(("data:image/png;base64,", "#")), attributes
    style = text[text.index("<style>") : text.index("</style>")]
    assert "url(" not in style and "@import" not in style and "http" not in style
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    return page


# ----- what is on it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_layers", [1, 2, 32, 80])
def test_the_heat_map_shows_the_last_rank_of_every_module(tmp_path, num_layers):
    run = MadeUpRun(tmp_path / "run", num_layers).train()
    page = opened(run.finish())
    ranks = run.rank_lines[-1]["ranks"]
    assert page.cells == {f"{name}: rank {rank}": str(rank) for name, rank in ranks.items()}
    classes = {a["title"]: a["class"] for tag, a in page.tags if tag == "td" and "title" in a}
    zeros = {f"{name}: rank 0" for name, rank in ranks.items() if rank == 0}
    assert zeros and {title for title, style in classes.items() if style == "zero"} == zeros
    assert f"{7 * num_layers:,} modules, ranks 0 to 16, {len(zeros):,} at rank 0" in page.text
    layers = [words for words in page.words if words.isdigit()]
    assert str(num_layers - 1) in layers


def test_the_step_of_the_adapter_is_named_where_it_is_not_the_last(tmp_path):
    for step, said in ((80, True), (100, False)):
        run = MadeUpRun(tmp_path / str(step)).train()
        run.finish(best_step=step)
        assert ("reloaded from disk 1.5915; the adapter of step 80, the best" in opened(run.path).text) == said


def test_a_finished_run_is_told_in_numbers(tmp_path):
    run = MadeUpRun(tmp_path / "my run").train()
    run.json("data_report.json", data_report())
    run.finish()
    config = {"model": {"name_or_path": "made/up"}, "sora": {"target_rank": 6.0}, "train": {"max_steps": 100}}
    page = opened(run.path, config)
    last = run.metrics[-1]
    for expected in (
        "my run finished",
        "Base model made/up",
        "No alarms.",
        "100 of 100 10 dense, 50 sparsify, 40 finetune",
        f"3.9000 → {last['eval_loss']:.4f} reloaded from disk {last['eval_loss_exported']:.4f}",
        f"16 → {last['mean_rank']:.2f} target 6",
        f"{last['kept_params']:,} {last['kept_params'] / run.full:.1%} of {run.full:,}",
        "passed ΔW to 1.4e-15, logits to 5.6e-03",
        f"train loss {run.metrics[1]['loss']:.4f} {run.metrics[-2]['loss']:.4f}",
        "data/gsm8k_train.jsonl prompt_completion 7,473 7,401 2 70 1,781,936 66.4%",
        "mean 238, median 222, longest 697. Packed into sequences of 1,024, all rows together fill 98.3%",
        "193 – 256 2,232",
        "Dev rows: 73 of the train rows",
        json.loads((run.path / "adapter" / "certificate.json").read_text())["sha256"],
        "strategy zero2",
        "NVIDIA H200",
        "None: this run has one λ or one budget",
    ):
        assert expected in page.text, expected
    speeds = [line["tokens_per_second"] for line in run.metrics if line["phase"] == "finetune"]
    assert f"finetune 40 {sorted(speeds)[3]:,.0f}" in page.text or f"{speeds[-1]:,.0f} 0.4 s 4.10 GiB" in page.text
    assert f"{speeds[-1]:,.0f} 0.4 s 4.10 GiB" in page.text


def test_phases_end_where_the_config_plans_it_also_between_the_lines(tmp_path):
    """Lines every 10 steps, phases that end after 15 and 45: the run of the demo; and a run with one line."""
    run = MadeUpRun(tmp_path / "run").train(dense=0.15, consensus=0.45)
    config = {"sora": {"dense_ratio": 0.15, "consensus_at": 0.45}, "train": {"max_steps": 100}}
    assert "100 of 100 15 dense, 30 sparsify, 55 finetune" in opened(run.finish(), config).text
    run.metrics = [line for line in run.metrics if line["step"] == 100]
    assert "100 of 100 15 dense, 30 sparsify, 55 finetune" in opened(run.finish(), config).text
    epochs = config | {"train": {"max_steps": None, "num_train_epochs": 3.0}}
    assert "100 of 100 15 dense, 30 sparsify, 55 finetune" in opened(run.finish(), epochs).text
    patient = epochs | {"evaluation": {"early_stopping_patience": 2}}
    assert "100 of 100 100 finetune" in opened(run.finish(), patient).text, "its end may not be the planned one"
    other = config | {"sora": {"dense_ratio": 0.15, "consensus_at": 1.0}}
    assert "100 of 100 100 finetune" in opened(run.finish(), other).text, "what a line says itself counts more"


def test_the_first_stage_of_a_path_alone_begins_with_dense_steps(tmp_path):
    """Lines every 10 steps; of the 40 of a stage the first 4 are dense and the last 12 finetune."""
    run = MadeUpRun(tmp_path / "run", steps=40, every=10)
    sora = {"lambda_num": 2, "sparse_lambda": 0.1, "max_lambda": 0.2, "dense_ratio": 0.1, "consensus_at": 0.7}
    path = run.path_of([0.1, 0.2])
    lines = [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line["phase"] = "finetune" if line["step"] % 40 in (30, 0) and line["phase"] == "sparsify" else line["phase"]
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = opened(path, {"sora": sora, "train": {"max_steps": 40}})
    assert "80 of 80 4 dense, 52 sparsify, 24 finetune" in page.text
    page = opened(path, {"sora": sora, "train": {"num_train_epochs": 1.0}})
    assert "80 of 80 40 sparsify, 40 finetune" in page.text, "how long a stage was to be is not known"
    spent = [line for line in lines if line["step"] not in (30, 40) or line["phase"] == "export"]
    for line in spent:
        line["step"] -= 10 if line["step"] >= 40 else 0  # the first stage was cut to nothing after its step 30
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in spent))
    page = opened(path, {"sora": sora, "train": {"max_steps": 40}})
    assert "4 dense, 44 sparsify, 12 finetune" in page.text


def test_a_budget_is_tracked(tmp_path):
    run = MadeUpRun(tmp_path / "run", has_budget=True).train()
    page = opened(run.finish())
    budget = run.metrics[-2]["budget_params"]
    pairs = [(x["step"], x["mean_rank"] - x["target_mean_rank"]) for x in run.metrics if "target_mean_rank" in x]
    step, worst = max(pairs, key=lambda pair: abs(pair[1]))
    assert worst != 0
    assert f"The budget is {budget:,} parameters. {budget:,} are kept, 100.0% of it." in page.text
    last_step, last = pairs[-1]
    said = f"by {last:+.2f} at step {last_step}, the last with both values, and by at most {worst:+.2f}, at step {step}"
    assert said in page.text
    assert "λ and τ over steps" in (run.path / "report.html").read_text(encoding="utf-8")
    for label in ("the schedule's target", "threshold τ", "mean rank − schedule"):
        assert label in page.text


@pytest.mark.parametrize(("key", "symbol"), [("thresholds", "τ"), ("lambdas", "λ")])
def test_every_one_of_several_budgets_has_its_line(key, symbol, tmp_path):
    run = MadeUpRun(tmp_path / "run", has_budget=True).train()
    for line in run.metrics:
        if (threshold := line.pop("threshold", None)) is not None:
            line |= {key: {"self_attn": threshold, "all": 2 * threshold}}
            line.pop("lambda", None)
        elif line["step"]:
            line["lambda"] = 0.0
    panels = lambda_chart(read_record(run.finish())).panels
    assert [panel.y_label for panel in panels] == [symbol], "and none of the phases without pruning alone"
    assert [series.label for series in panels[0].series] == [f"{symbol} of self_attn", f"{symbol} of all"]
    assert all(max(value for _, value in series.points) > 0 for series in panels[0].series)


def test_the_target_of_several_budgets_is_their_sum(tmp_path):
    run = MadeUpRun(tmp_path / "run", has_budget=True).train()
    page = opened(run.finish(), {"sora": {"target_rank": 2.0, "budgets": {"mlp": 6.0}}})
    (budget,) = {line["budget_params"] for line in run.metrics if "budget_params" in line}
    assert f"budgets: {budget:,} parameters" in page.text and "target 2" not in page.text


def test_a_path_shows_its_stages_and_the_best_one(tmp_path):
    run = MadeUpRun(tmp_path / "run", 4, 40, 2)
    lambdas = [0.1, 0.2, 0.3, 0.5, 0.8, 1.0]
    config = {"sora": {"lambda_num": 6, "sparse_lambda": 0.1, "max_lambda": 1.0}, "train": {"max_steps": 40}}
    page = opened(run.path_of(lambdas), config)
    assert "λ 0.1 to 1" in page.text
    exports = [line for line in run.metrics if line["phase"] == "export"]
    for sparse_lambda, line in zip(lambdas, exports, strict=True):
        row = f"path/{sparse_lambda:.6g} {sparse_lambda:g} {line['kept_params']:,} {line['mean_rank']:.2f}".rstrip("0")
        assert row in page.text
        assert f"{line['train_loss']:.4f} {line['eval_loss']:.4f} passed" in page.text
    assert "The dev loss is lowest at λ 0.3." in page.text
    assert re.search(r"path/0.3 [^/]* passed best dev loss", page.text)
    assert re.search(r"path/1 [^/]* passed adapter/", page.text), "adapter/ is the last stage's, known by its digest"
    assert "240 of 240" in page.text


def test_a_run_without_dev_rows_says_so(tmp_path):
    page = opened(MadeUpRun(tmp_path / "run", has_dev=False).train().finish())
    assert "Not measured: this run has no dev rows." in page.text and "dev loss of the exported" not in page.text


def test_alarms_come_first_once_each_with_their_steps(tmp_path):
    alarms = [(20, "All gates die."), (25, "All gates die."), (40, "Loss up by 2.1 after consensus.")]
    page = opened(MadeUpRun(tmp_path / "run").train(alarms=alarms).finish())
    assert page.text.count("All gates die.") == 1
    assert "Alarms All gates die. (steps 20 to 25, 2 times) Loss up by 2.1 after consensus. (step 40)" in page.text
    assert page.text.index("All gates die") < page.text.index("Mean rank")


# ----- whatever state the files are in --------------------------------------------------------------------------------


def test_an_unfinished_run_says_what_is_not_there_yet(tmp_path):
    run = MadeUpRun(tmp_path / "run").train(until=0.3)
    page = opened(run.write("running"), {"train": {"max_steps": 100}})
    assert "run running" in page.text and "30 of 100" in page.text
    assert "not exported yet" in page.text and "Not exported yet." in page.text
    assert "finetune" not in page.text


def test_a_run_in_its_dense_phase_has_no_ranks_yet(tmp_path):
    page = opened(MadeUpRun(tmp_path / "run").train(until=0.1).write("running"))
    assert "No ranks yet: they are logged from the sparsify phase on." in page.text and not page.cells
    assert "mean rank of the adapter" not in page.text or "16 → 16" in page.text


def test_a_failed_run_with_torn_files_shows_its_error_and_what_is_whole(tmp_path):
    run = MadeUpRun(tmp_path / "run").train(until=0.5)
    run.write("failed", error="the loss of process 3 is not finite")
    for name in ("metrics.jsonl", "ranks.jsonl"):
        with (run.path / name).open("ab") as file:
            file.write(b'{"step": 55, "loss": 1.\xff')
    page = opened(run.path)
    assert "The run failed: the loss of process 3 is not finite" in page.text
    assert "metrics.jsonl is truncated" in page.text and "ranks.jsonl is truncated" in page.text
    assert f"{run.metrics[-1]['loss']:.4f}" in page.text
    assert page.cells == {f"{name}: rank {rank}": str(rank) for name, rank in run.rank_lines[-1]["ranks"].items()}


def test_an_adapter_that_did_not_pass_is_an_alarm(tmp_path):
    run = MadeUpRun(tmp_path / "run").train()
    run.finish()
    certificate = json.loads((run.path / "adapter" / "certificate.json").read_text())
    run.json("adapter/certificate.json", certificate | {"passed": False})
    page = opened(run.path)
    assert "The adapter did not pass its self-check." in page.text and "Self-check not passed" in page.text


def test_the_settings_of_the_run_are_on_its_page(tmp_path):
    sora = {"r": 16, "lora_alpha": 32.0, "target_rank": None}
    config = {"sora": sora, "data": {"datasets": [{"path": "<rows>", "type": "alpaca", "split": None}]}}
    page = opened(MadeUpRun(tmp_path / "run").train().finish(), config)
    assert "r: 16, lora_alpha: 32.0" in page.text and "target_rank: " not in page.text
    assert 'datasets: [{"path": "<rows>", "type": "alpaca"}]' in page.text


def test_texts_among_the_settings_are_told_apart_and_bounded(tmp_path):
    config = {"model": {"name_or_path": "/my models/llama", "revision": "a, dtype: b", "dtype": "x" * 1000}}
    page = opened(MadeUpRun(tmp_path / "run").train().finish(), config)
    assert 'name_or_path: /my models/llama, revision: "a, dtype: b", dtype: xxx' in page.text
    assert "x" * 400 + "…" in page.text and "x" * 401 not in page.text


def test_an_empty_folder_makes_a_page(tmp_path):
    page = opened(tmp_path)
    assert "unknown" in page.text and "Nothing is logged yet." in page.text


def test_ranks_of_an_adapter_are_in_its_certificate_too(tmp_path):
    run = MadeUpRun(tmp_path / "run").train()
    run.finish()
    (run.path / "ranks.jsonl").unlink()
    assert len(opened(run.path).cells) == 14


HOSTILE = "<script>alert(1)</script>&amp;\"'$\\frac{$"


def test_what_is_in_the_files_stays_text(tmp_path):
    run = MadeUpRun(tmp_path / "<b>run&").train(alarms=[(10, HOSTILE)])
    run.shapes = {f"model.layers.0.{HOSTILE}": (8, 8), f"head{HOSTILE}": (8, 8)}
    run.keep = dict.fromkeys(run.shapes, 3)
    run.rank_lines.append({"step": 100, "ranks": run.keep})
    run.export(ranks=run.keep)
    run.write("failed", error=HOSTILE, adapter=HOSTILE)
    run.json("data_report.json", data_report(HOSTILE))
    run.json("env.json", {"strategy": HOSTILE, "versions": {HOSTILE: HOSTILE}, "hardware": {"gpus": [HOSTILE]}})
    (run.path / "samples.jsonl").write_text(json.dumps({"prompt": HOSTILE, "base": "\ud800", "adapted": HOSTILE}))
    config = {"model": {"name_or_path": HOSTILE}}
    page = opened(run.path, config)
    assert page.text.count(HOSTILE) >= 10
    assert write_report(run.path, config, plots=True).exists(), "a $ in a name is no formula"


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=6,
)


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_values_of_another_kind_than_expected_stop_nothing(tmp_path, data):
    run = MadeUpRun(tmp_path / "run", 1, 40, 10, has_budget=True).train()
    run.finish()
    report = data_report()
    status = json.loads((run.path / "status.json").read_text())
    certificate = json.loads((run.path / "adapter" / "certificate.json").read_text())
    env = json.loads((run.path / "env.json").read_text())
    trees = [*run.metrics, *run.rank_lines, report, report["train"], report["train"]["datasets"][0], status, env]
    for tree in [*trees, certificate]:
        if data.draw(st.booleans()):
            tree[data.draw(st.sampled_from(sorted(tree)))] = data.draw(ANYTHING)
    for name, lines in (("metrics.jsonl", run.metrics), ("ranks.jsonl", run.rank_lines)):
        (run.path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, tree in (("data_report.json", report), ("status.json", status), ("env.json", env)):
        run.json(name, tree)
    run.json("adapter/certificate.json", certificate)
    opened(run.path, {"sora": data.draw(ANYTHING), "train": {"max_steps": data.draw(ANYTHING)}})


@pytest.mark.parametrize("name", ["metrics.jsonl", "status.json", "ranks.jsonl", "adapter/certificate.json"])
def test_a_file_that_cannot_be_read_is_as_good_as_missing(tmp_path, name):
    run = MadeUpRun(tmp_path / "run").train()
    run.finish()
    (run.path / name).unlink()
    (run.path / name).mkdir()
    opened(run.path)


@pytest.mark.parametrize("content", [b"", b'{"state": "fini', b'{"state": "\xff"}', b"[1]", b"null", b"[" * 100_000])
def test_a_damaged_json_file_is_as_good_as_missing(tmp_path, content):
    run = MadeUpRun(tmp_path / "run").train()
    run.finish()
    for name in (
        "status.json",
        "env.json",
        "data_report.json",
        "adapter/certificate.json",
        "path/0.1/certificate.json",
    ):
        (run.path / name).parent.mkdir(parents=True, exist_ok=True)
        (run.path / name).write_bytes(content)
    page = opened(run.path)
    assert "run unknown" in page.text and len(page.cells) == 14 and "env.json is not there yet" in page.text


def test_steps_and_ranks_that_cannot_be_are_left_out(tmp_path):
    run = MadeUpRun(tmp_path / "run").train(until=0.5)
    for step in (-5, 10**400, True, 60.0, "60", None):
        run.metrics.append({"step": step, "phase": "sparsify", "loss": 777.0})
        run.rank_lines.append({"step": step, "ranks": {"layers.0.q": 7}})
    run.rank_lines.append({"step": 51, "ranks": {"layers.0.q": -1, "layers.1.q": 10**400, "layers.2.q": 5}})
    page = opened(run.write("running", step=51, phase="sparsify"))
    assert "777" not in page.text and page.cells == {"layers.2.q: rank 5": "5"}
    assert "51" in opened(run.write("running", step=10**400, phase="sparsify")).text


def test_a_loss_beyond_what_can_be_drawn_costs_its_point_alone(tmp_path):
    """The range of an axis from -1e308 to 1e308 is infinite."""
    run = MadeUpRun(tmp_path / "run").train()
    for index, line in enumerate(run.metrics):
        if index % 2 and "loss" in line:
            line["loss"] = (-1) ** (index // 2) * 1e308
    run.finish()
    opened(run.path)
    assert write_report(run.path, {}, plots=True).exists()


def test_of_a_large_file_of_ranks_evenly_spread_lines_are_read(tmp_path, monkeypatch):
    run = MadeUpRun(tmp_path / "run", 8, 4000, 1).train(dense=0.0)
    run.write("running")
    everything = run.rank_lines
    assert len(everything) == 2400
    limit = "sora_llm.report_page.reading._MAX_RANK_BYTES"
    monkeypatch.setattr(limit, 1 << 30)
    whole = read_record(run.path)
    monkeypatch.setattr(limit, 1000)
    with (run.path / "ranks.jsonl").open("a") as file:
        file.write('{"step": 9')
    spread = read_record(run.path)
    assert spread.torn == ["ranks.jsonl"] and not whole.torn
    for record in (whole, spread):
        steps = [line.step for line in record.rank_lines]
        assert 0.9 * _MAX_RANK_LINES <= len(steps) <= _MAX_RANK_LINES + 1
        assert steps == sorted(set(steps)) and steps[0] == 1 and steps[-1] == everything[-1]["step"]
        assert max(b - a for a, b in pairwise(steps)) <= 12
        assert record.ranks == everything[-1]["ranks"]


# ----- the browser ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
@pytest.mark.parametrize("kind", ["finished", "path", "hostile", "empty"])
def test_a_browser_opens_it_without_an_error(tmp_path, kind):
    run = MadeUpRun(tmp_path / "run", 4, has_budget=True)
    if kind == "finished":
        run.train().finish()
    elif kind == "path":
        run.path_of([0.1, 0.3, 1.0])
    elif kind == "hostile":
        run.train(alarms=[(10, "<script>console.error(1)</script><img src=x onerror=console.error(2)>")]).finish()
    else:
        shutil.rmtree(run.path)
        run.path.mkdir()
    shown, said = browse(write_report(run.path), tmp_path)
    assert said == [], said
    assert "</html>" in shown and "<h2>Loss</h2>" in shown
    assert ("<svg" in shown) is (kind != "empty")


@pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (apt-get install chromium)")
def test_a_page_that_reaches_out_would_be_noticed(tmp_path):
    page = tmp_path / "run" / "report.html"
    MadeUpRun(tmp_path / "run").train().finish()
    write_report(tmp_path / "run")
    text = page.read_text()
    for addition in ("<script>alert(1)</script>", '<img src="https://example.org/x.png">'):
        page.write_text(text.replace("</body>", f"{addition}</body>"))
        assert browse(page, tmp_path)[1], addition


def browse(page: Path, folder: Path) -> tuple[str, list[str]]:
    """What a headless Chromium makes of a page, and its console's lines."""
    assert CHROMIUM is not None
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0", "--dump-dom"]
    command = [CHROMIUM, *flags, f"--user-data-dir={folder / 'chromium'}", page.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    return done.stdout, [line for line in done.stderr.splitlines() if ":CONSOLE" in line]


# ----- when it is written ---------------------------------------------------------------------------------------------


def begun(path: Path, *, is_main: bool = True) -> RunDirectory:
    directory = RunDirectory(path, is_main=is_main)
    directory.begin(config_yaml="a: 1\n", env={}, total_steps=9)
    return directory


def test_the_main_process_refreshes_the_page(tmp_path):
    directory = begun(tmp_path)
    directory.metrics(4, "dense", {"loss": 1.2345})
    directory.report({"train": {"max_steps": 9}})
    assert "1.2345" in Page((tmp_path / "report.html").read_text()).text
    assert not (tmp_path / "plots").exists()
    directory.metrics(8, "dense", {"loss": 1.1111})
    directory.report({"train": {"max_steps": 9}}, plots=True)
    page = Page((tmp_path / "report.html").read_text())
    assert "8 of 9" in page.text and "1.1111" in page.text
    assert (tmp_path / "plots" / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.rglob("*.tmp"))


def test_other_processes_and_runs_that_have_not_begun_write_no_page(tmp_path):
    (tmp_path / "other").mkdir()
    begun(tmp_path / "other", is_main=False).report({})
    RunDirectory(tmp_path, is_main=True).report({})
    assert not list(tmp_path.rglob("report.html"))


def test_what_the_pointer_is_told_is_of_its_step_or_says_of_which():
    measured = Series("loss", [(1, 2.0), (2, 1.5), (3, 1.0)], 0)
    seldom = Series("parameters", [(1, 221_952.0), (3, 100.0)], 1)
    page = chart_svg(Chart("losses", "step", [Panel("both", [measured, seldom])]), "Losses")
    assert "<title>step 1\nloss 2\nparameters 221,952</title>" in page
    assert "<title>step 2\nloss 1.5\nparameters 221,952 (at 1)</title>" in page


def test_a_page_that_cannot_be_drawn_costs_a_warning(tmp_path, capsys, monkeypatch):
    directory = begun(tmp_path)

    def broken(*arguments, **options):
        raise ZeroDivisionError("no room")

    monkeypatch.setattr("sora_llm.running.rundir.write_report", broken)
    directory.report({})
    assert "warning: report.html is not up to date: ZeroDivisionError: no room" in capsys.readouterr().out


def test_plots_are_drawn_for_all_there_is(tmp_path):
    run = MadeUpRun(tmp_path / "run", 3, 40, 2, has_budget=True).train()
    run.finish()
    write_report(run.path, plots=True)
    names = {path.name for path in (run.path / "plots").iterdir()}
    expected = {"loss", "ranks", "lambda", "rates", "budget", "speed", "heat_map", "ranks_over_time"}
    assert names == {f"{name}.png" for name in expected}


@pytest.mark.parametrize("grows", ["lines", "layers"])
def test_the_work_of_a_page_grows_no_faster_than_the_lines_or_modules_of_its_run(tmp_path, grows):
    """In lines of Python that are run, which no busy machine makes more."""
    sizes = [(4, 100 * 2**k) if grows == "lines" else (2 * 2**k, 100) for k in range(3)]
    work = [lines_run(tmp_path / f"run-{layers}-{lines}", layers, lines) for layers, lines in sizes]
    assert work[2] - work[1] < 2.2 * (work[1] - work[0])


def lines_run(folder: Path, layers: int, lines: int) -> int:
    """How many lines of Python, each as often as it is run, make the page of a run."""
    run = MadeUpRun(folder, layers, lines, 1).train()
    run.finish()
    num_lines, before = 0, sys.gettrace()

    def count(frame, event, _):
        nonlocal num_lines
        num_lines += event == "line"
        return count

    sys.settrace(count)
    try:
        write_report(run.path)
    finally:
        sys.settrace(before)
    return num_lines


def test_it_needs_neither_torch_nor_matplotlib(tmp_path):
    check = (
        "import sys; from pathlib import Path; from sora_llm.report_page import write_report; "
        "write_report(Path(sys.argv[1])); "
        "sys.exit(', '.join({'torch', 'transformers', 'matplotlib', 'numpy'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", check, str(tmp_path)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


# ----- what is drawn --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place"),
    [
        ("model.layers.3.self_attn.q_proj", ("model.layers", 3, "self_attn.q_proj")),
        ("layers.0.mlp.experts.12.up_proj", ("layers", 0, "mlp.experts.12.up_proj")),
        ("transformer.h.11.attn.c_attn", ("transformer.h", 11, "attn.c_attn")),
        ("0.q", ("", 0, "q")),
        ("lm_head", None),
        ("block3.q_proj", None),
    ],
)
def test_module_names_are_split_at_their_layer(name, place):
    assert split_name(name) == place


def test_modules_that_share_their_last_name_keep_their_whole_one(tmp_path):
    run = MadeUpRun(tmp_path / "run").train()
    ranks = {f"layers.0.mlp.experts.{i}.up_proj": i for i in range(3)} | {"layers.0.mlp.gate": 2, "lm_head": 5}
    run.rank_lines.append({"step": 100, "ranks": ranks})
    page = opened(run.write("running"))
    assert "mlp.experts.1.up_proj" in page.text and "Modules outside of layers" in page.text
    assert re.search(r"lm_head 5", page.text)


def test_numbers_on_axes_are_round_and_differ():
    assert ticks(0, 100, 5) == [0, 20, 40, 60, 80, 100]
    assert ticks(0.0013, 0.0048, 4) == pytest.approx([0.002, 0.003, 0.004])
    assert ticks(0, 1, 8, least=1.0) == [0, 1] and ticks(0, 4, 8, least=1.0) == [0, 1, 2, 3, 4]
    assert tick_labels([0, 500, 1000]) == ["0", "500", "1,000"]
    assert tick_labels([0, 500_000, 1_000_000]) == ["0", "0.5M", "1.0M"]
    assert tick_labels([1.45, 1.5, 1.55]) == ["1.45", "1.50", "1.55"]
    assert tick_labels([0.0001, 0.0002]) == ["0.0001", "0.0002"]
    assert tick_labels([0, 2e-5, 4e-5]) == ["0", "2e-5", "4e-5"]


@given(st.floats(-1e12, 1e12), st.floats(1e-9, 1e12))
def test_any_range_gets_a_few_different_labels(low, size):
    values = ticks(low, low + size, 6)
    assert len(values) <= 8 and len(tick_labels(values)) == len(values)


def test_thin_lines_keep_their_ends_and_extremes():
    points = [(float(i), float(i % 7)) for i in range(10_000)]
    points[4321] = (4321.0, 99.0)
    thinned = thin(points, 800)
    assert len(thinned) <= 802 and thinned[0] == points[0] and thinned[-1] == points[-1] and points[4321] in thinned


def test_smoothing_keeps_a_straight_line_away_from_its_ends():
    points = [(float(i), 3.0 * i) for i in range(400)]
    smoothed = smooth(points)
    assert [x for x, _ in smoothed] == [x for x, _ in points]
    assert [y for _, y in smoothed[5:-5]] == pytest.approx([y for _, y in points[5:-5]])


def test_numbers_can_be_read_on_every_colour():
    def luminance(colour):
        parts = [v / 255 / 12.92 if v / 255 <= 0.04045 else ((v / 255 + 0.055) / 1.055) ** 2.4 for v in colour]
        return sum(w * v for w, v in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    levels = [luminance(colour_of(rank, 64)) for rank in range(1, 65)]
    assert levels == sorted(levels), "brighter is higher"
    for rank, level in zip(range(1, 65), levels, strict=True):
        text = 1.0 if is_dark(colour_of(rank, 64)) else 0.0
        contrast = (max(level, text) + 0.05) / (min(level, text) + 0.05)
        assert contrast > 4.5, (rank, contrast)


def test_ranks_above_the_palette_of_a_picture_are_drawn(tmp_path):
    run = MadeUpRun(tmp_path / "run").train()
    run.rank_lines = [{"step": s, "ranks": {"layers.0.q": r, "layers.1.q": 0}} for s, r in ((50, 4096), (100, 300))]
    assert FULL_RANK < 300 and "300" in opened(run.write("running")).text


def test_projections_stand_as_data_meets_them_whatever_the_alphabet_says():
    usual = ("mlp.down_proj", "mlp.gate_proj", "self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj")
    (grid,), others = grids_of({f"model.layers.{layer}.{name}": 1 for layer in (1, 0) for name in usual})
    assert [name.rpartition(".")[2][0] for name in grid.projections] == ["q", "k", "o", "g", "d"] and not others
    assert grid.layers == [0, 1]
    (grid,), _ = grids_of({f"h.0.{name}": 1 for name in ("mlp.c_proj", "attn.q_proj")})
    assert grid.projections == ["mlp.c_proj", "attn.q_proj"], "as they came"
