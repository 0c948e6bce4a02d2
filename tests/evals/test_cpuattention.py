"""Attention in bfloat16 on a CPU, against all scores at once in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from evals import cpuattention, treeattention, trees

HEADS, KEYS, WIDTH = 6, 2, 16


def _row(*sequences: list[int]) -> trees.Row:
    (row,) = trees.pack([np.array(each) for each in sequences], 10_000)
    return row


def _ids(first: int, number: int) -> list[int]:
    return list(range(first, first + number))


ROWS = {
    "one sequence": _row(_ids(0, 90)),
    "a pair": _row(_ids(0, 100) + _ids(1_000, 80), _ids(0, 100) + _ids(2_000, 130)),
    "small branches": _row(*[_ids(0, 70) + _ids(1_000 * n, 5 + n) for n in range(1, 6)]),
    "nested": _row(
        *[_ids(0, 80) + _ids(1_000 * n, 70) + _ids(10_000 * m, 9) for n in (1, 2) for m in (1, 2)],
        [*_ids(0, 20), 7, 7, 7],
    ),
    "one token": _row([3]),
}


def _given(row: trees.Row) -> list[Tensor]:
    torch.manual_seed(0)
    length = len(row.ids)
    shapes = [(1, heads, length, WIDTH) for heads in (HEADS, KEYS, KEYS, HEADS)]
    return [torch.randn(shape).to(torch.bfloat16) for shape in shapes]


def _ours(row: trees.Row, given: list[Tensor], scale: float | None) -> list[Tensor]:
    *given, gradient = given
    inputs = [each.clone().requires_grad_() for each in given]
    found = treeattention._Blocks(row, torch.device("cpu")).attend(*inputs, scale, 0.0)
    return [found.detach(), *torch.autograd.grad(found, inputs, gradient)]


def _truth(row: trees.Row, given: list[Tensor], scale: float) -> list[Tensor]:
    *given, gradient = (each.double() for each in given)
    inputs = [each.requires_grad_() for each in given]
    query, key, value = inputs
    key, value = (each.repeat_interleave(HEADS // KEYS, dim=1) for each in (key, value))
    hidden = ~torch.from_numpy(trees.sees(row.ends))
    scores = (query @ key.mT * scale).masked_fill(hidden, -torch.inf)
    found = scores.softmax(-1) @ value
    return [found.detach(), *torch.autograd.grad(found, inputs, gradient)]


@pytest.mark.parametrize("scale", [None, 0.6])
@pytest.mark.parametrize("row", ROWS.values(), ids=ROWS)
def test_value_and_gradient(
    row: trees.Row, scale: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = _given(row)
    whole = _ours(row, given, scale)
    for one, other in zip(whole, _truth(row, given, scale or WIDTH**-0.5), strict=True):
        # A product's rounding, 2⁻⁸ of a value at most, in two or three products one after the other.
        assert (one.double() - other).norm() <= 2**-6 * other.norm()
    # A few queries at a time, the last of a block fewer than the others.
    monkeypatch.setattr(cpuattention, "_VALUES", HEADS * 7 * 100)
    for one, other in zip(_ours(row, given, scale), whole, strict=True):
        assert (one.double() - other.double()).norm() <= 2**-6 * other.double().norm()


def test_values_of_another_width_than_keys() -> None:
    """As in multi-head latent attention."""
    row = ROWS["nested"]
    query, key, value, gradient = _given(row)
    given = [query, key, value[..., :10].contiguous(), gradient[..., :10].contiguous()]
    for one, other in zip(_ours(row, given, None), _truth(row, given, WIDTH**-0.5), strict=True):
        assert one.shape == other.shape
        assert (one.double() - other).norm() <= 2**-6 * other.norm()


def test_no_scores_are_kept_between_the_passes() -> None:
    row = ROWS["a pair"]
    *given, _ = _given(row)
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        blocks = treeattention._Blocks(row, torch.device("cpu"))
        blocks.attend(*(each.requires_grad_() for each in given), None, 0.0)
    assert kept
    assert max(kept) <= given[0].numel()


def test_what_is_meant() -> None:
    half, single = torch.zeros(1, dtype=torch.bfloat16), torch.zeros(1)
    assert cpuattention.is_meant(half, 0.0)
    assert not cpuattention.is_meant(half, 0.1)
    assert not cpuattention.is_meant(single, 0.0)
    assert not cpuattention.is_meant(half.to("meta"), 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        assert cpuattention.is_meant(single, 0.0)
    with torch.autocast("cpu", torch.float16):
        assert not cpuattention.is_meant(single, 0.0)


def test_autocast_changes_nothing_but_the_format() -> None:
    row = ROWS["a pair"]
    *given, _ = _given(row)
    expected = treeattention._Blocks(row, torch.device("cpu")).attend(*given, None, 0.0)
    with torch.autocast("cpu", torch.bfloat16):
        blocks = treeattention._Blocks(row, torch.device("cpu"))
        found = blocks.attend(*(each.float() for each in given), None, 0.0)
    assert found.dtype == torch.bfloat16
    assert torch.equal(found, expected)
