"""A reward out of its configuration: the weighted sum of verifiers, reward models and functions."""

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.entry import UserError
from conf.passthrough import did_you_mean
from conf.schema import Dtype, Reward, Scorer, Term
from reward import functions, sandbox, verify
from reward.answers import Answer, Scoring
from reward.functions import Function
from reward.prompts import Asked
from reward.records import Prompt
from reward.turns import make_turn
from reward.verifiers import aside
from reward.verify import VERIFIERS

MODEL, FUNCTION = "model", "function"  # kinds of terms beside the verifiers

# Options of a term → whether it is required.
_OF_SEVERAL = {"combine": False, "k": False, "scales": False}  # see reward.ensemble
_MODEL_OPTIONS = {
    item.name: item.name == "path" for item in dataclasses.fields(Scorer)
} | _OF_SEVERAL
_FUNCTION_OPTIONS = {"function": True, "timeout": False}


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
        """Score answers; an answer of which one term says nothing has no total.

        A term of weight 0 is only recorded. Asynchronous functions run together, and while the other terms do.
        """
        if not answers:
            return Worth([], {name: [] for name in self._terms})
        waiting = {
            name: scoring.begin(answers)
            for name, (_, scoring) in self._terms.items()
            if isinstance(scoring, Function)
        }
        now = {
            name: scoring(answers)
            for name, (_, scoring) in self._terms.items()
            if name not in waiting
        }
        scored = {name: waiting[name]() if name in waiting else now[name] for name in self._terms}
        weighted = [(weight, scored[name]) for name, (weight, _) in self._terms.items() if weight]
        total = [
            math.fsum(weight * scores[place] for weight, scores in weighted)
            for place in range(len(answers))
        ]
        return Worth(total, scored)

    @property
    def stopped(self) -> dict[str, int]:
        """Questions and programs of verifiers that this process gave up so far: too long, or too much memory."""
        return dict(aside.stopped + sandbox.stopped)


def check_reward(reward: Reward, where: str) -> None:
    """Check what can be checked without loading a model or importing a function.

    Args:
        reward: what was asked for.
        where: its place in the configuration, for messages.

    Raises:
        UserError: naming the key.
    """
    if not reward.terms:
        raise UserError(f"{where}.terms is empty: a reward needs at least one term")
    if not any(term.weight for term in reward.terms.values()):
        raise UserError(
            f"{where}: every weight is 0, so that every answer would be worth 0; give at least one term a weight"
        )
    for name, term in reward.terms.items():
        place = f"{where}.terms.{name}"
        if not math.isfinite(term.weight):
            raise UserError(f"{place}.weight={term.weight} must be a finite number")
        if term.kind == MODEL:
            _check_model(term.args, f"{place}.args")
        elif term.kind == FUNCTION:
            _check_function(term.args, f"{place}.args")
        else:
            _check_kind(term.kind, f"{place}.kind")
            verify.check_options(term.kind, term.args, f"{place}.args")


def model_paths(reward: Reward, where: str) -> dict[str, Any]:
    """The reward models of a reward, one or a list each, by their place in the configuration."""
    return {
        f"{where}.terms.{name}.args.path": term.args["path"]
        for name, term in reward.terms.items()
        if term.kind == MODEL
    }


def check_models(paths: Mapping[str, Any]) -> None:
    """Check that reward models can be loaded; a server is asked when it is used.

    Args:
        paths: one or a list each, by the place in the configuration that named them.

    Raises:
        UserError: naming the place.
    """
    from reward import classifier, ensemble

    for where, named in paths.items():
        for path in named if isinstance(named, list) else [named]:
            if ensemble.is_remote(path):
                continue
            try:
                classifier.check(path, Scorer.dtype.value)
            except UserError as error:
                raise UserError(f"{where}: {error}") from error


def check_needs(reward: Reward, prompts: Iterable[Prompt | Asked], where: str) -> None:
    """Refuse prompts of which none has what a verifier needs: it could say nothing of any answer.

    Raises:
        UserError: naming the verifier and the column.
    """
    needed = {
        need: term.kind
        for term in reward.terms.values()
        if term.kind in VERIFIERS
        and (need := VERIFIERS[term.kind].needs) is not None
        and need not in term.args
    }
    for prompt in prompts:
        if not needed:
            return
        for need in [*needed]:
            if any(_has(prompt, one) for one in need.split("|")):
                del needed[need]
    for need, kind in needed.items():
        column = "`reference`" if need == "references" else f"`{need}`".replace("|", "` or `")
        raise UserError(
            f"{where}: verifier {kind!r} can say nothing, because no prompt has {need.replace('|', ' or ')}; give the "
            f"rows a column {column}"
        )


def _has(prompt: Prompt | Asked, need: str) -> bool:
    return bool(prompt.references) if need == "references" else need in prompt.facts


@contextlib.contextmanager
def open_reward(reward: Reward) -> Iterator[RewardFunction]:
    """Load what the terms need; what they hold is freed at the end.

    Raises:
        UserError: when a model or function cannot be had.
    """
    with contextlib.ExitStack() as stack:
        terms = {
            name: (term.weight, _scoring(name, term, stack)) for name, term in reward.terms.items()
        }
        stack.callback(terms.clear)  # the models, even where somebody still holds the function
        opened = [scoring for _, scoring in terms.values() if isinstance(scoring, Function)]
        stack.enter_context(functions.awaiting(opened))
        yield RewardFunction(terms)


def _scoring(name: str, term: Term, stack: contextlib.ExitStack) -> Scoring:
    if term.kind == MODEL:
        return _model(stack, **term.args)
    if term.kind == FUNCTION:
        seconds = term.args.get("timeout")
        return functions.load(term.args["function"], seconds, f"terms.{name}.args.function")
    return functools.partial(verify.load(term.kind), **term.args)


def _model(stack: contextlib.ExitStack, path: str | list[str], **options: Any) -> Scoring:
    from reward.ensemble import close, open_model, open_models

    model = open_model(path, **options) if isinstance(path, str) else open_models(path, **options)
    stack.callback(close, model)

    def score(answers: Sequence[Answer]) -> list[float]:
        return model.score(
            [answer.prompt for answer in answers],
            [[make_turn("assistant", answer.text)] for answer in answers],
            [answer.tools for answer in answers],
        )

    return score


def _check_kind(kind: str, where: str) -> None:
    kinds = [*VERIFIERS, MODEL, FUNCTION]
    if kind not in kinds:
        raise UserError(
            f"{where}: there is no kind {kind!r}.{did_you_mean(kind, kinds)} There are: {', '.join(kinds)}"
        )


def _check_model(options: Mapping[str, Any], where: str) -> None:
    verify.check_names(options, _MODEL_OPTIONS, where)
    path = options["path"]
    paths = path if isinstance(path, list) else [path]
    if not paths or not all(isinstance(item, str) and item for item in paths):
        raise UserError(
            f"{where}.path={path!r} must be a folder, hub id or address, or a list of several"
        )
    of_several = sorted(_OF_SEVERAL.keys() & options.keys())
    if of_several and not isinstance(path, list):
        raise UserError(f"{where}.{of_several[0]} is of several models: give `path` a list")
    try:
        _check_together(paths, options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    names = [item.value for item in Dtype]
    if (dtype := options.get("dtype", Scorer.dtype.value)) not in names:
        raise UserError(f"{where}.dtype={dtype!r} must be one of {', '.join(names)}")
    for name in ("max_length", "batch_tokens"):
        value = options.get(name)
        if value is not None and (
            isinstance(value, bool) or not isinstance(value, int) or value < 1
        ):
            raise UserError(f"{where}.{name}={value!r} must be a whole number, 1 or more")


def _check_together(paths: list[str], options: Mapping[str, Any]) -> None:
    """Check what the options mean for these models, as `python -m reward.score` does."""
    from reward import ensemble

    ensemble.check(options.get("combine", "mean"), options.get("k", ensemble.K), len(paths))
    own = {name: value for name, value in options.items() if name not in ("path", *_OF_SEVERAL)}
    ensemble.check_options(paths, {name: own[name] for name in own if own[name] is not None})
    if (scales := options.get("scales")) is not None:
        if not isinstance(scales, str):
            raise UserError(f"scales={scales!r} must be a file")
        ensemble.read_scales(Path(os.path.expanduser(scales)))


def _check_function(options: Mapping[str, Any], where: str) -> None:
    verify.check_names(options, _FUNCTION_OPTIONS, where)
    functions.check(options["function"], f"{where}.function")
    seconds = options.get("timeout", functions.SECONDS)
    if (
        isinstance(seconds, bool)
        or not isinstance(seconds, int | float)
        or not 0 < seconds < math.inf
    ):
        raise UserError(f"{where}.timeout={seconds!r} must be a number of seconds")
