"""The page of one arm as HTML: what was trained, what it gained, lost, and costs. jinja2 loads when it is made."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

from evals.contrast import Change, Contrast, Row
from evals.deltas import margin_of
from evals.leaderboard import MeanScore
from evals.rated import Rated, rated
from evals.runs import Run, Variant
from evals.site.courses import Course, courses
from evals.site.curves import StageCurves, stage_curves
from evals.site.graphs import Spot, trade_chart
from evals.site.markup import environment, shared_note
from evals.site.measured import Form, Text, forms, texts
from evals.site.places import INDEX, Compared, Place, board_title
from evals.site.rollouts import Rollouts, stage_rollouts
from reward.pages.markup import TABLES, count, duration, percent, script
from reward.pages.plots import Pair, Point, dumbbell_chart, forest_chart, score_chart

# Metric, column, and the direction in which its column is sorted first: the better end up.
_FOOTPRINTS = [
    ("size_mb", "Size, MB", "ascending"),
    ("load_peak_mb", "Peak while loading, MB", "ascending"),
    ("peak_mb", "Peak memory, MB", "ascending"),
    ("prefill_tokens_per_s", "Prefill, tokens/s", "descending"),
    ("decode_tokens_per_s", "Decode, tokens/s", "descending"),
]
_OF_LAST_ROLLOUT: dict[str, Callable[[float], str]] = {
    "objective/scores": "reward {:.3g}".format,
    "objective/kl": "KL {:.3g} nats a response".format,
    "response/length_mean": "{:.0f} tokens a response".format,
    "response/eos_rate": lambda share: f"{percent(share)} ended",
}
_Z95 = 1.959964  # half-width of a 95 % normal interval, in standard errors


def render(place: Place) -> str:
    """The page of an arm; equal records give equal text."""
    view = ArmView(place)
    kinds = list(dict.fromkeys(name for form in view.forms for name in form.footprint))
    return (
        environment()
        .get_template("arm.html.jinja")
        .render(
            view=view,
            form_texts=list(
                dict.fromkeys(
                    t.task for form in view.forms for t in form.texts if "kl" in t.divergence
                )
            ),
            perplexities=list(dict.fromkeys(t for form in view.forms for t in form.perplexity)),
            footprints=[one for one in _FOOTPRINTS if one[0] in kinds],
            home=f"../{INDEX}",
            up="../",
            script=script(TABLES),
        )
    )


class Step(NamedTuple):
    """One box of the line that says what was trained."""

    name: str
    facts: list[str]
    data: str = ""  # link to the rows that it was trained on


class ArmView:
    """An arm as its section of the page shows it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.arm = arm = place.arm
        self.gain = arm.average("gain")
        self.retention = arm.average("retention")
        self.retained = arm.stages[-1].rows("retention", main_only=True) if arm.stages else []
        self.dtype = str(arm.first.model.get("dtype", "16-bit"))
        self.margins = dict(arm.first.margins)
        self.cost_notes = list(
            dict.fromkeys(
                note
                for contrast in arm.quantized
                for role in ("gain", "retention")
                if (note := shared_note(contrast.average(role).note))
            )
        )

    @property
    def title(self) -> str:
        """Name of the arm's board, as the leaderboard heads it."""
        return board_title(self.place.board)

    @property
    def has_gain_tasks(self) -> bool:
        """Whether a format was compared on tasks of gain."""
        return any(form.gain is not None and not form.gain.is_missing for form in self.forms)

    def cost(self, form: Form) -> Change | None:
        """What a format costs; None for the unquantized itself."""
        return None if form.gain is None else self.arm.cost(form.name)

    def text_page(self, variant: Variant, task: str) -> str:
        """The documents of held-out text as a variant of the last policy read them; empty when there is no page."""
        suites = dict.fromkeys(key.suite for key in self.place.samples if key.task == task)
        pages = (self.place.samples_of(variant, suite, task) for suite in suites)
        return next(filter(None, pages), "")

    def flips_page(self, variant: Variant) -> str:
        """The one task whose documents flipped; empty where they are of several."""
        pages = [
            path
            for key, path in self.place.samples.items()
            if (key.before, key.after) == (self.arm.final, variant)
        ]
        return pages[0] if len(pages) == 1 else ""

    @property
    def steps(self) -> list[Step]:
        """The base and the training stages, in order."""
        model = self.arm.first.model
        start = Step("base", [str(model.get("path", "unknown model")), self.dtype])
        folder, links = self.arm.first.folder, self.place.data
        stages = [
            (stage, links.get((folder, str(stage.get("stage"))), ""))
            for stage in self.arm.first.stages
        ]
        rated_here = self.arm.first.rewards
        return [
            start,
            *(
                _step(stage, str(stage.get("stage")) in rated_here)._replace(data=link)
                for stage, link in stages
            ),
        ]

    @property
    def rewards(self) -> list[Rated]:
        """The reward models with their main figures on held-out pairs."""
        return rated(self.arm.runs)

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
            if (chart := self._score_chart(suite, task, f"score-{number}"))
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
                # NaN, of a missing stderr, stays NaN only as the first argument.
                max(score.value - _Z95 * score.stderr, low) * scale,
                min(score.value + _Z95 * score.stderr, high) * scale,
            )
            for score in known
        ]
        unit = " (%)" if scale == 100 else ""
        return score_chart(name, drawn, f"{task} · {known[0].metric}{unit}")

    @property
    def forest(self) -> str:
        """The forest plot of the retention tasks; empty when no task has a share to draw."""
        drawn = [
            Point(row.task, *_times_100(row.change), row.change.verdict, -self._margin(row) * 100)
            for row in self._drawn
        ]
        if not drawn:
            return ""
        if len(drawn) > 1 and not self.retention.is_missing:
            drawn.append(Point("average", *_times_100(self.retention)))
        label = "change from base to tuned (percentage points)"
        return forest_chart("forest", drawn, label, self.arm.margin * 100)

    @property
    def costs(self) -> list[tuple[str, list[Row]]]:
        """Each quantizer with its rows; suites that share one reason are one row."""
        return [
            (contrast.after.quantizer, _merged(_judged_rows(contrast, main_only=True)))
            for contrast in self.arm.quantized
        ]

    @functools.cached_property
    def forms(self) -> list[Form]:
        """The number formats of the last policy; empty where only one was measured and not its footprint."""
        found = forms(self.arm)
        return found if len(found) > 1 or found[0].footprint else []

    @property
    def size_chart(self) -> str:
        """Size against the change of accuracy; empty with fewer than two sizes."""
        spots = [
            Spot(
                form.name,
                form.footprint["size_mb"],
                form.change.difference * 100,
                y_interval=(form.change.ci_low * 100, form.change.ci_high * 100),
            )
            for form in self.forms
            if "size_mb" in form.footprint and not form.change.is_missing and form.change.is_share
        ]
        if len(spots) < 2:
            return ""
        names = ("size (MB)", "change of accuracy (points)")
        margin = self.arm.margin * 100
        return trade_chart("sizes", spots, names, is_less_better=True, margin=margin)

    @property
    def all_metrics(self) -> list[tuple[Contrast, list[Row]]]:
        """Every metric of every contrast."""
        contrasts = [*self.arm.stages, *self.arm.quantized]
        return [(contrast, _judged_rows(contrast)) for contrast in contrasts]

    @property
    def samples(self) -> list[tuple[Compared, str]]:
        """Every page of samples."""
        return list(self.place.samples.items())

    def gain_page(self, seed: int) -> str:
        """A seed's samples of the gain; empty where it is an average over tasks."""
        tasks = self.arm.tasks("gain")
        if len(tasks) != 1:
            return ""
        return self.place.sample_page(self.arm.base, self.arm.final, *tasks[0], seed=seed)

    @property
    def seeds(self) -> list[tuple[Run, Change]]:
        """Each seed with its own gain."""
        if not self.arm.stages:
            return []
        return list(zip(self.arm.runs, self.arm.stages[-1].by_seed("gain"), strict=True))

    @property
    def curves(self) -> list[StageCurves]:
        """What the training stages logged."""
        return stage_curves(self.arm, "stage")

    @property
    def rollouts(self) -> list[Rollouts]:
        """What the policy wrote while it was trained."""
        return stage_rollouts(self.arm)

    @property
    def courses(self) -> list[Course]:
        """What the probes of the training stages saw."""
        return courses(self.arm, "course")

    @property
    def texts(self) -> list[Text]:
        """The held-out text on which the last policy was compared with the base."""
        return texts(self.arm.stages[-1]) if self.arm.stages else []

    @property
    def dumbbells(self) -> str:
        """Scores of the retention tasks before and after; empty when no task has a share to draw."""
        drawn = [
            Pair(
                row.task,
                row.baseline * 100,
                row.candidate * 100,
                (row.baseline - self._margin(row)) * 100,
                row.change.verdict,
            )
            for row in self._drawn
        ]
        if not drawn:
            return ""
        return dumbbell_chart("dumbbells", drawn, "score (%): ○ base, ● tuned, | margin")

    @property
    def own_margins(self) -> list[tuple[str, str]]:
        """Retention tasks whose margin is not the common one, each with its own."""
        own = ((row, self._margin(row)) for row in self.retained if row.task)
        return [
            (
                row.task,
                f"{margin * 100:g} points"
                if row.change.is_share
                else f"{margin:g} in {row.metric}",
            )
            for row, margin in own
            if margin != self.arm.margin
        ]

    def _margin(self, row: Row) -> float:
        return margin_of(row, self.arm.margin, self.margins)  # type: ignore[arg-type]

    @property
    def _drawn(self) -> list[Row]:
        return [
            row
            for row in self.retained
            if not row.change.is_missing and row.change.is_share and row.higher_is_better
        ]


def _judged_rows(contrast: Contrast, main_only: bool = False) -> list[Row]:
    """The rows of all suites but those of a cost, which has no documents to pair."""
    return [row for row in contrast.rows(main_only=main_only) if row.role != "cost"]


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


def _step(stage: dict[str, Any], is_rated: bool) -> Step:
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
    if is_rated:
        pass  # the report has these of the same pairs, and counts each pair once
    elif isinstance(accuracy := metrics.get("eval_accuracy"), float):  # a reward model's
        facts.append(f"{percent(accuracy)} of held-out pairs ranked right")
    elif isinstance(loss := metrics.get("eval_loss"), float):
        facts.append(f"held-out loss {loss:.3f}")
    facts += _rollout_facts(metrics)
    spent = duration(stage.get("seconds"))
    facts.append(f"{spent}, reused from an earlier run" if stage.get("reused") else spent)
    return Step(str(stage.get("stage", "stage")), facts)


def _rollout_facts(metrics: dict[str, Any]) -> list[str]:
    """What PPO's last rollout was like, and which alarms were raised; nothing of another stage."""
    known = {name: one for name, one in metrics.items() if isinstance(one, int | float)}
    told = [
        text(known[name])
        for name, text in _OF_LAST_ROLLOUT.items()
        if math.isfinite(known.get(name, math.nan))
    ]
    facts = [f"last rollout: {', '.join(told)}"] if told else []
    if math.isfinite(reward := known.get("eval_reward", math.nan)):
        facts.append(
            f"held-out reward {reward:.3g} ± {known.get('eval_reward_stderr', math.nan):.2g}"
        )
    alarms = [name.removeprefix("alarm/") for name in known if name.startswith("alarm/")]
    return [*facts, *(f"warning: {name} at step {known[f'alarm/{name}']:.0f}" for name in alarms)]
