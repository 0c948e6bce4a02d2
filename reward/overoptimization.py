"""`python -m reward.overoptimization SCORED OUT --proxy FIELD --gold FIELD`: what best-of-n by a proxy is worth."""

import argparse
import math
from collections import Counter
from pathlib import Path
from typing import Any

from conf.entry import UserError, plainly
from reward.bestofn import looks, sizes
from reward.command import MAX_BAD_FRACTION, Reading, at_least_one, fraction
from reward.looks import FEWEST, LOOKS, Finding, Look, append, judge
from reward.store import canonical, write_json
from reward.turns import BadRow, Row, kind_of, list_of

REPORT, PAGE = "report.json", "report.html"
_SPARED = 0.05  # share of prompts that may have fewer completions than the largest n

Measured = tuple[str, list[tuple[float, float]]]  # a prompt, and (proxy, gold) of completions


def measured(row: Row, proxy: str, gold: str) -> Measured:
    """The prompt of a row and the two scores of each completion; NaN where a score is null.

    A row holds a prompt with `completions`, each an object with the scores, or one completion with its scores.

    Raises:
        BadRow: when a score is missing, or is no number.
    """
    prompt = canonical([row.get("prompt", row.get("instruction")), row.get("tools")])
    items = list_of(row, "completions") if row.get("completions") is not None else [row]
    return prompt, [(_number(item, proxy), _number(item, gold)) for item in items]


def _number(item: Any, name: str) -> float:
    """The number in a field; a dot leads into a nested object."""
    value = item
    for part in name.split("."):
        if not isinstance(value, dict) or part not in value:
            keys = ", ".join(map(str, value)) if isinstance(value, dict) else kind_of(value)
            raise BadRow(f"it has no field {name!r} (there are: {keys})", "missing_field")
        value = value[part]
    if value is None:
        return math.nan
    if isinstance(value, bool | int | float):
        return float(value)
    raise BadRow(f"{name!r} is {kind_of(value)}, expected a number")


def run(given: argparse.Namespace) -> str:
    """Write the report; the summary.

    Raises:
        UserError: if the input cannot be read, or has too few prompts or completions.
    """
    reading = Reading(
        given.source, lambda row, _: measured(row, given.proxy, given.gold), "overoptimization"
    )
    groups: dict[str, list[tuple[float, float]]] = {}
    unscored = 0
    for prompt, scores in reading:
        known = [pair for pair in scores if all(map(math.isfinite, pair))]
        unscored += len(scores) - len(known)
        groups.setdefault(prompt, []).extend(known)
    reading.check(given.max_bad_fraction)
    largest = given.n or _largest([len(group) for group in groups.values()])
    kept = [group for group in groups.values() if len(group) >= largest]
    _check(given.source, len(kept), largest, Counter(map(len, groups.values())))
    found = looks([tuple(zip(*group, strict=True)) for group in kept], sizes(largest))  # type: ignore[misc]
    facts = {
        "source": Path(given.source).name,
        "proxy": given.proxy,
        "gold": given.gold,
        "prompts": len(kept),
        "largest": largest,
        "left_out": len(groups) - len(kept),
        "unscored": unscored,
    }
    finding = judge(found)
    _write(given.out, facts, found, finding)
    lines = [look.line("n =") for look in found]
    mark = "warning: " if finding.is_warning else ""
    return "\n".join(
        filter(
            None,
            [*lines, mark + finding.sentence("n ="), reading.described(), str(given.out / PAGE)],
        )
    )


def _largest(counts: list[int]) -> int:
    """The most completions that nearly every prompt has."""
    return sorted(counts)[int(_SPARED * len(counts))]


def _check(source: str, prompts: int, largest: int, counts: Counter[int]) -> None:
    if largest < 2:
        raise UserError(
            f"best-of-n needs two scored completions of a prompt or more, but in {source} "
            f"{counts[0] + counts[1]:,} of {counts.total():,} prompts have fewer; draw more with n=… of evals.sample"
        )
    if prompts < FEWEST:
        raise UserError(
            f"{source} has {prompts:,} prompts with {largest} scored completions, and an interval over prompts needs "
            f"{FEWEST}; add prompts, or lower --n"
        )


def _write(out: Path, facts: dict[str, Any], found: list[Look], finding: Finding) -> None:
    from reward.pages.courses import course_chart
    from reward.pages.markup import TEMPLATES, environment

    try:
        out.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError) as error:
        raise UserError(f"{out} is a file: name a folder for the report") from error
    (out / LOOKS).unlink(missing_ok=True)
    for look in found:
        append(out / LOOKS, look)
    rows = [{k: v for k, v in look.to_json().items() if k != "per_prompt"} for look in found]
    write_json(out / REPORT, facts | {"looks": rows, "finding": finding.to_json()})
    chart = course_chart("course", found, "n =")
    template = environment(TEMPLATES).get_template("bestofn.html.jinja")
    page = template.render(facts=facts, looks=found, finding=finding, chart=chart, script=None)
    (out / PAGE).write_text(page, encoding="utf-8")


def main() -> None:
    """Estimate what the best of n completions by one score is worth by another, for n = 1, 2, 4, …"""
    parser = argparse.ArgumentParser(
        prog="python -m reward.overoptimization", description=main.__doc__
    )
    parser.add_argument("source", metavar="SCORED", help="rows with scored completions")
    parser.add_argument("out", metavar="OUT", type=Path, help=f"folder for {PAGE} and {REPORT}")
    parser.add_argument("--proxy", required=True, metavar="FIELD", help="the score that picks")
    parser.add_argument("--gold", required=True, metavar="FIELD", help="the score that judges")
    parser.add_argument(
        "--n", type=at_least_one, help="largest n; default: what 95 %% of the prompts have"
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=fraction,
        default=MAX_BAD_FRACTION,
        help="share of unusable rows that may be left out (default: %(default)s)",
    )
    given = parser.parse_args()
    with plainly():
        print(run(given))


if __name__ == "__main__":
    main()
