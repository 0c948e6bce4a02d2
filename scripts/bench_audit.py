"""How fast rows are read, normalised and audited, on one core and in all, and how the cost grows.

python scripts/bench_audit.py prefs.jsonl.gz
"""

import argparse
import gzip
import json
import os
import random
import tempfile
import time
from itertools import islice
from pathlib import Path

from bench_duplicates import FIELDS, PeakMemory, processor, recombined

from conf.schema import Data
from reward import data, sources
from reward.ingest import Reading, read


def write(path: Path, count: int, real: list[dict[str, object]]) -> None:
    """Preference rows in the conversational form, as long as the real ones."""
    roles = ("user", "assistant", "assistant")
    with path.open("w", encoding="utf-8") as file:
        for texts in islice(recombined(real, random.Random(count)), count):
            turns = zip(FIELDS, roles, texts, strict=True)
            row = {field: [{"role": role, "content": text}] for field, role, text in turns}
            file.write(json.dumps(row, ensure_ascii=False) + "\n")


def on_one_core(path: Path) -> float:
    """CPU seconds to parse, normalise and look through a row in this process."""
    numbered = enumerate(sources.open_rows(Data(source=str(path)), "data"))
    reading = Reading(format="preference")
    read(list(islice(numbered, 1000)), reading)  # loads libraries, which takes half a second
    start, rows = time.process_time(), 0
    while chunk := list(islice(numbered, 4000)):
        read(chunk, reading)
        rows += len(chunk)
    return (time.process_time() - start) / rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("preferences", type=Path, help="JSON lines with prompt, chosen, rejected")
    parser.add_argument(
        "--rows", type=int, nargs="+", default=[10_000, 20_000, 50_000, 100_000, 200_000]
    )
    options = parser.parse_args()
    with gzip.open(options.preferences, "rt", encoding="utf-8") as file:
        real = [json.loads(line) for line in file]
    print(f"{processor()}, {os.cpu_count()} cores", flush=True)
    print("| rows | MB | rows/s on one core | whole audit s | rows/s | peak MiB |")
    print("| --: | --: | --: | --: | --: | --: |", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for count in options.rows:
            path = Path(folder) / f"{count}.jsonl"
            write(path, count, real)
            alone = on_one_core(path)
            with PeakMemory() as memory, tempfile.TemporaryDirectory() as scratch:
                start = time.perf_counter()
                data.examine(Data(source=str(path)), "preference", Path(scratch))
                seconds = time.perf_counter() - start
            size = path.stat().st_size / 1e6
            path.unlink()
            print(
                f"| {count:,} | {size:,.0f} | {1 / alone:,.0f} | {seconds:.1f} "
                f"| {count / seconds:,.0f} | {memory.resident / 2**20:,.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
