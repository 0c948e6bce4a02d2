"""The perplexity of generated text under a language model."""

from collections.abc import Sequence
from typing import Any


def perplexity(
    answers: Sequence[str], references: Sequence[Sequence[str]], model: Any, tokenizer: Any
) -> list[tuple[float, float, str] | None]:
    """(log-likelihood in nats, tokens, `perplexity`) of each answer: exp of the mean loss over all tokens.

    The text is read alone, after the model's first token, without the prompt. Unlike the mean of the texts'
    perplexities, this is not ruled by the shortest and oddest ones. An empty answer has no token and is a gap.
    """
    return [_likelihood(answer, model, tokenizer) for answer in answers]


def _likelihood(text: str, model: Any, tokenizer: Any) -> tuple[float, float, str] | None:
    """One text at a time: padding would let a row's value depend on its neighbours."""
    import torch

    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        return None
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    window = (getattr(model.config, "max_position_embeddings", None) or len(ids) + 1) - 1
    total = 0.0
    for start in range(0, len(ids), window):  # a longer text is read in pieces
        piece = torch.tensor([first, *ids[start : start + window]], device=model.device)
        with torch.inference_mode():
            logits = model(piece[None, :-1]).logits[0].float()  # (tokens, vocabulary)
        total -= float(torch.nn.functional.cross_entropy(logits, piece[1:], reduction="sum"))
    return total, float(len(ids)), "perplexity"
