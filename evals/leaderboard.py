"""From run records to ranked arms: what each one gained, lost, and costs when quantized. No torch.

An arm is a configuration without its seed; the runs of an arm differ in the seed only.
"""

import functools
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from conf.entry import UserError
from evals.contrast import Change, Contrast, contrast, is_share, joined, spread_of, with_one_unit
from evals.ranking import paired_ranks
from evals.rated import Rating, held_out, rating
from evals.results import UNQUANTIZED, EvalResult, Score
from evals.runs import Run, Variant, load_runs


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
    higher_is_better: bool = True
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
    def is_reward_model(self) -> bool:
        """Whether all that was trained are reward models: there is no policy to measure."""
        return bool(self.first.stages) and not self.stages

    @functools.cached_property
    def rating(self) -> Rating | None:
        """What its reward model is worth on held-out pairs."""
        return rating(self.runs)

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
            return Change(note="no policy was trained")
        return self.stages[-1].average(role)

    def cost(self, quantizer: str) -> Change:
        """The quantized last policy against the unquantized, on the gain suites, or else on the retention suites."""
        for one in self.quantized:
            if one.after.quantizer == quantizer:
                return one.average("gain" if "gain" in one.roles.values() else "retention")
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
            return MeanScore(variant, task, note=joined(reasons))
        values = [score.value for score in found]
        return MeanScore(
            variant,
            task,
            metric=found[0].metric,
            value=statistics.fmean(values),
            stderr=statistics.fmean(score.stderr for score in found),
            # Seeds are seeds of training, and the base was not trained.
            spread=math.nan if variant == self.base else spread_of(values),
            n=found[0].n,
            is_share=is_share(found[0].metric, *values),
            higher_is_better=found[0].higher_is_better,
            note=f"{len(found)} seed(s) only, because {joined(reasons)}" if reasons else "",
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
            return MeanScore(self.final, name, note=joined(missing))
        if not all(with_one_unit([(score.metric, score.is_share) for score in scores])):
            return MeanScore(self.final, name, note="the tasks have no common unit to average")
        return MeanScore(
            self.final,
            name,
            value=statistics.fmean(score.value for score in scores),
            stderr=math.sqrt(sum(score.stderr**2 for score in scores)) / len(scores),
            n=sum(score.n for score in scores),
            is_share=all(score.is_share for score in scores),
        )

    def problems(self) -> list[str]:
        """Suites of which nothing could be read; they appear in no table, so they must be named."""
        return [
            f"{suite}: {joined(r for r in results if isinstance(r, str))}"
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
    """An arm and the ranks that it may have, such as "1–2"; "–" when it has nothing to be ranked by."""

    rank: str
    arm: Arm


@dataclass(frozen=True)
class Board:
    """Arms whose gain was measured on the same test, best first; without one, reward models on the same pairs.

    Gains on different tests cannot be ranked against each other.
    """

    test: str
    entries: list[Ranked]
    note: str = ""  # why the ranks are not from paired comparisons

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
    by_test: dict[tuple[str, ...], list[Arm]] = {}
    for (experiment, _, test), group in _grouped(
        runs, lambda r: (r.experiment, r.arm, r.test())
    ).items():
        siblings = [run for run in runs if run.experiment == experiment]
        arm = _arm(group, _distinction(group[0], siblings), margin)
        # Without a gain suite, reward models are judged by the pairs that they were measured on. What a test is called
        # is left out: two experiments may name one suite differently.
        contents = {content for _, content in test or held_out(arm.runs)}
        by_test.setdefault(tuple(sorted(contents)), []).append(arm)
    named = [(-len(arms), _test_name(arms), test) for test, arms in by_test.items()]
    names = [name for _, name, _ in named]
    return [
        # One task under two settings is two tests, which only the settings' hash tells apart.
        Board(
            name if names.count(name) == 1 else f"{name} (settings {', '.join(test)})",
            *_ranked(by_test[test]),
        )
        for _, name, test in sorted(named)
    ]


def _grouped(
    runs: Iterable[Run], key: Callable[[Run], tuple[Any, ...]]
) -> dict[tuple[Any, ...], list[Run]]:
    groups: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def _distinction(run: Run, siblings: Sequence[Run]) -> str:
    """What tells a run's arm from the others of its experiment: its label without what all share."""
    oldest_first = sorted(siblings, key=lambda sibling: sibling.started)
    labels = {sibling.arm: sibling.label.split(", ") for sibling in oldest_first}
    if len(labels) == 1:
        return ""
    shared = set.intersection(*map(set, labels.values()))
    own = [part for part in labels[run.arm] if part and part not in shared]
    return ", ".join(own) or f"as configured ({run.arm})"


def _arm(runs: Sequence[Run], distinction: str, margin: float | None) -> Arm:
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
    return Arm(
        name=f"{first.experiment} · {distinction}" if distinction else first.experiment,
        runs=kept,
        margin=limit,
        superseded=len(runs) - len(kept),
        stages=[contrast(kept, base, policy, limit) for policy in later],
        quantized=[
            contrast(kept, final, Variant(final.policy, name), limit) for name in quantizers
        ],
    )


def _test_name(arms: Sequence[Arm]) -> str:
    if tasks := arms[0].tasks("gain"):
        return ", ".join(task for _, task in tasks)
    sources = [source for source, _ in held_out(arms[0].runs)]
    return f"held-out pairs of {', '.join(sources)}" if sources else "no gain suite"


def _ranked(arms: Sequence[Arm]) -> tuple[list[Ranked], str]:
    """Arms whose gain is known, best final policy first, each with every rank that it may have; and `Board.note`.

    Final policies are compared on the same documents; see `evals.ranking.paired_ranks`. Where that cannot be done, arms
    are ordered by gain, and one is behind another when its whole interval lies below the other's. Without a gain suite
    it is the accuracy of their reward models.
    """
    if not any(arm.tasks("gain") for arm in arms) and any(arm.rating for arm in arms):
        return _ranked_by_accuracy(arms)
    gains = sorted(((arm.average("gain"), arm) for arm in arms), key=lambda pair: pair[1].name)
    known = [pair for pair in gains if not pair[0].is_missing]
    found, note = [], ""
    try:
        found = paired_ranks([arm for _, arm in known]) if known else []
    except UserError as error:
        note = f"ranks are by overlap of intervals: {error}"
        ranges = rank_ranges([(gain.ci_low, gain.ci_high) for gain, _ in known])
        found = [(gain.difference, span) for (gain, _), span in zip(known, ranges, strict=True)]
    order = sorted(range(len(known)), key=lambda number: -found[number][0])
    entries = [
        *(Ranked(_rank(*found[number][1]), known[number][1]) for number in order),
        *(Ranked("–", arm) for gain, arm in gains if gain.is_missing),
    ]
    return entries, note


def _ranked_by_accuracy(arms: Sequence[Arm]) -> tuple[list[Ranked], str]:
    named = sorted(arms, key=lambda arm: arm.name)
    known = [(one.figures, arm) for arm in named if (one := arm.rating) and not one.is_missing]
    ranges = rank_ranges([(figures["ci_low"], figures["ci_high"]) for figures, _ in known])
    ordered = sorted(zip(known, ranges, strict=True), key=lambda one: -one[0][0]["accuracy"])
    entries = [Ranked(_rank(*span), arm) for (_, arm), span in ordered]
    entries += [Ranked("–", arm) for arm in named if not arm.rating or arm.rating.is_missing]
    return entries, ("ranks are by overlap of the accuracies' intervals" if len(known) > 1 else "")


def _rank(best: int, worst: int) -> str:
    return f"{best}–{worst}" if best < worst else str(best)


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
