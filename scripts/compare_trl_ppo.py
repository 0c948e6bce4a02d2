"""The same weights from our PPO and from TRL 1.12.0's, step by step.

    pip install --no-deps --target DIR trl==1.12.0
    python scripts/compare_trl_ppo.py --trl DIR

Both train the same tiny models on the same recorded responses, 3 rollouts of 4 epochs. The responses have full length:
of those that end earlier TRL puts the score one token too late (trl#1893). TRL's code runs as it is; only what would be
drawn comes from the record.
"""

import argparse
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from ppo_peer import END, UNKNOWN, Case, in_process, models, ours, peer_environment, theirs
from torch import Tensor

from align.ppo import core
from align.ppo.batches import Sample
from conf.entry import UserError, plainly
from reward.quiet import quiet

LIMIT = 1e-6  # of the difference of any weight
RATES = {"sgd": 0.1, "adamw_torch": 1e-3}
VOCABULARY, LENGTH = 24, 8


def case_of(optimizer: str) -> Case:
    """Tiny models, and prompts of 3 to 8 tokens."""
    generator = torch.Generator().manual_seed(1)
    prompts: dict[tuple[int, ...], None] = {}
    while len(prompts) < 64:
        length = int(torch.randint(3, 9, (1,), generator=generator))
        prompts[tuple(_words(length, generator))] = None
    return Case(
        VOCABULARY, 16, 2, [list(ids) for ids in prompts], LENGTH,
        rollout_size=8, micro_rows=2, learning_rate=RATES[optimizer], optimizer=optimizer, temperature=0.7,
    )  # fmt: skip


def _words(length: int, generator: torch.Generator) -> list[int]:
    return torch.randint(UNKNOWN + 1, VOCABULARY, (length,), generator=generator).tolist()


def response_to(prompt: Sequence[int], is_ended: bool) -> list[int]:
    """What is recorded after a prompt: of full length, or ended by its end token, at the latest in the last place."""
    generator = torch.Generator().manual_seed(sum(23**i * token for i, token in enumerate(prompt)))
    words = _words(LENGTH, generator)
    return [*words[: sum(prompt) % LENGTH], END] if is_ended else words


class Recorded:
    """A sampler that reads."""

    def __init__(self, is_ended: bool) -> None:
        self._is_ended = is_ended

    def sync(self) -> None:
        """Nothing to do."""

    def sample(self, prompts: Sequence[list[int]], seeds: Sequence[int]) -> list[Sample]:
        """The recorded responses."""
        return [Sample(ids, response_to(ids, self._is_ended), self._is_ended) for ids in prompts]

    def close(self) -> None:
        """Nothing to give back."""


def with_bessel() -> AbstractContextManager[Any]:
    """Our whitening with the variance of a sample, as TRL has it, instead of the population's."""
    population = core.whiten

    def whiten(x: Tensor, mask: Tensor) -> Tensor:
        number = mask.sum()
        return population(x, mask) * ((number - 1) / number).sqrt()

    return mock.patch.object(core, "whiten", whiten)


# --- in the peer's process ---


def run_peer(case: Case, is_ended: bool, out: Path) -> None:
    """Train with TRL; leave the weights, and the first advantages before they are whitened."""
    import trl.experimental.ppo.ppo_trainer as peer
    from safetensors.torch import save_file

    advantages: list[Tensor] = []

    def recorded(model: Any, queries: Tensor, _: int, pad: int, __: Any) -> tuple[Tensor, Tensor]:
        prompts = [[token for token in row if token != pad] for row in queries.tolist()]
        rows = [response_to(ids, is_ended) for ids in prompts]
        said = torch.tensor([row + [pad] * (LENGTH - len(row)) for row in rows])
        both = torch.cat([queries, said], dim=1)
        logits = peer.forward(model, both, pad).logits[:, queries.shape[1] - 1 : -1]
        return both, logits / (case.temperature + 1e-7)

    whiten = peer.masked_whiten

    def noted(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
        advantages.append(torch.where(mask, values, 0.0))
        return whiten(values, mask, shift_mean)

    made = models(case)
    with (
        mock.patch.object(peer, "batch_generation", recorded),
        mock.patch.object(peer, "masked_whiten", noted),
    ):
        theirs(case, made, str(out / "run")).train()
    found = weights_of(made.policy, made.value)
    save_file(found | {"advantages": advantages[0]}, out / "peer.safetensors")


def weights_of(policy: Any, value: Any) -> dict[str, Tensor]:
    """All parameters of each model in one vector."""
    return {
        name: torch.cat([p.detach().flatten() for _, p in sorted(model.named_parameters())])
        for name, model in (("policy", policy), ("value", value))
    }


# --- ours ---


def run_ours(case: Case, out: str) -> dict[str, Tensor]:
    """The weights after training."""
    made = models(case)
    trainer = ours(case, made, out)
    trainer.collector.sampler = Recorded(is_ended=False)
    with with_bessel():
        trainer.train()
    return weights_of(made.policy, made.value)


def peers(optimizer: str, is_ended: bool, folder: Path, out: Path) -> dict[str, Tensor]:
    """What TRL made of a case."""
    from safetensors.torch import load_file

    out.mkdir()
    ending = ["--ended"] if is_ended else []
    in_process(
        [__file__, "--peer", optimizer, "--into", str(out), *ending], peer_environment(folder)
    )
    return load_file(out / "peer.safetensors")


def compare(optimizer: str, folder: Path, out: Path) -> dict[str, Tensor]:
    """Train both, print how far apart they end, and return TRL's weights.

    Raises:
        UserError: when they differ.
    """
    peer, case = peers(optimizer, False, folder, out), case_of(optimizer)
    start = models(case)
    before = weights_of(start.policy, start.value)
    own = run_ours(case, str(out / "ours"))
    for name in own:
        off, moved = (float((peer[name] - x[name]).abs().max()) for x in (own, before))
        print(
            f"{optimizer:12} {name:7} differs by {off:.1e} at most, moved by {moved:.1e}",
            flush=True,
        )
        if not off <= LIMIT:
            raise UserError(
                f"{optimizer}: the {name} differs from TRL's by {off:.1e}, more than {LIMIT:g}"
            )
    return {f"{optimizer}.{name}": peer[name] for name in own}


def golden(found: dict[str, Tensor], ended: dict[str, Tensor], path: Path) -> None:
    """Keep TRL's numbers where they can be compared without it."""
    from safetensors.torch import save_file

    save_file(found | {"ended.advantages": ended["advantages"]}, path)
    print(f"{path}: {path.stat().st_size:,} bytes")


def main() -> None:
    """Compare with both optimizers."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trl", type=Path, default=Path("outputs/trl-1.12.0"), help="folder with TRL 1.12.0"
    )
    parser.add_argument("--golden", type=Path, help="write TRL's numbers here, for the tests")
    parser.add_argument("--peer", choices=RATES, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ended", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    if given.peer:
        return run_peer(case_of(given.peer), given.ended, given.into)
    with plainly(), tempfile.TemporaryDirectory() as scratch:
        found: dict[str, Tensor] = {}
        for optimizer in RATES:
            found |= compare(optimizer, given.trl, Path(scratch) / optimizer)
        if given.golden:
            ended = peers("sgd", True, given.trl, Path(scratch) / "ended")
            golden(found, ended, given.golden)
    return None


if __name__ == "__main__":
    main()
