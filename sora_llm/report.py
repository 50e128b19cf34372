"""The running output of a run: metrics.jsonl, ranks.jsonl, the progress line."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from pathlib import Path
from typing import Any, TextIO

from sora_llm.files import write_text_atomically
from sora_llm.terminal import end_progress, is_terminal, say, show_progress


class JsonLines:
    """An append-only file of one JSON object per line; every line is on disk when `write` returns."""

    def __init__(self, path: Path, last_step: int, *, exports_again: bool = True, source: Path | None = None):
        """Continue `path` after `last_step`, or the lines of the file `source`.

        Dropped are later lines, a torn last one and, unless `exports_again` is false, the line that an export wrote at
        `last_step` itself, since the export will be repeated.
        """
        self.path = path
        kept: list[str] = []
        has_last = False
        for line in read_json_lines(source or path):
            step = line.get("step")
            again = exports_again and step == last_step and (has_last or line.get("phase") == "export")
            if isinstance(step, int) and step <= last_step and not again:
                has_last |= step == last_step
                kept.append(json.dumps(line) + "\n")
        write_text_atomically(path, "".join(kept))

    def write(self, line: dict[str, Any]) -> dict[str, Any]:
        """Append a line, leaving out fields without a value (None or not finite, which JSON cannot express)."""
        line = {key: _finite(value) for key, value in line.items()}
        line = {key: value for key, value in line.items() if value is not None}
        with self.path.open("a") as file:
            file.write(json.dumps(line, allow_nan=False) + "\n")
            file.flush()
            os.fsync(file.fileno())
        return line


def _finite(value: Any) -> Any:
    """The value without its non-finite entries; None if it is itself non-finite."""
    if isinstance(value, dict):
        found = {key: _finite(inner) for key, inner in value.items()}
        return {key: inner for key, inner in found.items() if inner is not None}
    if isinstance(value, list):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a .jsonl file, [] if it is missing; reading stops at a torn line or one that is not an object."""
    lines: list[dict[str, Any]] = []
    if not path.exists():
        return lines
    for text in path.read_bytes().split(b"\n"):
        try:
            line = json.loads(text)
        except ValueError:
            break
        if not isinstance(line, dict):
            break
        lines.append(line)
    return lines


class Progress:
    """One progress line per logged step: overwritten in place on a terminal, plain lines elsewhere."""

    def __init__(self, total_steps: int, first_step: int, stream: TextIO | None = None):
        self.total_steps, self.first_step = total_steps, first_step
        self.stream: TextIO | None = stream or sys.stdout  # None if it was closed before Python started
        self.started = time.monotonic()

    def show(self, line: dict[str, Any]) -> None:
        """Print a metrics line."""
        parts = [f"step {line['step']}/{self.total_steps} {line['phase']}"]
        done = line["step"] - self.first_step
        if done == 0:  # the evaluation before the first step takes time that no later step does
            self.started = time.monotonic()
        if done > 0 and line["step"] < self.total_steps:  # early in the line, which a narrow terminal truncates
            left = (time.monotonic() - self.started) / done * (self.total_steps - line["step"])
            parts.append(f"{duration(left)} left")
        for key, label, form in (
            ("loss", "loss", ".4f"),
            ("eval_loss", "eval loss", ".4f"),
            ("mean_rank", "mean rank", ".2f"),
            ("lambda", "λ", ".3g"),
            ("tokens_per_second", "tokens/s", ",.0f"),
        ):
            if key in line and (key != "lambda" or line[key] != 0):  # 0 is logged for steps that cut no gate
                parts.append(f"{label} {line[key]:{form}}")
        text = "  ".join(parts)
        if is_terminal(self.stream):
            show_progress(text, self.stream)
            if "eval_loss" in line or line["step"] == self.total_steps:
                end_progress()
        else:
            say(text, self.stream)


def duration(seconds: float) -> str:
    """Hours, if any, minutes and seconds: 1:02:03."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
