"""The documents of a benchmark, as they would stand in training data that leaked it."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.entry import UserError
from conf.schema import Data
from reward.readers import parse
from reward.sources import local_files, open_rows
from reward.turns import BadRow, Row

# Columns that name or sort a row, or say where it comes from.
_ABOUT_THE_ROW = re.compile(
    r"(?:.*_)?(?:id|idx|ids|id_list|key|hash|url|source|split|type|label|labels|role)"
    r"|category|subject|dataset|generator|model|entry_point",
    re.IGNORECASE,
)
# The column with the question goes first: a short question counts as a whole.
_QUESTION = re.compile(
    r"question|question_stem|prompt|instruction|query|problem|goal|sentence|ctx|context|turns",
    re.IGNORECASE,
)
_ADDRESS_OR_DATA = re.compile(r"(?:https?:|data:)\S*|[\x21-\x7e]{100,}")

# What a template or a data set puts before a question, such as "Question: ".
_LABEL = re.compile(r"^[^:：]{1,30}(?::\s|：)")


@dataclass(frozen=True, slots=True)
class Document:
    """One item of a benchmark."""

    task: str
    doc: int  # its number in the split that is scored, from 0
    text: str  # question and answer; a short question has a line to itself


def read_documents(path: str) -> list[Document]:
    """The documents in a file, a folder or a glob.

    Args:
        path: what `python -m evals.documents` writes, or any benchmark as JSON Lines, JSON, CSV or
            Parquet. There the task is the name of the file, and a document is all texts of a row.

    Raises:
        UserError: if there is no such file, it cannot be read, or holds no text.
    """
    files = local_files(path)
    if not files:
        raise UserError(f"{path!r}: there is no such benchmark file or folder")
    documents = [document for file in files for document in _documents(file)]
    if not documents:
        raise UserError(f"{path!r} holds no rows with text")
    return documents


def _documents(file: Path) -> Iterator[Document]:
    task = re.sub(
        r"(?:\.(?:jsonl|json|csv|parquet))?(?:\.gz)?$", "", file.name, flags=re.IGNORECASE
    )
    rows = open_rows(Data(source=str(file)), "benchmark")
    for number, (_, raw) in enumerate(rows):
        try:
            row = parse(raw)
        except BadRow:
            continue
        if row.keys() == {"task", "doc", "text"} and isinstance(row["doc"], int):
            yield Document(str(row["task"]), row["doc"], str(row["text"]))
        elif text := text_of_row(row):
            yield Document(task, number, text)


def text_of_row(row: Row) -> str:
    """All texts of a row, one a line, the question first; columns about the row are left out."""
    columns = sorted(row.items(), key=lambda item: not _QUESTION.fullmatch(item[0]))
    texts = [text for key, value in columns for text in _texts(key, value)]
    # What stands in another text too says nothing new: a label, a part of the context, a copy.
    new = [
        text
        for place, text in enumerate(texts)
        if not any(
            text in other and (text != other or before < place)
            for before, other in enumerate(texts)
            if before != place
        )
    ]
    return "\n".join(new)


def questions_in(text: str) -> Iterator[str]:
    """The lines of a document that ask, without a label: the first, and those that end in `?`."""
    for number, line in enumerate(text.strip().split("\n")):
        if number == 0 or line.rstrip().endswith(("?", "？")):
            yield _LABEL.sub("", line)


def _texts(key: str, value: Any) -> Iterator[str]:
    """The texts in a column, with those of lists and objects in it."""
    if _ABOUT_THE_ROW.fullmatch(key):
        return
    if isinstance(value, dict):
        for inner, item in value.items():
            yield from _texts(inner, item)
    elif isinstance(value, list):
        for item in value:
            yield from _texts(key, item)
    elif isinstance(value, str) and value.strip() and not _ADDRESS_OR_DATA.fullmatch(value.strip()):
        yield value.strip()
