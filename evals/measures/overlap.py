"""Answers against references by their words. With several references, the best one counts."""

import functools
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def squad_em(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1 where answer and reference have the same words (Rajpurkar et al. 2016, SQuAD, section 6.1)."""
    return _best(lambda answer, reference: words(answer) == words(reference), answers, references)


def f1(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """Harmonic mean of precision and recall over the words (SQuAD 1.1 and 2.0, section 6.1)."""
    return _best(lambda *pair: _f1(*map(words, pair)), answers, references)


def words(text: str) -> list[str]:
    """Lower-cased words without punctuation and English articles, as SQuAD's official script takes them."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:  # SQuAD 2.0: an empty answer is right where none is expected
        return float(answer == reference)
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))


def rouge1(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float | None]:
    """F-measure over words, stemmed (Lin 2004, ROUGE)."""
    return _rouge("rouge1", answers, references)


def rouge2(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float | None]:
    """F-measure over pairs of words, stemmed (Lin 2004, ROUGE)."""
    return _rouge("rouge2", answers, references)


def rouge_l(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float | None]:
    """F-measure over the longest common subsequence of words, stemmed (Lin 2004, ROUGE)."""
    return _rouge("rougeL", answers, references)


def _rouge(
    kind: str, answers: Sequence[str], references: Sequence[Sequence[str]]
) -> list[float | None]:
    """A reference without a token cannot be matched by anything, not even itself: a gap."""
    scorer = _rouge_scorer(kind)
    return [
        float(scorer.score_multi(texts, answer)[kind].fmeasure)
        if any(_rouge_tokens(text) for text in texts)
        else None
        for answer, texts in zip(answers, references, strict=True)
    ]


def _rouge_tokens(text: str) -> list[str]:
    """What rouge-score sees of a text: a–z and digits."""
    from rouge_score.tokenize import tokenize

    return list(tokenize(text, None))


@functools.cache
def _rouge_scorer(kind: str) -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer([kind], use_stemmer=True)


def _best(
    score: Callable[[str, str], float],
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
) -> list[float]:
    pairs = zip(answers, references, strict=True)
    return [float(max(score(answer, text) for text in texts)) for answer, texts in pairs]
