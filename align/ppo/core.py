"""The arithmetic of PPO on tensors. Nothing here knows of models, tokenizers or processes.

Notation, for B responses of at most T tokens:

    mask      (B, T) bool   True: a token that the policy wrote, its end token among them. Its first False is mostly
                            padding, but a response may hold tokens of a tool, which are no actions
    logp      (B, T)        log-probability of token t under the policy that sampled it, "old" in the paper
    ref_logp  (B, T)        the same under the reference
    values    (B, T)        V(s_t): the expected return from before token t on
    scores    (B,)          what the whole response is worth, see `align.ppo.scores`

Everything is float32 or wider, whatever the models are in. What a masked slot holds is never read: it may be NaN.

Sources: Schulman et al. 2017 (PPO, arXiv 1707.06347) and 2016 (GAE, 1506.02438), Ziegler et al. 2019 (1909.08593),
Huang et al. 2024 (N+ implementation details, 2403.17031), Schulman 2020 (joschu.net/blog/kl-approx).
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

_MOST_LOG_RATIO = 20.0  # exp(20) is 5e8; a longer step is lost already and must not overflow
_EPSILON = 1e-8


def only(x: Tensor, mask: Tensor) -> Tensor:
    """`x` with zeros where the mask is False, whatever was there."""
    if mask.dtype != torch.bool:
        raise TypeError(f"a mask is bool, this one is {mask.dtype}")
    return torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))


# --- divergence from the reference ---


def k1(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """log π − log π_ref of each token (B, T): unbiased, and negative for some tokens.

    As a part of the reward it gives the unbiased gradient of the reverse KL (arXiv 2510.01555). k3 would not: a policy
    trained with it in the reward ends at a wrong optimum.
    """
    return only(logp - ref_logp, mask)


def k3(logp: Tensor, ref_logp: Tensor, mask: Tensor) -> Tensor:
    """exp(−k1) − 1 + k1 of each token (B, T): never negative and of little variance, so a good number to log."""
    log_ratio = k1(logp, ref_logp, mask).clamp(-_MOST_LOG_RATIO, _MOST_LOG_RATIO)
    return only(torch.expm1(-log_ratio) + log_ratio, mask)


def kl_loss(
    logp: Tensor, old_logp: Tensor, ref_logp: Tensor, mask: Tensor, kind: str = "k2"
) -> Tensor:
    """A divergence from the reference as a loss of each token (B, T), whose gradient is that of the reverse KL.

    `k2`, ½ (log π − log π_ref)², has it on policy. `k3_is` is k3 times the ratio π / π_old that carries a gradient
    too, so that it holds for later steps of a rollout as well (DeepSeek-V3.2, arXiv 2512.02556); k3 alone would not
    have it (arXiv 2512.21852).

    Args:
        logp: (B, T) under the policy in training; carries the gradient.
        old_logp, ref_logp, mask: (B, T), without gradient.
        kind: `k2` or `k3_is`.
    """
    if kind == "k2":
        return 0.5 * k1(logp, ref_logp, mask) ** 2
    log_ratio = only(logp - old_logp, mask).clamp(-_MOST_LOG_RATIO, _MOST_LOG_RATIO)
    return log_ratio.exp() * k3(logp, ref_logp, mask)


# --- rewards ---


def last_token(mask: Tensor) -> Tensor:
    """Place of the last True of each row (B,); 0 for a row without one."""
    places = torch.arange(mask.shape[1], device=mask.device)
    return torch.where(mask, places, 0).amax(dim=1)


def token_rewards(kl: Tensor, scores: Tensor, mask: Tensor, kl_coef: float) -> Tensor:
    """The reward of each token (B, T): −β · kl, and the score on the last token of the response, its end token if any.

    Args:
        kl: (B, T), see `k1`.
        scores: (B,); or (B, T) when each token has a score of its own.
        mask: (B, T).
        kl_coef: β, now.
    """
    rewards = only(-kl_coef * kl, mask)
    if scores.dim() == 2:
        return rewards + only(scores.to(rewards.dtype), mask)
    ends = last_token(mask)[:, None]
    has_any = mask.any(dim=1)
    return rewards.scatter_add(1, ends, only(scores, has_any)[:, None].to(rewards.dtype))


def overlong_penalty(lengths: Tensor, limit: int, buffer: int, factor: float = 1.0) -> Tensor:
    """A penalty (B,) from 0 to −factor for the last `buffer` of `limit` tokens (DAPO, arXiv 2503.14476, eq. 13).

    A response that has reached the limit gets all of it.
    """
    into = (lengths - (limit - buffer)).clamp(0, buffer)
    return -factor * into.float() / buffer


# --- advantages ---


class Advantages(NamedTuple):
    """What an action was better than expected by, and what the critic should have expected; (B, T) each."""

    advantages: Tensor
    returns: Tensor


def gae(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float | Tensor = 0.95,
    bootstrap: Tensor | None = None,
) -> Advantages:
    """Generalized advantage estimation (arXiv 1506.02438, eq. 11–16), from the last token to the first.

        δ_t = r_t + γ V_{t+1} − V_t;  A_t = δ_t + γ λ A_{t+1};  R_t = A_t + V_t

    Over a masked token inside a response, advantage and next value are carried unchanged: no time passes there.

    Args:
        rewards, values, mask: (B, T).
        gamma: discount.
        lam: one λ, or one for each response (B,).
        bootstrap: (B,) value of the state after the last token, for responses that were cut off and are to be judged
            as if they went on; None: every response is over.
    """
    rewards, values = only(rewards, mask), only(values, mask)
    advantages = torch.zeros_like(values)
    following = torch.zeros_like(values[:, 0])  # A_{t+1}
    next_value = following.clone() if bootstrap is None else bootstrap.to(values.dtype)
    for t in reversed(range(values.shape[1])):
        is_action = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * following
        advantages[:, t] = only(advantage, is_action)
        following = torch.where(is_action, advantage, following)
        next_value = torch.where(is_action, values[:, t], next_value)
    return Advantages(advantages, advantages + values)


def adaptive_lambda(lengths: Tensor, alpha: float = 0.05) -> Tensor:
    """λ of each response by its length (B,): 1 − 1/(αL), from 0 up to 0.999 (VAPO, arXiv 2504.05118, eq. 6)."""
    return (1 - 1 / (alpha * lengths.clamp(min=1).float())).clamp(0.0, 0.999)


class Moments(NamedTuple):
    """How many, their mean and their population variance."""

    number: Tensor
    mean: Tensor
    variance: Tensor


def moments(x: Tensor, mask: Tensor) -> Moments:
    """Moments over what the mask lets through.

    Two passes in float64: the difference of large squares loses every digit of a small variance. Of nothing, the mean
    is 0 and the variance 0.
    """
    number = mask.sum().double()
    mean = only(x.double(), mask).sum() / number.clamp(min=1)
    squares = only((x.double() - mean) ** 2, mask).sum()
    return Moments(number, mean, squares / number.clamp(min=1))


def whiten(x: Tensor, mask: Tensor, *, keeps_mean: bool = False) -> Tensor:
    """`x` with mean 0 and variance 1 over all tokens of a whole rollout (B, T); 0 outside the mask.

    The variance is that of the population, which is finite for one token. `keeps_mean`: the mean is left as it was.
    """
    _, mean, variance = moments(x, mask)
    white = (x.double() - mean) * torch.rsqrt(variance + _EPSILON)
    return only((white + mean if keeps_mean else white).to(x.dtype), mask)


# --- losses: of each token, to be summed and divided by one count for all micro-batches and processes ---


class PolicyLoss(NamedTuple):
    """The clipped objective, token by token (B, T), and what it did; 0 outside the mask."""

    loss: Tensor
    ratio: Tensor  # π_θ / π_old
    is_clipped_high: Tensor  # bool
    is_clipped_low: Tensor  # bool
    is_dual_clipped: Tensor  # bool


def policy_loss(
    logp: Tensor,
    old_logp: Tensor,
    advantages: Tensor,
    mask: Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
) -> PolicyLoss:
    """max(−A ρ, −A clip(ρ, 1 − ε_low, 1 + ε_high)) (arXiv 1707.06347, eq. 7).

    Args:
        logp: (B, T) under the policy in training; carries the gradient.
        old_logp, advantages, mask: (B, T), without gradient.
        clip_low, clip_high: ε on either side; a higher `clip_high` lets unlikely tokens rise (DAPO, 2503.14476).
        dual_clip: c > 1 bounds the loss of a bad action whose ratio exploded by c·|A| (Ye et al. 2020, 1912.09729).
        weights: (B, T) importance weights for a sampler that is not quite the policy, see `importance_weights`.
    """
    log_ratio = only(logp - old_logp, mask).clamp(-_MOST_LOG_RATIO, _MOST_LOG_RATIO)
    ratio = log_ratio.exp()
    advantages = only(advantages, mask)
    loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - clip_low, 1 + clip_high))
    is_dual_clipped = torch.zeros_like(mask)
    if dual_clip is not None:
        bound = -advantages * dual_clip
        is_dual_clipped = (advantages < 0) & (loss > bound) & mask
        loss = torch.where(is_dual_clipped, bound, loss)
    if weights is not None:
        loss = loss * only(weights, mask)
    return PolicyLoss(
        only(loss, mask),
        only(ratio, mask),
        (ratio > 1 + clip_high) & (advantages > 0) & mask,
        (ratio < 1 - clip_low) & (advantages < 0) & mask,
        is_dual_clipped,
    )


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, mask: Tensor, clip: float | None = 0.2
) -> tuple[Tensor, Tensor]:
    """½ max((V − R)², (V_clip − R)²), V_clip within ±`clip` of the old value, as in OpenAI's baselines.

    Args:
        values: (B, T); carries the gradient.
        old_values, returns, mask: (B, T), without gradient.
        clip: in units of the reward; None: not clipped.

    Returns:
        The loss of each token, and whether the clipped value decided it; (B, T) each.
    """
    values, old_values, returns = (only(x, mask) for x in (values, old_values, returns))
    loss = (values - returns) ** 2
    is_clipped = torch.zeros_like(mask)
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        clipped = (near - returns) ** 2
        is_clipped = (clipped > loss) & mask
        loss = torch.max(loss, clipped)
    return only(0.5 * loss, mask), is_clipped


def importance_weights(
    logp: Tensor, sampler_logp: Tensor, mask: Tensor, most: float, is_dropped: bool = False
) -> Tensor:
    """π_old / sampler of each token (B, T), at most `most`: for a sampler whose numbers differ from the trainer's.

    A token for which the sampler gave no number weighs 1.

    Args:
        logp, sampler_logp, mask: (B, T).
        most: the cap.
        is_dropped: a token beyond `most` or below its inverse weighs nothing, instead of being cut to `most`.
    """
    log_ratio = only(logp - sampler_logp, mask).clamp(-_MOST_LOG_RATIO, _MOST_LOG_RATIO)
    weights = torch.nan_to_num(log_ratio, nan=0.0).exp()
    if is_dropped:
        weights = only(weights, (weights <= most) & (weights >= 1 / most))
    return only(weights.clamp(max=most), mask)


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 − Var(R − V) / Var(R): 1 for a critic that knows, 0 for one that knows nothing; NaN where R does not vary."""
    error = moments(returns - values, mask).variance
    spread = moments(returns, mask).variance
    return torch.where(spread > 0, 1 - error / spread, torch.nan)


# --- what is adjusted from rollout to rollout, and saved with a checkpoint ---


@dataclass
class AdaptiveKL:
    """β that is raised while the policy is farther from the reference than wanted (1909.08593, section 2.2).

    Args:
        coef: β, now.
        target: wanted KL of a whole response in nats, not of a token as some programs count it; None: β stays.
        horizon: episodes within which β follows.
    """

    coef: float
    target: float | None = None
    horizon: int = 10_000

    def update(self, kl: float, episodes: int) -> None:
        """Adjust β once a rollout.

        Args:
            kl: mean over the rollout's responses of the sum of `k1`.
            episodes: responses of the rollout.
        """
        if self.target is not None and math.isfinite(kl):
            error = min(0.2, max(-0.2, kl / self.target - 1))
            self.coef *= 1 + error * episodes / self.horizon


@dataclass
class RunningMoments:
    """Mean and variance of all scores so far, merged rollout by rollout (Chan et al. 1979)."""

    count: float = 0.0
    mean: float = 0.0
    variance: float = 0.0

    @property
    def std(self) -> float:
        """Standard deviation of the population; 1 before it is known."""
        return float(self.variance**0.5) if self.variance > 0 else 1.0

    def update(self, scores: Tensor) -> None:
        """Take in the scores (B,) of a rollout; those that are not finite do not count."""
        new = moments(scores, torch.isfinite(scores))
        count, mean, variance = (float(x) for x in new)
        total = self.count + count
        if not count:
            return
        shift = mean - self.mean
        squares = self.variance * self.count + variance * count
        squares += shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count, self.variance = total, squares / total
