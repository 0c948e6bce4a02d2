"""What an evaluation found, and the comparison of two of them. JSON in and out; no torch."""

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.entry import UserError
from evals import stats
from reward.store import content_key, read_json, write_json

RESULTS = "results.json"
UNQUANTIZED = "none"


@dataclass(frozen=True)
class Score:
    """One metric of one task over n documents. `value` and `stderr` are in the metric's own unit.

    `neutral` is set for a divergence from the result's reference model: what the reference itself
    has by definition. Such a score is a difference already.
    """

    task: str
    metric: str
    value: float
    stderr: float
    n: int
    higher_is_better: bool
    is_main: bool  # the metric by which the task is ranked
    neutral: float | None = None


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


@dataclass(frozen=True)
class EvalResult:
    """A model's scores on a suite, with everything needed to compare them fairly.

    `settings` holds all that must be equal for two results to be comparable: tasks and their versions, documents,
    few-shot, template, generation arguments, backend, number format. The quantizer is not part of it: that is what a
    quantization delta compares. When `skipped` is set there are no scores, and it says why.
    """

    model: dict[str, Any]
    quantizer: str
    suite: str
    role: str
    settings: dict[str, Any]
    scores: list[Score]
    samples: dict[str, str]  # task → name of its per-sample JSONL, beside results.json
    provenance: dict[str, Any]
    seconds: float = math.nan
    skipped: str | None = None
    reference: dict[str, Any] | None = None  # the model from which divergences are measured
    folder: Path = field(default=Path(), compare=False)

    @property
    def settings_hash(self) -> str:
        """Names the settings; equal hashes mean comparable results."""
        return content_key(self.settings)

    def save(self, folder: Path) -> None:
        """Write `results.json` into `folder`, where the sample files already are."""
        record = dataclasses.asdict(self)
        del record["folder"]
        write_json(folder / RESULTS, {"settings_hash": self.settings_hash, **record})

    @classmethod
    def load(cls, folder: Path) -> "EvalResult":
        """Read a folder written by `save`.

        Raises:
            UserError: when the folder holds no result, or one that cannot be read.
        """
        path = folder / RESULTS
        if not path.is_file():
            raise UserError(
                f"{folder} holds no {RESULTS}: give a folder that `python -m evals` wrote"
            )
        try:
            record = read_json(path)
            record.pop("settings_hash", None)
            scores = [Score(**_null_to_nan(score)) for score in record.pop("scores")]
            seconds = record.pop("seconds")
            return cls(
                scores=scores, folder=folder, seconds=math.nan if seconds is None else seconds, **record
            )  # fmt: skip
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is not a result of this program: {error}") from error

    def read_samples(self, task: str) -> dict[str, Sample]:
        """The documents of a task by id and hash; the rows of several answer filters are one sample."""
        if task not in self.samples:
            return {}
        found: dict[str, Sample] = {}
        for row in read_jsonl(self.folder / self.samples[task]):
            weighted = {
                name: (v, w, scale) for name, (v, w, scale) in row.get("weighted", {}).items()
            }
            name = f"{row['doc_id']}:{row['doc_hash']}"
            sample = found.setdefault(name, Sample(row, {}, {}))
            sample.metrics.update(row["metrics"])
            sample.weighted.update(weighted)
        return found

    def sample_values(self, task: str) -> dict[str, dict[str, float]]:
        """Per-document values of the metrics that are means: document → metric → value."""
        return {name: sample.metrics for name, sample in self.read_samples(task).items()}

    def is_reference_of(self, other: "EvalResult") -> bool:
        """Whether `other` measured its divergences from this result's model."""
        if other.reference is None:
            return False
        mine = self.model | {"quantizer": self.quantizer}
        return all(mine.get(key) == value for key, value in other.reference.items())


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
    is_divergence: bool = False  # from the baseline itself: shown, not judged
    note: str = ""


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
        UserError: when the settings differ (says which), a side was skipped, or documents are missing on one side.
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
    found = [
        delta for task in baseline.samples for delta in _task_deltas(baseline, candidate, task)
    ]
    adjusted = stats.holm([delta.p if _in_family(delta, family) else math.nan for delta in found])
    return [
        dataclasses.replace(
            delta,
            p_adjusted=p_adjusted,
            verdict=_verdict_of(delta, baseline.role, _margin_of(delta, margin, margins or {})),
        )
        for delta, p_adjusted in zip(found, adjusted, strict=True)
    ]


def _in_family(delta: Delta, family: Sequence[str]) -> bool:
    if not family:
        return delta.is_main
    return f"{delta.task}/{delta.metric}" in family or (delta.is_main and delta.task in family)


def _margin_of(delta: Delta, margin: float, margins: Mapping[str, float]) -> float:
    names = (f"{delta.task}/{delta.metric}", delta.task, delta.metric)
    return next((margins[name] for name in names if name in margins), margin)


def _verdict_of(delta: Delta, role: str, margin: float) -> str:
    if (
        delta.is_divergence
    ):  # of two models that differ at all, its interval never holds the neutral value
        return ""
    return verdict(delta.ci_low, delta.ci_high, margin, role, delta.higher_is_better)


def verdict(
    ci_low: float, ci_high: float, margin: float, role: str, higher_is_better: bool = True
) -> str:
    """Judge an interval of a difference.

    A cost is not judged. For a gain suite: better, worse or inconclusive, by whether the interval excludes zero. For a
    retention suite, by non-inferiority: retained when the interval excludes a loss of `margin`; forgotten when it
    excludes zero and not such a loss; else inconclusive, because a wide interval is never "no forgetting".
    """
    if role == "cost":
        return ""
    low, high = (ci_low, ci_high) if higher_is_better else (-ci_high, -ci_low)
    if math.isnan(low) or math.isnan(high):
        return "inconclusive"
    if role == "gain":
        return "better" if low > 0 else "worse" if high < 0 else "inconclusive"
    if low > -margin:
        return "retained"
    return "forgotten" if high < 0 else "inconclusive"


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


def _task_deltas(baseline: EvalResult, candidate: EvalResult, task: str) -> Iterator[Delta]:
    """The deltas of a task's metrics, not yet judged."""
    ours, theirs = (_samples_of(result, task) for result in (baseline, candidate))
    if ours.keys() != theirs.keys():
        missing = len(ours.keys() ^ theirs.keys())
        raise UserError(
            f"the results are not comparable: {missing} documents of {task} are on one side only"
        )
    pairs = [(ours[name], theirs[name]) for name in ours]
    others = {(score.task, score.metric): score for score in candidate.scores}
    mine = {score.metric for score in baseline.scores if score.task == task}
    for score in (score for score in baseline.scores if score.task == task):
        other = others.get((task, score.metric))
        if other is None:
            yield _unpaired(score, math.nan, "the candidate has no such metric")
        elif score.neutral is None:
            yield _paired(score, other, pairs)
    for other in (score for score in candidate.scores if score.task == task):
        if other.neutral is not None and baseline.is_reference_of(candidate):
            yield _divergence(other, [theirs for _, theirs in pairs])
        elif other.neutral is None and other.metric not in mine:
            yield _unpaired(other, other.value, "the baseline has no such metric")


def _samples_of(result: EvalResult, task: str) -> dict[str, Sample]:
    try:
        found = result.read_samples(task)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"the samples of {task} cannot be read: {error}") from error
    expected = {score.n for score in result.scores if score.task == task}
    if expected and len(found) not in expected:
        raise UserError(
            f"{result.folder}: the samples of {task} hold {len(found)} documents, "
            f"but its scores are over {min(expected)}; evaluate it again"
        )
    return found


_NOT_PER_DOCUMENT = "cannot be paired: the metric is not a mean over the documents"


def _paired(score: Score, other: Score, pairs: list[tuple[Sample, Sample]]) -> Delta:
    metric = score.metric
    if any(metric in side.weighted for pair in pairs for side in pair):
        usable = [pair for pair in pairs if all(_has_weight(side, metric) for side in pair)]
        scale = usable[0][0].weighted[metric][2] if usable else "mean"
        left, right = (
            stats.contributions([pair[side].weighted[metric][:2] for pair in usable], scale)
            for side in (0, 1)
        )
    else:
        usable = [pair for pair in pairs if all(_has_value(side, metric) for side in pair)]
        left, right = ([pair[side].metrics[metric] for pair in usable] for side in (0, 1))
    if not usable:
        return _unpaired(score, other.value, _NOT_PER_DOCUMENT)
    missing = len(pairs) - len(usable)
    if not missing and not (_averages_to(left, score) and _averages_to(right, other)):
        return _unpaired(score, other.value, _NOT_PER_DOCUMENT)
    clusters = [side.cluster for side, _ in usable]
    is_same = all(ours.row == theirs.row for ours, theirs in pairs)
    found = stats.paired(
        left, right, clusters=clusters if any(clusters) else None, is_identical=is_same
    )
    if any(metric in side.weighted for side, _ in usable):
        found = dataclasses.replace(found, flips=0.0 if is_same else math.nan)
    note = (
        f"{missing} of {len(pairs)} documents have no value on a side and are left out"
        if missing
        else ""
    )
    return _delta(score, other.value, found, missing, note)


def _has_value(sample: Sample, metric: str) -> bool:
    value = sample.metrics.get(metric)
    return value is not None and math.isfinite(value)


def _has_weight(sample: Sample, metric: str) -> bool:
    value, weight, _ = sample.weighted.get(metric, (math.nan, 0.0, ""))
    return value is not None and math.isfinite(value) and weight > 0


def _averages_to(values: list[float], score: Score) -> bool:
    """Whether the documents' values average to the score: those of a corpus metric such as BLEU do not."""
    return math.isclose(math.fsum(values) / len(values), score.value, rel_tol=1e-6, abs_tol=1e-9)


def _divergence(score: Score, samples: list[Sample]) -> Delta:
    """A divergence from the baseline, which has the neutral value on every document."""
    assert score.neutral is not None
    neutral, metric = score.neutral, score.metric
    baseline = dataclasses.replace(score, value=neutral, stderr=0.0)
    pairs = []
    for sample in samples:
        _, weight, scale = sample.weighted.get(metric, (0.0, 1.0, "mean"))
        metrics = {metric: neutral} if metric in sample.metrics else {}
        weighted = {metric: (neutral * weight, weight, scale)} if metric in sample.weighted else {}
        pairs.append((Sample({**sample.row, "answer": None}, metrics, weighted), sample))
    return dataclasses.replace(_paired(baseline, score, pairs), flips=math.nan, is_divergence=True)


def _delta(
    score: Score, candidate: float, paired: stats.Paired, missing: int = 0, note: str = ""
) -> Delta:
    return Delta(
        task=score.task,
        metric=score.metric,
        baseline=score.value,
        candidate=candidate,
        **dataclasses.asdict(paired),
        p_adjusted=math.nan,
        higher_is_better=score.higher_is_better,
        is_main=score.is_main,
        verdict="",
        missing=missing,
        note=note,
    )


def _unpaired(score: Score, candidate: float, note: str) -> Delta:
    nan = math.nan
    nothing = stats.Paired(nan, nan, nan, nan, p=nan, flips=nan, n=score.n)
    return _delta(score, candidate, nothing, note=note)


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file. Splits on newline only: text may hold U+2028."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _null_to_nan(score: dict[str, Any]) -> dict[str, Any]:
    return {
        key: math.nan if item is None and key in ("value", "stderr") else item
        for key, item in score.items()
    }
