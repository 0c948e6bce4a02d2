"""What PPO costs: our trainer beside TRL 1.12.0's, by phases.

    pip install --no-deps --target DIR trl==1.12.0
    python scripts/bench_ppo.py --trl DIR --workloads full early uneven --out outputs/bench_ppo

Every run is a process of its own, the two by turns. Both begin with the same weights, see the same prompts, sample with
the same probability of ending and take as many micro-batches of as many rows, in the same environment: what
`python -m align` sets for its workers, such as GLIBC_TUNABLES, is not set. Time is CPU time of `train()`; the least of
the rounds counts, because other work on the machine only adds.
"""

import argparse
import os
import resource
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch: threads that wait let others run

import torch
from bench_contamination import processor
from ppo_peer import END, PAD, UNKNOWN, Case, in_process, models, ours, peer_environment, theirs

from conf.entry import UserError, plainly
from reward.quiet import quiet
from reward.store import read_json, write_json

ARMS = ("ours", "trl")
STEADY = (
    1.1  # an arm's slowest round over its fastest; beyond it the machine was too busy to compare
)


def _prompts(vocabulary: int, shortest: int, longest: int, number: int = 64) -> list[list[int]]:
    """Random prompts, more than are needed: TRL takes other steps at the end of its data."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(shortest, longest + 1, (number,), generator=generator).tolist()
    return [
        torch.randint(UNKNOWN + 1, vocabulary, (length,), generator=generator).tolist()
        for length in lengths
    ]


def workload(name: str, seed: int) -> Case:
    """A case by its name, see `MEANING`."""
    size: dict[str, Any] = {"vocabulary": 32_000, "hidden": 256, "layers": 4}
    shortest, longest = 8, 63
    more: dict[str, Any] = {}
    if name == "early":
        more = {"end_probability": 0.038}  # mean of min(geometric, 64): 24
    elif name == "uneven":
        shortest, longest, more = 8, 256, {"end_probability": 0.038}
    elif name == "logits":
        size = {"vocabulary": 152_000, "hidden": 64, "layers": 2}
    elif name == "one-epoch":
        more = {"epochs": 1}
    prompts = _prompts(size["vocabulary"], shortest, longest)
    return Case(**size, prompts=prompts, response_length=64, seed=seed, **more)


MEANING = {
    "full": "prompts of 8–63 tokens, every response has 64",
    "early": "the same prompts, responses end after about 24 of 64 tokens",
    "uneven": "prompts of 8–256 tokens, responses end after about 24 of 64",
    "logits": "as full, 152k words and a tiny trunk",
    "one-epoch": "as full, one epoch instead of 4",
}


# --- one run, in a process of its own ---


class Clock:
    """CPU seconds by phase; what is called inside a phase counts to it."""

    def __init__(self) -> None:
        self.seconds: Counter[str] = Counter()
        self._is_running = False

    def around(
        self, owner: Any, name: str, phase: str, is_meant: Callable[..., bool] = lambda *_: True
    ) -> None:
        """Count the calls of a function to a phase."""
        inner = getattr(owner, name)

        def timed(*args: Any, **kwargs: Any) -> Any:
            if self._is_running or not is_meant(*args):
                return inner(*args, **kwargs)
            self._is_running, started = True, time.process_time()
            try:
                return inner(*args, **kwargs)
            finally:
                self.seconds[phase] += time.process_time() - started
                self._is_running = False

        setattr(owner, name, timed)


def prepared(arm: str, case: Case, out: str, clock: Clock) -> tuple[Any, list[int]]:
    """A trainer with the clock in it, and a list that gets the length of each response."""
    made, lengths = models(case), []
    if arm == "ours":
        trainer = ours(case, made, out, temperature=case.temperature)
        collector = trainer.collector
        drawn = collector.sampler.sample

        def sample(*args: Any) -> Any:
            found = drawn(*args)
            lengths.extend(len(one.response) for one in found)
            return found

        collector.sampler.sample = sample
        clock.around(collector.sampler, "sample", "generate")
        clock.around(collector, "_judged", "score")
        clock.around(collector, "worths", "score")
        return trainer, lengths
    import trl.experimental.ppo.ppo_trainer as peer

    generate = peer.batch_generation

    def generation(model: Any, queries: Any, *rest: Any) -> Any:
        found = generate(model, queries, *rest)
        lengths.extend(map(_length, found[0][:, queries.shape[1] :].tolist()))
        return found

    peer.batch_generation = generation
    clock.around(peer, "batch_generation", "generate")
    clock.around(peer, "get_reward", "score")
    clock.around(peer, "forward", "score", lambda model, *_: model is made.reference)
    return theirs(case, made, out), lengths


def _length(row: list[int]) -> int:
    """Tokens of a response, its end token among them."""
    return next((i + (t == END) for i, t in enumerate(row) if t in (END, PAD)), len(row))


def cpu_seconds() -> float:
    """Of this process with its children."""
    both = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(one.ru_utime + one.ru_stime for one in both)


def highest_memory() -> float:
    """MB that this process held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def one_run(arm: str, case: Case, out: Path) -> None:
    """Train, and leave the figures."""
    clock = Clock()
    trainer, lengths = prepared(arm, case, str(out / "run"), clock)
    before, started = highest_memory(), cpu_seconds()
    trainer.train()
    total = cpu_seconds() - started
    phases = {name: clock.seconds[name] for name in ("generate", "score")}
    found = phases | {"update": total - sum(phases.values()), "total": total}
    found |= {"tokens": sum(lengths), "responses": len(lengths)}
    write_json(out / "run.json", found | {"memory": highest_memory(), "memory_before": before})


# --- all runs ---


def measured(name: str, given: argparse.Namespace) -> dict[str, list[dict[str, float]]]:
    """The figures of every round of a workload."""
    found: dict[str, list[dict[str, float]]] = {arm: [] for arm in ARMS}
    for number in range(1, given.rounds + 1):
        for arm in ARMS:
            environment = dict(os.environ) if arm == "ours" else peer_environment(given.trl)
            with tempfile.TemporaryDirectory() as scratch:
                options = ["--run", arm, "--workloads", name, "--into", scratch]
                numbers = ["--threads", str(given.threads), "--seed", str(given.seed)]
                in_process([__file__, *options, *numbers], environment)
                figures = read_json(Path(scratch) / "run.json")
            found[arm].append(figures)
            brief = ", ".join(f"{key} {value:.1f}" for key, value in figures.items())
            print(f"{name}, round {number}, {arm}: {brief}", flush=True)
    return found


def table(every: dict[str, dict[str, list[dict[str, float]]]]) -> str:
    """The least of each workload's rounds as Markdown; no ratio where the peer's rounds are far apart."""
    lines = [
        "| workload | | generate s | score s | update s | total s (median) | tokens | tokens/s | MB |",
        "|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, found in every.items():
        for arm in ARMS:
            best = min(found[arm], key=lambda run: run["total"])
            middle = statistics.median(run["total"] for run in found[arm])
            phases = " | ".join(f"{best[key]:.1f}" for key in ("generate", "score", "update"))
            memory = max(run["memory"] for run in found[arm])
            lines.append(
                f"| {name} | {arm} | {phases} | {best['total']:.1f} ({middle:.1f}) | {best['tokens']} | "
                f"{best['tokens'] / best['total']:.0f} | {memory:.0f} |"
            )
        lines.append(f"| {name} | TRL / ours | | | | {_ratio(found)} | | | {_saved(found)} |")
    return "\n".join(lines)


def _ratio(found: dict[str, list[dict[str, float]]]) -> str:
    totals = {arm: [run["total"] for run in found[arm]] for arm in ARMS}
    for arm in ARMS:
        if (spread := max(totals[arm]) / min(totals[arm])) > STEADY:
            return f"unstable: the rounds of {arm} differ by {spread - 1:.0%}"
    return f"**{min(totals['trl']) / min(totals['ours']):.2f}×**"


def _saved(found: dict[str, list[dict[str, float]]]) -> str:
    ours_, theirs_ = (max(run["memory"] for run in found[arm]) for arm in ARMS)
    return f"{ours_ / theirs_:.2f} of TRL's"


def main() -> None:
    """Run the workloads by turns and write the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--trl", type=Path, default=Path("outputs/trl-1.12.0"), help="folder with TRL 1.12.0"
    )
    parser.add_argument(
        "--workloads", nargs="+", choices=MEANING, default=["full", "early", "uneven"]
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("outputs/bench_ppo"))
    parser.add_argument("--run", choices=ARMS, help=argparse.SUPPRESS)
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    quiet()
    torch.set_num_threads(given.threads)
    if given.run:
        return one_run(given.run, workload(given.workloads[0], given.seed), given.into)
    with plainly():
        if given.rounds < 1:
            raise UserError(f"--rounds {given.rounds} must be at least 1")
        peer_environment(given.trl)
        machine = f"{processor()}, torch {torch.__version__}, threads {given.threads}, float32"
        print(machine, flush=True)
        every = {name: measured(name, given) for name in given.workloads}
        given.out.mkdir(parents=True, exist_ok=True)
        written = f"{machine}; CPU seconds of 3 rollouts, the least of {given.rounds} rounds\n\n{table(every)}\n"
        (given.out / "table.md").write_text(written, encoding="utf-8")
        write_json(
            given.out / "runs.json", {"machine": machine, "command": sys.argv, "runs": every}
        )
        print(written)
    return None


if __name__ == "__main__":
    main()
