"""What each setting does to scores, advantages, losses and steps: by hand, on rollouts of two responses."""

import math
from pathlib import Path
from typing import Any

import ppo_toys as toys
import pytest
import torch

from align.ppo import core, limits
from align.ppo.batches import Sample
from align.ppo.collect import questions_of
from align.ppo.rollout import Judged, Rollout, build
from align.ppo.scores import shape
from align.ppo.trainer import PPOTrainer
from align.ppo.update import token_weights
from conf.entry import UserError

# A short response that was cut off, and a longer one that ended: what a padded width cannot tell apart.
SAMPLES = [Sample([3], [5, 6], False), Sample([3, 4], [5, 6, 1], True)]
JUDGED = [
    Judged([-1.0, -2.0], [-1.2, -1.9], [0.5, 0.4], 0.6),
    Judged([-0.1, -0.2, -0.3], [-0.3, -0.1, -0.3], [0.1, 0.2, 0.3], 0.7),
]


def shaped(tmp_path: Path, raw: list[float], **given: Any) -> list[float]:
    args = toys.settings(tmp_path, **{"max_new_tokens": 3} | given)
    return [round(x, 6) for x in shape(raw, SAMPLES, args, core.RunningMoments()).scores.tolist()]


def built(tmp_path: Path, raw: list[float], **given: Any) -> tuple[Rollout, dict[str, float]]:
    """A rollout with β = 0.1, γ = 1, λ = 0.95, nothing whitened, unless said otherwise."""
    options = {"kl_coef": 0.1, "whiten_advantages": False, "max_new_tokens": 3}
    args = toys.settings(tmp_path, **options | given)
    scores = shape(raw, SAMPLES, args, core.RunningMoments())
    return build(0, SAMPLES, [[0, 1]], JUDGED, scores, args.kl_coef, args)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ({}, [2.0, 4.0]),
        ({"reward_bias": 1.0, "reward_gain": 2.0}, [0.5, 1.5]),
        ({"missing_eos_penalty": 1.0}, [1.0, 4.0]),
        ({"missing_eos_penalty": 1.0, "missing_eos_mode": "replace"}, [-1.0, 4.0]),
        ({"truncation": "bootstrap"}, [0.0, 4.0]),
        ({"truncation": "bootstrap", "missing_eos_penalty": 1.0}, [-1.0, 4.0]),
        ({"overlong_buffer": 2, "overlong_penalty": 1.0}, [1.5, 3.0]),  # of 3 tokens: 2 and 3
        ({"reward_clip": 3.0}, [2.0, 3.0]),
        # The bias goes first, the clip last.
        ({"reward_bias": 1.0, "missing_eos_penalty": 1.0, "reward_clip": 0.5}, [0.0, 0.5]),
        ({"scale_rewards": True}, [2.0, 4.0]),  # 2 and 4 have a standard deviation of 1
    ],
)
def test_scores_by_hand(tmp_path: Path, given: dict[str, Any], wanted: list[float]) -> None:
    assert shaped(tmp_path, [2.0, 4.0], **given) == pytest.approx(wanted, abs=1e-4)


def test_a_response_that_was_cut_off_by_each_reading(tmp_path: Path) -> None:
    """T7. The first response is cut off after two tokens, the second ends with its third."""
    over, _ = built(tmp_path, [1.0, 1.0])
    # r = −0.1 k1, then the score on the last token: [−.02, 1.01] and [−.02, .01, 1].
    assert over.returns[0, 1] == pytest.approx(1.01)
    assert over.advantages[0, 1] == pytest.approx(1.01 - 0.4)
    assert over.policy_mask.tolist() == over.mask.tolist() == [[True, True, False], [True] * 3]
    goes_on, _ = built(tmp_path, [1.0, 1.0], truncation="bootstrap")
    assert goes_on.returns[0, 1] == pytest.approx(0.01 + 0.6)  # V of what follows, and no score
    assert goes_on.returns[1].tolist() == pytest.approx(over.returns[1].tolist())
    left_out, _ = built(tmp_path, [1.0, 1.0], truncation="mask")
    assert left_out.policy_mask.tolist() == [[False] * 3, [True] * 3]
    assert left_out.mask.tolist() == over.mask.tolist()  # the critic learns from both
    assert torch.equal(left_out.returns, over.returns)


def test_policy_and_critic_may_look_ahead_differently(tmp_path: Path) -> None:
    both, _ = built(tmp_path, [1.0, 1.0])
    own, _ = built(tmp_path, [1.0, 1.0], lam_value=1.0)
    assert torch.equal(own.advantages, both.advantages)
    # With λ = 1 a return is the sum of what comes.
    assert own.returns[1].tolist() == pytest.approx([0.99, 1.01, 1.0])
    adaptive, _ = built(tmp_path, [1.0, 1.0], lam_adaptive=0.5, lam_value=0.95)
    assert torch.equal(adaptive.returns, both.returns)
    short, _ = built(tmp_path, [1.0, 1.0], lam=0.0)  # 1 − 1/(0.5 · 2) = 0
    assert torch.equal(adaptive.advantages[0], short.advantages[0])


def test_the_divergence_is_measured_where_nothing_depends_on_it(tmp_path: Path) -> None:
    silent, log = built(tmp_path, [1.0, 1.0], kl_coef=0.0)
    assert log["objective/kl"] == pytest.approx((0.1 + 0.1) / 2)
    assert log["objective/rlhf_reward"] == 1
    assert silent.returns[1, 2] == 1
    _, less = built(tmp_path, [1.0, 1.0], kl_coef=0.0, measure_kl=False)
    assert "objective/kl" not in less


def test_only_usable_responses_count(tmp_path: Path) -> None:
    rollout, log = built(tmp_path, [math.nan, 1.0])
    assert rollout.mask[0].tolist() == [False] * 3
    assert log["objective/rlhf_reward"] == pytest.approx(1.0 - 0.1 * 0.1)
    assert log["reward/missing"] == 1


def test_every_response_may_weigh_the_same(tmp_path: Path) -> None:
    rollout, _ = built(tmp_path, [1.0, 1.0])
    tokens = token_weights(rollout, [0, 1], toys.settings(tmp_path))
    assert tokens.policy.tolist()[1] == pytest.approx([0.2] * 3)
    rows = token_weights(rollout, [0, 1], toys.settings(tmp_path, loss_aggregation="seq_mean"))
    assert rows.policy.tolist()[0] == pytest.approx([0.25, 0.25, 0])
    assert rows.policy.tolist()[1] == pytest.approx([1 / 6] * 3)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"kl_coef": -0.1}, "kl_coef=-0.1 must be 0 or more"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be 0 or more"),
        ({"cliprange": 0.0}, "cliprange=0.0 must be above 0"),
        ({"dual_clip": 0.5}, "dual_clip=0.5 must be at least 1"),
        ({"temperature": math.inf}, "temperature=inf must be above 0"),
        ({"overlong_buffer": 9}, "overlong_buffer=9 must be at most max_new_tokens=8"),
        ({"target_kl_per_sequence": 1.0, "kl_horizon": 64}, "kl_horizon=64 must be more than"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha=5.0 must be null"),
    ],
)
def test_numbers_that_mean_nothing_are_refused(
    tmp_path: Path, given: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        toys.settings(tmp_path, **given)
    with pytest.raises(UserError, match=told):  # and before torch is loaded
        limits.check(limits.settings_of({"rollout_batch_size": 64, "max_new_tokens": 8} | given))


def test_a_curriculum_keeps_its_order(tmp_path: Path) -> None:
    every = toys.questions([[i] for i in range(2, 8)])
    ordered = toys.settings(tmp_path, rollout_batch_size=4, train_sampling_strategy="sequential")
    first, second = (questions_of(every, number, ordered) for number in (0, 1))
    assert [one.ids[0] for one in first + second] == [2, 3, 4, 5, 6, 7, 2, 3]
    drawn = [toys.settings(tmp_path, rollout_batch_size=6, data_seed=seed) for seed in (1, 2, 1)]
    orders = [[one.ids[0] for one in questions_of(every, 0, args)] for args in drawn]
    assert orders[0] == orders[2] != orders[1]


def test_the_policys_rate_rises_after_the_critics_warm_up(tmp_path: Path) -> None:
    trainer = toys.trainer(
        tmp_path,
        toys.share_of(7),
        num_rollouts=3,
        critic_warmup_steps=4,
        warmup_steps=4,
        lr_scheduler_type="constant_with_warmup",
    )
    trainer.train()
    rates = [row["learning_rate"] for row in trainer.state.log_history if "learning_rate" in row]
    assert rates == pytest.approx([0] * 4 + [3e-3 * i / 4 for i in (1, 2, 3, 4)] + [3e-3] * 4)


@pytest.mark.parametrize("limit", [1.0, 0.0])
def test_a_gradient_that_is_not_finite_changes_no_weight(tmp_path: Path, limit: float) -> None:
    trainer = toys.trainer(tmp_path, toys.share_of(7), num_rollouts=2, max_grad_norm=limit)
    step = trainer.training_step
    seen: list[torch.Tensor] = []

    def broken(*given: Any, **named: Any) -> torch.Tensor:
        loss = step(*given, **named)
        seen.append(toys.weights(trainer.model).clone())
        if len(seen) == 2:
            next(trainer.model.policy.parameters()).grad[0, 0] = math.inf
        return loss

    trainer.training_step = broken
    trainer.train()
    assert torch.equal(seen[2], seen[1])
    assert not torch.equal(seen[3], seen[2])
    assert trainer.ppo.skipped_steps == 1
    assert trainer.ppo.alarms.raised == {"gradient": 1}


def test_broken_models_end_the_run(tmp_path: Path) -> None:
    trainer: PPOTrainer = toys.trainer(tmp_path, toys.share_of(7), num_rollouts=2)
    torch.nn.init.constant_(trainer.model.value.score.weight, math.nan)
    with pytest.raises(UserError, match="rollout 0: policy or critic no longer give finite"):
        trainer.train()


def test_a_resumed_log_has_what_was_noted_before(tmp_path: Path) -> None:
    """With a row for four steps, a checkpoint between two rows."""
    options: dict[str, Any] = {
        "num_rollouts": 2,
        "logging_steps": 4,
        "num_ppo_epochs": 2,
        "save_strategy": "steps",
        "save_steps": 6,
    }
    whole = toys.trainer(tmp_path / "whole", toys.share_of(7), **options)
    whole.train()
    part = toys.trainer(tmp_path / "part", toys.share_of(7), **options)
    part.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    ours, theirs = (
        [row for row in trainer.state.log_history if "objective/scores" in row][-1]
        for trainer in (part, whole)
    )
    kept = [name for name in theirs if not name.startswith(("time/", "perf/", "loss", "grad"))]
    assert len(kept) > 30
    assert [ours[name] for name in kept] == [theirs[name] for name in kept]


def test_without_a_learning_rate_nothing_moves(tmp_path: Path) -> None:
    """T21. And every mean is over what was really computed."""
    trainer = toys.trainer(
        tmp_path,
        toys.share_of(7),
        num_rollouts=2,
        num_mini_batches=4,
        learning_rate=0.0,
        value_learning_rate=0.0,
    )
    before = toys.weights(trainer.model).clone()
    trainer.train()
    assert torch.equal(toys.weights(trainer.model), before)
    rows = [row for row in trainer.state.log_history if "val/ratio" in row]
    assert len(rows) == 2 * 2 * 4
    for row in rows:
        assert row["val/ratio"] == pytest.approx(1, abs=1e-6)
        assert row["policy/clipfrac_avg"] == 0


def test_weight_decay_is_what_was_asked_for(tmp_path: Path) -> None:
    """T50. Biases and norms are left out; without it, AdamW's own default of 0.01 would act."""
    for asked in (0.0, 0.1):
        trainer = toys.trainer(tmp_path, toys.share_of(7), weight_decay=asked)
        groups = trainer.create_optimizer().param_groups
        assert {group["part"] for group in groups} == {"policy", "value"}
        assert {group["weight_decay"] for group in groups} == {0.0, asked}
        held = [p for group in groups for p in group["params"]]
        assert len(held) == len({*map(id, held)}) == len(list(trainer.model.parameters()))
        norms = [p for group in groups if group["weight_decay"] == 0 for p in group["params"]]
        assert not asked or all(p.ndim == 1 for p in norms)


def test_callbacks_hear_what_a_trainer_tells(tmp_path: Path) -> None:
    """T32."""
    from transformers import TrainerCallback

    heard: list[str] = []

    class Ear(TrainerCallback):
        def on_event(self, event: str) -> None:
            heard.append(event)

    for name in ("train_begin", "step_begin", "step_end", "evaluate", "save", "log", "train_end"):
        setattr(Ear, f"on_{name}", lambda self, *_, name=name, **__: self.on_event(name))
    options = {"save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 4}
    policy, value, reference = toys.models()
    asked = toys.questions([[3, 4, 5]])
    trainer = PPOTrainer(
        policy,
        value,
        reference,
        toys.tokenizer(),
        asked,
        toys.rewarded(toys.share_of(7)),
        toys.settings(tmp_path, num_rollouts=1, **options),
        asked,
        [Ear()],
    )
    trainer.train()
    assert heard[0] == "train_begin"
    assert heard[-1] == "train_end"
    assert heard.count("step_begin") == heard.count("step_end") == 4
    assert heard.count("evaluate") == 1
    assert heard.count("save") == 2
    assert heard.count("log") == 4 + 1 + 1  # steps, evaluation, the end
