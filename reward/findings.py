"""What an audit says of a data set: findings by row, their kinds and severities, and the JSON."""

from collections.abc import Container
from dataclasses import dataclass, replace
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


_UNUSABLE = "fix the row; a run leaves it out and counts it"


def _drop(kind: str) -> str:
    return f"clean.drop=[{kind}]"


# In the order in which they are shown.
KINDS: dict[str, Kind] = {
    # rows that are no records: errors once there are more than `max_bad_fraction` of them
    "broken_line": Kind(Severity.warning, "a line that is not one JSON object", _UNUSABLE),
    "blank_line": Kind(Severity.warning, "a line with nothing on it", "remove the line"),
    "unknown_format": Kind(Severity.warning, "a row that fits no known format", _UNUSABLE),
    "missing_field": Kind(Severity.warning, "a row without a field that it needs", _UNUSABLE),
    "wrong_type": Kind(Severity.warning, "a field that is not what it should be", _UNUSABLE),
    "empty_turn": Kind(Severity.warning, "a turn with nothing in it", _UNUSABLE),
    "bad_role_order": Kind(Severity.warning, "turns that do not follow each other", _UNUSABLE),
    "same_pair": Kind(Severity.warning, "chosen and rejected are the same", _UNUSABLE),
    "prompt_mismatch": Kind(
        Severity.warning, "chosen and rejected answer different prompts", _UNUSABLE
    ),
    # what a record says
    "mojibake": Kind(
        Severity.warning, "text that was decoded with the wrong encoding", "clean.repair=true"
    ),
    "pii": Kind(Severity.warning, "an e-mail address, a phone or card number…", "clean.mask=true"),
    "secret": Kind(Severity.warning, "what looks like a key or a password", "clean.mask=true"),
    "refusal": Kind(Severity.note, "an answer that declines to help", _drop("refusal")),
    # how records compare
    "exact_duplicate": Kind(
        Severity.warning, "the same as an earlier row", _drop("exact_duplicate")
    ),
    "near_duplicate": Kind(
        Severity.warning, "nearly the same as an earlier row", _drop("near_duplicate")
    ),
    "label_conflict": Kind(
        Severity.warning, "an earlier row prefers the other answer", _drop("label_conflict")
    ),
    "missing_margin": Kind(
        Severity.warning,
        "no margin, although other rows have one: the trainer will use none",
        "give every row a margin, or remove the column",
    ),
    # what a run compares them with
    "contamination": Kind(
        Severity.warning, "text of a benchmark that is in use", _drop("contamination")
    ),
    "shared_phrase": Kind(
        Severity.note,
        "a few words in a row that a benchmark has too: mostly a stock phrase",
        "look",
    ),
    "eval_split": Kind(Severity.error, "the rows are an evaluation split", "train on other rows"),
    "split_overlap": Kind(
        Severity.warning,
        "the prompt is in the held-out rows too",
        "split by prompt: data.part=train, eval_data.part=validation of one source",
    ),
    # what a tokenizer makes of them
    "no_loss_tokens": Kind(
        Severity.warning,
        "no token to learn from: the trainer leaves the row out",
        "raise args.max_length, or lower clean.max_chars",
    ),
    "truncated": Kind(Severity.note, "longer than max_length", "raise args.max_length"),
    "prefix_mismatch": Kind(
        Severity.warning,
        "the prompt's tokens do not begin those of prompt and answer",
        "use a chat template that writes the prompt the same way in both",
    ),
    "double_bos": Kind(
        Severity.error, "two begin-of-sequence tokens", "remove one from the chat template"
    ),
    "tools_lost": Kind(
        Severity.warning,
        "a tool, or a call of one, that the chat template does not write",
        "use a chat template that knows tools",
    ),
    "missing_eos": Kind(
        Severity.warning,
        "no end-of-sequence token after the answer: the model will not learn to stop",
        "use a chat template that ends the assistant's turn with one",
    ),
}


def escalate(
    findings: list[Finding], kinds: Container[str], share: float, allowed: float
) -> list[Finding]:
    """The findings, those of `kinds` as errors when their share is above what is allowed."""
    if share <= allowed:
        return findings
    return [
        replace(finding, severity=Severity.error) if finding.kind in kinds else finding
        for finding in findings
    ]


_NAMES = list(KINDS)
# Kinds of rows that are left out in any case, and those that cleaning drops when it is asked to.
UNUSABLE = _NAMES[: _NAMES.index("mojibake")]
DROPPABLE = _NAMES[_NAMES.index("mojibake") : _NAMES.index("shared_phrase")]
