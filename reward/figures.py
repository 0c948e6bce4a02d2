"""Numbers of a report: each with its interval, how many values it rests on, and how many prompts. No torch."""

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from reward.intervals import Clusters, Estimate, by_cluster, share, stderr
from reward.resampling import bootstrap_totals


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval; NaN where there is nothing to say."""

    value: float
    ci_low: float
    ci_high: float
    n: int
    clusters: int  # documents that share a cluster, here a prompt, are not independent

    def as_json(self) -> dict[str, Any]:
        """Its fields."""
        return asdict(self)


def count(clusters: Clusters) -> int:
    """How many clusters there are."""
    return len(set(clusters))


def proportion(values: np.ndarray, clusters: Clusters) -> Figure:
    """A mean of values in [0, 1], see `reward.intervals.share`."""
    value = float(values.mean()) if values.size else math.nan
    return Figure(value, *share(values, clusters), values.size, count(clusters))


def mean(values: np.ndarray, clusters: Clusters) -> Figure:
    """A mean with Student's t on its standard error, robust to clusters."""
    if not values.size:
        return Figure(math.nan, math.nan, math.nan, 0, 0)
    sums, sizes = by_cluster(values, clusters)
    found = Estimate(float(values.mean()), stderr(sums, sizes), sums.size - 1)
    return Figure(found.centre, *found.interval(), values.size, sums.size)


def of_totals(
    statistic: Callable[[np.ndarray], np.ndarray], terms: np.ndarray, clusters: Clusters
) -> Figure:
    """A function of totals with the percentile interval of the bootstrap over whole clusters (Efron 1979).

    Args:
        statistic: of totals; shape (R, P) → (R,).
        terms: what each document adds to the totals; shape (n, P).
        clusters: the cluster of each document; shape (n,).
    """
    value = float(statistic(terms.sum(axis=0, keepdims=True))[0]) if len(terms) else math.nan
    low = high = math.nan
    if count(clusters) > 1 and math.isfinite(value):
        drawn = statistic(bootstrap_totals(by_cluster(terms, clusters)[0]))
        low, high = (float(end) for end in np.nanquantile(drawn, [0.025, 0.975]))
    return Figure(value, low, high, len(terms), count(clusters))


def correlation(x: np.ndarray, y: np.ndarray, clusters: Clusters) -> Figure:
    """Pearson's correlation; NaN when one side is constant. Shapes (n,)."""
    scaled = [(side - side.mean()) / (side.std() or 1.0) if side.size else side for side in (x, y)]
    a, b = scaled
    terms = np.stack([np.ones_like(a), a, b, a * a, b * b, a * b], axis=1)
    return of_totals(_pearson, terms, clusters)


def rank_correlation(x: np.ndarray, y: np.ndarray, clusters: Clusters) -> Figure:
    """Spearman's: Pearson's of the ranks. The interval takes the ranks as they are in the sample."""
    from scipy.stats import rankdata

    return correlation(rankdata(x), rankdata(y), clusters)


def _pearson(totals: np.ndarray) -> np.ndarray:
    n, x, y, xx, yy, xy = totals.T
    spread = (n * xx - x * x) * (n * yy - y * y)
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(spread > 1e-12 * n**4, (n * xy - x * y) / np.sqrt(spread), np.nan)
