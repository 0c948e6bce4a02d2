"""What the pages of the report share: the template environment and numbers as text."""

import math
from pathlib import Path
from typing import TYPE_CHECKING

from evals.contrast import Change

if TYPE_CHECKING:
    from jinja2 import Environment

_TEMPLATES = Path(__file__).parent / "templates"


def environment() -> "Environment":
    """The jinja2 environment of every page; jinja2 loads here."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader(_TEMPLATES),
        autoescape=True,  # prompts and answers are foreign text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "value": value,
        "signed": signed,
        "interval": interval,
        "probability": probability,
        "percent": percent,
        "duration": duration,
        "count": count,
        "whole": whole,
    }
    return made


# Numbers as text. A share (a metric in [0, 1]) is shown in percent, its difference in points.


def value(number: float, share: bool = True) -> str:
    """`0.6354` → "63.5"; in the metric's own unit when it is not a share."""
    if math.isnan(number):
        return "n/a"
    return _minus(f"{number * 100:.1f}" if share else f"{number:.4g}")


def signed(number: float, share: bool = True) -> str:
    """`-0.021` → "−2.1", always with its sign."""
    if math.isnan(number):
        return "n/a"
    text = f"{number * 100:+.1f}" if share else f"{number:+.4g}"
    return "0.0" if float(text) == 0 and share else _minus(text)


def interval(change: Change) -> str:
    """`[−4.0, +1.2]`."""
    return f"[{signed(change.ci_low, change.is_share)}, {signed(change.ci_high, change.is_share)}]"


def probability(number: float) -> str:
    """A p-value; below 0.001 only its order matters."""
    if math.isnan(number):
        return "n/a"
    return "<0.001" if number < 0.001 else f"{number:.3f}"


def percent(number: float) -> str:
    """`0.125` → "12.5 %"."""
    return "n/a" if math.isnan(number) else f"{number * 100:.1f} %"


def duration(seconds: float | None) -> str:
    """`4000` → "1 h 7 min"."""
    if seconds is None or math.isnan(seconds):
        return "unknown time"
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def count(number: float) -> str:
    """`134515008` → "134.5 M"."""
    for size, unit in ((1e9, "G"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.1f} {unit}"
    return whole(number)


def whole(number: float) -> str:
    """`1234567` → "1 234 567", every digit of it."""
    return _minus(f"{number:,.0f}".replace(",", "\N{NARROW NO-BREAK SPACE}"))


def _minus(text: str) -> str:
    return text.replace("-", "−")
