"""Responses as tensors, and how a step's responses are cut into micro-batches."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from reward.store import content_key


@dataclass(frozen=True)
class Sample:
    """What the policy wrote after a prompt."""

    prompt: list[int]
    response: list[int]  # the end token among them, if there is one
    is_ended: (
        bool  # the sampler says so; a response of full length may have ended with its last token
    )
    sampler_logp: list[float] | None = None  # by a sampler that is not the trainer's own model

    @property
    def length(self) -> int:
        """Tokens of prompt and response."""
        return len(self.prompt) + len(self.response)


class Batch(NamedTuple):
    """Sequences padded on the right, and where the states before each response token are."""

    ids: Tensor  # (B, S)
    rows: Tensor  # (N,) with `cols`, see `PolicyValue.forward`; row by row, from the first token to the last
    cols: Tensor
    places: Tensor  # (N,) number of the token in its response
    ends: Tensor  # (B,) column of each sequence's last token


def pack(samples: Sequence[Sample], pad: int, device: torch.device | str = "cpu") -> Batch:
    """Samples as one batch."""
    width = max(sample.length for sample in samples)
    ids = [s.prompt + s.response + [pad] * (width - s.length) for s in samples]
    lengths = [len(sample.response) for sample in samples]
    rows = [row for row, length in enumerate(lengths) for _ in range(length)]
    places = [place for length in lengths for place in range(length)]
    starts = torch.tensor([len(sample.prompt) - 1 for sample in samples], device=device)
    rows_, places_ = (torch.tensor(x, dtype=torch.long, device=device) for x in (rows, places))
    ends = torch.tensor([sample.length - 1 for sample in samples], device=device)
    return Batch(torch.tensor(ids, device=device), rows_, starts[rows_] + places_, places_, ends)


def shuffled(number: int, seed: int, *salt: int | str) -> list[int]:
    """A permutation of 0 … number − 1 that depends on its arguments alone, so that it can be drawn again on resume."""
    generator = torch.Generator().manual_seed(int(content_key([seed, *salt]), 16) >> 1)
    return [int(place) for place in torch.randperm(number, generator=generator)]


def micro_batches(
    places: Sequence[int], lengths: Sequence[int], most_rows: int, most_tokens: int | None
) -> list[list[int]]:
    """Cut a mini-batch into micro-batches of similar length, the longest first.

    A loss is a sum over tokens divided by a count that all micro-batches share, so any cut gives the same gradient.

    Args:
        places: numbers of the samples.
        lengths: tokens of every sample, by its number.
        most_rows: samples of a micro-batch at most.
        most_tokens: tokens of a micro-batch at most, padding among them; a longer sample stands alone.
    """
    found: list[list[int]] = []
    for place in sorted(places, key=lambda place: (-lengths[place], place)):
        widest = lengths[found[-1][0]] if found else 0
        is_full = not found or len(found[-1]) == most_rows
        if is_full or (most_tokens is not None and widest * (len(found[-1]) + 1) > most_tokens):
            found.append([])
        found[-1].append(place)
    return found


def share(batches: Sequence[list[int]], rank: int, processes: int) -> list[list[int]]:
    """The micro-batches of one process: as many as every other has, the last of them empty where they do not divide."""
    each = -(-len(batches) // processes)
    mine = list(batches[rank::processes])
    return mine + [[]] * (each - len(mine))
