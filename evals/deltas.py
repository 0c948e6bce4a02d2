"""The comparison of two results: paired deltas and their verdicts. No torch."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from conf.entry import UserError
from evals import stats
from evals.pairing import Pairing, Samples, pair, pair_divergence, pooled
from evals.results import EvalResult


@dataclass(frozen=True)
class Delta:
    """The paired difference of one metric, candidate minus baseline, in the metric's own unit.

    A metric that cannot be paired has NaN for its difference, and `note` says why.
    """

    task: str
    metric: str
    baseline: float
    candidate: float
    difference: float
    stderr: float  # of the difference; clustered where the documents have clusters
    ci_low: float
    ci_high: float
    p: float  # two-sided
    p_adjusted: float  # Holm's within the family; NaN outside it
    flips: (
        float  # share of documents whose value differs; NaN where the value is not of one document
    )
    n: int  # documents that were paired
    higher_is_better: bool
    is_main: bool
    verdict: str
    clusters: int | None = None  # number of clusters; None when every document stands alone
    mde: float = math.nan  # smallest true difference that would be found with 80 % power
    bootstrap_low: float = math.nan  # paired bootstrap interval
    bootstrap_high: float = math.nan
    missing: int = 0  # documents without a value on a side, left out
    missing_share: float = 0.0  # of the documents
    reach: float = (
        0.0  # the most by which the missing documents could move the mean difference of all
    )
    is_divergence: bool = False  # from the baseline itself: shown, not judged
    note: str = ""

    @property
    def worst(self) -> tuple[float, float]:
        """The ends of the interval if what is missing was all lost, and if it was all won."""
        known = 1 - self.missing_share
        return known * self.ci_low - self.reach, known * self.ci_high + self.reach


class _Hypothesis(Protocol):
    @property
    def task(self) -> str: ...
    @property
    def metric(self) -> str: ...
    @property
    def is_main(self) -> bool: ...


def compare(
    baseline: EvalResult,
    candidate: EvalResult,
    margin: float = 0.03,
    family: Sequence[str] = (),
    margins: Mapping[str, float] | None = None,
) -> list[Delta]:
    """Pair two results by document: forgetting is (base, tuned), quantization (16-bit, quantized), ablation (arm, arm).

    Args:
        baseline, candidate: results of the same suite under the same settings.
        margin: non-inferiority margin for suites whose role is retention, in the metric's unit.
        family: hypotheses for Holm's correction, TASK or TASK/METRIC; default: the main metrics.
        margins: TASK/METRIC, TASK or METRIC → its own margin.

    Returns:
        One delta for each metric.

    Raises:
        UserError: when the settings differ (says which), a side was skipped, documents are missing on one side, or
            a name in `family` matches nothing.
    """
    deltas = [delta_of([pairing]) for pairing in pair_all(baseline, candidate)]
    if unknown := [
        name for name in family if not any(in_family(delta, [name]) for delta in deltas)
    ]:
        known = ", ".join(f"{delta.task}/{delta.metric}" for delta in deltas)
        raise UserError(
            f"the family names {', '.join(unknown)}, which is no TASK or TASK/METRIC here: {known}"
        )
    return judged(deltas, baseline.role, margin, family, margins or {})


def pair_all(baseline: EvalResult, candidate: EvalResult) -> list[Pairing]:
    """Every metric of two results, document by document; see `compare`.

    Raises:
        UserError: when the two are not comparable.
    """
    for result in (baseline, candidate):
        if result.skipped:
            raise UserError(
                f"there is nothing to compare: {result.folder} was skipped ({result.skipped})"
            )
    if different := differing(baseline.settings, candidate.settings):
        raise UserError(
            "the results are not comparable, their settings differ:\n  " + "\n  ".join(different)
        )
    if baseline.role != candidate.role:
        raise UserError(
            f"the results are not comparable: one is of a {baseline.role} suite, the other of a {candidate.role} suite"
        )
    tasks = dict.fromkeys([*baseline.samples, *(score.task for score in baseline.scores)])
    return [pairing for task in tasks for pairing in _task_pairings(baseline, candidate, task)]


def delta_of(pairings: Sequence[Pairing]) -> Delta:
    """One metric over one or several training seeds, not yet judged."""
    first = pairings[0]
    nan = math.nan
    usable = [pairing for pairing in pairings if pairing.documents]
    found = (
        pooled(usable)
        if usable
        else stats.Paired(nan, nan, nan, nan, p=nan, flips=nan, n=first.score.n)
    )
    return Delta(
        task=first.score.task,
        metric=first.score.metric,
        baseline=statistics.fmean(pairing.score.value for pairing in pairings),
        candidate=statistics.fmean(pairing.candidate for pairing in pairings),
        **dataclasses.asdict(found),
        p_adjusted=nan,
        higher_is_better=first.score.higher_is_better,
        is_main=first.score.is_main,
        verdict="",
        is_divergence=first.score.neutral is not None,
        missing=max(pairing.missing for pairing in pairings),
        missing_share=max(pairing.missing_share for pairing in usable) if usable else 0.0,
        reach=max(pairing.reach for pairing in pairings),
        note="; ".join(dict.fromkeys(pairing.note for pairing in pairings if pairing.note)),
    )


def judged(
    deltas: Sequence[Delta],
    role: str,
    margin: float,
    family: Sequence[str] = (),
    margins: Mapping[str, float] | None = None,
) -> list[Delta]:
    """The deltas with their verdicts, and with p adjusted by Holm within the family.

    Raises:
        UserError: when a margin is no finite number from 0 up.
    """
    for limit in (margin, *(margins or {}).values()):
        if not 0 <= limit < math.inf:
            raise UserError(
                f"a margin is the loss that is still accepted: a number from 0 up, not {limit}"
            )
    adjusted = stats.holm([delta.p if in_family(delta, family) else math.nan for delta in deltas])
    return [
        dataclasses.replace(
            delta,
            p_adjusted=p_adjusted,
            verdict=_verdict_of(delta, role, margin_of(delta, margin, margins or {})),
        )
        for delta, p_adjusted in zip(deltas, adjusted, strict=True)
    ]


def _verdict_of(delta: Delta, role: str, margin: float) -> str:
    if delta.is_divergence:  # of two models that differ at all, it is never the neutral value
        return ""
    return verdict(*delta.worst, margin, role, delta.higher_is_better)


def in_family(delta: _Hypothesis, family: Sequence[str]) -> bool:
    """Whether a delta is among the declared hypotheses; by default every main metric is."""
    if not family:
        return delta.is_main
    return f"{delta.task}/{delta.metric}" in family or (delta.is_main and delta.task in family)


def margin_of(delta: Delta, margin: float, margins: Mapping[str, float]) -> float:
    """The non-inferiority margin of a metric: that of TASK/METRIC, TASK or METRIC, else `margin`.

    A perplexity is exp(loss), so `margin` is taken for nats: e^margin times the baseline is still accepted.
    """
    names = (f"{delta.task}/{delta.metric}", delta.task, delta.metric)
    for name in names:
        if name in margins:
            return margins[name]
    is_perplexity = delta.metric.split(",")[0].endswith("perplexity")
    return delta.baseline * math.expm1(margin) if is_perplexity else margin


def verdict(
    ci_low: float, ci_high: float, margin: float, role: str, higher_is_better: bool = True
) -> str:
    """Judge an interval of a difference.

    A cost is not judged. For a gain suite: better, worse or inconclusive, by whether the interval excludes zero;
    unchanged for the same output on every document, where "inconclusive" would promise more from more documents. For a
    retention suite, by non-inferiority: retained when the interval excludes a loss of `margin`; forgotten when it
    excludes zero and not such a loss; else inconclusive, because a wide interval is never "no forgetting".
    """
    if role == "cost":
        return ""
    low, high = (ci_low, ci_high) if higher_is_better else (-ci_high, -ci_low)
    if math.isnan(low) or math.isnan(high):
        return "inconclusive"
    if role == "gain":
        if low == high == 0:
            return "unchanged"
        return "better" if low > 0 else "worse" if high < 0 else "inconclusive"
    if low > -margin or low == high == 0:
        return "retained"
    return "forgotten" if high < 0 else "inconclusive"


def is_own_reading(metric: str, baseline: EvalResult, candidate: EvalResult) -> bool:
    """Whether a metric is how surprised each of two models is by its own answers, which is no common measure."""
    is_of_answers = metric.split(",")[0] == "perplexity" and "perplexity" in baseline.settings.get(
        "metrics", []
    )
    read_by = [one.model.get("weights", one.model) for one in (baseline, candidate)]
    is_one_reader = read_by[0] == read_by[1] and baseline.quantizer == candidate.quantizer
    return is_of_answers and "perplexity_model" not in baseline.settings and not is_one_reader


def differing(left: dict[str, Any], right: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings that differ, as `key: left → right` lines."""
    lines = []
    for key in sorted(left.keys() | right.keys()):
        a, b = left.get(key, "absent"), right.get(key, "absent")
        if isinstance(a, dict) and isinstance(b, dict):
            lines += differing(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {_short(a)} → {_short(b)}")
    return lines


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "…"


def _task_pairings(baseline: EvalResult, candidate: EvalResult, task: str) -> Iterator[Pairing]:
    ours, theirs = (samples_of(result, task) for result in (baseline, candidate))
    if one_sided := _one_sided(ours, theirs):
        raise UserError(f"the results are not comparable: of the documents of {task}, {one_sided}")
    others = {score.metric: score for score in candidate.scores if score.task == task}
    mine = {score.metric: score for score in baseline.scores if score.task == task}
    for metric, score in mine.items():
        if metric not in others:
            yield Pairing(score, math.nan, note="the candidate has no such metric")
        elif score.higher_is_better != others[metric].higher_is_better:
            raise UserError(
                f"the results are not comparable: {task} {metric} is better when higher on one side, lower on the other"
            )
        elif is_own_reading(metric, baseline, candidate):
            note = "each model read its own answers; set suite.perplexity_model"
            yield Pairing(score, others[metric].value, note=note)
        elif score.neutral is None:
            yield pair(score, others[metric], ours, theirs)
    for metric, other in others.items():
        if other.neutral is not None and baseline.is_reference_of(candidate):
            yield pair_divergence(other, theirs, candidate.is_reference_of(candidate))
        elif other.neutral is None and metric not in mine:
            absent = dataclasses.replace(other, value=math.nan, stderr=math.nan)
            yield Pairing(absent, other.value, note="the baseline has no such metric")


def _one_sided(ours: Samples, theirs: Samples) -> str:
    sides = (("baseline", ours.keys() - theirs.keys()), ("candidate", theirs.keys() - ours.keys()))
    return " and ".join(f"{len(names)} are only in the {side}" for side, names in sides if names)


def samples_of(result: EvalResult, task: str) -> Samples:
    """The documents of a task, as many as its scores are over.

    Raises:
        UserError: when they cannot be read, or some are missing.
    """
    try:
        found = result.read_samples(task)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"the samples of {task} cannot be read: {_without_folder(error)}"
        ) from error
    expected = {score.n for score in result.scores if score.task == task}
    # A score with gaps is over fewer.
    if task in result.samples and expected and len(found) < max(expected):
        raise UserError(
            f"{result.folder.name}: the samples of {task} hold {len(found)} documents, "
            f"but its scores are over {max(expected)}; evaluate it again"
        )
    return found


def _without_folder(error: Exception) -> str:
    """An error's message without the place of the records, on which a page must not depend."""
    if isinstance(error, OSError):
        return f"{error.strerror}: {Path(str(error.filename)).name}"
    return str(error)
