"""Rows out of files: JSON Lines, JSON, CSV, Parquet. A fault costs its row, not the file.

Read with the standard library, and with pyarrow for Parquet: a preflight check must not wait for
`datasets`.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from conf.entry import UserError
from reward.records import detect
from reward.turns import BadRow, Row

# A row as it is read: bytes are a line of JSON that nobody has parsed yet, so that worker processes
# can do it.
Raw = Row | BadRow | bytes
Line = tuple[str, Raw]  # with its place, such as `prefs.jsonl:17`
Numbered = tuple[int, Raw]

_CSV_FIELD_LIMIT = 1 << 30  # Python stops at 128 KiB, which long conversations exceed
# Of an integer beyond 64 bits, orjson makes a float. A regular expression would take six times as long to find one.
_ZEROS = bytes.maketrans(b"123456789", b"000000000")
_LONG_NUMBER = b"0" * 19


def read_file(path: Path) -> Iterator[Numbered]:
    """The rows of a file with their numbers (of lines, where it has lines) from 1.

    Raises:
        UserError: if no row can be told from the next.
    """
    reader = _READERS[path.name.lower().removesuffix(".gz").rpartition(".")[2]]
    try:
        with _open(path) as file:
            yield from reader(file)
    except (OSError, EOFError, ValueError, NotImplementedError, csv.Error, zlib.error) as error:
        raise unreadable(path, error) from error


def unreadable(path: str | Path, error: Exception) -> UserError:
    """What to say of a file or folder that cannot be read, and how to put it right."""
    return UserError(f"cannot read {path}: {_reason(error)}. {_fix(error)}")


def _reason(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    return str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__


def _fix(error: Exception) -> str:
    if isinstance(error, PermissionError):
        return "Make it readable, or choose another source"
    if isinstance(error, json.JSONDecodeError):
        return "Mend it there, or write an object a line (.jsonl): then a broken line stands alone"
    if isinstance(error, _BrokenFile):
        return error.fix
    return "Fetch or write the file again, if it is damaged"


class _BrokenFile(ValueError):
    """A file of which no row can be told from the next, and what to do about it."""

    def __init__(self, reason: str, fix: str) -> None:
        super().__init__(reason)
        self.fix = fix


def _open(path: Path) -> BinaryIO:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]  # a GzipFile reads like one
    return path.open("rb")


def _read_jsonl(file: BinaryIO) -> Iterator[Numbered]:
    """One object a line. A binary file splits at line feeds alone: text may hold U+2028."""
    for number, line in enumerate(file, 1):
        yield number, line.removeprefix(codecs.BOM_UTF8) if number == 1 else line


def parse(raw: Raw) -> Row:
    """The row of what a source gave.

    Raises:
        BadRow: when it is no row, with the reason.
    """
    if isinstance(raw, BadRow):
        raise raw
    if not isinstance(raw, bytes):
        return raw
    try:
        if _LONG_NUMBER not in raw.translate(_ZEROS):
            return _object(orjson.loads(raw))
    except orjson.JSONDecodeError:
        pass
    if not raw.strip():
        raise BadRow("the line is blank", "blank_line")
    try:  # slower, with better reasons and exact integers
        return _object(_loads(raw.rstrip(b"\r\n").decode()))
    except UnicodeDecodeError as error:
        raise BadRow(f"it is not UTF-8 text (byte {error.start + 1})", "broken_line") from None
    except json.JSONDecodeError as error:
        reason = f"it is not JSON: {error.msg} (column {error.colno})"
        if error.msg == "Extra data":
            reason = f"there is more than one JSON value on the line (column {error.colno})"
        raise BadRow(reason, "broken_line") from None
    except ValueError as error:
        raise BadRow(f"it is not JSON: {str(error)[:80]}", "broken_line") from None
    except RecursionError:
        raise BadRow("it is nested too deeply", "broken_line") from None


def _loads(text: str) -> Any:
    return json.loads(text, parse_constant=_reject_constant)


def _reject_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON value")


def _object(value: Any) -> Row:
    if not isinstance(value, dict):
        raise BadRow("it is not an object with keys and values", "broken_line")
    return value


def _read_json(file: BinaryIO) -> Iterator[Numbered]:
    """A list of objects, an object that holds only such a list, one object, or JSON Lines.

    Rows are cut out as they are written and parsed one by one, so that a fault in one is its own.
    """
    content = file.read().removeprefix(codecs.BOM_UTF8)
    text = content.decode(errors="surrogateescape")
    start = _after_space(text, 0)
    if text.startswith("[", start):
        yield from enumerate(_items(text, start), 1)
    elif (value := _only_object(text, start)) is None:
        yield from _read_jsonl(io.BytesIO(content))
    elif _is_wrapper(value):
        _, end = _SCAN.raw_decode(text, text.index('"', start))  # the key
        yield from enumerate(_items(text, text.index("[", end), "}"), 1)
    else:
        yield 1, content


# Finds where a value ends; what it makes of it is not used. Python refuses to read long integers.
_SCAN = json.JSONDecoder(parse_int=str, parse_float=str)
_SPACE = re.compile(r"[ \t\r\n]*")  # JSON's own, which is less than Python's


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return match.end() if match else at


def _only_object(text: str, start: int) -> Row | None:
    """The object that is all of a text; None when it is something else, such as lines of them."""
    try:
        value, end = _SCAN.raw_decode(text, start)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) and _after_space(text, end) == len(text) else None


def _is_wrapper(value: Row) -> bool:
    """Whether an object only holds the rows, as in `{"data": [...]}`, and is none itself."""
    items = next(iter(value.values()), None)
    if len(value) != 1 or not isinstance(items, list):
        return False
    if items and not any(isinstance(item, dict) for item in items):
        return False
    try:
        detect(value)
    except BadRow:
        return True
    return False


def _items(text: str, start: int, closing: str = "") -> Iterator[bytes]:
    """The items of the JSON list at `start`, as they are written; `closing` ends what is around it.

    Raises:
        ValueError: if the text is no such list.
    """
    at = _after_space(text, start + 1)
    number = 0
    while number or not text.startswith("]", at):
        number += 1
        try:
            _, end = _SCAN.raw_decode(text, at)
        except RecursionError as error:
            raise _BrokenFile(f"item {number} is nested too deeply", "Remove the item") from error
        yield text[at:end].encode(errors="surrogateescape")
        at = _after_space(text, end)
        if not text.startswith(",", at):
            break
        at = _after_space(text, at + 1)
    for mark in "]" + closing:
        if not text.startswith(mark, at):
            raise json.JSONDecodeError(f"Expecting ',' or {mark!r}", text, at)
        at = _after_space(text, at + 1)
    if at < len(text):
        raise json.JSONDecodeError("Extra data", text, at)


def _read_csv(file: BinaryIO) -> Iterator[Numbered]:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    with io.TextIOWrapper(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
        lines = _Lines(text)
        reader = csv.reader(lines, strict=True)
        header = _csv_header(reader)
        while True:
            lines.begin_row()
            start = lines.number + 1  # a quoted field may span lines; a row is named by its first
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as error:
                lines.return_all_but_first()
                yield start, BadRow(f"it is not CSV: {error}", "broken_line")
                continue
            if cells:
                yield start, _csv_row(header, cells)


class _Lines:
    """Lines that can be given back: after an open quote, the reader has taken later rows for text."""

    def __init__(self, text: Iterable[str]) -> None:
        self.number = 0  # of the line that was read last, from 1
        self._text = iter(text)
        self._row: list[str] = []
        self._returned: list[str] = []  # the next one last

    def __iter__(self) -> "_Lines":
        return self

    def __next__(self) -> str:
        line = self._returned.pop() if self._returned else next(self._text)
        self.number += 1
        self._row.append(line)
        return line

    def begin_row(self) -> None:
        self._row.clear()

    def return_all_but_first(self) -> None:
        again = self._row[1:]
        self.number -= len(again)
        self._returned += reversed(again)


def _csv_header(reader: Iterator[list[str]]) -> list[str]:
    try:
        header = next(reader, [])
    except csv.Error as error:
        raise _BrokenFile(f"line 1, the header, is not CSV: {error}", "Mend that line") from error
    if not _is_utf8("".join(header)):
        fix = "Write the file as UTF-8, such as with iconv"
        raise _BrokenFile("line 1, the header, is not UTF-8 text", fix)
    return header


def _csv_row(header: list[str], cells: list[str]) -> Row | BadRow:
    if len(cells) != len(header):
        fields = f"it has {len(cells)} fields, the header has {len(header)}"
        return BadRow(fields, "broken_line")
    for name, cell in zip(header, cells, strict=True):
        if not _is_utf8(cell):
            return BadRow(f"it is not UTF-8 text (in {name!r})", "broken_line")
    return dict(zip(header, cells, strict=True))


def _is_utf8(text: str) -> bool:
    """Whether a text that was decoded with `surrogateescape` holds no byte that is not UTF-8."""
    try:
        text.isascii() or text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _read_parquet(file: BinaryIO) -> Iterator[Numbered]:
    from pyarrow.parquet import ParquetFile

    number = 0
    for batch in ParquetFile(file).iter_batches(batch_size=1024):
        try:
            rows = batch.to_pylist()
        except UnicodeDecodeError:
            rows = [_parquet_row(batch.slice(at, 1)) for at in range(batch.num_rows)]
        for row in rows:
            number += 1
            yield number, row


def _parquet_row(batch: Any) -> Row | BadRow:
    try:
        row: Row = batch.to_pylist()[0]
    except UnicodeDecodeError:
        return BadRow("it is not UTF-8 text", "broken_line")
    return row


_READERS: dict[str, Callable[[BinaryIO], Iterator[Numbered]]] = {
    "jsonl": _read_jsonl,
    "json": _read_json,
    "csv": _read_csv,
    "parquet": _read_parquet,
}
