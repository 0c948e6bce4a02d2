"""Which data the runs of a report were trained on: the records in each run's `data` folder. No torch."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evals.leaderboard import Arm, Board
from evals.runs import Run
from reward.store import MANIFEST, content_key
from reward.versions import AUDIT

DATA = "data"  # folder of a run, with a folder for each stage
_IN_MANIFEST = ("fingerprint", "records", "examples", "rows", "unusable", "sources", "steps")
_IN_AUDIT = ("rows", "findings", "summary")


@dataclass
class Look:
    """What an audit found in a version, and the stages and runs that it was made for."""

    audit: dict[str, Any]
    users: dict[str, dict[str, list[int]]] = field(default_factory=dict)  # stage → arm → seeds

    def named(self) -> str:
        """The users as one line."""
        named = (f"{stage} of {', '.join(arms_text(arms))}" for stage, arms in self.users.items())
        return "; ".join(named)


@dataclass
class Used:
    """A data version, and how it looks to those that trained on it.

    The tokenizer, the lengths and the benchmarks of a stage are part of its look.
    """

    manifest: dict[str, Any]
    looks: dict[str, Look] = field(default_factory=dict)  # by the hash of the audit
    uses: list[tuple[Path, str]] = field(default_factory=list)  # (run's folder, stage)


@dataclass
class Usage:
    """Everything that the records tell of data."""

    versions: list[Used] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)  # records that cannot be read
    without: list[str] = field(default_factory=list)  # runs that recorded no data


def arms_text(arms: dict[str, list[int]]) -> list[str]:
    """Each arm with its seeds."""
    return [
        f"{arm} (seed{'s' if len(seeds) > 1 else ''} {', '.join(map(str, sorted(seeds)))})"
        for arm, seeds in arms.items()
    ]


def read_usage(found: Sequence[Board]) -> Usage:
    """The data versions of all runs that the boards count, in the boards' order."""
    usage = Usage()
    versions: dict[str, Used] = {}
    audits: dict[str, dict[str, Any]] = {}  # runs share them, and one may be large
    for arm, run, stage in _stages(found):
        folder = run.folder / DATA / stage
        where = f"{arm.name}, seed {run.seed}"
        if not folder.is_dir():
            usage.without.append(f"{where}: {stage}")
            continue
        try:
            manifest = _object((folder / MANIFEST).read_bytes(), _IN_MANIFEST)
            content = (folder / AUDIT).read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            audit = audits[digest] if digest in audits else _object(content, _IN_AUDIT)
        except OSError as error:
            reason = f"{Path(str(error.filename)).name} cannot be read: {error.strerror}"
            usage.problems.append(f"{where}: {DATA}/{stage}: {reason}")
            continue
        except ValueError as error:
            usage.problems.append(f"{where}: {DATA}/{stage}: no record of data: {error}")
            continue
        audits[digest] = audit
        # Not by its key, which changes with the code, nor by its fingerprint alone: the same records
        # may have come from other rows.
        identity = content_key({name: value for name, value in manifest.items() if name != "key"})
        used = versions.setdefault(identity, Used(manifest))
        look = used.looks.setdefault(digest, Look(audit))
        look.users.setdefault(stage, {}).setdefault(arm.name, []).append(run.seed)
        used.uses.append((run.folder, stage))
    usage.versions = list(versions.values())
    return usage


def _stages(found: Sequence[Board]) -> Iterator[tuple[Arm, Run, str]]:
    for board in found:
        for _, arm in board.entries:
            for run in arm.runs:
                for stage in run.stages:
                    yield arm, run, str(stage.get("stage", "stage"))


def _object(content: bytes, keys: Sequence[str]) -> dict[str, Any]:
    value = json.loads(content)
    if not isinstance(value, dict):
        raise ValueError(f"it holds a {type(value).__name__}, not an object")
    for key in keys:
        if key not in value:
            raise ValueError(f"it has no {key!r}")
    return value
