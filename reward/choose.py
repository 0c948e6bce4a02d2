"""Which records a version keeps, and in which order: cleaning, splitting, mixing, by their facts."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from conf.entry import UserError
from conf.passthrough import did_you_mean
from conf.schema import Data, Order, Part
from reward.findings import DROPPABLE, Finding

Array = np.ndarray[Any, Any]

_PARTS = (Part.train, Part.validation, Part.test)


@dataclass
class Choice:
    """The records to keep, in order, and what each step removed."""

    order: Array  # (kept,) places of records
    steps: list[dict[str, Any]] = field(default_factory=list)
    removed: list[tuple[int, str]] = field(default_factory=list)  # (row, step)


def check_choice(data: Data, where: str) -> None:
    """Check the settings that `choose` reads.

    Raises:
        UserError: naming the field.
    """
    for kind in data.clean.drop:
        if kind not in DROPPABLE:
            raise UserError(
                f"{where}.clean.drop: {kind!r} is no kind of finding that can be dropped."
                f"{did_you_mean(kind, DROPPABLE)} There are: {', '.join(DROPPABLE)}"
            )
    fractions = data.fractions
    if len(fractions) != 3 or min(fractions) < 0 or abs(sum(fractions) - 1) > 1e-6:
        raise UserError(
            f"{where}.fractions={fractions} must be three shares (train, validation, test) whose sum is 1"
        )
    if (data.seed or 0) < 0:
        raise UserError(f"{where}.seed={data.seed} must be at least 0")
    wants_score = data.clean.min_score is not None or data.clean.max_score is not None
    if (wants_score or "score" in data.order.value) and not data.clean.score:
        raise UserError(
            f"{where}.clean.score must name the column that holds the score; it is needed for min_score, "
            "max_score and an order by score"
        )
    for name, portion in data.mix.items():
        if portion.weight <= 0:
            raise UserError(f"{where}.mix.{name}.weight={portion.weight} must be above 0")


def choose(facts: Array, sources: Array, findings: list[Finding], data: Data) -> Choice:
    """Apply every step that `data` asks for.

    Args:
        facts: (records,) see `reward.ingest.FACTS`.
        sources: (records,) number of the source of each: 0 is the main set, then those of `data.mix`.
        findings: about the records.
        data: what is asked for.
    """
    kept = np.arange(len(facts))
    choice = Choice(kept)
    for name, keep in _masks(facts, sources, findings, data):
        kept = _narrow(choice, facts, kept, keep[kept], name)
    rng = np.random.default_rng(data.seed or 0)
    if data.clean.balance:
        keep = sources[kept] > 0
        keep[~keep] = _balanced(facts["group"][kept][~keep], rng)
        kept = _narrow(choice, facts, kept, keep, "balance")
    if data.mix:
        keep = _weighed(sources[kept], [portion.weight for portion in data.mix.values()], rng)
        kept = _narrow(choice, facts, kept, keep, "mix")
    choice.order = kept[_ordered(facts[kept], sources[kept], data.order, rng)]
    return choice


def part_of(openings: Array, fractions: list[float], seed: int) -> Array:
    """Number of the part (0 train, 1 validation, 2 test) that each first user turn belongs to.

    It depends on the turn's hash and the seed alone: rows with one prompt stay together, and rows
    that are added later do not move the others.
    """
    mixed = openings ^ np.random.default_rng(seed).integers(1 << 63, dtype=np.uint64)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):  # splitmix64's
        mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
    place = (mixed ^ (mixed >> np.uint64(31))) / 2.0**64
    return np.asarray(np.searchsorted(np.cumsum(fractions)[:2], place, side="right"))


def _masks(
    facts: Array, sources: Array, findings: list[Finding], data: Data
) -> Iterator[tuple[str, Array]]:
    """Step by step, which records stay, of all."""
    clean = data.clean
    # Of a set that is mixed in, and in which nothing has a score, scores ask for nothing.
    scored = np.unique(sources[~np.isnan(facts["score"])])
    is_free = (sources > 0) & ~np.isin(sources, scored)
    for kind in clean.drop:
        rows = {finding.row for finding in findings if finding.kind == kind}
        if kind == "label_conflict":  # nobody knows which of the two is right
            pairs = facts["pair"][np.isin(facts["row"], list(rows))]
            yield f"drop {kind}", ~np.isin(facts["pair"], pairs)
        else:
            yield f"drop {kind}", ~np.isin(facts["row"], list(rows))
    answer, other = facts["answer_chars"], facts["rejected_chars"]
    if clean.min_chars is not None:
        shorter = np.minimum(answer, other) if other.any() else answer
        yield f"min_chars {clean.min_chars}", shorter >= clean.min_chars
    if clean.max_chars is not None:
        whole = facts["prompt_chars"] + np.maximum(answer, other)
        yield f"max_chars {clean.max_chars}", whole <= clean.max_chars
    if clean.min_score is not None:  # a row without a score is not known to be good
        yield f"min_score {clean.min_score:g}", (facts["score"] >= clean.min_score) | is_free
    if clean.max_score is not None:
        yield f"max_score {clean.max_score:g}", (facts["score"] <= clean.max_score) | is_free
    if data.part is not Part.all:
        parts = part_of(facts["opening"], data.fractions, data.seed or 0)
        yield f"part {data.part.value}", parts == _PARTS.index(data.part)


def _narrow(choice: Choice, facts: Array, kept: Array, keep: Array, step: str) -> Array:
    """The records that stay; the others are recorded as removed by the step."""
    gone = facts["row"][kept[~keep]].tolist()
    choice.removed += [(row, step) for row in gone]
    choice.steps.append({"step": step, "removed": len(gone), "left": int(keep.sum())})
    return kept[keep]


def _balanced(groups: Array, rng: np.random.Generator) -> Array:
    """Keep as many of each group as the smallest one has, drawn at random, and none without a group."""
    keep = np.zeros(len(groups), bool)
    names, counts = np.unique(groups[groups > 0], return_counts=True)
    for name in names:
        keep[rng.choice(np.flatnonzero(groups == name), counts.min(), replace=False)] = True
    return keep


def _weighed(sources: Array, weights: list[float], rng: np.random.Generator) -> Array:
    """Keep the main set, and of each further one its weight × the size of the main one."""
    keep = np.asarray(sources == 0)
    size = int(keep.sum())
    for number, weight in enumerate(weights, 1):
        places = np.flatnonzero(sources == number)
        wanted = min(len(places), round(weight * size))
        keep[rng.choice(places, wanted, replace=False)] = True
    return keep


def _ordered(facts: Array, sources: Array, order: Order, rng: np.random.Generator) -> Array:
    """Places in the order that is asked for; equals stay in the order of the source."""
    length = facts["prompt_chars"] + facts["answer_chars"] + facts["rejected_chars"]
    match order:
        case Order.shuffled:
            return np.asarray(rng.permutation(len(facts)))
        case Order.short_first:
            return np.argsort(length, kind="stable")
        case Order.long_first:
            return np.argsort(-length, kind="stable")
        case Order.low_score_first:
            return np.argsort(facts["score"], kind="stable")
        case Order.high_score_first:
            return np.argsort(-facts["score"], kind="stable")
    spread = np.zeros(len(facts))  # each set evenly over the whole
    for number in np.unique(sources):
        places = np.flatnonzero(sources == number)
        spread[places] = (np.arange(len(places)) + 0.5) / len(places)
    return np.argsort(spread, kind="stable")
