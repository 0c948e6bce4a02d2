"""Requests a second and latency of the scoring server, rows of many requests together against one at a time.

python scripts/bench_serve.py [--model PATH]
"""

import argparse
import asyncio
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import numpy as np
from bench_duplicates import processor

_WORDS = (  # noqa: SIM905
    "the model says that a long answer is not always a better one and we ask why it is so"
).split()
_ONE_ROW = 1  # batch_tokens: a longer row is scored alone


def random_model(folder: Path) -> None:
    """A reward model of SmolLM2-135M's shape with random weights, and a tokenizer of bytes."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForSequenceClassification, PreTrainedTokenizerFast

    tokens = ["<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(
        models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=[])
    )
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    )
    PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<|im_end|>", chat_template=template
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        num_labels=1,
        pad_token_id=1,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)


def row(number: int) -> dict[str, str]:
    """A short question with an answer of a few words; no two are equal."""
    rng = np.random.default_rng(number)
    return {
        "prompt": f"Question {number}?",
        "completion": " ".join(rng.choice(_WORDS, rng.integers(2, 10))),
    }


async def load(url: str, concurrent: int, seconds: float) -> tuple[float, list[float]]:
    """Ask for one row a request, `concurrent` at a time.

    Returns:
        Requests a second, and the seconds that each took.
    """
    taken: list[float] = []
    numbers = iter(range(10**9))
    start = time.perf_counter()

    async def ask(client: httpx.AsyncClient) -> None:
        while time.perf_counter() - start < seconds:
            began = time.perf_counter()
            reply = await client.post(f"{url}/score", json={"rows": [row(next(numbers))]})
            reply.raise_for_status()
            taken.append(time.perf_counter() - began)

    limits = httpx.Limits(max_connections=concurrent)
    async with httpx.AsyncClient(timeout=300, limits=limits) as client:
        await asyncio.gather(*(ask(client) for _ in range(concurrent)))
    return len(taken) / (time.perf_counter() - start), taken


def measure(model: str, batch_tokens: int, counts: list[int], seconds: float) -> list[list[float]]:
    """Requests a second, p50 and p95 in milliseconds, for each number of concurrent requests."""
    command = [sys.executable, "-m", "reward.serve", f"model.path={model}", "port=0", "timeout=300"]
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen([*command, f"model.batch_tokens={batch_tokens}"], stderr=log)
        try:
            while "INFO ready" not in (text := _read(log)):
                if server.poll() is not None:
                    sys.exit(text)
                time.sleep(0.2)
            found = re.search(r"listening on (\S+)", text)
            assert found
            asyncio.run(load(found[1], 4, 3))  # the first forward passes allocate memory
            figures = []
            for count in counts:
                rate, taken = asyncio.run(load(found[1], count, seconds))
                figures.append([rate, *(1000 * np.quantile(taken, [0.5, 0.95]))])
            return figures
        finally:
            server.terminate()
            server.wait()


def _read(log: "tempfile._TemporaryFileWrapper[str]") -> str:
    return os.pread(log.fileno(), 1 << 16, 0).decode()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="reward model; default: SmolLM2-135M's shape, at random")
    parser.add_argument("--batch-tokens", type=int, default=4096)
    parser.add_argument("--concurrent", type=int, nargs="+", default=[1, 16, 200])
    parser.add_argument("--seconds", type=float, default=20, help="for each figure")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.model is None:
            random_model(Path(folder))
        model = options.model or folder
        one, many = (
            measure(model, tokens, options.concurrent, options.seconds)
            for tokens in (_ONE_ROW, options.batch_tokens)
        )
    print(f"{processor()}, {os.cpu_count()} cores, {os.getloadavg()[0]:.1f} processes running")
    print("| requests at once | one row a batch: requests/s | p50 ms | p95 ms ", end="")
    print("| together: requests/s | p50 ms | p95 ms | ratio |")
    print("| --: " * 8 + "|")
    for count, alone, together in zip(options.concurrent, one, many, strict=True):
        cells = [f"{alone[0]:.1f}", f"{alone[1]:,.0f}", f"{alone[2]:,.0f}"]
        cells += [f"{together[0]:.1f}", f"{together[1]:,.0f}", f"{together[2]:,.0f}"]
        print(f"| {count} | {' | '.join(cells)} | {together[0] / alone[0]:.1f} |")


if __name__ == "__main__":
    main()
