"""Token sequences packed into rows of trees: what several have in common at their start stands there once.

A row holds trees one behind another, each in depth-first order. One number a token then says all of the structure:
where the token's subtree ends. Token q sees token k, its ancestor or itself, exactly where `k <= q < ends[k]`.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# Subtrees of fewer tokens than this are not worth an attention call of their own.
_SMALL = 64
# Tokens of small subtrees that share one call: each of them is compared with all of them.
_TOGETHER = 256
# Branches within branches beyond which a subtree is one block: each block is joined with all that it sees.
_DEEP = 32


@dataclass(frozen=True)
class Row:
    """Trees of T tokens. Arrays of shape (T,), int64."""

    ids: np.ndarray
    positions: np.ndarray  # tokens before it in its sequence
    ends: np.ndarray  # where its subtree ends
    members: list[int]  # numbers of the sequences that are here
    places: list[np.ndarray]  # of each of them, where its tokens stand


@dataclass(frozen=True)
class Block:
    """Tokens of a row whose attention is computed together.

    They see every token of the blocks `before`, and of themselves what `sees` says.
    """

    start: int
    stop: int
    before: tuple[int, ...]  # numbers of blocks
    sees: np.ndarray | None  # (stop − start, stop − start), bool; None: the causal triangle


def pack(sequences: Sequence[np.ndarray], capacity: int, least: int = 1) -> Iterator[Row]:
    """Rows that hold every sequence once, the tokens of a common start once a row.

    Rows depend on the set of sequences alone, not on its order.

    Args:
        sequences: token ids of each, at least one; int64.
        capacity: tokens of a row. A longer sequence has a row of its own.
        least: a common start of fewer tokens is repeated, unless it is a whole sequence.
    """
    keys = [sequence.astype(">u4").tobytes() for sequence in sequences]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    del keys
    ordered = [sequences[number] for number in order]
    # In this order the longest common start with any sequence before is that with the last one.
    shared = [0] * bool(ordered)
    for last, this in pairwise(ordered):
        common = _common(last, this)
        shared.append(common if common >= least or common == len(last) else 0)
    for start, stop in _cuts([len(each) for each in ordered], shared, capacity):
        yield _row(ordered[start:stop], [0, *shared[start + 1 : stop]], order[start:stop])


def alone(sequences: Sequence[np.ndarray]) -> Iterator[Row]:
    """A row for each distinct sequence, shorter ones first; in an order that depends on their set alone."""
    equal: dict[bytes, list[int]] = {}
    for number, sequence in enumerate(sequences):
        equal.setdefault(sequence.tobytes(), []).append(number)
    for _, numbers in sorted(equal.items(), key=lambda each: (len(each[0]), each[0])):
        same = [sequences[number] for number in numbers]
        yield _row(same, [0, *[len(same[0])] * (len(same) - 1)], numbers)


def _common(one: np.ndarray, other: np.ndarray) -> int:
    """Number of equal tokens at the start of two sequences."""
    size = min(len(one), len(other))
    differs = one[:size] != other[:size]
    return int(differs.argmax()) if differs.any() else size


def _cuts(
    lengths: Sequence[int], shared: Sequence[int], capacity: int
) -> Iterator[tuple[int, int]]:
    """Where rows begin and end: in the fuller half of a row, where the next row repeats least."""
    start = 0
    while start < len(lengths):
        size, stop = lengths[start], start + 1
        best = None
        while stop < len(lengths) and size + lengths[stop] - shared[stop] <= capacity:
            if 2 * size >= capacity and (best is None or shared[stop] <= shared[best]):
                best = stop
            size += lengths[stop] - shared[stop]
            stop += 1
        if stop < len(lengths) and best is not None and shared[best] < shared[stop]:
            stop = best
        yield start, stop
        start = stop


def _row(ordered: Sequence[np.ndarray], shared: Sequence[int], members: list[int]) -> Row:
    """Sequences in lexicographic order, each behind what it shares with the last one."""
    total = sum(map(len, ordered)) - sum(shared)
    ids, positions = np.empty(total, np.int64), np.empty(total, np.int64)
    ends = np.full(total, total)
    places: list[np.ndarray] = []
    place, size = np.empty(0, np.int64), 0
    for sequence, common in zip(ordered, shared, strict=True):
        ends[place[common:]] = size
        stop = size + len(sequence) - common
        ids[size:stop] = sequence[common:]
        positions[size:stop] = np.arange(common, len(sequence))
        place = np.concatenate([place[:common], np.arange(size, stop)])
        places.append(place)
        size = stop
    return Row(ids, positions, ends, list(members), places)


def sees(ends: np.ndarray) -> np.ndarray:
    """Which tokens (rows) see which (columns); shape (T, T), bool."""
    number = np.arange(len(ends))
    return (number <= number[:, None]) & (number[:, None] < ends)


def blocks(ends: np.ndarray) -> list[Block]:
    """A row's attention in blocks, in the order of its tokens.

    A run of tokens without branches that much follows is a block, and causal; small branches and small trees beside one
    another are blocks with a mask. So no tree is compared with another, but for small ones.
    """
    found: list[Block] = []
    turns = np.flatnonzero(np.diff(ends)) + 1  # where a run of tokens without branches begins
    _split(ends, np.append(turns, len(ends)), 0, len(ends), (), found)
    return found


def _split(
    ends: np.ndarray,
    turns: np.ndarray,
    start: int,
    stop: int,
    before: tuple[int, ...],
    found: list[Block],
) -> None:
    """Add the blocks of the subtrees from `start` to `stop`, which stand side by side behind the blocks `before`."""
    begun = place = start
    while place < stop:
        end = int(ends[place])
        is_large = end - place >= _SMALL and len(before) < _DEEP
        if place > begun and (is_large or end - begun > _TOGETHER):
            found.append(_block(ends, begun, place, before))
            begun = place
        if is_large:
            trunk = int(turns[np.searchsorted(turns, place, side="right")])
            found.append(_block(ends, place, trunk, before))
            _split(ends, turns, trunk, end, (*before, len(found) - 1), found)
            begun = end
        place = end
    if begun < stop:
        found.append(_block(ends, begun, stop, before))


def _block(ends: np.ndarray, start: int, stop: int, before: tuple[int, ...]) -> Block:
    has_no_branch = bool((ends[start:stop] >= stop).all())
    return Block(start, stop, before, None if has_no_branch else sees(ends[start:stop] - start))
