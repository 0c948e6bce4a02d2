"""What a reward depends on, so that rewards that were kept can be told from those of another."""

import contextlib
import importlib.metadata
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from conf.entry import plain
from conf.schema import Reward, Term
from reward.store import fingerprint, source_key
from reward.verify import VERIFIERS

_PACKAGE = Path(__file__).parent
# A change in these files can change a reward.
_FILES = ("verif*", "rewards.py", "functions.py", "model.py", "classifier.py", "ensemble.py")
_CODE = [path for name in _FILES for path in sorted(_PACKAGE.glob(name))]


def origin(reward: Reward, cache: Path) -> dict[str, Any]:
    """The terms of a reward with hashes of what they read; JSON-like.

    Args:
        reward: checked before.
        cache: folder that remembers hashes of files.
    """
    return {
        "terms": {name: _term(term, cache) for name, term in reward.terms.items()},
        "code": source_key(*_CODE),
    }


def _term(term: Term, cache: Path) -> dict[str, Any]:
    """A term, its files by content, and the versions of the libraries that decide its score."""
    known = cache / "fingerprints.json"
    files = {text: fingerprint(path, known) for text, path in _files(term) if path.exists()}
    libraries = ["torch", "transformers"] if term.kind == "model" else []
    if term.kind in VERIFIERS and (library := VERIFIERS[term.kind].library):
        libraries = [library]
    found = {
        **plain(term),
        "files": files,
        "versions": {name: _version(name) for name in libraries},
    }
    return found | {"device": _device()} if term.kind == "model" else found


def _files(term: Term) -> Iterator[tuple[str, Path]]:
    """The arguments that may name a file, a folder or, of a function, a module."""
    for text in _texts(term.args):
        yield text, Path(text).expanduser()
        if term.kind == "function":
            with contextlib.suppress(ImportError, ValueError, AttributeError):
                module = text.partition(":")[0] if ":" in text else text.rpartition(".")[0]
                spec = importlib.util.find_spec(module)
                if spec is not None and spec.origin:
                    yield text, Path(spec.origin)


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _texts(item)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"  # they round differently
