"""The records of runs: `run.json` and the evaluations that it names. No torch."""

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from conf.entry import UserError
from evals.results import UNQUANTIZED, EvalResult
from reward.store import read_json

RUN = "run.json"


class Variant(NamedTuple):
    """A policy as it was measured."""

    policy: str
    quantizer: str = UNQUANTIZED

    def __str__(self) -> str:
        return self.policy if self.quantizer == UNQUANTIZED else f"{self.policy} {self.quantizer}"


@dataclass(frozen=True)
class Run:
    """One `run.json`, with the evaluations that it names."""

    experiment: str
    arm: str
    seed: int
    margin: float
    policies: list[str]
    margins: dict[str, float] = field(default_factory=dict)
    family: list[str] = field(default_factory=list)
    title: str = ""
    label: str = ""
    command: str = ""
    started: str = ""
    seconds: float | None = None
    model: dict[str, Any] = field(default_factory=dict)
    stages: list[dict[str, Any]] = field(default_factory=list)
    rewards: dict[str, dict[str, Any]] = field(default_factory=dict)  # stage → figures, evals.rated
    provenance: dict[str, Any] = field(default_factory=dict)
    # An evaluation that cannot be read is the reason why, so that one lost file costs one cell.
    results: dict[tuple[Variant, str], EvalResult | str] = field(default_factory=dict)
    folder: Path = Path()  # where the record lies

    @property
    def suites(self) -> list[str]:
        """Names of the suites, in the order of their first evaluation."""
        return list(dict.fromkeys(suite for _, suite in self.results))

    def role(self, suite: str) -> str | None:
        """What a suite is for; None when none of its results can be read."""
        return next((result.role for result in self._readable(suite)), None)

    def result(self, variant: Variant, suite: str) -> EvalResult | str:
        """A result with scores, or the reason why there is none."""
        found = self.results.get((variant, suite), f"{variant} was not measured on {suite}")
        if isinstance(found, EvalResult) and found.skipped:
            return f"skipped: {found.skipped}"
        return found

    def test(self) -> tuple[tuple[str, str], ...]:
        """What the gain was measured on: name and settings of each gain suite."""
        found = {
            suite: next(result.settings_hash for result in self._readable(suite))
            for suite in self.suites
            if self.role(suite) == "gain"
        }
        return tuple(sorted(found.items()))

    def _readable(self, suite: str) -> Iterator[EvalResult]:
        for (_, name), result in self.results.items():
            if name == suite and isinstance(result, EvalResult):
                yield result


def load_runs(folder: Path) -> list[Run]:
    """Every run recorded below `folder`, in the order of their paths.

    Raises:
        UserError: when there is no folder, no record in it, or a record that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the one where the runs were written")
    paths = sorted(folder.rglob(RUN))
    if not paths:
        raise UserError(
            f"{folder} holds no {RUN}: run an experiment first, or give its output folder"
        )
    return [load_run(path) for path in paths]


def load_run(path: Path) -> Run:
    """Read one `run.json` and the evaluations that it names.

    Raises:
        UserError: naming the file, when it is not a record of a run.
    """
    try:
        record = read_json(path)
        _check(record)
        results = {
            (
                Variant(str(entry["policy"]), str(entry["quantizer"])),
                str(entry["suite"]),
            ): _load_result(path.parent, str(entry["path"]))
            for entry in record["evaluations"]
        }
    except KeyError as error:
        raise UserError(f"{path} is not the record of a run: it has no {error}") from error
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not the record of a run: {error}") from error
    known = {item.name for item in dataclasses.fields(Run)} - {"results", "folder"}
    fields = {key: value for key, value in record.items() if key in known}
    return Run(results=results, folder=path.parent, **fields)


# The kind of each field. `bool` is an `int` to isinstance, but no record has one here.
_KINDS: dict[str, tuple[type, ...]] = {
    "experiment": (str,),
    "arm": (str,),
    "seed": (int,),
    "margin": (int, float),
    "policies": (list,),
    "evaluations": (list,),
}
_OPTIONAL_KINDS: dict[str, tuple[type, ...]] = {
    "margins": (dict,),
    "family": (list,),
    "title": (str,),
    "label": (str,),
    "command": (str,),
    "started": (str,),
    "seconds": (int, float, type(None)),
    "model": (dict,),
    "stages": (list,),
    "rewards": (dict,),
    "provenance": (dict,),
}


def _check(record: Any) -> None:
    if not isinstance(record, dict):
        raise TypeError(f"it holds a {type(record).__name__}, not an object")
    for key, kinds in (_KINDS | _OPTIONAL_KINDS).items():
        if key in _OPTIONAL_KINDS and key not in record:
            continue
        if not isinstance(record[key], kinds):
            raise TypeError(f"{key!r} is a {type(record[key]).__name__}, not a {kinds[0].__name__}")
    if not all(isinstance(stage, dict) for stage in record.get("stages", [])):
        raise TypeError("'stages' is not a list of objects")
    if not record["policies"]:
        raise ValueError("'policies' is empty")


def _load_result(folder: Path, path: str) -> EvalResult | str:
    try:
        return EvalResult.load(folder / path)
    except UserError as error:
        # The page must not depend on where the records happen to lie.
        return str(error).replace(str(folder / path), path)
