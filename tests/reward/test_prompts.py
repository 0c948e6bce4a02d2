"""Prompts with what is known of their answers."""

import json
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from conf.schema import Source
from reward.prompts import Asked, key_of, read_prompts


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def read(folder: Path, rows: list[dict[str, Any]], **more: Any) -> list[Asked]:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    found, _ = read_prompts(Source(source=str(path), **more), "test", 0.0)
    assert list(found) == [key_of(asked.prompt, asked.tools) for asked in found.values()]
    return list(found.values())


@pytest.mark.parametrize(
    ("row", "references"),
    [
        ({"prompt": "a", "reference": "b"}, ["b"]),
        ({"prompt": "a", "answer": 4}, ["4"]),
        ({"prompt": "a", "answer": 147573952589676412927}, ["147573952589676412927"]),
        ({"prompt": "a", "answer": -9223372036854775809}, ["-9223372036854775809"]),
        ({"prompt": "a"}, []),
        ({"messages": [*user("a"), {"role": "assistant", "content": "b"}]}, ["b"]),
        ({"question": "a", "answer": "b #### 4"}, ["b #### 4"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, []),  # preferred, not right
        ({"prompt": "a", "completion": "b", "label": True}, []),
    ],
)
def test_the_reference_of_every_kind_of_row(
    tmp_path: Path, row: dict[str, Any], references: list[str]
) -> None:
    assert read(tmp_path, [row]) == [Asked(user("a"), None, references)]


def test_answers_of_a_repeated_prompt_are_all_right_and_counted_once(tmp_path: Path) -> None:
    rows = [("a", "1"), ("b", "2"), ("a", "3"), ("a", "1")]
    found = read(tmp_path, [{"prompt": prompt, "reference": text} for prompt, text in rows])
    assert [asked.references for asked in found] == [["1", "3"], ["2"]]


def test_a_blank_line_is_no_row(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('\n{"prompt": "a"}\n  \n\n')
    found, left_out = read_prompts(Source(source=str(path)), "test", 0.0)
    assert [asked.prompt for asked in found.values()] == [user("a")]
    assert left_out["unusable"] == 0
    path.write_text('{"prompt": "a"}\n\n\n\n{"answer": "b"}\n')
    with pytest.raises(UserError, match=r"test: 1 of 2 rows cannot be used"):
        read_prompts(Source(source=str(path)), "test", 0.4)


def test_the_limit_counts_prompts(tmp_path: Path) -> None:
    rows = [{"prompt": text} for text in "aabc"]
    assert [asked.prompt for asked in read(tmp_path, rows, limit=2)] == [user("a"), user("b")]


def test_rows_after_the_limit_hold_references_of_the_same_prompts(tmp_path: Path) -> None:
    rows = [("a", "1"), ("b", "2"), ("c", "3"), ("b", "two"), ("a", "one")]
    found = read(
        tmp_path, [{"prompt": prompt, "reference": text} for prompt, text in rows], limit=2
    )
    assert [asked.references for asked in found] == [["1", "one"], ["2", "two"]]


def test_rows_of_one_prompt_with_other_facts_are_counted_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [("a", "kg"), ("b", "kg"), ("a", "g"), ("a", "kg"), ("b", "kg")]
    (first, _) = read(tmp_path, [{"prompt": prompt, "unit": unit} for prompt, unit in rows])
    assert first.facts == {"unit": "kg"}
    capsys.readouterr()
    _, left_out = read_prompts(Source(source=str(tmp_path / "rows.jsonl")), "test", 0.0)
    assert left_out == {"unusable": 0, "repeated": 3, "differing_facts": 1}
    assert capsys.readouterr().err.startswith("warning: test: 1 rows repeat a prompt with other")
    read(tmp_path, [{"prompt": prompt, "unit": "kg"} for prompt, _ in rows])
    assert not capsys.readouterr().err


def test_an_empty_source_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"rows.jsonl' has no rows"):
        read(tmp_path, [])
