"""What an audit says of a data set: findings by row, their kinds and severities, and the JSON."""

from dataclasses import dataclass
from enum import StrEnum


class Severity(StrEnum):
    """How bad a finding is."""

    error = "error"  # stops a run
    warning = "warning"  # a row that most users would want to drop or mend
    note = "note"  # a property worth knowing


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of finding: its usual severity, what it is, and what to do about it."""

    severity: Severity
    meaning: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about one row."""

    row: int  # from 0 in file order; lines count where the file has lines
    kind: str  # a key of KINDS
    severity: Severity
    detail: str


_FIX_OR_DROP = "fix the row; a run drops it and counts it"

# In the order in which they are shown. A row that is no record is an error once there are more of
# them than `max_bad_fraction` allows.
KINDS: dict[str, Kind] = {
    "broken_line": Kind(Severity.warning, "a line that is not one JSON object", _FIX_OR_DROP),
    "blank_line": Kind(Severity.note, "a line with nothing on it", "remove the line"),
    "unknown_format": Kind(Severity.warning, "a row that fits no known format", _FIX_OR_DROP),
    "missing_field": Kind(Severity.warning, "a row without a field that it needs", _FIX_OR_DROP),
    "wrong_type": Kind(Severity.warning, "a field that holds no text or messages", _FIX_OR_DROP),
    "empty_turn": Kind(Severity.warning, "a turn with nothing in it", _FIX_OR_DROP),
    "bad_role_order": Kind(Severity.warning, "turns that do not follow each other", _FIX_OR_DROP),
    "same_pair": Kind(Severity.warning, "chosen and rejected are the same text", _FIX_OR_DROP),
    "mojibake": Kind(
        Severity.warning, "text that was decoded with the wrong encoding", "clean.repair=true"
    ),
    "pii": Kind(
        Severity.warning, "an e-mail address, phone, card or similar number", "clean.mask=true"
    ),
    "secret": Kind(Severity.warning, "what looks like a key or password", "clean.mask=true"),
    "refusal": Kind(
        Severity.note, "an answer that declines to help", "clean.drop=[refusal] if unwanted"
    ),
    "exact_duplicate": Kind(
        Severity.warning, "the same as an earlier row", "clean.drop=[exact_duplicate]"
    ),
    "near_duplicate": Kind(
        Severity.warning, "nearly the same as an earlier row", "clean.drop=[near_duplicate]"
    ),
    "label_conflict": Kind(
        Severity.warning,
        "an earlier row prefers the other of the same two answers",
        "clean.drop=[label_conflict]",
    ),
    "contamination": Kind(
        Severity.warning,
        "text that a benchmark in use contains",
        "clean.drop=[contamination]",
    ),
}
