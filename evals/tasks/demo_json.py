"""lm-eval's hooks for the demo's held-out prompts."""

from typing import Any

import datasets

from reward.demo import held_out, score


def documents(count: int, **_: Any) -> datasets.DatasetDict:
    """The held-out prompts as lm-eval's dataset."""
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(held_out(count))})


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Scores of one answer."""
    return score(results[0].strip(), doc["reference"])
