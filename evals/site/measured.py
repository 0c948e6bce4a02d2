"""What suites of text and of footprint say of an arm, and what each quantizer costs it. No torch."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from statistics import fmean
from typing import NamedTuple

from evals.contrast import Change, Contrast, Row, joined
from evals.leaderboard import Arm
from evals.results import EvalResult
from evals.runs import Variant

# A task is one of held-out text when it has this metric.
LOSS = "loss"
_DIVERGENCES = ("kl", "kl_p95", "kl_p99", "kl_max", "top1_agreement")


class Text(NamedTuple):
    """A set of held-out text: the change of its loss in nats a token, and the divergence from the first model."""

    suite: str
    task: str
    loss: Change
    divergence: dict[str, float]  # metric → value, of those that were measured


def texts(contrast: Contrast) -> list[Text]:
    """The sets of held-out text in a contrast."""
    rows = contrast.rows("retention") + contrast.rows("gain")
    return [
        Text(row.suite, row.task, row.change, _divergence(rows, row))
        for row in rows
        if row.metric == LOSS
    ]


def _divergence(rows: list[Row], of: Row) -> dict[str, float]:
    return {
        row.metric: row.candidate
        for row in rows
        if (row.suite, row.task) == (of.suite, of.task)
        and row.metric in _DIVERGENCES
        and not math.isnan(row.candidate)
    }


@dataclass(frozen=True)
class Form:
    """The last policy in one number format: what it costs against the unquantized weights, and what it takes to run.

    A number that was not measured is absent from its dictionary.
    """

    name: str
    variant: Variant
    gain: Change | None = None  # None for the unquantized itself
    retention: Change | None = None
    flips: float = math.nan  # share of documents whose main metric differs
    texts: list[Text] = field(default_factory=list)
    perplexity: dict[str, float] = field(default_factory=dict)  # by task
    footprint: dict[str, float] = field(default_factory=dict)  # metric → value
    note: str = ""  # why the footprint is missing

    @property
    def change(self) -> Change:
        """Its accuracy against the unquantized: on the gain tasks, else on the retention tasks."""
        for change in (self.gain, self.retention):
            if change is not None and not change.is_missing:
                return change
        return Change(0.0, 0.0, 0.0) if self.gain is None else self.gain


def forms(arm: Arm) -> list[Form]:
    """The unquantized last policy, then each of its quantized forms."""
    first = Form(
        "unquantized",
        arm.final,
        perplexity=_perplexity(arm, arm.final),
        footprint=_footprint(arm, arm.final)[0],
    )
    return [first, *(_form(arm, contrast) for contrast in arm.quantized)]


def _form(arm: Arm, contrast: Contrast) -> Form:
    footprint, note = _footprint(arm, contrast.after)
    return Form(
        contrast.after.quantizer,
        contrast.after,
        gain=contrast.average("gain"),
        retention=contrast.average("retention"),
        flips=_flips(contrast),
        texts=texts(contrast),
        perplexity=_perplexity(arm, contrast.after),
        footprint=footprint,
        note=note,
    )


def _flips(contrast: Contrast) -> float:
    rows = [row for row in contrast.rows(main_only=True) if not math.isnan(row.flips)]
    documents = sum(row.change.n for row in rows)
    return sum(row.flips * row.change.n for row in rows) / documents if documents else math.nan


def _results(arm: Arm, variant: Variant) -> list[tuple[str, EvalResult | str]]:
    return [
        (suite, run.result(variant, suite))
        for run in arm.runs
        for one, suite in run.results
        if one == variant
    ]


def _perplexity(arm: Arm, variant: Variant) -> dict[str, float]:
    """By task of held-out text, averaged over seeds."""
    found: dict[str, list[float]] = {}
    for _, result in _results(arm, variant):
        for score in result.scores if isinstance(result, EvalResult) else []:
            names = {other.metric for other in result.scores if other.task == score.task}  # type: ignore[union-attr]
            if score.metric == "perplexity" and LOSS in names:
                found.setdefault(score.task, []).append(score.value)
    return _means(found.items())


def _footprint(arm: Arm, variant: Variant) -> tuple[dict[str, float], str]:
    """Metric → value averaged over seeds, and why a suite gave none."""
    found: dict[str, list[float]] = {}
    reasons = []
    for suite, result in _results(arm, variant):
        if isinstance(result, str):
            if arm.first.role(suite) == "cost":
                reasons.append(result)
        elif result.role == "cost":
            for score in result.scores:
                found.setdefault(score.metric, []).append(score.value)
    return _means(found.items()), joined(reasons)


def _means(found: Iterable[tuple[str, list[float]]]) -> dict[str, float]:
    means = ((name, fmean(values)) for name, values in found)
    return {name: mean for name, mean in means if not math.isnan(mean)}
