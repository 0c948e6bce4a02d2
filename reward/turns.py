"""Messages and texts out of a raw row, checked: what is wrong with a row is said here.

A message is kept in the ecosystem's own form, `{"role": …, "content": …}`, so that it goes to a
chat template as it is.
"""

import json
import re
from typing import Any

import orjson

Row = dict[str, Any]
Message = dict[str, Any]


class BadRow(Exception):
    """A row that cannot be used; the text is the reason, without the place.

    Args:
        reason: what is wrong with the row, for its author.
        kind: the kind of finding, a key of `reward.findings.KINDS`.
    """

    def __init__(self, reason: str, kind: str = "wrong_type") -> None:
        super().__init__(reason)
        self.kind = kind

    def __reduce__(self) -> tuple[type["BadRow"], tuple[str, str]]:
        return BadRow, (str(self), self.kind)  # an exception pickles its `args` only


# Which roles may follow a role; "" is the start. An assistant may open after a system turn, as
# role-play data do.
_NEXT = {
    "": ("system", "user"),
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}

_ROLES = {"developer": "system"}  # OpenAI's newer name

# What `str.strip` takes for space, and what has no width.
_BLANK = " \t\n\r\v\f\x1c\x1d\x1e\x1f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000\u200b\u200c\u200d\u2060\ufeff"
_BLANK += "".join(map(chr, range(0x2000, 0x200B)))
_INNER_SPACE = re.compile(r"(?<=\S)[^\S\n]+")
_ONE_SPACE = re.compile(r"^ (?=\S)")


def check_order(turns: list[Message], where: str) -> None:
    """Check that the roles follow each other as in a chat, by the table above.

    Args:
        turns: all turns of the conversation, from its start.
        where: what precedes the place of a turn in a message, such as `prompt and chosen: `.

    Raises:
        BadRow: naming the first turn that is out of order, counted from 1.
    """
    previous = ""
    for number, turn in enumerate(turns, 1):
        role = turn["role"]
        if role not in _NEXT[previous]:
            found = f"{where}turn {number} has role {short(role)}"
            raise BadRow(f"{found}, expected {' or '.join(_NEXT[previous])}", "bad_role_order")
        previous = role


def differ_in_spaces_only(left: list[Message], right: list[Message]) -> bool:
    """Whether turns are the same but for spaces inside lines and at the ends.

    Line breaks and indentation mean something, in code for one.
    """
    # Nearly all pairs differ in their first or last word: no need to look further.
    for place in (0, -1):
        if len(left) != len(right) or _edge(left, place) != _edge(right, place):
            return False
    words = [[turn["content"].strip(_BLANK).split() for turn in turns] for turns in (left, right)]
    return words[0] == words[1] and _single_spaced(left) == _single_spaced(right)


def _edge(turns: list[Message], place: int) -> str:
    text: str = turns[place]["content"].strip(_BLANK)
    words = text.split(None, 1) if place == 0 else text.rsplit(None, 1)
    return words[place] if words else ""


def _single_spaced(turns: list[Message]) -> list[Message]:
    return [turn | {"content": _one_spaced(turn["content"])} for turn in turns]


def _one_spaced(text: str) -> str:
    return _INNER_SPACE.sub(" ", text.replace("\r\n", "\n").strip(_BLANK))


def opening(row: Row) -> list[Message]:
    """The turns before the ones that a format is about: a system text, and Alpaca's `history`."""
    turns = []
    if row.get("system") not in (None, ""):
        turns.append(make_turn("system", text_of(row, "system")))
    if row.get("history") not in (None, "", "[]", []):
        for number, pair in enumerate(list_of(row, "history"), 1):
            if not isinstance(pair, list) or len(pair) != 2:
                raise BadRow(f"'history' item {number} is no pair of a question and an answer")
            for role, text in zip(("user", "assistant"), pair, strict=True):
                turns.append(check_turn(make_turn(role, text), f"'history' item {number}"))
    return turns


def tools_of(row: Row) -> list[Any] | None:
    """The tool definitions of a row: JSON schemas as a list, or as the text of one."""
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise BadRow("'tools' is text that is not JSON") from error
        except RecursionError:
            raise BadRow("'tools' is nested too deeply") from None
    if tools in (None, "", [], {}):
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise BadRow(f"'tools' is {kind_of(tools)}, expected a list of tool definitions")
    _check_writable(tools, "'tools'")
    return tools


def text_or_turns(row: Row, key: str, role: str) -> list[Message]:
    """One turn made of a text, or the turns of a list."""
    if isinstance(row.get(key), list):
        return turns_of(row, key)
    text = text_of(row, key)
    if role == "assistant":  # one space only joined it to the prompt; deeper indentation is meant
        text = _ONE_SPACE.sub("", text)
    return [make_turn(role, text)]


def turns_of(row: Row, key: str) -> list[Message]:
    """The checked messages of a column."""
    place = "turn" if key in ("messages", "conversations") else f"{key!r} turn"
    return [
        dict(turn) if _is_plain(turn) else check_turn(turn, f"{place} {number}")
        for number, turn in enumerate(list_of(row, key), 1)
    ]


def _is_plain(turn: Any) -> bool:
    """Whether `check_turn` would find nothing: nearly all turns are so, and need no place for a message."""
    if type(turn) is not dict or len(turn) != 2:
        return False
    content = turn.get("content")
    return (
        type(content) is str
        and type(role := turn.get("role")) is str
        and role in _NEXT
        and bool(content)
        and not content.isspace()
        and (content.isascii() or _is_encodable(content))
    )


def make_turn(role: str, content: str) -> Message:
    """A message of a role."""
    return {"role": role, "content": content}


def check_turn(turn: Any, where: str) -> Message:
    """A checked copy of a message; keys other than role and content stay as they are."""
    if not isinstance(turn, dict):
        raise BadRow(f"{where} is {kind_of(turn)}, expected an object with role and content")
    # Parquet gives every message the keys of all others, filled with null.
    message = {key: value for key, value in turn.items() if value is not None}
    if "role" not in message:
        raise BadRow(f"{where} has no role", "missing_field")
    role = _check_text(message["role"], f"the role of {where}")
    if "tool_calls" in message and not isinstance(message["tool_calls"], list):
        raise BadRow(
            f"'tool_calls' of {where} is {kind_of(message['tool_calls'])}, expected a list"
        )
    message["role"] = role = _ROLES.get(role, role)
    may_be_blank = role == "tool" or bool(message.get("tool_calls"))
    if may_be_blank:
        message.setdefault("content", "")  # some templates would print "None"
    if "content" not in message:
        raise BadRow(f"{where} has no content", "empty_turn")
    _check_text(message["content"], where, may_be_blank)
    if len(message) > 2:
        _check_writable(message, where)
    return message


def list_of(row: Row, key: str) -> list[Any]:
    """The list in a column, not empty."""
    value = _value(row, key)
    if not isinstance(value, list):
        raise BadRow(f"{key!r} is {kind_of(value)}, expected a list of messages")
    if not value:
        raise BadRow(f"{key!r} is empty", "empty_turn")
    return value


def text_of(row: Row, key: str, may_be_blank: bool = False) -> str:
    """The text in a column."""
    return _check_text(_value(row, key), repr(key), may_be_blank)


def _value(row: Row, key: str) -> Any:
    if key not in row:
        raise BadRow(f"{key!r} is missing", "missing_field")
    return row[key]


def _check_text(value: Any, name: str, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        kind = "empty_turn" if value is None else "wrong_type"
        raise BadRow(f"{name} is {kind_of(value)}, expected text", kind)
    if not may_be_blank and not value.strip():
        raise BadRow(f"{name} is {'only spaces' if value else 'empty'}", "empty_turn")
    if not value.isascii() and not _is_encodable(value):
        raise BadRow(f"{name} has half a surrogate pair, which no tokenizer can read")
    return value


def _check_writable(value: Any, name: str) -> None:
    """Refuse what no file or server takes: integers beyond 64 bits, half a surrogate pair, too deep a nest."""
    try:
        orjson.dumps(value, default=str)
    except TypeError as error:
        raise BadRow(f"{name} cannot be written as JSON: {error}") from None


def _is_encodable(text: str) -> bool:
    """Whether no half of a surrogate pair is in the text: JSON can escape one."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def kind_of(value: Any) -> str:
    """What a JSON value is, in words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true or false"
    names = {str: "text", int: "a number", float: "a number", list: "a list", dict: "an object"}
    return names.get(type(value), f"of type {type(value).__name__}")


def short(value: Any) -> str:
    """A value for a message, cut to 40 characters."""
    text = repr(value) if isinstance(value, str | int | float) else kind_of(value)
    return text if len(text) <= 40 else text[:37] + "…"
