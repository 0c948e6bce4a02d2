"""Contrasts over seeds, families and margins of a run, and the ranks of arms."""

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from evals.contrast import Change, Contrast, Row, contrast, is_share, with_one_unit
from evals.leaderboard import Arm, boards
from evals.results import EvalResult, Score
from evals.runs import Variant, load_runs
from evals.stats import paired
from reward.store import write_json

SUITES = {"task": "gain", "general": "retention"}


def write_result(folder: Path, suite: str, tasks: dict[str, Sequence[float]]) -> None:
    folder.mkdir(parents=True)
    for task, values in tasks.items():
        rows = [
            {
                "doc_id": i,
                "doc_hash": f"{i}",
                "prompt": "p",
                "target": "t",
                "answer": f"{folder} {v}",
                "metrics": {"acc": v},
            }
            for i, v in enumerate(values)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / f"{task}.jsonl").write_text(text, "utf-8")
    EvalResult(
        model={"path": "tiny"},
        quantizer="none",
        suite=suite,
        role=SUITES[suite],
        settings={"suite": suite},
        scores=[
            Score(task, "acc", sum(v) / len(v), 0.1, len(v), True, True)
            for task, v in tasks.items()
        ],
        samples={task: f"{task}.jsonl" for task in tasks},
        provenance={},
    ).save(folder)


def write_run(
    folder: Path, base: dict[str, Any], tuned: dict[str, Any], seed: int = 0, **fields: Any
) -> None:
    """A run of two policies; `base` and `tuned` hold, for each suite, the values of its tasks."""
    for policy, suites in (("base", base), ("dpo", tuned)):
        for suite, tasks in suites.items():
            write_result(folder / f"{policy}-{suite}", suite, tasks)
    evaluations = [
        {"policy": policy, "quantizer": "none", "suite": suite, "path": f"{policy}-{suite}"}
        for policy in ("base", "dpo")
        for suite in base
    ]
    record = {
        "experiment": "demo", "arm": "a", "seed": seed, "margin": 0.03, "policies": ["base", "dpo"],
        "evaluations": evaluations, "label": fields.get("arm", ""),
    }  # fmt: skip
    write_json(folder / "run.json", record | fields)


def arms(folder: Path) -> list[tuple[str, Arm]]:
    return [(rank, arm) for board in boards(load_runs(folder)) for rank, arm in board.entries]


def rows(folder: Path) -> list[Row]:
    ((_, arm),) = arms(folder)
    return arm.stages[-1].rows()


def test_seeds_share_their_documents(tmp_path: Path) -> None:
    base = [0.0] * 30 + [1.0] * 30
    seeds = [[0.0] * (20 - 5 * s) + [1.0] * (40 + 5 * s) for s in range(3)]
    for number, values in enumerate(seeds):
        write_run(
            tmp_path / f"{number}", {"task": {"quiz": base}}, {"task": {"quiz": values}}, number
        )
    (row,) = rows(tmp_path)
    change = row.change
    gains = [10 / 60, 15 / 60, 20 / 60]
    assert change.difference == pytest.approx(0.25)
    assert change.spread == pytest.approx(5 / 60)
    assert (change.n, change.seeds, row.clusters) == (60, 3, None)
    means = [sum(values) / 3 for values in zip(*seeds, strict=True)]
    assert change.stderr == pytest.approx(paired(base, means).stderr)
    # More seeds do not narrow it as more documents would.
    alone = [paired(base, values) for values in seeds]
    assert change.ci_high - change.ci_low > 0.8 * min(one.ci_high - one.ci_low for one in alone)
    assert 0 < change.seed_sd < change.spread
    assert change.total_error > change.seed_sd
    ((_, arm),) = arms(tmp_path)
    assert [one.difference for one in arm.stages[-1].by_seed("gain")] == pytest.approx(gains)
    assert arm.average("gain").spread == pytest.approx(change.spread)


def test_two_tasks_over_seeds_are_averaged_by_task(tmp_path: Path) -> None:
    half = [0.0] * 20 + [1.0] * 20
    for number in range(2):
        tuned = {
            "json": [0.0] * (10 - number) + [1.0] * (30 + number),
            "yaml": half[:20] + [1.0] * 20,
        }
        write_run(
            tmp_path / f"{number}", {"task": {"json": half, "yaml": half}}, {"task": tuned}, number
        )
    ((_, arm),) = arms(tmp_path)
    gain = arm.average("gain")
    assert gain.difference == pytest.approx((10 / 40 + 11 / 40) / 2 / 2)
    assert gain.spread == pytest.approx(1 / 40 / 2 / math.sqrt(2))
    assert (gain.seeds, gain.n) == (2, 80)
    json_row, yaml_row = arm.stages[-1].rows()
    assert gain.stderr == pytest.approx(
        math.hypot(json_row.change.stderr, yaml_row.change.stderr) / 2
    )


def test_a_unit_is_that_of_all_seeds(tmp_path: Path) -> None:
    """An F1 out of 100 is no share, though it is below 1 under one seed."""
    half = [0.0] * 20 + [1.0] * 20
    for seed, f1 in enumerate((0.6, 40.0)):
        tuned = {"task": {"quiz": [1.0] * 10 + half[10:], "spans": [f1] * 40}}
        write_run(tmp_path / f"{seed}", {"task": {"quiz": half, "spans": [0.5] * 40}}, tuned, seed)
    for path in tmp_path.rglob("spans.jsonl"):
        path.write_text(path.read_text("utf-8").replace('"acc"', '"f1"'), "utf-8")
    for path in tmp_path.rglob("results.json"):
        record = json.loads(path.read_text("utf-8"))
        record["scores"][1]["metric"] = "f1"
        path.write_text(json.dumps(record), "utf-8")
    ((_, arm),) = arms(tmp_path)
    gain = arm.average("gain")
    assert gain.difference == pytest.approx(10 / 40)
    for change in (gain, *arm.stages[-1].by_seed("gain")):
        assert change.note == "without spans, which has another unit"
    quiz, spans = arm.stages[-1].rows()
    assert (quiz.change.is_share, spans.change.is_share) == (True, False)


def test_a_declared_family_spans_the_suites(tmp_path: Path) -> None:
    base = {"task": {"quiz": [0.0] * 40}, "general": {"kept": [1.0] * 40, "other": [1.0] * 40}}
    tuned = {
        "task": {"quiz": [0.0] * 30 + [1.0] * 10},
        "general": {"kept": [1.0] * 38 + [0.0] * 2, "other": [1.0] * 40},
    }
    write_run(tmp_path / "a", base, tuned, family=["quiz", "kept"])
    by_task = {row.task: row for row in rows(tmp_path)}
    assert by_task["quiz"].p_adjusted == pytest.approx(2 * by_task["quiz"].p)
    assert by_task["kept"].p_adjusted == pytest.approx(by_task["kept"].p)
    assert math.isnan(by_task["other"].p_adjusted)


def test_a_metric_has_its_own_margin(tmp_path: Path) -> None:
    sides = ({"general": {"kept": [1.0] * 100}}, {"general": {"kept": [1.0] * 98 + [0.0] * 2}})
    write_run(tmp_path / "tight/run", *sides)
    write_run(tmp_path / "wide/run", *sides, margins={"kept/acc": 0.2})
    assert [rows(tmp_path / name)[0].change.verdict for name in ("tight", "wide")] == [
        "inconclusive",
        "retained",
    ]


def test_arms_are_ranked_by_pairs_of_documents_not_by_overlap(tmp_path: Path) -> None:
    # "better" is right on all documents of "good" and on 10 more.
    base = [0.0] * 60
    for arm, right in (("good", 20), ("better", 30), ("best", 30)):
        tuned = {"task": {"quiz": [1.0] * right + [0.0] * (60 - right)}}
        write_run(tmp_path / arm, {"task": {"quiz": base}}, tuned, arm=arm)
    found = arms(tmp_path)
    assert [(rank, arm.first.arm) for rank, arm in found] == [
        ("1–2", "best"),
        ("1–2", "better"),
        ("3", "good"),
    ]
    gains = [arm.average("gain") for _, arm in found]
    assert gains[2].ci_high > gains[0].ci_low  # the intervals overlap: pairing tells them apart
    assert [board.note for board in boards(load_runs(tmp_path))] == [""]


def test_arms_on_other_documents_fall_back_to_intervals_and_say_so(tmp_path: Path) -> None:
    for arm, n in (("one", 40), ("two", 41)):
        write_run(
            tmp_path / arm, {"task": {"quiz": [0.0] * n}}, {"task": {"quiz": [1.0] * n}}, arm=arm
        )
    (board,) = boards(load_runs(tmp_path))
    assert (
        board.note
        == "ranks are by overlap of intervals: the arms were not measured on the same documents"
    )
    assert {entry.rank for entry in board.entries} == {"1–2"}


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        *((name, True) for name in ("acc", "f1", "rougeL", "top1_agreement", "json_exact")),
        *(
            (name, False)
            for name in ("kl", "kl_p99", "bleu", "chrf", "loss", "size_mb", "decode_tokens_per_s")
        ),
    ],
)
def test_only_shares_are_read_in_percent(metric: str, expected: bool) -> None:
    assert is_share(metric, 0.5, 0.4) is expected


def test_an_average_minds_what_is_missing(tmp_path: Path) -> None:
    base, tuned = [0.0] * 160, [1.0] * 20 + [0.0] * 80 + [math.nan] * 60
    write_run(tmp_path / "a", {"task": {"quiz": base}}, {"task": {"quiz": tuned}})
    ((_, arm),) = arms(tmp_path)
    (row,) = arm.stages[-1].rows()
    average = arm.average("gain")
    assert row.change.ci_low > 0
    assert row.change.verdict == average.verdict == "inconclusive"
    assert "60 of 160" in average.note


def test_the_average_of_a_number_format_has_its_tasks_margins(tmp_path: Path) -> None:
    sides = ({"general": {"kept": [1.0] * 300}}, {"general": {"kept": [1.0] * 280 + [0.0] * 20}})
    for margins, verdict in (({}, "worse"), ({"acc": 0.15}, "retained")):
        write_run(tmp_path / verdict, *sides, margins=margins)
        (run,) = load_runs(tmp_path / verdict)
        found = contrast([run], Variant("base"), Variant("dpo"), 0.03)
        forms = dataclasses.replace(found, after=Variant("base", "int8"))
        assert forms.average("retention").verdict == verdict


@pytest.mark.parametrize("role", ["gain", "retention"])
def test_a_number_format_is_judged_by_the_margin_on_every_suite(role: str) -> None:
    forms = Contrast(Variant("dpo"), Variant("dpo", "int8"), 0.03, {}, [])
    training = Contrast(Variant("base"), Variant("dpo"), 0.03, {}, [])
    small, large = Change(-0.01, -0.02, 0.01), Change(-0.1, -0.2, -0.05)
    assert forms._judged(small, 0.03, role).verdict == "retained"
    assert forms._judged(large, 0.03, role).verdict == "worse"
    assert training._judged(large, 0.03, role).verdict == {"gain": "worse"}.get(role, "forgotten")


def test_what_is_averaged_has_one_unit() -> None:
    assert with_one_unit([("loss", False), ("loss", False)]) == [True, True]
    assert with_one_unit([("acc", True), ("loss", False), ("f1", True)]) == [True, False, True]
    assert with_one_unit([("loss", False), ("bleu", False)]) == [False, False]
