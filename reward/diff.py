"""`python -m reward.diff A B [--json OUT]`: what changed from one data version to another."""

import argparse
import json
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from conf.entry import UserError, plainly
from reward.store import write_json
from reward.versions import RECORDS, Version, is_version, read_lines

_SHOWN = 3
_WIDTH = 100


def diff(a: Version, b: Version) -> dict[str, Any]:
    """Records that only one version has, those that changed, and what was done otherwise.

    A record is the same when all its text is, each copy once; it has changed when the other version
    has the prompt with another answer. Each version's records are numbered from 0.
    """
    import numpy as np

    left, right = a.facts(), b.facts()
    copies_a, copies_b = _copies(left["text"].tolist()), _copies(right["text"].tolist())
    in_a, in_b = set(copies_a), set(copies_b)
    common_a = [copy for copy in copies_a if copy in in_b]
    common_b = [copy for copy in copies_b if copy in in_a]
    only_a = np.array([i for i, copy in enumerate(copies_a) if copy not in in_b], np.int64)
    only_b = np.array([i for i, copy in enumerate(copies_b) if copy not in in_a], np.int64)
    was_changed = np.isin(left["prompt"][only_a], right["prompt"][only_b])
    is_changed = np.isin(right["prompt"][only_b], left["prompt"][only_a])
    settings = ("sources", "steps", "rows", "unusable", "part", "order", "seed", "kind")
    return {
        "a": {"folder": a.folder.name, "fingerprint": a.fingerprint, "records": len(a)},
        "b": {"folder": b.folder.name, "fingerprint": b.fingerprint, "records": len(b)},
        "same": len(common_a),
        "removed": only_a[~was_changed].tolist(),
        "added": only_b[~is_changed].tolist(),
        "changed": [only_a[was_changed].tolist(), only_b[is_changed].tolist()],
        "is_reordered": common_a != common_b,
        "settings": {
            name: [a.manifest[name], b.manifest[name]]
            for name in settings
            if a.manifest[name] != b.manifest[name]
        },
    }


def _copies(texts: list[int]) -> list[tuple[int, int]]:
    """Each text's hash with the number of its equals before it."""
    seen: Counter[int] = Counter()
    numbered = []
    for text in texts:
        numbered.append((text, seen[text]))
        seen[text] += 1
    return numbered


def table(found: dict[str, Any], a: Version, b: Version) -> str:
    """The difference as text, with a few records of each sort."""
    lines = [
        f"{name}: {side['folder']}, {side['records']:,} records, fingerprint {side['fingerprint']}"
        for name, side in (("A", found["a"]), ("B", found["b"]))
    ]
    if a.fingerprint == b.fingerprint:
        lines.append("The records are the same, in the same order.")
    for name, (before, after) in found["settings"].items():
        lines.append(f"{name}: {json.dumps(before)} → {json.dumps(after)}")
    before, after = found["changed"]
    lines.append(
        f"{found['same']:,} the same, {len(found['removed']):,} only in A, {len(found['added']):,} only in B, "
        f"{len(before):,} with another answer or margin"
        + (", and another order" if found["is_reordered"] else "")
    )
    for sign, version, places in (
        ("-", a, found["removed"]),
        ("+", b, found["added"]),
        ("<", a, before),
        (">", b, after),
    ):
        for place in places[:_SHOWN]:
            line = next(islice(read_lines(version.folder / RECORDS), place, None)).decode()
            lines.append(
                f"{sign} {place}: {line if len(line) < _WIDTH else line[: _WIDTH - 1] + '…'}"
            )
    return "\n".join(lines)


def _version(path: Path) -> Version:
    if not is_version(path):
        raise UserError(
            f"{path} is no data version: name a folder such as outputs/data/NAME-KEY, as a run's plan does"
        )
    return Version.load(path)


def main() -> None:
    """Compare two data versions; exit code 2 when a folder is none."""
    parser = argparse.ArgumentParser(prog="python -m reward.diff", description=main.__doc__)
    parser.add_argument("a", type=Path, help="folder of a data version")
    parser.add_argument("b", type=Path, help="folder of another")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the difference as JSON too")
    given = parser.parse_args()
    with plainly():
        a, b = _version(given.a), _version(given.b)
        found = diff(a, b)
        print(table(found, a, b))
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(given.json, found)


if __name__ == "__main__":
    main()
