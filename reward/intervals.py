"""Intervals of means, of shares and of paired differences. numpy and scipy only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

POWER = 0.8
_ALPHA = 0.05
_FEW = 30  # documents or clusters that differ, of many that do not: their spread says little of those not drawn
_ROUNDING = 1e-12  # relative: a spread below it is that of floating point

Clusters = Sequence[str | None]


def estimate(
    base: np.ndarray,
    cand: np.ndarray,
    confidence: float = 0.95,
    clusters: Clusters | None = None,
    span: float | None = None,
) -> "Estimate | Proportions":
    """What the interval of `paired` is made from."""
    delta = cand - base
    sums, sizes = by_cluster(delta, clusters)
    if span is None and is_binary(base, cand):
        return _proportions(delta, sums, sizes, confidence)
    if not delta.any():
        if span is None:
            both = np.concatenate([base, cand])
            span = 1.0 if both.min() >= 0 and both.max() <= 1 else 0.0
        return _unchanged(sums.size, span, confidence)
    error = stderr(sums, sizes)
    is_constant = error <= _ROUNDING * np.abs(delta).max()
    is_sparse = (sums != 0).sum() < min(_FEW, sums.size / 2)
    if sums.size > 1 and (is_constant or is_sparse):
        return _few(sums / sizes.mean())
    return Estimate(float(delta.mean()), error, sums.size - 1)


def is_binary(base: np.ndarray, cand: np.ndarray) -> bool:
    return all(bool(((side == 0) | (side == 1)).all()) for side in (base, cand))


def by_cluster(values: np.ndarray, clusters: Clusters | None) -> tuple[np.ndarray, np.ndarray]:
    """Sum of the values, and number of documents, of each cluster; a document without one is its own.

    Args:
        values: shape (n,) or (n, P).
        clusters: shape (n,), or None.

    Returns:
        Shapes (G,) or (G, P), and (G,).
    """
    if clusters is None or not any(cluster is not None for cluster in clusters):
        return values, np.ones(len(values))
    numbers: dict[str | int, int] = {}
    of = [
        numbers.setdefault(document if cluster is None else cluster, len(numbers))
        for document, cluster in enumerate(clusters)
    ]
    sums = np.zeros((len(numbers), *values.shape[1:]))
    np.add.at(sums, of, values)
    return sums, np.bincount(of).astype(float)


def stderr(sums: np.ndarray, sizes: np.ndarray) -> float:
    """Standard error of a mean over documents, robust to clusters; NaN with one cluster.

    Miller 2024, equation 4, as √(Σ over clusters of (the sum of its deviations)²) / n, times √(G / (G − 1)), which
    makes it the usual standard error where every document stands alone (Cameron and Miller 2015, section II.B).
    """
    count = sums.size
    if count < 2:
        return math.nan
    documents = sizes.sum()
    residuals = sums - sums.sum() / documents * sizes
    return math.sqrt(count / (count - 1) * float(residuals @ residuals)) / float(documents)


@dataclass(frozen=True)
class Estimate:
    """A centre and its error, on a scale where Student's t (normal when `freedom` is ∞) applies."""

    centre: float
    error: float
    freedom: float
    limit: float = math.inf  # of the absolute difference

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The two ends."""
        half = self.error * self._quantile(0.5 + confidence / 2)
        if math.isnan(half):
            return math.nan, math.nan
        return max(-self.limit, self.centre - half), min(self.limit, self.centre + half)

    def detectable(self) -> float:
        """Smallest true difference that is found with 80 % power at a two-sided 5 %.

        (t at 1 − α/2 + t at the power) standard errors (Bloom 1995; Miller 2024, section 5).
        """
        return self.error * (self._quantile(1 - _ALPHA / 2) + self._quantile(POWER))

    def _quantile(self, at: float) -> float:
        if self.freedom < 1:
            return math.nan
        from scipy import stats

        return float(
            stats.norm.ppf(at) if math.isinf(self.freedom) else stats.t.ppf(at, self.freedom)
        )


@dataclass(frozen=True)
class Proportions:
    """A difference of paired proportions: `lost` (1 → 0) and `won` (0 → 1) of `size` documents, real numbers."""

    lost: float
    won: float
    size: float

    def interval(self, confidence: float = 0.95) -> tuple[float, float]:
        """The differences that Tango's score test does not reject (Tango 1998, "Equivalence test and confidence
        interval for the difference in proportions for the paired-sample design").

        Unlike Wald's it is no point without flips, and keeps its level where few documents flip, all one way.
        """
        from scipy import stats

        z = float(stats.norm.ppf(0.5 + confidence / 2))
        centre = (self.won - self.lost) / self.size
        return self._end(z, -1.0, centre), self._end(-z, centre, 1.0)

    def _end(self, z: float, low: float, high: float) -> float:
        """Where the test statistic, which falls with the difference, is z."""
        from scipy import optimize

        if self._score(low) <= z:
            return low
        if self._score(high) >= z:
            return high
        return float(optimize.brentq(lambda at: self._score(at) - z, low, high, xtol=1e-12))

    def _score(self, difference: float) -> float:
        """The deviation from a supposed difference, in its standard errors there (Tango 1998)."""
        deviation = self.won - self.lost - self.size * difference
        if abs(deviation) < _ROUNDING * self.size:
            return 0.0
        b = (2 * self.size - self.won + self.lost) * difference - self.won - self.lost
        c = -self.lost * difference * (1 - difference)
        share = (math.sqrt(max(0.0, b * b - 8 * self.size * c)) - b) / (4 * self.size)
        variance = self.size * (2 * share + difference * (1 - difference))
        return (
            deviation / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, deviation)
        )

    def detectable(self) -> float:
        """As `Estimate.detectable`, with the error that the 95 % interval amounts to."""
        from scipy import stats

        low, high = self.interval(1 - _ALPHA)
        z = float(stats.norm.ppf(1 - _ALPHA / 2))
        return (high - low) / (2 * z) * (z + float(stats.norm.ppf(POWER)))


def _unchanged(count: int, span: float, confidence: float) -> Estimate:
    """No document differs: the share that would is below 1 − (α/2)^(1/G), its exact binomial bound (Clopper and
    Pearson 1934; the "rule of three"), and each by `span` at most.
    """
    from scipy import stats

    bound = span * (1 - (0.5 - confidence / 2) ** (1 / count))
    return Estimate(0.0, bound / float(stats.norm.ppf(0.5 + confidence / 2)), math.inf, span)


def _few(delta: np.ndarray) -> Estimate:
    """Few documents or clusters differ, or all by the same: one is added that is lost, and one that is won, each by
    the largest difference seen. For values of 0 and 1 it is that of Bonett and Price 2012, but for t in the place of z.
    """
    size = delta.size + 2
    mean = float(delta.sum()) / size
    squares = float(delta @ delta) + 2 * float(np.abs(delta).max()) ** 2
    return Estimate(mean, math.sqrt((squares / size - mean**2) / size), size - 1)


def _proportions(
    delta: np.ndarray, sums: np.ndarray, sizes: np.ndarray, confidence: float
) -> Estimate | Proportions:
    """Clusters are taken into account by the effective number of documents."""
    n, count = delta.size, sums.size
    if count < 2:
        return Estimate(float(delta.mean()), math.nan, 0)
    robust, plain = stderr(sums, sizes), stderr(delta, np.ones(n))
    size = float(n) if count == n else effective(n, count, robust, plain, confidence)
    return Proportions(size * float((delta < 0).mean()), size * float((delta > 0).mean()), size)


def effective(n: int, count: int, robust: float, plain: float, confidence: float) -> float:
    """The effective number of documents in `count` clusters (Korn and Graubard 1998): n divided by the design effect
    and by the squared ratio of t quantiles, n at most; the number of clusters where no variance shows.

    Args:
        n: documents.
        count: clusters.
        robust, plain: the standard error that minds the clusters, and the one that does not.
        confidence: of the interval that it is for.
    """
    from scipy import stats

    if not robust > 0:
        return float(count)
    at = 0.5 + confidence / 2
    ratio = float(stats.t.ppf(at, n - 1) / stats.t.ppf(at, count - 1))
    return float(min(n, n * (plain / robust * ratio) ** 2))


def wilson(rate: float, n: float, confidence: float = 0.95) -> tuple[float, float]:
    """Wilson's interval of a share of `n`, which may be an effective number (Wilson 1927)."""
    if not n:
        return math.nan, math.nan
    from scipy import stats

    z = float(stats.norm.ppf(0.5 + confidence / 2))
    middle = (rate + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(rate * (1 - rate) / n + (z / (2 * n)) ** 2) / (1 + z**2 / n)
    return max(0.0, middle - half), min(1.0, middle + half)


def share(
    values: np.ndarray, clusters: Clusters | None = None, confidence: float = 0.95
) -> tuple[float, float]:
    """Interval of the mean of values in [0, 1], such as 0, ½ and 1: Wilson's, at the effective number of documents.

    Korn and Graubard 1998. Never narrower than without clusters, and as wide for ½ as for a mixture of 0 and 1; one
    cluster, whatever its size, tells as much as one document.

    Args:
        values: shape (n,).
        clusters: the cluster of each document, None for one that stands alone; shape (n,).
        confidence: coverage.
    """
    sums, sizes = by_cluster(values, clusters)
    n, count = values.size, sums.size
    if not n:
        return math.nan, math.nan
    rate = float(values.mean())
    if count in (1, n):  # a tie varies less than a 0 or 1, and is not counted as knowledge
        return wilson(rate, count, confidence)
    plain = math.sqrt(rate * (1 - rate) / (n - 1))
    return wilson(rate, effective(n, count, stderr(sums, sizes), plain, confidence), confidence)


def combined(
    found: Sequence[tuple[float, float, float]], weights: Sequence[float]
) -> tuple[float, float, float]:
    """Weighted mean of independent (value, low, high), and its interval.

    The distances to the ends add up in squares (MOVER: Zou and Donner 2008), which for normal intervals is the usual
    standard error of a mean, and keeps an end that an interval owes to few flips.
    """
    whole = sum(weights)
    parts = [weight / whole for weight in weights]
    mean = sum(part * value for part, (value, _, _) in zip(parts, found, strict=True))
    below = math.hypot(
        *(p * (value - low) for p, (value, low, _) in zip(parts, found, strict=True))
    )
    above = math.hypot(
        *(p * (high - value) for p, (value, _, high) in zip(parts, found, strict=True))
    )
    return mean, mean - below, mean + above
