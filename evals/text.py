"""Suites of kind text: the loss on held-out text, and the divergence from a reference model on it."""

import contextlib
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from conf.entry import UserError
from conf.schema import Suite
from evals import heldout, likelihood, stats
from evals.heldout import Document
from evals.likelihood import AGREES, KL, LOSS, REFERENCE_LOSS
from evals.models import dtype_name, free_device, open_model
from evals.results import Score
from evals.run import Measured, Subject
from reward.store import content_key

_MAIN = "loss"
# metric of a divergence → what the reference itself has
_NEUTRAL = {"kl": 0.0, "top1_agreement": 1.0}
_HIGHER_IS_BETTER = frozenset({"top1_agreement"})

_SHOWN = 200  # characters of a document that its row keeps
_RESAMPLES = 200
# exp(709) is the largest that a float holds
_LARGEST_LOSS = 700.0


@dataclass(frozen=True)
class Passage:
    """A document in tokens; `size` is the number of bytes that the predicted ones stand for."""

    document: Document
    ids: list[int]
    size: int


def measure(subject: Subject, out: Path) -> Measured:
    """Score a model on held-out text; see `evals.run.KINDS`.

    With a reference, both models are in memory at once. Writes one JSONL a set into `out`, a row a document.

    Raises:
        UserError: when a text cannot be read, the windows are longer than a model reads, the reference has another
            tokenizer, or a loss is not finite.
    """
    suite = subject.request.suite
    texts = heldout.read(suite)
    model, tokenizer = subject.open()
    has_bos = _has_bos(tokenizer)
    passages = {
        name: _passages(name, text.documents, tokenizer, has_bos) for name, text in texts.items()
    }
    values = _values(subject, model, tokenizer, passages)
    free_device()  # of the reference
    settings = _settings(subject, texts, passages, has_bos, model)
    scores, samples = [], {}
    for name in texts:
        rows = [_row(*pair) for pair in zip(passages[name], values[name], strict=True)]
        samples[name] = f"samples_{name}.jsonl"
        with (out / samples[name]).open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        scores += [*_sums(name, rows), *_tail(name, values[name])]
    return Measured(settings, scores, samples)


def _has_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer starts a text with its BOS token; many have one that they do not use."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a")["input_ids"][:1] == [bos]


def _passages(
    name: str, documents: Sequence[Document], tokenizer: Any, has_bos: bool
) -> list[Passage]:
    """The documents of which at least one token can be predicted."""
    found = []
    for document in documents:
        # Not `verbose`: it would warn of documents longer than the model reads, which is what windows are for.
        ids = tokenizer(document.text, add_special_tokens=False, verbose=False)["input_ids"]
        size = document.size
        if has_bos:
            ids = [tokenizer.bos_token_id, *ids]
        elif ids:
            size -= _bytes_of_first(document.text, ids, tokenizer)
        if len(ids) > 1:
            found.append(Passage(document, ids, size))
    if not found:
        raise UserError(f"suite.texts.{name}: no document has two tokens, so nothing is predicted")
    return found


def _bytes_of_first(text: str, ids: list[int], tokenizer: Any) -> int:
    """Bytes of the first token, which nothing predicts where there is no BOS."""
    first = tokenizer.decode(ids[:1], clean_up_tokenization_spaces=False)
    # A token that is part of a character has no text of its own.
    return len(first.encode()) if text.startswith(first) else 1


def _values(
    subject: Subject, model: Any, tokenizer: Any, passages: dict[str, list[Passage]]
) -> dict[str, list[np.ndarray]]:
    """The columns of `likelihood.token_values` for each document of each set."""
    suite = subject.request.suite
    _check_length(suite, model, subject.request.model.path)
    with _reference(subject, model, tokenizer) as reference:
        values = {
            name: likelihood.token_values(
                model, [each.ids for each in found], suite.max_length, suite.batch_size, reference
            )
            for name, found in passages.items()
        }
    for name in passages:
        _check_finite(subject, name, passages[name], values[name])
    return values


@contextlib.contextmanager
def _reference(subject: Subject, model: Any, tokenizer: Any) -> Iterator[Any]:
    """The reference's model; the candidate's own where it is its own reference; None without one."""
    request, cache = subject.request, subject.cache
    if request.reference is None:
        yield None
    elif request.is_its_own_reference(cache):
        yield model
    else:
        with open_model(request.reference, request.reference_quantizer, cache) as opened:
            reference, its_tokenizer = opened
            _check_length(request.suite, reference, request.reference.path)
            _check_vocabulary(subject, (model, reference), (tokenizer, its_tokenizer))
            yield reference


def _check_length(suite: Suite, model: Any, path: str) -> None:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and suite.max_length > longest:
        raise UserError(
            f"suite.max_length={suite.max_length}, but {path} reads {longest} tokens at once: "
            f"set suite.max_length={longest} for every model that is compared"
        )


def _check_vocabulary(
    subject: Subject, models: tuple[Any, Any], tokenizers: tuple[Any, Any]
) -> None:
    """Refuse two models whose probabilities are of different things. Padded embeddings are no difference."""
    ours, theirs = (tokenizer.get_vocab() for tokenizer in tokenizers)
    narrowest = min(likelihood.vocabulary_of(model) for model in models)
    if ours != theirs or narrowest <= max(ours.values()):
        request = subject.request
        assert request.reference is not None
        raise UserError(
            f"the divergence (KL) of {request.model.path} from {request.reference.path} needs the same tokenizer and "
            f"a logit for each of its tokens; theirs have {len(ours):,} and {len(theirs):,} tokens, "
            f"the narrower model {narrowest:,} logits. Choose another reference, or none"
        )


def _check_finite(
    subject: Subject, name: str, passages: list[Passage], values: list[np.ndarray]
) -> None:
    request = subject.request
    about = f"{request.model.path} (quantizer {request.quantizer})"
    if request.reference is not None:
        about += f" or its reference {request.reference.path}"
    for passage, columns in zip(passages, values, strict=True):
        if not np.isfinite(columns).all():
            raise UserError(
                f"{about} gives no finite loss or divergence on document {passage.document.number} of {name}: "
                "its weights or its number format are broken (float16 overflows where bfloat16 does not)"
            )
    loss = np.concatenate([columns[LOSS] for columns in values]).mean()
    if loss > _LARGEST_LOSS:
        raise UserError(f"{about} has a loss of {loss:.0f} nats a token on {name}: it is broken")


def _settings(
    subject: Subject,
    texts: dict[str, heldout.HeldOut],
    passages: dict[str, list[Passage]],
    has_bos: bool,
    model: Any,
) -> dict[str, Any]:
    """All that must be equal for two results to be comparable; see `EvalResult.settings`."""
    import transformers

    suite = subject.request.suite
    return {
        "backend": f"transformers {transformers.__version__}",
        "device": model.device.type,
        "dtype": dtype_name(subject.request.model, model.config),
        "softmax_dtype": "float32",
        "batch_size": suite.batch_size,
        "max_length": suite.max_length,
        "windows": "disjoint, one token of context",
        "bos": has_bos,
        "limit": suite.limit,
        "sample_seed": suite.sample_seed,
        "texts": {
            name: {
                "limit": suite.texts[name].limit,
                "documents": content_key([document.text for document in text.documents]),
                # Equal where the tokenizers are, as far as this text can tell.
                "tokens": content_key([passage.ids for passage in passages[name]]),
                "n": len(passages[name]),
                "blank": text.blank,
                "too_short": len(text.documents) - len(passages[name]),
            }
            for name, text in texts.items()
        },
    }


def _row(passage: Passage, values: np.ndarray) -> dict[str, Any]:
    """What is kept of a document; see `evals.pairing.Sample`."""
    tokens = values.shape[1]
    loss = math.fsum(values[LOSS])
    row: dict[str, Any] = {
        "doc_id": passage.document.number,
        "doc_hash": content_key(passage.document.text),
        "kind": "text",
        "prompt": passage.document.text[:_SHOWN],
        "target": "",
        "answer": "",
        "metrics": {},
        "weighted": {
            "loss": [loss, tokens, "mean"],
            "perplexity": [-loss, tokens, "perplexity"],
            "bits_per_byte": [-loss, passage.size, "bits_per_byte"],
        },
    }
    if len(values) > 1:
        row["weighted"]["kl"] = [math.fsum(values[KL]), tokens, "mean"]
        row["weighted"]["top1_agreement"] = [math.fsum(values[AGREES]), tokens, "mean"]
        row["reference_loss"] = math.fsum(values[REFERENCE_LOSS])  # summed, as `loss`
    return row


def _sums(task: str, rows: list[dict[str, Any]]) -> Iterator[Score]:
    """The scores formed of the documents' sums, as `evals.results` forms them again."""
    for metric, (_, _, scale) in rows[0]["weighted"].items():
        pairs = [tuple(row["weighted"][metric][:2]) for row in rows]
        values = np.array(stats.contributions(pairs, scale))
        n = len(values)
        yield Score(
            task=task,
            metric=metric,
            value=math.fsum(values) / n,
            stderr=float(values.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan,
            n=n,
            higher_is_better=metric in _HIGHER_IS_BETTER,
            is_main=metric == _MAIN,
            neutral=_NEUTRAL.get(metric),
        )


def _tail(task: str, values: list[np.ndarray]) -> Iterator[Score]:
    """Where the model is furthest from its reference: quantiles of KL over the tokens of all documents.

    Their standard error is that of a bootstrap over documents; a maximum has none.
    """
    if len(values[0]) == 1:
        return
    documents = [columns[KL] for columns in values]
    n = len(documents)
    rng = np.random.default_rng(0)
    drawn = [
        np.quantile(np.concatenate([documents[i] for i in rng.integers(n, size=n)]), (0.95, 0.99))
        for _ in range(_RESAMPLES)
    ]
    errors = np.std(drawn, axis=0, ddof=1) if n > 1 else np.full(2, math.nan)
    found = np.quantile(np.concatenate(documents), (0.95, 0.99, 1.0))
    for metric, value, stderr in zip(
        ("kl_p95", "kl_p99", "kl_max"), found, [*errors, math.nan], strict=True
    ):
        yield Score(task, metric, float(value), float(stderr), n, False, False, neutral=0.0)
