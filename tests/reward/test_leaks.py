"""What counts as a leak of a benchmark, and what as a phrase or a template."""

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from conf.entry import UserError
from reward.leaks import build_index, find_leaks

WORDS = [
    *("amber", "boats", "carry", "dusty", "eagles", "from", "golden", "harbours", "into", "jade"),
    *("kingdoms", "light", "moons", "never", "open", "purple", "quarries", "reach", "silver"),
    *("towers", "under", "violet", "waves", "xenon", "yellow", "zinc", "azure", "brown"),
]
TEMPLATE = "Read the text below with care and answer the question in one short sentence of your own"


def sentence(number: int) -> str:
    """Twenty words in an order that no other number has."""
    return " ".join(WORDS[(number * 7 + i * (number % 5 + 1)) % len(WORDS)] for i in range(20))


@pytest.fixture
def index(tmp_path: Path) -> Path:
    documents = [f"{TEMPLATE}: {sentence(n)} {sentence(n + 50)}" for n in range(6)]
    path = tmp_path / "quiz.jsonl"
    path.write_text("".join(json.dumps({"question": text}) + "\n" for text in documents))
    return build_index([str(path)], tmp_path / "index")


def found(texts: list[str], index: Path) -> dict[int, str]:
    findings = find_leaks(texts, range(len(texts)), index)
    return {f.row: f.kind for f in reversed(findings) if f.kind != "shared_phrase"}


def test_a_shared_template_is_no_leak(index: Path) -> None:
    assert found([f"{TEMPLATE}: what do you think of number {n}?" for n in range(9)], index) == {}


def test_a_document_is_a_leak_alone_and_within_other_text(index: Path) -> None:
    leak = f"{sentence(2)} {sentence(52)}"
    texts = ["nothing of the kind", f"Here is my homework. {leak} Thank you!", "more of nothing"]
    assert found(texts, index) == {1: "contamination"}


def test_a_leaked_prompt_with_many_answers_is_a_leak_each_time(index: Path) -> None:
    texts = [f"{sentence(2)} {sentence(52)}\x1eanswer {n}" for n in range(9)]
    assert found(texts, index) == dict.fromkeys(range(9), "contamination")


def test_most_of_a_benchmark_is_an_evaluation_split(index: Path) -> None:
    texts = [f"{TEMPLATE}: {sentence(n)} {sentence(n + 50)}" for n in range(5)]
    padding = [f"row {n} says nothing of interest" for n in range(20)]
    kinds = [f.kind for f in find_leaks(texts + padding, range(25), index)]
    assert kinds.count("eval_split") == 1
    assert kinds.count("contamination") == 5


TASK_FILES = {
    "plain.yaml": b"dataset_path: json\ntask: plain-1.2\n",
    "quoted.yaml": b'\xef\xbb\xbf"task": "mmlu_(abstract)"\r\n"tag": "mmlu_stem_tasks"\r\n',
    "single.yaml": b"task: 'single'  # the only one\n",
    "latin.yaml": b"description: caf\xe9\ntask: latin # caf\xe9\n",
    "group.yaml": b"group: all\ntask:\n  - plain-1.2\n  - task: inner\n",
    "listed.yaml": b"group: all\ntask: [latin, single]\n",
    "default.yaml": b"subtask: a\ntask_alias: b\n# task: c\n",
}


def test_every_task_file_of_a_folder_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tasks (new, a=b) it's"
    folder.mkdir()
    for name, content in TASK_FILES.items():
        (folder / name).write_bytes(content)
    asked: dict[str, Any] = {}

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        for override in OverridesParser.create().parse_overrides(command[3:]):
            asked[override.key_or_group] = override.value()
        return subprocess.CompletedProcess(command, 1, "", "error: enough")

    monkeypatch.setattr(subprocess, "run", run)
    with pytest.raises(UserError, match="enough"):
        build_index([str(folder)], folder)
    assert asked["suite"] == "local"
    assert asked["suite.include_path"] == str(folder)
    assert asked["suite.tasks"] == ["latin", "plain-1.2", "mmlu_(abstract)", "single"]
    assert asked["out"] == str(folder / "documents-0.jsonl")
