"""The pairs of a report: records of a data version with their places in the source, and the scores of a model."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.entry import UserError
from conf.passthrough import did_you_mean
from conf.schema import Data, Scorer
from reward.data import prepare
from reward.readers import parse
from reward.records import Preference
from reward.sources import open_rows
from reward.turns import Message
from reward.versions import Version

if TYPE_CHECKING:
    from reward.ordering import Pairs

_NO_SUBSET = "(none)"  # of a row without a value


@dataclass(frozen=True)
class Held:
    """Preference pairs, and where each is in its source."""

    version: Version
    records: list[Preference]
    places: list[str]  # such as `prefs.jsonl:17`
    prompts: list[str | None]  # names that are equal for equal prompts
    subsets: list[str] | None


@dataclass(frozen=True)
class Scores:
    """What one model gave, columns chosen and rejected; NaN where it gave no score."""

    scores: list[tuple[float, float]]
    tokens: (
        list[tuple[int, int]] | None
    )  # of prompt and answer; None where the model has no tokenizer here
    max_length: int | None

    @property
    def too_long(self) -> int:
        """Pairs without a score: a model, here or on a server, gives none to a conversation that is too long only."""
        return sum(not all(map(math.isfinite, pair)) for pair in self.scores)


def read(data: Data, root: Path, subset: str | None) -> Held:
    """The pairs that `data` describes.

    Args:
        data: which rows, and what is done to them.
        root: data versions are kept in `root/data`.
        subset: column of the source's rows that names subsets.

    Raises:
        UserError: if there are no pairs, or no row has the column.
    """
    version = prepare(data, "preference", root)
    facts = version.facts()
    records = [record for record in version.records() if isinstance(record, Preference)]
    found = _found(data, version, facts["row"].tolist(), subset)
    subsets = None
    if subset is not None:
        values = [value for _, value in found]
        subsets = [_NO_SUBSET if value in (None, "") else str(value) for value in values]
    prompts: list[str | None] = [f"{prompt:016x}" for prompt in facts["prompt"].tolist()]
    return Held(version, records, [place for place, _ in found], prompts, subsets)


def _found(
    data: Data, version: Version, numbers: list[int], column: str | None
) -> list[tuple[str, Any]]:
    """Place, and value of a column, of the rows with the given numbers over all sources."""
    wanted = set(numbers)
    found: dict[int, tuple[str, Any]] = {}
    keys: dict[str, None] = {}
    sources = [data, *data.mix.values()]
    for source, described in zip(sources, version.manifest["sources"], strict=True):
        end = described["start"] + described["rows"]
        lines = open_rows(source, "data")
        for number, (place, raw) in zip(range(described["start"], end), lines, strict=False):
            if number not in wanted:
                continue
            row = parse(raw) if column else {}
            keys |= dict.fromkeys(row)
            found[number] = (place, row.get(column) if column else None)
    if column and column not in keys:
        names = ", ".join(keys)
        raise UserError(
            f"subset={column!r}: no row has that column.{did_you_mean(column, list(keys))} There are: {names}. "
            "(A data version keeps the records alone: name the file that it was made from.)"
        )
    return [found[number] for number in numbers]


def score(scorer: Scorer, records: Sequence[Preference]) -> Scores:
    """Score both answers of every pair; the model is freed at the end."""
    from reward.ensemble import close, open_model

    model: Any = open_model(
        scorer.path,
        revision=scorer.revision,
        dtype=scorer.dtype.value,
        batch_tokens=scorer.batch_tokens,
        max_length=scorer.max_length,
    )
    prompts = [record.prompt for record in records for _ in range(2)]
    answers = [side for record in records for side in (record.chosen, record.rejected)]
    tools = [record.tools for record in records for _ in range(2)]
    tokens = None
    try:
        if hasattr(model, "tokenize"):
            ids = [model.tokenize(*row) for row in zip(prompts, answers, tools, strict=True)]
            tokens = list(zip(map(len, ids[::2]), map(len, ids[1::2]), strict=True))
            scores = model.score_ids(ids)
        else:
            scores = model.score(prompts, answers, tools)
    finally:
        close(model)
    return Scores(list(zip(scores[::2], scores[1::2], strict=True)), tokens, model.max_length)


def text_of(turns: list[Message]) -> str:
    """The text of turns, which an answer's length is counted in; a tool call is no text."""
    return "\n\n".join(turn.get("content") or "" for turn in turns if turn["role"] == "assistant")


def as_pairs(held: Held, scores: Scores) -> "Pairs":
    """Scores and lengths as arrays."""
    import numpy as np

    from reward.ordering import Pairs

    chars = [[len(text_of(side)) for side in (pair.chosen, pair.rejected)] for pair in held.records]
    tokens = None if scores.tokens is None else np.array(scores.tokens)
    return Pairs(np.array(scores.scores), np.array(chars), held.prompts, tokens)
