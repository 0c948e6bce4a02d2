"""Draw completions from a causal model: padding, sampling, stopping.

A completion depends on the model, the prompt and a seed of its own, not on what else is in the batch: every row draws
from its own random numbers. What is left of the batch is float rounding. In float32 it all but never decides a token;
in bfloat16, in quantized formats and on an accelerator it may decide one between two nearly equal ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from reward.prompts import Asked
from reward.records import Prompt
from reward.store import content_key

_STRIDE = 16  # tokens after which rows that have ended leave the batch


@dataclass(frozen=True)
class Completion:
    """What the model wrote after a prompt."""

    text: str  # without the special tokens
    tokens: int  # that were generated, the ending one among them
    finish: str  # "eos": the model ended it; "length": it was cut off


def seed_of(seed: int, prompt: Prompt | Asked, index: int) -> int:
    """The seed of a prompt's `index`-th completion, in 64 bits."""
    return int(content_key([seed, prompt.prompt, prompt.tools, index]), 16)


def end_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a completion: those that the model names, and the tokenizer's."""
    own = model.generation_config.eos_token_id
    ends = set(own if isinstance(own, list) else [own]) | {tokenizer.eos_token_id}
    return sorted(end for end in ends if end is not None)


class Generator:
    """A model that completes prompts under one setting of temperature, top_p and length.

    It samples from the model itself: what its `generation_config.json` asks for (a repetition penalty, top-k) is not
    applied, because it is another distribution than the one that training changes.

    Args:
        model: a causal language model, in evaluation mode.
        tokenizer: with a chat template.
        temperature: 0 takes the likeliest token always.
        top_p: draw from the likeliest tokens that together have this probability (Holtzman et al. 2020, 1904.09751).
        max_new_tokens: a completion's length at most.
    """

    def __init__(
        self, model: Any, tokenizer: Any, temperature: float, top_p: float, max_new_tokens: int
    ) -> None:
        from transformers import GenerationConfig

        self._ends = end_tokens(model, tokenizer)
        self._pad = tokenizer.pad_token_id
        self._model = model
        self._tokenizer = tokenizer
        self._temperature = temperature
        self._top_p = top_p
        self.max_new_tokens = max_new_tokens
        # Here too, because `generate` takes from it what the config of a call leaves open.
        model.generation_config = GenerationConfig(
            do_sample=False,
            max_new_tokens=max_new_tokens,
            eos_token_id=self._ends or None,
            pad_token_id=self._pad,
        )

    @property
    def context(self) -> int | None:
        """Tokens that the model can see, where its configuration tells."""
        return getattr(self._model.config.get_text_config(), "max_position_embeddings", None)

    def encode(self, prompt: Prompt | Asked) -> list[int]:
        """The token ids of a prompt, up to where the assistant is to speak."""
        encoded = self._tokenizer.apply_chat_template(
            prompt.prompt,
            tools=prompt.tools,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        return list(encoded["input_ids"])

    def complete(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Completion]:
        """One completion of each prompt; see `tokens`."""
        return [self.completion(ids) for ids in self.tokens(prompts, seeds)]

    def tokens(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[list[int]]:
        """The token ids that the model says after each prompt, the ending one among them.

        Args:
            prompts: token ids, see `encode`.
            seeds: one for each prompt.
        """
        import torch

        width = max(map(len, prompts))
        # On the left, so that every row goes on at the same place.
        rows = [[self._pad] * (width - len(ids)) + ids for ids in prompts]
        is_token = [[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts]
        device = self._model.device
        ids, mask = (torch.tensor(each, device=device) for each in (rows, is_token))
        generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]
        found: list[list[int]] = [[] for _ in prompts]
        going, cache = list(range(len(prompts))), None
        stride = _STRIDE if _can_leave(self._model) else self.max_new_tokens
        with torch.inference_mode():
            for done in range(0, self.max_new_tokens, stride):
                steps = min(stride, self.max_new_tokens - done)
                ids, cache = self._continued(
                    ids, mask, cache, steps, [generators[i] for i in going]
                )
                for row, new in zip(going, ids[:, width + done :].tolist(), strict=True):
                    found[row] += self._ended(new)
                left = [at for at, row in enumerate(going) if not self.is_ended(found[row])]
                if not left or done + steps == self.max_new_tokens:
                    break
                going = [going[at] for at in left]
                kept = torch.tensor(left, device=device)
                ids, mask = ids[kept], torch.nn.functional.pad(mask[kept], (0, steps), value=1)
                cache.batch_select_indices(kept)
        return found

    def _continued(
        self, ids: Any, mask: Any, cache: Any, steps: int, generators: Sequence[Any]
    ) -> tuple[Any, Any]:
        """The rows with what comes next, and the cache of them."""
        from transformers import LogitsProcessorList

        output = self._model.generate(
            input_ids=ids,
            attention_mask=mask,
            past_key_values=cache,
            max_new_tokens=steps,
            logits_processor=LogitsProcessorList(self._processors(generators)),
            return_dict_in_generate=True,
            synced_gpus=False,  # the weights are whole here, so no process waits for another
        )
        return output.sequences, output.past_key_values

    def _ended(self, ids: list[int]) -> list[int]:
        end = next((place for place, token in enumerate(ids) if token in self._ends), len(ids))
        return ids[: end + 1]

    def completion(self, ids: list[int]) -> Completion:
        """What `tokens` gave, as text."""
        text = self._tokenizer.decode(ids, skip_special_tokens=True)
        return Completion(text, len(ids), "eos" if self.is_ended(ids) else "length")

    def is_ended(self, ids: list[int]) -> bool:
        """Whether the model ended by itself what `tokens` gave."""
        return ids[-1] in self._ends

    def _processors(self, generators: Sequence[Any]) -> list[Any]:
        from transformers import TemperatureLogitsWarper, TopPLogitsWarper

        if self._temperature == 0:
            return []
        return [
            *([TemperatureLogitsWarper(self._temperature)] if self._temperature != 1 else []),
            *([TopPLogitsWarper(self._top_p)] if self._top_p < 1 else []),
            race(generators),
        ]


def _can_leave(model: Any) -> bool:
    """Whether rows can be taken out of the model's cache: where every layer keeps all keys and values."""
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    is_whole = kinds == {"full_attention"} and not getattr(model, "_is_stateful", False)
    return is_whole and getattr(config, "sliding_window", None) is None


def race(generators: Sequence[Any]) -> Callable[[Any, Any], Any]:
    """A logits processor after which the highest score is a draw from the softmax.

    With waiting times e ~ Exp(1), the token with the smallest e/p is a draw from p: the Gumbel-max trick. A small
    change of p, such as rounding, rarely changes who wins.

    Args:
        generators: of random numbers, one for each row of the batch, on the device of the scores; its kind is part of
            what the numbers depend on.
    """
    import torch

    def with_noise(_: Any, scores: Any) -> Any:
        """Scores (rows, vocabulary) in float32 with the noise of each row."""
        waits = torch.empty_like(scores)
        for row, generator in zip(waits, generators, strict=True):
            row.exponential_(generator=generator)
        return scores - waits.clamp_min_(torch.finfo(waits.dtype).tiny).log_()

    return with_noise
