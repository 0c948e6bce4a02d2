"""BLEU and chrF: functions of counts that are summed over all answers, so that no answer has a score of its own.

An answer's part is its influence by the delta method (the infinitesimal jackknife, Efron 1982): with the counts of
answer i as a vector s_i, their sum S, and the metric f(S), it is f(S) + n f'(S)·(s_i − S / n). The mean of these is
f(S), and the standard error of their mean is that of f(S).
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Parts = list[tuple[float, float, str]]

_ORDERS = 4  # of BLEU's n-grams


def bleu(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Parts:
    """Corpus BLEU of sacrebleu, with its defaults: 13a tokens, case kept, exponential smoothing (Post 2018)."""
    from sacrebleu.metrics.bleu import BLEU

    return _parts(BLEU(), _bleu_slope, answers, references)


def chrf(answers: Sequence[str], references: Sequence[Sequence[str]]) -> Parts:
    """Corpus chrF2 of sacrebleu: character n-grams up to 6, recall counts twice (Popović 2016)."""
    from sacrebleu.metrics.chrf import CHRF

    return _parts(CHRF(), _chrf_slope, answers, references)


def _parts(
    metric: Any,
    slope: Callable[[np.ndarray, float], np.ndarray],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
) -> Parts:
    most = max(map(len, references))
    # sacrebleu takes the first reference of all answers, then the second; None where there is none.
    columns = [[texts[k] if k < len(texts) else None for texts in references] for k in range(most)]
    counts = np.array(metric._extract_corpus_statistics(answers, columns), dtype=float)
    value = float(metric.corpus_score(answers, columns).score)
    gradient = slope(counts.sum(axis=0), value)
    influence = (counts - counts.mean(axis=0)) @ gradient * len(answers)
    return [(value + float(part), 1.0, "mean") for part in influence]


def _bleu_slope(total: np.ndarray, value: float) -> np.ndarray:
    """Gradient of BLEU = 100 exp(min(0, 1 − r/c) + mean over n of log(matches_n / ngrams_n)).

    Args:
        total: c (words of the answers), r (of the references), matches (4), n-grams (4).
        value: BLEU; where it is 0 it stays 0, for lack of n-grams or of matches.

    A smoothed precision, of an order without a match, moves with its number of n-grams only.
    """
    gradient = np.zeros_like(total)
    if value == 0:
        return gradient
    words, expected, matches, ngrams = (
        total[0],
        total[1],
        total[2 : 2 + _ORDERS],
        total[2 + _ORDERS :],
    )
    if words < expected:
        gradient[:2] = value * expected / words**2, -value / words
    gradient[2 : 2 + _ORDERS] = np.where(matches > 0, value / _ORDERS / np.maximum(matches, 1), 0)
    gradient[2 + _ORDERS :] = -value / _ORDERS / ngrams
    return gradient


def _chrf_slope(total: np.ndarray, value: float) -> np.ndarray:
    """Gradient of chrF = 100 (1 + β²) P R / (β² P + R), with β = 2 and P, R the means over the orders present.

    Args:
        total: for each order the n-grams of the answers, of the references, and the matches.
        value: chrF; where it is 0 it stays 0, for lack of matches.
    """
    answered, expected, matches = total.reshape(-1, 3).T
    present = (answered > 0) & (expected > 0)
    gradient = np.zeros((len(answered), 3))
    if value == 0:
        return gradient.ravel()
    a, e, m = answered[present], expected[present], matches[present]
    precision, recall, factor = (m / a).mean(), (m / e).mean(), 4.0
    bottom = factor * precision + recall
    by_precision = 100 * (1 + factor) * recall**2 / bottom**2 / len(a)
    by_recall = 100 * (1 + factor) * factor * precision**2 / bottom**2 / len(a)
    gradient[present, 0] = -by_precision * m / a**2
    gradient[present, 1] = -by_recall * m / e**2
    gradient[present, 2] = by_precision / a + by_recall / e
    return gradient.ravel()
