"""Whether an answer is mathematically equal to a reference.

math-verify (Hugging Face) parses and compares, in a process of its own: `10^{10^{10}}` can hold sympy in one call
that no signal interrupts, or take all memory. Nothing of an answer is evaluated as code.
"""

import contextlib
import json
import os
import re
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

SECONDS = 10  # for one comparison, which normally takes some hundredths
_POWER = re.compile(r"\*\*\s*(\w+)")  # Python's way of writing it
_START_SECONDS = 120  # for the imports of the process


def equivalent(answers: Sequence[str], references: Sequence[Sequence[str]]) -> list[float | None]:
    """1 where the answer equals a reference as a number, fraction, set, interval or expression.

    The last boxed or marked answer of a text counts, or its last number or formula; after `####` (GSM8K) what follows.
    An answer that cannot be read, or not be compared in time, is 0; a reference that cannot be read is a gap.
    """
    with contextlib.closing(_Verifier()) as verifier:
        pairs = zip(answers, references, strict=True)
        return [_verdict(verifier, answer, texts) for answer, texts in pairs]


def _verdict(verifier: "_Verifier", answer: str, references: Sequence[str]) -> float | None:
    readable = [text for text in references if verifier.ask(reference=text)]
    if not readable:
        return None
    return float(any(verifier.ask(reference=text, answer=answer) for text in readable))


class _Verifier:
    """The process, started when it is first asked, and again after it had to be stopped."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, **question: str) -> bool:
        """Whether the reference can be read or, beside an answer, equals it; False when that takes too long."""
        process = self._process = self._process or _started()
        assert process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
            if line := _line(process, SECONDS):
                return bool(json.loads(line))
        self.close()
        return False

    def close(self) -> None:
        """Stop the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def _started() -> subprocess.Popen[bytes]:
    root = str(Path(__file__).parents[2])  # where this package is, whatever the working directory
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    process = subprocess.Popen(
        [sys.executable, "-m", "evals.measures.verifier"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
    )
    if not _line(process, _START_SECONDS):
        process.kill()
        process.communicate()
        raise RuntimeError(
            "the process that compares mathematics does not start: is math-verify installed?"
        )
    return process


def _line(process: subprocess.Popen[bytes], seconds: float) -> bytes:
    """The next line of the process; empty when it has ended or takes longer."""
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        return process.stdout.readline() if selector.select(seconds) else b""


def texts_of(text: str) -> Iterator[str]:
    """The readings of a text to try in turn: what follows its last `####`, as a formula if it is nothing but one."""
    *_, final = text.rpartition("####")
    final = final.strip().replace("\\%", "%")
    is_marked = any(mark in final for mark in ("$", "\\(", "\\[", "\\boxed"))
    is_prose = any(word.isalpha() and len(word) > 1 for word in final.split())
    is_number = all(sign in "0123456789+-*^.,/% " for sign in final)
    if final and not (is_marked or is_prose or is_number or "\n" in final):
        formula = _POWER.sub(r"^{\1}", final)
        yield f"${formula}$"
    yield final
