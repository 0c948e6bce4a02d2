"""From run records to arms: what each one gained, lost, and costs when quantized. No torch.

An arm is a configuration without its seed; the runs of an arm differ in the seed only. Two errors
are kept apart throughout. The *sampling* error says how far a number could move with other
documents; the *spread* is the standard deviation between seeds, and says how far it moves with
another training run.
"""

import dataclasses
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from conf.entry import UserError
from evals import stats
from evals.results import Delta, EvalResult, Score, compare, verdict
from evals.runs import UNQUANTIZED, Run, Variant, load_runs

# Metrics that have no upper bound, yet whose mean may happen to lie between 0 and 1.
_UNBOUNDED = ("bits", "length", "loglikelihood", "logprob", "loss", "nll", "perplexity", "reward")


@dataclass(frozen=True)
class Change:
    """A paired difference with its 95 % interval, averaged over seeds, or why there is none.

    The interval is the sampling error alone. It is the average of the seeds' intervals: all seeds
    answer the same documents, so their errors are not independent, and more seeds do not narrow it
    (an upper bound, reached when the errors are fully correlated). `spread` is the standard
    deviation between seeds, NaN with one seed.
    """

    difference: float = math.nan
    ci_low: float = math.nan
    ci_high: float = math.nan
    spread: float = math.nan
    seeds: int = 0
    n: int = 0  # documents
    verdict: str = ""
    is_share: bool = True  # in [0, 1], to be shown in percentage points
    note: str = ""  # what the number leaves out, or why there is none

    @property
    def is_missing(self) -> bool:
        """Whether there is no number."""
        return math.isnan(self.difference)


@dataclass(frozen=True)
class Row:
    """One metric of one task in a contrast, averaged over seeds.

    A suite without numbers is one row without a task, whose change has the reason.
    """

    suite: str
    role: str
    change: Change
    task: str = ""
    metric: str = ""
    is_main: bool = True
    higher_is_better: bool = True
    baseline: float = math.nan
    candidate: float = math.nan
    flips: float = math.nan
    p: float = math.nan  # the largest over seeds
    p_adjusted: float = math.nan  # the largest over seeds


@dataclass(frozen=True)
class Contrast:
    """Two variants compared on every suite.

    `found` has one entry per seed: for each suite its deltas, or why there are none.
    """

    before: Variant
    after: Variant
    margin: float
    roles: dict[str, str]
    found: list[dict[str, list[Delta] | str]]

    def rows(self, role: str | None = None, main_only: bool = False) -> list[Row]:
        """The rows of the suites of a role, or of all suites."""
        return [
            row
            for suite, its_role in self.roles.items()
            if role in (None, its_role)
            for row in self._suite_rows(suite, its_role)
            if row.is_main or not main_only
        ]

    def average(self, role: str) -> Change:
        """The mean improvement (+ is better) over the main metrics of a role's suites.

        Tasks weigh the same.
        """
        if role not in self.roles.values():
            return Change(note=f"no {role} suite was measured")
        each = self.by_seed(role)
        changes = [change for change in each if not change.is_missing]
        mean = _over_seeds(changes, (change.note for change in each if change.is_missing))
        if mean.is_missing or role != "gain":
            return (
                mean  # one verdict over all retention tasks would hide the task that was forgotten
            )
        return _judged(mean, self.margin, role)

    def by_seed(self, role: str) -> list[Change]:
        """What `average` averages: one change a seed, in the order of the runs."""
        suites = [suite for suite, its_role in self.roles.items() if its_role == role]
        return [_seed_change(found, suites) for found in self.found]

    def _suite_rows(self, suite: str, role: str) -> list[Row]:
        reasons = [found for seed in self.found if isinstance(found := seed[suite], str)]
        measured = [found for seed in self.found if not isinstance(found := seed[suite], str)]
        if not measured:
            return [Row(suite, role, Change(note=_joined(reasons)))]
        keys = dict.fromkeys((delta.task, delta.metric) for deltas in measured for delta in deltas)
        return [
            self._row(
                suite,
                role,
                [d for ds in measured for d in ds if (d.task, d.metric) == key],
                reasons,
            )
            for key in keys
        ]

    def _row(self, suite: str, role: str, deltas: list[Delta], reasons: list[str]) -> Row:
        first = deltas[0]
        row = Row(
            suite,
            role,
            Change(note=_UNPAIRED, is_share=_is_share(first)),
            task=first.task,
            metric=first.metric,
            is_main=first.is_main,
            higher_is_better=first.higher_is_better,
            baseline=statistics.fmean(delta.baseline for delta in deltas),
            candidate=statistics.fmean(delta.candidate for delta in deltas),
        )
        paired = [delta for delta in deltas if not math.isnan(delta.difference)]
        if not paired:
            return row
        mean = _over_seeds([_change(delta) for delta in paired], reasons)
        return dataclasses.replace(
            row,
            change=_judged(mean, self.margin, role, first.higher_is_better),
            flips=statistics.fmean(delta.flips for delta in paired),
            p=max(delta.p for delta in paired),
            p_adjusted=max(delta.p_adjusted for delta in paired),
        )


_UNPAIRED = "cannot be paired: the metric is not a mean over the documents"


def contrast(runs: Sequence[Run], before: Variant, after: Variant, margin: float) -> Contrast:
    """Compare two variants on every suite, within each seed."""
    roles = {suite: role for suite in runs[0].suites if (role := runs[0].role(suite))}
    found = [
        {suite: _compare(run, before, after, suite, margin) for suite in roles} for run in runs
    ]
    return Contrast(before, after, margin, roles, found)


def _compare(
    run: Run, before: Variant, after: Variant, suite: str, margin: float
) -> list[Delta] | str:
    # The candidate comes first: a skipped quantizer is the better reason than an unmeasured base.
    candidate, baseline = run.result(after, suite), run.result(before, suite)
    for result in (candidate, baseline):
        if isinstance(result, str):
            return result
    assert isinstance(baseline, EvalResult)
    assert isinstance(candidate, EvalResult)
    try:
        deltas = compare(baseline, candidate, margin)
    except UserError as error:
        return str(error)
    except (OSError, ValueError, KeyError) as error:
        return f"the samples of {before} and {after} cannot be paired: {_without_folder(error)}"
    return deltas + list(_unpaired(baseline, candidate, deltas))


def _without_folder(error: Exception) -> str:
    """An error's message without the place of the records, on which the page must not depend."""
    if isinstance(error, OSError):
        return f"{error.strerror}: {Path(str(error.filename)).name}"
    return str(error)


def _unpaired(baseline: EvalResult, candidate: EvalResult, deltas: list[Delta]) -> Iterator[Delta]:
    """The metrics that `compare` leaves out, without a difference: their absence must be seen."""
    known = {(delta.task, delta.metric) for delta in deltas}
    others = {(score.task, score.metric): score.value for score in candidate.scores}
    for score in baseline.scores:
        if (score.task, score.metric) not in known:
            yield Delta(
                task=score.task,
                metric=score.metric,
                baseline=score.value,
                candidate=others.get((score.task, score.metric), math.nan),
                difference=math.nan,
                stderr=math.nan,
                ci_low=math.nan,
                ci_high=math.nan,
                p=math.nan,
                p_adjusted=math.nan,
                flips=math.nan,
                n=score.n,
                higher_is_better=score.higher_is_better,
                is_main=score.is_main,
                verdict="",
            )


def _seed_change(found: dict[str, list[Delta] | str], suites: Sequence[str]) -> Change:
    measured = []
    for suite in suites:
        deltas = found[suite]
        if isinstance(deltas, str):
            return Change(note=deltas)
        measured.append(deltas)
    try:
        return dataclasses.replace(_improvement(measured), seeds=1)
    except UserError as error:
        return Change(note=str(error))


def _improvement(suites: Sequence[list[Delta]]) -> Change:
    """One seed's average over the main metrics; see `Contrast.average`.

    Raises:
        UserError: when a main metric has no difference, or no two of them share a unit.
    """
    mains = [delta for deltas in suites for delta in deltas if delta.is_main]
    if unpaired := [delta.task for delta in mains if math.isnan(delta.difference)]:
        raise UserError(f"{', '.join(unpaired)} {_UNPAIRED}")
    if not mains:
        raise UserError("no task has a main metric")
    if len(mains) == 1:
        return _change(mains[0], oriented=True)
    shares = [delta for delta in mains if _is_share(delta)]
    if not shares:
        raise UserError("the main metrics have no common unit to average")
    left_out = [delta.task for delta in mains if not _is_share(delta)]
    signs = [1 if delta.higher_is_better else -1 for delta in shares]
    mean, low, high = stats.macro(
        [sign * delta.difference for sign, delta in zip(signs, shares, strict=True)],
        [delta.stderr for delta in shares],
    )
    note = f"without {', '.join(left_out)}, which has another unit" if left_out else ""
    return Change(mean, low, high, n=sum(delta.n for delta in shares), note=note)


def _change(delta: Delta, oriented: bool = False) -> Change:
    """A delta's difference and interval; `oriented` turns it so that + is better."""
    low, high, difference = delta.ci_low, delta.ci_high, delta.difference
    if oriented and not delta.higher_is_better:
        low, high, difference = -high, -low, -difference
    return Change(difference, low, high, n=delta.n, is_share=_is_share(delta))


def _over_seeds(changes: Sequence[Change], reasons: Iterable[str]) -> Change:
    """Average the seeds' changes; the reasons of the seeds without one become the note."""
    missing = _joined(reasons)
    if not changes:
        return Change(note=missing)
    notes = [changes[0].note] if changes[0].note else []
    if missing:
        notes.append(f"{len(changes)} seed(s) only, because {missing}")
    return Change(
        difference=statistics.fmean(change.difference for change in changes),
        ci_low=statistics.fmean(change.ci_low for change in changes),
        ci_high=statistics.fmean(change.ci_high for change in changes),
        spread=_spread([change.difference for change in changes]),
        seeds=len(changes),
        n=changes[0].n,
        is_share=changes[0].is_share,
        note="; ".join(notes),
    )


def _judged(change: Change, margin: float, role: str, higher_is_better: bool = True) -> Change:
    judged = verdict(change.ci_low, change.ci_high, margin, role, higher_is_better)
    if judged == "inconclusive" and change.ci_low == change.ci_high == 0:
        judged = "unchanged"  # every document kept its value: nothing is left in doubt
    return dataclasses.replace(change, verdict=judged)


def _spread(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else math.nan


def _joined(reasons: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(reasons))


def _is_share(delta: Delta) -> bool:
    return is_share(delta.metric, delta.baseline, delta.candidate)


def is_share(metric: str, *values: float) -> bool:
    """Whether a metric lives in [0, 1], as accuracy does, and is to be read in percent."""
    name = metric.lower()
    return all(0 <= value <= 1 for value in values if not math.isnan(value)) and not any(
        word in name for word in _UNBOUNDED
    )


@dataclass(frozen=True)
class MeanScore:
    """A variant's main score on a task, averaged over seeds; `note` says why there is none.

    `stderr` is the mean of the seeds' standard errors, for the reason given at `Change`.
    """

    variant: Variant
    task: str
    metric: str = ""
    value: float = math.nan
    stderr: float = math.nan
    spread: float = math.nan
    n: int = 0
    is_share: bool = True
    note: str = ""

    @property
    def is_missing(self) -> bool:
        """Whether there is no number."""
        return math.isnan(self.value)


@dataclass(frozen=True)
class Arm:
    """A configuration: its runs, one a seed, and what they show."""

    name: str
    runs: list[Run]
    margin: float
    superseded: int  # older runs with a seed that is here already, not counted
    stages: list[Contrast]  # base → each later policy; the last one is what the arm is judged by
    quantized: list[Contrast]  # the last policy → its quantized forms

    @property
    def first(self) -> Run:
        """The run of the lowest seed, which stands for the arm where numbers cannot be averaged."""
        return self.runs[0]

    @property
    def base(self) -> Variant:
        """What training started from."""
        return Variant(self.first.policies[0])

    @property
    def final(self) -> Variant:
        """The last policy, unquantized."""
        return Variant(self.first.policies[-1])

    @property
    def variants(self) -> list[Variant]:
        """Every policy in order, then the quantized forms of the last."""
        policies = [Variant(policy) for policy in self.first.policies]
        return policies + [contrast.after for contrast in self.quantized]

    def average(self, role: str) -> Change:
        """The last policy against the base."""
        if not self.stages:
            return Change(note="nothing was trained")
        return self.stages[-1].average(role)

    def cost(self, quantizer: str) -> Change:
        """The quantized last policy against the unquantized, on the gain suites."""
        for one in self.quantized:
            if one.after.quantizer == quantizer:
                return one.average("gain")
        return Change(note="not measured")

    def verdicts(self) -> dict[str, int]:
        """How many retention tasks have each verdict."""
        rows = self.stages[-1].rows("retention", main_only=True) if self.stages else []
        judged = [row.change.verdict for row in rows if row.change.verdict]
        return {name: judged.count(name) for name in ("retained", "forgotten", "inconclusive")}

    def tasks(self, role: str) -> list[tuple[str, str]]:
        """The (suite, task) pairs of a role that have a score in any variant."""
        found = (
            (suite, score.task)
            for (_, suite), result in self.first.results.items()
            if isinstance(result, EvalResult) and result.role == role
            for score in result.scores
            if score.is_main
        )
        return list(dict.fromkeys(found))

    def score(self, variant: Variant, suite: str, task: str) -> MeanScore:
        """The main score of a task, averaged over seeds."""
        found, reasons = [], []
        for run in self.runs:
            try:
                found.append(_main_score(run.result(variant, suite), task))
            except UserError as error:
                reasons.append(str(error))
        if not found:
            return MeanScore(variant, task, note=_joined(reasons))
        values = [score.value for score in found]
        return MeanScore(
            variant,
            task,
            metric=found[0].metric,
            value=statistics.fmean(values),
            stderr=statistics.fmean(score.stderr for score in found),
            # Seeds are seeds of training, and the base was not trained.
            spread=math.nan if variant == self.base else _spread(values),
            n=found[0].n,
            is_share=is_share(found[0].metric, *values),
            note=f"{len(found)} seed(s) only, because {_joined(reasons)}" if reasons else "",
        )

    def final_score(self) -> MeanScore:
        """The last policy's score on the gain task; its mean where there are several tasks."""
        tasks = self.tasks("gain")
        scores = [self.score(self.final, suite, task) for suite, task in tasks]
        if len(scores) == 1:
            return scores[0]
        if not scores:
            return MeanScore(self.final, "", note="no gain suite was measured")
        name = f"mean of {len(scores)} tasks"
        if missing := [score.note for score in scores if score.is_missing]:
            return MeanScore(self.final, name, note=_joined(missing))
        if not all(score.is_share for score in scores):
            return MeanScore(self.final, name, note="the tasks have no common unit to average")
        return MeanScore(
            self.final,
            name,
            value=statistics.fmean(score.value for score in scores),
            stderr=math.sqrt(sum(score.stderr**2 for score in scores)) / len(scores),
            n=sum(score.n for score in scores),
        )

    def problems(self) -> list[str]:
        """Suites of which nothing could be read; they appear in no table, so they must be named."""
        return [
            f"{suite}: {_joined(r for r in results if isinstance(r, str))}"
            for suite in self.first.suites
            if self.first.role(suite) is None
            for results in [[r for (_, name), r in self.first.results.items() if name == suite]]
        ]


def _main_score(result: EvalResult | str, task: str) -> Score:
    if isinstance(result, str):
        raise UserError(result)
    for score in result.scores:
        if score.task == task and score.is_main:
            if math.isnan(score.value):
                raise UserError(f"{task} has no value")
            return score
    raise UserError(f"{task} was not measured")


class Ranked(NamedTuple):
    """An arm and the ranks that it may have, such as "1–2"; "–" when it has no gain."""

    rank: str
    arm: Arm


@dataclass(frozen=True)
class Board:
    """Arms whose gain was measured on the same test, best first.

    Gains on different tests cannot be ranked against each other.
    """

    test: str
    entries: list[Ranked]

    @property
    def quantizers(self) -> list[str]:
        """Every quantizer that an arm was measured with."""
        contrasts = (one for entry in self.entries for one in entry.arm.quantized)
        return list(dict.fromkeys(one.after.quantizer for one in contrasts))


def boards(runs: Sequence[Run], margin: float | None = None) -> list[Board]:
    """Group runs into arms and rank them.

    Args:
        runs: as loaded.
        margin: replaces the non-inferiority margin that each run recorded.
    """
    by_test: dict[tuple[Any, ...], list[Arm]] = {}
    for (experiment, _, test), group in _grouped(
        runs, lambda r: (r.experiment, r.arm, r.test())
    ).items():
        siblings = {run.arm for run in runs if run.experiment == experiment}
        by_test.setdefault(test, []).append(_arm(group, len(siblings) > 1, margin))
    ordered = sorted(by_test.items(), key=lambda item: (-len(item[1]), item[0]))
    return [Board(_test_name(arms), ranked(arms)) for _, arms in ordered]


def _grouped(
    runs: Iterable[Run], key: Callable[[Run], tuple[Any, ...]]
) -> dict[tuple[Any, ...], list[Run]]:
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def _arm(runs: Sequence[Run], has_siblings: bool, margin: float | None) -> Arm:
    newest: dict[int, Run] = {}
    for run in sorted(runs, key=lambda run: run.started):
        newest[run.seed] = run
    kept = [newest[seed] for seed in sorted(newest)]
    first = kept[0]
    limit = first.margin if margin is None else margin
    base, *later = [Variant(policy) for policy in first.policies]
    quantizers = dict.fromkeys(
        v.quantizer for run in kept for v, _ in run.results if v.quantizer != UNQUANTIZED
    )
    final = later[-1] if later else base
    label = first.label or (first.arm if has_siblings else "")
    return Arm(
        name=f"{first.experiment} · {label}" if label else first.experiment,
        runs=kept,
        margin=limit,
        superseded=len(runs) - len(kept),
        stages=[contrast(kept, base, policy, limit) for policy in later],
        quantized=[
            contrast(kept, final, Variant(final.policy, name), limit) for name in quantizers
        ],
    )


def _test_name(arms: Sequence[Arm]) -> str:
    return ", ".join(task for _, task in arms[0].tasks("gain")) or "no gain suite"


def ranked(arms: Sequence[Arm]) -> list[Ranked]:
    """Arms by gain, each with every rank that its interval allows.

    An arm is surely behind another when its whole interval lies below the other's. Overlapping
    intervals leave the order open, so such arms share a range of ranks.
    """
    gains = {id(arm): arm.average("gain") for arm in arms}
    known = [arm for arm in arms if not gains[id(arm)].is_missing]
    known.sort(key=lambda arm: (-gains[id(arm)].difference, arm.name))
    unknown = sorted((arm for arm in arms if gains[id(arm)].is_missing), key=lambda arm: arm.name)
    ranges = rank_ranges([(gains[id(arm)].ci_low, gains[id(arm)].ci_high) for arm in known])
    return [
        *(
            Ranked(f"{low}–{high}" if low < high else str(low), a)
            for (low, high), a in zip(ranges, known, strict=True)
        ),
        *(Ranked("–", arm) for arm in unknown),
    ]


def rank_ranges(intervals: Sequence[tuple[float, float]]) -> list[tuple[int, int]]:
    """The best and the worst rank that each interval allows; 1 is the highest."""
    return [
        (
            1 + sum(other_low > high for other_low, _ in intervals),
            len(intervals) - sum(other_high < low for _, other_high in intervals),
        )
        for low, high in intervals
    ]


def leaderboard_rows(runs: Path, margin: float | None = None) -> list[dict[str, Any]]:
    """The leaderboard as flat records with equal keys, in the metrics' own units.

    A missing number is None, and the key that ends in `_note` says why.

    Args:
        runs: folder that is searched for run records.
        margin: replaces the recorded non-inferiority margin.

    Raises:
        UserError: when the folder or a record in it cannot be read.
    """
    return rows_of(boards(load_runs(runs), margin))


def rows_of(found: Sequence[Board]) -> list[dict[str, Any]]:
    """The flat records of boards that are already computed."""
    quantizers = list(dict.fromkeys(name for board in found for name in board.quantizers))
    entries = ((board.test, rank, arm) for board in found for rank, arm in board.entries)
    return [_flat_row(test, rank, arm, quantizers) for test, rank, arm in entries]


def _flat_row(test: str, rank: str, arm: Arm, quantizers: Sequence[str]) -> dict[str, Any]:
    score = arm.final_score()
    row = {
        "test": test,
        "rank": rank,
        "name": arm.name,
        "experiment": arm.first.experiment,
        "arm": arm.first.arm,
        "seeds": len(arm.runs),
        "policy": arm.final.policy,
        "score": score.value,
        "score_stderr": score.stderr,
        "score_n": score.n,
        "score_note": score.note,
        **_flat("gain", arm.average("gain")),
        **_flat("retention", arm.average("retention")),
        **{f"retention_{name}": count for name, count in arm.verdicts().items()},
        **{
            key: value
            for name in quantizers
            for key, value in _flat(f"{name}_cost", arm.cost(name)).items()
        },
    }
    return {
        key: None if isinstance(value, float) and math.isnan(value) else value
        for key, value in row.items()
    }


def _flat(prefix: str, change: Change) -> dict[str, Any]:
    return {
        prefix: change.difference,
        f"{prefix}_ci_low": change.ci_low,
        f"{prefix}_ci_high": change.ci_high,
        f"{prefix}_seed_sd": change.spread,
        f"{prefix}_n": change.n,
        f"{prefix}_verdict": change.verdict,
        f"{prefix}_note": change.note,
    }
