"""Evaluation beside lm-eval's command line: the same questions, the same weights, the same number format."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import inputs
from running import ARMS, Argv, Run, apart, has_gpu, program
from table import Goal, Measure
from training import whole

BATCH = 8
TOKENS_AT_ONCE = 2048
METRICS = ("acc", "acc_norm")
# In bfloat16 a log-likelihood depends on how requests are batched. A question may be answered otherwise only where the
# peer itself separates its two best options by less than this: nats of a whole option.
TIE = 0.25


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
        model = f"pretrained={self.models[name]},dtype=bfloat16,softmax_dtype=float32"
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
            "model.dtype=bfloat16",
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
            quantizer = "int8" if name == "int8" else "none"
            model = Model(path=str(folder), dtype=Dtype.bfloat16)
            requests.append(plain(Request(model, quantizer, Suite(**self._suite()))))
        file = scratch / "requests.json"
        file.write_text(json.dumps(requests), encoding="utf-8")
        return [sys.executable, "-m", "evals.worker", str(file), str(scratch / "outputs")]

    def collect(self, arm: str, scratch: Path, run: Run) -> None:
        """Keep the answers to every question, model by model."""
        if arm == "peer":
            for name in self.models:
                (file,) = (scratch / name).rglob("samples_*.jsonl")
                run.answers.append(
                    sorted(map(_peer_answer, _rows(file)), key=lambda one: one["doc"])
                )
            return
        results = sorted(
            (scratch / "outputs" / "evals").glob("*/results.json"),
            key=lambda f: f.stat().st_mtime_ns,
        )
        for file in results:
            if skipped := json.loads(file.read_text(encoding="utf-8")).get("skipped"):
                run.answers.append(f"skipped: {skipped}")
                continue
            rows = _rows(file.parent / f"samples_{inputs.TASK}.jsonl")
            run.answers.append(sorted(map(_our_answer, rows), key=lambda one: one["doc"]))

    def problems(self, runs: dict[str, list[Run]]) -> list[str]:
        """Why the two sides are not comparable."""
        peer, ours = (runs[arm][0] for arm in ARMS)
        if len(peer.answers) != len(ours.answers):
            return [f"the peer gave {len(peer.answers)} results, ours {len(ours.answers)}"]
        found = []
        if peer.threads != ours.threads:
            found.append(
                f"threads: the peer used {sorted(peer.threads)}, ours {sorted(ours.threads)}"
            )
        for name, theirs, own in zip(self.models, peer.answers, ours.answers, strict=True):
            found += differences(name, theirs, own)
        return found

    def measures(self, runs: dict[str, list[Run]]) -> list[Measure]:
        """Scoring alone, from tokenising to the last answer; whole processes; memory."""
        found = [
            Measure(
                f"scoring, {unit}",
                *(
                    [sum(row[clock] for row in run.of("score")) for run in runs[arm]]
                    for arm in ARMS
                ),
            )
            for clock, unit in (("cpu", "CPU s"), ("wall", "wall s"))
        ]
        return [*found, *whole(runs)]

    def notes(self, runs: dict[str, list[Run]], threads: int) -> list[str]:
        """Token statistics, and how equal the answers are."""
        peer, ours = (runs[arm][0] for arm in ARMS)
        documents = sum(len(answers) for answers in peer.answers)
        read = [sum(row["read"] for row in run.of("score")) / documents for run in (peer, ours)]
        said = [
            f"Tokens read a question: {read[0]:.0f} by the peer, padding included, {read[1]:.0f} by ours."
        ]
        if not any(isinstance(answers, str) for answers in ours.answers):
            every, other = agreement(peer.answers, ours.answers)
            said.append(f"Answered alike: {every - other} of {every} questions.")
        return said


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        yield from map(json.loads, lines)


def _peer_answer(row: dict[str, Any]) -> dict[str, Any]:
    """Its metrics, and the log-likelihood of each option."""
    answer = {name: row[name] for name in METRICS} | {"doc": row["doc_id"]}
    likelihoods = [float(one[0]) for one in row["filtered_resps"]]
    return answer | {"likelihoods": likelihoods, "lengths": list(map(len, row["doc"]["choices"]))}


def _our_answer(row: dict[str, Any]) -> dict[str, Any]:
    return {name: row["metrics"][name] for name in METRICS} | {"doc": row["doc_id"]}


def _is_tie(theirs: dict[str, Any], metric: str) -> bool:
    """Whether rounding may decide between the peer's two best options; `acc_norm` divides by their characters."""
    lengths = theirs["lengths"] if metric == "acc_norm" else [1] * len(theirs["likelihoods"])
    ranked = sorted(
        zip(theirs["likelihoods"], lengths, strict=True), key=lambda one: one[0] / one[1]
    )
    (second, its_length), (best, length) = ranked[-2:]
    return best / length - second / its_length < TIE / min(length, its_length)


def _changed(theirs: dict[str, Any], own: dict[str, Any]) -> list[str]:
    """The metrics of a question that differ."""
    return [name for name in METRICS if theirs[name] != own[name]]


def differences(name: str, theirs: Any, own: Any) -> list[str]:
    """What is answered otherwise, ties apart."""
    if isinstance(own, str):
        return [f"{name}: ours was {own}"]
    if [one["doc"] for one in theirs] != [one["doc"] for one in own]:
        return [f"{name}: the two sides answered other questions"]
    return [
        f"{name}: question {a['doc']} has {metric} {a[metric]:g} with the peer and {b[metric]:g} with ours, and no tie "
        f"of {TIE} nats explains it"
        for a, b in zip(theirs, own, strict=True)
        for metric in _changed(a, b)
        if not _is_tie(a, metric)
    ]


def agreement(theirs: list[Any], own: list[Any]) -> tuple[int, int]:
    """Questions in all, and those that are not answered alike."""
    pairs = [
        pair
        for one, other in zip(theirs, own, strict=True)
        for pair in zip(one, other, strict=True)
    ]
    return len(pairs), sum(bool(_changed(a, b)) for a, b in pairs)
