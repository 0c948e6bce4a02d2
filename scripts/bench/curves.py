"""What a side's cost grows with: the work's own seconds, without the start of a process, against a size."""

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from running import ARMS, Run
from table import STEADY


@dataclass(frozen=True)
class Point:
    """Both sides at one size."""

    size: int
    seconds: dict[str, float]  # by arm, of the clock that is drawn; the least of the rounds
    tokens: dict[str, int]  # read, by arm
    rounds: int
    is_steady: bool  # of the peer's rounds


def point(size: int, runs: dict[str, list[Run]], clock: str) -> Point:
    """The cost of steps or of scoring."""
    every = {arm: [sum(row[clock] for row in _work(run)) for run in runs[arm]] for arm in ARMS}
    return Point(
        size,
        {arm: min(every[arm]) for arm in ARMS},
        {arm: sum(row["read"] for row in _work(runs[arm][0])) for arm in ARMS},
        len(every["peer"]),
        max(every["peer"]) <= STEADY * min(every["peer"]),
    )


def _work(run: Run) -> list[dict[str, Any]]:
    return run.of("step") or run.of("score")


def slope(points: Sequence[Point], arm: str) -> float:
    """Seconds that one more costs: least squares through the points."""
    sizes = [point.size for point in points]
    costs = [point.seconds[arm] for point in points]
    middle, mean = sum(sizes) / len(sizes), sum(costs) / len(costs)
    products = sum((x - middle) * (y - mean) for x, y in zip(sizes, costs, strict=True))
    return products / sum((x - middle) ** 2 for x in sizes)


def markdown(points: Sequence[Point], unit: str) -> str:
    """The points as a table, and what one more of the unit costs."""
    lines = [
        f"| {unit} | peer s | ours s | ratio | peer: tokens read | ours |",
        "|--:|--:|--:|--:|--:|--:|",
    ]
    for one in points:
        peer, ours = (one.seconds[arm] for arm in ARMS)
        once = ", one round" if one.rounds == 1 else ""
        ratio = f"{peer / ours:.2f}×{once}" if one.is_steady else "none: the peer's rounds differ"
        read = " | ".join(f"{one.tokens[arm]:,}" for arm in ARMS)
        lines.append(f"| {one.size} | {peer:.2f} | {ours:.2f} | {ratio} | {read} |")
    if len(points) > 1:
        costs = ", ".join(f"{arm} {slope(points, arm):.3g} s" for arm in ARMS)
        lines += ["", f"One more of {unit} costs: {costs}."]
    return "\n".join(lines)


def draw(points: Sequence[Point], unit: str, title: str, out: Path) -> None:
    """Both sides' seconds against the size."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6, 4))
    for arm in ARMS:
        sizes, costs = [one.size for one in points], [one.seconds[arm] for one in points]
        axes.plot(sizes, costs, "o-", label=arm, linewidth=2)
    axes.set(
        xlabel=unit,
        ylabel="seconds of the work itself",
        title=textwrap.fill(title, 60),
        xlim=(0, None),
        ylim=(0, None),
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(out, dpi=110)
    pyplot.close(figure)
