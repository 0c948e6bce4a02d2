"""A worked or factual answer with one wrong fact: another number, date or name, yes for no.

Each fault has a name and is a function `(answer, rng) -> wrong answer`; None where the answer has
nothing that it could change. A number, date or name is changed everywhere, so that an answer that
repeats it does not give itself away. The rules are of English text, and see only its surface.
"""

import random
import re
from collections.abc import Callable
from decimal import Decimal, localcontext
from itertools import pairwise

Fault = Callable[[str, random.Random], str | None]

# No part of a word, a longer number, a version or a date such as 2024-05-01: `A4`, `1.2.3`.
_NUMBER = re.compile(r"(?<![\w.,:/-])\d+(?:,\d{3})*(?:\.\d+)?(?![\w:/]|[.,-]\d)")
_LIST_MARK = re.compile(r"(?<!.)[ \t]*\d+[.)]")  # "2. Mix": the number of a line is no fact
_ANY_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
_FINAL = re.compile(rf"(?:####|answer is:?|\\boxed\{{)[ \t*$]*(-?{_ANY_NUMBER})", re.IGNORECASE)

_MONTHS = ["January", "February", "March", "April", "May", "June"]
_MONTHS += ["July", "August", "September", "October", "November", "December"]
_DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
# "May" and "March" are also words: a month follows a preposition or stands beside a number.
_MONTH = re.compile(
    rf"(?:(?<=\b[Ii]n )|(?<=\b[Oo]f )|(?<=\b[Oo]n )|(?<=\d )|(?<=th )|(?<=st ))({'|'.join(_MONTHS)})\b"
    rf"|\b({'|'.join(_MONTHS)})(?= \d)"
)
_DAY = re.compile(rf"\b({'|'.join(_DAYS)})\b")

# A capital that no sentence's beginning asks for; of "Leonardo da Vinci", none is a name alone.
_NAME = re.compile(
    r"(?<=[a-z,;] )(?<! da )(?<! de )(?<! van )(?<! von )"
    r"[A-Z][a-z]+(?:[ -][A-Z][a-z]+)*\b(?! (?:da|de|van|von) )"
)
_JOINED = re.compile(r"[\s,&]*(?:\b(?:and|or|nor)\b)?[\s,&]*")

_OPPOSITES = {"yes": "no", "no": "yes", "true": "false", "false": "true"}
_VERDICT = re.compile(
    r"\W*(?:the answer is:? )?(yes|no|true|false)(?=[,.;:!]|\W*$| [-–—])", re.IGNORECASE
)


def _final_answer(answer: str, rng: random.Random) -> str | None:
    """The number after `####`, "the answer is" or in a box; the reasoning before stays."""
    found = list(_FINAL.finditer(answer))
    if not found:
        return None
    start, end = found[-1].span(1)
    return answer[:start] + _other_number(found[-1].group(1), rng) + answer[end:]


def _number(answer: str, rng: random.Random) -> str | None:
    """A number, wherever the answer has it."""
    marks = {place for mark in _LIST_MARK.finditer(answer) for place in range(*mark.span())}
    found = [match for match in _NUMBER.finditer(answer) if match.start() not in marks]
    if not found:
        return None
    old = rng.choice(sorted({match.group() for match in found}))
    new = _other_number(old, rng)
    for match in reversed(found):  # from the end: the places before stay right
        if match.group() == old:
            answer = answer[: match.start()] + new + answer[match.end() :]
    return answer


def _other_number(text: str, rng: random.Random) -> str:
    """A nearby number in the same notation: as many decimals, commas where there were some."""
    with localcontext(prec=len(text) + 2):  # the usual 28 digits may be too few
        value = Decimal(text.replace(",", ""))
        decimals = len(text.partition(".")[2])
        unit = Decimal(1).scaleb(-decimals)
        steps = [unit, 2 * unit, 10 * unit, max(unit, abs(value) // 10)]
        others = [value + sign * step for step in steps for sign in (1, -1)]
        likely = [other for other in others if (other < 0) == (value < 0) and other != 0]
        new = rng.choice(likely)
        return f"{new:,.{decimals}f}" if "," in text else f"{new:.{decimals}f}"


def _date(answer: str, rng: random.Random) -> str | None:
    """A month or a weekday, wherever the answer has it."""
    options = [
        (pattern, names, found.group())
        for pattern, names in ((_MONTH, _MONTHS), (_DAY, _DAYS))
        for found in pattern.finditer(answer)
    ]
    if not options:
        return None
    pattern, names, old = rng.choice(options)
    new = rng.choice([name for name in names if name not in answer] or names)
    return pattern.sub(lambda found: new if found.group() == old else found.group(), answer)


def _swapped_names(answer: str, rng: random.Random) -> str | None:
    """Two names change places. Names that are only listed together would say the same again."""
    spans = [found.span() for found in _NAME.finditer(answer)]
    listed = {
        frozenset((answer[slice(*left)], answer[slice(*right)]))
        for left, right in pairwise(spans)
        if _JOINED.fullmatch(answer, left[1], right[0])
    }
    names = list(dict.fromkeys(answer[slice(*span)] for span in spans))
    names = [name for name in names if name not in _MONTHS + _DAYS]
    options = [
        (one, other)
        for place, one in enumerate(names)
        for other in names[place + 1 :]
        if one not in other and other not in one and frozenset((one, other)) not in listed
    ]
    if not options:
        return None
    one, other = rng.choice(options)
    both = re.compile(rf"\b(?:{re.escape(one)}|{re.escape(other)})\b")
    return both.sub(lambda found: other if found.group() == one else one, answer)


def _flipped_verdict(answer: str, rng: random.Random) -> str | None:
    """Yes for no, true for false, at the answer's beginning."""
    found = _VERDICT.match(answer)
    if not found:
        return None
    old = found.group(1)
    new = _OPPOSITES[old.lower()]
    new = new.upper() if old.isupper() else new.capitalize() if old[0].isupper() else new
    return answer[: found.start(1)] + new + answer[found.end(1) :]


FACTS: dict[str, Fault] = {
    "final_answer": _final_answer,
    "number": _number,
    "date": _date,
    "swapped_names": _swapped_names,
    "flipped_verdict": _flipped_verdict,
}
