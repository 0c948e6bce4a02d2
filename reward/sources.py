"""Raw rows from where they are kept: files, the demo's generator, the Hugging Face hub.

Local files are read with the standard library, and with pyarrow for Parquet: a preflight check
must not wait for `datasets`.
"""

import codecs
import csv
import glob
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import orjson

from conf.entry import UserError
from conf.passthrough import did_you_mean
from conf.schema import Source
from reward import demo
from reward.records import detect
from reward.store import MANIFEST, content_key, fingerprint, read_json
from reward.turns import BadRow, Row
from reward.versions import RECORDS, is_version, read_lines

# A row as it is read: bytes are a line of JSON that nobody has parsed yet, so that worker processes
# can do it.
Raw = Row | BadRow | bytes
Line = tuple[str, Raw]  # with its place, such as `prefs.jsonl:17`
Numbered = tuple[int, Raw]

DEMO_ROWS = 256
DEMOS: dict[str, Callable[[int], list[Row]]] = {
    "demonstrations": demo.demonstrations,
    "preferences": demo.preferences,
    "held_out": demo.held_out,
}

_ENDING = re.compile(r"\.(?:(?:jsonl|json|csv)(?:\.gz)?|parquet)$", re.IGNORECASE)
_ENDINGS = ".jsonl, .json, .csv (each also .gz), .parquet"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)
_CSV_FIELD_LIMIT = 1 << 30  # Python stops at 128 KiB, which long conversations exceed


def open_rows(data: Source, where: str) -> Iterator[Line]:
    """The rows of a source, read as they are asked for.

    Args:
        data: which rows.
        where: the dotted path of `data` in the config, for messages.

    Raises:
        UserError: if there is no such source, or it cannot be read.
    """
    source = data.source
    if source.startswith("demo:"):
        return _demo_rows(data, where)
    if is_version(folder := Path(source).expanduser()):
        return _version_rows(folder)
    if files := local_files(source):
        return _file_rows(files)
    if _looks_local(source):
        raise UserError(f"{where}.source={source!r}: {_what_is_missing(source)}")
    if _HUB_ID.fullmatch(source):
        return _hub_rows(data, where)
    raise UserError(
        f"{where}.source={source!r} is neither a file that exists nor a hub id (owner/name, "
        f"such as openai/gsm8k) nor demo:NAME.{did_you_mean(source, _siblings('.'))}"
    )


def identity(data: Source, where: str, cache: Path) -> list[str]:
    """What names the bytes of a source: hashes of its files, or the hub's own fingerprint.

    Args:
        data: which rows.
        where: the dotted path of `data` in the config, for messages.
        cache: folder that remembers hashes of files.
    """
    source = data.source
    if source.startswith("demo:"):
        return [source]  # the generator's code is part of the key
    if is_version(folder := Path(source).expanduser()):
        return [str(read_json(folder / MANIFEST)["fingerprint"])]
    if files := local_files(source):
        known = cache / "fingerprints.json"
        return [content_key([file.name, fingerprint(file, known)]) for file in files]
    if _HUB_ID.fullmatch(source) and not _looks_local(source):
        return [str(_hub_dataset(data, where)._fingerprint)]
    open_rows(data, where)  # says what is missing
    return []


def local_files(source: str) -> list[Path]:
    """The data files that a path or a glob names, in the order of their names; empty if none.

    A folder stands for the files directly in it: a `test/` below it is never read by accident.

    Raises:
        UserError: if the path exists but holds no data file, or one that cannot be read.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        try:
            names = os.listdir(path)
        except OSError as error:
            raise UserError(f"cannot read {path}: {_reason(error)}. {_fix(error)}") from error
        found = [os.path.join(path, name) for name in names if name[0] != "."]
    elif os.path.exists(path):
        found = [path]
    else:
        found = glob.glob(path, recursive=True)
    files = sorted(Path(name) for name in found if _ENDING.search(name) and not os.path.isdir(name))
    for file in files:
        _check_readable(file)
    if not files and (found or os.path.isdir(path)):
        raise UserError(f"{source!r} is no data file or folder of them: names end in {_ENDINGS}")
    return files


def _check_readable(file: Path) -> None:
    """Refuse a file that would otherwise be missing from the data without a word."""
    if file.is_symlink() and not os.path.exists(file):
        raise UserError(
            f"cannot read {file}: it is a link to {os.readlink(file)!r}, which does not exist. "
            "Restore what it links to, or remove the link"
        )
    if not (os.path.isfile(file) and os.access(file, os.R_OK)):
        reason = "permission denied" if not os.access(file, os.R_OK) else "it is no regular file"
        raise UserError(f"cannot read {file}: {reason}. Make it readable, or move it elsewhere")


def _looks_local(source: str) -> bool:
    return source[:1] in (".", "/", "~") or bool(_ENDING.search(source) or glob.has_magic(source))


def _what_is_missing(source: str) -> str:
    if glob.has_magic(source):
        return "no file matches"
    path = Path(source).expanduser()
    missing = path
    while not missing.parent.is_dir():  # the topmost part that does not exist
        missing = missing.parent
    kind = "file" if missing == path else "folder"
    hint = did_you_mean(missing.name, _siblings(missing.parent))
    return f"there is no {kind} {missing.name!r} in {str(missing.parent)!r}.{hint}"


def _siblings(folder: str | Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError:
        return []


def _file_rows(files: list[Path]) -> Iterator[Line]:
    for path in files:
        name = path.name if len(files) == 1 else str(path)
        for number, row in _read_file(path):
            yield f"{name}:{number}", row


def _read_file(path: Path) -> Iterator[Numbered]:
    reader = _READERS[path.name.lower().removesuffix(".gz").rpartition(".")[2]]
    try:
        with _open(path) as file:
            yield from reader(file)
    except (OSError, EOFError, ValueError, NotImplementedError, csv.Error, zlib.error) as error:
        raise UserError(f"cannot read {path}: {_reason(error)}. {_fix(error)}") from error


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
        return _object(orjson.loads(raw))
    except orjson.JSONDecodeError:
        pass
    if not raw.strip():
        raise BadRow("the line is blank", "blank_line")
    try:  # slower, with better reasons
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


def _demo_rows(data: Source, where: str) -> Iterator[Line]:
    name = data.source.removeprefix("demo:")
    if name not in DEMOS:
        hint = did_you_mean(name, DEMOS)
        raise UserError(
            f"{where}.source={data.source!r}: there is no demo {name!r}.{hint} "
            f"There are: {', '.join(DEMOS)}"
        )
    return _numbered(DEMOS[name](DEMO_ROWS if data.limit is None else data.limit), data.source)


def _version_rows(folder: Path) -> Iterator[Line]:
    for number, line in enumerate(read_lines(folder / RECORDS), 1):
        yield f"{folder.name}:{number}", line


def _hub_rows(data: Source, where: str) -> Iterator[Line]:
    return _numbered(_hub_dataset(data, where), data.source)


def _hub_dataset(data: Source, where: str) -> Any:
    try:
        from datasets import load_dataset

        return load_dataset(data.source, data.name, split=data.split, revision=data.revision)
    except Exception as error:  # the hub's client, its HTTP library and builders share no base
        reason = str(error).strip().split("\n")[0] or "no reason given"
        raise UserError(
            f"{where}.source={data.source!r}: there is no such file, and the Hugging Face hub did "
            f"not give it ({type(error).__name__}: {reason}). Set {where}.source to a local file, "
            f"or check the name, split={data.split!r}, the network and HF_HUB_OFFLINE."
        ) from error


def _numbered(rows: Iterable[Row], source: str) -> Iterator[Line]:
    return ((f"{source}:{number}", row) for number, row in enumerate(rows, 1))
