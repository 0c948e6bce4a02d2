"""The audit against data whose faults are known, and against data that have none."""

import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conf.entry import UserError
from conf.schema import Data
from reward.audit import audit, table
from reward.findings import KINDS
from reward.leaks import build_index
from reward.records import KINDS as RECORD_KINDS

ROOT = Path(__file__).parents[2]

# The truth files' names of what the audit calls otherwise.
CALLED = {
    "leak_verbatim": "contamination",
    "leak_normalised": "contamination",
    "leak_embedded": "contamination",
    "empty_output": "empty_turn",
    "whitespace_output": "empty_turn",
    "null_output": "empty_turn",
    "empty_chosen": "empty_turn",
    "empty_rejected": "empty_turn",
    "same_pair_whitespace": "same_pair",
    **dict.fromkeys(
        [
            "cut_off",
            "trailing_comma",
            "single_quotes",
            "not_an_object",
            "invalid_utf8",
            "nan_value",
            "two_objects_on_one_line",
        ],
        "broken_line",
    ),
}


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "reward.audit", *arguments], cwd=ROOT, capture_output=True, text=True
    )


def truth(path: Path) -> dict[str, dict[int, int | None]]:
    """Kind of finding → faulty row → the row that it resembles, where there is one."""
    known: dict[str, dict[int, int | None]] = defaultdict(dict)
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            item = json.loads(line)
            row = item["row"] if "row" in item else item["line"]
            known[CALLED.get(item["issue"], item["issue"])][row] = item.get("ref")
    return known


@pytest.mark.parametrize(
    ("file", "kind", "against"),
    [
        ("sft_dirty.jsonl.gz", "sft", ["gsm8k.test", "arc_easy.test", "arc_challenge.test"]),
        ("preference_dirty.jsonl.gz", "preference", []),
        ("broken_lines.jsonl", "sft", []),
    ],
)
def test_every_planted_fault_is_found_and_no_clean_row(
    shared_data: Path, tmp_path: Path, file: str, kind: str, against: list[str]
) -> None:
    out = tmp_path / "audit.json"
    benchmarks = [str(shared_data / "eval" / f"{name}.jsonl.gz") for name in against]
    options = ["--against", *benchmarks] if against else []
    folder = shared_data / "raw_dirty"
    done = run(str(folder / file), "--kind", kind, "--json", str(out), *options)
    assert (done.returncode, done.stderr) == (0, "")
    made = json.loads(out.read_text())
    known = truth(folder / f"{file.split('.')[0]}.truth.jsonl")
    found: dict[str, set[int]] = defaultdict(set)
    for finding in made["findings"]:
        if finding["severity"] != "note":
            found[finding["kind"]].add(finding["row"])
    assert set(found) == set(known)
    for name, faulty in known.items():
        originals = {row for row in faulty.values() if row is not None}
        # Either row of a pair may be the one that is told.
        hits = sum(row in found[name] or ref in found[name] for row, ref in faulty.items())
        false = found[name] - set(faulty) - originals
        assert hits / len(faulty) >= 0.95, name
        assert len(false) / len(found[name]) <= 0.05, name
    assert len({(f["row"], f["kind"]) for f in made["findings"]}) == len(made["findings"])


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("preference/hh_harmless.train", "preference"),
        ("preference/hh_harmless.test", "preference"),
        ("preference/alpaca_judged.train", "preference"),
        ("preference/alpaca_judged.test", "preference"),
        ("sft/gsm8k.train", "sft"),
        ("sft/alpaca", "sft"),
        ("sft/self_instruct_seed", "sft"),
        ("sft/chat_messages", "sft"),
        ("sft/completion", "sft"),
    ],
)
def test_clean_sets_have_no_error(shared_data: Path, tmp_path: Path, file: str, kind: str) -> None:
    benchmarks = [
        str(shared_data / "eval" / f"{name}.jsonl.gz") for name in ("gsm8k.test", "arc_easy.test")
    ]
    index = build_index(benchmarks, tmp_path)
    made = audit(Data(source=str(shared_data / f"{file}.jsonl.gz")), kind, index=index)
    found = defaultdict(list)
    for finding in made["findings"]:
        found[finding["kind"]].append(finding)
    assert not [f for f in made["findings"] if f["severity"] == "error"]
    assert not found["mojibake"]
    assert len(found["pii"]) <= 0.02 * made["rows"]
    assert len(found["contamination"]) <= 0.001 * made["rows"]


def test_tokens_are_counted_with_a_model(tiny_model: Path, tmp_path: Path) -> None:
    rows = [{"question": "a" * 50, "answer": "b"}, {"question": "a", "answer": "b" * 50}]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    made = audit(Data(source=str(path)), "sft", str(tiny_model), max_length=40)
    by_kind = {finding["kind"]: finding["row"] for finding in made["findings"]}
    assert by_kind["no_loss_tokens"] == 0
    assert {f["row"] for f in made["findings"] if f["kind"] == "truncated"} == {0, 1}
    assert made["summary"]["tokens"]["no_loss"] == 1
    assert "truncated 2, without loss 1" in table(made)


def test_length_gap_by_hand(tmp_path: Path) -> None:
    pairs = [("aaaa", "b"), ("aa", "bbbb"), ("aaaaaa", "bb")]
    rows = [
        {"prompt": f"Question {i}?", "chosen": good, "rejected": bad, "margin": float(i)}
        for i, (good, bad) in enumerate(pairs)
    ]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    gap = audit(Data(source=str(path)), "preference")["summary"]["length_gap"]
    assert gap["mean"] == pytest.approx((3 - 2 + 4) / 3)
    assert gap["chosen_is_longer"] == pytest.approx(2 / 3)
    # Point-biserial correlation of six answers, centred by pair, the long way.
    import numpy as np

    logs = np.log1p(np.array([[len(good), len(bad)] for good, bad in pairs]))
    centred = (logs - logs.mean(axis=1, keepdims=True)).ravel()
    labels = np.tile([1.0, 0.0], len(pairs))
    assert gap["correlation"] == pytest.approx(np.corrcoef(labels, centred)[0, 1])
    assert gap["correlation_with_margin"] == pytest.approx(np.corrcoef([3, -2, 4], [0, 1, 2])[0, 1])


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    content=st.binary(max_size=300)
    | st.lists(
        st.fixed_dictionaries({"question": st.text(max_size=30), "answer": st.text(max_size=30)})
        | st.dictionaries(st.sampled_from(["prompt", "chosen", "rejected"]), st.text(max_size=9)),
        max_size=9,
    ).map(lambda rows: "\n".join(map(json.dumps, rows)).encode()),
    kind=st.sampled_from(list(RECORD_KINDS)),
)
def test_no_bytes_make_the_audit_fail_otherwise_than_with_a_message(
    content: bytes, kind: str
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.jsonl"
        path.write_bytes(content)
        try:
            made = audit(Data(source=str(path)), kind)
        except UserError:
            return
    lines = content.count(b"\n") + (not content.endswith(b"\n") and content != b"")
    assert made["rows"] == lines
    assert all(0 <= finding["row"] < lines for finding in made["findings"])
    assert {finding["kind"] for finding in made["findings"]} <= set(KINDS)
    json.dumps(made)
    table(made)


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (
            ["nowhere.jsonl", "--kind", "sft"],
            "error: data.source='nowhere.jsonl': there is no file",
        ),
        (["demo:demonstrations", "--kind", "preference"], "this stage needs pairs of a chosen"),
        (["demo:demonstrations", "--kind", "sft", "--max-length", "9"], "it needs --model"),
        (
            ["demo:demonstrations", "--kind", "sft", "--max-length", "0"],
            "--max-length: '0' must be a whole number, 1 or more",
        ),
        (["demo:demonstrations", "--kind", "sft", "--model", "./x"], "cannot open the tokenizer"),
        (["demo:demonstrations", "--kind", "sft", "--against", "gsm9k"], "Did you mean 'gsm8k'?"),
    ],
)
def test_a_mistake_gets_one_message(arguments: list[str], text: str) -> None:
    done = run(*arguments)
    assert done.returncode == 2
    assert text in done.stderr
    assert "Traceback" not in done.stderr


def test_the_exit_code_serves_a_pipeline(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "Mail?", "answer": "ann@example.com"}\n' * 1)
    assert run(str(path), "--kind", "sft").returncode == 0
    assert run(str(path), "--kind", "sft", "--fail-on", "error").returncode == 0
    assert run(str(path), "--kind", "sft", "--fail-on", "warning").returncode == 1
