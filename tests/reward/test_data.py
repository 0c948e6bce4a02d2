"""From a source to records: every file type, every message to the user, and real data."""

import csv
import gzip
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.entry import UserError
from conf.schema import Data
from reward import audit, demo
from reward.command import Reading
from reward.data import prepare
from reward.findings import UNUSABLE
from reward.records import KINDS, NORMALISERS, Conversation, Preference, Prompt, Record, detect
from reward.versions import AUDIT, to_trl

ROOT = Path(__file__).parents[2]
SHARED = ROOT.parent / "shared" / "data"
needs_shared_data = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the shared data folder is not beside this checkout"
)

ROWS = [
    {"instruction": "Greet.", "input": "", "output": "Hi"},
    {"instruction": "Add.", "input": "1, 2", "output": "3\u2028and\u0085no more"},
    {"instruction": 'Quote "it",', "input": "", "output": "a\nb"},
]
GOOD = b'{"question": "a", "answer": "b"}'


@dataclass
class Problem:
    where: str
    reason: str


@dataclass
class Loaded:
    records: list[Record]
    rows: int
    dropped: list[Problem]
    format: str
    fingerprint: str
    blank: int  # lines, which are among the rows


def load(data: Data, kind: str, where: str = "data") -> Loaded:
    """A version, whole in memory, and what it left out."""
    with tempfile.TemporaryDirectory() as root:
        version = prepare(data, kind, Path(root), where)
        found = json.loads((version.folder / AUDIT).read_text())["findings"]
        dropped = [
            Problem(*f["detail"].split(": ", 1))
            for f in found
            if f["kind"] in UNUSABLE and f["kind"] != "blank_line"
        ]
        made = version.manifest
        return Loaded(
            list(version.records()),
            made["rows"],
            dropped,
            made["format"],
            version.fingerprint,
            sum(f["kind"] == "blank_line" for f in found),
        )


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")
    return path


def write_as(path: Path, rows: list[dict[str, Any]]) -> Path:
    """Write the rows in the form that the file's name says."""
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "jsonl":
        write(path, rows)
    elif kind == "json":
        path.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    elif kind == "csv":
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        import pyarrow as pa
        import pyarrow.parquet

        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    return path


def load_bytes(content: bytes, **changes: Any) -> Loaded:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows.jsonl"
        path.write_bytes(content)
        return load(Data(source=str(path), **changes), "sft")


def refusal(data: Data, kind: str = "sft", where: str = "sft.data") -> str:
    with pytest.raises(UserError) as caught:
        load(data, kind, where)
    return str(caught.value)


# --- files


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "a.csv", "a.csv.gz", "a.parquet"]
)
def test_every_file_type_gives_the_same_records(tmp_path: Path, name: str) -> None:
    loaded = load(Data(source=str(write_as(tmp_path / name, ROWS))), "sft")
    expected = [NORMALISERS["alpaca"](row) for row in ROWS]
    assert loaded.records == expected
    assert (loaded.rows, loaded.dropped, loaded.format) == (3, [], "alpaca")
    plain = load(Data(source=str(write(tmp_path / "plain.jsonl", ROWS))), "sft")
    assert loaded.fingerprint == plain.fingerprint


def test_the_fingerprint_names_content_not_format_or_place(tmp_path: Path) -> None:
    first = load(Data(source=str(write(tmp_path / "a.jsonl", ROWS))), "sft")
    chats = [{"messages": record.messages} for record in first.records]  # type: ignore[union-attr]
    second = load(Data(source=str(write(tmp_path / "b.jsonl", chats))), "sft")
    fewer = load(Data(source=str(write(tmp_path / "c.jsonl", ROWS[:2]))), "sft")
    turned = load(Data(source=str(write(tmp_path / "d.jsonl", ROWS[::-1]))), "sft")
    assert (first.format, second.format) == ("alpaca", "messages")
    assert first.fingerprint == second.fingerprint
    assert len({first.fingerprint, fewer.fingerprint, turned.fingerprint}) == 3
    assert len(first.fingerprint) == 16


def test_parquet_and_jsonl_agree_on_messages_with_different_keys(tmp_path: Path) -> None:
    rows = [
        {"messages": [{"role": "user", "content": "a", "name": "X"}, assistant("b")]},
        {"messages": [{"role": "user", "content": "c"}, assistant("d")]},
    ]
    loaded = [
        load(Data(source=str(write_as(tmp_path / n, rows))), "sft")
        for n in ("a.jsonl", "a.parquet")
    ]
    assert loaded[0].records == loaded[1].records
    assert loaded[0].fingerprint == loaded[1].fingerprint


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def test_a_folder_and_a_glob_are_read_in_the_order_of_names(tmp_path: Path) -> None:
    for name, row in zip(["b.jsonl", "a.csv", "c.jsonl.gz"], ROWS, strict=True):
        write_as(tmp_path / name, [row])
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / ".hidden.jsonl").write_text("not data")
    (tmp_path / "test").mkdir()
    write(tmp_path / "test" / "d.jsonl", ROWS)
    expected = [NORMALISERS["alpaca"](ROWS[i]) for i in (1, 0, 2)]
    assert load(Data(source=str(tmp_path)), "sft").records == expected
    assert load(Data(source=str(tmp_path / "*")), "sft").records == expected
    assert load(Data(source=str(tmp_path / "[ab].*")), "sft").records == expected[:2]


def test_json_lines_under_the_name_json(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.json", ROWS)
    assert load(Data(source=str(path)), "sft").rows == 3


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"data": ROWS}),
        json.dumps({"data": ROWS}, indent=2),
        "\ufeff\n" + json.dumps({'a "key" [': ROWS}, indent=2) + "\n",
    ],
)
def test_an_object_that_holds_the_rows(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    loaded = load(Data(source=str(tmp_path / "a.json")), "sft")
    assert loaded.records == [NORMALISERS["alpaca"](row) for row in ROWS]
    assert (loaded.rows, loaded.dropped) == (3, [])


@pytest.mark.parametrize(
    "row",
    [
        ROWS[1],
        {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]},
    ],
)
@pytest.mark.parametrize("indent", [None, 2])
def test_one_object_is_one_row(tmp_path: Path, row: dict[str, Any], indent: int | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps(row, indent=indent))
    loaded = load(Data(source=str(tmp_path / "a.json")), "sft")
    assert (loaded.rows, len(loaded.records), loaded.dropped) == (1, 1, [])


@pytest.mark.parametrize(("before", "after"), [(b"[", b"]"), (b'{"data": [', b"\n]}\n")])
@pytest.mark.parametrize(
    ("item", "reason"),
    [
        (b'{"question": "a", "answer": "b", "x": NaN}', "NaN is not a JSON value"),
        (b'{"question": "a",\n"answer": "b", "x": [-Infinity]}', "-Infinity is not a JSON value"),
        (b'{"question": "\xff", "answer": "b"}', "it is not UTF-8 text (byte 15)"),
        (b'{"question": "a", "answer": "\\udcff"}', "half a surrogate pair"),
        (b'{"question": ' + b"9" * 5000 + b"}", "it is not JSON: Exceeds the limit"),
        (b"3", "it is not an object"),
    ],
)
def test_a_fault_in_a_json_list_is_one_row(
    tmp_path: Path, before: bytes, after: bytes, item: bytes, reason: str
) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(before + b" ,\n".join([GOOD, item, GOOD]) + after)
    loaded = load(Data(source=str(path), max_bad_fraction=0.5), "sft")
    assert [problem.where for problem in loaded.dropped] == ["a.json:2"]
    assert reason in loaded.dropped[0].reason
    assert len(loaded.records) == 2


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"[" + GOOD + b",\n" + GOOD + b"\n" + GOOD + b"]", "line 3 column 1"),
        (b"[" + GOOD + b",\n{'a': 1}]", "line 2 column 2"),
        (b"[" + GOOD + b",\n" + GOOD, "line 2 column 33"),
        (b"[" + GOOD + b"]\n[" + GOOD + b"]", "Extra data: line 2 column 1"),
        (b"[" + GOOD + b"," + b"[" * 200_000 + b"]" * 200_000 + b"]", "item 2 is nested too"),
    ],
)
def test_a_json_list_that_is_none_names_the_place_and_a_fix(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "a.json").write_bytes(content)
    message = refusal(Data(source=str(tmp_path / "a.json"), max_bad_fraction=0.9))
    assert message.startswith(f"cannot read {tmp_path / 'a.json'}: ")
    assert reason in message
    assert ". Mend it there" in message or ". Remove the item" in message


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (b'"q2"x,a2\n', "it is not CSV: ',' expected after '\"'"),
        (b'q2,"a2\n', "it is not CSV: "),  # the quote would take the next rows for text
        (b"q2,caf\xe9\n", "it is not UTF-8 text (in 'answer')"),
        (b"q2\n", "it has 1 fields, the header has 2"),
    ],
)
@pytest.mark.parametrize("last", [b'"q4","a4"\n', b"q4,a4"])
def test_a_fault_in_a_csv_file_is_one_row(
    tmp_path: Path, row: bytes, reason: str, last: bytes
) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(b'question,answer\n"q\n1",a1\n' + row + b"q3,a3\n" + last)
    loaded = load(Data(source=str(path), max_bad_fraction=0.5), "sft")
    assert [problem.where for problem in loaded.dropped] == ["a.csv:4"]
    assert reason in loaded.dropped[0].reason
    said = [[turn["content"] for turn in record.messages] for record in loaded.records]  # type: ignore[union-attr]
    assert said == [["q\n1", "a1"], ["q3", "a3"], ["q4", "a4"]]


@pytest.mark.parametrize(
    ("header", "reason"),
    [(b'"question"x,answer', "is not CSV: "), (b"question,r\xe9ponse", "is not UTF-8 text")],
)
def test_a_broken_csv_header_is_named(tmp_path: Path, header: bytes, reason: str) -> None:
    (tmp_path / "a.csv").write_bytes(header + b"\na,b\n")
    assert f"line 1, the header, {reason}" in refusal(Data(source=str(tmp_path / "a.csv")))


def test_text_in_a_parquet_file_that_is_not_utf8_is_one_row(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    answers = pa.array([b"a", b"\xff", b"c"]).view(pa.string())
    table = pa.table({"question": ["x", "y", "z"], "answer": answers})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    loaded = load(Data(source=str(tmp_path / "a.parquet"), max_bad_fraction=0.5), "sft")
    assert [(p.where, p.reason) for p in loaded.dropped] == [
        ("a.parquet:2", "it is not UTF-8 text")
    ]
    assert len(loaded.records) == 2


def test_a_dangling_link_in_a_folder_is_named(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "b.jsonl").symlink_to(tmp_path / "gone.jsonl")
    for source in (tmp_path, tmp_path / "*", tmp_path / "b.jsonl"):
        message = refusal(Data(source=str(source)))
        assert f"cannot read {tmp_path / 'b.jsonl'}: it is a link to " in message
        assert "gone.jsonl', which does not exist. Restore" in message


def test_an_unreadable_file_in_a_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "a.jsonl", ROWS)
    locked = write(tmp_path / "b.jsonl", ROWS)
    allowed = os.access  # root may read everything, whatever the file's mode
    monkeypatch.setattr(os, "access", lambda path, mode: path != locked and allowed(path, mode))
    assert f"cannot read {locked}: permission denied. Make it" in refusal(
        Data(source=str(tmp_path))
    )


def test_rows_that_are_nested_too_deeply_are_counted_by_small_commands(tmp_path: Path) -> None:
    deep = {"messages": [{"role": "user", "content": "a"}, assistant("b")], "tools": "[" * 200_000}
    path = write(tmp_path / "a.jsonl", [deep, ROWS[0]])
    reading = Reading(str(path), lambda row, _: NORMALISERS[detect(row)](row), "negatives")
    assert list(reading) == [NORMALISERS["alpaca"](ROWS[0])]
    assert (reading.rows, reading.bad) == (2, ["a.jsonl:1: 'tools' is nested too deeply"])


def test_an_audit_that_cannot_be_written_is_refused_before_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = write(tmp_path / "a.json", ROWS)

    def fail(*_: Any) -> None:
        raise AssertionError("the audit ran")

    monkeypatch.setattr(audit, "audit", fail)
    for out, text in ((tmp_path, "is a folder: name a file in it"), (path, "is part of the input")):
        argv = ["audit", str(path), "--kind", "sft", "--json", str(out)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as stopped:
            audit.main()
        assert stopped.value.code == 2
        assert f"error: {out} {text}" in capsys.readouterr().err


def test_a_csv_cell_may_be_long_and_span_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,answer\n"a\nb",' + "x" * 300_000 + "\nc,d,e\nf,g\n")
    loaded = load(Data(source=str(path), max_bad_fraction=0.5), "sft")
    assert loaded.rows == 3
    assert [(p.where, p.reason) for p in loaded.dropped] == [
        ("a.csv:4", "it has 3 fields, the header has 2")
    ]


def test_reading_a_file_loads_nothing_heavy(tmp_path: Path) -> None:
    path = write_as(tmp_path / "a.parquet", ROWS)
    code = (
        "import sys; from pathlib import Path\n"
        "from conf.schema import Data; from reward.data import prepare\n"
        f"prepare(Data(source={str(path)!r}), 'sft', Path({str(tmp_path)!r}))\n"
        "print({'torch', 'datasets', 'transformers'} & set(sys.modules))"  # pyarrow loads pandas
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "set()"


# --- lines


def test_a_byte_order_mark_windows_line_ends_and_blank_lines_are_no_problem() -> None:
    loaded = load_bytes(b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n   \n" + GOOD)
    assert (loaded.rows, loaded.dropped) == (4, [])


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"question": "a"', "it is not JSON: Expecting ',' delimiter (column 17)"),
        (b"{'question': 'a'}", "it is not JSON"),
        (b'{"question": "a", "answer": "b",}', "it is not JSON"),
        (GOOD + GOOD, "more than one JSON value on the line (column 33)"),
        (b'{"question": "\xff", "answer": "b"}', "it is not UTF-8 text (byte 15)"),
        (b'{"question": "a", "answer": "b", "x": NaN}', "NaN is not a JSON value"),
        (b'{"question": "a", "answer": "b", "x": -Infinity}', "-Infinity is not a JSON value"),
        (b'["a", "b"]', "it is not an object"),
        (b"3", "it is not an object"),
        (b"[" * 100_000, "it is nested too deeply"),
        (b'{"question": ' + b"9" * 5000 + b"}", "it is not JSON: Exceeds the limit"),
        (b'{"question": "a", "answer": ""}', "'answer' is empty"),
        (b'{"question": "a", "answer": "\\ud800"}', "half a surrogate pair"),
        (b'{"prompt": "a", "completion": "b"}', "'question' is missing"),
        (
            b'{"prompt": "p", "completion": "q", "question": "a", "answer": "b"}',
            "it looks like format 'completion', the rows before it like 'qa'",
        ),
    ],
)
def test_an_unusable_line_is_named(line: bytes, reason: str) -> None:
    content = GOOD + b"\n\n" + line + b"\n" + GOOD + b"\n"
    with pytest.raises(UserError, match=r"1 of 3 rows in .* \(limit 1 %\): rows\.jsonl:3: "):
        load_bytes(content)
    loaded = load_bytes(content, max_bad_fraction=0.4)
    assert [problem.where for problem in loaded.dropped] == ["rows.jsonl:3"]
    assert reason in loaded.dropped[0].reason
    assert len(loaded.records) == 2


@pytest.mark.parametrize("argument", ["18446744073709551616", '"\\ud83d"'])
def test_a_tool_call_that_cannot_be_written_is_one_row(argument: str) -> None:
    def line(call: str) -> bytes:
        turns = [("human", "a"), ("function_call", call), ("observation", "b"), ("gpt", "c")]
        return json.dumps(
            {"conversations": [{"from": who, "value": said} for who, said in turns]}
        ).encode()

    calls = [f'{{"name": "f", "arguments": {{"x": {value}}}}}' for value in ("1", argument)]
    loaded = load_bytes(b"\n".join(map(line, calls)), max_bad_fraction=0.5)
    assert [problem.where for problem in loaded.dropped] == ["rows.jsonl:2"]
    assert loaded.dropped[0].reason.startswith("turn 2 cannot be written as JSON: ")


def test_the_format_comes_from_the_first_usable_row() -> None:
    loaded = load_bytes(b'{"messages": []}\n{"a": 1}\n' + GOOD, max_bad_fraction=0.7)
    assert (loaded.format, loaded.rows, len(loaded.records)) == ("qa", 3, 1)


LINES = st.lists(
    st.binary(max_size=20)
    | st.sampled_from([GOOD, b'{"messages": [{"role": "user"}]}', b"{", b"\xef\xbb\xbf", b"[]"])
    | st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    ["messages", "role", "content", "prompt", "chosen", "rejected", "margin"]
                ),
                inner,
            )
        ),
        max_leaves=6,
    ).map(lambda value: json.dumps(value).encode()),
    max_size=5,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(lines=LINES, kind=st.sampled_from(list(KINDS)), bad=st.sampled_from([0.0, 0.9]))
def test_any_bytes_give_records_or_a_message(lines: list[bytes], kind: str, bad: float) -> None:
    content = b"\n".join(lines)
    with tempfile.TemporaryDirectory() as folder:
        for ending in ("jsonl", "json", "csv", "parquet", "jsonl.gz"):
            path = Path(folder) / f"rows.{ending}"
            path.write_bytes(content)
            try:
                loaded = load(Data(source=str(path), max_bad_fraction=bad), kind)
            except UserError:
                continue
            assert len(loaded.records) + len(loaded.dropped) + loaded.blank == loaded.rows
            assert all(isinstance(record, KINDS[kind]) for record in loaded.records)
            json.dumps([list(to_trl(record)) for record in loaded.records])


# --- limits


def test_limit_takes_the_first_usable_rows(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        ROWS[0],
        {"instruction": "x", "output": ""},
        ROWS[1],
        ROWS[2],
        {"nonsense": 1},
    ]
    path = write(tmp_path / "a.jsonl", rows)
    loaded = load(Data(source=str(path), limit=2, max_bad_fraction=0.5), "sft")
    assert loaded.records == [NORMALISERS["alpaca"](row) for row in ROWS[:2]]
    assert (loaded.rows, [p.where for p in loaded.dropped]) == (3, ["a.jsonl:2"])


@pytest.mark.parametrize(("bad", "good"), [(1, 2), (3, 117), (29, 71), (7, 93), (1, 3000)])
def test_the_fraction_that_the_message_offers_is_enough(
    tmp_path: Path, bad: int, good: int
) -> None:
    path = write(tmp_path / "a.jsonl", [ROWS[0]] * good + [{"instruction": ""}] * bad)
    message = refusal(Data(source=str(path), max_bad_fraction=0.0))
    assert f"{bad} of {bad + good} rows in {path} cannot be used (limit 0 %)" in message
    assert message.count("a.jsonl:") == min(bad, 5)
    remedy, _, fraction = message.rpartition("sft.data.max_bad_fraction=")
    assert remedy.endswith("Fix the rows, or drop them with ")
    loaded = load(Data(source=str(path), max_bad_fraction=float(fraction)), "sft")
    assert len(loaded.dropped) == bad


def test_nothing_usable_is_refused_whatever_the_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"a": 1}])
    message = refusal(Data(source=str(path), max_bad_fraction=1.0))
    assert "1 of 1 rows" in message
    assert "fit none of the formats messages, sharegpt" in message
    (tmp_path / "empty.jsonl").touch()
    assert "has no rows" in refusal(Data(source=str(tmp_path / "empty.jsonl")))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"limit": 0}, "sft.data.limit=0 must be at least 1"),
        ({"max_bad_fraction": 1.5}, "sft.data.max_bad_fraction=1.5 must lie between 0 and 1"),
        ({"format": "alpacca"}, "no format 'alpacca'. Did you mean 'alpaca'?"),
        ({"source": ""}, "sft.data.source must be set"),
        ({"source": "demo:preference"}, "no demo 'preference'. Did you mean 'preferences'?"),
    ],
)
def test_a_wrong_knob_is_named(changes: dict[str, Any], text: str) -> None:
    assert text in refusal(Data(**{"source": "demo:demonstrations"} | changes))


# --- kinds


def test_feedback_of_another_kind_is_refused(tmp_path: Path) -> None:
    pairs = str(write(tmp_path / "pairs.jsonl", demo.preferences(3)))
    message = refusal(Data(source=pairs))
    assert "format 'preference' was detected, but this stage needs demonstrations" in message
    chats = str(write(tmp_path / "chats.jsonl", demo.demonstrations(3)))
    assert "needs pairs of a chosen" in refusal(Data(source=chats), "preference")


def test_of_answered_rows_the_prompts_can_be_taken(tmp_path: Path) -> None:
    """A demonstration's answer is the reference; that of a pair was only preferred."""
    qa = write(tmp_path / "qa.jsonl", [{"question": "1 + 1?", "answer": "It is #### 2"}])
    assert load(Data(source=str(qa)), "prompts").records == [
        Prompt([{"role": "user", "content": "1 + 1?"}], "It is #### 2")
    ]
    pairs = str(write(tmp_path / "pairs.jsonl", demo.preferences(3)))
    prompts = load(Data(source=pairs), "prompts").records
    assert prompts == [Prompt(row["prompt"]) for row in demo.preferences(3)]
    chats = str(write(tmp_path / "chats.jsonl", demo.demonstrations(3)))
    rows = [row["messages"] for row in demo.demonstrations(3)]
    prompts = load(Data(source=chats), "prompts").records
    assert prompts == [Prompt(turns[:-1], turns[-1]["content"]) for turns in rows]


def test_the_demo_has_every_kind() -> None:
    assert load(Data(source="demo:demonstrations"), "sft").rows == 256
    assert load(Data(source="demo:preferences", limit=5), "preference").rows == 5
    prompts = load(Data(source="demo:held_out", limit=300), "prompts")
    assert [r.reference for r in prompts.records] == [  # type: ignore[union-attr]
        row["reference"] for row in demo.held_out(300)
    ]


def test_each_assistant_turn_is_trained_once_and_alone() -> None:
    turns = [
        {"role": role, "content": str(i)}
        for i, role in enumerate(["system", "user", "assistant", "tool", "assistant", "user"])
    ]
    turns.append(assistant("6"))
    assert list(to_trl(Conversation(turns))) == [
        {"prompt": turns[:2], "completion": [turns[2]]},
        {"prompt": turns[:4], "completion": [turns[4]]},
        {"prompt": turns[:6], "completion": [turns[6]]},
    ]


def test_preferences_and_prompts_for_trl() -> None:
    ask, good, bad = [{"role": "user", "content": "a"}], [assistant("b")], [assistant("c")]
    row = {"prompt": ask, "chosen": good, "rejected": bad}
    assert list(to_trl(Preference(ask, good, bad))) == [row]
    assert list(to_trl(Preference(ask, good, bad, 0.0))) == [row | {"margin": 0.0}]
    assert list(to_trl(Prompt(ask))) == [{"prompt": ask}]
    assert list(to_trl(Prompt(ask, "b"))) == [{"prompt": ask, "reference": "b"}]
    (row,) = to_trl(Prompt(ask, facts={"tests": ["x"]}))
    assert row == {"prompt": ask, "facts": '{"tests": ["x"]}'}


# --- which source


def test_a_path_that_does_not_exist_names_the_nearest(tmp_path: Path) -> None:
    write(tmp_path / "prefs.jsonl", ROWS)
    message = refusal(Data(source=str(tmp_path / "perfs.jsonl")))
    assert "there is no file 'perfs.jsonl'" in message
    assert "Did you mean 'prefs.jsonl'?" in message
    folder = tmp_path.parent / (tmp_path.name + "x") / "deep" / "a.jsonl"
    assert f"there is no folder '{tmp_path.name}x'" in refusal(Data(source=str(folder)))
    assert "no file matches" in refusal(Data(source=str(tmp_path / "*.csv")))
    assert "there is no folder '~nobody-of-that-name'" in refusal(
        Data(source="~nobody-of-that-name/a.jsonl")
    )


def test_a_file_of_no_known_type_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("x")
    for source in (tmp_path / "a.txt", tmp_path, tmp_path / "*"):
        assert "names end in .jsonl, .json, .csv" in refusal(Data(source=str(source)))


def test_an_existing_folder_wins_over_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "owner" / "name").mkdir(parents=True)
    write(tmp_path / "owner" / "name" / "a.jsonl", ROWS)
    monkeypatch.chdir(tmp_path)
    assert load(Data(source="owner/name"), "sft").rows == 3


def test_a_bare_name_is_told_what_a_source_may_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "feedback").mkdir()
    message = refusal(Data(source="fedback"))
    assert "neither a file that exists nor a hub id (owner/name" in message
    assert "Did you mean 'feedback'?" in message


@pytest.mark.parametrize("ending", ["json", "csv", "parquet", "jsonl.gz"])
def test_a_damaged_file_is_named(tmp_path: Path, ending: str) -> None:
    path = tmp_path / f"a.{ending}"
    path.write_bytes(b'["\xff"')
    assert f"cannot read {path}: " in refusal(Data(source=str(path)))
    if ending == "jsonl.gz":
        path.write_bytes(gzip.compress(GOOD * 99)[:-12])
        assert f"cannot read {path}: " in refusal(Data(source=str(path)))


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may read everything")
def test_a_forbidden_file_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", ROWS)
    path.chmod(0)
    assert f"cannot read {path}: " in refusal(Data(source=str(path)))


def test_the_hub_is_asked_for_what_the_config_says(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(*args: Any, **kwargs: Any) -> Any:
        asked.append((args, kwargs))
        return datasets.Dataset.from_list([ROWS[0], ROWS[1], {"instruction": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = Data(source="owner/name", name="en", split="test", revision="abc", max_bad_fraction=0.4)
    loaded = load(data, "sft")
    assert asked[0] == (("owner/name", "en"), {"split": "test", "revision": "abc"})
    assert len(loaded.records) == 2
    assert [p.where for p in loaded.dropped] == ["owner/name:3"]


def test_a_failing_hub_says_what_why_and_the_fix(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def load_dataset(*args: Any, **kwargs: Any) -> None:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub\nlong story")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    message = refusal(Data(source="owner/name"))
    assert "(ConnectionError: Couldn't reach 'owner/name' on the Hub)" in message
    assert "Set sft.data.source to a local file" in message
    assert "HF_HUB_OFFLINE" in message


# --- real data


@needs_shared_data
@pytest.mark.parametrize(
    ("file", "kind", "form", "rows"),
    [
        ("preference/hh_harmless.train.jsonl.gz", "preference", "preference", 1533),
        ("preference/hh_harmless.test.jsonl.gz", "preference", "preference", 271),
        ("preference/alpaca_judged.train.jsonl.gz", "preference", "preference", 3356),
        ("preference/alpaca_judged.test.jsonl.gz", "preference", "preference", 497),
        ("sft/gsm8k.train.jsonl.gz", "sft", "qa", 7473),
        ("sft/alpaca.jsonl.gz", "sft", "alpaca", 1084),
        ("sft/self_instruct_seed.jsonl.gz", "sft", "alpaca", 175),
        ("sft/chat_messages.jsonl.gz", "sft", "messages", 400),
        ("sft/completion.jsonl.gz", "sft", "completion", 1000),
    ],
)
def test_real_data_load_whole(file: str, kind: str, form: str, rows: int) -> None:
    loaded = load(Data(source=str(SHARED / file)), kind)
    assert (loaded.format, loaded.rows, loaded.dropped) == (form, rows, [])


@needs_shared_data
def test_alpaca_rows_become_the_chats_that_others_made_of_them() -> None:
    ours = load(Data(source=str(SHARED / "sft/alpaca.jsonl.gz"), limit=400), "sft")
    theirs = load(Data(source=str(SHARED / "sft/chat_messages.jsonl.gz")), "sft")
    assert ours.fingerprint == theirs.fingerprint


def hh_text(turns: list[dict[str, str]]) -> str:
    names = {"user": "Human", "assistant": "Assistant"}
    return "".join(f"\n\n{names[turn['role']]}: {turn['content']}" for turn in turns)


@needs_shared_data
def test_three_ways_to_write_a_preference_agree(tmp_path: Path) -> None:
    source = SHARED / "preference" / "hh_harmless.test.jsonl.gz"
    rows = [json.loads(line) for line in gzip.decompress(source.read_bytes()).split(b"\n") if line]
    whole = [{k: row["prompt"] + row[k] for k in ("chosen", "rejected")} for row in rows]
    texts = [{k: hh_text(turns) for k, turns in row.items()} for row in whole]
    explicit = load(Data(source=str(source)), "preference")
    implicit = load(Data(source=str(write(tmp_path / "a.jsonl", whole))), "preference")
    plain = load(Data(source=str(write(tmp_path / "b.jsonl", texts))), "preference")
    assert [explicit.format, implicit.format, plain.format] == [
        "preference",
        "preference_implicit",
        "hh",
    ]
    assert explicit.fingerprint == implicit.fingerprint == plain.fingerprint


def truth(name: str, key: str) -> dict[int, str]:
    """Issue by 1-based line."""
    text = (SHARED / "raw_dirty" / name).read_text(encoding="utf-8")
    items = [json.loads(line) for line in text.split("\n") if line]
    return {item[key] + 1: item["issue"] for item in items}


@needs_shared_data
def test_every_broken_line_is_reported_and_no_other() -> None:
    source = SHARED / "raw_dirty" / "broken_lines.jsonl"
    loaded = load(Data(source=str(source), max_bad_fraction=1.0), "sft")
    known = truth("broken_lines.truth.jsonl", "line")
    expected = [line for line, issue in known.items() if issue != "blank_line"]
    assert [p.where for p in loaded.dropped] == [f"broken_lines.jsonl:{n}" for n in expected]
    assert loaded.rows == 80


@needs_shared_data
def test_dirty_pairs_are_dropped_where_a_row_alone_shows_the_fault() -> None:
    source = SHARED / "raw_dirty" / "preference_dirty.jsonl.gz"
    loaded = load(Data(source=str(source), max_bad_fraction=1.0), "preference")
    visible = {
        "same_pair",
        "same_pair_whitespace",
        "empty_chosen",
        "empty_rejected",
        "bad_role_order",
    }
    known = truth("preference_dirty.truth.jsonl", "row")
    expected = [line for line, issue in known.items() if issue in visible]
    assert [int(p.where.rpartition(":")[2]) for p in loaded.dropped] == expected
