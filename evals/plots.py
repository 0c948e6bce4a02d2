"""Charts of a report as inline SVG. matplotlib loads when a chart is drawn, not on import."""

import html
import io
import re
from collections.abc import Sequence
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
_INK, _MUTED, _LINE, _ACCENT, _GOOD, _BAD, _UNSURE = _THEME

_VERDICT_COLOURS = {
    "better": _GOOD,
    "retained": _GOOD,
    "worse": _BAD,
    "forgotten": _BAD,
}

_WIDTH = 7.4  # inches
_ROW = 0.36  # inches a row
_FRAME = 0.62  # inches for the axis and its label
_LABELS = 1.9  # inches for the names at the left


class Point(NamedTuple):
    """One row of a chart: a value and its interval in the axis' unit; `verdict` sets the colour."""

    label: str
    value: float
    low: float
    high: float
    verdict: str = ""


def score_chart(name: str, points: Sequence[Point], axis: str) -> str:
    """Scores of the variants of a model, one row each, with 95 % intervals.

    Args:
        name: unique on the page; it becomes part of the SVG's ids.
        points: from top to bottom.
        axis: label of the horizontal axis, with its unit.
    """
    figure, axes = _canvas(points, axis)
    axes.axvline(points[0].value, color=_MUTED, linewidth=1, linestyle=(0, (1, 3)), zorder=1)
    _draw(axes, points)
    return _svg(figure, name, f"{axis}: " + _spoken(points))


def forest_chart(name: str, points: Sequence[Point], axis: str, margin: float) -> str:
    """Differences with 95 % intervals, the zero line and the line of the non-inferiority margin.

    Args:
        name: unique on the page; it becomes part of the SVG's ids.
        points: from top to bottom.
        axis: label of the horizontal axis, with its unit.
        margin: the loss that still counts as retained, in the axis' unit.
    """
    figure, axes = _canvas(points, axis)
    axes.axvline(0, color=_MUTED, linewidth=1, zorder=1)
    axes.axvline(-margin, color=_BAD, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    for position, text in ((0, "no change"), (-margin, f"margin −{margin:g}")):
        axes.annotate(
            text,
            (position, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            ha="left" if position == 0 else "right",
            color=_MUTED,
            fontsize=8,
        )
    _draw(axes, points)
    return _svg(figure, name, f"{axis}: " + _spoken(points))


def _canvas(points: Sequence[Point], axis: str) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    height = _ROW * len(points) + _FRAME
    figure = Figure(figsize=(_WIDTH, height))
    # Margins are fixed, not fitted: fitted ones depend on the fonts of the machine.
    axes = figure.add_axes(
        (_LABELS / _WIDTH, 0.42 / height, 1 - (_LABELS + 0.2) / _WIDTH, 1 - _FRAME / height)
    )
    axes.set_ylim(len(points) - 0.5, -0.5)
    axes.set_yticks(range(len(points)))
    axes.set_yticklabels([point.label for point in points], parse_math=False)
    axes.set_xlabel(axis, parse_math=False, color=_MUTED, fontsize=9)
    axes.tick_params(axis="both", length=0, labelsize=9, labelcolor=_INK)
    axes.tick_params(axis="x", labelcolor=_MUTED)
    axes.grid(axis="x", color=_LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes


def _draw(axes: Any, points: Sequence[Point]) -> None:
    for row, point in enumerate(points):
        colour = _VERDICT_COLOURS.get(point.verdict, _UNSURE) if point.verdict else _ACCENT
        if point.low <= point.high:  # false for NaN: a value without an interval is only a dot
            axes.plot((point.low, point.high), (row, row), color=colour, linewidth=2, zorder=2)
        axes.plot(point.value, row, "o", color=colour, markersize=7, zorder=3)


def _spoken(points: Sequence[Point]) -> str:
    return "; ".join(f"{point.label} {point.value:.1f}" for point in points)


def _svg(figure: Any, name: str, description: str) -> str:
    """The figure as an `<svg>` element; equal figures give equal text."""
    import matplotlib

    buffer = io.StringIO()
    # Text stays text: it takes the page's font, can be selected, and needs no glyph outlines.
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    # Every figure calls its parts figure_1, axes_1, …, but an id must be unique on the page.
    svg = re.sub(r'(\bid="|xlink:href="#|url\(#)', rf"\g<1>{name}-", svg)
    svg = re.sub(
        r"(?<=: )#(?:0\d){3}\b", lambda found: _THEME.get(found.group(), found.group()), svg
    )
    svg = re.sub(r"font-family: [^;]+; ", "", svg)
    svg = re.sub(r"<style.*?</style>", "", svg, count=1)  # it would apply to the whole page
    svg = re.sub(r'width="[\d.]+pt" height="[\d.]+pt" ', "", svg, count=1)
    label = html.escape(description, quote=True)
    return svg.replace("<svg ", f'<svg role="img" aria-label="{label}" ', 1)
