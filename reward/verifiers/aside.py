"""Questions whose answer may take for ever, or all memory, asked of a process that can be killed.

`10^{10^{10}}` can hold sympy in one call that no signal interrupts, and a pattern can backtrack for years. A process
is started at the first question, kept for the next ones (its imports take seconds), and ended with this one.
"""

import atexit
import contextlib
import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

from conf.entry import UserError

SECONDS = 10.0  # for one question, which normally takes some milliseconds
_START_SECONDS = 120.0  # for the imports of the process
_PIECE = 1 << 16  # bytes read or written at once

stopped: Counter[str] = (
    Counter()
)  # what took too long or too much, by module; on an idle machine it might not


class Unanswered(Exception):
    """A question that could not be decided: `problem` is the answering module's reason, or None if it was killed."""

    def __init__(self, problem: str | None = None) -> None:
        super().__init__(problem or "it took too long, or too much memory")
        self.problem = problem


class Aside:
    """A process that answers questions by the function `reply` of a module in this package."""

    def __init__(self, module: str) -> None:
        self._module = module
        self._lock = threading.Lock()  # one question at a time
        self._process: subprocess.Popen[bytes] | None = None
        self._owner = 0  # a forked child must not speak through its parent's pipes
        atexit.register(self.close)

    def ask(self, question: dict[str, Any], seconds: float | None = None) -> Any:
        """What `reply(**question)` returns, as JSON.

        Args:
            question: keyword arguments, JSON-like.
            seconds: limit; None: SECONDS.

        Raises:
            Unanswered: when the process had to be killed, or the question makes no sense to it.
            UserError: when the process cannot start.
        """
        limit = SECONDS if seconds is None else seconds
        with self._lock:
            process = self._running()
            line = json.dumps([limit, question]).encode() + b"\n"
            reply = _exchanged(process, line, limit)
            if not reply:
                self._kill()
        found: dict[str, Any] = json.loads(reply) if reply else {"stopped": True}
        if "problem" in found:
            raise Unanswered(found["problem"])
        if "stopped" in found:
            stopped[self._module] += 1
            raise Unanswered
        return found["answer"]

    def close(self) -> None:
        """End the process; the next question starts another."""
        with self._lock:
            self._kill()

    def _running(self) -> subprocess.Popen[bytes]:
        """The process; a new one where there is none, or where it was killed while nobody asked."""
        is_own = self._owner == os.getpid()
        if self._process is None or not is_own or self._process.poll() is not None:
            self._kill()
            self._process, self._owner = _started(self._module), os.getpid()
        return self._process

    def _kill(self) -> None:
        if self._process is not None and self._owner == os.getpid():
            self._process.kill()
            self._process.communicate()
        self._process = None


def _started(module: str) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])  # where this package is, whatever the working directory
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    one_thread = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # each reserves memory
    process = subprocess.Popen(
        [sys.executable, "-m", "reward.verifiers.answering", module],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | one_thread | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    os.set_blocking(process.stdin.fileno(), False)
    os.set_blocking(process.stdout.fileno(), False)
    if not _exchanged(process, b"", _START_SECONDS):
        process.kill()
        process.communicate()
        raise UserError(
            f"the process behind reward.verifiers.{module} does not start: is every requirement installed?"
            f" python -m reward.verifiers.answering {module} says what is missing"
        )
    return process


def _exchanged(process: subprocess.Popen[bytes], line: bytes, seconds: float) -> bytes:
    """Send a line, of any length, and read one; empty when the process has ended or takes longer."""
    assert process.stdin is not None
    assert process.stdout is not None
    until = time.monotonic() + seconds
    reply = b""
    with selectors.DefaultSelector() as selector, contextlib.suppress(BrokenPipeError):
        selector.register(process.stdout, selectors.EVENT_READ)
        if line:
            selector.register(process.stdin, selectors.EVENT_WRITE)
        while (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                if key.fileobj is process.stdin:
                    line = line[os.write(key.fd, line[:_PIECE]) :]
                    if not line:
                        selector.unregister(process.stdin)
                    continue
                piece = os.read(key.fd, _PIECE)
                reply += piece
                if not piece:
                    return b""
                if reply.endswith(b"\n"):
                    return reply
    return b""
