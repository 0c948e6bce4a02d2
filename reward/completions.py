"""The completions of a row that reward models score, and the row with what they say."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from reward.command import line_of
from reward.records import NORMALISERS, Conversation, Preference, Rated, detect
from reward.turns import (
    BadRow,
    Message,
    Row,
    check_order,
    kind_of,
    list_of,
    make_turn,
    opening,
    text_or_turns,
    tools_of,
)

if TYPE_CHECKING:
    from reward.ensemble import Array

_TEXTS = ("text", "response", "content", "completion")  # names of a nested completion's text


@dataclass(frozen=True)
class Task:
    """A row, and the conversations in it that get a score."""

    row: Row
    prompt: list[Message]
    completions: list[list[Message]]
    tools: list[Any] | None
    is_pair: bool = False
    is_nested: bool = False

    def scored(self, scores: list[float], members: "Array | None" = None) -> Row:
        """The row with its scores.

        Args:
            scores: (completions,).
            members: (completions, members) what they are made of, when there are several.
        """
        if self.is_nested:
            items = zip(self.row["completions"], _facts(scores, members), strict=True)
            return self.row | {"completions": [item | facts for item, facts in items]}
        if self.is_pair:
            return self.row | _pair_facts(scores, members)
        return self.row | _facts(scores, members)[0]


def _facts(scores: list[float], members: "Array | None") -> list[Row]:
    """What each completion gets."""
    if members is None:
        return [{"score": score} for score in scores]
    from reward.ensemble import disagreement

    said = zip(scores, members.tolist(), disagreement(members).tolist(), strict=True)
    return [{"score": score, "members": each, "disagreement": std} for score, each, std in said]


def _pair_facts(scores: list[float], members: "Array | None") -> Row:
    """What a pair gets; its disagreement is about the margin, from which each member's zero drops out."""
    names = ("chosen", "rejected")
    facts = {f"score_{name}": score for name, score in zip(names, scores, strict=True)}
    found: Row = facts | {"margin": scores[0] - scores[1]}
    if members is None:
        return found
    from reward.ensemble import disagreement

    found |= {f"members_{name}": row for name, row in zip(names, members.tolist(), strict=True)}
    return found | {"disagreement": float(disagreement(members[:1] - members[1:])[0])}


def task_of(row: Row, place: str = "") -> Task:
    """Find what is to be scored in a row.

    Raises:
        BadRow: when there is nothing, or it cannot be read or written.
    """
    del place
    try:
        line_of(row)
    except TypeError as error:
        raise BadRow(f"it cannot be written as JSON: {error}") from None
    if isinstance(row.get("completions"), list):
        return _nested(row)
    record = NORMALISERS[detect(row)](row)
    match record:
        case Preference(prompt, chosen, rejected):
            return Task(row, prompt, [chosen, rejected], record.tools, is_pair=True)
        case Rated(prompt, completion):
            return Task(row, prompt, [completion], record.tools)
        case Conversation(turns):
            return Task(row, turns[:-1], [turns[-1:]], record.tools)
    raise BadRow("it has a prompt, but no completion to score", "missing_field")


def _nested(row: Row) -> Task:
    key = "prompt" if row.get("prompt") is not None else "instruction"
    prompt = opening(row) + text_or_turns(row, key, "user")
    completions = []
    for number, item in enumerate(list_of(row, "completions"), 1):
        found = item if isinstance(item, dict) else {}
        text = next((found[name] for name in _TEXTS if found.get(name) is not None), None)
        if not isinstance(text, str):
            raise BadRow(f"completion {number} is {kind_of(item)}, expected an object with text")
        completions.append([make_turn("assistant", text)])  # a model may well have said nothing
        check_order(prompt + completions[-1], "prompt and completion: ")
    return Task(row, prompt, completions, tools_of(row), is_nested=True)
