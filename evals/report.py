"""The leaderboard site, rebuilt from the JSON records alone.

`python -m evals.report RUNS_DIR --out SITE_DIR` writes it. Equal records give equal bytes: every
date on the page is the date of a run. No torch.
"""

import argparse
import json
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from filelock import FileLock

from conf.entry import UserError, plainly
from evals.leaderboard import boards, leaderboard_rows
from evals.rated import rated
from evals.runs import load_runs
from evals.site import armpage, card, datapage, page, samplespage, tables
from evals.site.places import DATA, INDEX, places

__all__ = ["build_report", "leaderboard_rows", "main"]


def build_report(runs: Path, out: Path, margin: float | None = None) -> Path:
    """Write the site into `out`: the leaderboard, a page and a model card an arm, the samples, the data, the tables.

    Files of the same name are replaced, others are left.

    Args:
        runs: folder that is searched for run records.
        out: folder of the site; made when absent.
        margin: replaces the non-inferiority margin that each run recorded, in the metrics' unit.

    Returns:
        The path of `index.html`.

    Raises:
        UserError: when a record cannot be read or `out` cannot be written.
    """
    load_runs(runs)  # what is no folder of runs is refused before anything is made
    try:
        out.mkdir(parents=True, exist_ok=True)
        # Of two builders, the later also reads the records later: none replaces a page by an older one.
        with FileLock(out / ".lock"):
            for name, text in _files(runs, margin):
                _write(out / name, text)
    except (FileExistsError, NotADirectoryError, IsADirectoryError, PermissionError) as error:
        raise UserError(f"the site cannot be written to {out}: {error.strerror}") from error
    return out / INDEX


def _write(path: Path, text: str) -> None:
    """Write a file so that a reader sees the old one or the new one, never half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.tmp")
    # A model's answer may hold half a surrogate pair, which UTF-8 cannot.
    partial.write_text(text, encoding="utf-8", errors="replace", newline="\n")
    os.replace(partial, path)


def _files(runs: Path, margin: float | None) -> Iterator[tuple[str, str]]:
    """Path from the site's root and text of each file. The index is last: it leads to what is there."""
    found = boards(load_runs(runs), margin)
    data = datapage.read_data(found)
    arms = places(found, {use: f"{DATA}#{section}" for use, section in data.links.items()})
    for place in arms:
        for subject, path in place.samples.items():
            yield path, samplespage.render(place, subject, runs)
        for one in rated(place.arm.runs):
            if one.page:
                yield one.page, one.report.read_text(encoding="utf-8")
        yield place.card, card.card(place.arm)
        yield place.page, armpage.render(place)
    if data:
        yield DATA, datapage.render(data, INDEX)
    rows = tables.records(found)
    yield "leaderboard.json", json.dumps(rows, indent=2) + "\n"
    yield "leaderboard.csv", tables.as_csv(rows)
    yield "leaderboard.md", tables.as_markdown(found)
    yield INDEX, page.render(arms, DATA if data else "")


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line; prints the path of the page as its last line."""
    parser = argparse.ArgumentParser(
        prog="python -m evals.report",
        description="Rebuild the leaderboard site from the JSON records of the runs.",
        epilog="example: python -m evals.report outputs/runs --out site",
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


if __name__ == "__main__":
    main()
