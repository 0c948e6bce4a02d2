"""How fast near-duplicates are found, in how much memory, and how many of those planted.

python scripts/bench_duplicates.py prefs.jsonl.gz --processes 2

Rows are sentences of real rows put together at random. Some that are short come out nearly the
same by chance; precision counts these as mistakes.
"""

import argparse
import gzip
import json
import os
import platform
import random
import re
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa

from reward.duplicates import (
    SEPARATOR,
    jaccard,
    near_duplicates,
    normalised_fields,
    shingles,
    whole,
)

SHARE_PLANTED = 0.01
FIELDS = ("prompt", "chosen", "rejected")


class PeakMemory:
    """The most memory (bytes) that this process and its children hold at once."""

    def __enter__(self) -> "PeakMemory":
        self.resident = 0
        self._is_over = threading.Event()
        self._watch = threading.Thread(target=self._run)
        self._watch.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._is_over.set()
        self._watch.join()

    def _run(self) -> None:
        own = psutil.Process()
        while not self._is_over.wait(0.05):
            total = 0
            for process in [own, *own.children(recursive=True)]:
                try:
                    total += process.memory_info().rss
                except psutil.NoSuchProcess:
                    continue
            self.resident = max(self.resident, total)


def text_of(field: Any) -> str:
    return field if isinstance(field, str) else "\n".join(turn["content"] for turn in field)


def recombined(real: list[dict[str, Any]], rng: random.Random) -> Iterator[list[str]]:
    """Rows with as many sentences in each field as a real row has, each from anywhere."""
    split = re.compile(r"(?<=[.!?\n])\s+").split
    rows = [[split(text_of(row[field])) for field in FIELDS] for row in real]
    sentences = sorted({s for row in rows for field in row for s in field if s.strip()})
    while True:
        row = rng.choice(rows)
        yield [" ".join(rng.choices(sentences, k=len(field))) for field in row]


def edited(fields: list[str], rng: random.Random) -> list[str]:
    """A near-duplicate: some words swapped, dropped or in capitals."""
    share = rng.choice([0.01, 0.02, 0.03, 0.05])
    changed = []
    for field in fields:
        words = field.split()
        for _ in range(max(1, round(share * len(words)))):
            place = rng.randrange(len(words)) if words else 0
            kind = rng.choice(["swap", "drop", "case"])
            if kind == "swap" and place + 1 < len(words):
                words[place], words[place + 1] = words[place + 1], words[place]
            elif kind == "drop" and len(words) > 1:
                del words[place]
            elif words:
                words[place] = words[place].upper()
        changed.append(" ".join(words))
    return changed


def write(path: Path, count: int, real: list[dict[str, Any]]) -> dict[int, tuple[int, float]]:
    """Writes a corpus; returns its planted rows: row → original and exact similarity."""
    rng = random.Random(count)
    fresh = recombined(real, rng)
    planted: dict[int, tuple[int, float]] = {}
    recent: dict[int, list[str]] = {}

    def rows() -> Iterator[str]:
        for row in range(count):
            if recent and rng.random() < SHARE_PLANTED:
                original, fields = recent.popitem()
                copy = edited(fields, rng)
                sets = [
                    shingles(whole(normalised_fields(SEPARATOR.join(texts))))
                    for texts in (fields, copy)
                ]
                planted[row] = original, jaccard(*sets)
                yield SEPARATOR.join(copy)
                continue
            fields = next(fresh)
            if rng.random() < 2 * SHARE_PLANTED:
                recent[row] = fields
            yield SEPARATOR.join(fields)

    schema = pa.schema([("text", pa.string())])
    source = rows()
    with pa.ipc.new_file(str(path), schema) as file:
        while batch := list(islice(source, 10_000)):
            file.write_batch(pa.record_batch([pa.array(batch, pa.string())], schema=schema))
    return planted


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preferences", type=Path, help="JSON lines with prompt, chosen, rejected")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[10_000, 20_000, 50_000, 100_000, 200_000]
    )
    options = parser.parse_args()
    with gzip.open(options.preferences, "rt", encoding="utf-8") as file:
        real = [json.loads(line) for line in file]
    print(f"{processor()}, {os.cpu_count()} cores; {options.processes} processes", flush=True)
    print("| rows | seconds | rows/s | peak MiB | planted | recall ≥ 0.7 | ≥ 0.8 | precision |")
    print("| --: | --: | --: | --: | --: | --: | --: | --: |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for count in options.rows:
            path = Path(folder) / f"{count}.arrow"
            planted = write(path, count, real)
            with PeakMemory() as memory:
                start = time.perf_counter()
                found = near_duplicates(path, processes=options.processes)
                seconds = time.perf_counter() - start
            path.unlink()
            pairs = {(match.index, match.original) for match in found}
            truth = {
                least: {(row, first) for row, (first, alike) in planted.items() if alike >= least}
                for least in (0.0, 0.7, 0.8)
            }
            recall = [len(truth[least] & pairs) / len(truth[least]) for least in (0.7, 0.8)]
            precision = len(pairs & truth[0.0]) / len(pairs)
            print(
                f"| {count:,} | {seconds:.1f} | {count / seconds:,.0f} "
                f"| {memory.resident / 2**20:,.0f} | {len(planted):,} | {recall[0]:.4f} "
                f"| {recall[1]:.4f} | {precision:.4f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
