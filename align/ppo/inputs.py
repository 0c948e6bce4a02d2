"""What PPO needs of models, tokenizer and prompts, checked before anything is trained."""

from collections.abc import Sequence
from typing import Any

from align.ppo.config import PPOConfig
from conf.entry import UserError


def check(
    policy: Any, value: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], args: PPOConfig
) -> None:
    """Check that every prompt and its response fit both models, and that a response can end.

    A tokenizer without a pad token gets one: which it is makes no difference, because padding is known by lengths.

    Args:
        policy, value: the models.
        tokenizer: the policy's.
        prompts: token ids, of training and of evaluation.
        args: the settings.

    Raises:
        UserError: naming the argument to change.
    """
    if not all(prompts):
        raise UserError("a prompt has no tokens: the first token of a response needs one before it")
    longest = max(map(len, prompts))
    for name, model in (("policy", policy), ("critic", value)):
        _check_window(name, model, longest, args)
    _check_vocabulary(policy, value, tokenizer, max(map(max, prompts)))
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    _check_end(policy, tokenizer, args)


def _check_window(name: str, model: Any, longest: int, args: PPOConfig) -> None:
    window = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if window and longest + args.max_new_tokens > window:
        fix = (
            f"lower ppo.args.max_prompt_length to {window - args.max_new_tokens} or less (longer prompts are left "
            "out), or ppo.args.max_new_tokens"
            if window > args.max_new_tokens
            else "lower ppo.args.max_new_tokens"
        )
        raise UserError(
            f"the longest prompt has {longest} tokens, which with ppo.args.max_new_tokens={args.max_new_tokens} is "
            f"more than the {window} that the {name} can see; {fix}"
        )


def _check_vocabulary(policy: Any, value: Any, tokenizer: Any, largest: int) -> None:
    size, of_critic = (model.config.get_text_config().vocab_size for model in (policy, value))
    if largest >= size:
        raise UserError(
            f"a prompt holds token {largest}, but the policy knows {size}: its tokens are another tokenizer's"
        )
    if of_critic < (needed := min(len(tokenizer), size)):
        raise UserError(
            f"the critic knows {of_critic} tokens and the policy {needed}, but both read the same: leave ppo.value "
            "out, and the critic starts from the policy"
        )


def _check_end(policy: Any, tokenizer: Any, args: PPOConfig) -> None:
    has_end = (
        tokenizer.eos_token_id is not None or policy.generation_config.eos_token_id is not None
    )
    if has_end or (args.missing_eos_penalty is None and args.truncation == "terminal"):
        return
    raise UserError(
        "neither the tokenizer nor the model's generation_config has an end token, so every response is cut off: name "
        "it (eos_token), or, where responses are of one length, set ppo.args.missing_eos_penalty=null and "
        "ppo.args.truncation=terminal"
    )
