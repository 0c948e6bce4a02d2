"""Charts of a report as inline SVG. matplotlib loads when a chart is drawn, not on import."""

import html
import io
import math
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

# matplotlib can only write fixed colours. Each is a placeholder that becomes a CSS property of the
# page, so that one chart fits the light and the dark theme.
_THEME = {
    "#010101": "var(--ink)",
    "#020202": "var(--muted)",
    "#030303": "var(--line)",
    "#040404": "var(--accent)",
    "#050505": "var(--good)",
    "#060606": "var(--bad)",
    "#070707": "var(--unsure)",
}
INK, MUTED, LINE, ACCENT, GOOD, BAD, UNSURE = _THEME

VERDICT_COLOURS = {
    "better": GOOD,
    "retained": GOOD,
    "worse": BAD,
    "forgotten": BAD,
}

WIDTH = 7.4  # inches
_ROW = 0.36  # inches a row
_FRAME = 0.62  # inches for the axis and its label
_LABELS = 1.9  # inches for the names at the left


class Point(NamedTuple):
    """One row of a chart: a value and its interval in the axis' unit; `verdict` sets the colour.

    `limit` is the least that still counts as retained; NaN where the row has no limit of its own.
    """

    label: str
    value: float
    low: float
    high: float
    verdict: str = ""
    limit: float = math.nan


def score_chart(name: str, points: Sequence[Point], axis: str) -> str:
    """Scores of the variants of a model, one row each, with 95 % intervals.

    Args:
        name: unique on the page; it becomes part of the SVG's ids.
        points: from top to bottom.
        axis: label of the horizontal axis, with its unit.
    """
    figure, axes = _canvas(points, axis)
    axes.axvline(points[0].value, color=MUTED, linewidth=1, linestyle=(0, (1, 3)), zorder=1)
    _draw(axes, points)
    return svg(figure, name, f"{axis}: " + _spoken(points))


def forest_chart(name: str, points: Sequence[Point], axis: str, margin: float) -> str:
    """Differences with 95 % intervals, the zero line and the line of the non-inferiority margin.

    Args:
        name: unique on the page; it becomes part of the SVG's ids.
        points: from top to bottom.
        axis: label of the horizontal axis, with its unit.
        margin: the loss that still counts as retained, in the axis' unit.
    """
    figure, axes = _canvas(points, axis)
    axes.axvline(0, color=MUTED, linewidth=1, zorder=1)
    axes.axvline(-margin, color=BAD, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for row, point in enumerate(points):
        if not math.isnan(point.limit) and point.limit != -margin:
            ends = (row - 0.3, row + 0.3)
            axes.plot((point.limit, point.limit), ends, color=BAD, linewidth=1.5, zorder=2)
    for position, text in ((0, "no change"), (-margin, f"margin −{margin:g}")):
        axes.annotate(
            text,
            (position, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="left" if position == 0 else "right",
            color=MUTED,
            fontsize=8,
        )
    _draw(axes, points)
    return svg(figure, name, f"{axis}: " + _spoken(points))


class Pair(NamedTuple):
    """One row of a chart: a value before and after; `limit` is the least that still counts as retained."""

    label: str
    before: float
    after: float
    limit: float
    verdict: str = ""


def dumbbell_chart(name: str, pairs: Sequence[Pair], axis: str) -> str:
    """Scores before and after, one row each: an open mark, a line to a filled one, a tick at the limit.

    Args:
        name: unique on the page; it becomes part of the SVG's ids.
        pairs: from top to bottom.
        axis: label of the horizontal axis, with its unit.
    """
    figure, axes = _canvas(pairs, axis)
    for row, pair in enumerate(pairs):
        colour = VERDICT_COLOURS.get(pair.verdict, UNSURE)
        axes.plot(
            (pair.limit, pair.limit), (row - 0.3, row + 0.3), color=BAD, linewidth=1.5, zorder=2
        )
        axes.plot((pair.before, pair.after), (row, row), color=colour, linewidth=2, zorder=3)
        axes.plot(
            pair.before, row, "o", color=MUTED, markersize=8, markerfacecolor="none", zorder=4
        )
        axes.plot(pair.after, row, "o", color=colour, markersize=7, zorder=5)
    spoken = (f"{pair.label} {pair.before:.1f} to {pair.after:.1f}" for pair in pairs)
    return svg(figure, name, f"{axis}: " + "; ".join(spoken))


class Spread(NamedTuple):
    """One row of a chart: quantiles of what was counted."""

    label: str
    quantiles: Sequence[float]  # at 0, 5, 25, 50, 75, 95 and 100 %


def spread_chart(name: str, spreads: Sequence[Spread], axis: str) -> str:
    """Distributions as bars on a logarithmic axis, one row each.

    A thin line spans everything, a thick one 5–95 %, a box the middle half; a mark is the median.

    Args:
        name: unique on the page; it becomes part of the SVG's ids.
        spreads: from top to bottom. A logarithm has no zero, so 0 is drawn at 1.
        axis: label of the horizontal axis, with its unit.
    """
    figure, axes = _canvas(spreads, axis)
    for row, spread in enumerate(spreads):
        low, p5, p25, median, p75, p95, high = (max(1.0, one) for one in spread.quantiles)
        axes.plot((low, high), (row, row), color=MUTED, linewidth=1, zorder=2)
        axes.plot((p5, p95), (row, row), color=ACCENT, linewidth=3, zorder=3)
        axes.barh(row, p75 - p25, 0.5, p25, color=ACCENT, linewidth=0, zorder=4)
        axes.plot((median, median), (row - 0.32, row + 0.32), color=INK, linewidth=2.5, zorder=5)
    least = max(1.0, min(spread.quantiles[0] for spread in spreads))
    most = max(2 * least, *(spread.quantiles[-1] for spread in spreads))
    axes.set_xscale("log")
    axes.set_xlim(least / 1.15, most * 1.15)
    ticks = _log_ticks(least / 1.15, most * 1.15)
    axes.set_xticks(
        ticks, [f"{tick:,}".replace(",", "\N{NARROW NO-BREAK SPACE}") for tick in ticks]
    )
    axes.minorticks_off()
    spoken = (f"{spread.label} {spread.quantiles[3]:.0f}" for spread in spreads)
    return svg(figure, name, f"{axis}, medians: " + "; ".join(spoken))


def _log_ticks(low: float, high: float) -> list[int]:
    """Round numbers between the ends; powers of ten alone where there are many."""
    digits = (1,) if high > 1000 * low else (1, 2, 5)
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    candidates = (digit * 10**power for power in powers if power >= 0 for digit in digits)
    return [tick for tick in candidates if low <= tick <= high]


def _canvas(
    points: Sequence[Point] | Sequence[Pair] | Sequence[Spread], axis: str
) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    height = _ROW * len(points) + _FRAME
    figure = Figure(figsize=(WIDTH, height))
    # Margins are fixed, not fitted: fitted ones depend on the fonts of the machine.
    axes = figure.add_axes(
        (_LABELS / WIDTH, 0.42 / height, 1 - (_LABELS + 0.2) / WIDTH, 1 - _FRAME / height)
    )
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.set_yticks(range(len(points)))
    axes.set_yticklabels([point.label for point in points], parse_math=False)
    axes.set_xlabel(axis, parse_math=False, color=MUTED, fontsize=9)
    axes.tick_params(axis="both", length=0, labelsize=9, labelcolor=INK)
    axes.tick_params(axis="x", labelcolor=MUTED)
    axes.grid(axis="x", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _draw(axes: Any, points: Sequence[Point]) -> None:
    for row, point in enumerate(points):
        colour = VERDICT_COLOURS.get(point.verdict, UNSURE) if point.verdict else ACCENT
        if point.low <= point.high:  # false for NaN: a value without an interval is only a dot
            axes.plot((point.low, point.high), (row, row), color=colour, linewidth=2, zorder=2)
        axes.plot(point.value, row, "o", color=colour, markersize=7, zorder=3)


def _spoken(points: Sequence[Point]) -> str:
    return "; ".join(f"{point.label} {point.value:.1f}" for point in points)


def svg(
    figure: Any, name: str, description: str, titles: Mapping[str, str] = MappingProxyType({})
) -> str:
    """The figure as an `<svg>` element; equal figures give equal text.

    Args:
        figure: what is drawn.
        name: unique on the page; it becomes part of the ids.
        description: what a screen reader says of the whole.
        titles: id of a part (matplotlib's `gid`) → what is shown when the pointer rests on it.
    """
    import matplotlib

    buffer = io.StringIO()
    # Text stays text: it takes the page's font, can be selected, and needs no glyph outlines.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    # Every figure calls its parts figure_1, axes_1, …, but an id must be unique on the page.
    text = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", text)
    text = re.sub(
        r"(?<=: )#(?:0\d){3}\b", lambda found: _THEME.get(found.group(), found.group()), text
    )
    text = re.sub(r"font-family: [^;]+; ", "", text)
    text = re.sub(r"<style.*?</style>", "", text, count=1)  # it would apply to the whole page
    text = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", text, count=1)
    for part, title in titles.items():
        group = f'<g id="{name}-{part}">'
        text = text.replace(group, f"{group}<title>{html.escape(title)}</title>", 1)
    label = html.escape(description, quote=True)
    return text.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
