"""Pairs from scored completions: against brute force, hand-made rows and real judgements."""

import gzip
import json
import random
import subprocess
import sys
from collections import Counter
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import pairs as command
from reward.pairs import METHODS, Pair, Scored, Task, as_row, pairs
from reward.records import NORMALISERS, Preference
from reward.scored import task_of
from reward.turns import BadRow

Row = dict[str, Any]
SCORES = st.one_of(st.integers(-3, 3).map(float), st.floats(-1e6, 1e6, allow_subnormal=False))
SCORED = st.lists(
    st.tuples(st.sampled_from(["a", "b", "c", "d d", "d  d", "e\n"]), SCORES), max_size=7
)


def answer(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def scored(items: list[tuple[str, float]]) -> list[Scored]:
    return [Scored(answer(text), score, f"row {i}") for i, (text, score) in enumerate(items)]


def texts(found: list[Pair]) -> list[tuple[str, str]]:
    return [(p.chosen.completion[0]["content"], p.rejected.completion[0]["content"]) for p in found]


def make(
    items: list[tuple[str, float]], method: str, min_margin: float = 0, cap: int | None = None
) -> list[Pair]:
    return pairs(scored(items), method, min_margin, cap, random.Random(0))


@given(
    items=SCORED,
    method=st.sampled_from(list(METHODS)),
    margin=st.floats(0, 5),
    cap=st.integers(1, 9),
)
@settings(max_examples=400, deadline=None)
def test_every_pair_is_right(
    items: list[tuple[str, float]], method: str, margin: float, cap: int
) -> None:
    dropped: Counter[str] = Counter()
    given_ = scored(items)
    found = pairs(given_, method, margin, cap, random.Random(1), dropped)
    assert found == pairs(given_, method, margin, cap, random.Random(1))
    assert len(found) <= cap
    for pair in found:
        assert pair.margin == pair.chosen.score - pair.rejected.score > 0
        assert pair.margin >= margin * (1 - 1e-9)
        row = as_row(Task([{"role": "user", "content": "q"}], None, given_), pair)
        record = NORMALISERS["preference"](json.loads(json.dumps(row)))  # refuses equal texts
        assert isinstance(record, Preference)
        assert record.margin == pair.margin
    n = len(items)
    candidates = {"best_worst": 1, "best_rest": n - 1, "all": n * (n - 1) // 2}
    if n > 1:  # nothing vanishes uncounted
        assert len(found) + dropped.total() == candidates.get(method, candidates["all"])
    else:
        assert (found, dropped) == ([], {"prompts with one completion": 1})


@given(items=SCORED, margin=st.floats(0, 5))
@settings(max_examples=200, deadline=None)
def test_all_and_margin_against_brute_force(items: list[tuple[str, float]], margin: float) -> None:
    expected = sorted(
        (one[1] - other[1], i, j)
        for (i, one), (j, other) in permutations(enumerate(items), 2)
        if one[1] > other[1]
        and one[1] - other[1] >= margin * (1 - 1e-9)
        and one[0].split() != other[0].split()
    )
    for method in ("all", "margin"):
        found = make(items, method, margin, None)
        places = [(int(p.chosen.place[4:]), int(p.rejected.place[4:])) for p in found]
        assert (
            sorted((p.margin, *place) for p, place in zip(found, places, strict=True)) == expected
        )
    assert [pair.margin for pair in found] == sorted((e[0] for e in expected), reverse=True)


def test_methods_by_hand() -> None:
    items = [("a", 3.0), ("b", 1.0), ("c", 4.0), ("d", 1.0)]
    assert texts(make(items, "best_worst")) == [("c", "b")]
    assert texts(make(items, "best_rest")) == [("c", "a"), ("c", "b"), ("c", "d")]
    five = {("a", "b"), ("c", "a"), ("a", "d"), ("c", "b"), ("c", "d")}
    assert set(texts(make(items, "all"))) == five  # six pairs but for the tie of b and d
    assert texts(make(items, "margin", 2.0)) == [("c", "b"), ("c", "d"), ("a", "b"), ("a", "d")]
    assert texts(make(items, "margin", 2.0, 1)) == [("c", "b")]
    assert set(texts(make(items, "all", 0.0, 2))) < five


def test_a_margin_on_the_edge_is_enough() -> None:
    assert 0.3 - 0.1 < 0.2
    assert len(make([("a", 0.3), ("b", 0.1)], "all", 0.2)) == 1
    assert make([("a", 0.3), ("b", 0.11)], "all", 0.2) == []


ULTRA = {
    "instruction": "q",
    "completions": [
        {"response": "poor", "overall_score": 2.0},
        {"response": "best", "overall_score": 9.0},
        {"response": "good", "overall_score": 7.5},
    ],
}
FORMS: list[tuple[Row, dict[str, float]]] = [
    (ULTRA, {"poor": 2, "best": 9, "good": 7.5}),
    ({"prompt": "q", "completions": [{"text": "x", "score": "1"}, {"content": "y", "score": 2}]},
     {"x": 1, "y": 2}),
    ({"prompt": "q", "responses": ["x", "y"], "scores": [0.5, -1]}, {"x": 0.5, "y": -1}),
    ({"prompt": "q", "responses": ["x", "y"], "ranks": [2, 1]}, {"x": -2, "y": -1}),
    ({"prompt": "q", "completions": ["x", answer("y")], "ranking": [1, 1]}, {"x": -1, "y": -1}),
    ({"prompt": "q", "completion": "x", "score": 3}, {"x": 3}),
    ({"prompt": "q", "completion": "x", "score": "", "label": "True"}, {"x": 1}),
    ({"prompt": "q", "completion": "x", "label": 0}, {"x": 0}),
    ({"prompt": "q", "completion": "x", "score": None}, {}),
    ({"prompt": "q", "responses": [{"text": "x", "score": None}, "y"], "ranks": [2, 1]}, {"x": -2, "y": -1}),
    ({"prompt": "q", "completions": [{"text": "x", "overall_score": 2, "score": None},
                                     {"text": "y", "overall_score": 9, "score": 3}]}, {"y": 3}),
    ({"prompt": "q", "completions": [{"text": "x", "overall_score": 2, "score": None}]}, {"x": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("row", "expected"), FORMS)
def test_forms_of_rows(row: Row, expected: dict[str, float]) -> None:
    task = task_of(row, "f:1")
    assert {item.completion[0]["content"]: item.score for item in task.scored} == expected
    assert not expected or task.prompt == [{"role": "user", "content": "q"}]


def test_best_worst_is_what_the_ultrafeedback_format_makes() -> None:
    task = task_of(ULTRA, "f:1")
    (pair,) = pairs(task.scored, "best_worst", 0, None, random.Random(0))
    mine = NORMALISERS["preference"](as_row(task, pair))
    assert mine == NORMALISERS["ultrafeedback"](ULTRA)
    assert (pair.chosen.place, pair.rejected.place) == ("f:1#2", "f:1#1")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (
            {"prompt": "q"},
            "it has no 'completions', 'responses' or 'completion'; its keys are 'prompt'",
        ),
        ({"prompt": "q", "completion": "x"}, "'completion' has neither 'score' nor 'label'"),
        (
            {"prompt": "q", "completion": "x", "score": "high"},
            "'score' is 'high', expected a finite",
        ),
        ({"prompt": "q", "responses": ["x"]}, "completion 1 is text and there is no list 'scores'"),
        ({"prompt": "q", "responses": ["x", "y"], "scores": [1]}, "'scores' has 1 values for 2"),
        (
            {"prompt": "q", "responses": ["x", "y"], "ranking": [1, 0]},
            "'ranking' holds 0; ranks count",
        ),
        (
            {"prompt": "q", "responses": ["x", ""], "ranks": [1, 2]},
            "completion 2: 'completion' is empty",
        ),
        (
            {"prompt": "q", "completions": [{"text": "x", "score": None}]},
            "no completion has a score",
        ),
        ({"completions": [{"text": "x", "score": 1}]}, "completion 1: 'prompt' is null"),
        ({"prompt": [*answer("x")], "completion": "y", "score": 1}, "turn 1 has role 'assistant'"),
        (
            {**ULTRA, "tools": '[{"maximum": 18446744073709551616}]'},
            "'tools' cannot be written as JSON: Integer exceeds 64-bit range",
        ),
        ({**ULTRA, "tools": "[" * 100_000}, "'tools' is nested too deeply"),
    ],
)
def test_bad_rows_say_why(row: Row, reason: str) -> None:
    with pytest.raises(BadRow) as caught:
        task_of(row, "f:1")
    assert reason in str(caught.value)


def call(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["pairs", *map(str, argv)])
    try:
        command.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_flat_rows_are_grouped_by_prompt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "flat.csv", tmp_path / "out.jsonl"
    source.write_text('prompt,completion,score\np,one,1\nq,only,5\np,three,3\n"p",tie,3\n')
    assert call(monkeypatch, source, out, "--method", "all") == 0
    found = {(r["chosen"][0]["content"], r["rejected"][0]["content"]): r for r in read(out)}
    assert set(found) == {("three", "one"), ("tie", "one")}
    row = found["three", "one"]
    assert (row["margin"], row["score_chosen"], row["score_rejected"]) == (2, 3, 1)
    assert (row["row_chosen"], row["row_rejected"]) == ("flat.csv:4", "flat.csv:2")
    said = capsys.readouterr().out
    assert "2 pairs by all, of 4 rows with 2 prompts" in said
    assert "dropped: 1 ties, 1 prompts with one completion" in said
    assert "margin: min 2, 25 % 2, median 2, 75 % 2, max 2" in said


@pytest.mark.parametrize("more", [{}, {"score": None}])
def test_kto_rows_and_parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: Row) -> None:
    import pyarrow as pa
    from pyarrow import parquet

    out = tmp_path / "out.jsonl"
    rows = [{"prompt": "p", "completion": c, "label": c in "ab", **more} for c in "abxy"]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "kto.parquet")
    assert call(monkeypatch, tmp_path / "kto.parquet", out, "--method", "all") == 0
    sides = {
        (r["chosen"][0]["content"], r["rejected"][0]["content"], r["margin"]) for r in read(out)
    }
    assert sides == {(good, bad, 1.0) for good in "ab" for bad in "xy"}


def test_a_label_is_no_score(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`reward.score` leaves both in the rows of KTO, and null for what is too long."""
    found = [("a", True, -4.2), ("b", True, None), ("c", False, -5), ("d", None, None)]
    rows = [
        {"prompt": "p", "completion": c, "label": label, "score": score}
        for c, label, score in found
    ]
    rows.append({"prompt": "other", "completion": "b", "label": True, "score": None})
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    assert call(monkeypatch, source, out, "--method", "all") == 0
    assert [(r["row_chosen"], r["row_rejected"]) for r in read(out)] == [
        ("in.jsonl:1", "in.jsonl:3")
    ]
    assert (
        "of 5 rows with 1 prompts\ndropped: 3 completions without a score\n"
        in capsys.readouterr().out
    )


def test_a_draw_depends_on_seed_and_prompt_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [
        {"prompt": f"p{n}", "responses": list("abcdef"), "scores": [1, 2, 3, 4, 5, 6]}
        for n in range(9)
    ]
    outs = []
    for name, part, seed in (("a", rows, 0), ("b", rows[::-1], 0), ("c", rows, 1)):
        source, out = write(tmp_path / f"{name}.jsonl", part), tmp_path / f"{name}.out.jsonl"
        assert (
            call(monkeypatch, source, out, "--method", "all", "--max-pairs", 3, "--seed", seed) == 0
        )
        outs.append(
            {(r["prompt"][0]["content"], r["score_chosen"], r["score_rejected"]) for r in read(out)}
        )
    assert len(outs[0]) == 27
    assert outs[0] == outs[1] != outs[2]


def test_tools_system_and_history_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tools = [{"type": "function", "function": {"name": "add"}}]
    row = {"system": "Be short.", "history": [["a", "b"]], "prompt": "q", "tools": tools}
    source = write(tmp_path / "in.jsonl", [row | {"responses": ["x", "y"], "scores": [1, 2]}])
    assert call(monkeypatch, source, tmp_path / "out.jsonl", "--method", "best_worst") == 0
    record = NORMALISERS["preference"](read(tmp_path / "out.jsonl")[0])
    assert [turn["role"] for turn in record.prompt] == ["system", "user", "assistant", "user"]  # type: ignore[union-attr]
    assert record.tools == tools


GOOD = {"prompt": "p", "responses": ["a", "b"], "scores": [1, 2]}


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([GOOD] * 9 + [{"prompt": "p"}], [], "1 of 10 rows in"),
        ([GOOD] * 9 + [{"prompt": "p"}], [], "--max-bad-fraction 0.1"),
        ([{**GOOD, "scores": [1, 1]}], [], "gave no pair of 1 prompts (dropped: 1 ties)"),
        ([GOOD], ["--method", "margin"], "--method margin needs --min-margin"),
        ([], [], "has no rows"),
        (
            [GOOD],
            ["--max-pairs", "0"],
            "argument --max-pairs: '0' must be a whole number, 1 or more",
        ),
        (
            [GOOD],
            ["--min-margin", "nan"],
            "argument --min-margin: 'nan' must be a number, 0 or more",
        ),
        ([GOOD], ["--max-bad-fraction", "2"], "'2' must lie between 0 and 1"),
    ],
)
def test_mistakes_get_one_message_and_leave_nothing(
    rows: list[Row], options: list[str], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "new" / "out.jsonl"
    assert call(monkeypatch, source, out, "--method", "all", *options) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert not said.out
    assert not out.parent.exists() or not list(out.parent.iterdir())


def test_an_old_result_survives_a_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    out.write_text("old\n")
    source = write(tmp_path / "in.jsonl", [GOOD, {"prompt": "p"}])
    assert call(monkeypatch, source, out, "--method", "all") == 2
    assert out.read_text() == "old\n"
    assert call(monkeypatch, source, out, "--method", "all", "--max-bad-fraction", 0.5) == 0
    assert len(read(out)) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.jsonl"]


def test_names_that_cannot_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write(tmp_path / "in.jsonl", [GOOD])
    for arguments, message in (
        ((tmp_path / "inn.jsonl", tmp_path / "o.jsonl"), "there is no file 'inn.jsonl'"),
        ((source, tmp_path / "o.json"), "must end in .jsonl"),
        ((source, source), "is part of the input"),
        ((tmp_path, source), "is part of the input"),
        ((source, source / "o.jsonl"), "cannot write"),
    ):
        assert call(monkeypatch, *arguments, "--method", "all") == 2
        assert message in capsys.readouterr().err
    assert read(source) == [GOOD]


def test_real_judgements_give_back_their_pairs(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each judged row becomes two scored ones; "all" must find the judge's own pairs and margins."""
    with gzip.open(shared_data / "preference" / "alpaca_judged.test.jsonl.gz", "rt") as file:
        judged = [json.loads(line) for line in file]
    flat = []
    for row in judged:
        won = row["chosen_model"] != "gpt4_1106_preview"  # `preference`: 1 baseline … 2 model
        other, baseline = ("chosen", "rejected") if won else ("rejected", "chosen")
        flat.append({"prompt": row["prompt"], "completion": row[other], "score": row["preference"]})
        flat.append({"prompt": row["prompt"], "completion": row[baseline], "score": 1.5})
    source, out = write(tmp_path / "flat.jsonl", flat), tmp_path / "out.jsonl"
    assert call(monkeypatch, source, out, "--method", "all") == 0
    made = {
        (*(r[key][0]["content"] for key in ("prompt", "chosen", "rejected")), round(r["margin"], 4))
        for r in read(out)
    }
    for row in judged:
        answers = (row[key].removeprefix(" ") for key in ("chosen", "rejected"))
        margin = abs(row["preference"] - 1.5)
        assert margin == pytest.approx(row["strength"] / 2, abs=1e-6)
        assert (row["prompt"], *answers, round(margin, 4)) in made


@pytest.mark.parametrize("name", ["pairs", "negatives", "synthesize"])
def test_help_loads_nothing_heavy(name: str) -> None:
    code = f"import sys\nsys.argv = ['x', '--help']\nfrom reward.{name} import main\n"
    code += "try: main()\nexcept SystemExit: pass\n"
    code += "print(sorted({'torch', 'datasets', 'numpy', 'httpx', 'tqdm'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
    assert f"usage: python -m reward.{name}" in done.stdout


def test_a_completion_without_a_score_is_passed_over() -> None:
    scores = {"a": 1.0, "b": None, "c": 3.0}
    completions = [{"text": text, "score": score} for text, score in scores.items()]
    task = task_of({"prompt": "p", "completions": completions}, "a.jsonl:1")
    assert [(item.score, item.place) for item in task.scored] == [
        (1.0, "a.jsonl:1#1"),
        (3.0, "a.jsonl:1#3"),
    ]
