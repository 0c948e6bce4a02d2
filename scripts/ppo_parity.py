"""How far a vLLM server's log-probabilities are from the trainer's, before a long run is given to it.

python scripts/ppo_parity.py MODEL http://127.0.0.1:8000 --dtype bfloat16 --temperature 0.7
"""

import argparse
import contextlib
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import AutoModelForCausalLM, AutoTokenizer

from align.ppo import parity
from align.ppo.batches import pack
from align.ppo.config import PPOConfig
from align.ppo.model import token_logp
from align.ppo.sampling import open_sampler
from conf.entry import plainly

QUESTIONS = ["What is a tide?", "Name three rivers.", "Why is the sky blue?", "Tell me of Ada."]


def main() -> None:
    """Hand a model over, draw four responses, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("url")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--tokens", type=int, default=32)
    with plainly():
        compare(parser.parse_args())


def compare(asked: argparse.Namespace) -> None:
    """Print a response of the server and how far its numbers are off."""
    tokenizer = AutoTokenizer.from_pretrained(asked.model)
    policy = AutoModelForCausalLM.from_pretrained(asked.model, dtype=asked.dtype).eval()
    prompts = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in QUESTIONS
    ]
    with tempfile.TemporaryDirectory() as folder:
        args = PPOConfig(
            output_dir=str(Path(folder)),
            engine="vllm",
            vllm_url=asked.url,
            temperature=asked.temperature,
            max_prompt_length=max(map(len, prompts)),
            max_new_tokens=asked.tokens,
            use_cpu=not torch.cuda.is_available(),
        )
        policy.to(args.device)
        sampler = open_sampler(policy, tokenizer, args, Accelerator(), contextlib.nullcontext)
        sampler.sync()
        samples = sampler.sample(prompts, range(len(prompts)))
        sampler.close()
    logp = []
    for sample in samples:
        batch = pack([sample], 0, args.device)
        with torch.no_grad():
            said, _ = token_logp(policy, batch.ids, batch.rows, batch.cols, asked.temperature)
        logp.append(said.tolist())
    print(tokenizer.decode(samples[0].response))
    found = parity.gap(samples, logp)
    print(f"{found}; training is refused when the mean is above {args.sampler_tolerance}")


if __name__ == "__main__":
    main()
