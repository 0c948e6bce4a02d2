"""The findings of audits as the data page shows them: by kind, with examples and what was done. No torch."""

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple
from unicodedata import category

from evals.site.datause import Look
from reward.findings import KINDS, UNUSABLE, Kind, Severity

_EXAMPLES = 3
_LONGEST_DETAIL = 300  # characters shown of an example
_RANK = {severity.value: rank for rank, severity in enumerate(Severity)}
_ORDER = {kind: place for place, kind in enumerate(KINDS)}
_UNKNOWN = Kind(Severity.note, "a kind that this version of the program does not know", "look")
# What a step does about which findings.
_MENDS = {"repair": ("mended", ["mojibake"]), "mask": ("masked", ["pii", "secret"])}


class Found(NamedTuple):
    """One kind of finding."""

    kind: str
    severity: str
    meaning: str
    rows: int  # in which it is; one row may hold several findings
    findings: int
    share: float  # of the rows that were read
    remedy: str
    done: str  # what was done about it already
    examples: list[tuple[int, str]]  # row and detail


class FoundBy(NamedTuple):
    """A table of findings; `users` are those that it holds for, empty for all."""

    users: str
    rows: list[Found]


def kind_of(name: str) -> Kind:
    """What is known of a kind; records of another version of the program may name others."""
    return KINDS.get(name, _UNKNOWN)


def severities(found: list[FoundBy]) -> dict[str, int]:
    """How many findings there are of each severity, for the stage that has most."""
    common = _totals(found[:1])
    own = [_totals([table]) for table in found[1:]]
    return {name: common[name] + max((one[name] for one in own), default=0) for name in _RANK}


def tables(manifest: dict[str, Any], looks: list[Look]) -> list[FoundBy]:
    """What holds for all stages, then what holds for some only."""
    each = [
        {(int(f["row"]), str(f["kind"]), str(f["severity"]), str(f["detail"])) for f in findings}
        for findings in (look.audit["findings"] for look in looks)
    ]
    common = set.intersection(*each)
    done = _done(manifest)
    rows = max(1, int(manifest["rows"]))
    tables = [FoundBy("", _found(common, rows, done))]
    for look, findings in zip(looks, each, strict=True):
        if own := findings - common:
            tables.append(FoundBy(look.named(), _found(own, rows, done)))
    return tables


def _done(manifest: dict[str, Any]) -> dict[str, str]:
    """Kinds of findings that the version has dealt with, and how."""
    done = dict.fromkeys(UNUSABLE, "left out")
    for step in manifest["steps"]:
        name, _, kind = str(step["step"]).partition(" ")
        if name in _MENDS:
            word, kinds = _MENDS[name]
            done |= dict.fromkeys(kinds, word)
        if name == "drop":
            done[kind] = "dropped"
    return done


def _found(
    findings: Iterable[tuple[int, str, str, str]], rows: int, done: dict[str, str]
) -> list[Found]:
    groups: dict[tuple[str, str], list[tuple[int, str]]] = {}
    for row, kind, severity, detail in sorted(findings):
        groups.setdefault((severity, kind), []).append((row, detail))
    touched = {key: len({row for row, _ in group}) for key, group in groups.items()}
    last = len(KINDS)
    ordered = sorted(groups, key=lambda key: (_RANK.get(key[0], 9), _ORDER.get(key[1], last), key))
    return [
        Found(
            kind,
            severity,
            kind_of(kind).meaning,
            touched[severity, kind],
            len(groups[severity, kind]),
            touched[severity, kind] / rows,
            kind_of(kind).remedy,
            done.get(kind, ""),
            [(row, _shown(detail)) for row, detail in groups[severity, kind][:_EXAMPLES]],
        )
        for severity, kind in ordered
    ]


def _shown(detail: str) -> str:
    """A detail on one line, without control characters and halves of surrogate pairs."""
    text = "".join(" " if category(one) in ("Cc", "Cs") else one for one in detail)
    text = " ".join(text.split())
    if text.startswith("row "):  # the other row of a pair, beside the number of this one
        text = f"with {text}"
    return text if len(text) <= _LONGEST_DETAIL else text[:_LONGEST_DETAIL] + " …"


def _totals(tables: Iterable[FoundBy]) -> Counter[str]:
    counts: Counter[str] = Counter()
    for table in tables:
        for row in table.rows:
            counts[row.severity] += row.findings
    return counts
