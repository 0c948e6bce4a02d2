"""The real server on loopback, as a process, and with models that are slow or fail; its client."""

import asyncio
import contextlib
import json
import math
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from conf.entry import UserError
from conf.schema import Reward, Scorer, Serving, Term
from reward import ensemble
from reward.chat import seconds_before
from reward.classifier import identity
from reward.model import RewardModel
from reward.origin import origin
from reward.remote import RemoteModel
from reward.rewards import open_reward
from reward.serve import check_serving

ROOT = Path(__file__).parents[2]
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}
Json = dict[str, Any]


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def expected(model: RewardModel, *rows: tuple[str, str]) -> list[float]:
    return model.score(
        [[turn("user", prompt)] for prompt, _ in rows],
        [[turn("assistant", completion)] for _, completion in rows],
    )


def body(*rows: tuple[str, str]) -> Json:
    return {"rows": [{"prompt": prompt, "completion": completion} for prompt, completion in rows]}


def samples(url: str) -> dict[str, float]:
    """`name{label values}` → value, of all metrics."""
    families = text_string_to_metric_families(httpx.get(f"{url}/metrics").text)
    return {
        f"{sample.name}{{{','.join(sample.labels.values())}}}": sample.value
        for family in families
        for sample in family.samples
    }


@dataclass
class Process:
    """A server as a process of its own."""

    process: subprocess.Popen[bytes]
    log: Path
    url: str = ""

    def wait(self, condition: Callable[[], bool]) -> None:
        for _ in range(1200):
            if condition():
                return
            assert self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def listen(self) -> "Process":
        self.wait(lambda: "listening on" in self.log.read_text())
        self.url = re.findall(r"listening on (\S+)", self.log.read_text())[0]
        return self

    def ready(self) -> "Process":
        self.wait(lambda: httpx.get(f"{self.url}/health").status_code == 200)
        return self


@contextlib.contextmanager
def process(log: Path, *options: str, **environment: str) -> Iterator[Process]:
    command = [sys.executable, "-m", "reward.serve", "port=0", *options]
    with (
        log.open("wb") as file,
        subprocess.Popen(
            command, stderr=file, stdout=file, cwd=ROOT, env={**os.environ, **environment}
        ) as child,
    ):
        try:
            yield Process(child, log)
        finally:
            child.kill()


@pytest.fixture(scope="module")
def reward_folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a random scalar head, in float32."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, dtype=torch.float32
    )
    torch.nn.init.normal_(model.score.weight, std=1.0)
    out = tmp_path_factory.mktemp("reward") / "tiny-rm"
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def server(reward_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    log = tmp_path_factory.mktemp("server") / "log"
    with process(log, f"model.path={reward_folder}", "max_body_bytes=2000000") as found:
        yield found.listen().ready()


@pytest.fixture(scope="module")
def model(reward_folder: Path) -> RewardModel:
    return RewardModel.load(str(reward_folder))


@dataclass
class Wrapped:
    """A reward model that can be held up, that fails on a text, and that remembers its batches."""

    model: RewardModel
    gate: threading.Event = field(default_factory=threading.Event)
    batches: list[list[list[int]]] = field(default_factory=list)
    failures: dict[str, Any] = field(default_factory=dict)  # text → an exception, or a score

    @property
    def max_length(self) -> int | None:
        return self.model.max_length

    def tokenize(self, *row: Any) -> list[int]:
        return self.model.tokenize(*row)

    def text(self, ids: list[int]) -> str:
        return str(self.model._tokenizer.decode(ids))

    def score_tokens(self, rows: list[list[int]]) -> list[float]:
        self.batches.append(rows)
        assert self.gate.wait(20)
        scores = self.model.score_tokens(rows)
        for place, ids in enumerate(rows):
            for text, outcome in self.failures.items():
                if text in self.text(ids):
                    if isinstance(outcome, BaseException):
                        raise outcome
                    scores[place] = outcome
        return scores


@contextlib.contextmanager
def running(model: Any, key: str | None = None, **limits: Any) -> Iterator[tuple[str, Any]]:
    """The server inside this process; its address and its batcher."""
    import uvicorn

    from reward.server.app import make_app
    from reward.server.batcher import Batcher
    from reward.server.meters import Meters

    config = Serving(model=Scorer(path="x", batch_tokens=limits.pop("batch_tokens", 4096)))
    for name, value in limits.items():
        assert hasattr(config, name)
        setattr(config, name, value)
    meters = Meters()
    batcher = Batcher(
        lambda: model,
        batch_tokens=config.model.batch_tokens,
        max_wait=config.max_wait_ms / 1000,
        max_queue=config.max_queue,
        meters=meters,
        on_end=lambda: None,
    )
    about = {"name": "x", "weights": "0123", "dtype": "float32", "max_length": model.max_length}
    app = make_app(config, key, batcher, meters, lambda: about)
    options: Any = {"http": "h11", "ws": "none", "lifespan": "off", "log_config": None}
    server = uvicorn.Server(uvicorn.Config(app, **options))
    with socket.create_server(("127.0.0.1", 0), backlog=512) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        batcher.start()
        thread.start()
        try:
            url = f"http://127.0.0.1:{listener.getsockname()[1]}"
            until(lambda: server.started and batcher.state == "ready")
            yield url, batcher
        finally:
            if isinstance(model, Wrapped):
                model.gate.set()
            server.should_exit = True
            thread.join()
            assert batcher.close(10)


def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never came")


def post(url: str, content: Any, **options: Any) -> httpx.Response:
    kind = "content" if isinstance(content, bytes) else "json"
    return httpx.post(f"{url}/score", **{kind: content}, timeout=30, **options)


def raw(url: str, sent: bytes) -> bytes:
    """What the server answers to these bytes, read to the end of the connection."""
    host, port = url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(sent)
        reply = b""
        with contextlib.suppress(ConnectionResetError):
            while chunk := connection.recv(65536):
                reply += chunk
    return reply


# the process


def test_scores_are_those_of_the_model(
    server: Process, model: RewardModel, reward_folder: Path
) -> None:
    asked = body(("Hi", "Hello!"), ("Hi", ""), ("Why?", "x" * 1100), ("Why?", "Rayleigh.\n"))
    asked["rows"] += [
        {"prompt": [turn("user", "Hi")], "completion": [turn("assistant", "Hello!")]},
        {"prompt": "Hi", "completion": [turn("assistant", "  ")], "tools": [TOOL]},
    ]
    reply = post(server.url, asked)
    assert reply.status_code == 200, reply.text
    found = reply.json()
    wanted = expected(model, ("Hi", "Hello!"), ("Hi", ""), ("Why?", "Rayleigh.\n"), ("Hi", "  "))
    assert found["scores"][2] is None
    assert found["too_long"] == 1
    assert found["scores"][:2] + found["scores"][3:4] == pytest.approx(wanted[:3], abs=1e-5)
    assert found["scores"][4:] == pytest.approx([wanted[0], wanted[3]], abs=1e-5)
    assert found["model"] == {
        "name": "tiny-rm",
        "weights": identity(str(reward_folder)),
        "dtype": "float32",
        "max_length": 1024,
    }
    about = httpx.get(f"{server.url}/info").json()
    assert about["model"] == found["model"]
    assert about["limits"]["max_rows"] == 256


def test_200_requests_at_once(server: Process, model: RewardModel) -> None:
    asked = [
        [
            (f"Question {number}", f"Answer {number} {row}" * (1 + row))
            for row in range(1 + number % 3)
        ]
        for number in range(200)
    ]
    before = samples(server.url)

    async def ask_all() -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=200)
        async with httpx.AsyncClient(timeout=60, limits=limits) as client:
            posts = [client.post(f"{server.url}/score", json=body(*rows)) for rows in asked]
            return await asyncio.gather(*posts)

    replies = asyncio.run(ask_all())
    assert [reply.status_code for reply in replies] == [200] * 200
    wanted = expected(model, *(row for rows in asked for row in rows))
    assert len(set(wanted)) == len(wanted)
    for rows, reply in zip(asked, replies, strict=True):
        ours, wanted = wanted[: len(rows)], wanted[len(rows) :]
        assert reply.json()["scores"] == pytest.approx(ours, abs=1e-5)
    after = samples(server.url)

    def grown(name: str) -> float:
        return after[name] - before.get(name, 0)

    count = sum(map(len, asked))
    assert grown("reward_requests_total{/score,200}") == 200
    assert grown("reward_request_seconds_count{}") == 200
    assert grown("reward_rows_total{scored}") == count
    assert after["reward_queue_rows{}"] == 0
    assert 1 <= grown("reward_batch_tokens_count{}") < 100  # they were scored together
    tokens = sum(
        len(model.tokenize([turn("user", prompt)], [turn("assistant", completion)]))
        for rows in asked
        for prompt, completion in rows
    )
    assert tokens <= grown("reward_batch_tokens_sum{}") < 3 * tokens


DEEP = b"[" * 100_000
BAD: list[tuple[Any, int, str]] = [
    (b"", 400, 'the body is not JSON: it is empty, expected {"rows": […]}'),
    (b"{", 400, "the body is not JSON: it is not JSON: "),
    (b'{"rows": NaN}', 400, "the body is not JSON: it is not JSON: NaN is not a JSON value"),
    (b'{"rows": [-Infinity]}', 400, "-Infinity is not a JSON value"),
    (b'{"rows": "\xff"}', 400, "the body is not JSON: it is not UTF-8 text (byte 11)"),
    (b'{"rows": ' + DEEP, 400, "the body is not JSON: it is nested too deeply"),
    (b"[1]", 422, 'the body is not an object, expected {"rows": […]}'),
    (b"{}", 422, "'rows' is missing"),
    ({"rows": [], "model": 1}, 422, "the body has 'model', expected only 'rows'"),
    ({"rows": []}, 422, "'rows' is empty"),
    ({"rows": "a"}, 422, "'rows' is text, expected a list of objects"),
    (body(*[("a", "b")] * 257), 422, "'rows' has 257 rows, more than 256: send several requests"),
    ({"rows": [3]}, 422, "rows[0]: it is a number, expected an object with prompt and completion"),
    ({"rows": [{"prompt": "a"}]}, 422, "rows[0]: 'completion' is missing"),
    (
        {"rows": [*body(("a", "b"))["rows"], {"completion": "b"}]},
        422,
        "rows[1]: 'prompt' is missing",
    ),
    (
        {"rows": [{"prompt": "a", "completion": "b", "tool": []}]},
        422,
        "rows[0]: it has 'tool', expected only prompt, completion, tools",
    ),
    (
        {"rows": [{"prompt": 1, "completion": "b"}]},
        422,
        "rows[0]: 'prompt' is a number, expected text",
    ),
    ({"rows": [{"prompt": "", "completion": "b"}]}, 422, "rows[0]: 'prompt' is empty"),
    ({"rows": [{"prompt": "a", "completion": None}]}, 422, "rows[0]: 'completion' is null"),
    (
        {"rows": [{"prompt": "a", "completion": "b", "tools": 7}]},
        422,
        "rows[0]: 'tools' is a number, expected a list of tool definitions",
    ),
    (
        {"rows": [{"prompt": [{"role": "user"}], "completion": "b"}]},
        422,
        "rows[0]: 'prompt' turn 1 has no content",
    ),
    (
        {"rows": [{"prompt": "a", "completion": [turn("user", "b")]}]},
        422,
        "rows[0]: prompt and completion: turn 2 has role 'user', expected assistant",
    ),
    (
        b'{"rows": [{"prompt": "\\ud800", "completion": "b"}]}',
        422,
        "rows[0]: 'prompt' has half a surrogate pair, which no tokenizer can read",
    ),
]


@pytest.mark.parametrize(("content", "status", "reason"), BAD)
def test_a_bad_request_is_told_why(server: Process, content: Any, status: int, reason: str) -> None:
    reply = post(server.url, content)
    assert reply.status_code == status, reply.text
    error = reply.json()["error"]
    assert reason in error
    assert "\n" not in error
    assert len(error) < 300


def test_other_paths_and_methods(server: Process) -> None:
    for path in ("/", "/docs", "/openapi.json", "/score/", "/../etc/passwd"):
        reply = httpx.get(server.url + path)
        assert reply.status_code == 404, path
        assert reply.json()["error"].startswith("there is no such path; there are /score")
    reply = httpx.get(f"{server.url}/score")
    assert (reply.status_code, reply.json()) == (405, {"error": "this path takes POST only"})
    assert httpx.delete(f"{server.url}/health").status_code == 405
    assert raw(server.url, b"nonsense\r\n\r\n").startswith(b"HTTP/1.1 400")


def test_a_body_over_the_limit_is_not_read(server: Process) -> None:
    head = b"POST /score HTTP/1.1\r\nHost: x\r\n"
    declared = raw(server.url, head + b"Content-Length: 1000000000\r\n\r\n{")  # no more is sent
    assert declared.startswith(b"HTTP/1.1 413 ")
    assert b"the body has more than 2000000 bytes" in declared
    chunk = b"%x\r\n%s\r\n" % (500_000, b" " * 500_000)
    chunked = raw(server.url, head + b"Transfer-Encoding: chunked\r\n\r\n" + 5 * chunk)
    assert chunked.startswith(b"HTTP/1.1 413 ")
    assert post(server.url, body(("a", "b" * 10_000_000))).status_code == 413
    long = post(server.url, body(("a", "b " * 100_000)))  # within the limit, but no model reads it
    assert (long.status_code, long.json()["scores"]) == (200, [None])


def test_the_log_has_a_line_for_each_request_and_none_of_its_text(server: Process) -> None:
    assert post(server.url, body(("What is SECRETWORD?", "It is SECRETWORD"))).is_success
    httpx.get(f"{server.url}/SECRETWORD%0Afake")
    server.wait(lambda: "other 404" in server.log.read_text())
    log = server.log.read_text()
    assert re.search(r"INFO /score 200, 1 rows, \d+ ms", log)
    assert "SECRETWORD" not in log
    assert "Traceback" not in log


def test_loading_and_the_end(reward_folder: Path, tmp_path: Path, model: RewardModel) -> None:
    """Requests before the model is there are told to come again; those under way at SIGTERM are answered."""
    with process(tmp_path / "log", f"model.path={reward_folder}", "model.batch_tokens=1") as server:
        server.listen()
        early = httpx.get(f"{server.url}/health")
        assert (early.status_code, early.json()) == (503, {"status": "loading"})
        refused = post(server.url, body(("a", "b")))
        assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
        assert refused.json() == {"error": "the model is being loaded"}
        server.ready()
        rows = [(f"Question {number}", "word " * 120) for number in range(60)]
        with ThreadPoolExecutor(5) as pool:
            replies = [pool.submit(post, server.url, body(*rows)) for _ in range(5)]
            # All are in when only the row that is being scored is neither queued nor scored.
            server.wait(lambda: _rows_in(server.url) >= 5 * len(rows) - 1)
            server.process.send_signal(signal.SIGTERM)
            server.wait(lambda: not _accepts(server.url))
            wanted = expected(model, *rows)
            for reply in replies:
                assert reply.result().status_code == 200
                assert reply.result().json()["scores"] == pytest.approx(wanted, abs=1e-5)
        assert server.process.wait(20) == 0
        assert "stopped" in server.log.read_text()


def _rows_in(url: str) -> float:
    found = samples(url)
    return found["reward_queue_rows{}"] + found.get("reward_rows_total{scored}", 0)


def _accepts(url: str) -> bool:
    host, port = url.removeprefix("http://").split(":")
    try:
        socket.create_connection((host, int(port)), timeout=1).close()
    except OSError:
        return False
    return True


def test_what_is_no_model_ends_the_server(tmp_path: Path) -> None:
    with process(tmp_path / "log", f"model.path={tmp_path}") as server:
        assert server.process.wait(60) == 2
    assert "error: " in (log := (tmp_path / "log").read_text())
    assert "config.json is missing" in log
    assert "Traceback" not in log


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("max_rows", 0, "max_rows=0 must be at least 1"),
        ("max_rows", 5000, "no room for one request of max_rows=5000"),
        ("timeout", 0, "timeout=0 must be"),
        ("timeout", math.nan, "timeout=nan must be"),
        ("port", 70000, "port=70000 must lie between"),
        ("max_wait_ms", -1, "max_wait_ms=-1 must be"),
        ("model", Scorer(path="http://x"), "a server itself"),
        ("model", Scorer(path="x", batch_tokens=0), "model.batch_tokens=0 must be at least 1"),
    ],
)
def test_settings_that_make_no_sense(name: str, value: Any, reason: str) -> None:
    config = Serving(model=Scorer(path="x"))
    check_serving(config)
    setattr(config, name, value)
    with pytest.raises(UserError, match=re.escape(reason)):
        check_serving(config)


# models that are slow or fail


def test_batches_are_full_and_no_fuller(model: RewardModel) -> None:
    slow = Wrapped(model)
    with running(slow, batch_tokens=300) as (url, batcher), ThreadPoolExecutor(9) as pool:
        texts = [
            [(f"{number}", "word " * (7 * row % 30)) for row in range(12)] for number in range(8)
        ]
        first = pool.submit(post, url, body(("first", "first")))
        until(lambda: len(slow.batches) == 1)
        replies = [pool.submit(post, url, body(*rows)) for rows in texts]
        until(lambda: len(batcher._queue) == 96)
        slow.gate.set()
        assert first.result().is_success
        for rows, reply in zip(texts, replies, strict=True):
            assert reply.result().json()["scores"] == pytest.approx(
                expected(model, *rows), abs=1e-5
            )
    sizes = [len(batch) * max(map(len, batch)) for batch in slow.batches[1:]]
    assert max(sizes) <= 300
    assert len(sizes) < 60  # of 96 rows
    assert sum(map(len, slow.batches[1:])) == 96


def test_timeout_drops_what_waits(model: RewardModel) -> None:
    slow = Wrapped(model)
    with (
        running(slow, timeout=0.5, batch_tokens=1) as (url, batcher),
        ThreadPoolExecutor(2) as pool,
    ):
        held = pool.submit(post, url, body(("a", "held"), ("a", "never scored")))
        until(lambda: len(slow.batches) == 1)
        reply = held.result()
        assert reply.status_code == 504
        assert reply.json() == {"error": "there was no score within 0.5 s: send fewer rows"}
        until(lambda: not batcher._queue)
        slow.gate.set()
        assert post(url, body(("a", "b"))).json()["scores"] == pytest.approx(
            expected(model, ("a", "b")), abs=1e-5
        )
        found = samples(url)
        assert found["reward_requests_total{/score,504}"] == 1
        assert found["reward_rows_total{dropped}"] == 1
        late = raw(url, b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\n{")
        assert late.startswith(b"HTTP/1.1 408 ")
        assert b"the body was not here within 0.5 s" in late
    assert len(slow.batches) == 2


def test_a_client_that_leaves_takes_its_rows_along(model: RewardModel) -> None:
    slow = Wrapped(model)
    with running(slow, batch_tokens=1) as (url, batcher), ThreadPoolExecutor(1) as pool:
        held = pool.submit(post, url, body(("a", "b")))
        until(lambda: len(slow.batches) == 1)
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{url}/score", json=body(*[("a", "c")] * 9), timeout=0.3)
        until(lambda: not batcher._queue)
        slow.gate.set()
        assert held.result().status_code == 200
        until(lambda: "reward_requests_total{/score,499}" in samples(url))
    assert len(slow.batches) == 1


def test_a_full_queue_refuses_and_goes_on(model: RewardModel) -> None:
    slow = Wrapped(model)
    with running(slow, max_queue=4, max_rows=4, batch_tokens=1) as (url, batcher):
        with ThreadPoolExecutor(4) as pool:
            held = [pool.submit(post, url, body(("a", "b")))]
            until(lambda: len(slow.batches) == 1)
            held += [pool.submit(post, url, body(("a", "b"), ("a", "c"))) for _ in range(2)]
            until(lambda: len(batcher._queue) == 4)
            refused = post(url, body(("a", "d")))
            assert (refused.status_code, refused.headers["Retry-After"]) == (503, "1")
            assert "4 rows are all that may wait" in refused.json()["error"]
            assert httpx.get(f"{url}/health").status_code == 200
            slow.gate.set()
            assert [reply.result().status_code for reply in held] == [200, 200, 200]
        assert post(url, body(("a", "d"))).status_code == 200


def test_one_bad_row_fails_its_own_request_only(model: RewardModel) -> None:
    place = str(ROOT)
    failing = Wrapped(model, failures={"POISON": RuntimeError(f"at {place}"), "LOST": math.nan})
    with running(failing) as (url, batcher), ThreadPoolExecutor(10) as pool:
        first = pool.submit(post, url, body(("first", "first")))
        until(lambda: len(failing.batches) == 1)
        texts = ["good", "POISON", "fine", "LOST", "well"]
        replies = [pool.submit(post, url, body(("a", "b"), ("a", text))) for text in texts]
        until(lambda: len(batcher._queue) == 10)
        failing.gate.set()
        assert first.result().status_code == 200
        for text, reply in zip(texts, replies, strict=True):
            answer = reply.result()
            if text in failing.failures:
                reason = (
                    "the model failed on it (RuntimeError)"
                    if text == "POISON"
                    else "its score is not a finite number"
                )
                assert (answer.status_code, answer.json()) == (500, {"error": f"rows[1]: {reason}"})
            else:
                wanted = expected(model, ("a", "b"), ("a", text))
                assert answer.json()["scores"] == pytest.approx(wanted, abs=1e-5)
        found = samples(url)
        assert found["reward_model_errors_total{}"] >= 1
        assert found["reward_rows_total{failed}"] == 2
        assert found["reward_requests_total{/score,500}"] == 2


def test_a_template_that_refuses_is_the_senders_business(reward_folder: Path) -> None:
    strict = RewardModel.load(str(reward_folder))
    strict._tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('No system turn') }}{% endif %}"
        + strict._tokenizer.chat_template
    )
    with running(strict) as (url, _):
        row = {"prompt": [turn("system", "x"), turn("user", "y")], "completion": "z"}
        reply = post(url, {"rows": [*body(("a", "b"))["rows"], row]})
        assert reply.status_code == 422
        assert reply.json() == {
            "error": "rows[1]: the model's chat template refuses it (No system turn)"
        }
        assert post(url, body(("a", "b"))).status_code == 200


def test_a_dead_scoring_thread_is_seen(model: RewardModel) -> None:
    dying = Wrapped(model, failures={"DIE": SystemExit("gone")})
    dying.gate.set()
    with running(dying) as (url, _):
        assert post(url, body(("a", "b"))).status_code == 200
        until(lambda: post(url, body(("a", "DIE"))).status_code == 503)
        health = httpx.get(f"{url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "failed"})
        assert "restart the server" in post(url, body(("a", "b"))).json()["error"]


def test_key(model: RewardModel) -> None:
    with running(model, key="s3cret") as (url, _):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "s3cret"}):
            reply = post(url, body(("a", "b")), headers=headers)
            assert (reply.status_code, reply.headers["WWW-Authenticate"]) == (401, "Bearer")
            assert "s3cret" not in reply.text
        assert httpx.get(f"{url}/metrics").status_code == 401
        assert httpx.get(f"{url}/health").status_code == 200
        right = {"Authorization": "Bearer s3cret"}
        assert post(url, body(("a", "b")), headers=right).status_code == 200
        with pytest.raises(UserError, match="does not accept the key"):
            RemoteModel(url, key="other")
        with contextlib.closing(RemoteModel(url, key="s3cret")) as remote:
            assert remote.identity == "0123"


def test_commands_take_the_key_from_the_environment(
    model: RewardModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    with running(model, key="s3cret") as (url, _):
        monkeypatch.setenv("ALIGN_REWARD_API_KEY", "s3cret")
        assert ensemble.identity(url) == "0123"
        opened: Any = ensemble.open_model(url)
        with contextlib.closing(opened):
            assert len(opened.score(*ONE)) == 1
        monkeypatch.setenv("ALIGN_REWARD_API_KEY", "an0ther")
        with pytest.raises(UserError, match="environment variable ALIGN_REWARD_API_KEY") as caught:
            ensemble.open_models([url])
        assert "an0ther" not in str(caught.value)
        monkeypatch.delenv("ALIGN_REWARD_API_KEY")
        with pytest.raises(UserError, match="does not accept the key"):
            ensemble.identity(url)


def test_other_weights_at_one_address_are_another_reward(tmp_path: Path) -> None:
    other = 200, json.dumps(info("4567"))
    with answering(INFO, INFO, other) as url:
        reward = Reward({"m": Term("model", 1.0, {"path": url})})
        first, again, third = (origin(reward, tmp_path) for _ in range(3))
    assert first == again != third
    assert third["terms"]["m"]["weights"] == ["4567"]


# the client


def test_remote_scores_are_local_scores(
    server: Process, model: RewardModel, reward_folder: Path
) -> None:
    prompts = [[turn("user", f"Question {number}")] for number in range(150)]
    completions = [[turn("assistant", "wörd " * (number * 7 % 31))] for number in range(150)]
    completions[40] = [turn("assistant", "x" * 2000)]
    tools = [[TOOL] if number % 2 else None for number in range(150)]
    wanted = model.score(prompts, completions, tools)
    with contextlib.closing(
        RemoteModel(server.url + "/", rows=7, expected=identity(str(reward_folder)))
    ) as remote:
        found = remote.score(prompts, completions, tools)
        assert found == pytest.approx(wanted, abs=1e-5, nan_ok=True)
        assert [math.isnan(score) for score in found] == [number == 40 for number in range(150)]
        assert remote.score([], []) == []
        assert remote.max_length == 1024
        remote._bytes = 400  # as a server with a small limit says
        assert remote.score(prompts[:3], completions[:3]) == pytest.approx(
            model.score(prompts[:3], completions[:3]), abs=1e-5
        )
        with pytest.raises(UserError, match=r"row 41 has \d+ bytes, and .* takes 400"):
            remote.score(prompts, completions)
        refused = [*completions[:9], [turn("user", "no")]]
        with pytest.raises(UserError, match="refused: row 10: prompt and completion: turn 2"):
            remote.score(prompts[:10], refused)
        with pytest.raises(UserError, match="row 2 cannot be sent as JSON"):
            remote.score(prompts[:2], [completions[0], [turn("assistant", "\ud800")]])
    with pytest.raises(UserError, match=r"has the weights .*, expected abc"):
        RemoteModel(server.url, expected="abc")


@contextlib.contextmanager
def answering(*replies: tuple[int, str]) -> Iterator[str]:
    """A server that gives these answers, one a connection, the last one again and again; 0 hangs up, -1 is silent."""
    left = list(replies)
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answer() -> None:
            while True:
                try:
                    connection, _ = listener.accept()
                except OSError:
                    return
                with connection:
                    status, text = left.pop(0) if len(left) > 1 else left[0]
                    connection.recv(1 << 20)
                    while status == -1 and connection.recv(1 << 20):
                        pass  # until the client leaves
                    if status > 0:
                        head = f"HTTP/1.1 {status} X\r\nContent-Length: {len(text)}\r\n"
                        connection.sendall(f"{head}Connection: close\r\n\r\n{text}".encode())

        thread = threading.Thread(target=answer)
        thread.start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            listener.shutdown(socket.SHUT_RDWR)
            thread.join()


def info(weights: str = "0123") -> Json:
    model = {"name": "x", "weights": weights, "dtype": "float32", "max_length": 9}
    return {"model": model, "limits": {"max_rows": 8, "max_body_bytes": 1000, "timeout": 0.2}}


def reply(scores: Any, weights: str = "0123") -> tuple[int, str]:
    return 200, json.dumps({"model": info(weights)["model"], "scores": scores, "too_long": 0})


INFO = 200, json.dumps(info())
ONE: Any = ([[turn("user", "a")]], [[turn("assistant", "b")]])


def test_remote_is_patient() -> None:
    busy = 503, '{"error": "full"}'
    with (
        answering(busy, INFO, busy, (0, ""), busy, reply([1.5])) as url,
        contextlib.closing(RemoteModel(url, pause=0.01)) as remote,
    ):
        assert remote.score(*ONE) == [1.5]


def test_remote_sends_less_when_the_server_runs_out_of_time() -> None:
    with (
        answering(INFO, (504, "{}"), reply([1, 2]), (504, "{}"), reply([3]), reply([None])) as url,
        contextlib.closing(RemoteModel(url, connections=1)) as remote,
    ):
        found = remote.score(ONE[0] * 4, ONE[1] * 4)
        assert found == pytest.approx([1, 2, 3, math.nan], nan_ok=True)


def test_remote_waits_for_a_silent_server_as_long_as_that_may_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("reward.remote._SPARE", 0.3)
    with (
        answering(INFO, (-1, ""), reply([1]), reply([2])) as url,
        contextlib.closing(RemoteModel(url, connections=1, retries=0)) as remote,
    ):
        assert remote._client.timeout.read == pytest.approx(0.5)
        assert remote._client.timeout.connect == 120
        assert remote.score(ONE[0] * 2, ONE[1] * 2) == [1, 2]
    with (
        answering(INFO, (-1, "")) as url,
        contextlib.closing(RemoteModel(url)) as remote,
        pytest.raises(UserError, match=r"had no score for row 1 in time \(ReadTimeout"),
    ):
        remote.score(*ONE)


@pytest.mark.parametrize(
    ("answers", "reason"),
    [
        (
            [(200, "<html>")],
            "does not answer as `python -m reward.serve` does: it answered 200: <html>",
        ),
        ([(404, "nothing here")], "it answered 404: nothing here"),
        ([(200, "[]")], "it answered 200"),
        ([(200, "{}")], "/info says no model and limits"),
        ([(503, "{}")], r"cannot be reached: .*attempts: 3"),
        ([(0, "")], "cannot be reached: RemoteProtocolError.*attempts: 3"),
        ([INFO, (503, '{"error": "full"}')], r"cannot be reached: full \(attempts: 3"),
        ([INFO, (500, '{"error": "rows[0]: bad"}')], "refused: row 1: bad"),
        ([INFO, (504, "{}")], "had no score for row 1 in time"),
        ([INFO, reply([1, 2])], "does not hold 1 scores"),
        ([INFO, reply(["1"])], "not every score is a number"),
        ([INFO, reply([True])], "not every score is a number"),
        ([INFO, reply([1.0], weights="4567")], "another model by now: 4567"),
    ],
)
def test_remote_says_what_is_wrong(answers: list[tuple[int, str]], reason: str) -> None:
    with answering(*answers) as url, pytest.raises(UserError, match=reason):  # noqa: SIM117
        with contextlib.closing(RemoteModel(url, retries=2, pause=0.01)) as remote:
            remote.score(*ONE)


def test_a_reward_closes_its_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    closed, close = [], RemoteModel.close
    monkeypatch.setattr(RemoteModel, "close", lambda remote: (closed.append(remote), close(remote)))
    with answering(INFO) as url:
        terms = {
            name: Term("model", 1.0, {"path": path}) for name, path in (("a", url), ("b", [url]))
        }
        with open_reward(Reward(terms)):
            assert not closed
        assert len(closed) == 2
        broken = terms | {"c": Term("model", 1.0, {"path": "./absent"})}
        with pytest.raises(UserError, match="no reward model"):
            open_reward(Reward(broken)).__enter__()
        assert len(closed) == 4


def test_pauses_leave_the_random_numbers_of_the_user_alone() -> None:
    state = random.getstate()
    assert all(2 <= seconds_before(2, 1.0, 0.0) <= 6 for _ in range(20))
    assert seconds_before(0, 0.1, wanted=5.0) == 5
    assert seconds_before(9, 1.0, wanted=0.0) == 60
    assert random.getstate() == state


def test_remote_without_a_server() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(UserError, match=r"cannot be reached: .*attempts: 1"):
        RemoteModel(f"http://user:word@127.0.0.1:{port}")
    for url in ("127.0.0.1:8700", "ftp://x", "http://"):
        with pytest.raises(UserError, match="must be an address such as"):
            RemoteModel(url)
