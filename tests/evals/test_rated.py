"""A reward model's figures on the arm's page, in its card and in the site."""

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from evals.rated import main_figures, rated_text
from evals.report import build_report
from evals.results import EvalResult, Score
from evals.site.card import write_card
from reward.store import read_json

REPORT = {
    "accuracy": {"value": 0.68, "ci_low": 0.62, "ci_high": 0.74, "n": 271, "ties": 0, "gaps": 0},
    "length_baseline": {"value": 0.55},
    "over_length": {"difference": 0.13, "ci_low": 0.05, "ci_high": 0.21},
    "ece": {"value": 0.06},
    "brier": {"value": None},
}
LINE = "accuracy 0.68 [0.62, 0.74], longest-wins 0.55, ECE 0.06, n=271"


def test_the_main_figures_of_a_report_in_a_line(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report\.json is not a report on a reward model"):
        main_figures(tmp_path)
    (tmp_path / "report.json").write_text(json.dumps(REPORT))
    figures = main_figures(tmp_path)
    assert rated_text(figures) == LINE
    assert figures["brier"] != figures["brier"]


def write_run(
    folder: Path, arm: str, seed: int, accuracy: float, source: str = "hh-01", **more: Any
) -> Path:
    """The record of a run that trained a reward model and measured it, with its report."""
    report = {
        **REPORT,
        "accuracy": REPORT["accuracy"]
        | {"value": accuracy, "ci_low": accuracy - 0.06, "ci_high": accuracy + 0.06},
        "over_length": {
            "difference": accuracy - 0.55,
            "ci_low": accuracy - 0.63,
            "ci_high": accuracy - 0.47,
        },
        "inputs": {"data": {"source": f"/where/ever/{source}", "fingerprint": source}},
    }
    kept = folder / "rewards" / "rm"
    kept.mkdir(parents=True)
    (kept / "report.html").write_text(f"<p>the report of {arm}, seed {seed}</p>")
    (kept / "report.json").write_text(json.dumps(report))
    record = {
        "experiment": "rm_hh",
        "arm": arm,
        "seed": seed,
        "label": f"rm.args.x={arm}",
        "margin": 0.03,
        "policies": ["base"],
        "evaluations": [],
        "stages": [
            {
                "stage": "rm",
                "seconds": 1.0,
                "method": "lora",
                "metrics": {"eval_accuracy": 0.4321, "eval_loss": 0.6543},
            }
        ],
        "rewards": {"rm": main_figures(kept) | {"brier": None}},  # JSON has no NaN
    }
    (folder / "run.json").write_text(json.dumps(record | more))
    return folder


def test_a_reward_model_alone_has_its_page_and_its_card(tmp_path: Path) -> None:
    """Such a run has no policy but the base, and nothing was measured on it."""
    folder = write_run(tmp_path / "runs" / "one", "abc", 3, 0.68)
    index = build_report(tmp_path / "runs", tmp_path / "site")
    assert "rm_hh" in index.read_text("utf-8")
    (arm,) = (tmp_path / "site" / "arms").glob("*.html")
    text = arm.read_text("utf-8")
    for shown in ("68.0 [62.0, 74.0]", "55.0", "+13.0 [+5.0, +21.0]", "0.060", "271"):
        assert shown in text
    assert 'href="../rewards/rm_hh-abc-seed3-rm.html"' in text
    page = tmp_path / "site" / "rewards" / "rm_hh-abc-seed3-rm.html"
    assert page.read_text("utf-8") == "<p>the report of abc, seed 3</p>"
    card = write_card(folder / "run.json").read_text("utf-8")
    assert f"- rm, seed 3, on held-out pairs: {LINE}" in card
    assert "trained: rm." in card
    assert "pipeline_tag: text-classification" in card
    for empty in ("Nothing was measured", "No policy", "No quantizer", "quantized forms"):
        assert empty not in card
    assert "What does quantization cost" not in text
    assert "All metrics" not in text


def test_the_page_has_one_accuracy_for_the_same_pairs(tmp_path: Path) -> None:
    """The trainer's is a mean over batches; it stands where there is no report."""
    write_run(tmp_path / "runs" / "rated", "a", 1, 0.68)
    write_run(tmp_path / "runs" / "plain", "b", 1, 0.68, rewards={})
    build_report(tmp_path / "runs", tmp_path / "site")
    rated, plain = (
        (tmp_path / "site" / "arms" / f"rm_hh-{arm}.html").read_text("utf-8") for arm in "ab"
    )
    assert "43.2 % of held-out pairs ranked right" in plain
    assert "ranked right" not in rated
    assert "0.654" not in rated


def test_the_leaderboard_ranks_reward_models_by_accuracy(tmp_path: Path) -> None:
    """Three arms; the first two overlap, seeds of the best are averaged."""
    runs, site = tmp_path / "runs", tmp_path / "site"
    found = [0.70, 0.74]
    for seed, accuracy in enumerate(found):
        write_run(runs / f"best{seed}", "best", seed, accuracy)
    write_run(runs / "near", "near", 0, 0.68)
    write_run(runs / "last", "last", 0, 0.51)
    index = build_report(runs, site)
    rows = read_json(site / "leaderboard.json")
    assert [(row["arm"], row["rank"]) for row in rows] == [
        ("best", "1–2"), ("near", "1–2"), ("last", "3"),
    ]  # fmt: skip
    assert {row["test"] for row in rows} == {"held-out pairs of hh-01"}
    best, near = rows[:2]
    assert best["reward_accuracy"] == pytest.approx(0.72)
    assert (best["reward_ci_low"], best["reward_ci_high"]) == pytest.approx((0.66, 0.78))
    assert best["reward_over_length"] == pytest.approx(0.17)
    assert best["reward_accuracy_seed_sd"] == pytest.approx(statistics.stdev(found))
    assert near["reward_accuracy_seed_sd"] is None
    assert best["reward_n"] == 271
    assert best["reward_report"] == "rewards/rm_hh-best-seed0-rm.html"
    assert (site / best["reward_report"]).is_file()
    with (site / "leaderboard.csv").open(encoding="utf-8") as lines:
        assert [float(row["reward_accuracy"]) for row in csv.DictReader(lines)] == pytest.approx(
            [0.72, 0.68, 0.51]
        )
    text = (site / "leaderboard.md").read_text("utf-8")
    href = "rewards/rm_hh-best-seed0-rm.html"
    assert f"[72.0]({href}) [66.0, 78.0], seed sd 2.8, n = 271 |" in text
    assert f"[+17.0]({href}) [+9.0, +25.0], seed sd 2.8 | [6.0]({href}), seed sd 0.0 |" in text
    page = index.read_text("utf-8")
    assert "Reward models on held-out pairs of hh-01" in page
    assert page.count(f'class="number" href="{href}"') == 3
    for shown in ("72.0", "[66.0, 78.0]", "+17.0", "[+9.0, +25.0]", "n = 271", "seed sd 2.8"):
        assert shown in page
    assert "overlap of the accuracies" in page
    files = {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}
    build_report(runs, site)
    assert files == {path: path.read_bytes() for path in site.rglob("*") if path.is_file()}


def test_reward_models_on_other_pairs_are_on_another_board(tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "a", "a", 0, 0.6)
    write_run(tmp_path / "runs" / "b", "b", 0, 0.9, source="judged-02")
    lost = write_run(tmp_path / "runs" / "c", "c", 0, 0.7)
    (lost / "rewards" / "rm" / "report.json").unlink()
    (lost / "rewards" / "rm" / "report.html").unlink()
    build_report(tmp_path / "runs", tmp_path / "site")
    rows = read_json(tmp_path / "site" / "leaderboard.json")
    assert [(row["test"], row["rank"], row["reward_report"]) for row in rows] == [
        ("held-out pairs of hh-01", "1", "rewards/rm_hh-a-seed0-rm.html"),
        ("held-out pairs of judged-02", "1", "rewards/rm_hh-b-seed0-rm.html"),
        ("held-out pairs of unknown source", "1", ""),
    ]
    page = (tmp_path / "site" / "index.html").read_text("utf-8")
    assert 'href="arms/rm_hh-c.html#rewards"' in page  # where all of it is said


def test_each_report_has_a_page_of_its_own(tmp_path: Path) -> None:
    """Names that are equal where they are cut, and one arm on two boards."""
    runs, site = tmp_path / "runs", tmp_path / "site"
    for end in ("a", "b"):
        write_run(runs / end, "abc", 0, 0.6, experiment="x" * 70 + end)
    for limit in (1, 2):
        entry = {"policy": "base", "quantizer": "none", "suite": "quiz", "path": "quiz"}
        folder = write_run(runs / f"{limit}", "abc", 0, 0.6, evaluations=[entry])
        (folder / "quiz").mkdir()
        score = Score("quiz", "acc", 0.5, 0.1, 2, True, True)
        EvalResult({}, "none", "quiz", "gain", {"limit": limit}, [score], {}, {}).save(
            folder / "quiz"
        )
    build_report(runs, site)
    assert len(list((site / "rewards").iterdir())) == 4
    linked = [row["reward_report"] for row in read_json(site / "leaderboard.json")]
    assert len(set(linked)) == 4
    assert all((site / page).is_file() for page in linked)


def test_a_figure_that_is_missing_is_a_dash(tmp_path: Path) -> None:
    write_run(tmp_path / "runs", "abc", 0, 0.6, rewards={"rm": {"accuracy": 0.6}})
    build_report(tmp_path / "runs", tmp_path / "site")
    (arm,) = (tmp_path / "site" / "arms").glob("*.html")
    assert ">nan<" not in arm.read_text("utf-8")
