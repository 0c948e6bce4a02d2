"""Evaluation beside lm-eval's command line: the same questions, the same weights, the same number format."""

import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import answers
import inputs
from counting import tokens
from running import ARMS, Argv, Run, apart, has_gpu, program
from table import Goal, Measure
from training import SECONDS, figures, threads_differ, whole

from conf.entry import UserError

BATCH = 8
TOKENS_AT_ONCE = 2048


@dataclass(frozen=True)
class Choice:
    """A comparison of multiple-choice evaluations."""

    meaning: str
    goals: tuple[Goal, ...]
    shots: int = 0
    models: tuple[str, ...] = ("base",)
    source: str = "questions"
    rows: int = 64
    options: int | None = None  # of a question; None: its own
    dtype: str = "bfloat16"

    def prepare(self, data: dict[str, str], model: Path, number: int, out: Path) -> "Prepared":
        """Write what both sides read."""
        file = Path(data[self.source])
        tasks = apart(inputs.task_folder, file, number, self.options, out)
        made = {"tuned": inputs.tuned, "int8": inputs.int8}
        folders = {
            name: apart(made[name], model, out) if name in made else model for name in self.models
        }
        return Prepared(self, folders, tasks)


@dataclass(frozen=True)
class Prepared:
    """A comparison whose inputs are on disk."""

    workload: Choice
    models: dict[str, Path]
    tasks: Path  # folder with the task file

    def commands(self, arm: str, scratch: Path) -> list[Argv]:
        """The command lines of one side, which write to `scratch`."""
        if arm == "peer":
            return [self._peer(name, scratch) for name in self.models]
        if len(self.models) == 1:
            return [self._ours(scratch)]
        return [self._worker(scratch)]

    def _peer(self, name: str, scratch: Path) -> Argv:
        model = f"pretrained={self.models[name]},dtype={self.workload.dtype},softmax_dtype=float32"
        argv = [program("lm_eval"), "run", "--model", "hf", "--model_args", model]
        argv += ["--batch_size", str(BATCH), "--device", "cuda" if has_gpu() else "cpu"]
        argv += ["--include_path", str(self.tasks), "--tasks", inputs.TASK]
        argv += ["--num_fewshot", str(self.workload.shots)]
        return [*argv, "--log_samples", "--output_path", str(scratch / name)]

    def _suite(self) -> dict[str, Any]:
        return {
            "name": "bench",
            "include_path": str(self.tasks),
            "tasks": [inputs.TASK],
            "num_fewshot": self.workload.shots,
            "tokens_at_once": TOKENS_AT_ONCE,
            "batch_size": BATCH,
        }

    def _ours(self, scratch: Path) -> Argv:
        argv = [
            sys.executable,
            "-m",
            "evals",
            f"model.path={self.models['base']}",
            f"model.dtype={self.workload.dtype}",
        ]
        settings = self._suite() | {"tasks": f"[{inputs.TASK}]"}
        argv += ["suite=local", *(f"suite.{name}={value}" for name, value in settings.items())]
        return [*argv, f"paths.root={scratch / 'outputs'}"]

    def _worker(self, scratch: Path) -> Argv:
        """One process for all models, as `python -m align` starts it; it quantizes by itself."""
        from conf.entry import plain
        from conf.schema import Dtype, Model, Suite
        from evals.run import Request

        requests = []
        for name in self.models:
            folder = self.models["base" if name == "int8" else name]
            quantizer = inputs.INT8 if name == "int8" else "none"
            model = Model(path=str(folder), dtype=Dtype[self.workload.dtype])
            requests.append(plain(Request(model, quantizer, Suite(**self._suite()))))
        file = scratch / "requests.json"
        file.write_text(json.dumps(requests), encoding="utf-8")
        return [sys.executable, "-m", "evals.worker", str(file), str(scratch / "outputs")]

    def collect(self, arm: str, scratch: Path, run: Run) -> None:
        """Keep the answers to every question, model by model."""
        if arm == "peer":
            for name in self.models:
                (file,) = (scratch / name).rglob("samples_*.jsonl")
                run.answers.append(_sorted(map(answers.of_peer, _rows(file))))
            return
        every = (scratch / "outputs" / "evals").glob("*/results.json")
        for file in sorted(every, key=lambda file: file.stat().st_mtime_ns):
            if skipped := json.loads(file.read_text(encoding="utf-8")).get("skipped"):
                raise UserError(f"{file.parent.name} was skipped: {skipped}")
            rows = _rows(file.parent / f"samples_{inputs.TASK}.jsonl")
            run.answers.append(_sorted(map(answers.of_ours, rows)))

    def problems(self, runs: dict[str, list[Run]]) -> list[str]:
        """Why the two sides are not comparable."""
        peer, ours = (runs[arm][0] for arm in ARMS)
        found = threads_differ(peer, ours)
        asked = [[sorted(row["sequences"]) for row in run.of("score")] for run in (peer, ours)]
        if asked[0] != asked[1]:
            found.append("the two sides asked for the log-likelihoods of other tokens")
        for name, theirs, own in zip(self.models, peer.answers, ours.answers, strict=True):
            found += answers.differences(name, theirs, own, self.workload.dtype)
        return found

    def measures(self, runs: dict[str, list[Run]]) -> list[Measure]:
        """Scoring alone, from tokenising to the last answer; whole processes; memory."""
        found = []
        for clock, unit in SECONDS.items():
            spent = figures(
                runs, lambda run, clock=clock: sum(row[clock] for row in run.of("score"))
            )
            found.append(Measure(f"scoring, {unit}", *spent))
        return [*found, *whole(runs)]

    def notes(self, runs: dict[str, list[Run]], threads: int) -> list[str]:
        """Token statistics, and how equal the answers are."""
        peer, ours = (runs[arm][0] for arm in ARMS)
        score = peer.of("score")[0]
        questions = len(peer.answers[0])
        count = tokens(score["sequences"], questions, score["read"], score["scored"])
        read = ours.of("score")[0]["read"] / questions
        pairs = [
            pair
            for theirs, own in zip(peer.answers, ours.answers, strict=True)
            for pair in zip(theirs, own, strict=True)
        ]
        alike = sum(answers.is_alike(*pair) for pair in pairs)
        return [
            f"Tokens a question: {count.a_row()}. Ours read {read:.0f}.",
            f"Answered alike: {alike} of {len(pairs)} questions.",
        ]


def _sorted(found: Iterable[answers.Answer]) -> list[answers.Answer]:
    return sorted(found, key=lambda answer: answer.document)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)
