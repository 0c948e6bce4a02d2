"""The demo's rows: repeatable, disjoint from the held-out ones, and judged as they are meant."""

import json
import re
from collections.abc import Callable

import pytest

from reward import demo
from reward.records import detect

COUNT = 400


@pytest.mark.parametrize("make", [demo.demonstrations, demo.preferences, demo.held_out])
def test_the_same_call_gives_the_same_rows(make: Callable[[int], list[demo.Row]]) -> None:
    rows = make(COUNT)
    assert make(COUNT) == rows
    assert make(50) == rows[:50]  # so a limit takes the first rows of a larger set
    prompts = [row["messages"][0] if "messages" in row else row["prompt"] for row in rows]
    assert len(set(map(json.dumps, prompts))) == COUNT


def test_the_rows_are_of_known_formats() -> None:
    assert detect(demo.demonstrations(1)[0]) == "messages"
    assert detect(demo.preferences(1)[0]) == "preference"
    assert detect(demo.held_out(1)[0]) == "prompt"


def test_held_out_values_never_occur_in_training_rows() -> None:
    # Each row as the texts in it: JSON would escape the line breaks into letters.
    training = "\n".join(
        turn["content"]
        for row in demo.demonstrations(COUNT) + demo.preferences(COUNT)
        for turns in row.values()
        for turn in turns
    )
    words = set(re.findall(r"\w+", training))
    for domain in demo.DOMAINS:
        for _, held_out in domain.fields.values():
            for value in held_out:
                if " " in str(value):
                    assert str(value) not in training
                else:
                    assert str(value) not in words


def test_held_out_rows_use_held_out_values_only() -> None:
    trained = {str(v) for d in demo.DOMAINS for pool, _ in d.fields.values() for v in pool}
    for row in demo.held_out(COUNT):
        assert trained.isdisjoint(map(str, json.loads(row["reference"]).values()))


def test_chosen_is_right_and_rejected_is_not() -> None:
    for row in demo.preferences(COUNT):
        reference = row["chosen"][0]["content"]
        assert demo.score(reference, reference) == {"json_exact": 1.0, "json_valid": 1.0}
        assert demo.score(row["rejected"][0]["content"], reference)["json_exact"] == 0.0


def test_the_reference_scores_full_marks() -> None:
    for row in demo.held_out(COUNT):
        score = demo.score(row["reference"], row["reference"])
        assert score == {"json_exact": 1.0, "json_valid": 1.0}


@pytest.mark.parametrize(
    ("answer", "valid", "exact"),
    [
        ('{"name": "A", "age": 4}', 1.0, 1.0),
        (' {"name":"A","age":4}\n', 1.0, 1.0),
        ('{"age": 4, "name": "A"}', 1.0, 0.0),  # the order was asked for
        ('{"name": "A", "age": 5}', 1.0, 0.0),
        ('{"name": "A", "age": "4"}', 0.0, 0.0),
        ('{"name": "A", "age": 4.0}', 0.0, 0.0),
        ('{"name": "A", "age": true}', 0.0, 0.0),
        ('{"name": "A"}', 0.0, 0.0),
        ('{"name": "A", "age": 4} done', 0.0, 0.0),
        ("[" * 100_000, 0.0, 0.0),
        ("null", 0.0, 0.0),
        ("", 0.0, 0.0),
    ],
)
def test_score_against_a_hand_made_table(answer: str, valid: float, exact: float) -> None:
    reference = '{"name": "A", "age": 4}'
    assert demo.score(answer, reference) == {"json_exact": exact, "json_valid": valid}
