"""report.html: one file without scripts or external references, to be read, printed and sent."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from sora_llm import run_files
from sora_llm.files import write_text_atomically
from sora_llm.report import duration
from sora_llm.report_page import markup
from sora_llm.report_page.charts import Chart, charts, tracking_error
from sora_llm.report_page.data_section import data_section
from sora_llm.report_page.rank_section import rank_section, ranks_over_time
from sora_llm.report_page.reading import read_record
from sora_llm.report_page.record import Record, StageRecord
from sora_llm.report_page.style import STYLE
from sora_llm.report_page.svg import chart_svg
from sora_llm.report_page.untrusted import as_list, as_mapping, as_number, setting

_NOT_MEASURED = "Not measured: this run has no dev rows."
_STATES = ("running", "finished", "preempted", "failed")
LONGEST_VALUE = 400
"""Characters of a setting that are shown."""
_PLAIN = re.compile(r"[^\s,:{}\[\]\"'#]+( [^\s,:{}\[\]\"'#]+)*")
"""Text that needs no quotes between others."""
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy: the browser runs no scripts and fetches nothing."""


def write_report(run_dir: Path, config: Mapping[str, Any] | None = None, *, plots: bool = False) -> Path:
    """Write report.html into a run directory from the files there, and with `plots` the PNGs.

    Args:
        config: the run's resolved config as plain values, if the caller has it.
    Returns: the page.
    Raises:
        OSError: the run directory cannot be written.
    """
    return write_page(read_record(run_dir, config), plots=plots)


def write_page(record: Record, *, plots: bool = False) -> Path:
    """`write_report` for a run directory that has already been read."""
    path = record.path / run_files.REPORT
    text = page(record, datetime.now(timezone.utc))
    write_text_atomically(path, text.encode("utf-8", "replace").decode())  # a JSON string can hold a lone surrogate
    if plots:
        from sora_llm.report_page.plots import write_plots  # matplotlib takes a second to load

        write_plots(record, record.path / run_files.PLOTS)
    return path


def page(record: Record, now: datetime) -> str:
    """The complete page."""
    drawn = charts(record)
    sections: list[tuple[str, Callable[[], str]]] = [
        ("Loss", lambda: _loss(record, drawn.get("loss"))),
        ("Ranks", lambda: rank_section(record)),
        ("Ranks over time", lambda: ranks_over_time(record, drawn.get("ranks"))),
        ("λ and budget", lambda: _budget(record, drawn)),
        ("Sparsity–quality path", lambda: _path(record, drawn.get("path"))),
        ("Time and memory", lambda: _costs(record, drawn.get("speed"))),
        ("Data", lambda: data_section(record)),
        ("Adapter", lambda: _adapter(record)),
        ("Sample answers", lambda: _samples(record)),
        ("Settings", lambda: _settings(record)),
        ("Environment", lambda: _environment(record)),
    ]
    body = [_head(record, now), _alarms(record), _tiles(record)]
    for title, section in sections:
        content = section()
        if content:
            body.append(f"<section><h2>{title}</h2>\n{content}</section>")
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{markup.text(record.name)}: {markup.text(record.state)}</title>
<style>{STYLE}</style>
</head>
<body>
{chr(10).join(part for part in body if part)}
</body>
</html>
"""


# ----- the top --------------------------------------------------------------------------------------------------------


def _head(record: Record, now: datetime) -> str:
    base = setting(record.config, "model", "name_or_path")
    parts = [f"Written {now:%Y-%m-%d %H:%M} UTC"]
    if base:
        parts.insert(0, f"Base model {markup.code(base)}")
    return (
        f'<header><div class="head"><h1>{markup.text(record.name)}</h1>{_state(record)}</div>'
        f'<p class="quiet">{" · ".join(parts)}</p></header>'
    )


def _state(record: Record) -> str:
    style = record.state if record.state in _STATES else "quiet"
    return f'<span class="state {style}">{markup.text(record.state)}</span>'


def _alarms(record: Record) -> str:
    """Errors and alarms, shown before anything else."""
    said = []
    if record.error:
        said.append(f"The run failed: {markup.text(record.error)}")
    for alarm in record.alarms:
        where = f"step {alarm.first_step:,}"
        if alarm.count > 1:
            where = f"steps {alarm.first_step:,} to {alarm.last_step:,}, {alarm.count:,} times"
        said.append(f'{markup.text(alarm.sentence)} <span class="quiet">({where})</span>')
    said += [f"{markup.code(name)} is truncated; what is before the damage is shown." for name in record.torn]
    skipped = record.last("skipped_steps")
    if skipped:
        said.append(f"Steps skipped because loss or gradient was not finite: {skipped:,.0f}.")
    if record.certificate and record.certificate.get("passed") is not True:
        said.append("The adapter did not pass its self-check.")
    if not said:
        return '<p class="quiet">No alarms.</p>' if record.lines else ""
    items = "".join(f"<li>{one}</li>" for one in said)
    return f'<section class="alarms"><h2>Alarms</h2><ul>{items}</ul></section>'


def _tiles(record: Record) -> str:
    total = f" of {record.total_steps:,}" if record.total_steps is not None else ""
    tiles = [("State", _state(record), f"phase {markup.text(record.phase)}" if record.phase else "no status yet")]
    tiles.append(("Steps", f"{record.step:,}{total}", _elapsed(record)))
    before, after = record.first("eval_loss"), record.last("eval_loss")
    if after is not None and record.eval_step == 0:
        tiles.append(("Dev loss", markup.decimal(after), "before training; not measured since"))
    elif after is not None:
        exported = record.last("eval_loss_exported")
        below = f"reloaded from disk {exported:.4f}" if exported is not None else "before → last measured"
        best_step = record.last("best_step")
        if best_step is not None and best_step < record.step:
            below += f"; the adapter of step {markup.count(best_step)}, the best"
        tiles.append(("Dev loss", f"{markup.decimal(before)} → {markup.decimal(after)}", below))
    else:
        tiles.append(("Dev loss", "–", _NOT_MEASURED if record.lines else "not measured yet"))
    rank = record.last("mean_rank")
    rank_note = _target_words(record) if rank is not None else "not measured yet"
    tiles.append(("Mean rank", f"{_rank(record.full_mean_rank)} → {_rank(rank)}", rank_note))
    kept, all_params = record.last("kept_params"), record.all_params
    share = f"{kept / all_params:.1%} of {all_params:,.0f}" if kept is not None and all_params else "not measured yet"
    tiles.append(("Kept parameters", markup.count(kept), share))
    if record.adapter_bytes is not None:
        folder = markup.text(record.status.get("adapter") or "adapter")
        tiles.append(("Adapter", markup.size(record.adapter_bytes), f"in {folder}/"))
    else:
        tiles.append(("Adapter", "–", "not exported yet"))
    tiles.append(("Self-check", *_self_check(record)))
    best = record.best_stage
    if best is not None:
        tiles.append(("Best dev loss of the path", markup.decimal(best.eval_loss), f"λ {best.sparse_lambda:.4g}"))
    elif record.last("loss") is not None:
        step, loss = record.series("loss")[-1]
        tiles.append(("Train loss", markup.decimal(loss), f"at step {markup.count(step)}"))
    items = "".join(
        f'<div class="tile"><dt>{name}</dt><dd>{value}</dd><dd>{note}</dd></div>' for name, value, note in tiles
    )
    return f'<dl class="tiles">{items}</dl>'


def _rank(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def _elapsed(record: Record) -> str:
    """The number of steps in each phase, in words."""
    spans = [f"{cost.steps:,} {cost.phase}" for cost in record.phase_costs]
    return ", ".join(spans) if spans else "no step logged yet"


def _target_words(record: Record) -> str:
    if setting(record.config, "sora", "budgets"):
        budget = as_number(record.last("budget_params"))
        return "several budgets" if budget is None else f"budgets: {budget:,.0f} parameters"
    target = as_number(setting(record.config, "sora", "target_rank"))
    if target is not None:
        return f"target {target:g}"
    params = as_number(setting(record.config, "sora", "target_params"))
    if params is not None:
        return f"target {params:,.0f} parameters"
    first, last = (as_number(setting(record.config, "sora", name)) for name in ("sparse_lambda", "max_lambda"))
    if first is None:
        return "weighted by module size"
    return f"λ {first:g}" if last is None else f"λ {first:g} to {last:g}"


def _self_check(record: Record) -> tuple[str, str]:
    if not record.certificate:
        return "–", "made with the export"
    logits = as_number(record.certificate.get("logits_error"))
    note = f"ΔW to {_error(record.delta_error)}, logits to {_error(logits)}"
    if record.certificate.get("passed") is True:
        return '<span class="passed">passed</span>', note
    return '<span class="failed">not passed</span>', note


def _error(value: float | None) -> str:
    return "–" if value is None else f"{value:.1e}"


# ----- loss -----------------------------------------------------------------------------------------------------------


def _loss(record: Record, chart: Chart | None) -> str:
    if chart is None:
        return markup.missing("Nothing is logged yet.")
    parts = [chart_svg(chart, "loss over steps")]
    rows = []
    loss = record.series("loss")
    if loss:
        rows.append(("train loss", markup.decimal(loss[0][1]), markup.decimal(loss[-1][1]), *_lowest(loss)))
    dev = record.series("eval_loss")
    if dev:
        rows.append(("dev loss", markup.decimal(dev[0][1]), markup.decimal(dev[-1][1]), *_lowest(dev)))
    exported = record.series("eval_loss_exported")
    if exported:
        rows.append(("dev loss, adapter reloaded", "–", markup.decimal(exported[-1][1]), *_lowest(exported)))
    parts.append(markup.table(("", "first", "last", "lowest", "at step"), rows))
    if not dev:
        parts.append(markup.missing(f"Dev loss: {_NOT_MEASURED}"))
    return "".join(parts)


def _lowest(points: Sequence[tuple[float, float]]) -> tuple[str, str]:
    step, loss = min(points, key=lambda point: point[1])
    return markup.decimal(loss), markup.count(step)


# ----- λ and budget ---------------------------------------------------------------------------------------------------


def _budget(record: Record, drawn: Mapping[str, Chart]) -> str:
    parts = []
    if "budget" in drawn:
        parts += ["<h3>Budget</h3>", _budget_words(record), chart_svg(drawn["budget"], "kept parameters and budget")]
    if "lambda" in drawn:
        names = " and ".join(panel.y_label for panel in drawn["lambda"].panels)
        parts += [f"<h3>{names}</h3>" if parts else "", chart_svg(drawn["lambda"], f"{names} over steps")]
    if "rates" in drawn:
        parts += ["<h3>Learning rates</h3>", chart_svg(drawn["rates"], "learning rates over steps")]
    return "".join(parts) or markup.missing("Nothing is logged yet.")


def _budget_words(record: Record) -> str:
    budget, kept = record.last("budget_params"), record.last("kept_params")
    said = []
    if budget:
        said.append(f"The budget is {budget:,.0f} parameters.")
        if kept is not None:
            said.append(f"{kept:,.0f} are kept, {kept / budget:.1%} of it.")
    error = tracking_error(record)
    if error:
        worst = max(error, key=lambda point: abs(point[1]))
        said.append(
            f"The mean rank differed from the schedule by {error[-1][1]:+.2f} at step {error[-1][0]:,.0f}, the last "
            f"with both values, and by at most {worst[1]:+.2f}, at step {worst[0]:,.0f}."
        )
    return f"<p>{' '.join(said)}</p>"


# ----- path -----------------------------------------------------------------------------------------------------------


def _path(record: Record, chart: Chart | None) -> str:
    if not record.is_path:
        none = "None: this run has one λ or one budget (sora.lambda_num trains a path)."
        return markup.missing(none) if record.lines else ""
    if not record.stages:
        return markup.missing("No stage of the path is finished yet.")
    parts = [chart_svg(chart, "loss against kept parameters")] if chart is not None else []
    best = record.best_stage
    if best is not None:
        chosen = "" if not best.is_adapter else "; <code>adapter/</code> is this one"
        parts.append(f"<p>The dev loss is lowest at λ {best.sparse_lambda:.4g}{chosen}.</p>")
    elif record.lines:
        parts.append(markup.missing(f"Dev loss: {_NOT_MEASURED}"))
    heads = ("folder", "λ", "kept parameters", "mean rank", "train loss", "dev loss", "self-check", "")
    rows = [_stage_row(stage, stage is best) for stage in record.stages]
    marked = [index for index, stage in enumerate(record.stages) if stage is best]
    return "".join([*parts, markup.table(heads, rows, marked=marked)])


def _stage_row(stage: StageRecord, is_best: bool) -> tuple[str, ...]:
    check = {True: "passed", False: "not passed", None: "–"}[stage.passed]
    said = ["best dev loss"] if is_best else []
    said += ["adapter/"] if stage.is_adapter else []
    return (
        markup.code(stage.folder) if stage.folder else "–",
        markup.short(stage.sparse_lambda),
        markup.count(stage.kept_params),
        _rank(stage.mean_rank),
        markup.decimal(stage.train_loss),
        markup.decimal(stage.eval_loss),
        check,
        ", ".join(said),
    )


# ----- time and memory ------------------------------------------------------------------------------------------------


def _costs(record: Record, chart: Chart | None) -> str:
    costs = record.phase_costs
    if not costs:
        return markup.missing("No step is logged yet.")
    has_seconds = any(cost.median_step_seconds is not None for cost in costs)
    heads = ["phase", "steps", "tokens/s, median", "tokens/s, last", "peak memory"]
    if has_seconds:
        heads.insert(4, "step time, median")
    rows = []
    for cost in costs:
        memory = "–" if cost.peak_memory_gib is None else f"{cost.peak_memory_gib:.2f} GiB"
        row = [cost.phase, f"{cost.steps:,}", markup.count(cost.median_tokens_per_second)]
        row += [markup.count(cost.last_tokens_per_second)]
        if has_seconds:
            row.append("–" if cost.median_step_seconds is None else f"{cost.median_step_seconds:.3g} s")
        rows.append([*row, memory])
    note = (
        f'<p class="quiet">{_time(record)}Tokens/s of all processes together; peak memory of the main process: on a '
        "GPU since its engine was last made (at the start, and wherever adapters change), on a CPU since it began.</p>"
    )
    drawn = "" if chart is None else chart_svg(chart, "tokens per second over steps")
    return markup.table(heads, rows) + note + drawn


def _time(record: Record) -> str:
    """The time that the steps took, and an estimate for the rest; "" if no line records it."""
    if record.seconds_in_steps is None:
        return ""
    left = "" if record.seconds_left is None else f", about {duration(record.seconds_left)} left"
    return f"{duration(record.seconds_in_steps)} in steps{left}, without evaluations and saves. "


# ----- adapter, samples, environment ----------------------------------------------------------------------------------


def _adapter(record: Record) -> str:
    certificate = record.certificate
    if not certificate:
        checkpoint = record.status.get("checkpoint")
        where = f" The newest checkpoint is {markup.code(checkpoint)}." if checkpoint else ""
        return markup.missing(f"Not exported yet.{where}")
    value, _ = _self_check(record)
    facts = [
        ("folder", markup.code(record.status.get("adapter") or "adapter")),
        ("self-check", value),
        ("largest relative error of ΔW", _error(record.delta_error)),
        ("relative error of the logits", _error(as_number(certificate.get("logits_error")))),
        ("layout", markup.text(certificate.get("layout"))),
        ("PEFT that reloaded it", markup.text(certificate.get("peft_version"))),
        ("SHA-256 of the weights", markup.code(certificate.get("sha256"))),
    ]
    if record.adapter_bytes is not None:
        facts.insert(1, ("size", f"{markup.size(record.adapter_bytes)} ({record.adapter_bytes:,} bytes)"))
    return markup.facts(facts)


def _samples(record: Record) -> str:
    parts = []
    for sample in record.samples:
        answers = [("prompt", "prompt"), ("base", "base model"), ("adapted", "with the adapter")]
        said = "".join(
            f'<p class="quiet">{label}</p><blockquote>{markup.text(sample[key])}</blockquote>'
            for key, label in answers
            if key in sample
        )
        parts.append(said)
    return "".join(parts)


def _settings(record: Record) -> str:
    """The resolved config, a line per section; keys without a value are left out."""
    lines = []
    for section, values in record.config.items():
        stated = [f"{key}: {_value(value)}" for key, value in as_mapping(values).items() if value is not None]
        lines += [(markup.code(section), markup.code(", ".join(stated)))] if stated else []
    return markup.facts(lines) if lines else ""


def _value(value: Any) -> str:
    """As in YAML's flow style, near enough to be read; at most LONGEST_VALUE characters of it."""
    text = value
    if not isinstance(value, str) or not _PLAIN.fullmatch(value):
        text = json.dumps(_without_nulls(value), ensure_ascii=False, skipkeys=True, default=str)
    return text if len(text) <= LONGEST_VALUE else f"{text[:LONGEST_VALUE]}…"


def _without_nulls(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _without_nulls(inner) for name, inner in value.items() if inner is not None}
    return [_without_nulls(inner) for inner in value] if isinstance(value, list | tuple) else value


def _environment(record: Record) -> str:
    env = record.env
    if not env:
        return markup.missing("env.json is not there yet.")
    hardware = as_mapping(env.get("hardware"))
    gpus = ", ".join(markup.text(gpu) for gpu in as_list(hardware.get("gpus"))) or "none"
    versions = as_mapping(env.get("versions"))
    return markup.facts(
        [
            ("processes", markup.text(env.get("num_processes", "–"))),
            ("strategy", markup.text(env.get("strategy", "–"))),
            ("GPUs", gpus),
            ("machine", markup.text(f"{hardware.get('cpu_cores', '–')} cores, {hardware.get('memory_gib', '–')} GiB")),
            ("versions", markup.text(", ".join(f"{name} {version}" for name, version in versions.items()))),
            ("git commit", markup.code(env.get("git_commit") or "–")),
        ]
    )
