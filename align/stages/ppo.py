"""PPO: a policy moved toward a reward, kept near where it started."""

import contextlib
import time
from typing import Any

from align.artifact import METRICS, SAMPLES, Job
from align.ppo.sharding import loaded_whole, writable
from align.stages import checkpoints
from align.stages.common import arguments, carry_out, chat_tokenizer, ledger, peft_config
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
    from transformers import set_seed

    from align.ppo.config import PPOConfig
    from align.ppo.trainer import PPOTrainer

    started = time.monotonic()
    tokenizer = chat_tokenizer(job)
    rows = Version.load(job.data)
    args = PPOConfig(**_arguments(job, rows.is_ordered))
    questions, left_out = read_questions(rows, tokenizer, args.max_prompt_length)
    held_out, facts = None, {"prompt/number": len(questions), "prompt/left_out": left_out}
    if job.eval_data:
        held_out, facts["prompt/held_out_left_out"] = read_questions(
            Version.load(job.eval_data), tokenizer, args.max_prompt_length
        )
    set_seed(args.seed)  # adapters begin with random weights
    policy, value, reference = open_models(job, args, tokenizer)
    assert job.reward is not None
    with watched(job) as callbacks, contextlib.ExitStack() as stack:
        with loaded_whole(args):
            reward = stack.enter_context(open_reward(job.reward))
        trainer = PPOTrainer(
            policy, value, reference, tokenizer, questions, reward, args, held_out,
            [ledger(job.out / METRICS), checkpoints.keeper(job), *callbacks],
        )  # fmt: skip
        stack.callback(trainer.collector.sampler.close)
        trainer.facts |= facts
        if trainer.is_world_process_zero():
            _tell(facts, args)
        trainer.samples_path = job.out / SAMPLES
        carry_out(trainer, job, "CAUSAL_LM", rows, started)


def _tell(facts: dict[str, int], args: Any) -> None:
    """Say what became of the prompts."""
    prompts = facts["prompt/number"]
    for name, kind in (
        ("prompt/left_out", "prompts"),
        ("prompt/held_out_left_out", "held-out prompts"),
    ):
        if number := facts.get(name):
            print(
                f"ppo: {number:,} {kind} are left out, which have more than ppo.args.{PROMPT_LIMIT}="
                f"{args.max_prompt_length} tokens",
                flush=True,
            )
    if prompts < args.rollout_batch_size:
        print(
            f"ppo: there are {prompts:,} prompts for the {args.rollout_batch_size:,} responses of a rollout, so each "
            f"is answered about {args.rollout_batch_size / prompts:.2g} times in it",
            flush=True,
        )


def _arguments(job: Job, is_ordered: bool) -> dict[str, Any]:
    """PPO's arguments: those of every stage but what only TRL's trainers take."""
    found = arguments(job, "CAUSAL_LM", is_ordered)
    del found["model_init_kwargs"]
    return found


def read_questions(rows: Version, tokenizer: Any, limit: int) -> tuple[list[Any], int]:
    """The prompts of a data version that are not longer than `limit` tokens, and how many are longer.

    Raises:
        UserError: when none is left.
    """
    from align.ppo.collect import Question

    found, left_out = [], 0
    for record in rows.records():
        assert isinstance(record, Prompt)
        ids = tokenizer.apply_chat_template(
            record.prompt, tools=record.tools, add_generation_prompt=True, return_dict=True
        )["input_ids"]
        if len(ids) > limit:
            left_out += 1
        else:
            asked = Asked(record.prompt, record.tools, record.references, record.facts)
            found.append(Question(list(ids), asked))
    if not found:
        raise UserError(
            f"every prompt has more than {PROMPT_LIMIT}={limit} tokens: raise ppo.args.{PROMPT_LIMIT}, or give shorter "
            "prompts"
        )
    return found, left_out


def open_models(job: Job, args: Any, tokenizer: Any) -> tuple[Any, Any, Any]:
    """Policy, critic, and the policy's frozen copy.

    That is None with an adapter, without which the policy is that copy, and where nothing is asked of it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    is_adapted = job.peft.method != "none"
    # Frozen weights need no more than bfloat16; adapters, and weights that are all trained, are float32.
    dtype = torch.bfloat16 if is_adapted and args.bf16 else torch.float32

    def opened() -> Any:
        return AutoModelForCausalLM.from_pretrained(
            local_path(job.model, job.cache), revision=job.model.revision, dtype=dtype
        )

    policy, value = opened(), _critic(job, dtype, tokenizer)
    if not is_adapted:
        # No copy of the policy, whose weights ZeRO-3 has split.
        return policy, value, opened() if args.needs_reference else None
    from peft import get_peft_model

    adapted = get_peft_model(value, peft_config(job, "SEQ_CLS"))
    # Most updates of the head are too small for bfloat16; and ZeRO-3 wants one format of all that is trained.
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return get_peft_model(policy, peft_config(job, "CAUSAL_LM")), adapted, None


def _critic(job: Job, dtype: Any, tokenizer: Any) -> Any:
    """A reward model to go on from, or the policy's own layers under a head of zeros: then V is 0 at first.

    Raises:
        UserError: when the reward model reads other tokens than the policy writes.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    if job.value and AutoTokenizer.from_pretrained(job.value).get_vocab() != tokenizer.get_vocab():
        raise UserError(
            f"ppo.value={job.value} has another tokenizer than the policy, and a critic reads the policy's tokens: "
            "leave ppo.value out, and the critic starts from the policy (as the reward, any reward model will do)"
        )
    path = job.value or local_path(job.model, job.cache)
    revision = None if job.value else job.model.revision
    try:
        value, loading = AutoModelForSequenceClassification.from_pretrained(
            path, revision=revision, num_labels=1, dtype=dtype, output_loading_info=True
        )
    except ValueError as error:
        if "Unrecognized configuration class" not in str(error):
            raise
        raise UserError(
            f"transformers has no sequence classifier for {path}, so it cannot be a critic: give a reward model of "
            "another family with the same tokenizer as ppo.value"
        ) from error
    if job.value and any("score" in key for key in loading["missing_keys"]):
        raise UserError(f"ppo.value={job.value} has no score head: it is no reward model")
    if not job.value:
        with writable(value.score.parameters()):
            torch.nn.init.zeros_(value.score.weight)
    return value
