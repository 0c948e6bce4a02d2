"""What writes the responses: one small protocol, and Hugging Face's `generate` behind it."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from align.ppo.batches import Sample
from align.ppo.config import PPOConfig
from evals.generate import Generator


class Sampler(Protocol):
    """An engine that writes responses with the policy's present weights."""

    def sync(self) -> None:
        """Take over the policy's weights; called on every process, before responses are drawn."""

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        """A response to each prompt, drawn with the seed of its own. Every process calls it, even without a prompt."""

    def close(self) -> None:
        """Give back what the engine holds."""


class GenerateSampler:
    """`generate` of the policy itself: nothing to synchronize, and no second copy of the weights.

    A response depends on its prompt, its seed and the weights, not on what else is in the batch, see `evals.generate`.

    Args:
        policy: causal language model, or a PEFT model of one.
        tokenizer: the policy's.
        temperature: of the draws.
        max_new_tokens: of a response.
        batch_size: prompts that are continued together.
        around: a context in which to generate: mixed precision, gathered weights.
    """

    def __init__(
        self,
        policy: Any,
        tokenizer: Any,
        temperature: float,
        max_new_tokens: int,
        batch_size: int,
        around: Callable[[], AbstractContextManager[Any]],
    ) -> None:
        model = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        self._model = model
        self._generator = Generator(model, tokenizer, temperature, 1.0, max_new_tokens)
        self._batch_size = batch_size
        self._around = around

    def sync(self) -> None:
        """Nothing to do: it is the policy."""

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        """A response to each prompt; prompts of similar length are continued together."""
        order = sorted(range(len(prompts)), key=lambda place: -len(prompts[place]))
        found: dict[int, Sample] = {}
        was_training = self._model.training
        self._model.eval()
        try:
            with self._around():
                for start in range(0, len(order), self._batch_size):
                    places = order[start : start + self._batch_size]
                    drawn = self._generator.tokens(
                        [prompts[place] for place in places], [seeds[place] for place in places]
                    )
                    for place, ids in zip(places, drawn, strict=True):
                        is_ended = self._generator.is_ended(ids)
                        found[place] = Sample(prompts[place], ids, is_ended)
        finally:
            self._model.train(was_training)
        return [found[place] for place in range(len(prompts))]

    def close(self) -> None:
        """Nothing to give back."""


def open_sampler(
    policy: Any,
    tokenizer: Any,
    args: PPOConfig,
    accelerator: Any,
    around: Callable[[], AbstractContextManager[Any]],
) -> Sampler:
    """The engine that `args` names.

    Args:
        policy: causal language model, or a PEFT model of one.
        tokenizer: the policy's.
        args: `engine`, and what is drawn how.
        accelerator: of the trainer.
        around: a context in which the policy's weights are whole and may generate.

    Raises:
        UserError: when there is no such server, or it cannot write as long as is asked for.
    """
    if args.engine == "vllm":
        from align.ppo.vllm import VLLMSampler

        return VLLMSampler(policy, tokenizer, args, accelerator, around)
    return GenerateSampler(
        policy,
        tokenizer,
        args.temperature,
        args.max_new_tokens,
        args.generation_batch_size,
        around,
    )
