"""Answers checked by a verifier: the function that rewards them in training, see `reward.verify`."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from reward import verify
from reward.answers import Answer
from reward.turns import make_turn


def scores(
    answers: Sequence[str],
    references: Sequence[Sequence[str]],
    *,
    verifier: str,
    facts: Sequence[Mapping[str, Any]] | None = None,
) -> list[float | None]:
    """The verifier's score of each answer; None where it can say nothing.

    Args:
        verifier: a name in `reward.verify.VERIFIERS`.
        facts: the columns of each answer's document.
    """
    rows = zip(answers, references, facts or [{}] * len(answers), strict=True)
    given = [Answer(_prompt(row), text, right, row) for text, right, row in rows]
    return [None if math.isnan(score) else score for score in verify.load(verifier)(given)]


def _prompt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [make_turn("user", row["prompt"])] if isinstance(row.get("prompt"), str) else []
