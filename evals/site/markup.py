"""What the pages of the report share besides `reward.pages`: notes in the room that they have, and differences."""

from pathlib import Path
from typing import TYPE_CHECKING

from evals.contrast import Change
from reward.pages import markup
from reward.pages.markup import signed

if TYPE_CHECKING:
    from jinja2 import Environment

TEMPLATES = Path(__file__).parent / "templates"
_BRIEF = 90  # characters


def environment() -> "Environment":
    """The jinja2 environment of the report's pages."""
    return markup.environment(TEMPLATES, interval=interval, brief=brief, own_note=own_note)


def interval(change: Change) -> str:
    """`[−4.0, +1.2]`."""
    return f"[{signed(change.ci_low, change.is_share)}, {signed(change.ci_high, change.is_share)}]"


def brief(note: str) -> str:
    """A reason in the few words that a cell of a table has room for; the arm's page has all of it."""
    if "settings differ" in note:
        return "not comparable: settings differ"
    if "not comparable" in note:
        return "not comparable: documents differ"
    first = note.split("\n")[0]
    return first if len(first) <= _BRIEF else f"{first[: _BRIEF - 1].rstrip()}…"


def shared_note(note: str) -> str:
    """What a note says of every row alike, and a table says once below itself: what an average leaves out."""
    return "; ".join(part for part in note.split("; ") if part.endswith("which has another unit"))


def own_note(note: str) -> str:
    """The rest of a note, without its `shared_note`."""
    shared = shared_note(note)
    return "; ".join(part for part in note.split("; ") if part not in shared.split("; "))
