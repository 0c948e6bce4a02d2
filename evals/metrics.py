"""Metrics of generated answers: a table of names, and `load`, which makes a metric of the `evaluate` library of one.

`evaluate.load` fetches code from the hub and runs a copy of it under the user's home; these metrics are subclasses
of `evaluate.Metric` in this package, so they need neither a hub nor a writable home, and one version gives one number.
"""

import functools
import importlib
import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from conf.entry import UserError
from conf.passthrough import did_you_mean
from reward.verify import VERIFIERS

# What an answer adds to a metric: a value whose mean is the metric, or (value, weight, scale) as in
# `evals.pairing.Sample.weighted`. None is a gap: nothing can be said of this answer.
Value = float | tuple[float, float, str] | None


@dataclass(frozen=True)
class Metric:
    """A metric of generated text.

    `scorer` is "module:function" in evals.measures: (answers, references of each) → a `Value` for each answer. A
    `verifier` is a name in `reward.verify.VERIFIERS`, whose `needs` is a document's references or a column of it.
    """

    scorer: str
    unit: str
    library: str | None = None  # package whose version decides the number
    needs_reference: bool = True
    higher_is_better: bool = True
    verifier: str | None = None

    @property
    def needs_column(self) -> str | None:
        """The column of a document without which the metric says nothing."""
        need = VERIFIERS[self.verifier].needs if self.verifier else None
        return None if need == "references" else need


_SHARE, _POINTS = "0 to 1", "0 to 100"


def _verified(name: str) -> Metric:
    verifier = VERIFIERS[name]
    return Metric(
        "verified:scores",
        _SHARE,
        verifier.library,
        needs_reference=verifier.needs == "references",
        verifier=name,
    )


METRICS = {
    "exact_match": _verified("exact"),
    "squad_em": Metric("overlap:squad_em", _SHARE),
    "f1": Metric("overlap:f1", _SHARE),
    "rouge1": Metric("overlap:rouge1", _SHARE, "rouge_score"),
    "rouge2": Metric("overlap:rouge2", _SHARE, "rouge_score"),
    "rougeL": Metric("overlap:rouge_l", _SHARE, "rouge_score"),
    "bleu": Metric("corpus:bleu", _POINTS, "sacrebleu"),
    "chrf": Metric("corpus:chrf", _POINTS, "sacrebleu"),
    "math": _verified("math"),
    "json_valid": _verified("json_valid"),
    "json_exact": _verified("json_exact"),
    "json_schema": _verified("json_schema"),
    "ifeval": _verified("ifeval"),
    "perplexity": Metric(
        "fluency:perplexity",
        "from 1, per token",
        "transformers",
        needs_reference=False,
        higher_is_better=False,
    ),
}


@dataclass(frozen=True)
class Measurement:
    """A metric over answers: its value, standard error, the number of answers with a value, and what each adds.

    Without a single value, `value` is NaN.
    """

    value: float
    stderr: float
    n: int
    values: list[Value]


def check(names: Iterable[str]) -> None:
    """Refuse a name that no metric has.

    Raises:
        UserError: with the nearest name and the list.
    """
    for name in names:
        if name not in METRICS:
            hint = did_you_mean(name, METRICS)
            raise UserError(
                f"suite.metrics: there is no metric {name!r}.{hint} There are: {', '.join(METRICS)}"
            )


def libraries(names: Iterable[str]) -> list[str]:
    """The packages on whose versions the metrics depend."""
    found = {METRICS[name].library for name in names if name in METRICS}
    return sorted({"evaluate", *(library for library in found if library)}) if found else []


def load(name: str) -> Any:
    """The metric as an `evaluate.Metric`.

    Its `compute(predictions=[text…], references=[[text…]…])` gives `{name: value, "stderr", "n", "values"}`;
    `perplexity` takes no references, but `model=` and `tokenizer=`.
    """
    return _metric_class()(name)


def measure(
    name: str,
    answers: Sequence[str | None],
    references: Sequence[Sequence[str]],
    facts: Sequence[Mapping[str, Any]] | None = None,
    **options: Any,
) -> Measurement:
    """Score answers against their references; see `load`.

    Args:
        name: a name in METRICS.
        answers: the generated texts; None for one that failed, which is a gap. Shape (n,).
        references: the right answers of each; none is a gap for a metric that needs one. Shape (n, any).
        facts: the columns of each document, for a metric that needs one of them. Shape (n,).
        options: what the metric takes besides.
    """
    is_needed = METRICS[name].needs_reference
    usable = {
        number: answer
        for number, answer in enumerate(answers)
        if answer is not None and (references[number] or not is_needed)
    }
    values: list[Value] = [None] * len(answers)
    if not usable:
        return Measurement(math.nan, math.nan, 0, values)
    inputs: dict[str, Any] = {"predictions": [_encodable(answer) for answer in usable.values()]}
    if is_needed:
        inputs["references"] = [[_encodable(text) for text in references[i]] for i in usable]
    if METRICS[name].verifier:
        options["verifier"] = METRICS[name].verifier
        options["facts"] = None if facts is None else [facts[i] for i in usable]
    found = load(name).compute(**inputs, **options)
    for number, value in zip(usable, found["values"], strict=True):
        values[number] = value
    return Measurement(found[name], found["stderr"], found["n"], values)


def _encodable(text: str) -> str:
    """The text with half surrogate pairs replaced, which Arrow cannot hold."""
    return text.encode("utf-8", "replace").decode()


@functools.cache
def _metric_class() -> Any:
    """The subclass of `evaluate.Metric`; made here, so that the table can be read without the library."""
    import datasets
    import evaluate

    text = datasets.Value("string")

    class Generated(evaluate.Metric):  # type: ignore[misc]  # evaluate is untyped here
        """One row of METRICS."""

        def __init__(self, name: str) -> None:
            self.row, self.row_name = METRICS[name], name
            # The library makes a folder for its buffers, and never uses it when they are in memory.
            with tempfile.TemporaryDirectory() as folder:
                super().__init__(keep_in_memory=True, cache_dir=folder)

        def _info(self) -> Any:
            features = {"predictions": text}
            if self.row.needs_reference:
                features["references"] = datasets.Sequence(text)
            return evaluate.MetricInfo(
                description=f"{self.row_name}, {self.row.unit}",
                citation="",
                inputs_description="",
                features=datasets.Features(features),
            )

        def _compute(self, predictions: Any, references: Any = None, **options: Any) -> Any:
            return _computed(self.row_name, list(predictions), references, options)

    return Generated


def _computed(
    name: str, answers: list[str], references: Any, options: dict[str, Any]
) -> dict[str, Any]:
    module, function = METRICS[name].scorer.split(":")
    scorer = getattr(importlib.import_module(f"evals.measures.{module}"), function)
    texts = [[]] * len(answers) if references is None else [list(item) for item in references]
    values = scorer(answers, texts, **options)
    value, stderr, n = summary(values)
    return {name: value, "stderr": stderr, "n": n, "values": values}


def summary(values: Sequence[Value]) -> tuple[float, float, int]:
    """The metric that values form, its standard error (delta method, `evals.stats.contributions`), and their number."""
    from evals.stats import contributions

    present = [value for value in values if value is not None]
    if not present:
        return math.nan, math.nan, 0
    scale = next((value[2] for value in present if isinstance(value, tuple)), "mean")
    pairs = [value[:2] if isinstance(value, tuple) else (value, 1.0) for value in present]
    parts = contributions(pairs, scale)
    n = len(parts)
    mean = math.fsum(parts) / n
    spread = math.fsum((part - mean) ** 2 for part in parts)
    return mean, math.sqrt(spread / (n - 1) / n) if n > 1 else math.nan, n
