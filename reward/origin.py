"""What a reward depends on, so that rewards that were kept can be told from those of another."""

import contextlib
import importlib.metadata
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from conf.entry import plain
from conf.schema import Reward, Term
from reward.rewards import FUNCTION, MODEL
from reward.store import fingerprint, source_key
from reward.verify import VERIFIERS

_PACKAGE = Path(__file__).parent
# A change in these files can change a score of a reward model,
MODEL_CODE = [
    _PACKAGE / f"{name}.py" for name in ("model", "classifier", "ensemble", "remote", "turns")
]
# and in these any reward.
_CODE = [
    *MODEL_CODE,
    *(_PACKAGE / f"{name}.py" for name in ("rewards", "functions", "verify")),
    *(_PACKAGE / f"{name}.py" for name in ("sandbox", "inside", "seccomp")),
    _PACKAGE / "verifiers",
]


def origin(reward: Reward, cache: Path) -> dict[str, Any]:
    """The terms of a reward with what names the bytes that they read; JSON-like.

    Of a function the file of its module is known, not what that imports or asks elsewhere.

    Args:
        reward: checked before.
        cache: folder that remembers hashes of files.

    Raises:
        UserError: when a reward model's server cannot be reached, or its folder holds something else.
    """
    return {
        "terms": {name: plain(term) | _read(term, cache) for name, term in reward.terms.items()},
        "code": source_key(*_CODE),
    }


def device(models: Sequence[str]) -> str | None:
    """Where reward models score: a processor and a GPU round differently. None: all of them behind servers."""
    from reward.ensemble import is_remote

    if all(map(is_remote, models)):
        return None
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _read(term: Term, cache: Path) -> dict[str, Any]:
    """What a term reads, and the versions of the libraries that decide its score."""
    if term.kind == MODEL:
        return _of_models(term.args, cache)
    if term.kind == FUNCTION:
        return {"module": _module(str(term.args["function"]))}
    library = VERIFIERS[term.kind].library
    return {"versions": {library: _version(library)}} if library else {}


def _of_models(args: dict[str, Any], cache: Path) -> dict[str, Any]:
    from reward.ensemble import identity

    paths = args["path"] if isinstance(args["path"], list) else [args["path"]]
    scales = args.get("scales")
    return {
        "weights": [identity(path, args.get("revision"), cache) for path in paths],
        "scales": scales and fingerprint(Path(os.path.expanduser(scales))),
        "versions": {name: _version(name) for name in ("torch", "transformers")},
        "device": device(paths),
    }


def _module(function: str) -> str | None:
    """Hash of the file that a function is in; None where it cannot be found, which opening the reward tells better."""
    with contextlib.suppress(Exception):  # whatever the package around it does when it is imported
        spec = importlib.util.find_spec(function.partition(":")[0])
        if spec is not None and spec.origin:
            return fingerprint(Path(spec.origin))
    return None


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None
