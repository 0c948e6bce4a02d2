"""Log-probabilities of completions given their prompts: common starts once, the head only where a token is scored.

Training and evaluation use the same code. Whatever sequences have in common at their start (the prompt of a preference
pair, the context of a question's options, a few-shot preamble) is read once in a batch; see `evals.trees`.
"""

import contextlib
import itertools
import math
import sys
from collections.abc import Container, Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from conf.entry import UserError
from evals import lmhead, trees
from evals.lmhead import Found, Wanted
from evals.treeattention import Form, form_of, inputs, obstacle, reading, unwrapped
from evals.trees import Row

# A start this short is cheaper to read again than to share: without it, trees are causal and independent.
_LEAST_SHARED = 8
# Tokens of a row with a dense mask, unless a sequence is longer: its attention grows with the square.
_DENSE_ROW = 512

T = TypeVar("T")
Prompts = Sequence[Sequence[int]]
Completions = Sequence[Sequence[Sequence[int]]]


class Scored(NamedTuple):
    """What a model says of one completion."""

    sum: float  # nats
    per_token: list[float]
    is_greedy: bool  # whether every token is the likeliest one


class _Sequence(NamedTuple):
    read: np.ndarray  # prompt and completion without its last token, whose state nobody asks
    scored: np.ndarray  # the completion


class Scorer:
    """Scores completions by a causal language model of transformers.

    Args:
        model: also within PEFT or DDP. Its device, number format and autocast context are used as they are.
        tokens: read at once, at most, unless one sequence is longer.

    Raises:
        UserError: for an encoder-decoder and a model without a language-modelling head.
    """

    def __init__(self, model: Any, tokens: int = 2048) -> None:
        if tokens < 1:
            raise UserError(f"tokens={tokens}: a batch needs at least one token")
        core = unwrapped(model)
        if core.config.is_encoder_decoder:
            raise UserError(
                f"{type(core).__name__} is an encoder-decoder: only causal models score completions"
            )
        if core.get_output_embeddings() is None:
            raise UserError(
                f"{type(core).__name__} has no language-modelling head to score tokens with"
            )
        self._model = model
        self._tokens = tokens
        self._forms: dict[Form, str | None] = {}  # tried forms, and what was wrong with them
        self._shaping: lmhead.Shaping | None = None
        self._is_plain_head: bool | None = None  # not known yet
        self._said: set[str] = set()

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
        found: dict[int, Tensor] = {}
        for batch in self._found(prompts, completions):
            found |= {number: each.logp for number, each in batch.items()}
        return _by_prompt(found, completions)

    def batches(
        self, prompts: Prompts, completions: Completions, known: Container[int] = ()
    ) -> Iterator[dict[int, Scored]]:
        """As `score`, batch by batch: what is found by the number of the completion, counted through all prompts.

        Args:
            prompts, completions: as in `score`.
            known: numbers of completions of which nothing is asked. The others are in the batches in which they would
                be without it.
        """
        found = self._found(prompts, completions, known)
        while True:
            # Not around the loop: between two batches the caller's modes are in force.
            with torch.no_grad(), _without_dropout(self._model):
                batch = next(found, None)
            if batch is None:
                return
            yield {number: _scored(*each) for number, each in batch.items()}

    def _found(
        self, prompts: Prompts, completions: Completions, known: Container[int] = ()
    ) -> Iterator[dict[int, Found]]:
        sequences = self._checked(prompts, completions)
        if not sequences:
            return
        form = self._form(max(len(each.read) for each in sequences))
        for rows in self._batches([each.read for each in sequences], form):
            members, wanted, order = _wanted(rows, sequences, unwrapped(self._model).device)
            if all(member in known for member in members):
                continue
            scored = self._scored(rows, form, wanted)
            back = torch.from_numpy(order).to(scored.logp.device)
            sizes = [len(sequences[member].scored) for member in members]
            parts = zip(*(torch.split(part[back], sizes) for part in scored), strict=True)
            yield {
                member: Found(*part)
                for member, part in zip(members, parts, strict=True)
                if member not in known
            }

    def _checked(self, prompts: Prompts, completions: Completions) -> list[_Sequence]:
        if len(prompts) != len(completions):
            raise UserError(f"{len(prompts)} prompts with completions for {len(completions)}")
        core = unwrapped(self._model)
        size = core.get_input_embeddings().num_embeddings
        limit = getattr(core.config.get_text_config(), "max_position_embeddings", None)
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
                sequences.append(_Sequence(whole[:-1], whole[len(prompt) :]))
        return sequences

    def _form(self, longest: int) -> Form:
        """The fastest form that gives what separate sequences give."""
        reason = obstacle(self._model, longest)
        if reason is None:
            form = form_of(self._model)
            for each in dict.fromkeys([form, Form.dense]):
                if each not in self._forms:
                    self._forms[each] = self._trouble(each)
                if self._forms[each] is None:
                    return each
            reason = self._forms[Form.dense]
        if reason not in self._said:
            self._said.add(str(reason))
            name = type(unwrapped(self._model)).__name__
            print(
                f"{name}: common prompts are read once for each completion, because {reason}",
                file=sys.stderr,
            )
        return Form.plain

    def _trouble(self, form: Form) -> str | None:
        """What goes wrong when a small tree is read in a form, found by reading its sequences alone too."""
        sequences = _small_tree(unwrapped(self._model))
        with torch.no_grad(), _without_dropout(self._model):
            rows = list(trees.pack(sequences, capacity=1 << 20))
            try:
                packed = self._states(rows, form)[0]
            except (
                Exception
            ) as error:  # whatever a model's own code makes of arguments that it does not expect
                said = str(error).splitlines() or [type(error).__name__]
                return f"it does not take a tree ({said[0]})"
            separate = [self._states([row], Form.plain)[0] for row in trees.alone(sequences)]
        numbers = [row.members[0] for row in trees.alone(sequences)]
        by_member = dict(zip(rows[0].members, rows[0].places, strict=True))
        ours = torch.cat([packed[torch.from_numpy(by_member[n])] for n in numbers]).float()
        theirs = torch.cat(separate).float()
        within = 1e-4 if packed.dtype == torch.float32 else 5e-2
        if ((ours - theirs).norm(dim=-1) <= within * theirs.norm(dim=-1)).all():
            return None
        return "its states in a tree are not those of separate sequences"

    def _batches(self, sequences: Sequence[np.ndarray], form: Form) -> Iterator[list[Row]]:
        if form is Form.blocks:
            for row in trees.pack(sequences, self._tokens, _LEAST_SHARED):
                yield [row]
            return
        if form is Form.dense:
            longest = max(map(len, sequences))
            capacity = max(longest, min(self._tokens, _DENSE_ROW))
            rows = trees.pack(sequences, capacity)
            yield from _together(rows, max(1, self._tokens // capacity))
            return
        for size, same in itertools.groupby(trees.alone(sequences), key=lambda row: len(row.ids)):
            yield from _together(same, max(1, self._tokens // size))

    def _scored(self, rows: Sequence[Row], form: Form, wanted: Wanted) -> Found:
        head = unwrapped(self._model).get_output_embeddings()
        if self._is_plain_head is None:
            self._check_head(rows, form, wanted)
        if not self._is_plain_head or self._shaping is None:
            return lmhead.by_logits(self._states(rows, form, wanted.states, passed=None)[1], wanted)
        states, _ = self._states(rows, form, wanted.states)
        return lmhead.by_head(head, self._shaping, states, wanted)

    def _check_head(self, rows: Sequence[Row], form: Form, wanted: Wanted) -> None:
        """Find out whether the model's own logits are what its head and its configuration say."""
        core = unwrapped(self._model)
        head = core.get_output_embeddings()
        self._is_plain_head = lmhead.is_plain(head)
        if not self._is_plain_head:
            return
        self._shaping = lmhead.shaping_of(core.config.get_text_config())
        with torch.no_grad():
            few = wanted.states[:8]
            states, logits = self._states(rows, form, few, passed=None)
            self._is_plain_head = lmhead.agrees(head, self._shaping, states, logits)

    def _states(
        self, rows: Sequence[Row], form: Form, places: Tensor | None = None, passed: int | None = 1
    ) -> tuple[Tensor, Tensor]:
        """The states at places (all: none given) that the head would see, and its logits of the first `passed`."""
        seen: list[Tensor] = []
        head = unwrapped(self._model).get_output_embeddings()
        if places is None:
            places = torch.arange(
                sum(len(row.ids) for row in rows), device=unwrapped(self._model).device
            )
        with lmhead.only_at(head, places, seen, passed), reading(self._model, form):
            logits = self._model(**inputs(rows, form, self._model)).logits
        return seen[0], logits


def _small_tree(model: Any) -> list[np.ndarray]:
    """Three sequences with a common start, two of them with a longer one."""
    size = model.get_input_embeddings().num_embeddings
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 100
    stem = np.arange(1, min(100, limit - 3)) * 7 % size
    ends = [np.array(ids) % size for ids in ([3, 5, 8], [4, 6], [9, 2, 1, 11])]
    return [np.concatenate([stem[: len(stem) - 4 * (n == 2)], end]) for n, end in enumerate(ends)]


def _wanted(
    rows: Sequence[Row], sequences: Sequence[_Sequence], device: torch.device
) -> tuple[list[int], Wanted, np.ndarray]:
    """What to ask of a batch: the sequences in it, their tokens by state, and where each of them is in that order."""
    width = max(len(row.ids) for row in rows)
    members, places, tokens = [], [], []
    for number, row in enumerate(rows):
        for member, place in zip(row.members, row.places, strict=True):
            scored = sequences[member].scored
            members.append(member)
            places.append(number * width + place[len(place) - len(scored) :])
            tokens.append(scored)
    states, pairs = np.unique(np.concatenate(places), return_inverse=True)
    order = np.argsort(pairs, kind="stable")
    wanted = Wanted(
        torch.from_numpy(states).to(device),
        pairs[order],
        torch.from_numpy(np.concatenate(tokens)[order]).to(device),
    )
    return members, wanted, np.argsort(order)


def _together(rows: Iterator[Row], count: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch


def _scored(logp: Tensor, is_best: Tensor) -> Scored:
    per_token = logp.tolist()
    return Scored(math.fsum(per_token), per_token, bool(is_best.all()))


def _by_prompt(found: dict[int, T], completions: Completions) -> list[list[T]]:
    numbers = itertools.count()
    return [[found[next(numbers)] for _ in options] for options in completions]


@contextlib.contextmanager
def _without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, for a while; afterwards every module is as it was."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True
