"""PPO's equivalences: other code that must give the same numbers, and runs that must end in the same weights."""

import ast
import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ppo_toys as toys
import pytest
import torch
from torch import Tensor

from align.ppo import core
from align.ppo.alarms import Alarms
from align.ppo.batches import Sample, pack
from align.ppo.model import adapter_start, token_logp, without_adapter
from align.ppo.rollout import Rollout
from align.ppo.trainer import STATE, PPOTrainer
from align.ppo.update import micro_loss, token_weights
from conf.schema import Reward, Term
from reward.answers import Answer
from reward.rewards import Worth, open_reward

PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [12, 13]]
SMALL: dict[str, Any] = {
    "num_rollouts": 2,
    "rollout_batch_size": 16,
    "num_mini_batches": 1,
    "kl_coef": 0.1,
}


def logged(trainer: PPOTrainer, name: str) -> list[float]:
    return [row[name] for row in trainer.state.log_history if name in row]


def trained(trainer: PPOTrainer) -> Tensor:
    trainer.train()
    return toys.weights(trainer.model)


# --- log-probabilities and gradients ---


@torch.no_grad()
def test_old_log_probabilities_are_those_of_the_sampler() -> None:
    """T9: `generate`'s own processed scores, at a temperature, from a batch that it pads on the left."""
    policy, _, _ = toys.models()
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[toys.PAD] * (width - len(p)) + p for p in PROMPTS])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in PROMPTS])
    torch.manual_seed(0)
    out = policy.generate(
        ids,
        attention_mask=mask,
        do_sample=True,
        temperature=0.7,
        top_k=0,
        max_new_tokens=9,
        eos_token_id=None,
        output_scores=True,
        return_dict_in_generate=True,
    )
    written = out.sequences[:, width:]
    scores = torch.stack(out.scores, dim=1).log_softmax(-1)
    wanted = scores.gather(-1, written[..., None]).squeeze(-1)
    samples = [
        Sample(p, row, is_ended=False) for p, row in zip(PROMPTS, written.tolist(), strict=True)
    ]
    batch = pack(samples, toys.PAD)
    found, _ = token_logp(policy, batch.ids, batch.rows, batch.cols, 0.7)
    torch.testing.assert_close(found.view_as(wanted), wanted, atol=2e-6, rtol=1e-5)


def with_other_reference(out: Path, **given: Any) -> PPOTrainer:
    """A trainer whose reference is not its policy, so that there is a divergence from the first step."""
    policy, value, _ = toys.models()
    reference, _, _ = toys.models(seed=1)
    return PPOTrainer(
        policy,
        value,
        reference,
        toys.tokenizer(),
        toys.questions(PROMPTS),
        toys.rewarded(given.pop("score", toys.share_of(7))),
        toys.settings(out, **SMALL | {"lam": 1.0, "whiten_advantages": False} | given),
    )


def gradient(trainer: PPOTrainer, rollout: Rollout) -> Tensor:
    """Of the policy, in a rollout's first step."""
    places = rollout.schedule[0]
    batch = pack([rollout.samples[place] for place in places], toys.PAD)
    scored = trainer.model(batch.ids, batch.rows, batch.cols)
    where = torch.tensor(places)[batch.rows], batch.places
    weights = token_weights(rollout, places, trainer.args)
    trainer.model.zero_grad()
    micro_loss(scored, rollout, weights, where, True, trainer.args)[0].backward()
    return grads_of(trainer.model.policy)


def grads_of(model: Any) -> Tensor:
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def test_the_first_gradient_is_that_of_reinforce(tmp_path: Path) -> None:
    """G1: with γ = λ = 1 and V = 0, Σ R_t ∇ log π, from the full logits of each response by itself."""
    trainer = with_other_reference(tmp_path)
    rollout = trainer._next_rollout()
    found = gradient(trainer, rollout)
    policy, reference = trainer.model.policy, trainer.collector._reference
    total, tokens = torch.zeros(()), 0
    for sample in rollout.samples:
        ids = torch.tensor([sample.prompt + sample.response])
        chosen = torch.tensor(sample.response)[:, None]
        logp, ref = (
            model(ids).logits[0, len(sample.prompt) - 1 : -1].log_softmax(-1).gather(-1, chosen)
            for model in (policy, reference)
        )
        rewards = -0.1 * (logp - ref).detach().squeeze(-1)
        said = [token for token in sample.response if token != toys.END and token != toys.PAD]
        rewards[-1] += toys.share_of(7)(said_text(said))
        returns = rewards.flip(0).cumsum(0).flip(0)
        total = total - (returns * logp.squeeze(-1)).sum()
        tokens += len(sample.response)
    trainer.model.zero_grad()
    (total / tokens).backward()
    wanted = grads_of(policy)
    assert float(wanted.norm()) > 1e-3
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def said_text(ids: list[int]) -> list[int]:
    """What the reward sees of a response: the text has no special tokens."""
    return [token for token in ids if token not in (toys.PAD, toys.END)]


def test_k2_in_the_loss_is_k1_in_the_reward(tmp_path: Path) -> None:
    """G2: for one token, on policy (arXiv 2510.01555)."""
    nothing: dict[str, Any] = {
        "score": lambda ids: 0.0,
        "max_new_tokens": 1,
        "truncation": "terminal",
    }
    rewarded = with_other_reference(tmp_path, **nothing)
    punished = with_other_reference(
        tmp_path, **nothing, kl_in_reward="none", kl_loss_coef=0.1, kl_loss_type="k2"
    )
    one, other = (gradient(t, t._next_rollout()) for t in (rewarded, punished))
    assert float(one.norm()) > 1e-3
    torch.testing.assert_close(one, other, atol=1e-7, rtol=1e-4)


def test_what_the_divergence_costs_in_the_reward(tmp_path: Path) -> None:
    """By hand from the log-probabilities: k1, its absolute value, or nothing."""
    for kind in ("k1", "abs", "none"):
        # The coefficient of the loss is there so that the rollout keeps the reference's numbers.
        trainer = with_other_reference(
            tmp_path, kl_in_reward=kind, kl_loss_coef=1.0, score=lambda ids: 0.25
        )
        rollout = trainer._next_rollout()
        assert rollout.ref_logp is not None
        k1 = core.only(rollout.old_logp - rollout.ref_logp, rollout.mask)
        cost = {"k1": k1, "abs": k1.abs(), "none": torch.zeros_like(k1)}[kind]
        # With γ = λ = 1, the return of the first token is all that is earned.
        torch.testing.assert_close(rollout.returns[:, 0], 0.25 - 0.1 * cost.sum(dim=1))
        (told,) = trainer._metrics["objective/non_score_reward"]
        assert told == pytest.approx(-0.1 * float(cost.sum(dim=1).mean()), abs=1e-7)
        (told,) = trainer._metrics["objective/rlhf_reward"]
        assert told == pytest.approx(float(rollout.returns[:, 0].mean()), abs=1e-6)


def test_both_losses_have_the_gradient_of_the_divergence() -> None:
    """Over all tokens instead of draws. k3_is holds off policy and is the KL itself; k3 alone is something else."""
    torch.manual_seed(0)
    theta, old, ref = torch.randn(3, 1, 9, dtype=torch.float64).log_softmax(-1)
    mask = torch.ones(1, 9).bool()

    def gradient_of(loss: Callable[[Tensor], Tensor]) -> Tensor:
        free = theta.clone().requires_grad_()
        loss(free.log_softmax(-1)).backward()
        assert free.grad is not None
        return free.grad

    def drawn(logp: Tensor, sampler: Tensor, kind: str) -> Tensor:
        return (sampler.exp() * core.kl_loss(logp, sampler, ref, mask, kind)).sum()

    wanted = gradient_of(lambda logp: (logp.exp() * (logp - ref)).sum())
    for found in (
        gradient_of(lambda logp: drawn(logp, old, "k3_is")),
        gradient_of(lambda logp: drawn(logp, theta, "k3_is")),
        gradient_of(lambda logp: drawn(logp, theta, "k2")),
    ):
        torch.testing.assert_close(found, wanted)
    divergence = (theta.exp() * (theta - ref)).sum()
    torch.testing.assert_close(drawn(theta, old, "k3_is"), divergence)
    k3 = gradient_of(lambda logp: (theta.exp() * core.k3(logp, ref, mask)).sum())
    assert not torch.allclose(k3, wanted, atol=1e-3)


def test_a_divergence_in_the_loss_keeps_the_policy_near(tmp_path: Path) -> None:
    ends = {}
    for name, given in {
        "free": {"kl_coef": 0.0},
        "k2": {"kl_coef": 0.0, "kl_loss_coef": 1.0},
        "k3_is": {"kl_coef": 0.0, "kl_loss_coef": 1.0, "kl_loss_type": "k3_is"},
    }.items():
        trainer = toys.trainer(tmp_path / name, toys.share_of(7), num_rollouts=5, **given)
        start = copy.deepcopy(trainer.model.policy)
        trainer.train()
        ends[name] = distance(trainer.model.policy, start)
        if name in ("k2", "k3_is"):
            assert max(logged(trainer, "loss/kl")) > 0
            assert logged(trainer, "objective/kl")[-1] > 0
    assert ends["free"] > 3 * max(ends["k2"], ends["k3_is"])


@torch.no_grad()
def distance(policy: Any, start: Any) -> float:
    """KL of the next token after each of some prompts."""
    one, other = (
        model(torch.tensor([[3, 4, 5, 6, 7]])).logits.log_softmax(-1) for model in (policy, start)
    )
    return float((one.exp() * (one - other)).sum())


def test_without_a_divergence_there_is_no_reference(tmp_path: Path) -> None:
    policy, value, _ = toys.models()
    given = (toys.tokenizer(), toys.questions(PROMPTS), toys.rewarded(toys.share_of(7)))
    free = PPOTrainer(
        policy,
        value,
        None,
        *given,
        toys.settings(tmp_path, **SMALL | {"kl_coef": 0, "measure_kl": False}),
    )
    free.train()
    assert not logged(free, "objective/kl")
    assert logged(free, "objective/rlhf_reward") == logged(free, "objective/scores")
    with pytest.raises(ValueError, match="needs a reference"):
        PPOTrainer(policy, value, None, *given, toys.settings(tmp_path))
    with pytest.raises(ValueError, match="the reference is the policy itself"):
        PPOTrainer(policy, value, policy, *given, toys.settings(tmp_path))


def test_whitened_rewards_keep_their_mean() -> None:
    mask = torch.tensor([[True, True, False], [True, True, True]])
    found = core.whiten(torch.tensor([[1.0, 2.0, 99.0], [3.0, 4.0, 10.0]]), mask, keeps_mean=True)
    moments = core.moments(found, mask)
    assert float(moments.mean) == pytest.approx(4.0)
    assert float(moments.variance) == pytest.approx(1.0)
    assert found[0, 2] == 0


# --- invariances ---


def test_the_order_of_a_rollout_changes_nothing(tmp_path: Path) -> None:
    """T25."""
    found = []
    for order in (
        list(range(16)),
        torch.randperm(16, generator=torch.Generator().manual_seed(3)).tolist(),
    ):
        trainer = toys.trainer(
            tmp_path, toys.share_of(7), PROMPTS, **SMALL | {"num_rollouts": 1, "num_ppo_epochs": 1},
            per_device_train_batch_size=4,
        )  # fmt: skip
        rollout = trainer._next_rollout()
        rollout.samples = [rollout.samples[place] for place in order]
        for name, value in vars(rollout).items():
            if isinstance(value, Tensor):
                setattr(rollout, name, value[order])
        trainer.rollout = rollout
        found.append(trained(trainer))
    assert trainer.ppo.rollouts == 1
    torch.testing.assert_close(found[0], found[1], atol=2e-6, rtol=1e-5)


def adapted(trained_start: bool = False) -> tuple[Any, Any]:
    """A policy with an adapter, and a critic."""
    from peft import LoraConfig, get_peft_model

    policy, value, _ = toys.models()
    torch.manual_seed(1)
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_dropout=0.5, target_modules="all-linear")
    tuned = get_peft_model(policy, config)
    if trained_start:
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
    return tuned, value


def adapter_trainer(out: Path, policy: Any, value: Any, reference: Any, **given: Any) -> PPOTrainer:
    reward = toys.rewarded(toys.share_of(7))
    args = toys.settings(out, **SMALL | {"learning_rate": 1e-2} | given)
    return PPOTrainer(
        policy, value, reference, toys.tokenizer(), toys.questions(PROMPTS), reward, args
    )


@pytest.mark.parametrize("trained_start", [False, True], ids=["fresh", "trained"])
def test_an_adapter_is_its_own_reference(tmp_path: Path, trained_start: bool) -> None:
    """T34, T35: the run with a copy as the reference, bit by bit; and no frozen weight moves."""
    policy, value = adapted(trained_start)
    assert (adapter_start(policy) is None) == (not trained_start)
    frozen = {n: p.detach().clone() for n, p in policy.named_parameters() if not p.requires_grad}
    own = adapter_trainer(tmp_path / "own", policy, value, None)
    found = trained(own)
    for name, parameter in policy.named_parameters():
        assert name not in frozen or torch.equal(parameter, frozen[name])
    other, value = adapted(trained_start)
    copied = adapter_trainer(tmp_path / "copied", other, value, copy.deepcopy(other))
    assert torch.equal(found, trained(copied))
    assert logged(own, "objective/kl") == logged(copied, "objective/kl")
    assert logged(own, "objective/kl")[0] == 0
    assert logged(own, "objective/kl")[-1] != 0


@torch.no_grad()
def test_the_start_of_an_adapter_is_put_back_whatever_happens() -> None:
    policy, _ = adapted(trained_start=True)
    policy.eval()
    ids = torch.tensor([[3, 4, 5]])
    start, before = adapter_start(policy), policy(ids).logits
    for parameter in policy.parameters():
        if parameter.requires_grad:
            parameter += 0.1
    after = policy(ids).logits
    with without_adapter(policy, start):
        assert torch.equal(policy(ids).logits, before)
    with pytest.raises(KeyError), without_adapter(policy, start):
        raise KeyError
    assert torch.equal(policy(ids).logits, after)
    assert not torch.equal(after, before)


@torch.no_grad()
def test_a_stage_starts_a_fresh_adapter_on_what_its_folder_holds(
    tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from align.artifact import Job
    from align.stages.ppo import open_models
    from conf.schema import Model, Peft

    peft = Peft("lora", {"r": 4, "target_modules": "all-linear", "init_lora_weights": False})
    model = Model(path=str(tiny_model))
    job = Job("ppo", "", model, tmp_path, None, {}, peft, None, {}, tmp_path, tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    policy, _, reference = open_models(job, toys.settings(tmp_path), tokenizer)
    assert reference is None
    ids = torch.arange(2, 30)[None]
    merged = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    assert not torch.equal(policy(ids).logits, merged(ids).logits)
    with without_adapter(policy):
        assert torch.equal(policy(ids).logits, merged(ids).logits)


@pytest.mark.parametrize("is_adapted", [False, True], ids=["full", "lora"])
def test_checkpointed_activations_change_nothing(tmp_path: Path, is_adapted: bool) -> None:
    """T27: in both models, through the Trainer's own switch."""
    found = []
    for name in ("plain", "checkpointed"):
        policy, value = adapted() if is_adapted else toys.models()[:2]
        reference = None if is_adapted else copy.deepcopy(policy)
        trainer = adapter_trainer(
            tmp_path / name,
            policy,
            value,
            reference,
            activation_checkpointing=name == "checkpointed",
            learning_rate=1e-3,
        )
        found.append(trained(trainer))
        bare = policy.get_base_model() if is_adapted else policy
        for model in (bare, value):
            assert model.is_activation_checkpointing == (name == "checkpointed")
    torch.testing.assert_close(found[0], found[1], atol=2e-6, rtol=1e-5)


def test_a_saved_policy_keeps_its_settings_of_generation(tmp_path: Path) -> None:
    policy, value, reference = toys.models()
    policy.generation_config.update(do_sample=True, top_p=0.9, max_new_tokens=77)
    given = (toys.tokenizer(), toys.questions(PROMPTS), toys.rewarded(toys.share_of(7)))
    trainer = PPOTrainer(policy, value, reference, *given, toys.settings(tmp_path, **SMALL))
    trainer.save_model(str(tmp_path / "saved"))
    saved = json.loads((tmp_path / "saved" / "generation_config.json").read_text())
    assert (saved["do_sample"], saved["top_p"], saved["max_new_tokens"]) == (True, 0.9, 77)
    assert policy.generation_config.max_new_tokens == 8  # the sampler's, again


# --- rewards ---


@pytest.fixture
def reward_models(tiny_model: Path, tmp_path: Path) -> list[str]:
    """The same function of a text twice: the second one's tokenizer numbers the tokens the other way round."""
    from tokenizers import Tokenizer
    from transformers import (
        AutoConfig,
        AutoTokenizer,
        LlamaForSequenceClassification,
        PreTrainedTokenizerFast,
    )

    torch.manual_seed(4)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    config = AutoConfig.from_pretrained(tiny_model, num_labels=1, dtype="float32")
    model = LlamaForSequenceClassification(config)
    model.save_pretrained(tmp_path / "one")
    tokenizer.save_pretrained(tmp_path / "one")
    size = len(tokenizer)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["vocab"] = {t: size - 1 - i for t, i in state["model"]["vocab"].items()}
    for token in state["added_tokens"]:
        token["id"] = size - 1 - token["id"]
    other = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        chat_template=tokenizer.chat_template,
    )
    model.model.embed_tokens.weight.data = model.model.embed_tokens.weight.data.flip(0)
    model.config.pad_token_id = other.pad_token_id
    model.save_pretrained(tmp_path / "two")
    other.save_pretrained(tmp_path / "two")
    assert other.get_vocab() != tokenizer.get_vocab()
    return [str(tmp_path / "one"), str(tmp_path / "two")]


def by_model(path: str) -> Reward:
    return Reward({"rm": Term("model", 1.0, {"path": path})})


def test_a_reward_model_reads_text_in_its_own_tokens(
    tmp_path: Path, reward_models: list[str]
) -> None:
    """T14: two reward models that are one function of the text give one run, of a policy with a third tokenizer."""
    ends, scores = [], []
    for place, path in enumerate(reward_models):
        policy, value, reference = toys.models()
        args = toys.settings(tmp_path / str(place), **SMALL)
        with open_reward(by_model(path)) as reward:
            trainer = PPOTrainer(
                policy, value, reference, toys.tokenizer(), toys.questions(PROMPTS), reward, args
            )
            ends.append(trained(trainer))
        scores.append(logged(trainer, "objective/scores_std"))
    assert scores[0] == pytest.approx(scores[1], abs=1e-6)
    assert min(scores[0]) > 0
    torch.testing.assert_close(ends[0], ends[1], atol=1e-5, rtol=1e-4)


def test_only_the_reward_model_reads_an_end_that_was_not_written(
    tmp_path: Path, reward_models: list[str]
) -> None:
    """T15: its template closes the answer; what the policy learns from stays as it was drawn."""
    from reward.model import RewardModel

    with open_reward(by_model(reward_models[0])) as reward:
        policy, value, reference = toys.models()
        args = toys.settings(tmp_path, **SMALL)
        questions = toys.questions(PROMPTS[:1] * 2)
        trainer = PPOTrainer(policy, value, reference, toys.tokenizer(), questions, reward, args)
        cut = Sample(PROMPTS[0], [5, 6], is_ended=False)
        ended = Sample(PROMPTS[0], [5, 6, toys.END], is_ended=True)
        worth, answers = trainer.collector.worths(questions, [cut, ended])
    assert worth.total[0] == pytest.approx(worth.total[1], abs=1e-6)
    assert cut.response == [5, 6]
    assert [answer.is_ended for answer in answers] == [False, True]
    model = RewardModel.load(reward_models[0])
    turn = {"role": "assistant", "content": answers[0].text}
    ids = model.tokenize(answers[0].prompt, [turn])
    assert model._tokenizer.eos_token_id in ids[-2:]


def test_a_policy_copies_what_only_its_prompt_tells(tmp_path: Path) -> None:
    """T43: the last token of the prompt. Without a look at the prompt, nothing is worth more than 1/6."""
    prompts = [[3 + (7 * place) % 13, 3 + place % 6] for place in range(48)]

    def copied(answers: Sequence[Answer]) -> Worth:
        found = []
        for answer in answers:
            wanted = f"t{ast.literal_eval(answer.prompt[0]['content'])[-1]}"
            found.append(answer.text.split().count(wanted) / 4)
        return Worth(found, {"copied": found})

    policy, value, reference = toys.models()
    args = toys.settings(
        tmp_path,
        num_rollouts=28,
        rollout_batch_size=96,
        per_device_train_batch_size=96,
        generation_batch_size=96,
        num_ppo_epochs=4,
        num_mini_batches=1,
        max_new_tokens=4,
        kl_coef=0.0,
        lr_scheduler_type="linear",
        logging_steps=4,
    )
    trainer = PPOTrainer(
        policy, value, reference, toys.tokenizer(), toys.questions(prompts), copied, args
    )
    trainer.train()
    scores = logged(trainer, "objective/scores")
    assert scores[0] < 0.17
    assert scores[-1] > 0.5


# --- alarms ---


def test_alarms_are_raised_once_and_go_on_with_a_checkpoint(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options: dict[str, Any] = {
        "num_rollouts": 4,
        "save_strategy": "steps",
        "save_steps": 4,
        "cliprange_value": 1e-4,
        "rollout_batch_size": 16,
        "max_new_tokens": 1,
    }
    whole = toys.trainer(tmp_path / "whole", toys.share_of(2), PROMPTS, **options)
    outcome = whole.train()
    said = capsys.readouterr().err
    assert said.count("of the responses end by themselves: raise ppo.args.max_new_tokens") == 1
    assert said.count("of the values are clipped, so that the critic hardly learns") == 1
    assert outcome.metrics["alarm/few_ended"] == 0
    assert "alarm/value_clipped" in outcome.metrics
    assert "alarm/first_ratio" not in outcome.metrics
    folder = tmp_path / "whole" / "checkpoint-4"
    assert json.loads((folder / STATE).read_text())["alarms"]["raised"]["few_ended"] == 0
    part = toys.trainer(tmp_path / "part", toys.share_of(2), PROMPTS, **options)
    part.train(resume_from_checkpoint=str(folder))
    assert "end by themselves" not in capsys.readouterr().err
    assert part.ppo == whole.ppo


def test_every_alarm_has_its_sign(capsys: pytest.CaptureFixture[str]) -> None:
    quiet = {"objective/kl": -0.01, "objective/kl_stderr": 0.01, "response/eos_rate": 0.5}
    low = quiet | {"objective/kl": -0.03}
    alarms = Alarms()
    for place, numbers in enumerate((low, low, quiet, low, low)):
        alarms.hear_rollout(numbers, place, True)
    fine = {"val/first_ratio_off": 0.01, "val/clipfrac_avg": 0.4}
    alarms.hear_step(fine, 5, True, True)
    alarms.hear_gradient(1.0, 5, True)
    assert alarms.described() == {}
    alarms.hear_rollout(low, 6, True)
    alarms.hear_rollout(low, 7, True)
    alarms.hear_step(fine, 8, False, True)
    alarms.hear_gradient(float("nan"), 9, False)
    assert alarms.described() == {
        "alarm/negative_kl": 6,
        "alarm/first_ratio": 8,
        "alarm/gradient": 9,
    }
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2  # the last one was not for this process to tell
    assert all(line.startswith("warning: ppo, step ") for line in said)
