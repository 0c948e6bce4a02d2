"""Packing against brute force: every token once, and attention to exactly what stands before it in its sequence."""

from collections.abc import Iterator
from unittest import mock

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from evals import trees

SEQUENCES = st.lists(
    st.lists(st.integers(0, 2), min_size=1, max_size=12).map(lambda ids: np.array(ids, np.int64)),
    min_size=1,
    max_size=14,
)


def prefixes(sequence: np.ndarray) -> Iterator[tuple[int, ...]]:
    for stop in range(1, len(sequence) + 1):
        yield tuple(sequence[:stop].tolist())


@given(SEQUENCES, st.integers(1, 40))
@settings(deadline=None)
def test_every_prefix_is_there_once(sequences: list[np.ndarray], capacity: int) -> None:
    seen = []
    for row in trees.pack(sequences, capacity):
        names: dict[int, tuple[int, ...]] = {}
        for member, place in zip(row.members, row.places, strict=True):
            seen.append(member)
            assert row.ids[place].tolist() == sequences[member].tolist()
            assert row.positions[place].tolist() == list(range(len(place)))
            for where, name in zip(place.tolist(), prefixes(sequences[member]), strict=True):
                assert names.setdefault(where, name) == name
        distinct = {name for member in row.members for name in prefixes(sequences[member])}
        assert len(row.ids) == len(distinct) == len(names)
        assert set(names.values()) == distinct
        longest = max(len(sequences[member]) for member in row.members)
        assert len(row.ids) <= max(capacity, longest)
        # A token sees the tokens whose prefix starts its own.
        expected = [
            [names[q][: len(names[k])] == names[k] for k in range(len(names))]
            for q in range(len(names))
        ]
        assert trees.sees(row.ends).tolist() == expected
    assert sorted(seen) == list(range(len(sequences)))


@given(SEQUENCES, st.integers(1, 40), st.integers(1, 6))
@settings(deadline=None)
def test_short_starts_may_be_repeated(
    sequences: list[np.ndarray], capacity: int, least: int
) -> None:
    for row in trees.pack(sequences, capacity, least):
        seen = trees.sees(row.ends)
        for member, place in zip(row.members, row.places, strict=True):
            assert row.ids[place].tolist() == sequences[member].tolist()
            for depth, where in enumerate(place):
                assert np.flatnonzero(seen[where]).tolist() == place[: depth + 1].tolist()


@given(SEQUENCES, st.integers(1, 40), st.randoms())
@settings(deadline=None)
def test_rows_do_not_depend_on_the_order(
    sequences: list[np.ndarray], capacity: int, random: object
) -> None:
    shuffled = list(sequences)
    random.shuffle(shuffled)  # type: ignore[attr-defined]
    one, other = (
        [(row.ids.tolist(), row.ends.tolist()) for row in trees.pack(each, capacity)]
        for each in (sequences, shuffled)
    )
    assert one == other


@given(SEQUENCES, st.integers(2, 6), st.integers(1, 12), st.integers(1, 4))
@settings(deadline=None)
def test_blocks_say_what_the_mask_says(
    sequences: list[np.ndarray], small: int, together: int, deep: int
) -> None:
    with mock.patch.multiple(trees, _SMALL=small, _TOGETHER=together, _DEEP=deep):
        for row in trees.pack(sequences, 60):
            blocks = trees.blocks(row.ends)
            mask = np.zeros((len(row.ids), len(row.ids)), bool)
            for block in blocks:
                size = block.stop - block.start
                own = np.tri(size, dtype=bool) if block.sees is None else block.sees
                mask[block.start : block.stop, block.start : block.stop] = own
                for number in block.before:
                    before = blocks[number]
                    mask[block.start : block.stop, before.start : before.stop] = True
            assert [block.start for block in blocks] == [0, *(b.stop for b in blocks)][:-1]
            assert blocks[-1].stop == len(row.ids)
            assert (mask == trees.sees(row.ends)).all()


def test_a_long_trunk_is_causal_and_its_branches_share_a_block() -> None:
    stem = np.arange(100)
    (row,) = trees.pack([np.append(stem, [200 + n, 5, 6]) for n in range(4)], 1000)
    trunk, branches = trees.blocks(row.ends)
    assert (trunk.start, trunk.stop, trunk.before, trunk.sees) == (0, 100, (), None)
    assert (branches.start, branches.stop, branches.before) == (100, 112, (0,))
    assert branches.sees is not None


def test_a_branch_at_every_token_makes_no_block_of_each() -> None:
    text = np.arange(2000)
    (row,) = trees.pack([np.append(text[:n], 5000 + n) for n in range(1, 2000)], 10_000)
    found = trees.blocks(row.ends)
    assert len(found) < 100
    assert max(len(block.before) for block in found) < 50


def test_rows_are_cut_where_least_is_repeated() -> None:
    """Two questions of four options each, one of which fits a row as a whole."""
    options = [np.array([question] * 10 + [n]) for question in (1, 2) for n in range(4)]
    rows = list(trees.pack(options, 20))
    assert [sorted(row.members) for row in rows] == [[0, 1, 2, 3], [4, 5, 6, 7]]


@given(SEQUENCES)
def test_alone_keeps_each_sequence_whole(sequences: list[np.ndarray]) -> None:
    rows = list(trees.alone(sequences))
    assert sorted(member for row in rows for member in row.members) == list(range(len(sequences)))
    for row in rows:
        for member, place in zip(row.members, row.places, strict=True):
            assert row.ids.tolist() == sequences[member].tolist()
            assert place.tolist() == list(range(len(row.ids)))
    assert len(rows) == len({tuple(each.tolist()) for each in sequences})
    other_way = [row.ids.tolist() for row in trees.alone(sequences[::-1])]
    assert [row.ids.tolist() for row in rows] == other_way
