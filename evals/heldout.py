"""Held-out text: the documents of a suite of kind text, read and drawn. Loads no model."""

import gzip
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.entry import UserError
from conf.passthrough import did_you_mean
from conf.schema import Source, Suite, Text
from evals import offline
from reward.readers import parse, unreadable
from reward.sources import is_on_hub, matching, open_rows
from reward.turns import BadRow

_OFFLINE = "offline:"
_PLAIN = (".txt", ".txt.gz")


@dataclass(frozen=True)
class Document:
    """One text and its number in the source, from 0."""

    number: int
    text: str

    @property
    def size(self) -> int:
        """Bytes of the text in UTF-8."""
        return len(self.text.encode())


@dataclass(frozen=True)
class HeldOut:
    """The documents drawn from one source, and how many of its documents were left out as blank."""

    documents: list[Document]
    blank: int


def check(suite: Suite) -> None:
    """Refuse texts that are not there, as far as that shows without a network. Reads one row of a file.

    Raises:
        UserError: naming the file, the column or the offline task.
    """
    for name, text in suite.texts.items():
        where = f"suite.texts.{name}"
        if text.limit is not None and text.limit < 1:
            raise UserError(f"{where}.limit={text.limit} must be at least 1")
        if text.source.startswith(_OFFLINE):
            offline.check_text(text.source.removeprefix(_OFFLINE))
        elif text.source.lower().endswith(_PLAIN):
            _plain_files(text, where)
        elif not is_on_hub(text.source):
            next(_texts(text, where), None)


def read(suite: Suite) -> dict[str, HeldOut]:
    """The documents of each set: `limit` of those that are not blank, drawn by `sample_seed`, in their order.

    Raises:
        UserError: when a set cannot be read or has no text.
    """
    return {name: _drawn(name, text, suite) for name, text in suite.texts.items()}


def documents(suite: Suite) -> Iterator[tuple[str, int, str]]:
    """Set, number and text of the documents that the suite scores, as `evals.harness.documents`."""
    for name, held_out in read(suite).items():
        for document in held_out.documents:
            yield name, document.number, document.text


def _drawn(name: str, text: Text, suite: Suite) -> HeldOut:
    where = f"suite.texts.{name}"
    every = [Document(number, found) for number, found in enumerate(_texts(text, where))]
    usable = [document for document in every if document.text.strip()]
    if not usable:
        raise UserError(
            f"{where}.source={text.source!r} has no text: {len(every)} documents, all blank"
        )
    limit = suite.limit if text.limit is None else text.limit
    chosen = usable
    if limit is not None and limit < len(usable):
        numbers = random.Random(f"{suite.sample_seed}").sample(range(len(usable)), limit)
        chosen = [usable[number] for number in sorted(numbers)]
    return HeldOut(chosen, len(every) - len(usable))


def _texts(text: Text, where: str) -> Iterator[str]:
    if text.source.startswith(_OFFLINE):
        return offline.texts(text.source.removeprefix(_OFFLINE))
    if text.source.lower().endswith(_PLAIN):
        return (_whole(path) for path in _plain_files(text, where))
    return _column(text, where)


def _plain_files(text: Text, where: str) -> list[Path]:
    """Plain files, each of which is one document."""
    found = [Path(name) for name in matching(text.source)]
    if not found:
        raise UserError(f"{where}.source={text.source!r}: there is no such file")
    return found


def _whole(path: Path) -> str:
    try:
        content = path.read_bytes()
        content = gzip.decompress(content) if path.name.lower().endswith(".gz") else content
        return content.decode("utf-8-sig")
    except (OSError, EOFError, ValueError) as error:
        raise unreadable(path, error) from error


def _column(text: Text, where: str) -> Iterator[str]:
    """The texts in one column of rows. Held-out text is a yardstick: a broken row stops it."""
    source = Source(text.source, text.name, text.split, text.revision)
    for place, raw in open_rows(source, where):
        try:
            row = parse(raw)
        except BadRow as error:
            raise UserError(f"{place}: {error}; mend or remove that row") from error
        if text.column not in row:
            hint = did_you_mean(text.column, row)
            raise UserError(
                f"{where}.column: {place} has no column {text.column!r}.{hint} It has: {', '.join(row)}"
            )
        value = row[text.column]
        if value is not None and not isinstance(value, str):
            raise UserError(
                f"{where}.column={text.column!r}: {place} holds {type(value).__name__}, not text; "
                "choose another column"
            )
        if not _is_unicode(value or ""):
            raise UserError(f"{place}: {text.column!r} holds half a character (a lone surrogate)")
        yield value or ""


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
