"""What scoring options costs beside lm-eval's Hugging Face backend: tokens read, states through the head, seconds.

python scripts/bench_scoring.py MODEL hellaswag.jsonl.gz --prompt ctx --options endings --limit 32
python scripts/bench_scoring.py MODEL preferences.jsonl.gz --prompt prompt --options chosen,rejected --limit 32
python scripts/bench_scoring.py MODEL hellaswag.jsonl.gz --prompt ctx --options endings --limit 32 --shots 5

Both score the same token ids with the same weights in one process, by turns; the least time of the rounds counts.
The log-likelihoods must agree within 1e-5 of their size in float32 (--within).
"""

import argparse
import contextlib
import gzip
import json
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch: threads that wait let others run

from conf.entry import UserError, plainly

Question = tuple[list[int], list[list[int]]]


def text_of(value: Any) -> str:
    """A text, or what the turns of a conversation say."""
    if isinstance(value, str):
        return value
    return "\n\n".join(turn["content"] for turn in value)


def questions(given: argparse.Namespace, tokenizer: Any) -> list[Question]:
    """The file's first rows as token ids, behind a preamble of solved rows."""
    opened = gzip.open if given.data.endswith(".gz") else open
    with opened(given.data, "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    fields = given.options.split(",")
    found = []
    for row in rows[: given.limit + given.shots]:
        values = [
            option
            for field in fields
            for option in (row[field] if len(fields) == 1 else [row[field]])
        ]
        found.append((text_of(row[given.prompt]), [text_of(value) for value in values]))
    preamble = "".join(f"{prompt} {options[0]}\n\n" for prompt, options in found[: given.shots])
    return [
        (
            tokenizer(preamble + prompt)["input_ids"],
            [tokenizer(f" {option}", add_special_tokens=False)["input_ids"] for option in options],
        )
        for prompt, options in found[given.shots :]
    ]


@contextlib.contextmanager
def counted(model: Any, counts: Counter[str]) -> Iterator[None]:
    """Count the tokens that a model reads, and the states that its head sees."""
    from evals import lmhead

    def reads(_: Any, inputs: Any, output: Any) -> None:
        counts["tokens"] += inputs[0].numel()

    def heads(_: Any, inputs: Any, output: Any) -> None:
        counts["states"] += output.numel() // output.shape[-1]

    by_head = lmhead.by_head

    def ours(head: Any, shaping: Any, states: Any, wanted: Any) -> Any:
        counts["states"] += len(states)
        return by_head(head, shaping, states, wanted)

    lmhead.by_head = ours
    hooks = [
        model.get_input_embeddings().register_forward_hook(reads),
        model.get_output_embeddings().register_forward_hook(heads),
    ]
    try:
        yield
    finally:
        lmhead.by_head = by_head
        for hook in hooks:
            hook.remove()


def arms(
    given: argparse.Namespace, asked: list[Question]
) -> tuple[Any, dict[str, Callable[[], list[float]]]]:
    """The model and both ways to score it."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from evals.scoring import Scorer

    lm = HFLM(
        pretrained=given.model,
        dtype=given.dtype,
        softmax_dtype="float32",
        batch_size=given.batch_size,
        device="cpu",
        tokenizer=AutoTokenizer.from_pretrained(given.model),
    )
    requests = [
        ((f"{number}", f"{option}"), prompt, ids)
        for number, (prompt, options) in enumerate(asked)
        for option, ids in enumerate(options)
    ]
    scorer = Scorer(lm.model, tokens=given.tokens)
    prompts, completions = [list(part) for part in zip(*asked, strict=True)]

    def theirs() -> list[float]:
        return [value for value, _ in lm._loglikelihood_tokens(requests, disable_tqdm=True)]

    def ours() -> list[float]:
        return [each.sum for options in scorer.score(prompts, completions) for each in options]

    scorer.score(prompts[:1], completions[:1])  # looks at the model
    return lm.model, {"ours": ours, "lm-eval": theirs}


def compare(
    given: argparse.Namespace, model: Any, work: dict[str, Callable[[], list[float]]]
) -> None:
    """Count once, then time both by turns."""
    found, walls, cpus = {}, {name: [] for name in work}, {name: [] for name in work}
    for number in range(given.rounds + 1):
        for name, score in work.items():
            counts: Counter[str] = Counter()
            wall, cpu = time.perf_counter(), time.process_time()
            with counted(model, counts) if number == 0 else contextlib.nullcontext():
                found[name] = score()
            if number == 0:
                print(
                    f"{name}: {counts['tokens']} tokens read, {counts['states']} states through the head"
                )
                continue
            walls[name].append(time.perf_counter() - wall)
            cpus[name].append(time.process_time() - cpu)
            print(
                f"round {number}, {name}: {walls[name][-1]:.2f} s, {cpus[name][-1]:.2f} CPU s",
                flush=True,
            )
    pairs = list(zip(*found.values(), strict=True))
    gap = max(abs(one - other) for one, other in pairs)
    relative = max(abs(one - other) / abs(other) for one, other in pairs)
    if relative > given.within:
        raise UserError(f"the log-likelihoods differ by {relative:.1e} of their size")
    ratios = [min(times["lm-eval"]) / min(times["ours"]) for times in (walls, cpus) if given.rounds]
    if ratios:
        print(f"ratio: {ratios[0]:.2f} by wall time, {ratios[1]:.2f} by CPU time")
    print(f"largest gap: {gap:.1e} nats, {relative:.1e} of the size")


def asking(description: str | None) -> argparse.ArgumentParser:
    """Arguments that say what `questions` reads."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("data")
    parser.add_argument("--prompt", required=True, help="the field of the prompt")
    parser.add_argument(
        "--options", required=True, help="the field of a list, or several fields with commas"
    )
    parser.add_argument("--limit", type=int, default=32)
    parser.add_argument("--shots", type=int, default=0)
    return parser


def main() -> None:
    parser = asking(__doc__)
    parser.add_argument("--tokens", type=int, default=2048, help="ours: tokens read at once")
    parser.add_argument("--batch-size", type=int, default=8, help="lm-eval: sequences read at once")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3, help="0: only count")
    parser.add_argument("--within", type=float, default=1e-5)
    given = parser.parse_args()
    with plainly():
        from transformers import AutoTokenizer

        asked = questions(given, AutoTokenizer.from_pretrained(given.model))
        compare(given, *arms(given, asked))


if __name__ == "__main__":
    main()
