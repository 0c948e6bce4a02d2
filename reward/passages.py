"""Documents from where they are kept, cut into passages that fit a prompt."""

import glob
import os
import re
from collections.abc import Iterator
from pathlib import Path

from conf.entry import UserError
from reward.command import Reading
from reward.turns import Row, text_of

_ENDINGS = (".txt", ".md")
_PARAGRAPH = re.compile(r"\n\s*\n")
_SENTENCE_END = re.compile(r"(?<=[.!?。！？])\s*")
_WORD_END = re.compile(r"(?<=\s)")

Document = tuple[str, str]  # its place, such as `notes.md` or `pages.jsonl:17`, and its text


class Documents:
    """The documents of a folder or glob of text files, or of a column of a data file.

    A folder stands for the files directly in it.

    Args:
        source: folder, glob or file: .txt and .md, else what `reward.sources` reads.
        field: the column that holds the text.
    """

    def __init__(self, source: str, field: str) -> None:
        self.files = _text_files(source)
        self.reading: Reading[Document] | None = None
        if not self.files:

            def document(row: Row, place: str) -> Document:
                return place, text_of(row, field)

            self.reading = Reading(source, document, "synthesize")

    def __iter__(self) -> Iterator[Document]:
        if self.reading is not None:
            yield from self.reading
        for path in self.files:
            try:
                text = path.read_text(encoding="utf-8-sig")
            except (OSError, UnicodeDecodeError) as error:
                reason = "it is not UTF-8 text" if isinstance(error, ValueError) else error.strerror
                raise UserError(f"cannot read {path}: {reason}") from error
            yield (path.name if len(self.files) == 1 else str(path)), text


def _text_files(source: str) -> list[Path]:
    path = os.path.expanduser(source)
    pattern = os.path.join(glob.escape(path), "*") if os.path.isdir(path) else path
    found = [path] if os.path.isfile(path) else glob.glob(pattern, recursive=True)
    return sorted(Path(name) for name in found if name.lower().endswith(_ENDINGS))


def passages(text: str, limit: int) -> list[str]:
    """Cut a text into passages of whole paragraphs.

    Args:
        text: a document.
        limit: most characters of a passage. Longer paragraphs are cut after sentences, longer
            sentences after words, longer words anywhere.

    Returns:
        Passages in order, none empty; together they have every word of the text.
    """
    found: list[str] = []
    for paragraph in _PARAGRAPH.split(text):
        for piece in _cut(paragraph.strip(), limit, (_SENTENCE_END, _WORD_END)):
            if piece and found and len(found[-1]) + 2 + len(piece) <= limit:
                found[-1] += "\n\n" + piece
            elif piece:
                found.append(piece)
    return found


def _cut(text: str, limit: int, seams: tuple[re.Pattern[str], ...]) -> Iterator[str]:
    """Pieces within the limit, cut at the first kind of seam where that is enough."""
    if len(text) <= limit:
        yield text
        return
    if not seams:
        yield from (text[start : start + limit] for start in range(0, len(text), limit))
        return
    held = ""
    place = 0
    for seam in [*seams[0].finditer(text), None]:
        end = seam.end() if seam else len(text)
        part, place = text[place:end], end
        if held and len((held + part).rstrip()) > limit:
            yield from _cut(held.strip(), limit, seams[1:])
            held = ""
        held += part
    yield from _cut(held.strip(), limit, seams[1:])
