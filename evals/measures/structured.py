"""Answers that must be JSON."""

import json
from collections.abc import Sequence
from typing import Any


def json_valid(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float]:
    """1 where the whole answer is JSON (RFC 8259: no NaN, no text around it)."""
    return [float(_parsed(answer) is not None) for answer in answers]


def json_exact(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float | None]:
    """1 where the answer is the JSON value of a reference; a gap where no reference is JSON.

    The order of keys, spaces, and how a number is written do not count.
    """
    found: list[float | None] = []
    for answer, texts in zip(answers, references, strict=True):
        expected = [value for text in texts if (value := _parsed(text)) is not None]
        found.append(float(_parsed(answer) in expected) if expected else None)
    return found


def _parsed(text: str) -> str | None:
    """The JSON value in one spelling, in which 1 and true differ; None where it is not JSON."""
    try:
        value = json.loads(text, parse_float=_number, parse_constant=_refuse)
        return json.dumps(value, sort_keys=True)
    except (ValueError, RecursionError):
        return None


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
