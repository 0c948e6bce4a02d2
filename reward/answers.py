"""An answer as rewards see it, and what a reward is."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

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
