"""Questions from documents, against a real HTTP server that answers as OpenAI's does, or badly."""

import gzip
import json
import random
import re
import socket
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
from hypothesis import given
from hypothesis import strategies as st

from reward import synthesize as command
from reward.passages import passages
from reward.questions import grounded, pairs_in, same_question, why_not
from reward.records import NORMALISERS, detect

Answer = tuple[int, bytes, dict[str, str]]
ROOT = Path(__file__).parents[2]


@dataclass
class Server:
    """An endpoint: what it was asked, and what it answers."""

    reply: Callable[[str, int], Answer]  # of a passage and how often it was asked about
    asked: list[dict[str, Any]] = field(default_factory=list)
    keys: set[str | None] = field(default_factory=set)
    times: list[float] = field(default_factory=list)
    running: int = 0
    most_running: int = 0
    url: str = ""

    @property
    def passages(self) -> list[str]:
        return [passage_of(body) for body in self.asked]


def passage_of(body: dict[str, Any]) -> str:
    return str(body["messages"][-1]["content"]).partition("Passage:\n")[2]


def said(content: str) -> Answer:
    body = {"choices": [{"index": 0, "message": {"role": "assistant", "content": content}}]}
    return 200, json.dumps(body).encode(), {}


def pair(question: str, answer: str) -> dict[str, str]:
    return {"question": question, "answer": answer}


def good(passage: str, _: int = 0) -> Answer:
    """One question about the number that each passage of these tests has."""
    number = re.search(r"\d+", passage).group()  # type: ignore[union-attr]
    return said(
        json.dumps({"pairs": [pair(f"How old is tower {number}?", f"Tower {number} is old.")]})
    )


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Server]]:
    """Start a server with a `reply` function."""
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    started = []

    def start(reply: Callable[[str, int], Answer]) -> Server:
        server = Server(reply)
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    before = server.passages.count(passage_of(body))
                    server.asked.append(body)
                    server.times.append(time.monotonic())
                    server.keys.add(self.headers.get("Authorization"))
                    server.running += 1
                    server.most_running = max(server.most_running, server.running)
                status, content, headers = server.reply(passage_of(body), before)
                if self.path != "/v1/chat/completions":
                    status, content = 404, b"no such path"
                try:
                    self.send_response(status)
                    for name, value in ({"Content-Length": str(len(content))} | headers).items():
                        self.send_header(name, value)
                    self.end_headers()
                    self.wfile.write(content)
                except OSError:  # the client waited no longer
                    self.close_connection = True
                with lock:
                    server.running -= 1

            def log_message(self, *_: object) -> None:
                pass

        http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        http.daemon_threads = True
        server.url = f"http://127.0.0.1:{http.server_port}"
        thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        started.append((http, thread))
        return server

    yield start
    for http, thread in started:
        http.shutdown()
        thread.join()
        http.server_close()


def text(number: int) -> str:
    return (
        f"Tower {number} is an old tower. " + "It stands beside the river and has many steps. " * 3
    )


@pytest.fixture
def documents(tmp_path: Path) -> Path:
    """Six documents of one passage each."""
    folder = tmp_path / "docs"
    folder.mkdir()
    for number in range(6):
        (folder / f"{number}.{'md' if number % 2 else 'txt'}").write_text(text(number))
    (folder / "image.png").write_bytes(b"\x89PNG")
    return folder


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """Run the command with short pauses; its exit code."""

    def run(*argv: object) -> int:
        fixed = ["--model", "m", "--per-document", "1", "--pause", "0.01"]
        monkeypatch.setattr(sys, "argv", ["synthesize", *map(str, argv), *fixed])
        try:
            command.main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    return run


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def test_good_answers_become_qa_rows(
    serve: Callable[..., Server], call: Callable[..., int], documents: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server, out = serve(good), tmp_path / "new" / "out.jsonl"
    monkeypatch.setenv("MY_KEY", " sk-very-secret\n")
    assert call(documents, out, "--endpoint", server.url, "--api-key-env", "MY_KEY") == 0
    rows = read(out)
    assert [row["question"] for row in rows] == [f"How old is tower {n}?" for n in range(6)]
    assert [Path(row["source"]).name[0] for row in rows] == list("012345")
    assert len({row["chunk"] for row in rows}) == 6
    for row in rows:
        assert set(row) == {"question", "answer", "source", "chunk"}
        assert detect(row) == "qa"
        NORMALISERS["qa"](row)
    assert server.keys == {"Bearer sk-very-secret"}
    assert server.asked[0]["model"] == "m"
    assert server.asked[0]["response_format"] == {"type": "json_object"}
    assert sorted(server.passages) == [text(n).strip() for n in range(6)]
    output = capsys.readouterr()
    assert "6 documents, 6 passages to ask about" in output.out
    assert "6 pairs\ndropped: none" in output.out
    assert "sk-very-secret" not in output.out + output.err


def test_a_busy_server_is_asked_again(
    serve: Callable[..., Server], call: Callable[..., int], documents: Path, tmp_path: Path
) -> None:
    def busy(passage: str, before: int) -> Answer:
        refusals = [(429, b"slow down", {"Retry-After": "0"}), (503, b"", {}), (500, b"oops", {})]
        return refusals[before] if before < 3 else good(passage)

    server = serve(busy)
    assert call(documents, tmp_path / "out.jsonl", "--endpoint", server.url + "/v1/") == 0
    assert len(read(tmp_path / "out.jsonl")) == 6
    assert len(server.asked) == 24
    assert server.keys == {None}


def test_retry_after_is_obeyed(
    serve: Callable[..., Server], call: Callable[..., int], documents: Path, tmp_path: Path
) -> None:
    def busy(passage: str, before: int) -> Answer:
        return good(passage) if before else (429, b"", {"Retry-After": "0.5"})

    server = serve(busy)
    arguments = ("--endpoint", server.url, "--max-documents", 1)
    assert call(documents, tmp_path / "out.jsonl", *arguments) == 0
    assert server.times[1] - server.times[0] >= 0.5


def test_a_slow_answer_is_given_up_and_asked_again(
    serve: Callable[..., Server], call: Callable[..., int], documents: Path, tmp_path: Path
) -> None:
    def slow(passage: str, before: int) -> Answer:
        if "Tower 2" in passage and not before:
            time.sleep(0.6)
        return good(passage)

    server = serve(slow)
    out = tmp_path / "out.jsonl"
    assert call(documents, out, "--endpoint", server.url, "--timeout", 0.3) == 0
    assert [row["question"] for row in read(out)] == [f"How old is tower {n}?" for n in range(6)]
    assert server.passages.count(text(2).strip()) == 2


def test_no_more_requests_at_a_time_than_asked_for(
    serve: Callable[..., Server], call: Callable[..., int], documents: Path, tmp_path: Path
) -> None:
    def steady(passage: str, before: int) -> Answer:
        time.sleep(0.05)
        return good(passage)

    server = serve(steady)
    assert (
        call(documents, tmp_path / "out.jsonl", "--endpoint", server.url, "--concurrency", 2) == 0
    )
    assert server.most_running == 2


def test_each_filter_counts(
    serve: Callable[..., Server], call: Callable[..., int], documents: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fine = pair("Where does tower 1 stand?", "It stands beside the river.")
    replies = {
        "Tower 0": [fine, pair("where does the Tower 1 stand ?", "Beside the river.")],
        "Tower 1": [
            pair("Tell me about tower 1.", "It is old."),
            pair("", "old"),
            pair("Why so?", ""),
        ],
        "Tower 2": [pair("Who built tower 2?", "The famous architect Gustave Eiffel.")],
        "Tower 3": [
            pair("What does the passage say of tower 3?", "It is old."),
            "no pair",
            {"q": 1},
        ],
        "Tower 4": [
            pair("Why?", "It is an old tower."),
            pair("How many steps has it?", "x" * 3000),
        ],
        "Tower 5": None,
    }

    def reply(passage: str, _: int) -> Answer:
        pairs = replies[passage[:7]]
        return said("I cannot do that." if pairs is None else json.dumps({"pairs": pairs}))

    server, out = serve(reply), tmp_path / "out.jsonl"
    assert call(documents, out, "--endpoint", server.url) == 0
    assert [(row["question"], row["answer"]) for row in read(out)] == [tuple(fine.values())]
    expected = {"duplicate": 1, "no question": 1, "empty": 4, "not grounded": 1, "length": 2}
    expected |= {"refers to the text": 1, "unparsable reply": 1}
    counted = capsys.readouterr().out.partition("dropped: ")[2].strip().split(", ")
    assert {name: int(n) for n, name in (c.split(" ", 1) for c in counted)} == expected


@pytest.mark.parametrize(
    "body",
    [
        b"<html>busy</html>",
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"message": {"content": null}}]}',
        b"\xff",
    ],
)
def test_a_reply_of_another_form_is_counted(
    body: bytes, serve: Callable[..., Server], call: Callable[..., int], documents: Path,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server = serve(lambda *_: (200, body, {}))
    assert call(documents, tmp_path / "out.jsonl", "--endpoint", server.url) == 2
    output = capsys.readouterr()
    assert "0 pairs\ndropped: 6 unparsable reply" in output.out
    assert "no reply had a pair that is fit to keep" in output.err


def test_an_interrupted_run_continues(
    serve: Callable[..., Server], call: Callable[..., int], documents: Path, tmp_path: Path
) -> None:
    """The process is killed while the fourth passage is waited for; what it had is not asked again."""
    is_killed = threading.Event()

    def hang(passage: str, _: int) -> Answer:
        if "Tower 3" in passage and not is_killed.is_set():
            is_killed.wait(20)
        return good(passage)

    server, out = serve(hang), tmp_path / "out.jsonl"
    argv = [sys.executable, "-m", "reward.synthesize", documents, out, "--endpoint", server.url]
    argv += ["--model", "m", "--per-document", "1", "--concurrency", "1"]
    with subprocess.Popen(list(map(str, argv)), cwd=ROOT, stdout=subprocess.DEVNULL) as process:
        while not any("Tower 3" in passage for passage in server.passages):
            assert process.poll() is None
            time.sleep(0.01)
        process.kill()
    is_killed.set()
    # A crash may also have cut lines off, or come between rows and note.
    notes = tmp_path / ".out.jsonl.done"
    lines = notes.read_text().splitlines(keepends=True)
    done = len(lines)
    assert len(read(out)) == done <= 3
    if done:
        notes.write_text("".join(lines[:-1]) + lines[-1][:9])
    with out.open("a") as file:
        file.write('{"question": "cut o')
    server.asked.clear()
    assert call(documents, out, "--endpoint", server.url) == 0
    assert len(server.asked) == 6 - max(0, done - 1)
    assert sorted(row["question"] for row in read(out)) == [
        f"How old is tower {n}?" for n in range(6)
    ]
    server.asked.clear()
    whole = out.read_bytes()
    assert call(documents, out, "--endpoint", server.url) == 0
    assert server.asked == []
    assert out.read_bytes() == whole


def test_changed_and_new_documents_are_asked_about(
    serve: Callable[..., Server], call: Callable[..., int], documents: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    server, out = serve(good), tmp_path / "out.jsonl"
    assert call(documents, out, "--endpoint", server.url) == 0
    (documents / "0.txt").write_text(text(70))
    (documents / "copy.txt").write_text(text(1))
    server.asked.clear()
    assert call(documents, out, "--endpoint", server.url) == 0
    assert server.passages == [text(70).strip()]
    assert "7 documents, 6 passages to ask about, 5 of them done before" in capsys.readouterr().out
    assert len(read(out)) == 7


def test_one_failing_passage_does_not_stop_the_others(
    serve: Callable[..., Server], call: Callable[..., int], documents: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    def picky(passage: str, _: int) -> Answer:
        return (400, b"too long", {}) if "Tower 2" in passage else good(passage)

    server, out = serve(picky), tmp_path / "out.jsonl"
    assert call(documents, out, "--endpoint", server.url) == 2
    assert "1 passages got no answer, such as" in (error := capsys.readouterr().err)
    assert "2.txt: 400: too long; the same command asks again" in error
    assert len(read(out)) == 5
    server.reply = good
    assert call(documents, out, "--endpoint", server.url) == 0
    assert len(read(out)) == 6


@pytest.mark.parametrize(
    ("status", "message"), [(401, "--api-key-env"), (403, "--model"), (404, "check --endpoint")]
)
def test_a_hopeless_refusal_stops_at_once_and_shows_no_key(
    status: int, message: str, serve: Callable[..., Server], call: Callable[..., int],
    documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setenv("MY_KEY", "sk-very-secret")
    server = serve(lambda *_: (status, b"bad key sk-very-secret given", {}))
    url = server.url.replace("//", "//user:hidden@")
    options = ("--endpoint", url, "--api-key-env", "MY_KEY", "--concurrency", 1)
    assert call(documents, tmp_path / "out.jsonl", *options) == 2
    output = capsys.readouterr()
    assert message in output.err
    assert f"{status}: bad key [key] given" in output.err
    assert "secret" not in output.err + output.out
    assert "hidden" not in output.err + output.out
    assert len(server.asked) <= 2


def test_a_dead_endpoint_is_given_up(
    call: Callable[..., int], documents: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        assert call(documents, tmp_path / "out.jsonl", "--endpoint", url, "--retries", 1) == 2
    error = capsys.readouterr().err
    assert "no answer for 5 passages in a row (ConnectError" in error
    assert "(attempts: 2)" in error


def test_mistakes_get_one_message(
    call: Callable[..., int], documents: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (tmp_path / "short.txt").write_text("A heading")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "rows.jsonl").write_text('{"body": "x"}\n')
    (tmp_path / "mine.jsonl").write_text('{"a": 1}\n')
    monkeypatch.delenv("NO_SUCH_KEY", raising=False)
    monkeypatch.setenv("BAD_KEY", "sk one two")
    out, there = tmp_path / "out.jsonl", ("--endpoint", "http://127.0.0.1:1")
    for arguments, message in (
        ((tmp_path / "docz", out, *there), "docz"),
        ((tmp_path / "short.txt", out, *there), "has no passage of 100 characters in 1 documents"),
        ((tmp_path / "latin.txt", out, *there), "it is not UTF-8 text"),
        ((tmp_path / "rows.jsonl", out, *there), "rows.jsonl:1: 'text' is missing"),
        ((documents, tmp_path / "out.txt", *there), "must end in .jsonl"),
        ((documents, tmp_path / "mine.jsonl", *there), "was not written by this command"),
        ((documents, out, "--endpoint", "localhost:8000"), "must be an address such as"),
        ((documents, out, "--endpoint", "http://a:port"), "must be an address such as"),
        ((documents, out, *there, "--api-key-env", "NO_SUCH_KEY"), "has no such variable"),
        ((documents, out, *there, "--api-key-env", "BAD_KEY"), "characters no key has"),
    ):
        assert call(*arguments) == 2
        error = capsys.readouterr().err
        assert message in error
        assert "sk one two" not in error
    assert not out.exists()
    assert (tmp_path / "mine.jsonl").read_text() == '{"a": 1}\n'


def test_two_runs_do_not_write_to_one_file(
    serve: Callable[..., Server], call: Callable[..., int], documents: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    from filelock import FileLock

    server = serve(good)
    with FileLock(tmp_path / ".out.jsonl.lock"):
        assert call(documents, tmp_path / "out.jsonl", "--endpoint", server.url) == 2
    assert "another run is writing to" in capsys.readouterr().err
    assert server.asked == []


def test_real_documents(
    serve: Callable[..., Server], call: Callable[..., int], shared_data: Path, tmp_path: Path
) -> None:
    """Sentences of Wikipedia pages come back as answers, so each is grounded."""

    def quote(passage: str, _: int) -> Answer:
        sentence = max(passage.split(" . "), key=len)[:300]
        return said(
            "```json\n" + json.dumps([pair(f"What about {sentence[:40]}?", sentence)]) + "\n```"
        )

    server, out = serve(quote), tmp_path / "out.jsonl"
    source = shared_data / "eval" / "wikitext2.test.jsonl.gz"
    options = ("--field", "page", "--max-documents", 20, "--concurrency", 8)
    assert call(source, out, "--endpoint", server.url, *options) == 0
    rows = read(out)
    assert len(rows) == 20
    with gzip.open(source, "rt") as file:
        pages = [json.loads(line)["page"] for line in file]
    for row in rows:
        page = pages[int(row["source"].rpartition(":")[2]) - 1]
        assert " ".join(row["answer"].split()) in " ".join(page.split())


@given(
    paragraphs=st.lists(st.text(st.sampled_from("ab .!?\n"), min_size=1, max_size=80), max_size=6),
    limit=st.integers(1, 60),
)
def test_passages_lose_nothing_and_fit(paragraphs: list[str], limit: int) -> None:
    whole = "\n\n".join(paragraphs)
    found = passages(whole, limit)
    assert all(0 < len(passage) <= limit for passage in found)
    assert "".join("".join(found).split()) == "".join(whole.split())


def test_passages_by_hand() -> None:
    assert passages("One.\n\nTwo.\n \nThree is long.", 12) == ["One.\n\nTwo.", "Three is", "long."]
    assert passages("A first one. A second. A third.", 24) == ["A first one. A second.", "A third."]
    assert passages("", 9) == []


def test_questions_are_spread_over_a_document() -> None:
    long = "\n\n".join(text(number) for number in range(10))
    for asked in (1, 3, 10, 25):
        made = command.works(("d", long), asked, 200, "m")
        assert sum(work.count for work in made) == asked
        assert len(made) == min(asked, 10)
        assert max(w.count for w in made) - min(w.count for w in made) <= 1
    assert (
        len({work.key for model in "mn" for work in command.works(("d", long), 3, 200, model)}) == 6
    )


PAIR = {"question": "q?", "answer": "a"}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        (json.dumps({"pairs": [PAIR]}), [PAIR]),
        (json.dumps([PAIR, PAIR]), [PAIR, PAIR]),
        (json.dumps(PAIR), [PAIR]),
        (f"As [1] says:\n```json\n{json.dumps({'pairs': [PAIR]}, indent=2)}\n```\nDone.", [PAIR]),
        ("<think>{maybe [x]}</think>" + json.dumps({"questions": [PAIR]}), [PAIR]),
        ('{"pairs": []}', []),
        (json.dumps({"pairs": [PAIR, PAIR]})[:-12], [PAIR]),  # cut off in the second
        ("{'pairs': 1}", None),
        ("", None),
        ("[" * 5000, None),
    ],
)
def test_pairs_in_replies(reply: str, expected: list[Any] | None) -> None:
    assert pairs_in(reply) == expected


def test_grounding_by_hand() -> None:
    passage = "The Eiffel Tower was finished in 1889 and is 330 metres tall."
    assert grounded("It was finished in 1889.", passage) == 1
    assert grounded("The tower was opened in 1889.", passage) == pytest.approx(2 / 3)
    assert grounded("Gustave built it.", passage) == 0
    assert grounded("Yes.", passage) == 0
    assert grounded("...", passage) == 0
    assert grounded("埃菲尔", "埃菲尔铁塔") == 1


def test_questions_that_are_the_same() -> None:
    assert same_question("What is the Capital of France?") == same_question(
        "what's capital of France"
    )
    assert same_question("Is A taller than B?") != same_question("Is B taller than A?")
    assert same_question("Who founded Rome?") != same_question("When was Rome founded?")
    assert same_question("लड़का कौन है?") != same_question("लड़की कौन है?")  # the boy, the girl
    assert same_question("Ｃａｆｅ\u0301?") == same_question("caf\u00e9?")


@pytest.mark.parametrize(
    ("question", "is_kept"),
    [
        ("What does the passage above say?", False),
        ("Which river is mentioned in this text?", False),
        ("According to the provided document, who came?", False),
        ("Which river, as mentioned above, is long?", False),
        ("Which text did Homer write?", True),
        ("Who signed the document of surrender in 1945?", False),  # the price of a simple rule
        ("这座塔有多高，能告诉我吗？", True),
    ],
)
def test_questions_that_refer_to_the_text(question: str, is_kept: bool) -> None:
    reason = why_not(pair(question, "the river"), "the river", 0.5, set())
    assert reason == (None if is_kept else "refers to the text")


def test_half_a_surrogate_pair_is_no_text() -> None:
    assert why_not(pair("Is it \ud800 long?", "river"), "river", 0.5, set()) == "empty"


def test_random_replies_never_crash() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        pairs_in("".join(rng.choices('{}[]",:1a \\', k=rng.randrange(40))))
