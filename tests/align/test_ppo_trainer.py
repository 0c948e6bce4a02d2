"""PPO's trainer on toys: optima that are known, invariances, checkpoints."""

import math
import random
from collections import Counter
from pathlib import Path
from typing import Any

import ppo_toys as toys
import pytest
import torch

from align.artifact import SAMPLES
from align.ppo.trainer import LAST, VALUE_MODEL, PPOTrainer
from conf.entry import UserError

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [12, 13]]


def logged(trainer: PPOTrainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def reward_of(trainer: PPOTrainer) -> float:
    """Mean score of the last five rollouts."""
    return sum(logged(trainer, "objective/scores")[-5:]) / 5


@pytest.mark.parametrize("seed", [0, 1])
def test_a_policy_learns_a_frequency_and_the_critic_follows(tmp_path: Path, seed: int) -> None:
    """T40, T44. All of eight tokens should be t7: ending early loses the rest."""
    draw = random.Random(seed)
    prompts = [[draw.randrange(2, 16) for _ in range(draw.randrange(2, 7))] for _ in range(256)]
    trainer = toys.trainer(
        tmp_path, lambda ids: ids.count(7) / 8, prompts, seed=seed, num_rollouts=30
    )
    trainer.train()
    assert logged(trainer, "objective/scores")[0] < 0.2
    assert reward_of(trainer) > 0.9
    assert min(logged(trainer, "val/explained_variance")[-5:]) > 0.5


def without_end(trainer: PPOTrainer) -> None:
    """Let no token end a response."""
    trainer.collector.sampler._generator._ends = []  # type: ignore[attr-defined]
    trainer.model.policy.generation_config.eos_token_id = None


def test_a_policy_reaches_the_optimum_that_can_be_proved(tmp_path: Path) -> None:
    """T41. With one token, the best policy is π_ref · exp(r / β) / Z (Ziegler et al. 2019, section 2)."""
    beta, size = 0.5, 16
    score = torch.linspace(-1, 1, size)
    trainer = toys.trainer(
        tmp_path,
        lambda ids: float(score[ids[0]]) if ids else float(score[toys.END]),
        max_new_tokens=1,
        rollout_batch_size=512,
        per_device_train_batch_size=512,
        generation_batch_size=512,
        num_rollouts=60,
        num_ppo_epochs=4,
        num_mini_batches=1,
        kl_coef=beta,
        gamma=1.0,
        lam=1.0,
        logging_steps=40,
        lr_scheduler_type="linear",
    )
    without_end(trainer)
    prompt = torch.tensor([[3, 4, 5]])
    with torch.no_grad():
        start = trainer.model.policy(prompt).logits[0, -1].double().log_softmax(-1)
        # The pad and end tokens leave no text, and count as the end token does.
        worth = torch.where(torch.arange(size) < 2, score[toys.END], score).double()
        best = (start + worth / beta).log_softmax(-1)
    trainer.train()
    with torch.no_grad():
        found = trainer.model.policy(prompt).logits[0, -1].double().log_softmax(-1)
    divergence = float((found.exp() * (found - best)).sum())
    assert float((start.exp() * (start - best)).sum()) > 0.2
    assert divergence < 0.01


def test_the_first_step_is_where_it_started(tmp_path: Path) -> None:
    """T8, T10, T11: no divergence, a ratio of exactly 1; whatever the micro-batches, and with dropout configured."""
    policy, value, reference = toys.models()
    for model in (policy, value):
        model.config.attention_dropout = 0.5
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.5
    args = toys.settings(
        tmp_path,
        num_rollouts=2,
        num_mini_batches=1,
        num_ppo_epochs=2,
        per_device_train_batch_size=16,
        learning_rate=0.0,
        value_learning_rate=0.0,
    )
    trainer = PPOTrainer(
        policy,
        value,
        reference,
        toys.tokenizer(),
        toys.questions(PROMPTS),
        toys.rewarded(toys.share_of(7)),
        args,
    )
    before = toys.weights(trainer.model)
    trainer.train()
    assert set(logged(trainer, "objective/kl")) == {0.0}
    assert set(logged(trainer, "val/first_ratio_off")) == {0.0}
    assert set(logged(trainer, "val/ratio_max")) == {1.0}
    assert min(logged(trainer, "objective/entropy")) > 0
    assert torch.equal(toys.weights(trainer.model), before)  # at a learning rate of 0 nothing moves


def test_steps_are_what_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """T20, T22: one optimizer step a mini-batch, each clipped, over the end of the prompts and of every rollout."""
    trainer = toys.trainer(
        tmp_path,
        toys.share_of(7),
        PROMPTS,
        num_rollouts=3,
        num_ppo_epochs=2,
        num_mini_batches=4,
        rollout_batch_size=8,
        per_device_train_batch_size=1,
    )
    counts: Counter[str] = Counter()
    step, clip = torch.optim.AdamW.step, trainer.accelerator.clip_grad_norm_

    def counted(name: str, function: Any) -> Any:
        def call(*given: Any, **named: Any) -> Any:
            counts[name] += 1
            return function(*given, **named)

        return call

    monkeypatch.setattr(torch.optim.AdamW, "step", counted("step", step))
    monkeypatch.setattr(trainer.accelerator, "clip_grad_norm_", counted("clip", clip))
    trainer.train()
    assert counts == {"step": 24, "clip": 48}
    assert trainer.state.max_steps == 24
    assert trainer.ppo.rollouts == 3


def trained(out: Path, **given: Any) -> torch.Tensor:
    trainer = toys.trainer(
        out,
        toys.share_of(7),
        PROMPTS,
        **{"num_rollouts": 2, "rollout_batch_size": 16, "num_mini_batches": 1} | given,
    )
    trainer.train()
    return toys.weights(trainer.model)


def test_how_a_step_is_cut_changes_nothing(tmp_path: Path) -> None:
    """T23: rows and tokens of a micro-batch are a matter of memory alone."""
    whole = trained(tmp_path, per_device_train_batch_size=16)
    cuts: list[dict[str, Any]] = [{"per_device_train_batch_size": size} for size in (1, 2, 8)]
    for cut in [*cuts, {"max_tokens_per_micro_batch": 24}]:
        torch.testing.assert_close(trained(tmp_path, **cut), whole, atol=2e-6, rtol=1e-5)


def test_a_seed_is_a_run(tmp_path: Path) -> None:
    assert torch.equal(trained(tmp_path), trained(tmp_path))
    assert not torch.equal(trained(tmp_path), trained(tmp_path, seed=7))


@pytest.mark.parametrize("step", [3, 4, 6])
def test_a_run_goes_on_exactly_in_the_middle_of_a_rollout(tmp_path: Path, step: int) -> None:
    """T30: weights, prompts and every logged number are those of a run that was never stopped."""
    options: dict[str, Any] = {
        "num_rollouts": 4,
        "rollout_batch_size": 8,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "target_kl_per_sequence": 0.01,
        "scale_rewards": True,
        "lr_scheduler_type": "linear",
        "save_strategy": "steps",
        "save_steps": step,
        "log_samples": 8,
    }
    whole = toys.trainer(tmp_path / "whole", toys.share_of(7), PROMPTS, **options)
    ended = whole.train().metrics
    part = toys.trainer(tmp_path / "part", toys.share_of(7), PROMPTS, **options)
    again = part.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
    assert {name: again.metrics[name] for name in LAST} == {name: ended[name] for name in LAST}
    assert torch.equal(toys.weights(part.model), toys.weights(whole.model))
    assert part.ppo == whole.ppo
    for name in ("loss", "objective/kl_coef", "val/ratio_max", "learning_rate_value"):
        ours, theirs = logged(part, name), logged(whole, name)
        assert ours == theirs[-len(ours) :]
    tail = (tmp_path / "part" / SAMPLES).read_bytes()
    assert (tmp_path / "whole" / SAMPLES).read_bytes().endswith(tail)


def test_a_checkpoint_is_two_model_folders(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    trainer = toys.trainer(tmp_path, toys.share_of(7), PROMPTS, num_rollouts=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "saved"))
    policy = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    value = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved" / VALUE_MODEL)
    assert torch.equal(toys.weights(policy), toys.weights(trainer.model.policy))
    assert torch.equal(toys.weights(value), toys.weights(trainer.model.value))


def test_held_out_prompts_are_answered_during_training(tmp_path: Path) -> None:
    """T32: evaluation, its callbacks and the best checkpoint are the Trainer's own."""
    policy, value, reference = toys.models()
    args = toys.settings(
        tmp_path,
        num_rollouts=10,
        eval_strategy="steps",
        eval_steps=20,
        save_strategy="steps",
        save_steps=20,
        load_best_model_at_end=True,
        metric_for_best_model="eval_reward",
        greater_is_better=True,
    )
    trainer = PPOTrainer(
        policy,
        value,
        reference,
        toys.tokenizer(),
        toys.questions(PROMPTS),
        toys.rewarded(toys.share_of(7)),
        args,
        eval_questions=toys.questions([[3, 9]] * 8),
    )
    trainer.train()
    rewards = logged(trainer, "eval_reward")
    assert len(rewards) == 2
    assert trainer.state.best_metric == max(rewards)
    assert trainer.evaluate()["eval_reward"] == trainer.state.best_metric  # the same draws again


def test_the_critic_warms_up_alone(tmp_path: Path) -> None:
    trainer = toys.trainer(
        tmp_path, toys.share_of(7), PROMPTS, num_rollouts=1, critic_warmup_steps=4
    )
    policy, value = toys.weights(trainer.model.policy), toys.weights(trainer.model.value)
    trainer.train()
    assert torch.equal(toys.weights(trainer.model.policy), policy)
    assert not torch.equal(toys.weights(trainer.model.value), value)
    assert logged(trainer, "learning_rate_value") == [3e-3] * 4


def test_a_policy_that_went_far_leaves_its_rollout(tmp_path: Path) -> None:
    trainer = toys.trainer(
        tmp_path, toys.share_of(7), PROMPTS, num_rollouts=3, learning_rate=0.05, early_stop_kl=1e-3
    )
    trainer.train()
    assert logged(trainer, "policy/early_stop_step")
    assert trainer.ppo.rollouts > 3  # as many steps, of more rollouts


def test_rewards_on_a_large_scale_are_learnt_with_a_running_scale(tmp_path: Path) -> None:
    """T42. Advantages are whitened anyway; it is the critic, clipped in units of the reward, that needs the scale."""
    off, clipped = {}, {}
    for scaled in (True, False):
        trainer = toys.trainer(
            tmp_path,
            lambda ids: 100 * toys.share_of(7)(ids),
            num_rollouts=30,
            scale_rewards=scaled,
        )
        trainer.train()
        assert logged(trainer, "rewards/toy/mean")[-1] > 60
        off[scaled] = logged(trainer, "val/mean")[-1] - logged(trainer, "val/return_mean")[-1]
        clips = logged(trainer, "val/clipfrac_avg")
        clipped[scaled] = sum(clips) / len(clips)
    assert abs(off[True]) < 0.1
    assert off[False] < -50
    assert clipped[True] < 0.1 < 0.3 < clipped[False]


def test_an_answer_without_a_reward_teaches_nothing(tmp_path: Path) -> None:
    score = toys.share_of(7)
    trainer = toys.trainer(
        tmp_path, lambda ids: score(ids) if len(ids) % 2 else math.nan, PROMPTS, num_rollouts=2
    )
    trainer.train()
    assert min(logged(trainer, "reward/missing")) > 0
    assert torch.isfinite(toys.weights(trainer.model)).all()
    silent = toys.trainer(tmp_path, lambda ids: math.nan, PROMPTS, num_rollouts=2)
    with pytest.raises(UserError, match="said nothing of any of 64 responses"):
        silent.train()


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps=4 must be 1"),
        ({"rollout_batch_size": 10, "num_mini_batches": 4}, "a multiple of num_mini_batches=4"),
        ({"temperature": 0.0}, "temperature=0.0 must be above 0"),
        ({"truncation": "cut"}, "truncation=cut must be terminal, bootstrap or mask"),
        ({"num_train_epochs": 3}, "num_rollouts says how long"),
        ({"lam": 1.5}, "lam=1.5 must be between 0 and 1"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    tmp_path: Path, given: dict[str, Any], told: str
) -> None:
    with pytest.raises(UserError, match=told):
        toys.settings(tmp_path, **given)
