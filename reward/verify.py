"""Verifiable rewards: answers that a program can check. One table, for training and evaluation alike."""

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from conf.entry import UserError
from conf.passthrough import did_you_mean


@dataclass(frozen=True)
class Verifier:
    """A way to check an answer.

    `function` is "module:function" in reward.verifiers: (answers, *, options) → a score for each answer, NaN where
    nothing can be said. It checks its options first, so that a call without answers is a check of them. `needs` names
    what an answer must come with, unless an option of that name is set: "references", a column of its prompt's row, or
    several of which one will do, separated by `|`.
    """

    function: str
    needs: str | None = None
    library: str | None = None  # package whose version decides the score


VERIFIERS = {
    "exact": Verifier("words:exact", "references"),
    "code": Verifier("code:code", "tests|test_list|test|inputs|input_output"),
    "regex": Verifier("words:regex"),
    "math": Verifier("maths:equivalent", "references", "math-verify"),
    "json_valid": Verifier("structured:json_valid"),
    "json_exact": Verifier("structured:json_exact", "references"),
    "json_schema": Verifier("structured:json_schema", "schema", "jsonschema"),
    "ifeval": Verifier("instructions:ifeval", "instruction_id_list", "if-verifiable"),
    "length": Verifier("shaping:length"),
    "format": Verifier("shaping:layout"),
    "ended": Verifier("shaping:ended"),
}


def load(name: str) -> Callable[..., list[float]]:
    """The function of a verifier."""
    module, function = VERIFIERS[name].function.split(":")
    found: Callable[..., list[float]] = getattr(
        importlib.import_module(f"reward.verifiers.{module}"), function
    )
    return found


def check_options(name: str, options: Mapping[str, Any], where: str) -> None:
    """Check the options of a verifier: their names by its signature, their values by itself.

    Raises:
        UserError: naming the option.
    """
    function = load(name)
    parameters = list(inspect.signature(function).parameters.values())[1:]  # after the answers
    check_names(
        options,
        {item.name: item.default is item.empty for item in parameters},
        f"{where}: verifier {name!r}",
    )
    try:
        function([], **options)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (TypeError, ValueError) as error:
        raise UserError(f"{where}: {name} cannot use these options: {error}") from error


def check_names(options: Mapping[str, Any], known: Mapping[str, bool], where: str) -> None:
    """Refuse options that are not `known`, and miss those of which `known` says True: they are required.

    Raises:
        UserError: with the nearest name and the list.
    """
    for name in options:
        if name not in known:
            there = f"There are: {', '.join(known)}" if known else "There are none"
            raise UserError(
                f"{where} has no option {name!r}.{did_you_mean(str(name), known)} {there}"
            )
    if missing := [name for name, is_needed in known.items() if is_needed and name not in options]:
        raise UserError(f"{where} needs {', '.join(missing)}")
