"""Log-probabilities of chosen tokens from a model's last states, without ever holding all their logits."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# Logits of one step over states: 64 MiB in float32, so that a step reads the head's weights once for many states.
_CHUNK_VALUES = 1 << 24


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
    head: nn.Module, places: Tensor, seen: list[Tensor], passed: int | None
) -> Iterator[None]:
    """Let a head see chosen states alone, and keep them.

    Args:
        head: a model's last layer, called with states (B, S, H).
        places: (N,) numbers of states among the B·S.
        seen: the chosen states (N, H) are put here.
        passed: how many of them the head is called with; None: all.
    """

    def select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        states = inputs[0].flatten(0, -2)[places]
        seen.append(states)
        return states[:passed], *inputs[1:]

    handle = head.register_forward_pre_hook(select)
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
    step = max(1, _CHUNK_VALUES // logits.shape[-1])
    totals, best, described = [], [], []
    for part in torch.split(logits, step):
        totals.append(part.float().logsumexp(-1))
        best.append(part.detach().argmax(-1))
        described.append(_described(part.detach().float(), wanted.with_statistics))
    logp = logits[pairs, wanted.tokens].float() - torch.cat(totals)[pairs]
    is_best = torch.cat(best)[pairs] == wanted.tokens
    return Found(logp, is_best, torch.cat(described)[pairs])


def _described(logits: Tensor, is_wanted: bool) -> Tensor:
    """Entropy, mean logit and log Σ p² of rows of logits (S, V); shape (S, 3). Twice their memory."""
    found = logits.new_full((len(logits), 3), torch.nan)
    if not is_wanted:
        return found
    found[:, 1] = logits.mean(-1)
    below = logits - logits.amax(-1, keepdim=True)
    weights = below.exp()
    total = weights.sum(-1)
    found[:, 0] = total.log() - torch.linalg.vecdot(weights, below) / total
    found[:, 2] = torch.linalg.vecdot(weights, weights).log() - 2 * total.log()
    return found


def _linear(states: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return nn.functional.linear(states.to(weight.dtype), weight, bias)


class _Chunk(NamedTuple):
    rows: slice  # of the N states
    span: slice  # of the M tokens
    state: Tensor  # of those tokens, the state among these
    token: Tensor
    logits: Tensor  # (states, V), float32; written over by the next chunk


def _chunks(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pairs: np.ndarray,
    tokens: Tensor,
    shaping: Shaping,
) -> Iterator[_Chunk]:
    """The logits of some states after the other, in one buffer."""
    step = min(max(1, _CHUNK_VALUES // len(weight)), len(states))
    buffer = states.new_empty(step, len(weight))
    exact = buffer if buffer.dtype == torch.float32 else buffer.float()
    for start in range(0, len(states), step):
        part = states[start : start + step]
        logits = torch.mm(part, weight.T, out=buffer[: len(part)])
        if bias is not None:
            logits += bias
        if exact is not buffer:
            logits = exact[: len(part)].copy_(logits)
        first, last = np.searchsorted(pairs, [start, start + step])
        span = slice(int(first), int(last))
        state = torch.from_numpy(pairs[span] - start).to(states.device)
        rows = slice(start, start + len(part))
        yield _Chunk(rows, span, state, tokens[span], shaping.apply_(logits))


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
        for rows, span, state, token, logits in _chunks(
            states, weight, bias, pairs, tokens, shaping
        ):
            chosen = logits[state, token]
            statistics[span] = _described(logits, wanted.with_statistics)[state]
            highest, where = logits.max(-1)
            total = logits.sub_(highest[:, None]).exp_().sum(-1).log_().add_(highest)
            totals[rows] = total
            logp[span] = chosen - total[state]
            is_best[span] = where[state] == token
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
        for rows, span, state, token, logits in _chunks(
            states, weight, bias, ctx.pairs, tokens, ctx.shaping
        ):
            # d log p(token) / d logits = one-hot(token) − softmax
            shaped = logits.clone() if ctx.shaping.cap is not None else None
            slope = logits.sub_(totals[rows, None]).exp_().mul_(-through[rows, None])
            slope.index_put_((state, token), gradient[span], accumulate=True)
            ctx.shaping.pull_back_(slope, shaped)
            if d_bias is not None:
                d_bias += slope.sum(0)
            slope = slope.to(weight.dtype)
            if d_states is not None:
                torch.mm(slope, weight, out=d_states[rows])
            if d_weight is not None:
                _add_product_(d_weight, slope, states[rows])
        return d_states, _as(d_weight, weight), _as(d_bias, bias), None, None


def _add_product_(total: Tensor, slope: Tensor, states: Tensor) -> None:
    """Add slopeᵀ · states, summed over chunks in float32."""
    if slope.dtype == total.dtype:
        total.addmm_(slope.T, states)
    else:
        total += slope.T @ states


def _as(gradient: Tensor | None, like: Tensor | None) -> Tensor | None:
    return None if gradient is None or like is None else gradient.to(like.dtype)
