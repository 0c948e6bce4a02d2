"""What an evaluation found, and the comparison of two of them. JSON in and out; no torch."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.entry import UserError
from evals import stats
from reward.store import content_key, read_json, write_json

RESULTS = "results.json"


@dataclass(frozen=True)
class Score:
    """One metric of one task over n documents. `value` and `stderr` are in the metric's own unit."""

    task: str
    metric: str
    value: float
    stderr: float
    n: int
    higher_is_better: bool
    is_main: bool  # the metric by which the task is ranked


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

    def sample_values(self, task: str) -> dict[str, dict[str, float]]:
        """Per-document metric values of a task: document → metric → value. The document's id and hash name it."""
        if task not in self.samples:
            return {}
        values: dict[str, dict[str, float]] = {}
        for row in read_jsonl(self.folder / self.samples[task]):
            values.setdefault(f"{row['doc_id']}:{row['doc_hash']}", {}).update(row["metrics"])
        return values


@dataclass(frozen=True)
class Delta:
    """The paired difference of one metric, candidate minus baseline. `p_adjusted` is Holm's within the suite."""

    task: str
    metric: str
    baseline: float
    candidate: float
    difference: float
    stderr: float
    ci_low: float
    ci_high: float
    p: float
    p_adjusted: float
    flips: float
    n: int
    higher_is_better: bool
    is_main: bool
    verdict: str


def compare(baseline: EvalResult, candidate: EvalResult, margin: float = 0.03) -> list[Delta]:
    """Pair two results by document: forgetting is (base, tuned), quantization (16-bit, quantized), ablation (arm, arm).

    Args:
        baseline, candidate: results of the same suite under the same settings.
        margin: non-inferiority margin for suites whose role is retention, in the metric's unit.

    Returns:
        One delta for each metric that is a mean over documents; the others cannot be paired.

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
    found = list(_paired_scores(baseline, candidate))
    family = [paired.p if score.is_main else math.nan for score, _, paired in found]
    adjusted = stats.holm(family)
    return [
        Delta(
            task=score.task,
            metric=score.metric,
            baseline=score.value,
            candidate=other.value,
            **dataclasses.asdict(paired),
            p_adjusted=p_adjusted,
            higher_is_better=score.higher_is_better,
            is_main=score.is_main,
            verdict=verdict(
                paired.ci_low, paired.ci_high, margin, baseline.role, score.higher_is_better
            ),
        )
        for (score, other, paired), p_adjusted in zip(found, adjusted, strict=True)
    ]


def verdict(
    ci_low: float, ci_high: float, margin: float, role: str, higher_is_better: bool = True
) -> str:
    """Judge an interval of a difference.

    For a gain suite: better, worse or inconclusive, by whether the interval excludes zero. For a retention suite, by
    non-inferiority: retained when the interval excludes a loss of `margin`; forgotten when it excludes zero and not
    such a loss; else inconclusive, because a wide interval is never "no forgetting".
    """
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


def _paired_scores(
    baseline: EvalResult, candidate: EvalResult
) -> Iterator[tuple[Score, Score, stats.Paired]]:
    others = {(score.task, score.metric): score for score in candidate.scores}
    for task in baseline.samples:
        try:
            ours, theirs = baseline.sample_values(task), candidate.sample_values(task)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"the samples of {task} cannot be read: {error}") from error
        if ours.keys() != theirs.keys():
            missing = len(ours.keys() ^ theirs.keys())
            raise UserError(
                f"the results are not comparable: {missing} documents of {task} are on one side only"
            )
        for score in (score for score in baseline.scores if score.task == task):
            other = others.get((task, score.metric))
            pairs = [
                (ours[doc][score.metric], theirs[doc][score.metric])
                for doc in ours
                if score.metric in ours[doc] and score.metric in theirs[doc]
            ]
            if other is not None and len(pairs) == score.n:
                yield score, other, stats.paired([a for a, _ in pairs], [b for _, b in pairs])


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
