"""Statistics of paired comparisons. numpy and scipy only."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from reward.intervals import Clusters, by_cluster, combined, estimate, is_binary, stderr
from reward.resampling import bootstrap, sign_flips

SCALES = ("mean", "perplexity", "bits_per_byte")  # see `contributions`


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
    baseline: Sequence[float] | np.ndarray,
    candidate: Sequence[float] | np.ndarray,
    confidence: float = 0.95,
    clusters: Clusters | None = None,
    is_identical: bool = False,
    span: float | None = None,
) -> Paired:
    """Compare two models on the same documents.

    The standard error is that of the mean of the per-document differences (Miller 2024, "Adding Error Bars to Evals",
    arXiv 2411.00640, section 4.2), robust to clusters where there are any (section 2.2). The interval is Student's t
    on it with one degree of freedom less than there are clusters; in `reward.intervals`, see `Proportions` for metrics
    that are 0 or 1, `_few` where few documents differ, and `_unchanged` where none does. p is the exact McNemar test
    where both sides are 0 or 1 and no cluster has two documents, else a sign-flip permutation test of the clusters.

    Args:
        baseline, candidate: one value per document, in the same order; shape (n,).
        confidence: coverage of the intervals.
        clusters: the cluster of each document, None for one that stands alone; shape (n,).
        is_identical: both sides gave the same output, not only the same values: nothing is left in doubt.
        span: the most by which one document can differ. None: 1 where all values lie in [0, 1]. 0: unknown, and no
            difference at all means the same output, as for a divergence.

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
    sums, sizes = by_cluster(delta, clusters)
    count = sums.size if sums.size < delta.size else None
    if is_identical:
        return Paired(0.0, 0.0, 0.0, 0.0, 1.0, 0.0, delta.size, count, 0.0, 0.0, 0.0)
    is_exact = span is None and count is None and is_binary(base, cand)
    lost, won = int((delta < 0).sum()), int((delta > 0).sum())
    found = estimate(base, cand, confidence, clusters, span)
    return Paired(
        float(delta.mean()),
        stderr(sums, sizes),
        *found.interval(confidence),
        mcnemar(lost, won) if is_exact else permutation(sums),
        float((delta != 0).mean()),
        delta.size,
        count,
        found.detectable(),
        *(bootstrap(sums, sizes, confidence) if sums.size > 1 else (math.nan, math.nan)),
    )


def documents_needed(mde: float, n: int, margin: float) -> int | None:
    """Documents at which a true difference of `margin` is found with 80 % power, from the `mde` that n of them gave.

    Errors shrink with √n, so n (mde / margin)². None when the MDE is unknown or the margin is zero.
    """
    if not math.isfinite(mde) or margin <= 0:
        return None
    return math.ceil(n * (mde / margin) ** 2)


def mcnemar(lost: int, won: int) -> float:
    """Exact two-sided McNemar p-value for discordant counts `lost` (1 → 0) and `won` (0 → 1).

    McNemar 1947 in the conditional binomial form. Conservative: at few flips it rejects far less often than 5 %.
    """
    if lost + won == 0:
        return 1.0
    from scipy import stats

    return float(stats.binomtest(lost, lost + won, 0.5).pvalue)


def permutation(delta: np.ndarray) -> float:
    """Two-sided p-value of the mean of `delta` (n,) under random sign flips; see `sign_flips`."""
    return float(sign_flips(delta[:, None])[0])


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


def macro(found: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    """Mean of independent (difference, low, high), and its interval. Tasks have equal weight."""
    return combined(found, [1.0] * len(found))


def rank_intervals(
    values: np.ndarray, clusters: Clusters | None = None, confidence: float = 0.95
) -> list[tuple[int, int]]:
    """The ranks that each of K arms may have, all right at once with the given confidence; 1 is the best.

    Every pair is tested on the same documents by sign flips, with Holm's correction over the K (K − 1) / 2 pairs. An
    arm's best rank is 1 + the number surely better, its worst K − the number surely worse (Mogstad, Romano, Shaikh and
    Wilhelm 2024, "Inference for Ranks", section 3). Arms that are truly equal share every rank of the tie.

    Args:
        values: per-document values, higher is better; shape (K, n).
        clusters: the cluster of each document; shape (n,).
        confidence: of all ranks together.
    """
    arms = len(values)
    pairs = list(itertools.combinations(range(arms), 2))
    if not pairs:
        return [(1, 1)] * arms
    sums, _ = by_cluster(values.T, clusters)
    differences = np.stack([sums[:, a] - sums[:, b] for a, b in pairs], axis=1)
    adjusted = holm(list(sign_flips(differences)))
    better, worse = [0] * arms, [0] * arms
    for (a, b), total, p in zip(pairs, differences.sum(axis=0), adjusted, strict=True):
        if p < 1 - confidence:
            first, last = (a, b) if total > 0 else (b, a)
            worse[first] += 1
            better[last] += 1
    return [(1 + better[arm], arms - worse[arm]) for arm in range(arms)]


@dataclass(frozen=True)
class SeedEffects:
    """A difference measured with several training seeds on the same documents, its errors kept apart.

    All in the metric's own unit; the last three are NaN with one seed.
    """

    mean: float  # over seeds, tasks weighing the same
    stderr: float  # sampling error of the mean: other documents, these very seeds
    observed_sd: float  # standard deviation between the seeds' means
    training_sd: (
        float  # the part of it due to training, without the noise of finitely many documents
    )
    total_error: float  # standard deviation of what one more training run shows on other documents


def seed_effects(
    tasks: Sequence[np.ndarray], clusters: Sequence[Clusters | None] | None = None
) -> SeedEffects:
    """Two-way random effects: d = mean + seed + document + noise (Searle, Casella and McCulloch 1992, chapter 4).

    The variance between the seeds' means is that of training plus that of the noise / n. The latter is estimated from
    the residuals of the two-way table and subtracted (method of moments), never below zero.

    Args:
        tasks: per-document paired differences of each task; shapes (S, n_k). Tasks are independent strata.
        clusters: the clusters of each task's documents; shapes (n_k,).
    """
    by_task = clusters or [None] * len(tasks)
    seeds, k = len(tasks[0]), len(tasks)
    means = np.mean([task.mean(axis=1) for task in tasks], axis=0)
    sampling = [_squared(task.mean(axis=0), of) for task, of in zip(tasks, by_task, strict=True)]
    mean, error = float(means.mean()), math.sqrt(sum(sampling)) / k
    if seeds < 2:
        return SeedEffects(mean, error, math.nan, math.nan, math.nan)
    observed = float(means.var(ddof=1))
    single = noise = 0.0
    for task, of in zip(tasks, by_task, strict=True):
        residuals = task - task.mean(axis=1, keepdims=True) - task.mean(axis=0) + task.mean()
        single += float(np.mean([_squared(row, of) for row in task])) / k**2
        noise += float(np.sum([_squared(row, of) for row in residuals])) / (seeds - 1) / k**2
    training = max(0.0, observed - noise)
    return SeedEffects(
        mean, error, math.sqrt(observed), math.sqrt(training), math.sqrt(training + single)
    )


def _squared(values: np.ndarray, clusters: Clusters | None) -> float:
    return stderr(*by_cluster(values, clusters)) ** 2
