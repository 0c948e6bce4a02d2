"""Pieces of long work that are kept until the whole is written, so that a killed command goes on where it was.

Beside OUT lies `.OUT.journal`: a line that says what the work depends on, then a line for each piece, in order. It goes
when OUT is complete. Unlike `reward.ledger`, OUT itself is not there before.
"""

import contextlib
import glob
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from conf.entry import UserError
from reward.store import canonical


class Journal:
    """The pieces that are there, and the way to add the next one; see `resumed`."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.pieces = _read(path, settings)
        self._path = path

    def add(self, piece: Any) -> None:
        """Keep a JSON-like piece; NaN is one. It lasts when this returns."""
        with self._path.open("ab") as file:
            file.write(json.dumps(piece).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.pieces.append(piece)

    def remove(self) -> None:
        """The whole is written: the pieces are needed no more."""
        self._path.unlink()


@contextlib.contextmanager
def resumed(out: Path, settings: dict[str, Any]) -> Iterator[Journal]:
    """The journal beside `out`, new or as a killed run with equal settings left it.

    Args:
        out: what is being made.
        settings: all that the pieces depend on; JSON-like.

    Raises:
        UserError: when the work was begun with other settings, or another process is at it.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out.with_name(f".{out.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{out} is being written by another process; choose another file"
        ) from error
    try:
        for rest in out.parent.glob(f".{glob.escape(out.name)}.*.tmp"):  # of a killed run
            rest.unlink(missing_ok=True)
        yield Journal(out.with_name(f".{out.name}.journal"), settings)
    finally:
        lock.release()


def _read(path: Path, settings: dict[str, Any]) -> list[Any]:
    """The whole pieces at `path`, which is begun anew when there is nothing in it."""
    head = canonical(settings).encode() + b"\n"
    content = path.read_bytes() if path.exists() else b""
    lines = content[: content.rfind(b"\n") + 1].splitlines(keepends=True)  # a torn line goes
    try:
        before, *pieces = map(json.loads, lines) if lines else [json.loads(head)]
    except ValueError as error:
        raise UserError(f"{path} holds a line that is not JSON; remove it to start anew") from error
    if lines and lines[0] != head:
        raise UserError(
            f"{path} was begun with other settings; give them again, choose another output, or remove it to start "
            "anew:\n  " + "\n  ".join(_differing(before, json.loads(head)))
        )
    with path.open("r+b" if lines else "wb") as file:
        if not lines:
            file.write(head)
        file.truncate(sum(map(len, lines or [head])))
        file.flush()
        os.fsync(file.fileno())
    return pieces


def _differing(before: Any, now: dict[str, Any]) -> list[str]:
    """The settings that differ, as `key: before → now`."""
    if not isinstance(before, dict):
        return ["it is the journal of something else"]
    return [
        f"{key}: {before.get(key, 'absent')} → {now.get(key, 'absent')}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
