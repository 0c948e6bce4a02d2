"""Tiny models and rewards with a known answer, for the tests of PPO."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from align.ppo.collect import Question
from align.ppo.config import PPOConfig
from align.ppo.trainer import PPOTrainer
from reward.answers import Answer
from reward.prompts import Asked
from reward.rewards import Worth

END, PAD = 1, 0


def tokenizer(size: int = 16) -> Any:
    """Words t0 … t(size − 1), of which 0 is the pad and 1 the end token."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({f"t{i}": i for i in range(size)}, unk_token="t2"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # type: ignore[assignment]
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="t0", eos_token="t1")


def models(size: int = 16, seed: int = 0, width: int = 32) -> tuple[Any, Any, Any]:
    """Policy, critic with a head of zeros, and the policy's frozen copy."""
    import copy

    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=size,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=2,
        eos_token_id=END,
    )
    policy = LlamaForCausalLM(config)
    config.num_labels = 1
    value = LlamaForSequenceClassification(config)
    torch.nn.init.zeros_(value.score.weight)
    return policy, value, copy.deepcopy(policy)


def settings(out: Path, **given: Any) -> PPOConfig:
    """Settings for a toy: on the CPU, in float32, silent."""
    options: dict[str, Any] = {
        "output_dir": str(out),
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "rollout_batch_size": 64,
        "num_ppo_epochs": 2,
        "num_mini_batches": 2,
        "per_device_train_batch_size": 64,
        "generation_batch_size": 64,
        "max_new_tokens": 8,
        "kl_coef": 0.01,
        "learning_rate": 3e-3,
        "value_learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "missing_eos_penalty": None,
        "log_samples": 0,
    }
    return PPOConfig(**options | given)


def questions(prompts: Sequence[list[int]]) -> list[Question]:
    """Prompts as the trainer takes them."""
    return [Question(ids, Asked([{"role": "user", "content": str(ids)}])) for ids in prompts]


def rewarded(score: Callable[[list[int]], float]) -> Callable[[Sequence[Answer]], Worth]:
    """A reward of the response's token ids."""

    def worth(answers: Sequence[Answer]) -> Worth:
        ids = [[int(word[1:]) for word in answer.text.split()] for answer in answers]
        totals = [score(row) for row in ids]
        return Worth(totals, {"toy": totals})

    return worth


def trainer(
    out: Path,
    score: Callable[[list[int]], float],
    prompts: Sequence[list[int]] = ([3, 4, 5],),
    size: int = 16,
    seed: int = 0,
    **given: Any,
) -> PPOTrainer:
    """A trainer of a toy."""
    policy, value, reference = models(size, seed)
    args = settings(out, **given)
    return PPOTrainer(
        policy, value, reference, tokenizer(size), questions(prompts), rewarded(score), args
    )


def share_of(token: int) -> Callable[[list[int]], float]:
    """The share of a token in the response."""
    return lambda ids: ids.count(token) / max(len(ids), 1)


def weights(model: Any) -> torch.Tensor:
    """All parameters in one vector."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])
