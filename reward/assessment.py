"""All numbers of a reward model's report, out of its scores: JSON-like, with n and interval. No torch."""

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from reward import calibration, ordering
from reward.heldpairs import Held, Scores, as_pairs, text_of
from reward.ordering import Pairs
from reward.pages.markup import percent, shortened
from reward.records import Preference
from reward.rewardbench import sections
from reward.turns import Row

_MISTAKES = 20
_LONGEST = 1200  # characters of a mistake's text
_GAPS = 0.05  # share of pairs without a score above which the numbers speak of other pairs than were given


def assess(held: Held, scores: Scores, others: Mapping[str, Scores]) -> dict[str, Any]:
    """What a model is worth on pairs of which it scored at least one.

    Args:
        held: the pairs.
        scores: of the model.
        others: scores of further models, by path.
    """
    pairs = as_pairs(held, scores)
    subsets = _subsets(held, pairs)
    return {
        **_order(pairs),
        **_calibration(pairs.scored()),
        "too_long": scores.too_long,
        "warning": _warning(scores),
        "subsets": subsets,
        "rewardbench": sections(subsets),
        "others": [
            {"path": path, **ordering.agreement(pairs, as_pairs(held, other))}
            for path, other in others.items()
        ],
        "mistakes": _mistakes(held, pairs),
    }


def _warning(scores: Scores) -> str:
    """What is wrong when many pairs have no score, and the fix; empty when few have none."""
    pairs, gaps = len(scores.scores), scores.too_long
    if gaps <= _GAPS * pairs:
        return ""
    limit = scores.max_length or "the model's"
    where = " where it is served" if scores.tokens is None else ""
    return (
        f"{gaps:,} of {pairs:,} pairs ({percent(gaps / pairs)}) have no score and are left out of every number: with "
        f"its prompt an answer is longer than {limit} tokens (raise model.max_length{where})"
    )


def _order(pairs: Pairs) -> dict[str, Any]:
    scored = pairs.scored()
    lengths = {"characters": scored.chars}
    if scored.tokens is not None:
        lengths["tokens"] = scored.tokens
    baseline = {name: ordering.baseline(scored, each).as_json() for name, each in lengths.items()}
    over = {name: ordering.over_length(scored, each) for name, each in lengths.items()}
    return {
        "accuracy": ordering.accuracy(pairs),
        "length_baseline": baseline["characters"] | {"tokens": baseline.get("tokens")},
        "over_length": over["characters"] | {"tokens": over.get("tokens")},
        "by_length": ordering.by_length(scored),
        "auc": ordering.auc(scored).as_json(),
        "correlation": {
            name: ordering.correlations(scored, each) for name, each in lengths.items()
        },
        "score_by_length": ordering.score_by_length(scored),
    }


def _calibration(scored: Pairs) -> dict[str, Any]:
    margins, prompts = scored.margins, scored.clusters
    wide = calibration.calibration(margins, prompts, calibration.equal_width())
    even = calibration.calibration(margins, prompts, calibration.equal_mass(margins))
    return {
        "ece": wide.as_json() | {"binning": "equal width"},
        "ece_adaptive": even.as_json() | {"binning": "equal mass"},
        "brier": calibration.brier(margins, prompts).as_json(),
        "nll": calibration.nll(margins, prompts).as_json(),
        "temperature": calibration.temperature(margins, prompts),
        "reliability": [asdict(one) for one in wide.bins],
        "reliability_adaptive": [asdict(one) for one in even.bins],
        "margins": calibration.histogram(margins),
    }


def _subsets(held: Held, pairs: Pairs) -> list[dict[str, Any]]:
    """Accuracy and length baseline of each subset, in the order of their names."""
    found = []
    for name in sorted(set(held.subsets or [])):
        own = pairs.where(np.array([subset == name for subset in held.subsets or []]))
        base = ordering.baseline(own.scored(), own.scored().chars)
        found.append(
            {"name": name, "accuracy": ordering.accuracy(own), "length_baseline": base.as_json()}
        )
    return found


def _mistakes(held: Held, pairs: Pairs) -> list[dict[str, Any]]:
    """The pairs in the wrong order with the largest margins, with their texts."""
    margins = np.where(pairs.is_scored, pairs.margins, 0.0)
    worst = [
        at for at in np.argsort(margins, kind="stable")[:_MISTAKES].tolist() if margins[at] < 0
    ]
    return [line(held, pairs, at) | _texts(held.records[at]) for at in worst]


def _texts(pair: Preference) -> dict[str, str]:
    prompt = "\n\n".join(f"{turn['role']}: {turn.get('content') or ''}" for turn in pair.prompt)
    texts = {"prompt": prompt, "chosen": text_of(pair.chosen), "rejected": text_of(pair.rejected)}
    return {name: shortened(text, _LONGEST) for name, text in texts.items()}


def line(held: Held, pairs: Pairs, at: int) -> Row:
    """What is known of one pair, as a line of `pairs.jsonl`; numbers that are not there are None."""
    chosen, rejected = pairs.scores[at].tolist()
    is_scored = bool(pairs.is_scored[at])
    tokens = (None, None) if pairs.tokens is None else pairs.tokens[at].tolist()
    return {
        "row": held.places[at],
        "subset": held.subsets[at] if held.subsets else None,
        "prompt_key": held.prompts[at],
        "score_chosen": chosen if np.isfinite(chosen) else None,
        "score_rejected": rejected if np.isfinite(rejected) else None,
        "margin": chosen - rejected if is_scored else None,
        "chars_chosen": int(pairs.chars[at, 0]),
        "chars_rejected": int(pairs.chars[at, 1]),
        "tokens_chosen": tokens[0],
        "tokens_rejected": tokens[1],
    }
