"""Reading a run directory defensively: a missing, truncated or foreign file counts as empty."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, BinaryIO

from sora_llm import run_files
from sora_llm.report import read_json_lines
from sora_llm.report_page.record import RankLine, Record, StageRecord
from sora_llm.report_page.untrusted import as_int, as_mapping, as_number, is_step, ranks_in

MARKERS = (run_files.STATUS, run_files.METRICS)
"""A folder with none of these is not a run directory: anybody may have put a config.yaml or a report there."""

_MAX_RANK_LINES = 300
_MAX_RANK_BYTES = 4 << 20  # of a ranks.jsonl that is read completely; 224 modules take 10 KB a line
_BLOCK_BYTES = 1 << 16  # read at a time when searching backwards for the end of a line


def is_run_directory(path: Path) -> bool:
    """Whether a run has written anything here."""
    return any((path / name).is_file() for name in MARKERS)


def read_record(run_dir: Path, config: Mapping[str, Any] | None = None) -> Record:
    """Read a run directory; `config` is the run's resolved config, if the caller has it."""
    run_dir = run_dir.resolve()
    torn: list[str] = []
    lines = [line for line in _lines(run_dir / run_files.METRICS, torn) if is_step(line.get("step"))]
    rank_lines = []
    for line in _spread_lines(run_dir / run_files.RANKS, torn):
        ranks = ranks_in(line.get("ranks"))
        if is_step(line.get("step")) and ranks:
            rank_lines.append(RankLine(line["step"], ranks))
    certificate = read_json(run_dir / run_files.ADAPTER / run_files.CERTIFICATE)
    return Record(
        run_dir,
        as_mapping(config),
        status=read_json(run_dir / run_files.STATUS),
        env=read_json(run_dir / run_files.ENV),
        lines=lines,
        rank_lines=rank_lines,
        data=read_json(run_dir / run_files.DATA_REPORT),
        certificate=certificate,
        adapter_bytes=_size(run_dir / run_files.ADAPTER / run_files.ADAPTER_WEIGHTS),
        stages=_stages(run_dir, lines, certificate),
        samples=_lines(run_dir / run_files.SAMPLES, torn),
        torn=torn,
    )


def read_json(path: Path) -> Mapping[str, Any]:
    """A file's JSON object, {} if there is none."""
    try:
        return as_mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return {}


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _lines(path: Path, torn: list[str]) -> list[dict[str, Any]]:
    """The objects of a .jsonl file up to a torn line, which is noted in `torn`."""
    try:
        lines = read_json_lines(path)
        num_written = sum(1 for line in path.read_bytes().split(b"\n") if line.strip()) if path.exists() else 0
    except (OSError, RecursionError):
        lines, num_written = [], 1
    if num_written > len(lines):
        torn.append(path.name)
    return lines


def _spread_lines(path: Path, torn: list[str]) -> list[dict[str, Any]]:
    """About `_MAX_RANK_LINES` objects or fewer, evenly spread; in a large file the rest is not even read."""
    size = _size(path) or 0
    if size <= _MAX_RANK_BYTES:
        lines = _lines(path, torn)
        every = math.ceil(len(lines) / _MAX_RANK_LINES) or 1
        return [*lines[:-1:every], *lines[-1:]]
    found: dict[int, dict[str, Any]] = {}
    with path.open("rb") as file:
        end = _after_newline(file, size)  # of the last complete line
        if end < size:
            torn.append(path.name)
        for index in range(_MAX_RANK_LINES):
            file.seek(max(0, round(index * end / _MAX_RANK_LINES) - 1))
            if index:
                file.readline()
            start = file.tell()
            if start < end and start not in found:
                found[start] = _object(file.readline())
        start = _after_newline(file, max(0, end - 1))
        file.seek(start)
        found[start] = _object(file.readline())
    return [found[start] for start in sorted(found)]


def _object(line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _after_newline(file: BinaryIO, end: int) -> int:
    """The position after the last newline before `end`, 0 if there is none."""
    while end > 0:
        start = max(0, end - _BLOCK_BYTES)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            return start + found + 1
        end = start
    return 0


def _stages(run_dir: Path, lines: Sequence[Mapping[str, Any]], certificate: Mapping[str, Any]) -> list[StageRecord]:
    """The stages of a path, in the order of λ."""
    certificates = {
        path.parent.name: read_json(path) for path in (run_dir / run_files.PATH).glob(f"*/{run_files.CERTIFICATE}")
    }
    found: dict[str, StageRecord] = {}
    for line in lines:
        sparse_lambda = as_number(line.get("sparse_lambda"))
        if line.get("phase") == "export" and "stage" in line and sparse_lambda is not None:
            kept = as_number(line.get("kept_params"))
            found[run_files.stage_name(sparse_lambda)] = StageRecord(
                sparse_lambda,
                stage=as_int(line["stage"]),
                kept_params=None if kept is None else round(kept),
                mean_rank=as_number(line.get("mean_rank")),
                train_loss=as_number(line.get("train_loss")),
                eval_loss=as_number(line.get("eval_loss")),
            )
    for name, own in certificates.items():
        stage = found.get(name)
        if stage is None:
            try:
                stage = StageRecord(float(name))
            except ValueError:
                continue
        sha256 = own.get("sha256")
        found[name] = replace(
            stage,
            folder=f"{run_files.PATH}/{name}",
            passed=own.get("passed") is True,
            is_adapter=sha256 is not None and sha256 == certificate.get("sha256"),
        )
    return sorted(found.values(), key=lambda stage: stage.sparse_lambda)
