"""What judging programs costs, and whether verdicts are right, on HumanEval's own solutions.

Usage: HF_ALLOW_CODE_EVAL=1 python scripts/bench_sandbox.py HUMANEVAL.jsonl[.gz]
"""

import os
import sys
import time
from typing import Any

from conf.schema import Data
from reward.answers import Answer
from reward.readers import parse
from reward.sandbox import run
from reward.sources import open_rows
from reward.verifiers.code import code

_WRONG = "{solution}\n_right = {name}\ndef {name}(*args):\n    return (_right(*args),)\n"


def main(path: str) -> None:
    """Judge each solution; each with its result wrapped in a tuple; each prompt alone; and run a program often."""
    rows = [parse(raw) for _, raw in open_rows(Data(source=path), "data")]
    solutions = [row["prompt"] + row["canonical_solution"] for row in rows]
    wrapped = [
        _WRONG.format(solution=text, name=row["entry_point"])
        for row, text in zip(rows, solutions, strict=True)
    ]
    print(f"{len(rows)} problems, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}")
    _judge("solutions", rows, solutions)
    _judge("wrapped", rows, wrapped)
    _judge("empty", rows, [row["prompt"] for row in rows])
    start = time.perf_counter()
    for _ in range(30):
        run("print(1)")
    print(f"{'print(1)':<10} {30 / (time.perf_counter() - start):5.1f} runs/s, one at a time")


def _judge(name: str, rows: list[dict[str, Any]], texts: list[str]) -> None:
    start = time.perf_counter()
    scores = code([Answer([], text, facts=row) for row, text in zip(rows, texts, strict=True)])
    speed = len(rows) / (time.perf_counter() - start)
    print(f"{name:<10} {speed:5.1f} answers/s, {scores.count(1.0)} of {len(scores)} pass")


if __name__ == "__main__":
    main(*sys.argv[1:])
