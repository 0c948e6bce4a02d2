"""What the small commands share: rows in with the bad ones counted, lines out whole or not at all."""

import argparse
import contextlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Generic, TypeVar

import orjson

from conf.entry import UserError
from conf.schema import Source
from reward.readers import parse
from reward.sources import local_files, open_rows
from reward.turns import BadRow, Row

T = TypeVar("T")
MAX_BAD_FRACTION = 0.01  # as `Data.max_bad_fraction`, which is a stage's
_SHOWN = 3
_ENDING = ".jsonl"


class Reading(Generic[T]):
    """What `convert` makes of the rows of a source, in order; rows that it refuses are counted.

    Args:
        source: file, folder, glob, hub id or `demo:NAME`.
        convert: makes a value of a row and its place, such as `prefs.jsonl:17`; may raise `BadRow`.
        where: the command's name, for messages.
    """

    def __init__(self, source: str, convert: Callable[[Row, str], T], where: str) -> None:
        self.source = source
        self.rows = 0  # read so far, without blank lines
        self.bad: list[str] = []  # place and reason
        self._convert = convert
        self._lines = open_rows(Source(source=source), where)

    def __iter__(self) -> Iterator[T]:
        for place, raw in self._lines:
            try:
                value = self._convert(parse(raw), place)
            except RecursionError:
                self.rows += 1
                self.bad.append(f"{place}: it is nested too deeply")
                continue
            except BadRow as error:
                if error.kind != "blank_line":
                    self.rows += 1
                    self.bad.append(f"{place}: {error}")
                continue
            self.rows += 1
            yield value

    def check(self, max_bad_fraction: float) -> None:
        """Stop when more rows were bad than may be left out, or all.

        Raises:
            UserError: with the places and reasons of the first ones.
        """
        if not self.rows:
            raise UserError(f"{self.source} has no rows")
        if len(self.bad) < self.rows and len(self.bad) <= max_bad_fraction * self.rows:
            return
        share = -(-1000 * len(self.bad) // self.rows) / 1000  # rounded up, so that it is enough
        remedy = f", or leave them out with --max-bad-fraction {share:g}"
        raise UserError(
            f"{len(self.bad):,} of {self.rows:,} rows in {self.source} cannot be used (limit "
            f"{100 * max_bad_fraction:g} %): {self._first()}. Fix the rows"
            + (remedy if len(self.bad) < self.rows else "")
        )

    def described(self) -> str:
        """The bad rows in a line; empty if there are none."""
        return f"bad rows left out: {len(self.bad):,} ({self._first()})" if self.bad else ""

    def _first(self) -> str:
        more = len(self.bad) - _SHOWN
        return "; ".join(self.bad[:_SHOWN]) + (f"; and {more:,} more" if more > 0 else "")


def check_out(out: Path, source: str | None) -> None:
    """Check that a result may be written to `out`, when data are read from `source`.

    Raises:
        UserError: if later commands could not read it, or it is part of what is read.
    """
    if out.suffix != _ENDING:
        raise UserError(f"{out} must end in {_ENDING}: its lines are JSON objects")
    check_file(out, source, "out.jsonl")


def check_file(out: Path, source: str | None, example: str) -> None:
    """Check that a file of any name may be written, when data are read from `source`.

    Raises:
        UserError: if it is a folder, or part of what is read.
    """
    if out.is_dir():
        raise UserError(f"{out} is a folder: name a file in it, such as {out / example}")
    if (
        source
        and out.exists()
        and out.resolve() in {path.resolve() for path in local_files(source)}
    ):
        raise UserError(f"{out} is part of the input {source}: choose another file to write to")


@contextlib.contextmanager
def written_whole(out: Path) -> Iterator[Callable[[Row], int]]:
    """A function that writes a row; the file appears at the end, and only if nothing failed.

    Raises:
        UserError: if the file cannot be written.
    """
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        file = partial.open("wb")
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror}") from error
    try:
        with file:
            yield lambda row: file.write(line_of(row))
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)


def line_of(row: Row) -> bytes:
    """A row as a line of JSON; numbers that it does not know are null, values that it does not know text."""
    return orjson.dumps(row, default=str, option=orjson.OPT_APPEND_NEWLINE)


def counts(found: Mapping[str, int]) -> str:
    """Counts in words, the largest first; `none` if there are none."""
    ordered = sorted(found.items(), key=lambda item: -item[1])
    return ", ".join(f"{count:,} {name}" for name, count in ordered) or "none"


def at_least_one(text: str) -> int:
    """A command line's count."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number, 1 or more")
    return int(text)


def at_least_zero(text: str) -> float:
    """A command line's finite number that is not negative."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"{text!r} must be a number, 0 or more")
    return number


def fraction(text: str) -> float:
    """A command line's share, from 0 to 1."""
    number = at_least_zero(text)
    if number > 1:
        raise argparse.ArgumentTypeError(f"{text!r} must lie between 0 and 1")
    return number


def add_common(parser: argparse.ArgumentParser) -> None:
    """The arguments IN, OUT, --seed and --max-bad-fraction."""
    parser.add_argument("source", metavar="IN", help="file, folder, glob, hub id or demo:NAME")
    parser.add_argument("out", metavar="OUT.jsonl", type=Path, help="file to write")
    parser.add_argument("--seed", type=int, default=0, help="of what is drawn at random")
    parser.add_argument(
        "--max-bad-fraction",
        type=fraction,
        default=MAX_BAD_FRACTION,
        help="share of unusable rows that may be left out (default: %(default)s)",
    )
