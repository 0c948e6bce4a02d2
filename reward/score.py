"""`python -m reward.score MODEL IN OUT.jsonl`: what a reward model thinks of completions."""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from conf.entry import UserError, plainly
from conf.schema import Source
from reward.model import RewardModel
from reward.readers import Line, parse
from reward.records import NORMALISERS, Conversation, Preference, Rated, detect
from reward.sources import local_files, open_rows
from reward.store import fingerprint, nan_to_null, write_json
from reward.turns import (
    BadRow,
    Message,
    Row,
    check_order,
    kind_of,
    list_of,
    make_turn,
    opening,
    text_or_turns,
    tools_of,
)

_CHUNK = 512  # rows whose completions are sorted by length together
_TEXTS = ("text", "response", "content", "completion")  # names of a nested completion's text


@dataclass(frozen=True)
class Task:
    """A row, and the conversations in it that get a score."""

    row: Row
    prompt: list[Message]
    completions: list[list[Message]]
    tools: list[Any] | None
    is_pair: bool = False
    is_nested: bool = False

    def scored(self, scores: list[float]) -> Row:
        """The row with its scores."""
        if self.is_nested:
            items = zip(self.row["completions"], scores, strict=True)
            return self.row | {"completions": [item | {"score": score} for item, score in items]}
        if self.is_pair:
            chosen, rejected = scores
            margin = chosen - rejected
            return self.row | {"score_chosen": chosen, "score_rejected": rejected, "margin": margin}
        return self.row | {"score": scores[0]}


def task_of(row: Row) -> Task:
    """Find what is to be scored in a row.

    Raises:
        BadRow: when there is nothing, or it cannot be read.
    """
    if isinstance(row.get("completions"), list):
        return _nested(row)
    record = NORMALISERS[detect(row)](row)
    match record:
        case Preference(prompt, chosen, rejected):
            return Task(row, prompt, [chosen, rejected], record.tools, is_pair=True)
        case Rated(prompt, completion):
            return Task(row, prompt, [completion], record.tools)
        case Conversation(turns):
            return Task(row, turns[:-1], [turns[-1:]], record.tools)
    raise BadRow("it has a prompt, but no completion to score", "missing_field")


def _nested(row: Row) -> Task:
    key = "prompt" if row.get("prompt") is not None else "instruction"
    prompt = opening(row) + text_or_turns(row, key, "user")
    completions = []
    for number, item in enumerate(list_of(row, "completions"), 1):
        name = next((name for name in _TEXTS if isinstance(item, dict) and name in item), None)
        if name is None or not isinstance(text := item[name], str):
            raise BadRow(f"completion {number} is {kind_of(item)}, expected an object with text")
        completions.append([make_turn("assistant", text)])  # a model may well have said nothing
        check_order(prompt + completions[-1], "prompt and completion: ")
    return Task(row, prompt, completions, tools_of(row), is_nested=True)


def score_rows(model: RewardModel, lines: Iterator[Line]) -> Iterator[Row]:
    """The rows with their scores, in their order.

    Raises:
        UserError: at the first row that cannot be scored, with its place.
    """
    while chunk := list(islice(lines, _CHUNK)):
        tasks = []
        for place, raw in chunk:
            try:
                tasks.append(task_of(parse(raw)))
            except BadRow as error:
                raise UserError(f"{place}: {error}") from error
        flat = [(task, completion) for task in tasks for completion in task.completions]
        scores = model.score(
            [task.prompt for task, _ in flat],
            [completion for _, completion in flat],
            [task.tools for task, _ in flat],
        )
        start = 0
        for task in tasks:
            end = start + len(task.completions)
            yield task.scored(scores[start:end])
            start = end


def write(model: RewardModel, source: Path, out: Path) -> Counter[str]:
    """Score a file into another, which appears when it is whole.

    Returns:
        How many rows there were, completions that have a score, and `too_long` ones that have null.
    """
    counts: Counter[str] = Counter(rows=0, scored=0, too_long=0)
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            for row in score_rows(model, open_rows(Source(source=str(source)), "input")):
                counts["rows"] += 1
                for score in _scores(row):
                    counts["scored" if score == score else "too_long"] += 1
                file.write(json.dumps(nan_to_null(row), ensure_ascii=False, default=str) + "\n")
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return counts


def _scores(row: Row) -> list[float]:
    if isinstance(row.get("completions"), list):
        return [item["score"] for item in row["completions"]]
    if "score_chosen" in row:
        return [row["score_chosen"], row["score_rejected"]]
    return [row["score"]]


def main() -> None:
    """Add a `score` to every completion; pairs get `score_chosen`, `score_rejected` and `margin`."""
    parser = argparse.ArgumentParser(prog="python -m reward.score", description=main.__doc__)
    parser.add_argument("model", help="folder of a reward model, or hub id")
    parser.add_argument("source", metavar="IN", type=Path, help=".jsonl, .json, .csv or .parquet")
    parser.add_argument("out", metavar="OUT", type=Path, help="JSONL file")
    parser.add_argument("--batch-size", type=int, default=16, help="conversations scored together")
    parser.add_argument(
        "--max-length",
        type=int,
        help="longer conversations, in tokens, get null; default: the model's context",
    )
    parser.add_argument("--dtype", default="float32", help="float32 (default) or bfloat16")
    parser.add_argument("--revision", help="hub branch, tag or commit of the model")
    given = parser.parse_args()
    with plainly():
        if not local_files(str(given.source)):
            raise UserError(f"there is no file {given.source}")
        model = RewardModel.load(
            given.model,
            revision=given.revision,
            dtype=given.dtype,
            batch_size=given.batch_size,
            max_length=given.max_length,
        )
        counts = write(model, given.source, given.out)
        folder = Path(given.model).expanduser()
        record = {
            "model": given.model,
            "weights": fingerprint(folder) if folder.is_dir() else None,
            "revision": given.revision,
            "source": {"file": given.source.name, "fingerprint": fingerprint(given.source)},
            "dtype": given.dtype,
            "max_length": model.max_length,
            **counts,
        }
        write_json(given.out.with_name(f"{given.out.name}.manifest.json"), record)
        print(
            f"{counts['rows']} rows, {counts['scored']} completions scored, {counts['too_long']} longer than "
            f"{model.max_length} tokens (null)"
        )
        print(given.out)


if __name__ == "__main__":
    main()
