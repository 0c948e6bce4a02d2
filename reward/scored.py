"""Scored or ranked completions out of raw rows: what preference pairs are made of.

A row may hold a prompt with all its completions and their scores (UltraFeedback's form, or parallel
lists with `scores` or `ranks`), or one completion with a `score` or KTO's `label`.
"""

from dataclasses import dataclass
from typing import Any

from reward.records import kto, number_of, score_name
from reward.store import canonical
from reward.turns import BadRow, Message, Row, kind_of, list_of, short

_LISTS = ("completions", "responses")
_TEXTS = ("text", "response", "content", "completion")
_RANKS = ("ranks", "ranking")


@dataclass(frozen=True)
class Scored:
    """A completion and how good it is: a higher score is better, on the data's own scale."""

    completion: list[Message]
    score: float
    place: str = ""  # the row that it comes from, such as `prefs.jsonl:17`
    is_label: bool = False  # the score is KTO's label, for want of a score


@dataclass
class Task:
    """A prompt with its completions."""

    prompt: list[Message]
    tools: list[Any] | None
    scored: list[Scored]
    is_whole: bool = True  # False: other rows may hold completions of the same prompt

    @property
    def key(self) -> str:
        """What is equal for equal prompts."""
        return canonical([self.prompt, self.tools])


def task_of(row: Row, place: str) -> Task:
    """The prompt and the scored completions of a raw row.

    Ranks become scores of the other sign, so that a higher score is better.

    Raises:
        BadRow: with the reason.
    """
    common = {key: row[key] for key in ("prompt", "system", "history", "tools") if key in row}
    common.setdefault("prompt", row.get("instruction"))
    name = next((key for key in _LISTS if row.get(key) is not None), None)
    if name is None:
        answers, scores, places = [row.get("completion")], [_flat_score(row)], [place]
    else:
        items = list_of(row, name)
        answers, scores = [_text(item) for item in items], _scores(row, items)
        places = [f"{place}#{number}" for number in range(1, len(items) + 1)]
        if all(score is None for score in scores):
            raise BadRow("no completion has a score", "missing_field")
    is_label = name is None and row.get("score") in (None, "")
    scored, prompt, tools = [], [], None
    for answer, score, where in zip(answers, scores, places, strict=True):
        if score is None:
            continue
        try:
            rated = kto(common | {"completion": answer, "label": True})
        except BadRow as error:
            number = where.removeprefix(place).replace("#", "completion ")
            raise BadRow(f"{number}: {error}" if number else str(error), error.kind) from None
        prompt, tools = rated.prompt, rated.tools
        scored.append(Scored(rated.completion, score, where, is_label))
    return Task(prompt, tools, scored, is_whole=name is not None)


def _flat_score(row: Row) -> float | None:
    """The score, or else the label; None if there is none for what `reward.score` wrote null."""
    if row.get("completion") is None:
        raise BadRow(
            f"it has no {', '.join(map(repr, _LISTS))} or 'completion'; its keys are "
            f"{', '.join(map(short, list(row)[:8])) or 'none'}",
            "unknown_format",
        )
    if row.get("score") not in (None, ""):
        return number_of(row["score"], "'score'")
    if row.get("label") in (None, ""):
        if "score" in row:
            return None
        raise BadRow("'completion' has neither 'score' nor 'label'", "missing_field")
    return float(kto(row).label)


def _text(item: Any) -> Any:
    """A completion's text or messages."""
    if not isinstance(item, dict):
        return item
    return next((item[key] for key in _TEXTS if item.get(key) is not None), None)


def _scores(row: Row, items: list[Any]) -> list[float | None]:
    """A score for each completion: from lists beside it, or from its own fields."""
    name = next((key for key in ("scores", *_RANKS) if row.get(key) is not None), None)
    if name is None:
        own = score_name(items)
        return [_own_score(item, own, number) for number, item in enumerate(items, 1)]
    values = list_of(row, name)
    if len(values) != len(items):
        raise BadRow(f"{name!r} has {len(values)} values for {len(items)} completions")
    numbers = [number_of(value, f"{name!r} value {i}") for i, value in enumerate(values, 1)]
    if name == "scores":
        return [*numbers]
    if min(numbers) < 1:  # places in a sorted list count from 0 and mean something else
        raise BadRow(f"{name!r} holds {min(numbers):g}; ranks count from 1, which is the best")
    return [-number for number in numbers]


def _own_score(item: Any, name: str, number: int) -> float | None:
    """A completion's score; None where `python -m reward.score` found it too long to be scored."""
    where = f"completion {number}"
    if not isinstance(item, dict):
        found = f"{where} is {kind_of(item)} and there is no list"
        raise BadRow(f"{found} 'scores' or 'ranks' beside it", "missing_field")
    value = item.get(name)
    if value is None and "score" in item:
        return None
    return number_of(value, f"the score of {where}")
