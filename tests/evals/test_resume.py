"""Kill -9 in the middle of an evaluation: what was answered stays, and the result has the same bytes."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Dtype, Model, Suite
from evals.progress import Answers
from evals.run import Request, evaluate

ROOT = Path(__file__).parents[2]
# Log-likelihoods in many batches (one-token answers share one), then generated and sampled answers, then windows.
TASKS = ["hellaswag_local", "cmmlu_local", "gsm8k_local", "wikitext2_local"]


def command(model: Path, root: Path, shared_data: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "evals", f"model.path={model}", "model.dtype=float32"),
        *("suite=local", f"suite.include_path={shared_data / 'lm_eval_tasks'}"),
        *(f"suite.tasks=[{','.join(TASKS)}]", "suite.limit=6", "suite.batch_size=2"),
        *("suite.gen_kwargs.max_gen_toks=16", f"paths.root={root}", *more),
    ]


def lines(root: Path) -> list[str]:
    """Whole lines of the journal of the one evaluation below `root`."""
    found = [
        line
        for file in root.glob("cache/answers/*.jsonl")
        for line in file.read_text().splitlines(keepends=True)
    ]
    return [line for line in found if line.endswith("\n")]


def run_until(argv: list[str], root: Path, batches: int) -> None:
    """Kill the evaluation, without any chance to tidy up, when so many batches are answered."""
    process = subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    patience = time.monotonic() + 120
    while len(lines(root)) < batches:
        assert process.poll() is None, "the evaluation ended before it could be killed"
        assert time.monotonic() < patience
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def finish(argv: list[str]) -> str:
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


def content(root: Path) -> dict[str, Any]:
    """Everything of the one result that may not depend on when and in how many pieces it was made."""
    (results,) = root.glob("evals/*/results.json")
    record = json.loads(results.read_text())
    for key in ("provenance", "seconds"):
        del record[key]
    samples = {path.name: path.read_bytes() for path in results.parent.glob("*.jsonl")}
    return {"record": record, "folder": results.parent.name, **samples}


def test_a_killed_evaluation_resumes_to_the_same_bytes(
    lively_model: Path, tmp_path: Path, shared_data: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(command(lively_model, whole, shared_data))
    assert not list(whole.glob("cache/answers/*"))  # gone with the result's completion
    argv = command(lively_model, broken, shared_data)
    for batches in (9, 17):  # among log-likelihoods, then generated answers
        run_until(argv, broken, batches)
        before = lines(broken)
        assert len(before) >= batches
        if batches == 9:  # a write that the machine's end cut off
            (journal,) = broken.glob("cache/answers/*.jsonl")
            with journal.open("a") as file:
                file.write(before[0][: len(before[0]) // 2])
    assert not list(broken.glob("evals/*/results.json"))
    answers = [key for line in before for key, _ in json.loads(line)]
    said = finish(argv)
    assert f"continuing: {len(answers)} answers are there" in said
    assert content(broken) == content(whole)
    assert not list(broken.glob("cache/answers/*"))


def test_only_what_is_missing_is_asked(
    lively_model: Path, tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batches that a resumed run asks are exactly the last ones of an unbroken run."""
    from evals import backend

    suite = Suite(
        name="r",
        tasks=["arc_easy_local", "cmmlu_local", "gsm8k_local"],
        include_path=str(shared_data / "lm_eval_tasks"),
        limit=5,
        batch_size=2,
        num_fewshot=0,
        gen_kwargs={"max_gen_toks": 8},
    )
    asked: list[list[list[int]]] = []
    kept: list[bytes] = []
    call, generate = backend.Backend._model_call, backend.Backend._model_generate
    commit = Answers.commit

    def seen_call(self: Any, inps: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(inps.tolist())
        return call(self, inps, *args, **kwargs)

    def seen_generate(self: Any, context: Any, *args: Any, **kwargs: Any) -> Any:
        asked.append(context.tolist())
        return generate(self, context, *args, **kwargs)

    def kept_commit(self: Answers) -> None:
        commit(self)
        if self._path.exists():
            kept.append(self._path.read_bytes())

    monkeypatch.setattr(backend.Backend, "_model_call", seen_call)
    monkeypatch.setattr(backend.Backend, "_model_generate", seen_generate)
    monkeypatch.setattr(Answers, "commit", kept_commit)
    request = Request(Model(path=str(lively_model), dtype=Dtype.float32), "none", suite)
    unbroken = next(evaluate([request], tmp_path / "whole"))
    batches, journal = list(asked), kept[-1].splitlines(keepends=True)
    assert len(journal) == len(batches)  # a line a batch
    monkeypatch.setattr(Answers, "commit", commit)
    for done in (1, len(journal) // 2, len(journal) - 1, len(journal)):
        root = tmp_path / f"after{done}"
        file = root / "cache" / "answers" / f"{request.key(root / 'cache')}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"".join(journal[:done]))
        asked.clear()
        resumed = next(evaluate([request], root))
        assert asked == batches[done:]
        assert resumed.scores == unbroken.scores
        for name in unbroken.samples.values():
            assert (resumed.folder / name).read_bytes() == (unbroken.folder / name).read_bytes()


def test_answers_survive_a_torn_line_and_keep_their_digits(tmp_path: Path) -> None:
    path = tmp_path / "answers.jsonl"
    answers = Answers(path)
    first, second = [(-0.1 - 0.2, True), (float("-inf"), False)], ["“a”\n\u2028b\x85", ""]
    for answer in first:
        answers.add(["same", "request"], answer)
    answers.commit()
    for number, answer in enumerate(second):
        answers.add(["text", number], answer)
    answers.commit()
    answers.add(["never committed"], 1)
    whole = path.read_bytes()
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        again = Answers(path)
        found = [again.take(["same", "request"]) for _ in range(3)]
        assert again.take(["never committed"]) is None
        texts = [again.take(["text", number]) for number in range(2)]
        lines_there = whole[:cut].count(b"\n")
        assert path.read_bytes().count(b"\n") == again.count / 2 == lines_there
        assert found == ([list(answer) for answer in first] if lines_there else [None, None]) + [
            None
        ]
        assert texts == (second if lines_there == 2 else [None, None])
