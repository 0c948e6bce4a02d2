"""What the text checks cost: microseconds a row and rows a second, on the rows of a data file.

Usage: python scripts/bench_text_checks.py FILE [REPEATS]
"""

import os
import platform
import sys
import time
from collections.abc import Callable
from typing import Any

from conf.schema import Data
from reward import language, private
from reward.readers import parse
from reward.sources import open_rows

_PROMPTS = ("prompt", "instruction", "input", "question", "messages", "content")
_ANSWERS = ("chosen", "rejected", "output", "answer", "completion")


def main(path: str, repeats: int = 3) -> None:
    """Time each check on one core, the best of some repeats after one that loads libraries."""
    rows = [parse(raw) for _, raw in open_rows(Data(source=path), "data")]
    texts = [text for row in rows for text in _texts(row)]
    answers = [_texts(row[key])[-1] for row in rows for key in _ANSWERS if row.get(key)]
    size = sum(map(len, texts)) / len(rows)
    print(f"{platform.machine()}, {_processor()}, {os.cpu_count()} cores; one core is used")
    print(f"{path}: {len(rows):,} rows, {len(texts):,} texts, {size:,.0f} characters a row")
    print(f"{'check':<10}{'µs/row':>9}{'rows/s':>12}{'found':>8}")
    checks: dict[str, Callable[[], Any]] = {
        "private": lambda: private.find(texts),
        "mojibake": lambda: language.mojibake(texts),
        "refusals": lambda: language.refusals(answers),
    }
    total = 0.0
    for name, check in checks.items():
        seconds, found = _time(check, repeats)
        total += seconds
        _show(name, seconds, len(rows), len(found))
    _show("together", total, len(rows))
    seconds, languages = _time(lambda: language.mix(texts), repeats)
    print(f"languages of a sample of {sum(languages.values()):,}: {seconds:.2f} s, {languages}")


def _time(check: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    found = check()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        check()
        seconds.append(time.perf_counter() - start)
    return min(seconds), found


def _show(name: str, seconds: float, rows: int, found: int | str = "") -> None:
    print(f"{name:<10}{seconds / rows * 1e6:>9.2f}{rows / seconds:>12,.0f}{found:>8}")


def _texts(value: Any) -> list[str]:
    """The texts of a prompt, an answer or a row, of plain strings or messages."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        value = [value[key] for key in (*_PROMPTS, *_ANSWERS) if key in value]
    return [text for item in value or [] for text in _texts(item)]


def _processor() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.partition(":")[2].strip() for line in file if "model name" in line]
    except OSError:
        names = []
    return names[0] if names else platform.processor() or "processor unknown"


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3):
        sys.exit((__doc__ or "").strip())
    main(sys.argv[1], *map(int, sys.argv[2:]))
