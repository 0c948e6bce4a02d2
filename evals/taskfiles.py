"""What the task files in a folder of yours depend on: themselves, and the data files that they name.

A result is found again by its key, before any task is loaded; so the data are found by reading the text of the task
files, which costs milliseconds, instead of by running them, which costs seconds.
"""

import functools
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from reward.store import fingerprint

# `sft/gsm8k.train.jsonl.gz`, `/data/*.parquet`
_DATA_FILE = re.compile(
    r"""[^\s"'`,:;|(){}\[\]=]+\.(?:jsonl?|ndjson|csv|tsv|txt|parquet|arrow)(?:\.(?:gz|zst|bz2|xz))?\b"""
)
# `os.environ.get("LOCAL_DATA_DIR")`, `os.environ["X"]`, `os.getenv("X")`
_VARIABLE = re.compile(r"""(?:environ(?:\.get\(|\[)|getenv\()\s*["'](\w+)["']""")


def content(include_path: str | None, cache: Path) -> dict[str, Any] | None:
    """Hashes of all that a folder of task files says and names; equal content elsewhere gives the same.

    A data file counts where its name is absolute, or relative to the task file, to a folder above it up to the parent
    of `include_path`, to the working directory, or to a folder that an environment variable names which the files read.
    A glob may hold `*`, not `**`: that could mean the whole disk.
    """
    if include_path is None:
        return None
    folder = Path(include_path).resolve()
    files = sorted(
        file
        for file in folder.rglob("*")
        if file.is_file() and not _is_made(file.relative_to(folder))
    )
    texts = {
        file: file.read_text(encoding="utf-8", errors="replace")
        for file in files
        if file.suffix in (".yaml", ".yml", ".py", "")
    }
    variables = {name for text in texts.values() for name in _VARIABLE.findall(text)}
    values = {name: value for name in variables if (value := os.environ.get(name))}
    places = [Path(value) for value in values.values() if Path(value).is_dir()]
    hashed = functools.cache(lambda file: fingerprint(file, cache / "fingerprints.json"))
    named = {  # 57 subjects of MMLU name the same two files
        (name, data)
        for file, text in texts.items()
        for name in set(_DATA_FILE.findall(text))
        for data in _found(name, [*_between(file, folder.parent), *places, Path.cwd()])
    }
    return {
        "files": [(str(file.relative_to(folder)), hashed(file)) for file in files],
        "data": sorted({(name, hashed(data)) for name, data in named}),
        "settings": {k: v for k, v in sorted(values.items()) if not Path(v).is_dir()},
    }


def _is_made(file: Path) -> bool:
    """Whether Python or an editor made the file: the first run leaves a `__pycache__`."""
    return any(part == "__pycache__" or part.startswith(".") for part in file.parts)


def _between(file: Path, top: Path) -> Iterator[Path]:
    """The folders above a file, up to `top`."""
    for folder in file.parents:
        yield folder
        if folder == top:
            return


def _found(name: str, places: list[Path]) -> list[Path]:
    """The files that a name or a glob means, in all places where it means some."""
    path = Path(
        os.path.expanduser(name)
    )  # unlike `Path.expanduser`, it leaves `~backup.csv` as it is
    if path.is_absolute():
        places, path = [Path(path.anchor)], path.relative_to(path.anchor)
    if "**" in path.parts:
        return []
    if ".." in path.parts:  # no glob can have them
        return sorted({found for place in places if (found := (place / path).resolve()).is_file()})
    return sorted({found for place in places for found in place.glob(str(path)) if found.is_file()})
