"""An answer as rewards see it, and what a reward is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from reward.records import Prompt
from reward.turns import Message


@dataclass(frozen=True)
class Answer:
    """What an assistant wrote after a prompt, with what is known about the right answer."""

    prompt: list[Message]
    text: str
    references: Sequence[str] = ()  # right answers; a verifier takes the best match
    # further columns of the prompt's row, such as `schema`, `instruction_id_list` or `tests`
    facts: Mapping[str, Any] = field(default_factory=dict)
    tools: list[Any] | None = None
    tokens: int | None = None  # that were generated, where it is known
    is_ended: bool | None = None  # whether the model ended by itself; None: unknown


# Scores of answers, higher is better. NaN: nothing can be said of this one, which is never a zero.
Scoring = Callable[[Sequence[Answer]], list[float]]


def answers_of(
    prompt: Prompt,
    texts: Sequence[str],
    tokens: Sequence[int | None] | None = None,
    is_ended: Sequence[bool | None] | None = None,
) -> list[Answer]:
    """What was written after a prompt, as answers to it.

    Args:
        prompt: with its references and facts.
        texts: (n,) completions.
        tokens: (n,) their lengths, where they are known.
        is_ended: (n,) whether the model ended each by itself, where that is known.
    """
    unknown = [None] * len(texts)
    return [
        Answer(prompt.prompt, text, prompt.references, prompt.facts, prompt.tools, count, end)
        for text, count, end in zip(texts, tokens or unknown, is_ended or unknown, strict=True)
    ]
