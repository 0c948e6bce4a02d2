"""Evaluate models on suites, each result cached by everything that it depends on."""

import dataclasses
import itertools
import shutil
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.schema import Model, Suite
from evals.models import check, identity, open_model
from evals.provenance import provenance, versions
from evals.quantize import QUANTIZERS, QuantizerUnavailable, find
from evals.results import EvalResult
from evals.store import build_once, content_key, source_key

_PACKAGE = Path(__file__).parent
# A change in these files can change a number.
_CODE = [
    *(
        _PACKAGE / name
        for name in ("harness.py", "models.py", "offline.py", "quantize.py", "tasks")
    ),
    _PACKAGE.parent / "reward" / "demo.py",
]


@dataclass(frozen=True)
class Request:
    """One model, in one number format, on one suite."""

    model: Model
    quantizer: str
    suite: Suite

    def key(self, cache: Path) -> str:
        """Names the result by what it depends on. Hashes local weights; loads nothing."""
        libraries = ["torch", "transformers", "lm-eval", "peft"]
        if library := QUANTIZERS[self.quantizer].library:
            libraries.append(library)
        include = self.suite.include_path
        suite = dataclasses.asdict(self.suite)
        return content_key(
            {
                "model": identity(self.model, cache),
                "quantizer": self.quantizer,
                "suite": {
                    key: value for key, value in suite.items() if key not in ("name", "role")
                },
                "code": source_key(*_CODE, *([Path(include)] if include else [])),
                "versions": versions(*libraries),
                "accelerator": shutil.which("nvidia-smi") is not None,
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


def evaluate(requests: Iterable[Request], root: Path) -> Iterator[EvalResult]:
    """Results in the order of `requests`; those of one model and quantizer share one loading of it.

    Args:
        requests: what to evaluate; put equal models beside each other.
        root: folder under which results and converted models are kept.
    """
    for (model, quantizer), group in itertools.groupby(
        requests, key=lambda r: (r.model, r.quantizer)
    ):
        todo = list(group)
        missing = [
            request for request in todo if not (request.folder(root) / "manifest.json").is_file()
        ]
        if missing:
            _evaluate_one_model(model, quantizer, missing, root)
        for request in todo:
            yield EvalResult.load(request.folder(root))


def _evaluate_one_model(model: Model, quantizer: str, requests: list[Request], root: Path) -> None:
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        with open_model(model, quantizer, root / "cache") as (loaded, tokenizer):
            for request in requests:

                def build(out: Path, request: Request = request) -> dict[str, Any]:
                    return _measure(loaded, tokenizer, request, out, root, device)

                build_once(request.folder(root), build)
    except QuantizerUnavailable as error:
        for request in requests:

            def skip(
                out: Path, request: Request = request, reason: str = str(error)
            ) -> dict[str, Any]:
                return _save(request, out, root, settings={}, scores=[], samples={}, skipped=reason)

            build_once(request.folder(root), skip)


def _measure(
    loaded: Any, tokenizer: Any, request: Request, out: Path, root: Path, device: str
) -> dict[str, Any]:
    from evals import harness

    started = time.monotonic()
    groups = harness.load_groups(request.suite)
    dtype = request.model.dtype.value
    settings = harness.settings(request.suite, groups, tokenizer, dtype, device)
    scores, samples = harness.score(loaded, tokenizer, request.suite, groups, out)
    return _save(
        request,
        out,
        root,
        settings=settings,
        scores=scores,
        samples=samples,
        seconds=round(time.monotonic() - started, 1),
    )


def _save(request: Request, out: Path, root: Path, **found: Any) -> dict[str, Any]:
    cache = root / "cache"
    result = EvalResult(
        model={
            "path": request.model.path,
            "revision": request.model.revision,
            **identity(request.model, cache),
        },
        quantizer=request.quantizer,
        suite=request.suite.name,
        role=request.suite.role.value,
        provenance=provenance(),
        **found,
    )
    result.save(out)
    return {"key": request.key(cache), "settings_hash": result.settings_hash}
