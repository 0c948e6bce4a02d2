"""How often the statistics are right, on simulated comparisons whose truth is known.

Usage: python scripts/calibration.py [COMPARISONS]
"""

import functools
import sys
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np

from evals.stats import holm, mcnemar, rank_intervals
from reward.intervals import by_cluster, estimate
from reward.resampling import sign_flips

Clusters = list[str | None] | None
Drawn = tuple[np.ndarray, np.ndarray]  # baseline and candidate, shape (comparisons, n) each
DRAWS = 2_000  # sign flips a comparison


class Setting(NamedTuple):
    """Comparisons that are drawn alike."""

    name: str
    truth: float  # the true difference
    draw: Callable[[np.random.Generator, int], Drawn]
    clusters: Clusters = None


class Row(NamedTuple):
    """What was measured; shares of the comparisons."""

    name: str
    covered: float  # the interval holds the truth
    above: float  # all of it lies above the truth: a loss of the margin would pass for retained
    rejected: float  # p < 0.05; NaN where the truth is not zero
    ignored: float  # covered by the interval that takes no account of clusters; NaN without any


def settings() -> Iterator[Setting]:
    """From easy to hard."""
    for n in (30, 100, 300, 1000):
        yield binary(n, 0.15, 0.15)
        yield binary(n, 0.10, 0.20)
    for n in (30, 100, 300, 1000):
        yield binary(n, 0.01, 0.01)
        yield binary(n, 0.03, 0.0)
    for n in (100, 300):
        yield sparse(n, 0.03)
    for n in (10, 30, 100, 1000):
        yield continuous(n)
    yield skewed(100)
    for groups, size in ((20, 5), (40, 5), (200, 5)):
        yield clustered(groups, size)
        yield clustered_binary(groups, size, 0.2)
        yield clustered_binary(groups, size, 0.02)


def binary(n: int, lost: float, won: float) -> Setting:
    """0 or 1, with given shares of documents that are lost (1 → 0) and won (0 → 1)."""

    def draw(rng: np.random.Generator, count: int) -> Drawn:
        return _flipped(rng.random((count, n)), lost, won)

    return Setting(f"0/1, n = {n}, {lost:.0%} lost, {won:.0%} won", won - lost, draw)


def _flipped(uniform: np.ndarray, lost: float, won: float) -> Drawn:
    base = (uniform < lost) | (uniform > 0.6)
    candidate = (base & (uniform >= lost)) | ((uniform >= lost) & (uniform < lost + won))
    return base.astype(float), candidate.astype(float)


def sparse(n: int, lost: float) -> Setting:
    """A graded metric of which few documents lose 0.2 to 1, and the others nothing."""

    def draw(rng: np.random.Generator, count: int) -> Drawn:
        fall = (rng.random((count, n)) < lost) * rng.uniform(0.2, 1, (count, n))
        return np.ones((count, n)), 1 - fall

    return Setting(f"graded, n = {n}, {lost:.0%} lose 0.2 to 1", -0.6 * lost, draw)


def continuous(n: int) -> Setting:
    """Normal differences."""
    return Setting(
        f"normal, n = {n}",
        0.0,
        lambda rng, count: (np.zeros((count, n)), rng.normal(size=(count, n))),
    )


def skewed(n: int) -> Setting:
    """Differences of mean zero with skewness 2."""

    def draw(rng: np.random.Generator, count: int) -> Drawn:
        return np.zeros((count, n)), rng.exponential(size=(count, n)) - 1

    return Setting(f"exponential, n = {n}", 0.0, draw)


def clustered(groups: int, size: int) -> Setting:
    """Normal differences, 80 % of their variance shared within a cluster."""

    def draw(rng: np.random.Generator, count: int) -> Drawn:
        shared = rng.normal(scale=0.8**0.5, size=(count, groups, 1))
        own = rng.normal(scale=0.2**0.5, size=(count, groups, size))
        return np.zeros((count, groups * size)), (shared + own).reshape(count, -1)

    return Setting(f"normal, {groups} clusters of {size}", 0.0, draw, _clusters(groups, size))


def clustered_binary(groups: int, size: int, flips: float) -> Setting:
    """0 or 1; four of five documents do what their cluster does."""

    def draw(rng: np.random.Generator, count: int) -> Drawn:
        shared = np.broadcast_to(rng.random((count, groups, 1)), (count, groups, size))
        own = rng.random((count, groups, size))
        uniform = np.where(rng.random(own.shape) < 0.8, shared, own).reshape(count, -1)
        return _flipped(uniform, flips / 2, flips / 2)

    name = f"0/1, {groups} clusters of {size}, {flips:.0%} flips"
    return Setting(name, 0.0, draw, _clusters(groups, size))


def _clusters(groups: int, size: int) -> Clusters:
    return [f"{group}" for group in range(groups) for _ in range(size)]


def measure(setting: Setting, count: int = 2_000) -> Row:
    """Draw comparisons and count."""
    base, candidate = setting.draw(np.random.default_rng(0), count)
    pairs = list(zip(base, candidate, strict=True))

    def ends(clusters: Clusters) -> np.ndarray:
        return np.array([estimate(a, b, clusters=clusters).interval() for a, b in pairs])

    def covered(clusters: Clusters) -> float:
        low, high = ends(clusters).T
        return float(((low <= setting.truth) & (setting.truth <= high)).mean())

    return Row(
        setting.name,
        covered(setting.clusters),
        float((ends(setting.clusters)[:, 0] > setting.truth).mean()),
        float("nan")
        if setting.truth
        else float((p_values(base, candidate, setting.clusters) < 0.05).mean()),
        covered(None) if setting.clusters else float("nan"),
    )


def p_values(base: np.ndarray, candidate: np.ndarray, clusters: Clusters = None) -> np.ndarray:
    """The p-value of each comparison, as `evals.stats.paired` chooses its test."""
    delta = candidate - base
    if clusters is None and np.isin(base, (0, 1)).all() and np.isin(candidate, (0, 1)).all():
        exact = functools.cache(mcnemar)
        counts = zip((delta < 0).sum(axis=1), (delta > 0).sum(axis=1), strict=True)
        return np.array([exact(int(lost), int(won)) for lost, won in counts])
    sums, _ = by_cluster(delta.T, clusters)
    return sign_flips(sums, DRAWS)


def family_wise(families: int = 2_000, size: int = 5) -> tuple[float, float]:
    """Share of families of true nulls with a rejection: by Holm's p, and by the unadjusted one.

    Families have 30 to 129 documents, because those of one number share their random signs: 10,000 of them, as in a
    comparison. Each number of documents has its share of the families.
    """
    rng, found = np.random.default_rng(0), []
    numbers = range(30, 130)
    for n in numbers:
        delta = rng.normal(size=(n, -(-families // len(numbers)) * size))
        p = sign_flips(delta, 10_000).reshape(-1, size)
        adjusted = np.array([holm(list(row)) for row in p])
        found.append([(each.min(axis=1) < 0.05).mean() for each in (adjusted, p)])
    return tuple(map(float, np.mean(found, axis=0)))  # type: ignore[return-value]


def ranks_right(means: list[float], boards: int = 400, n: int = 60) -> float:
    """Share of leaderboards on which every arm's ranks hold its true ones, ties counted as every rank of the tie."""
    rng, right = np.random.default_rng(0), 0
    for _ in range(boards):
        difficulty = rng.normal(size=(1, n))
        values = np.array(means)[:, None] + difficulty + rng.normal(scale=0.5, size=(len(means), n))
        right += all(
            low <= 1 + sum(other > mean for other in means)
            and len(means) - sum(other < mean for other in means) <= high
            for mean, (low, high) in zip(means, rank_intervals(values), strict=True)
        )
    return right / boards


def main(count: int = 2_000) -> None:
    """Print the table as markdown."""
    print(
        "| comparisons | 95 % interval covers | lies above the truth | p < 0.05 | covers, clusters ignored |"
    )
    print("|---|---|---|---|---|")
    for setting in settings():
        row = measure(setting, count)
        print(f"| {row.name} | {' | '.join('' if x != x else f'{x:.1%}' for x in row[1:])} |")
    adjusted, plain = family_wise(count)
    print(
        f"\nFamilies of 5 true nulls with a rejection: {adjusted:.1%} by Holm, {plain:.1%} unadjusted."
    )
    for means in ([0.0] * 5, [0.0, 0.0, 0.3, 0.3, 0.6], [0.0, 0.1, 0.2, 0.3, 0.4]):
        print(f"All ranks right for true means {means}: {ranks_right(means):.1%}.")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        sys.exit((__doc__ or "").strip())
    main(*map(int, sys.argv[1:]))
