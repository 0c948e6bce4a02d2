"""`python -m reward.pairs IN OUT.jsonl --method …`: preference pairs from scored completions.

Rows that hold all completions of a prompt are paired as they are read; rows with one completion each
are grouped by equal prompt first, in memory. A pair is a row of TRL's conversational preference
format.
"""

import argparse
import math
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

from conf.entry import UserError, plainly
from reward.command import (
    Reading,
    add_common,
    at_least_one,
    at_least_zero,
    check_out,
    counts,
    written_whole,
)
from reward.scored import Scored, Task, task_of
from reward.turns import Row, differ_in_spaces_only

_QUANTILES = (0, 0.25, 0.5, 0.75, 1)
_UNSCORED = "completions without a score"

METHODS = {
    "best_worst": "the best completion against the worst",
    "margin": "every two that are at least --min-margin apart, the widest first",
    "all": "every two of unequal score",
    "best_rest": "the best completion against every other",
}


@dataclass(frozen=True)
class Pair:
    """Two completions of one prompt, of which the first has the higher score."""

    chosen: Scored
    rejected: Scored

    @property
    def margin(self) -> float:
        """By how much chosen is better, > 0."""
        return self.chosen.score - self.rejected.score


def pairs(
    scored: list[Scored],
    method: str,
    min_margin: float,
    max_pairs: int | None,
    rng: random.Random,
    dropped: Counter[str] | None = None,
) -> list[Pair]:
    """Pair the completions of one prompt.

    Args:
        scored: the completions, in any order; of equally good ones the first counts as best or worst.
        method: a key of METHODS.
        min_margin: smallest difference of the scores that makes a pair; equal scores never do.
        max_pairs: most pairs to return: the widest with `margin`, else drawn at random.
        rng: what draws them.
        dropped: counts the candidates that became no pair, by reason.

    Returns:
        The pairs; in each, chosen has the higher score and another text than rejected.
    """
    dropped = Counter() if dropped is None else dropped
    if len(scored) < 2:
        dropped["prompts with one completion"] += 1
        return []
    found = []
    for pair in _candidates(scored, method):
        reason = _why_not(pair, min_margin)
        if reason:
            dropped[reason] += 1
        else:
            found.append(pair)
    if method == "margin":
        found.sort(key=lambda pair: -pair.margin)
    if max_pairs is None or len(found) <= max_pairs:
        return found
    dropped["above --max-pairs"] += len(found) - max_pairs
    if method == "margin":
        return found[:max_pairs]
    return [found[place] for place in sorted(rng.sample(range(len(found)), max_pairs))]


def _candidates(scored: list[Scored], method: str) -> Iterator[Pair]:
    """The pairs that a method asks for, equal scores among them."""
    best = max(scored, key=lambda item: item.score)
    if method == "best_worst":
        yield Pair(best, min(scored, key=lambda item: item.score))
    elif method == "best_rest":
        yield from (Pair(best, other) for other in scored if other is not best)
    else:
        for left, right in combinations(scored, 2):
            yield Pair(left, right) if left.score >= right.score else Pair(right, left)


def _why_not(pair: Pair, min_margin: float) -> str | None:
    if pair.margin == 0:
        return "ties"
    # 0.3 − 0.1 is a little less than 0.2
    if pair.margin < min_margin and not math.isclose(pair.margin, min_margin):
        return "below --min-margin"
    if differ_in_spaces_only(pair.chosen.completion, pair.rejected.completion):
        return "equal texts"
    return None


def _tasks(reading: Reading[Task], dropped: Counter[str]) -> Iterator[Task]:
    """Whole tasks as they come, then those that were put together from several rows.

    Labels count where no row has a score: `reward.score` leaves the label beside a score of null.
    """
    groups: dict[str, Task] = {}
    for task in reading:
        if task.is_whole:
            yield task
        elif not task.scored:
            dropped[_UNSCORED] += 1
        elif (group := groups.setdefault(task.key, task)) is not task:
            group.scored += task.scored
    labels = [item.is_label for group in groups.values() for item in group.scored]
    if any(labels) and not all(labels):
        dropped[_UNSCORED] += sum(labels)
        for group in groups.values():
            group.scored = [item for item in group.scored if not item.is_label]
    yield from (group for group in groups.values() if group.scored)


def as_row(task: Task, pair: Pair) -> Row:
    """A pair as a row of TRL's conversational preference format, with where it comes from."""
    row = {
        "prompt": task.prompt,
        "chosen": pair.chosen.completion,
        "rejected": pair.rejected.completion,
        "margin": pair.margin,
        "score_chosen": pair.chosen.score,
        "score_rejected": pair.rejected.score,
        "row_chosen": pair.chosen.place,
        "row_rejected": pair.rejected.place,
    }
    return row | {"tools": task.tools} if task.tools else row


def quantiles(margins: Sequence[float]) -> dict[str, float]:
    """The smallest, the quartiles and the largest of at least one margin, by their names."""
    import numpy as np

    named = ("min", "25 %", "median", "75 %", "max")
    return dict(zip(named, np.quantile(margins, _QUANTILES).tolist(), strict=True))


def run(given: argparse.Namespace) -> str:
    """Write the pairs; the summary.

    Raises:
        UserError: if the input cannot be read, too many rows are bad, or no pair is left.
    """
    check_out(given.out, given.source)
    reading = Reading(given.source, task_of, "pairs")
    dropped: Counter[str] = Counter()
    margins, prompts = array("d"), 0
    with written_whole(given.out) as write:
        for task in _tasks(reading, dropped):
            prompts += 1
            # by prompt, so that other rows change nothing
            rng = random.Random(f"{given.seed}:{task.key}")
            limits = given.min_margin or 0.0, given.max_pairs
            for pair in pairs(task.scored, given.method, *limits, rng, dropped):
                margins.append(pair.margin)
                write(as_row(task, pair))
        reading.check(given.max_bad_fraction)
        if not margins:
            raise UserError(
                f"{given.source} gave no pair of {prompts:,} prompts (dropped: {counts(dropped)}): a "
                "pair needs two completions of one prompt, with other texts and scores"
            )
    lines = [
        f"{given.out}: {len(margins):,} pairs by {given.method}, "
        f"of {reading.rows:,} rows with {prompts:,} prompts",
        f"dropped: {counts(dropped)}",
        "margin: " + ", ".join(f"{name} {value:.4g}" for name, value in quantiles(margins).items()),
    ]
    return "\n".join(filter(None, [*lines, reading.described()]))


def main() -> None:
    """Make preference pairs of scored or ranked completions."""
    methods = "\n".join(f"  {name:11} {meaning}" for name, meaning in METHODS.items())
    parser = argparse.ArgumentParser(
        prog="python -m reward.pairs",
        description=f"{main.__doc__}\n\nmethods:\n{methods}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_common(parser)
    parser.add_argument("--method", required=True, choices=list(METHODS))
    parser.add_argument(
        "--min-margin", type=at_least_zero, help="smallest difference of the scores"
    )
    parser.add_argument("--max-pairs", type=at_least_one, metavar="N", help="pairs of one prompt")
    given = parser.parse_args()
    with plainly():
        if given.method == "margin" and given.min_margin is None:
            raise UserError("--method margin needs --min-margin: how far apart two scores must be")
        print(run(given))


if __name__ == "__main__":
    main()
