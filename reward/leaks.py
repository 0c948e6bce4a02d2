"""Benchmarks in the training data: findings by row, and the index that they are found with."""

import os
import re
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.entry import UserError
from reward.child import overrides
from reward.duplicates import SEPARATOR
from reward.findings import KINDS, Finding
from reward.store import content_key

if TYPE_CHECKING:
    from reward.contamination import Hit

# A set that holds so much of a benchmark, or consists of it to that share, is the benchmark.
_SPLIT_SHARE = 0.5
_SPLIT_FEWEST = 5  # documents
_TEMPLATE_PROMPTS, _TEMPLATE_DOCUMENTS = 4, 2  # strong hits
_BATCH = 1000  # texts
# `task: NAME`, either of them quoted, as in the files that lm-eval's own scripts write; a list would be a group.
_TASK = re.compile(
    r"""^(["']?)task\1[ \t]*:[ \t]+(["']?)([^\s"'#\[{]+)\2[ \t]*(?:[ \t]#.*)?$""", re.MULTILINE
)


def find_leaks(texts: Iterable[str], rows: Sequence[int], index_file: Path) -> list[Finding]:
    """Rows that repeat a benchmark's text, and one error for each benchmark that is there as a whole.

    Args:
        texts: of the records.
        rows: of the records, in the same order.
        index_file: from `build_index`.
    """
    from reward.contamination import Index

    index = Index.load(index_file)
    hits: list[Hit] = []
    first: dict[str, tuple[int, Hit]] = {}
    leaking: dict[str, set[int]] = defaultdict(set)
    findings = []
    found: list[tuple[int, Hit]] = []
    prompts: list[int] = []  # of the hits
    start = 0
    unread = iter(texts)
    while batch := list(islice(unread, _BATCH)):
        for hit in index.find(batch):
            found.append((rows[start + hit.text], hit))
            prompts.append(hash(batch[hit.text].split(SEPARATOR, 1)[0]))
        start += len(batch)
    for (row, hit), is_leak in zip(found, _are_leaks(found, prompts), strict=True):
        kind = "contamination" if is_leak else "shared_phrase"
        findings.append(Finding(row, kind, KINDS[kind].severity, hit.detail))
        if hit.is_whole:
            hits.append(hit)
            leaking[hit.task].add(row)
            first.setdefault(hit.task, (row, hit))
    for coverage in index.coverage(hits):
        is_there = coverage.found >= _SPLIT_SHARE * coverage.searchable
        is_it = len(leaking[coverage.task]) >= _SPLIT_SHARE * start
        if coverage.found >= _SPLIT_FEWEST and (is_there or is_it):
            row, hit = first[coverage.task]
            detail = (
                f"{coverage.found:,} of {coverage.documents:,} documents of {coverage.task} are in the data, "
                f"such as {hit.detail}"
            )
            findings.append(Finding(row, "eval_split", KINDS["eval_split"].severity, detail))
    return findings


def _are_leaks(found: list[tuple[int, "Hit"]], prompts: list[int]) -> list[bool]:
    """Which hits are more than a phrase, or a template that rows and documents were both made with.

    A part of a document that stands in several prompts, or a row with a part of several documents of
    a task, has a template's words: a leak is of one document in one prompt, or of the whole.
    """
    prompts_of: dict[tuple[str, int], set[int]] = defaultdict(set)
    documents: Counter[tuple[int, str]] = Counter()
    for (row, hit), prompt in zip(found, prompts, strict=True):
        if hit.is_strong:
            prompts_of[hit.task, hit.doc].add(prompt)
            documents[row, hit.task] += 1
    return [
        hit.is_whole
        or (
            hit.is_strong
            and len(prompts_of[hit.task, hit.doc]) < _TEMPLATE_PROMPTS
            and documents[row, hit.task] < _TEMPLATE_DOCUMENTS
        )
        for row, hit in found
    ]


def build_index(against: list[str], folder: Path) -> Path:
    """The index of benchmarks, in a file of `folder` that is named by what it holds.

    Args:
        against: each a suite's name, a benchmark file or a folder of them, or a folder of lm-eval task files.
        folder: where the index is kept.

    Raises:
        UserError: if a benchmark cannot be read.
    """
    from reward.benchmarks import read_documents
    from reward.contamination import Index

    folder.mkdir(parents=True, exist_ok=True)
    documents = [
        document
        for number, name in enumerate(against)
        for document in read_documents(_documents_file(name, folder / f"documents-{number}.jsonl"))
    ]
    key = content_key([[d.task, d.doc, d.text] for d in documents])
    file = folder / f"index-{key}.arrow"
    if not file.is_file():
        Index.build(documents).save(file)
    return file


def _documents_file(name: str, out: Path) -> str:
    """A path that `read_documents` reads; what needs lm-eval is asked of `python -m evals.documents`."""
    path = Path(os.path.expanduser(name))
    tasks = sorted(path.glob("**/*.yaml")) if path.is_dir() else []
    if path.exists() and not tasks:
        return name
    values: dict[str, Any] = {"suite": name}
    if tasks:
        names = [found for file in tasks if (found := _task_name(file))]
        values = {"suite": "local", "suite.include_path": str(path), "suite.tasks": names}
    settings = overrides(values | {"out": str(out)})
    command = [sys.executable, "-m", "evals.documents", *settings]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        reason = done.stderr.strip().split("\n")[-1].removeprefix("error: ")
        raise UserError(f"--against {name}: it is no file or folder, and as a suite: {reason}")
    return str(out)


def _task_name(file: Path) -> str | None:
    """The task that an lm-eval task file defines; other YAML files define groups or defaults."""
    found = _TASK.search(file.read_text(encoding="utf-8-sig", errors="replace"))
    return found[3] if found else None
