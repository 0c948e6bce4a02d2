"""Which settings of PPO mean something. No torch: they are checked with the plan, before any stage begins."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from conf.entry import UserError
from conf.passthrough import default_of, fields_of

_ONE_OR_MORE = (
    "num_rollouts",
    "rollout_batch_size",
    "num_ppo_epochs",
    "num_mini_batches",
    "max_prompt_length",
    "max_new_tokens",
    "generation_batch_size",
    "entropy_every",
    "per_device_train_batch_size",
    "max_tokens_per_micro_batch",
    "importance_cap",
    "dual_clip",
)
_ZERO_OR_MORE = (
    "kl_coef",
    "kl_loss_coef",
    "missing_eos_penalty",
    "overlong_buffer",
    "overlong_penalty",
    "learning_rate",
    "value_learning_rate",
    "critic_warmup_steps",
    "vf_coef",
    "entropy_coef",
    "log_samples",
)
_ABOVE_ZERO = (
    "cliprange",
    "cliprange_high",
    "cliprange_value",
    "early_stop_kl",
    "kl_horizon",
    "lam_adaptive",
    "ratio_threshold",
    "reward_clip",
    "reward_gain",
    "sampler_tolerance",
    "target_kl_per_sequence",
    "vllm_timeout",
)
_CHOICES = {
    "engine": ("generate", "vllm"),
    "importance_correction": ("none", "truncate", "mask"),
    "kl_in_reward": ("k1", "abs", "none"),
    "kl_loss_type": ("k2", "k3_is"),
    "missing_eos_mode": ("subtract", "replace"),
    "truncation": ("terminal", "bootstrap", "mask"),
    "loss_aggregation": ("token_mean", "seq_mean"),
}
# Settings of the Trainer that PPO cannot keep, with what to do instead.
_REFUSED = {
    "fp16": "false: use bf16",
    "auto_find_batch_size": "false: set max_tokens_per_micro_batch",
    "neftune_noise_alpha": "null: with noise the first ratio would not be 1",
    "label_smoothing_factor": "0: PPO has no labels",
    "use_liger_kernel": "false: only a response's own logits are made anyway",
    "fsdp": "left out: use deepspeed=zero2 or zero3",
}


def settings_of(args: Mapping[str, Any]) -> dict[str, Any]:
    """Every setting with a plain default, with the values that are given."""
    found = dict(args)
    for name in fields_of("ppo"):
        try:
            found.setdefault(name, default_of("ppo", name))
        except LookupError:
            continue
    return found


def check(given: Mapping[str, Any]) -> None:
    """Refuse what means nothing.

    Args:
        given: values by the names of `align.ppo.config.PPOConfig`.

    Raises:
        UserError: naming the argument.
    """
    _check_choices(given)
    _check_numbers(given)
    _check_adaptive(given)
    _check_engine(given)
    _check_batches(given)
    for name, wanted in _REFUSED.items():
        _require(not given.get(name), name, given, wanted)


def _check_choices(given: Mapping[str, Any]) -> None:
    _require(
        given["kl_in_reward"] != "k3",
        "kl_in_reward",
        given,
        "k1, abs or none: with k3 in the reward the gradient is not that of the KL, and the policy ends elsewhere "
        "than at the optimum (arXiv 2512.21852); k3 belongs in the loss: kl_loss_coef with kl_loss_type=k3_is",
    )
    for name, choices in _CHOICES.items():
        wanted = f"{', '.join(choices[:-1])} or {choices[-1]}"
        _require(given[name] in choices, name, given, wanted)


def _check_numbers(given: Mapping[str, Any]) -> None:
    bounds: list[tuple[Sequence[str], Callable[[float], bool], str]] = [
        (_ONE_OR_MORE, lambda value: value >= 1, "at least 1"),
        (_ZERO_OR_MORE, lambda value: value >= 0, "0 or more"),
        (_ABOVE_ZERO, lambda value: value > 0, "above 0"),
        (("gamma", "lam", "lam_value"), lambda value: 0 <= value <= 1, "between 0 and 1"),
        (("temperature",), lambda value: value > 0, "above 0: PPO must explore"),
    ]
    for names, is_fine, wanted in bounds:
        for name in names:
            value = given[name]
            is_number = value is None or (math.isfinite(value) and is_fine(value))
            _require(is_number, name, given, wanted)
    most = given["max_new_tokens"]
    _require(
        given["overlong_buffer"] <= most, "overlong_buffer", given, f"at most max_new_tokens={most}"
    )


def _check_adaptive(given: Mapping[str, Any]) -> None:
    """A β that follows a target must have one to begin with, and must not change its sign on the way."""
    if given["target_kl_per_sequence"] is None:
        return
    _require(
        given["kl_in_reward"] != "none" and given["kl_coef"] > 0,
        "target_kl_per_sequence",
        given,
        "null when kl_coef=0 or kl_in_reward=none: it is β that follows the target",
    )
    size = given["rollout_batch_size"]
    _require(
        given["kl_horizon"] > size, "kl_horizon", given, f"more than rollout_batch_size={size}"
    )


def _check_engine(given: Mapping[str, Any]) -> None:
    url = given["vllm_url"]
    if given["engine"] == "vllm":
        is_address = url is not None and url.startswith(("http://", "https://"))
        _require(is_address, "vllm_url", given, "the server's address, http://HOST:PORT")
    else:
        _require(url is None, "vllm_url", given, "left out, or ppo.args.engine be vllm")


def _check_batches(given: Mapping[str, Any]) -> None:
    _require(
        given["gradient_accumulation_steps"] == 1,
        "gradient_accumulation_steps",
        given,
        "1: a step takes rollout_batch_size / num_mini_batches responses, in as many micro-batches of "
        "per_device_train_batch_size or max_tokens_per_micro_batch as they need",
    )
    _require(
        given["num_train_epochs"] == 1,
        "num_train_epochs",
        given,
        "1: num_rollouts says how long to train, and prompts are gone through as often as that takes",
    )
    parts = given["num_mini_batches"]
    _require(
        given["rollout_batch_size"] % parts == 0,
        "rollout_batch_size",
        given,
        f"a multiple of num_mini_batches={parts}",
    )


def _require(is_fine: bool, name: str, given: Mapping[str, Any], wanted: str) -> None:
    if not is_fine:
        raise UserError(f"ppo.args.{name}={given[name]} must be {wanted}")
