"""Log-probabilities of completions given their prompts: common starts once, the head only where a token is scored.

Training and evaluation use the same code. Whatever sequences have in common at their start (the prompt of a preference
pair, the context of a question's options, a few-shot preamble) is read once in a batch; see `evals.trees`.
"""

import itertools
import math
from collections.abc import Callable, Container, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor

from conf.entry import UserError
from evals import lmhead, trees
from evals.lmhead import Found, Wanted
from evals.treeattention import Form, inputs, reading, unwrapped, vocabulary
from evals.treereader import TreeReader, small_tree, without_dropout
from evals.trees import Row

T = TypeVar("T")
Prompts = Sequence[Sequence[int]]
Completions = Sequence[Sequence[Sequence[int]]]


class Scored(NamedTuple):
    """What a model says of one completion."""

    sum: float  # nats
    per_token: list[float]
    is_greedy: bool  # whether every token is the likeliest one


class Labelled(NamedTuple):
    """A sequence and tokens to score, each by the state of a token in the sequence."""

    read: np.ndarray  # (T,) token ids
    states: np.ndarray  # (M,) which of the T states
    scored: np.ndarray  # (M,) token ids


class Scorer:
    """Scores completions by a causal language model of transformers.

    Args:
        model: also within PEFT or DDP. Its device, number format and autocast context are used as they are.
        tokens: read at once, at most, unless one sequence is longer; None: no limit.
        forward: called instead of the model.

    Raises:
        UserError: for an encoder-decoder and a model without a language-modelling head.
    """

    def __init__(
        self,
        model: Any,
        tokens: int | None = 2048,
        forward: Callable[..., Any] | None = None,
    ) -> None:
        if tokens is not None and tokens < 1:
            raise UserError(f"tokens={tokens}: a batch needs at least one token")
        self._core = unwrapped(model)
        if self._core.config.is_encoder_decoder:
            raise UserError(
                f"{type(self._core).__name__} is an encoder-decoder: only causal models score completions"
            )
        if self._core.get_output_embeddings() is None:
            raise UserError(
                f"{type(self._core).__name__} has no language-modelling head to score tokens with"
            )
        self._model = model
        self._forward = forward or model
        self._tokens = tokens
        self._reader = TreeReader(self._core, lambda *given: self._seen(*given)[0])
        self._shaping: lmhead.Shaping | None = None
        self._is_plain_head: bool | None = None  # not known yet

    def score(self, prompts: Prompts, completions: Completions) -> list[list[Scored]]:
        """Score each prompt's completions, without gradients and dropout.

        Args:
            prompts: token ids of each, at least one.
            completions: of each prompt, the token ids of its completions, at least one token in each.

        Raises:
            UserError: for an empty prompt or completion, an unknown token, and a sequence longer than the model reads.
        """
        found: dict[int, Scored] = {}
        for batch in self.batches(prompts, completions):
            found |= batch
        return _by_prompt(found, completions)

    def log_probs(self, prompts: Prompts, completions: Completions) -> list[list[Tensor]]:
        """Log-probability of each token, with gradients: a tensor (tokens,) in float32 for each completion.

        What autograd keeps of every batch is held until the backward pass: give it a micro-batch.

        Args:
            prompts, completions: as in `score`.

        Raises:
            UserError: as `score`.
        """
        found = self.labelled(self._checked(prompts, completions))
        return _by_prompt({number: each.logp for number, each in enumerate(found)}, completions)

    def labelled(self, sequences: Sequence[Labelled], with_statistics: bool = False) -> list[Found]:
        """What the model says of the tokens of each sequence, with gradients of `logp`.

        Args:
            sequences: at least one token to score in each.
            with_statistics: also of the distributions that the tokens were scored by.
        """
        found: dict[int, Found] = {}
        for batch in self._found(sequences, with_statistics=with_statistics):
            found |= batch
        return [found[number] for number in range(len(sequences))]

    def shares(self, longest: int) -> bool:
        """Whether sequences of at most so many tokens are read as trees; says once why they are not."""
        return self._reader.form(longest) is not Form.plain

    def batches(
        self, prompts: Prompts, completions: Completions, known: Container[int] = ()
    ) -> Iterator[dict[int, Scored]]:
        """As `score`, batch by batch: what is found by the number of the completion, counted through all prompts.

        Args:
            prompts, completions: as in `score`.
            known: numbers of completions of which nothing is asked. The others are in the batches in which they would
                be without it.
        """
        found = self._found(self._checked(prompts, completions), known)
        while True:
            # Not around the loop: between two batches the caller's modes are in force.
            with torch.no_grad(), without_dropout(self._model):
                batch = next(found, None)
            if batch is None:
                return
            yield {number: _scored(each) for number, each in batch.items()}

    def _found(
        self,
        sequences: Sequence[Labelled],
        known: Container[int] = (),
        with_statistics: bool = False,
    ) -> Iterator[dict[int, Found]]:
        if not sequences:
            return
        form = self._reader.form(max(len(each.read) for each in sequences))
        for rows in self._reader.batches([each.read for each in sequences], form, self._tokens):
            members, wanted, order = _wanted(rows, sequences, self._core.device)
            if all(member in known for member in members):
                continue
            scored = self._scored(rows, form, wanted._replace(with_statistics=with_statistics))
            back = torch.from_numpy(order).to(scored.logp.device)
            sizes = [len(sequences[member].scored) for member in members]
            parts = zip(*(torch.split(part[back], sizes) for part in scored), strict=True)
            yield {
                member: Found(*part)
                for member, part in zip(members, parts, strict=True)
                if member not in known
            }

    def _checked(self, prompts: Prompts, completions: Completions) -> list[Labelled]:
        if len(prompts) != len(completions):
            raise UserError(f"{len(prompts)} prompts with completions for {len(completions)}")
        size = vocabulary(self._core)
        limit = getattr(self._core.config.get_text_config(), "max_position_embeddings", None)
        sequences = []
        for number, (prompt, options) in enumerate(zip(prompts, completions, strict=True)):
            for option in options:
                if not len(prompt) or not len(option):
                    what = "completion" if len(prompt) else "prompt"
                    raise UserError(
                        f"prompt {number}: its {what} has no token; a prompt can be the start token alone"
                    )
                whole = np.concatenate([np.asarray(prompt, np.int64), np.asarray(option, np.int64)])
                if whole.min() < 0 or whole.max() >= size:
                    raise UserError(f"prompt {number}: a token id is not one of the model's {size}")
                if limit is not None and len(whole) - 1 > limit:
                    raise UserError(
                        f"prompt {number}: {len(whole) - 1} tokens, and the model reads {limit}; cut the prompt"
                    )
                # The last token is not read, because nobody asks for its state.
                states = np.arange(len(prompt) - 1, len(whole) - 1)
                sequences.append(Labelled(whole[:-1], states, whole[len(prompt) :]))
        return sequences

    def _scored(self, rows: Sequence[Row], form: Form, wanted: Wanted) -> Found:
        if self._is_plain_head is None:
            self._check_head()
        head = self._core.get_output_embeddings()
        if not self._is_plain_head or self._shaping is None:
            return lmhead.by_logits(self._with_logits(rows, form, wanted.states)[1], wanted)
        states = self._reader.states(rows, form, wanted.states)
        return lmhead.by_head(head, self._shaping, states, wanted)

    def _check_head(self) -> None:
        """Find out whether the model's own logits are what its head and its configuration say."""
        head = self._core.get_output_embeddings()
        self._is_plain_head = lmhead.is_plain(head)
        if not self._is_plain_head:
            return
        self._shaping = lmhead.shaping_of(self._core.config.get_text_config())
        (row, *_) = trees.alone(small_tree(self._core))
        few = torch.arange(min(8, len(row.ids)), device=self._core.device)
        with torch.no_grad(), without_dropout(self._model), lmhead.enlarged(head):
            states, logits = self._with_logits([row], Form.plain, few)
            self._is_plain_head = lmhead.agrees(head, self._shaping, states, logits)

    def _with_logits(
        self, rows: Sequence[Row], form: Form, places: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The states at places and the model's logits of them."""
        with reading(self._core, form):
            return self._seen(inputs(rows, form, self._core), places, passed=None)

    def _seen(
        self, arguments: dict[str, Any], places: Tensor | None, passed: int | None = 1
    ) -> tuple[Tensor, Tensor]:
        """The states at places (None: all) that the head would see, and its logits of the first `passed`."""
        tokens = arguments["input_ids"].numel()
        if places is None:
            places = torch.arange(tokens, device=self._core.device)
        seen: list[Tensor] = []
        with lmhead.only_at(self._core.get_output_embeddings(), places, seen, passed, tokens):
            logits = self._forward(**arguments).logits
        return seen[0], logits


def _wanted(
    rows: Sequence[Row], sequences: Sequence[Labelled], device: torch.device
) -> tuple[list[int], Wanted, np.ndarray]:
    """What to ask of a batch: the sequences in it, their tokens by state, and where each of them is in that order."""
    width = max(len(row.ids) for row in rows)
    members, places, tokens = [], [], []
    for number, row in enumerate(rows):
        for member, place in zip(row.members, row.places, strict=True):
            members.append(member)
            places.append(number * width + place[sequences[member].states])
            tokens.append(sequences[member].scored)
    states, pairs = np.unique(np.concatenate(places), return_inverse=True)
    order = np.argsort(pairs, kind="stable")
    wanted = Wanted(
        torch.from_numpy(states).to(device),
        pairs[order],
        torch.from_numpy(np.concatenate(tokens)[order]).to(device),
    )
    return members, wanted, np.argsort(order)


def _scored(found: Found) -> Scored:
    per_token = found.logp.tolist()
    return Scored(math.fsum(per_token), per_token, bool(found.is_best.all()))


def _by_prompt(found: dict[int, T], completions: Completions) -> list[list[T]]:
    numbers = itertools.count()
    return [[found[next(numbers)] for _ in options] for options in completions]
