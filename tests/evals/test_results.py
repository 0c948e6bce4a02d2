"""Comparing two results: pairing, refusals, verdicts, round trip."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from evals.results import EvalResult, Score, compare, verdict

Write = Callable[..., EvalResult]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes a result with one binary task and reads it back."""
    count = 0

    def make(values: list[float], role: str = "retention", **changes: Any) -> EvalResult:
        nonlocal count
        count += 1
        folder = tmp_path / str(count)
        folder.mkdir()
        rows = [
            {
                "doc_id": i,
                "doc_hash": f"h{i}",
                "prompt": "p",
                "target": "t",
                "answer": "a\u2028b",
                "metrics": {"acc": v},
            }
            for i, v in enumerate(values)
        ]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "samples_quiz.jsonl").write_text(text, encoding="utf-8")
        mean = sum(values) / len(values)
        fields: dict[str, Any] = {
            "model": {"path": "m"},
            "quantizer": "none",
            "suite": "quiz",
            "role": role,
            "settings": {"dtype": "bfloat16", "tasks": {"quiz": {"num_fewshot": 0}}},
            "scores": [Score("quiz", "acc", mean, 0.1, len(values), True, True)],
            "samples": {"quiz": "samples_quiz.jsonl"},
            "provenance": {},
        }
        EvalResult(**(fields | changes)).save(folder)
        return EvalResult.load(folder)

    return make


def test_round_trip(write: Write) -> None:
    result = write([1, 0, 1], seconds=2.5)
    assert EvalResult.load(result.folder) == result
    assert result.seconds == 2.5
    assert result.sample_values("quiz")["1:h1"] == {"acc": 0.0}


def test_nan_is_null_on_disk_and_nan_again(write: Write) -> None:
    result = write([1, 0], scores=[Score("quiz", "acc", math.nan, math.nan, 2, True, True)])
    assert "NaN" not in (result.folder / "results.json").read_text()
    assert math.isnan(result.scores[0].value)


def test_itself_is_all_zeros(write: Write) -> None:
    result = write([1, 0, 1, 1])
    (delta,) = compare(result, result)
    assert (delta.difference, delta.stderr, delta.ci_low, delta.ci_high, delta.flips) == (
        0,
        0,
        0,
        0,
        0,
    )
    assert delta.p == delta.p_adjusted == 1.0
    assert delta.verdict == "retained"


def test_documents_are_paired_by_identity_not_by_order(write: Write, tmp_path: Path) -> None:
    baseline, candidate = write([1, 0, 1, 1]), write([0, 0, 1, 1])
    path = candidate.folder / "samples_quiz.jsonl"
    lines = path.read_text(encoding="utf-8").split("\n")[:-1]
    path.write_text("".join(line + "\n" for line in lines[::-1]), encoding="utf-8")
    (delta,) = compare(baseline, candidate)
    assert delta.difference == -0.25
    assert delta.flips == 0.25


def test_different_settings_are_refused_by_name(write: Write) -> None:
    baseline = write([1, 0])
    settings = {"dtype": "bfloat16", "tasks": {"quiz": {"num_fewshot": 5}}}
    with pytest.raises(UserError, match=r"tasks\.quiz\.num_fewshot: 0 → 5"):
        compare(baseline, write([1, 0], settings=settings))


def test_missing_documents_are_refused(write: Write) -> None:
    with pytest.raises(UserError, match="1 documents of quiz are on one side only"):
        compare(write([1, 0, 1]), write([1, 0]))


def test_a_skipped_side_is_refused(write: Write) -> None:
    with pytest.raises(UserError, match="no bitsandbytes"):
        compare(write([1, 0]), write([1, 0], skipped="no bitsandbytes"))


def test_a_result_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no results\.json"):
        EvalResult.load(tmp_path)
    (tmp_path / "results.json").write_text('{"scores": 3}')
    with pytest.raises(UserError, match="is not a result of this program"):
        EvalResult.load(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "role", "higher", "expected"),
    [
        (0.01, 0.05, "gain", True, "better"),
        (-0.05, -0.01, "gain", True, "worse"),
        (-0.05, -0.01, "gain", False, "better"),
        (-0.01, 0.05, "gain", True, "inconclusive"),
        (-0.02, 0.05, "retention", True, "retained"),
        (-0.02, -0.01, "retention", True, "retained"),  # a loss, but surely below the margin
        (-0.20, -0.01, "retention", True, "forgotten"),
        (-0.20, 0.20, "retention", True, "inconclusive"),  # wide is not "no forgetting"
        (0.01, 0.20, "retention", False, "forgotten"),
        (math.nan, math.nan, "gain", True, "inconclusive"),
    ],
)
def test_verdict(low: float, high: float, role: str, higher: bool, expected: str) -> None:
    assert verdict(low, high, 0.03, role, higher) == expected


def test_lower_is_better_keeps_the_sign_of_the_difference(write: Write) -> None:
    def lower(values: list[float]) -> EvalResult:
        result = write(values, role="gain")
        scores = [replace(result.scores[0], higher_is_better=False)]
        return replace(result, scores=scores)

    (delta,) = compare(lower([1.0] * 20), lower([0.0] * 19 + [1.0]))
    assert delta.difference == pytest.approx(-0.95)
    assert delta.verdict == "better"
