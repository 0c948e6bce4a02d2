"""Metrics of generated answers, against hand values, the libraries themselves, and brute force."""

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conf.entry import UserError
from conf.schema import Reward, Term
from evals import metrics
from evals.deltas import compare
from evals.measures import corpus, overlap
from evals.metrics import METRICS, Measurement, measure
from evals.results import EvalResult, Score
from reward.answers import Answer
from reward.verifiers import aside, structured, words
from reward.verifiers.maths import equivalent, texts_of

ANSWERS = [
    "the cat sat on the mat",
    "a dog barked loudly at night",
    "It rains in Spain, often.",
    "no",
]
REFERENCES = [
    ["the cat sat on a mat", "there is a cat on the mat"],
    ["the dog barked at night"],
    ["It rains in Spain, mainly.", "Spain is wet."],
    ["yes"],
]


def value_of(name: str, answer: str | None, *references: str) -> Any:
    (value,) = measure(name, [answer], [list(references)]).values
    return value


# Hand-computed; the SQuAD rows are the cases that its official script was written for.
@pytest.mark.parametrize(
    ("name", "answer", "reference", "expected"),
    [
        ("exact_match", " Paris\n", "Paris", 1),
        ("exact_match", "paris", "Paris", 0),
        ("squad_em", "The Paris!", "paris", 1),
        ("squad_em", "an apple a day", "apple day", 1),
        ("squad_em", "théâtre", "theatre", 0),
        ("squad_em", "thea", "a", 0),  # an article is a whole word
        ("f1", "the big red dog", "a red dog barks", 2 / 3),  # 2 shared of 3 and 3
        ("f1", "to be or not to be", "to be", 0.5),  # shared words count as often as in both
        ("f1", "", "42", 0),
        ("f1", "the", "a", 1),  # both are empty after the articles are gone
        ("json_valid", '{"a": [1, 2.5, null]}', "", 1),
        ("json_valid", "{'a': 1}", "", 0),
        ("json_valid", "NaN", "", 0),
        ("json_valid", 'Sure: {"a": 1}', "", 0),
        ("json_valid", "", "", 0),
        ("json_valid", "[" * 100_000, "", 0),
        ("json_valid", "9" * 5000, "", 0),  # Python reads no integer as long
        ("json_exact", '{"b": 2, "a": 1.0}', '{"a": 1, "b": 2}', 1),
        ("json_exact", "true", "1", 0),
        ("json_exact", "nothing", "null", 0),
        ("json_exact", "null", "null", 1),
    ],
)
def test_hand_values(name: str, answer: str, reference: str, expected: float) -> None:
    assert value_of(name, answer, reference) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["exact_match", "squad_em", "f1", "rouge1", "math"])
def test_the_best_of_several_references_counts(name: str) -> None:
    assert value_of(name, "42", "banana 7", "42") == 1


@pytest.mark.parametrize("name", ["rouge1", "rouge2", "rougeL"])
def test_rouge_is_that_of_rouge_score(name: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([name], use_stemmer=True)
    expected = [
        max(scorer.score(text, answer)[name].fmeasure for text in texts)
        for answer, texts in zip(ANSWERS, REFERENCES, strict=True)
    ]
    found = measure(name, ANSWERS, REFERENCES)
    assert found.values == pytest.approx(expected)
    assert found.value == pytest.approx(np.mean(expected))
    assert found.stderr == pytest.approx(np.std(expected, ddof=1) / 2)


def corpora(n: int, seed: int, noise: float) -> tuple[list[str], list[list[str]]]:
    """Texts and noisy copies of them of other lengths."""
    draw = random.Random(seed)
    words = [f"w{number}" for number in range(40)]
    answers, references = [], []
    for _ in range(n):
        text = draw.choices(words, k=draw.randint(5, 25))
        references.append([" ".join(text)])
        copy = [draw.choice(words) if draw.random() < noise else word for word in text]
        answers.append(" ".join(copy[: max(1, int(len(copy) * draw.uniform(0.6, 1.1)))]))
    return answers, references


def published(name: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    import sacrebleu

    function = {"bleu": sacrebleu.corpus_bleu, "chrf": sacrebleu.corpus_chrf}[name]
    most = max(map(len, references))
    columns = [[texts[k] if k < len(texts) else None for texts in references] for k in range(most)]
    return float(function(list(answers), columns).score)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
@pytest.mark.parametrize("case", ["short", "noisy", "several", "long"])
def test_corpus_metrics_are_those_of_sacrebleu(name: str, case: str) -> None:
    answers, references = {
        "short": corpora(30, 0, 0.1),
        "noisy": corpora(30, 1, 0.8),  # orders without a match are smoothed
        "several": (ANSWERS, REFERENCES),
        "long": (["a b c d e f g", "x y z a b c"], [["a b c d"], ["x y z"]]),
    }[case]
    found = measure(name, answers, references)
    assert found.value == pytest.approx(published(name, answers, references), rel=1e-12)


def jackknife(name: str, answers: Sequence[str], references: Sequence[Sequence[str]]) -> float:
    """Standard error from leaving out one answer at a time (Efron and Stein 1981)."""
    n = len(answers)
    left = np.array(
        [
            published(
                name, [*answers[:i], *answers[i + 1 :]], [*references[:i], *references[i + 1 :]]
            )
            for i in range(n)
        ]
    )
    return float(np.sqrt((n - 1) / n * ((left - left.mean()) ** 2).sum()))


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_their_standard_errors_are_those_of_jackknife_and_bootstrap(name: str) -> None:
    answers, references = corpora(60, 2, 0.3)
    found = measure(name, answers, references)
    assert found.stderr == pytest.approx(jackknife(name, answers, references), rel=0.05)
    draw = np.random.default_rng(0)
    picks = [draw.integers(0, 60, 60) for _ in range(120)]
    again = [published(name, [answers[i] for i in p], [references[i] for i in p]) for p in picks]
    assert found.stderr == pytest.approx(np.std(again, ddof=1), rel=0.25)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_the_slopes_are_those_of_differences(name: str) -> None:
    answers, references = corpora(20, 3, 0.3)
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    metric, slope = (BLEU(), corpus._bleu_slope) if name == "bleu" else (CHRF(), corpus._chrf_slope)
    counts = np.array(metric._extract_corpus_statistics(answers, [[r[0] for r in references]]))
    total = counts.sum(axis=0).astype(float)
    value = metric._compute_score_from_stats(list(total)).score
    found = slope(total, value)
    for place in range(len(total)):
        # sacrebleu truncates the two lengths to integers
        step = 1.0 if name == "bleu" and place < 2 else 1e-3
        ends = []
        for sign in (1, -1):
            moved = total.copy()
            moved[place] += sign * step
            ends.append(metric._compute_score_from_stats(list(moved)).score)
        assert found[place] == pytest.approx((ends[0] - ends[1]) / 2 / step, rel=2e-3, abs=1e-9)


@pytest.mark.parametrize("name", ["bleu", "chrf"])
def test_nothing_in_common_is_zero(name: str) -> None:
    found = measure(name, ["", "x"], [["abc def"], ["yz"]])
    assert (found.value, found.stderr) == (0, 0)


def result_of(folder: Path, found: Measurement, n: int) -> EvalResult:
    """A result with one corpus metric, as the harness writes it."""
    folder.mkdir()
    rows = [
        {"doc_id": i, "doc_hash": "h", "answer": f"{folder.name}{i}", "metrics": {}, "weighted": {"m": value}}
        for i, value in enumerate(found.values)
    ]  # fmt: skip
    (folder / "samples_t.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = Score("t", "m", found.value, found.stderr, n, True, True)
    return EvalResult({}, "none", "s", "gain", {}, [score], {"t": "samples_t.jsonl"}, {}, folder=folder)  # fmt: skip


def test_bleu_of_two_models_is_compared_in_pairs(tmp_path: Path) -> None:
    answers, references = corpora(60, 4, 0.2)
    draw = random.Random(5)
    worse = [" ".join(w for w in text.split() if draw.random() > 0.05) or "w" for text in answers]
    sides = [measure("bleu", texts, references) for texts in (answers, worse)]
    (delta,) = compare(*(result_of(tmp_path / str(i), s, 60) for i, s in enumerate(sides)))
    assert delta.difference == pytest.approx(sides[1].value - sides[0].value)
    left = np.array(
        [
            published("bleu", worse[:i] + worse[i + 1 :], references[:i] + references[i + 1 :])
            - published(
                "bleu", answers[:i] + answers[i + 1 :], references[:i] + references[i + 1 :]
            )
            for i in range(60)
        ]
    )
    expected = math.sqrt(59 / 60 * ((left - left.mean()) ** 2).sum())
    assert delta.stderr == pytest.approx(expected, rel=0.05)
    assert delta.stderr < math.hypot(sides[0].stderr, sides[1].stderr) / 2  # what pairing is for
    assert math.isnan(delta.flips)


# math-verify's own cases, and answers that mean harm.
EQUAL = [
    ("42", "42"),
    ("The answer is 1,234.", "1234"),
    ("so 6 * 7 = 42\n#### 42", "He has 6.\n#### 42"),
    (r"Thus \boxed{\frac{1}{2}}", "0.5"),
    ("1/2", r"\frac{2}{4}"),
    (r"$\sqrt{8}$", r"2\sqrt{2}"),
    ("x**2 + 1", "1+x^2"),
    (r"\{1, 2\}", r"\{2, 1\}"),
    ("50%", r"50\%"),
    ("2**10", "1024"),
    (r"\boxed{" * 30 + "3" + "}" * 30, "3"),
]
UNEQUAL = [
    ("41", "42"),
    ("", "42"),
    ("[invalid]", "3"),
    ("2", "x^2"),
    ("-3", "3"),
    ("__import__('os').system('touch /tmp/never')", "42"),
    ("exec(open('/etc/passwd').read())", "42"),
    ("{" * 50, "42"),
    ("$" + "(" * 40 + "1$", "7"),
    ("10**10**10", "10"),
    ("9" * 20_000, "9"),
]


def test_mathematics() -> None:
    cases = [*EQUAL, *UNEQUAL]
    found = equivalent([Answer([], answer, [reference]) for answer, reference in cases])
    assert found == [1.0] * len(EQUAL) + [0.0] * len(UNEQUAL)


def test_what_cannot_be_computed_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(aside, "SECONDS", 1)
    tower = "$10^{10^{10^{10}}}$"
    cases = [(tower, "3"), ("$9!!!!!$", "3"), ("7", "7")]
    found = equivalent([Answer([], answer, [reference]) for answer, reference in cases])
    assert found == [0.0, 0.0, 1.0]  # and the next question finds a process again


def test_a_reference_that_is_no_mathematics_is_a_gap() -> None:
    assert measure("math", ["42", "7"], [["banana"], ["7"]]).values == [None, 1.0]


@given(st.text(max_size=60))
def test_every_text_has_readings(text: str) -> None:
    *_, last = texts_of(text)
    assert last in text.replace("\\%", "%")


def exact_match(answers: list[str], references: list[list[str]]) -> list[float]:
    return words.exact([Answer([], *pair) for pair in zip(answers, references, strict=True)])


@given(st.text(max_size=40), st.text(max_size=40))
def test_overlap_is_a_share_and_symmetric(one: str, other: str) -> None:
    for metric in (exact_match, overlap.squad_em, overlap.f1):
        (there,), (back,) = metric([one], [[other]]), metric([other], [[one]])
        assert 0 <= there == back <= 1
        assert metric([one], [[one]]) == [1]
    assert exact_match([one], [[other]]) <= overlap.squad_em([one], [[other]])
    assert overlap.squad_em([one], [[other]]) <= overlap.f1([one], [[other]])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


@given(JSON, st.text(max_size=30))
def test_json_of_any_value_is_its_own_equal(value: Any, text: str) -> None:
    plain, spaced = json.dumps(value), json.dumps(value, indent=2, sort_keys=True)
    if "Infinity" not in plain:
        assert structured.json_exact([Answer([], spaced, [plain])]) == [1]
    assert structured.json_valid([Answer([], text)])[0] in (0, 1)


@settings(max_examples=25, deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=20), st.text(min_size=1, max_size=20)), min_size=1, max_size=4
    )
)
def test_corpus_metrics_take_any_text(pairs: list[tuple[str, str]]) -> None:
    answers, references = [a for a, _ in pairs], [[r] for _, r in pairs]
    for name in ("bleu", "chrf"):
        found = measure(name, answers, references)
        assert 0 <= found.value <= 100 + 1e-9
        parts = [value[0] for value in found.values if isinstance(value, tuple)]
        assert np.mean(parts) == pytest.approx(found.value, rel=1e-6, abs=1e-9)


def test_a_metric_is_the_verifier_that_rewards() -> None:
    from reward.rewards import open_reward

    row: dict[str, Any] = {
        "prompt": "Answer in JSON.",
        "schema": {"type": "object"},
        "instruction_id_list": ["detectable_format:json_format"],
        "kwargs": [{}],
    }
    texts, rows = ['{"a": 1}', "[2]", "42", "no", "{}"], [row, row, row, row, {}]
    references = [['{"a": 1.0}'], ["[2]"], ["42.0"], ["7"], []]
    names = {metric.verifier: name for name, metric in METRICS.items() if metric.verifier}
    assert set(names) == {"exact", "math", "json_valid", "json_exact", "json_schema", "ifeval"}
    with open_reward(Reward({name: Term(name) for name in names})) as function:
        cases = zip(texts, references, rows, strict=True)
        rewards = function([Answer([], *case) for case in cases]).terms
    for verifier, name in names.items():
        values = measure(name, texts, references, rows).values
        assert [math.nan if v is None else v for v in values] == pytest.approx(
            rewards[str(verifier)], nan_ok=True
        )
        assert 0 in values
        assert 1 in values


def test_gaps_are_not_zeros() -> None:
    found = measure("f1", ["a b", None, "", "a b"], [["b"], ["b"], ["b"], []])
    assert found.values == [1.0, None, 0.0, None]
    assert (found.value, found.n) == (0.5, 2)
    nothing = measure("f1", [None], [["b"]])
    assert math.isnan(nothing.value)
    assert nothing.n == 0
    bleu = measure("bleu", [*ANSWERS, None], [*REFERENCES, ["x"]])
    assert bleu.values[-1] is None
    assert bleu.value == pytest.approx(published("bleu", ANSWERS, REFERENCES))


def test_perplexity_is_exp_of_the_loss(tiny_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    texts = ["The cat sat.", "", "Über allen Gipfeln ist Ruh"]
    found = measure("perplexity", texts, [[]] * 3, model=model, tokenizer=tokenizer)
    losses, tokens = [], []
    for text in (texts[0], texts[2]):
        ids = torch.tensor([[0, *tokenizer(text)["input_ids"]]])  # 0 is the first token
        with torch.inference_mode():
            losses.append(float(model(ids, labels=ids).loss) * (ids.numel() - 1))
        tokens.append(ids.numel() - 1)
    assert found.value == pytest.approx(math.exp(sum(losses) / sum(tokens)), rel=1e-5)
    assert (found.n, found.values[1]) == (2, None)


def test_a_metric_is_one_of_the_evaluate_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import evaluate

    monkeypatch.setenv("HF_HOME", str(tmp_path / "none"))
    metric = metrics.load("squad_em")
    assert isinstance(metric, evaluate.Metric)
    assert metric.compute(predictions=["The end."], references=[["end"]])["squad_em"] == 1
    assert not (tmp_path / "none").exists()


def test_every_scorer_exists() -> None:
    import importlib

    for metric in METRICS.values():
        module, function = metric.scorer.split(":")
        assert callable(getattr(importlib.import_module(f"evals.measures.{module}"), function))


def test_an_unknown_metric_is_named() -> None:
    with pytest.raises(UserError, match=r"no metric 'rougel'\. Did you mean 'rougeL'"):
        metrics.check(["f1", "rougel"])


def test_rouge_does_not_judge_what_it_cannot_read() -> None:
    from evals.measures.overlap import rouge_l

    found = rouge_l(["我爱北京", "the cat"], [["我爱北京"], ["the cat"]])
    assert found == [None, 1]
