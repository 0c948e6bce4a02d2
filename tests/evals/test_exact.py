"""Every number is lm-eval's own: bit for bit in float32, against its function and its command line."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Dtype, Model, Suite
from evals.results import EvalResult
from evals.run import Request, evaluate

BATCH = 4
# What a suite asks for, and the same in the words of `lm_eval.simple_evaluate`.
CASES: dict[str, dict[str, Any]] = {
    "multiple choice, log-likelihood": {
        "tasks": ["hellaswag_local", "truthfulqa_mc2_local", "lambada_openai_local"],
        "limit": 6,
    },
    "few-shot": {
        "tasks": ["arc_easy_local", "cmmlu_local"],
        "limit": 5,
        "num_fewshot": 3,
    },
    "few-shot through the chat template": {
        "tasks": ["piqa_local", "gsm8k_local"],
        "limit": 3,
        "num_fewshot": 2,
        "apply_chat_template": True,
        "system_instruction": "Answer.",
        "gen_kwargs": {"max_gen_toks": 24},
    },
    "generation with filters": {
        "tasks": ["gsm8k_local"],
        "limit": 5,
        "gen_kwargs": {"max_gen_toks": 24},
    },
    "sampled generation": {
        "tasks": ["gsm8k_local"],
        "limit": 5,
        "gen_kwargs": {"max_gen_toks": 16, "do_sample": True, "temperature": 1.0},
    },
    "rolling log-likelihood": {"tasks": ["wikitext2_local"], "limit": 1},
}


def simple_evaluate(model: Any, suite: Suite, documents: dict[str, list[int]]) -> dict[str, Any]:
    """Plain lm-eval on the documents that the suite samples, all else by its own defaults."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    return dict(
        lm_eval.simple_evaluate(
            model,
            tasks=list(suite.tasks),
            task_manager=TaskManager(include_path=suite.include_path, include_defaults=False),
            samples=documents,
            num_fewshot=suite.num_fewshot,
            apply_chat_template=suite.apply_chat_template,
            system_instruction=suite.system_instruction,
            gen_kwargs=dict(suite.gen_kwargs) or None,
            bootstrap_iters=0,
        )
    )


def measured(
    model: Path, suite: Suite, root: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[EvalResult, dict[str, Any]]:
    """A result, and what lm-eval gave inside of it."""
    import lm_eval

    inside: dict[str, Any] = {}
    evaluate_inside = lm_eval.evaluate

    def spy(**kwargs: Any) -> Any:
        inside.update(evaluate_inside(**kwargs))
        return inside

    with monkeypatch.context() as patched:
        patched.setattr(lm_eval, "evaluate", spy, raising=False)
        request = Request(Model(path=str(model), dtype=Dtype.float32), "none", suite)
        return next(evaluate([request], root)), inside


def documents_of(suite: Suite) -> dict[str, list[int]]:
    from evals import harness

    return {
        task: numbers
        for group in harness.load_groups(suite)
        for task, numbers in group.documents.items()
    }


@pytest.mark.parametrize("name", CASES)
def test_equals_simple_evaluate(
    lively_model: Path,
    tmp_path: Path,
    shared_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
) -> None:
    from lm_eval.models.huggingface import HFLM

    include = str(shared_data / "lm_eval_tasks")
    suite = Suite(name="exact", include_path=include, batch_size=BATCH, **CASES[name])
    result, inside = measured(lively_model, suite, tmp_path, monkeypatch)
    options = {"dtype": "float32", "softmax_dtype": "float32", "batch_size": BATCH, "device": "cpu"}
    plain = simple_evaluate(
        HFLM(pretrained=str(lively_model), **options), suite, documents_of(suite)
    )
    for task in suite.tasks:
        for ours, theirs in zip(inside["samples"][task], plain["samples"][task], strict=True):
            assert ours == theirs  # the prompt, every answer with its log-likelihood, every metric
        scores = {score.metric: score.value for score in result.scores if score.task == task}
        expected = {
            key.removesuffix(",none"): value
            for key, value in plain["results"][task].items()
            if "," in key and "_stderr" not in key
        }
        assert scores == expected
    assert any(score.value not in (0, 1) for score in result.scores) or "gsm8k" in suite.tasks[0]


def test_a_group_equals_simple_evaluate(
    lively_model: Path, tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lm_eval.models.huggingface import HFLM

    include = str(shared_data / "lm_eval_tasks")
    suite = Suite(name="g", tasks=["mmlu_local"], include_path=include, limit=9, num_fewshot=1)
    result, inside = measured(lively_model, suite, tmp_path, monkeypatch)
    documents = documents_of(suite)
    model = HFLM(pretrained=str(lively_model), dtype="float32", batch_size=8, device="cpu")
    leaves = Suite(
        name="g", tasks=list(documents), include_path=include, num_fewshot=1, batch_size=8
    )
    plain = simple_evaluate(model, leaves, documents)
    assert {task: inside["samples"][task] for task in documents} == plain["samples"]
    values = [row["acc"] for rows in plain["samples"].values() for row in rows]
    assert result.scores[0].value == sum(values) / len(values)


def test_equals_the_command_line(lively_model: Path, tmp_path: Path, shared_data: Path) -> None:
    include = shared_data / "lm_eval_tasks"
    suite = Suite(
        name="exact",
        tasks=["openbookqa_local", "gsm8k_local"],
        include_path=str(include),
        limit=4,
        num_fewshot=2,
        batch_size=BATCH,
        apply_chat_template=True,
        gen_kwargs={"max_gen_toks": 16},
    )
    request = Request(Model(path=str(lively_model), dtype=Dtype.float32), "none", suite)
    result = next(evaluate([request], tmp_path / "ours"))
    argv = [
        *("run", "--model", "hf", "--device", "cpu", "--batch_size", str(BATCH)),
        *("--model_args", f"pretrained={lively_model},dtype=float32,softmax_dtype=float32"),
        *("--tasks", ",".join(suite.tasks), "--include_path", str(include)),
        *("--samples", json.dumps(documents_of(suite)), "--num_fewshot", "2"),
        *("--apply_chat_template", "--gen_kwargs", "max_gen_toks=16"),
        *("--log_samples", "--output_path", str(tmp_path / "plain")),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "lm_eval", *argv], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (written,) = (tmp_path / "plain").rglob("results_*.json")
    plain = json.loads(written.read_text())["results"]
    for score in result.scores:
        metric = score.metric if "," in score.metric else f"{score.metric},none"
        assert score.value == plain[score.task][metric]
        name, _, used = metric.partition(",")
        assert score.stderr == pytest.approx(plain[score.task][f"{name}_stderr,{used}"], abs=0)
    for task in suite.tasks:
        (samples,) = (tmp_path / "plain").rglob(f"samples_{task}_*.jsonl")
        theirs = [json.loads(line) for line in samples.read_text().split("\n") if line]
        ours = [
            json.loads(line)
            for line in (result.folder / result.samples[task]).read_text().split("\n")
            if line
        ]
        assert [row["prompt"] for row in ours] == [
            row["arguments"]["gen_args_0"]["arg_0"] for row in theirs
        ]
        for mine, other in zip(ours, theirs, strict=True):
            for label, value in mine["metrics"].items():
                assert value == other[label.split(",")[0]]
