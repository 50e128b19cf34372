"""Comparing runs: their results, and the settings in which they differ."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sora_llm.config import CHANGES_NO_ROW, differing_keys, flattened
from sora_llm.report_page.untrusted import setting
from sora_llm.terminal import aligned

MISSING = "-"


def compared(summaries: Sequence[Mapping[str, Any]], configs: Sequence[Mapping[str, Any] | None]) -> dict[str, Any]:
    """The runs as JSON, and {key: its value in each} for the settings that are not the same in all.

    `configs` are those of the runs, None for one that cannot be read; the output folder is not a setting.
    """
    known = [dict(config) for config in configs if config is not None]
    keys = dict.fromkeys(key for other in known[1:] for key in differing_keys(known[0], other))
    flat = [{} if config is None else flattened(dict(config)) for config in configs]
    settings = {key: [one.get(key) for one in flat] for key in keys if key != "output.output_dir"}
    settings = {key: values for key, values in settings.items() if any(value is not None for value in values)}
    return {
        "runs": [dict(summary) for summary in summaries],
        "without_config": [number for number, config in enumerate(configs, 1) if config is None],
        "settings": settings,
        "of_other_dev_rows": [key for key in settings if _decides_dev_rows(key, known)],
    }


def _decides_dev_rows(key: str, configs: Sequence[Mapping[str, Any]]) -> bool:
    """Whether runs that differ in a setting are measured on different rows, or on different tokens of them."""
    if key == "train.seed" or key.startswith("data.datasets."):
        return not key.endswith(".weight") and any(_holds_out(config) for config in configs)
    return key.startswith("data.") and key.removeprefix("data.") not in CHANGES_NO_ROW


def _holds_out(config: Mapping[str, Any]) -> bool:
    return setting(config, "data", "val_set_size") is not None


def as_text(content: Mapping[str, Any]) -> str:
    """A line per run (the speed of its last phase, the most memory of all phases), then a line per setting; runs are
    numbered."""
    names = short_names([run["run"] for run in content["runs"]])
    results = [["", "run", "state", "step", "dev loss", "mean rank", "kept", "tokens/s", "peak GiB"]]
    results += [
        [str(number), name, *_result(run)]
        for number, (name, run) in enumerate(zip(names, content["runs"], strict=True), 1)
    ]
    settings = [["setting", *(str(number) for number in range(1, len(names) + 1))]]
    settings += [[key, *map(_value, values)] for key, values in content["settings"].items()]
    lines = [line.rstrip() for line in aligned(results, left=3)]
    unread = content["without_config"]
    if content["settings"]:
        lines += ["", *(line.rstrip() for line in aligned(settings, left=1))]
    elif not unread:
        lines += ["", "no setting differs"]
    if content["of_other_dev_rows"] and sum(run["eval_loss"] is not None for run in content["runs"]) > 1:
        lines += ["", f"dev losses are not of the same rows or tokens: {', '.join(content['of_other_dev_rows'])}"]
    if not {"model.name_or_path", "model.revision"}.isdisjoint(content["settings"]):
        lines += ["", "losses for different bases are over different tokens if their tokenizers differ"]
    lines += [f"the config of run {number} cannot be read: its settings are not compared" for number in unread]
    return "\n".join(lines)


def short_names(paths: Sequence[str]) -> list[str]:
    """The paths without the leading folders that they share; they still tell runs apart."""
    parts = [Path(path).parts for path in paths]
    shared = 0
    while all(len(own) > shared + 1 for own in parts) and len({own[shared] for own in parts}) == 1:
        shared += 1
    return [str(Path(*own[shared:])) for own in parts]


def _result(run: Mapping[str, Any]) -> list[str]:
    last = run["phases"][-1] if run["phases"] else {}
    peaks = [phase["peak_memory_gib"] for phase in run["phases"] if phase["peak_memory_gib"] is not None]
    before, after = run["eval_loss_before"], run["eval_loss"]
    is_measured = before is not None and after is not None and run["eval_step"] != 0
    return [
        run["state"],
        f"{run['step']:,}",
        f"{before:.4f} → {after:.4f}" if is_measured else MISSING,
        _number(run["mean_rank"], ".2f"),
        _number(run["kept_params"], ",.0f"),
        _number(last.get("median_tokens_per_second"), ",.0f"),
        _number(max(peaks, default=None), ".2f"),
    ]


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else f"{value:{form}}"


def _value(value: Any) -> str:
    """A setting as text; None is a key that a config lacks, or leaves unset."""
    if value is None:
        return MISSING
    return value if isinstance(value, str) else json.dumps(value)
