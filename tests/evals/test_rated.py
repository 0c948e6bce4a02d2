"""A reward model's figures on the arm's page, in its card and in the site."""

import json
from pathlib import Path

import pytest

from conf.entry import UserError
from evals.rated import main_figures, rated_text
from evals.report import build_report
from evals.site.card import write_card

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


def test_a_reward_model_alone_has_its_page_and_its_card(tmp_path: Path) -> None:
    """Such a run has no policy but the base, and nothing was measured on it."""
    folder = tmp_path / "runs" / "one"
    (folder / "rewards" / "rm").mkdir(parents=True)
    (folder / "rewards" / "rm" / "report.html").write_text("<p>the report</p>")
    (folder / "rewards" / "rm" / "report.json").write_text(json.dumps(REPORT))
    figures = main_figures(folder / "rewards" / "rm") | {"brier": None}  # JSON has no NaN
    record = {
        "experiment": "rm_hh",
        "arm": "abc",
        "seed": 3,
        "margin": 0.03,
        "policies": ["base"],
        "evaluations": [],
        "stages": [{"stage": "rm", "seconds": 1.0, "method": "lora"}],
        "rewards": {"rm": figures},
    }
    (folder / "run.json").write_text(json.dumps(record))
    index = build_report(tmp_path / "runs", tmp_path / "site")
    assert "rm_hh" in index.read_text("utf-8")
    (arm,) = (tmp_path / "site" / "arms").glob("*.html")
    text = arm.read_text("utf-8")
    for shown in ("68.0 [62.0, 74.0]", "55.0", "+13.0 [+5.0, +21.0]", "0.060", "271"):
        assert shown in text
    assert 'href="../rewards/rm_hh-abc-seed3-rm.html"' in text
    page = tmp_path / "site" / "rewards" / "rm_hh-abc-seed3-rm.html"
    assert page.read_text("utf-8") == "<p>the report</p>"
    card = write_card(folder / "run.json").read_text("utf-8")
    assert f"- rm, seed 3, on held-out pairs: {LINE}" in card
    assert "trained: rm." in card
    assert "pipeline_tag: text-classification" in card
