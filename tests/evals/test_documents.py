"""The documents of real lm-eval tasks, written for a search for leaks."""

import gzip
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from conf.schema import Suite
from evals.documents import write_documents
from reward.benchmarks import read_documents
from reward.contamination import Index

ROOT = Path(__file__).parents[2]


def documents_of(suite: Suite, folder: Path) -> list[dict[str, Any]]:
    out = folder / "documents.jsonl"
    counts = write_documents(suite, out)
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").split("\n") if line]
    assert counts.total() == len(rows)
    return rows


def local_suite(shared_data: Path, *tasks: str, **changes: Any) -> Suite:
    folder = str(shared_data / "lm_eval_tasks")
    return Suite(name="local", include_path=folder, tasks=list(tasks), **changes)


def test_text_is_question_and_right_answer(shared_data: Path, tmp_path: Path) -> None:
    names = [
        "gsm8k",
        "arc_easy",
        "winogrande",
        "boolq",
        "truthfulqa_mc1",
        "cmmlu",
        "ifeval",
        "wikitext2",
    ]
    suite = local_suite(shared_data, *(f"{name}_local" for name in names))
    rows = documents_of(suite, tmp_path)
    assert len({(row["task"], row["doc"]) for row in rows}) == len(rows)
    first = {row["task"].removesuffix("_local"): row["text"] for row in reversed(rows)}
    assert first["gsm8k"].startswith("Question: Janet’s ducks lay 16 eggs")
    assert first["gsm8k"].endswith("#### 18")
    assert first["arc_easy"] == (
        "Question: Which statement best explains why photosynthesis is the foundation of most food "
        "webs?\nAnswer:\nSunlight is the source of energy for nearly all ecosystems."
    )
    assert first["winogrande"] == (
        "Sarah was a much better surgeon than Maria so Maria always got the easier cases.\n"
        "Sarah was a much better surgeon than Maria so always got the easier cases."
    )
    assert first["boolq"].startswith("Property tax -- ")
    assert first["boolq"].endswith(
        "Question: is house tax and property tax are same?\nAnswer:\nyes"
    )
    assert first["truthfulqa_mc1"].endswith(
        "Q: What is the spiciest part of a chili pepper?\n"
        "A:\nThe spiciest part of a chili pepper is the placenta."
    )
    assert "\nB. 土地\n" in first["cmmlu"]
    assert first["ifeval"].endswith("*highlighted section part 3*.")  # no target
    assert first["wikitext2"].startswith("= Robert Boulter =")


def test_all_documents_of_the_scored_split(shared_data: Path, tmp_path: Path) -> None:
    rows = documents_of(local_suite(shared_data, "gsm8k_local", num_fewshot=2), tmp_path)
    assert [row["doc"] for row in rows] == list(range(1055))
    drawn = documents_of(local_suite(shared_data, "gsm8k_local", limit=3, sample_seed=7), tmp_path)
    assert len(drawn) == 3
    assert all(rows[row["doc"]] == row for row in drawn)


def test_groups_and_targets_of_all_kinds(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    row = {"q": "Which?", "options": ["a", "b"], "gold": 1, "golds": ["one", "two"]}
    data.write_text("".join(json.dumps(row | {"q": f" Which {i}?"}) + "\n" for i in range(3)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "doc_to_text": "{{q}}",
    }
    choice = common | {"output_type": "multiple_choice", "doc_to_choice": "options"}
    tasks = {
        "by_number": choice | {"doc_to_target": "gold"},
        "by_text": common | {"output_type": "generate_until", "doc_to_target": "golds"},
        "unknown": common | {"output_type": "generate_until", "doc_to_target": 0},
    }
    for name, task in tasks.items():  # JSON is YAML
        (tmp_path / f"{name}.yaml").write_text(json.dumps(task | {"task": name}))
    group = {"group": "quiz", "task": ["by_number", "by_text"]}
    (tmp_path / "quiz.yaml").write_text(json.dumps(group))
    suite = Suite(name="mine", include_path=str(tmp_path), tasks=["quiz", "unknown"])
    out = tmp_path / "out"
    out.mkdir()
    assert documents_of(suite, out) == [
        {"task": name, "doc": number, "text": f"Which {number}?{answer}"}
        for name, answer in (("by_number", "\nb"), ("by_text", "\none\ntwo"), ("unknown", ""))
        for number in range(3)
    ]


def test_leaks_are_found_by_the_documents_of_a_suite(shared_data: Path, tmp_path: Path) -> None:
    tasks = ("gsm8k_local", "arc_easy_local", "arc_challenge_local")
    documents_of(local_suite(shared_data, *tasks), tmp_path)
    index = Index.build(read_documents(str(tmp_path / "documents.jsonl")))
    dirty = shared_data / "raw_dirty"
    with gzip.open(dirty / "sft_dirty.jsonl.gz", "rt", encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    truth = {
        (fault["row"], Path(fault["eval_file"]).name.split(".")[0] + "_local", fault["eval_row"])
        for fault in map(json.loads, (dirty / "sft_dirty.truth.jsonl").read_text().splitlines())
        if fault["issue"].startswith("leak_")
    }
    hits = index.find(["\n".join(value for value in row.values() if value) for row in rows])
    assert {(hit.text, hit.task, hit.doc) for hit in hits} == truth


def test_a_failure_leaves_the_old_file(tmp_path: Path) -> None:
    task = {"task": "gone", "dataset_path": "json", "dataset_kwargs": {"data_files": "none.jsonl"}}
    (tmp_path / "gone.yaml").write_text(json.dumps(task | {"test_split": "test"}))
    out = tmp_path / "documents.jsonl"
    out.write_text("old")
    with pytest.raises(UserError, match="task 'gone' cannot be loaded"):
        write_documents(Suite(name="mine", include_path=str(tmp_path), tasks=["gone"]), out)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["documents.jsonl", "gone.yaml"]
    assert out.read_text() == "old"


def test_command_line(tmp_path: Path) -> None:
    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "evals.documents", *argv]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    out = tmp_path / "new" / "documents.jsonl"
    done = run("suite=demo_json", f"out={out}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["demo_json", "80", "documents", str(out)]
    assert len(read_documents(str(out))) == 80
    for argv, message in (
        (["suite=demo_json"], "error: out must be set"),
        (["suite=demo_json", "out=x.txt"], "error: out='x.txt': the file is JSON Lines"),
        (["suite=demo_json", "suite.tasks=[]", "out=x.jsonl"], "error: suite 'demo_json' has no"),
    ):
        done = run(*argv)
        assert (done.returncode, done.stdout) == (2, "")
        assert done.stderr.startswith(message)
        assert done.stderr.count("\n") == 1
