"""Log-probabilities of chosen tokens from a model's last states, without ever holding all their logits."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from conf.entry import UserError

# Of the logits of one product: the head's weights are read, and their gradient is added to, once for many states.
_PRODUCT_BYTES = 1 << 26
# Logits that are worked on at a time: on a CPU 1 MiB in float32, which stays in a cache.
_BLOCK_BYTES = {"cpu": 1 << 20}


class Wanted(NamedTuple):
    """M tokens to score by N states."""

    states: Tensor  # (N,) where the states are, in the flattened batch
    pairs: np.ndarray  # (M,) which of the N states predicts each token; ascending
    tokens: Tensor  # (M,)
    with_statistics: bool = False  # of the states' distributions, without gradients


class Found(NamedTuple):
    """What the head says of M tokens, and of the distributions by which it says it (NaN where nobody asked)."""

    logp: Tensor  # (M,) log-probability, float32
    is_best: Tensor  # (M,) whether no token is likelier; the first of equals
    statistics: Tensor  # (M, 3): entropy in nats, mean logit, log Σ p²


@dataclass(frozen=True)
class Shaping:
    """What a model does to its logits: `cap · tanh(scale · x / cap)`, or `scale · x`."""

    scale: float = 1.0
    cap: float | None = None

    def apply_(self, logits: Tensor) -> Tensor:
        """In place."""
        if self.scale != 1:
            logits.mul_(self.scale)
        if self.cap is not None:
            logits.div_(self.cap).tanh_().mul_(self.cap)
        return logits

    def pull_back_(self, gradient: Tensor, shaped: Tensor | None) -> Tensor:
        """The gradient of what came in from that of what came out, in place."""
        if self.cap is not None and shaped is not None:
            gradient.mul_(1 - (shaped / self.cap) ** 2)
        if self.scale != 1:
            gradient.mul_(self.scale)
        return gradient


def shaping_of(config: Any) -> Shaping:
    """What a configuration says: Cohere's `logit_scale`, Granite's `logits_scaling`, Gemma 2's soft cap."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    if scale is None:
        scale = 1 / divisor if divisor else 1.0
    return Shaping(float(scale), getattr(config, "final_logit_softcapping", None))


@contextlib.contextmanager
def only_at(
    head: nn.Module, places: Tensor, seen: list[Tensor], passed: int | None, tokens: int
) -> Iterator[None]:
    """Let a head see chosen states alone, and keep them.

    Args:
        head: a model's last layer, called with states (B, S, H).
        places: (N,) numbers of states among the B·S.
        seen: the chosen states (N, H) are put here.
        passed: how many of them the head is called with; None: all.
        tokens: that the model was given, B·S.

    Raises:
        UserError: when the head is called with other states than those of the tokens.
    """

    def select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        every = inputs[0].flatten(0, -2)
        if len(every) != tokens:
            raise UserError(
                f"the model's head sees {len(every)} states of {tokens} tokens, so it cannot be said which is whose; "
                "adapters that put tokens of their own before a sequence (prompt tuning) are not read"
            )
        states = every[places]
        seen.append(states)
        return states[:passed], *inputs[1:]

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def enlarged(head: nn.Module) -> Iterator[None]:
    """Let a head see states that are sixteen times as large: the logits of real text, and caps show on them."""
    handle = head.register_forward_pre_hook(lambda _, inputs: (16 * inputs[0], *inputs[1:]))
    try:
        yield
    finally:
        handle.remove()


def is_plain(head: Any) -> bool:
    """Whether a head is one matrix in one place: not quantised, adapted or sharded."""
    return (
        type(head) is nn.Linear
        and type(head.weight) is nn.Parameter
        and head.weight.is_floating_point()
        and not hasattr(head.weight, "ds_id")  # ZeRO-3 keeps parts of it elsewhere
    )


def agrees(head: nn.Linear, shaping: Shaping, states: Tensor, logits: Tensor) -> bool:
    """Whether a model's own logits (N, V) are those of its head and a shaping."""
    product = _linear(states, head.weight, head.bias)
    ours = shaping.apply_(product.float())
    if ours.shape != logits.shape:
        return False
    # Under autocast the states may be wider than the product, which a model shapes in the product's own format.
    eps = max(torch.finfo(each.dtype).eps for each in (states, product))
    within = 8 * eps * logits.abs().max().item()
    return torch.allclose(ours, logits.float(), rtol=0, atol=within)


def by_head(head: nn.Linear, shaping: Shaping, states: Tensor, wanted: Wanted) -> Found:
    """Score tokens by a plain head, some states at a time, in the backward pass too.

    Args:
        head: see `is_plain`.
        shaping: see `agrees`.
        states: (N, H), what the head would be called with.
        wanted: the tokens.
    """
    device = states.device.type
    dtype = (
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else head.weight.dtype
    )
    bias = None if head.bias is None else head.bias.to(dtype)
    found = _ByHead.apply(  # type: ignore[no-untyped-call]
        states.to(dtype), head.weight.to(dtype), bias, wanted, shaping
    )
    return Found(*found)


def by_logits(logits: Tensor, wanted: Wanted) -> Found:
    """Score tokens by a model's own logits (N, V)."""
    pairs = torch.from_numpy(wanted.pairs).to(logits.device)
    totals, best, described = [], [], []
    for part in torch.split(logits, _block_size(logits)):
        totals.append(part.float().logsumexp(-1))
        best.append(part.detach().argmax(-1))
        if wanted.with_statistics:
            described.append(_described(part.detach().to(torch.float32, copy=True), True)[1])
        else:
            described.append(totals[-1].new_full((len(part), 3), torch.nan))
    logp = logits[pairs, wanted.tokens].float() - torch.cat(totals)[pairs]
    is_best = torch.cat(best)[pairs] == wanted.tokens
    return Found(logp, is_best, torch.cat(described)[pairs])


def _block_size(logits: Tensor) -> int:
    """Rows of logits that are worked on at a time, in float32."""
    return max(1, _BLOCK_BYTES.get(logits.device.type, _PRODUCT_BYTES) // (4 * logits.shape[-1]))


def _described(logits: Tensor, with_statistics: bool) -> tuple[Tensor, Tensor]:
    """Log-sum-exp (S,), and entropy, mean logit and log Σ p² (S, 3), of logits (S, V), which are written over."""
    statistics = logits.new_full((len(logits), 3), torch.nan)
    highest = logits.amax(-1)
    if not with_statistics:
        total = logits.sub_(highest[:, None]).exp_().sum(-1)
        return total.log() + highest, statistics
    statistics[:, 1] = logits.mean(-1)
    below = logits.sub_(highest[:, None])
    weights = below.exp()
    total = weights.sum(-1)
    statistics[:, 0] = total.log() - below.mul_(weights).sum(-1) / total
    statistics[:, 2] = weights.square_().sum(-1).log() - 2 * total.log()
    return total.log() + highest, statistics


def _linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(states.to(weight.dtype), weight, bias)


def _products(
    states: Tensor, weight: Tensor, bias: Tensor | None
) -> Iterator[tuple[slice, Tensor]]:
    """Which states, and the head's product with them, some states after the other in one buffer."""
    step = min(max(1, _PRODUCT_BYTES // (weight.element_size() * len(weight))), len(states))
    buffer = states.new_empty(step, len(weight))
    for start in range(0, len(states), step):
        part = states[start : start + step]
        product = torch.mm(part, weight.T, out=buffer[: len(part)])
        if bias is not None:
            product += bias
        yield slice(start, start + len(part)), product


class _Block(NamedTuple):
    rows: slice  # of the N states
    span: slice  # of the M tokens
    state: Tensor  # of those tokens, the state among these
    token: Tensor
    product: Tensor  # (states, V), in the head's format
    logits: Tensor  # the same, shaped, in float32; in the product's place where that is float32


def _blocks(
    rows: slice, product: Tensor, pairs: np.ndarray, tokens: Tensor, shaping: Shaping
) -> Iterator[_Block]:
    """The logits of a product, some rows after the other."""
    step = _block_size(product)
    exact = product.new_empty(min(step, len(product)), product.shape[-1], dtype=torch.float32)
    for part in torch.split(product, step):
        block = slice(rows.start, rows.start + len(part))
        rows = slice(block.stop, rows.stop)
        first, last = np.searchsorted(pairs, [block.start, block.stop])
        span = slice(int(first), int(last))
        state = torch.from_numpy(pairs[span] - block.start).to(product.device)
        logits = part if part.dtype == torch.float32 else exact[: len(part)].copy_(part)
        yield _Block(block, span, state, tokens[span], part, shaping.apply_(logits))


class _ByHead(torch.autograd.Function):
    """Log-probabilities (M,) and whether they are the highest (M,), of states (N, H) and weights (V, H).

    Between the passes it keeps the N log-sum-exps, and no logits: the backward pass computes them again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        wanted: Wanted,
        shaping: Shaping,
    ) -> tuple[Tensor, Tensor, Tensor]:
        pairs, tokens = wanted.pairs, wanted.tokens
        logp = torch.empty(len(tokens), device=states.device)
        statistics = torch.empty(len(tokens), 3, device=states.device)
        is_best = torch.empty(len(tokens), dtype=torch.bool, device=states.device)
        totals = torch.empty(len(states), device=states.device)
        for every, product in _products(states, weight, bias):
            for block in _blocks(every, product, pairs, tokens, shaping):
                rows, span, state, logits = block.rows, block.span, block.state, block.logits
                chosen = logits[state, block.token]
                is_best[span] = logits.argmax(-1)[state] == block.token
                totals[rows], described = _described(logits, wanted.with_statistics)
                logp[span] = chosen - totals[rows][state]
                statistics[span] = described[state]
        ctx.save_for_backward(states, weight, bias, tokens, totals)
        ctx.pairs, ctx.shaping = pairs, shaping
        ctx.mark_non_differentiable(is_best, statistics)
        return logp, is_best, statistics

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor, *_: Any) -> tuple[Any, ...]:
        states, weight, bias, tokens, totals = ctx.saved_tensors
        of_states, of_weight, of_bias = ctx.needs_input_grad[:3]
        pairs = torch.from_numpy(ctx.pairs).to(states.device)
        through = torch.zeros_like(totals).index_add_(0, pairs, gradient)  # Σ of a state's tokens
        d_states = torch.empty_like(states) if of_states else None
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if of_weight else None
        d_bias = torch.zeros_like(bias, dtype=torch.float32) if of_bias else None
        for every, product in _products(states, weight, bias):
            for block in _blocks(every, product, ctx.pairs, tokens, ctx.shaping):
                slope = _slope(block, totals, through, gradient, ctx.shaping)
                if d_bias is not None:
                    d_bias += slope.sum(0)
                block.product.copy_(slope)
            if d_states is not None:
                torch.mm(product, weight, out=d_states[every])
            if d_weight is not None:
                _add_product_(d_weight, product, states[every])
        return d_states, _as(d_weight, weight), _as(d_bias, bias), None, None


def _slope(
    block: _Block, totals: Tensor, through: Tensor, gradient: Tensor, shaping: Shaping
) -> Tensor:
    """The gradient of the head's product, in place: d log p(token) / d logits = one-hot(token) − softmax."""
    shaped = block.logits.clone() if shaping.cap is not None else None
    slope = block.logits.sub_(totals[block.rows, None]).exp_().mul_(-through[block.rows, None])
    slope.index_put_((block.state, block.token), gradient[block.span], accumulate=True)
    return shaping.pull_back_(slope, shaped)


def _add_product_(total: Tensor, slope: Tensor, states: Tensor) -> None:
    """Add slopeᵀ · states, summed over chunks in float32."""
    if slope.dtype == total.dtype:
        total.addmm_(slope.T, states)
    else:
        total += slope.T @ states


def _as(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)
