"""Load feedback: raw rows become records, every row that cannot be used is counted and named."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass

from conf.entry import UserError
from conf.passthrough import did_you_mean
from conf.schema import Data
from reward import sources
from reward.records import (
    KINDS,
    NORMALISERS,
    Conversation,
    Preference,
    Prompt,
    Record,
    detect,
)
from reward.turns import BadRow, Row

_SHOWN_PROBLEMS = 5

# What to say when a stage is given records of another kind.
_NEEDS = {
    "sft": "demonstrations (messages, sharegpt, alpaca, completion or qa)",
    "preference": "pairs of a chosen and a rejected answer (preference, preference_implicit or hh)",
    "prompts": "prompts alone (prompt)",
}


@dataclass(frozen=True)
class Problem:
    """A row that cannot be used."""

    where: str  # file and line, such as `prefs.jsonl:17`
    reason: str


@dataclass(frozen=True)
class Loaded:
    """The records of a source, and what was dropped on the way."""

    records: list[Record]
    rows: int  # rows read, usable or not
    dropped: list[Problem]
    format: str  # a name in NORMALISERS
    fingerprint: str  # 16 hexadecimal digits that name the records, whatever their file and format
    source: str


def load(data: Data, kind: str, where: str = "data") -> Loaded:
    """Read the first `data.limit` usable rows of a source.

    Args:
        data: which rows, and how many may be unusable.
        kind: what the stage trains on, a key of KINDS.
        where: the dotted path of `data` in the config, such as `dpo.data`, for messages.

    Raises:
        UserError: if the source cannot be read, holds nothing usable or another kind of feedback,
            or if more rows are unusable than `data.max_bad_fraction` allows.
    """
    _check(data, where)
    is_detected = data.format == "auto"
    name = None if is_detected else data.format
    records: list[Record] = []
    dropped: list[Problem] = []
    digest = hashlib.sha256()
    for place, row in sources.open_rows(data, where):
        try:
            record_name, record = _record(row, name, is_detected)
            line = _canonical(record)
        except BadRow as error:
            dropped.append(Problem(place, str(error)))
            continue
        except RecursionError:
            dropped.append(Problem(place, "it is nested too deeply"))
            continue
        name = record_name
        if not isinstance(record, KINDS[kind]):
            raise UserError(_wrong_kind(data, kind, name, where))
        records.append(record)
        digest.update(line)
        if len(records) == data.limit:
            break
    rows = len(records) + len(dropped)
    if name is None or not records or len(dropped) / rows > data.max_bad_fraction:
        raise UserError(_too_bad(data, rows, dropped, where))
    return Loaded(records, rows, dropped, name, digest.hexdigest()[:16], data.source)


def to_trl(records: list[Record]) -> list[Row]:
    """The rows that TRL's trainers read, all in its conversational form.

    A conversation becomes one row for each assistant turn, with all earlier turns as the prompt. So
    the loss falls on every assistant turn and on nothing else, whatever the chat template is; the
    alternative, TRL's `assistant_only_loss`, needs a template with generation markers, which most
    models lack. The price is that a conversation of n answers is read n times.
    """
    return [row for record in records for row in _rows_of(record)]


def _check(data: Data, where: str) -> None:
    if not data.source:
        raise UserError(f"{where}.source must be set")
    formats = ("auto", *NORMALISERS)
    if data.format not in formats:
        raise UserError(
            f"{where}.format: there is no format {data.format!r}."
            f"{did_you_mean(data.format, formats)} There are: {', '.join(formats)}"
        )
    if data.limit is not None and data.limit < 1:
        raise UserError(f"{where}.limit={data.limit} must be at least 1; null takes every row")
    if not 0 <= data.max_bad_fraction <= 1:
        fraction = f"{where}.max_bad_fraction={data.max_bad_fraction}"
        raise UserError(f"{fraction} must lie between 0 and 1")


def _record(row: Row | BadRow, name: str | None, is_detected: bool) -> tuple[str, Record]:
    """The format and the record of a row; `name` is None until a first row was usable."""
    if isinstance(row, BadRow):
        raise row
    name = name or detect(row)
    record = NORMALISERS[name](row)
    # A normaliser may fit a row of another format too (a pair has a prompt) and drop half of it.
    if is_detected and (found := detect(row)) != name:
        raise BadRow(f"it looks like format {found!r}, the rows before it like {name!r}")
    return name, record


def _canonical(record: Record) -> bytes:
    """One line of JSON, equal for equal records."""
    text = json.dumps(vars(record), sort_keys=True, separators=(",", ":"), default=str)
    return text.encode() + b"\n"


def _wrong_kind(data: Data, kind: str, name: str, where: str) -> str:
    found = "was detected" if data.format == "auto" else "was asked for"
    return (
        f"{where}.source={data.source!r}: format {name!r} {found}, but this stage needs "
        f"{_NEEDS[kind]}. Choose another source, or another reading with {where}.format"
    )


def _too_bad(data: Data, rows: int, dropped: list[Problem], where: str) -> str:
    """Why a source cannot be used, with the places of its first problems."""
    if not rows:
        return f"{where}.source={data.source!r} has no rows"
    shown = "; ".join(f"{p.where}: {p.reason}" for p in dropped[:_SHOWN_PROBLEMS])
    if len(dropped) > _SHOWN_PROBLEMS:
        shown += f"; and {len(dropped) - _SHOWN_PROBLEMS} more"
    share = -(-1000 * len(dropped) // rows) / 1000  # rounded up, so that it is enough
    remedy = f"Fix the rows, or drop them with {where}.max_bad_fraction={share:g}"
    if len(dropped) == rows:
        remedy = f"Fix the rows, or say how to read them with {where}.format=…"
    return (
        f"{len(dropped)} of {rows} rows in {data.source} cannot be used "
        f"(limit {100 * data.max_bad_fraction:g} %): {shown}. {remedy}"
    )


def _rows_of(record: Record) -> Iterator[Row]:
    match record:
        case Conversation(turns):
            for at, turn in enumerate(turns):
                if turn["role"] == "assistant":
                    yield {"prompt": turns[:at], "completion": [turn]}
        case Preference(prompt, chosen, rejected, margin):
            row: Row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
            yield row if margin is None else row | {"margin": margin}
        case Prompt(turns, reference):
            row = {"prompt": turns}
            yield row if reference is None else row | {"reference": reference}
