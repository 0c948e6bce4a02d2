"""Rejected answers: a fault that is really there, and nothing but the fault."""

import gzip
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward import corrupt, misstate
from reward import negatives as command
from reward.negatives import FAULTS, negatives
from reward.records import NORMALISERS

ALL = len(FAULTS["json"])
LEAVES = st.none() | st.booleans() | st.integers(-(10**6), 10**6) | st.floats(-1e6, 1e6) | st.text()
VALUES = st.recursive(
    LEAVES, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=12
)


def members(text: str) -> Any:
    """JSON with objects as lists of pairs, so that a repeated key is seen."""
    return json.loads(text, object_pairs_hook=lambda pairs: ["object", *map(list, pairs)])


def strict(value: Any) -> str:
    """Text in which 1, 1.0 and true differ; the order of keys does not matter."""
    return json.dumps(value, sort_keys=True)


@given(
    value=VALUES,
    layout=st.sampled_from(
        [{}, {"indent": 2}, {"separators": (",", ":")}, {"ensure_ascii": False}]
    ),
    seed=st.integers(0, 9),
)
@settings(max_examples=300, deadline=None)
def test_syntax_faults_do_not_parse_and_others_say_something_else(
    value: Any, layout: dict[str, Any], seed: int
) -> None:
    answer = json.dumps(value, **layout)
    found = negatives(answer, "json", ALL, random.Random(seed))
    if not (isinstance(value, dict | list) and value):
        assert found == []
        return
    names = [wrong.corruption for wrong in found]
    assert len(set(names)) == len(names)
    assert len({wrong.answer for wrong in found} | {answer}) == len(found) + 1
    assert {"truncated", "prose_before", "prose_after", "code_fence", "wrapped"} <= {
        *names,
        "truncated",
    }
    for wrong in found:
        if wrong.corruption in corrupt.SYNTAX:
            with pytest.raises(json.JSONDecodeError):
                json.loads(wrong.answer)
        else:
            assert strict(json.loads(wrong.answer)) != strict(json.loads(answer))


PERSON = '{"name": "Ann", "age": 30, "is_new": true, "tags": ["a, b", "c: {d}"]}'


def faulty(name: str, answer: str = PERSON) -> set[str]:
    """What a fault makes of an answer, over many draws."""
    made = {corrupt_or_none(name, answer, seed) for seed in range(200)}
    return {text for text in made if text is not None}


def corrupt_or_none(name: str, answer: str, seed: int) -> str | None:
    return FAULTS["json"][name](answer, random.Random(seed))


def test_syntax_faults_by_hand() -> None:
    assert faulty("missing_bracket") == {PERSON[:-1]}
    assert faulty("trailing_comma") == {PERSON[:-1] + ",}"}
    assert faulty("single_quotes") == {
        "{'name': 'Ann', 'age': 30, 'is_new': True, 'tags': ['a, b', 'c: {d}']}"
    }
    assert faulty("code_fence") == {f"```json\n{PERSON}\n```"}
    assert all(text.endswith("\n" + PERSON) for text in faulty("prose_before"))
    assert all(text.startswith(PERSON + "\n\n") for text in faulty("prose_after"))
    assert faulty("unquoted_key") == {
        PERSON.replace(f'"{key}"', key) for key in ("name", "age", "is_new", "tags")
    }
    # Marks inside strings are no marks of JSON.
    commas = [
        m.start() for m in re.finditer(r', "|, 3|, t', PERSON) if PERSON[m.start() - 1] != "a"
    ]
    assert faulty("missing_comma") == {PERSON[:at] + PERSON[at + 1 :] for at in commas}
    assert len(faulty("missing_colon")) == 4
    assert faulty("truncated") <= {PERSON[:end].rstrip() for end in range(1, len(PERSON))}


def test_faults_of_meaning_by_hand() -> None:
    person = json.loads(PERSON)
    assert faulty("missing_key") == {
        json.dumps({k: v for k, v in person.items() if k != key}) for key in person
    }
    assert {json.loads(text)["age"] for text in faulty("wrong_value")} == {30, 20, 29, 31, 40}
    assert {json.loads(text)["is_new"] for text in faulty("wrong_value")} == {True, False}
    types = [{k: type(v) for k, v in json.loads(text).items()} for text in faulty("wrong_type")]
    right = {k: type(v) for k, v in person.items()}
    assert len(types) == 4
    assert all(sum(one[k] is not right[k] for k in right) == 1 for one in types)
    for text in faulty("wrong_key"):
        assert len(set(json.loads(text)) - set(person)) == 1
        assert list(json.loads(text).values()) == list(person.values())
    for text in faulty("extra_key"):
        assert {k: v for k, v in json.loads(text).items() if k in person} == person
    for text in faulty("duplicate_key"):
        keys = [key for key, _ in members(text)[1:]]
        assert len(keys) == 5
        assert max(Counter(keys).values()) == 2
    assert {next(iter(json.loads(t).values())) == person for t in faulty("wrapped")} == {True}


def test_a_fault_keeps_the_layout_and_may_lie_deep() -> None:
    value = [{"a": {"b": 1, "é": "x y"}}]
    for layout in ({"indent": 2}, {"indent": 4, "ensure_ascii": False}, {"separators": (",", ":")}):
        answer = json.dumps(value, **layout)  # type: ignore[arg-type]
        assert json.dumps([{"a": {"b": 2, "é": "x y"}}], **layout) in faulty("wrong_value", answer)  # type: ignore[arg-type]
        assert json.dumps([{"a": {"é": "x y"}}], **layout) in faulty("missing_key", answer)  # type: ignore[arg-type]
    assert faulty("duplicate_key", '{\n  "a": 1,\n  "b": 2\n}') >= {
        '{\n  "a": 1,\n  "b": 2,\n  "b": 3\n}'
    }


@pytest.mark.parametrize(
    "answer", ["", "no JSON", "3", '"text"', "{}", "[]", '{"a": 1} and more', "[" * 9999]
)
def test_what_is_no_json_object_has_no_json_faults(answer: str) -> None:
    assert negatives(answer, "json", ALL, random.Random(0)) == []


def stated(name: str, answer: str) -> set[str]:
    made = {misstate.FACTS[name](answer, random.Random(seed)) for seed in range(200)}
    return {text for text in made if text is not None}


def test_numbers_by_hand() -> None:
    worked = "He has 5 bags of 1,200 = <<5*1200=6000>>6,000.\n#### 6,000"
    finals = stated("final_answer", worked)
    assert all(text.startswith(worked[:-5]) for text in finals)
    wrong = {text[len(worked) - 5 :] for text in finals}
    assert wrong == {"5,999", "6,001", "5,998", "6,002", "5,990", "6,010", "5,400", "6,600"}
    assert stated("final_answer", "It is 4. The answer is $2.50.") >= {
        "It is 4. The answer is $2.51."
    }
    # Everywhere, and in no longer number.
    assert "7 of 7, not 57" in stated("number", "5 of 5, not 57")
    assert "5 of 5, not 58" in stated("number", "5 of 5, not 57")
    # A line's own number, a version, a time, a part of a word and a date are not taken apart.
    assert stated("number", "1. Mix\n2) Bake A4 at 10:30 on 2024-05-01 with v1.2.3") == set()


def test_a_number_may_have_any_length() -> None:
    power = str(2**100)
    wrong = {text.removeprefix("#### ") for text in stated("final_answer", f"#### {power}")}
    tenth = 2**100 // 10
    assert wrong == {str(2**100 + sign * step) for step in (1, 2, 10, tenth) for sign in (1, -1)}
    assert f"#### 0.{'3' * 39}4" in stated("final_answer", f"#### 0.{'3' * 40}")


def test_dates_by_hand() -> None:
    made = stated("date", "In March 1999 they may march on Monday; March on!")
    assert "In June 1999 they may march on Monday; March on!" in made
    assert "In March 1999 they may march on Friday; March on!" in made
    assert all(text.endswith("March on!") for text in made)
    assert stated("date", "May I march?") == set()


def test_names_by_hand() -> None:
    assert stated("swapped_names", "The capital of France is Paris, and Paris is big.") == {
        "The capital of Paris is France, and France is big."
    }
    assert stated("swapped_names", "So Ann and Bob went home.") == set()  # it would say the same
    assert stated("swapped_names", "We met Ann, Bob and Cid.") == {"We met Cid, Bob and Ann."}
    assert stated("swapped_names", "It was by Leonardo da Vinci in Milan.") == set()
    assert stated("swapped_names", "The cat sat. A dog ran.") == set()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Yes, it is.", {"No, it is."}),
        ("NO", {"YES"}),
        ("**True.**", {"**False.**"}),
        ("The answer is no.", {"The answer is yes."}),
        ("No one knows.", set()),
        ("Yes men agree.", set()),
        ("Noon.", set()),
        ("It is true.", set()),
    ],
)
def test_verdicts(answer: str, expected: set[str]) -> None:
    assert stated("flipped_verdict", answer) == expected


@given(
    answer=st.text(st.sampled_from("AnBob 0123.,-$#\nYesMay"), max_size=40), seed=st.integers(0, 5)
)
@settings(max_examples=300, deadline=None)
def test_no_fact_is_ever_right(answer: str, seed: int) -> None:
    found = negatives(answer, "fact", 9, random.Random(seed))
    assert found == negatives(answer, "fact", 9, random.Random(seed))
    assert all(wrong.answer.split() != answer.split() for wrong in found)


def call(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    """The command's exit code."""
    monkeypatch.setattr(sys, "argv", ["negatives", *map(str, argv)])
    try:
        command.main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().split("\n")[:-1]]


def test_real_worked_answers(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out.jsonl"
    with gzip.open(shared_data / "sft" / "gsm8k.train.jsonl.gz", "rt") as file:
        rows = [json.loads(line) for line in file][::4]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call(monkeypatch, source, out, "--kind", "fact", "--per-row", 9) == 0
    got_another_final = set()
    for row in read(out):
        record = NORMALISERS["preference"](row)
        original = rows[int(row["row"].rpartition(":")[2]) - 1]
        assert record.prompt == [{"role": "user", "content": original["question"]}]
        assert row["chosen"] == [{"role": "assistant", "content": original["answer"]}]
        texts = original["answer"], row["rejected"][0]["content"]
        steps, answers = zip(*(text.split("####") for text in texts), strict=True)
        right, wrong = (float(text.replace(",", "")) for text in answers)
        if right != wrong:
            got_another_final.add(row["row"])
        if row["corruption"] == "final_answer":
            assert steps[0] == steps[1]
            assert right != wrong
            assert right.is_integer() == wrong.is_integer()
    assert len(got_another_final) == len(rows)  # each GSM8K answer ends with a number


def test_the_demo_gets_every_json_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.jsonl"
    assert call(monkeypatch, "demo:demonstrations", out, "--kind", "json", "--per-row", 99) == 0
    made = read(out)
    assert {row["corruption"] for row in made} == set(FAULTS["json"])
    for row in made:
        NORMALISERS["preference"](row)
    first = out.read_bytes()
    assert call(monkeypatch, "demo:demonstrations", out, "--kind", "json", "--per-row", 99) == 0
    assert out.read_bytes() == first
    call(monkeypatch, "demo:demonstrations", out, "--kind", "json", "--per-row", 99, "--seed", 1)
    assert out.read_bytes() != first


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"question": "q", "answer": "words"}], "none of the 1 answers in"),
        (
            [{"prompt": "q", "chosen": "a", "rejected": "b"}],
            "its format preference is no demonstration",
        ),
        ([{"question": "q"}], "cannot be used"),
        (
            [{"question": "q", "answer": "{}", "tools": '[{"maximum": 18446744073709551616}]'}],
            "in.jsonl:1: 'tools' cannot be written as JSON",
        ),
        ([], "has no rows"),
    ],
)
def test_mistakes_get_one_message_and_leave_nothing(
    rows: list[dict[str, Any]], message: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = tmp_path / "in.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert call(monkeypatch, source, tmp_path / "out.jsonl", "--kind", "json") == 2
    assert message in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["in.jsonl"]
