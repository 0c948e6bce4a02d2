"""Feedback records, and the pure functions that turn a raw row of any known format into one."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Row = Mapping[str, Any]
Message = dict[str, Any]  # role and content; further keys such as tool_calls are kept


class BadRow(Exception):
    """This row cannot be used; the text says why."""


@dataclass(frozen=True)
class Conversation:
    """A demonstration: messages that end with the assistant's turn."""

    messages: list[Message]


@dataclass(frozen=True)
class Preference:
    """Two answers to one prompt, the better one first. `margin` is by how much, where the data say so."""

    prompt: list[Message]
    chosen: list[Message]
    rejected: list[Message]
    margin: float | None = None


@dataclass(frozen=True)
class Prompt:
    """A prompt with its reference answer, if there is one."""

    messages: list[Message]
    reference: str | None = None


Record = Conversation | Preference | Prompt

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
}
_HH_TURN = re.compile(r"\n\n(Human|Assistant): ?")


def _messages(value: Any, name: str) -> list[Message]:
    """A list of messages, each checked by itself. A string is one user turn."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, Sequence) or isinstance(value, bytes):
        raise BadRow(f"{name!r} is neither text nor a list of messages")
    if not value:
        raise BadRow(f"{name!r} is empty")
    return [_message(item, f"turn {number} of {name!r}") for number, item in enumerate(value, 1)]


def _message(value: Any, name: str) -> Message:
    if not isinstance(value, Mapping):
        raise BadRow(f"{name} is no message with role and content")
    role, content = value.get("role"), value.get("content")
    if role not in _ROLES:
        raise BadRow(f"{name} has role {role!r}, expected one of {', '.join(_ROLES)}")
    # A call of a tool may come without words.
    if not isinstance(content, str) and not (content is None and value.get("tool_calls")):
        raise BadRow(f"{name} has no text in 'content'")
    if isinstance(content, str) and not content.strip() and not value.get("tool_calls"):
        raise BadRow(f"{name} is empty")
    return {key: item for key, item in value.items() if item is not None or key == "content"}


def _check_order(messages: list[Message], name: str) -> None:
    """System first, then user and assistant in turn; tool results follow an assistant."""
    previous = None
    for number, message in enumerate(messages, 1):
        role = message["role"]
        allowed = {
            None: ("system", "developer", "user"),
            "system": ("user",),
            "developer": ("user",),
            "user": ("assistant",),
            "assistant": ("user", "tool"),
            "tool": ("assistant", "tool", "user"),
        }[previous]
        if role not in allowed:
            expected = " or ".join(allowed)
            raise BadRow(f"turn {number} of {name} has role {role!r}, expected {expected}")
        previous = role


def _text(row: Row, key: str, is_optional: bool = False) -> str:
    value = row.get(key)
    if value is None and is_optional:
        return ""
    if not isinstance(value, str):
        raise BadRow(f"{key!r} is no text")
    if not value.strip() and not is_optional:
        raise BadRow(f"{key!r} is empty")
    return value


def _conversation(messages: list[Message]) -> Conversation:
    _check_order(messages, "the conversation")
    if messages[-1]["role"] != "assistant":
        raise BadRow("the conversation does not end with the assistant, so there is nothing to learn from")
    return Conversation(messages)


def _answer(value: Any, name: str) -> list[Message]:
    """A completion: text is one assistant turn."""
    if isinstance(value, str):
        return _messages([{"role": "assistant", "content": value}], name)
    return _messages(value, name)


def _preference(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], row: Row
) -> Preference:
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[0]["role"] != "assistant":
            raise BadRow(f"{name!r} starts with role {answer[0]['role']!r}, expected assistant")
        _check_order(prompt + answer, f"prompt and {name}")
    if [message["content"] for message in chosen] == [message["content"] for message in rejected]:
        raise BadRow("'chosen' and 'rejected' are equal")
    margin = row.get("margin")
    if margin is not None and (isinstance(margin, bool) or not isinstance(margin, int | float)):
        raise BadRow(f"'margin' is {margin!r}, expected a number")
    return Preference(prompt, chosen, rejected, None if margin is None else float(margin))


def from_messages(row: Row) -> Conversation:
    """`{"messages": [{"role", "content"}, …]}`, OpenAI's format."""
    key = "messages" if "messages" in row else "conversations"
    return _conversation(_messages(row.get(key), key))


def from_sharegpt(row: Row) -> Conversation:
    """`{"conversations": [{"from": "human", "value": …}, …], "system": …}`."""
    turns = row.get("conversations")
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise BadRow("'conversations' is no list of turns")
    messages = []
    for number, turn in enumerate(turns, 1):
        if not isinstance(turn, Mapping):
            raise BadRow(f"turn {number} of 'conversations' is no object")
        sender = turn.get("from")
        if sender not in _SHAREGPT_ROLES:
            raise BadRow(f"turn {number} of 'conversations' is from {sender!r}, expected human or gpt")
        messages.append({"role": _SHAREGPT_ROLES[sender], "content": turn.get("value")})
    if isinstance(row.get("system"), str) and row["system"].strip():
        messages.insert(0, {"role": "system", "content": row["system"]})
    return _conversation(_messages(messages, "conversations"))


def from_alpaca(row: Row) -> Conversation:
    """`{"instruction", "input", "output"}` (Stanford Alpaca); the input follows the instruction."""
    parts = [_text(row, "instruction"), _text(row, "input", is_optional=True)]
    question = "\n\n".join(part for part in parts if part.strip())
    return _conversation(
        [*_messages(question, "instruction"), *_answer(_text(row, "output"), "output")]
    )


def from_qa(row: Row) -> Conversation:
    """`{"question", "answer"}`, as in GSM8K."""
    return _conversation(
        [*_messages(_text(row, "question"), "question"), *_answer(_text(row, "answer"), "answer")]
    )


def from_completion(row: Row) -> Conversation:
    """`{"prompt", "completion"}`, text or messages."""
    return _conversation(
        [*_messages(row.get("prompt"), "prompt"), *_answer(row.get("completion"), "completion")]
    )


def from_preference(row: Row) -> Preference:
    """`{"prompt", "chosen", "rejected"}`, text or messages; answers may repeat the prompt's messages."""
    prompt = _messages(row.get("prompt"), "prompt")
    answers = []
    for name in ("chosen", "rejected"):
        answer = _answer(row.get(name), name)
        if len(answer) > len(prompt) and answer[: len(prompt)] == prompt:
            answer = answer[len(prompt) :]
        answers.append(answer)
    return _preference(prompt, answers[0], answers[1], row)


def from_preference_implicit(row: Row) -> Preference:
    """`{"chosen", "rejected"}` as messages whose common beginning is the prompt."""
    chosen, rejected = _messages(row.get("chosen"), "chosen"), _messages(row.get("rejected"), "rejected")
    common = 0
    while common < min(len(chosen), len(rejected)) and chosen[common] == rejected[common]:
        common += 1
    if common == min(len(chosen), len(rejected)):
        raise BadRow("'chosen' and 'rejected' are equal, or one continues the other")
    if common == 0:
        raise BadRow("'chosen' and 'rejected' share no prompt")
    return _preference(chosen[:common], chosen[common:], rejected[common:], row)


def from_hh(row: Row) -> Preference:
    """`{"chosen", "rejected"}` as transcripts with `\\n\\nHuman: ` and `\\n\\nAssistant: ` (HH-RLHF)."""
    sides = {name: _transcript(_text(row, name), name) for name in ("chosen", "rejected")}
    return from_preference_implicit({**row, **sides})


def _transcript(text: str, name: str) -> list[Message]:
    lead, *parts = _HH_TURN.split(text)
    if lead.strip() or not parts:
        raise BadRow(f"{name!r} does not start with '\\n\\nHuman: '")
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": said.strip()}
        for speaker, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def from_prompt(row: Row) -> Prompt:
    """`{"prompt"}` with an optional `reference` or `answer`."""
    messages = _messages(row.get("prompt"), "prompt")
    _check_order(messages, "the prompt")
    reference = row.get("reference", row.get("answer"))
    return Prompt(messages, None if reference is None else str(reference))


NORMALISERS: dict[str, Callable[[Row], Record]] = {
    "messages": from_messages,
    "sharegpt": from_sharegpt,
    "alpaca": from_alpaca,
    "qa": from_qa,
    "completion": from_completion,
    "preference": from_preference,
    "preference_implicit": from_preference_implicit,
    "hh": from_hh,
    "prompt": from_prompt,
}

# The records that a kind of stage takes.
KINDS: dict[str, type[Record]] = {"sft": Conversation, "preference": Preference, "prompts": Prompt}


def detect(row: Row) -> str:
    """The format of a row, by its keys and the types under them.

    Raises:
        BadRow: when it is none that is known.
    """
    keys = set(row)
    if {"chosen", "rejected"} <= keys:
        if "prompt" in keys and not _is_transcript(row["chosen"]):
            return "preference"
        return "hh" if isinstance(row["chosen"], str) else "preference_implicit"
    if "messages" in keys:
        return "messages"
    if "conversations" in keys:
        return "sharegpt" if _first_keys(row["conversations"]) & {"from", "value"} else "messages"
    if {"instruction", "output"} <= keys:
        return "alpaca"
    if {"prompt", "completion"} <= keys:
        return "completion"
    if {"question", "answer"} <= keys:
        return "qa"
    if "prompt" in keys:
        return "prompt"
    raise BadRow(f"keys {sorted(keys)} fit no known format ({', '.join(NORMALISERS)})")


def _is_transcript(value: Any) -> bool:
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def _first_keys(value: Any) -> set[str]:
    is_list = isinstance(value, Sequence) and not isinstance(value, str) and len(value) > 0
    return set(value[0]) if is_list and isinstance(value[0], Mapping) else set()
