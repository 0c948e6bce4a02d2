"""From raw rows to records on disk: parsed, normalised and looked through by worker processes.

The set is never whole in memory. Records and their texts go to an Arrow file, batch by batch; what
stays is one `FACTS` entry a record (about 80 bytes), from which sets are compared and rows chosen.
"""

import contextlib
import gc
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from itertools import chain, islice
from typing import Any

import orjson
from xxhash import xxh3_64_intdigest

from reward import language, private
from reward.duplicates import SEPARATOR
from reward.findings import KINDS, Finding
from reward.prompts import as_prompt
from reward.readers import Line, parse
from reward.records import (
    NORMALISERS,
    Conversation,
    Preference,
    Rated,
    Record,
    detect,
    number_of,
)
from reward.turns import BadRow, Message, Row
from reward.workers import in_order, workers

FIELD = SEPARATOR  # joins the fields of a record's text
FACTS = [
    ("row", "i8"),  # place in the source, from 0
    ("text", "u8"),  # hashes: of the whole record; and without case and spaces,
    ("prompt", "u8"),  # of the prompt,
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
    ("group", "u8"),  # hash of the value to balance by, 0 for none
    ("mended", "u1"),  # REPAIRED and MASKED, added
]

REPAIRED, MASKED = 1, 2

_NAN = float("nan")
_CHUNK = 4000  # rows; RE2 compiles its patterns anew for each chunk
_INLINE = _CHUNK  # fewer rows are not worth the start of worker processes (about a second)


@dataclass(frozen=True)
class Reading:
    """How rows are read and what is mended on the way."""

    format: str | None = None  # None until the first usable row has told
    is_detected: bool = True
    as_prompts: bool = False  # of every record, only what was asked
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


@dataclass(slots=True)
class _Item:
    """A row that became a record."""

    number: int
    place: str
    row: Row
    record: Record
    line: bytes
    text: str
    prompt: int  # hashes, taken before anything is mended: a split must not depend on cleaning
    opening: int
    mended: int = 0


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
    items: list[_Item] = []
    for number, (place, raw) in chunk:
        try:
            row = parse(raw)
            name, record = _normalise(row, batch.format, reading)
            items.append(_item(number, place, row, record))
        except (BadRow, RecursionError) as error:
            batch.findings.append(_left_out(number, place, error))
            continue
        batch.format = name
    _look_through(batch, items)
    if reading.repair or reading.mask:
        items = _mend(batch, items, reading)
    batch.records = [item.line for item in items]
    batch.texts = [item.text for item in items]
    batch.facts = [_facts(item, reading) for item in items]
    return batch


def _item(number: int, place: str, row: Row, record: Record) -> _Item:
    prompt = parts(record)[0]
    text = text_of(record)
    question = next((turn["content"] for turn in prompt if turn["role"] == "user"), "")
    asked = _plain(question)
    is_all = len(prompt) == 1
    whole = asked if is_all else _plain(_text(prompt))
    return _Item(number, place, row, record, canonical(record), text, whole, asked)


def _left_out(number: int, place: str, error: Exception) -> Finding:
    kind = error.kind if isinstance(error, BadRow) else "wrong_type"
    reason = str(error) if isinstance(error, BadRow) else "it is nested too deeply"
    return Finding(number, kind, KINDS[kind].severity, f"{place}: {reason}")


def canonical(record: Record) -> bytes:
    """One line of JSON, the same for equal records; fields that say nothing are left out.

    Raises:
        BadRow: if a field holds what JSON cannot.
    """
    fields = {key: value for key, value in vars(record).items() if value not in (None, {})}
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


def _normalise(row: Row, name: str | None, reading: Reading) -> tuple[str, Record]:
    """The format and the record of a row; `name` is None until a first row was usable."""
    name = name or detect(row)
    record = NORMALISERS[name](row)
    # A normaliser may fit a row of another format too (a pair has a prompt) and drop half of it.
    if reading.is_detected and (found := detect(row)) != name:
        raise BadRow(
            f"it looks like format {found!r}, the rows before it like {name!r}", "unknown_format"
        )
    return name, as_prompt(record) if reading.as_prompts else record


def _look_through(batch: Batch, items: list[_Item]) -> None:
    """Findings that a record's own text gives."""

    def add(kind: str, index: int, detail: str) -> None:
        finding = Finding(items[index].number, kind, KINDS[kind].severity, detail)
        batch.findings.append(finding)

    texts = [item.text for item in items]
    for index, detail in language.mojibake(texts):
        add("mojibake", index, detail)
    found: dict[tuple[int, str], list[str]] = {}
    for span in private.find(texts):
        kind = "secret" if span.kind == "secret" else "pii"
        found.setdefault((span.index, kind), []).append(f"{span.kind} {_shown(span.text)}")
    for (index, kind), what in found.items():
        add(kind, index, ", ".join(what))
    answers = [text.split(FIELD)[1] if FIELD in text else "" for text in texts]
    for index, detail in language.refusals(answers):
        add("refusal", index, detail)


def _shown(text: str) -> str:
    """Enough of a private piece to find it in its row: reports travel further than data."""
    return f"{text[:3]}…{text[-2:]}" if len(text) > 8 else f"{text[:2]}…"


def _masked(text: str) -> str:
    return private.mask(text, private.find([text]))


def _mend(batch: Batch, items: list[_Item], reading: Reading) -> list[_Item]:
    """Repair and mask what was found; the items that are still records afterwards."""
    steps: list[tuple[int, set[str], Callable[[str], str]]] = []
    if reading.repair:
        steps.append((REPAIRED, {"mojibake"}, language.repair))
    if reading.mask:
        steps.append((MASKED, {"pii", "secret"}, _masked))
    for flag, kinds, change in steps:
        rows = {finding.row for finding in batch.findings if finding.kind in kinds}
        for item in items:
            if item.number in rows:
                for turns in parts(item.record):
                    for turn in turns:
                        _change(turn, change)
                if (line := canonical(item.record)) != item.line:
                    item.mended |= flag
                    item.line, item.text = line, text_of(item.record)
    kept = []
    for item in items:
        try:  # two answers may have become one
            if item.mended:
                row = orjson.loads(item.line)
                NORMALISERS[detect(row)](row)
            kept.append(item)
        except BadRow as error:
            mended = BadRow(f"after mending, {error}", error.kind)
            batch.findings.append(_left_out(item.number, item.place, mended))
    return kept


def _change(turn: Message, change: Callable[[str], str]) -> None:
    """Change the texts of a message, those in its tool calls too."""
    for key in ("content", "tool_calls", "reasoning_content"):
        if key in turn:
            turn[key] = _changed(turn[key], change)


def _changed(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, list):
        return [_changed(item, change) for item in value]
    if isinstance(value, dict):
        return {key: _changed(item, change) for key, item in value.items()}
    return value


def _facts(item: _Item, reading: Reading) -> tuple[Any, ...]:
    prompt, *answers = item.text.split(FIELD)
    record = item.record
    turns = parts(record)
    hashes = [_without_spaces(answer.encode()) for answer in answers]
    ordered = sorted(hashes)
    lengths = [*map(len, answers), 0, 0]
    margin = record.margin if isinstance(record, Preference) else None
    return (
        item.number,
        xxh3_64_intdigest(item.line),
        item.prompt,
        item.opening,
        _mixed(item.prompt, *ordered),
        hashes == ordered if len(answers) == 2 else getattr(record, "label", False),
        len(prompt),
        lengths[0],
        lengths[1],
        len(turns[0]) + len(turns[1] if answers else ()),
        _examples(record),
        _NAN if margin is None else margin,
        _column_score(item.row, reading.score) if reading.score else _NAN,
        _group(item.row, reading.balance) if reading.balance else 0,
        item.mended,
    )


def _mixed(*hashes: int) -> int:
    return hash(hashes) & 0xFFFF_FFFF_FFFF_FFFF  # Python salts the hashes of texts, not of numbers


def _plain(text: str) -> int:
    """The hash of a text without case and spaces."""
    if not text.isascii():
        text = "".join(text.split())
    return _without_spaces(text.lower().encode("utf-8", "surrogatepass"))


def _without_spaces(text: bytes) -> int:
    digest: int = xxh3_64_intdigest(text.translate(None, b" \t\n\r\v\f"))
    return digest


def _group(row: Row, column: str) -> int:
    """The hash of the value of the column to balance by; 0 where there is none."""
    value = row.get(column)
    return 0 if value is None else _plain(str(value))


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
