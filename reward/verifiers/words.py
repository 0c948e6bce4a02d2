"""Answers against their references by their characters."""

import math
from collections.abc import Sequence

from reward.answers import Answer


def exact(answers: Sequence[Answer]) -> list[float]:
    """1 where the answer is a reference, up to spaces at both ends; NaN without a reference."""
    return [
        float(any(answer.text.strip() == text.strip() for text in answer.references))
        if answer.references
        else math.nan
        for answer in answers
    ]
