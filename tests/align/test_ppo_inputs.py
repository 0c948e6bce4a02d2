"""What users get wrong, and what models and tokenizers lack: a message names the fix, or it is counted."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import ppo_toys as toys
import pytest
import torch
from test_ppo_stage import ARGS, carried_out

from align.artifact import SAMPLES, Manifest
from align.plan import make_plan, preflight
from align.ppo.batches import Sample
from align.ppo.core import RunningMoments
from align.ppo.sampling import GenerateSampler
from align.ppo.scores import shape
from align.ppo.trainer import PPOTrainer
from conf.entry import UserError
from conf.schema import PPO, Align, Data, Model, Peft, Reward, Term

MODULE = """
import asyncio, time

def brevity(completions, **columns):
    return [-float(len(completion[0]["content"])) for completion in completions]

def failing(completions, **columns):
    raise KeyError("solution")

def short(completions, **columns):
    return [1.0]

def nothing(completions, **columns):
    return [float("nan")] * len(completions)

def endless(completions, **columns):
    time.sleep(30)

def gaps(completions, **columns):
    return [None, *brevity(completions[1:])]

async def awaited(completions, **columns):
    await asyncio.sleep(0)
    return brevity(completions)
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "ppo_rewards.py").write_text(MODULE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ALIGN_REWARD_MODULES", "ppo_rewards")
    monkeypatch.delitem(sys.modules, "ppo_rewards", raising=False)


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Align:
    config = Align(name="test", model=Model(path=str(tiny_model)), stages=["ppo"])
    config.ppo = PPO(
        Data(source="demo:prompts", limit=4),
        args=ARGS | {"num_rollouts": 1, "max_new_tokens": 3},
        peft=Peft(),
        reward=reward_of("brevity"),
    )
    config.paths.root = str(tmp_path / "root")
    return config


def reward_of(name: str, **options: Any) -> Reward:
    return Reward({"own": Term("function", 1.0, {"function": f"ppo_rewards:{name}", **options})})


def done(config: Align) -> tuple[Manifest, list[dict[str, Any]]]:
    """The stage's manifest and log."""
    plan = make_plan(config)
    preflight(config, plan)
    out = carried_out(plan.jobs[0])
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return Manifest.load(out), [json.loads(line) for line in lines]


# --- rewards ---


@pytest.mark.parametrize(
    ("name", "options", "told"),
    [
        (
            "failing",
            {},
            r"ppo_rewards:failing failed in .*ppo_rewards\.py:\d+: KeyError: 'solution'",
        ),
        ("short", {}, "ppo_rewards:short returned 1 values for 4 completions"),
        ("nothing", {}, "said nothing of any of 4 responses in rollout 0; check ppo.reward"),
        ("endless", {"timeout": 0.05}, r"took longer than 0\.05 s; give it a larger `timeout`"),
        ("missing", {}, "ppo_rewards has no function 'missing'"),
    ],
)
def test_a_reward_that_fails_ends_the_stage_with_its_name(
    config: Align, name: str, options: dict[str, Any], told: str
) -> None:
    config.ppo.reward = reward_of(name, **options)
    with pytest.raises(UserError, match=told):
        done(config)


def test_functions_of_every_kind_are_rewards(config: Align, tmp_path: Path) -> None:
    """T16: an asynchronous function gives the run that a plain one does; None teaches nothing and is counted."""
    logs = []
    for place, name in enumerate(("brevity", "awaited", "gaps")):
        config.paths.root = str(tmp_path / f"root{place}")
        config.ppo.reward = reward_of(name)
        logs.append(done(config)[1])
    plain, awaited, gaps = logs
    for name in ("loss", "objective/scores", "val/return_mean"):
        assert plain[0][name] == awaited[0][name]
    assert plain[0]["reward/missing"] == 0
    assert gaps[0]["reward/missing"] == 1
    assert math.isfinite(gaps[0]["loss"])


def test_a_callable_that_gives_too_few_values_is_told(tmp_path: Path) -> None:
    trainer = toys.trainer(tmp_path, toys.share_of(7), num_rollouts=1, rollout_batch_size=4)
    reward = trainer.collector._reward
    trainer.collector._reward = lambda answers: reward(answers[1:])
    with pytest.raises(UserError, match="the reward gave 3 values for 4 responses"):
        trainer.train()


# --- prompts and batches ---


def test_prompts_that_are_too_long_or_too_few_are_told_and_counted(
    config: Align, tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoTokenizer

    from align.stages.ppo import read_questions
    from reward.versions import Version

    rows = Version.load(make_plan(config).jobs[0].data)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    lengths = sorted(len(one.ids) for one in read_questions(rows, tokenizer, 10_000)[0])
    assert lengths[0] < lengths[-1]
    limit = lengths[-1] - 1
    kept = sum(length <= limit for length in lengths)
    config.ppo.args |= {"max_prompt_length": limit, "rollout_batch_size": 8}
    config.ppo.eval_data = Data(source="demo:held_out", limit=8)
    manifest, log = done(config)
    said = capsys.readouterr().out
    assert said.count(f"ppo: {4 - kept} prompts are left out, which have more than") == 1
    assert said.count(f"there are {kept} prompts for the 8 responses of a rollout") == 1
    (last,) = (row for row in log if "train_runtime" in row)
    assert manifest.metrics["prompt/left_out"] == last["prompt/left_out"] == 4 - kept
    assert manifest.metrics["prompt/number"] == kept
    held_out = Version.load(Path(make_plan(config).jobs[0].eval_data or ""))
    _, longer = read_questions(held_out, tokenizer, limit)
    assert manifest.metrics["prompt/held_out_left_out"] == longer
    assert said.count("held-out prompts are left out") == (longer > 0)


def test_a_prompt_and_its_response_must_fit_the_window(config: Align) -> None:
    config.ppo.args |= {"max_new_tokens": 1000}
    with pytest.raises(
        UserError,
        match=r"more than the 1024 that the policy can see; lower .*max_prompt_length to 24",
    ):
        done(config)
    config.ppo.args |= {"max_new_tokens": 1024}
    with pytest.raises(UserError, match=r"policy can see; lower ppo\.args\.max_new_tokens$"):
        done(config)


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"rollout_batch_size": 10, "num_mini_batches": 4}, "a multiple of num_mini_batches=4"),
        ({"per_device_train_batch_size": 0}, "per_device_train_batch_size=0 must be at least 1"),
        ({"max_tokens_per_micro_batch": 0}, "max_tokens_per_micro_batch=0 must be at least 1"),
        ({"num_rollouts": 0}, "num_rollouts=0 must be at least 1"),
        ({"kl_in_reward": "k3"}, "the policy ends elsewhere than at the optimum"),
        ({"kl_in_reward": "k4"}, "kl_in_reward=k4 must be k1, abs or none"),
        ({"kl_loss_type": "k3"}, "kl_loss_type=k3 must be k2 or k3_is"),
        ({"missing_eos_mode": "add"}, "missing_eos_mode=add must be subtract or replace"),
        (
            {"kl_coef": 0.0, "target_kl_per_sequence": 6.0},
            "null when kl_coef=0 or kl_in_reward=none",
        ),
    ],
)
def test_impossible_settings_are_refused(tmp_path: Path, given: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        toys.settings(tmp_path, **given)


# --- models and tokenizers ---


def test_a_critic_with_another_tokenizer_is_refused(
    config: Align, tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path / "rm"
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model.save_pretrained(folder)
    toys.tokenizer().save_pretrained(folder)
    config.ppo.value = str(folder)
    with pytest.raises(UserError, match="another tokenizer than the policy, and a critic reads"):
        done(config)


def test_a_reward_model_without_a_template_is_refused(
    config: Align, tiny_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification

    folder = tmp_path / "rm"
    model = AutoModelForSequenceClassification.from_pretrained(tiny_model, num_labels=1)
    model.save_pretrained(folder)
    toys.tokenizer().save_pretrained(folder)
    config.ppo.reward = Reward({"rm": Term("model", 1.0, {"path": str(folder)})})
    with pytest.raises(UserError, match="has no chat template; add the one with which"):
        done(config)


def made(out: Path, tokenizer: Any, prompts: Any = ([3, 4, 5],), **given: Any) -> PPOTrainer:
    policy, value, reference = toys.models()
    policy.generation_config.eos_token_id = given.pop("ends", toys.END)
    settings = toys.settings(
        out, **{"num_rollouts": 1, "rollout_batch_size": 16, "max_new_tokens": 6} | given
    )
    reward = toys.rewarded(toys.share_of(7))
    questions = toys.questions(prompts)
    return PPOTrainer(policy, value, reference, tokenizer, questions, reward, settings)


def test_a_pad_token_may_be_the_end_token_or_missing(tmp_path: Path) -> None:
    """T13: which token pads makes no difference to any weight."""
    found = []
    for name, pad in (("own", "t0"), ("eos", "t1"), ("none", None)):
        tokenizer = toys.tokenizer()
        tokenizer.pad_token = pad
        trainer = made(tmp_path / name, tokenizer, [[3, 4, 5], [6], [7, 8, 9, 10]])
        trainer.train()
        found.append(toys.weights(trainer.model))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_without_any_end_token_every_response_has_the_same_length(tmp_path: Path) -> None:
    tokenizer = toys.tokenizer()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="so every response is cut off: name it"):
        made(tmp_path, tokenizer, ends=None, missing_eos_penalty=1.0)
    trainer = made(tmp_path, tokenizer, ends=None)
    trainer.train()
    (row,) = [row for row in trainer.state.log_history if "response/eos_rate" in row][:1]
    assert row["response/eos_rate"] == 0
    assert row["response/length_min"] == row["response/length_max"] == 6


def test_tokens_that_the_model_does_not_know_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="a prompt holds token 16, but the policy knows 16"):
        made(tmp_path, toys.tokenizer(), [[3, 16]])
    with pytest.raises(UserError, match="a prompt has no tokens"):
        made(tmp_path, toys.tokenizer(), [[3], []])


# --- where responses end ---


def sampled(policy: Any, prompts: list[list[int]], most: int = 40) -> list[Sample]:
    import contextlib

    sampler = GenerateSampler(policy, toys.tokenizer(), 1.0, most, 32, contextlib.nullcontext)
    return sampler.sample(prompts, range(len(prompts)))


def test_every_end_token_ends_a_response_and_none_in_the_prompt_counts() -> None:
    """T5: all of a generation config's end tokens beside the tokenizer's."""
    policy, _, _ = toys.models()
    policy.generation_config.eos_token_id = [5, 6]
    for found in sampled(policy, [[3, 5, toys.END, 4]] * 32):
        is_end = [token in (toys.END, 5, 6) for token in found.response]
        assert not any(is_end[:-1])
        assert found.is_ended == is_end[-1]
        assert found.is_ended or len(found.response) == 40
    cut = sampled(policy, [[3, 5, toys.END, 4]] * 32, most=1)
    assert {one.is_ended for one in cut} == {False, True}
    assert all(one.is_ended == (one.response[0] in (toys.END, 5, 6)) for one in cut)


def test_writing_stops_when_all_have_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """T17."""
    policy, _, _ = toys.models()
    calls = []
    forward = type(policy).forward

    def counted(self: Any, *given: Any, **named: Any) -> Any:
        calls.append(1)
        return forward(self, *given, **named)

    monkeypatch.setattr(type(policy), "forward", counted)
    found = sampled(policy, [[3, 4], [5]], most=100)
    assert all(one.is_ended for one in found)
    assert len(calls) == max(len(one.response) for one in found) < 100


@pytest.mark.parametrize(
    ("mode", "wanted"), [("subtract", [2.0, 1.5, -0.5]), ("replace", [2.0, -0.5, -0.5])]
)
def test_a_response_that_was_cut_off_loses(tmp_path: Path, mode: str, wanted: list[float]) -> None:
    """The penalty is given as a positive number and makes a score lower; what is ended is not touched."""
    samples = [Sample([3, toys.END], [4], is_ended) for is_ended in (True, False, False)]
    args = toys.settings(tmp_path, missing_eos_penalty=0.5, missing_eos_mode=mode)
    found = shape([2.0, 2.0, 0.0], samples, args, RunningMoments())
    assert found.scores.tolist() == wanted
    assert found.raw.tolist() == [2.0, 2.0, 0.0]
    assert found.parts["reward/missing_eos_penalty"] == pytest.approx(sum(wanted) / 3 - 4 / 3)


# --- what is kept ---


def test_what_was_written_before_and_after_is_kept(config: Align) -> None:
    config.ppo.args |= {"num_rollouts": 3}
    done(config)
    out = next(Path(config.paths.root).glob("artifacts/ppo-*"))
    rows = [json.loads(line) for line in (out / SAMPLES).read_text().splitlines()]
    assert [row["rollout"] for row in rows] == [0] * 4 + [1] * 4 + [2] * 4
    assert {row["kl"] for row in rows[:4]} == {0.0}
    assert all(math.isfinite(row["kl"]) for row in rows)
    assert any(row["kl"] for row in rows[4:])
    assert set(rows[0]) == {
        *("rollout", "step", "prompt", "response", "score", "kl", "tokens", "is_ended")
    }
