"""Where a number comes from: the commit of this checkout, and the installed versions of libraries."""

import functools
import importlib.metadata
import subprocess
from pathlib import Path
from typing import Any


def installed(*names: str) -> dict[str, str | None]:
    """Installed versions of the named distributions, None for one that is absent. Imports none of them."""
    found: dict[str, str | None] = {}
    for name in names:
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
    except (OSError, subprocess.SubprocessError):
        return {"commit": None, "dirty": None}


def _git(root: Path, *arguments: str) -> str:
    if not (root / ".git").exists():
        raise OSError("not a checkout")
    done = subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=20
    )
    return done.stdout.strip()
