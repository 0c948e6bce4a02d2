"""Training beside TRL's command line: the same rows, the same start, the same TRL arguments."""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import inputs
from counting import Shape, Tokens, flops, tokens
from running import ARMS, Argv, Run, apart, has_gpu, matmul, program
from table import Goal, Measure

SEED = 42  # the Trainer's default: of the order of the rows
BATCH = 8
# How far the losses of the two sides may be apart. Weights are float32 and products bfloat16, whose rounding (2⁻⁹ of a
# value) depends on how rows are laid out: a sum of log-probabilities moves by about half a nat, times β in the loss.
LOSS_TOLERANCE = {"bfloat16": 0.03, "float32": 0.002}
BETA = 0.1  # TRL's default, to which the tolerance belongs; it grows with a larger one
LOGGED = 3  # losses compared; later ones also tell of steps that rounding has driven apart

_STAGES = {"dpo": "dpo", "reward": "rm", "sft": "sft"}  # TRL's command → our stage
_COMMON = {
    "num_train_epochs": 1,
    "logging_steps": 1,
    "per_device_train_batch_size": BATCH,
}


@dataclass(frozen=True)
class Training:
    """A comparison of training runs."""

    meaning: str
    command: str  # of TRL
    goals: tuple[Goal, ...]
    peer: dict[str, Any] = field(default_factory=dict)  # the peer's further arguments
    both: dict[str, Any] = field(default_factory=dict)
    source: str = "preferences"  # which of the data sets
    rows: int = 24
    sweep: tuple[float, ...] = ()  # values of β, a training run each
    tolerance: float = 1  # of losses, in those of LOSS_TOLERANCE
    dtype: str = "bfloat16"  # of products

    @property
    def stage(self) -> str:
        """Our name of the stage."""
        return _STAGES[self.command]

    def prepare(self, data: dict[str, str], model: Path, number: int, out: Path) -> "Prepared":
        """Write what both sides read."""
        kind = "sft" if self.command == "sft" else "preference"
        longest = self.both.get("max_length", 1024)
        rows = apart(inputs.training_rows, data[self.source], kind, model, longest, number, out)
        start = apart(inputs.reward_start, model, out) if self.command == "reward" else model
        return Prepared(self, start, rows, apart(inputs.shape, model))


@dataclass(frozen=True)
class Prepared:
    """A comparison whose inputs are on disk."""

    workload: Training
    model: Path
    rows: Path  # folder with train.jsonl
    shape: Shape

    def commands(self, arm: str, scratch: Path) -> list[Argv]:
        """The command lines of one side, which write to `scratch`."""
        if arm == "ours":
            return [self._ours(scratch)]
        betas = self.workload.sweep
        if not betas:
            return [self._peer(scratch, {})]
        return [self._peer(scratch, {"beta": beta}) for beta in betas]

    def _both(self) -> dict[str, Any]:
        return _COMMON | {"bf16": self.workload.dtype == "bfloat16"} | self.workload.both

    def _peer(self, scratch: Path, further: dict[str, Any]) -> Argv:
        options = self._both() | {"seed": SEED} | self.workload.peer | further
        folder = scratch / f"trained{further.get('beta', '')}"
        options |= {
            "model_name_or_path": self.model,
            "dataset_name": self.rows,
            "output_dir": folder,
        }
        options |= {"report_to": "none"} | ({} if has_gpu() else {"use_cpu": True})
        return [program("trl"), self.workload.command, *(f"--{k}={v}" for k, v in options.items())]

    def _ours(self, scratch: Path) -> Argv:
        stage = self.workload.stage
        args = self._both() | {"gradient_checkpointing": False}
        argv = [sys.executable, "-m", "align", "name=bench", f"stages=[{stage}]", f"seed={SEED}"]
        argv += [f"model.path={self.model}", f"{stage}.data.source={self.rows / 'train.jsonl'}"]
        argv += [
            f"{stage}.data.max_bad_fraction=1",
            "track.wandb=false",
            f"paths.root={scratch / 'outputs'}",
        ]
        argv += [f"+{stage}.args.{name}={str(value).lower()}" for name, value in args.items()]
        if self.workload.sweep:
            argv += ["-m", f"+dpo.args.beta={','.join(map(str, self.workload.sweep))}"]
        return argv

    def collect(self, arm: str, scratch: Path, run: Run) -> None:
        """Nothing beside the clock's rows."""

    def problems(self, runs: dict[str, list[Run]]) -> list[str]:
        """Why the two sides are not comparable."""
        peer, ours = (runs[arm][0] for arm in ARMS)
        found = [*threads_differ(peer, ours), *_batches(peer, ours)]
        losses = [[_losses(one) for one in run.by_process("loss")] for run in (peer, ours)]
        counts = [list(map(len, each)) for each in losses]
        if counts[0] != counts[1] or not counts[0]:
            return [*found, f"the peer logged {counts[0]} losses a training run, ours {counts[1]}"]
        for number, (theirs, own) in enumerate(zip(*losses, strict=True)):
            beta = self.workload.sweep[number] if self.workload.sweep else BETA
            where = f"β = {beta:g}, " if self.workload.sweep else ""
            within = LOSS_TOLERANCE[self.workload.dtype] * self.workload.tolerance
            within *= max(1, beta / BETA)
            found += _apart(theirs, own, where, within)
            if self.workload.command == "dpo":
                found += _no_start({"the peer": theirs[0], "ours": own[0]}, where, within)
        return found

    def measures(self, runs: dict[str, list[Run]]) -> list[Measure]:
        """Steps after the first, whole processes, memory, reference passes."""
        found = []
        for clock, unit in SECONDS.items():
            totals = figures(runs, lambda run, clock=clock: sum(_later(run, clock)))
            if all(map(min, totals)):
                best = (least(runs["peer"], clock), least(runs["ours"], clock))
                found.append(Measure(f"steps after the first, {unit}", *totals, best=best))
        epochs = int(self._both()["num_train_epochs"])
        return [*found, *whole(runs), *_references(runs, epochs)]

    def notes(self, runs: dict[str, list[Run]], threads: int) -> list[str]:
        """Token statistics, and how much of the machine the steps used."""
        steps = self._counted(runs["peer"][0])
        if not steps:
            return ["The peer's batches could not be read: no token statistics."]
        every = sum(steps[1:], steps[0])
        said = [f"Tokens a row: {every.a_row()}."]
        rows = every.rows * len(runs["peer"][0].by_process("step"))
        read = [sum(step["read"] for step in runs[arm][0].of("step")) / rows for arm in ARMS]
        said.append(
            f"Read with gradients, a row: {read[0]:.0f} by the peer, {read[1]:.0f} by ours."
        )
        if len(steps) > 1 and self.workload.command != "reward" and not self.workload.sweep:
            said.append(self._mfu(runs, sum(steps[2:], steps[1]), threads))
        return said

    def _counted(self, run: Run) -> list[Tokens]:
        """Of each step of the first training run."""
        steps = run.by_process("step")[0] if run.of("step") else []
        if not all("sequences" in step for step in steps):
            return []
        stage = self.workload.stage
        return [
            tokens(
                step["sequences"],
                len(step["sequences"]) // (1 if stage == "sft" else 2),
                step["padded"],
                step["scored"],
                wants_last=stage == "rm",
            )
            for step in steps
        ]

    def _mfu(self, runs: dict[str, list[Run]], later: Tokens, threads: int) -> str:
        measured = matmul(threads)
        # One thread's CPU seconds are those of a machine that does nothing else.
        clock = "cpu" if threads == 1 and not has_gpu() else "wall"
        work = flops(later, self.shape)
        shares = [work / least(runs[arm], clock) / measured[clock] for arm in ARMS]
        goal = " Goal for ours: 25 % (40 %)." if self.workload.command == "dpo" else ""
        return (
            f"Required-token MFU of the steps after the first: peer {shares[0]:.1%}, ours {shares[1]:.1%} of the "
            f"{measured[clock] / 1e12:.2f} TFLOP/s that a bfloat16 product reaches here with {threads} thread(s), by "
            f"{SECONDS[clock]}; required: {work / 1e12:.3f} TFLOP.{goal}"
        )


SECONDS = {"cpu": "CPU s", "wall": "wall s"}


def figures(runs: dict[str, list[Run]], of: Callable[[Run], float]) -> list[list[float]]:
    """A figure of every round, the peer's and ours."""
    return [[of(run) for run in runs[arm]] for arm in ARMS]


def whole(runs: dict[str, list[Run]]) -> list[Measure]:
    """Figures of whole processes."""
    found = [
        Measure("whole processes, CPU s", *figures(runs, lambda run: run.cpu)),
        Measure("whole processes, wall s", *figures(runs, lambda run: run.wall)),
        Measure("peak memory, MiB", *figures(runs, lambda run: run.memory), is_timed=False),
    ]
    held = figures(runs, lambda run: run.gpu_memory)
    if all(map(min, held)):
        found.append(Measure("peak GPU memory, MiB", *held, is_timed=False))
    return found


def _references(runs: dict[str, list[Run]], epochs: int) -> list[Measure]:
    """Processes that made a reference pass: without gradients they read at least half of what an epoch trains on.

    A look at the model with a few hundred tokens, by which ours tries how to read trees, is none.
    """

    def count(run: Run) -> float:
        return float(sum(2 * epochs * row["reference"] > row["trained"] for row in run.of("exit")))

    counts = figures(runs, count)
    if not all(map(min, counts)):
        return []
    return [Measure("processes that read a reference", *counts, is_timed=False)]


def _later(run: Run, clock: str) -> list[float]:
    """Seconds of each step but the first of each training run."""
    return [step[clock] for steps in run.by_process("step") for step in steps[1:]]


def least(runs: Sequence[Run], clock: str) -> float:
    """Seconds of the steps after the first, each the least of the rounds.

    Steps differ in length and are the same in every round, so the least of all of them would only name the shortest.
    """
    return sum(map(min, zip(*(_later(run, clock) for run in runs), strict=True)))


def _losses(rows: Sequence[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in sorted(rows, key=lambda row: row["step"])]


def _apart(theirs: Sequence[float], own: Sequence[float], where: str, within: float) -> list[str]:
    return [
        f"{where}step {step + 1}: the peer's loss is {a:.4f}, ours {b:.4f}"
        for step, (a, b) in enumerate(zip(theirs[:LOGGED], own[:LOGGED], strict=True))
        if not abs(a - b) <= within
    ]


def _no_start(first: dict[str, float], where: str, within: float) -> list[str]:
    """Sides whose reference is not what the policy starts as: then DPO's first loss is not ln 2."""
    return [
        f"{where}the first loss of {name} is {loss:.4f}, not ln 2: the reference is not the start"
        for name, loss in first.items()
        if not abs(loss - math.log(2)) <= within
    ]


def threads_differ(peer: Run, ours: Run) -> list[str]:
    """Whether the two sides used other numbers of threads."""
    if peer.threads == ours.threads:
        return []
    return [f"threads: the peer used {sorted(peer.threads)}, ours {sorted(ours.threads)}"]


def _batches(peer: Run, ours: Run) -> list[str]:
    """Whether each step read the same sequences, where both sides' batches are laid out as transformers' are."""
    pairs = zip(peer.of("step"), ours.of("step"), strict=False)
    return [
        f"step {number + 1}: the batches hold other sequences"
        for number, (one, other) in enumerate(pairs)
        if "sequences" in one and "sequences" in other
        if sorted(one["sequences"]) != sorted(other["sequences"])
    ]
