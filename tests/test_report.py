"""Lines of JSON, also of a run that was interrupted, and the line of progress."""

from __future__ import annotations

import io
import json

import pytest

from sora_llm.report import JsonLines, Progress, read_json_lines
from sora_llm.terminal import say


def test_fields_without_a_value_are_left_out(tmp_path):
    lines = JsonLines(tmp_path / "m.jsonl", -1)
    lines.write({"step": 1, "loss": float("nan"), "grad_norm": float("inf"), "eval_loss": None, "lambda": 0.0})
    nan = float("nan")
    lines.write({"step": 2, "lambdas": {"mlp": nan, "self_attn": 0.5, "deeper": {"all": nan}}, "several": [nan, 1.0]})
    assert read_json_lines(tmp_path / "m.jsonl") == [
        {"step": 1, "lambda": 0.0},
        {"step": 2, "lambdas": {"self_attn": 0.5, "deeper": {}}, "several": [None, 1.0]},
    ]
    assert "NaN" not in (tmp_path / "m.jsonl").read_text()


def test_a_resumed_file_has_no_step_twice(tmp_path):
    path = tmp_path / "m.jsonl"
    steps = [0, 5, 10, 10, 15]
    path.write_text("".join(json.dumps({"step": s, "nth": n}) + "\n" for n, s in enumerate(steps)) + '{"step": 2')
    lines = JsonLines(path, last_step=10)
    lines.write({"step": 11})
    assert [(line["step"], line.get("nth")) for line in read_json_lines(path)] == [(0, 0), (5, 1), (10, 2), (11, None)]


def test_the_line_of_an_export_stays_where_it_is_not_made_again(tmp_path):
    path = tmp_path / "m.jsonl"
    lines = [{"step": 4, "phase": "sparsify"}, {"step": 4, "phase": "export"}, {"step": 5, "phase": "sparsify"}]
    for exports_again, kept in ((True, lines[:1]), (False, lines[:2])):
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        JsonLines(path, last_step=4, exports_again=exports_again)
        assert read_json_lines(path) == kept


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_one_line_per_step_and_overwrites_only_terminals(terminal):
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    progress = Progress(total_steps=20, first_step=0, stream=stream)
    progress.show({"step": 10, "phase": "dense", "loss": 1.5, "mean_rank": 8.0, "lambda": 0.0})
    progress.show({"step": 20, "phase": "sparsify", "loss": 1.25, "mean_rank": 4.0, "lambda": 0.5})
    text = stream.getvalue()
    assert "step 10/20 dense  0:00 left  loss 1.5000  mean rank 8.00" in text
    assert "step 20/20 sparsify  loss 1.2500  mean rank 4.00  λ 0.5" in text
    assert text.count("λ") == 1, "only where gates are cut"
    assert ("\r" in text) is terminal and text.count("\n") == (1 if terminal else 2)


def test_the_time_left_is_told_without_the_evaluation_before_the_first_step(monkeypatch):
    stream, clock = io.StringIO(), iter((0.0, 600.0, 601.0))  # made; ten minutes later; one second for two steps
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress(total_steps=10, first_step=0, stream=stream)
    progress.show({"step": 0, "phase": "dense", "eval_loss": 5.0})
    progress.show({"step": 2, "phase": "dense", "loss": 4.0})
    assert "step 2/10 dense  0:04 left" in stream.getvalue()


def test_a_message_stands_below_the_line_of_progress(monkeypatch):
    """And that line is no wider than the terminal, so that the next one overwrites the whole of it."""
    stream = io.StringIO()
    stream.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setenv("COLUMNS", "28")
    progress = Progress(total_steps=20, first_step=0, stream=stream)
    for step in (10, 11):
        progress.show({"step": step, "phase": "dense", "loss": 1.5, "mean_rank": 8.0})
    say("consensus: done", stream)
    say("and on", stream)
    shown = stream.getvalue().replace("\r\033[K", "\r").split("\n")
    assert [line.rpartition("\r")[2] for line in shown] == [
        "step 11/20 dense  0:00 left",
        "consensus: done",
        "and on",
        "",
    ]
