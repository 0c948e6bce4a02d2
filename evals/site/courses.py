"""What the probe of a stage saw: proxy, gold measure and KL. No torch."""

from pathlib import Path
from typing import NamedTuple

from evals.leaderboard import Arm
from evals.runs import Run
from reward.looks import LOOKS, Finding, Look, judge, read
from reward.pages.courses import course_chart


class Course(NamedTuple):
    """The looks at one stage: those of the arm's first run that has any are drawn, every run is judged."""

    stage: str
    looks: list[Look]
    chart: str
    drawn: Run
    findings: list[tuple[Run, Finding]]
    note: str  # what could not be read


def looks_file(run: Path, stage: str) -> Path:
    """Where a run's folder keeps the looks at a stage, a JSON object a line."""
    return run / "stages" / stage / LOOKS


def courses(arm: Arm, name: str) -> list[Course]:
    """The course of every stage that was probed.

    Args:
        arm: whose runs are read.
        name: unique on the page; it becomes part of the SVGs' ids.
    """
    stages = [str(stage.get("stage", "stage")) for stage in arm.first.stages]
    found = (_course(arm, stage, f"{name}-{number}") for number, stage in enumerate(stages))
    return [course for course in found if course]


def _course(arm: Arm, stage: str, name: str) -> Course | None:
    taken: list[tuple[Run, list[Look], Finding]] = []
    problems = []
    for run in arm.runs:
        path = looks_file(run.folder, stage)
        try:
            if path.is_file() and (looks := read(path)):
                taken.append((run, looks, judge(looks)))
        except (OSError, ValueError) as error:
            problems.append(f"the looks of seed {run.seed} cannot be read: {type(error).__name__}")
    if not taken:
        return None
    drawn, looks, _ = taken[0]
    chart = course_chart(name, looks, "step")
    findings = [(run, finding) for run, _, finding in taken]
    return Course(stage, looks, chart, drawn, findings, "; ".join(problems))
