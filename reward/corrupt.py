"""Right JSON with one fault, of kinds that language models really make. Pure functions.

Each fault has a name and is a function `(answer, rng) -> wrong answer`; None where the answer has
nothing that it could spoil.
"""

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

from reward.store import canonical

Fault = Callable[[str, random.Random], str | None]

# A string, or one mark outside strings.
_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[{}\[\]:,]')
_LAYOUTS: list[dict[str, Any]] = [
    {"indent": indent, "separators": separators, "ensure_ascii": is_ascii}
    for indent in (None, 2, 4, "\t")
    for separators in (None, (",", ":"))
    for is_ascii in (False, True)
]


def parsed(answer: str) -> Any:
    """The object or list that an answer is, and nothing else; None if it is no such JSON."""
    try:
        value = json.loads(answer)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict | list) and value else None


def _text(value: Any, like: str) -> str:
    """A value as JSON, laid out as the original answer is: the fault shall be the only difference."""
    original = json.loads(like)
    fitting = (lay for lay in _LAYOUTS if json.dumps(original, **lay) == like.strip())
    return json.dumps(value, **next(fitting, {"ensure_ascii": False}))


def _marks(text: str, wanted: str) -> list[int]:
    """Places of a mark outside strings."""
    return [found.start() for found in _TOKEN.finditer(text) if found.group() == wanted]


def _last_bracket(text: str) -> int:
    return max(text.rfind("}"), text.rfind("]"))


def _without(text: str, places: list[int], rng: random.Random) -> str | None:
    """The text without the character at one of the places."""
    if not places:
        return None
    place = rng.choice(places)
    return text[:place] + text[place + 1 :]


def _missing_bracket(answer: str, rng: random.Random) -> str | None:
    return _without(answer, [_last_bracket(answer)], rng)


def _missing_comma(answer: str, rng: random.Random) -> str | None:
    return _without(answer, _marks(answer, ","), rng)


def _missing_colon(answer: str, rng: random.Random) -> str | None:
    return _without(answer, _marks(answer, ":"), rng)


def _trailing_comma(answer: str, rng: random.Random) -> str | None:
    body, bracket = answer[: _last_bracket(answer)], answer[_last_bracket(answer) :]
    end = body.rstrip()
    return end + "," + body[len(end) :] + bracket


def _truncated(answer: str, rng: random.Random) -> str | None:
    whole = answer.strip()
    return whole[: rng.randrange(1, len(whole))].rstrip()


def _python_literal(answer: str, rng: random.Random) -> str | None:
    """As Python prints it: single quotes, True, None."""
    return str(json.loads(answer))


def _unquoted_key(answer: str, rng: random.Random) -> str | None:
    keys = re.compile(r'"([A-Za-z_]\w*)"(?=\s*:)')
    places = [m for m in _TOKEN.finditer(answer) if keys.match(answer, m.start())]
    if not places:
        return None
    found = rng.choice(places)
    return answer[: found.start()] + found.group()[1:-1] + answer[found.end() :]


def _prose_before(answer: str, rng: random.Random) -> str | None:
    opening = ("Here is the JSON you asked for:", "Sure! Here is the JSON:", "The result is:")
    return f"{rng.choice(opening)}\n{answer}"


def _prose_after(answer: str, rng: random.Random) -> str | None:
    closing = ("Let me know if you need anything else!", "I hope this helps.", "Is that right?")
    return f"{answer}\n\n{rng.choice(closing)}"


def _code_fence(answer: str, rng: random.Random) -> str | None:
    return f"```json\n{answer}\n```"


def _duplicate_key(answer: str, rng: random.Random) -> str | None:
    """A member of the outermost object is said again, with another value."""
    value = json.loads(answer)
    if not isinstance(value, dict):
        return None
    key = rng.choice(list(value))
    others = _other_values(value, key, rng)
    if not others:
        return None
    member = _text({key: rng.choice(others)}, answer).strip()[1:-1].strip()
    body = answer[: answer.rstrip().rfind("}")].rstrip()
    commas = _marks(answer, ",")
    after = answer[commas[0] + 1 :] if commas else f" {answer}"
    space = after[: len(after) - len(after.lstrip())]  # a line break, where each member has a line
    return f"{body},{space}{member}{answer[len(body) :]}"


def _in_an_object(change: Callable[[dict[str, Any], str, random.Random], bool]) -> Fault:
    """A fault of one member of one object, which may lie deep inside."""

    def fault(answer: str, rng: random.Random) -> str | None:
        value = copy.deepcopy(json.loads(answer))
        objects = list(_objects(value))
        if not objects:
            return None
        chosen = rng.choice(objects)
        return _text(value, answer) if change(chosen, rng.choice(list(chosen)), rng) else None

    return fault


def _objects(value: Any) -> Iterator[dict[str, Any]]:
    """Every object with members, itself among them."""
    if isinstance(value, dict) and value:
        yield value
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _objects(item)


def _wrong_key(value: dict[str, Any], key: str, rng: random.Random) -> bool:
    forms = (key.upper(), key.capitalize(), f"{key}s", f"{key}_value", key.replace("_", ""))
    new = rng.choice([name for name in forms if name not in value] or [f"{key}_2"])
    members = [(new if name == key else name, item) for name, item in value.items()]
    value.clear()
    value.update(members)
    return True


def _missing_key(value: dict[str, Any], key: str, rng: random.Random) -> bool:
    del value[key]
    return True


def _extra_key(value: dict[str, Any], key: str, rng: random.Random) -> bool:
    names = {"note": "done", "status": "ok", "comment": "", "confidence": 0.9}
    name = rng.choice([name for name in names if name not in value] or [f"{key}_2"])
    value[name] = names.get(name, "")
    return True


def _wrong_type(value: dict[str, Any], key: str, rng: random.Random) -> bool:
    item = value[key]
    if isinstance(item, str):
        value[key] = [item]
    elif item is None:
        value[key] = "null"
    elif isinstance(item, bool):
        value[key] = str(item).lower()
    else:
        value[key] = str(item) if isinstance(item, int | float) else json.dumps(item)
    return True


def _wrong_value(value: dict[str, Any], key: str, rng: random.Random) -> bool:
    others = _other_values(value, key, rng)
    if others:
        value[key] = rng.choice(others)
    return bool(others)


def _other_values(value: dict[str, Any], key: str, rng: random.Random) -> list[Any]:
    """Values of the same type that a careless reader could have put there."""
    item = value[key]
    if isinstance(item, bool):
        return [not item]
    if isinstance(item, int):
        return [item + step for step in (-10, -1, 1, 10)]
    if isinstance(item, float):
        return [item + 1.0, item * 10 or -1.0]
    others = [other for other in value.values() if type(other) is type(item) and other != item]
    return others or ([" ".join(item.split()[:-1])] if isinstance(item, str) else [])


def _wrapped(answer: str, rng: random.Random) -> str | None:
    return _text({rng.choice(("result", "data", "output")): json.loads(answer)}, answer)


# Faults after which the answer is no JSON, and those after which it is JSON that says something else.
SYNTAX: dict[str, Fault] = {
    "missing_bracket": _missing_bracket,
    "missing_comma": _missing_comma,
    "missing_colon": _missing_colon,
    "trailing_comma": _trailing_comma,
    "truncated": _truncated,
    "single_quotes": _python_literal,
    "unquoted_key": _unquoted_key,
    "prose_before": _prose_before,
    "prose_after": _prose_after,
    "code_fence": _code_fence,
}
MEANING: dict[str, Fault] = {
    "duplicate_key": _duplicate_key,
    "wrong_key": _in_an_object(_wrong_key),
    "missing_key": _in_an_object(_missing_key),
    "extra_key": _in_an_object(_extra_key),
    "wrong_type": _in_an_object(_wrong_type),
    "wrong_value": _in_an_object(_wrong_value),
    "wrapped": _wrapped,
}


def is_as_named(name: str, wrong: str, answer: str) -> bool:
    """Whether a fault did what its name says: broke the syntax, or changed what the JSON says."""
    try:
        value = json.loads(wrong)
    except ValueError:
        return name in SYNTAX
    # As text: Python takes 1, 1.0 and true for equal.
    return name in MEANING and canonical(value) != canonical(json.loads(answer))
