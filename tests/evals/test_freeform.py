"""Free-form tasks from a user's own file, and further metrics of generated answers, end to end."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from conf.schema import Dtype, Model, Role, Source, Suite
from evals.deltas import compare
from evals.results import EvalResult, read_jsonl
from evals.run import Request, check_suite, evaluate

ROOT = Path(__file__).parents[2]
PARIS = {"prompt": "What is the capital of France?", "reference": "Paris"}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def suite_of(path: Path, **changes: Any) -> Suite:
    fields: dict[str, Any] = {
        "name": "free",
        "role": Role.gain,
        "prompts": {"mine": Source(source=str(path))},
        "apply_chat_template": True,
        "gen_kwargs": {"max_gen_toks": 8},
    }
    return Suite(**(fields | changes))


def one(model: Path, suite: Suite, root: Path) -> EvalResult:
    request = Request(Model(path=str(model), dtype=Dtype.float32), "none", suite)
    return next(evaluate([request], root))


def samples(result: EvalResult, task: str = "mine") -> list[dict[str, Any]]:
    return list(read_jsonl(result.folder / result.samples[task]))


def test_a_file_of_prompts_is_scored_and_compared(
    lively_model: Path, tiny_model: Path, tmp_path: Path
) -> None:
    # What the model says, so that some references are right.
    path = write(tmp_path / "a.jsonl", [{"prompt": f"{i} times 7?"} for i in range(6)])
    spoken = one(lively_model, suite_of(path, metrics=["json_valid"]), tmp_path)
    said = [row["answer"] for row in samples(spoken)]
    rows = [
        {"prompt": f"{i} times 7?", "reference": (said[i] if i % 2 else str(i * 7)) or "none"}
        for i in range(6)
    ]
    names = ["f1", "exact_match", "rougeL", "bleu", "chrf", "perplexity"]
    suite = suite_of(write(tmp_path / "b.jsonl", rows), metrics=names)
    baseline, candidate = (one(model, suite, tmp_path) for model in (lively_model, tiny_model))
    scores = {score.metric: score for score in baseline.scores}
    assert list(scores) == names
    assert [score.metric for score in baseline.scores if score.is_main] == ["f1"]
    assert scores["exact_match"].value == 0.5
    assert all(score.n == 6 and math.isfinite(score.value) for score in scores.values())
    # The records alone give the scores again, through the libraries themselves.
    import sacrebleu

    answers = [row["answer"] for row in samples(baseline)]
    expected = sacrebleu.corpus_bleu(answers, [[row["target"] for row in samples(baseline)]]).score
    assert scores["bleu"].value == pytest.approx(expected)
    deltas = {delta.metric: delta for delta in compare(baseline, candidate)}
    assert list(deltas) == names
    unpaired = [name for name, delta in deltas.items() if not math.isfinite(delta.difference)]
    assert unpaired == ["perplexity"]  # each model read its own answers
    assert not deltas["perplexity"].higher_is_better


def test_formats_become_prompts_with_references(tmp_path: Path) -> None:
    from evals.tasks.prompts import read

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    question, answer = {"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}
    cases: list[tuple[dict[str, Any], str, list[str]]] = [
        (PARIS, "What is the capital of France?", ["Paris"]),
        ({"prompt": "2+2?", "answer": 4}, "2+2?", ["4"]),
        ({"prompt": "2+2?", "references": ["4", "four"]}, "2+2?", ["4", "four"]),
        ({"prompt": "Write a poem."}, "Write a poem.", []),
        ({"prompt": "2+2?", "completion": "4"}, "2+2?", ["4"]),
        ({"question": "2+2?", "answer": "4"}, "2+2?", ["4"]),
        ({"instruction": "Add.", "input": "2+2", "output": "4"}, "Add.\n\n2+2", ["4"]),
        (
            {"messages": [*turns, question, answer]},
            "User: Hi\n\nAssistant: Yes?\n\nUser: 2+2?\n\nAssistant:",
            ["4"],
        ),
    ]
    for number, (row, text, references) in enumerate(cases):
        path = write(tmp_path / f"{number}.jsonl", [row])
        (document,), left_out = read("mine", Source(source=str(path)))
        assert (document["text"], document["references"], left_out) == (text, references, 0)


def test_columns_of_a_prompt_reach_the_metrics_that_need_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    row = {
        "prompt": "Say nothing in JSON.",
        "schema": {"type": "object"},
        "instruction_id_list": ["punctuation:no_comma", "keywords:existence"],
        "kwargs": [{}, {"keywords": ["never said by a random model"]}],
    }
    path = write(tmp_path / "a.jsonl", [row, {"prompt": "No columns."}])
    result = one(tiny_model, suite_of(path, metrics=["json_schema", "ifeval"]), tmp_path)
    assert {score.metric: (score.value, score.n) for score in result.scores} == {
        "json_schema": (0, 1),
        "ifeval": (0, 1),
    }
    path = write(tmp_path / "b.jsonl", [{"prompt": "No columns."}])
    with pytest.raises(UserError, match="json_schema needs the column 'schema', and none of its 1"):
        one(tiny_model, suite_of(path, metrics=["json_schema"]), tmp_path)


@pytest.mark.parametrize("has_template", [True, False])
def test_turns_keep_their_roles(tiny_model: Path, tmp_path: Path, has_template: bool) -> None:
    turns = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Yes?"), ("user", "2+2?")]
    prompt = [{"role": role, "content": content} for role, content in turns]
    path = write(tmp_path / "a.jsonl", [{"prompt": prompt, "reference": "4"}])
    suite = suite_of(path, apply_chat_template=has_template, system_instruction="Be kind.")
    (row,) = samples(one(tiny_model, suite, tmp_path))
    prompt[0]["content"] = "Be kind.\n\nBe brief."
    if has_template:
        rendered = "".join(f"<|im_start|>{t['role']}\n{t['content']}<|im_end|>\n" for t in prompt)
        assert row["prompt"] == f"{rendered}<|im_start|>assistant\n"
        assert row["messages"] == prompt
    else:
        assert row["prompt"] == (
            "System: Be kind.\n\nBe brief.\n\nUser: Hi\n\nAssistant: Yes?\n\nUser: 2+2?\n\nAssistant:"
        )


def test_a_missing_reference_is_a_counted_gap(tiny_model: Path, tmp_path: Path) -> None:
    rows = [PARIS, {"prompt": "Write a poem."}, {"prompt": "2+2?", "answer": "4"}]
    suite = suite_of(write(tmp_path / "a.jsonl", rows))
    result = one(tiny_model, suite, tmp_path)
    (score,) = result.scores
    assert (score.metric, score.n) == ("exact_match", 2)
    assert [row["metrics"] for row in samples(result)] == [{"exact_match": 0}, {}, {"exact_match": 0}]  # fmt: skip
    (delta,) = compare(result, result)
    assert (delta.n, delta.missing) == (2, 1)


def test_no_reference_at_all_is_refused(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [{"prompt": "Write a poem."}] * 3)
    with pytest.raises(UserError, match="none of its 3 documents has one"):
        one(tiny_model, suite_of(path, metrics=["f1"]), tmp_path)


def test_rows_that_cannot_be_used(tmp_path: Path) -> None:
    from evals.tasks.prompts import read

    pair = {"prompt": "2+2?", "chosen": "4", "rejected": "5"}
    with pytest.raises(UserError, match=r"1 of 2 rows cannot be used.*no right one"):
        read("mine", Source(source=str(write(tmp_path / "a.jsonl", [PARIS, pair]))))
    many = write(tmp_path / "b.jsonl", [PARIS] * 199 + [{"prompt": ""}])
    documents, left_out = read("mine", Source(source=str(many)))
    assert (len(documents), left_out) == (199, 1)
    assert len(read("mine", Source(source=str(many), limit=5))[0]) == 5


def test_mistakes_are_named_before_anything_loads(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no metric 'blue'\. Did you mean 'bleu'"):
        check_suite(suite_of(tmp_path, metrics=["blue"]))
    with pytest.raises(UserError, match="has no tasks"):
        check_suite(Suite(name="free"))
    with pytest.raises(UserError, match="no folder"):
        check_suite(suite_of(tmp_path, metrics=["perplexity"], perplexity_model="./nowhere"))


def test_the_key_holds_the_files_and_the_reader(
    tiny_model: Path, lively_model: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [PARIS])

    def key(**changes: Any) -> str:
        return Request(Model(path=str(tiny_model)), "none", suite_of(path, **changes)).key(tmp_path)

    first = key()
    assert key() == first
    assert key(metrics=["perplexity"], perplexity_model=str(lively_model)) != key(
        metrics=["perplexity"], perplexity_model=str(tiny_model)
    )
    write(path, [PARIS, PARIS])
    assert key() != first


def test_another_model_may_read_the_answers(
    tiny_model: Path, lively_model: Path, tmp_path: Path
) -> None:
    path = write(tmp_path / "a.jsonl", [PARIS, {"prompt": "2+2?", "answer": "4"}])
    values = []
    for reader in (None, str(tiny_model), str(lively_model)):
        suite = suite_of(path, metrics=["perplexity"], perplexity_model=reader)
        values.append(one(tiny_model, suite, tmp_path).scores[0].value)
    assert values[0] == pytest.approx(values[1], rel=0.02)  # in float32, and in its own bfloat16
    assert abs(values[2] - values[0]) > 1


def test_ifeval_is_paired_by_instruction(
    tiny_model: Path, lively_model: Path, tmp_path: Path, shared_data: Path
) -> None:
    suite = Suite(
        name="if",
        role=Role.gain,
        tasks=["ifeval_local"],
        include_path=str(shared_data / "lm_eval_tasks"),
        apply_chat_template=True,
        limit=8,
        gen_kwargs={"max_gen_toks": 16},
        metrics=["json_valid"],
    )
    results = [one(model, suite, tmp_path) for model in (tiny_model, lively_model)]
    rows = samples(results[0], "ifeval_local")
    scores = {score.metric: score for score in results[0].scores}
    for label in ("inst_level_strict_acc", "inst_level_loose_acc"):
        pairs = [row["weighted"][label] for row in rows]
        ratio = sum(pair[0] for pair in pairs) / sum(pair[1] for pair in pairs)
        assert scores[label].value == pytest.approx(ratio)
        assert math.isfinite(scores[label].stderr)
    deltas = {delta.metric: delta for delta in compare(*results)}
    assert len(deltas) == 5
    assert all(math.isfinite(delta.difference) and not delta.note for delta in deltas.values())


def test_metrics_of_a_published_task_are_those_of_each_filter(
    tiny_model: Path, tmp_path: Path, shared_data: Path
) -> None:
    suite = Suite(
        name="math",
        tasks=["gsm8k_local"],
        include_path=str(shared_data / "lm_eval_tasks"),
        limit=3,
        num_fewshot=0,
        gen_kwargs={"max_gen_toks": 8},
        metrics=["exact_match", "math", "f1"],
    )
    result = one(tiny_model, suite, tmp_path)
    metrics = {score.metric: score.is_main for score in result.scores}
    filters = ("strict-match", "flexible-extract")
    assert set(metrics) == {f"{m},{f}" for m in ("exact_match", "math", "f1") for f in filters}
    assert [name for name, is_main in metrics.items() if is_main] == ["exact_match,strict-match"]
    assert len(samples(result, "gsm8k_local")) == 6


def test_metrics_need_generated_answers(
    shared_data: Path, tmp_path: Path, tiny_model: Path
) -> None:
    folder = str(shared_data / "lm_eval_tasks")
    suite = Suite(name="x", tasks=["arc_easy_local"], include_path=folder, limit=2, metrics=["f1"])
    with pytest.raises(UserError, match="no task of suite 'x' generates any"):
        one(tiny_model, suite, tmp_path)


@pytest.mark.parametrize(
    ("given", "gathered"),
    [
        (["suite.prompts.a.source=x", "suite.limit=1"], ["suite.limit=1", "++suite.prompts={a:{source:x}}"]),
        (
            ["+suite.prompts.a-b.source='x,y'", "suite.prompts.a-b.limit=3"],
            ["++suite.prompts={a-b:{source:'x,y',limit:3}}"],
        ),
        (["evaluation.suites.s.texts.t.source=f=1"], ["++evaluation.suites.s.texts={t:{source:f=1}}"]),
        (["model.path=prompts.a.b"], ["model.path=prompts.a.b"]),
        (
            [f"ppo.reward.terms.t.{one}" for one in ("weight=0.1,0.5", "args.path=x", "args.k=range(1,3)")],
            ["++ppo.reward.terms=" + ",".join(
                f"{{t:{{weight:{w},args:{{path:x,k:{k}}}}}}}" for w in ("0.1", "0.5") for k in (1, 2)
            )],
        ),
        (["suite.prompts.a.source=(x"], ["++suite.prompts={a:{source:(x}}"]),
    ],
)  # fmt: skip
def test_keys_of_a_named_set_are_gathered(given: list[str], gathered: list[str]) -> None:
    from conf.arguments import arranged

    assert arranged(given) == gathered


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "evals", *argv],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )


def test_the_command_line(tiny_model: Path, tmp_path: Path) -> None:
    path = write(tmp_path / "my prompts.jsonl", [PARIS, PARIS])
    done = run(
        f"model.path={tiny_model}",
        "suite=freeform",
        f"suite.prompts.mine.source='{path}'",
        "suite.prompts.mine.limit=1",
        "suite.metrics=[f1,rougeL]",
        "suite.gen_kwargs.max_gen_toks=4",
        f"paths.root={tmp_path}",
        f"out={tmp_path / 'out'}",
    )
    assert done.returncode == 0, done.stderr
    result = EvalResult.load(tmp_path / "out")
    assert [(score.metric, score.n) for score in result.scores] == [("f1", 1), ("rougeL", 1)]
    gone = "suite.prompts.mine.source=gone.jsonl"
    done = run(f"model.path={tiny_model}", "suite=freeform", gone, f"paths.root={tmp_path}")
    assert (done.returncode, "Traceback" in done.stderr) == (2, False), done.stderr
    assert "there is no file 'gone.jsonl'" in done.stderr
