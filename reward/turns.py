"""Messages and texts out of a raw row, checked: what is wrong with a row is said here.

A message is kept in the ecosystem's own form, `{"role": …, "content": …}`, so that it goes to a
chat template as it is.
"""

import re
from typing import Any

Row = dict[str, Any]
Message = dict[str, Any]


class BadRow(Exception):
    """A row that cannot be used; the text is the reason, without the place."""


# Which roles may follow a role; "" is the start. An assistant may open after a system turn, as
# role-play data do.
_NEXT = {
    "": ("system", "user"),
    "system": ("user", "assistant"),
    "user": ("assistant",),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}

# Columns that change what a conversation means but have no place in a record: to drop them in
# silence would train something else than the data say.
_UNREAD = {
    "tools": "write the tool definitions into the system turn",
    "history": "write the earlier turns into 'messages'",
}

_INNER_SPACE = re.compile(r"(?<=\S)[ \t]+")
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
        allowed = _NEXT[previous]
        if turn["role"] not in allowed:
            found = f"{where}turn {number} has role {short(turn['role'])}"
            raise BadRow(f"{found}, expected {' or '.join(allowed)}")
        previous = turn["role"]


def without_spacing(turns: list[Message]) -> list[Message]:
    """The turns with single spaces inside lines; line breaks and indentation mean something."""
    return [turn | {"content": _INNER_SPACE.sub(" ", turn["content"]).strip()} for turn in turns]


def opening(row: Row) -> list[Message]:
    """The system turn of a row that keeps it in a column of its own.

    Raises:
        BadRow: if the row has a column whose meaning a record cannot hold.
    """
    for key, remedy in _UNREAD.items():
        if row.get(key) not in (None, "", "[]", [], {}):
            raise BadRow(f"{key!r} is not read: {remedy} and remove {key!r}")
    if row.get("system") in (None, ""):
        return []
    return [make_turn("system", text_of(row, "system"))]


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
    return [check_turn(turn, f"{place} {i}") for i, turn in enumerate(list_of(row, key), 1)]


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
        raise BadRow(f"{where} has no role")
    role = _check_text(message["role"], f"the role of {where}")
    may_be_blank = role == "tool" or bool(message.get("tool_calls"))
    if may_be_blank:
        message.setdefault("content", "")  # some templates would print "None"
    if "content" not in message:
        raise BadRow(f"{where} has no content")
    _check_text(message["content"], where, may_be_blank)
    return message


def list_of(row: Row, key: str) -> list[Any]:
    """The list in a column, not empty."""
    value = _value(row, key)
    if not isinstance(value, list):
        raise BadRow(f"{key!r} is {kind_of(value)}, expected a list of messages")
    if not value:
        raise BadRow(f"{key!r} is empty")
    return value


def text_of(row: Row, key: str, may_be_blank: bool = False) -> str:
    """The text in a column."""
    return _check_text(_value(row, key), repr(key), may_be_blank)


def _value(row: Row, key: str) -> Any:
    if key not in row:
        raise BadRow(f"{key!r} is missing")
    return row[key]


def _check_text(value: Any, name: str, may_be_blank: bool = False) -> str:
    if not isinstance(value, str):
        raise BadRow(f"{name} is {kind_of(value)}, expected text")
    if not may_be_blank and not value.strip():
        raise BadRow(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can escape it, but no tokenizer can read it
        place = f"character {error.start + 1}"
        raise BadRow(f"{name} has half a surrogate pair at {place}") from error
    return value


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
