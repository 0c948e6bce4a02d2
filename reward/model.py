"""Reward models: a scalar for a prompt and its completion.

The tokens are those that TRL's RewardTrainer trains on: the whole conversation through the chat template, without a
generation prompt, padded on the right; the score is read at the last token that is not the pad token.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from conf.entry import UserError
from reward.classifier import identity, open_classifier
from reward.turns import Message


class RewardModel:
    """A sequence classifier with one label, and its tokenizer. Use `load`.

    In float32 a score does not depend on what else is in the batch, up to rounding (1e-5 on a scale from −5 to 6, of a
    135M model). In bfloat16 it does (0.2 there): enough to turn the order of two completions.

    `path` is where it is from, `max_length` in tokens.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        batch_tokens: int,
        max_length: int | None,
        path: str,
        revision: str | None = None,
    ) -> None:
        config = model.config.get_text_config()
        if config.pad_token_id is None:  # the model finds the last token by it
            config.pad_token_id = tokenizer.pad_token_id
        self._pad = config.pad_token_id
        self._model = model
        self._tokenizer = tokenizer
        self._batch_tokens = batch_tokens
        self._revision = revision
        self.path = path
        self.max_length = max_length or getattr(config, "max_position_embeddings", None)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        batch_tokens: int = 4096,
        max_length: int | None = None,
    ) -> "RewardModel":
        """Load a reward model to the accelerator if there is one, in evaluation mode.

        Args:
            path: a folder, such as an artifact of the `rm` stage; a LoRA adapter with its score head; or a hub id.
            revision: hub branch, tag or commit.
            dtype: number format of the weights, float32 or bfloat16.
            batch_tokens: tokens scored together, padding among them; a longer conversation is scored alone.
            max_length: tokens of the longest conversation that gets a score; None: what the model can see.

        Raises:
            UserError: when there is no such model, or it is no reward model.
        """
        for name, number in (("batch_tokens", batch_tokens), ("max_length", max_length)):
            if number is not None and number < 1:
                raise UserError(f"{name}={number} must be at least 1")
        model, tokenizer = open_classifier(path, revision, dtype)
        return cls(model, tokenizer, batch_tokens, max_length, path, revision)

    @functools.cached_property
    def identity(self) -> str:
        """What names the weights, the tokenizer and the template: a hash of files, or the commit on the hub."""
        commit = getattr(self._model.config, "_commit_hash", None)
        return identity(self.path, self._revision, commit=commit)

    def tokenize(
        self, prompt: list[Message], completion: list[Message], tools: list[Any] | None = None
    ) -> list[int]:
        """The token ids of a conversation, as TRL's RewardTrainer makes its `chosen_ids`.

        Raises:
            UserError: when the chat template refuses it.
        """
        from jinja2 import TemplateError

        try:
            encoded = self._tokenizer.apply_chat_template(
                prompt + completion, tools=tools, tokenize=True, return_dict=True
            )
        except TemplateError as error:
            start = str((prompt + completion)[0].get("content"))[:40]
            raise UserError(
                f"the chat template of {self.path} refuses a conversation ({error}); it begins with {start!r}"
            ) from error
        return list(encoded["input_ids"])

    def score(
        self,
        prompts: Sequence[list[Message]],
        completions: Sequence[list[Message]],
        tools: Sequence[list[Any] | None] | None = None,
    ) -> list[float]:
        """Rewards, higher is better, on the model's own scale: only differences for one prompt mean something.

        Args:
            prompts: the turns before each completion.
            completions: the turns from the assistant's on.
            tools: tool definitions of each prompt.

        Returns:
            A score for each completion; NaN where prompt and completion are longer than `max_length` tokens, because
            the score of a cut conversation is that of another one. Training leaves such rows out too.

        Raises:
            UserError: when the model gives a number that is not finite.
        """
        offered = tools or [None] * len(prompts)
        return self.score_ids(
            [self.tokenize(*row) for row in zip(prompts, completions, offered, strict=True)]
        )

    def score_ids(self, ids: list[list[int]]) -> list[float]:
        """As `score`, of conversations that `tokenize` has made token ids of."""
        limit = self.max_length or math.inf
        fitting = {place: len(row) for place, row in enumerate(ids) if len(row) <= limit}
        scores = [math.nan] * len(ids)
        for places in batches(fitting, self._batch_tokens):
            for place, score in zip(
                places, self.score_tokens([ids[p] for p in places]), strict=True
            ):
                scores[place] = score
        return scores

    def score_tokens(self, rows: list[list[int]]) -> list[float]:
        """The scores of one batch of token ids, see `tokenize`.

        Raises:
            UserError: when the model gives a number that is not finite.
        """
        import torch

        width = max(map(len, rows))
        device = self._model.device
        padded = [row + [self._pad] * (width - len(row)) for row in rows]
        is_token = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
        with torch.inference_mode():
            logits = self._model(
                input_ids=torch.tensor(padded, device=device),
                attention_mask=torch.tensor(is_token, device=device),
                use_cache=False,
            ).logits  # (batch, 1)
        scores = [float(score) for score in logits.squeeze(-1).float().tolist()]
        if not all(
            map(math.isfinite, scores)
        ):  # a NaN would read as a conversation that is too long
            raise UserError(
                f"the scores of {self.path} are not finite: its weights hold NaN or infinity, or overflow; "
                "look at the end of its training, or score with dtype float32"
            )
        return scores


def batches(lengths: Mapping[int, int], batch_tokens: int) -> Iterator[list[int]]:
    """Places of similar length together, the longest first, so that little is padded and memory runs out at once.

    Args:
        lengths: tokens of each conversation, by its place.
        batch_tokens: of a batch, padding among them; a longer conversation stands alone.
    """
    ordered = sorted(lengths, key=lambda place: -lengths[place])
    start = 0
    while start < len(ordered):
        rows = max(1, batch_tokens // max(1, lengths[ordered[start]]))
        yield ordered[start : start + rows]
        start += rows
