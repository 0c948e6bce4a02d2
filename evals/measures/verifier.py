"""The process behind `evals.measures.maths`: a line of JSON in, `true` or `false` out. Started by that module."""

import json
import logging
import resource
import sys

from evals.measures.maths import texts_of

MEMORY = 4 * 2**30  # bytes of address space; sympy would take all there are for 10^{10^{10}}
_SECONDS = 2  # math-verify's own limit, by a signal, for what can be interrupted


def main() -> None:
    """Answer questions until the input ends."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    logging.disable()
    import math_verify  # noqa: F401

    print("true", flush=True)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            found = holds(**question)
        except (MemoryError, RecursionError):
            found = False
        print(json.dumps(found), flush=True)


def holds(reference: str, answer: str | None = None) -> bool:
    """Whether the reference can be read or, beside an answer, equals it."""
    from math_verify import verify

    expected = _parsed(reference)
    if answer is None:
        return bool(expected)
    return bool(verify(expected, _parsed(answer), timeout_seconds=_SECONDS))


def _parsed(text: str) -> list[object]:
    """Values and texts that math-verify finds; empty if none."""
    from math_verify import parse

    readings = (parse(reading, parsing_timeout=_SECONDS) for reading in texts_of(text))
    return next((found for found in readings if found), [])


if __name__ == "__main__":
    main()
