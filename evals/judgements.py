"""Pairwise judgements: the rows that a judge writes and `evals.winrate` reads.

A row is one judgement, in the form of AlpacaEval's annotations: `index` of the instruction, `generator_1` and
`generator_2`, the lengths of their answers in characters `len_1` and `len_2` (or the answers themselves, `output_1`
and `output_2`), and `preference` from 1 (generator_1's answer is better) to 2 (generator_2's is). 1.5 is a draw, as is
0 in old files; null or NaN is a judgement that failed.

The baseline is the generator that every row names, on either side. A pair may be there twice, once in each order: then
its preference is the mean of the two, and it is missing when either is.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.entry import UserError
from reward.readers import parse, read_file
from reward.sources import local_files
from reward.turns import BadRow, Row, short

_DRAW = 1.5


@dataclass(frozen=True)
class Judgement:
    """One row, as it stands in the file. `preference` is NaN where the judge gave none."""

    place: str
    index: str
    generators: tuple[str, str]
    lengths: tuple[float, float]
    preference: float

    def turned(self) -> "Judgement":
        """The same judgement with the two sides exchanged."""
        generators, lengths = self.generators[::-1], self.lengths[::-1]
        return Judgement(self.place, self.index, generators, lengths, 3 - self.preference)


@dataclass(frozen=True)
class Pair:
    """A model's answer against the baseline's to one instruction.

    `preference` is from 0 (the baseline is better) to 1, NaN where it is missing; lengths are in characters.
    """

    index: str
    preference: float
    length_baseline: float
    length: float


@dataclass(frozen=True)
class Judged:
    """Everything that was judged against one baseline."""

    baseline: str
    models: dict[str, list[Pair]]
    left_out: int  # rows that do not name the baseline, when it was asked for


def load(sources: Iterable[str], baseline: str | None = None) -> Judged:
    """The judgements in files.

    Args:
        sources: JSONL or JSON files (.gz), folders or globs of them.
        baseline: the generator to which the others are compared; None: the one that every row names. Of two models
            judged against each other in both orders, it is `generator_1` of the first row.

    Raises:
        UserError: at the first row that cannot be used, when a pair is there twice, or there is no one baseline.
    """
    files = list(dict.fromkeys(file for source in sources for file in _files(source)))
    rows = [row for file in files for row in _rows(file)]
    if not rows:
        raise UserError(f"{', '.join(map(str, files))}: there are no judgements in it")
    chosen = baseline or _baseline(rows)
    kept = [row for row in rows if chosen in row.generators]
    if not kept:
        names = sorted({name for row in rows for name in row.generators})
        raise UserError(
            f"no row names the baseline {chosen!r}; the generators are {', '.join(names)}"
        )
    return Judged(chosen, _pairs(kept, chosen), len(rows) - len(kept))


def _files(source: str) -> list[Path]:
    files = local_files(source)
    if not files:
        raise UserError(f"there is no file {source!r}; give the judgements as JSONL (.gz)")
    return files


def _rows(file: Path) -> Iterator[Judgement]:
    for number, raw in read_file(file):
        place = f"{file}:{number}"
        try:
            yield _judgement(place, _parsed(raw))
        except BadRow as error:
            if error.kind != "blank_line":
                raise UserError(f"{place}: {error}; mend or remove the line") from None


def _parsed(raw: Any) -> Row:
    """A row in which a number may be NaN: pandas writes it so where a judge gave no preference."""
    try:
        return parse(raw)
    except BadRow:
        if not (isinstance(raw, bytes) and b"NaN" in raw):
            raise
        try:
            value = json.loads(raw)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise
        return value


def _judgement(place: str, row: Row) -> Judgement:
    index = row.get("index", row.get("instruction"))
    if index is None or isinstance(index, float | bool | list | dict):
        raise BadRow(f"'index' is {short(index)}, expected the number or name of the instruction")
    names = [row.get(f"generator_{side}") for side in (1, 2)]
    for side, name in enumerate(names, 1):
        if not isinstance(name, str) or not name:
            raise BadRow(f"'generator_{side}' is {short(name)}, expected the name of a model")
    return Judgement(
        place,
        str(index),
        (str(names[0]), str(names[1])),
        (_length(row, 1), _length(row, 2)),
        _preference(row),
    )


def _length(row: Row, side: int) -> float:
    value = row.get(f"len_{side}")
    if value is None and isinstance(text := row.get(f"output_{side}"), str):
        return float(len(text))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"'len_{side}' is {short(value)}, expected the answer's length in characters")
    if not 0 <= value < 1e12:
        raise BadRow(f"'len_{side}' is {short(value)}, expected a finite number, 0 or more")
    return float(value)


def _preference(row: Row) -> float:
    if "preference" not in row:
        raise BadRow("'preference' is missing, expected a number from 1 to 2, or null")
    value = row["preference"]
    if value is None:
        return math.nan
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadRow(f"'preference' is {short(value)}, expected a number from 1 to 2, or null")
    if value == 0:
        return _DRAW
    if not (1 <= value <= 2 or math.isnan(value)):
        raise BadRow(
            f"'preference' is {value}, expected 1 (generator_1 is better) to 2 (generator_2), 1.5 or 0 for a draw, or "
            "null for none"
        )
    return float(value)


def _baseline(rows: list[Judgement]) -> str:
    common = set(rows[0].generators).intersection(*(row.generators for row in rows))
    if not common:
        counts = Counter(row.generators[0] for row in rows)
        listed = ", ".join(f"{name} ({count:,} rows)" for name, count in counts.most_common(5))
        raise UserError(
            f"the rows have no baseline in common (generator_1 is {listed}): a win rate is against one model; choose "
            "it with --baseline NAME, or give files of one baseline"
        )
    return rows[0].generators[0] if rows[0].generators[0] in common else common.pop()


def _pairs(rows: list[Judgement], baseline: str) -> dict[str, list[Pair]]:
    """The pairs of each model in the order of the file, those that were judged in both orders as one."""
    found: dict[tuple[str, str], dict[bool, Judgement]] = {}
    for row in rows:
        is_turned = row.generators[0] != baseline
        model = row.generators[0] if is_turned else row.generators[1]
        orders = found.setdefault((model, row.index), {})
        if (before := orders.get(is_turned)) is not None:
            raise UserError(
                f"{row.place}: {model} is judged on index {row.index} for the second time in this order (before: "
                f"{before.place}); remove one of the two"
            )
        orders[is_turned] = row.turned() if is_turned else row
    models: dict[str, list[Pair]] = {}
    for (model, index), orders in found.items():
        judged = list(orders.values())
        if len({one.lengths for one in judged}) > 1:
            raise UserError(
                f"{judged[1].place}: {model} on index {index} has other lengths than in the other order "
                f"({judged[0].place}); judge both orders on the same answers"
            )
        preference = sum(one.preference for one in judged) / len(judged) - 1
        models.setdefault(model, []).append(Pair(index, preference, *judged[0].lengths))
    return models
