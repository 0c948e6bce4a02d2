"""The pairwise judge against a real HTTP server with known habits, and with a tiny reward model."""

import json
import math
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from evals import judge as command
from evals.judge import order_facts
from evals.judgements import load
from evals.matches import align, read_answers
from evals.verdicts import verdict_in
from reward.intervals import wilson

Answer = tuple[int, bytes]
ROOT = Path(__file__).parents[2]
PAIRS = 40


def said(content: str) -> Answer:
    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}
    return 200, json.dumps(body).encode()


def verdict(letter: str) -> Answer:
    return said(json.dumps({"verdict": letter}))


@dataclass
class Server:
    """An endpoint that sees the prompt and the two replies."""

    reply: Callable[[str, str, str], Answer]
    asked: list[dict[str, Any]] = field(default_factory=list)
    url: str = ""


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    started = []

    def start(reply: Callable[[str, str, str], Answer]) -> Server:
        server = Server(reply)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.asked.append(body)
                found = re.fullmatch(
                    r"--- conversation ---\n(.*)\n--- reply A ---\n(.*)\n--- reply B ---\n(.*)\n--- end ---.*",
                    body["messages"][-1]["content"],
                    re.DOTALL,
                )
                assert found
                status, content = server.reply(*found.groups())
                try:
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the client waited no longer
                    self.close_connection = True

            def log_message(self, *_: object) -> None:
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        http.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that gave up
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_port}/v1"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((http, thread))
        return server

    yield start
    for http, thread in started:
        http.shutdown()
        thread.join()
        http.server_close()


def answer(name: str, number: int) -> str:
    """Of the model longer than of the baseline, by an amount that varies and is now and then negative."""
    extra = (number * 37) % 89 - 20 if name == "new" else 0
    return f"{name} {number} " + "x" * (60 + extra)


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path]:
    """Answers in AlpacaEval's form."""
    paths = []
    for name in ("base", "new"):
        rows = [
            {"instruction": f"Question {n}?", "output": answer(name, n), "generator": name}
            for n in range(PAIRS)
        ]
        paths.append(tmp_path / f"{name}.json")
        paths[-1].write_text(json.dumps(rows))
    return paths[0], paths[1]


@pytest.fixture
def call(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., int]:
    """Run the command on the two files; its exit code. The judgements are in out.jsonl."""

    def run(*more: object) -> int:
        argv = ["judge", *files, tmp_path / "out.jsonl", "--pause", "0.01", *more]
        monkeypatch.setattr(sys, "argv", list(map(str, argv)))
        try:
            command.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


def rows_of(tmp_path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]


def summary_of(tmp_path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((tmp_path / "out.jsonl.summary.json").read_text())
    return found


def test_a_judge_that_prefers_the_first_reply_decides_nothing(
    serve: Callable[..., Server], call: Callable[..., int], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server = serve(lambda *_: verdict("A"))
    assert call("--endpoint", server.url, "--model", "j") == 0
    found = summary_of(tmp_path)
    assert found["models"]["new"]["win_rate"] == 50
    assert found["flip_rate"] == found["first_rate"] == 100
    assert 85 < found["first_ci_low"] < 100
    assert found["models"]["new"]["n_draws"] == PAIRS
    assert len(server.asked) == 2 * PAIRS
    assert server.asked[0]["temperature"] == 0
    rows = rows_of(tmp_path)
    assert rows[0]["orders"] == {"baseline_first": "A", "model_first": "A"}
    assert (rows[0]["generator_1"], rows[0]["generator_2"]) == ("base", "new")
    assert (rows[0]["len_1"], rows[0]["len_2"]) == (len(answer("base", 0)), len(answer("new", 0)))
    said = capsys.readouterr().out
    assert "flip rate 100.0 %" in said
    assert "the judge goes by the place of a reply" in said
    server.asked.clear()
    assert call("--endpoint", server.url, "--model", "j") == 0
    assert server.asked == []
    assert rows_of(tmp_path) == rows
    assert call("--endpoint", server.url, "--model", "another judge") == 0
    assert len(server.asked) == 2 * PAIRS


def test_a_judge_of_length_alone_is_seen_through(
    serve: Callable[..., Server], call: Callable[..., int], tmp_path: Path
) -> None:
    """The longer reply wins in both orders: the win rate is the share of longer ones, the controlled rate is 50."""

    def longer(_: str, first: str, second: str) -> Answer:
        difference = len(first) - len(second)
        return verdict("tie" if not difference else "A" if difference > 0 else "B")

    server = serve(longer)
    assert call("--endpoint", server.url, "--model", "j") == 0
    found = summary_of(tmp_path)
    model = found["models"]["new"]
    assert model["win_rate"] >= 65
    assert found["flip_rate"] == 0
    assert model["length_controlled_win_rate"] == pytest.approx(50, abs=3)
    assert model["length_controlled_ci_low"] < 50 < model["length_controlled_ci_high"]
    assert model["is_length_only"]


def test_gaps_are_counted_and_asked_again(
    serve: Callable[..., Server], call: Callable[..., int], tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """An error, a page and rubbish in one order each: three pairs without a preference, never half a point."""

    def faulty(prompt: str, first: str, _: str) -> Answer:
        faults = {"Question 3?": (400, b"too long"), "Question 5?": (200, b"<html>busy</html>")}
        faults["Question 7?"] = said("I think that A is the better one")
        if first.startswith("base") and prompt in faults:
            return faults[prompt]
        return verdict("A" if first.startswith("new") else "B")

    server = serve(faulty)
    assert call("--endpoint", server.url, "--model", "j") == 0
    found = summary_of(tmp_path)
    assert (found["pairs"], found["gaps"]) == (PAIRS, 3)
    assert (found["unanswered"], found["unparsable"]) == (1, 2)
    model = found["models"]["new"]
    assert (model["win_rate"], model["n"], model["n_missing"]) == (100, PAIRS - 3, 3)
    rows = rows_of(tmp_path)
    assert [n for n, row in enumerate(rows) if row["preference"] is None] == [3, 5, 7]
    assert rows[3]["orders"] == {"baseline_first": None, "model_first": "A"}
    assert "3 of 40 pairs have no preference" in capsys.readouterr().out
    server.asked.clear()
    server.reply = lambda _, first, __: verdict("A" if first.startswith("new") else "B")
    assert call("--endpoint", server.url, "--model", "j") == 0
    assert len(server.asked) == 3
    assert summary_of(tmp_path)["gaps"] == 0


@pytest.mark.parametrize(
    ("reply", "message"),
    [
        ((500, b"oops"), "no answer to 5 questions in a row (500: oops"),
        ((200, b"<html>login</html>"), "nothing could be judged: all of 40 pairs are gaps"),
        (said("both are fine"), "no verdict in the reply 'both are fine'"),
        ((401, b"bad key sk-secret"), "it does not accept the key"),
    ],
)
def test_a_judge_that_never_judges_is_an_error(
    reply: Answer, message: str, serve: Callable[..., Server], call: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path,
) -> None:  # fmt: skip
    monkeypatch.setenv("MY_KEY", "sk-secret")
    server = serve(lambda *_: reply)
    options = ("--endpoint", server.url, "--model", "j", "--retries", 1, "--api-key-env", "MY_KEY")
    assert call(*options) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert "Traceback" not in output.err
    written = [path.read_text() for path in tmp_path.iterdir() if path.is_file()]
    assert not any("sk-secret" in text for text in [output.out, output.err, *written])


def test_a_judge_that_times_out_is_an_error(
    serve: Callable[..., Server], call: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    def slow(*_: str) -> Answer:
        time.sleep(0.5)
        return verdict("A")

    options = ("--model", "j", "--timeout", 0.1, "--retries", 1, "--concurrency", 8)
    assert call("--endpoint", serve(slow).url, *options) == 2
    assert "no answer to 5 questions in a row (ReadTimeout" in capsys.readouterr().err


def test_a_busy_judge_is_asked_again(
    serve: Callable[..., Server], call: Callable[..., int], tmp_path: Path
) -> None:
    seen: set[tuple[str, str]] = set()

    def busy(prompt: str, first: str, _: str) -> Answer:
        if (prompt, first) in seen:
            return verdict("tie")
        seen.add((prompt, first))
        return 503, b""

    assert call("--endpoint", serve(busy).url, "--model", "j") == 0
    found = summary_of(tmp_path)
    assert (found["retries"], found["gaps"], found["tie_rate"]) == (2 * PAIRS, 0, 100)
    assert found["first_rate"] is None
    assert found["models"]["new"]["win_rate"] == 50


def test_a_killed_run_asks_only_what_is_missing(
    serve: Callable[..., Server], call: Callable[..., int], files: tuple[Path, Path], tmp_path: Path
) -> None:
    is_killed = threading.Event()

    def hang(prompt: str, first: str, _: str) -> Answer:
        if prompt == "Question 9?" and not is_killed.is_set():
            is_killed.wait(20)
        return verdict("A" if first.startswith("new") else "B")

    server = serve(hang)
    out = tmp_path / "out.jsonl"
    argv = [sys.executable, "-m", "evals.judge", *files, out, "--endpoint", server.url]
    argv += ["--model", "j", "--concurrency", "1"]
    with subprocess.Popen(list(map(str, argv)), cwd=ROOT, stderr=subprocess.DEVNULL) as process:
        while not any("Question 9?" in body["messages"][-1]["content"] for body in server.asked):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    is_killed.set()
    assert not out.exists()
    kept = len((tmp_path / "out.jsonl.verdicts").read_text().splitlines())
    assert kept == 18
    server.asked.clear()
    assert call("--endpoint", server.url, "--model", "j") == 0
    assert len(server.asked) == 2 * PAIRS - kept
    assert summary_of(tmp_path)["models"]["new"]["win_rate"] == 100


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ('{"verdict": "A"}', "A"),
        ('{"verdict": "TIE", "why": "equal"}', "tie"),
        ('```json\n{"verdict": "b"}\n```', "B"),
        ('"B"', "B"),
        ("A is short, B is wrong.\n\n**Verdict: A**", "A"),
        ('Let me think.\n{"verdict": "B"}', "B"),
        ("Final verdict: tie.", "tie"),
        ("[[B]]", "B"),
        ("A", "A"),
        ("", None),
        ("A is better", None),
        ("Verdict: A or B", None),
        ('{"verdict": "C"}', None),
        ('{"verdict": null}', None),
        ('{"a": "A", "b": "B"}', None),
        ("Verdict: A\nbut I am not sure", None),
        ('["A"]', None),
    ],
)
def test_verdicts_are_read_strictly(reply: str, expected: str | None) -> None:
    assert verdict_in(reply) == expected


def test_facts_about_orders_by_hand() -> None:
    pairs = [("A", "A"), ("A", "B"), ("tie", "B"), ("tie", "tie"), (None, "A")]
    found = order_facts([dict(zip(("baseline_first", "model_first"), p, strict=True)) for p in pairs])  # fmt: skip
    assert found["flip_rate"] == 50  # (A, A) and (tie, B) of four whole pairs
    assert found["tie_rate"] == pytest.approx(100 * 3 / 9)
    assert found["first_rate"] == pytest.approx(100 * 4 / 6)
    from scipy.stats import binomtest

    interval = binomtest(7, 20).proportion_ci(method="wilson")
    assert wilson(7 / 20, 20) == pytest.approx((interval.low, interval.high))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_the_forms_of_answers_align(tmp_path: Path) -> None:
    """Samples of an evaluation, of `evals.sample`, and AlpacaEval's; a repeated prompt pairs in order."""
    turn = {"role": "user", "content": "Hi\n\nyou"}
    sample = {"doc_id": 0, "doc_hash": "x", "kind": "generate_until", "target": "", "metrics": {}}
    chat = {"prompt": "<|im_start|>Hi", "messages": [turn], "answer": "5", "generated": "It is 5"}
    completions = [{"text": "one", "tokens": 1, "finish": "eos"}, {"text": "two"}]
    rows = [
        sample | chat | {"doc_id": n, "filter": f} for n in range(2) for f in ("strict", "flexible")
    ]
    first = read_answers(write(tmp_path / "a.jsonl", rows), "a")
    drawn = [{"prompt": [turn], "completions": completions}] * 2
    second = read_answers(write(tmp_path / "b.jsonl", drawn))
    third = read_answers(
        write(tmp_path / "c.jsonl", [{"instruction": "Hi", "input": "you", "output": ""}] * 2)
    )
    assert (second.name, second.further) == ("b", 2)
    matches = align(first, second)
    assert [(m.baseline, m.answer) for m in matches] == [("It is 5", "one")] * 2
    assert matches[0].index != matches[1].index
    assert [m.answer for m in align(first, third)] == ["", ""]


def test_answers_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    one, two = ({"prompt": f"Q{n}", "completion": "x"} for n in range(2))
    both = read_answers(write(tmp_path / "both.jsonl", [one, two]))
    only = read_answers(write(tmp_path / "only.jsonl", [one]))
    with pytest.raises(UserError, match=r"1 of 2 are only in the answers of both, 0 of 1 .*'Q1'"):
        align(both, only)
    with pytest.raises(UserError, match=r"both sets of answers are called 'both'.*--names"):
        align(both, both)
    choice = {"doc_id": 0, "kind": "multiple_choice", "prompt": "Q", "answer": "1"}
    for row, message in (
        ({"prompt": "Q"}, "it has no answer"),
        ({"completion": "x"}, "'prompt' is missing"),
        (choice, "multiple_choice task"),
        ({"prompt": "Q", "completions": [{}]}, "the first completion"),
    ):
        with pytest.raises(UserError, match=f"bad.jsonl:1: .*{message}"):
            read_answers(write(tmp_path / "bad.jsonl", [row]))
    with pytest.raises(UserError, match="0 files"):
        read_answers(str(tmp_path / "none*.jsonl"))


def test_one_judge_is_needed(call: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert call() == 2
    assert "give one judge" in capsys.readouterr().err
    assert call("--endpoint", "http://127.0.0.1:9/v1") == 2
    assert "--endpoint needs --model" in capsys.readouterr().err
    assert call("--reward-model", "http://127.0.0.1:9", "--max-length", 300) == 2
    assert "max_length: the options of a model at an address" in capsys.readouterr().err
    # Said before anything about the files.
    with pytest.raises(UserError, match="give one judge"):
        command.run(command.parser().parse_args(["absent", "absent", "out.csv"]))


def test_a_reward_model_judges(
    tiny_model: Path, call: Callable[..., int], files: tuple[Path, Path], tmp_path: Path
) -> None:
    """Preferences are the logistic of the score differences; equal answers tie; a long one is a gap."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from reward.model import RewardModel

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, dtype=torch.float32
    )
    torch.nn.init.normal_(model.score.weight, std=1.0)
    folder = tmp_path / "rm"
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(folder)
    sides = [json.loads(path.read_text()) for path in files]
    sides[1][0]["output"] = sides[0][0]["output"]
    sides[1][1]["output"] = "x" * 900
    for path, rows in zip(files, sides, strict=True):
        path.write_text(json.dumps(rows))
    assert call("--reward-model", folder, "--max-length", 300) == 0
    found = rows_of(tmp_path)
    assert found[0]["preference"] == 1.5
    assert found[1]["preference"] is None
    prompt = [{"role": "user", "content": "Question 2?"}]
    texts = [side[2]["output"] for side in sides]
    scores = RewardModel.load(str(folder)).score(
        [prompt] * 2, [[{"role": "assistant", "content": text}] for text in texts]
    )
    expected = 1 + 1 / (1 + math.exp(scores[0] - scores[1]))
    assert found[2]["preference"] == pytest.approx(expected, abs=1e-5)
    facts = summary_of(tmp_path)
    assert (facts["gaps"], facts["too_long"]) == (1, 1)
    assert "flip_rate" not in facts
    (model_name,) = load([str(tmp_path / "out.jsonl")]).models
    assert model_name == "new"
