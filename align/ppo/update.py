"""What one micro-batch teaches, and the numbers of a step."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from align.ppo import core
from align.ppo.config import PPOConfig
from align.ppo.model import Scored
from align.ppo.rollout import Rollout


class TokenWeights(NamedTuple):
    """What each token of a rollout weighs in the loss of a step (B, T); each adds up to 1 over all micro-batches."""

    policy: Tensor
    value: Tensor


class Sums(NamedTuple):
    """Sums over tokens, to be added over micro-batches and processes."""

    tokens: float
    value_tokens: float
    policy_loss: float
    value_loss: float
    ratio: float
    ratio_squared: float  # of ρ − 1
    k2: float
    k3: float
    clipped_high: float
    clipped_low: float
    dual_clipped: float
    value_clipped: float
    entropy: float
    entropy_loss: float
    kl_loss: float
    loss: float  # of all of these together
    farthest: float  # the highest |ρ − 1|, no sum

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


def micro_loss(
    scored: Scored,
    rollout: Rollout,
    weights: TokenWeights,
    where: tuple[Tensor, Tensor],
    is_real: bool,
    args: PPOConfig,
) -> tuple[Tensor, Sums]:
    """The part of a step's loss that one micro-batch holds.

    Args:
        scored: what the models say now of N tokens.
        rollout: what was said of them before, and what they are worth.
        weights: of the tokens in this step.
        where: (N,) each: response and token, the place in the rollout.
        is_real: False: take part, but teach nothing.
        args: the clips and coefficients.
    """
    assert scored.logp is not None
    assert scored.values is not None
    device = scored.logp.device

    def at(x: Tensor) -> Tensor:
        return x[where].to(device)

    mask, policy_mask = at(rollout.mask) & is_real, at(rollout.policy_mask) & is_real
    low, high = args.policy_clip
    policy = core.policy_loss(
        scored.logp,
        at(rollout.old_logp),
        at(rollout.advantages),
        policy_mask,
        clip_low=low,
        clip_high=high,
        dual_clip=args.dual_clip,
        weights=None if rollout.weights is None else at(rollout.weights),
    )
    value, is_value_clipped = core.value_loss(
        scored.values, at(rollout.old_values), at(rollout.returns), mask, args.cliprange_value
    )
    policy_loss = (policy.loss * at(weights.policy)).sum()
    value_loss = (value * at(weights.value)).sum()
    loss = policy_loss + args.vf_coef * value_loss
    entropy = torch.zeros_like(policy.loss)
    if scored.entropy is not None:
        entropy = core.only(scored.entropy, policy_mask)
    entropy_loss = kl_loss = torch.zeros(())
    if args.entropy_coef:
        entropy_loss = -(entropy * at(weights.policy)).sum()
        loss = loss + args.entropy_coef * entropy_loss
    if rollout.ref_logp is not None:
        old, ref = at(rollout.old_logp), at(rollout.ref_logp)
        kl = core.kl_loss(scored.logp, old, ref, policy_mask, args.kl_loss_type)
        kl_loss = (kl * at(weights.policy)).sum()
        loss = loss + args.kl_loss_coef * kl_loss
    off = core.only(policy.ratio.detach() - 1, policy_mask)
    log_ratio = core.only(scored.logp.detach() - at(rollout.old_logp), policy_mask)
    sums = Sums(
        tokens=_sum(policy_mask),
        value_tokens=_sum(mask),
        policy_loss=_sum(policy_loss),
        value_loss=_sum(value_loss),
        ratio=_sum(policy.ratio),
        ratio_squared=_sum(off**2),
        k2=_sum(0.5 * log_ratio**2),
        k3=_sum(core.only(off - log_ratio, policy_mask)),
        clipped_high=_sum(policy.is_clipped_high),
        clipped_low=_sum(policy.is_clipped_low),
        dual_clipped=_sum(policy.is_dual_clipped),
        value_clipped=_sum(is_value_clipped),
        entropy=_sum(entropy),
        entropy_loss=_sum(entropy_loss),
        kl_loss=_sum(kl_loss),
        loss=_sum(loss),
        farthest=float(off.abs().amax()),
    )
    return loss, sums


def _sum(x: Tensor) -> float:
    return float(x.detach().double().sum())
