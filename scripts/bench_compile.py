"""What `torch_compile` gains where a layer is compiled by itself: forward and backward seconds of batches of pairs.

python scripts/bench_compile.py MODEL hh_harmless.test.jsonl.gz --prompt prompt --options chosen,rejected

Both copies of the model read the same pairs with common prompts once, in bfloat16 by autocast, by turns; each batch
counts by its least round. The losses of both must agree within --within.
"""

import argparse
import time
from typing import Any

from bench_scoring import Question, asking, questions

from conf.entry import UserError, plainly


def step(model: Any, scorer: Any, batch: list[Question]) -> tuple[float, float]:
    """CPU seconds of a forward and backward pass, and the mean log-probability of a token."""
    import torch

    prompts, completions = [list(part) for part in zip(*batch, strict=True)]
    started = time.process_time()
    with torch.autocast(model.device.type, dtype=torch.bfloat16):
        found = scorer.log_probs(prompts, completions)
        mean = torch.cat([each for options in found for each in options]).mean()
    mean.backward()
    took = time.process_time() - started
    model.zero_grad()
    return took, float(mean.detach())


def compare(given: argparse.Namespace) -> None:
    """Time each batch on both copies by turns."""
    import torch
    from accelerate.utils import compile_regions_deepspeed
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evals.scoring import Scorer

    asked = questions(given, AutoTokenizer.from_pretrained(given.model))
    batches = [asked[first : first + given.batch] for first in range(0, len(asked), given.batch)]
    arms = {}
    for name in ("as it is", "compiled"):
        model = AutoModelForCausalLM.from_pretrained(given.model, dtype=torch.float32).train()
        if name == "compiled":
            compile_regions_deepspeed(model, dynamic=True)
        arms[name] = model, Scorer(model, tokens=None)
    least: dict[str, list[float]] = {}
    for number in range(given.rounds + 1):
        for name, (model, scorer) in arms.items():
            steps = [step(model, scorer, batch) for batch in batches]
            if number == 0:
                told = sum(seconds for seconds, _ in steps)
                print(f"{name}: {told:.1f} CPU s at first", flush=True)
                continue
            seconds = [took for took, _ in steps]
            least[name] = [
                min(pair) for pair in zip(seconds, least.get(name, seconds), strict=True)
            ]
            print(f"round {number}, {name}: {' '.join(f'{each:.2f}' for each in seconds)} CPU s")
            if name == "as it is":
                usual = steps
            elif any(
                abs(a - b) > given.within for (_, a), (_, b) in zip(usual, steps, strict=True)
            ):
                raise UserError("the two do not give the same log-probabilities")
    own, compiled = (sum(each) for each in least.values())
    print(f"{own:.2f} as it is, {compiled:.2f} compiled: {own / compiled:.2f} times as fast")


def main() -> None:
    parser = asking(__doc__)
    parser.set_defaults(limit=24)
    parser.add_argument("--batch", type=int, default=8, help="pairs")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--within", type=float, default=0.02, help="nats a token")
    with plainly():
        compare(parser.parse_args())


if __name__ == "__main__":
    main()
