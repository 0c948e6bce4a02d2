"""Comparing two results: pairing, refusals, verdicts, round trip."""

import json
import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from evals import compare as command
from evals.deltas import Delta, compare, margin_of, verdict
from evals.results import EvalResult, Score
from evals.stats import contributions

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
    assert result.read_samples("quiz")["1:h1"].metrics == {"acc": 0.0}


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
    with pytest.raises(UserError, match="of quiz, 1 are only in the baseline"):
        compare(write([1, 0, 1]), write([1, 0]))
    with pytest.raises(UserError, match="of quiz, 2 are only in the candidate"):
        compare(write([1]), write([1, 0, 1]))


def test_a_skipped_side_is_refused(write: Write) -> None:
    with pytest.raises(UserError, match="no bitsandbytes"):
        compare(write([1, 0]), write([1, 0], skipped="no bitsandbytes"))


def test_a_result_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no results\.json"):
        EvalResult.load(tmp_path)
    for text in ('{"scores": 3}', '{"scores": [null]}', "null"):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(UserError, match="is not a result of this program"):
            EvalResult.load(tmp_path)


@pytest.mark.parametrize(
    ("low", "high", "role", "higher", "expected"),
    [
        (0.01, 0.05, "gain", True, "better"),
        (-0.05, -0.01, "gain", True, "worse"),
        (-0.05, -0.01, "gain", False, "better"),
        (-0.01, 0.05, "gain", True, "inconclusive"),
        (0.0, 0.0, "gain", True, "unchanged"),
        (0.0, 0.0, "gain", False, "unchanged"),  # -0.0
        (0.0, 0.0, "retention", True, "retained"),
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


def edit(result: EvalResult, change: Callable[[list[dict[str, Any]]], Any]) -> EvalResult:
    """The result with other rows in its samples file."""
    path = result.folder / "samples_quiz.jsonl"
    rows = [json.loads(line) for line in path.read_text("utf-8").split("\n") if line]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    return result


def test_no_flips_with_other_answers_is_inconclusive(write: Write) -> None:
    baseline, candidate = write([1, 0] * 20), write([1, 0] * 20)
    assert compare(baseline, candidate)[0].verdict == "retained"  # two files, the same answers

    def reword(rows: list[dict[str, Any]]) -> None:
        rows[0]["answer"] = "another"

    (delta,) = compare(baseline, edit(candidate, reword))
    assert (delta.difference, delta.flips) == (0, 0)
    assert (delta.ci_high, delta.verdict) == (
        pytest.approx(1.959964**2 / (40 + 1.959964**2)),
        "inconclusive",
    )


def test_clusters_widen_the_error(write: Write) -> None:
    baseline, candidate = write([1.0] * 12), write([0.0] * 4 + [1.0] * 8)
    (alone,) = compare(baseline, candidate)

    def gather(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["cluster"] = str(row["doc_id"] // 4)

    (delta,) = compare(edit(baseline, gather), edit(candidate, gather))
    assert (delta.clusters, delta.n, alone.clusters) == (3, 12, None)
    assert delta.difference == alone.difference == pytest.approx(-1 / 3)
    assert delta.stderr == pytest.approx(math.sqrt(3 / 2 * ((8 / 3) ** 2 + 2 * (4 / 3) ** 2)) / 12)
    assert delta.p == 1.0  # one cluster of three changed: its sign alone says nothing
    assert delta.ci_high > alone.ci_high


def test_values_that_are_missing_are_counted(write: Write) -> None:
    def lose(rows: list[dict[str, Any]]) -> None:
        rows[0]["metrics"] = {}
        rows[1]["metrics"]["acc"] = None

    values = [1.0, 1, 0, 1, 0, 1]
    candidate = write(values, scores=[Score("quiz", "acc", math.nan, math.nan, 6, True, True)])
    (delta,) = compare(write(values), edit(candidate, lose))
    assert (delta.n, delta.missing) == (4, 2)
    assert delta.note == "2 of 6 documents have no value on a side and are left out"
    none = edit(write(values), lambda rows: [row["metrics"].clear() for row in rows])
    (delta,) = compare(write(values), none)
    assert math.isnan(delta.difference)
    assert delta.verdict == "inconclusive"


def test_a_score_that_is_nan_says_so(write: Write) -> None:
    broken = [Score("quiz", "acc", math.nan, math.nan, 2, True, True)]
    (delta,) = compare(write([1, 0]), write([1, 0], scores=broken))
    assert math.isnan(delta.difference)
    assert delta.note == "cannot be paired: the candidate's score is not a number"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda text: text[:-20], "cannot be read"),
        (lambda text: text[: text.index("\n") + 1], "hold 1 documents, but its scores are over 3"),
        (lambda text: text + text[: text.index("\n") + 1], "holds document 0 twice"),
        (lambda text: "[]\n" + text, "cannot be read"),
        (
            lambda text: text + text[: text.index("\n") + 1].replace('"acc"', '"f1"'),
            "2 rows of some",
        ),
    ],
)
def test_damaged_samples_are_refused(write: Write, damage: Callable[[str], str], says: str) -> None:
    good, bad = write([1, 0, 1]), write([1, 0, 1])
    path = bad.folder / "samples_quiz.jsonl"
    path.write_text(damage(path.read_text("utf-8")), "utf-8")
    for sides in ((good, bad), (bad, good)):
        with pytest.raises(UserError, match=says):
            compare(*sides)


def test_a_metric_that_one_side_lacks_is_no_zero(write: Write) -> None:
    both = [
        Score("quiz", "acc", 0.5, 0.1, 2, True, True),
        Score("quiz", "f1", 0.4, 0.1, 2, True, False),
    ]
    for sides in (
        (write([1, 0]), write([1, 0], scores=both)),
        (write([1, 0], scores=both), write([1, 0])),
    ):
        _, delta = compare(*sides)
        assert math.isnan(delta.difference)
        assert "has no such metric" in delta.note
        assert math.isnan(delta.baseline) != math.isnan(delta.candidate)


def test_a_score_without_samples_is_shown_and_not_paired(write: Write) -> None:
    (delta,) = compare(write([1, 0], samples={}), write([1, 0], samples={}))
    assert math.isnan(delta.difference)
    assert "not a mean over the documents" in delta.note


def test_sums_are_paired_by_what_each_document_contributes(write: Write) -> None:
    pairs = {
        "base": [(-10.0, 4.0), (-30.0, 10.0), (-6.0, 6.0)],
        "tuned": [(-9.0, 4.0), (-33.0, 10.0), (-5.0, 6.0)],
    }

    def result(name: str) -> EvalResult:
        ratio = sum(v for v, _ in pairs[name]) / 20
        score = Score("quiz", "bits", -ratio / math.log(2), math.nan, 3, False, True)

        def weigh(rows: list[dict[str, Any]]) -> None:
            for row, pair in zip(rows, pairs[name], strict=True):
                row["metrics"], row["weighted"] = {}, {"bits": [*pair, "bits_per_byte"]}

        return edit(write([0, 0, 0], scores=[score]), weigh)

    (delta,) = compare(result("base"), result("tuned"))
    assert delta.difference == pytest.approx(1 / 20 / math.log(2))
    parts = [contributions(pairs[name], "bits_per_byte") for name in ("base", "tuned")]
    change = [b - a for a, b in zip(*parts, strict=True)]
    variance = sum((x - delta.difference) ** 2 for x in change) / 2
    assert delta.stderr == pytest.approx(math.sqrt(variance / 3))
    assert math.isnan(delta.flips)


def test_a_divergence_is_compared_with_its_neutral_value(write: Write) -> None:
    def result(values: list[float], model: str) -> EvalResult:
        score = Score(
            "quiz", "acc", sum(values) / len(values), 0.1, len(values), False, True, neutral=0.0
        )
        return write(
            values,
            scores=[score],
            model={"path": model},
            reference={"path": "base", "quantizer": "none"},
        )

    base = result([0.0] * 5, "base")
    (delta,) = compare(base, result([0.1, 0.2, 0.1, 0.3, 0.1], "tuned"))
    assert delta.baseline == 0
    assert delta.difference == pytest.approx(0.16)
    (same,) = compare(base, base)
    assert (same.difference, same.ci_low, same.ci_high, same.p) == (0, 0, 0, 1)
    (exact,) = compare(base, result([0.0] * 5, "equal"))  # no divergence on any document
    assert (exact.ci_low, exact.ci_high) == (0, 0)


def test_the_family_is_declared_by_name(write: Write) -> None:
    scores = [
        Score("quiz", "acc", 0.75, 0.1, 8, True, True),
        Score("quiz", "f1", 0.75, 0.1, 8, True, False),
    ]

    def double(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            row["metrics"]["f1"] = row["metrics"]["acc"]

    sides = [
        edit(write(values, scores=scores), double)
        for values in ([1.0] * 6 + [0.0] * 2, [0.0] * 2 + [1.0] * 6)
    ]
    by_default = compare(*sides)
    assert [math.isnan(delta.p_adjusted) for delta in by_default] == [False, True]
    both = compare(*sides, family=["quiz", "quiz/f1"])
    assert [delta.p_adjusted for delta in both] == [min(1.0, 2 * delta.p) for delta in both]
    with pytest.raises(UserError, match=r"the family names quizz.*quiz/acc, quiz/f1"):
        compare(*sides, family=["quizz"])


def run(monkeypatch: pytest.MonkeyPatch, *argv: Any) -> None:
    monkeypatch.setattr("sys.argv", ["compare", *map(str, argv)])
    command.main()


def test_the_command_prints_an_aligned_table(
    write: Write,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    baseline, candidate = write([1, 0] * 20), write([0, 0] * 2 + [1, 0] * 18)
    out = tmp_path / "deep/deltas.json"
    run(
        monkeypatch,
        baseline.folder,
        candidate.folder,
        "--json",
        out,
        "--margins",
        "quiz=0.05",
        "--family",
        "quiz",
    )
    said = capsys.readouterr().out
    sides, rows, reading = said.split("\n\n")
    assert str(baseline.folder) in sides
    assert "a loss of 0.03" in sides
    header, line = rows.splitlines()
    assert max(len(header), len(line)) <= 140
    assert line.endswith("inconclusive")
    (delta,) = json.loads(out.read_text())["deltas"]
    needed = math.ceil(40 * (delta["mde"] / 0.05) ** 2)
    assert f"quiz about {needed:,} (it has 40)" in reading
    assert f"{delta['mde']:.4f}" in line


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--family", "nothing"], "the family names nothing"),
        (["--margins", "nothing=0.1"], "--margins names nothing"),
        (["--margins", "quiz=wide"], "write NAME=X"),
        (["--margin", "-1"], "a number from 0 up, not -1"),
        (["--margin", "inf"], "a number from 0 up, not inf"),
    ],
)
def test_a_users_mistake_is_exit_code_2(
    write: Write,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    options: list[str],
    says: str,
) -> None:
    folder = write([1, 0]).folder
    with pytest.raises(SystemExit) as stopped:
        run(monkeypatch, folder, folder, *options)
    assert stopped.value.code == 2
    assert re.search(re.escape(says), capsys.readouterr().err)


def test_a_perplexity_is_judged_as_the_loss_that_it_is_made_of() -> None:
    def delta(metric: str, baseline: float) -> Delta:
        return Delta("text", metric, baseline, 0, 0, 0, 0, 0, 1, 1, 0, 9, False, True, "")

    assert margin_of(delta("loss", 2.0), 0.03, {}) == 0.03
    accepted = math.exp(2.0 + 0.03) - math.exp(2.0)
    assert margin_of(delta("perplexity", math.exp(2.0)), 0.03, {}) == pytest.approx(accepted)
    assert margin_of(delta("perplexity,strict", math.exp(2.0)), 0.03, {}) == pytest.approx(accepted)
    assert margin_of(delta("word_perplexity", 20.0), 0.03, {"word_perplexity": 1.0}) == 1.0


def test_documents_that_the_candidate_failed_on_are_not_retained(write: Write) -> None:
    values: list[float] = [0, 1] * 500
    baseline, candidate = write(values), write(values)
    baseline = edit(baseline, lambda rows: rows[0].update(answer="another"))
    assert compare(baseline, candidate)[0].verdict == "retained"

    def fail(rows: list[dict[str, Any]]) -> None:
        for row in rows[:100]:
            row["metrics"]["acc"] = math.nan

    (delta,) = compare(baseline, edit(candidate, fail))
    assert (delta.missing, delta.reach, delta.difference) == (100, pytest.approx(0.1), 0)
    assert delta.verdict == "inconclusive"  # the 100 may all be wrong


def test_what_is_missing_may_take_back_all_that_was_won(write: Write) -> None:
    def fail(rows: list[dict[str, Any]]) -> None:
        for row in rows[:50]:
            row["metrics"]["acc"] = math.nan

    (delta,) = compare(write([0.0] * 100, "gain"), edit(write([1.0] * 100, "gain"), fail))
    assert delta.ci_low > 0.8
    assert delta.worst[0] == pytest.approx(0.5 * delta.ci_low - 0.5)
    assert delta.verdict == "inconclusive"


def test_how_surprised_models_are_by_their_own_answers_is_not_compared(write: Write) -> None:
    scores = [Score("quiz", "perplexity,none", 3.0, 0.1, 4, False, True)]
    settings = {"metrics": ["perplexity"]}
    one, other = (
        write([1, 2, 3, 4], scores=scores, settings=settings, model={"path": p, "weights": p})
        for p in "ab"
    )
    (delta,) = compare(one, other)
    assert math.isnan(delta.difference)
    assert "perplexity_model" in delta.note
    by_one = [
        write([1, 2], settings=settings | {"perplexity_model": "x"}, model={"weights": p})
        for p in "ab"
    ]
    assert not math.isnan(compare(*by_one)[0].difference)


@pytest.mark.parametrize("value", ["x", [1], {"a": 1}])
def test_a_value_that_is_no_number_is_refused(write: Write, value: Any) -> None:
    def spoil(rows: list[dict[str, Any]]) -> None:
        rows[0]["metrics"]["acc"] = value

    with pytest.raises(UserError, match="cannot be read"):
        compare(write([1, 0]), edit(write([1, 0]), spoil))
