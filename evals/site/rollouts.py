"""What a policy wrote while PPO trained it: in its first rollout, and in its last. No torch."""

import math
from pathlib import Path
from typing import Any, NamedTuple

from evals.leaderboard import Arm
from evals.results import read_jsonl
from evals.runs import Run
from reward.pages.markup import shortened

RESPONSES = 4  # of a rollout, at most
LONGEST_TEXT = 1500  # characters


class Response(NamedTuple):
    """An answer to a prompt of a rollout; NaN where a number is not known."""

    rollout: int
    step: int  # of the optimizer, before which it was written
    prompt: str
    text: str
    score: float
    kl: float  # nats, from the reference
    tokens: int
    is_ended: bool


class Rollouts(NamedTuple):
    """Responses of a stage's first and last rollout, in the arm's first run that kept any."""

    stage: str
    drawn: Run
    responses: list[Response]
    note: str  # why there are none


def samples_file(run: Path, stage: str) -> Path:
    """Where a run's folder keeps what a policy wrote while it was trained, a JSON object a line."""
    return run / "stages" / stage / "samples.jsonl"


def stage_rollouts(arm: Arm) -> list[Rollouts]:
    """The rollouts of every stage that kept some."""
    found = []
    for stage in dict.fromkeys(str(stage.get("stage")) for stage in arm.first.stages):
        kept = (run for run in arm.runs if samples_file(run.folder, stage).is_file())
        if run := next(kept, None):
            found.append(_rollouts(run, stage))
    return found


def _rollouts(run: Run, stage: str) -> Rollouts:
    try:
        every = [_response(row) for row in read_jsonl(samples_file(run.folder, stage))]
    except (OSError, ValueError, KeyError, TypeError) as error:
        note = f"what seed {run.seed} wrote cannot be read: {type(error).__name__}"
        return Rollouts(stage, run, [], note)
    numbers = [response.rollout for response in every]
    shown = [
        response
        for number in sorted({min(numbers), max(numbers)} if numbers else ())
        for response in [one for one in every if one.rollout == number][:RESPONSES]
    ]
    return Rollouts(stage, run, shown, "")


def _response(row: dict[str, Any]) -> Response:
    turns = [(turn["role"], turn["content"] or "") for turn in row["prompt"]]
    is_plain = len(turns) == 1 and turns[0][0] == "user"
    prompt = "\n\n".join(text if is_plain else f"{role}: {text}" for role, text in turns)
    return Response(
        int(row["rollout"]),
        int(row["step"]),
        shortened(prompt, LONGEST_TEXT),
        shortened(row["response"], LONGEST_TEXT),
        _number(row["score"]),
        _number(row["kl"]),
        int(row["tokens"]),
        bool(row["is_ended"]),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
