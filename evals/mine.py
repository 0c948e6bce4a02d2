"""`python -m evals.mine BASE_DIR CANDIDATE_DIR OUT.jsonl`: where quantization changes a model's answer.

Takes two results of one model under one suite, in 16 bits and quantized. The documents on which the two answer
differently are those near the quantization boundary; where exactly one answer is right they are preference pairs.

The documents are those of an evaluation: a model that is trained on them must be measured on other tasks.
"""

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from conf.entry import UserError, plainly
from reward.records import NORMALISERS
from reward.store import write_json
from reward.turns import BadRow, Row, make_turn

_SIDES = ("baseline", "candidate")


@dataclass(frozen=True)
class Answer:
    """What one side answered to a document."""

    key: Any  # what makes two answers the same: the option's number, or the text that is scored
    text: str  # the option, or all that was generated
    is_right: bool | None  # None where the metric gives part marks


@dataclass
class Mined:
    """The flips of a task."""

    task: str
    documents: int = 0  # that have an answer to compare
    baseline_only: int = 0  # flips where only the baseline is right
    candidate_only: int = 0
    pairs: int = 0
    rows: list[Row] = field(default_factory=list)

    def counts(self) -> dict[str, Any]:
        """The numbers, for a table."""
        return {
            "task": self.task,
            "documents": self.documents,
            "flips": len(self.rows),
            "baseline_only": self.baseline_only,
            "candidate_only": self.candidate_only,
            "pairs": self.pairs,
        }


def mine(baseline: Any, candidate: Any) -> list[Mined]:
    """The documents of each task on which two results differ.

    Args:
        baseline, candidate: `evals.results.EvalResult` of one model, in 16 bits and quantized.

    Returns:
        A record a task. Its rows have task, doc_id, prompt (messages), and `answer` and `is_right` of each side; a row
        with exactly one right answer has `chosen` and `rejected` as `reward.records.preference` reads them.

    Raises:
        UserError: when the results are not comparable, or are of two models.
    """
    from evals.deltas import compare

    if any(
        baseline.model.get(name) != candidate.model.get(name) for name in ("weights", "adapter")
    ):
        raise UserError(
            f"these are results of two models, {baseline.model['path']} and {candidate.model['path']}; "
            "give two of one model that differ in quant="
        )
    compare(baseline, candidate)  # refuses what cannot be paired
    main = {score.task: score for score in baseline.scores if score.is_main}
    return [_mine_task(task, main[task], baseline, candidate) for task in baseline.samples]


def _mine_task(task: str, score: Any, baseline: Any, candidate: Any) -> Mined:
    found = Mined(task)
    ours, theirs = _rows(baseline, task, score.metric), _rows(candidate, task, score.metric)
    for name, row in ours.items():
        if name not in theirs:  # the candidate alone has no value there
            continue
        answers = [_answer(side[name], score) for side in (ours, theirs)]
        before, after = answers
        if before is None or after is None:
            continue
        found.documents += 1
        if before.key == after.key:
            continue
        flip = {
            "task": task,
            "doc_id": row["doc_id"],
            "prompt": row.get("messages") or [make_turn("user", row["prompt"])],
            "baseline": {"answer": before.text, "is_right": before.is_right},
            "candidate": {"answer": after.text, "is_right": after.is_right},
        }
        if {before.is_right, after.is_right} == {True, False}:
            found.baseline_only += before.is_right is True
            found.candidate_only += after.is_right is True
            pair = _pair(flip, *((before, after) if before.is_right else (after, before)))
            found.pairs += bool(pair)
            flip |= pair
        found.rows.append(flip)
    return found


def _rows(result: Any, task: str, metric: str) -> dict[str, Row]:
    """The rows of a task that carry its main metric, by document."""
    from evals.results import read_jsonl

    path = result.folder / result.samples[task]
    rows = {
        f"{row['doc_id']}:{row['doc_hash']}": row
        for row in read_jsonl(path)
        if metric in row["metrics"]
    }
    if any("kind" not in row for row in rows.values()):
        raise UserError(
            f"{path} was written by a version that kept too little of each answer; run the evaluation again"
        )
    return rows


def _answer(row: Row, score: Any) -> Answer | None:
    """One side's answer; None for a document that is scored without one, as by perplexity."""
    value = row["metrics"][score.metric]
    right, wrong = (1.0, 0.0) if score.higher_is_better else (0.0, 1.0)
    is_right = value == right if value in (right, wrong) else None
    if row["kind"] == "generate_until":
        name = "generated" if "generated" in row else "answer"
        return Answer(row["answer"], row[name], is_right)
    number = row.get("picked", {}).get(score.metric)
    return None if number is None else Answer(number, row["options"][number], is_right)


def _pair(flip: Row, right: Answer, wrong: Answer) -> Row:
    """`chosen` and `rejected`; empty when training could not read them."""
    pair = {
        name: [make_turn("assistant", answer.text.strip())]
        for name, answer in (("chosen", right), ("rejected", wrong))
    }
    try:
        NORMALISERS["preference"](flip | pair)
    except BadRow:
        return {}
    return pair


def write(rows: Iterator[Row], out: Path) -> None:
    """Write a JSONL file that appears when it is whole."""
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    with partial.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False) + "\n")
    os.replace(partial, out)


def table(counts: list[dict[str, Any]]) -> str:
    """The counts as aligned text, a line a task and one for all."""
    names = [name for name in counts[0] if name != "task"]
    total = {"task": "all"} | {name: sum(row[name] for row in counts) for name in names}
    lines = [f"{'task':24}" + "".join(f"{name.replace('_', ' '):>16}" for name in names)]
    for row in [*counts, total] if len(counts) > 1 else counts:
        lines.append(f"{row['task']:24}" + "".join(f"{row[name]:16,}" for name in names))
    return "\n".join(lines)


def main() -> None:
    """Write the documents on which two number formats of one model answer differently."""
    parser = argparse.ArgumentParser(prog="python -m evals.mine", description=main.__doc__)
    parser.add_argument("baseline", type=Path, help="result folder of the model in 16 bits")
    parser.add_argument("candidate", type=Path, help="result folder of the quantized model")
    parser.add_argument("out", metavar="OUT", type=Path, help="JSONL file, a row a flip")
    parser.add_argument(
        "--pairs-only",
        action="store_true",
        help="leave out flips that are no preference pair, to train on OUT",
    )
    given = parser.parse_args()
    with plainly():
        from evals.results import EvalResult

        sides = [EvalResult.load(folder) for folder in (given.baseline, given.candidate)]
        found = mine(*sides)
        if not found:
            raise UserError(f"{given.baseline} holds no samples: nothing was scored")
        rows = (
            row for task in found for row in task.rows if "chosen" in row or not given.pairs_only
        )
        write(rows, given.out)
        counts = [task.counts() for task in found]
        record = {
            name: {"folder": str(side.folder), "quantizer": side.quantizer}
            for name, side in zip(_SIDES, sides, strict=True)
        }
        settings = {"model": sides[0].model, "settings_hash": sides[0].settings_hash}
        path = given.out.with_name(f"{given.out.name}.manifest.json")
        write_json(path, record | settings | {"pairs_only": given.pairs_only, "tasks": counts})
        print(
            f"baseline {sides[0].quantizer}, candidate {sides[1].quantizer}: {sides[0].model['path']}"
        )
        print(table(counts))
        print(given.out)


if __name__ == "__main__":
    main()
