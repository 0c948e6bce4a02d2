"""Data versions: folders that are built once and never changed. Going back is naming the older one.

manifest.json   sources, steps with counts, fingerprint; written last
records.arrow   a record a row, as canonical JSON, in the order of training
facts.npy       what is known of each record, see `reward.ingest.FACTS`
audit.json      findings and figures, see `reward.audit`
removed.jsonl   rows that a cleaning step took out, and the step
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Order
from reward.records import NORMALISERS, Record, detect
from reward.store import MANIFEST, is_complete, read_json
from reward.turns import Row

RECORDS, FACTS_FILE, AUDIT, REMOVED = "records.arrow", "facts.npy", "audit.json", "removed.jsonl"


def is_version(folder: Path) -> bool:
    """Whether a folder is a data version."""
    return is_complete(folder) and (folder / RECORDS).is_file()


@dataclass(frozen=True)
class Version:
    """A data version on disk."""

    folder: Path
    manifest: dict[str, Any]

    @classmethod
    def load(cls, folder: Path) -> "Version":
        """The version in a folder."""
        return cls(folder, read_json(folder / MANIFEST))

    def __len__(self) -> int:
        return int(self.manifest["records"])

    @property
    def fingerprint(self) -> str:
        """16 hexadecimal digits that name the records and their order, whatever they were made from."""
        return str(self.manifest["fingerprint"])

    @property
    def is_ordered(self) -> bool:
        """Whether the order is a curriculum that the trainer must keep."""
        return self.manifest["order"] not in (Order.source.value, Order.shuffled.value)

    def records(self) -> Iterator[Record]:
        """The records, read as they are asked for."""
        for line in read_lines(self.folder / RECORDS):
            yield record_of(line)

    def facts(self) -> Any:
        """(records,) structured array, see `reward.ingest.FACTS`."""
        import numpy as np

        return np.load(self.folder / FACTS_FILE)


def read_lines(path: Path) -> Iterator[bytes]:
    """The canonical JSON of each record in an Arrow file."""
    return read_column(path, "record")


def read_column(path: Path, name: str) -> Iterator[Any]:
    """The values of a column in an Arrow file, read as they are asked for."""
    import pyarrow as pa

    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        for number in range(reader.num_record_batches):
            for value in reader.get_batch(number).column(name):
                yield value.as_py()


def take(path: Path, name: str, places: Any) -> list[Any]:
    """Values of a column in an Arrow file, at some places and in their order; only these are in memory."""
    import numpy as np
    import pyarrow as pa

    places = np.asarray(places, np.int64)
    values: list[Any] = [None] * len(places)
    with pa.memory_map(str(path)) as file:
        reader = pa.ipc.open_file(file)
        sizes = [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)]
        ends = np.cumsum(sizes)
        batches = np.searchsorted(ends, places, side="right")
        for number in np.unique(batches):
            wanted = np.flatnonzero(batches == number)
            inner = places[wanted] - (ends[number] - sizes[number])
            column = reader.get_batch(int(number)).column(name).take(pa.array(inner))
            for place, value in zip(wanted.tolist(), column.to_pylist(), strict=True):
                values[place] = value
    return values


def record_of(line: bytes) -> Record:
    """The record that was written as canonical JSON."""
    row = json.loads(line)
    return NORMALISERS[detect(row)](row)


def to_trl(record: Record) -> Iterator[Row]:
    """The rows that TRL's trainers read for a record, in its conversational form.

    A conversation becomes one row for each assistant turn, with all earlier turns as the prompt. So
    the loss falls on every assistant turn and on nothing else, whatever the chat template is; the
    alternative, TRL's `assistant_only_loss`, needs a template with generation markers, which most
    models lack. The price is that a conversation of n answers is read n times.
    """
    fields = {key: value for key, value in vars(record).items() if value not in (None, {})}
    for name in {"tools", "facts"} & fields.keys():  # they differ from row to row in ways that
        fields[name] = json.dumps(fields[name])  # Arrow's columns cannot
    turns = fields.pop("messages", None)
    if turns is None:
        yield fields
        return
    for at, turn in enumerate(turns):
        if turn["role"] == "assistant":
            yield {"prompt": turns[:at], "completion": [turn], **fields}
