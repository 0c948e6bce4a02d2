"""Answers that must be JSON."""

import functools
import json
import math
from collections.abc import Sequence
from typing import Any

from conf.entry import UserError
from reward.answers import Answer
from reward.verifiers.aside import Aside, Unanswered

_ASIDE = Aside("structured")  # a pattern in a schema can backtrack for ever
_UNKNOWN_REF = "Unresolvable"  # in the name of the library's error
# Errors that an answer can cause, by its depth and by its numbers. Others are the schema's, such as a bad pattern.
_BY_ANSWER = ("RecursionError", "OverflowError")


def json_valid(answers: Sequence[Answer]) -> list[float]:
    """1 where the whole answer is JSON (RFC 8259: no NaN, no text around it)."""
    return [float(_parsed(answer.text) is not None) for answer in answers]


def json_exact(answers: Sequence[Answer]) -> list[float]:
    """1 where the answer is the JSON value of a reference; NaN where no reference is JSON.

    The order of keys, spaces, and how a number is written do not count.
    """
    found = []
    for answer in answers:
        expected = [value for text in answer.references if (value := _parsed(text)) is not None]
        found.append(float(_parsed(answer.text) in expected) if expected else math.nan)
    return found


def json_schema(answers: Sequence[Answer], *, schema: dict[str, Any] | None = None) -> list[float]:
    """1 where the whole answer is JSON that fits a JSON Schema, by the library jsonschema.

    NaN where there is no schema that can be used; 0 where it is the answer that cannot be checked, because it is nested
    too deeply or makes a pattern search for too long. A schema is read as Draft 2020-12 unless its `$schema` says
    otherwise; `format` is an annotation, as there; a `$ref` out of the schema is never fetched.

    Args:
        schema: for all answers; None: the column `schema` of each prompt's row, an object or its JSON text.

    Raises:
        UserError: when `schema` is not a JSON Schema, or jsonschema cannot be run.
    """
    if schema is not None:
        _check_schema(schema)
    return [_fits(answer, schema) for answer in answers]


def _check_schema(schema: Any) -> None:
    import jsonschema

    try:
        _class_of(schema).check_schema(schema)
    except jsonschema.SchemaError as error:
        raise UserError(
            f"json_schema: the schema is not one: {error.message} (at {error.json_path})"
        ) from error


def _fits(answer: Answer, schema: dict[str, Any] | None) -> float:
    wanted = answer.facts.get("schema") if schema is None else schema
    if wanted is None:
        return math.nan
    text = wanted if isinstance(wanted, str) else json.dumps(wanted)
    try:
        return float(_ASIDE.ask({"schema": text, "text": answer.text}))
    except Unanswered as error:
        if schema is not None and _UNKNOWN_REF in (error.problem or ""):
            raise UserError(
                f"json_schema: the schema has a $ref that leads out of it, and nothing is fetched: {error.problem}"
            ) from error
        is_answers = error.problem is None or error.problem.startswith(_BY_ANSWER)
        return 0.0 if is_answers and _is_usable(text) else math.nan


def _is_usable(schema: str) -> bool:
    """Whether a schema can be checked on the simplest value; one that leads to itself cannot."""
    try:
        _ASIDE.ask({"schema": schema, "text": "null"})
    except Unanswered:
        return False
    return True


def _class_of(schema: Any) -> Any:
    from jsonschema.validators import Draft202012Validator, validator_for

    return validator_for(schema, default=Draft202012Validator)


def prepare() -> None:
    """In the process: import what the first question needs."""
    import jsonschema  # noqa: F401


def reply(schema: str, text: str) -> bool:
    """In the process: whether a text is JSON that fits a schema."""
    validator = _validator(schema)
    try:
        value = _loaded(text)
    except (ValueError, RecursionError):
        return False
    return bool(validator.is_valid(value))


@functools.lru_cache(maxsize=256)  # the completions of a prompt share a schema
def _validator(schema: str) -> Any:
    from jsonschema_specifications import REGISTRY

    value = _loaded(schema)
    kind = _class_of(value)
    kind.check_schema(value)
    return kind(value, registry=REGISTRY)  # its own default would fetch what a $ref names


def _parsed(text: str) -> str | None:
    """The JSON value in one spelling, in which 1 and true differ; None where it is not JSON."""
    try:
        return json.dumps(_loaded(text), sort_keys=True)
    except (ValueError, RecursionError):
        return None


def _loaded(text: str) -> Any:
    return json.loads(text, parse_float=_number, parse_constant=_refuse)


def _number(text: str) -> float:
    value = float(text)
    return int(value) if value.is_integer() else value


def _refuse(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")
