"""What a training step or an evaluation cannot avoid: tokens, and floating-point operations. Plain arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class Tokens:
    """Of some steps together."""

    rows: int  # of data: pairs, demonstrations or questions
    padded: int  # positions of the batches, padding among them
    real: int  # tokens of the sequences
    required: int  # tokens of their prefix tree: what begins alike is read once
    scored: int  # whose log-probability, or sequences whose score, is wanted
    depths: int  # sum over the tree's tokens of the tokens that each sees, itself among them

    def __add__(self, other: "Tokens") -> "Tokens":
        return Tokens(**{name: value + getattr(other, name) for name, value in vars(self).items()})

    def a_row(self) -> str:
        """The statistics beside a ratio."""
        shares = {
            name: getattr(self, name) / self.rows
            for name in ("padded", "real", "required", "scored")
        }
        return ", ".join(f"{share:.0f} {name}" for name, share in shares.items())


@dataclass(frozen=True)
class Shape:
    """What the floating-point operations of a model depend on."""

    body: int  # parameters but for embeddings and head
    head: int  # parameters of the matrix that makes a logit (or a score) of a state
    layers: int
    width: int  # heads × size of a head


def tree(sequences: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Tokens of the prefix tree of sequences, and the sum of their depths (the root's is 1).

    In lexicographic order a sequence adds what it does not share with the one before it.
    """
    size = depths = 0
    ordered = sorted(sequences)
    for last, this in pairwise([[], *ordered]):
        common = next(
            (i for i, (a, b) in enumerate(zip(last, this, strict=False)) if a != b),
            min(len(last), len(this)),
        )
        size += len(this) - common
        depths += sum(range(common + 1, len(this) + 1))
    return size, depths


def tokens(
    sequences: Sequence[Sequence[int]],
    rows: int,
    padded: int,
    scored: int,
    wants_last: bool = False,
) -> Tokens:
    """The tokens of one step, or of one evaluation.

    Args:
        sequences: token ids of all that it reads.
        rows, padded, scored: as in `Tokens`.
        wants_last: whether the state of a sequence's last token is wanted, as a reward model's is. Nobody asks what
            follows an answer, so otherwise that token need not be read.
    """
    read = sequences if wants_last else [sequence[:-1] for sequence in sequences]
    required, depths = tree(read)
    return Tokens(rows, padded, sum(map(len, sequences)), required, scored, depths)


def flops(count: Tokens, shape: Shape) -> int:
    """Floating-point operations that forward and backward pass need for required tokens.

    Two a parameter and token forward, twice that backward: 6 (Kaplan et al. 2020, arXiv 2001.08361, section 2.1).
    Attention multiplies queries with keys and weights with values, 2 × 2 × width a layer for each token that is seen,
    times 3 with the backward pass: 12 × layers × width × depth; as in PaLM (Chowdhery et al. 2022, arXiv 2204.02311,
    appendix B), but of the tokens that are seen, not of the whole square.
    """
    matrices = 6 * (shape.body * count.required + shape.head * count.scored)
    return matrices + 12 * shape.layers * shape.width * count.depths
