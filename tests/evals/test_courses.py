"""The course of proxy and gold measure on an arm's page."""

import re
from pathlib import Path

import pytest
from test_report import BASE, TASK, marks, write_run, write_task

from evals.leaderboard import boards
from evals.report import build_report
from evals.runs import load_runs
from evals.site.courses import courses, looks_file
from reward.looks import Look, append

GOLDS = {0: [0.5, 0.6, 0.2], 1: [0.5, 0.6, 0.9]}  # seed → gold measure at steps 0, 10, 20


def write_looks(run: Path, golds: list[float]) -> None:
    path = looks_file(run, "dpo")
    path.parent.mkdir(parents=True)
    for number, gold in enumerate(golds):
        spread = [(place - 9.5) / 100 + (-1) ** (place * (number + 1)) / 50 for place in range(20)]
        values = [[mean + one for one in spread] for mean in (number, gold)]
        kl = [number + place / 20 for place in range(20)] if number else [0.0] * 20
        further = {"ended_share": 0.9}
        append(path, Look(10 * number, kl, *values, [30.0 + number] * 20, further))


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for seed, golds in GOLDS.items():
        run = tmp_path / "runs" / f"seed{seed}"
        write_task(run, BASE, marks(1, 1, 1, 0, 0, 1, 1, 1))
        write_run(run, TASK, seed=seed)
        write_looks(run, golds)
    return tmp_path / "runs"


def page(runs: Path, out: Path) -> str:
    build_report(runs, out)
    (arm,) = (out / "arms").glob("*.html")
    return arm.read_text("utf-8")


def test_every_seed_is_judged_and_the_first_drawn(runs: Path, tmp_path: Path) -> None:
    (board,) = boards(load_runs(runs))
    ((_, arm),) = board.entries
    (course,) = courses(arm, "course")
    assert [finding.verdict for _, finding in course.findings] == ["over-optimized", "both rose"]
    assert course.drawn.seed == 0
    found = page(runs, tmp_path / "out")
    section = found[found.index('<section id="overoptimization">') :].split("</section>")[0]
    assert (
        "dpo: proxy and gold measure on held-out prompts while it moved; chart and table are seed 0"
        in section
    )
    assert "From step 10 to step 20 the proxy rose while the gold measure fell" in section
    assert section.count("badge worse") == 1
    assert section.count("badge better") == 1
    assert [int(step) for step in re.findall(r'class="r">(\d+)</th>', section)] == [0, 10, 20]
    assert "√KL" in section
    assert found == page(runs, tmp_path / "again")


def test_without_looks_there_is_no_section(runs: Path, tmp_path: Path) -> None:
    for seed in GOLDS:
        looks_file(runs / f"seed{seed}", "dpo").unlink()
    assert "overoptimization" not in page(runs, tmp_path / "out")


def test_looks_that_cannot_be_read_are_said(runs: Path, tmp_path: Path) -> None:
    looks_file(runs / "seed1", "dpo").write_text("[]\n")
    assert "the looks of seed 1 cannot be read" in page(runs, tmp_path / "out")


def test_looks_at_other_prompts_are_said(runs: Path, tmp_path: Path) -> None:
    fewer = Look(30, *[[0.5] * 19] * 4, {"ended_share": 0.9})
    append(looks_file(runs / "seed1", "dpo"), fewer)
    assert "the looks of seed 1 cannot be read" in page(runs, tmp_path / "out")
