"""What a number was made with: commit, library versions, machine."""

import functools
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

from evals.gguf import llama_cpp_version

LIBRARIES = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "lm-eval", "deepspeed", "bitsandbytes", "torchao"
)  # fmt: skip


def versions(*names: str) -> dict[str, str | None]:
    """Installed versions of the named distributions, None for one that is absent. Imports none of them.

    `llama.cpp` is no distribution: its version is a hash of the program that is found.
    """
    found: dict[str, str | None] = {}
    for name in names or LIBRARIES:
        if name == "llama.cpp":
            found[name] = llama_cpp_version()
            continue
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


@functools.cache
def commit() -> dict[str, Any]:
    """`{"commit": sha, "dirty": bool}` of this project's checkout; None for both in an installed wheel."""
    root = Path(__file__).parent.parent
    try:
        sha = _git(root, "rev-parse", "HEAD")
        return {
            "commit": sha,
            "dirty": bool(_git(root, "status", "--porcelain", "--untracked-files=no")),
        }
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def _git(root: Path, *arguments: str) -> str:
    if not (root / ".git").exists():
        raise OSError("not a checkout")
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()


def provenance() -> dict[str, Any]:
    """Commit, versions and machine, as stored beside every result."""
    return {
        **commit(),
        "versions": versions(),
        "python": platform.python_version(),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "system": platform.system(),
        },
    }
