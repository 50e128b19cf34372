"""The report's charts as plain data: line charts with phases behind them, a picture of ranks over time."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from sora_llm.report_page.grids import projection_means, short_names
from sora_llm.report_page.record import Point, Record, Span

COLOURS = ("#2f6fb7", "#d9662b", "#3f9a4d", "#8a5cc2", "#b8860b", "#c2417c", "#3a9fa8", "#7a6a5a")
"""Colours of lines on a light background; the page has a second set for dark screens."""

CROWDED = 80  # dots on a line
MAX_POINTS = 800  # of a line: already more than a chart has pixels for
PICTURE_COLUMNS = 240  # of ranks over time
_LEVELS = ((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141), (39, 173, 129))
VIRIDIS = (*_LEVELS, (92, 200, 99), (170, 220, 50), (253, 231, 37))
"""viridis in eighths: perceptually uniform, and monotone in grey."""


@dataclass(frozen=True)
class Series:
    """Points that belong together.  `style`: line, thin, faint, dashed, dots, or linked (dots on a line)."""

    label: str
    points: Sequence[Point]
    colour: int
    style: str = "line"
    notes: Sequence[str] = ()
    """Labels above the points, one for each; "" for none."""

    @property
    def has_dots(self) -> bool:
        """Whether its points are drawn as dots: not if they would hide each other and the line."""
        return self.style != "linked" or len(self.points) <= CROWDED


@dataclass(frozen=True)
class Panel:
    """One pair of axes."""

    y_label: str
    series: Sequence[Series]
    height: int = 190
    from_zero: bool = False
    y_range: tuple[float, float] | None = None
    """Replaces the range of the points; anything outside is cut off."""


@dataclass(frozen=True)
class Chart:
    """Panels stacked above one x axis."""

    name: str
    x_label: str
    panels: Sequence[Panel]
    spans: Sequence[Span] = ()
    from_zero: bool = True
    """Whether the x axis begins at 0."""

    @property
    def x_range(self) -> tuple[float, float]:
        """The range of x over all points; never empty."""
        found = [x for panel in self.panels for series in panel.series for x, _ in series.points]
        found += [span.last for span in self.spans]
        return widened(0 if self.from_zero else min(found, default=0), max(found, default=1))


@dataclass(frozen=True)
class Picture:
    """A colour per module and step: a row per label, its values at evenly spaced steps of `x_range`."""

    name: str
    x_range: tuple[float, float]
    labels: Sequence[str]
    rows: Sequence[Sequence[int | None]]
    groups: Sequence[tuple[str, int]]
    """(name, rows) of neighbouring rows that belong together."""

    @cached_property
    def top(self) -> int:
        """The largest rank in the picture."""
        return max((value for row in self.rows for value in row if value is not None), default=0)


def charts(record: Record) -> dict[str, Chart]:
    """The charts that there is data for, by name."""
    found = [
        loss_chart(record),
        rank_chart(record),
        lambda_chart(record),
        rate_chart(record),
        budget_chart(record),
        path_chart(record),
        speed_chart(record),
    ]
    return {chart.name: chart for chart in found if any(s.points for panel in chart.panels for s in panel.series)}


def loss_chart(record: Record) -> Chart:
    """Train loss as logged and smoothed, dev loss, the exported adapter's dev loss."""
    raw, dev, exported = (record.series(key) for key in ("loss", "eval_loss", "eval_loss_exported"))
    series = []
    if len(raw) >= 60:
        series += [
            Series("train loss, mean since the last point", thin(raw), 0, "faint"),
            Series("smoothed", thin(smooth(raw)), 0),
        ]
    elif raw:
        series.append(Series("train loss, mean since the last point", raw, 0, "linked"))
    if dev:
        series.append(Series("dev loss", thin(dev), 1, "linked"))
    if exported:
        series.append(Series("dev loss of the exported adapter", exported[-1:], 2, "dots"))
    return Chart("loss", "step", [Panel("loss", series, 260, y_range=_loss_range(raw, dev))], record.spans)


def _loss_range(raw: Sequence[Point], dev: Sequence[Point]) -> tuple[float, float] | None:
    """A range that covers the dev loss, the smoothed train loss, and the raw train loss except for rare spikes."""
    values = sorted(y for _, y in raw)
    shown = [y for _, y in [*dev, *smooth(raw)]] + values[: max(1, math.ceil(0.98 * len(values)))]
    if not shown:
        return None
    low, high = widened(min(shown), max(shown))
    return low - 0.04 * (high - low), high + 0.04 * (high - low)


def rank_chart(record: Record) -> Chart:
    """The mean rank of all modules (weighted by their size) and of each projection, and the schedule's target."""
    means = [(line.step, projection_means(line.ranks)) for line in record.rank_lines]
    projections = list(dict.fromkeys(name for _, found in means for name in found))
    names = short_names(projections)
    series = [
        Series(names[name], [(step, found[name]) for step, found in means if name in found], 1 + i, "thin")
        for i, name in enumerate(projections)
    ]
    if len(series) > len(COLOURS) - 1:  # more lines than colours cannot be told apart
        series = []
    series.append(Series("mean rank of the adapter", thin(record.series("mean_rank")), 0))
    target = record.series("target_mean_rank")
    if target:
        series.append(Series("the schedule's target", thin(target), 0, "dashed"))
    return Chart("ranks", "step", [Panel("rank", series, 230, from_zero=True)], record.spans)


def lambda_chart(record: Record) -> Chart:
    """λ and, if it is adaptive, the threshold τ; one for each budget if there are several."""
    lambdas, threshold = record.series("lambda"), record.series("threshold")
    of_budgets, thresholds = record.named_series("lambdas"), record.named_series("thresholds")
    panels = []
    if of_budgets:
        panels.append(Panel("λ", _by_budget("λ", of_budgets), 130, from_zero=True))
    elif not (threshold or thresholds) or any(value for _, value in lambdas):
        panels.append(Panel("λ", [Series("λ", thin(lambdas), 0)], 130, from_zero=True))
    if threshold:
        panels.append(Panel("τ", [Series("threshold τ", thin(threshold), 1)], 130, from_zero=True))
    if thresholds:
        panels.append(Panel("τ", _by_budget("τ", thresholds), 130, from_zero=True))
    return Chart("lambda", "step", panels, record.spans)


def _by_budget(symbol: str, found: Mapping[str, Sequence[Point]]) -> list[Series]:
    return [
        Series(f"{symbol} of {name}", thin(points), i % len(COLOURS)) for i, (name, points) in enumerate(found.items())
    ]


def rate_chart(record: Record) -> Chart:
    """Learning rates of factors and gates, in panels of their own because their magnitudes differ."""
    fields = (("learning_rate", "learning rate"), ("gate_learning_rate", "gate learning rate"))
    panels = [
        Panel(label, [Series(label, thin(record.series(key)), i)], 110, from_zero=True)
        for i, (key, label) in enumerate(fields)
        if record.series(key)
    ]
    return Chart("rates", "step", panels, record.spans)


def budget_chart(record: Record) -> Chart:
    """Mean rank against the schedule's target, and kept parameters against the budget."""
    panels = []
    error = tracking_error(record)
    if len(error) > 1:
        panels.append(Panel("rank error", [Series("mean rank − schedule", thin(error), 1)], 120))
    budget = record.last("budget_params")
    if budget is not None:
        kept = record.series("kept_params")
        ends = [(0.0, budget), (max((x for x, _ in kept), default=1.0), budget)]
        series = [Series("kept parameters", thin(kept), 0), Series("budget", ends, 2, "dashed")]
        panels.insert(0, Panel("parameters", series, 190, from_zero=True))
    return Chart("budget", "step", panels, record.spans)


def tracking_error(record: Record) -> list[Point]:
    """mean_rank − target_mean_rank for the lines that have both."""
    wanted = dict(record.series("target_mean_rank"))
    return [(step, value - wanted[step]) for step, value in record.series("mean_rank") if step in wanted]


def path_chart(record: Record) -> Chart:
    """Dev and train loss of each stage against the parameters it kept."""
    stages = sorted((s for s in record.stages if s.kept_params is not None), key=lambda s: s.kept_params or 0)
    best = record.best_stage
    series: list[Series] = []
    for label, key, colour in (
        ("dev loss (generalisation)", "eval_loss", 1),
        ("train loss (memorisation)", "train_loss", 0),
    ):
        there = [stage for stage in stages if getattr(stage, key) is not None]
        notes = [f"λ {stage.sparse_lambda:.3g}" for stage in there] if not series else ()
        points = [(float(stage.kept_params or 0), float(getattr(stage, key))) for stage in there]
        if points:
            series.append(Series(label, points, colour, "linked", notes))
    if best is not None and best.kept_params is not None and best.eval_loss is not None:
        series.append(Series("best dev loss", [(float(best.kept_params), best.eval_loss)], 2, "ring"))
    for stage in stages:
        loss = stage.train_loss if stage.eval_loss is None else stage.eval_loss
        if stage.is_adapter and loss is not None:
            series.append(Series("adapter/", [(float(stage.kept_params or 0), loss)], 3, "diamond"))
    return Chart("path", "kept parameters", [Panel("loss", series, 260)], from_zero=False)


def speed_chart(record: Record) -> Chart:
    """Tokens per second."""
    series = [Series("tokens/s", thin(record.series("tokens_per_second")), 0)]
    return Chart("speed", "step", [Panel("tokens/s", series, 130, from_zero=True)], record.spans)


def rank_picture(record: Record) -> Picture | None:
    """The rank of every module over time, projection by projection; None with fewer than two logged steps."""
    lines = record.rank_lines
    if len(lines) < 2:
        return None
    grids, others = record.grids
    labels, groups = [], []
    for grid in grids:
        for projection, short in short_names(grid.projections).items():
            names = [grid.cells[layer, projection] for layer in grid.layers if (layer, projection) in grid.cells]
            labels += names
            groups.append((short.removesuffix("_proj"), len(names)))
    if others:
        labels += list(others)
        groups.append(("others", len(others)))
    last = max(record.step, lines[-1].step)
    steps = [last * (column + 0.5) / PICTURE_COLUMNS for column in range(PICTURE_COLUMNS)]
    logged = [line.step for line in lines]
    # Ranks hold until the next line; before the first line they are not known.
    known = [lines[at - 1].ranks if (at := bisect_right(logged, step)) else {} for step in steps]
    known[-1] = lines[-1].ranks
    rows = [[ranks.get(name) for ranks in known] for name in labels]
    return Picture("ranks_over_time", (0.0, float(max(last, 1))), labels, rows, groups)


# ----- numbers --------------------------------------------------------------------------------------------------------


def smooth(points: Sequence[Point]) -> list[Point]:
    """Means over a window around each point, a twentieth of all points wide: no lag, unlike a running average."""
    half = len(points) // 40
    sums = [0.0]
    for _, y in points:
        sums.append(sums[-1] + y)
    smoothed = []
    for i, (x, _) in enumerate(points):
        reach = min(half, max(i, half // 4), max(len(points) - 1 - i, half // 4))  # symmetric except at the very ends
        low, high = max(0, i - reach), min(len(points), i + reach + 1)
        smoothed.append((x, (sums[high] - sums[low]) / (high - low)))
    return smoothed


def thin(points: Sequence[Point], most: int = MAX_POINTS) -> list[Point]:
    """About `most` points at most that look the same: the lowest and highest of each stretch, and the two ends."""
    if len(points) <= most:
        return list(points)
    size = math.ceil(2 * len(points) / most)
    kept = {0, len(points) - 1}
    for start in range(0, len(points), size):
        stretch = range(start, min(start + size, len(points)))
        kept |= {min(stretch, key=lambda i: points[i][1]), max(stretch, key=lambda i: points[i][1])}
    return [points[i] for i in sorted(kept)]


def widened(low: float, high: float) -> tuple[float, float]:
    """The range, widened if it is empty."""
    if high > low:
        return low, high
    room = abs(low) * 0.1 or 1.0
    return low - (room if low else 0.0), high + room


def panel_range(panel: Panel) -> tuple[float, float]:
    """The lowest and the highest value of a panel's y axis."""
    if panel.y_range is not None:
        return panel.y_range
    found = [y for series in panel.series for _, y in series.points]
    low, high = widened(min(found, default=0.0), max(found, default=1.0))
    room = 0.06 * (high - low)
    if panel.from_zero and low >= 0:
        return 0.0, high + room
    return low - room, high + room


def ticks(low: float, high: float, most: float, least: float = 0.0) -> list[float]:
    """Round numbers (1, 2, 5 · 10ᵏ, at least `least` apart) within a range, at most about `most` of them."""
    rough = max((high - low) / most, least)
    if not (rough > 0 and math.isfinite(rough)):
        return [low]
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """Numbers as text, as short as possible while still distinct."""
    largest = max((abs(value) for value in values), default=0.0)
    gap = min((b - a for a, b in pairwise(values)), default=largest)
    for limit, factor, unit in ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k")):
        if largest >= limit:
            decimals = max(0, -math.floor(math.log10(gap / factor) + 1e-9)) if gap > 0 else 1
            return [f"{value / factor:.{decimals}f}{unit}" if value else "0" for value in values]
    if 0 < largest < 1e-3:
        return [f"{value:.3g}".replace("e-0", "e-") for value in values]
    decimals = max(0, -math.floor(math.log10(gap) + 1e-9)) if gap > 0 else 3
    return [f"{value:,.{decimals}f}" for value in values]


def colour_of(rank: int, top: int) -> tuple[int, int, int]:
    """The colour of a rank from 1 to `top`; rank 0 has none (it is hatched)."""
    place = (rank - 1) / (top - 1) if top > 1 else 1.0
    place = min(max(place, 0.0), 1.0) * (len(VIRIDIS) - 1)
    index = min(int(place), len(VIRIDIS) - 2)
    share = place - index
    red, green, blue = (round(a + share * (b - a)) for a, b in zip(VIRIDIS[index], VIRIDIS[index + 1], strict=True))
    return red, green, blue


def is_dark(colour: tuple[int, int, int]) -> bool:
    """Whether white text is easier to read on a colour than black, by relative luminance (WCAG)."""
    red, green, blue = (value / 3294.6 if value <= 10 else ((value / 255 + 0.055) / 1.055) ** 2.4 for value in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue < 0.179
