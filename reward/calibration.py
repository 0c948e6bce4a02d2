"""Whether a reward model is as sure as it should be. numpy and scipy only.

Under Bradley and Terry's model (1952) the answer that was chosen wins with probability p = σ(margin), where the margin
is score(chosen) − score(rejected). Pairs always come as (chosen, rejected), so the label is always 1, and p against it
says nothing of calibration: its mean label is 1 in every bin. Calibration is that of the answer that the model prefers:
its confidence max(p, 1 − p) against whether it is the one that was chosen. The Brier score and the log-likelihood are
the same either way.
"""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from reward import figures
from reward.figures import Figure
from reward.intervals import Clusters, Estimate, by_cluster, share, stderr
from reward.resampling import bootstrap_totals

BINS = 10
_DRAWS = 2_000  # of outcomes of a model that is calibrated


def correct(margins: np.ndarray) -> np.ndarray:
    """1 where the chosen answer has the higher score, ½ for a tie, else 0; shape (n,)."""
    return np.asarray((np.sign(margins) + 1) / 2)


def confidence(margins: np.ndarray) -> np.ndarray:
    """The probability that the model gives to the answer that it prefers, from ½ to 1; shape (n,)."""
    return np.asarray(1 / (1 + np.exp(-np.abs(margins))))


def brier(margins: np.ndarray, clusters: Clusters) -> Figure:
    """Mean squared error of p (Brier 1950): 0 is the best, ¼ is that of p = ½ throughout."""
    with np.errstate(over="ignore"):
        return figures.mean(1 / (1 + np.exp(margins)) ** 2, clusters)


def nll(margins: np.ndarray, clusters: Clusters) -> Figure:
    """Mean −log p in nats, the loss of training: 0 is the best, log 2 is that of p = ½ throughout."""
    return figures.mean(np.logaddexp(0, -margins), clusters)


@dataclass(frozen=True)
class Bin:
    """The pairs whose confidence lies in (low, high]; the first bin holds its low end too."""

    low: float
    high: float
    n: int
    confidence: float  # mean
    accuracy: float
    ci_low: float
    ci_high: float


@dataclass(frozen=True)
class Calibration:
    """Expected calibration error (Guo et al. 2017, equation 3) with the bins that it is made of."""

    ece: Figure
    expected: (
        float  # of a model that is calibrated: finitely many pairs never agree with their mean
    )
    p: float  # how often a calibrated one would show as much
    bins: list[Bin]

    def as_json(self) -> dict[str, Any]:
        """The figure with what puts it into proportion, without the bins."""
        return self.ece.as_json() | {
            "expected_if_calibrated": self.expected,
            "p_calibrated": self.p,
            "bins": len(self.bins),
        }


def equal_width(bins: int = BINS) -> np.ndarray:
    """Edges of equally wide bins over the confidences that there can be; shape (bins + 1,)."""
    return np.linspace(0.5, 1.0, bins + 1)


def equal_mass(margins: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Edges of bins that hold equally many pairs, fewer where confidences are equal (Nguyen and O'Connor 2015)."""
    inner = np.quantile(confidence(margins), np.linspace(0, 1, bins + 1)[1:-1])
    return np.unique([0.5, *inner, 1.0])


def calibration(margins: np.ndarray, clusters: Clusters, edges: np.ndarray) -> Calibration:
    """The calibration error over given bins.

    Sampling makes an absolute error larger than it is, and resampling does so again. So the interval is the basic one
    of the bootstrap over prompts (Davison and Hinkley 1997, section 5.2), which takes the excess off, and it reaches
    down to 0 where a model that is calibrated would show as much in more than one of 20 sets of outcomes (consistency
    resampling: Bröcker and Smith 2007). An end that this moves past the value is set to it. The edges are taken
    as given.

    Args:
        margins: shape (n,), n > 0.
        clusters: the prompt of each pair; shape (n,).
        edges: of the bins, from 0.5 to 1.
    """
    sure, right = confidence(margins), correct(margins)
    place = np.digitize(sure, edges[1:-1], right=True)
    is_in = place[:, None] == np.arange(len(edges) - 1)
    value = float(np.abs(((right - sure)[:, None] * is_in).sum(axis=0)).sum() / sure.size)
    calibrated = _if_calibrated(sure, is_in)
    p = float((calibrated >= value - 1e-12).mean())
    low, high = _ends(value, right - sure, is_in, clusters)
    found = Figure(value, 0.0 if p > 0.05 else low, high, sure.size, figures.count(clusters))
    bins = [
        _bin(edges[at : at + 2], sure[inside], right[inside], _chosen(clusters, inside))
        for at, inside in enumerate(is_in.T)
    ]
    return Calibration(found, float(calibrated.mean()), p, bins)


def _ends(
    value: float, gaps: np.ndarray, is_in: np.ndarray, clusters: Clusters
) -> tuple[float, float]:
    sums, _ = by_cluster(np.column_stack([gaps[:, None] * is_in, np.ones(gaps.size)]), clusters)
    if len(sums) < 2:
        return math.nan, math.nan
    totals = bootstrap_totals(sums)
    drawn = np.abs(totals[:, :-1]).sum(axis=1) / totals[:, -1]
    low, high = np.quantile(drawn, [0.025, 0.975])
    return max(0.0, min(value, 2 * value - float(high))), max(value, 2 * value - float(low))


def _if_calibrated(sure: np.ndarray, is_in: np.ndarray) -> np.ndarray:
    """Calibration errors if every pair came out as the model says, independently; shape (draws,)."""
    rng = np.random.default_rng(0)
    found = np.empty(_DRAWS)
    for start in range(0, _DRAWS, rows := max(1, (1 << 21) // sure.size)):
        drawn = rng.random((min(rows, _DRAWS - start), sure.size)) < sure
        found[start : start + len(drawn)] = np.abs((drawn - sure) @ is_in).sum(axis=1) / sure.size
    return found


def _bin(edges: np.ndarray, sure: np.ndarray, right: np.ndarray, clusters: list[str | None]) -> Bin:
    n = sure.size
    means = (float(sure.mean()), float(right.mean())) if n else (math.nan, math.nan)
    return Bin(float(edges[0]), float(edges[1]), n, *means, *share(right, clusters))


def _chosen(clusters: Clusters, inside: np.ndarray) -> list[str | None]:
    return [clusters[at] for at in np.flatnonzero(inside).tolist()]


def temperature(margins: np.ndarray, clusters: Clusters) -> dict[str, Any]:
    """The number to divide scores by that calibrates them: fitted on half of the prompts, tried on the other half.

    Returns:
        `value` with its interval (of a sandwich error of its inverse, on the logarithm), None with a `note` where no
        positive number is the best; `n` pairs of the fit; and, on the other half, NLL and ECE `before` and `after`.
    """
    fitted, other = _halves(clusters)
    found: dict[str, Any] = _fit(margins[fitted], _chosen(clusters, fitted))
    rest = margins[other]
    found["tried_on"] = rest.size
    if found["value"] is None or not rest.size:
        return found
    names = _chosen(clusters, other)
    for name, scaled in (("before", rest), ("after", rest / found["value"])):
        error = calibration(scaled, names, equal_width())
        found[name] = {"nll": nll(scaled, names).as_json(), "ece": error.as_json()}
    return found


def _halves(clusters: Clusters) -> tuple[np.ndarray, np.ndarray]:
    """Masks of the pairs in either half of the prompts, drawn at random with a fixed seed."""
    numbers = {name: number for number, name in enumerate(dict.fromkeys(clusters))}
    first = set(np.random.default_rng(0).permutation(len(numbers))[::2].tolist())
    mask = np.array([numbers[name] in first for name in clusters])
    return mask, ~mask


def _fit(margins: np.ndarray, clusters: list[str | None]) -> dict[str, Any]:
    """Least mean of log(1 + exp(−β margin)) over β > 0, which is convex; the temperature is 1 / β."""
    from scipy import optimize

    found: dict[str, Any] = {"value": None, "ci_low": None, "ci_high": None, "n": margins.size}
    if margins.sum() <= 0:
        return found | {"note": "the scores order this half no better than chance: none would help"}
    if (margins >= 0).all():
        return found | {
            "note": "no pair of this half is in the wrong order: ever sharper is better"
        }

    def slope(beta: float) -> np.ndarray:  # of each pair's loss
        with np.errstate(over="ignore"):
            return np.asarray(-margins / (1 + np.exp(beta * margins)))

    top = 1.0
    while slope(top).mean() < 0:
        top *= 2
    beta = float(optimize.brentq(lambda at: slope(at).mean(), 0.0, top, xtol=1e-12, rtol=1e-12))
    chance = 1 / (1 + np.exp(-beta * margins))
    curvature = float((margins**2 * chance * (1 - chance)).mean())
    sums, sizes = by_cluster(slope(beta), clusters)
    error = stderr(sums, sizes) / curvature / beta  # of log β
    ends = Estimate(-math.log(beta), error, sums.size - 1).interval()
    with np.errstate(over="ignore"):  # scores that are hardly better than chance leave it open
        low, high = np.exp(ends).tolist()
    known = {name: end for name, end in (("ci_low", low), ("ci_high", high)) if math.isfinite(end)}
    return found | {"value": 1 / beta, **known}


def histogram(margins: np.ndarray, bins: int = 40) -> dict[str, Any]:
    """Counts of margins in equally wide bins, of which 0 is an edge: ties count as not wrong.

    Returns:
        `edges` (bins + 1,), `counts` (bins,), and `beyond`, how many are further out than 99.5 % of them.
    """
    reach = float(np.quantile(np.abs(margins), 0.995)) or 1.0
    edges = np.linspace(-reach, reach, bins + 1)
    edges[bins // 2] = 0.0
    counts, _ = np.histogram(margins, edges)
    return {
        "edges": edges.tolist(),
        "counts": counts.tolist(),
        "beyond": int((np.abs(margins) > reach).sum()),
    }
