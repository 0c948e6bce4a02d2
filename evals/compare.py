"""`python -m evals.compare BASELINE_DIR CANDIDATE_DIR [--json OUT]`: paired deltas of two evaluations."""

import argparse
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from conf.entry import UserError, plainly
from evals.contrast import improvement
from evals.deltas import Delta, compare, margin_of
from evals.results import UNQUANTIZED, EvalResult
from evals.stats import documents_needed
from reward.command import check_file
from reward.store import write_json


def table(deltas: Sequence[Delta]) -> str:
    """The deltas as aligned text of at most 140 columns, one line a metric, then their notes; ★ marks main metrics."""
    lines = [
        f"{'task/metric':28} {'baseline':>8} {'candidate':>9} {'delta':>8} {'stderr':>7} "
        f"{'95 % interval':>18} {'p':>7} {'adj. p':>7} {'flips':>6} {'n':>5} {'clust.':>6} {'MDE':>6}  verdict"
    ]
    for delta in deltas:
        name = f"{delta.task}/{delta.metric}"
        name = (name if len(name) <= 26 else f"…{name[-25:]}") + (" ★" if delta.is_main else "")
        interval = f"[{_number(delta.ci_low, '+.4f')}, {_number(delta.ci_high, '+.4f')}]"
        lines.append(
            f"{name:28} {_number(delta.baseline, '.4f'):>8} {_number(delta.candidate, '.4f'):>9} "
            f"{_number(delta.difference, '+.4f'):>8} {_number(delta.stderr, '.4f'):>7} {interval:>18} "
            f"{_probability(delta.p):>7} {_probability(delta.p_adjusted):>7} "
            f"{_number(delta.flips, '.1%'):>6} {delta.n:>5} "
            f"{delta.clusters or '–':>6} {_number(delta.mde, '.4f'):>6}  {delta.verdict}"
        )
    notes: dict[str, list[str]] = {}
    for delta in deltas:
        if delta.note:
            notes.setdefault(delta.note, []).append(f"{delta.task}/{delta.metric}")
    return "\n".join(lines + [f"{', '.join(names)}: {note}" for note, names in notes.items()])


def _number(value: float, form: str) -> str:
    if math.isnan(value):
        return "–"
    return format(value, form if abs(value) < 10 else form.replace(".4f", ".5g"))


def _probability(value: float) -> str:
    return "<0.0001" if value < 0.0001 else _number(value, ".4f")


def heading(baseline: EvalResult, candidate: EvalResult, margin: float) -> str:
    """Which model is on which side, and by what rule it is judged."""
    sides = (("baseline", baseline), ("candidate", candidate))
    lines = [
        f"{side:9}  {result.model.get('path', '?')}"
        + (f", {result.quantizer}" if result.quantizer != UNQUANTIZED else "")
        + f"  ({result.folder})"
        for side, result in sides
    ]
    rules = {
        "retention": f"retained when the interval excludes a loss of {margin:g}",
        "gain": "better or worse when the interval excludes zero",
    }
    lines.append(f"suite      {baseline.suite}: {rules.get(baseline.role, 'not judged')}")
    return "\n".join(lines)


def mean(deltas: Sequence[Delta]) -> str:
    """The mean over the tasks' main metrics; empty where there is one task."""
    if sum(delta.is_main for delta in deltas) < 2:
        return ""
    try:
        change = improvement([list(deltas)])
    except UserError as error:
        return f"no mean over the tasks: {error}"
    note = f" ({change.note})" if change.note else ""
    return (
        f"mean of the tasks{note}, + is better: "
        f"{change.difference:+.4f} [{change.ci_low:+.4f}, {change.ci_high:+.4f}]"
    )


def reading(deltas: Sequence[Delta], role: str, margin: float, margins: Mapping[str, float]) -> str:
    """What the inconclusive rows of a retention suite could not have shown, and how many documents would."""
    weak = []
    for delta in deltas:
        limit = margin_of(delta, margin, margins)
        needed = documents_needed(delta.mde, delta.n, limit)
        is_open = delta.is_main and delta.verdict == "inconclusive"
        if is_open and needed is not None and delta.mde > limit:
            weak.append(f"{delta.task} about {needed:,} (it has {delta.n:,})")
    if role != "retention" or not weak:
        return ""
    return (
        f"Inconclusive is not unchanged: to find a loss of the margin with 80 % power would take more "
        f"documents: {', '.join(weak)}"
    )


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
    if arguments.json:
        check_file(arguments.json, None, "deltas.json")
    margins = dict(_margin(text) for text in arguments.margins)
    baseline, candidate = EvalResult.load(arguments.baseline), EvalResult.load(arguments.candidate)
    deltas = compare(baseline, candidate, arguments.margin, arguments.family, margins)
    names = {n for d in deltas for n in (d.task, d.metric, f"{d.task}/{d.metric}")}
    if unknown := margins.keys() - names:
        raise UserError(
            f"--margins names {', '.join(sorted(unknown))}, but there are: {', '.join(sorted(names))}"
        )
    parts = (
        heading(baseline, candidate, arguments.margin),
        table(deltas),
        mean(deltas),
        reading(deltas, baseline.role, arguments.margin, margins),
    )
    print("\n\n".join(filter(None, parts)))
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
