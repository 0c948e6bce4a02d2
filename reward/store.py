"""Folders keyed by their content: built once, complete or absent.

A folder is built under a temporary name, its `manifest.json` is written last, and the whole is renamed into place. So a
manifest means done, a killed builder leaves nothing that counts, and builders that race build once (filelock).
"""

import contextlib
import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from filelock import FileLock

MANIFEST = "manifest.json"
_CHUNK = 1 << 22


def canonical(value: Any) -> str:
    """JSON text that is equal for equal values, whatever the order of their keys."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), default=str)


def content_key(value: Any) -> str:
    """16 hexadecimal digits (64 bits) that name a JSON-like value."""
    return hashlib.sha256(canonical(value).encode()).hexdigest()[:16]


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half of one."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with partial.open("w", encoding="utf-8") as file:
            json.dump(nan_to_null(value), file, indent=2, ensure_ascii=False, default=str)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def nan_to_null(value: Any) -> Any:
    """The value with null for every number that JSON does not know."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: nan_to_null(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [nan_to_null(item) for item in value]
    return value


def read_json(path: Path) -> Any:
    """The JSON value in a file."""
    return json.loads(path.read_text(encoding="utf-8"))


def is_complete(folder: Path) -> bool:
    """Whether `folder` was built to its end."""
    return (folder / MANIFEST).is_file()


def build_once(folder: Path, build: Callable[[Path], dict[str, Any]]) -> Path:
    """`folder`, built by `build` unless it is there.

    Args:
        folder: where the result belongs; its name should hold a content key.
        build: fills the empty folder that it is given and returns the manifest.

    Returns:
        `folder`, complete.
    """
    if is_complete(folder):
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{folder.name}.lock"):
        if is_complete(folder):  # another process built it while this one waited
            return folder
        partial = folder.parent / f".{folder.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)  # the rest of a killed builder
        partial.mkdir()
        try:
            manifest = build(partial)
            write_json(partial / MANIFEST, manifest)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        shutil.rmtree(folder, ignore_errors=True)
        settle(partial)
        os.replace(partial, folder)
    return folder


def settle(folder: Path) -> None:
    """Wait until all of a folder is on the disk: a power cut must not leave a name without its content."""
    for path in [*folder.rglob("*"), folder]:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def fingerprint(path: Path, cache: Path | None = None) -> str:
    """Hash of a file's bytes, or of all files below a folder with their relative names.

    Args:
        path: a file or a folder. A folder with a manifest that names its `key` is known by that key.
        cache: JSON file that remembers hashes by path, size and modification time.
    """
    if is_complete(path):
        key = read_json(path / MANIFEST).get("key")
        if key:
            return str(key)
    if path.is_file():
        return _file_hash(path, cache)
    files = sorted(file for file in path.rglob("*") if file.is_file())
    return content_key([(str(file.relative_to(path)), _file_hash(file, cache)) for file in files])


def _file_hash(path: Path, cache: Path | None) -> str:
    stat = path.stat()
    identity = f"{path.resolve()}:{stat.st_size}:{stat.st_mtime_ns}"
    known: dict[str, str] = {}
    if cache is not None and stat.st_size > _CHUNK:
        with contextlib.suppress(OSError, ValueError):
            known = read_json(cache)
        if identity in known:
            return known[identity]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    value = digest.hexdigest()[:16]
    if cache is not None and stat.st_size > _CHUNK:
        cache.parent.mkdir(parents=True, exist_ok=True)
        write_json(cache, known | {identity: value})
    return value


@functools.cache  # the code that runs is the code that was there at the start
def source_key(*paths: Path) -> str:
    """Hash of source files: the given ones, and all `.py` and `.yaml` below given folders."""
    files = [
        file
        for path in paths
        for file in ([path] if path.is_file() else sorted(path.rglob("*")))
        if file.suffix in (".py", ".yaml")
    ]
    return content_key([(file.name, _file_hash(file, None)) for file in files])
