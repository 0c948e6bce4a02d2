"""The course of proxy and gold measure against KL, as inline SVG. matplotlib loads when one is drawn."""

import math
from collections.abc import Sequence
from typing import Any

from reward.looks import Look, Mean, interval
from reward.pages.plots import ACCENT, LINE, MUTED, UNSURE, WIDTH, svg

_PANEL = 1.75  # inches
_NAMES = ("proxy", "gold")


def course_chart(name: str, looks: Sequence[Look], unit: str) -> str:
    """Two panels over one axis: the proxy above, the gold measure below, each with 95 % intervals over prompts.

    The horizontal axis is √KL, over which Gao, Schulman and Hilton (2023) draw their courses: the first steps, in which
    most happens, take little KL.

    Args:
        name: unique on the page; it becomes part of the SVG's ids.
        looks: in their order.
        unit: what `Look.step` counts, such as `step`.
    """
    from matplotlib.figure import Figure

    height = 2 * _PANEL + 0.75
    figure = Figure(figsize=(WIDTH, height))
    places = [math.sqrt(max(0.0, look.mean("kl").value)) for look in looks]
    for row, (measure, colour) in enumerate(zip(_NAMES, (ACCENT, UNSURE), strict=True)):
        bottom = (0.5 + (1 - row) * (_PANEL + 0.1)) / height
        axes = figure.add_axes((0.95 / WIDTH, bottom, 1 - 1.15 / WIDTH, (_PANEL - 0.12) / height))
        _panel(axes, measure, colour)
        _draw(axes, places, [look.mean(measure) for look in looks], colour)
        if row == 0:
            _name_steps(axes, places, looks, unit)
            axes.tick_params(labelbottom=False)
        else:
            axes.set_xlabel("√KL from the start (√nats)", color=MUTED, fontsize=9)
    spoken = "; ".join(
        f"{unit} {look.step}: proxy {look.mean('proxy').value:.3g}, gold {look.mean('gold').value:.3g}"
        for look in looks
    )
    return svg(figure, name, f"proxy and gold measure against the square root of KL: {spoken}")


def _panel(axes: Any, measure: str, colour: str) -> None:
    axes.set_ylabel(measure, color=colour, fontsize=9)
    axes.yaxis.set_label_coords(
        -0.115, 0.5
    )  # clear of the numbers where a narrow page enlarges both
    axes.tick_params(axis="both", length=0, labelsize=8.5, labelcolor=MUTED)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)


def _draw(axes: Any, places: Sequence[float], means: Sequence[Mean], colour: str) -> None:
    values = [mean.value for mean in means]
    axes.plot(places, values, "o-", color=colour, linewidth=1.6, markersize=5, zorder=3)
    for place, mean in zip(places, means, strict=True):
        low, high = interval(mean)
        if low <= high:  # false for NaN
            axes.plot((place, place), (low, high), color=colour, linewidth=1.2, zorder=2)
    axes.margins(x=0.05, y=0.12)


def _name_steps(axes: Any, places: Sequence[float], looks: Sequence[Look], unit: str) -> None:
    """Write the step above each look that has room; the first and the last always."""
    from matplotlib.transforms import blended_transform_factory

    span = (max(places) - min(places)) or 1.0
    least = 0.055 * span  # width of a number
    taken = [places[0], places[-1]]
    shown = {0, len(looks) - 1}
    for number, place in enumerate(places):
        if number not in shown and all(abs(place - other) >= least for other in taken):
            taken.append(place)
            shown.add(number)
    if len(looks) > 1 and abs(places[0] - places[-1]) < least:
        shown.discard(0)
    above = blended_transform_factory(axes.transData, axes.transAxes)
    for number in sorted(shown):
        text = f"{unit} {looks[number].step}" if number == min(shown) else str(looks[number].step)
        axes.annotate(
            text,
            (places[number], 1),
            xycoords=above,
            xytext=(0, 3),
            textcoords="offset points",
            ha="center",
            color=MUTED,
            fontsize=8,
            parse_math=False,
            annotation_clip=False,
        )
