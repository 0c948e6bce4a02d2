"""What one micro-batch teaches, and the numbers of a step."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from align.ppo import core
from align.ppo.config import PPOConfig
from align.ppo.model import Scored
from align.ppo.rollout import Rollout

_At = Callable[[Tensor], Tensor]  # (B, T) of a rollout → the (N,) tokens of a micro-batch


class TokenWeights(NamedTuple):
    """What each token of a rollout weighs in the loss of a step (B, T); each adds up to 1 over all micro-batches."""

    policy: Tensor
    value: Tensor


class Sums(NamedTuple):
    """Sums over tokens, to be added over micro-batches and processes; what a model was not asked for is 0."""

    tokens: float = 0.0
    value_tokens: float = 0.0
    policy_loss: float = 0.0
    value_loss: float = 0.0
    ratio: float = 0.0
    ratio_squared: float = 0.0  # of ρ − 1
    k2: float = 0.0
    k3: float = 0.0
    clipped_high: float = 0.0
    clipped_low: float = 0.0
    dual_clipped: float = 0.0
    value_clipped: float = 0.0
    entropy: float = 0.0
    entropy_loss: float = 0.0
    kl_loss: float = 0.0
    loss: float = 0.0  # of all of these together
    farthest: float = 0.0  # the highest |ρ − 1|, no sum

    @classmethod
    def added(cls, parts: Sequence["Sums"]) -> "Sums":
        """All of them together."""
        columns = dict(zip(cls._fields, zip(*parts, strict=True), strict=True))
        farthest = highest(columns.pop("farthest"))
        return cls(
            **{name: math.fsum(column) for name, column in columns.items()}, farthest=farthest
        )

    @property
    def mean_ratio(self) -> float:
        """Mean of π_θ / π_old; 1 where the policy has no token to learn from."""
        return self.ratio / self.tokens if self.tokens else 1.0

    @property
    def mean_k3(self) -> float:
        """Nats a token from the policy that wrote the rollout."""
        return self.k3 / max(self.tokens, 1)

    def described(self) -> dict[str, float]:
        """The step's numbers under the names that dashboards know."""
        tokens, value_tokens = max(self.tokens, 1), max(self.value_tokens, 1)
        return {
            "loss/policy_avg": self.policy_loss,
            "loss/value_avg": self.value_loss,
            "loss/entropy": self.entropy_loss,
            "loss/kl": self.kl_loss,
            "policy/approxkl_avg": self.k2 / tokens,
            "policy/approxkl_k3": self.mean_k3,
            "policy/clipfrac_avg": (self.clipped_high + self.clipped_low) / tokens,
            "policy/clipfrac_high": self.clipped_high / tokens,
            "policy/clipfrac_low": self.clipped_low / tokens,
            "policy/dualclipfrac": self.dual_clipped / tokens,
            "policy/entropy_avg": self.entropy / tokens,
            "val/clipfrac_avg": self.value_clipped / value_tokens,
            "val/ratio": self.mean_ratio,
            "val/ratio_var": self.ratio_squared / tokens - (self.mean_ratio - 1) ** 2,
            "val/ratio_max": 1 + self.farthest,
        }


def token_weights(rollout: Rollout, step: Sequence[int], args: PPOConfig) -> TokenWeights:
    """Every token alike, or every response alike.

    Args:
        rollout: all responses.
        step: those that the optimizer step learns from.
        args: `loss_aggregation` is read.
    """
    is_chosen = torch.zeros(len(rollout.samples), 1, dtype=torch.bool)
    is_chosen[list(step)] = True
    found = []
    for mask in (rollout.policy_mask & is_chosen, rollout.mask & is_chosen):
        weights = mask.float()
        if args.loss_aggregation == "seq_mean":
            weights = weights / weights.sum(dim=1, keepdim=True).clamp(min=1)
        found.append(weights / weights.sum().clamp(min=torch.finfo(torch.float32).tiny))
    return TokenWeights(*found)


def highest(values: Sequence[float]) -> float:
    """The highest value; NaN if one is."""
    return math.nan if any(map(math.isnan, values)) else max(values)


def micro_loss(
    scored: Scored,
    rollout: Rollout,
    weights: TokenWeights,
    where: tuple[Tensor, Tensor],
    is_real: bool,
    args: PPOConfig,
) -> tuple[Tensor, Sums]:
    """The part of a step's loss that one micro-batch holds, for the models that were asked.

    Args:
        scored: what the policy, the critic or both say now of N tokens.
        rollout: what was said of them before, and what they are worth.
        weights: of the tokens in this step.
        where: (N,) each: response and token, the place in the rollout.
        is_real: False: take part, but teach nothing.
        args: the clips and coefficients.
    """
    seen = scored.values if scored.logp is None else scored.logp
    assert seen is not None

    def at(x: Tensor) -> Tensor:
        return x[where].to(seen.device)

    learns = []
    if scored.logp is not None:
        learns.append(
            _policy_loss(scored.logp, scored.entropy, rollout, weights, at, is_real, args)
        )
    if scored.values is not None:
        learns.append(_value_loss(scored.values, rollout, weights, at, is_real, args))
    losses, sums = zip(*learns, strict=True)
    return torch.stack(losses).sum(), Sums.added(sums)


def _policy_loss(
    logp: Tensor,
    entropy: Tensor | None,
    rollout: Rollout,
    weights: TokenWeights,
    at: _At,
    is_real: bool,
    args: PPOConfig,
) -> tuple[Tensor, Sums]:
    mask, weight = at(rollout.policy_mask) & is_real, at(weights.policy)
    low, high = args.policy_clip
    policy = core.policy_loss(
        logp,
        at(rollout.old_logp),
        at(rollout.advantages),
        mask,
        clip_low=low,
        clip_high=high,
        dual_clip=args.dual_clip,
        weights=None if rollout.weights is None else at(rollout.weights),
    )
    loss = policy_loss = (policy.loss * weight).sum()
    entropy = torch.zeros_like(policy.loss) if entropy is None else core.only(entropy, mask)
    entropy_loss = kl_loss = torch.zeros(())
    if args.entropy_coef:
        entropy_loss = -(entropy * weight).sum()
        loss = loss + args.entropy_coef * entropy_loss
    if rollout.ref_logp is not None:
        old, ref = at(rollout.old_logp), at(rollout.ref_logp)
        kl = core.kl_loss(logp, old, ref, mask, args.kl_loss_type)
        kl_loss = (kl * weight).sum()
        loss = loss + args.kl_loss_coef * kl_loss
    off = core.only(policy.ratio.detach() - 1, mask)
    log_ratio = core.only(logp.detach() - at(rollout.old_logp), mask)
    return loss, Sums(
        tokens=_sum(mask),
        policy_loss=_sum(policy_loss),
        ratio=_sum(policy.ratio),
        ratio_squared=_sum(off**2),
        k2=_sum(0.5 * log_ratio**2),
        k3=_sum(core.only(off - log_ratio, mask)),
        clipped_high=_sum(policy.is_clipped_high),
        clipped_low=_sum(policy.is_clipped_low),
        dual_clipped=_sum(policy.is_dual_clipped),
        entropy=_sum(entropy),
        entropy_loss=_sum(entropy_loss),
        kl_loss=_sum(kl_loss),
        loss=_sum(loss),
        farthest=float(off.abs().amax()),
    )


def _value_loss(
    values: Tensor, rollout: Rollout, weights: TokenWeights, at: _At, is_real: bool, args: PPOConfig
) -> tuple[Tensor, Sums]:
    mask = at(rollout.mask) & is_real
    each, is_clipped = core.value_loss(
        values, at(rollout.old_values), at(rollout.returns), mask, args.cliprange_value
    )
    value_loss = (each * at(weights.value)).sum()
    loss = args.vf_coef * value_loss
    return loss, Sums(
        value_tokens=_sum(mask),
        value_loss=_sum(value_loss),
        value_clipped=_sum(is_clipped),
        loss=_sum(loss),
    )


def _sum(x: Tensor) -> float:
    return float(x.detach().double().sum())
