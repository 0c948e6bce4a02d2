"""Question–answer pairs out of a model's reply, and which of them are fit to learn from. Pure functions."""

import json
import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from typing import Any

from reward.language import marks
from reward.turns import BadRow, Message, text_of

# Characters of a question and of an answer.
_QUESTION_LENGTH = range(8, 401)
_ANSWER_LENGTH = range(2, 2001)

_INSTRUCTION = """\
Write {count} about facts in the passage, each with its answer.
A question must make sense to a reader who has never seen the passage, so name what it is about, and \
never mention the passage, text, document or author. An answer must be stated in the passage, complete \
and brief.
Reply with one JSON object and nothing else: {{"pairs": [{{"question": "…", "answer": "…"}}]}}

Passage:
{passage}"""

_QUESTION_END = re.compile(r"[?？؟][\"'”’)\s]*$")
_REFERENCE = re.compile(
    r"\b(?:the|this|that|these|given|provided|above|following)\s+"
    r"(?:(?:above|given|provided|following)\s+)?"
    r"(?:document|text|passage|paragraph|excerpt|article|snippet|context|author)s?\b"
    r"|\b(?:mentioned|described|stated|discussed|listed|shown|given) (?:above|below|here)\b"
    r"|\baccording to (?:it|them)\b",
    re.IGNORECASE,
)
_HAN = "\u3040-\u30ff\u3400-\u9fff"
_LETTER = rf"[^\W_{_HAN}]"
_NO_CONTENT = "a an the is are was were be been do does did s"
_ARTICLES = frozenset(_NO_CONTENT.split())
_NO_CONTENT += (
    " and or but if of in on at by to for from with as it its this that these those he she"
)
_NO_CONTENT += (
    " they his her their there which who what when where how why not no so than then also"
)
_NO_CONTENT += " can could will would has have had i we you into about over"
_EMPTY_WORDS = frozenset(_NO_CONTENT.split())

REASONS = {
    "unparsable reply": "the reply holds no JSON with pairs",
    "empty": "a question or an answer is missing, blank or no text",
    "no question": "it does not end with a question mark",
    "length": "the question or the answer is too short or too long",
    "refers to the text": "it speaks of the document, the passage, the text above…",
    "not grounded": "too few of the answer's content words are in the passage",
    "duplicate": "the same question was kept before, but for articles, case and marks",
}


def prompt_of(passage: str, count: int) -> list[Message]:
    """What the model is asked."""
    asked = "one question" if count == 1 else f"{count} different questions"
    return [{"role": "user", "content": _INSTRUCTION.format(count=asked, passage=passage)}]


def pairs_in(reply: str) -> list[Any] | None:
    """The items that a reply holds: a list, or an object with a list or with one pair.

    Words around the JSON, code fences and a thought before it are passed over.

    Returns:
        The items, unchecked; None if the reply cannot be read.
    """
    said = reply.rpartition("</think>")[2]
    for start in re.finditer(r"[{\[]", said):
        try:
            value, _ = json.JSONDecoder().raw_decode(said, start.start())
        except ValueError:
            continue
        except RecursionError:
            return None
        if isinstance(value, dict) and "question" in value:
            return [value]
        if isinstance(value, dict):
            value = next((item for item in value.values() if isinstance(item, list)), None)
        # "[1]" is a footnote of the words around
        if isinstance(value, list) and (not value or any(isinstance(i, dict) for i in value)):
            return value
    return None


def why_not(item: Any, passage: str, min_grounded: float, seen: set[tuple[str, ...]]) -> str | None:
    """Why a pair is not to be kept.

    Args:
        item: what should be an object with question and answer.
        passage: what it was made from.
        min_grounded: smallest share of the answer's content words that the passage must have.
        seen: `same_question` of the questions kept so far.

    Returns:
        A key of REASONS; None if the pair is good.
    """
    try:
        question, answer = (text_of(item, key).strip() for key in ("question", "answer"))
    except (BadRow, TypeError):  # TypeError: it is no object
        return "empty"
    if not _QUESTION_END.search(question):
        return "no question"
    if len(question) not in _QUESTION_LENGTH or len(answer) not in _ANSWER_LENGTH:
        return "length"
    if _REFERENCE.search(question) or _REFERENCE.search(answer):
        return "refers to the text"
    if grounded(answer, passage) < min_grounded:
        return "not grounded"
    return "duplicate" if same_question(question) in seen else None


def grounded(answer: str, passage: str) -> float:
    """Share of the answer's content words that the passage has, from 0 to 1.

    An answer without any, such as "Yes.", is measured by all its words.
    """
    known = set(_words(passage))
    words = set(_words(answer))
    wanted = words - _EMPTY_WORDS or words
    return len(wanted & known) / len(wanted) if wanted else 0.0


def same_question(question: str) -> tuple[str, ...]:
    """What is equal for questions that differ in articles, case and punctuation only."""
    return tuple(word for word in _words(question) if word not in _ARTICLES)


def _words(text: str) -> Iterator[str]:
    text = unicodedata.normalize("NFKC", text).casefold()
    return (found.group() for found in _word().finditer(text))


@cache
def _word() -> re.Pattern[str]:
    """A word, or one character of a script that puts no spaces between words."""
    return re.compile(rf"[{_HAN}]|{_LETTER}+(?:[{marks()}]+{_LETTER}*)*")
