"""What becomes of the scored completions of a prompt: the best, the accepted, or pairs."""

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conf.schema import Pick, Ranking
from reward.pairs import as_row, pairs
from reward.samples import Completion, Sample
from reward.scored import Scored, Task
from reward.turns import Row, make_turn


@dataclass(frozen=True)
class Ranked:
    """A completion with its reward."""

    completion: Completion
    reward: float  # NaN: a gap, a term can say nothing of it
    terms: dict[str, float]  # by the term's name, before its weight

    @property
    def is_usable(self) -> bool:
        """Whether it has a reward and says something: a blank turn is no training row."""
        return math.isfinite(self.reward) and bool(self.completion.text.strip())


@dataclass
class Picked:
    """What one prompt gave."""

    rows: list[Row]
    mean: float  # reward of one completion, over all that have one; NaN if none has
    best: float  # reward of the best usable one; NaN if there is none


def usable(ranked: Sequence[Ranked], drop_cut: bool, counts: Counter[str]) -> list[Ranked]:
    """The completions that can be picked; counts the others, and those that were cut off."""
    kept = []
    for item in ranked:
        counts["completions"] += 1
        counts["cut"] += item.completion.is_cut
        if not math.isfinite(item.reward):
            counts["gaps"] += 1
            for name, value in item.terms.items():
                counts[f"gaps_in_{name}"] += not math.isfinite(value)
        elif not item.completion.text.strip():
            counts["empty"] += 1
        if item.is_usable and not (drop_cut and item.completion.is_cut):
            kept.append(item)
    return kept


def pick(sample: Sample, ranked: Sequence[Ranked], config: Ranking, counts: Counter[str]) -> Picked:
    """The rows of a prompt.

    Args:
        sample: the prompt.
        ranked: its completions, in their order.
        config: what is picked, and by which limits.
        counts: counts completions and prompts (`undecided`: all rewards are equal), and what became no row, by reason.
    """
    rewards = [item.reward for item in ranked if math.isfinite(item.reward)]
    mean = math.fsum(rewards) / len(rewards) if rewards else math.nan
    counts["prompts"] += 1
    candidates = usable(ranked, config.drop_cut, counts)
    rows = [_whole(sample, ranked)] if config.pick is Pick.all else []
    if not candidates:
        counts["prompts_without_a_usable_completion"] += 1
        return Picked(rows, mean, math.nan)
    best = max(candidates, key=lambda item: item.reward)  # the first of equally good ones
    counts["undecided"] += best.reward == min(candidates, key=lambda item: item.reward).reward
    if config.pick in PICKS:
        rows = PICKS[config.pick](sample, candidates, config, counts)
    return Picked(rows, mean, best.reward)


def _whole(sample: Sample, ranked: Sequence[Ranked]) -> Row:
    """The row of a prompt with all completions, null for a reward that is a gap."""
    asked = sample.asked
    completions = [
        {
            "text": item.completion.text,
            "tokens": item.completion.tokens,
            "finish": item.completion.finish,
            "score": item.reward,
            "terms": item.terms,
        }
        for item in ranked
    ]
    row: Row = {"prompt": asked.prompt, "completions": completions}
    return row | {"tools": asked.tools} if asked.tools else row


def _best(
    sample: Sample, candidates: list[Ranked], config: Ranking, counts: Counter[str]
) -> list[Row]:
    best = max(candidates, key=lambda item: item.reward)
    return [_demonstration(sample, best, candidates)]


def _accepted(
    sample: Sample, candidates: list[Ranked], config: Ranking, counts: Counter[str]
) -> list[Row]:
    """Rejection sampling: the best `keep` of those at `min_score` or above, each text once."""
    least = -math.inf if config.min_score is None else config.min_score
    good = [item for item in candidates if item.reward >= least]
    counts["below_min_score"] += len(candidates) - len(good)
    distinct: dict[str, Ranked] = {}
    for item in sorted(good, key=lambda item: -item.reward):  # stable: of equal ones the first
        distinct.setdefault(item.completion.text, item)
    counts["accepted"] += len(good)
    counts["repeated"] += len(good) - len(distinct)
    counts["above_keep"] += max(0, len(distinct) - config.keep)
    return [
        _demonstration(sample, item, candidates) for item in list(distinct.values())[: config.keep]
    ]


def _paired(
    sample: Sample, candidates: list[Ranked], config: Ranking, counts: Counter[str]
) -> list[Row]:
    """Pairs as `reward.pairs` makes them, with the terms of both completions."""
    places = {item.completion.place: item for item in candidates}
    scored = [
        Scored([make_turn("assistant", item.completion.text)], item.reward, place)
        for place, item in places.items()
    ]
    task = Task(sample.asked.prompt, sample.asked.tools, scored)
    rng = random.Random(f"{config.seed}:{task.key}")  # by prompt: other rows change nothing
    dropped: Counter[str] = Counter()
    found = pairs(scored, config.pairing, config.min_margin, config.max_pairs, rng, dropped)
    for reason, count in dropped.items():
        counts[reason.replace("--", "").replace("-", "_").replace(" ", "_")] += count
    return [
        as_row(task, pair)
        | {
            "terms_chosen": places[pair.chosen.place].terms,
            "terms_rejected": places[pair.rejected.place].terms,
        }
        for pair in found
    ]


def _demonstration(sample: Sample, item: Ranked, candidates: list[Ranked]) -> Row:
    """A row of messages, with its reward and what it was chosen from."""
    row: Row = {
        "messages": [*sample.asked.prompt, make_turn("assistant", item.completion.text)],
        "score": item.reward,
        "terms": item.terms,
        "rank": 1 + sum(other.reward > item.reward for other in candidates),
        "of": len(candidates),
        "row": item.completion.place,
    }
    return row | {"tools": sample.asked.tools} if sample.asked.tools else row


PICKS: dict[Pick, Callable[[Sample, list[Ranked], Ranking, Counter[str]], list[Row]]] = {
    Pick.best: _best,
    Pick.accept: _accepted,
    Pick.pairs: _paired,
}
