"""The body of a request, checked: every reason names the row and the field."""

from dataclasses import dataclass
from typing import Any

from reward.readers import parse
from reward.records import text_or_turns
from reward.turns import BadRow, Message, check_order, kind_of, make_turn, tools_of

_FIELDS = ("prompt", "completion", "tools")


class NotJson(Exception):
    """A body that is not JSON; the text is the reason."""


@dataclass(frozen=True)
class Row:
    """A conversation to score."""

    prompt: list[Message]
    completion: list[Message]  # from the assistant's turn on
    tools: list[Any] | None

    @property
    def size(self) -> int:
        """Its characters, about."""
        return sum(len(turn["content"]) for turn in self.prompt + self.completion)


def rows_of(body: bytes, max_rows: int) -> list[Row]:
    """The rows of `{"rows": […]}`.

    Raises:
        NotJson: when the body is something else altogether.
        BadRow: naming the first row that cannot be scored.
    """
    if not body.strip():
        raise NotJson('it is empty, expected {"rows": […]}')
    try:
        asked = parse(body)
    except BadRow as error:
        if error.kind == "broken_line" and "not an object" not in str(error):
            raise NotJson(str(error)) from error
        raise BadRow('the body is not an object, expected {"rows": […]}') from error
    if unknown := asked.keys() - {"rows"}:
        raise BadRow(f"the body has {_quoted(min(unknown))}, expected only 'rows'")
    if "rows" not in asked:
        raise BadRow("'rows' is missing")
    rows = asked["rows"]
    if not isinstance(rows, list):
        raise BadRow(f"'rows' is {kind_of(rows)}, expected a list of objects")
    if not rows:
        raise BadRow("'rows' is empty")
    if len(rows) > max_rows:
        raise BadRow(f"'rows' has {len(rows)} rows, more than {max_rows}: send several requests")
    return [_checked(row, place) for place, row in enumerate(rows)]


def _checked(row: Any, place: int) -> Row:
    try:
        return row_of(row)
    except BadRow as error:
        raise BadRow(f"rows[{place}]: {error}", error.kind) from error


def row_of(row: Any) -> Row:
    """A prompt and its completion, each a text or messages, as `python -m reward.score` reads them.

    Raises:
        BadRow: when they are something else, or no conversation together.
    """
    if not isinstance(row, dict):
        raise BadRow(f"it is {kind_of(row)}, expected an object with prompt and completion")
    if unknown := row.keys() - set(_FIELDS):
        raise BadRow(f"it has {_quoted(min(unknown))}, expected only {', '.join(_FIELDS)}")
    prompt = text_or_turns(row, "prompt", "user")
    completion = _silence(row.get("completion")) or text_or_turns(row, "completion", "assistant")
    check_order(prompt + completion, "prompt and completion: ")
    for turn, which in ((completion[0], "first"), (completion[-1], "last")):
        if turn["role"] != "assistant":
            found = f"the {which} turn of 'completion' has role {turn['role']!r}"
            raise BadRow(f"{found}, expected assistant", "bad_role_order")
    return Row(prompt, completion, tools_of(row))


def _silence(completion: Any) -> list[Message] | None:
    """A completion of nothing but space, as a turn: a model may well say nothing, and must hear what that is worth."""
    if isinstance(completion, list) and len(completion) == 1:
        turn = completion[0]
        if isinstance(turn, dict) and turn.keys() == {"role", "content"}:
            completion = turn["content"] if turn["role"] == "assistant" else None
    if isinstance(completion, str) and not completion.strip():
        return [make_turn("assistant", completion)]
    return None


def _quoted(key: str) -> str:
    """A key for a message: ASCII, one line, cut to 40 characters."""
    text = ascii(key)
    return text if len(text) <= 40 else text[:37] + "..."
