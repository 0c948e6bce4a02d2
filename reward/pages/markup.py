"""What all pages share: the template environment, and numbers as text."""

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

TEMPLATES = Path(__file__).parent / "templates"
_BREAKS = re.compile(r"(?<=[_=])|(?<=\.)(?=[A-Za-z])")
MISSING = "–"  # for a number that was not measured, everywhere
TABLES = TEMPLATES / "tables.js"  # sorts and filters every table of a page


def environment(templates: Path, **filters: Callable[..., Any]) -> "Environment":
    """A jinja2 environment that finds templates in a folder, and the base of every page; jinja2 loads here.

    Args:
        templates: folder of a page's own templates.
        filters: what they may use besides the filters that all pages have.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    made = Environment(
        loader=FileSystemLoader([templates, TEMPLATES]),
        autoescape=True,  # prompts and answers are foreign text
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= {
        "value": value,
        "signed": signed,
        "probability": probability,
        "percent": percent,
        "duration": duration,
        "count": count,
        "whole": whole,
        "breakable": breakable,
        "key": sort_key,
        "digest": digest,
        **filters,
    }
    return made


def script(path: Path) -> "Markup":
    """A script of the pages, from its file."""
    from markupsafe import Markup

    return Markup(path.read_text(encoding="utf-8"))


def breakable(text: str) -> "Markup":
    """A name that may be broken after `_`, `=` and the dots between words, where the style allows it."""
    from markupsafe import Markup, escape

    return Markup("<wbr>").join(escape(part) for part in _BREAKS.split(text))


def digest(text: str) -> str:
    """What a page's Content-Security-Policy names a script by: no other script runs, however it got there."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def slug(text: str) -> str:
    """`text` as part of a file name; may be empty."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", text)[:60].strip("-.")


def shortened(text: Any, longest: int) -> str:
    """`text` without its middle where it is too long: a prompt's question is at its end."""
    whole_text = text if isinstance(text, str) else json.dumps(text, ensure_ascii=False)
    if len(whole_text) <= longest:
        return whole_text
    half = longest // 2
    left_out = whole(len(whole_text) - 2 * half)
    return f"{whole_text[:half]}\n[… {left_out} characters left out …]\n{whole_text[-half:]}"


# Numbers as text. A share (a metric in [0, 1]) is shown in percent, its difference in points.


def value(number: float, share: bool = True) -> str:
    """`0.6354` → "63.5"; in the metric's own unit when it is not a share."""
    if math.isnan(number):
        return MISSING
    return _minus(f"{number * 100:.1f}" if share else f"{number:.4g}")


def signed(number: float, share: bool = True) -> str:
    """`-0.021` → "−2.1", always with its sign."""
    if math.isnan(number):
        return MISSING
    text = f"{number * 100:+.1f}" if share else _own_unit(number)
    return "0.0" if float(text) == 0 else _minus(text)


def _own_unit(number: float) -> str:
    """Four decimals, as far as a difference in nats is known; two digits of what is smaller than that shows."""
    if number == 0 or 0.001 <= abs(number) < 1:
        return f"{number:+.4f}"
    return f"{number:+.2g}" if abs(number) < 0.001 else f"{number:+.4g}"


def probability(number: float) -> str:
    """A p-value; below 0.001 only its order matters."""
    if math.isnan(number):
        return MISSING
    return "<0.001" if number < 0.001 else f"{number:.3f}"


def percent(number: float) -> str:
    """`0.125` → "12.5 %"."""
    return MISSING if math.isnan(number) else f"{number * 100:.1f} %"


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


def sort_key(number: float | None) -> str:
    """A number as a table's script sorts by it; nothing for a missing one, which is put last."""
    return "" if number is None or math.isnan(number) else f"{number:.9g}"


def _minus(text: str) -> str:
    return text.replace("-", "−")
