"""The charts of a reward model's report as inline SVG. matplotlib loads when one is drawn."""

import math
from collections.abc import Sequence
from typing import Any

from reward.pages.plots import ACCENT, BAD, GOOD, INK, LINE, MUTED, WIDTH, svg

_LEFT, _RIGHT, _LABELS = 0.75, 0.25, 1.9  # inches beside the axes; for the names of subsets
_ROW = 0.34  # inches a subset


def reliability_chart(name: str, bins: Sequence[dict[str, Any]]) -> str:
    """Accuracy against confidence, with intervals, over the number of pairs of each bin.

    Args:
        name: unique on the page.
        bins: of `reward.calibration.Bin`, as dictionaries; empty ones are left out.
    """
    figure = _figure(4.3)
    upper = _axes(figure, (1.45, 2.65), "confidence (%)", "in the right order (%)", is_upper=True)
    lower = _axes(figure, (0.5, 0.75), "confidence (%)", "pairs")
    upper.plot((50, 100), (50, 100), color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    spoken = []
    for place, one in enumerate(bins):
        low, wide = 100 * one["low"], 100 * (one["high"] - one["low"])
        lower.bar(
            low + wide / 2, one["n"], 0.9 * wide, color=ACCENT, linewidth=0, gid=f"bin-{place}"
        )
        if not one["n"]:
            continue
        at, ends = 100 * one["confidence"], (100 * one["ci_low"], 100 * one["ci_high"])
        upper.plot((at, at), ends, color=ACCENT, linewidth=1.6, zorder=2)
        upper.plot(at, 100 * one["accuracy"], "o", color=ACCENT, markersize=6, zorder=3)
        spoken.append(f"{at:.0f} % sure, {100 * one['accuracy']:.0f} % right, {one['n']} pairs")
    for axes in (upper, lower):
        axes.set_xlim(49, 101)
    upper.set_ylim(-3, 103)
    titles = {
        f"bin-{place}": f"{100 * one['low']:.1f} to {100 * one['high']:.1f} %: {one['n']} pairs"
        for place, one in enumerate(bins)
    }
    return svg(figure, name, "Reliability: " + "; ".join(spoken), titles)


def margin_chart(name: str, margins: dict[str, Any]) -> str:
    """Histogram of margins, those of pairs in the wrong order in another colour; see `reward.calibration.histogram`."""
    figure = _figure(2.6)
    axes = _axes(figure, (0.5, 1.9), "margin: score of the chosen − score of the rejected", "pairs")
    edges, counts = margins["edges"], margins["counts"]
    for low, high, count in zip(edges, edges[1:], counts, strict=False):
        colour = GOOD if low >= 0 else BAD
        axes.bar((low + high) / 2, count, 0.92 * (high - low), color=colour, linewidth=0)
    axes.axvline(0, color=INK, linewidth=1)
    right = sum(count for low, count in zip(edges, counts, strict=False) if low >= 0)
    return svg(figure, name, f"Margins: {right} pairs at 0 or above, {sum(counts) - right} below")


def subset_chart(name: str, subsets: Sequence[dict[str, Any]]) -> str:
    """Accuracy of each subset with its interval, and a tick at what "the longer answer wins" gets there."""
    rows = [one for one in subsets if one["accuracy"]["n"]]
    height = _ROW * len(rows) + 0.62
    figure = _figure(height)
    axes = _axes(figure, (0.46, _ROW * len(rows)), "in the right order (%)", "", left=_LABELS)
    axes.axvline(50, color=MUTED, linewidth=1, linestyle=(0, (1, 3)), zorder=1)
    for row, one in enumerate(rows):
        found, base = one["accuracy"], 100 * one["length_baseline"]["value"]
        ends = (100 * found["ci_low"], 100 * found["ci_high"])
        axes.plot((base, base), (row - 0.32, row + 0.32), color=BAD, linewidth=2, zorder=2)
        axes.plot(ends, (row, row), color=ACCENT, linewidth=2, zorder=3)
        axes.plot(100 * found["value"], row, "o", color=ACCENT, markersize=7, zorder=4)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [one["name"] for one in rows], parse_math=False)
    axes.tick_params(axis="y", labelcolor=INK)
    axes.grid(visible=False, axis="y")
    axes.set_xlim(-2, 102)
    spoken = (f"{one['name']} {100 * one['accuracy']['value']:.1f}" for one in rows)
    return svg(figure, name, "Accuracy by subset: " + "; ".join(spoken))


def length_chart(name: str, groups: Sequence[dict[str, Any]]) -> str:
    """Mean score of answers of like length, over a logarithmic axis; see `reward.ordering.score_by_length`."""
    figure = _figure(2.7)
    axes = _axes(figure, (0.5, 2.0), "characters of the answer", "mean score")
    middles = []
    for one in groups:
        ends = (max(1, one["shortest"]), max(1, one["longest"]))
        middles.append(math.sqrt(ends[0] * ends[1]))
        axes.plot(ends, (one["value"], one["value"]), color=LINE, linewidth=3, zorder=2)
        interval = (one["ci_low"], one["ci_high"])
        axes.plot((middles[-1], middles[-1]), interval, color=ACCENT, linewidth=1.6, zorder=3)
    values = [one["value"] for one in groups]
    axes.plot(middles, values, "o-", color=ACCENT, markersize=5, linewidth=1, zorder=4)
    axes.set_xscale("log")
    axes.minorticks_off()
    low, high = max(1, groups[0]["shortest"]), max(2, groups[-1]["longest"])
    ticks = [d * 10**p for p in range(8) for d in (1, 2, 5) if low <= d * 10**p <= high]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    spoken = (f"{one['shortest']} to {one['longest']}: {one['value']:.2f}" for one in groups)
    return svg(figure, name, "Mean score by length: " + "; ".join(spoken))


def _figure(height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(WIDTH, height))


def _axes(
    figure: Any,
    span: tuple[float, float],
    x: str,
    y: str,
    left: float = _LEFT,
    is_upper: bool = False,
) -> Any:
    """Axes of a fixed place: `span` is their bottom and height in inches. Upper ones leave the ticks to those below."""
    height = figure.get_figheight()
    box = (left / WIDTH, span[0] / height, 1 - (left + _RIGHT) / WIDTH, span[1] / height)
    axes = figure.add_axes(box)
    if not is_upper:
        axes.set_xlabel(x, parse_math=False, color=MUTED, fontsize=9)
    axes.set_ylabel(y, parse_math=False, color=MUTED, fontsize=9)
    axes.tick_params(axis="both", length=0, labelsize=8.5, labelcolor=MUTED)
    axes.tick_params(axis="x", labelbottom=not is_upper)
    axes.grid(color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for spine in axes.spines.values():
        spine.set_visible(False)
    return axes
