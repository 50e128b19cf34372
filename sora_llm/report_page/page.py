"""report.html: one file without scripts or references, to be read, printed and sent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime, timezone
from html import escape
from pathlib import Path
from statistics import fmean
from typing import Any

from sora_llm.files import write_text_atomically
from sora_llm.report_page.charts import Chart, charts, colour_of, is_dark, rank_picture, tracking_error
from sora_llm.report_page.record import (
    Grid,
    Record,
    StageRecord,
    as_int,
    as_list,
    as_mapping,
    as_number,
    read_record,
    setting,
    short_names,
    split_name,
)
from sora_llm.report_page.style import STYLE
from sora_llm.report_page.svg import chart_svg, picture_svg

FILE, PLOTS = "report.html", "plots"
ROWS_PER_BLOCK = 40  # of a heat map; more layers stand beside each other

_NOT_MEASURED = "Not measured: this run has no dev rows."
_STATES = ("running", "finished", "preempted", "failed")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
"""Whatever gets into the page, a browser runs and fetches nothing."""


def write_report(run_dir: Path, config: Mapping[str, Any] | None = None, *, plots: bool = False) -> Path:
    """Write report.html into a run directory from the files there, and with `plots` the PNGs.

    Args:
        config: the run's resolved config as plain values, where the caller has it.
    Returns: the page.
    Raises:
        OSError: the run directory cannot be written.
    """
    return write_page(read_record(run_dir, config), plots=plots)


def write_page(record: Record, *, plots: bool = False) -> Path:
    """As `write_report`, of a run directory that has been read."""
    path = record.path / FILE
    text = page(record, datetime.now(timezone.utc))
    write_text_atomically(path, text.encode("utf-8", "replace").decode())  # a string of JSON can hold half a character
    if plots:
        from sora_llm.report_page.plots import write_plots  # matplotlib takes a second to load

        write_plots(record, record.path / PLOTS)
    return path


def page(record: Record, now: datetime) -> str:
    """The whole page."""
    drawn = charts(record)
    sections: list[tuple[str, Callable[[], str]]] = [
        ("Loss", lambda: _loss(record, drawn.get("loss"))),
        ("Ranks", lambda: _ranks(record)),
        ("Ranks over time", lambda: _ranks_over_time(record, drawn.get("ranks"))),
        ("λ and budget", lambda: _budget(record, drawn)),
        ("Sparsity–quality path", lambda: _path(record, drawn.get("path"))),
        ("Time and memory", lambda: _costs(record, drawn.get("speed"))),
        ("Data", lambda: _data(record)),
        ("Adapter", lambda: _adapter(record)),
        ("Sample answers", lambda: _samples(record)),
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
<title>{_text(record.name)}: {_text(record.state)}</title>
<style>{STYLE}</style>
</head>
<body>
{chr(10).join(part for part in body if part)}
</body>
</html>
"""


# ----- words and numbers ----------------------------------------------------------------------------------------------


def _text(value: Any) -> str:
    """Anything as text of the page."""
    return escape(str(value))


def _code(value: Any) -> str:
    return f"<code>{_text(value)}</code>"


def _count(value: Any) -> str:
    number = as_number(value)
    return "–" if number is None else f"{number:,.0f}"


def _decimal(value: Any, decimals: int = 4) -> str:
    number = as_number(value)
    return "–" if number is None else f"{number:,.{decimals}f}"


def _short(value: Any) -> str:
    number = as_number(value)
    return "–" if number is None else f"{number:.3g}"


def _percent(value: Any) -> str:
    number = as_number(value)
    return "–" if number is None else f"{number:.1%}"


def _bytes(count: int) -> str:
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} bytes"


def _missing(sentence: str) -> str:
    return f'<p class="missing">{sentence}</p>'


def _table(
    heads: Sequence[str], rows: Iterable[Sequence[str]], *, num_text: int = 1, marked: Sequence[int] = ()
) -> str:
    """Cells are HTML; the first `num_text` columns are words, the others numbers."""

    def cells(tag: str, row: Sequence[str]) -> str:
        return "".join(
            f'<{tag} class="text">{cell}</{tag}>' if i < num_text else f"<{tag}>{cell}</{tag}>"
            for i, cell in enumerate(row)
        )

    body = "".join(
        f'<tr class="{"marked" if index in marked else "row"}">{cells("td", row)}</tr>\n'
        for index, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{cells("th", heads)}</tr></thead><tbody>{body}</tbody></table></div>'


def _facts(facts: Iterable[tuple[str, str]]) -> str:
    return f'<dl class="facts">{"".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts)}</dl>'


# ----- the top --------------------------------------------------------------------------------------------------------


def _head(record: Record, now: datetime) -> str:
    base = setting(record.config, "model", "name_or_path")
    parts = [f"Written {now:%Y-%m-%d %H:%M} UTC"]
    if base:
        parts.insert(0, f"Base model {_code(base)}")
    return (
        f'<header><div class="head"><h1>{_text(record.name)}</h1>{_state(record)}</div>'
        f'<p class="quiet">{" · ".join(parts)}</p></header>'
    )


def _state(record: Record) -> str:
    style = record.state if record.state in _STATES else "quiet"
    return f'<span class="state {style}">{_text(record.state)}</span>'


def _alarms(record: Record) -> str:
    """What went wrong, before anything else."""
    said = []
    if record.error:
        said.append(f"The run failed: {_text(record.error)}")
    for alarm in record.alarms:
        where = f"step {alarm.first_step:,}"
        if alarm.count > 1:
            where = f"steps {alarm.first_step:,} to {alarm.last_step:,}, {alarm.count:,} times"
        said.append(f'{_text(alarm.sentence)} <span class="quiet">({where})</span>')
    said += [f"The end of {_code(name)} is torn; what is before it is shown." for name in record.torn]
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
    tiles = [("State", _state(record), f"phase {_text(record.phase)}" if record.phase else "no status yet")]
    tiles.append(("Steps", f"{record.step:,}{total}", _elapsed(record)))
    before, after = record.first("eval_loss"), record.last("eval_loss")
    if after is not None and record.eval_step == 0:
        tiles.append(("Dev loss", _decimal(after), "before training; not measured since"))
    elif after is not None:
        exported = record.last("eval_loss_exported")
        below = f"reloaded from disk {exported:.4f}" if exported is not None else "before → last measured"
        best_step = record.last("best_step")
        if best_step is not None and best_step < record.step:
            below += f"; the adapter of step {_count(best_step)}, the best"
        tiles.append(("Dev loss", f"{_decimal(before)} → {_decimal(after)}", below))
    else:
        tiles.append(("Dev loss", "–", _NOT_MEASURED if record.lines else "not measured yet"))
    rank = record.last("mean_rank")
    rank_note = _target_words(record) if rank is not None else "not measured yet"
    tiles.append(("Mean rank", f"{_rank(record.first('mean_rank'))} → {_rank(rank)}", rank_note))
    kept, all_params = record.last("kept_params"), record.all_params
    share = f"{kept / all_params:.1%} of {all_params:,.0f}" if kept is not None and all_params else "not measured yet"
    tiles.append(("Kept parameters", _count(kept), share))
    if record.adapter_bytes is not None:
        tiles.append(
            ("Adapter", _bytes(record.adapter_bytes), f"in {_text(record.status.get('adapter') or 'adapter')}/")
        )
    else:
        tiles.append(("Adapter", "–", "not exported yet"))
    tiles.append(("Self-check", *_self_check(record)))
    best = record.best_stage
    if best is not None:
        tiles.append(("Best dev loss of the path", _decimal(best.eval_loss), f"λ {best.sparse_lambda:.4g}"))
    elif record.last("loss") is not None:
        tiles.append(("Train loss", _decimal(record.last("loss")), f"at step {_count(record.series('loss')[-1][0])}"))
    items = "".join(
        f'<div class="tile"><dt>{name}</dt><dd>{value}</dd><dd>{note}</dd></div>' for name, value, note in tiles
    )
    return f'<dl class="tiles">{items}</dl>'


def _rank(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}".rstrip("0").rstrip(".")


def _elapsed(record: Record) -> str:
    """What the steps are made of, in words."""
    spans = [f"{cost.steps:,} {cost.phase}" for cost in record.phase_costs]
    return ", ".join(spans) if spans else "no step logged yet"


def _target_words(record: Record) -> str:
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
        return _missing("Nothing is logged yet.")
    parts = [chart_svg(chart, "loss over steps")]
    rows = []
    loss = record.series("loss")
    if loss:
        rows.append(("train loss", _decimal(loss[0][1]), _decimal(loss[-1][1]), *_lowest(loss)))
    dev = record.series("eval_loss")
    if dev:
        rows.append(("dev loss", _decimal(dev[0][1]), _decimal(dev[-1][1]), *_lowest(dev)))
    exported = record.series("eval_loss_exported")
    if exported:
        rows.append(("dev loss, adapter reloaded", "–", _decimal(exported[-1][1]), *_lowest(exported)))
    parts.append(_table(("", "first", "last", "lowest", "at step"), rows))
    if not dev:
        parts.append(_missing(f"Dev loss: {_NOT_MEASURED}"))
    return "".join(parts)


def _lowest(points: Sequence[tuple[float, float]]) -> tuple[str, str]:
    step, loss = min(points, key=lambda point: point[1])
    return _decimal(loss), _count(step)


# ----- ranks ----------------------------------------------------------------------------------------------------------


def _ranks(record: Record) -> str:
    ranks = record.ranks
    if not ranks:
        return _missing("No ranks yet: they are logged from the sparsify phase on.")
    top = max(ranks.values())
    num_zero = sum(rank == 0 for rank in ranks.values())
    when = f"After step {record.rank_lines[-1].step:,}" if record.rank_lines else "As exported"
    if record.state == "finished":
        when = "As exported"
    parts = [f"<p>{when}: {len(ranks):,} modules, ranks {min(ranks.values())} to {top}, {num_zero:,} at rank 0.</p>"]
    grids, others = record.grids
    if grids:
        parts.append(_scale(top))
    for grid in grids:
        if len(grids) > 1:
            parts.append(f"<h3>{_code(grid.stack)}</h3>")
        parts.append(heat_map(grid, ranks, top))
        parts.append(_projections(grid, ranks))
    if others:
        parts.append("<h3>Modules outside of layers</h3>" if grids else "")
        parts.append(_table(("module", "rank"), [(_code(name), str(rank)) for name, rank in others.items()]))
    return "".join(parts)


def _scale(top: int, pruned: str = '<i class="zero"></i>rank 0: the module has no adapter') -> str:
    """What the colours mean."""
    colours = f"rank 1<i class='colours'></i>{top}" if top > 1 else f"{_one_colour(top)}rank 1"
    return f'<p class="scale"><span>{colours}</span><span>{pruned}</span></p>'


def _one_colour(top: int) -> str:
    red, green, blue = colour_of(1, top)
    return f'<i style="background:rgb({red},{green},{blue})"></i>'


def heat_map(grid: Grid, ranks: Mapping[str, int], top: int) -> str:
    """Layer × projection with numbers, as tables: blocks of at most `ROWS_PER_BLOCK` layers beside each other."""
    num_blocks = -(-len(grid.layers) // ROWS_PER_BLOCK)
    size = -(-len(grid.layers) // num_blocks)
    names = short_names(grid.projections)
    shown = {name: short.removesuffix("_proj") for name, short in names.items()}
    if len(set(shown.values())) < len(shown):
        shown = names
    heads = "".join(f'<th title="{_text(name)}">{_text(short)}</th>' for name, short in shown.items())
    head = f"<thead><tr><th>layer</th>{heads}<th>mean</th></tr></thead>"
    style = "heat wide" if num_blocks == 1 and len(names) <= 8 else "heat"
    blocks = []
    for start in range(0, len(grid.layers), size):
        rows = "".join(_heat_row(grid, layer, ranks, top) for layer in grid.layers[start : start + size])
        blocks.append(f'<table class="{style}">{head}<tbody>{rows}</tbody></table>')
    return f'<div class="scroll"><div class="heat-blocks">{"".join(blocks)}</div></div>'


def _heat_row(grid: Grid, layer: int, ranks: Mapping[str, int], top: int) -> str:
    names = [grid.cells.get((layer, projection)) for projection in grid.projections]
    cells = "".join(_heat_cell(name, ranks, top) for name in names)
    mean = fmean(ranks[name] for name in names if name is not None)
    return f'<tr><th scope="row">{layer}</th>{cells}<td class="mean">{mean:.1f}</td></tr>\n'


def _heat_cell(name: str | None, ranks: Mapping[str, int], top: int) -> str:
    if name is None:
        return "<td></td>"
    rank = ranks[name]
    if rank <= 0:
        return f'<td class="zero" title="{_text(name)}: rank 0">{rank}</td>'
    colour = colour_of(rank, top)
    tone = "dark" if is_dark(colour) else "bright"
    return (
        f'<td class="{tone}" style="background:rgb{str(colour).replace(" ", "")}" title="{_text(name)}: rank {rank}">'
        f"{rank}</td>"
    )


def _projections(grid: Grid, ranks: Mapping[str, int]) -> str:
    """A row per projection, over all layers."""
    rows = []
    for projection, short in short_names(grid.projections).items():
        found = [ranks[name] for (_, other), name in grid.cells.items() if other == projection]
        zeros = sum(rank == 0 for rank in found)
        rows.append((_text(short), f"{fmean(found):.2f}", str(min(found)), str(max(found)), f"{zeros} of {len(found)}"))
    return _table(("projection", "mean rank", "lowest", "highest", "at rank 0"), rows)


def _ranks_over_time(record: Record, chart: Chart | None) -> str:
    if chart is None:
        return _missing("No ranks yet.")
    parts = [chart_svg(chart, "mean rank over steps")]
    if len(chart.panels[0].series) > 2:
        parts.append('<p class="quiet">A projection\'s line is the mean over its layers.</p>')
    picture = rank_picture(record)
    if picture is not None:
        one = split_name(picture.labels[0]) is not None
        order = ", by projection and from the first layer to the last" if one else ""
        parts.append(f"<h3>Every module</h3><p>A row per module{order}; blank where no ranks are logged yet.</p>")
        parts.append(_scale(picture.top, '<i class="pruned"></i>rank 0'))
        parts.append(picture_svg(picture, "rank of every module over steps"))
    return "".join(parts)


# ----- λ and budget ---------------------------------------------------------------------------------------------------


def _budget(record: Record, drawn: Mapping[str, Chart]) -> str:
    parts = []
    if "budget" in drawn:
        parts += ["<h3>Budget</h3>", _budget_words(record), chart_svg(drawn["budget"], "kept parameters and budget")]
    if "lambda" in drawn:
        parts += ["<h3>λ</h3>" if parts else "", chart_svg(drawn["lambda"], "λ over steps")]
    if "rates" in drawn:
        parts += ["<h3>Learning rates</h3>", chart_svg(drawn["rates"], "learning rates over steps")]
    return "".join(parts) or _missing("Nothing is logged yet.")


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
            f"The mean rank differed from the schedule by {error[-1][1]:+.2f} at the end of it and by {worst[1]:+.2f} "
            f"at most, at step {worst[0]:,.0f}."
        )
    return f"<p>{' '.join(said)}</p>"


# ----- path -----------------------------------------------------------------------------------------------------------


def _path(record: Record, chart: Chart | None) -> str:
    if not record.is_path:
        return (
            _missing("None: this run has one λ or one budget (sora.lambda_num trains a path).") if record.lines else ""
        )
    if not record.stages:
        return _missing("No stage of the path is finished yet.")
    parts = [chart_svg(chart, "loss against kept parameters")] if chart is not None else []
    best = record.best_stage
    if best is not None:
        chosen = "" if not best.is_adapter else "; <code>adapter/</code> is this one"
        parts.append(f"<p>The dev loss is lowest at λ {best.sparse_lambda:.4g}{chosen}.</p>")
    elif record.lines:
        parts.append(_missing(f"Dev loss: {_NOT_MEASURED}"))
    heads = ("folder", "λ", "kept parameters", "mean rank", "train loss", "dev loss", "self-check", "")
    rows = [_stage_row(stage, stage is best) for stage in record.stages]
    marked = [index for index, stage in enumerate(record.stages) if stage is best]
    return "".join([*parts, _table(heads, rows, marked=marked)])


def _stage_row(stage: StageRecord, is_best: bool) -> tuple[str, ...]:
    check = {True: "passed", False: "not passed", None: "–"}[stage.passed]
    said = ["best dev loss"] if is_best else []
    said += ["adapter/"] if stage.is_adapter else []
    return (
        _code(stage.folder) if stage.folder else "–",
        _short(stage.sparse_lambda),
        _count(stage.kept_params),
        _rank(stage.mean_rank),
        _decimal(stage.train_loss),
        _decimal(stage.eval_loss),
        check,
        ", ".join(said),
    )


# ----- time and memory ------------------------------------------------------------------------------------------------


def _costs(record: Record, chart: Chart | None) -> str:
    costs = record.phase_costs
    if not costs:
        return _missing("No step is logged yet.")
    has_seconds = any(cost.median_step_seconds is not None for cost in costs)
    heads = ["phase", "steps", "tokens/s, median", "tokens/s, last", "peak memory"]
    if has_seconds:
        heads.insert(4, "step time, median")
    rows = []
    for cost in costs:
        memory = "–" if cost.peak_memory_gib is None else f"{cost.peak_memory_gib:.2f} GiB"
        row = [cost.phase, f"{cost.steps:,}", _count(cost.median_tokens_per_second)]
        row += [_count(cost.last_tokens_per_second)]
        if has_seconds:
            row.append("–" if cost.median_step_seconds is None else f"{cost.median_step_seconds:.3g} s")
        rows.append([*row, memory])
    note = '<p class="quiet">Tokens/s of all processes together; peak memory of the main process, until then.</p>'
    return _table(heads, rows) + note + ("" if chart is None else chart_svg(chart, "tokens per second over steps"))


# ----- data -----------------------------------------------------------------------------------------------------------


def _data(record: Record) -> str:
    parts = [_data_part(name, as_mapping(record.data.get(name))) for name in ("train", "dev")]
    held_out = as_int(record.data.get("held_out"))
    if held_out:
        parts.append(f"<p>Dev rows: {held_out:,} of the train rows (data.val_set_size).</p>")
    if any(parts):
        return "".join(parts)
    datasets = [as_mapping(one) for one in as_list(setting(record.config, "data", "datasets"))]
    rows = [(_code(one.get("path")), _text(one.get("type"))) for one in datasets]
    table = _table(("data set", "type"), rows, num_text=2) if rows else ""
    return table + _missing("Rows, lengths and masks: <code>sora-llm preprocess CONFIG</code> counts them.")


def _data_part(name: str, section: Mapping[str, Any]) -> str:
    datasets = [as_mapping(one) for one in as_list(section.get("datasets"))]
    if not datasets:
        return ""
    columns = [("read", "rows_read"), ("kept", "rows_kept")]
    losses = (
        ("malformed", "num_bad_rows"),
        ("too long", "too_long"),
        ("truncated", "truncated"),
        ("split", "split"),
        ("untrained", "no_supervised"),
        ("repeated", "duplicates"),
    )
    columns += [(title, key) for title, key in losses if any(as_number(one.get(key)) for one in datasets)]
    columns.append(("tokens", "tokens"))
    rows = [_data_row(_code(one.get("path")), one, columns) for one in datasets]
    if len(rows) > 1:
        rows.append(_data_row("all", section, columns))
    heads = ["data set", "type", *(title for title, _ in columns), "supervised"]
    parts = [f"<h3>{name.capitalize()} rows</h3>", _table(heads, rows, num_text=2)]
    if as_number(section.get("mean_length")) is not None:
        parts.append(
            f"<p>Tokens per row: mean {_count(section.get('mean_length'))}, median "
            f"{_count(section.get('median_length'))}, longest {_count(section.get('max_length'))}. Packed into "
            f"sequences of {_count(section.get('sequence_len'))} they fill {_percent(section.get('fill_rate'))}.</p>"
        )
    return "".join([*parts, _histogram(section)])


def _data_row(name: str, counts: Mapping[str, Any], columns: Sequence[tuple[str, str]]) -> list[str]:
    numbers = [_count(counts.get(key)) for _, key in columns]
    return [name, _text(counts.get("type", "")), *numbers, _percent(counts.get("supervised_fraction"))]


def _histogram(section: Mapping[str, Any]) -> str:
    bins = [
        (low, high, rows)
        for low, high, rows in (one for one in as_list(section.get("length_histogram")) if len(as_list(one)) == 3)
        if None not in (as_int(low), as_int(high), as_int(rows))
    ]
    most = max((rows for _, _, rows in bins), default=0)
    if most <= 0:
        return ""
    lines = "".join(
        f'<tr><td>{low:,} – {high:,}</td><td class="bar"><i style="width:{100 * max(0, rows) / most:.1f}%"></i></td>'
        f"<td>{rows:,}</td></tr>\n"
        for low, high, rows in bins
    )
    return (
        '<div class="scroll"><table class="bars"><thead><tr><th>tokens</th><th></th><th>rows</th></tr></thead>'
        f"<tbody>{lines}</tbody></table></div>"
    )


# ----- adapter, samples, environment ----------------------------------------------------------------------------------


def _adapter(record: Record) -> str:
    certificate = record.certificate
    if not certificate:
        checkpoint = record.status.get("checkpoint")
        where = f" The newest checkpoint is {_code(checkpoint)}." if checkpoint else ""
        return _missing(f"Not exported yet.{where}")
    value, _ = _self_check(record)
    facts = [
        ("folder", _code(record.status.get("adapter") or "adapter")),
        ("self-check", value),
        ("largest relative error of ΔW", _error(record.delta_error)),
        ("relative error of the logits", _error(as_number(certificate.get("logits_error")))),
        ("layout", _text(certificate.get("layout"))),
        ("PEFT that reloaded it", _text(certificate.get("peft_version"))),
        ("SHA-256 of the weights", _code(certificate.get("sha256"))),
    ]
    if record.adapter_bytes is not None:
        facts.insert(1, ("size", f"{_bytes(record.adapter_bytes)} ({record.adapter_bytes:,} bytes)"))
    return _facts(facts)


def _samples(record: Record) -> str:
    parts = []
    for sample in record.samples:
        answers = [("prompt", "prompt"), ("base", "base model"), ("adapted", "with the adapter")]
        said = "".join(
            f'<p class="quiet">{label}</p><blockquote>{_text(sample[key])}</blockquote>'
            for key, label in answers
            if key in sample
        )
        parts.append(said)
    return "".join(parts)


def _environment(record: Record) -> str:
    env = record.env
    if not env:
        return _missing("env.json is not there yet.")
    hardware = as_mapping(env.get("hardware"))
    gpus = ", ".join(_text(gpu) for gpu in as_list(hardware.get("gpus"))) or "none"
    versions = as_mapping(env.get("versions"))
    return _facts(
        [
            ("processes", _text(env.get("num_processes", "–"))),
            ("strategy", _text(env.get("strategy", "–"))),
            ("GPUs", gpus),
            ("machine", f"{_text(hardware.get('cpu_cores', '–'))} cores, {_text(hardware.get('memory_gib', '–'))} GiB"),
            ("versions", ", ".join(f"{_text(name)} {_text(version)}" for name, version in versions.items())),
            ("git commit", _code(env.get("git_commit") or "–")),
        ]
    )
