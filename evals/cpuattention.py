"""Attention of rows of trees in bfloat16 on a CPU, by matrix products.

PyTorch's flash kernel takes two to four times as long there, and a call for each block, with copies around it
(docs/scorer.md). Scores and their softmax are float32; they are made some queries at a time, and again in the backward
pass: nothing of the size queries × keys is kept.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evals.trees import Block

_VALUES = 1 << 18  # scores at a time: 1 MiB in float32, which stays in a cache


class Tree(NamedTuple):
    """The blocks of a row, and of each, which of its own tokens sees which, (n, n) bool."""

    blocks: Sequence[Block]
    sees: Sequence[Tensor]


def is_meant(query: Tensor, dropout: float) -> bool:
    """Whether this module computes attention of such queries: in bfloat16, or under autocast to it."""
    if query.device.type != "cpu" or dropout:
        return False
    if torch.is_autocast_enabled("cpu"):
        return torch.get_autocast_dtype("cpu") == torch.bfloat16
    return query.dtype == torch.bfloat16


def attend(query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float | None) -> Tensor:
    """Attention (1, H, T, E) of a row.

    Args:
        query: (1, H, T, D).
        key, value: (1, K, T, D) and (1, K, T, E), where K divides H.
        tree: which token sees which.
        scale: of the scores; None: 1 / √D.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    query, key, value = (part.to(torch.bfloat16)[0] for part in (query, key, value))
    query = query.view(len(key), -1, *query.shape[1:])
    with torch.autocast("cpu", enabled=False):
        found: Tensor = _Attention.apply(query, key, value, tree, scale)  # type: ignore[no-untyped-call]
    return found.flatten(0, 1)[None]


class _Attention(torch.autograd.Function):
    """Of queries (K, G, T, D), keys (K, T, D) and values (K, T, E); shape (K, G, T, E)."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, tree: Tree, scale: float
    ) -> Tensor:
        (groups, heads, length, _), width = query.shape, value.shape[-1]
        # In this layout it is (T, H · D) for the projection that follows, without a copy.
        found = query.new_empty(length, groups, heads, width).permute(1, 2, 0, 3)
        for block, sees in zip(*tree, strict=True):
            keys, values = _seen(key, block, tree), _seen(value, block, tree)
            exact = keys.float()
            for part in _parts(query, block, sees, keys.shape[1]):
                weights = _weights(part, exact, scale).to(values.dtype)
                attended = torch.bmm(weights, values[:, : part.seen])
                found[:, :, part.rows] = attended.view(groups, heads, -1, width)
        ctx.save_for_backward(query, key, value)
        ctx.tree, ctx.scale = tree, scale
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        query, key, value = ctx.saved_tensors
        d_query = torch.empty_like(query)
        d_key, d_value = (torch.zeros_like(each, dtype=torch.float32) for each in (key, value))
        for block, sees in zip(*ctx.tree, strict=True):
            keys, values = _seen(key, block, ctx.tree), _seen(value, block, ctx.tree)
            exact = keys.float()
            d_keys, d_values = (torch.zeros_like(x, dtype=torch.float32) for x in (keys, values))
            for part in _parts(query, block, sees, keys.shape[1]):
                slope = gradient[:, :, part.rows].flatten(1, 2)
                weights = _weights(part, exact, ctx.scale)
                d_values[:, : part.seen] += torch.bmm(weights.to(key.dtype).mT, slope)
                d_scores = torch.bmm(slope, values[:, : part.seen].mT).float()
                d_scores -= (weights * d_scores).sum(-1, keepdim=True)
                d_products = d_scores.mul_(weights).mul_(ctx.scale).to(key.dtype)
                of_query = torch.bmm(d_products, keys[:, : part.seen])
                d_query[:, :, part.rows] = of_query.view_as(query[:, :, part.rows])
                d_keys[:, : part.seen] += torch.bmm(d_products.mT, part.query)
            _add_(d_key, d_keys, block, ctx.tree)
            _add_(d_value, d_values, block, ctx.tree)
        return d_query, d_key.to(key.dtype), d_value.to(value.dtype), None, None


class _Part(NamedTuple):
    rows: slice  # of the T tokens
    query: Tensor  # (K, G · rows, D)
    seen: int  # of the keys that the block sees
    sees: Tensor  # (rows, o) which of the last o of these


def _parts(query: Tensor, block: Block, sees: Tensor, keys: int) -> Iterator[_Part]:
    """Queries of a block, some after the other."""
    size = block.stop - block.start
    step = max(1, _VALUES // (query.shape[0] * query.shape[1] * keys))
    for first in range(0, size, step):
        last = min(first + step, size)
        rows = slice(block.start + first, block.start + last)
        yield _Part(
            rows,
            query[:, :, rows].flatten(1, 2),
            keys - size + last,  # nobody sees what stands behind the last of them
            sees[first:last, :last],
        )


def _weights(part: _Part, keys: Tensor, scale: float) -> Tensor:
    """Softmax of the scores (K, G · rows, seen), float32 as the keys: rounded scores would double the error."""
    scores = torch.bmm(part.query.float(), keys[:, : part.seen].mT).mul_(scale)
    rows, own = part.sees.shape
    own_scores = scores.view(len(keys), -1, rows, part.seen)[..., part.seen - own :]
    own_scores.masked_fill_(~part.sees, -torch.inf)
    return scores.softmax(-1)


def _ranges(block: Block, tree: Tree) -> list[slice]:
    """What a block sees: blocks before it, and itself."""
    seen = [tree.blocks[number] for number in block.before]
    return [slice(each.start, each.stop) for each in (*seen, block)]


def _seen(states: Tensor, block: Block, tree: Tree) -> Tensor:
    return torch.cat([states[:, each] for each in _ranges(block, tree)], dim=1)


def _add_(total: Tensor, part: Tensor, block: Block, tree: Tree) -> None:
    ranges = _ranges(block, tree)
    sizes = [each.stop - each.start for each in ranges]
    for place, piece in zip(ranges, torch.split(part, sizes, dim=1), strict=True):
        total[:, place] += piece
