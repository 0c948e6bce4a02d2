"""A rollout: what the policy wrote, what that was worth, and what there is to learn from it."""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from align.ppo import core, parity
from align.ppo.batches import Sample
from align.ppo.config import PPOConfig
from align.ppo.scores import Scores
from reward.store import read_json, write_json

_TENSORS = "rollout.safetensors"
_REST = "rollout.json"


@dataclass
class Rollout:
    """B responses of at most T tokens, the same on every process."""

    number: int  # of the rollout, from 0
    samples: list[Sample]  # (B,)
    schedule: list[list[int]]  # the responses of each optimizer step, by their places
    mask: Tensor  # (B, T) bool: tokens that the critic learns from
    policy_mask: Tensor  # (B, T) bool: those of them that the policy learns from
    old_logp: Tensor  # (B, T)
    old_values: Tensor  # (B, T)
    advantages: Tensor  # (B, T) whitened where that was asked for
    returns: Tensor  # (B, T)
    ref_logp: Tensor | None = None  # (B, T) where the loss has a divergence from the reference
    weights: Tensor | None = None  # (B, T) importance weights, where the sampler was not the policy
    step: int = 0  # of the schedule, that comes next

    @property
    def is_used_up(self) -> bool:
        """Whether every step has been taken."""
        return self.step >= len(self.schedule)

    def save(self, folder: Path) -> None:
        """Write it into a checkpoint."""
        from safetensors.torch import save_file

        tensors = {
            k: v.clone() for k, v in vars(self).items() if isinstance(v, Tensor)
        }  # may be shared
        save_file(tensors, folder / _TENSORS)
        rest = {"number": self.number, "schedule": self.schedule, "step": self.step}
        write_json(folder / _REST, rest | {"samples": [asdict(one) for one in self.samples]})

    @classmethod
    def load(cls, folder: Path) -> "Rollout | None":
        """The rollout of a checkpoint; None where there was none to go on with."""
        from safetensors.torch import load_file

        if not (folder / _REST).is_file():
            return None
        rest = read_json(folder / _REST)
        rest["samples"] = [Sample(**one) for one in rest["samples"]]
        return cls(**rest | load_file(folder / _TENSORS))


@dataclass(frozen=True)
class Judged:
    """What the models said of a response's tokens, (L,) each."""

    logp: list[float]  # under the policy that wrote them
    ref_logp: list[float]
    values: list[float]
    last_value: float  # V of the state after the last token


def padded(rows: list[list[float]], width: int) -> Tensor:
    """Rows of unequal length as (B, width), with zeros behind."""
    return torch.tensor([row + [0.0] * (width - len(row)) for row in rows], dtype=torch.float32)


def build(
    number: int,
    samples: list[Sample],
    schedule: list[list[int]],
    judged: list[Judged],
    scores: Scores,
    kl_coef: float,
    args: PPOConfig,
) -> tuple[Rollout, dict[str, float]]:
    """From what was said of the responses to what is learnt from them.

    Returns:
        The rollout, and its numbers for the log.
    """
    lengths = torch.tensor([len(sample.response) for sample in samples])
    width = int(lengths.max())
    written = torch.arange(width)[None, :] < lengths[:, None]
    logp, ref_logp, values = (
        padded([getattr(one, name) for one in judged], width)
        for name in ("logp", "ref_logp", "values")
    )
    mask = written & scores.is_usable[:, None]
    is_cut = torch.tensor([not sample.is_ended for sample in samples])
    policy_mask = mask & ~is_cut[:, None] if args.truncation == "mask" else mask
    kl = core.k1(logp, ref_logp, written)
    penalty = kl.abs() if args.kl_in_reward == "abs" else kl
    own_coef = 0.0 if args.kl_in_reward == "none" else kl_coef
    rewards = core.token_rewards(penalty, scores.scores, mask, own_coef)
    if args.whiten_rewards:
        rewards = core.whiten(rewards, mask, keeps_mean=True)
    after = torch.tensor([one.last_value for one in judged])
    bootstrap = torch.where(is_cut, after, 0.0) if args.truncation == "bootstrap" else None
    advantages, returns = _advantages(rewards, values, mask, lengths, bootstrap, args)
    log = _facts(samples, written, logp, scores) | _critic_facts(values, returns, advantages, mask)
    non_score = -own_coef * float(penalty.sum(dim=1)[scores.is_usable].mean())
    log["objective/rlhf_reward"] = float(scores.scores[scores.is_usable].mean()) + non_score
    if args.needs_reference:
        log |= _distances(kl, core.k3(logp, ref_logp, written), written)
        log |= {"objective/kl_coef": own_coef, "objective/non_score_reward": non_score}
    weights, weighed = parity.weights(samples, logp, written, args)
    if args.whiten_advantages:
        advantages = core.whiten(advantages, policy_mask)
    rollout = Rollout(
        number, samples, schedule, mask, policy_mask, logp, values, advantages, returns, weights
    )
    rollout.ref_logp = ref_logp if args.kl_loss_coef else None
    return rollout, log | weighed


def _advantages(
    rewards: Tensor,
    values: Tensor,
    mask: Tensor,
    lengths: Tensor,
    bootstrap: Tensor | None,
    args: PPOConfig,
) -> core.Advantages:
    """Advantages for the policy and returns for the critic, each with its own λ where that is asked for."""
    lam: float | Tensor = args.lam
    if args.lam_adaptive is not None:
        lam = core.adaptive_lambda(lengths, args.lam_adaptive)
    found = core.gae(rewards, values, mask, gamma=args.gamma, lam=lam, bootstrap=bootstrap)
    target = args.lam if args.lam_value is None else args.lam_value
    if args.lam_adaptive is None and target == args.lam:
        return found
    own = core.gae(rewards, values, mask, gamma=args.gamma, lam=target, bootstrap=bootstrap)
    return core.Advantages(found.advantages, own.returns)


def _facts(
    samples: list[Sample], written: Tensor, logp: Tensor, scores: Scores
) -> dict[str, float]:
    """What was written, and what it was worth."""
    rows = len(samples)
    raw = scores.raw[scores.is_usable]
    lengths = written.sum(dim=1).float()
    is_ended = torch.tensor([sample.is_ended for sample in samples])
    number = int(is_ended.sum())
    return {
        "objective/scores": float(raw.mean()),
        "objective/scores_std": float(raw.std(unbiased=False)),
        "objective/scores_min": float(raw.min()),
        "objective/scores_max": float(raw.max()),
        "objective/entropy": -float(core.only(logp, written).sum()) / rows,
        "reward/missing": rows - int(scores.is_usable.sum()),
        "response/length_mean": float(lengths.mean()),
        "response/length_min": float(lengths.min()),
        "response/length_max": float(lengths.max()),
        "response/terminated_length_mean": float(lengths[is_ended].mean()),  # NaN where none ended
        "response/eos_rate": number / rows,
        "response/truncated_rate": 1 - number / rows,
        "val/num_eos_tokens": number,
        "prompt/length_mean": sum(len(sample.prompt) for sample in samples) / rows,
        **scores.parts,
    }


def _distances(kl: Tensor, k3: Tensor, written: Tensor) -> dict[str, float]:
    """How far the policy is from the reference."""
    tokens = int(written.sum())
    per_response = core.moments(kl.sum(dim=1), written.any(dim=1))
    return {
        "objective/kl": float(per_response.mean),
        "objective/kl_stderr": float((per_response.variance / per_response.number) ** 0.5),
        "objective/kl_per_token": float(kl.sum()) / tokens,
        "objective/kl_k3": float(k3.sum()) / tokens,
    }


def _critic_facts(
    values: Tensor, returns: Tensor, advantages: Tensor, mask: Tensor
) -> dict[str, float]:
    """What the critic expected, and what came."""
    back, ahead = core.moments(returns, mask), core.moments(advantages, mask)
    return {
        "val/mean": float(core.moments(values, mask).mean),
        "val/return_mean": float(back.mean),
        "val/return_std": float(back.variance**0.5),
        "val/advantage_mean": float(ahead.mean),
        "val/advantage_std": float(ahead.variance**0.5),
        "val/advantage_abs_mean": float(core.moments(advantages.abs(), mask).mean),
        "val/explained_variance": float(core.explained_variance(values, returns, mask)),
    }
