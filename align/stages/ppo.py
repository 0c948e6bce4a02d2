"""PPO: a policy moved toward a reward, kept near where it started."""

import contextlib
import shutil
import time
from pathlib import Path
from typing import Any

from align.artifact import Job
from align.ppo.sharding import loaded_whole, writable
from align.ppo.trainer import SAMPLES
from align.stages.common import METRICS, arguments, carry_out, chat_tokenizer, ledger, peft_config
from align.stages.probe import watched
from conf.entry import UserError
from evals.models import local_path
from reward.prompts import Asked
from reward.records import Prompt
from reward.rewards import open_reward
from reward.versions import Version

PROMPT_LIMIT = "max_prompt_length"


def run(job: Job) -> None:
    """Train `job`'s policy with its critic, and leave the policy as a model folder with the critic inside."""
    from align.ppo.config import PPOConfig
    from align.ppo.trainer import PPOTrainer

    started = time.monotonic()
    tokenizer = chat_tokenizer(job)
    rows = Version.load(job.data)
    args = PPOConfig(**_arguments(job))
    questions = read_questions(rows, tokenizer, args.max_prompt_length)
    held_out = None
    if job.eval_data:
        held_out = read_questions(Version.load(job.eval_data), tokenizer, args.max_prompt_length)
    policy, value, reference = open_models(job, args)
    assert job.reward is not None
    with watched(job) as callbacks, contextlib.ExitStack() as stack:
        with loaded_whole(args):
            reward = stack.enter_context(open_reward(job.reward))
        trainer = PPOTrainer(
            policy, value, reference, tokenizer, questions, reward, args, held_out,
            [ledger(job.out / METRICS), *callbacks],
        )  # fmt: skip
        carry_out(trainer, job, "CAUSAL_LM", rows, started, _keep_samples(job.out))


def _keep_samples(out: Path) -> Any:
    """Move the kept responses beside the model; the trainer's own folder is removed."""

    def keep(trainer: Any) -> None:
        path = Path(trainer.args.output_dir) / SAMPLES
        if trainer.is_world_process_zero() and path.is_file():
            shutil.move(path, out / SAMPLES)

    return keep


def _arguments(job: Job) -> dict[str, Any]:
    """PPO's arguments: those of every stage but what only TRL's trainers take."""
    found = arguments(job, "CAUSAL_LM")
    del found["model_init_kwargs"]
    return found


def read_questions(rows: Version, tokenizer: Any, limit: int) -> list[Any]:
    """The prompts of a data version that are not longer than `limit` tokens.

    Raises:
        UserError: when none is left.
    """
    from align.ppo.collect import Question

    found = []
    for record in rows.records():
        assert isinstance(record, Prompt)
        ids = tokenizer.apply_chat_template(
            record.prompt, tools=record.tools, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        if len(ids) <= limit:
            asked = Asked(record.prompt, record.tools, record.references, record.facts)
            found.append(Question(list(ids), asked))
    if not found:
        raise UserError(
            f"every prompt has more than {PROMPT_LIMIT}={limit} tokens: raise ppo.args.{PROMPT_LIMIT}, or give shorter "
            "prompts"
        )
    return found


def open_models(job: Job, args: Any) -> tuple[Any, Any, Any]:
    """Policy, critic, and the policy's frozen copy: None with an adapter, without which the policy is that copy."""
    import torch
    from transformers import AutoModelForCausalLM

    is_adapted = job.peft.method != "none"
    # Frozen weights need no more than bfloat16; adapters, and weights that are all trained, are float32.
    dtype = torch.bfloat16 if is_adapted and args.bf16 else torch.float32

    def opened() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            local_path(job.model, job.cache), revision=job.model.revision, dtype=dtype
        )

    policy, value = opened(), _critic(job, dtype)
    if not is_adapted:
        return policy, value, opened()  # no copy of the policy, whose weights ZeRO-3 has split
    from peft import get_peft_model

    adapted = get_peft_model(value, peft_config(job, "SEQ_CLS"))
    # Most updates of the head are too small for bfloat16; and ZeRO-3 wants one format of all that is trained.
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return get_peft_model(policy, peft_config(job, "CAUSAL_LM")), adapted, None


def _critic(job: Job, dtype: Any) -> Any:
    """A reward model to go on from, or the policy's own layers under a head of zeros: then V is 0 at first."""
    import torch
    from transformers import AutoModelForSequenceClassification

    path = job.value or local_path(job.model, job.cache)
    revision = None if job.value else job.model.revision
    value = AutoModelForSequenceClassification.from_pretrained(
        path, revision=revision, num_labels=1, dtype=dtype
    )
    if not job.value:
        with writable(value.score.parameters()):
            torch.nn.init.zeros_(value.score.weight)
    return value
