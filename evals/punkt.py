"""NLTK's model of sentences and words (punkt_tab), which some checks of IFEval need and lm-eval downloads on import."""

import importlib.util
from typing import Any

from conf.entry import UserError
from evals.generated import facts_of
from reward import network

# Instructions whose checks cut text into sentences or words; the others count with regular expressions.
NEEDED_BY = {"length_constraints:number_sentences", "change_case:capital_word_frequency"}


def spare_downloads() -> None:
    """Offline, keep lm-eval's IFEval from trying to download the model when it is imported."""
    if network.is_closed() and importlib.util.find_spec("nltk"):
        import nltk

        nltk.download = lambda *_, **__: False


def require(name: str, tasks: dict[str, Any], documents: dict[str, list[int]]) -> None:
    """Refuse a task that would fail for want of the model after all its answers are generated; fetch it if allowed.

    Args:
        name: what the suite calls the task, for the message.
        tasks: lm-eval's tasks by name.
        documents: numbers of the documents that are scored, by task.

    Raises:
        UserError: when the model is needed, not here, and cannot be fetched.
    """
    if not any(_needs(task.eval_docs, documents[leaf]) for leaf, task in tasks.items()):
        return
    import nltk

    try:
        nltk.data.find("tokenizers/punkt_tab")
    except LookupError as missing:
        if network.is_closed() or not nltk.download("punkt_tab", quiet=True):
            raise UserError(
                f"task {name} needs NLTK's punkt_tab, which is not here and cannot be fetched. Where there is a "
                "network: python -m evals.prefetch with this suite; or copy the folder nltk_data/tokenizers/punkt_tab"
            ) from missing


def _needs(rows: Any, numbers: list[int]) -> bool:
    if {"instruction_id_list", "facts"}.isdisjoint(getattr(rows, "column_names", None) or ()):
        return False
    instructions = (facts_of(rows[number]).get("instruction_id_list") or [] for number in numbers)
    return any(not NEEDED_BY.isdisjoint(names) for names in instructions)
