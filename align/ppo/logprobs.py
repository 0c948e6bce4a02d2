"""Log-probabilities and entropies from logits, in hardly more memory than that of the logits."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Products and casts do not look at their result again, so that their gradient may take its place.
_LEAVE_THEIR_RESULT = {"MmBackward0", "AddmmBackward0", "UnsafeViewBackward0", "ToCopyBackward0"}
# Logits that are worked on at a time: on a CPU 1 MiB in float32, which stays in a cache; elsewhere fewer, larger calls.
_CHUNK_VALUES = {"cpu": 1 << 18}
_CHUNK_VALUES_ELSEWHERE = 1 << 22


def token_logp(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """Log-probabilities of tokens (N,), float32; see `token_logp_and_entropy`."""
    logp: Tensor = _TokenLogp.apply(logits, tokens, temperature, False)[0]  # type: ignore[no-untyped-call]
    return logp


def token_logp_and_entropy(
    logits: Tensor, tokens: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of tokens and the entropies of the distributions they were drawn from (N,), float32, in nats.

    PyTorch's own `log_softmax` and `gather` hold three tensors of the logits' size in the backward pass and round a
    half-precision tensor up. Here there is one where the logits are a head's product: the gradient takes their place,
    so that a second backward pass through them fails. Else there are two.

    Args:
        logits: (N, V), of any float type.
        tokens: (N,).
        temperature: the logits are divided by it.
    """
    logp, entropy = _TokenLogp.apply(logits, tokens, temperature, True)  # type: ignore[no-untyped-call]
    return logp, entropy


def _chunks(logits: Tensor) -> Iterator[slice]:
    number, width = logits.shape
    step = max(1, _CHUNK_VALUES.get(logits.device.type, _CHUNK_VALUES_ELSEWHERE) // width)
    return (slice(start, min(start + step, number)) for start in range(0, number, step))


def _log_softmax(logits: Tensor, rows: slice, temperature: float) -> Tensor:
    """log π of some rows. A kernel of whole rows: the result must not depend on which rows are together."""
    return (logits[rows].float() / temperature).log_softmax(dim=-1)


class _TokenLogp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, tokens: Tensor, temperature: float, with_entropy: bool
    ) -> tuple[Tensor, Tensor | None]:
        logp = torch.empty(tokens.shape, dtype=torch.float32, device=logits.device)
        entropy = torch.empty_like(logp) if with_entropy else None
        for rows in _chunks(logits):
            every = _log_softmax(logits, rows, temperature)
            logp[rows] = every.gather(-1, tokens[rows, None])[:, 0]
            if entropy is not None:
                entropy[rows] = -every.exp().mul_(every).sum(dim=-1)
        ctx.save_for_backward(logits, tokens, entropy)
        ctx.temperature = temperature
        ctx.is_free = type(logits.grad_fn).__name__ in _LEAVE_THEIR_RESULT
        return logp, entropy

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, of_logp: Tensor, of_entropy: Tensor | None
    ) -> tuple[Tensor, None, None, None]:
        logits, tokens, entropy = ctx.saved_tensors
        gradient = logits if ctx.is_free else torch.empty_like(logits)
        for rows in _chunks(logits):
            every = _log_softmax(logits, rows, ctx.temperature)
            # d log π(token) / d logits = one-hot(token) − π;  d H / d logits = −π · (log π + H)
            share = every.exp()
            if entropy is None:
                share.mul_(-of_logp[rows, None])
            else:
                assert of_entropy is not None
                every.add_(entropy[rows, None]).mul_(of_entropy[rows, None])
                share.mul_(every.add_(of_logp[rows, None]).neg_())
            share.scatter_add_(-1, tokens[rows, None], of_logp[rows, None])
            gradient[rows] = share.div_(ctx.temperature)
        return gradient, None, None, None
