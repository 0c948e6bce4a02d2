"""Feedback records, and the pure functions that make them from raw rows.

A row that cannot be used raises `BadRow` with a reason that its author understands. Each normaliser
also reads what it made itself: a record's fields are a row of its format.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from reward.turns import (
    BadRow,
    Message,
    Row,
    check_order,
    check_turn,
    kind_of,
    list_of,
    make_turn,
    opening,
    short,
    text_of,
    text_or_turns,
    turns_of,
    without_spacing,
)


@dataclass(frozen=True)
class Conversation:
    """A demonstration: turns that end with the assistant's."""

    messages: list[Message]


@dataclass(frozen=True)
class Preference:
    """Two continuations of one prompt, of which the first is better."""

    prompt: list[Message]  # ends before the assistant's turn
    chosen: list[Message]  # from the assistant's turn on
    rejected: list[Message]
    margin: float | None = None  # by how much chosen is better, on the data's own scale


@dataclass(frozen=True)
class Prompt:
    """A question to the assistant, with the right answer where there is one."""

    messages: list[Message]
    reference: str | None = None


Record = Conversation | Preference | Prompt

KINDS: dict[str, type[Conversation] | type[Preference] | type[Prompt]] = {
    "sft": Conversation,
    "preference": Preference,
    "prompts": Prompt,
}

_SHAREGPT_ROLES = {
    "human": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "observation": "tool",
}

# Tried in order: a row with a completion has a prompt too.
_BY_KEYS = {
    "alpaca": {"instruction", "output"},
    "completion": {"prompt", "completion"},
    "qa": {"question", "answer"},
    "prompt": {"prompt"},
}

_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def messages(row: Row) -> Conversation:
    """OpenAI's form: `messages` (or `conversations`) of role and content."""
    key = "messages" if row.get("messages") is not None else "conversations"
    return _conversation(opening(row) + turns_of(row, key))


def sharegpt(row: Row) -> Conversation:
    """ShareGPT's form: `conversations` of from and value."""
    turns = list_of(row, "conversations")
    converted = [_from_sharegpt(turn, number) for number, turn in enumerate(turns, 1)]
    return _conversation(opening(row) + converted)


def alpaca(row: Row) -> Conversation:
    """Stanford Alpaca's form: instruction, optional input, output."""
    question = text_of(row, "instruction")
    extra = "" if row.get("input") is None else text_of(row, "input", may_be_blank=True)
    if extra.strip():
        question += "\n\n" + extra
    answer = make_turn("assistant", text_of(row, "output"))
    return _conversation([*opening(row), make_turn("user", question), answer])


def completion(row: Row) -> Conversation:
    """A prompt and its completion, each a text or messages."""
    prompt = opening(row) + text_or_turns(row, "prompt", "user")
    return _conversation(prompt + text_or_turns(row, "completion", "assistant"))


def qa(row: Row) -> Conversation:
    """A question and its worked answer, as in GSM8K."""
    return _conversation(
        [
            *opening(row),
            make_turn("user", text_of(row, "question")),
            make_turn("assistant", text_of(row, "answer")),
        ]
    )


def preference(row: Row) -> Preference:
    """TRL's explicit form: prompt, chosen, rejected, each a text or messages.

    Where chosen and rejected repeat the prompt (as in UltraFeedback), they are split after it.
    """
    prompt = text_or_turns(row, "prompt", "user")
    chosen = text_or_turns(row, "chosen", "assistant")
    rejected = text_or_turns(row, "rejected", "assistant")
    if chosen[0]["role"] in ("system", "user"):
        shared, chosen, rejected = _split(chosen, rejected)
        if shared[-len(prompt) :] != prompt:
            raise BadRow("chosen and rejected do not begin with the turns of 'prompt'")
        prompt = shared
    return _preference(opening(row) + prompt, chosen, rejected, row)


def preference_implicit(row: Row) -> Preference:
    """TRL's implicit form: two conversations that are the same up to an assistant's turn."""
    shared, chosen, rejected = _split(turns_of(row, "chosen"), turns_of(row, "rejected"))
    return _preference(opening(row) + shared, chosen, rejected, row)


def hh(row: Row) -> Preference:
    """Anthropic's HH-RLHF form: two texts with "Human:" and "Assistant:" before each turn."""
    return _preference(*_split(_hh_turns(row, "chosen"), _hh_turns(row, "rejected")), row)


def prompt(row: Row) -> Prompt:
    """A prompt (text or messages), with an optional `reference` or `answer`."""
    turns = opening(row) + text_or_turns(row, "prompt", "user")
    check_order(turns, "'prompt': ")
    if turns[-1]["role"] not in ("user", "tool"):
        raise BadRow(f"'prompt' ends with role {turns[-1]['role']!r}, expected user or tool")
    key = "reference" if row.get("reference") is not None else "answer"
    value = row.get(key)
    if value is None or value == "":  # a CSV file has no other way to say none
        return Prompt(turns)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return Prompt(turns, str(value))
    return Prompt(turns, text_of(row, key))


NORMALISERS: dict[str, Callable[[Row], Record]] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "completion": completion,
    "qa": qa,
    "preference": preference,
    "preference_implicit": preference_implicit,
    "hh": hh,
    "prompt": prompt,
}


def detect(row: Row) -> str:
    """Name the format of a row by its keys and their types.

    Raises:
        BadRow: listing the known formats, when none fits.
    """
    present = {key for key, value in row.items() if value is not None}
    if {"prompt", "chosen", "rejected"} <= present:
        return "preference"
    if {"chosen", "rejected"} <= present:
        if isinstance(row["chosen"], list):
            return "preference_implicit"
        if isinstance(row["chosen"], str) and _HH_TURN.search(row["chosen"]):
            return "hh"
    if isinstance(row.get("messages"), list):
        return "messages"
    if isinstance(turns := row.get("conversations"), list):
        is_sharegpt = any(isinstance(turn, dict) and "from" in turn for turn in turns)
        return "sharegpt" if is_sharegpt else "messages"
    for name, needed in _BY_KEYS.items():
        if needed <= present:
            return name
    keys = ", ".join(map(short, list(row)[:8])) or "none"
    raise BadRow(f"its keys ({keys}) fit none of the formats {', '.join(NORMALISERS)}")


def _conversation(turns: list[Message]) -> Conversation:
    check_order(turns, "")
    if turns[-1]["role"] != "assistant":
        raise BadRow(f"the last turn has role {turns[-1]['role']!r}, expected assistant")
    return Conversation(turns)


def _preference(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], row: Row
) -> Preference:
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        check_order(prompt + answer, f"prompt and {name}: ")
        if (role := answer[0]["role"]) != "assistant":
            raise BadRow(f"{name!r} begins with role {role!r}, expected assistant")
        if (role := answer[-1]["role"]) != "assistant":
            raise BadRow(f"{name!r} ends with role {role!r}, expected assistant")
    if chosen == rejected:
        raise BadRow("chosen and rejected are equal")
    if without_spacing(chosen) == without_spacing(rejected):
        raise BadRow("chosen and rejected differ in spaces only")
    return Preference(prompt, chosen, rejected, _margin(row))


def _split(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two conversations after their last common message: (shared, chosen, rejected)."""
    if chosen == rejected:
        raise BadRow("chosen and rejected are equal")
    shortest = min(len(chosen), len(rejected))
    at = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    if at == 0:
        raise BadRow("chosen and rejected share no prompt")
    if at == shortest:
        raise BadRow("one of chosen and rejected only continues the other")
    return chosen[:at], chosen[at:], rejected[at:]


def _margin(row: Row) -> float | None:
    value = row.get("margin")
    if value is None or value == "":
        return None
    try:
        margin = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        margin = math.nan
    if not math.isfinite(margin):
        raise BadRow(f"'margin' is {short(value)}, expected a finite number")
    return margin


def _hh_turns(row: Row, key: str) -> list[Message]:
    before, *parts = _HH_TURN.split(text_of(row, key))
    if before.strip() or not parts:
        raise BadRow(f"{key!r} does not begin with two line breaks and 'Human:'")
    roles = {"Human": "user", "Assistant": "assistant"}
    pairs = enumerate(zip(parts[::2], parts[1::2], strict=True), 1)
    return [
        check_turn({"role": roles[who], "content": said.strip()}, f"{key!r} turn {number}")
        for number, (who, said) in pairs
    ]


def _from_sharegpt(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"turn {number} is {kind_of(turn)}, expected an object with from and value")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    role = turn.get("from")
    role = _SHAREGPT_ROLES.get(role, role) if isinstance(role, str) else role
    return check_turn(rest | {"role": role, "content": turn.get("value")}, f"turn {number}")
