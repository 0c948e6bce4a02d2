"""A reward model's report as one self-contained HTML page. jinja2 and matplotlib load when it is made."""

import math
from pathlib import Path
from typing import Any

from reward.pages.markup import MISSING, TEMPLATES, environment, signed, value
from reward.pages.rewardcharts import length_chart, margin_chart, reliability_chart, subset_chart


def render(report: dict[str, Any]) -> str:
    """The page; equal reports give equal text.

    Args:
        report: what `reward.assessment.assess` gives, with its `inputs`.
    """
    charts = {
        "reliability": reliability_chart("reliability", report["reliability"]),
        "margins": margin_chart("margins", report["margins"]),
        "length": length_chart("length", report["score_by_length"]),
    }
    if any(one["accuracy"]["n"] for one in report["subsets"]):
        charts["subsets"] = subset_chart("subsets", report["subsets"])
    name = Path(report["inputs"]["model"]["path"]).name
    made = environment(TEMPLATES, interval=interval, own=own).get_template("reward.html.jinja")
    return made.render(name=name, r=report, charts=charts, script="")


def own(number: float | None, digits: int = 3) -> str:
    """A number in its own unit; the sign for what is missing."""
    if number is None or math.isnan(number):
        return MISSING
    return f"{number:.{digits}f}".replace("-", "−")


def interval(figure: dict[str, Any], kind: str = "share") -> str:
    """`[61.2, 70.4]` of a share in percent, of a `difference` with signs, or in its `own` unit."""
    show = {"share": value, "difference": signed, "own": own}[kind]
    return f"[{show(figure['ci_low'])}, {show(figure['ci_high'])}]"
