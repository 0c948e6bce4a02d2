"""From raw rows to records on disk: parsed, normalised and looked through by worker processes.

The set is never whole in memory. Records and their texts go to an Arrow file, batch by batch; what
stays is one `FACTS` entry a record (about 80 bytes), from which sets are compared and rows chosen.
"""

import contextlib
import gc
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import orjson
from xxhash import xxh3_64_intdigest

from reward import language, private
from reward.findings import KINDS, Finding
from reward.records import (
    NORMALISERS,
    Conversation,
    Preference,
    Rated,
    Record,
    detect,
    number_of,
)
from reward.sources import Line, parse
from reward.turns import BadRow, Message, Row
from reward.workers import in_order, workers

FIELD = "\x1e"  # ASCII's record separator joins the fields of a record's text
FACTS = [
    ("row", "i8"),  # place in the source, from 0
    ("text", "u8"),  # hashes: of the whole text,
    ("prompt", "u8"),  # of the prompt without case and spacing,
    ("opening", "u8"),  # of the first user turn,
    ("pair", "u8"),  # of the prompt and its two answers in either order (or its one answer);
    ("side", "?"),  # which of the two orders, or labels, it is
    ("prompt_chars", "i4"),
    ("answer_chars", "i4"),  # chosen, for a pair
    ("rejected_chars", "i4"),
    ("turns", "i4"),
    ("examples", "i4"),  # assistant turns to learn from
    ("margin", "f8"),
    ("score", "f8"),  # of the column that was asked for
    ("group", "u8"),  # hash of the value to balance by
]

_NAN = float("nan")
_CHUNK = 4000  # rows; RE2 compiles its patterns anew for each chunk
_INLINE = _CHUNK  # fewer rows are not worth the start of worker processes (about a second)


@dataclass(frozen=True)
class Reading:
    """How rows are read and what is mended on the way."""

    format: str | None = None  # None until the first usable row has told
    is_detected: bool = True
    repair: bool = False
    mask: bool = False
    score: str | None = None  # columns to keep besides the record
    balance: str | None = None


@dataclass
class Batch:
    """What a chunk of rows gave."""

    start: int
    rows: int
    format: str | None = None
    records: list[bytes] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    facts: list[tuple[Any, ...]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    repaired: int = 0
    masked: int = 0


def batches(
    lines: Iterable[Line], reading: Reading, limit: int | None, start: int
) -> Iterator[Batch]:
    """Read rows until `limit` records are there, in their order; many rows are read in parallel.

    Args:
        lines: from `reward.sources.open_rows`.
        reading: how to read them.
        limit: usable rows to read, None for all.
        start: number of the first row.
    """
    numbered = enumerate(lines, start)
    chunks = iter(lambda: list(islice(numbered, _CHUNK)), [])
    usable = 0
    for batch in _read_all(chunks, reading):
        surplus = 0 if limit is None else usable + len(batch.records) - limit
        if surplus >= 0 and limit is not None:
            yield _cut(batch, len(batch.records) - surplus)
            return
        usable += len(batch.records)
        yield batch


def _read_all(chunks: Iterator[list[tuple[int, Line]]], reading: Reading) -> Iterator[Batch]:
    """The first rows here, which tells the format; the rest in worker processes if there is much."""
    seen = 0
    for chunk in chunks:
        batch = read(chunk, reading)
        reading = replace(reading, format=batch.format)
        seen += len(chunk)
        yield batch
        if reading.format and seen >= _INLINE:
            break
    if (rest := next(chunks, None)) is None:
        return
    with workers() as pool:
        yield from in_order(pool, read, ((chunk, reading) for chunk in chain([rest], chunks)))


@contextlib.contextmanager
def _without_collection() -> Iterator[None]:
    """Spare the search for cycles of objects, a third of the time: rows make very many and no cycle."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@_without_collection()
def read(chunk: list[tuple[int, Line]], reading: Reading) -> Batch:
    """Parse, normalise and look through some rows."""
    batch = Batch(chunk[0][0], len(chunk), reading.format)
    records: list[Record] = []
    kept: list[tuple[int, Row]] = []
    for number, (place, raw) in chunk:
        try:
            row = parse(raw)
            name, record = _normalise(row, batch.format, reading.is_detected)
            line = canonical(record)
        except (BadRow, RecursionError) as error:
            kind = error.kind if isinstance(error, BadRow) else "wrong_type"
            reason = str(error) if isinstance(error, BadRow) else "it is nested too deeply"
            batch.findings.append(Finding(number, kind, KINDS[kind].severity, f"{place}: {reason}"))
            continue
        batch.format = name
        records.append(record)
        kept.append((number, row))
        batch.records.append(line)
        batch.texts.append(text_of(record))
    _look_through(batch, records, [number for number, _ in kept])
    if reading.repair or reading.mask:
        _mend(batch, records, reading, [number for number, _ in kept])
    batch.facts = [
        _facts(number, row, record, text, reading)
        for (number, row), record, text in zip(kept, records, batch.texts, strict=True)
    ]
    return batch


def canonical(record: Record) -> bytes:
    """One line of JSON, the same for equal records; fields that say nothing are left out.

    Raises:
        BadRow: if a field holds what JSON cannot.
    """
    fields = {key: value for key, value in vars(record).items() if value is not None}
    try:
        return orjson.dumps(fields, default=str, option=orjson.OPT_SORT_KEYS)
    except TypeError as error:
        raise BadRow(f"it cannot be written as JSON: {error}") from error


def text_of(record: Record) -> str:
    """What a record says: its fields (prompt, then answers) joined by `FIELD`, turns by line breaks."""
    return FIELD.join([_text(part) for part in parts(record)])


def parts(record: Record) -> tuple[list[Message], ...]:
    """The prompt, and the answers to it: none for a prompt alone, two for a pair."""
    if isinstance(record, Preference):
        return record.prompt, record.chosen, record.rejected
    if isinstance(record, Conversation):
        return record.messages[:-1], record.messages[-1:]
    return (record.prompt, record.completion) if isinstance(record, Rated) else (record.prompt,)


def _text(turns: list[Message]) -> str:
    said = []
    for turn in turns:
        said.append(turn["content"])
        if calls := turn.get("tool_calls"):
            said.append(orjson.dumps(calls, default=str).decode())
    text = said[0] if len(said) == 1 else "\n".join(said)
    return text.replace(FIELD, " ") if FIELD in text else text


def _normalise(row: Row, name: str | None, is_detected: bool) -> tuple[str, Record]:
    """The format and the record of a row; `name` is None until a first row was usable."""
    name = name or detect(row)
    record = NORMALISERS[name](row)
    # A normaliser may fit a row of another format too (a pair has a prompt) and drop half of it.
    if is_detected and (found := detect(row)) != name:
        raise BadRow(
            f"it looks like format {found!r}, the rows before it like {name!r}", "unknown_format"
        )
    return name, record


def _look_through(batch: Batch, records: list[Record], rows: list[int]) -> None:
    """Findings that a record's own text gives."""

    def add(kind: str, index: int, detail: str) -> None:
        batch.findings.append(Finding(rows[index], kind, KINDS[kind].severity, detail))

    for index, detail in language.mojibake(batch.texts):
        add("mojibake", index, detail)
    found: dict[tuple[int, str], list[str]] = {}
    for span in private.find(batch.texts):
        kind = "secret" if span.kind == "secret" else "pii"
        found.setdefault((span.index, kind), []).append(f"{span.kind} {_shown(span.text)}")
    for (index, kind), what in found.items():
        add(kind, index, ", ".join(what))
    answers = [answer.split(FIELD)[1] if FIELD in answer else "" for answer in batch.texts]
    for index, detail in language.refusals(answers):
        add("refusal", index, detail)


def _shown(text: str) -> str:
    """Enough of a private piece to find it in its row: reports travel further than data."""
    return f"{text[:3]}…{text[-2:]}" if len(text) > 8 else f"{text[:2]}…"


def _masked(text: str) -> str:
    return private.mask(text, private.find([text]))


def _mend(batch: Batch, records: list[Record], reading: Reading, rows: list[int]) -> None:
    """Repair and mask the records that have something to mend."""
    by_row = {row: index for index, row in enumerate(rows)}
    steps = []
    if reading.repair:
        steps.append(("repaired", {"mojibake"}, language.repair))
    if reading.mask:
        steps.append(("masked", {"pii", "secret"}, _masked))
    for counter, kinds, change in steps:
        affected = {by_row[f.row] for f in batch.findings if f.kind in kinds and f.row in by_row}
        for index in affected:
            for turns in parts(records[index]):
                for turn in turns:
                    turn["content"] = change(turn["content"])
            batch.records[index] = canonical(records[index])
            batch.texts[index] = text_of(records[index])
        setattr(batch, counter, getattr(batch, counter) + len(affected))


def _facts(number: int, row: Row, record: Record, text: str, reading: Reading) -> tuple[Any, ...]:
    prompt, *answers = text.split(FIELD)
    turns = parts(record)
    first = turns[0][0]["content"] if len(turns[0]) == 1 else _first_question(turns[0])
    plain = _plain(prompt)
    hashes = [xxh3_64_intdigest(answer.encode()) for answer in answers]
    ordered = sorted(hashes)
    lengths = [*map(len, answers), 0, 0]
    margin = record.margin if isinstance(record, Preference) else None
    return (
        number,
        _mixed(xxh3_64_intdigest(prompt.encode()), *hashes),
        plain,
        plain if first == prompt else _plain(first),
        _mixed(plain, *ordered),
        hashes == ordered if len(answers) == 2 else getattr(record, "label", False),
        len(prompt),
        lengths[0],
        lengths[1],
        len(turns[0]) + len(turns[1] if answers else ()),
        _examples(record),
        _NAN if margin is None else margin,
        _column_score(row, reading.score) if reading.score else _NAN,
        _plain(str(row.get(reading.balance))) if reading.balance else 0,
    )


def _mixed(*hashes: int) -> int:
    return hash(hashes) & 0xFFFF_FFFF_FFFF_FFFF  # Python salts the hashes of texts, not of numbers


def _plain(text: str) -> int:
    """The hash of a text without case and (ASCII's) spaces."""
    digest: int = xxh3_64_intdigest(text.lower().encode().translate(None, b" \t\n\r\v\f"))
    return digest


def _first_question(turns: list[Message]) -> str:
    return next((turn["content"] for turn in turns if turn["role"] == "user"), "")


def _examples(record: Record) -> int:
    if isinstance(record, Conversation):
        return sum(turn["role"] == "assistant" for turn in record.messages)
    return 1


def _column_score(row: Row, column: str) -> float:
    """The value of the score column; NaN where there is none."""
    with contextlib.suppress(BadRow):
        return number_of(row.get(column), column)
    return _NAN


def _cut(batch: Batch, count: int) -> Batch:
    """The batch up to its `count`-th record."""
    end = batch.facts[count - 1][0] + 1
    return replace(
        batch,
        rows=end - batch.start,
        records=batch.records[:count],
        texts=batch.texts[:count],
        facts=batch.facts[:count],
        findings=[finding for finding in batch.findings if finding.row < end],
    )
