"""Distributions by resampling: the bootstrap of clusters and random sign flips. Fixed seeds; numpy only."""

import numpy as np

_RESAMPLES = 2_000
_FLIPS = 10_000
_EXACT = 13  # 2¹³ = 8,192 flips are fewer than are drawn: all of them are taken
_CHUNK = 1 << 21  # numbers held at a time
_TIE = 1e-9  # relative rounding within which two sums are equal


def bootstrap(sums: np.ndarray, sizes: np.ndarray, confidence: float = 0.95) -> tuple[float, float]:
    """Percentile interval of a mean over documents, resampling whole clusters (Efron 1979).

    Args:
        sums: sum over the documents of each cluster; shape (G,).
        sizes: number of documents of each cluster; shape (G,).
        confidence: coverage.
    """
    means = bootstrap_means(sums, sizes)
    low, high = np.quantile(means, [0.5 - confidence / 2, 0.5 + confidence / 2])
    return float(low), float(high)


def bootstrap_means(sums: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Means of resampled clusters, each drawn with replacement as often as there are clusters."""
    totals = bootstrap_totals(np.stack([sums, sizes], axis=1))
    return np.asarray(totals[:, 0] / totals[:, 1])


def bootstrap_totals(sums: np.ndarray) -> np.ndarray:
    """Totals over resampled clusters, for statistics that are functions of totals.

    Args:
        sums: sums over the documents of each cluster; shape (G, P).

    Returns:
        Shape (resamples, P).
    """
    rng = np.random.default_rng(0)
    count = len(sums)
    rows = max(1, _CHUNK // count)
    found = []
    for start in range(0, _RESAMPLES, rows):
        shape = (min(rows, _RESAMPLES - start), count)
        drawn = rng.integers(count, size=shape, dtype=np.int32)
        flat = drawn + np.arange(shape[0])[:, None] * count
        times = np.bincount(flat.ravel(), minlength=flat.size).reshape(shape)  # each is drawn
        found.append(times @ sums)
    return np.concatenate(found)


def sign_flips(deltas: np.ndarray, draws: int | None = None) -> np.ndarray:
    """Two-sided p-values of sums against those under random signs (Fisher 1935).

    All 2ⁿ signs are taken where at most 13 rows differ from zero. Else they are drawn, the same for
    every column, and the identity counts as one, so that p is never zero (Phipson and Smyth
    2010).

    Args:
        deltas: paired differences (of clusters: their sums), a column a comparison; shape (n, P).
        draws: how many signs; default: 10,000, and more for over 100 columns, since the p-values
            that Holm's correction asks for are smaller.

    Returns:
        p of each column; shape (P,).
    """
    deltas = deltas[deltas.any(axis=1)]
    count, columns = deltas.shape
    total = deltas.sum(axis=0)
    least = np.abs(total) - _TIE * np.abs(deltas).sum(axis=0)
    if count <= _EXACT:
        bits = (np.arange(1 << count)[:, None] >> np.arange(count)) & 1
        return np.asarray((np.abs(2 * (bits @ deltas) - total) >= least).mean(axis=0))
    rng = np.random.default_rng(0)
    draws = draws or max(_FLIPS, 100 * columns)
    hits = np.zeros(columns)
    rows = max(1, _CHUNK // count)
    for start in range(0, draws, rows):
        shape = (min(rows, draws - start), -(-count // 8))
        packed = rng.integers(0, 256, size=shape, dtype=np.uint8)
        bits = np.unpackbits(packed, axis=1, count=count).astype(float)
        hits += (np.abs(2 * (bits @ deltas) - total) >= least).sum(axis=0)
    return np.asarray((hits + 1) / (draws + 1))
