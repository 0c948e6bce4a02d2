"""Training curves of an arm, from the rows that its stages logged. No torch."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any, NamedTuple

from evals.leaderboard import Arm
from evals.results import read_jsonl
from evals.runs import Run
from evals.site.graphs import Curve, curve_chart

if TYPE_CHECKING:
    from typing_extensions import TypeIs

# Logged quantities that are drawn, each with its twin on held-out rows.
QUANTITIES = {
    "loss": "loss",
    "rewards/margins": "reward margin",
    "rewards/accuracies": "reward accuracy",
    "accuracy": "accuracy",
    "margin": "margin",
    "mean_token_accuracy": "token accuracy",
    "learning_rate": "learning rate",
}
# PPO's loss is of rows that the policy itself wrote: it tells nothing of how well it does.
QUANTITIES_OF_PPO = {
    "objective/scores": "reward",
    "objective/kl": "KL, nats a response",
    "policy/entropy_avg": "entropy, nats a token",
    "response/length_mean": "tokens a response",
    "response/eos_rate": "share that ended",
    "val/explained_variance": "critic: variance explained",
    "policy/clipfrac_avg": "share of clipped ratios",
    "learning_rate": "learning rate",
}
# Twins that are not called `eval_` and the quantity's own name.
_HELD_OUT = {
    "objective/scores": "eval_reward",
    "response/length_mean": "eval_length_mean",
    "response/eos_rate": "eval_eos_rate",
}
_POINTS = 200  # of a line; more are averaged

Points = list[tuple[float, float]]


class StageCurves(NamedTuple):
    """The charts of one stage; `note` says what they leave out, or why there are none."""

    stage: str
    charts: list[str]
    note: str


def metrics_file(run: Path, stage: str) -> Path:
    """Where a run's folder keeps what a stage logged, a JSON object a line."""
    return run / "stages" / stage / "metrics.jsonl"


def stage_curves(arm: Arm, name: str) -> list[StageCurves]:
    """The curves of each stage, a line a seed.

    Args:
        arm: whose runs are read.
        name: unique on the page; it becomes part of the SVGs' ids.
    """
    stages = [str(stage.get("stage", "stage")) for stage in arm.first.stages]
    return [_stage(arm, stage, f"{name}-{number}") for number, stage in enumerate(stages)]


def _stage(arm: Arm, stage: str, name: str) -> StageCurves:
    logged: list[tuple[Run, list[dict[str, Any]]]] = []
    problems = []
    for run in arm.runs:
        try:
            logged.append((run, list(read_jsonl(metrics_file(run.folder, stage)))))
        except FileNotFoundError:
            problems.append(f"seed {run.seed} kept no log of this stage")
        except (OSError, ValueError) as error:
            problems.append(f"the log of seed {run.seed} cannot be read: {type(error).__name__}")
    charts = []
    quantities = QUANTITIES_OF_PPO if stage == "ppo" else QUANTITIES
    for number, (quantity, label) in enumerate(quantities.items()):
        curves = [
            Curve(
                _label(arm, run, key),
                *_thinned(points),
                is_held_out=key != quantity,
                number=arm.runs.index(run),
            )
            for key in (quantity, _held_out(quantity))
            for run, rows in logged
            if (points := _points(rows, key))
        ]
        if curves:
            charts.append(curve_chart(f"{name}-curve-{number}", curves, label))
    lost = sum(_is_not_finite(row, quantities) for _, rows in logged for row in rows)
    if lost:
        problems.append(f"{lost} logged rows hold a number that is not finite, which is not drawn")
    return StageCurves(stage, charts, "; ".join(problems))


def _held_out(quantity: str) -> str:
    return _HELD_OUT.get(quantity, f"eval_{quantity}")


def _label(arm: Arm, run: Run, key: str) -> str:
    kind = "held-out" if key.startswith("eval_") else "training"
    return kind if len(arm.runs) == 1 else f"{kind} {run.seed}"


def _points(rows: Sequence[dict[str, Any]], key: str) -> Points:
    pairs = [(row.get("step"), row.get(key)) for row in rows]
    return [(float(x), float(y)) for x, y in pairs if _is_finite(x) and _is_finite(y)]


def _is_finite(value: Any) -> "TypeIs[int | float]":
    return isinstance(value, int | float) and math.isfinite(value)


def _is_not_finite(row: dict[str, Any], quantities: Iterable[str]) -> bool:
    values = [row.get(key) for name in quantities for key in (name, _held_out(name))]
    return any(isinstance(value, float) and not math.isfinite(value) for value in values)


def _thinned(points: Points) -> tuple[list[float], list[float]]:
    """Steps and values; where there are many, means of equally many neighbours."""
    size = math.ceil(len(points) / _POINTS)
    groups = list(_batches(points, size))
    return [fmean(x for x, _ in group) for group in groups], [
        fmean(y for _, y in group) for group in groups
    ]


def _batches(points: Points, size: int) -> Iterator[Points]:
    rest = iter(points)
    while group := list(itertools.islice(rest, size)):
        yield group
