"""`python -m evals.prefetch suite=NAME [model.path=…]`: bring what an evaluation needs into the local caches.

What is fetched is then opened by a second process under `offline=true`: "ready offline" is tried, not assumed.
"""

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from conf.entry import UserError, entry
from conf.schema import Kind, Model, Prefetch, Source, Suite, TaskSource, Text
from evals import punkt
from reward import network


@dataclass(frozen=True)
class Item:
    """One thing that is here: what it is, where it is, and its size."""

    name: str
    where: str
    bytes: int


def fetch(suite: Suite, model: Model | None, root: Path) -> Iterator[Item]:
    """Everything that measuring `model` on `suite` reads, brought here where it is not, as it is found.

    Raises:
        UserError: naming what cannot be had, and why.
    """
    if model is not None:
        yield from _model(model, root / "cache")
    if suite.kind is Kind.tasks:
        yield from _tasks(suite)
    for name, prompts in suite.prompts.items():
        yield _rows(f"prompts {name}", prompts)
    for name, text in suite.texts.items():
        yield _rows(f"text {name}", text)


def _model(model: Model, cache: Path) -> Iterator[Item]:
    from evals.models import check, load_tokenizer
    from reward.gguf import gguf_file, is_gguf
    from reward.weights import is_local

    check(model)
    parts = {"model": (model.path, model.revision)}
    if model.adapter:
        parts["adapter"] = (model.adapter, None)
    for name, (path, revision) in parts.items():
        if is_gguf(path):
            where = gguf_file(path)
        elif is_local(path):
            where = Path(path).expanduser()
        else:
            where = _snapshot(path, revision)
        yield Item(f"{name} {path}", str(where), _size(where))
    if not is_gguf(
        model.path
    ):  # a GGUF is converted when it is first opened; nothing is fetched for that
        load_tokenizer(model, cache)


def _snapshot(repository: str, revision: str | None) -> Path:
    """A hub repository's files in the local cache, without the formats that are not loaded."""
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision,
                allow_patterns=[
                    "*.safetensors",
                    "*.json",
                    "*.model",
                    "*.txt",
                    "*.jinja",
                    "*.tiktoken",
                ],
                local_files_only=network.is_closed(),
            )
        )
    except Exception as error:  # of the hub's client, of the network below it, of the disk
        raise UserError(
            f"{repository} is not here and cannot be fetched: {_reason(error)}"
        ) from error


def _tasks(suite: Suite) -> Iterator[Item]:
    from evals import harness, offline

    for group in harness.load_groups(suite):
        punkt.require(group.name, group.tasks, group.documents)
        if suite.source is TaskSource.offline:
            yield Item(f"task {group.name}", str(offline.root()), _size(offline.root()))
            continue
        files = {
            Path(file["filename"])
            for task in group.tasks.values()
            for split in (task.dataset or {}).values()
            for file in getattr(split, "cache_files", [])
        }
        folders = sorted({str(file.parent) for file in files}) or ["in memory"]
        where = folders[0] + (f" and {len(folders) - 1} more" if len(folders) > 1 else "")
        yield Item(f"task {group.name}", where, sum(map(_size, files)))


def _rows(name: str, source: Source | Text) -> Item:
    """The rows of a hub dataset, or the files that a source names."""
    import datasets

    from evals import offline
    from reward.sources import local_files

    if source.source.startswith("offline:"):
        return Item(name, str(offline.root()), _size(offline.root()))
    if source.source.startswith("demo:"):
        return Item(name, source.source, 0)
    if files := local_files(source.source):
        return Item(name, str(files[0].parent), sum(map(_size, files)))
    try:
        rows = datasets.load_dataset(
            source.source, source.name, split=source.split, revision=source.revision
        )
    except Exception as error:
        raise UserError(
            f"{source.source} is not here and cannot be fetched: {_reason(error)}"
        ) from error
    found = [Path(file["filename"]) for file in rows.cache_files]
    return Item(name, str(found[0].parent) if found else "in memory", sum(map(_size, found)))


def _size(path: Path) -> int:
    """Bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def _is_ready_offline(overrides: list[str]) -> None:
    """Do it all again in a process that may not connect.

    Raises:
        UserError: with what is still missing there.
    """
    argv = [sys.executable, "-m", "evals.prefetch", *overrides, "offline=true"]
    done = subprocess.run(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False
    )
    if done.returncode:
        told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        why = told[-1].removeprefix("error: ") if told else done.stderr.strip()[-1000:]
        raise UserError(f"fetched, but not usable offline: {why}")


@entry("prefetch", Prefetch)
def main(config: Prefetch, overrides: list[str]) -> float | None:
    """Fetch, list what is here, and try it offline."""
    from evals.run import check_suite
    from reward.quiet import quiet

    check_suite(config.suite)
    # A hub that does not answer is told apart here: its clients, closed in time, look into their caches at once.
    trouble = None if config.offline else network.hub_trouble()
    if trouble:
        print(
            f"{network.hub()} does not answer ({trouble}): only what is here already can be used",
            file=sys.stderr,
        )
    if config.offline or trouble:
        network.close()
    quiet()
    model = config.model if config.model.path else None
    try:
        for item in fetch(config.suite, model, Path(config.paths.root)):
            print(f"{item.name:40} {item.bytes / 1e6:10,.1f} MB  {item.where}")
    except UserError as error:
        if trouble is None:
            raise
        raise UserError(
            f"{network.hub()} does not answer ({trouble}), and not all is here yet: {error}. Give this command where "
            "there is a network, or set HTTPS_PROXY or HF_ENDPOINT"
        ) from error
    if not config.offline:
        _is_ready_offline([o for o in overrides if not o.lstrip("+").startswith("offline=")])
    print("ready offline")
    return None


if __name__ == "__main__":
    main()
