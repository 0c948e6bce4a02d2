"""From what a reward says of responses to the scores that PPO learns from."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from align.ppo import core
from align.ppo.batches import Sample
from align.ppo.config import PPOConfig


class Scores(NamedTuple):
    """What each response is worth (B,) and which responses count."""

    raw: Tensor  # as the reward said it
    scores: Tensor
    is_usable: Tensor  # bool; False where the reward said nothing
    parts: dict[str, float]  # means of what was added or taken, for the log


def shape(
    raw: Sequence[float], samples: Sequence[Sample], args: PPOConfig, running: core.RunningMoments
) -> Scores:
    """Bias and gain, penalties, running scale, clip: in this order, each only where it is asked for.

    Args:
        raw: a reward for each response, NaN where it said nothing.
        samples: the responses.
        args: which of the steps, and their numbers.
        running: moments of all scores so far; those of this rollout are taken in.
    """
    said = torch.tensor(raw, dtype=torch.float32)
    is_usable = torch.isfinite(said)
    scores = (core.only(said, is_usable) - args.reward_bias) / args.reward_gain
    parts = {}
    is_cut = torch.tensor([not sample.is_ended for sample in samples])
    if args.truncation == "bootstrap":
        scores = torch.where(is_cut, torch.zeros(()), scores)
    if args.missing_eos_penalty is not None:
        before = scores
        if args.missing_eos_mode == "replace":
            scores = torch.where(is_cut, -args.missing_eos_penalty, scores)
        else:
            scores = scores - args.missing_eos_penalty * is_cut.float()
        parts["reward/missing_eos_penalty"] = _mean(scores - before, is_usable)
    if args.overlong_buffer:
        lengths = torch.tensor([len(sample.response) for sample in samples])
        penalty = core.overlong_penalty(
            lengths, args.max_new_tokens, args.overlong_buffer, args.overlong_penalty
        )
        scores = scores + penalty
        parts["reward/overlong_penalty"] = _mean(penalty, is_usable)
    if args.scale_rewards:
        running.update(torch.where(is_usable, scores, torch.nan))
        scores = scores / running.std
        parts |= {"reward/running_mean": running.mean, "reward/running_std": running.std}
    if args.reward_clip is not None:
        scores = scores.clamp(-args.reward_clip, args.reward_clip)
    return Scores(said, core.only(scores, is_usable), is_usable, parts)


def _mean(x: Tensor, mask: Tensor) -> float:
    number = int(mask.sum())
    return float(core.only(x, mask).sum()) / number if number else math.nan
