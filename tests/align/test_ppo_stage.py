"""PPO as a stage: from a plan to a policy that later stages and evaluations take."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from align.artifact import SAMPLES, Job, Manifest
from align.plan import make_plan, preflight
from align.ppo.trainer import LAST, VALUE_MODEL
from conf.entry import UserError
from conf.schema import PPO, Align, Data, Model, Peft, Reward, Stage, Term

LORA = Peft("lora", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"})
ARGS: dict[str, Any] = {
    "num_rollouts": 2,
    "rollout_batch_size": 4,
    "num_ppo_epochs": 1,
    "max_new_tokens": 6,
    "learning_rate": 1e-2,
    "logging_steps": 1,
    "disable_tqdm": True,
    "bf16": False,
    "seed": 0,
}


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Align:
    config = Align(name="test", model=Model(path=str(tiny_model)), stages=["ppo"])
    reward = Reward({"brief": Term("length", 1.0, {"max_chars": 1})})
    config.ppo = PPO(
        Data(source="demo:prompts", limit=8), args=dict(ARGS), peft=Peft(), reward=reward
    )
    config.rm = Stage(
        Data(source="demo:preferences", limit=4),
        args={"per_device_train_batch_size": 2, "max_steps": 1, "bf16": False},
        peft=Peft(),
    )
    config.paths.root = str(tmp_path / "root")
    return config


def carried_out(job: Job) -> Path:
    """Run a job in this process, through JSON as a worker gets it."""
    import importlib

    from align.plan import STAGES

    job.out.mkdir(parents=True)
    module, function = STAGES[job.stage].run.split(":")
    copy = Job.from_json(json.loads(json.dumps(job.to_json(job.out))))
    getattr(importlib.import_module(module), function)(copy)
    return job.out


@pytest.mark.parametrize("peft", [Peft(), LORA], ids=["full", "lora"])
def test_the_artifact_is_a_policy_with_its_critic(
    config: Align, tiny_model: Path, peft: Peft
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    config.ppo.peft = peft
    config.ppo.eval_data = Data(source="demo:held_out", limit=3)
    plan = make_plan(config)
    preflight(config, plan)
    out = carried_out(plan.jobs[0])
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (tiny_model, out))
    moved = [
        torch.equal(a, b) for a, b in zip(before.parameters(), after.parameters(), strict=True)
    ]
    assert not all(moved)
    assert AutoTokenizer.from_pretrained(out).chat_template
    critic = (out / "adapter" if peft is LORA else out) / VALUE_MODEL
    assert critic.is_dir()
    samples = [json.loads(line) for line in (out / SAMPLES).read_text().splitlines()]
    assert [row["rollout"] for row in samples] == [0] * 4 + [1] * 4
    manifest = Manifest.load(out)
    assert manifest.metrics["eval_reward"] <= 0
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["objective/kl"] == 0
    assert rows[0]["val/ratio_max"] == 1
    written = [row for row in rows if "objective/kl" in row]
    assert len(written) == 2  # one a rollout, and none again at the end
    for name in LAST:
        assert manifest.metrics[name] == written[-1][name]
    assert not (out / "trainer").exists()


def test_a_reward_model_of_an_earlier_stage_is_the_reward_and_the_critic(config: Align) -> None:
    config.stages = ["rm", "ppo"]
    config.ppo.reward = Reward({"rm": Term("model", 1.0, {"path": "stage:rm"})})
    config.ppo.value = "stage:rm"
    config.ppo.args["missing_eos_penalty"] = None
    plan = make_plan(config)
    preflight(config, plan)
    rm, ppo = plan.jobs
    assert ppo.parents == {"base": rm.parents["base"], "rm": rm.key}
    assert ppo.reward is not None
    assert ppo.reward.terms["rm"].args["path"] == str(rm.out) == ppo.value
    carried_out(rm)
    # Though it is there now:
    assert [job.key for job in make_plan(config).jobs] == [rm.key, ppo.key]
    out = carried_out(ppo)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[0]["rewards/rm/mean"] == pytest.approx(rows[0]["objective/scores"], abs=1e-6)
    assert rows[0]["val/mean"] != 0  # the critic knows something from the start


def test_the_key_holds_the_reward(config: Align) -> None:
    key = make_plan(config).jobs[0].key
    assert make_plan(config).jobs[0].key == key
    config.ppo.reward.terms["brief"].weight = 2.0
    assert make_plan(config).jobs[0].key != key


def test_the_key_holds_every_reward_model_and_the_critic(
    config: Align, seeded_reward_model: Callable[[int], Path], tmp_path: Path
) -> None:
    member = shutil.copytree(seeded_reward_model(1), tmp_path / "member")
    critic = shutil.copytree(seeded_reward_model(1), tmp_path / "critic")
    (critic / "manifest.json").write_text('{"key": "named by hand"}')
    config.stages = ["rm", "ppo"]
    paths = ["stage:rm", str(member)]
    config.ppo.reward = Reward({"rm": Term("model", 1.0, {"path": paths})})
    config.ppo.value = str(critic)
    before = make_plan(config).jobs[1].key
    for folder in (member, critic):
        for file in seeded_reward_model(2).iterdir():
            shutil.copyfile(file, folder / file.name)
        assert make_plan(config).jobs[1].key != before
        before = make_plan(config).jobs[1].key


def refused(config: Align, told: str, **changes: Any) -> None:
    config.ppo = replace(config.ppo, **changes)
    with pytest.raises(UserError, match=told):
        preflight(config, make_plan(config))


def test_what_cannot_work_is_refused_before_anything_loads(config: Align) -> None:
    whole = config.ppo
    model = Reward({"rm": Term("model", 1.0, {"path": "stage:rn"})})
    refused(config, "'stage:rn' names no stage before ppo, there are: none", reward=model)
    config.ppo = whole
    refused(config, r"ppo\.reward\.terms is empty", reward=Reward())
    config.ppo = whole
    refused(config, "must be a multiple of num_mini_batches=3", args=ARGS | {"num_mini_batches": 3})
    config.ppo = whole
    refused(
        config,
        "gradient_accumulation_steps=2 must be 1",
        args=ARGS | {"gradient_accumulation_steps": 2},
    )
    config.ppo = whole
    schema = Reward({"json": Term("json_schema")})
    refused(config, "'json_schema' can say nothing, because no prompt has schema", reward=schema)
    config.ppo = replace(whole, args=ARGS | {"max_prompt_length": 3}, reward=whole.reward)
    with pytest.raises(UserError, match="every prompt has more than max_prompt_length=3 tokens"):
        carried_out(make_plan(config).jobs[0])
