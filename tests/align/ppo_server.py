"""A small server that speaks as vLLM does, over a model of transformers; and ways for it to fail."""

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any

import torch

from align.ppo.batches import Sample, pack
from align.ppo.model import token_logp
from align.ppo.sampling import GenerateSampler

CONTEXT = 64


class Server(ThreadingHTTPServer):
    """Completions of a model folder; loads another when it is told to.

    `fault` names what goes wrong, see `Handler`.
    """

    daemon_threads = True

    def __init__(self, model: Path, tokenizer: Any) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.fault = ""
        self.loads = 0
        self.asked: list[dict[str, Any]] = []
        self.lock = Lock()
        self.tokenizer = tokenizer
        self.load(model)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def load(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    def drawn(self, asked: dict[str, Any]) -> tuple[Sample, list[float]]:
        """A response with its log-probabilities, by the model that was loaded last."""
        self.model.generation_config.eos_token_id = asked["stop_token_ids"]
        temperature = asked["temperature"]
        limits = temperature, asked["max_tokens"], 1
        sampler = GenerateSampler(self.model, self.tokenizer, *limits, nullcontext)
        sample = sampler.sample([asked["prompt"]], [asked["seed"]])[0]
        batch = pack([sample], 0)
        scale = 1.0 if self.fault == "raw" else temperature
        with torch.no_grad():
            logp, _ = token_logp(self.model, batch.ids, batch.rows, batch.cols, scale)
        return sample, logp.tolist()


class Handler(BaseHTTPRequestHandler):
    """The four addresses that the engine asks."""

    server: Server

    def do_GET(self) -> None:
        if self.server.fault == "another program":
            self._say(200, b"<html>")
            return
        models = {"data": [{"id": "toy", "parent": None, "max_model_len": CONTEXT}]}
        self._say(200, models)

    def do_POST(self) -> None:
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            if self.path == "/v1/completions":
                self._say(*self._completed(body))
            elif server.fault == "no development mode":
                self._say(404, {"detail": "Not Found"})
            elif self.path == "/collective_rpc":
                self._say(*self._loaded(body))
            else:
                self._say(200, {"success": True})

    def _loaded(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        server = self.server
        if server.fault == "blind":
            return 500, {"error": {"message": "Worker failed with error: no such folder"}}
        assert body["method"] == "reload_weights"
        server.loads += 1
        if server.fault != "stale":
            server.load(Path(body["kwargs"]["weights_path"]))
        return 200, {"results": [None]}

    def _completed(self, asked: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        server = self.server
        server.asked.append(asked)
        if server.fault == "refused":
            return 400, {"error": {"message": "Token id 70 is out of vocabulary"}}
        if server.fault == "slow":
            time.sleep(1)
        sample, logp = server.drawn(asked)
        choice = {
            "token_ids": sample.response,
            "prompt_token_ids": asked["prompt"],
            "finish_reason": "stop" if sample.is_ended else "length",
            "logprobs": {"token_logprobs": logp},
        }
        if server.fault == "short":
            choice |= {"token_ids": sample.response[:1], "logprobs": {"token_logprobs": logp[:1]}}
            choice["finish_reason"] = "length"
        if server.fault == "no ids":
            del choice["token_ids"]
        if server.fault == "another prompt":
            choice["prompt_token_ids"] = asked["prompt"][1:]
        return 200, {"choices": [choice]}

    def _say(self, status: int, body: Any) -> None:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        with suppress(ConnectionError):  # the one that asked had no time
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@contextmanager
def serving(model: Path, tokenizer: Any) -> Iterator[Server]:
    """A server in a thread of its own."""
    server = Server(model, tokenizer)
    thread = Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
