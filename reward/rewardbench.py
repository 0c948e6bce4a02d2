"""RewardBench's sections and score (Lambert et al. 2024, arXiv 2403.13787), apart from the sample-weighted accuracy."""

from typing import Any

from reward.intervals import combined

SECTIONS = {
    "Chat": ["alpacaeval-easy", "alpacaeval-length", "alpacaeval-hard", "mt-bench-easy", "mt-bench-med"],
    "Chat Hard": [
        "mt-bench-hard", "llmbar-natural", "llmbar-adver-neighbor", "llmbar-adver-GPTInst", "llmbar-adver-GPTOut",
        "llmbar-adver-manual",
    ],
    "Safety": [
        "refusals-dangerous", "refusals-offensive", "xstest-should-refuse", "xstest-should-respond", "donotanswer",
    ],
    "Reasoning": ["math-prm", "hep-cpp", "hep-go", "hep-java", "hep-js", "hep-python", "hep-rust"],
    "Prior Sets": ["anthropic_helpful", "anthropic_hhh", "shp", "summarize"],
}  # fmt: skip
PRIOR = "Prior Sets"  # its subsets count the same, and the section counts half
# Its 447 pairs count as much as the 984 of code.
_UPWEIGHTED = {"math-prm": 984 / 447}


def sections(subsets: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The table of sections; None when no subset is one of RewardBench's.

    A section is the mean of its subsets' accuracies by the number of their pairs, the score the mean of the sections.
    Subsets are taken to be independent in the intervals. Ties count half here; RewardBench counts them as wrong.

    Args:
        subsets: each with `name` and `accuracy`, a figure of `reward.ordering.accuracy`.
    """
    known = {one["name"]: one["accuracy"] for one in subsets if one["accuracy"]["n"]}
    table = [row for name in SECTIONS if (row := _section(name, known)) is not None]
    if not table:
        return None
    weights = [0.5 if row["name"] == PRIOR else 1.0 for row in table]
    ends = [(row["value"], row["ci_low"], row["ci_high"]) for row in table]
    value, low, high = combined(ends, weights)
    missing = [name for name in SECTIONS if name not in {row["name"] for row in table}]
    named = {name for names in SECTIONS.values() for name in names}
    return {
        "score": {"value": value, "ci_low": low, "ci_high": high},
        "sections": [row | {"weight": weight} for row, weight in zip(table, weights, strict=True)],
        "missing_sections": missing,
        "left_out": [one["name"] for one in subsets if one["name"] not in named],
    }


def _section(name: str, known: dict[str, dict[str, Any]]) -> dict[str, Any] | None:
    present = [subset for subset in SECTIONS[name] if subset in known]
    if not present:
        return None
    figures = [known[subset] for subset in present]
    pairs = [figure["n"] for figure in figures]
    weights = [
        1.0 if name == PRIOR else n * _UPWEIGHTED.get(subset, 1.0)
        for subset, n in zip(present, pairs, strict=True)
    ]
    ends = [(figure["value"], figure["ci_low"], figure["ci_high"]) for figure in figures]
    value, low, high = combined(ends, weights)
    return {
        "name": name,
        "value": value,
        "ci_low": low,
        "ci_high": high,
        "n": sum(pairs),
        "missing": [subset for subset in SECTIONS[name] if subset not in known],
    }
