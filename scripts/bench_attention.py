"""What attention of trees costs on a CPU in bfloat16: our products beside PyTorch's kernel, block by block.

    python scripts/bench_attention.py [--heads 9 --keys 3 --width 64]

One layer, forward and backward, on one thread: CPU milliseconds, the least of some repeats, and the error of the result
and of the gradients (queries, keys, values) against float32. The default heads are SmolLM2-135M's.
"""

import argparse
import time
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from evals import cpuattention
from evals.treeattention import _Blocks
from evals.trees import Row, pack

# Tokens of a prompt, tokens of each of its two answers, prompts.
SHAPES = ((30, 150, 8), (150, 60, 8), (300, 40, 4), (8, 400, 2))


def row(prompt: int, answer: int, number: int) -> Row:
    """Pairs of answers to prompts that have nothing in common."""
    tokens = np.random.default_rng(0).integers(0, 40_000, (number, prompt + 2 * answer))
    pairs = [np.split(each, [prompt, prompt + answer]) for each in tokens]
    (packed,) = pack([np.concatenate([p, a]) for p, *both in pairs for a in both], tokens.size)
    return packed


def once(tree: _Blocks, given: list[Tensor], gradient: Tensor) -> tuple[list[float], list[Tensor]]:
    """CPU seconds forward and backward; the result and the gradients."""
    inputs = [each.clone().requires_grad_() for each in given]
    times = [time.process_time()]
    found = tree.attend(*inputs, None, 0.0)
    times.append(time.process_time())
    gradients = torch.autograd.grad(found, inputs, gradient)
    times.append(time.process_time())
    return np.diff(times).tolist(), [found.detach(), *gradients]


def main() -> None:
    """Print a line for each shape and each way."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    for name, default in (("heads", 9), ("keys", 3), ("width", 64), ("repeats", 5)):
        parser.add_argument(f"--{name}", type=int, default=default)
    said = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    print(f"{'prompt + answers':<20}{'way':<10}{'forward':>9}{'backward':>10} ms   errors")
    for prompt, answer, number in SHAPES:
        packed = row(prompt, answer, number)
        shapes = [(1, heads, len(packed.ids), said.width) for heads in (said.heads, said.keys)]
        query, key, value, gradient = (2 * torch.randn(shapes[n]) for n in (0, 1, 1, 0))
        tree = _Blocks(packed, torch.device("cpu"))
        _, truth = once(tree, [query, key, value], gradient)
        half = [each.to(torch.bfloat16) for each in (query, key, value)]
        for way, is_ours in (("kernel", False), ("products", True)):
            with mock.patch.object(cpuattention, "is_meant", lambda *_, ours=is_ours: ours):
                runs = [once(tree, half, gradient.bfloat16()) for _ in range(said.repeats)]
            least = np.min([seconds for seconds, _ in runs], axis=0) * 1e3
            pairs = zip(runs[0][1], truth, strict=True)
            errors = [float((one.float() - true).norm() / true.norm()) for one, true in pairs]
            what = f"{number} × ({prompt} + 2 × {answer})"
            print(f"{what:<20}{way:<10}{least[0]:>9.1f}{least[1]:>10.1f}      ", end="")
            print(*(f"{error:.4f}" for error in errors), sep="  ")


if __name__ == "__main__":
    main()
