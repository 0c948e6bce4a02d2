"""Evaluation from common prefixes beside plain lm-eval: the same answers, and log-likelihoods up to rounding."""

from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from conf.schema import Dtype, Model, Suite
from evals.results import EvalResult
from evals.run import Request, check_suite, evaluate

TOKENS = 700
TASKS = ["hellaswag_local", "cmmlu_local", "lambada_openai_local", "truthfulqa_mc2_local"]


def suite_of(shared_data: Path, **options: Any) -> Suite:
    include = str(shared_data / "lm_eval_tasks")
    settings = {"tasks": TASKS, "limit": 6, "num_fewshot": 2, "batch_size": 4} | options
    return Suite(name="prefixes", include_path=include, **settings)


def measured(
    model: Path, suite: Suite, root: Path, patch: pytest.MonkeyPatch
) -> tuple[EvalResult, dict[str, Any]]:
    """A result, and lm-eval's samples inside of it."""
    import lm_eval

    inside: dict[str, Any] = {}
    evaluate_inside = lm_eval.evaluate

    def spy(**kwargs: Any) -> Any:
        inside.update(evaluate_inside(**kwargs))
        return inside

    with patch.context() as patched:
        patched.setattr(lm_eval, "evaluate", spy, raising=False)
        request = Request(Model(path=str(model), dtype=Dtype.float32), "none", suite)
        return next(evaluate([request], root)), inside["samples"]


def test_answers_are_those_of_lm_eval(
    lively_model: Path,
    tmp_path: Path,
    shared_data: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain, theirs = measured(lively_model, suite_of(shared_data), tmp_path, monkeypatch)
    result, ours = measured(
        lively_model, suite_of(shared_data, tokens_at_once=TOKENS), tmp_path, monkeypatch
    )
    assert plain.folder != result.folder
    assert "longer than the 1024 tokens that the model reads" in capsys.readouterr().err
    gaps = []
    for task in TASKS:
        for mine, other in zip(ours[task], theirs[task], strict=True):
            assert mine["doc_id"] == other["doc_id"]
            assert mine["arguments"] == other["arguments"]
            for ((one, is_one),), ((two, is_two),) in zip(
                mine["resps"], other["resps"], strict=True
            ):
                assert is_one == is_two
                gaps.append(abs(one - two))
            for metric in set(mine) & {"acc", "acc_norm"}:
                # That of TruthfulQA is a share of probability, the others are right or wrong.
                within = 1e-4 if task == "truthfulqa_mc2_local" else 0
                assert mine[metric] == pytest.approx(other[metric], rel=within, abs=0)
    assert max(gaps) <= 1e-3
    assert len(gaps) > 40
    for one, two in zip(result.scores, plain.scores, strict=True):
        assert one.value == pytest.approx(two.value, rel=1e-4)


def test_a_broken_run_resumes_to_the_same_bytes(
    lively_model: Path, tmp_path: Path, shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evals.progress import Answers

    suite = suite_of(shared_data, tokens_at_once=TOKENS, tasks=TASKS[:2])
    kept: list[bytes] = []
    commit = Answers.commit

    def kept_commit(self: Answers) -> None:
        commit(self)
        if self._path.exists():
            kept.append(self._path.read_bytes())

    with monkeypatch.context() as patched:
        patched.setattr(Answers, "commit", kept_commit)
        request = Request(Model(path=str(lively_model), dtype=Dtype.float32), "none", suite)
        unbroken = next(evaluate([request], tmp_path / "whole"))
    journal = kept[-1].splitlines(keepends=True)
    assert len(journal) > 3
    for done in (1, len(journal) // 2, len(journal)):
        root = tmp_path / f"after{done}"
        file = root / "cache" / "answers" / f"{request.key(root / 'cache')}.jsonl"
        file.parent.mkdir(parents=True)
        file.write_bytes(b"".join(journal[:done]))
        resumed = next(evaluate([request], root))
        assert resumed.scores == unbroken.scores
        for name in unbroken.samples.values():
            assert (resumed.folder / name).read_bytes() == (unbroken.folder / name).read_bytes()


def test_no_tokens_are_too_few(shared_data: Path) -> None:
    with pytest.raises(UserError, match="tokens_at_once=0 must be at least 1"):
        check_suite(suite_of(shared_data, tokens_at_once=0))
