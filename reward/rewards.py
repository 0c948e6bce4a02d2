"""A reward out of its configuration: the weighted sum of verifiers, reward models and functions."""

import contextlib
import functools
import importlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from conf.entry import UserError
from conf.schema import Reward, Term
from reward.answers import Answer, Scoring
from reward.turns import make_turn
from reward.verify import VERIFIERS, check


@dataclass(frozen=True)
class Worth:
    """What answers are worth: (n,) each; NaN where a term can say nothing."""

    total: list[float]
    terms: dict[str, list[float]]  # by the term's name, before its weight


class RewardFunction:
    """Terms that are open, and their sum. Use `open_reward`."""

    def __init__(self, terms: dict[str, tuple[float, Scoring]]) -> None:
        self._terms = terms

    def __call__(self, answers: Sequence[Answer]) -> Worth:
        """Score answers; an answer of which one term says nothing has no total."""
        scored = {name: scoring(answers) for name, (_, scoring) in self._terms.items()}
        total = [
            math.fsum(weight * scored[name][place] for name, (weight, _) in self._terms.items())
            for place in range(len(answers))
        ]
        return Worth(total, scored)


def check_reward(reward: Reward, where: str) -> None:
    """Check what can be checked without loading anything.

    Args:
        reward: what was asked for.
        where: its place in the configuration, for messages.

    Raises:
        UserError: naming the key.
    """
    if not reward.terms:
        raise UserError(f"{where}.terms is empty: a reward needs at least one term")
    for name, term in reward.terms.items():
        if term.kind != "model":
            check([term.kind], f"{where}.terms.{name}.kind")


@contextlib.contextmanager
def open_reward(reward: Reward) -> Iterator[RewardFunction]:
    """Load what the terms need; what they hold is freed at the end."""
    yield RewardFunction(
        {name: (term.weight, _scoring(term)) for name, term in reward.terms.items()}
    )


def _scoring(term: Term) -> Scoring:
    if term.kind == "model":
        return _model(**term.args)
    module, name = VERIFIERS[term.kind].function.split(":")
    function = getattr(importlib.import_module(f"reward.verifiers.{module}"), name)
    return functools.partial(function, **term.args)


def _model(path: str, **options: object) -> Scoring:
    from reward.model import RewardModel

    model = RewardModel.load(path, **options)  # type: ignore[arg-type]  # names are checked above

    def score(answers: Sequence[Answer]) -> list[float]:
        return model.score(
            [answer.prompt for answer in answers],
            [[make_turn("assistant", answer.text)] for answer in answers],
            [answer.tools for answer in answers],
        )

    return score
