"""The answers that a model has given so far, so that a killed evaluation goes on where it was.

Unlike a response cache, a file belongs to one result: it is named by the result's key, so no other model, setting or
version of the code ever sees it, and it goes when the result is complete.
"""

import json
import os
from collections import defaultdict, deque
from pathlib import Path
from typing import Any

from reward.store import content_key


def answers_file(cache: Path, key: str) -> Path:
    """Where the answers for the result of this key are kept until it is complete."""
    return cache / "answers" / f"{key}.jsonl"


class Answers:
    """Answers by request, on disk a line for each batch of the model.

    A batch is there whole or not at all. What is asked anew is then asked in the same batches as before, and floating
    point gives the same digits: padding, and so rounding, depends on what stands beside a request in its batch.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, deque[Any]] = defaultdict(deque)
        self._batch: list[tuple[str, Any]] = []
        self.count = 0
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            self._read()

    def _read(self) -> None:
        content = self._path.read_bytes()
        end = 0
        for line in content.splitlines(keepends=True):
            try:
                batch = json.loads(line) if line.endswith(b"\n") else None
            except ValueError:
                batch = None
            if (
                batch is None
            ):  # torn when the machine went down: this batch and all after it are asked anew
                break
            for key, answer in batch:
                self._known[key].append(answer)
            self.count += len(batch)
            end += len(line)
        os.truncate(self._path, end)

    def take(self, request: Any) -> Any:
        """The answer to a JSON-like request, or None. Equal requests take theirs in the order of asking."""
        answers = self._known.get(content_key(request))
        return answers.popleft() if answers else None

    def add(self, request: Any, answer: Any) -> None:
        """Remember an answer; `commit` makes it last."""
        self._batch.append((content_key(request), answer))

    def commit(self) -> None:
        """Write the answers since the last commit as one line."""
        if not self._batch:
            return
        with self._path.open("ab") as file:
            file.write(json.dumps(self._batch).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self._batch = []
