"""The prompts of a source, each once, with what is known about the right answer."""

import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from conf.entry import UserError
from conf.passthrough import did_you_mean
from conf.schema import Source
from reward.answers import Answer
from reward.readers import parse
from reward.records import NORMALISERS, Conversation, Prompt, Record, detect
from reward.sources import open_rows
from reward.store import content_key
from reward.turns import BadRow, Message


@dataclass
class Asked:
    """A prompt, and all that the rows that hold it say of its answer."""

    prompt: list[Message]
    tools: list[Any] | None = None
    references: list[str] = field(default_factory=list)  # each text once; any of them is right
    facts: Mapping[str, Any] = field(default_factory=dict)  # further columns, of the first row

    def answered(
        self, text: str, tokens: int | None = None, is_ended: bool | None = None
    ) -> Answer:
        """What somebody wrote after it, as a reward sees it.

        Args:
            text: of the completion.
            tokens: its length, where it is known.
            is_ended: whether the model ended it by itself, where that is known.
        """
        return Answer(
            self.prompt, text, tuple(self.references), self.facts, self.tools, tokens, is_ended
        )


def key_of(prompt: list[Message], tools: list[Any] | None) -> str:
    """What is equal for equal prompts."""
    return content_key([prompt, tools])


def read_prompts(
    source: Source, where: str, max_bad_fraction: float
) -> tuple[dict[str, Asked], Counter[str]]:
    """The distinct prompts of a source by their key, in its order, the first `limit` of them.

    The rows after these are read too, which may hold further references of the same prompts. Where rows of one prompt
    differ in their facts, those of the first hold, and a warning says how many others there are.

    Args:
        source: rows of any format; what precedes the last answer is the prompt.
        where: the command's name, for messages.
        max_bad_fraction: share of rows that may be unusable.

    Returns:
        The prompts, and how many rows were `unusable`, `repeated` a prompt, or had `differing_facts`.

    Raises:
        UserError: when more rows are unusable, with the first reason, or there is none.
    """
    check_format(source.format)
    found: dict[str, Asked] = {}
    left_out = Counter(unusable=0, repeated=0)
    first, rows = "", 0
    for place, raw in open_rows(source, where):
        try:
            row = parse(raw)
            name = detect(row) if source.format == "auto" else source.format
            record = NORMALISERS[name](row)
            prompt = prompt_of(record)
        except BadRow as error:
            if error.kind == "blank_line":
                continue
            rows += 1
            left_out["unusable"] += 1
            first = first or f"{place}: {error}"
            continue
        rows += 1
        key = key_of(prompt.prompt, prompt.tools)
        facts = facts_of(record)
        if key in found:
            left_out["repeated"] += 1
            if facts != found[key].facts:
                left_out["differing_facts"] += 1
        elif len(found) == source.limit:
            continue
        asked = found.setdefault(key, Asked(prompt.prompt, prompt.tools, facts=facts))
        for reference in references_of(record):
            if reference not in asked.references:
                asked.references.append(reference)
    if left_out["unusable"] > max_bad_fraction * rows:
        raise UserError(
            f"{where}: {left_out['unusable']} of {rows} rows cannot be used, more than max_bad_fraction="
            f"{max_bad_fraction} allows; the first: {first}"
        )
    if not found:
        raise UserError(f"{where}: source={source.source!r} has no rows")
    if differing := left_out["differing_facts"]:
        print(
            f"warning: {where}: {differing:,} rows repeat a prompt with other facts; those of its first row hold",
            file=sys.stderr,
        )
    return found, left_out


def check_format(name: str) -> None:
    """Refuse a format that rows cannot have.

    Raises:
        UserError: with the nearest name and the list.
    """
    if name not in (*NORMALISERS, "auto"):
        hint = did_you_mean(name, [*NORMALISERS, "auto"])
        raise UserError(
            f"there is no format {name!r}.{hint} There are: auto, {', '.join(NORMALISERS)}"
        )


def prompt_of(record: Record) -> Prompt:
    """What the assistant is to answer: the turns before the last answer.

    Raises:
        BadRow: when nobody has asked anything.
    """
    turns = record.messages[:-1] if isinstance(record, Conversation) else record.prompt
    if turns[-1]["role"] not in ("user", "tool"):
        raise BadRow(f"before the answer is no turn of a user, but of {turns[-1]['role']!r}")
    return Prompt(turns, None, record.tools)


def as_prompt(record: Record) -> Prompt:
    """A record as a prompt, with what is known of the right answer: a prompt's own, or a demonstration's last turn.

    Raises:
        BadRow: when nobody has asked anything.
    """
    if isinstance(record, Prompt):
        return record
    return replace(prompt_of(record), reference=next(iter(references_of(record)), None))


def references_of(record: Record) -> list[str]:
    """The right answers that a record holds: a prompt's, or the last answer of a demonstration.

    An answer that was only preferred to another, or rated, is none.
    """
    if isinstance(record, Conversation):
        text = record.messages[-1]["content"]
        return [text] if text.strip() else []
    return record.references if isinstance(record, Prompt) else []


def facts_of(record: Record) -> Mapping[str, Any]:
    """The further columns of a record's row, where its format keeps them."""
    return record.facts if isinstance(record, Prompt) else {}
