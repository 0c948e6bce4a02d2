"""MinHash signatures of texts, and the pairs of rows whose signatures make them worth comparing.

The share of equal values of two signatures estimates the Jaccard index of the texts' sets of
character 5-grams (Broder, "On the resemblance and containment of documents", 1997). Rows that
share a band of values are candidates (locality-sensitive hashing; Leskovec, Rajaraman, Ullman,
"Mining of Massive Datasets", ch. 3): with b bands of r values, a pair of similarity s shares one
with probability 1 - (1 - s^r)^b. For the 25 bands of 5 used here that is 0.990 at s = 0.7,
0.99995 at 0.8, and 0.0002 at the 0.1 of unrelated English texts.

A bucket, the rows that share a band, may hold any number of rows. To stay linear, a row meets only
the `_PREDECESSORS` before it in each of its buckets. A caller that replaces a removed row by the
one it is like still reaches the first of a crowd of duplicates. What that may miss: pairs in a
crowd of thousands of rows that are all above the threshold as a whole but differ in a field. Of
pairs of similarity 0.92 among 40,000 rows alike at 0.83, 98% were found.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Signatures = NDArray[np.uint16]  # (rows, _BANDS * _ROWS_PER_BAND)
    Pairs = NDArray[np.uint64]  # (pairs,): later row << 32 | earlier row

GRAM = 5  # characters

_BANDS = 25
_ROWS_PER_BAND = 5
_SEED = 42
_ODD = 0x9E3779B97F4A7C15  # 2^64 over the golden ratio, to multiply hashes with

_PREDECESSORS = 4
# The estimate's standard deviation is at most 0.045 (125 values) and 0.041 at 0.7: a pair at the
# threshold falls this far below it once in 8,000 times.
_SLACK = 0.15
_MOST_CANDIDATES = 8  # a row: those with the best estimates
_PAIRS_AT_ONCE = 1 << 16  # about 32 MiB of signatures


def signatures(texts: list[str]) -> "Signatures":
    """The signatures of texts; one shorter than `GRAM` counts as a single gram.

    A value is the low half of rensa's: chance makes one in 65,536 equal.
    """
    import numpy as np
    from rensa import RMinHash

    if not texts:
        return np.empty((0, _BANDS * _ROWS_PER_BAND), dtype=np.uint16)
    texts = [text.ljust(GRAM, "\0") for text in texts]
    code_points = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32)
    hashes = np.zeros(len(code_points) - GRAM + 1, dtype=np.uint64)
    for place in range(GRAM):
        hashes = hashes * np.uint64(_ODD) + code_points[place : place + len(hashes)]
    ends = np.cumsum([len(text) for text in texts])
    is_within = np.ones(len(hashes), dtype=bool)
    for overlap in range(1, GRAM):  # grams that begin in one text and end in the next
        is_within[ends[:-1] - overlap] = False
    offsets = np.zeros(len(ends) + 1, dtype=np.uint64)
    offsets[1:] = ends - (GRAM - 1) * np.arange(1, len(ends) + 1)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(
        _mixed(hashes[is_within]), offsets, _BANDS * _ROWS_PER_BAND, _SEED
    )
    return np.array(matrix.to_rows(), dtype=np.uint32).astype(np.uint16)


def candidates(signatures: "Signatures", threshold: float) -> "Pairs":
    """Pairs of rows that meet in a bucket and whose estimate is not far below the threshold.

    They are in order, and at most `_MOST_CANDIDATES` for each later row.
    """
    import numpy as np

    found = np.empty(0, dtype=np.uint64)
    for band in range(_BANDS):
        met = np.setdiff1d(_met_in_buckets(_band_keys(signatures, band)), found, assume_unique=True)
        is_alike = _equal_values(signatures, met) >= (threshold - _SLACK) * signatures.shape[1]
        found = _best(signatures, np.union1d(found, met[is_alike]))
    return found


def _best(signatures: "Signatures", pairs: "Pairs") -> "Pairs":
    """The `_MOST_CANDIDATES` pairs of each later row that are most alike, in order."""
    import numpy as np

    later = pairs >> np.uint64(32)  # sorted, as the pairs are
    by_likeness = np.lexsort((-_equal_values(signatures, pairs), later))
    rank = np.arange(len(pairs)) - np.searchsorted(later, later)
    return np.sort(pairs[by_likeness[rank < _MOST_CANDIDATES]])


def _band_keys(signatures: "Signatures", band: int) -> "NDArray[np.uint64]":
    """A band's values as one number a row; shape (rows,)."""
    import numpy as np

    key = np.zeros(len(signatures), dtype=np.uint64)
    for column in range(band * _ROWS_PER_BAND, (band + 1) * _ROWS_PER_BAND):
        key = _mixed(key ^ signatures[:, column])
    return key


def _met_in_buckets(keys: "NDArray[np.uint64]") -> "Pairs":
    """Each row with its predecessors among the rows of the same key; `keys` has shape (rows,)."""
    import numpy as np

    order = np.argsort(keys, kind="stable").astype(np.uint64)  # a bucket stays in row order
    ordered = keys[order]
    met = []
    for step in range(1, _PREDECESSORS + 1):
        is_shared = ordered[step:] == ordered[:-step]
        met.append(order[step:][is_shared] << np.uint64(32) | order[:-step][is_shared])
    return np.concatenate(met)


def _equal_values(signatures: "Signatures", pairs: "Pairs") -> "NDArray[np.int64]":
    """How many values the two signatures of each pair share; shape (pairs,)."""
    import numpy as np

    equal = np.empty(len(pairs), dtype=np.int64)
    for start in range(0, len(pairs), _PAIRS_AT_ONCE):
        part = pairs[start : start + _PAIRS_AT_ONCE]
        later, earlier = part >> np.uint64(32), part & np.uint64(0xFFFFFFFF)
        is_equal = signatures[later] == signatures[earlier]
        equal[start : start + len(part)] = np.count_nonzero(is_equal, axis=1)
    return equal


def _mixed(numbers: "NDArray[np.uint64]") -> "NDArray[np.uint64]":
    """Numbers whose every bit depends on all the bits given, as in MurmurHash's finaliser."""
    import numpy as np

    numbers = (numbers ^ numbers >> np.uint64(32)) * np.uint64(_ODD)
    return numbers ^ numbers >> np.uint64(29)
