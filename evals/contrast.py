"""Two variants of a model compared on every suite, over all seeds of an arm. No torch.

Two errors are kept apart throughout. The *sampling* error says how far a number could move with
other documents; the *spread* is the standard deviation between seeds, and says how far it moves
with another training run.
"""

import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from conf.entry import UserError
from evals import stats
from evals.results import Delta, EvalResult, compare, verdict
from evals.runs import Run, Variant

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
            return mean  # one verdict over all retention tasks would hide a forgotten one
        return _judged(mean, self.margin, role)

    def by_seed(self, role: str) -> list[Change]:
        """What `average` averages: one change a seed, in the order of the runs."""
        suites = [suite for suite, its_role in self.roles.items() if its_role == role]
        return [_seed_change(found, suites) for found in self.found]

    def _suite_rows(self, suite: str, role: str) -> list[Row]:
        reasons = [found for seed in self.found if isinstance(found := seed[suite], str)]
        measured = [found for seed in self.found if not isinstance(found := seed[suite], str)]
        if not measured:
            return [Row(suite, role, Change(note=joined(reasons)))]
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
            change=mean
            if first.is_divergence
            else _judged(mean, self.margin, role, first.higher_is_better),
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
        deltas = compare(baseline, candidate, margin, run.family, run.margins)
    except UserError as error:
        return str(error)
    except (OSError, ValueError, KeyError) as error:
        return f"the samples of {before} and {after} cannot be paired: {_without_folder(error)}"
    return deltas


def _without_folder(error: Exception) -> str:
    """An error's message without the place of the records, on which the page must not depend."""
    if isinstance(error, OSError):
        return f"{error.strerror}: {Path(str(error.filename)).name}"
    return str(error)


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
    missing = joined(reasons)
    if not changes:
        return Change(note=missing)
    notes = [changes[0].note] if changes[0].note else []
    if missing:
        notes.append(f"{len(changes)} seed(s) only, because {missing}")
    return Change(
        difference=statistics.fmean(change.difference for change in changes),
        ci_low=statistics.fmean(change.ci_low for change in changes),
        ci_high=statistics.fmean(change.ci_high for change in changes),
        spread=spread_of([change.difference for change in changes]),
        seeds=len(changes),
        n=changes[0].n,
        is_share=changes[0].is_share,
        note="; ".join(notes),
    )


def _judged(change: Change, margin: float, role: str, higher_is_better: bool = True) -> Change:
    judged = verdict(change.ci_low, change.ci_high, margin, role, higher_is_better)
    if judged == "inconclusive" and change.ci_low == change.ci_high == 0:
        judged = "unchanged"  # the same output on every document: nothing is left in doubt
    return dataclasses.replace(change, verdict=judged)


def spread_of(values: Sequence[float]) -> float:
    """Standard deviation between seeds; NaN with one seed."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def joined(reasons: Iterable[str]) -> str:
    """Each distinct reason once."""
    return "; ".join(dict.fromkeys(reasons))


def _is_share(delta: Delta) -> bool:
    return is_share(delta.metric, delta.baseline, delta.candidate)


def is_share(metric: str, *values: float) -> bool:
    """Whether a metric lives in [0, 1], as accuracy does, and is to be read in percent."""
    name = metric.lower()
    return all(0 <= value <= 1 for value in values if not math.isnan(value)) and not any(
        word in name for word in _UNBOUNDED
    )
