"""Statistics of paired comparisons. numpy and scipy only."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

_PERMUTATIONS = 10_000


@dataclass(frozen=True)
class Paired:
    """A paired difference, candidate minus baseline.

    `difference`, `stderr`, `ci_low`, `ci_high`, `mde` and the bootstrap's ends are in the metric's own unit, `p` is
    two-sided, `flips` is the share of documents whose value differs, `n` the number of documents, `clusters` that of
    their clusters (None when every document stands alone), `mde` the smallest true difference that would be found
    with 80 % power.
    """

    difference: float
    stderr: float
    ci_low: float
    ci_high: float
    p: float
    flips: float
    n: int
    clusters: int | None = None
    mde: float = math.nan
    bootstrap_low: float = math.nan
    bootstrap_high: float = math.nan


def paired(
    baseline: Sequence[float],
    candidate: Sequence[float],
    confidence: float = 0.95,
    clusters: Sequence[str | None] | None = None,
    is_identical: bool = False,
) -> Paired:
    """Compare two models on the same documents.

    The standard error is that of the mean of the per-document differences (Miller 2024, "Adding Error Bars to Evals",
    arXiv 2411.00640, section 4.2), the interval is Student's t on it. The p-value is the exact McNemar test where both
    sides are 0 or 1 (McNemar 1947; conditional binomial form), else a paired sign-flip permutation test.

    Args:
        baseline, candidate: one value per document, in the same order; shape (n,).
        confidence: coverage of the interval.
        clusters: the cluster of each document, None for one that stands alone; shape (n,).
        is_identical: both sides gave the same output, not only the same values: nothing is left in doubt.

    Raises:
        ValueError: when the lengths differ, nothing is given, or a value is not finite.
    """
    base, cand = np.asarray(baseline, dtype=float), np.asarray(candidate, dtype=float)
    if base.shape != cand.shape or base.ndim != 1 or base.size == 0:
        raise ValueError(
            f"paired values must be two equally long, non-empty lists, got {base.shape} and {cand.shape}"
        )
    if not (np.isfinite(base).all() and np.isfinite(cand).all()):
        raise ValueError("paired values must be finite")
    delta = cand - base
    n = delta.size
    mean = float(delta.mean())
    stderr = float(delta.std(ddof=1) / math.sqrt(n)) if n > 1 else math.nan
    half = float(stats.t.ppf(0.5 + confidence / 2, n - 1)) * stderr if n > 1 else math.nan
    is_binary = bool(np.isin(base, (0, 1)).all() and np.isin(cand, (0, 1)).all())
    p = mcnemar(int((delta < 0).sum()), int((delta > 0).sum())) if is_binary else permutation(delta)
    return Paired(mean, stderr, mean - half, mean + half, p, float((delta != 0).mean()), n)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided McNemar p-value for discordant counts `lost` (1 → 0) and `won` (0 → 1)."""
    if lost + won == 0:
        return 1.0
    return float(stats.binomtest(lost, lost + won, 0.5).pvalue)


def permutation(delta: np.ndarray) -> float:
    """Two-sided p-value of the mean of `delta` (n,) under random sign flips, with a fixed seed.

    The identity counts as one permutation, so that p is never zero (Phipson and Smyth 2010).
    """
    if not delta.any():
        return 1.0
    rng = np.random.default_rng(0)
    observed = abs(float(delta.sum()))
    hits = 0
    for _ in range(_PERMUTATIONS // 100):
        signs = rng.choice((-1.0, 1.0), size=(100, delta.size))
        hits += int((np.abs(signs @ delta) >= observed * (1 - 1e-12)).sum())
    return (hits + 1) / (_PERMUTATIONS + 1)


def contributions(pairs: Sequence[tuple[float, float]], scale: str) -> list[float]:
    """What each document contributes to a metric of sums: values whose mean is the metric.

    With R = Σ value / Σ weight, the metric is f(R); document i contributes f(R) + f'(R) (value_i − R weight_i) / mean
    weight, its influence by the delta method (the infinitesimal jackknife, Efron 1982). The standard error of the mean
    of these values is that of the metric, so paired statistics apply to them.

    Args:
        pairs: (value, weight) of each document; shape (n, 2).
        scale: f: `mean` R, `perplexity` exp(−R), `bits_per_byte` −R / ln 2.
    """
    value, weight = np.asarray(pairs, dtype=float).T
    ratio = value.sum() / weight.sum()
    metric, slope = {
        "mean": (ratio, 1.0),
        "perplexity": (math.exp(-ratio), -math.exp(-ratio)),
        "bits_per_byte": (-ratio / math.log(2), -1 / math.log(2)),
    }[scale]
    return list(metric + slope * (value - ratio * weight) / weight.mean())


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjustment (Holm 1979) within one family, in the given order; NaN is left out."""
    adjusted = [math.nan] * len(p_values)
    order = sorted(
        (i for i, p in enumerate(p_values) if not math.isnan(p)), key=lambda i: p_values[i]
    )
    running = 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(order) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def macro(
    differences: Sequence[float], stderrs: Sequence[float], confidence: float = 0.95
) -> tuple[float, float, float]:
    """Mean of independent differences with its normal interval: (mean, low, high). Tasks have equal weight."""
    k = len(differences)
    mean = sum(differences) / k
    half = float(stats.norm.ppf(0.5 + confidence / 2)) * math.sqrt(sum(s * s for s in stderrs)) / k
    return mean, mean - half, mean + half
