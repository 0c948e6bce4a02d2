"""Answers against their references, or a pattern, by their characters."""

import functools
import math
import re
from collections.abc import Sequence

from conf.entry import UserError
from reward.answers import Answer
from reward.verifiers.aside import Aside, Unanswered

_ASIDE = Aside("words")  # a pattern can backtrack for ever


def exact(answers: Sequence[Answer]) -> list[float]:
    """1 where the answer is a reference, up to spaces at both ends; NaN without a reference."""
    return [
        float(any(answer.text.strip() == text.strip() for text in answer.references))
        if answer.references
        else math.nan
        for answer in answers
    ]


def regex(
    answers: Sequence[Answer], *, pattern: str, full: bool = False, ignore_case: bool = False
) -> list[float]:
    """1 where the answer matches a regular expression of Python's `re`; NaN where that took too long.

    Args:
        pattern: the expression.
        full: the whole answer must match; False: some part of it.
        ignore_case: letters match in either case.

    Raises:
        UserError: when the pattern is no regular expression.
    """
    try:
        re.compile(pattern)
    except (re.error, TypeError, OverflowError, RecursionError) as error:
        raise UserError(f"regex: {pattern!r} is no regular expression: {error}") from error
    question = {"pattern": pattern, "full": full, "ignore_case": ignore_case}
    return [_matches(question | {"text": answer.text}) for answer in answers]


def _matches(question: dict[str, object]) -> float:
    try:
        return float(_ASIDE.ask(question))
    except Unanswered:
        return math.nan


def prepare() -> None:
    """In the process: nothing to import."""


def reply(pattern: str, full: bool, ignore_case: bool, text: str) -> bool:
    """In the process: whether a pattern matches a text."""
    compiled = _compiled(pattern, re.IGNORECASE if ignore_case else 0)
    return (compiled.fullmatch(text) if full else compiled.search(text)) is not None


@functools.cache
def _compiled(pattern: str, flags: int) -> re.Pattern[str]:
    return re.compile(pattern, flags)
