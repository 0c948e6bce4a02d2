"""Two variants of a model compared on every suite, over all seeds of an arm. No torch.

Two errors are kept apart throughout. The *sampling* error says how far a number could move with
other documents; the *spread* is the standard deviation between seeds, and says how far it moves
with another training run.
"""

import dataclasses
import functools
import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np

from conf.entry import UserError
from evals import stats
from evals.deltas import Delta, delta_of, in_family, judged, margin_of, pair_all, verdict
from evals.pairing import Pairing, common
from evals.results import EvalResult
from evals.runs import Run, Variant

# Metrics that are no share, yet whose value may happen to lie between 0 and 1.
_NO_SHARE = re.compile(
    r"bits|bleu|chrf|^kl(_|$)|length|loglikelihood|logprob|loss|nll|perplexity|reward|^ter$|_mb$|_per_s$"
)

# (task, metric) → whether it is a share; one that is not in it is judged by its own values.
Units = Mapping[tuple[str, str], bool]


@dataclass(frozen=True)
class Change:
    """A paired difference with its 95 % interval, averaged over seeds, or why there is none.

    The interval and `stderr` are the sampling error alone, given these very seeds: a document's
    answers under all seeds are averaged first, because all seeds answer the same documents.
    `spread` is what was observed between seeds; `seed_sd` the part of it that is due to training,
    without the noise of finitely many documents; `total_error` the standard deviation of what one
    more training run shows on other documents. These three are NaN with one seed; see
    `evals.stats.SeedEffects`.
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
    stderr: float = math.nan
    seed_sd: float = math.nan
    total_error: float = math.nan
    gap: tuple[float, float] = (0.0, 0.0)  # how much further out the ends may be: missing documents

    @property
    def worst(self) -> tuple[float, float]:
        """The ends of the interval if what is missing was all lost, and if it was all won."""
        return self.ci_low - self.gap[0], self.ci_high + self.gap[1]

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
    p: float = math.nan  # of the mean over seeds
    p_adjusted: float = math.nan  # Holm's within the run's family; NaN outside it
    mde: float = math.nan  # smallest true difference that would be found with 80 % power
    clusters: int | None = None  # None when every document stands alone
    bootstrap_low: float = math.nan
    bootstrap_high: float = math.nan
    missing: int = 0  # documents without a value on a side, left out


@dataclass(frozen=True)
class Contrast:
    """Two variants compared on every suite.

    `found` has one entry per seed: for each suite its deltas, or why there are none. `pairings` has
    the documents behind the deltas, in the same order.
    """

    before: Variant
    after: Variant
    margin: float
    roles: dict[str, str]
    found: list[dict[str, list[Delta] | str]]
    pairings: list[dict[str, list[Pairing]]] = field(default_factory=list, repr=False)
    family: Sequence[str] = ()
    margins: Mapping[str, float] = field(default_factory=dict)

    @property
    def is_quantization(self) -> bool:
        """Whether the two are one policy in two number formats."""
        return self.before.policy == self.after.policy

    def rows(self, role: str | None = None, main_only: bool = False) -> list[Row]:
        """The rows of the suites of a role, or of all suites."""
        return [
            row for row in self._rows if role in (None, row.role) and (row.is_main or not main_only)
        ]

    @functools.cached_property
    def _rows(self) -> list[Row]:
        """All rows; Holm's correction is over the declared family, or else over each suite's main metrics."""
        by_suite = [self._suite_rows(suite, role) for suite, role in self.roles.items()]
        if self.family:
            return self._adjusted([row for rows in by_suite for row in rows])
        return [row for rows in by_suite for row in self._adjusted(rows)]

    def _adjusted(self, rows: list[Row]) -> list[Row]:
        p_values = [row.p if in_family(row, self.family) else math.nan for row in rows]
        return [
            dataclasses.replace(row, p_adjusted=p)
            for row, p in zip(rows, stats.holm(p_values), strict=True)
        ]

    def average(self, role: str) -> Change:
        """The mean improvement (+ is better) over the main metrics of a role's suites.

        Tasks weigh the same.
        """
        if role not in self.roles.values():
            return Change(note=f"no {role} suite was measured")
        each = self.by_seed(role)
        reasons = [change.note for change in each if change.is_missing]
        seeds = [number for number, change in enumerate(each) if not change.is_missing]
        if not seeds:
            return Change(note=joined(reasons))
        mean = _with_reasons(self._mean_over([each[seed] for seed in seeds], seeds, role), reasons)
        if role != "gain" and not self.is_quantization:
            return mean  # one verdict over all retention tasks would hide a forgotten one
        averaged = self._averaged(role, seeds[0])
        margin = statistics.fmean(margin_of(one, self.margin, self.margins) for one in averaged)
        return self._judged(mean, margin, role)

    def _averaged(self, role: str, seed: int) -> list[Delta]:
        """The main deltas of a seed that are averaged."""
        found = self.found[seed]
        suites = [suite for suite, its_role in self.roles.items() if its_role == role]
        mains = [
            one
            for suite in suites
            for one in found[suite]
            if isinstance(one, Delta) and one.is_main
        ]
        return _of_one_unit(mains, self._units)

    @functools.cached_property
    def _units(self) -> Units:
        """A unit is that of all seeds: a score out of 100 may be below 1 under one."""
        units: dict[tuple[str, str], bool] = {}
        for deltas in (deltas for seed in self.found for deltas in seed.values()):
            for one in [] if isinstance(deltas, str) else deltas:
                key = one.task, one.metric
                units[key] = units.get(key, True) and _is_share(one, {})
        return units

    def _mean_over(self, each: list[Change], seeds: list[int], role: str) -> Change:
        """The seeds' averages as one, with the documents of all."""
        if len(each) == 1:
            return each[0]
        kept = {(one.task, one.metric) for one in self._averaged(role, seeds[0])}
        suites = [suite for suite, its_role in self.roles.items() if its_role == role]
        by_seed = [
            [
                one
                for suite in suites
                for one in self.pairings[seed][suite]
                if one.score.is_main and (one.score.task, one.score.metric) in kept
            ]
            for seed in seeds
        ]
        by_task = [list(task) for task in zip(*by_seed, strict=True)]
        change = _combined([delta_of(task) for task in by_task], each[0].note, self._units)
        return _with_seeds(change, by_task)

    def by_seed(self, role: str) -> list[Change]:
        """What `average` averages: one change a seed, in the order of the runs."""
        suites = [suite for suite, its_role in self.roles.items() if its_role == role]
        return [_seed_change(found, suites, self._units) for found in self.found]

    def _suite_rows(self, suite: str, role: str) -> list[Row]:
        reasons = [found for seed in self.found if isinstance(found := seed[suite], str)]
        measured = [found for seed in self.found if not isinstance(found := seed[suite], str)]
        if not measured:
            return [Row(suite, role, Change(note=joined(reasons)))]
        by_metric: dict[tuple[str, str], list[Pairing]] = {}
        for seed in self.pairings:
            for one in seed.get(suite, []):
                by_metric.setdefault((one.score.task, one.score.metric), []).append(one)
        alone = {(d.task, d.metric): d for d in measured[0]} if len(measured) == 1 else {}
        return [
            self._row(suite, role, alone.get(key) or delta_of(pairings), pairings, reasons)
            for key, pairings in by_metric.items()
        ]

    def _row(
        self, suite: str, role: str, delta: Delta, pairings: list[Pairing], reasons: list[str]
    ) -> Row:
        usable = [pairing for pairing in pairings if pairing.documents]
        change = Change(note=delta.note, is_share=_is_share(delta, self._units))
        if usable:
            gaps = [delta.note] if delta.note else []
            change = _with_seeds(_change(delta, self._units), [usable])
            change = _with_reasons(dataclasses.replace(change, note="; ".join(gaps)), reasons)
            margin = margin_of(delta, self.margin, self.margins)
            if not delta.is_divergence:
                change = self._judged(change, margin, role, delta.higher_is_better)
        shared = {item.name for item in dataclasses.fields(Row)} & vars(delta).keys()
        return Row(suite, role, change, **{name: getattr(delta, name) for name in shared})

    def _judged(
        self,
        change: Change,
        margin: float,
        role: str,
        higher_is_better: bool = True,
    ) -> Change:
        """With its verdict. A number format is not meant to improve anything, so it is judged by the
        margin on every suite: retained, worse or inconclusive.
        """
        ends = change.worst
        if self.is_quantization and role != "cost":
            found = verdict(*ends, margin, "retention", higher_is_better)
            found = "worse" if found == "forgotten" else found
        else:
            found = verdict(*ends, margin, role, higher_is_better)
        return dataclasses.replace(change, verdict=found)


def contrast(runs: Sequence[Run], before: Variant, after: Variant, margin: float) -> Contrast:
    """Compare two variants on every suite, within each seed."""
    roles = {suite: role for suite in runs[0].suites if (role := runs[0].role(suite))}
    found: list[dict[str, list[Delta] | str]] = []
    pairings: list[dict[str, list[Pairing]]] = []
    for run in runs:
        paired = {suite: _pairings(run, before, after, suite) for suite in roles}
        pairings.append(
            {suite: ones for suite, ones in paired.items() if not isinstance(ones, str)}
        )
        found.append(
            {
                suite: ones
                if isinstance(ones, str)
                else judged(
                    [delta_of([one]) for one in ones], roles[suite], margin, (), run.margins
                )
                for suite, ones in paired.items()
            }
        )
    first = runs[0]
    return Contrast(before, after, margin, roles, found, pairings, first.family, first.margins)


def _pairings(run: Run, before: Variant, after: Variant, suite: str) -> list[Pairing] | str:
    # The candidate comes first: a skipped quantizer is the better reason than an unmeasured base.
    candidate, baseline = run.result(after, suite), run.result(before, suite)
    for result in (candidate, baseline):
        if isinstance(result, str):
            return result
    assert isinstance(baseline, EvalResult)
    assert isinstance(candidate, EvalResult)
    try:
        return pair_all(baseline, candidate)
    except UserError as error:
        return str(error)


def _seed_change(
    found: dict[str, list[Delta] | str], suites: Sequence[str], units: Units
) -> Change:
    measured = []
    for suite in suites:
        deltas = found[suite]
        if isinstance(deltas, str):
            return Change(note=deltas)
        measured.append(deltas)
    try:
        return dataclasses.replace(improvement(measured, units), seeds=1)
    except UserError as error:
        return Change(note=str(error))


def improvement(suites: Sequence[list[Delta]], units: Units = MappingProxyType({})) -> Change:
    """One seed's average over the main metrics; see `Contrast.average`.

    Raises:
        UserError: when a main metric has no difference, or no two of them share a unit.
    """
    mains = [delta for deltas in suites for delta in deltas if delta.is_main]
    if unpaired := [delta for delta in mains if math.isnan(delta.difference)]:
        raise UserError("; ".join(f"{delta.task} {delta.note}" for delta in unpaired))
    if not mains:
        raise UserError("no task has a main metric")
    kept = _of_one_unit(mains, units)
    if not kept:
        raise UserError("the main metrics have no common unit to average")
    left_out = [delta.task for delta in mains if delta not in kept]
    note = f"without {', '.join(left_out)}, which has another unit" if left_out else ""
    return _combined(kept, note, units)


def _of_one_unit(mains: Sequence[Delta], units: Units) -> list[Delta]:
    """Those that can be averaged."""
    kinds = [(delta.metric, _is_share(delta, units)) for delta in mains]
    return [one for one, is_kept in zip(mains, with_one_unit(kinds), strict=True) if is_kept]


def with_one_unit(kinds: Sequence[tuple[str, bool]]) -> list[bool]:
    """Which of some (metric, whether it is a share) are averaged: all of one metric, else the shares."""
    if len({metric for metric, _ in kinds}) == 1:
        return [True] * len(kinds)
    return [is_a_share for _, is_a_share in kinds]


def _combined(deltas: Sequence[Delta], note: str, units: Units) -> Change:
    """The mean of tasks, turned so that + is better."""
    each = [_change(delta, units, oriented=True) for delta in deltas]
    gaps = [f"{delta.task}: {delta.note}" for delta in deltas if delta.note]
    note = "; ".join(
        dict.fromkeys([*filter(None, [note]), *(gap for gap in gaps if gap not in note)])
    )
    if len(each) == 1:
        return dataclasses.replace(each[0], note=note)
    mean, low, high = stats.macro([(one.difference, one.ci_low, one.ci_high) for one in each])
    error = math.hypot(*(one.stderr for one in each)) / len(each)
    down, up = (statistics.fmean(one.gap[end] for one in each) for end in (0, 1))
    n, is_a_share = sum(one.n for one in each), all(one.is_share for one in each)
    return Change(
        mean, low, high, n=n, is_share=is_a_share, note=note, stderr=error, gap=(down, up)
    )


def _change(delta: Delta, units: Units, oriented: bool = False) -> Change:
    """A delta's difference and interval; `oriented` turns it so that + is better."""
    low, high, difference = delta.ci_low, delta.ci_high, delta.difference
    gap = low - delta.worst[0], delta.worst[1] - high
    if oriented and not delta.higher_is_better:
        low, high, difference, gap = -high, -low, -difference, (gap[1], gap[0])
    return Change(
        difference,
        low,
        high,
        seeds=1,
        n=delta.n,
        is_share=_is_share(delta, units),
        stderr=delta.stderr,
        gap=gap,
    )


def _with_seeds(change: Change, by_task: Sequence[Sequence[Pairing]]) -> Change:
    """Adds what the seeds show beside the sampling error; `by_task` has each task's pairings, one a seed."""
    seeds = len(by_task[0])
    tables, clusters = [], []
    for pairings in by_task:
        documents = common(pairings)
        if seeds == 1 or not documents:
            return dataclasses.replace(change, seeds=seeds)
        sign = 1 if pairings[0].score.higher_is_better else -1
        tables.append(np.stack([sign * one.at(documents)[0] for one in pairings]))
        clusters.append(pairings[0].at(documents)[1])
    effects = stats.seed_effects(tables, clusters)
    return dataclasses.replace(
        change,
        seeds=seeds,
        spread=effects.observed_sd,
        seed_sd=effects.training_sd,
        total_error=effects.total_error,
    )


def _with_reasons(change: Change, reasons: Sequence[str]) -> Change:
    """Adds why some seeds have no number."""
    if not reasons:
        return change
    notes = [change.note] if change.note else []
    notes.append(f"{change.seeds} seed(s) only, because {joined(reasons)}")
    return dataclasses.replace(change, note="; ".join(notes))


def spread_of(values: Sequence[float]) -> float:
    """Standard deviation between seeds; NaN with one seed."""
    return statistics.stdev(values) if len(values) > 1 else math.nan


def joined(reasons: Iterable[str]) -> str:
    """Each distinct reason once."""
    return "; ".join(dict.fromkeys(reasons))


def _is_share(delta: Delta, units: Units) -> bool:
    own = is_share(delta.metric, delta.baseline, delta.candidate)
    return units.get((delta.task, delta.metric), own)


def is_share(metric: str, *values: float) -> bool:
    """Whether a metric lives in [0, 1], as accuracy does, and is to be read in percent."""
    known = [value for value in values if not math.isnan(value)]
    return all(0 <= value <= 1 for value in known) and not _NO_SHARE.search(metric.lower())
