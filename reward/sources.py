"""Raw rows from where they are kept: files, the demo's generator, the hub, a data version."""

import glob
import os
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from conf.entry import UserError
from conf.passthrough import did_you_mean
from conf.schema import Source
from reward import demo
from reward.readers import Line, read_file, unreadable
from reward.store import MANIFEST, content_key, fingerprint, read_json
from reward.turns import Row
from reward.versions import RECORDS, is_version, read_lines

DEMO_ROWS = 256
DEMOS: dict[str, Callable[[int], list[Row]]] = {
    "demonstrations": demo.demonstrations,
    "preferences": demo.preferences,
    "prompts": demo.prompts,
    "held_out": demo.held_out,
}

_ENDING = re.compile(r"\.(?:(?:jsonl|json|csv)(?:\.gz)?|parquet)$", re.IGNORECASE)
_ENDINGS = ".jsonl, .json, .csv (each also .gz), .parquet"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*", re.ASCII)


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
    if is_version(folder := Path(os.path.expanduser(source))):
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
    if is_version(folder := Path(os.path.expanduser(source))):
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
            raise unreadable(path, error) from error
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


def matching(source: str) -> list[str]:
    """The files and folders that a path or a glob names, in the order of their names."""
    path = os.path.expanduser(source)
    return [path] if os.path.exists(path) else sorted(glob.glob(path, recursive=True))


def is_on_hub(source: str) -> bool:
    """Whether a source can only mean a dataset of the hub."""
    is_here = source.startswith("demo:") or matching(source) or _looks_local(source)
    return not is_here and bool(_HUB_ID.fullmatch(source))


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
    path = Path(os.path.expanduser(source))
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
        for number, row in read_file(path):
            yield f"{name}:{number}", row


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
