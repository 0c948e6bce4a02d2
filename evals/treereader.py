"""Reads sequences through a model as rows of trees, in the fastest form that gives what separate sequences give."""

import contextlib
import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from evals import trees
from evals.treeattention import Form, forms_of, inputs, obstacle, reading, vocabulary
from evals.trees import Row

# A start this short is cheaper to read again than to share: without it, trees are causal and independent.
_LEAST_SHARED = 8
# Tokens of a row with a dense mask, unless a sequence is longer: its attention grows with the square.
_DENSE_ROW = 512

# Takes a model's arguments and places among the B·S tokens (None: all); gives their last states (N, H).
States = Callable[[dict[str, Any], Tensor | None], Tensor]


class TreeReader:
    """Reads sequences through a causal model of transformers.

    Args:
        model: of transformers, not wrapped. Its device, number format and autocast context are used as they are.
        states: runs it.
    """

    def __init__(self, model: Any, states: States) -> None:
        self._model = model
        self._states = states
        # Forms that were tried, with gradients or without, and what was wrong with them.
        self._forms: dict[tuple[Form, bool], str | None] = {}
        self._said: set[str] = set()

    def form(self, longest: int) -> Form:
        """The form for sequences of this many tokens at most; why it is the plain one is said once."""
        reason = obstacle(self._model, longest)
        if reason is None:
            for form in forms_of(self._model):
                # A kernel that is compiled for this machine has to show that its gradients are right, too.
                tried = form, form is Form.flex and torch.is_grad_enabled()
                if tried not in self._forms:
                    self._forms[tried] = self._trouble(*tried)
                if self._forms[tried] is None:
                    return form
                reason = self._forms[tried]
        if reason not in self._said:
            self._said.add(str(reason))
            name = type(self._model).__name__
            print(
                f"{name}: common prompts are read once for each completion, because {reason}",
                file=sys.stderr,
            )
        return Form.plain

    def batches(
        self, sequences: Sequence[np.ndarray], form: Form, tokens: int | None
    ) -> Iterator[list[Row]]:
        """Rows that are read together.

        Args:
            sequences: token ids of each, at least one.
            form: of the rows.
            tokens: in a batch at most, unless a sequence is longer; None: no limit.
        """
        limit = sum(map(len, sequences)) * len(sequences) if tokens is None else tokens
        if form in (Form.flex, Form.blocks):
            for row in trees.pack(sequences, limit, _LEAST_SHARED):
                yield [row]
            return
        if form is Form.dense:
            longest = max(map(len, sequences))
            capacity = max(longest, min(limit, _DENSE_ROW))
            yield from _together(trees.pack(sequences, capacity), max(1, limit // capacity))
            return
        for size, same in itertools.groupby(trees.alone(sequences), key=lambda row: len(row.ids)):
            yield from _together(same, max(1, limit // size))

    def states(self, rows: Sequence[Row], form: Form, places: Tensor | None = None) -> Tensor:
        """Last states (N, H) at places among the B·S tokens of rows; all of them where none are given."""
        with reading(self._model, form):
            return self._states(inputs(rows, form, self._model), places)

    def _trouble(self, form: Form, with_gradient: bool) -> str | None:
        """What goes wrong when a small tree is read in a form, found by reading its sequences alone too."""
        sequences = small_tree(self._model)
        rows, apart = list(trees.pack(sequences, 1 << 20)), list(trees.alone(sequences))
        places = dict(zip(rows[0].members, rows[0].places, strict=True))
        order = np.concatenate([places[row.members[0]] for row in apart])
        device = self._model.device
        with torch.set_grad_enabled(with_gradient), without_dropout(self._model):
            try:
                ours = self.states(rows, form, torch.from_numpy(order).to(device))
                theirs = torch.cat([self.states([row], Form.plain) for row in apart])
                is_rounded = ours.dtype != torch.float32 or torch.is_autocast_enabled(device.type)
                if is_rounded:
                    settled = torch.from_numpy(_settled(apart)).to(device)
                    ours, theirs = ours[settled], theirs[settled]
                pairs = [(ours, theirs)]
                if with_gradient:
                    pairs.append((self._gradient(ours), self._gradient(theirs)))
            except (
                Exception
            ) as error:  # whatever a model's own code makes of arguments that it does not expect
                said = str(error).splitlines() or [type(error).__name__]
                return f"it does not take a tree ({said[0]})"
        within = 5e-2 if is_rounded else 1e-4
        for one, other in ((one.float(), other.float()) for one, other in pairs):
            if not ((one - other).norm(dim=-1) <= within * other.norm(dim=-1)).all():
                return "its states in a tree are not those of separate sequences"
        return None

    def _gradient(self, states: Tensor) -> Tensor:
        """Of a sum of states, by the first parameter that is trained; shape (1, parameters)."""
        first = next(each for each in self._model.parameters() if each.requires_grad)
        weights = torch.linspace(-1, 1, states.numel(), device=states.device).view_as(states)
        found: Tensor = torch.autograd.grad((states.float() * weights).sum(), first)[0]
        return found.detach().flatten()[None]


def _settled(rows: Sequence[Row]) -> np.ndarray:
    """Whether to compare the state of each token in 16 bits; shape (T,).

    A sequence's first tokens take most of everyone's attention, and rounding moves their states by 8 % where it moves
    others by 2 % (SmolLM2-135M in bfloat16). They stand before every branch, so they show no wrong tree.
    """
    first = min(_LEAST_SHARED, *(len(row.ids) - 1 for row in rows))
    return np.concatenate([row.positions for row in rows]) >= first


def small_tree(model: Any) -> list[np.ndarray]:
    """Three sequences with a common start, two of them with a longer one."""
    size = vocabulary(model)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 100
    stem = np.arange(1, min(100, limit - 3)) * 7 % size
    ends = [np.array(ids) % size for ids in ([3, 5, 8], [4, 6], [9, 2, 1, 11])]
    return [np.concatenate([stem[: len(stem) - 4 * (n == 2)], end]) for n, end in enumerate(ends)]


def _together(rows: Iterator[Row], count: int) -> Iterator[list[Row]]:
    batch: list[Row] = []
    for row in rows:
        batch.append(row)
        if len(batch) == count:
            yield batch
            batch = []
    if batch:
        yield batch


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, for a while; afterwards every module is as it was."""
    trained = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in trained:
            module.training = True
