"""Whether an engine draws from the policy in training, and what a token weighs where it does so only nearly.

An engine with kernels, a number format or weights of its own gives a token another probability than the trainer does.
A little is in the nature of the thing, and is corrected by importance weights (Yao et al. 2025, "Your efficient RL
framework secretly brings you off-policy RL training"). Much is a mistake, which no weight puts right.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from align.ppo import core
from align.ppo.batches import Sample
from align.ppo.config import PPOConfig
from conf.entry import UserError


class Gap(NamedTuple):
    """How far the log-probabilities of an engine are from the trainer's, in nats of a token."""

    mean: float
    largest: float
    tokens: int  # that the engine gave a number for

    def described(self) -> dict[str, float]:
        """The numbers under the names that dashboards know."""
        return {"sampling/logp_diff_mean": self.mean, "sampling/logp_diff_max": self.largest}


def gap(samples: Sequence[Sample], logp: Sequence[Sequence[float]]) -> Gap | None:
    """The gap over all tokens; None when the engine gave no numbers.

    Args:
        samples: B responses with what the engine says of their tokens.
        logp: of each response (L,), what the trainer says.
    """
    off = [
        abs(ours - theirs)
        for sample, own in zip(samples, logp, strict=True)
        if sample.sampler_logp is not None
        for ours, theirs in zip(own, sample.sampler_logp, strict=True)
        if not math.isnan(theirs)
    ]
    return Gap(math.fsum(off) / len(off), max(off), len(off)) if off else None


def checked(
    samples: Sequence[Sample], logp: Sequence[Sequence[float]], args: PPOConfig
) -> Gap | None:
    """The gap, see `gap`, where training may go on with it.

    Raises:
        UserError: when the mean is more than `sampler_tolerance`.
    """
    found = gap(samples, logp)
    if found is None or found.mean <= args.sampler_tolerance:  # a NaN is refused
        return found
    raise UserError(
        f"the {args.engine} engine does not draw from the policy in training: over {found.tokens} tokens of "
        f"{len(samples)} responses its log-probabilities differ from the trainer's by {found.mean:.3g} nats on average "
        f"and {found.largest:.3g} at most, where ppo.args.sampler_tolerance={args.sampler_tolerance:g} on average is "
        "allowed. Likely causes: it reports log-probabilities from before the temperature (vLLM: start it with "
        "--logprobs-mode processed_logprobs); it holds other weights (another model, or it did not load the new ones); "
        "it computes in a coarser number format (vLLM: --dtype, quantization)"
    )


def weights(
    samples: Sequence[Sample], logp: Tensor, mask: Tensor, args: PPOConfig
) -> tuple[Tensor | None, dict[str, float]]:
    """Importance weights (B, T), and numbers of them for the log; None where no token needs one.

    Args:
        samples: the responses (B,), with what the engine says of their tokens where it says it.
        logp: (B, T) what the trainer says.
        mask: (B, T) tokens that were written.
        args: `importance_correction` and its cap.
    """
    if all(sample.sampler_logp is None for sample in samples):
        return None, {}
    theirs = torch.full_like(logp, torch.nan)
    for row, sample in enumerate(samples):
        if sample.sampler_logp is not None:
            theirs[row, : len(sample.sampler_logp)] = torch.tensor(sample.sampler_logp)
    ratio = core.importance_weights(logp, theirs, mask, math.inf)
    found = None
    if args.importance_correction != "none":
        found = core.importance_weights(
            logp, theirs, mask, args.importance_cap, args.importance_correction == "mask"
        )
    changed = torch.zeros_like(mask) if found is None else (found != ratio) & mask
    return found, {
        "sampling/is_ratio_mean": float(core.moments(ratio, mask).mean),
        "sampling/is_clipfrac": float(core.moments(changed, mask).mean),
    }
