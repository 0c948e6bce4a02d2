"""The command that scores files: rows, members, bad rows, and a run that is killed and goes on."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.entry import UserError
from reward import score as command
from reward.completions import task_of
from reward.ensemble import Ensemble, open_models
from reward.turns import BadRow

ROOT = Path(__file__).parents[2]
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}
HI = [{"role": "user", "content": "Hi"}]


def says(content: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": content}]


@pytest.fixture(scope="module")
def folder(seeded_reward_model: Callable[[int], Path]) -> Path:
    return seeded_reward_model(1)


@pytest.fixture(scope="module")
def one(folder: Path) -> Ensemble:
    return open_models([str(folder)])


@pytest.fixture(scope="module")
def two(folder: Path, seeded_reward_model: Callable[[int], Path]) -> Ensemble:
    return open_models([str(folder), str(seeded_reward_model(2))], "min")


def scored(model: Ensemble, row: dict[str, Any]) -> dict[str, Any]:
    (found,) = command.score_tasks(model, [task_of(row)])
    new = found.task.scored(found.scores, None if len(model.names) == 1 else found.members)
    assert all(new[key] == value for key, value in row.items() if key != "completions")
    return new


def test_every_form_of_row_is_scored(one: Ensemble) -> None:
    good, bad = one.score([HI] * 2, [says("Hello!"), says("No.")])
    nested = [{"text": "Hello!", "tokens": 6, "finish": "eos"}, {"text": "No."}]
    row = scored(one, {"prompt": HI, "completions": nested})
    assert [item["score"] for item in row["completions"]] == pytest.approx([good, bad], abs=1e-5)
    assert row["completions"][0]["finish"] == "eos"
    row = scored(one, {"instruction": "Hi", "completions": [{"text": None, "response": "No."}]})
    assert row["completions"][0]["score"] == pytest.approx(bad, abs=1e-5)
    for given in (
        {"prompt": "Hi", "completion": "No."},
        {"prompt": "Hi", "completion": "No.", "label": False},
        {"messages": HI + says("No.")},
    ):
        assert scored(one, given)["score"] == pytest.approx(bad, abs=1e-5)
        assert "members" not in scored(one, given)
    pair = scored(one, {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."})
    assert pair["score_chosen"] == pytest.approx(good, abs=1e-5)
    assert pair["score_rejected"] == pytest.approx(bad, abs=1e-5)
    assert pair["margin"] == pytest.approx(good - bad, abs=1e-5)


def test_rows_of_an_ensemble_say_what_its_members_say(two: Ensemble) -> None:
    members = two.members([HI] * 2, [says("Hello!"), says("No.")])
    row = scored(two, {"prompt": "Hi", "completions": [{"text": "Hello!"}, {"text": "No."}]})
    for item, each in zip(row["completions"], members, strict=True):
        assert item["members"] == pytest.approx(each.tolist(), abs=1e-5)
        assert item["score"] == min(item["members"])
        assert item["disagreement"] == pytest.approx(np.std(each), abs=1e-5)
    pair = scored(two, {"prompt": "Hi", "chosen": "Hello!", "rejected": "No."})
    assert pair["members_chosen"] == pytest.approx(members[0].tolist(), abs=1e-5)
    assert pair["members_rejected"] == pytest.approx(members[1].tolist(), abs=1e-5)
    assert pair["margin"] == pair["score_chosen"] - pair["score_rejected"]
    assert pair["disagreement"] == pytest.approx(np.std(members[0] - members[1]), abs=1e-5)


def test_tools_are_part_of_what_is_scored(folder: Path) -> None:
    model = open_models([str(folder)])
    member: Any = model._members[0]
    member._tokenizer.chat_template = "{{ tools }}" + member._tokenizer.chat_template
    row = scored(model, {"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": [TOOL]})
    expected = model.score([HI], [says("a")], [[TOOL]])
    assert [row["score_chosen"]] == pytest.approx(expected, abs=1e-5)
    assert member.tokenize(HI, says("a"), [TOOL]) != member.tokenize(HI, says("a"))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a"}, "no completion to score"),
        ({"prompt": "a", "completions": []}, "'completions' is empty"),
        ({"prompt": "a", "completions": ["b"]}, "completion 1 is text, expected an object"),
        ({"prompt": "a", "completions": [{"text": None}]}, "completion 1 is an object"),
        ({"prompt": [], "completions": [{"text": "b"}]}, "'prompt' is empty"),
        ({"prompt": "a", "completion": "b", "id": "\ud800"}, "cannot be written as JSON"),
    ],
)
def test_a_row_that_cannot_be_scored_is_told(row: Any, reason: str) -> None:
    with pytest.raises(BadRow, match=reason):
        task_of(row)


def call(*argv: object) -> list[str]:
    return command.run(command.parser().parse_args(list(map(str, argv))))


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def manifest_of(out: Path) -> Any:
    return json.loads(out.with_name(f"{out.name}.manifest.json").read_text())


def test_bad_rows_are_left_out_and_counted(folder: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "Hi", "completion": "a", "n": n} for n in range(4)]
    source = write(tmp_path / "in.jsonl", [*rows[:2], {"prompt": "Hi"}, *rows[2:]])
    out = tmp_path / "out.jsonl"
    with pytest.raises(UserError, match=r"1 of 5 rows .*in\.jsonl:3.*--max-bad-fraction 0\.2"):
        call(folder, source, out)
    assert not out.exists()
    lines = call(folder, source, out, "--max-bad-fraction", 0.2)
    assert lines[:2] == [
        "4 rows, 4 completions scored, 0 longer than 1024 tokens (null)",
        lines[1],
    ]
    assert lines[1].startswith("bad rows left out: 1 (in.jsonl:3")
    assert [json.loads(line)["n"] for line in out.read_text().splitlines()] == [0, 1, 2, 3]
    assert manifest_of(out)["bad"] == 1


def test_the_manifest_says_how_far_members_are_apart(
    folder: Path, seeded_reward_model: Callable[[int], Path], two: Ensemble, tmp_path: Path
) -> None:
    texts = ["a", "bb", "Hello!", "No.", "x" * 30]
    source = write(
        tmp_path / "in.jsonl", [{"prompt": "Hi", "completions": [{"text": t} for t in texts]}]
    )
    out, paths = tmp_path / "out.jsonl", (folder, seeded_reward_model(2))
    lines = call(*paths, source, out, "--combine", "min")
    members = two.members([HI] * 5, [says(text) for text in texts])
    pairs = [(a, b) for a in range(5) for b in range(a)]
    at_odds = [(members[a, 0] > members[b, 0]) != (members[a, 1] > members[b, 1]) for a, b in pairs]
    found = manifest_of(out)
    assert (found["pairs"], found["at_odds"]) == (10, sum(at_odds) / 10)
    assert 0 < sum(at_odds) < 10
    assert found["disagreement"] == pytest.approx(members.std(axis=1).mean(), abs=1e-5)
    for place, member in enumerate(found["members"]):
        assert member["mean"] == pytest.approx(members[:, place].mean(), abs=1e-5)
        assert member["std"] == pytest.approx(members[:, place].std(), abs=1e-5)
    assert f"disagree about the order of {sum(at_odds)}0.0% of 10 pairs" in lines[1]
    # The same data as a reference: each member in its own units.
    scaled = tmp_path / "scaled.jsonl"
    call(*paths, source, scaled, "--scales", f"{out}.manifest.json")
    (row,) = map(json.loads, scaled.read_text().splitlines())
    units = np.array([item["members"] for item in row["completions"]])
    assert units.mean(axis=0).tolist() == pytest.approx([0, 0], abs=1e-5)
    assert units.std(axis=0).tolist() == pytest.approx([1, 1], abs=1e-5)
    assert "mean" not in manifest_of(scaled)["members"][0]


def test_the_same_command_finds_its_work_done(folder: Path, tmp_path: Path) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "Hi", "completion": "a"}])
    out = tmp_path / "out.jsonl"
    call(folder, source, out)
    before = out.stat().st_mtime_ns
    assert call(folder, source, out) == [f"{out} is complete: the same command wrote it"]
    assert out.stat().st_mtime_ns == before
    assert not list(tmp_path.glob(".*.journal"))
    out.write_text("edited")
    call(folder, source, out)
    assert "score" in json.loads(out.read_text())
    write(source, [{"prompt": "Hi", "completion": "b"}])
    call(folder, source, out)
    assert json.loads(out.read_text())["completion"] == "b"


@pytest.mark.parametrize("name", ["source_key", "device"])
def test_scores_of_other_code_or_another_device_are_made_anew(
    name: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "in.jsonl", [{"prompt": "Hi", "completion": "a"}])
    out = tmp_path / "out.jsonl"
    call(folder, source, out)
    monkeypatch.setattr(command, name, lambda *_: "other")
    assert "1 completions scored" in call(folder, source, out)[0]


def killed_after(journal: Path, lines: int, command: list[str]) -> None:
    """Start a command, and end it without warning when its journal has that many lines."""
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_bytes().count(b"\n") >= lines):
        assert process.poll() is None, "it was done before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()


def test_a_killed_run_goes_on_and_gives_the_same_bytes(
    folder: Path, seeded_reward_model: Callable[[int], Path], tmp_path: Path
) -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"prompt": "Hi", "chosen": "a" * int(n), "rejected": "b" * int(n // 2 + 1)}
        for n in rng.integers(1, 120, 600)
    ]
    source, whole, out = (tmp_path / name for name in ("in.jsonl", "whole.jsonl", "out.jsonl"))
    write(source, rows)
    models = [str(folder), str(seeded_reward_model(2))]
    call(*models, source, whole)
    journal = tmp_path / ".out.jsonl.journal"
    argv = [sys.executable, "-m", "reward.score", *models, str(source), str(out)]
    killed_after(journal, 2, argv)
    assert not out.exists()
    kept = journal.read_bytes()
    assert 2 <= kept.count(b"\n") <= 5  # of 6
    with pytest.raises(UserError, match=r"(?s)begun with other settings.*combine: mean → min"):
        call(*models, source, out, "--combine", "min")
    journal.write_bytes(kept + b"[[1.0, 2")  # as when the machine goes down in a write
    call(*models, source, out)
    assert out.read_bytes() == whole.read_bytes()
    left = {path.name for path in tmp_path.iterdir() if "out.jsonl" in path.name}
    assert left == {"out.jsonl", "out.jsonl.manifest.json", ".out.jsonl.lock"}


def test_what_was_scored_is_not_scored_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last chunk and the output: nothing is left to score."""
    rows = [{"prompt": "Hi", "completion": "a" * (n + 1)} for n in range(5)]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "out.jsonl"
    monkeypatch.setattr(command, "_CHUNK", 2)
    monkeypatch.setattr(command, "write_json", lambda *_: (_ for _ in ()).throw(OSError("gone")))
    with pytest.raises(OSError, match="gone"):
        call(folder, source, out)
    monkeypatch.undo()
    monkeypatch.setattr(command, "_CHUNK", 2)
    first = out.read_bytes()
    out.unlink()
    monkeypatch.setattr(Ensemble, "members", lambda *_: pytest.fail("it is scored again"))
    call(folder, source, out)
    assert out.read_bytes() == first


def test_command_line(folder: Path, tmp_path: Path) -> None:
    def run(*argv: object) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "reward.score", *map(str, argv)]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    rows = [{"prompt": "Hi", "completions": [{"text": "a"}, {"text": "b" * 200}]}]
    source, out = write(tmp_path / "in.jsonl", rows), tmp_path / "new" / "out.jsonl"
    done = run(folder, source, out, "--max-length", "100")
    assert done.returncode == 0, done.stderr
    assert "1 rows, 1 completions scored, 1 longer than 100 tokens (null)" in done.stdout
    scores = [item["score"] for item in json.loads(out.read_text())["completions"]]
    assert isinstance(scores[0], float)
    assert scores[1] is None
    found = manifest_of(out)
    assert found["members"][0]["model"] == str(folder)
    assert found["too_long"] == 1
    done = run("./absent", source, out)
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "there is no reward model './absent'" in done.stderr


def test_what_is_wrong_is_said_before_anything_is_loaded(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("reward.model.open_classifier", lambda *_: pytest.fail("it is loaded"))
    source, out = write(tmp_path / "in.jsonl", [{"prompt": "Hi"}]), tmp_path / "out.jsonl"
    for argv, reason in (
        ((folder, source, out), "1 of 1 rows .* no completion to score"),
        ((folder, source, out, "--max-bad-fraction", 1), "1 of 1 rows .* no completion to score"),
        ((folder, tmp_path / "no.jsonl", out), "there is no file"),
        ((folder, source, source), "is part of the input"),
        ((folder, source, tmp_path / "out.csv"), r"must end in \.jsonl"),
        ((folder, source, out, "--combine", "max"), "There are: mean, min, mean_minus_std"),
        ((folder, folder, source, out, "--revision", "v1"), "revision is of one model"),
        ((folder, folder, source, out, "--k", "2"), "k=2 is of mean_minus_std"),
        (("http://127.0.0.1:1", source, out, "--dtype", "bfloat16"), "set where it is served"),
    ):
        with pytest.raises(UserError, match=reason):
            call(*argv)
