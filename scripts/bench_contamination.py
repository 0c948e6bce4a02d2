"""`python scripts/bench_contamination.py FILE --against FILES…`: what a look-up costs.

Prints the machine, the size and build time of the index, and the time for a row: the best of several
passes over the file's rows in batches of 1000, on one core.
"""

import argparse
import os
import platform
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from conf.entry import plainly
from conf.schema import Data
from reward.benchmarks import read_documents
from reward.contamination import Index
from reward.readers import parse
from reward.sources import open_rows

BATCH = 1000


def texts_in(value: Any) -> Iterator[str]:
    """All texts in a row."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from texts_in(item)


def processor() -> str:
    """The processor's name and the number of cores that this process may use."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if os.name == "posix" else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores"


def main() -> None:
    """Build an index, look rows up in it, print the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", help="training data: JSON Lines, JSON, CSV or Parquet")
    parser.add_argument("--against", nargs="+", required=True, help="benchmark files or folders")
    parser.add_argument("--passes", type=int, default=5)
    arguments = parser.parse_args()
    with plainly():
        documents = [item for path in arguments.against for item in read_documents(path)]
        rows = [parse(raw) for _, raw in open_rows(Data(source=arguments.file), "file")]
    texts = ["\n".join(texts_in(row)) for row in rows]
    started = time.perf_counter()
    index = Index.build(documents)
    build = time.perf_counter() - started
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "index.arrow"
        index.save(path)
        size = path.stat().st_size
        index = Index.load(path)
        seconds = []
        for _ in range(arguments.passes):
            started = time.perf_counter()
            hits = []
            for first in range(0, len(texts), BATCH):
                hits += index.find(texts[first : first + BATCH])
            seconds.append(time.perf_counter() - started)
    words = sum(len(text.split()) for text in texts)
    characters = sum(map(len, texts))
    print(f"{processor()}; Python {platform.python_version()}, numpy {np.__version__}")
    print(
        f"index: {len(documents):,} documents, {len(index.hashes):,} entries, "
        f"{size / 1e6:.1f} MB, built in {build:.2f} s"
    )
    print(
        f"rows: {len(texts):,} of {characters / len(texts):.0f} characters, "
        f"{words / len(texts):.0f} words"
    )
    print(
        f"look-up: {min(seconds) / len(texts) * 1e6:.1f} µs/row, "
        f"{characters / min(seconds) / 1e6:.0f} MB/s; {len(hits):,} hits: {dict(Counter(hit.task for hit in hits))}"
    )


if __name__ == "__main__":
    main()
