"""Charts over a plane as inline SVG: trade-offs and training curves. matplotlib loads when one is drawn."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from evals.site.plots import ACCENT, INK, LINE, MUTED, UNSURE, WIDTH, svg

_NAMED = 8  # with more points than this, only those of the front are named
_LONGEST_NAME = 34


class Spot(NamedTuple):
    """A point of a trade-off with its 95 % intervals; NaN where an end is unknown."""

    label: str
    x: float
    y: float
    x_interval: tuple[float, float] = (math.nan, math.nan)
    y_interval: tuple[float, float] = (math.nan, math.nan)


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """The places of the points that no other point beats: in both numbers no worse, in one better (more is better)."""
    return [
        place
        for place, (x, y) in enumerate(points)
        if not any(a >= x and b >= y and (a > x or b > y) for a, b in points)
    ]


def trade_chart(
    name: str, spots: Sequence[Spot], axes_names: tuple[str, str], is_less_better: bool = False
) -> str:
    """Points with their intervals; those of the Pareto front are filled and joined.

    Args:
        name: unique on the page; it becomes part of the SVG's ids.
        spots: the points. The front is that of the values themselves, whatever their intervals.
        axes_names: labels of the horizontal and the vertical axis, with their units.
        is_less_better: whether the horizontal number is better when it is smaller. More is better for the vertical.
    """
    figure, axes = _plane(WIDTH, 3.6, axes_names)
    sign = -1 if is_less_better else 1
    best = front([(sign * spot.x, spot.y) for spot in spots])
    line = sorted((spots[place].x, spots[place].y) for place in best)
    axes.plot(*zip(*line, strict=True), color=ACCENT, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    axes.axhline(0, color=MUTED, linewidth=1, zorder=1)
    if not is_less_better:
        axes.axvline(0, color=MUTED, linewidth=1, zorder=1)
    for place, spot in enumerate(spots):
        is_best = place in best
        colour = ACCENT if is_best else MUTED
        axes.plot(spot.x_interval, (spot.y, spot.y), color=colour, linewidth=1.2, zorder=3)
        axes.plot((spot.x, spot.x), spot.y_interval, color=colour, linewidth=1.2, zorder=3)
        face = {} if is_best else {"markerfacecolor": "none"}
        axes.plot(spot.x, spot.y, "o", color=colour, markersize=7, zorder=4, **face)
        if is_best or len(spots) <= _NAMED:
            _name(axes, spot, INK if is_best else MUTED)
    axes.margins(0.12, 0.14)
    spoken = "; ".join(
        f"{spot.label} {spot.x:.1f}, {spot.y:.1f}{' (front)' if place in best else ''}"
        for place, spot in enumerate(spots)
    )
    return svg(figure, name, f"{axes_names[1]} against {axes_names[0]}: {spoken}")


def _name(axes: Any, spot: Spot, colour: str) -> None:
    text = spot.label
    if len(text) > _LONGEST_NAME:
        text = text[: _LONGEST_NAME - 1] + "…"
    axes.annotate(
        text,
        (spot.x, spot.y),
        xytext=(7, 6),
        textcoords="offset points",
        color=colour,
        fontsize=8.5,
        parse_math=False,
    )


class Curve(NamedTuple):
    """A line over training steps; one that was taken on held-out rows is dashed, with marks."""

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    is_held_out: bool = False


def curve_chart(name: str, curves: Sequence[Curve], axis: str) -> str:
    """Curves over the training steps.

    Args:
        name: unique on the page; it becomes part of the SVG's ids.
        curves: each with at least one point.
        axis: label of the vertical axis.
    """
    figure, axes = _plane(4.4, 2.5, ("step", axis))
    for curve in curves:
        style: dict[str, Any] = {"marker": "o" if len(curve.steps) == 1 else ""}
        if curve.is_held_out:
            style = {"linestyle": (0, (4, 2)), "marker": "o", "markersize": 4}
        axes.plot(curve.steps, curve.values, color=_colour(curve), linewidth=1.4, zorder=3, **style)
    _label_ends(axes, curves)
    axes.margins(x=0.04)
    ends = "; ".join(
        f"{curve.label} from {curve.values[0]:.3g} to {curve.values[-1]:.3g}" for curve in curves
    )
    return svg(figure, name, f"{axis} over steps: {ends}")


def _colour(curve: Curve) -> str:
    return UNSURE if curve.is_held_out else ACCENT


def _label_ends(axes: Any, curves: Sequence[Curve]) -> None:
    """Name each curve at its end; a name moves up where it would lie on another."""
    low, high = axes.get_ylim()
    least = (high - low) * 0.075  # height of a name
    place = -math.inf
    for curve in sorted(curves, key=lambda one: one.values[-1]):
        place = max(curve.values[-1], place + least)
        axes.annotate(
            curve.label,
            (curve.steps[-1], place),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            color=_colour(curve),
            fontsize=8,
            parse_math=False,
            annotation_clip=False,
        )


def _plane(width: float, height: float, names: tuple[str, str]) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height))
    # Margins are fixed, not fitted: fitted ones depend on the fonts of the machine. The right one holds names.
    right = 1.1 if width == WIDTH else 0.75
    axes = figure.add_axes(
        (0.75 / width, 0.5 / height, 1 - (0.75 + right) / width, 1 - 0.7 / height)
    )
    axes.set_xlabel(names[0], parse_math=False, color=MUTED, fontsize=9)
    axes.set_ylabel(names[1], parse_math=False, color=MUTED, fontsize=9)
    axes.tick_params(axis="both", length=0, labelsize=8.5, labelcolor=MUTED)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return figure, axes
