"""The leaderboard site, rebuilt from the JSON records alone.

`python -m evals.report RUNS_DIR --out SITE_DIR` writes it. Equal records give equal bytes: every
date on the page is the date of a run. No torch.
"""

import argparse
import csv
import io
import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.entry import UserError, plainly
from evals import datapage
from evals.contrast import Change
from evals.leaderboard import Board, MeanScore, boards, leaderboard_rows, rows_of
from evals.markup import interval, signed, value
from evals.page import render
from evals.runs import load_runs

__all__ = ["build_report", "leaderboard_rows", "main"]

INDEX, DATA = "index.html", "data.html"


def build_report(runs: Path, out: Path, margin: float | None = None) -> Path:
    """Write `index.html` and `leaderboard.json`, `.md` and `.csv` into `out`.

    Where the records tell of the training data, `data.html` is written too.

    Args:
        runs: folder that is searched for run records.
        out: folder of the site; made when absent.
        margin: replaces the non-inferiority margin that each run recorded, in the metrics' unit.

    Returns:
        The path of `index.html`.

    Raises:
        UserError: when a record cannot be read or `out` cannot be written.
    """
    found = boards(load_runs(runs), margin)
    rows = rows_of(found)
    data = datapage.read_data(found)
    links = {use: f"{DATA}#{section}" for use, section in data.links.items()}
    files = {
        "leaderboard.json": json.dumps(rows, indent=2) + "\n",
        "leaderboard.csv": _csv(rows),
        "leaderboard.md": _markdown(found),
        INDEX: render(found, DATA if data else "", links),
    }
    if data:
        files[DATA] = datapage.render(data, INDEX)
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            # A model's answer may hold half a surrogate pair, which UTF-8 cannot.
            (out / name).write_text(text, encoding="utf-8", errors="replace", newline="\n")
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"the site cannot be written to {out}: {error.strerror}") from error
    return out / INDEX


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; prints the path of the page as its last line."""
    parser = argparse.ArgumentParser(
        prog="python -m evals.report",
        description="Rebuild the leaderboard site from the JSON records of the runs.",
    )
    parser.add_argument("runs", type=Path, metavar="RUNS_DIR", help="searched for run.json files")
    parser.add_argument("--out", type=Path, required=True, metavar="SITE_DIR", help="site folder")
    parser.add_argument(
        "--margin",
        type=float,
        metavar="X",
        help="loss that still counts as retained, in the metric's unit (default: as recorded)",
    )
    options = parser.parse_args(arguments)
    with plainly():
        if options.margin is not None and not 0 <= options.margin < math.inf:
            raise UserError(f"--margin must be a number from 0 up, not {options.margin}")
        print(build_report(options.runs, options.out, options.margin))


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def _markdown(found: Sequence[Board]) -> str:
    return "\n".join(_board_markdown(board) for board in found)


def _board_markdown(board: Board) -> str:
    header = ["Rank", "Arm", "Seeds", "Score (%)", "Gain (pp, 95 % CI)", "Retention (pp, 95 % CI)"]
    lines = [header + [f"{name} (pp, 95 % CI)" for name in board.quantizers]]
    lines.append(["---"] * len(lines[0]))
    for rank, arm in board.entries:
        counts = ", ".join(f"{number} {name}" for name, number in arm.verdicts().items() if number)
        lines.append(
            [
                rank,
                arm.name,
                str(len(arm.runs)),
                _score_text(arm.final_score()),
                _change_text(arm.average("gain")),
                f"{_change_text(arm.average('retention'))} {counts}".strip(),
                *(_change_text(arm.cost(name)) for name in board.quantizers),
            ]
        )
    table = "\n".join(f"| {' | '.join(map(_markdown_cell, line))} |" for line in lines)
    return f"## {_markdown_cell(board.test)}\n\n{table}\n"


def _markdown_cell(text: str) -> str:
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    return re.sub(r"\s+", " ", text)


def _score_text(score: MeanScore) -> str:
    if score.is_missing:
        return score.note
    return f"{value(score.value, score.is_share)} ± {value(score.stderr, score.is_share)}"


def _change_text(change: Change) -> str:
    if change.is_missing:
        return change.note
    spread = f", seed sd {value(change.spread, change.is_share)}" if change.seeds > 1 else ""
    difference = signed(change.difference, change.is_share)
    return f"{difference} {interval(change)}{spread} {change.verdict}".strip()


if __name__ == "__main__":
    main()
