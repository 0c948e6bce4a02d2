"""Raw rows to records: every format, every reason to refuse a row."""

import datetime
import json
import math
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reward.records import (
    NORMALISERS,
    Conversation,
    Preference,
    Prompt,
    Rated,
    detect,
    preference,
    prompt,
)
from reward.turns import BadRow


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be short."}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": None}}}],
}
RESULT = {"role": "tool", "content": "3", "name": "add"}

# Three rows a format, as they are found in the wild, and the records that a person makes of them.
FIXTURES: dict[str, list[tuple[dict[str, Any], Any]]] = {
    "messages": [
        ({"messages": [user("a"), assistant("b")]}, Conversation([user("a"), assistant("b")])),
        (
            {"conversations": [SYSTEM, user("a"), assistant("b"), user("c"), assistant("d")]},
            Conversation([SYSTEM, user("a"), assistant("b"), user("c"), assistant("d")]),
        ),
        (
            {"messages": [user("1+2?"), CALL | {"content": None}, RESULT, assistant("3")]},
            Conversation([user("1+2?"), CALL, RESULT, assistant("3")]),
        ),
    ],
    "sharegpt": [
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            Conversation([user("a"), assistant("b")]),
        ),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be short."},
                    {"from": "user", "value": "a"},
                    {"from": "assistant", "value": "b"},
                ]
            },
            Conversation([SYSTEM, user("a"), assistant("b")]),
        ),
        (
            {
                "system": "Be short.",
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b", "weight": 1},
                ],
            },
            Conversation([SYSTEM, user("a"), assistant("b") | {"weight": 1}]),
        ),
    ],
    "alpaca": [
        (
            {"instruction": "Add.", "input": "1, 2", "output": "3"},
            Conversation([user("Add.\n\n1, 2"), assistant("3")]),
        ),
        (
            {"instruction": "Greet.", "input": "", "output": "Hi"},
            Conversation([user("Greet."), assistant("Hi")]),
        ),
        (
            {"instruction": "Greet.", "input": None, "output": "Hi", "system": "Be short."},
            Conversation([SYSTEM, user("Greet."), assistant("Hi")]),
        ),
    ],
    "completion": [
        (
            {"prompt": "The sky is", "completion": " blue."},
            Conversation([user("The sky is"), assistant("blue.")]),
        ),
        (
            {"prompt": "def f():\n", "completion": "    return 1"},
            Conversation([user("def f():\n"), assistant("    return 1")]),
        ),
        (
            {"prompt": [SYSTEM, user("a")], "completion": [assistant("b")]},
            Conversation([SYSTEM, user("a"), assistant("b")]),
        ),
    ],
    "qa": [
        (
            {"question": "1+2?", "answer": "1+2=<<1+2=3>>3\n#### 3"},
            Conversation([user("1+2?"), assistant("1+2=<<1+2=3>>3\n#### 3")]),
        ),
        (
            {"question": "a", "answer": "b", "id": 7},
            Conversation([user("a"), assistant("b")]),
        ),
        (
            {"question": "a", "answer": "b", "system": "Be short."},
            Conversation([SYSTEM, user("a"), assistant("b")]),
        ),
    ],
    "preference": [
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            Preference([user("a")], [assistant("b")], [assistant("c")]),
        ),
        (
            {
                "prompt": [user("a")],
                "chosen": [assistant("b")],
                "rejected": [assistant("c")],
                "margin": "0.5",
            },
            Preference([user("a")], [assistant("b")], [assistant("c")], 0.5),
        ),
        (  # UltraFeedback: the answers repeat the prompt
            {
                "prompt": "a",
                "chosen": [user("a"), assistant("b")],
                "rejected": [user("a"), assistant("c")],
            },
            Preference([user("a")], [assistant("b")], [assistant("c")]),
        ),
    ],
    "preference_implicit": [
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c")]},
            Preference([user("a")], [assistant("b")], [assistant("c")]),
        ),
        (
            {
                "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
                "rejected": [user("a"), assistant("b"), user("c"), assistant("e")],
                "margin": 2,
            },
            Preference(
                [user("a"), assistant("b"), user("c")], [assistant("d")], [assistant("e")], 2.0
            ),
        ),
        (
            {
                "chosen": [SYSTEM, user("a"), CALL, RESULT, assistant("3")],
                "rejected": [SYSTEM, user("a"), assistant("4")],
            },
            Preference([SYSTEM, user("a")], [CALL, RESULT, assistant("3")], [assistant("4")]),
        ),
    ],
    "hh": [
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b",
                "rejected": "\n\nHuman: a\n\nAssistant: c",
            },
            Preference([user("a")], [assistant("b")], [assistant("c")]),
        ),
        (
            {
                "chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: d",
                "rejected": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c\n\nAssistant: e",
            },
            Preference([user("a"), assistant("b"), user("c")], [assistant("d")], [assistant("e")]),
        ),
        (
            {
                "chosen": "\n\nHuman: List:\n\n1. x\n\nAssistant: Human: y\n\nz",
                "rejected": "\n\nHuman: List:\n\n1. x\n\nAssistant: n",
            },
            Preference([user("List:\n\n1. x")], [assistant("Human: y\n\nz")], [assistant("n")]),
        ),
    ],
    "alpaca_preference": [
        (
            {"instruction": "Add.", "input": "1, 2", "chosen": "3", "rejected": "4"},
            Preference([user("Add.\n\n1, 2")], [assistant("3")], [assistant("4")]),
        ),
        (
            {"instruction": "a", "chosen": "b", "rejected": "c", "system": "Be short."},
            Preference([SYSTEM, user("a")], [assistant("b")], [assistant("c")]),
        ),
        (
            {
                "instruction": "a",
                "input": "",
                "chosen": "So:\n\nHuman: x\n\nAssistant: y",  # quotes a dialogue, is none
                "rejected": "c",
                "margin": 1,
            },
            Preference(
                [user("a")],
                [assistant("So:\n\nHuman: x\n\nAssistant: y")],
                [assistant("c")],
                1.0,
            ),
        ),
    ],
    "sharegpt_preference": [
        (
            {
                "conversations": [{"from": "human", "value": "a"}],
                "chosen": {"from": "gpt", "value": "b"},
                "rejected": {"from": "gpt", "value": "c"},
            },
            Preference([user("a")], [assistant("b")], [assistant("c")]),
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "a"},
                    {"from": "gpt", "value": "b"},
                    {"from": "human", "value": "c"},
                ],
                "chosen": {"from": "gpt", "value": "d"},
                "rejected": {"from": "gpt", "value": "e"},
            },
            Preference([user("a"), assistant("b"), user("c")], [assistant("d")], [assistant("e")]),
        ),
        (
            {
                "system": "Be short.",
                "conversations": [{"from": "user", "value": "a"}],
                "chosen": {"from": "assistant", "value": "b"},
                "rejected": {"from": "assistant", "value": "c"},
            },
            Preference([SYSTEM, user("a")], [assistant("b")], [assistant("c")]),
        ),
    ],
    "orca": [
        (
            {"system": "Be short.", "question": "a", "chosen": "b", "rejected": "c"},
            Preference([SYSTEM, user("a")], [assistant("b")], [assistant("c")]),
        ),
        (
            {"system": "", "question": "a", "chosen": "b", "rejected": "c"},
            Preference([user("a")], [assistant("b")], [assistant("c")]),
        ),
        (
            {"question": "a", "chosen": "x\n\nAssistant: y", "rejected": "c"},
            Preference([user("a")], [assistant("x\n\nAssistant: y")], [assistant("c")]),
        ),
    ],
    "reasoning": [
        (
            {"question": "1+2?", "reasoning": "1+2 is 3.", "answer": "3"},
            Conversation([user("1+2?"), assistant("1+2 is 3.\n\n3")]),
        ),
        (
            {"question": "a", "reasoning": "b\n", "answer": "c", "system": "Be short."},
            Conversation([SYSTEM, user("a"), assistant("b\n\nc")]),
        ),
        (
            {"question": "a", "reasoning": "b", "answer": "c", "history": [["d", "e"]]},
            Conversation([user("d"), assistant("e"), user("a"), assistant("b\n\nc")]),
        ),
    ],
    "ultrafeedback": [
        (
            {
                "instruction": "a",
                "completions": [
                    {"response": "b", "overall_score": 7.5, "model": "m"},
                    {"response": "c", "overall_score": 9},
                    {"response": "d", "overall_score": 2},
                ],
            },
            Preference([user("a")], [assistant("c")], [assistant("d")], 7.0),
        ),
        (
            {
                "instruction": "a",
                "completions": [{"response": r, "score": n} for n, r in enumerate("bc")],
            },
            Preference([user("a")], [assistant("c")], [assistant("b")], 1.0),
        ),
        (
            {
                "instruction": "a",
                "system": "Be short.",
                "completions": [{"response": r, "score": str(n)} for n, r in enumerate("cb")],
            },
            Preference([SYSTEM, user("a")], [assistant("b")], [assistant("c")], 1.0),
        ),
    ],
    "kto": [
        (
            {"prompt": "a", "completion": "b", "label": True},
            Rated([user("a")], [assistant("b")], True),
        ),
        (
            {"prompt": [SYSTEM, user("a")], "completion": [assistant("b")], "label": "False"},
            Rated([SYSTEM, user("a")], [assistant("b")], False),
        ),
        (
            {"prompt": "a", "completion": " b", "label": 0},
            Rated([user("a")], [assistant("b")], False),
        ),
    ],
    "prompt": [
        ({"prompt": "a"}, Prompt([user("a")])),
        ({"prompt": [SYSTEM, user("a")], "reference": "b"}, Prompt([SYSTEM, user("a")], "b")),
        ({"prompt": "1+2?", "answer": 3}, Prompt([user("1+2?")], "3")),
    ],
}

CASES = [(name, row, record) for name, rows in FIXTURES.items() for row, record in rows]


def test_other_columns_of_a_prompt_are_its_facts() -> None:
    row = {
        "prompt": "a",
        "reference": "b",
        "answer": "as the source has it",
        "system": None,
        "schema": {"type": "object", "maximum": math.inf},
        "kwargs": [{"n": 1, "m": None}, {}],
        "seen": datetime.date(2026, 1, 2),
        "big": 2**70,
        "half": "\ud800",
        "none": None,
    }
    facts = {
        "answer": "as the source has it",
        "schema": {"type": "object", "maximum": None},
        "kwargs": [{"n": 1, "m": None}, {}],
        "seen": "2026-01-02",
        "big": str(2**70),
        "half": "?",
    }
    record = NORMALISERS["prompt"](row)
    assert record == Prompt([user("a")], "b", facts=facts)
    assert NORMALISERS["prompt"](dict(vars(record))) == record
    packed = {"prompt": "a", "facts": json.dumps(facts)}  # as it goes to a trainer
    assert NORMALISERS["prompt"](packed) == Prompt([user("a")], facts=facts)
    deep: Any = 1
    for _ in range(3000):
        deep = [deep]
    with pytest.raises(BadRow, match="nested too deeply"):
        NORMALISERS["prompt"]({"prompt": "a", "deep": deep})


def test_every_format_has_a_three_row_fixture() -> None:
    assert {name: len(rows) for name, rows in FIXTURES.items()} == dict.fromkeys(NORMALISERS, 3)


@pytest.mark.parametrize(("name", "row", "record"), CASES)
def test_a_row_becomes_its_record(name: str, row: dict[str, Any], record: Any) -> None:
    assert NORMALISERS[name](row) == record


@pytest.mark.parametrize(("name", "row", "record"), CASES)
def test_the_format_of_a_row_is_detected(name: str, row: dict[str, Any], record: Any) -> None:
    assert detect(row) == name


@pytest.mark.parametrize(("name", "row", "record"), CASES)
def test_columns_filled_with_null_change_nothing(
    name: str, row: dict[str, Any], record: Any
) -> None:
    """Parquet and the hub give every row the columns of all others."""
    wide = dict.fromkeys(["prompt", "messages", "tools", "system", "margin", "question"]) | row
    assert detect(wide) == name
    assert NORMALISERS[name](wide) == record


BAD: list[tuple[str, dict[str, Any], str]] = [
    ("preference", {"prompt": "a", "chosen": "", "rejected": "c"}, "'chosen' is empty"),
    ("preference", {"prompt": "a", "chosen": " \n", "rejected": "c"}, "'chosen' is only spaces"),
    ("preference", {"prompt": "a", "chosen": "b"}, "'rejected' is missing"),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "b"}, "rejected are equal"),
    ("preference", {"prompt": "a", "chosen": "x  y", "rejected": "x y\n"}, "differ in spaces only"),
    (
        "preference",
        {"prompt": [user("a"), assistant("b")], "chosen": "c", "rejected": "d"},
        "prompt and chosen: turn 3 has role 'assistant', expected user or tool",
    ),
    (
        "preference",
        {"prompt": "z", "chosen": [user("a"), CALL], "rejected": [user("a"), assistant("c")]},
        "do not begin with the turns of 'prompt'",
    ),
    ("preference", {"prompt": "a", "chosen": "b", "rejected": "c", "margin": "x"}, "'margin' is"),
    (
        "preference",
        {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 10**400},
        "expected a finite number",
    ),
    ("preference_implicit", {"chosen": [user("a")], "rejected": [user("b")]}, "share no prompt"),
    (
        "preference_implicit",
        {"chosen": [user("a"), assistant("b")], "rejected": [user("a")]},
        "only continues the other",
    ),
    (
        "preference_implicit",
        {
            "chosen": [user("a"), assistant("b"), user("c"), assistant("d")],
            "rejected": [user("a"), assistant("b"), user("e"), assistant("d")],
        },
        "'chosen' begins with role 'user', expected assistant",
    ),
    ("hh", {"chosen": "Human: a", "rejected": "b"}, "does not begin with two line breaks"),
    (
        "hh",
        {"chosen": "\n\nHuman: a\n\nHuman: b", "rejected": "\n\nHuman: a\n\nAssistant: b"},
        "prompt and chosen: turn 2 has role 'user', expected assistant",
    ),
    ("messages", {"messages": []}, "'messages' is empty"),
    ("messages", {"messages": "hello"}, "'messages' is text, expected a list of messages"),
    ("messages", {"messages": ["hello"]}, "turn 1 is text, expected an object"),
    ("messages", {"messages": [{"content": "a"}]}, "turn 1 has no role"),
    ("messages", {"messages": [{"role": 3, "content": "a"}]}, "the role of turn 1 is a number"),
    ("messages", {"messages": [{"role": "user"}]}, "turn 1 has no content"),
    ("messages", {"messages": [user("a"), assistant(" ")]}, "turn 2 is only spaces"),
    ("messages", {"messages": [user("a")]}, "the last turn has role 'user'"),
    ("messages", {"messages": [assistant("a")]}, "turn 1 has role 'assistant', expected system"),
    (
        "messages",
        {"messages": [user("a"), assistant("b"), {"role": "foo", "content": "c"}]},
        "turn 3 has role 'foo', expected user or tool",
    ),
    ("messages", {"messages": [user("a"), SYSTEM]}, "turn 2 has role 'system', expected assistant"),
    (
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "turn 1 is a list, expected text",
    ),
    (
        "messages",
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}
            ]
        },
        "turn 1 is a list, expected text",
    ),
    ("messages", {"messages": [{"role": "user", "content": []}]}, "turn 1 is a list"),
    ("messages", {"messages": [user("\ud800")]}, "half a surrogate pair"),
    (
        "messages",
        {"messages": [user("a"), assistant("b")], "tools": "add"},
        "'tools' is text that is not JSON",
    ),
    (
        "messages",
        {"messages": [user("a"), assistant("b")], "tools": "[" * 100_000},
        "'tools' is nested too deeply",
    ),
    (
        "messages",
        {"messages": [user("a"), assistant("b")], "tools": {"name": "add"}},
        "'tools' is an object, expected a list",
    ),
    ("sharegpt", {"conversations": [{"value": "a"}]}, "turn 1 has no role"),
    ("sharegpt", {"conversations": [7]}, "turn 1 is a number"),
    (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "a"}]},
        "turn 1 is no function call",
    ),
    (
        "sharegpt",
        {"conversations": [{"from": "function_call", "value": "[" * 100_000}]},
        "turn 1 is no function call",
    ),
    ("alpaca", {"instruction": "a", "input": ""}, "'output' is missing"),
    (
        "alpaca_preference",
        {"instruction": "a", "chosen": ["b", "c"], "rejected": "d"},
        "'chosen' is a list, expected text",
    ),
    (
        "sharegpt_preference",
        {"conversations": [{"from": "human", "value": "a"}], "chosen": {"from": "gpt"}},
        "'rejected' is missing",
    ),
    (
        "sharegpt_preference",
        {
            "conversations": [{"from": "human", "value": "a"}],
            "chosen": {"from": "human", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        "turn 2 has role 'user', expected assistant",
    ),
    ("orca", {"question": "a", "chosen": "b", "rejected": "b"}, "rejected are equal"),
    ("alpaca", {"instruction": "a", "output": {"text": "b"}}, "'output' is an object"),
    ("alpaca", {"instruction": "a", "output": None}, "'output' is null"),
    ("alpaca", {"instruction": "a", "output": "b", "history": [["c"]]}, "'history' item 1"),
    ("completion", {"prompt": "a", "completion": [user("b")]}, "turn 2 has role 'user'"),
    ("qa", {"question": "a", "answer": 3}, "'answer' is a number, expected text"),
    ("reasoning", {"question": "a", "reasoning": "", "answer": "b"}, "'reasoning' is empty"),
    ("kto", {"prompt": "a", "completion": "b", "label": "good"}, "'label' is 'good', expected"),
    (
        "ultrafeedback",
        {"instruction": "a", "completions": [{"response": "b", "overall_score": "N/A"}]},
        "the score of completion 1 is 'N/A', expected a finite number",
    ),
    (
        "ultrafeedback",
        {"instruction": "a", "completions": [{"response": r, "score": 3} for r in "bc"]},
        "all completions have the same score",
    ),
    ("prompt", {"prompt": [user("a"), assistant("b")]}, "'prompt' ends with role 'assistant'"),
    ("prompt", {"prompt": "a", "reference": ["b"]}, "'reference' is a list"),
]


@pytest.mark.parametrize(("name", "row", "reason"), BAD)
def test_a_row_that_does_not_fit_says_why(name: str, row: dict[str, Any], reason: str) -> None:
    with pytest.raises(BadRow, match=re.escape(reason)):
        NORMALISERS[name](row)


TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


@pytest.mark.parametrize("written", [TOOLS, json.dumps(TOOLS)])
def test_tool_definitions_are_kept(written: Any) -> None:
    made = NORMALISERS["messages"]({"messages": [user("a"), assistant("b")], "tools": written})
    assert made.tools == TOOLS


def in_parts(turn: dict[str, Any]) -> dict[str, Any]:
    """The turn with each letter as a text part, with the nulls that Parquet adds."""
    parts = [{"type": "text", "text": letter, "image": None} for letter in turn["content"]]
    return turn | {"content": parts}


def test_text_parts_are_joined() -> None:
    ask, good, bad = user("one two"), assistant("three"), assistant("four")
    parts = {"messages": [in_parts(ask), good, user("and?"), in_parts(bad)]}
    before = repr(parts)
    assert NORMALISERS["messages"](parts).messages == [ask, good, user("and?"), bad]
    assert repr(parts) == before
    row = {"prompt": [in_parts(ask)], "chosen": [in_parts(good)], "rejected": [in_parts(bad)]}
    assert detect(row) == "preference"
    assert NORMALISERS["preference"](row) == Preference([ask], [good], [bad])
    whole = {"chosen": [in_parts(ask), good], "rejected": [ask, in_parts(bad)]}
    assert NORMALISERS["preference_implicit"](whole) == Preference([ask], [good], [bad])


@pytest.mark.parametrize("more", [{}, {"question": "q"}, {"instruction": "i"}])
def test_a_dialogue_is_one_beside_other_columns_too(more: dict[str, Any]) -> None:
    texts = {key: f"\n\nHuman: a\n\nAssistant: {key}" for key in ("chosen", "rejected")}
    assert detect(texts | more) == "hh"
    assert detect({"prompt": "p", "chosen": "b", "rejected": "c"} | more) == "preference"
    assert detect({"question": "a", "answer": "b", "chosen": "c", "rejected": "d"}) == "qa"


def test_llama_factorys_function_calls_become_tool_calls() -> None:
    call = {"name": "add", "arguments": {"a": 1}}
    turns = [("human", "1+2?"), ("function_call", json.dumps(call)), ("observation", "3")]
    row = {"conversations": [{"from": who, "value": said} for who, said in [*turns, ("gpt", "3")]]}
    made = NORMALISERS["sharegpt"](row).messages
    assert [turn["role"] for turn in made] == ["user", "assistant", "tool", "assistant"]
    assert made[1]["tool_calls"] == [{"type": "function", "function": call}]


def test_the_developer_speaks_as_the_system() -> None:
    developer = {"role": "developer", "content": "Be short."}
    made = NORMALISERS["messages"]({"messages": [developer, user("a"), assistant("b")]})
    assert made == Conversation([SYSTEM, user("a"), assistant("b")])


def test_binarized_ultrafeedback_keeps_the_margin() -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "score_chosen": 8, "score_rejected": 5.5}
    assert NORMALISERS["preference"](row).margin == 2.5
    for empty in (None, ""):  # a cell of Parquet, of CSV
        assert NORMALISERS["preference"](row | {"score_chosen": empty}).margin is None


def test_a_score_that_is_null_hides_no_other() -> None:
    rated = [{"response": "b", "overall_score": None, "score": 3}, {"response": "c", "score": 1}]
    made = NORMALISERS["ultrafeedback"]({"instruction": "a", "completions": rated})
    assert made == Preference([user("a")], [assistant("b")], [assistant("c")], 2.0)


def test_indentation_and_line_breaks_are_a_difference() -> None:
    row = {"prompt": "a", "chosen": "if x:\n    y", "rejected": "if x:\ny"}
    assert isinstance(NORMALISERS["preference"](row), Preference)


def test_an_unknown_shape_lists_the_formats() -> None:
    with pytest.raises(BadRow, match=r"\('text', 'label'\) fit none of .*messages, sharegpt"):
        detect({"text": "a", "label": 1})


def test_a_normaliser_leaves_its_row_alone() -> None:
    row = {"messages": [user("a"), {"role": "assistant", "content": None, "tool_calls": [1]}]}
    before = repr(row)
    NORMALISERS["messages"](row)
    assert repr(row) == before


# A busy machine is slow to draw the first examples; that is no fault of the code.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])

TEXT = st.text(min_size=1, max_size=8)
MESSAGES = st.lists(
    st.builds(
        lambda role, content: {"role": role, "content": content},
        st.sampled_from(["system", "user", "assistant", "tool"]),
        TEXT,
    ),
    max_size=4,
)
VALUE = TEXT | MESSAGES | st.none() | st.floats() | st.booleans()
ROWS = st.dictionaries(
    st.sampled_from(
        [
            "messages",
            "conversations",
            "instruction",
            "input",
            "output",
            "prompt",
            "completion",
            "chosen",
            "rejected",
            "margin",
            "question",
            "answer",
            "reference",
            "system",
        ]
    ),
    VALUE,
)


def as_row(record: Any) -> tuple[str, dict[str, Any]]:
    """A record's own form, written as a row again."""
    names = {Conversation: "messages", Preference: "preference", Rated: "kto", Prompt: "prompt"}
    return names[type(record)], dict(vars(record))


@pytest.mark.parametrize("name", NORMALISERS)
@PATIENT
@given(row=ROWS)
def test_any_row_gives_a_record_or_a_reason(name: str, row: dict[str, Any]) -> None:
    try:
        record = NORMALISERS[name](row)
    except BadRow:
        return
    again, own = as_row(record)
    assert NORMALISERS[again](own) == record


@pytest.mark.parametrize(("name", "row", "record"), CASES)
def test_normalising_a_record_again_changes_nothing(
    name: str, row: dict[str, Any], record: Any
) -> None:
    again, own = as_row(record)
    assert detect(own) == again
    assert NORMALISERS[again](own) == record


@given(
    st.lists(st.tuples(TEXT, TEXT).filter(lambda pair: all(t.strip() for t in pair)), min_size=1)
)
def test_sharegpt_and_messages_agree(pairs: list[tuple[str, str]]) -> None:
    turns = [t for question, answer in pairs for t in (("human", question), ("gpt", answer))]
    theirs = {"conversations": [{"from": who, "value": text} for who, text in turns]}
    ours = {"messages": [(user if who == "human" else assistant)(text) for who, text in turns]}
    assert NORMALISERS["sharegpt"](theirs) == NORMALISERS["messages"](ours)


def test_a_dialogue_as_a_prompt_has_its_turns() -> None:
    """As in Dahoas' form of HH-RLHF."""
    dialogue = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Who are you?\n\nAssistant:"
    turns = [user("Hi"), assistant("Hello!"), user("Who are you?")]
    row = {"prompt": dialogue, "chosen": " A bot.", "rejected": " Go away."}
    assert preference(row) == Preference(turns, [assistant("A bot.")], [assistant("Go away.")])
    assert prompt({"prompt": dialogue}).prompt == turns
    quoted = "What is wrong with this?\n\nHuman: a\n\nAssistant:"
    assert prompt({"prompt": quoted}).prompt == [user(quoted)]


@pytest.mark.parametrize(
    ("value", "text"), [(1e-05, "0.00001"), (1e16, "10000000000000000"), (3, "3")]
)
def test_a_number_is_a_reference_without_an_exponent(value: float, text: str) -> None:
    assert prompt({"prompt": "How much?", "answer": value}).reference == text
