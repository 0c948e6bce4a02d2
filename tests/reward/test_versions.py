"""Data versions: what cleaning removes and counts, how rows are split, mixed, ordered and named."""

import itertools
import json
import re
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.entry import UserError
from conf.schema import Clean, Data, Order, Part, Portion
from reward import ingest
from reward.choose import part_of
from reward.data import prepare
from reward.diff import diff
from reward.records import Conversation, Preference, Prompt
from reward.versions import RECORDS, REMOVED, Version


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_text(text, encoding="utf-8", newline="\n")
    return str(path)


def qa(number: int, **more: Any) -> dict[str, Any]:
    """A row that resembles no other."""
    words = np.random.default_rng(number).integers(10**9, size=8)
    return {"question": f"What of {words[:4]}?", "answer": f"It is {words[4:]}.", **more}


def answers(version: Version) -> list[str]:
    return [
        record.messages[-1]["content"]
        for record in version.records()
        if isinstance(record, Conversation)
    ]


def test_what_a_verifier_reads_is_kept_in_a_version(tmp_path: Path) -> None:
    facts = {"schema": {"type": "object"}, "kwargs": [{"n": None}], "instruction_id_list": ["a:b"]}
    rows = [{"prompt": "Give JSON.", "reference": "{}", **facts}, {"prompt": "Hi there"}]
    version = prepare(Data(source=write(tmp_path / "a.jsonl", rows)), "prompts", tmp_path)
    asked = [[{"role": "user", "content": row["prompt"]}] for row in rows]
    kept = [Prompt(asked[0], "{}", facts=facts), Prompt(asked[1])]
    assert list(version.records()) == kept
    again = prepare(Data(source=str(version.folder)), "prompts", tmp_path / "again")
    assert list(again.records()) == kept


# --- cleaning


def test_each_step_is_counted_and_every_removed_row_is_named(tmp_path: Path) -> None:
    rows = [qa(0), qa(1), qa(0), {"question": "Mail?", "answer": "To ann@example.com, please."}]
    rows += [{"question": "Sing!", "answer": "I'm sorry, but I can't help with that."}]
    rows += [{"question": "q", "answer": ""}, qa(2) | {"answer": "x" * 999}]
    clean = Clean(drop=["exact_duplicate", "refusal", "pii"], max_chars=500)
    data = Data(source=write(tmp_path / "a.jsonl", rows), clean=clean, max_bad_fraction=0.2)
    version = prepare(data, "sft", tmp_path)
    assert answers(version) == [rows[0]["answer"], rows[1]["answer"]]
    assert version.manifest["steps"] == [
        {"step": "drop exact_duplicate", "removed": 1, "left": 5},
        {"step": "drop refusal", "removed": 1, "left": 4},
        {"step": "drop pii", "removed": 1, "left": 3},
        {"step": "max_chars 500", "removed": 1, "left": 2},
    ]
    removed = [json.loads(line) for line in (version.folder / REMOVED).read_text().splitlines()]
    assert [(r["row"], r["step"]) for r in removed] == [
        (2, "drop exact_duplicate"),
        (4, "drop refusal"),
        (3, "drop pii"),
        (6, "max_chars 500"),
    ]
    assert (version.manifest["rows"], version.manifest["unusable"], len(version)) == (7, 1, 2)


def test_nothing_is_removed_or_changed_unless_asked(tmp_path: Path) -> None:
    rows = [qa(0), qa(0), {"question": "Mail?", "answer": "ann@example.com cafÃ©"}]
    version = prepare(Data(source=write(tmp_path / "a.jsonl", rows)), "sft", tmp_path)
    assert answers(version) == [row["answer"] for row in rows]
    assert version.manifest["steps"] == []


def test_mending_changes_what_is_wrong_and_no_more(tmp_path: Path) -> None:
    rows = [qa(0), {"question": "Where is the cafÃ©?", "answer": "Ask bo@example.com"}]
    clean = Clean(repair=True, mask=True)
    data = Data(source=write(tmp_path / "a.jsonl", rows), clean=clean)
    version = prepare(data, "sft", tmp_path)
    [first, second] = version.records()
    assert isinstance(first, Conversation)
    assert isinstance(second, Conversation)
    assert first.messages[0]["content"] == rows[0]["question"]
    assert [turn["content"] for turn in second.messages] == ["Where is the café?", "Ask [EMAIL]"]
    assert version.manifest["steps"] == [
        {"step": "repair", "changed": 1, "left": 2},
        {"step": "mask", "changed": 1, "left": 2},
    ]


def test_mending_reaches_tool_calls_and_counts_what_it_changed(tmp_path: Path) -> None:
    def row(address: str) -> dict[str, Any]:
        call = {"function": {"name": "send", "arguments": {"to": address}}}
        asked = {"role": "user", "content": "Send it!"}
        return {
            "messages": [asked, {"role": "assistant", "content": "", "tool_calls": [call]}],
            "id": address,
        }

    rows = [row(f"{name}@example.com") for name in ("ann", "bo", "cy")]
    data = Data(source=write(tmp_path / "a.jsonl", rows), clean=Clean(mask=True), limit=2)
    version = prepare(data, "sft", tmp_path)
    assert "@" not in (version.folder / RECORDS).read_bytes().decode(errors="ignore")
    assert version.manifest["steps"] == [{"step": "mask", "changed": 2, "left": 2}]


def test_answers_that_mending_made_equal_are_left_out(tmp_path: Path) -> None:
    rows = [
        {
            "prompt": "Whom?",
            "chosen": f"Call 415-555-01{n} now",
            "rejected": "Call 415-555-0102 now",
        }
        for n in ("01", "03")
    ]
    rows += [{"prompt": "Why?", "chosen": "So.", "rejected": "Just so."}]
    data = Data(
        source=write(tmp_path / "a.jsonl", rows), clean=Clean(mask=True), max_bad_fraction=0.7
    )
    version = prepare(data, "preference", tmp_path)
    assert len(list(version.records())) == 1
    assert version.manifest["unusable"] == 2


def test_mending_moves_no_row_to_another_part(tmp_path: Path) -> None:
    rows = [qa(n) | {"question": f"Mail {n}@example.com?"} for n in range(60)]
    source = write(tmp_path / "a.jsonl", rows)
    parts = []
    for part, clean in ((Part.train, Clean(mask=True)), (Part.validation, Clean())):
        data = Data(source=source, part=part, fractions=[0.5, 0.5, 0.0], clean=clean)
        parts.append(set(answers(prepare(data, "sft", tmp_path))))
    assert not parts[0] & parts[1]
    assert len(parts[0] | parts[1]) == 60


def test_rows_that_differ_in_label_tools_or_reference_are_no_copies(tmp_path: Path) -> None:
    rated = [{"prompt": "p", "completion": "c", "label": label} for label in (True, False)]
    data = Data(source=write(tmp_path / "a.jsonl", rated), clean=Clean(drop=["exact_duplicate"]))
    assert len(prepare(data, "rated", tmp_path)) == 2
    prompts = [{"prompt": "p", "reference": reference} for reference in ("1", "2")]
    data.source = write(tmp_path / "b.jsonl", prompts)
    assert len(prepare(data, "prompts", tmp_path)) == 2


def test_of_contradicting_rows_neither_is_kept(tmp_path: Path) -> None:
    rows = [
        {"prompt": "Which one of these?", "chosen": "The first.", "rejected": "The second."},
        {"prompt": "Which one of these?", "chosen": "The second.", "rejected": "The first."},
        {"prompt": "And which now?", "chosen": "This one here.", "rejected": "None of them."},
    ]
    data = Data(source=write(tmp_path / "a.jsonl", rows), clean=Clean(drop=["label_conflict"]))
    [record] = prepare(data, "preference", tmp_path).records()
    assert isinstance(record, Preference)
    assert record.prompt[0]["content"] == "And which now?"


def test_scores_filter_and_order(tmp_path: Path) -> None:
    rows = [qa(n, quality=score) for n, score in enumerate([3, 9, None, "7", "bad", 5])]
    clean = Clean(score="quality", min_score=4)
    data = Data(source=write(tmp_path / "a.jsonl", rows), clean=clean, order=Order.high_score_first)
    version = prepare(data, "sft", tmp_path)
    assert answers(version) == [rows[i]["answer"] for i in (1, 3, 5)]
    assert version.is_ordered
    data.order = Order.low_score_first
    assert answers(prepare(data, "sft", tmp_path)) == [rows[i]["answer"] for i in (5, 3, 1)]


def test_balance_takes_equally_many_of_each_value(tmp_path: Path) -> None:
    rows = [qa(n, topic="a" if n < 7 else "b") for n in range(10)]
    data = Data(source=write(tmp_path / "a.jsonl", rows), clean=Clean(balance="topic"))
    kept = set(answers(prepare(data, "sft", tmp_path)))
    assert Counter(row["topic"] for row in rows if row["answer"] in kept) == {"a": 3, "b": 3}


def test_what_is_mixed_in_is_not_balanced_and_needs_no_score(tmp_path: Path) -> None:
    rows = [qa(n, topic="a" if n < 7 else "b", quality=n) for n in range(10)]
    general = [qa(n, topic="c" if n == 50 else "a") for n in range(50, 70)]
    for row in general:
        row["answer"] += " g"
    mix = {"general": Portion(source=write(tmp_path / "g.jsonl", general), weight=0.5)}
    data = Data(write(tmp_path / "a.jsonl", rows), clean=Clean(balance="topic"), mix=mix)
    said = answers(prepare(data, "sft", tmp_path))
    assert len([one for one in said if not one.endswith(" g")]) == 6
    assert len(said) == 9
    data.clean = Clean(score="quality", min_score=4)
    said = answers(prepare(data, "sft", tmp_path))
    assert len([one for one in said if one.endswith(" g")]) == 3


# --- split, mix, order


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    prompts=st.lists(st.text(min_size=1, max_size=4).filter(str.strip), min_size=4, max_size=30),
    seed=st.integers(0, 99),
)
def test_parts_never_share_a_prompt_and_miss_no_row(prompts: list[str], seed: int) -> None:
    rows = [{"question": prompt, "answer": str(i)} for i, prompt in enumerate(prompts)]
    parts: list[list[str]] = []
    with tempfile.TemporaryDirectory() as folder:
        source = write(Path(folder) / "a.jsonl", rows)
        for part in (Part.train, Part.validation, Part.test):
            data = Data(source=source, part=part, fractions=[0.4, 0.3, 0.3], seed=seed)
            try:
                parts.append(answers(prepare(data, "sft", Path(folder))))
            except UserError:  # a small part may have no row; none is missed, as is seen below
                parts.append([])
    assert sorted(itertools.chain(*parts), key=int) == [row["answer"] for row in rows]
    asked = [
        {re.sub(r"[ \t\n\r\v\f]", "", prompts[int(i)].lower()) for i in part} for part in parts
    ]
    assert all(not one & other for one, other in itertools.combinations(asked, 2))


def test_parts_have_their_sizes_and_stay_when_rows_are_added() -> None:
    openings = np.random.default_rng(0).integers(1 << 63, size=20_000, dtype=np.uint64)
    parts = part_of(openings, [0.8, 0.15, 0.05], seed=1)
    shares = np.bincount(parts) / len(parts)
    assert shares == pytest.approx([0.8, 0.15, 0.05], abs=0.01)
    assert (part_of(openings[:100], [0.8, 0.15, 0.05], 1) == parts[:100]).all()
    assert (part_of(openings, [0.8, 0.15, 0.05], 2) != parts).mean() > 0.2


def test_a_mixed_set_has_its_weight_and_is_spread_evenly(tmp_path: Path) -> None:
    own = [qa(n) for n in range(40)]
    general = [
        {"prompt": f"General {qa(n)['question']}", "completion": "g"} for n in range(99, 139)
    ]
    data = Data(
        source=write(tmp_path / "own.jsonl", own),
        mix={"general": Portion(source=write(tmp_path / "general.jsonl", general), weight=0.25)},
    )
    version = prepare(data, "sft", tmp_path)
    said = answers(version)
    assert said.count("g") == 10
    for block in range(5):  # a tenth of all in each tenth of the rows
        assert said[10 * block : 10 * block + 10].count("g") == 2
    assert [s["format"] for s in version.manifest["sources"]] == ["qa", "completion"]
    data.seed = 1
    assert prepare(data, "sft", tmp_path).fingerprint != version.fingerprint


def test_orders(tmp_path: Path) -> None:
    rows = [qa(n) | {"answer": "x" * size} for n, size in enumerate([30, 10, 20])]
    data = Data(source=write(tmp_path / "a.jsonl", rows))
    sizes = {}
    for order in (Order.source, Order.short_first, Order.long_first):
        data.order = order
        sizes[order] = [len(answer) for answer in answers(prepare(data, "sft", tmp_path))]
    assert sizes == {
        Order.source: [30, 10, 20],
        Order.short_first: [10, 20, 30],
        Order.long_first: [30, 20, 10],
    }


def test_shuffling_is_by_the_datas_seed(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [qa(n) for n in range(30)])
    made = [
        answers(
            prepare(Data(source=source, order=Order.shuffled, seed=s), "sft", tmp_path / str(i))
        )
        for i, s in enumerate([0, 0, 1])
    ]
    assert made[0] == made[1] != made[2]
    assert sorted(made[0]) == sorted(made[2])


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"clean": Clean(drop=["exact_dublicate"])}, "Did you mean 'exact_duplicate'?"),
        ({"clean": Clean(drop=["broken_line"])}, "no kind of finding that can be dropped"),
        ({"fractions": [0.5, 0.5]}, "three shares (train, validation, test) whose sum is 1"),
        ({"clean": Clean(min_score=1.0)}, "clean.score must name the column"),
        ({"order": Order.low_score_first}, "clean.score must name the column"),
        ({"mix": {"x": Portion(source="a", weight=0.0)}}, "mix.x.weight=0.0 must be above 0"),
        ({"seed": -1}, "sft.data.seed=-1 must be at least 0"),
        ({"clean": Clean(balance="topicc")}, "clean.balance='topicc': no row has that column"),
        ({"clean": Clean(score="nope")}, "clean.score='nope': no row has a number in that column"),
        ({"mix": {"x": Portion(source="demo:preferences")}}, "this stage needs demonstrations"),
        ({"clean": Clean(min_chars=10**6)}, "no row of demo:demonstrations is left after cleaning"),
    ],
)
def test_a_wrong_knob_is_named(tmp_path: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError) as caught:
        prepare(Data(**{"source": "demo:demonstrations"} | change), "sft", tmp_path, "sft.data")
    assert text in str(caught.value)
    assert not list((tmp_path / "data").glob("*/")) if (tmp_path / "data").is_dir() else True


# --- names


def test_the_same_fingerprint_means_the_same_bytes(tmp_path: Path) -> None:
    rows = [qa(n) for n in range(2500)]
    lines = write(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.json").write_text(json.dumps([qa(9999), *rows]))
    first = prepare(Data(source=lines), "sft", tmp_path)
    second = prepare(
        Data(source=str(tmp_path / "b.json"), clean=Clean(max_chars=10**6)), "sft", tmp_path
    )
    third = prepare(Data(source=str(first.folder)), "sft", tmp_path / "elsewhere")
    assert first.fingerprint == third.fingerprint != second.fingerprint
    assert (first.folder / RECORDS).read_bytes() == (third.folder / RECORDS).read_bytes()
    assert (first.folder / RECORDS).read_bytes() != (second.folder / RECORDS).read_bytes()


def test_a_curriculum_stays_one_when_its_version_is_named(tmp_path: Path) -> None:
    data = Data(source=write(tmp_path / "a.jsonl", [qa(n) for n in range(3)]))
    data.order = Order.short_first
    first = prepare(data, "sft", tmp_path)
    again = prepare(Data(source=str(first.folder)), "sft", tmp_path)
    assert first.is_ordered
    assert again.is_ordered


def test_an_empty_mixed_set_is_refused(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [qa(n) for n in range(500)])
    for rows, text in (([], "has no rows"), ([{"foo": 1}] * 4, "4 of 4 rows in")):
        portion = Portion(source=write(tmp_path / "b.jsonl", rows))
        with pytest.raises(UserError, match=text):
            prepare(Data(source=source, mix={"b": portion}), "sft", tmp_path)


def test_a_version_is_built_once_and_again_when_the_file_changes(tmp_path: Path) -> None:
    data = Data(source=write(tmp_path / "a.jsonl", [qa(0)]))
    first = prepare(data, "sft", tmp_path)
    made = first.folder.stat().st_mtime_ns
    assert prepare(data, "sft", tmp_path).folder.stat().st_mtime_ns == made
    write(tmp_path / "a.jsonl", [qa(1)])
    second = prepare(data, "sft", tmp_path)
    assert second.folder != first.folder
    assert answers(Version.load(first.folder)) == [qa(0)["answer"]]  # the older one is still there


def test_another_release_of_a_library_makes_another_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Data(source=write(tmp_path / "a.jsonl", [qa(0)]))
    first = prepare(data, "sft", tmp_path)
    monkeypatch.setattr("reward.data.installed", lambda *names: dict.fromkeys(names, "0.1"))
    second = prepare(data, "sft", tmp_path)
    assert second.folder != first.folder
    assert second.fingerprint == first.fingerprint


def test_only_code_that_makes_a_version_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    monkeypatch.setattr("reward.data.source_key", lambda *paths: hashed.extend(paths))
    prepare(Data(source=write(tmp_path / "a.jsonl", [qa(0)])), "sft", tmp_path)
    assert {"ingest.py", "verifiers"} <= {path.name for path in hashed}
    assert "pages" not in {path.name for path in hashed}


def test_many_rows_are_read_in_parallel_to_the_same_version(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [qa(n) if n % 50 else {"question": n} for n in range(6000)]
    data = Data(source=write(tmp_path / "a.jsonl", rows), max_bad_fraction=0.1)
    parallel = prepare(data, "sft", tmp_path / "parallel")
    monkeypatch.setattr(ingest, "_INLINE", 10**9)
    alone = prepare(data, "sft", tmp_path / "alone")
    for name in ("records.arrow", "facts.npy", "audit.json", "manifest.json"):
        assert (parallel.folder / name).read_bytes() == (alone.folder / name).read_bytes()
    assert parallel.manifest["unusable"] == 120


def test_the_limit_is_exact_in_parallel_too(tmp_path: Path) -> None:
    data = Data(source=write(tmp_path / "a.jsonl", [qa(n) for n in range(9000)]), limit=5500)
    version = prepare(data, "sft", tmp_path)
    assert (len(version), version.manifest["rows"]) == (5500, 5500)
    assert answers(version)[-1] == qa(5499)["answer"]


def test_diff_tells_what_changed(tmp_path: Path) -> None:
    rows = [qa(n) for n in range(6)]
    before = prepare(Data(source=write(tmp_path / "a.jsonl", rows)), "sft", tmp_path)
    changed = [rows[1], rows[0], rows[2] | {"answer": "another"}, *rows[3:5], qa(7)]
    after = prepare(Data(source=write(tmp_path / "b.jsonl", changed)), "sft", tmp_path)
    found = diff(before, after)
    assert (found["same"], found["removed"], found["added"]) == (4, [5], [5])
    assert found["changed"] == [[2], [2]]
    assert found["is_reordered"]
    assert set(found["settings"]) == {"sources"}
    itself = diff(before, before)
    assert (itself["same"], itself["removed"], itself["added"]) == (6, [], [])
    assert not itself["is_reordered"]
    assert not itself["settings"]
