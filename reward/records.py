"""Feedback records, and the pure functions that make them from raw rows.

A row that cannot be used raises `BadRow` with a reason that its author understands. Each normaliser
also reads what it made itself: a record's fields are a row of its format.
"""

import contextlib
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from reward import turns as _turns
from reward.turns import (
    BadRow,
    Message,
    Row,
    check_order,
    check_turn,
    differ_in_spaces_only,
    kind_of,
    list_of,
    make_turn,
    opening,
    short,
    text_of,
    tools_of,
)

Tools = list[Any] | None  # JSON schemas of the tools that the assistant may call


@dataclass(frozen=True)
class Conversation:
    """A demonstration: turns that end with the assistant's."""

    messages: list[Message]
    tools: Tools = None


@dataclass(frozen=True)
class Preference:
    """Two continuations of one prompt, of which the first is better."""

    prompt: list[Message]  # ends before the assistant's turn
    chosen: list[Message]  # from the assistant's turn on
    rejected: list[Message]
    margin: float | None = None  # by how much chosen is better, on the data's own scale
    tools: Tools = None


@dataclass(frozen=True)
class Rated:
    """One continuation of a prompt, and whether it is wanted: what KTO learns from."""

    prompt: list[Message]
    completion: list[Message]
    label: bool
    tools: Tools = None


@dataclass(frozen=True)
class Prompt:
    """A question to the assistant, with the right answer where there is one."""

    prompt: list[Message]
    reference: str | None = None
    tools: Tools = None
    # further columns of its row, JSON-like, such as a verifier reads: `schema`, `instruction_id_list`, `tests`
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def references(self) -> list[str]:
        """The right answers: those of the column `references`, or else the one reference."""
        several = self.facts.get("references")
        if isinstance(several, list) and all(isinstance(text, str) for text in several):
            return [text for text in several if text]
        return [] if self.reference is None else [self.reference]


Record = Conversation | Preference | Rated | Prompt

KINDS: dict[str, type[Conversation] | type[Preference] | type[Rated] | type[Prompt]] = {
    "sft": Conversation,
    "preference": Preference,
    "rated": Rated,
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
    "ultrafeedback": {"instruction", "completions"},
    "alpaca": {"instruction", "output"},
    "kto": {"prompt", "completion", "label"},
    "completion": {"prompt", "completion"},
    "reasoning": {"question", "reasoning", "answer"},
    "qa": {"question", "answer"},
    "prompt": {"prompt"},
    "alpaca_preference": {"instruction", "chosen", "rejected"},
    "orca": {"question", "chosen", "rejected"},
}

_PROMPT_KEYS = {"prompt", "system", "history", "tools"}

_LABELS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False}

_HH_END = "\n\nAssistant:"  # of a prompt: what follows is the answer
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")


def messages(row: Row) -> Conversation:
    """OpenAI's form: `messages` (or `conversations`) of role and content, tool calls kept."""
    key = "messages" if row.get("messages") is not None else "conversations"
    return _conversation(opening(row) + turns_of(row, key), row)


def sharegpt(row: Row) -> Conversation:
    """ShareGPT's form: `conversations` of from and value."""
    return _conversation(opening(row) + _sharegpt_turns(row), row)


def alpaca(row: Row) -> Conversation:
    """Stanford Alpaca's form: instruction, optional input, output; `history` of earlier pairs."""
    answer = make_turn("assistant", text_of(row, "output"))
    return _conversation([*opening(row), _alpaca_question(row), answer], row)


def completion(row: Row) -> Conversation:
    """A prompt and its completion, each a text or messages."""
    prompt = opening(row) + text_or_turns(row, "prompt", "user")
    return _conversation(prompt + text_or_turns(row, "completion", "assistant"), row)


def qa(row: Row) -> Conversation:
    """A question and its worked answer, as in GSM8K."""
    question = make_turn("user", text_of(row, "question"))
    return _conversation(
        [*opening(row), question, make_turn("assistant", text_of(row, "answer"))], row
    )


def reasoning(row: Row) -> Conversation:
    """A question, a chain of thought and the answer; the assistant's turn is thought, then answer.

    The thought is part of the text rather than of a field of the message: a template that does not
    know such a field would drop what is to be learnt.
    """
    thought, answer = text_of(row, "reasoning").rstrip(), text_of(row, "answer")
    turns = [make_turn("user", text_of(row, "question"))]
    turns.append(make_turn("assistant", f"{thought}\n\n{answer}"))
    return _conversation(opening(row) + turns, row)


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
            raise BadRow(
                "chosen and rejected do not begin with the turns of 'prompt'", "prompt_mismatch"
            )
        prompt = shared
    return _preference(opening(row) + prompt, chosen, rejected, row)


def preference_implicit(row: Row) -> Preference:
    """TRL's implicit form: two conversations that are the same up to an assistant's turn."""
    shared, chosen, rejected = _split(turns_of(row, "chosen"), turns_of(row, "rejected"))
    return _preference(opening(row) + shared, chosen, rejected, row)


def hh(row: Row) -> Preference:
    """Anthropic's HH-RLHF form: two texts with "Human:" and "Assistant:" before each turn."""
    return _preference(*_split(_hh_turns(row, "chosen"), _hh_turns(row, "rejected")), row)


def alpaca_preference(row: Row) -> Preference:
    """Alpaca's form with two answers: instruction, optional input, chosen, rejected."""
    return _preference([*opening(row), _alpaca_question(row)], *_two_texts(row), row)


def sharegpt_preference(row: Row) -> Preference:
    """ShareGPT's form with two answers: `conversations`, and chosen and rejected as one turn each."""
    for key in ("chosen", "rejected"):
        if key not in row:
            raise BadRow(f"{key!r} is missing", "missing_field")
    chosen, rejected = ([_from_sharegpt(row[key], repr(key))] for key in ("chosen", "rejected"))
    return _preference(opening(row) + _sharegpt_turns(row), chosen, rejected, row)


def orca(row: Row) -> Preference:
    """The form of Orca's DPO pairs: optional system, question, chosen, rejected."""
    question = make_turn("user", text_of(row, "question"))
    return _preference([*opening(row), question], *_two_texts(row), row)


def ultrafeedback(row: Row) -> Preference:
    """UltraFeedback's raw form: an instruction and scored `completions`; best against worst.

    `python -m reward.pairs` makes other pairs of them.
    """
    scored = []
    items = list_of(row, "completions")
    name = score_name(items)
    for number, item in enumerate(items, 1):
        where = f"completion {number}"
        if not isinstance(item, dict):
            raise BadRow(f"{where} is {kind_of(item)}, expected an object with response")
        answer = check_turn({"role": "assistant", "content": item.get("response")}, where)
        scored.append((number_of(item.get(name), f"the score of {where}"), answer))
    worst, best = min(scored, key=_score), max(scored, key=_score)
    margin = best[0] - worst[0]
    if margin == 0:
        raise BadRow("all completions have the same score", "same_pair")
    prompt = [*opening(row), make_turn("user", text_of(row, "instruction"))]
    return _preference(prompt, [best[1]], [worst[1]], row | {"margin": margin})


def score_name(completions: list[Any]) -> str:
    """Where completions have their scores: in what `python -m reward.score` writes, or else in UltraFeedback's own."""
    has_score = any(isinstance(one, dict) and one.get("score") is not None for one in completions)
    return "score" if has_score else "overall_score"


def kto(row: Row) -> Rated:
    """KTO's form: prompt, completion (each a text or messages), and whether it is wanted."""
    label = _LABELS.get(str(row.get("label")).strip().lower())
    if label is None:
        raise BadRow(f"'label' is {short(row.get('label'))}, expected true or false")
    prompt = opening(row) + text_or_turns(row, "prompt", "user")
    answer = text_or_turns(row, "completion", "assistant")
    _check_answer(prompt, answer, "completion")
    return Rated(prompt, answer, label, tools_of(row))


def prompt(row: Row) -> Prompt:
    """A prompt (text or messages), with an optional `reference` or `answer`; other columns become its facts."""
    turns = opening(row) + text_or_turns(row, "prompt", "user")
    check_order(turns, "'prompt': ")
    if turns[-1]["role"] not in ("user", "tool"):
        raise BadRow(
            f"'prompt' ends with role {turns[-1]['role']!r}, expected user or tool",
            "bad_role_order",
        )
    key = "reference" if row.get("reference") is not None else "answer"
    return Prompt(turns, _reference(row, key), tools_of(row), _facts(row, {*_PROMPT_KEYS, key}))


def _reference(row: Row, key: str) -> str | None:
    value = row.get(key)
    if value is None or value == "":  # a CSV file has no other way to say none
        return None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return format(Decimal(str(value)), "f")  # 1e-05 would be read as e − 5
    return text_of(row, key)


def _facts(row: Row, understood: set[str]) -> dict[str, Any]:
    """The columns that a record has no field for, as JSON can hold them; those of a record's own `facts` too."""
    further = row.get("facts")
    if isinstance(further, str) and further.startswith(
        "{"
    ):  # as `reward.versions.to_trl` writes it
        with contextlib.suppress(ValueError, RecursionError):
            further = json.loads(further)
    if isinstance(further, dict):
        understood = understood | {"facts"}
    else:
        further = {}
    rest = {key: value for key, value in row.items() if key not in understood}
    try:
        found = json_like({**further, **rest})
    except RecursionError as error:
        raise BadRow("a column is nested too deeply") from error
    return {key: value for key, value in found.items() if value is not None}


def json_like(value: Any) -> Any:
    """The nearest value that JSON has: texts for dates and numbers beyond 64 bits, none for NaN."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {str(key): json_like(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [json_like(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return value
    return str(value)


NORMALISERS: dict[str, Callable[[Row], Record]] = {
    "messages": messages,
    "sharegpt": sharegpt,
    "alpaca": alpaca,
    "completion": completion,
    "reasoning": reasoning,
    "qa": qa,
    "preference": preference,
    "preference_implicit": preference_implicit,
    "hh": hh,
    "alpaca_preference": alpaca_preference,
    "sharegpt_preference": sharegpt_preference,
    "orca": orca,
    "ultrafeedback": ultrafeedback,
    "kto": kto,
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
        if isinstance(row["chosen"], str) and _is_hh(row["chosen"], present):
            return "hh"
        if isinstance(row["chosen"], dict) and isinstance(row.get("conversations"), list):
            return "sharegpt_preference"
    if isinstance(row.get("messages"), list):
        return "messages"
    if isinstance(turns := row.get("conversations"), list):
        is_sharegpt = any(isinstance(turn, dict) and "from" in turn for turn in turns)
        return "sharegpt" if is_sharegpt else "messages"
    for name, needed in _BY_KEYS.items():
        if needed <= present:
            return name
    keys = ", ".join(map(short, list(row)[:8])) or "none"
    raise BadRow(
        f"its keys ({keys}) fit none of the formats {', '.join(NORMALISERS)}", "unknown_format"
    )


def _is_hh(text: str, present: set[str]) -> bool:
    """Whether a text is a dialogue; beside a question, an answer may quote one further down."""
    if "question" in present or "instruction" in present:
        return _HH_TURN.match(text) is not None
    return _HH_TURN.search(text) is not None


def number_of(value: Any, name: str) -> float:
    """A finite number, from a number or its text.

    Raises:
        BadRow: naming the value.
    """
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise BadRow(f"{name} is {short(value)}, expected a finite number")
    return number


def _score(scored: tuple[float, Message]) -> float:
    return scored[0]


def _conversation(turns: list[Message], row: Row) -> Conversation:
    check_order(turns, "")
    if turns[-1]["role"] != "assistant":
        found = f"the last turn has role {turns[-1]['role']!r}"
        raise BadRow(f"{found}, expected assistant", "bad_role_order")
    return Conversation(turns, tools_of(row))


def _preference(
    prompt: list[Message], chosen: list[Message], rejected: list[Message], row: Row
) -> Preference:
    _check_answer(prompt, chosen, "chosen")
    _check_answer(prompt, rejected, "rejected")
    if chosen == rejected:
        raise BadRow("chosen and rejected are equal", "same_pair")
    if differ_in_spaces_only(chosen, rejected):
        raise BadRow("chosen and rejected differ in spaces only", "same_pair")
    return Preference(prompt, chosen, rejected, _margin(row), tools_of(row))


def _check_answer(prompt: list[Message], answer: list[Message], name: str) -> None:
    """An answer follows its prompt, and begins and ends with the assistant."""
    check_order(prompt + answer, f"prompt and {name}: ")
    for place, turn in (("begins", answer[0]), ("ends", answer[-1])):
        if (role := turn["role"]) != "assistant":
            raise BadRow(
                f"{name!r} {place} with role {role!r}, expected assistant", "bad_role_order"
            )


def _split(
    chosen: list[Message], rejected: list[Message]
) -> tuple[list[Message], list[Message], list[Message]]:
    """Split two conversations after their last common message: (shared, chosen, rejected)."""
    if chosen == rejected:
        raise BadRow("chosen and rejected are equal", "same_pair")
    shortest = min(len(chosen), len(rejected))
    at = next((i for i in range(shortest) if chosen[i] != rejected[i]), shortest)
    if at == 0:
        raise BadRow("chosen and rejected share no prompt", "prompt_mismatch")
    if at == shortest:
        raise BadRow("one of chosen and rejected only continues the other", "prompt_mismatch")
    return chosen[:at], chosen[at:], rejected[at:]


def _margin(row: Row) -> float | None:
    if row.get("margin") in (None, ""):
        scores = (row.get("score_chosen"), row.get("score_rejected"))
        if not any(score in (None, "") for score in scores):
            chosen, rejected = (number_of(score, "a score") for score in scores)
            return chosen - rejected
    value = row.get("margin")
    return None if value in (None, "") else number_of(value, "'margin'")


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


def turns_of(row: Row, key: str) -> list[Message]:
    """The checked messages of a column; contents that are lists of text parts are joined."""
    return _turns.turns_of(_with_texts(row, key), key)


def text_or_turns(row: Row, key: str, role: str) -> list[Message]:
    """One turn made of a text, or the turns of a list, as above; a dialogue in HH's form has several, too."""
    if role == "user" and isinstance(text := row.get(key), str):
        dialogue = text.rstrip().removesuffix(_HH_END)
        if _HH_TURN.match(text) and dialogue != text.rstrip():
            return _hh_turns({key: dialogue}, key)
    return _turns.text_or_turns(_with_texts(row, key), key, role)


def _with_texts(row: Row, key: str) -> Row:
    """The row, with a text for each content of the column that is a list of text parts."""
    turns = row.get(key)
    if type(turns) is not list or not any(map(_has_parts, turns)):
        return row
    return row | {key: [_joined(turn) if _has_parts(turn) else turn for turn in turns]}


def _has_parts(turn: Any) -> bool:
    return type(turn) is dict and type(turn.get("content")) is list


def _joined(turn: Message) -> Message:
    """The turn with its text parts as one text; as it is if a part is something else."""
    texts = []
    for part in turn["content"]:
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            return turn
        texts.append(text)
    if not texts:
        return turn
    return turn | {"content": "".join(texts)}  # templates put nothing between parts either


def _alpaca_question(row: Row) -> Message:
    question = text_of(row, "instruction")
    extra = "" if row.get("input") is None else text_of(row, "input", may_be_blank=True)
    if extra.strip():
        question += "\n\n" + extra
    return make_turn("user", question)


def _two_texts(row: Row) -> tuple[list[Message], list[Message]]:
    """The answers `chosen` and `rejected`, each a text."""
    chosen, rejected = (
        [make_turn("assistant", text_of(row, key))] for key in ("chosen", "rejected")
    )
    return chosen, rejected


def _sharegpt_turns(row: Row) -> list[Message]:
    turns = enumerate(list_of(row, "conversations"), 1)
    return [_from_sharegpt(turn, f"turn {number}") for number, turn in turns]


def _from_sharegpt(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise BadRow(f"{where} is {kind_of(turn)}, expected an object with from and value")
    rest = {key: value for key, value in turn.items() if key not in ("from", "value")}
    who, said = turn.get("from"), turn.get("value")
    if who == "function_call":
        rest["tool_calls"] = [{"type": "function", "function": _call(said, where)}]
        return check_turn(rest | {"role": "assistant", "content": ""}, where)
    role = _SHAREGPT_ROLES.get(who, who) if isinstance(who, str) else who
    return check_turn(rest | {"role": role, "content": said}, where)


def _call(value: Any, where: str) -> Any:
    """The call that a `function_call` turn holds as JSON text, as LLaMA-Factory writes it."""
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        call = None
    if not isinstance(call, dict) or "name" not in call:
        raise BadRow(f"{where} is no function call: expected JSON with name and arguments")
    return call
