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
        UserError: if the path exists but holds no data file.
    """
    path = os.path.expanduser(source)
    if os.path.isdir(path):
        found = [os.path.join(path, name) for name in os.listdir(path) if name[0] != "."]
    elif os.path.exists(path):
        found = [path]
    else:
        found = glob.glob(path, recursive=True)
    files = sorted(Path(name) for name in found if _ENDING.search(name) and os.path.isfile(name))
    if not files and (found or os.path.isdir(path)):
        raise UserError(f"{source!r} is no data file or folder of them: names end in {_ENDINGS}")
    return files


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
    except UnicodeDecodeError as error:
        place = f"byte {error.start + 1}"
        raise UserError(f"cannot read {path}: it is not UTF-8 text ({place})") from error
    except (OSError, EOFError, ValueError, NotImplementedError, csv.Error, zlib.error) as error:
        text = str(error).strip().split("\n")[0] or type(error).__name__
        raise UserError(f"cannot read {path}: {text}") from error


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
    """A list of objects. What does not begin with a bracket is JSON Lines under another name."""
    content = file.read().removeprefix(codecs.BOM_UTF8)
    if not content.lstrip().startswith(b"["):
        yield from _read_jsonl(io.BytesIO(content))
        return
    try:
        rows = _loads(content.decode())
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    for number, row in enumerate(rows, 1):
        yield (
            number,
            row
            if isinstance(row, dict)
            else BadRow("it is not an object with keys and values", "broken_line"),
        )


def _read_csv(file: BinaryIO) -> Iterator[Numbered]:
    csv.field_size_limit(_CSV_FIELD_LIMIT)
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline="") as text:
        reader = csv.reader(text, strict=True)
        header = next(reader, [])
        start = reader.line_num + 1  # a quoted field may span lines; a row is named by its first
        for cells in reader:
            if len(cells) == len(header):
                yield start, dict(zip(header, cells, strict=True))
            elif cells:
                fields = f"it has {len(cells)} fields, the header has {len(header)}"
                yield start, BadRow(fields, "broken_line")
            start = reader.line_num + 1


def _read_parquet(file: BinaryIO) -> Iterator[Numbered]:
    from pyarrow.parquet import ParquetFile

    number = 0
    for batch in ParquetFile(file).iter_batches(batch_size=1024):
        for row in batch.to_pylist():
            number += 1
            yield number, row


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
