"""Two sets of answers to the same prompts, aligned so that they can be judged against each other."""

import contextlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.entry import UserError
from evals.journal import manifest_path
from reward.readers import parse, read_file
from reward.sources import local_files
from reward.store import content_key, read_json
from reward.turns import BadRow, Message, Row, make_turn, short, text_of, text_or_turns

_ANSWERS = ("output", "completion", "response", "answer")
_SHOWN = 60  # characters of a prompt in a message


@dataclass(frozen=True)
class Match:
    """A prompt with the two answers; `index` is the same for the same prompt in every file."""

    index: str
    prompt: list[Message]
    baseline: str
    answer: str


@dataclass
class Answers:
    """The answers of one file by prompt."""

    name: str
    by_index: dict[str, tuple[list[Message], str]]
    further: int  # completions beyond the first of a prompt, which are not judged


def read_answers(path: str, name: str | None = None) -> Answers:
    """The answers in a file.

    Args:
        path: samples of an evaluation (`samples_TASK.jsonl` of a generated task), the output of
            `python -m evals.sample`, AlpacaEval's outputs (instruction, output, generator), or rows with `prompt` and
            `completion`.
        name: of the model; None: `generator` in the rows, else the model in the manifest or results.json beside the
            file, else the file's name.

    Raises:
        UserError: at the first row that has no prompt or no answer.
    """
    files = local_files(path)
    if len(files) != 1:
        raise UserError(
            f"{path!r} is {len(files)} files; give one JSONL or JSON file with prompts and answers"
        )
    found: dict[str, tuple[list[Message], str]] = {}
    seen: Counter[str] = Counter()
    generators: set[str] = set()
    documents: set[tuple[Any, Any]] = set()
    further = 0
    for number, raw in read_file(files[0]):
        try:
            row = parse(raw)
            prompt, answer, more = _answer(row)
        except BadRow as error:
            if error.kind == "blank_line":
                continue
            raise UserError(f"{path}:{number}: {error}; mend or remove the line") from None
        document = row.get("doc_id"), row.get("doc_hash")
        if None not in document:
            if (
                document in documents
            ):  # by another answer filter: the same answer, taken apart otherwise
                continue
            documents.add(document)
        key = content_key(_plain(prompt))
        seen[key] += 1  # a prompt that is there twice is paired in the order of the file
        found[key if seen[key] == 1 else f"{key}#{seen[key]}"] = (prompt, answer)
        further += more
        if isinstance(row.get("generator"), str):
            generators.add(row["generator"])
    if not found:
        raise UserError(f"{path} has no rows")
    if name is None and len(generators) > 1:
        raise UserError(
            f"{path} holds answers of {', '.join(sorted(generators))}; give a file a model"
        )
    return Answers(
        name or next(iter(generators), None) or _name_of(files[0]),
        found,
        further,
    )


def _answer(row: Row) -> tuple[list[Message], str, int]:
    """A row's prompt, its (first) answer, and how many more there are."""
    if isinstance(row.get("completions"), list) and row["completions"]:
        first = row["completions"][0]
        text = first.get("text") if isinstance(first, dict) else first
        if not isinstance(text, str):
            raise BadRow(f"the first completion is {short(first)}, expected an object with 'text'")
        return text_or_turns(row, "prompt", "user"), text, len(row["completions"]) - 1
    if "doc_id" in row and row.get("kind", "generate_until") != "generate_until":
        raise BadRow(f"it is of a {row['kind']} task, in which a model writes no answer")
    if isinstance(row.get("generated"), str):  # whole, where a filter took `answer` out of it
        return _prompt(row), row["generated"], 0
    name = next((key for key in _ANSWERS if row.get(key) is not None), None)
    if name is None:
        raise BadRow(f"it has no answer: none of {', '.join(map(repr, _ANSWERS))}, 'completions'")
    if isinstance(row[name], list):
        return _prompt(row), str(text_or_turns(row, name, "assistant")[-1]["content"]), 0
    return _prompt(row), text_of(row, name, may_be_blank=True), 0


def _prompt(row: Row) -> list[Message]:
    if isinstance(row.get("messages"), list):
        return text_or_turns(row, "messages", "user")
    if "prompt" not in row and "instruction" in row:
        more = row.get("input")
        text = text_of(row, "instruction")
        return [make_turn("user", f"{text}\n\n{more}" if isinstance(more, str) and more else text)]
    return text_or_turns(row, "prompt", "user")


def _plain(prompt: list[Message]) -> list[list[Any]]:
    return [[turn["role"], turn.get("content")] for turn in prompt]


def _name_of(file: Path) -> str:
    with contextlib.suppress(OSError, ValueError):
        model = read_json(manifest_path(file)).get("model")
        if isinstance(model, str) and model:
            return model
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return str(read_json(file.parent / "results.json")["model"]["path"])
    return file.name.split(".")[0]


def align(baseline: Answers, answers: Answers) -> list[Match]:
    """The two answers to each prompt, in the order of the baseline's file.

    Raises:
        UserError: when the prompts are not the same, or the two have one name.
    """
    if baseline.name == answers.name:
        raise UserError(
            f"both sets of answers are called {baseline.name!r}; tell them apart with --names BASELINE MODEL"
        )
    ours, theirs = baseline.by_index, answers.by_index
    only = [[key for key in side if key not in other] for side, other in ((ours, theirs), (theirs, ours))]  # fmt: skip
    if any(only):
        key, side = (only[0][0], ours) if only[0] else (only[1][0], theirs)
        start = str(side[key][0][-1].get("content"))[:_SHOWN]
        raise UserError(
            f"the prompts differ: {len(only[0]):,} of {len(ours):,} are only in the answers of {baseline.name}, "
            f"{len(only[1]):,} of {len(theirs):,} only in those of {answers.name} (the first ends with {start!r}); "
            "a win rate is over the same prompts: answer the missing ones, or take them out"
        )
    return [Match(key, prompt, answer, theirs[key][1]) for key, (prompt, answer) in ours.items()]
