"""How well scores put pairs in order, how much of it is length, and whether two models agree. numpy and scipy only."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from reward import figures
from reward.calibration import correct
from reward.figures import Figure
from reward.intervals import by_cluster, estimate, stderr, wilson


@dataclass(frozen=True)
class Pairs:
    """Scores and lengths of pairs, columns chosen and rejected. A pair without both scores is a gap."""

    scores: np.ndarray  # (n, 2)
    chars: np.ndarray  # (n, 2) of the answers
    clusters: list[str | None]  # (n,) the prompt of each pair
    tokens: np.ndarray | None = None  # (n, 2) of prompt and answer

    @property
    def is_scored(self) -> np.ndarray:
        """(n,) whether a pair has both scores."""
        return np.asarray(np.isfinite(self.scores).all(axis=1))

    @property
    def margins(self) -> np.ndarray:
        """(n,) score of the chosen minus that of the rejected answer."""
        return np.asarray(self.scores[:, 0] - self.scores[:, 1])

    def where(self, mask: np.ndarray) -> "Pairs":
        """Some of the pairs, in their order; `mask` is of shape (n,)."""
        tokens = None if self.tokens is None else self.tokens[mask]
        clusters = [self.clusters[at] for at in np.flatnonzero(mask).tolist()]
        return Pairs(self.scores[mask], self.chars[mask], clusters, tokens)

    def scored(self) -> "Pairs":
        """The pairs that are no gaps."""
        return self.where(self.is_scored)


def accuracy(pairs: Pairs) -> dict[str, Any]:
    """The share of pairs in the right order, each pair counting once and a tie half; gaps are left out and counted."""
    scored = pairs.scored()
    found = figures.proportion(correct(scored.margins), scored.clusters)
    gaps = len(pairs.scores) - len(scored.scores)
    return found.as_json() | {"ties": int((scored.margins == 0).sum()), "gaps": gaps}


def longest(lengths: np.ndarray) -> np.ndarray:
    """What "the longer answer wins" gets: 1, ½ where both are as long, 0; (n, 2) → (n,)."""
    return correct(lengths[:, 0] - lengths[:, 1])


def baseline(scored: Pairs, lengths: np.ndarray) -> Figure:
    """The accuracy of "the longer answer wins", fitted to nothing.

    The best of several rules of length, chosen on the same pairs, would be fitted to them and is not reported.
    """
    return figures.proportion(longest(lengths), scored.clusters)


def over_length(scored: Pairs, lengths: np.ndarray) -> dict[str, Any]:
    """Accuracy minus that of "the longer answer wins" on the same pairs, paired, with its interval."""
    base, own = longest(lengths), correct(scored.margins)
    low, high = estimate(base, own, clusters=scored.clusters).interval()
    difference = float((own - base).mean())
    return {"difference": difference, "ci_low": low, "ci_high": high, "n": own.size}


def by_length(scored: Pairs) -> dict[str, Any]:
    """Accuracy where the chosen answer is the longer one in characters, the shorter one, or as long."""
    difference = scored.chars[:, 0] - scored.chars[:, 1]
    masks = {"longer": difference > 0, "shorter": difference < 0, "equal": difference == 0}
    return {f"chosen_{name}": accuracy(scored.where(mask)) for name, mask in masks.items()}


def auc(scored: Pairs) -> Figure:
    """Chance that a chosen answer outscores a rejected one of any prompt (Mann and Whitney 1947).

    Training compares answers to one prompt only, so this may be far below the accuracy: scores then do not compare
    across prompts. The error is that of DeLong et al. 1988 for clusters (Obuchowski 1997), as Wilson's interval.
    """
    from scipy.stats import rankdata

    n = len(scored.scores)
    chosen, rejected = scored.scores.T
    ranks = rankdata(np.concatenate([chosen, rejected]))
    above = (ranks[:n] - rankdata(chosen)) / n  # share of the rejected below each chosen
    below = 1 - (ranks[n:] - rankdata(rejected)) / n  # share of the chosen above each rejected
    value = float(above.mean())
    error = by_cluster(above + below - value, scored.clusters)
    spread = stderr(*error)
    size = value * (1 - value) / spread**2 if spread > 0 else float(error[0].size)
    return Figure(value, *wilson(value, size), n, error[0].size)


def correlations(scored: Pairs, lengths: np.ndarray) -> dict[str, Any]:
    """Of scores with the lengths of all answers, and of margins with the differences in length."""
    both = scored.clusters * 2
    sides = {
        "score_and_length": (scored.scores.T.ravel(), lengths.T.ravel(), both),
        "margin_and_difference": (scored.margins, lengths[:, 0] - lengths[:, 1], scored.clusters),
    }
    return {
        name: {
            "pearson": figures.correlation(x, y.astype(float), clusters).as_json(),
            "spearman": figures.rank_correlation(x, y, clusters).as_json(),
        }
        for name, (x, y, clusters) in sides.items()
    }


def score_by_length(scored: Pairs, bins: int = 10) -> list[dict[str, Any]]:
    """Mean scores of answers in groups of equal size by their length in characters, the shortest first."""
    chars, scores = scored.chars.T.ravel(), scored.scores.T.ravel()
    clusters = scored.clusters * 2
    edges = np.unique(np.quantile(chars, np.linspace(0, 1, bins + 1)))
    place = np.digitize(chars, edges[1:-1], right=True)
    found = []
    for number in np.unique(place):
        at = np.flatnonzero(place == number)
        figure = figures.mean(scores[at], [clusters[one] for one in at])
        ends = {"shortest": int(chars[at].min()), "longest": int(chars[at].max())}
        found.append(ends | figure.as_json())
    return found


def agreement(own: Pairs, other: Pairs) -> dict[str, Any]:
    """What two models say of the same pairs, of those that both scored.

    Returns:
        The other's accuracy; the share of pairs that both put in one order (a tie agrees with a tie); Cohen's kappa
        (1960) of the orders, which takes off what would agree by chance; Spearman's correlation of the margins; the
        accuracy of the own model where both agree, and where they do not; and its accuracy minus the other's.
    """
    both = own.is_scored & other.is_scored
    mine, theirs = own.where(both), other.where(both)
    ours, others = np.sign(mine.margins), np.sign(theirs.margins)
    same, clusters = ours == others, mine.clusters
    cells = [(ours == a) & (others == b) for a in (-1, 0, 1) for b in (-1, 0, 1)]
    table = np.stack(cells, axis=1).astype(float)
    return {
        "accuracy": accuracy(other),
        "difference": lead(mine, theirs).as_json(),
        "agreement": figures.proportion(same.astype(float), clusters).as_json(),
        "kappa": figures.of_totals(_kappa, table, clusters).as_json(),
        "spearman": figures.rank_correlation(mine.margins, theirs.margins, clusters).as_json(),
        "accuracy_where_agreed": accuracy(mine.where(same)),
        "accuracy_where_not": accuracy(mine.where(~same)),
    }


def lead(mine: Pairs, theirs: Pairs) -> Figure:
    """Accuracy of one model minus that of another on the same scored pairs, paired."""
    if not len(mine.scores):
        return Figure(math.nan, math.nan, math.nan, 0, 0)
    base, own = correct(theirs.margins), correct(mine.margins)
    # With ties it is Student's t, which knows no bound.
    low, high = np.clip(estimate(base, own, clusters=mine.clusters).interval(), -1, 1).tolist()
    return Figure(float((own - base).mean()), low, high, own.size, figures.count(mine.clusters))


def _kappa(totals: np.ndarray) -> np.ndarray:
    """Cohen's kappa of tables with three classes; shape (R, 9) → (R,). NaN when both sides are one constant class."""
    tables = totals.reshape(-1, 3, 3) / totals.sum(axis=1)[:, None, None]
    seen = np.trace(tables, axis1=1, axis2=2)
    chance = (tables.sum(axis=1) * tables.sum(axis=2)).sum(axis=1)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(chance < 1 - 1e-12, (seen - chance) / (1 - chance), math.nan)
