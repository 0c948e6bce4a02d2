"""`python -m evals.compare BASELINE_DIR CANDIDATE_DIR [--json OUT]`: paired deltas of two evaluations."""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from conf.entry import UserError, plainly
from evals.results import Delta, EvalResult, compare, margin_of
from evals.stats import documents_needed
from reward.store import write_json


def table(deltas: Sequence[Delta]) -> str:
    """The deltas as aligned text of at most 140 columns, one line a metric, notes below it."""
    lines = [
        f"{'task/metric':30} {'baseline':>9} {'delta':>8} {'stderr':>7} {'95 % interval':>19} "
        f"{'p':>6} {'adj. p':>6} {'flips':>6} {'n':>6} {'clust.':>6} {'MDE':>7}  verdict"
    ]
    for delta in deltas:
        name = f"{delta.task}/{delta.metric}"
        name = name if len(name) <= 30 else f"…{name[-29:]}"
        interval = f"[{_number(delta.ci_low, '+.4f')}, {_number(delta.ci_high, '+.4f')}]"
        lines.append(
            f"{name:30} {_number(delta.baseline, '.4f'):>9} {_number(delta.difference, '+.4f'):>8} "
            f"{_number(delta.stderr, '.4f'):>7} {interval:>19} {_number(delta.p, '.4f'):>6} "
            f"{_number(delta.p_adjusted, '.4f'):>6} {_number(delta.flips, '.1%'):>6} {delta.n:>6} "
            f"{delta.clusters or '–':>6} {_number(delta.mde, '.4f'):>7}  {delta.verdict}"
        )
        if delta.note:
            lines.append(f"    {delta.note}")
    return "\n".join(lines)


def _number(value: float, form: str) -> str:
    if math.isnan(value):
        return "–"
    return format(value, form if abs(value) < 10 else form.replace(".4f", ".5g"))


def reading(deltas: Sequence[Delta], role: str, margin: float, margins: Mapping[str, float]) -> str:
    """How to read the table: what it could not have shown, and how many documents would."""
    weak = []
    for delta in deltas:
        limit = margin_of(delta, margin, margins)
        needed = documents_needed(delta.mde, delta.n, limit)
        if delta.is_main and needed is not None and delta.mde > limit:
            weak.append(f"{delta.task} (about {needed:,} documents would, it has {delta.n:,})")
    what = "loss" if role == "retention" else "difference"
    if weak:
        return (
            f"Too small to show a {what} of the margin ({margin:g}) in 4 of 5 comparisons: {', '.join(weak)}. "
            "There, inconclusive does not mean unchanged."
        )
    if any(not math.isnan(delta.mde) for delta in deltas if delta.is_main):
        return f"Every main metric could show a {what} of the margin ({margin:g}) in 4 of 5 comparisons."
    return "No main metric could be paired."


def main() -> None:
    """Compare two result folders; exit code 2 and the reason when they are not comparable."""
    parser = argparse.ArgumentParser(prog="python -m evals.compare", description=main.__doc__)
    parser.add_argument("baseline", type=Path, help="folder with results.json")
    parser.add_argument("candidate", type=Path, help="folder with results.json")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the deltas as JSON too")
    parser.add_argument(
        "--margin", type=float, default=0.03, help="non-inferiority margin of retention suites"
    )
    parser.add_argument(
        "--margins",
        nargs="+",
        default=[],
        metavar="NAME=X",
        help="margins of their own; NAME is TASK/METRIC, TASK or METRIC",
    )
    parser.add_argument(
        "--family",
        nargs="+",
        default=[],
        metavar="NAME",
        help="hypotheses for Holm's correction, TASK or TASK/METRIC; default: the main metrics",
    )
    arguments = parser.parse_args()
    with plainly():
        _compare(arguments)


def _compare(arguments: argparse.Namespace) -> None:
    margins = dict(_margin(text) for text in arguments.margins)
    if not arguments.margin >= 0:
        raise UserError(
            f"--margin {arguments.margin} is below zero; give the loss as a positive number"
        )
    baseline, candidate = EvalResult.load(arguments.baseline), EvalResult.load(arguments.candidate)
    deltas = compare(baseline, candidate, arguments.margin, arguments.family, margins)
    names = {n for d in deltas for n in (d.task, d.metric, f"{d.task}/{d.metric}")}
    if unknown := margins.keys() - names:
        raise UserError(
            f"--margins names {', '.join(sorted(unknown))}, but there are: {', '.join(sorted(names))}"
        )
    print(table(deltas))
    print("\n" + reading(deltas, baseline.role, arguments.margin, margins))
    if arguments.json:
        record = {
            "baseline": str(arguments.baseline),
            "candidate": str(arguments.candidate),
            "suite": baseline.suite,
            "margin": arguments.margin,
            "margins": margins,
            "family": arguments.family,
            "settings_hash": baseline.settings_hash,
            "deltas": [dataclasses.asdict(delta) for delta in deltas],
        }
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(arguments.json, record)


def _margin(text: str) -> tuple[str, float]:
    name, _, number = text.rpartition("=")
    try:
        limit = float(number)
    except ValueError:
        limit = math.nan
    if not name or not limit >= 0:
        raise UserError(f"--margins {text}: write NAME=X, with X the loss that is still accepted")
    return name, limit


if __name__ == "__main__":
    main()
