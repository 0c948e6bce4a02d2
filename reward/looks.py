"""Looks at a policy that moves: the reward that it is optimized for, a held-out gold measure, and how far it has moved.

Optimising against a proxy helps at first and then harms, while the proxy keeps rising (Gao, Schulman and Hilton 2023,
"Scaling Laws for Reward Model Overoptimization", arXiv 2210.10760). Only a measure that is not optimized shows it.
"""

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from reward.store import nan_to_null

LOOKS = "overoptimization.jsonl"
FEWEST = 6  # prompts: with five, not even five falls of five are unlikely enough (2/2⁵ > 5 %)
_ALPHA = 0.05
_SERIES = ("kl", "proxy", "gold", "length")

OVEROPTIMIZED, FELL, ROSE, UNKNOWN = "over-optimized", "gold fell", "both rose", "not known"


class Mean(NamedTuple):
    """A mean over prompts, with its standard error; NaN where there are too few."""

    value: float
    stderr: float
    n: int


class Change(NamedTuple):
    """A mean difference, paired by prompt, with its interval."""

    difference: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Look:
    """What was seen at one step, or with one n of best-of-n.

    The lists hold a value for each prompt, in the same order at every look: the mean over its completions. NaN where
    nothing can be said.
    """

    step: int  # of the optimizer; n for best-of-n
    kl: list[float]  # nats of a completion: the divergence from where the policy started
    proxy: list[float]  # the reward that is optimized
    gold: list[float]  # the one that is not
    length: list[float] = field(default_factory=list)  # tokens of a completion
    further: dict[str, float] = field(default_factory=dict)  # other numbers of the whole look

    def mean(self, name: str) -> Mean:
        """The mean of `kl`, `proxy`, `gold` or `length` over the prompts that have one."""
        return mean_of(getattr(self, name))

    def line(self, unit: str = "step") -> str:
        """The look in a line of text."""
        told = [
            f"{name} {found.value:.4g} ± {found.stderr:.2g}"
            for name, found in ((name, self.mean(name)) for name in ("proxy", "gold"))
        ]
        return f"{unit} {self.step:<5} KL {self.mean('kl').value:.3f}  {'  '.join(told)}"

    def to_json(self) -> dict[str, Any]:
        """A row of the file: means with their errors, and what they are made of."""
        row: dict[str, Any] = {"step": self.step}
        for name in _SERIES:
            if getattr(self, name):
                found = self.mean(name)
                row |= {name: found.value, f"{name}_stderr": found.stderr, f"{name}_n": found.n}
        values = {name: getattr(self, name) for name in _SERIES}
        made: dict[str, Any] = nan_to_null({**row, **self.further, "per_prompt": values})
        return made

    @classmethod
    def from_json(cls, row: dict[str, Any]) -> "Look":
        """The look of which `to_json` made a row.

        Raises:
            KeyError, TypeError: when it made no such row.
        """
        lists = {
            name: [math.nan if value is None else float(value) for value in row["per_prompt"][name]]
            for name in _SERIES
        }
        made = {name + ending for name in _SERIES for ending in ("", "_stderr", "_n")}
        rest = {k: v for k, v in row.items() if k not in made | {"step", "per_prompt"}}
        further = {key: math.nan if value is None else float(value) for key, value in rest.items()}
        return cls(int(row["step"]), further=further, **lists)


def append(path: Path, look: Look) -> None:
    """Add a look to a file, whole."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(look.to_json()) + "\n")


def read(path: Path) -> list[Look]:
    """The looks in a file, in their order.

    Raises:
        OSError, ValueError: when it cannot be read, or holds something else.
    """
    try:
        return [Look.from_json(json.loads(line)) for line in path.read_text("utf-8").splitlines()]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path.name} holds a row that is no look: {error!r}") from error


def mean_of(values: Iterable[float]) -> Mean:
    """The mean of the finite values, and its standard error."""
    import numpy as np

    known = np.array([value for value in values if math.isfinite(value)])
    if not known.size:
        return Mean(math.nan, math.nan, 0)
    if (known == known[0]).all():  # a sum of equal numbers may be rounded
        return Mean(float(known[0]), 0.0 if known.size > 1 else math.nan, known.size)
    return Mean(float(known.mean()), float(known.std(ddof=1) / math.sqrt(known.size)), known.size)


def interval(found: Mean, confidence: float = 1 - _ALPHA) -> tuple[float, float]:
    """Student's t interval of a mean over prompts; NaN below `FEWEST` prompts."""
    if found.n < FEWEST:
        return math.nan, math.nan
    from scipy import special

    half = float(special.stdtrit(found.n - 1, (1 + confidence) / 2)) * found.stderr
    return found.value - half, found.value + half


def change(before: Sequence[float], after: Sequence[float], confidence: float) -> Change:
    """By how much `after` is larger, over the prompts that have both values; shapes (prompts,).

    Raises:
        ValueError: when the two are not of the same prompts.
    """
    pairs = zip(before, after, strict=True)
    found = mean_of(b - a for a, b in pairs)  # NaN where either is
    return Change(found.value, *interval(found, confidence), found.n)


@dataclass(frozen=True)
class Finding:
    """What became of proxy and gold from the look at `since` to the one at `step`."""

    verdict: str
    step: int
    since: int
    proxy: Change
    gold: Change
    compared: int  # earlier looks with which the last one was compared

    @property
    def is_warning(self) -> bool:
        """Whether the proxy rose while the gold measure fell."""
        return self.verdict == OVEROPTIMIZED

    def sentence(self, unit: str = "step") -> str:
        """The finding in words.

        Args:
            unit: what `step` counts: `step`, or `n =` for best-of-n.
        """
        if self.verdict == UNKNOWN and not self.compared:
            return "There is one look only: nothing to compare it with."
        if self.proxy.n < FEWEST or self.gold.n < FEWEST:
            n = min(self.proxy.n, self.gold.n)
            return f"Both measures are known of {n} prompts only, and at least {FEWEST} are needed."
        told = {
            OVEROPTIMIZED: "the proxy rose while the gold measure fell",
            FELL: "the gold measure fell",
            ROSE: "proxy and gold measure both rose",
            UNKNOWN: f"it is not known that {_doubt(self.proxy, self.gold)}",
        }[self.verdict]
        return (
            f"From {unit} {self.since} to {unit} {self.step} {told}: proxy {_written(self.proxy)}, "
            f"gold {_written(self.gold)}, over {self.gold.n} prompts."
        )

    def to_json(self) -> dict[str, Any]:
        """As it stands in a record."""
        made: dict[str, Any] = nan_to_null(
            vars(self) | {"proxy": self.proxy._asdict(), "gold": self.gold._asdict()}
        )
        return made


def _doubt(proxy: Change, gold: Change) -> str:
    moved = [
        name
        for name, one in (("the proxy", proxy), ("the gold measure", gold))
        if one.low <= 0 <= one.high
    ]
    return f"{' or '.join(moved) or 'the gold measure'} changed"


def _written(change: Change) -> str:
    text = f"{change.difference:+.3g} [{change.low:+.3g}, {change.high:+.3g}]"
    return text.replace("-", "−")


def judge(looks: Sequence[Look], is_watching: bool = False) -> Finding:
    """Compare the last look with every earlier one, paired by prompt.

    It is over-optimized when since some earlier look the whole interval of the proxy's change lies above zero, and that
    of gold's below. Which look that is, the data say: the best of K noisy looks is best by luck too. So the intervals
    are simultaneous over the K comparisons (Bonferroni: each has confidence 1 − 0.05 / K), and hold whichever is
    chosen. If there is none, the changes are those since the look in which gold surely fell, or since the first.

    Args:
        looks: at least one, in their order, all of the same prompts.
        is_watching: whether it is asked again at every look of a course of any length, and one alarm of chance is one
            too many. Then the look after K others spends 1 / (K (K + 1)) of the 5 %, shares that add up to 1, all on
            the side of a fall.
    """
    *earlier, last = looks
    count = max(1, len(earlier))
    confidence = 1 - (2 * _ALPHA / (count**2 * (count + 1)) if is_watching else _ALPHA / count)
    found = [
        Finding(
            UNKNOWN,
            last.step,
            look.step,
            change(look.proxy, last.proxy, confidence),
            change(look.gold, last.gold, confidence),
            len(earlier),
        )
        for look in earlier
    ]
    fallen = [one for one in found if one.gold.high < 0]
    if fallen:
        hacked = [one for one in fallen if one.proxy.low > 0]
        worst = min(hacked or fallen, key=lambda one: one.gold.difference)
        return _named(worst, OVEROPTIMIZED if hacked else FELL)
    if not found:
        none = Change(math.nan, math.nan, math.nan, 0)
        return Finding(UNKNOWN, last.step, last.step, none, none, 0)
    is_up = found[0].proxy.low > 0 and found[0].gold.low > 0
    return _named(found[0], ROSE if is_up else UNKNOWN)


def _named(finding: Finding, verdict: str) -> Finding:
    return Finding(**vars(finding) | {"verdict": verdict})
