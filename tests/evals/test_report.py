"""The report against records written by hand, whose numbers are worked out in the tests."""

import base64
import csv
import hashlib
import html
import json
import math
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock

from evals.leaderboard import leaderboard_rows, rank_ranges
from evals.report import build_report, main
from evals.results import EvalResult, Score
from evals.site.markup import brief, own_note, shared_note
from evals.site.samplespage import CHARACTERS, DOCUMENTS, likelihoods
from reward.pages.markup import signed
from reward.store import write_json

Answers = Sequence[tuple[str, float]]  # answer and score of each document


def write_evaluation(
    folder: Path,
    suite: str,
    role: str,
    tasks: Mapping[str, Answers],
    *,
    quantizer: str = "none",
    skipped: str | None = None,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """A result folder with one metric, `acc`, per task."""
    folder.mkdir(parents=True, exist_ok=True)
    for task, answers in tasks.items():
        lines = [json.dumps(_sample(i, text, mark)) for i, (text, mark) in enumerate(answers)]
        (folder / f"{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    EvalResult(
        model={"path": "tiny"},
        quantizer=quantizer,
        suite=suite,
        role=role,
        settings=dict(settings or {"tasks": sorted(tasks), "limit": 8}),
        scores=[] if skipped else [_score(task, answers) for task, answers in tasks.items()],
        samples={} if skipped else {task: f"{task}.jsonl" for task in tasks},
        provenance={"commit": "abc"},
        seconds=1.0,
        skipped=skipped,
    ).save(folder)


def marks(*values: float) -> Answers:
    """Answers of which only the scores matter."""
    return [(f"answer {value}", value) for value in values]


def write_run(folder: Path, evaluations: Sequence[tuple[str, str, str]], **fields: Any) -> None:
    """A `run.json` that names evaluations: (policy, quantizer, suite) in `evals/P-Q-S`."""
    record = {
        "experiment": "demo",
        "title": "A demonstration",
        "label": "",
        "arm": "0a1b2c3d",
        "seed": 0,
        "overrides": [],
        "command": "python -m align +experiment=demo",
        "started": "2026-11-21T03:00:00+00:00",
        "seconds": 312.4,
        "margin": 0.03,
        "model": {"path": "tiny", "dtype": "bfloat16"},
        "stages": [
            {
                "stage": "dpo",
                "key": "0123456789abcdef",
                "seconds": 81.0,
                "reused": False,
                "metrics": {"train_loss": 0.11},
                "data": {"source": "demo:preferences", "rows": 192, "dropped": 0},
                "method": "lora",
                "parameters": {"trained": 4884480, "total": 134515008},
            }
        ],
        "policies": ["base", "dpo"],
        "evaluations": [
            {"policy": p, "quantizer": q, "suite": s, "path": f"evals/{p}-{q}-{s}"}
            for p, q, s in evaluations
        ],
        "provenance": {"commit": "abc", "dirty": False, "versions": {"torch": "2.11"}},
    }
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / "run.json", record | fields)


def _sample(number: int, answer: str, mark: float) -> dict[str, Any]:
    prompt = f"question {number}"
    return {
        "doc_id": number,
        "doc_hash": hashlib.sha256(prompt.encode()).hexdigest()[:8],
        "prompt": prompt,
        "target": "42",
        "answer": answer,
        "metrics": {"acc": mark},
    }


def _score(task: str, answers: Answers) -> Score:
    values = [mark for _, mark in answers]
    mean = sum(values) / len(values)
    variance = sum((mark - mean) ** 2 for mark in values) / (len(values) - 1)
    stderr = math.sqrt(variance / len(values))
    return Score(task, "acc", mean, stderr, len(values), higher_is_better=True, is_main=True)


TASK = [("base", "none", "task"), ("dpo", "none", "task")]
GENERAL = [("base", "none", "general"), ("dpo", "none", "general")]
BASE = marks(0, 0, 0, 0, 0, 0, 1, 1)


def write_task(run: Path, base: Answers, dpo: Answers, **settings: Any) -> None:
    """The gain suite of a run: one task, `json`."""
    write_evaluation(run / "evals/base-none-task", "task", "gain", {"json": base})
    write_evaluation(run / "evals/dpo-none-task", "task", "gain", {"json": dpo}, **settings)


def rewrite_scores(run: Path, **fields: Any) -> None:
    """Change fields of every score in a run's results."""
    for path in run.rglob("results.json"):
        record = json.loads(path.read_text("utf-8"))
        record["scores"] = [score | fields for score in record["scores"]]
        path.write_text(json.dumps(record), "utf-8")


def rename_metric(run: Path, name: str, **fields: Any) -> None:
    """Call the one metric of a run by another name, and change fields of its scores."""
    for path in (*run.rglob("*.jsonl"), *run.rglob("results.json")):
        path.write_text(path.read_text("utf-8").replace('"acc"', f'"{name}"'), "utf-8")
    rewrite_scores(run, metric=name, **fields)


def page(runs: Path, out: Path) -> str:
    """Every page of the site, one after the other."""
    build_report(runs, out)
    return "\n".join(path.read_text("utf-8") for path in sorted(out.rglob("*.html")))


def only(folder: Path, pattern: str) -> str:
    """The text of the one file that the pattern finds."""
    (path,) = folder.rglob(pattern)
    return path.read_text("utf-8")


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """One run: 2 of 8 right before, 6 of 8 after; one of two general tasks is lost."""
    run = tmp_path / "runs/one"
    write_task(run, BASE, marks(1, 1, 1, 1, 0, 0, 1, 1))
    right, wrong = marks(*[1] * 8), marks(*[0] * 6, 1, 1)
    write_evaluation(
        run / "evals/base-none-general", "general", "retention", {"kept": right, "lost": right}
    )
    write_evaluation(
        run / "evals/dpo-none-general", "general", "retention", {"kept": right, "lost": wrong}
    )
    write_evaluation(
        run / "evals/dpo-int8-task", "task", "gain", {}, quantizer="int8", skipped="needs a GPU"
    )
    write_run(run, [*TASK, *GENERAL, ("dpo", "int8", "task")])
    return tmp_path / "runs"


Z2 = 1.959964**2


def wilson_upper(won: float, n: float) -> float:
    share = won / n
    spread = math.sqrt(Z2 * (share * (1 - share) / n + Z2 / (4 * n**2)))
    return (share + Z2 / (2 * n) + spread) / (1 + Z2 / n)


def test_the_gain_is_the_paired_difference_worked_out_by_hand(runs: Path) -> None:
    (row,) = leaderboard_rows(runs)
    # Four of eight are won, none is lost: see `test_flips_all_one_way_by_hand`.
    assert row["gain"] == pytest.approx(0.5)
    assert row["gain_ci_low"] == pytest.approx((4 - Z2) / (8 + Z2), abs=1e-6)
    assert row["gain_ci_high"] == pytest.approx(wilson_upper(4, 8), abs=1e-6)
    assert row["gain_verdict"] == "better"
    assert row["score"] == pytest.approx(0.75)
    assert row["rank"] == "1"
    assert row["gain_seed_sd"] is None


def test_the_retention_average_weighs_tasks_equally_and_counts_verdicts(runs: Path) -> None:
    (row,) = leaderboard_rows(runs)
    assert row["retention"] == pytest.approx((0.0 - 0.75) / 2)
    assert (row["retention_retained"], row["retention_forgotten"]) == (1, 1)
    # The kept task has no error. Of the other's eight, six are lost.
    high, low = -(6 - Z2) / (8 + Z2), -wilson_upper(6, 8)
    assert row["retention_ci_high"] == pytest.approx(-0.375 + (high + 0.75) / 2, abs=1e-6)
    assert row["retention_ci_low"] == pytest.approx(-0.375 + (low + 0.75) / 2, abs=1e-6)


def test_a_wider_margin_forgives(runs: Path) -> None:
    (row,) = leaderboard_rows(runs, margin=2.0)
    assert (row["retention_retained"], row["retention_forgotten"]) == (2, 0)


def test_a_rebuild_is_byte_identical(runs: Path, tmp_path: Path) -> None:
    build_report(runs, tmp_path / "a")
    build_report(runs, tmp_path / "b")
    files = (
        path for path in (tmp_path / "a").rglob("*") if path.is_file() and path.name != ".lock"
    )
    names = sorted(path.relative_to(tmp_path / "a").as_posix() for path in files)
    assert names == [
        "arms/demo-0a1b2c3d.html",
        "cards/demo-0a1b2c3d.md",
        "index.html",
        "leaderboard.csv",
        "leaderboard.json",
        "leaderboard.md",
        "samples/demo-0a1b2c3d/general-kept-base-dpo.html",
        "samples/demo-0a1b2c3d/general-lost-base-dpo.html",
        "samples/demo-0a1b2c3d/task-json-base-dpo.html",
    ]
    for name in names:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_page_does_not_depend_on_where_the_records_lie(runs: Path, tmp_path: Path) -> None:
    (runs / "one/evals/base-none-general/results.json").unlink()  # its message holds a path
    before = page(runs, tmp_path / "a")
    assert str(tmp_path) not in before
    assert page(runs.rename(tmp_path / "moved"), tmp_path / "b") == before


def test_the_page_asks_nothing_of_the_network(runs: Path, tmp_path: Path) -> None:
    text = page(runs, tmp_path / "site")
    for word in ('src="', "@import", "url(http", 'href="http', '<link rel="stylesheet'):
        assert word not in text
    assert only(tmp_path / "site/arms", "*.html").count("<svg") == 3


def test_seeds_are_averaged_and_their_spread_is_kept_apart(tmp_path: Path) -> None:
    gains = {0: marks(1, 1, 0, 0, 0, 0, 1, 1), 1: marks(1, 1, 1, 1, 0, 0, 1, 1)}
    for seed, dpo in gains.items():
        write_task(tmp_path / f"runs/{seed}", BASE, dpo)
        write_run(tmp_path / f"runs/{seed}", TASK, seed=seed)
    (row,) = leaderboard_rows(tmp_path / "runs")
    assert row["seeds"] == 2
    assert row["gain"] == pytest.approx((0.25 + 0.5) / 2)
    assert row["gain_seed_sd"] == pytest.approx(0.25 / math.sqrt(2))
    # 16 answers to 8 documents: a document's answers are a cluster, with sums 2, 2, 1, 1, 0, 0, 0, 0.
    robust = 8 / 7 * (2 * 1.25**2 + 2 * 0.25**2 + 4 * 0.75**2) / 16**2
    plain = 0.375 * 0.625 / 15
    size = 16 * plain / robust * (2.131450 / 2.364624) ** 2  # t of 15 and of 7 degrees of freedom
    assert row["gain_ci_high"] == pytest.approx(wilson_upper(0.375 * size, size), abs=1e-6)
    assert "seed sd 17.7" in page(tmp_path / "runs", tmp_path / "site")


def test_a_repeated_seed_counts_once_and_the_newest_run_wins(tmp_path: Path) -> None:
    for day, dpo in ((1, BASE), (2, marks(*[1] * 8))):
        write_task(tmp_path / f"runs/{day}", BASE, dpo)
        write_run(tmp_path / f"runs/{day}", TASK, started=f"2026-11-0{day}T00:00:00+00:00")
    (row,) = leaderboard_rows(tmp_path / "runs")
    assert (row["seeds"], row["score"]) == (1, 1.0)
    assert "1 older run(s)" in page(tmp_path / "runs", tmp_path / "site")


def test_a_skipped_quantizer_says_so_and_is_no_zero(runs: Path, tmp_path: Path) -> None:
    (row,) = leaderboard_rows(runs)
    assert row["int8_cost"] is None
    assert row["int8_cost_note"] == "skipped: needs a GPU"
    assert "skipped: needs a GPU" in page(runs, tmp_path / "site")
    assert "skipped: needs a GPU" in (tmp_path / "site/leaderboard.md").read_text("utf-8")


def test_a_quantizer_that_changes_nothing_is_retained(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    write_task(run, BASE, BASE)
    write_evaluation(run / "evals/dpo-int8-task", "task", "gain", {"json": BASE}, quantizer="int8")
    write_run(run, [*TASK, ("dpo", "int8", "task")])
    (row,) = leaderboard_rows(run)
    assert (row["int8_cost"], row["int8_cost_verdict"]) == (0.0, "retained")


def test_mismatched_settings_are_the_reason_in_the_cell(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    write_task(run, BASE, BASE, settings={"tasks": ["json"], "limit": 9})
    write_run(run, TASK)
    (row,) = leaderboard_rows(run)
    assert (row["rank"], row["gain"]) == ("–", None)
    assert "limit: 8 → 9" in row["gain_note"]
    assert "limit: 8 → 9" in page(run, tmp_path / "site")
    index = (tmp_path / "site/index.html").read_text("utf-8")
    assert '#gain">not comparable: settings differ</a>' in index
    assert "limit: 8 → 9" not in index
    assert "| not comparable: settings differ |" in (tmp_path / "site/leaderboard.md").read_text(
        "utf-8"
    )


def test_a_reason_is_short_and_what_all_rows_share_is_apart() -> None:
    note = "without wiki, which has another unit; 1 seed(s) only, because of it"
    assert shared_note(note) == "without wiki, which has another unit"
    assert own_note(note) == "1 seed(s) only, because of it"
    assert own_note(shared_note(note)) == ""
    assert brief("the results are not comparable, their settings differ:\n  a: 1 → 2") == (
        "not comparable: settings differ"
    )
    assert brief("skipped: needs a GPU") == "skipped: needs a GPU"
    assert len(brief("x" * 500)) == 90


def test_a_difference_in_nats_has_four_decimals_unless_it_is_smaller() -> None:
    numbers = (0.02197, -0.5, 0.00002197, -12.3456, 0.0)
    assert [signed(number, share=False) for number in numbers] == [
        "+0.0220", "−0.5000", "+2.2e−05", "−12.35", "0.0",
    ]  # fmt: skip


def test_a_lost_sample_file_is_the_reason_in_the_cell(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    write_task(run, BASE, BASE)
    (run / "evals/dpo-none-task/json.jsonl").unlink()
    write_run(run, TASK)
    (row,) = leaderboard_rows(run)
    assert row["gain"] is None
    assert "json.jsonl" in row["gain_note"]


def test_a_metric_that_cannot_be_paired_says_so(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    write_task(run, BASE, BASE)
    rewrite_scores(run, metric="corpus_f1")  # in no sample
    write_run(run, TASK)
    (row,) = leaderboard_rows(run)
    assert row["gain"] is None
    assert "not a mean over the documents" in row["gain_note"]


def test_a_gain_in_a_metric_where_less_is_better_is_positive(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    write_task(run, marks(*[1] * 8), BASE)
    rewrite_scores(run, higher_is_better=False)
    write_run(run, TASK)
    (row,) = leaderboard_rows(run)
    assert (row["gain"], row["gain_verdict"]) == (0.75, "better")
    text = page(run, tmp_path / "site")
    assert "−75.0" in text  # its table shows the metric as it is
    assert "6 gained, 2 the same" in text
    arm = only(tmp_path / "site/arms", "*.html")
    assert "acc in %, lower is better, on 8 held-out documents" in arm
    assert "Change vs base" in arm


def test_two_gain_tasks_are_averaged_and_one_lost_task_leaves_no_average(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    tasks = {"json": BASE, "yaml": BASE}
    write_evaluation(run / "evals/base-none-task", "task", "gain", tasks)
    write_evaluation(run / "evals/dpo-none-task", "task", "gain", tasks | {"json": marks(*[1] * 8)})
    write_run(run, TASK)
    (row,) = leaderboard_rows(run)
    assert row["gain"] == pytest.approx((0.75 + 0) / 2)
    assert row["score"] == pytest.approx((1 + 0.25) / 2)
    assert row["score_n"] == 16
    page(run, tmp_path / "site")
    write_evaluation(run / "evals/base-none-more", "more", "gain", {"toml": BASE})
    write_run(run, [*TASK, ("base", "none", "more")])
    (row,) = leaderboard_rows(run)
    assert (row["gain"], row["gain_note"]) == (None, "dpo was not measured on more")
    page(run, tmp_path / "site")


def test_a_loss_is_not_headed_with_percent_and_two_of_them_are_averaged(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    tasks = {"json": BASE, "yaml": marks(*[3] * 8)}
    write_evaluation(run / "evals/base-none-task", "task", "gain", tasks)
    write_evaluation(run / "evals/dpo-none-task", "task", "gain", tasks | {"json": marks(*[2] * 8)})
    rename_metric(run, "loss", higher_is_better=False)
    write_run(run, TASK)
    (row,) = leaderboard_rows(run)
    assert (row["score"], row["score_note"]) == (2.5, "")
    assert row["gain"] == pytest.approx((0.25 - 2) / 2)
    assert "common unit" not in page(run, tmp_path / "site")
    text = (tmp_path / "site/leaderboard.md").read_text("utf-8")
    assert "| Score (own unit) | Gain (own unit, 95 % CI) | Retention (pp, 95 % CI) |" in text
    assert "| −0.8750 [" in text


def test_arms_are_found_by_their_verdicts(runs: Path, tmp_path: Path) -> None:
    index = build_report(runs, tmp_path / "site")
    assert 'data-verdicts="better forgot"' in index.read_text("utf-8")
    open_task = {"kept": marks(*[1] * 8), "lost": marks(*[1] * 7, 0)}
    write_evaluation(runs / "one/evals/dpo-none-general", "general", "retention", open_task)
    index = build_report(runs, tmp_path / "site")  # one is retained, one inconclusive
    assert 'data-verdicts="better"' in index.read_text("utf-8")
    same = {name: marks(*[1] * 8) for name in open_task}
    write_evaluation(runs / "one/evals/dpo-none-general", "general", "retention", same)
    index = build_report(runs, tmp_path / "site")
    assert 'data-verdicts="better kept"' in index.read_text("utf-8")


def test_a_margin_of_its_own_is_told_in_points(runs: Path, tmp_path: Path) -> None:
    write_run(runs / "one", [*TASK, *GENERAL], margins={"kept": 0.05})
    assert "Margins of their own: kept 5 points." in page(runs, tmp_path / "site")


def test_the_adjusted_p_is_of_the_declared_family(runs: Path, tmp_path: Path) -> None:
    names = [*TASK, *GENERAL]
    write_run(runs / "one", names, family=["json/acc", "kept"])
    for path in runs.rglob("*-none-task/results.json"):  # the hypothesis is no main metric
        record = json.loads(path.read_text("utf-8"))
        (score,) = record["scores"]
        main = score | {"metric": "other", "is_main": True}
        path.write_text(json.dumps(record | {"scores": [score | {"is_main": False}, main]}))
    text = page(runs, tmp_path / "site")
    assert "Holm's over the declared family, json/acc, kept." in html.unescape(text)
    (cells,) = re.findall(r"<td>json</td><td>acc</td>.*?</tr>", text, re.S)
    p, adjusted, _ = re.findall(r'<td class="r num">([^<]*)</td>', cells)[-3:]
    assert (p, adjusted) == ("0.125", "0.250")


def test_a_missing_stderr_is_drawn_without_an_interval(
    runs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rewrite_scores(runs, stderr=None)
    drawn: list[Any] = []
    monkeypatch.setattr(
        "evals.site.armpage.score_chart", lambda _, points, __: str(drawn.extend(points))
    )
    page(runs, tmp_path / "site")
    assert drawn
    assert all(math.isnan(end) for point in drawn for end in (point.low, point.high))


def test_a_run_that_trained_nothing_has_a_page(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    write_task(run, BASE, BASE)
    write_run(run, TASK[:1], policies=["base"], stages=[])
    (row,) = leaderboard_rows(run)
    assert (row["gain"], row["gain_note"]) == (None, "no policy was trained")
    page(run, tmp_path / "site")
    arm = only(tmp_path / "site/arms", "*.html")
    assert "What does it score?" in arm
    for word in ("Is it better?", "What was lost?", "What was trained", "Gain vs base"):
        assert word not in arm
    index = (tmp_path / "site/index.html").read_text("utf-8")
    assert "Gain vs base" not in index
    assert "base →" not in index
    assert "n = 8" in index
    assert "Gain" not in (tmp_path / "site/leaderboard.md").read_text("utf-8")


def test_a_board_without_a_gain_suite_is_headed_by_its_experiment(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    for quantizer in ("none", "int8"):
        folder = run / f"evals/base-{quantizer}-general"
        write_evaluation(folder, "general", "retention", {"kept": BASE}, quantizer=quantizer)
    names = [("base", quantizer, "general") for quantizer in ("none", "int8")]
    write_run(run, names, policies=["base"], stages=[], experiment="formats")
    text = page(run, tmp_path / "site")
    assert "<h2>formats</h2>" in text
    assert "no gain suite</h2>" not in text
    assert (tmp_path / "site/leaderboard.md").read_text("utf-8").startswith("## formats\n")


def test_one_task_under_two_settings_is_two_tests(tmp_path: Path) -> None:
    for limit in (8, 9):
        run = tmp_path / f"runs/{limit}"
        for policy in ("base", "dpo"):
            folder = run / f"evals/{policy}-none-task"
            write_evaluation(folder, "task", "gain", {"json": BASE}, settings={"limit": limit})
        write_run(run, TASK, arm=str(limit))
    rows = leaderboard_rows(tmp_path / "runs")
    assert [row["rank"] for row in rows] == ["1", "1"]
    assert len({row["test"] for row in rows}) == 2


def test_suites_of_other_names_and_equal_settings_are_one_test(tmp_path: Path) -> None:
    for name, dpo in (("task", BASE), ("renamed", marks(*[1] * 8))):
        run = tmp_path / "runs" / name
        for policy, answers in (("base", BASE), ("dpo", dpo)):
            folder = run / f"evals/{policy}-none-{name}"
            write_evaluation(folder, name, "gain", {"json": answers})
        suites = [(policy, "none", name) for policy in ("base", "dpo")]
        write_run(run, suites, experiment=name)
    rows = leaderboard_rows(tmp_path / "runs")
    assert [(row["test"], row["rank"], row["name"]) for row in rows] == [
        ("json", "1", "renamed"),
        ("json", "2", "task"),
    ]
    assert "overlap of intervals" not in page(tmp_path / "runs", tmp_path / "site")


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    hostile = "</pre><script>alert(1)</script>\ud800"
    write_task(run, BASE, [(hostile, 1.0)] * 8)
    write_run(run, TASK, label="<img onerror=x>|$a$", title="<b>")
    write_task(run / "other", BASE, [("{}", 1.0)] * 8)
    write_run(run / "other", TASK, label="plain", arm="other")
    text = page(run, tmp_path / "site")
    assert "&lt;script&gt;alert(1)" in text
    for word in ("<script>alert", "<img", "<b>&lt;b&gt;"):
        assert word not in text.replace("<title>", "")
    for path in (tmp_path / "site").rglob("*.html"):
        one = path.read_text("utf-8")
        (inline,) = re.findall(r"<script>(.*?)</script>", one, re.S)
        named = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"script-src 'sha256-{named}'" in html.unescape(one)
    assert "&lt;img onerror=x>\\|$a$" in (tmp_path / "site/leaderboard.md").read_text("utf-8")


def test_samples_that_are_scored_differently_come_first(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    base = [(f"before {i}", 0.0) for i in range(30)]
    dpo = [(f"after {i}", float(i >= 28)) for i in range(30)]
    write_task(run, base, dpo)
    write_run(run, TASK)
    text = page(run, tmp_path / "site")
    assert text.index("after 28") < text.index("after 29") < text.index("after 0")
    assert "30 documents, from base to dpo: 2 gained, 28 the same" in text


def test_a_page_of_many_documents_holds_both_outcomes_and_says_what_is_left_out(
    tmp_path: Path,
) -> None:
    run = tmp_path / "runs"
    base = [(f"before {i}", float(i == 999)) for i in range(1000)]
    dpo = [(f"after {i}", float(i < 900)) for i in range(1000)]
    write_task(run, base, dpo)
    write_run(run, TASK)
    text = page(run, tmp_path / "site")
    assert "1\N{NARROW NO-BREAK SPACE}000 documents" in text
    assert "900 gained, 1 lost, 99 the same" in text
    assert f"{DOCUMENTS} of 1\N{NARROW NO-BREAK SPACE}000 documents" in text
    assert text.count("<article") == DOCUMENTS
    assert text.index("after 0<") < text.index("after 999<") < text.index("after 1<")
    assert "<code>evals/dpo-none-task/json.jsonl</code>" in text


def test_long_texts_lose_their_middle_and_many_long_texts_their_rest(tmp_path: Path) -> None:
    run = tmp_path / "runs"
    long = [(f"start{i} " + "x" * 9000 + f" end{i}", float(i % 2)) for i in range(300)]
    write_task(run, long, long[::-1])
    write_run(run, TASK)
    page(run, tmp_path / "site")
    text = only(tmp_path / "site/samples", "*.html")
    assert "start0 x" in text
    assert " end0<" in text
    assert "characters left out" in text
    assert len(text) < 1.2 * CHARACTERS


def choices(metric: str, right: float, **fields: Any) -> dict[str, Any]:
    """A document with a short right option and a long wrong one."""
    return {
        "doc_id": 0,
        "doc_hash": "0",
        "kind": "multiple_choice",
        "prompt": "Which?",
        "target": "0",
        "answer": f"{right:.3f}  ab\n-6.000  abcdefgh",
        "options": [" ab", " abcdefgh"],
        "metrics": {metric: float(right / 2 > -6 / 8)},
        **fields,
    }


def compared_choices(run: Path, metric: str, **fields: Any) -> str:
    """The page of samples of one document that the tuned model no longer gets right per character."""
    write_task(run, BASE[:1] * 2, BASE[:1] * 2)
    rewrite_scores(run, metric=metric)
    for policy, right in (("base", -1.0), ("dpo", -4.0)):
        rows = [choices(metric, right, **fields), choices(metric, right, doc_id=1, **fields)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (run / f"evals/{policy}-none-task/json.jsonl").write_text(text, "utf-8")
    write_run(run, TASK)
    page(run, run.parent / "site")
    return only(run.parent / "site/samples", "*.html")


def test_a_metric_per_character_shows_what_it_compares(tmp_path: Path) -> None:
    text = compared_choices(tmp_path / "runs", "acc_norm", picked={"acc_norm": 0})
    assert "log-likelihood, and per character" in text
    # −4 beats −6, but −4 / 2 does not beat −6 / 8: that is why the document is lost.
    for number in ("−0.500", "−2.000", "−0.750"):
        assert f'<span class="sub">{number}</span>' in text
    assert "2 lost" in text
    assert "● picked" in text


def test_a_record_that_names_no_pick_has_no_legend_of_it(tmp_path: Path) -> None:
    text = compared_choices(tmp_path / "runs", "acc_norm")
    assert "✓ reference" in text
    assert "picked" not in text.replace(".picked.", "")


def test_options_with_one_text_are_shown_as_answers(tmp_path: Path) -> None:
    answer = {"answer": "-1.500  was late.\n-2.500  was late.", "options": None}
    text = compared_choices(tmp_path / "runs", "acc", target="was late.", **answer)
    assert "✓" not in text
    assert "-2.500  was late." in text


def test_a_reference_is_one_option_also_where_options_are_numbers(tmp_path: Path) -> None:
    options = [f" {number}" for number in (3, 5, 6, 8)]
    answer = "\n".join(f"-{place}.500 {text}" for place, text in enumerate(options))
    text = compared_choices(tmp_path / "runs", "acc", target="3", answer=answer, options=options)
    assert re.findall(r"✓ +(\d)", text) == ["8", "8"]  # of two documents


def test_options_are_read_back_with_their_line_breaks() -> None:
    row = {"answer": "-17.5 a\nb\n-3.25 c\n-inf d", "options": ["a\nb", "c", "d"]}
    assert likelihoods(row) == [("a\nb", -17.5), ("c", -3.25), ("d", -math.inf)]
    assert likelihoods({"answer": "-1.5 yes\n-2.0 no"}) == [("yes", -1.5), ("no", -2.0)]
    assert likelihoods({"answer": "-1.5 yes\nno"}) == []
    assert likelihoods({"answer": "-1.5 a\n-2.5 b", "kind": "generate_until"}) == []


def test_arms_share_ranks_where_intervals_overlap() -> None:
    assert rank_ranges([(0.4, 0.6), (0.3, 0.5), (0.1, 0.2)]) == [(1, 2), (1, 2), (3, 3)]


def test_arms_are_ranked_by_gain_and_only_on_the_same_test(tmp_path: Path) -> None:
    weak, strong = BASE, marks(*[1] * 8)
    for arm, dpo in (("weak", weak), ("strong", strong)):
        write_task(tmp_path / f"runs/{arm}", BASE, dpo)
        write_run(tmp_path / f"runs/{arm}", TASK, arm=arm, label=arm)
    other = tmp_path / "runs/zz"
    for policy in ("base", "dpo"):
        folder = other / f"evals/{policy}-none-task"
        write_evaluation(folder, "task", "gain", {"other": BASE})
    write_run(other, TASK, experiment="zz")
    rows = leaderboard_rows(tmp_path / "runs")
    assert [(row["rank"], row["name"]) for row in rows] == [
        ("1", "demo · strong"),
        ("2", "demo · weak"),
        ("1", "zz"),
    ]
    build_report(tmp_path / "runs", tmp_path / "site")
    with (tmp_path / "site/leaderboard.csv").open(encoding="utf-8", newline="") as file:
        assert [line["name"] for line in csv.DictReader(file)] == [row["name"] for row in rows]
    assert json.loads((tmp_path / "site/leaderboard.json").read_text("utf-8")) == rows


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "there is no folder"),
        ("", "run.json"),
        ("[]", "run.json"),
        ('{"experiment": "x"}', "run.json"),
        ('{"experiment": 3}', "'experiment' is a int"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: str | None, says: str
) -> None:
    folder = tmp_path / "runs"
    if content is not None:
        folder.mkdir()
        (folder / "run.json").write_text(content, "utf-8")
    with pytest.raises(SystemExit) as stopped:
        main([str(folder), "--out", str(tmp_path / "site")])
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line
    assert str(folder) in line
    assert not (tmp_path / "site").exists()


def test_a_folder_without_runs_and_a_bad_margin_are_refused(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for arguments in ([str(tmp_path / "empty")], [str(runs), "--margin", "-1"]):
        with pytest.raises(SystemExit) as stopped:
            main([*arguments, "--out", str(tmp_path / "site")])
        assert stopped.value.code == 2
    assert "holds no run.json" in capsys.readouterr().err


def test_the_command_prints_the_page_and_loads_nothing_heavy(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    code = (
        "import sys; from evals.report import main; main(sys.argv[1:]);"
        "print([n for n in ('torch', 'transformers', 'lm_eval', 'wandb') if n in sys.modules],"
        " file=sys.stderr)"
    )
    command = [sys.executable, "-c", code, str(runs), "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == str(out / "index.html")
    assert done.stderr.splitlines()[-1] == "[]"


def test_drawing_libraries_load_only_when_a_page_is_made() -> None:
    code = "import sys, evals.report; print('matplotlib' in sys.modules, 'jinja2' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


def test_of_two_builders_the_later_reads_the_later_records(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "site"
    out.mkdir()
    with ThreadPoolExecutor() as pool, FileLock(out / ".lock") as lock:
        built = pool.submit(build_report, runs, out)
        time.sleep(0.3)  # it waits for the lock
        write_task(runs / "two", BASE, BASE)
        write_run(runs / "two", TASK, experiment="newer")
        lock.release()
        built.result()
    assert "newer" in (out / "index.html").read_text("utf-8")
    assert not list(out.rglob("*.tmp"))
