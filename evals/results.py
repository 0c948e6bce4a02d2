"""What an evaluation found, and the comparison of two of them. JSON in and out; no torch."""

import dataclasses
import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from conf.entry import UserError
from evals import stats
from evals.pairing import Pairing, Sample, Samples, pair, pair_divergence, pooled
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
            if not all(
                isinstance(score.value, int | float) and isinstance(score.n, int)
                for score in scores
            ):
                raise TypeError("a score's value or n is not a number")
            if not isinstance(record["settings"], dict):
                raise TypeError("its settings are not an object")
            seconds = record.pop("seconds")
            return cls(
                scores=scores, folder=folder, seconds=math.nan if seconds is None else seconds, **record
            )  # fmt: skip
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{path} is not a result of this program: {error}") from error

    def read_samples(self, task: str) -> dict[str, Sample]:
        """The documents of a task by id and hash; the rows of several answer filters are one sample.

        Raises:
            UserError: when a document is there twice, or not as often as the others.
        """
        if task not in self.samples:
            return {}
        path = self.folder / self.samples[task]
        found: dict[str, Sample] = {}
        rows: Counter[str] = Counter()
        for row in read_jsonl(path):
            name = f"{row['doc_id']}:{row['doc_hash']}"
            weighted = {
                key: (_number(v), _number(w), _scale(scale))
                for key, (v, w, scale) in row.get("weighted", {}).items()
            }
            metrics = {key: _number(value) for key, value in row["metrics"].items()}
            sample = found.setdefault(name, Sample(row, {}, {}))
            if sample.metrics.keys() & metrics or sample.weighted.keys() & weighted:
                raise UserError(
                    f"{path.name} holds document {row['doc_id']} twice; evaluate it again"
                )
            sample.metrics.update(metrics)
            sample.weighted.update(weighted)
            rows[name] += 1
        if len(set(rows.values())) > 1:
            raise UserError(
                f"{path.name} holds {max(rows.values())} rows of some documents and {min(rows.values())} of others, "
                "as a file does that was cut off; evaluate it again"
            )
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
    reach: float = 0.0  # the most by which the missing documents could move the difference
    is_divergence: bool = False  # from the baseline itself: shown, not judged
    note: str = ""


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
    low, high = delta.ci_low - delta.reach, delta.ci_high + delta.reach
    return verdict(low, high, margin, role, delta.higher_is_better)


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
    return delta.baseline * math.expm1(margin) if delta.metric.endswith("perplexity") else margin


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
    if low > -margin or low == high == 0:
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


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a JSONL file. Splits on newline only: text may hold U+2028."""
    with path.open(encoding="utf-8", newline="\n") as file:
        for line in file:
            if line.strip():
                yield json.loads(line)


def _number(value: Any) -> float:
    """A value of a sample; null and NaN are gaps."""
    if value is None:
        return math.nan
    if not isinstance(value, int | float):
        raise TypeError(f"{value!r} is not a number")
    return value


def _scale(name: Any) -> str:
    if name not in stats.SCALES:
        raise ValueError(f"{name!r} is none of {', '.join(stats.SCALES)}")
    return str(name)


def _null_to_nan(score: dict[str, Any]) -> dict[str, Any]:
    return {
        key: math.nan if item is None and key in ("value", "stderr") else item
        for key, item in score.items()
    }
