"""Rows that are nearly the same as an earlier row, in time that grows linearly with their number.

Similarity is the Jaccard index of the sets of character 5-grams of two normalised texts. Pairs to
compare come from `minhash`, which may miss one but cannot invent one: each is compared exactly.
Texts stay in their memory-mapped file; a row takes less than 1 KB of memory beside it.
"""

import re
import unicodedata
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import blake2b
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from reward import minhash
from reward.language import marks
from reward.workers import in_order, workers

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Digests = NDArray[np.uint64]  # (rows, 2): 128 bits of the normalised fields
    Sketch = tuple[minhash.Signatures, Digests]

SEPARATOR = "\x1e"  # ASCII's record separator: between the fields of a row

# Rows that share a long prompt, or a long instruction with another short input, are alike as a
# whole. So every field but a short first one, the prompt, must be alike in itself.
FIELD_CHARACTERS = 40
FIELD_SIMILARITY = 0.5

_ROWS_A_TASK = 8192
_CHARACTERS_AT_ONCE = 1 << 20  # about 30 MiB of hashes


@dataclass(frozen=True, slots=True)
class NearDuplicate:
    """A row that is nearly the same as an earlier one."""

    index: int  # from 0, in file order
    original: int  # an earlier row that is itself no near-duplicate
    similarity: float  # of the whole texts; 1.0 for a copy of the original


def near_duplicates(path: Path, threshold: float = 0.7, processes: int = 1) -> list[NearDuplicate]:
    """The rows to remove so that no two of those left were found to be nearly the same.

    Rows are taken in file order. Each is compared with the earlier rows that are kept, and is
    itself kept unless it is nearly the same as one: the earliest such row is its `original`.
    A row that is like removed rows only is kept, so likeness never runs along a chain. A row whose
    normalised fields equal those of an earlier one has that row as its original, or shares that
    row's.

    Args:
        path: an uncompressed Arrow IPC file with a string column `text` without nulls, whose
            fields are joined by `SEPARATOR`.
        threshold: the least similarity, above 0 and at most 1. Nearly all pairs are found at 0.7
            and above; below, `minhash` says what share.
        processes: how many read the texts; the result is the same for any number.

    Returns:
        Near-duplicates by `index`.

    Raises:
        ValueError: if the threshold is not in (0, 1].
    """
    import numpy as np

    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold}: a similarity is above 0 and at most 1")
    texts = _Texts(path)
    signatures, digests = _sketch(path, texts.rows, processes)
    first_copy = _first_copies(digests)
    distinct = np.flatnonzero(first_copy == np.arange(texts.rows))
    pairs = minhash.candidates(signatures[distinct], threshold)
    rows = distinct[np.stack([pairs >> np.uint64(32), pairs & np.uint64(0xFFFFFFFF)], axis=1)]

    removed: dict[int, tuple[int, float]] = {}  # row: its original, the similarity
    for row, group in groupby(rows.tolist(), lambda pair: int(pair[0])):
        # An earlier row that was removed stands for the row that it is like.
        for original in sorted({removed.get(other, (other, 1.0))[0] for _, other in group}):
            similarity = _similarity(texts, original, row, threshold)
            if similarity is not None:
                removed[row] = original, similarity
                break
    for row in np.flatnonzero(first_copy != np.arange(texts.rows)).tolist():
        first = int(first_copy[row])
        removed[row] = removed.get(first, (first, 1.0))
    return [NearDuplicate(row, *removed[row]) for row in sorted(removed)]


class _Texts:
    """The normalised texts of an Arrow file, read from it as they are asked for."""

    def __init__(self, path: Path) -> None:
        import pyarrow as pa

        with pa.memory_map(str(path)) as source:
            column = pa.ipc.open_file(source).read_all().column("text")  # copies nothing
        self.rows = len(column)
        # A row meets several others, an original very many. Few are kept, for texts may be long.
        self.fields = lru_cache(maxsize=8)(lambda row: normalised_fields(column[row].as_py()))
        self.shingles = lru_cache(maxsize=16)(shingles)


def normalised_fields(text: str) -> list[str]:
    """The words of each field in lower case and NFKC, one space between them.

    A field without a word stands for itself: two different emojis are not the same.
    """
    return [
        unicodedata.normalize("NFKC", " ".join(_word().findall(field)) or field.strip())
        for field in text.lower().split(SEPARATOR)
    ]


@cache
def _word() -> re.Pattern[str]:
    """A letter, with the letters and marks that follow it; a mark alone belongs to a symbol, such as an emoji."""
    return re.compile(rf"\w[\w{marks()}]*")


def whole(fields: list[str]) -> str:
    """The normalised text of a row."""
    return " ".join(filter(None, fields))


def shingles(text: str) -> set[str]:
    """Its 5-grams of characters; a shorter text is one shingle."""
    return {
        text[start : start + minhash.GRAM] for start in range(max(1, len(text) - minhash.GRAM + 1))
    }


def jaccard(first: set[str], second: set[str]) -> float:
    """The size of the intersection over the size of the union."""
    shared = len(first & second)
    return shared / (len(first) + len(second) - shared)


def _similarity(texts: _Texts, first: int, second: int, threshold: float) -> float | None:
    """How similar two rows are, or None if they are not nearly the same."""
    fields, others = texts.fields(first), texts.fields(second)
    if len(fields) == len(others):
        # The shortest first: where rows share a long prompt, the answers decide at less cost.
        pairs = list(enumerate(zip(fields, others, strict=True)))
        for number, pair in sorted(pairs, key=lambda one: sum(map(len, one[1]))):
            is_short_prompt = number == 0 and max(map(len, pair)) < FIELD_CHARACTERS
            if pair[0] == pair[1] or is_short_prompt:
                continue
            if jaccard(*map(texts.shingles, pair)) < FIELD_SIMILARITY:
                return None
    similarity = jaccard(texts.shingles(whole(fields)), texts.shingles(whole(others)))
    return similarity if similarity >= threshold else None


def _first_copies(digests: "Digests") -> "NDArray[np.int64]":
    """For each row, the first row with the same digest; shape (rows,)."""
    import numpy as np

    order = np.lexsort(digests.T)  # stable: copies stay in file order
    is_new = np.ones(len(order), dtype=bool)
    is_new[1:] = (digests[order[1:]] != digests[order[:-1]]).any(axis=1)
    first = np.empty(len(order), dtype=np.int64)
    first[order] = order[is_new][np.cumsum(is_new) - 1]
    return first


def _sketch(path: Path, rows: int, processes: int) -> "Sketch":
    """The signatures and digests of all rows."""
    import numpy as np

    tasks = [range(rows)[start : start + _ROWS_A_TASK] for start in range(0, rows, _ROWS_A_TASK)]
    signatures: list[minhash.Signatures] = [minhash.signatures([])]
    digests: list[Digests] = [np.empty((0, 2), dtype=np.uint64)]
    with closing(_run(path, tasks, min(processes, rows // _ROWS_A_TASK))) as parts:
        for part in parts:
            signatures.append(part[0])
            digests.append(part[1])
    return np.concatenate(signatures), np.concatenate(digests)


def _run(path: Path, tasks: list[range], processes: int) -> Generator["Sketch", None, None]:
    """The sketches of the tasks, in their order."""
    if processes <= 1:
        yield from (_sketch_rows(path, task) for task in tasks)
        return
    with workers(processes) as pool:
        yield from in_order(pool, _sketch_rows, ((path, task) for task in tasks))


def _sketch_rows(path: Path, rows: range) -> "Sketch":
    """The signatures and digests of some rows, a limited number of characters at a time."""
    import numpy as np

    texts = _Texts(path)
    digests, signatures, waiting, characters = [], [], [], 0
    for row in rows:
        fields = texts.fields(row)
        digests.append(blake2b(SEPARATOR.join(fields).encode(), digest_size=16).digest())
        waiting.append(whole(fields))
        characters += len(waiting[-1])
        if characters >= _CHARACTERS_AT_ONCE or row == rows[-1]:
            signatures.append(minhash.signatures(waiting))
            waiting, characters = [], 0
    return np.concatenate(signatures), np.frombuffer(b"".join(digests), np.uint64).reshape(-1, 2)
