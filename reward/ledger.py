"""A file of rows that is added to, with a note of what is done: an interrupted run continues.

Beside `out.jsonl` lies `.out.jsonl.done`, a line for each finished piece of work. The rows of a piece
are written first, its line last; rows without a line are of a piece that was interrupted, and go.
"""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from conf.entry import UserError
from reward.command import line_of, written_whole
from reward.readers import parse
from reward.turns import BadRow, Row

PIECE = "chunk"  # the column that names the piece of work


class Ledger:
    """The rows in `out` and the pieces of work that are done; to be used in a `with` block.

    Raises:
        UserError: on entry, if another run writes to `out`, or it is none of our files.
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.notes = out.with_name(f".{out.name}.done")
        self.done: dict[str, Row] = {}
        self._lock = FileLock(out.with_name(f".{out.name}.lock"))

    def __enter__(self) -> "Ledger":
        try:
            self.out.parent.mkdir(parents=True, exist_ok=True)
            self._lock.acquire(timeout=0)
        except Timeout:
            raise UserError(f"another run is writing to {self.out}: wait for it") from None
        except OSError as error:
            raise UserError(f"cannot write {self.out}: {error.strerror}") from error
        try:
            self._mend()
        except BaseException:
            self._lock.release()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        self._lock.release()

    def rows(self) -> Iterator[Row]:
        """The rows so far, without a last line that was cut off."""
        return _whole_lines(self.out)

    def add(self, piece: str, rows: list[Row], note: Row) -> None:
        """Write the rows of a piece of work, then that it is done.

        Args:
            piece: its name; each row has it as PIECE.
            rows: what came of it.
            note: numbers about it; `kept` and `dropped` are summed by `totals`.
        """
        line = {PIECE: piece, **note}
        _append(self.out, rows)
        _append(self.notes, [line])
        self.done[piece] = line

    def totals(self) -> tuple[int, Counter[str]]:
        """Rows kept, and those dropped by reason, of all runs together."""
        dropped: Counter[str] = Counter()
        for note in self.done.values():
            dropped.update(note["dropped"])
        return sum(note["kept"] for note in self.done.values()), dropped

    def _mend(self) -> None:
        """Read what is there, and remove what an interrupted run left half done."""
        if not self.out.exists():  # removed by its owner, who wants to begin again
            self.notes.unlink(missing_ok=True)
            return
        if self.out.stat().st_size and not self.notes.exists():
            raise UserError(
                f"{self.out} was not written by this command, which would add to it: choose another "
                "file, or remove it"
            )
        # Before the rows: a cut-off line at its end would spoil the next one.
        self.done = {line[PIECE]: line for line in _whole_lines(self.notes)}
        with written_whole(self.notes) as write:
            for line in self.done.values():
                write(line)
        with written_whole(self.out) as write:
            for row in _whole_lines(self.out):
                if PIECE not in row or row[PIECE] in self.done:
                    write(row)


def _whole_lines(path: Path) -> Iterator[Row]:
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                try:
                    yield parse(line)
                except BadRow as error:
                    raise UserError(f"{path}:{number}: {error}; mend or remove the line") from None


def _append(path: Path, rows: list[Row]) -> None:
    with path.open("ab") as file:  # one write: no reader sees half of it
        file.write(b"".join(map(line_of, rows)))
        file.flush()
        os.fsync(file.fileno())
