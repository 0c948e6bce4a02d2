"""The likelihood of token sequences under a model and its divergence from a reference, token by token."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

# Columns of `token_values`; the first alone without a reference.
LOSS, REFERENCE_LOSS, KL, AGREES = range(4)

# Logits of one batch of one model: 1 GiB in 16 bits, so that a large vocabulary means fewer windows at once.
_BATCH_VALUES = 1 << 29
# Log-probabilities in float32 of one step over positions, 16 MiB: they stay in a processor's cache.
_CHUNK_VALUES = 1 << 22


@dataclass(frozen=True)
class Window:
    """Tokens that a model reads at once: `size` of a document from `start`, each to predict the one after it."""

    document: int
    start: int
    size: int


def windows(lengths: Sequence[int], max_length: int) -> list[Window]:
    """Windows that predict every token of each document but its first, exactly once.

    A window spans `max_length` tokens, of which the last is only predicted. The next one starts with that token, as its
    context (lm-eval's rolling log-likelihood with a context of one). So long documents lose context at the seams.

    Args:
        lengths: number of tokens of each document.
        max_length: at least 2.
    """
    step = max_length - 1
    return [
        Window(document, start, min(step, length - 1 - start))
        for document, length in enumerate(lengths)
        for start in range(0, length - 1, step)
    ]


def batches(found: Sequence[Window], batch_size: int, vocabulary: int) -> Iterator[list[Window]]:
    """Windows of similar length together, the longest first, at most `batch_size` and 2²⁹ logits at once."""
    ordered = sorted(found, key=lambda window: -window.size)
    start = 0
    while start < len(ordered):
        fitting = max(1, _BATCH_VALUES // (ordered[start].size * vocabulary))
        stop = start + min(batch_size, fitting)
        yield ordered[start:stop]
        start = stop


def token_values(
    model: Any,
    documents: Sequence[Sequence[int]],
    max_length: int,
    batch_size: int,
    reference: Any = None,
) -> list[np.ndarray]:
    """What each predicted token costs a model, and how far the model is from a reference there.

    The divergence is KL(reference ‖ model) in nats over the vocabulary that both have: rows with which only one of them
    pads its embeddings are left out. Rounding below zero is cut. Everything after the logits is in float32.

    Args:
        model: a causal language model of transformers.
        documents: token ids of each document, at least two.
        max_length, batch_size: tokens of a window, and windows at once.
        reference: another such model with the same tokenizer, or `model` itself.

    Returns:
        For each document the columns LOSS (−log p), REFERENCE_LOSS, KL and AGREES (1 where both have the same likeliest
        token); LOSS alone without a reference. Shape (columns, tokens − 1), float64.
    """
    import torch

    columns = 1 if reference is None else 4
    values = [np.full((columns, len(ids) - 1), np.nan) for ids in documents]
    found = windows([len(ids) for ids in documents], max_length)
    width = max(vocabulary_of(each) for each in (model, reference) if each is not None)
    with torch.inference_mode():
        for batch in batches(found, batch_size, width):
            inputs = _padded([_ids(documents, window) for window in batch], model.device)
            ours = model(**inputs, use_cache=False).logits
            theirs = None
            if reference is not None:
                theirs = ours if reference is model else reference(**inputs, use_cache=False).logits
            for row, window in enumerate(batch):
                targets = documents[window.document][window.start + 1 :][: window.size]
                last = slice(window.start, window.start + window.size)
                values[window.document][:, last] = _of_window(
                    ours[row], None if theirs is None else theirs[row], targets
                )
    return values


def vocabulary_of(model: Any) -> int:
    """Number of logits at a position."""
    return int(model.config.get_text_config().vocab_size)


def _ids(documents: Sequence[Sequence[int]], window: Window) -> Sequence[int]:
    return documents[window.document][window.start : window.start + window.size]


def _padded(rows: Sequence[Sequence[int]], device: Any) -> dict[str, "torch.Tensor"]:
    """Rows padded at their right: a causal model's real tokens cannot see that."""
    import torch

    longest = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
    return {"input_ids": ids.to(device), "attention_mask": mask.to(device)}


def _of_window(
    ours: "torch.Tensor", theirs: "torch.Tensor | None", targets: Sequence[int]
) -> np.ndarray:
    """The columns of one window's tokens, a few positions at a time.

    Args:
        ours, theirs: logits of the model and the reference; shape (padded length, vocabulary).
        targets: the tokens that follow; shape (size,).
    """
    import torch

    step = max(1, _CHUNK_VALUES // ours.shape[-1])
    parts = []
    for start in range(0, len(targets), step):
        stop = min(start + step, len(targets))
        wanted = torch.tensor(targets[start:stop], device=ours.device)[:, None]
        part = None if theirs is None else theirs[start:stop]
        parts.append(_of_positions(ours[start:stop], part, wanted).double().cpu().numpy())
    return np.concatenate(parts, axis=1)


def _of_positions(
    ours: "torch.Tensor", theirs: "torch.Tensor | None", wanted: "torch.Tensor"
) -> "torch.Tensor":
    """The columns of some positions (n): logits of shape (n, vocabulary), wanted tokens of shape (n, 1)."""
    import torch
    from torch.nn.functional import kl_div

    ours = ours.float().log_softmax(-1)
    loss = -ours.gather(-1, wanted)[:, 0]
    if theirs is None:
        return loss[None]
    theirs = theirs.float().log_softmax(-1)
    reference_loss = -theirs.gather(-1, wanted)[:, 0]
    if ours.shape != theirs.shape:
        common = min(ours.shape[-1], theirs.shape[-1])
        ours, theirs = (side[:, :common].log_softmax(-1) for side in (ours, theirs))
    kl = kl_div(ours, theirs, log_target=True, reduction="none").sum(-1).clamp(min=0)
    agrees = ours.argmax(-1) == theirs.argmax(-1)
    return torch.stack([loss, reference_loss, kl, agrees.float()])
