"""Policy and critic as one module, so that one engine trains, shards and saves both."""

import contextlib
import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from align.ppo import logprobs

Wanted = Literal["both", "policy", "value"]


class Scored(NamedTuple):
    """What the models say of N chosen tokens, in float32; None for what was not asked for."""

    logp: Tensor | None  # (N,) log-probability of each token
    entropy: Tensor | None  # (N,) nats, of the distribution that the token was drawn from
    values: Tensor | None  # (N,) V of the state before each token


class PolicyValue(nn.Module):
    """A causal language model and a critic of the same tokens.

    Call it, not its parts: DDP and ZeRO hook into the call.

    Args:
        policy: causal language model, or a PEFT model of one.
        value: sequence classifier with one label whose score is read at every token, or a PEFT model of one.
    """

    def __init__(self, policy: Any, value: Any) -> None:
        super().__init__()
        self.policy = policy
        self.value = value
        self.config = policy.config  # a trainer looks here

    def forward(
        self,
        ids: Tensor,
        rows: Tensor,
        cols: Tensor,
        wanted: Wanted = "both",
        temperature: float = 1.0,
        with_entropy: bool = False,
        entropy_learns: bool = False,
    ) -> Scored:
        """Score the tokens at `ids[rows, cols + 1]` by the states at `cols` before them.

        Args:
            ids: (B, S) prompts with their responses, padded on the right. There is no attention mask, because a causal
                model never looks at what follows.
            rows, cols: (N,) each.
            wanted: which of the two models to run.
            temperature: the logits are divided by it, as they were when the tokens were drawn.
            with_entropy: also the entropy.
            entropy_learns: with its gradient.
        """
        logp = entropy = values = None
        if wanted != "value":
            logp, entropy = token_logp(
                self.policy, ids, rows, cols, temperature, with_entropy, entropy_learns
            )
        if wanted != "policy":
            values = token_values(self.value, ids, rows, cols)
        return Scored(logp, entropy, values)

    def activation_checkpointing_enable(self, **options: Any) -> None:
        """Recompute activations in the backward pass, in both models."""
        for model in (self.policy, self.value):
            model.activation_checkpointing_enable(**options)
            model.config.use_cache = False

    def activation_checkpointing_disable(self) -> None:
        """Keep activations, in both models."""
        for model in (self.policy, self.value):
            model.activation_checkpointing_disable()


def token_logp(
    policy: Any,
    ids: Tensor,
    rows: Tensor,
    cols: Tensor,
    temperature: float = 1.0,
    with_entropy: bool = False,
    entropy_learns: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities (N,) of the tokens after `cols`, and their distributions' entropies; see `PolicyValue.forward`.

    The head sees only the N states that are asked for, not all B·S: their logits are most of what PPO costs in memory.
    """
    with _only_at(policy.get_output_embeddings(), rows, cols):
        logits = policy(input_ids=ids, use_cache=False).logits  # (N, V)
    tokens = ids[rows, cols + 1]
    if not with_entropy:
        return logprobs.token_logp(logits, tokens, temperature), None
    logp, entropy = logprobs.token_logp_and_entropy(logits, tokens, temperature)
    return logp, entropy if entropy_learns else entropy.detach()


@contextlib.contextmanager
def _only_at(head: nn.Module, rows: Tensor, cols: Tensor) -> Iterator[None]:
    """Let a head see the states at (rows, cols) alone.

    What a model does to its logits afterwards (scale them, cap them) is left to the model.
    """

    def select(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...]:
        return inputs[0][rows, cols], *inputs[1:]

    handle = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        handle.remove()


def token_values(value: Any, ids: Tensor, rows: Tensor, cols: Tensor) -> Tensor:
    """V (N,) of the states at (rows, cols), the last layer in float32."""
    model = value.get_base_model() if hasattr(value, "get_base_model") else value
    states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[rows, cols]
    with torch.autocast(states.device.type, enabled=False):
        return _score(model.score, states.float())


def _score(head: Any, states: Tensor) -> Tensor:
    """A classifier's head of one label in float32; PEFT wraps a head that it trains."""
    active = head.modules_to_save[head.active_adapter] if hasattr(head, "modules_to_save") else head
    bias = None if active.bias is None else active.bias.float()
    return functional.linear(states, active.weight.float(), bias).squeeze(-1)


@torch.no_grad()
def adapter_start(policy: Any) -> list[Tensor] | None:
    """What is trained of a PEFT policy, as it is now, to be the reference for one that goes on with its adapter.

    None for a fresh adapter, which changes nothing: leaving it away is the same, and costs less.
    """
    policy.eval()
    ids = torch.arange(min(8, policy.config.vocab_size), device=policy.device)[None]
    present = policy(input_ids=ids, use_cache=False).logits
    with policy.disable_adapter():
        is_fresh = torch.equal(present, policy(input_ids=ids, use_cache=False).logits)
    return None if is_fresh else [p.clone() for p in policy.parameters() if p.requires_grad]


@contextlib.contextmanager
def without_adapter(policy: Any, start: list[Tensor] | None = None) -> Iterator[None]:
    """A PEFT policy as it was when training began: without its adapter, or with the adapter of the start.

    Args:
        policy: a PEFT model.
        start: see `adapter_start`.
    """
    if start is None:
        with policy.disable_adapter():
            yield
        return
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    present = [parameter.data for parameter in trained]
    for parameter, before in zip(trained, start, strict=True):
        parameter.data = before.to(parameter.device, parameter.dtype)
    try:
        yield
    finally:
        for parameter, now in zip(trained, present, strict=True):
            parameter.data = now


def disable_dropout(model: nn.Module) -> None:
    """Let training compute what sampling computed: with dropout the ratio of the first step would not be 1."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # attention takes the rate as a number
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def load_weights(model: Any, folder: Path) -> None:
    """Take over the weights that `save_pretrained` wrote: an adapter's, or a whole model's."""
    if hasattr(model, "peft_config"):
        from peft import load_peft_weights, set_peft_model_state_dict

        set_peft_model_state_dict(model, load_peft_weights(str(folder), device="cpu"))
        return
    saved = type(model).from_pretrained(folder, dtype=model.dtype, use_safetensors=True)
    model.load_state_dict(saved.state_dict())


@torch.no_grad()
def merged_weights(policy: Any) -> dict[str, Tensor]:
    """The weights of the whole model by their names, an adapter's merged into copies.

    Merging in place and undoing it would round the frozen weights a little each time, and with them the reference.
    """
    if not hasattr(policy, "peft_config"):
        weights: dict[str, Tensor] = policy.state_dict()
        return weights
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    model = policy.get_base_model()
    found: dict[str, Tensor] = {}
    adapted: list[str] = []
    for name, layer in model.named_modules():
        if name.startswith(tuple(adapted)):  # a part of one that was merged
            continue
        if isinstance(layer, BaseTunerLayer):
            copied = copy.deepcopy(layer).float()
            with torch.autocast(next(copied.parameters()).device.type, enabled=False):
                copied.merge()
            whole = copied.get_base_layer()
        elif isinstance(layer, ModulesToSaveWrapper):
            whole = layer.modules_to_save[layer.active_adapter]
        else:
            continue
        adapted.append(f"{name}.")
        for key, tensor in whole.state_dict().items():
            found[f"{name}.{key}"] = tensor.to(policy.dtype)
    rest = model.state_dict().items()
    return found | {key: x for key, x in rest if not key.startswith(tuple(adapted))}
