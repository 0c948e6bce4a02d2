"""Reward models: a scalar for a prompt and its completion.

The tokens are those that TRL's RewardTrainer trains on: the whole conversation through the chat template, without a
generation prompt, padded on the right; the score is read at the last token that is not the pad token.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.entry import UserError
from reward.turns import Message

_DTYPES = ("float32", "bfloat16")


class RewardModel:
    """A sequence classifier with one label, and its tokenizer. Use `load`.

    In float32 a score does not depend on what else is in the batch, up to rounding (1e-5 on a scale from −5 to 6, of a
    135M model). In bfloat16 it does (0.2 there): enough to turn the order of two completions.
    """

    def __init__(self, model: Any, tokenizer: Any, batch_size: int, max_length: int | None) -> None:
        config = model.config.get_text_config()
        if config.pad_token_id is None:  # the model finds the last token by it
            config.pad_token_id = tokenizer.pad_token_id
        self._pad = config.pad_token_id
        self._model = model
        self._tokenizer = tokenizer
        self._batch_size = batch_size
        self.max_length = max_length or getattr(config, "max_position_embeddings", None)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        revision: str | None = None,
        dtype: str = "float32",
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> "RewardModel":
        """Load a reward model to the accelerator if there is one, in evaluation mode.

        Args:
            path: a folder, such as an artifact of the `rm` stage, or a hub id.
            revision: hub branch, tag or commit.
            dtype: number format of the weights, float32 or bfloat16.
            batch_size: conversations scored together.
            max_length: tokens of the longest conversation that gets a score; None: what the model can see.

        Raises:
            UserError: when there is no such model, or it is no reward model.
        """
        for name, number in (("batch_size", batch_size), ("max_length", max_length)):
            if number is not None and number < 1:
                raise UserError(f"{name}={number} must be at least 1")
        if dtype not in _DTYPES:
            raise UserError(f"there is no dtype {dtype!r}. There are: {', '.join(_DTYPES)}")
        _check_folder(path)
        try:
            model, tokenizer = _load(path, revision, dtype)
        except (OSError, ValueError) as error:
            reason = str(error).strip().split("\n")[0]
            raise UserError(f"{path} cannot be loaded as a reward model: {reason}") from error
        if tokenizer.chat_template is None:
            raise UserError(
                f"the tokenizer of {path} has no chat template; add the one with which the model was trained"
            )
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return cls(model, tokenizer, batch_size, max_length)

    def tokenize(
        self, prompt: list[Message], completion: list[Message], tools: list[Any] | None = None
    ) -> list[int]:
        """The token ids of a conversation, as TRL's RewardTrainer makes its `chosen_ids`."""
        encoded = self._tokenizer.apply_chat_template(
            prompt + completion, tools=tools, tokenize=True, return_dict=True
        )
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
        """
        offered = tools or [None] * len(prompts)
        ids = [self.tokenize(*row) for row in zip(prompts, completions, offered, strict=True)]
        limit = self.max_length or math.inf
        fitting = [place for place, row in enumerate(ids) if len(row) <= limit]
        fitting.sort(key=lambda place: -len(ids[place]))  # little padding; the largest batch first
        scores = [math.nan] * len(ids)
        for start in range(0, len(fitting), self._batch_size):
            places = fitting[start : start + self._batch_size]
            for place, score in zip(places, self._forward([ids[p] for p in places]), strict=True):
                scores[place] = score
        return scores

    def score_tokens(self, rows: list[list[int]]) -> list[float]:
        """The scores of conversations of which the tokens are known, as one batch."""
        return self._forward(rows)

    def _forward(self, rows: list[list[int]]) -> list[float]:
        """The scores of one batch."""
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
        return [float(score) for score in logits.squeeze(-1).float().tolist()]


def _check_folder(path: str) -> None:
    """Say what a path is instead of a model folder or a hub id."""
    folder = Path(path).expanduser()
    if folder.is_dir():
        if (folder / "adapter_config.json").is_file():
            raise UserError(f"{path} is an adapter; merge it into its base model first")
        if not (folder / "config.json").is_file():
            raise UserError(f"{path} is not a Hugging Face model folder: config.json is missing")
    elif path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"there is no reward model {path!r}: give a model folder or a hub id (owner/name)"
        )


def _load(path: str, revision: str | None, dtype: str) -> tuple[Any, Any]:
    import torch
    from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

    source: dict[str, Any] = {
        "pretrained_model_name_or_path": str(Path(path).expanduser()),
        "revision": revision,
        "trust_remote_code": False,
    }
    config = AutoConfig.from_pretrained(**source)
    kind = ", ".join(config.architectures or ["model without a known architecture"])
    if "ForSequenceClassification" not in kind or config.num_labels != 1:
        raise UserError(
            f"{path} is a {kind} with {config.num_labels} labels, not a reward model (a sequence classifier with one "
            "label); train one with the rm stage"
        )
    model, report = AutoModelForSequenceClassification.from_pretrained(
        **source,
        dtype=getattr(torch, dtype),
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        use_safetensors=True,
        output_loading_info=True,
    )
    if missing := report["missing_keys"]:  # they would be random numbers
        raise UserError(f"{path} lacks weights: {', '.join(sorted(missing)[:3])}")
    return model.eval(), AutoTokenizer.from_pretrained(**source)
