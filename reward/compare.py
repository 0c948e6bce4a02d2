"""What rows are to each other: duplicates, contradictions, and the figures of the whole set."""

from pathlib import Path
from typing import Any

import numpy as np

from reward import language
from reward.duplicates import near_duplicates
from reward.findings import KINDS, Finding

Facts = np.ndarray[Any, Any]  # structured, see `reward.ingest.FACTS`

_QUANTILES = (0, 5, 25, 50, 75, 95, 100)


def compare_rows(facts: Facts, texts: Path, processes: int) -> list[Finding]:
    """Exact and near duplicates and contradicting labels, one finding on the later of two rows.

    Args:
        facts: of the records, in their order.
        texts: Arrow file with the records' texts in the column `text`.
        processes: worker processes for the near duplicates.
    """
    rows = facts["row"]
    first = _first(facts["text"])
    exact = np.flatnonzero(first != np.arange(len(facts)))
    partner = _first(facts["pair"])
    conflicts = np.flatnonzero(facts["side"] != facts["side"][partner])
    told = {*exact.tolist(), *conflicts.tolist()}
    findings = [_finding(rows, "exact_duplicate", int(i), int(first[i])) for i in exact]
    findings += [_finding(rows, "label_conflict", int(i), int(partner[i])) for i in conflicts]
    has_margin = np.isfinite(facts["margin"])
    if has_margin.any():
        without = rows[~has_margin].tolist()
        kind = "missing_margin"
        findings += [Finding(row, kind, KINDS[kind].severity, "no margin") for row in without]
    for near in near_duplicates(texts, processes=processes):
        if near.index not in told:
            alike = f", {near.similarity:.0%} alike"
            findings.append(_finding(rows, "near_duplicate", near.index, near.original, alike))
    return findings


def overlap(train: Facts, held_out: Facts) -> list[Finding]:
    """Training rows whose prompt is among the held-out rows."""
    shared = np.flatnonzero(np.isin(train["prompt"], held_out["prompt"]))
    where = {
        int(prompt): int(row)
        for prompt, row in zip(held_out["prompt"], held_out["row"], strict=True)
    }
    return [
        Finding(
            int(train["row"][i]),
            "split_overlap",
            KINDS["split_overlap"].severity,
            f"the prompt of held-out row {where[int(train['prompt'][i])]}",
        )
        for i in shared
    ]


def figures(facts: Facts, sample: list[str]) -> dict[str, Any]:
    """Lengths, turns, repeated prompts, languages, and how much longer chosen answers are.

    Args:
        facts: of the records.
        sample: some of their texts, for the languages.
    """
    found: dict[str, Any] = {
        "records": len(facts),
        "examples": int(facts["examples"].sum()),
        "prompts": len(np.unique(facts["prompt"])),
        "languages": language.mix(sample),
    }
    if not len(facts):
        return found
    is_pair = bool(facts["rejected_chars"].any())
    names = {"prompt_chars": "prompt", "answer_chars": "chosen" if is_pair else "answer"}
    names |= {"rejected_chars": "rejected"} if is_pair else {}
    found["chars"] = {
        name: dict(
            zip(map(str, _QUANTILES), np.percentile(facts[key], _QUANTILES).tolist(), strict=True)
        )
        for key, name in names.items()
    }
    turns, counts = np.unique(facts["turns"], return_counts=True)
    found["turns"] = {str(n): int(count) for n, count in zip(turns, counts, strict=True)}
    if is_pair:
        found["length_gap"] = _length_gap(facts)
    return found


def _length_gap(facts: Facts) -> dict[str, float | None]:
    """Chosen − rejected in characters, and how well length alone tells which is chosen.

    `correlation` is the point-biserial one between being chosen and the log of the length, within
    pairs (each pair centred): 0 when length tells nothing, 1 when the longer one always wins by the same factor.
    """
    chosen, rejected = (facts[key].astype(float) for key in ("answer_chars", "rejected_chars"))
    gap, half = chosen - rejected, (np.log1p(chosen) - np.log1p(rejected)) / 2
    spread = float(np.sqrt((half**2).mean()))
    margins = facts["margin"]
    told = np.isfinite(margins)
    with_margin = None
    if told.sum() > 2 and margins[told].std() > 0 and gap[told].std() > 0:
        with_margin = float(np.corrcoef(gap[told], margins[told])[0, 1])
    return {
        "mean": float(gap.mean()),
        "standard_error": float(gap.std(ddof=1) / len(gap) ** 0.5) if len(gap) > 1 else None,
        "chosen_is_longer": float((gap > 0).mean()),
        "correlation": float(half.mean() / spread) if spread else 0.0,
        "correlation_with_margin": with_margin,
    }


def _first(values: Facts) -> Facts:
    """For each place, the first place with the same value."""
    _, first, inverse = np.unique(values, return_index=True, return_inverse=True)
    return np.asarray(first[inverse])


def _finding(rows: Facts, kind: str, index: int, original: int, more: str = "") -> Finding:
    detail = f"row {int(rows[original])}{more}"
    return Finding(int(rows[index]), kind, KINDS[kind].severity, detail)
