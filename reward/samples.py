"""Completions of prompts, as `python -m evals.sample` writes them: drawn by it, or read from a file."""

import dataclasses
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.entry import UserError, plain
from conf.schema import Ranking, Sampling, Source
from reward import child
from reward.answers import Answer
from reward.prompts import Asked, key_of
from reward.readers import parse
from reward.sources import open_rows
from reward.turns import BadRow, Message, Row, check_order, kind_of, list_of, tools_of, turns_of

_EVERY = 0.5  # seconds between two looks at how many prompts are done


@dataclass(frozen=True)
class Completion:
    """What a model wrote after a prompt."""

    text: str
    place: str  # such as `samples.jsonl:17#2`, the second one of line 17
    tokens: int | None = None  # that were generated
    finish: str | None = None  # "eos": the model ended it; "length": it was cut off

    @property
    def is_cut(self) -> bool:
        """Whether the limit on tokens ended it."""
        return self.finish == "length"


@dataclass(frozen=True)
class Sample:
    """A prompt with its completions."""

    asked: Asked
    completions: list[Completion]

    def answers(self) -> list[Answer]:
        """The completions as rewards see them."""
        return [
            self.asked.answered(
                item.text, item.tokens, None if item.finish is None else not item.is_cut
            )
            for item in self.completions
        ]


def check_sampling(config: Sampling) -> None:
    """Refuse numbers that mean nothing.

    Raises:
        UserError: naming the key.
    """
    for name in ("n", "max_new_tokens", "batch_size", "limit"):
        number = getattr(config, name)
        if number is not None and number < 1:
            raise UserError(f"{name}={number} must be at least 1")
    if not 0 <= config.temperature < math.inf:
        raise UserError(f"temperature={config.temperature} must be 0 or a positive number")
    if not 0 < config.top_p <= 1:
        raise UserError(f"top_p={config.top_p} must be above 0 and at most 1")
    if config.temperature == 0 and config.n > 1:
        raise UserError(
            f"temperature=0 would write {config.n} equal completions of each prompt: set n=1, or a temperature"
        )


def draw(config: Ranking, out: Path, prompts: int) -> None:
    """Draw the completions that `out` does not hold yet, with `python -m evals.sample`.

    Args:
        config: its sampling keys are passed on.
        out: file of completions.
        prompts: how many there are, for the progress.

    Raises:
        UserError: when it fails, with its message.
    """
    from tqdm import tqdm

    names = [field.name for field in dataclasses.fields(Sampling) if field.name != "out"]
    values = {name: plain(getattr(config, name)) for name in names}
    rows = _Rows(out)
    with tqdm(total=prompts, unit="prompt", desc="sample", disable=None) as bar:
        child.run(
            "evals.sample",
            child.overrides({**values, "out": str(out)}),
            "the completions could not be drawn",
            _EVERY,
            lambda: bar.update(rows.new()),
        )


class _Rows:
    """How many lines have come to a file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end = 0

    def new(self) -> int:
        if not self._path.exists():
            return 0
        with self._path.open("rb") as file:
            file.seek(self._end)
            content = file.read()
        self._end += len(content)
        return content.count(b"\n")


def read_samples(
    path: str, known: Mapping[str, Asked] | None, counts: Counter[str]
) -> Iterator[Sample]:
    """The samples in a file, in its order.

    Args:
        path: file of `evals.sample`.
        known: the prompts of the source, see `reward.prompts`; samples of other prompts are left out. None: nothing is
            known of any prompt.
        counts: counts them as `other_prompts`.

    Raises:
        UserError: at a row that cannot be read, with its place.
    """
    for place, raw in open_rows(Source(source=path), "samples"):
        try:
            sample = sample_of(parse(raw), place)
        except BadRow as error:
            if error.kind == "blank_line":
                continue
            raise UserError(f"{place}: {error}") from error
        if known is not None:
            asked = known.get(key_of(sample.asked.prompt, sample.asked.tools))
            if asked is None:
                counts["other_prompts"] += 1
                continue
            sample = Sample(asked, sample.completions)
        yield sample


def sample_of(row: Row, place: str) -> Sample:
    """The prompt and the completions of a row.

    Raises:
        BadRow: when it is no row of `evals.sample`.
    """
    prompt = turns_of(row, "prompt")
    _check_prompt(prompt)
    completions = []
    for number, item in enumerate(list_of(row, "completions"), 1):
        text = item.get("text") if isinstance(item, dict) else item
        if not isinstance(item, dict) or not isinstance(text, str):
            raise BadRow(f"completion {number} is {kind_of(text)}, expected an object with text")
        tokens = item.get("tokens")
        if tokens is not None and type(tokens) is not int:
            raise BadRow(
                f"'tokens' of completion {number} is {kind_of(tokens)}, expected a whole number"
            )
        completions.append(Completion(text, f"{place}#{number}", tokens, item.get("finish")))
    return Sample(Asked(prompt, tools_of(row)), completions)


def _check_prompt(prompt: list[Message]) -> None:
    check_order(prompt, "'prompt': ")
    if (role := prompt[-1]["role"]) not in ("user", "tool"):
        raise BadRow(f"'prompt' ends with role {role!r}, expected user or tool", "bad_role_order")


def settings_of(path: Path) -> dict[str, Any] | None:
    """How the samples at `path` were made, where their manifest says so."""
    from reward.store import read_json

    try:
        found = read_json(path.with_name(f"{path.name}.manifest.json"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None
