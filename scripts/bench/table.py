"""Ratios, the refusal to give one, and the Markdown table."""

from collections.abc import Sequence
from dataclasses import dataclass

# The peer's slowest round over its fastest; beyond it the machine was too busy to compare.
STEADY = 1.1


@dataclass(frozen=True)
class Goal:
    """What a measure should reach: the peer's figure over ours at least, or ours over the peer's at most."""

    measure: str
    least: float
    aim: float
    is_share: bool = False


@dataclass(frozen=True)
class Measure:
    """One figure of both sides in every round; less is better.

    `best` is what counts of the rounds where that is not the least of them.
    """

    name: str
    peer: Sequence[float]
    ours: Sequence[float]
    is_timed: bool = True  # a clock's figure, which other work on the machine raises
    best: tuple[float, float] | None = None

    @property
    def values(self) -> tuple[float, float]:
        """The peer's figure and ours."""
        return self.best or (min(self.peer), min(self.ours))

    @property
    def refusal(self) -> str | None:
        """Why there is no ratio, where there is none."""
        if self.is_timed and (spread := max(self.peer) / min(self.peer)) > STEADY:
            return f"none: the peer's rounds differ by {spread - 1:.0%}"
        if min(self.values) <= 0:
            return "none: nothing was measured"
        return None


def _ratio(measure: Measure, goal: Goal | None) -> str:
    if measure.refusal:
        return measure.refusal
    peer, ours = measure.values
    shown = f"{ours / peer:.2f}" if goal and goal.is_share else f"{peer / ours:.2f}×"
    shown = f"**{shown}**" if goal else shown
    return f"{shown}, one round" if measure.is_timed and len(measure.peer) == 1 else shown


def _goal(goal: Goal | None) -> str:
    if goal is None:
        return ""
    return (
        f"≤ {goal.least:g} ({goal.aim:g})"
        if goal.is_share
        else f"≥ {goal.least:g}× ({goal.aim:g}×)"
    )


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def markdown(measures: Sequence[Measure], goals: Sequence[Goal], problems: Sequence[str]) -> str:
    """The table of a workload; no ratio where the two sides did not do the same.

    Args:
        measures: of both sides.
        goals: of some of them.
        problems: why the sides are not comparable; none where they are.
    """
    wanted = {goal.measure: goal for goal in goals}
    lines = ["| | peer | ours | ratio | goal (aim) |", "|---|--:|--:|--:|--:|"]
    for measure in measures:
        goal = wanted.get(measure.name)
        ratio = "none: see below" if problems else _ratio(measure, goal)
        peer, ours = measure.values
        lines.append(
            f"| {measure.name} | {_number(peer)} | {_number(ours)} | {ratio} | {_goal(goal)} |"
        )
    missing = wanted.keys() - {measure.name for measure in measures}
    lines += [
        f"| {name} | | | none: not measured | {_goal(wanted[name])} |" for name in sorted(missing)
    ]
    if problems:
        lines += ["", "**No ratio: the two sides did not do the same.**", ""]
        lines += [f"- {problem}" for problem in problems]
    return "\n".join(lines)
