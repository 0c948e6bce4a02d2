"""One metric of two results, document by document. No torch."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from evals import stats

if TYPE_CHECKING:
    from evals.results import Score

NOT_PER_DOCUMENT = "cannot be paired: the metric is not a mean over the documents"


@dataclass(frozen=True)
class Sample:
    """One document as it was scored; `row` is its line of the samples file.

    `metrics` holds the values whose mean is the score. `weighted` holds [value, weight, scale] where
    the score is formed from the sums: `mean`, `perplexity` (exp(−mean)) or `bits_per_byte`
    (−mean / ln 2), with mean = Σ value / Σ weight. Documents of one `cluster` are not independent.
    """

    row: dict[str, Any]
    metrics: dict[str, float]
    weighted: dict[str, tuple[float, float, str]]

    @property
    def cluster(self) -> str | None:
        """What the document shares with others, such as a passage; None when it stands alone."""
        return self.row.get("cluster")


Samples = Mapping[str, Sample]  # by document


@dataclass(frozen=True)
class Pairing:
    """A metric's values on the documents that both sides have; `note` says why there are none."""

    score: "Score"  # the baseline's
    candidate: float
    documents: tuple[str, ...] = ()
    left: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))  # (n,)
    right: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros(0))  # (n,)
    clusters: tuple[str | None, ...] = ()
    is_identical: bool = False  # the same output on every document
    has_flips: bool = True  # a value is of one document alone
    span: float | None = None  # see `stats.paired`
    missing: int = 0
    note: str = ""

    @property
    def missing_share(self) -> float:
        """Of the documents, those without a value on a side."""
        return self.missing / max(1, self.missing + len(self.documents))

    @property
    def reach(self) -> float:
        """How far documents without a value could move the mean difference of all; inf where no bound is known.

        A model that fails on a document has no value there, so what is missing is rarely missing at random.
        """
        if not self.missing or not self.documents:
            return 0.0
        both = np.concatenate([self.left, self.right])
        span = 1.0 if self.span is None and both.min() >= 0 and both.max() <= 1 else math.inf
        return span * self.missing_share

    @property
    def differences(self) -> np.ndarray:
        """Candidate minus baseline; shape (n,)."""
        return np.asarray(self.right - self.left)

    def at(self, documents: Sequence[str]) -> tuple[np.ndarray, list[str | None]]:
        """Differences and clusters of some documents, in their order."""
        place = {name: number for number, name in enumerate(self.documents)}
        chosen = [place[name] for name in documents]
        return self.differences[chosen], [self.clusters[number] for number in chosen]


def common(pairings: Sequence[Pairing]) -> list[str]:
    """The documents that all pairings have, in the order of the first."""
    shared = set(pairings[0].documents).intersection(*(one.documents for one in pairings[1:]))
    return [name for name in pairings[0].documents if name in shared]


def pooled(pairings: Sequence[Pairing]) -> stats.Paired:
    """The statistics of one metric over one or several training seeds, given these seeds.

    A document's answers under several seeds are a cluster, so more seeds do not pass for more documents.
    """
    first = pairings[0]
    n = len(set().union(*(one.documents for one in pairings)))
    clusters = [
        f"document {name}" if cluster is None else cluster
        for one in pairings
        for name, cluster in zip(one.documents, one.clusters, strict=True)
    ]
    found = stats.paired(
        np.concatenate([one.left for one in pairings]),
        np.concatenate([one.right for one in pairings]),
        clusters=clusters,
        is_identical=all(one.is_identical for one in pairings),
        span=first.span,
    )
    flips = found.flips if first.has_flips or found.flips == 0 else math.nan
    count = found.clusters if any(cluster is not None for cluster in first.clusters) else None
    return dataclasses.replace(found, n=n, flips=flips, clusters=count)


def values(metric: str, samples: Samples) -> dict[str, float]:
    """What each document with a value contributes to a metric: values whose mean is the score."""
    sums = {
        name: sample.weighted[metric]
        for name, sample in samples.items()
        if _has_sum(sample, metric)
    }
    if sums:
        scale = next(iter(sums.values()))[2]
        parts = stats.contributions([(value, weight) for value, weight, _ in sums.values()], scale)
        return dict(zip(sums, parts, strict=True))
    return {
        name: value
        for name, sample in samples.items()
        if (value := sample.metrics.get(metric)) is not None and math.isfinite(value)
    }


def column(score: "Score", samples: Samples) -> dict[str, float] | str:
    """`values`, or why they are not those of the score: those of a corpus metric such as BLEU do not average to it."""
    found = values(score.metric, samples)
    if not found and samples and any(score.metric in one.metrics for one in samples.values()):
        return f"cannot be paired: none of the score's {len(samples)} documents has a value"
    if math.isnan(score.value) and len(found) == len(samples):
        return "cannot be paired: the score is not a number"
    mean = math.fsum(found.values()) / len(found) if found else math.nan
    is_mean = math.isnan(score.value) or math.isclose(mean, score.value, rel_tol=1e-6, abs_tol=1e-9)
    return found if found and is_mean else NOT_PER_DOCUMENT


def pair(score: "Score", other: "Score", ours: Samples, theirs: Samples) -> Pairing:
    """Pair a metric of two results over the same documents."""
    metric = score.metric
    left, right = column(score, ours), column(other, theirs)
    for side, found in (("baseline", left), ("candidate", right)):
        if isinstance(found, str):
            return Pairing(
                score, other.value, note=found.replace("the score", f"the {side}'s score")
            )
    assert not isinstance(left, str)
    assert not isinstance(right, str)
    names = [name for name in ours if name in left and name in right]
    missing = len(ours) - len(names)
    if not names:
        return Pairing(score, other.value, missing=missing, note=_gaps(missing, len(ours)))
    if missing:
        left, right = (
            values(metric, {name: side[name] for name in names}) for side in (ours, theirs)
        )
    is_weighted = metric in ours[names[0]].weighted
    return Pairing(
        score,
        other.value,
        documents=tuple(names),
        left=np.array([left[name] for name in names]),
        right=np.array([right[name] for name in names]),
        clusters=tuple(ours[name].cluster for name in names),
        is_identical=all(ours[name].row == theirs[name].row for name in ours),
        has_flips=not is_weighted,
        span=_span(metric, [side[name] for name in names for side in (ours, theirs)])
        if is_weighted
        else None,
        missing=missing,
        note=_gaps(missing, len(ours)) if missing else "",
    )


def pair_divergence(score: "Score", samples: Samples, is_same_model: bool) -> Pairing:
    """A divergence from the baseline, which itself has the neutral value on every document."""
    assert score.neutral is not None
    baseline = dataclasses.replace(score, value=score.neutral, stderr=0.0)
    found = column(score, samples)
    if isinstance(found, str):
        return Pairing(baseline, score.value, note=found)
    missing = len(samples) - len(found)
    return Pairing(
        baseline,
        score.value,
        documents=tuple(found),
        left=np.full(len(found), score.neutral),
        right=np.array(list(found.values())),
        clusters=tuple(samples[name].cluster for name in found),
        is_identical=is_same_model,
        has_flips=False,
        span=0.0,
        missing=missing,
        note=_gaps(missing, len(samples)) if missing else "",
    )


def _gaps(missing: int, n: int) -> str:
    return f"{missing} of {n} documents have no value on a side and are left out"


def _has_sum(sample: Sample, metric: str) -> bool:
    value, weight, _ = sample.weighted.get(metric, (math.nan, 0.0, ""))
    return value is not None and math.isfinite(value) and weight > 0


def _span(metric: str, samples: Sequence[Sample]) -> float:
    """The most by which a document can move a share of counts, such as of IFEval's instructions; 0: unknown."""
    parts = [sample.weighted[metric] for sample in samples]
    weights = [weight for _, weight, _ in parts]
    is_count = all(
        scale == "mean" and value == int(value) and 0 <= value <= weight
        for value, weight, scale in parts
    )
    return max(weights) / (sum(weights) / len(weights)) if is_count else 0.0
