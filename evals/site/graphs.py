"""Charts over a plane as inline SVG: trade-offs and training curves. matplotlib loads when one is drawn."""

import html
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

from reward.pages.plots import ACCENT, BAD, INK, LINE, MUTED, UNSURE, WIDTH, svg

_SIZE = 8.5  # of a name, in points; a character is taken to be 0.62 of it wide, as the font is the page's
_MARKS, _SHADES = ("o", "s", "^", "D", "v"), (1.0, 0.6, 0.4, 0.75, 0.3)  # of each seed
_GAPS = (4.0, 9.0, 15.0)  # between a point and its name, in points
_LOWEST = 30.0  # below are the axis and its label, in points


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
    name: str,
    spots: Sequence[Spot],
    axes_names: tuple[str, str],
    is_less_better: bool = False,
    margin: float | None = None,
) -> str:
    """Points with their intervals; those of the Pareto front are filled and joined.

    Where the names do not fit beside the points, the points are numbered, and a list below the chart names them.

    Args:
        name: unique on the page; it becomes part of the SVG's ids.
        spots: the points. The front is that of the values themselves, whatever their intervals.
        axes_names: labels of the horizontal and the vertical axis, with their units.
        is_less_better: whether the horizontal number is better when it is smaller. More is better for the vertical.
        margin: the loss that still counts as retained, in the vertical unit.
    """
    figure, axes = _plane(WIDTH, 3.6, axes_names)
    sign = -1 if is_less_better else 1
    best = front([(sign * spot.x, spot.y) for spot in spots])
    line = sorted((spots[place].x, spots[place].y) for place in best)
    axes.plot(*zip(*line, strict=True), color=ACCENT, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
    axes.axhline(0, color=MUTED, linewidth=1, zorder=1)
    if not is_less_better:
        axes.axvline(0, color=MUTED, linewidth=1, zorder=1)
    if margin is not None:
        _margin_line(axes, margin)
    for place, spot in enumerate(spots):
        _draw_spot(axes, spot, place in best, f"spot-{place}")
    axes.margins(0.12, 0.14)
    spoken = [
        f"{spot.label} {spot.x:.1f}, {spot.y:.1f}{' (front)' if place in best else ''}"
        for place, spot in enumerate(spots)
    ]
    is_numbered = not write_names(axes, spots, [spot.label for spot in spots], best)
    if is_numbered:
        numbers = [str(place) for place in range(1, len(spots) + 1)]
        write_names(axes, spots, numbers, best, is_last_resort=True)
    titles = {f"spot-{place}": text for place, text in enumerate(spoken)}
    description = f"{axes_names[1]} against {axes_names[0]}: {'; '.join(spoken)}"
    return svg(figure, name, description, titles) + (_legend(spots) if is_numbered else "")


def _draw_spot(axes: Any, spot: Spot, is_best: bool, gid: str) -> None:
    colour = ACCENT if is_best else MUTED
    axes.plot(spot.x_interval, (spot.y, spot.y), color=colour, linewidth=1.2, zorder=3)
    axes.plot((spot.x, spot.x), spot.y_interval, color=colour, linewidth=1.2, zorder=3)
    face = {} if is_best else {"markerfacecolor": "none"}
    axes.plot(spot.x, spot.y, "o", color=colour, markersize=7, zorder=4, gid=gid, **face)


def _margin_line(axes: Any, margin: float) -> None:
    axes.axhline(-margin, color=BAD, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    axes.annotate(
        f"margin −{margin:g}",
        (1, -margin),
        xycoords=("axes fraction", "data"),
        xytext=(4, 0),
        textcoords="offset points",
        va="center",
        color=MUTED,
        fontsize=8,
    )


def _legend(spots: Sequence[Spot]) -> str:
    return (
        '<ol class="legend">'
        + "".join(f"<li>{html.escape(spot.label)}</li>" for spot in spots)
        + "</ol>"
    )


class Box(NamedTuple):
    """A rectangle in points."""

    left: float
    bottom: float
    right: float
    top: float

    def overlaps(self, other: "Box") -> bool:
        """Whether the two have an area in common."""
        return (
            self.left < other.right
            and other.left < self.right
            and self.bottom < other.top
            and other.bottom < self.top
        )


def write_names(
    axes: Any,
    spots: Sequence[Spot],
    names: Sequence[str],
    best: Sequence[int],
    is_last_resort: bool = False,
) -> bool:
    """Write each name near its point where it lies on no other name or point.

    Args:
        axes: on which the points are drawn already.
        spots: the points.
        names: what is written, one a point.
        best: places of the points that stand out.
        is_last_resort: write a name over another one rather than nothing.

    Returns:
        False, with nothing written, where a name fits nowhere.
    """
    axes.autoscale_view()  # the limits are otherwise found when the figure is drawn
    to_points = 72 / axes.figure.dpi
    centres = axes.transData.transform([(spot.x, spot.y) for spot in spots]) * to_points
    width, height = (size * 72 for size in axes.figure.get_size_inches())
    taken = [Box(x - 4, y - 4, x + 4, y + 4) for x, y in centres]
    offsets = []
    for (x, y), name in zip(centres, names, strict=True):
        boxes = _boxes(float(x), float(y), 0.62 * _SIZE * len(name))
        free = (
            box
            for box in boxes
            if box.left > 0 and box.right < width and box.bottom > _LOWEST and box.top < height
            and not any(box.overlaps(other) for other in taken)
        )  # fmt: skip
        box = next(free, boxes[0] if is_last_resort else None)
        if box is None:
            return False
        taken.append(box)
        offsets.append((box.left - x, box.bottom - y + 2))
    for place, (spot, name) in enumerate(zip(spots, names, strict=True)):
        axes.annotate(
            name,
            (spot.x, spot.y),
            xytext=offsets[place],
            textcoords="offset points",
            color=INK if place in best else MUTED,
            fontsize=_SIZE,
            zorder=6,
            parse_math=False,
        )
    return True


def _boxes(x: float, y: float, width: float) -> list[Box]:
    """Where a name of a point may stand, the nearest place first: right, left, above and below."""
    height = _SIZE * 1.15
    boxes = []
    for gap in _GAPS:
        for left in (x + 5, x - 5 - width, x - width / 2, x + gap, x - gap - width):
            for bottom in (y + gap, y - gap - height, y - height / 2):
                boxes.append(Box(left, bottom, left + width, bottom + height))
    return boxes


class Curve(NamedTuple):
    """A line over training steps; one that was taken on held-out rows is dashed, with marks.

    `number` tells the seeds apart: each has its own shade, and its own marks.
    """

    label: str
    steps: Sequence[float]
    values: Sequence[float]
    is_held_out: bool = False
    number: int = 0


def curve_chart(name: str, curves: Sequence[Curve], axis: str) -> str:
    """Curves over the training steps.

    Args:
        name: unique on the page; it becomes part of the SVG's ids.
        curves: each with at least one point.
        axis: label of the vertical axis.
    """
    figure, axes = _plane(4.4, 2.5, ("step", axis))
    for curve in curves:
        mark, shade = _MARKS[curve.number % len(_MARKS)], _SHADES[curve.number % len(_SHADES)]
        style: dict[str, Any] = {"marker": mark if len(curve.steps) == 1 else "", "alpha": shade}
        if curve.is_held_out:
            style |= {"linestyle": (0, (4, 2)), "marker": mark, "markersize": 4}
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
