"""Load feedback rows from a file, a folder, the hub or the demo's generator; count and name what cannot be used."""

import csv
import dataclasses
import difflib
import glob
import gzip
import hashlib
import io
import json
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from conf.entry import UserError
from conf.passthrough import did_you_mean
from conf.schema import Data
from reward import demo
from reward.records import KINDS, NORMALISERS, BadRow, Conversation, Preference, Record, detect

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".csv", ".csv.gz", ".parquet")
DEMO_PREFIX = "demo:"
_DEMO = {
    "demonstrations": demo.demonstrations,
    "preferences": demo.preferences,
    "held_out": demo.held_out,
}
_DEMO_ROWS = 256
_SHOWN = 5  # problems named in a message


class Problem(NamedTuple):
    """A row that cannot be used: where it is (`file:line`) and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Loaded:
    """Usable records of one format, and what was dropped. `fingerprint` names their content."""

    records: list[Record]
    rows: int  # all rows that were read, usable or not
    dropped: list[Problem]
    format: str
    fingerprint: str
    source: str


def load(data: Data, kind: str) -> Loaded:
    """Read a data set as records.

    Args:
        data: where it is and how to read it.
        kind: what the records are for: a key of `reward.records.KINDS`.

    Raises:
        UserError: when the source is not there, holds records of another kind, or more rows than
            `data.max_bad_fraction` allows cannot be used (naming file and line).
    """
    if data.format != "auto" and data.format not in NORMALISERS:
        hint = did_you_mean(data.format, NORMALISERS)
        raise UserError(f"there is no format {data.format!r}.{hint} There are: {', '.join(NORMALISERS)}")
    name = data.format
    records: list[Record] = []
    dropped: list[Problem] = []
    for where, row in _rows(data):
        if data.limit is not None and len(records) >= data.limit:
            break
        try:
            if isinstance(row, BadRow):
                raise row
            if name == "auto":
                name = detect(row)
            record = NORMALISERS[name](row)
        except BadRow as problem:
            dropped.append(Problem(where, str(problem)))
            continue
        if not isinstance(record, KINDS[kind]):
            raise UserError(
                f"{data.source} holds rows in the format {name!r}, which are {_noun(record)}; "
                f"this stage takes {_noun_of_kind(kind)}"
            )
        records.append(record)
    _refuse_too_many(data, len(records), dropped)
    return Loaded(records, len(records) + len(dropped), dropped, name, fingerprint(records), data.source)


def _noun(record: Record) -> str:
    if isinstance(record, Conversation):
        return "demonstrations"
    return "preference pairs" if isinstance(record, Preference) else "prompts"


def _noun_of_kind(kind: str) -> str:
    return {"sft": "demonstrations", "preference": "preference pairs", "prompts": "prompts"}[kind]


def _refuse_too_many(data: Data, usable: int, dropped: list[Problem]) -> None:
    total = usable + len(dropped)
    if total == 0:
        raise UserError(f"{data.source} has no rows")
    share = len(dropped) / total
    if dropped and (share > data.max_bad_fraction or usable == 0):
        shown = "; ".join(f"{where}: {reason}" for where, reason in dropped[:_SHOWN])
        more = f"; and {len(dropped) - _SHOWN} more" if len(dropped) > _SHOWN else ""
        raise UserError(
            f"{len(dropped)} of {total} rows cannot be used (allowed: {data.max_bad_fraction:.2%}): {shown}{more}. "
            f"Correct them, or drop them with max_bad_fraction={math.ceil(share * 1000) / 1000}"
        )


def fingerprint(records: list[Record]) -> str:
    """16 hexadecimal digits that name the records' content, whatever file or format they came from."""
    digest = hashlib.sha256()
    for record in records:
        value = [type(record).__name__, dataclasses.asdict(record)]
        digest.update(json.dumps(value, sort_keys=True).encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()[:16]


def to_trl(records: list[Record]) -> list[dict[str, Any]]:
    """Rows in TRL's conversational formats.

    A conversation gives one prompt–completion row for each assistant turn: the loss is then on that turn alone, its
    end-of-turn token included, whatever the chat template, and no turn goes untrained.
    """
    rows: list[dict[str, Any]] = []
    for record in records:
        if isinstance(record, Conversation):
            turns = record.messages
            rows += [
                {"prompt": turns[:number], "completion": [turn]}
                for number, turn in enumerate(turns)
                if turn["role"] == "assistant"
            ]
        elif isinstance(record, Preference):
            row = {"prompt": record.prompt, "chosen": record.chosen, "rejected": record.rejected}
            rows.append(row if record.margin is None else row | {"margin": record.margin})
        else:
            rows.append({"prompt": record.messages})
    return rows


Located = tuple[str, dict[str, Any] | BadRow]


def _rows(data: Data) -> Iterator[Located]:
    """Every row with its place; a `BadRow` stands for one that could not even be read."""
    if data.source.startswith(DEMO_PREFIX):
        yield from _demo_rows(data)
    elif files := _files(data.source):
        for file in files:
            yield from _file_rows(file)
    else:
        yield from _hub_rows(data)


def _demo_rows(data: Data) -> Iterator[Located]:
    name = data.source.removeprefix(DEMO_PREFIX)
    if name not in _DEMO:
        raise UserError(f"the demo has no data {name!r}.{did_you_mean(name, _DEMO)} There are: {', '.join(_DEMO)}")
    for number, row in enumerate(_DEMO[name](data.limit or _DEMO_ROWS), 1):
        yield f"{data.source}:{number}", row


def _files(source: str) -> list[Path]:
    """The files that a source means; empty for a hub id.

    Raises:
        UserError: when it looks like a path and nothing is there.
    """
    path = Path(source).expanduser()
    if path.is_file():
        if not path.name.endswith(SUFFIXES):
            raise UserError(f"{source} has no known extension ({', '.join(SUFFIXES)})")
        return [path]
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.name.endswith(SUFFIXES))
        if not found:
            raise UserError(f"there is no data file in {source} ({', '.join(SUFFIXES)})")
        return found
    if glob.has_magic(source):
        found = sorted(Path(name) for name in glob.glob(str(path), recursive=True) if name.endswith(SUFFIXES))
        if not found:
            raise UserError(f"no file matches {source}")
        return found
    if source.startswith((".", "/", "~")) or source.endswith(SUFFIXES) or source.count("/") > 1:
        siblings = [file.name for file in path.parent.glob("*")] if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, siblings, n=1)
        hint = f" Did you mean {str(path.parent / near[0])!r}?" if near else ""
        raise UserError(f"there is no file {source}.{hint}")
    return []


def _file_rows(file: Path) -> Iterator[Located]:
    kind = file.name.removesuffix(".gz").rsplit(".", 1)[1]
    try:
        if kind == "parquet":
            yield from _parquet_rows(file)
        else:
            content = gzip.decompress(file.read_bytes()) if file.name.endswith(".gz") else file.read_bytes()
            content = content.removeprefix(b"\xef\xbb\xbf")  # the byte-order mark that some editors write
            yield from {"jsonl": _jsonl_rows, "json": _json_rows, "csv": _csv_rows}[kind](file, content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file} cannot be read: {error}") from error


def _jsonl_rows(file: Path, content: bytes) -> Iterator[Located]:
    # On b"\n" only: text may hold U+2028 or U+0085, which str.splitlines() also takes for line ends.
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            where = f"{file}:{number}"
            try:
                yield where, _object(_parse(line))
            except BadRow as problem:
                yield where, problem


def _json_rows(file: Path, content: bytes) -> Iterator[Located]:
    try:
        rows = _parse(content)
    except BadRow as problem:
        raise UserError(f"{file}: {problem}") from problem
    if not isinstance(rows, list):
        raise UserError(f"{file} holds no list of rows; one object a line belongs in a .jsonl file")
    for number, row in enumerate(rows, 1):
        try:
            yield f"{file}[{number}]", _object(row)
        except BadRow as problem:
            yield f"{file}[{number}]", problem


def _csv_rows(file: Path, content: bytes) -> Iterator[Located]:
    try:
        reader = csv.DictReader(io.StringIO(content.decode("utf-8"), newline=""), strict=True)
        for row in reader:
            where = f"{file}:{reader.line_num}"
            if None in row or None in row.values():
                yield where, BadRow("the row has another number of fields than the header")
            else:
                yield where, dict(row)
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{file} is not a UTF-8 CSV file: {error}") from error


def _parquet_rows(file: Path) -> Iterator[Located]:
    import pyarrow
    import pyarrow.parquet

    try:
        number = 0
        for batch in pyarrow.parquet.ParquetFile(file).iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield f"{file}[{number}]", row
    except pyarrow.ArrowException as error:
        raise UserError(f"{file} is not a Parquet file: {error}") from error


def _parse(text: bytes) -> Any:
    def refuse(constant: str) -> Any:
        raise BadRow(f"{constant} is not JSON")

    try:
        return json.loads(text.decode("utf-8"), parse_constant=refuse)
    except UnicodeDecodeError as error:
        raise BadRow(f"not UTF-8 (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise BadRow(f"not JSON: {error}") from error


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRow(f"a row must be an object, not {type(value).__name__}")
    return value


def _hub_rows(data: Data) -> Iterator[Located]:
    import datasets

    try:
        rows = datasets.load_dataset(data.source, data.name, split=data.split, revision=data.revision)
    except Exception as error:  # the hub's client raises many kinds
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{data.source} is no file here, and as a hub data set it cannot be loaded: {reason}. "
            "Name a local file, or check the spelling, the network and HF_HUB_OFFLINE"
        ) from error
    for number, row in enumerate(rows, 1):
        yield f"{data.source}[{number}]", row
