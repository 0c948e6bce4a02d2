"""What an evaluation found. JSON in and out; no torch."""

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.entry import UserError
from evals import stats
from evals.pairing import Sample
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
        except (ValueError, TypeError, KeyError, AttributeError) as error:
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

    def is_reference_of(self, other: "EvalResult") -> bool:
        """Whether `other` measured its divergences from this result's model."""
        if other.reference is None:
            return False
        mine = self.model | {"quantizer": self.quantizer}
        return all(mine.get(key) == value for key, value in other.reference.items())


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
