"""A JSONL file that grows row by row and can be continued, beside a manifest that says how it was made.

Unlike the folders of `reward.store`, it is of use before it is complete: each row is worth minutes of an accelerator.
"""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from conf.entry import UserError
from reward.store import content_key, nan_to_null, read_json, write_json

Row = dict[str, Any]


def manifest_path(path: Path) -> Path:
    """Where the manifest of a JSONL file is: `OUT.jsonl.manifest.json`."""
    return path.with_name(f"{path.name}.manifest.json")


class Journal:
    """Rows that are there, and the way to add one; see `continued`."""

    def __init__(self, path: Path, settings: dict[str, Any], rows: list[Row]) -> None:
        self.rows = rows
        self._path = path
        self._settings = settings

    def append(self, row: Row) -> None:
        """Add a row: whole, or not at all when the disk is full."""
        line = (json.dumps(nan_to_null(row), ensure_ascii=False) + "\n").encode()
        before = self._path.stat().st_size if self._path.exists() else 0
        with self._path.open("ab", buffering=0) as file:  # one write: a killed process tears no row
            try:
                while line:
                    line = line[file.write(line) or 0 :]
            except BaseException:
                os.truncate(self._path, before)
                raise
        self.rows.append(row)

    def write_manifest(self, is_complete: bool, **facts: Any) -> None:
        """Say how the rows were made, and whether these are all."""
        record = {"settings_hash": content_key(self._settings), "settings": self._settings}
        write_json(manifest_path(self._path), {"is_complete": is_complete, **record, **facts})


@contextlib.contextmanager
def continued(path: Path, settings: dict[str, Any]) -> Iterator[Journal]:
    """The journal at `path`, new or as an earlier run with equal settings left it.

    Args:
        path: JSONL file.
        settings: all that rows depend on; JSON-like.

    Raises:
        UserError: when the file was made with other settings, by something else, or is being written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path.with_name(f".{path.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{path} is being written by another process; choose another file"
        ) from error
    try:
        rows = _rows(path, settings) if path.exists() and path.stat().st_size else []
        journal = Journal(path, settings, rows)
        journal.write_manifest(is_complete=False)
        yield journal
    finally:
        lock.release()


def _rows(path: Path, settings: dict[str, Any]) -> list[Row]:
    from evals.deltas import differing

    try:
        manifest = read_json(manifest_path(path))
        before = manifest["settings"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} exists without a readable {manifest_path(path).name}, so it cannot be continued; "
            "choose another file or remove it"
        ) from error
    if different := differing(before, json.loads(json.dumps(settings))):
        raise UserError(
            f"{path} was written with other settings; choose another file, or remove it to start anew:\n  "
            + "\n  ".join(different)
        )
    content = path.read_bytes()
    if (end := content.rfind(b"\n") + 1) < len(content):  # the machine went down in a write
        os.truncate(path, end)
    try:
        return [json.loads(line) for line in content[:end].split(b"\n") if line]
    except ValueError as error:
        raise UserError(f"{path} holds a line that is not JSON; remove it to start anew") from error
