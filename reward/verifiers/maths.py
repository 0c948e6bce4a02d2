"""Whether an answer is mathematically equal to a reference, by math-verify (Hugging Face).

Nothing of an answer is evaluated as code.
"""

import functools
import math
import re
from collections.abc import Iterator, Sequence

from reward.answers import Answer
from reward.verifiers.aside import Aside, Unanswered

_POWER = re.compile(r"\*\*\s*(\w+)")  # Python's way of writing it
_MIXED = re.compile(r"(-?\d+) (\d+)/(\d+)")  # 3 1/2
_THOUSANDS = re.compile(r"-?\d{1,3}(,\d{3})+(\.\d+)?")
_SECONDS = 2  # math-verify's own limit, by a signal, for what can be interrupted
_ASIDE = Aside("maths")


def equivalent(answers: Sequence[Answer]) -> list[float]:
    """1 where the answer equals a reference as a number, fraction, set, interval or expression.

    The last boxed or marked answer of a text counts, or its last number or formula; after `####` (GSM8K) what follows.
    An answer that cannot be read, or not be compared in time, is 0; NaN where no reference can be read.

    Raises:
        UserError: when math-verify cannot be run.
    """
    return [_verdict(answer) for answer in answers]


def _verdict(answer: Answer) -> float:
    readable = [text for text in answer.references if _holds(reference=text)]
    if not readable:
        return math.nan
    return float(any(_holds(reference=text, text=answer.text) for text in readable))


def _holds(**question: str) -> bool:
    try:
        return bool(_ASIDE.ask(question))
    except Unanswered:
        return False


def texts_of(text: str) -> Iterator[str]:
    """The readings of a text to try in turn: what follows its last `####`, as a formula if it is nothing but one."""
    *_, final = text.rpartition("####")
    final = final.strip().replace("\\%", "%")
    is_marked = any(mark in final for mark in ("$", "\\(", "\\[", "\\boxed"))
    is_prose = any(word.isalpha() and len(word) > 1 for word in final.split())
    is_number = all(sign in "0123456789+-*^.,/% " for sign in final)
    is_several = ", " in final or ",-" in final or final.count(",") > 1
    is_one = is_number and not _MIXED.fullmatch(final)
    is_one = is_one and (not is_several or _THOUSANDS.fullmatch(final) is not None)
    if final and not (is_marked or is_prose or is_one or "\n" in final):
        formula = _POWER.sub(r"^{\1}", _MIXED.sub(r"\1\\frac{\2}{\3}", final))
        yield f"${formula}$"
    yield final


def prepare() -> None:
    """In the process: import what the first question needs."""
    import math_verify  # noqa: F401


def reply(reference: str, text: str | None = None) -> bool:
    """In the process: whether a text equals a reference, or whether the reference can be read at all.

    Raises:
        ValueError: when it cannot.
    """
    from math_verify import verify

    expected = _expected(reference)
    if text is None:
        return True
    return bool(verify(expected, _parsed(text), timeout_seconds=_SECONDS))


@functools.lru_cache(maxsize=256)  # the completions of a prompt share a reference
def _expected(reference: str) -> list[object]:
    if found := _parsed(reference):
        return found
    raise ValueError("the reference cannot be read")  # not remembered: it may have been in haste


def _parsed(text: str) -> list[object]:
    """Values and texts that math-verify finds; empty if none."""
    from math_verify import parse

    readings = (parse(reading, parsing_timeout=_SECONDS) for reading in texts_of(text))
    return next((found for found in readings if found), [])
