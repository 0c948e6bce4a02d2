"""`python -m reward.negatives IN OUT.jsonl --kind json|fact`: pairs from good demonstrations alone.

The demonstration's last answer is chosen; a version of it with one fault is rejected, and the column
`corruption` names the fault. What differs between the two is the fault and nothing else, so a model
cannot learn length or layout from them.
"""

import argparse
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from conf.entry import UserError, plainly
from reward import corrupt, misstate
from reward.command import Reading, add_common, at_least_one, check_out, counts, written_whole
from reward.records import NORMALISERS, Conversation, detect
from reward.store import canonical
from reward.turns import BadRow, Row, differ_in_spaces_only, make_turn

FAULTS: dict[str, Mapping[str, corrupt.Fault]] = {
    "json": corrupt.SYNTAX | corrupt.MEANING,
    "fact": misstate.FACTS,
}


@dataclass(frozen=True)
class Wrong:
    """A rejected answer and the name of its fault."""

    corruption: str
    answer: str


def negatives(answer: str, kind: str, count: int, rng: random.Random) -> list[Wrong]:
    """Wrong versions of a right answer, each with another fault.

    Args:
        answer: what is right.
        kind: `json`, where the answer is one JSON object or list and nothing else, or `fact`.
        count: how many at most; there are fewer where the answer gives no occasion for more faults.
        rng: draws the faults and their places.

    Returns:
        Answers that differ from the right one and from each other in more than spaces. Of a JSON
        fault, the syntax is broken or the value is another, as `corrupt.is_as_named` says.
    """
    if kind == "json" and corrupt.parsed(answer) is None:
        return []
    faults = FAULTS[kind]
    seen = [answer]
    found: list[Wrong] = []
    for name in rng.sample(list(faults), len(faults)):
        if len(found) == count:
            break
        wrong = faults[name](answer, rng)
        if wrong is None or any(_is_same(wrong, other) for other in seen):
            continue
        if kind == "json" and not corrupt.is_as_named(name, wrong, answer):
            continue
        seen.append(wrong)
        found.append(Wrong(name, wrong))
    return found


def _is_same(left: str, right: str) -> bool:
    return differ_in_spaces_only([make_turn("assistant", left)], [make_turn("assistant", right)])


def _demonstration(row: Row, place: str) -> tuple[Conversation, str]:
    name = detect(row)
    record = NORMALISERS[name](row)
    if not isinstance(record, Conversation):
        raise BadRow(f"its format {name} is no demonstration", "unknown_format")
    return record, place


def as_row(demonstration: Conversation, wrong: Wrong, place: str) -> Row:
    """A row of TRL's conversational preference format, with the fault and where it comes from."""
    *prompt, answer = demonstration.messages
    row = {
        "prompt": prompt,
        "chosen": [answer],
        "rejected": [answer | {"content": wrong.answer}],
        "corruption": wrong.corruption,
        "row": place,
    }
    return row | {"tools": demonstration.tools} if demonstration.tools else row


def run(given: argparse.Namespace) -> str:
    """Write the pairs; the summary.

    Raises:
        UserError: if the input cannot be read, too many rows are bad, or no answer can be spoilt.
    """
    check_out(given.out, given.source)
    reading = Reading(given.source, _demonstration, "negatives")
    made: Counter[str] = Counter()
    without = 0
    with written_whole(given.out) as write:
        for demonstration, place in reading:
            # by content, so that other rows change nothing
            rng = random.Random(f"{given.seed}:{canonical(demonstration.messages)}")
            answer = demonstration.messages[-1]["content"]
            found = negatives(answer, given.kind, given.per_row, rng)
            without += not found
            for wrong in found:
                made[wrong.corruption] += 1
                write(as_row(demonstration, wrong, place))
        reading.check(given.max_bad_fraction)
        if not made:
            needed = {
                "json": "an answer must be one JSON object or list and nothing else",
                "fact": "an answer must state a number, a date, two names, or yes or no",
            }
            raise UserError(
                f"none of the {reading.rows:,} answers in {given.source} could be spoilt: with --kind "
                f"{given.kind}, {needed[given.kind]}"
            )
    lines = [
        f"{given.out}: {made.total():,} pairs of {reading.rows:,} demonstrations",
        f"corruptions: {counts(made)}",
        f"demonstrations without a pair: {without:,}" if without else "",
        reading.described(),
    ]
    return "\n".join(filter(None, lines))


def main() -> None:
    """Make rejected answers from good demonstrations: corrupt JSON, or wrong facts."""
    parser = argparse.ArgumentParser(prog="python -m reward.negatives", description=main.__doc__)
    add_common(parser)
    parser.add_argument("--kind", required=True, choices=list(FAULTS), help="what is to be wrong")
    parser.add_argument(
        "--per-row", type=at_least_one, default=1, metavar="N", help="pairs of a row (default: 1)"
    )
    given = parser.parse_args()
    with plainly():
        print(run(given))


if __name__ == "__main__":
    main()
