"""How long an answer is, how it is laid out, and whether it came to its end."""

import math
from collections.abc import Iterator, Sequence

from conf.entry import UserError
from reward.answers import Answer


def length(
    answers: Sequence[Answer],
    *,
    max_tokens: int | None = None,
    soft_tokens: int = 0,
    min_chars: int | None = None,
    max_chars: int | None = None,
    min_words: int | None = None,
    max_words: int | None = None,
) -> list[float]:
    """0 where the answer is as long as it may be, down to −1 where it is not: the worst of the limits that are set.

    In tokens, the soft overlong punishment of DAPO (Yu et al. 2025, arXiv 2503.14476, equation 13): 0 up to
    `max_tokens - soft_tokens`, then falling in a line to −1 at `max_tokens`. In characters and words (between spaces),
    −1 outside of the limits. NaN where `max_tokens` is set and the number of tokens is not known.

    Args:
        max_tokens: L_max of the paper.
        soft_tokens: L_cache of the paper; 0: no soft part.
        min_chars: least characters; likewise the next three.

    Raises:
        UserError: when no limit is set, or one makes no sense.
    """
    limits = {
        "max_tokens": max_tokens,
        "min_chars": min_chars,
        "max_chars": max_chars,
        "min_words": min_words,
        "max_words": max_words,
    }
    _check_limits(limits, soft_tokens)

    def penalties(answer: Answer) -> Iterator[float]:
        if max_tokens is not None:
            yield _overlong(answer.tokens, max_tokens, soft_tokens)
        yield _outside(len(answer.text), min_chars, max_chars)
        if min_words is not None or max_words is not None:
            yield _outside(len(answer.text.split()), min_words, max_words)

    return [_least(list(penalties(answer))) for answer in answers]


def _check_limits(limits: dict[str, int | None], soft_tokens: int) -> None:
    given = {name: value for name, value in limits.items() if value is not None}
    if not given:
        raise UserError(f"length: set at least one of {', '.join(limits)}")
    for name, value in (given | {"soft_tokens": soft_tokens}).items():
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise UserError(f"length: {name}={value!r} must be a whole number, 0 or more")
    if soft_tokens > given.get("max_tokens", 0):
        raise UserError(f"length: soft_tokens={soft_tokens} must be at most max_tokens")
    for unit in ("chars", "words"):
        if given.get(f"min_{unit}", 0) > given.get(f"max_{unit}", math.inf):
            raise UserError(f"length: min_{unit} is more than max_{unit}: no answer fits")


def _overlong(tokens: int | None, most: int, soft: int) -> float:
    """Equation 13 of DAPO; at soft=0 the line is a step."""
    if tokens is None:
        return math.nan
    over = tokens - (most - soft)
    if over <= 0:
        return 0.0
    return -over / soft if tokens <= most else -1.0


def _outside(size: int, least: int | None, most: int | None) -> float:
    is_inside = (least is None or size >= least) and (most is None or size <= most)
    return 0.0 if is_inside else -1.0


def _least(values: list[float]) -> float:
    """The minimum; NaN where one is unknown, unless another is the worst there can be."""
    if -1.0 in values or not any(map(math.isnan, values)):
        return min(value for value in values if not math.isnan(value))
    return math.nan


def layout(
    answers: Sequence[Answer],
    *,
    sections: Sequence[str] = ("think", "answer"),
    opened: bool = False,
    rest: bool = False,
) -> list[float]:
    """1 where the answer is its sections in their order, each once: <think>…</think><answer>…</answer>.

    Only spaces may stand before, between and after them, and something must stand in each.

    Args:
        sections: names of the tags.
        opened: the prompt ends with the first section's opening tag, so the answer begins inside it.
        rest: further text may follow the last section, and must not be blank.

    Raises:
        UserError: when there is no section, or one twice.
    """
    if isinstance(sections, str) or not sections or len(set(sections)) < len(sections):
        raise UserError(f"format: sections={sections!r} must be a list of different names")
    if not all(isinstance(name, str) and name.strip() == name != "" for name in sections):
        raise UserError(f"format: sections={sections!r} must be names of tags")
    return [float(_is_laid_out(answer.text, sections, opened, rest)) for answer in answers]


def _is_laid_out(text: str, sections: Sequence[str], opened: bool, rest: bool) -> bool:
    """In one pass from left to right, in which nothing can backtrack."""
    tags = [tag for name in sections for tag in (f"<{name}>", f"</{name}>")]
    left = tags[0] + text if opened else text
    for start, end in zip(tags[::2], tags[1::2], strict=True):
        before, _, left = left.partition(start)
        inside, found, left = left.partition(end)
        if before.strip() or not found or not inside.strip() or any(tag in inside for tag in tags):
            return False
    return bool(left.strip()) == rest and not any(tag in left for tag in tags)


def ended(answers: Sequence[Answer]) -> list[float]:
    """0 where the model ended its answer by itself, −1 where it was cut off; NaN where that is not known."""
    return [
        math.nan if answer.is_ended is None else float(answer.is_ended) - 1 for answer in answers
    ]
