"""Our PPO and TRL 1.12.0's, the last release with one, built for the same models, prompts and settings.

TRL's is imported by `theirs` alone, in a process of its own, from a folder that holds that release and nothing else:

    pip install --no-deps --target DIR trl==1.12.0
"""

import math
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch: threads that wait let others run

import torch

from align.ppo.batches import shuffled
from align.ppo.collect import Question
from align.ppo.config import PPOConfig
from align.ppo.trainer import PPOTrainer
from conf.entry import UserError
from reward.answers import Answer
from reward.model import RewardModel
from reward.prompts import Asked
from reward.rewards import Worth
from reward.store import content_key

VERSION = "1.12.0"
PAD, END, UNKNOWN = range(3)  # tokens; every other one is a word
_SPREAD = 0.05  # of the weights
_NEVER = -1e4  # a logit that is never drawn, and with which 0 · log 0 is still 0


@dataclass(frozen=True)
class Case:
    """What both trainers get."""

    vocabulary: int
    hidden: int
    layers: int
    prompts: list[
        list[int]
    ]  # in the order of their turn; some are left over: TRL takes other steps at the end
    response_length: int  # tokens at most
    rollouts: int = 3
    rollout_size: int = 16
    micro_rows: int = 4  # responses of a micro-batch
    epochs: int = 4
    learning_rate: float = 1e-5
    optimizer: str = "adamw_torch_fused"  # what both take when they are not told
    temperature: float = 1.0
    end_probability: float = 0.0  # of the end token, after every token
    seed: int = 0


def tokenizer(size: int, side: str = "right") -> Any:
    """Three special tokens and the words t3 … t(size − 1), with a chat template that only joins."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = ["<pad>", "<end>", "<unknown>", *(f"t{i}" for i in range(UNKNOWN + 1, size))]
    words = Tokenizer(
        models.WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[UNKNOWN])
    )
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    made = PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token=names[PAD], eos_token=names[END], padding_side=side
    )
    made.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    return made


@dataclass(frozen=True)
class Models:
    """The four models of PPO."""

    policy: Any
    value: Any
    reference: Any
    reward: Any


def models(case: Case) -> Models:
    """Llamas whose weights follow from the seed and their names, whatever the libraries draw."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    def config(**more: Any) -> Any:
        return LlamaConfig(
            vocab_size=case.vocabulary,
            hidden_size=case.hidden,
            intermediate_size=2 * case.hidden,
            num_hidden_layers=case.layers,
            num_attention_heads=4,
            max_position_embeddings=1024,
            pad_token_id=PAD,
            bos_token_id=None,
            eos_token_id=END,
            tie_word_embeddings=False,
            **more,
        )

    found = []
    for salt in ("policy", "policy", "value", "reward"):
        if salt == "policy":
            model = LlamaForCausalLM(config())
            model.lm_head = torch.nn.Linear(case.hidden, case.vocabulary, bias=True)
        else:
            model = LlamaForSequenceClassification(config(num_labels=1))
        _draw(model, case.seed, salt)
        if salt == "policy":
            _set_ends(model.lm_head, case)
        found.append(model)
    policy, reference, value, reward = found
    return Models(policy, value, reference.eval(), reward.eval())


@torch.no_grad()
def _draw(model: Any, seed: int, salt: str) -> None:
    for name, parameter in sorted(model.named_parameters()):
        if parameter.dim() < 2:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
            continue
        width = 0.3 if name.startswith("score") else _SPREAD
        generator = torch.Generator().manual_seed(int(content_key([seed, salt, name]), 16) >> 1)
        parameter.normal_(std=width, generator=generator)


@torch.no_grad()
def _set_ends(head: Any, case: Case) -> None:
    """The pad is never drawn, the end token as often as asked.

    The states have a mean square of 1, so the other logits are about normal and their exponentials have the mean
    exp(variance / 2).
    """
    head.bias[PAD] = head.bias[END] = _NEVER
    if case.end_probability:
        odds = case.end_probability / (1 - case.end_probability)
        variance = case.hidden * (_SPREAD / case.temperature) ** 2
        head.weight[END] = 0.0
        head.bias[END] = case.temperature * (math.log(odds * case.vocabulary) + variance / 2)


def words(ids: Sequence[int]) -> str:
    """Token ids as the text that the tokenizer makes them of."""
    return " ".join(f"t{token}" for token in ids)


def shared_settings(case: Case, out: str) -> dict[str, Any]:
    """Arguments that both configurations know by the same name."""
    return {
        "output_dir": out,
        "use_cpu": True,
        "bf16": False,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
        "per_device_train_batch_size": case.micro_rows,
        "num_ppo_epochs": case.epochs,
        "num_mini_batches": 1,  # TRL takes the same steps however many it is told
        "learning_rate": case.learning_rate,
        "lr_scheduler_type": "constant",
        "optim": case.optimizer,
        "adam_beta2": 0.999,
        "adam_epsilon": 1e-8,
        "kl_coef": 0.05,
        "missing_eos_penalty": 1.0,
        "seed": case.seed,
    }


def ours(case: Case, made: Models, out: str, **given: Any) -> PPOTrainer:
    """Our trainer, which would shuffle the prompts, with those of `case` in their order."""
    number = case.rollouts * case.rollout_size
    questions: list[Any] = [None] * number
    for place, ids in zip(
        shuffled(number, case.seed, "prompts", 0), case.prompts[:number], strict=True
    ):
        questions[place] = Question(ids, Asked([{"role": "user", "content": words(ids)}]))
    args: dict[str, Any] = shared_settings(case, out) | {
        "num_rollouts": case.rollouts,
        "rollout_batch_size": case.rollout_size,
        "max_new_tokens": case.response_length,
        "temperature": case.temperature + 1e-7,  # as TRL divides by it
        "value_learning_rate": case.learning_rate,
        "generation_batch_size": case.rollout_size,
        "max_grad_norm": 0.0,  # TRL does not clip, whatever it is told
        "log_samples": 0,
        "logging_steps": case.epochs,
    }
    own = tokenizer(case.vocabulary)
    judge = RewardModel(made.reward, own, 4096, None, "reward")
    return PPOTrainer(
        made.policy, made.value, made.reference, own, questions, rewarded(judge), PPOConfig(**args | given)
    )  # fmt: skip


def rewarded(judge: RewardModel) -> Any:
    """A reward model as a reward."""

    def worth(answers: Sequence[Answer]) -> Worth:
        said = [[{"role": "assistant", "content": answer.text}] for answer in answers]
        scores = judge.score([answer.prompt for answer in answers], said)
        return Worth(scores, {"reward": scores})

    return worth


def theirs(case: Case, made: Models, out: str) -> Any:
    """TRL's trainer, which would shuffle the prompts, with those of `case` in their order."""
    import trl.experimental.ppo.ppo_trainer as peer
    from datasets import Dataset
    from torch.utils.data import DataLoader

    def in_order(rows: Any, shuffle: bool = False, **options: Any) -> DataLoader[Any]:
        return DataLoader(rows, **options)

    assert case.rollout_size % case.micro_rows == 0
    args = shared_settings(case, out) | {
        "gradient_accumulation_steps": case.rollout_size // case.micro_rows,
        "total_episodes": case.rollouts * case.rollout_size,
        "response_length": case.response_length,
        "temperature": case.temperature,
        "stop_token": "eos",
        "num_sample_generations": 0,
        "gradient_checkpointing": False,
        "local_rollout_forward_batch_size": case.rollout_size,
    }
    rows = Dataset.from_list([{"input_ids": ids} for ids in case.prompts])
    with mock.patch.object(peer, "DataLoader", in_order):
        trainer = peer.PPOTrainer(
            args=peer.PPOConfig(**args),
            processing_class=tokenizer(case.vocabulary, "left"),
            model=made.policy,
            ref_model=made.reference,
            reward_model=made.reward,
            value_model=made.value,
            train_dataset=rows,
            eval_dataset=rows,
        )
    trainer.log = lambda *_, **__: None
    return trainer


def peer_environment(folder: Path) -> dict[str, str]:
    """The environment of a process in which `trl` is the peer.

    Raises:
        UserError: when the folder does not hold that release, with the command that makes one.
    """
    if not (folder / f"trl-{VERSION}.dist-info").is_dir():
        raise UserError(
            f"{folder} does not hold TRL {VERSION}; make it with\n"
            f"  pip install --no-deps --target {folder} trl=={VERSION}"
        )
    path = os.pathsep.join([str(folder.resolve()), os.environ.get("PYTHONPATH", "")])
    return os.environ | {
        "PYTHONPATH": path.rstrip(os.pathsep),
        "TRL_EXPERIMENTAL_SILENCE": "1",
        "HF_HUB_OFFLINE": "1",
    }


def in_process(arguments: Sequence[str], environment: dict[str, str]) -> None:
    """Run a script in a process of its own.

    Raises:
        UserError: when it fails, with the end of what it wrote.
    """
    done = subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(f"{' '.join(arguments)} failed:\n{(done.stdout + done.stderr)[-2000:]}")
