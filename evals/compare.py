"""`python -m evals.compare BASELINE_DIR CANDIDATE_DIR [--json OUT]`: paired deltas of two evaluations."""

import argparse
import dataclasses
from pathlib import Path

from conf.entry import plainly
from evals.results import Delta, EvalResult, compare
from reward.store import write_json


def table(deltas: list[Delta]) -> str:
    """The deltas as aligned text, one line a metric."""
    lines = [
        f"{'task':24} {'metric':14} {'baseline':>9} {'candidate':>9} {'delta':>8} {'95 % interval':>20} "
        f"{'p':>7} {'flips':>6} {'n':>6}  verdict"
    ]
    for delta in deltas:
        interval = f"[{delta.ci_low:+.4f}, {delta.ci_high:+.4f}]"
        lines.append(
            f"{delta.task:24} {delta.metric:14} {delta.baseline:9.4f} {delta.candidate:9.4f} "
            f"{delta.difference:+8.4f} {interval:>20} {delta.p:7.4f} {delta.flips:6.1%} {delta.n:6}  {delta.verdict}"
        )
    return "\n".join(lines)


def main() -> None:
    """Compare two result folders; exit code 2 and the reason when they are not comparable."""
    parser = argparse.ArgumentParser(prog="python -m evals.compare", description=main.__doc__)
    parser.add_argument("baseline", type=Path, help="folder with results.json")
    parser.add_argument("candidate", type=Path, help="folder with results.json")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the deltas as JSON too")
    parser.add_argument(
        "--margin", type=float, default=0.03, help="non-inferiority margin of retention suites"
    )
    arguments = parser.parse_args()
    with plainly():
        baseline, candidate = (
            EvalResult.load(arguments.baseline),
            EvalResult.load(arguments.candidate),
        )
        deltas = compare(baseline, candidate, arguments.margin)
        print(table(deltas))
        if arguments.json:
            record = {
                "baseline": str(arguments.baseline),
                "candidate": str(arguments.candidate),
                "suite": baseline.suite,
                "margin": arguments.margin,
                "settings_hash": baseline.settings_hash,
                "deltas": [dataclasses.asdict(delta) for delta in deltas],
            }
            arguments.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(arguments.json, record)


if __name__ == "__main__":
    main()
