"""What was scored: counts, where each member's scores lie, and how far members disagree."""

import math
from collections import Counter
from itertools import combinations
from typing import TYPE_CHECKING, Any, NamedTuple

from reward.completions import Task

if TYPE_CHECKING:
    from reward.ensemble import Array


class Scored(NamedTuple):
    """A task, its scores (completions,) and those of each member (completions, members)."""

    task: Task
    scores: list[float]
    members: "Array"


class Tally:
    """Counts of what was scored, and the figures of the members."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter(rows=0, scored=0, too_long=0)
        self._members: list[Array] = []
        self._odds: list[float] = []  # of each pair of completions of one prompt

    def add(self, found: Scored) -> None:
        """Count a row."""
        from reward.ensemble import are_at_odds

        self.counts["rows"] += 1
        for score in found.scores:
            self.counts["too_long" if math.isnan(score) else "scored"] += 1
        self._members.append(found.members)
        if found.members.shape[1] > 1:
            pairs = list(combinations(range(len(found.scores)), 2))
            first, second = ([pair[side] for pair in pairs] for side in (0, 1))
            self._odds += are_at_odds(found.members[first], found.members[second]).tolist()

    def scales(self) -> list[dict[str, float]]:
        """The mean and the standard deviation of each member's scores."""
        import numpy as np

        scores = np.concatenate(self._members)
        columns = [column[np.isfinite(column)] for column in scores.T]
        return [
            {"mean": float(column.mean()), "std": float(column.std())}
            if len(column)
            else {"mean": math.nan, "std": math.nan}
            for column in columns
        ]

    def facts(self) -> dict[str, Any]:
        """The counts; of several members also the mean deviation between them, and the share of pairs at odds."""
        import numpy as np

        from reward.ensemble import disagreement

        scores = np.concatenate(self._members)
        if scores.shape[1] == 1:
            return dict(self.counts)
        spread = disagreement(scores)
        spread = spread[np.isfinite(spread)]
        odds = [value for value in self._odds if not math.isnan(value)]
        return self.counts | {
            "disagreement": float(spread.mean()) if len(spread) else math.nan,
            "pairs": len(odds),
            "at_odds": math.fsum(odds) / len(odds) if odds else math.nan,
        }
