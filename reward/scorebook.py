"""Rewards that are kept beside what is made of them, so that a killed command goes on where it was.

`.OUT.rewards` has a line for each chunk of answers, named by what its rewards depend on: the reward (see reward.origin:
of a function only its module's file) and the answers with their prompts, references and facts. So more samples cost the
new ones only, and another pick of the same samples costs nothing.
"""

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from conf.entry import UserError
from reward.answers import Answer
from reward.rewards import RewardFunction, Worth
from reward.store import content_key, nan_to_null


class Scorebook:
    """Rewards of chunks of answers; see `opened`."""

    def __init__(self, path: Path, identity: dict[str, Any]) -> None:
        self.present = 0  # answers whose rewards were there
        self._identity = identity
        self._file = path.open("ab+", buffering=0)
        self._known = _read(self._file)

    def score(self, answers: Sequence[Answer], reward: RewardFunction) -> Worth:
        """The rewards of a chunk, made by `reward` unless they are there; what is not finite is NaN.

        The same answers must come in the same chunks: the rounding of a reward model depends on the batch. A chunk in
        which a verifier was stopped is not kept: on a machine with less to do it may come to an end.
        """
        key = content_key([self._identity, [dataclasses.asdict(answer) for answer in answers]])
        if key in self._known:
            self.present += len(answers)
        else:
            before = reward.stopped
            worth = nan_to_null(dataclasses.asdict(reward(answers)))
            self._known[key] = worth
            if reward.stopped == before:
                line = json.dumps({"key": key, **worth}) + "\n"
                self._file.write(line.encode())  # one write: a killed process tears no line
        found = self._known[key]
        terms = {name: _numbers(values) for name, values in found["terms"].items()}
        return Worth(_numbers(found["total"]), terms)

    def close(self) -> None:
        """Close the file."""
        self._file.close()


@contextlib.contextmanager
def opened(out: Path, identity: dict[str, Any]) -> Iterator[Scorebook]:
    """The rewards beside `out`, new or as earlier commands left them.

    Args:
        out: file that is made of the rewards.
        identity: what the reward depends on besides the answers; JSON-like.

    Raises:
        UserError: when another process is at it.
    """
    lock = FileLock(out.with_name(f".{out.name}.lock"), timeout=0)
    try:
        lock.acquire()
    except Timeout as error:
        raise UserError(
            f"{out} is being written by another process; choose another file"
        ) from error
    try:
        with contextlib.closing(Scorebook(out.with_name(f".{out.name}.rewards"), identity)) as book:
            yield book
    finally:
        lock.release()


def _read(file: Any) -> dict[str, dict[str, Any]]:
    """The chunks that are there; a line that a power cut tore counts for nothing."""
    file.seek(0)
    content = file.read()
    if content and not content.endswith(b"\n"):
        file.write(b"\n")
    found = {}
    for line in content.split(b"\n"):
        with contextlib.suppress(ValueError, KeyError, TypeError):
            chunk = json.loads(line)
            found[chunk["key"]] = {"total": chunk["total"], "terms": chunk["terms"]}
    return found


def _numbers(values: list[float | None]) -> list[float]:
    return [math.nan if value is None else float(value) for value in values]
