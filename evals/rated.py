"""The main figures of a report on a reward model, as a run records them, and as text. No torch."""

import math
import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from conf.entry import UserError
from evals.runs import Run
from reward.pages.markup import MISSING, slug
from reward.store import content_key, read_json

FOLDER = "rewards"  # in a run's folder and in the site
REPORT, PAGE, PAIRS = "report.json", "report.html", "pairs.jsonl"

# Name in a run's record → where it is in the report.
_FIGURES = {
    "accuracy": ("accuracy", "value"),
    "ci_low": ("accuracy", "ci_low"),
    "ci_high": ("accuracy", "ci_high"),
    "n": ("accuracy", "n"),
    "longest_wins": ("length_baseline", "value"),
    "over_length": ("over_length", "difference"),
    "over_length_ci_low": ("over_length", "ci_low"),
    "over_length_ci_high": ("over_length", "ci_high"),
    "ece": ("ece", "value"),
    "brier": ("brier", "value"),
}


def main_figures(folder: Path) -> dict[str, float]:
    """What a run records of the report in `folder`; NaN where the report has null.

    Raises:
        UserError: when it is no such report.
    """
    path = folder / REPORT
    try:
        report = read_json(path)
        return {name: _number(report[part][key]) for name, (part, key) in _FIGURES.items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is not a report on a reward model: {error}") from error


class Rated(NamedTuple):
    """A reward model that a run trained and measured: its stage, and `main_figures`."""

    run: Run
    stage: str
    figures: dict[str, float]

    @property
    def report(self) -> Path:
        """The page that the run kept; it may be lost."""
        return self.run.folder / FOLDER / self.stage / PAGE

    @property
    def page(self) -> str:
        """Where it is in the site, from its root, under a name of its own; empty when the run lost it."""
        if not self.report.is_file():
            return ""
        run = self.run
        name = f"{run.experiment}-{run.arm}-seed{run.seed}-{self.stage}"
        short = slug(name)
        # What was cut or changed may be the name of another, and an arm may be on two boards.
        if short.casefold() != name or run.test():
            short += f"-{content_key([name, run.test()])}"
        return f"{FOLDER}/{short}.html"


def rated(runs: Iterable[Run]) -> list[Rated]:
    """The reward models of some runs."""
    return [
        Rated(run, stage, {name: _number(figures.get(name)) for name in _FIGURES})
        for run in runs
        for stage, figures in run.rewards.items()
    ]


class Rating(NamedTuple):
    """An arm's reward model: `main_figures` as means over the seeds, of an interval its ends.

    All seeds score the same pairs, so their mean is about as uncertain as each of them, and no less.
    """

    figures: dict[str, float]
    spreads: dict[str, float]  # standard deviations between seeds; NaN with one seed
    seeds: list[Rated]

    @property
    def page(self) -> str:
        """The report of the first seed."""
        return self.seeds[0].page

    @property
    def is_missing(self) -> bool:
        """Whether there is no accuracy."""
        return math.isnan(self.figures["accuracy"])


def rating(runs: Iterable[Run]) -> Rating | None:
    """The last reward model of the runs of one arm; None when none was measured."""
    found = rated(runs)
    seeds = [one for one in found if one.stage == found[-1].stage]
    if not seeds:
        return None
    columns = {name: [one.figures[name] for one in seeds] for name in _FIGURES}
    return Rating(
        {name: statistics.fmean(values) for name, values in columns.items()},
        {name: _spread(values) for name, values in columns.items()},
        seeds,
    )


def _spread(values: list[float]) -> float:
    is_known = len(values) > 1 and all(map(math.isfinite, values))
    return statistics.stdev(values) if is_known else math.nan


def held_out(runs: Iterable[Run]) -> tuple[tuple[str, str], ...]:
    """Name and fingerprint of the pairs that reward models were measured on; empty where none was."""
    found = [_pairs_of(one) for one in rated(runs)]
    return tuple(sorted(set(filter(None, found)) or {("unknown source", "") for _ in found}))


def _pairs_of(one: Rated) -> tuple[str, str] | None:
    try:
        data = read_json(one.report.with_name(REPORT))["inputs"]["data"]
        return Path(data["source"]).name, str(data["fingerprint"])
    except (OSError, ValueError, KeyError, TypeError):
        return None  # the run lost its report


def rated_text(figures: dict[str, float]) -> str:
    """`accuracy 0.68 [0.62, 0.74], longest-wins 0.55, ECE 0.06, n=271`; a figure that is missing is a dash."""
    text = {name: MISSING if math.isnan(x) else f"{x:.2f}" for name, x in figures.items()}
    n = MISSING if math.isnan(figures["n"]) else f"{figures['n']:.0f}"
    return (
        f"accuracy {text['accuracy']} [{text['ci_low']}, {text['ci_high']}], longest-wins {text['longest_wins']}, "
        f"ECE {text['ece']}, n={n}"
    )


def _number(value: Any) -> float:
    return math.nan if value is None else float(value)
