"""The leaderboard as one self-contained HTML page. jinja2 loads when a page is made."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from conf.entry import UserError
from evals.contrast import Change, Contrast, Row
from evals.leaderboard import Arm, Board, MeanScore
from evals.markup import count, duration, environment, percent
from evals.plots import Point, forest_chart, score_chart
from evals.results import EvalResult, Score, read_jsonl
from evals.runs import Run, Variant

Links = Mapping[tuple[Path, str], str]

_SAMPLES = 12
_LONGEST_TEXT = 4000  # characters shown of an answer: a runaway generation must not swell the page
_Z95 = 1.959964  # half-width of a 95 % normal interval, in standard errors


def render(found: Sequence[Board], data_page: str = "", links: Links | None = None) -> str:
    """The page of boards that are already computed; equal boards give equal text.

    Args:
        found: the boards.
        data_page: file name of the page about the training data; empty when there is none.
        links: (run's folder, stage) → where the data page tells of the stage's rows.
    """
    numbers = itertools.count(1)
    tables = [
        (board, [(rank, ArmView(arm, next(numbers), links)) for rank, arm in board.entries])
        for board in found
    ]
    views = [view for _, entries in tables for _, view in entries]
    return (
        environment()
        .get_template("leaderboard.html.jinja")
        .render(
            tables=tables,
            views=views,
            provenance=_provenance([view.arm for view in views]),
            data_page=data_page,
        )
    )


# What the template shows of an arm.


class Sample(NamedTuple):
    """A held-out prompt with both answers. `before` and `after` are the main metric's values."""

    prompt: str
    target: str
    before_answer: str
    after_answer: str
    before: float
    after: float


class SampleSet(NamedTuple):
    """Some samples of a task, and what share of it they are."""

    task: str
    metric: str
    total: int
    won: int
    lost: int
    rows: list[Sample]
    best: int = 1  # the mark of a right answer; 0 for a metric where less is better
    note: str = ""  # why there are none


class Step(NamedTuple):
    """One box of the line that says what was trained."""

    name: str
    facts: list[str]
    data: str = ""  # link to the rows that it was trained on


class ArmView:
    """An arm as its section of the page shows it."""

    def __init__(self, arm: Arm, number: int, links: Links | None = None) -> None:
        self.arm = arm
        self._links = links or {}
        self.id = f"arm-{number}"
        self.gain = arm.average("gain")
        self.retention = arm.average("retention")
        self.retained = arm.stages[-1].rows("retention", main_only=True) if arm.stages else []
        self.dtype = str(arm.first.model.get("dtype", "16-bit"))

    @property
    def steps(self) -> list[Step]:
        """The base and the training stages, in order."""
        model = self.arm.first.model
        start = Step("base", [str(model.get("path", "unknown model")), self.dtype])
        folder, links = self.arm.first.folder, self._links
        stages = [
            (stage, links.get((folder, str(stage.get("stage"))), ""))
            for stage in self.arm.first.stages
        ]
        return [start, *(_step(stage)._replace(data=link) for stage, link in stages)]

    @property
    def gain_tables(self) -> list[dict[str, Any]]:
        """For each gain task its scores by policy, each with its paired gain."""
        return [
            {"suite": suite, "task": task, "lines": self._lines(suite, task)}
            for suite, task in self.arm.tasks("gain")
        ]

    def _lines(self, suite: str, task: str) -> list[tuple[MeanScore, Row | None]]:
        gains = [_row_of(contrast, suite, task) for contrast in self.arm.stages]
        policies = self.arm.variants[: len(gains) + 1]
        scores = [self.arm.score(policy, suite, task) for policy in policies]
        return list(zip(scores, [None, *gains], strict=True))

    @property
    def charts(self) -> list[str]:
        """One score chart for each gain task."""
        return [
            chart
            for number, (suite, task) in enumerate(self.arm.tasks("gain"))
            if (chart := self._score_chart(suite, task, f"{self.id}-score-{number}"))
        ]

    def _score_chart(self, suite: str, task: str, name: str) -> str:
        scores = [self.arm.score(variant, suite, task) for variant in self.arm.variants]
        known = [score for score in scores if not score.is_missing]
        if not known:
            return ""
        is_share = all(score.is_share for score in known)
        scale, low, high = (100.0, 0.0, 1.0) if is_share else (1.0, -math.inf, math.inf)
        drawn = [
            Point(
                str(score.variant),
                score.value * scale,
                max(low, score.value - _Z95 * score.stderr) * scale,
                min(high, score.value + _Z95 * score.stderr) * scale,
            )
            for score in known
        ]
        unit = " (%)" if scale == 100 else ""
        return score_chart(name, drawn, f"{task} · {known[0].metric}{unit}")

    @property
    def forest(self) -> str:
        """The forest plot of the retention tasks; empty when no task has a share to draw."""
        drawn = [
            Point(row.task, *_times_100(row.change), row.change.verdict)
            for row in self.retained
            if not row.change.is_missing and row.change.is_share and row.higher_is_better
        ]
        if not drawn:
            return ""
        if len(drawn) > 1 and not self.retention.is_missing:
            drawn.append(Point("average", *_times_100(self.retention)))
        label = "change from base to tuned (percentage points)"
        return forest_chart(f"{self.id}-forest", drawn, label, self.arm.margin * 100)

    @property
    def costs(self) -> list[tuple[str, list[Row]]]:
        """Each quantizer with its rows; suites that share one reason are one row."""
        return [
            (contrast.after.quantizer, _merged(contrast.rows(main_only=True)))
            for contrast in self.arm.quantized
        ]

    @property
    def all_metrics(self) -> list[tuple[Contrast, list[Row]]]:
        """Every metric of every contrast."""
        contrasts = [*self.arm.stages, *self.arm.quantized]
        return [(contrast, contrast.rows()) for contrast in contrasts]

    @property
    def seeds(self) -> list[tuple[Run, Change]]:
        """Each seed with its own gain."""
        if not self.arm.stages:
            return []
        return list(zip(self.arm.runs, self.arm.stages[-1].by_seed("gain"), strict=True))

    @property
    def samples(self) -> list[SampleSet]:
        """Answers of the base and the last policy on the gain tasks, of the first seed."""
        return [
            _samples(self.arm.first, self.arm.base, self.arm.final, suite, task)
            for suite, task in self.arm.tasks("gain")
        ]


def _row_of(contrast: Contrast, suite: str, task: str) -> Row | None:
    """The main row of a task; the suite's row where the whole suite has no numbers."""
    for row in contrast.rows(main_only=True):
        if row.suite == suite and row.task in (task, ""):
            return row
    return None


def _times_100(change: Change) -> tuple[float, float, float]:
    return change.difference * 100, change.ci_low * 100, change.ci_high * 100


def _merged(rows: list[Row]) -> list[Row]:
    """The rows, without repeating a reason that all of them share, such as a skip."""
    notes = {row.change.note for row in rows}
    if len(rows) > 1 and len(notes) == 1 and all(row.change.is_missing for row in rows):
        return [Row("all suites", "", rows[0].change)]
    return rows


def _step(stage: dict[str, Any]) -> Step:
    data = stage.get("data") or {}
    parameters = stage.get("parameters") or {}
    facts = [str(stage["method"])] if stage.get("method") else []
    if "rows" in data:
        dropped = f" ({data['dropped']} dropped)" if data.get("dropped") else ""
        facts.append(f"{data['rows']} rows{dropped}")
    if data.get("source"):
        facts.append(str(data["source"]))
    if parameters.get("total"):
        trained, total = parameters.get("trained", 0), parameters["total"]
        facts.append(f"{count(trained)} of {count(total)} parameters ({percent(trained / total)})")
    metrics = stage.get("metrics") or {}
    if isinstance(accuracy := metrics.get("eval_accuracy"), float):  # a reward model's
        facts.append(f"{percent(accuracy)} of held-out pairs ranked right")
    elif isinstance(loss := metrics.get("eval_loss"), float):
        facts.append(f"held-out loss {loss:.3f}")
    spent = duration(stage.get("seconds"))
    facts.append(f"{spent}, reused from an earlier run" if stage.get("reused") else spent)
    return Step(str(stage.get("stage", "stage")), facts)


def _samples(run: Run, before: Variant, after: Variant, suite: str, task: str) -> SampleSet:
    try:
        ours, theirs = (
            _sample_rows(run.result(variant, suite), task) for variant in (before, after)
        )
        score = _main_score(run, suite, task)
        pairs = [(ours[key], theirs[key]) for key in ours if key in theirs]
        rows = [_sample(left, right, score.metric) for left, right in pairs]
    except (UserError, OSError, ValueError, KeyError, TypeError) as error:
        reason = str(error) if isinstance(error, UserError) else "the sample files cannot be read"
        return SampleSet(task, "", 0, 0, 0, [], note=reason)
    # Python's sort is stable: within each kind the test's own order stays.
    shown = sorted(
        rows, key=lambda row: (row.before == row.after, row.before_answer == row.after_answer)
    )
    rises = sum(row.after > row.before for row in rows)
    falls = sum(row.after < row.before for row in rows)
    won, lost = (rises, falls) if score.higher_is_better else (falls, rises)
    best = int(score.higher_is_better)
    return SampleSet(task, score.metric, len(rows), won, lost, shown[:_SAMPLES], best)


def _sample_rows(result: EvalResult | str, task: str) -> dict[str, dict[str, Any]]:
    if isinstance(result, str):
        raise UserError(result)
    if task not in result.samples:
        raise UserError(f"no samples of {task} were kept")
    rows = read_jsonl(result.folder / result.samples[task])
    return {f"{row['doc_id']}:{row['doc_hash']}": row for row in rows}


def _main_score(run: Run, suite: str, task: str) -> Score:
    for result in (result for (_, name), result in run.results.items() if name == suite):
        if isinstance(result, EvalResult):
            for score in result.scores:
                if score.task == task and score.is_main:
                    return score
    raise UserError(f"{task} has no main metric")


def _sample(left: dict[str, Any], right: dict[str, Any], metric: str) -> Sample:
    return Sample(
        prompt=_shortened(left.get("prompt", "")),
        target=_shortened(left.get("target", "")),
        before_answer=_shortened(left.get("answer", "")),
        after_answer=_shortened(right.get("answer", "")),
        before=float(left["metrics"][metric]),
        after=float(right["metrics"][metric]),
    )


def _shortened(text: Any) -> str:
    whole = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    return whole if len(whole) <= _LONGEST_TEXT else whole[:_LONGEST_TEXT] + " …"


def _provenance(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """What made the numbers, each distinct value once."""
    runs = sorted((run for arm in arms for run in arm.runs), key=lambda run: run.started)
    known = {
        "Commit": [_commit(run) for run in runs],
        "Versions": [_versions(run) for run in runs],
        "Command": [run.command for run in runs],
        "Date": [run.started for run in runs],
    }
    return {key: list(dict.fromkeys(filter(None, values))) for key, values in known.items()}


def _commit(run: Run) -> str:
    commit = run.provenance.get("commit")
    if not commit:
        return "unknown (not run from a checkout)"
    return f"{commit} with uncommitted changes" if run.provenance.get("dirty") else str(commit)


def _versions(run: Run) -> str:
    versions = run.provenance.get("versions") or {}
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version)
