"""From a source to a data version: read, looked through, cleaned, written, named by its content."""

import hashlib
import inspect
import itertools
import json
import math
import os
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.entry import UserError
from conf.passthrough import did_you_mean
from conf.schema import Data, Order, Part, Source
from reward import sources
from reward.findings import UNUSABLE, Finding, escalate
from reward.provenance import installed
from reward.records import KINDS, NORMALISERS
from reward.store import (
    build_once,
    content_key,
    source_key,
    write_json,
)
from reward.versions import (
    AUDIT,
    FACTS_FILE,
    RECORDS,
    REMOVED,
    Version,
    is_version,
    read_column,
    take,
)
from reward.workers import cores

_HERE = Path(__file__).parent
# What finds faults and duplicates, mends texts and draws rows, besides this package.
_LIBRARIES = (
    "detect-secrets",
    "ftfy",
    "numpy",
    "phonenumbers",
    "py3langid",
    "python-stdnum",
    "rensa",
)

_SHOWN_PROBLEMS = 5
_BATCH = 1000  # records; fixed, so that equal records are equal bytes
_AT_ONCE = 50 * _BATCH  # records in memory while a version is written

# What to say when a stage is given records of another kind.
_NEEDS = {
    "sft": "demonstrations (messages, sharegpt, alpaca, completion, reasoning or qa)",
    "preference": "pairs of a chosen and a rejected answer (preference, preference_implicit, "
    "alpaca_preference, sharegpt_preference, orca, hh or ultrafeedback)",
    "rated": "answers that are wanted or not (kto)",
    "prompts": "prompts alone (prompt)",
}
_EVAL_NAME = re.compile(
    r"(^|[._-])(test|testing|validation|valid|val|dev|eval|held[._-]?out)([._-]|$)", re.I
)


@dataclass(frozen=True)
class Examined:
    """A source that was read whole, into a scratch folder."""

    texts: Path  # Arrow file with the columns `record` and `text`
    facts: Any  # (records,) see `reward.ingest.FACTS`
    sources: Any  # (records,) number of the source
    described: list[dict[str, Any]]  # of each source: where, format, rows
    findings: list[Finding]

    @property
    def rows(self) -> int:
        """Rows read, usable or not."""
        return sum(source["rows"] for source in self.described)


def prepare(
    data: Data, kind: str, root: Path, where: str = "data", index: Path | None = None
) -> Version:
    """The version that `data` describes, built unless it is there.

    Args:
        data: which rows, and what is done to them.
        kind: what the stage trains on, a key of KINDS.
        root: versions are kept in `root/data`.
        where: the dotted path of `data` in the config, such as `dpo.data`, for messages.
        index: of the benchmarks in use (`reward.contamination`), for `clean.drop=[contamination]`.

    Raises:
        UserError: if the source cannot be read, holds nothing usable or another kind of feedback,
            or if more rows are unusable than `data.max_bad_fraction` allows.
    """
    check(data, where)
    if "contamination" in data.clean.drop and index is None:
        raise UserError(
            f"{where}.clean.drop=[contamination] drops text of the suites in use, and there is none: add one to "
            "evaluation.suites"
        )
    all_sources = [data, *data.mix.values()]
    key = content_key(
        {
            "data": _settings(data),
            "kind": kind,
            "content": [sources.identity(s, where, root / "cache") for s in all_sources],
            "index": index and index.name,
            # charts and pages only show what is there
            "code": source_key(*sorted(file for file in _HERE.iterdir() if file.name != "pages")),
            "versions": installed(*_LIBRARIES),
        }
    )
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(data.source).name.split(".")[0]).strip("-")[:40]
    folder = root / "data" / f"{name or 'data'}-{key}"

    def build(partial: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=partial) as scratch:
            examined = examine(data, kind, Path(scratch), where, index)
            _refuse(data, examined, where)
            _check_columns(data, examined.facts, examined.sources, where)
            return {"key": key, "kind": kind, **_write(partial, data, examined, where)}

    return Version.load(build_once(folder, build))


def examine(
    data: Data, kind: str, scratch: Path, where: str = "data", index: Path | None = None
) -> Examined:
    """Read and look through all rows of `data`; nothing is removed but rows that are no records.

    Raises:
        UserError: if a source cannot be read or holds another kind of feedback.
    """
    import numpy as np
    import pyarrow as pa

    from reward import compare, ingest, leaks

    clean = data.clean
    facts: list[Any] = []
    findings: list[Finding] = []
    described: list[dict[str, Any]] = []
    owners: list[int] = []
    start = 0
    texts = scratch / "texts.arrow"
    schema = pa.schema([("record", pa.large_binary()), ("text", pa.large_string())])
    with pa.OSFile(str(texts), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for number, source in enumerate([data, *data.mix.values()]):
            reading = ingest.Reading(
                None if source.format == "auto" else source.format,
                source.format == "auto",
                kind == "prompts",
                clean.repair,
                clean.mask,
                clean.score,
                clean.balance,
            )
            found, first = reading.format, start
            lines = sources.open_rows(source, where)
            for batch in ingest.batches(lines, reading, source.limit, start):
                start += batch.rows
                found = batch.format
                findings += batch.findings
                if not batch.records:
                    continue
                _check_kind(source, kind, str(found), where)
                facts.append(np.array(batch.facts, dtype=ingest.FACTS))
                owners += [number] * len(batch.records)
                columns = [
                    pa.array(batch.records, pa.large_binary()),
                    pa.array(batch.texts, pa.large_string()),
                ]
                writer.write_batch(pa.record_batch(columns, schema=schema))
            described.append(_described(source, found, first, start))
    table = np.concatenate(facts) if facts else np.empty(0, ingest.FACTS)
    findings += compare.compare_rows(table, texts, cores())
    if index is not None:
        findings += leaks.find_leaks(read_column(texts, "text"), table["row"].tolist(), index)
    findings = _with_severity(findings, described, data.max_bad_fraction)
    return Examined(texts, table, np.array(owners), described, findings)


def check(data: Data, where: str) -> None:
    """Check what can be checked without reading a row.

    Raises:
        UserError: naming the field.
    """
    from reward.choose import check_choice

    for source in (data, *data.mix.values()):
        if not source.source or source.source == "???":
            raise UserError(f"{where}.source must be set")
        formats = ("auto", *NORMALISERS)
        if source.format not in formats:
            raise UserError(
                f"{where}.format: there is no format {source.format!r}."
                f"{did_you_mean(source.format, formats)} There are: {', '.join(formats)}"
            )
        if source.limit is not None and source.limit < 1:
            raise UserError(
                f"{where}.limit={source.limit} must be at least 1; null takes every row"
            )
    if not 0 <= data.max_bad_fraction <= 1:
        fraction = f"{where}.max_bad_fraction={data.max_bad_fraction}"
        raise UserError(f"{fraction} must lie between 0 and 1")
    check_choice(data, where)


def check_training_split(data: Data, where: str) -> None:
    """Refuse rows that are kept for evaluation, by what they are called.

    Raises:
        UserError: naming the split and the way out.
    """
    if data.allow_eval_split:
        return
    called = [] if data.part in (Part.all, Part.train) else [data.part.value]
    for source in (data, *data.mix.values()):
        called += _called(source.source, source.split)
        if bad := [name for name in called if _EVAL_NAME.search(name)]:
            raise UserError(
                f"{where}: {bad[0]!r} of {source.source} is an evaluation split, and what is trained on cannot be "
                f"evaluated on. Use the train split, or set {where}.allow_eval_split=true if these rows are in no "
                "evaluation of yours"
            )


def _called(source: str, split: str) -> list[str]:
    """Names that may tell what rows are for: of files, a hub split, what a version is made of."""
    folder = Path(os.path.expanduser(source))
    if is_version(folder):
        manifest = Version.load(folder).manifest
        made_of = [_called(part["source"], part["split"]) for part in manifest["sources"]]
        return [manifest["part"], *itertools.chain(*made_of)]
    if source.startswith("demo:"):
        return [source.removeprefix("demo:")]
    if files := sources.local_files(source):
        folders = [path.parent.name for path in files]
        names = [path.name.split(".json")[0] for path in files]
        return names + [name for name in folders if _EVAL_NAME.fullmatch(name)]
    return [part.split("[")[0] for part in split.split("+")] if "/" in source else []


def _settings(data: Data) -> dict[str, Any]:
    """What `data` asks for, without what does not change the result."""
    settings = asdict(data)
    for name in ("allow_eval_split", "source"):  # `identity` names what is in the source
        del settings[name]
    for portion in settings["mix"].values():
        del portion["source"]
    settings["seed"] = data.seed or 0
    return settings


def _described(source: Source, found: str | None, start: int, end: int) -> dict[str, Any]:
    return {
        "source": source.source,
        "name": source.name,
        "split": source.split,
        "revision": source.revision,
        "format": found,
        "start": start,  # number of its first row
        "rows": end - start,
    }


def _check_kind(source: Source, kind: str, name: str, where: str) -> None:
    made = inspect.signature(NORMALISERS[name]).return_annotation
    if made is KINDS[kind] or kind == "prompts":  # anything that is answered was asked
        return
    found = "was detected" if source.format == "auto" else "was asked for"
    raise UserError(
        f"{where}.source={source.source!r}: format {name!r} {found}, but this stage needs "
        f"{_NEEDS[kind]}. Choose another source, or another reading with {where}.format"
    )


def _with_severity(
    findings: list[Finding], described: list[dict[str, Any]], allowed: float
) -> list[Finding]:
    """Sorted by row, one a row and kind; unusable rows are errors when a source has too many."""
    unique = {(finding.row, finding.kind): finding for finding in reversed(findings)}
    ordered = [unique[key] for key in sorted(unique)]
    judged = []
    for source in described:
        own = _of_source(ordered, source)
        judged += escalate(own, {f.kind for f in unusable(own)}, _bad_share(own, source), allowed)
    return judged


def _of_source(findings: list[Finding], source: dict[str, Any]) -> list[Finding]:
    end = source["start"] + source["rows"]
    return [finding for finding in findings if source["start"] <= finding.row < end]


def _bad_share(findings: list[Finding], source: dict[str, Any]) -> float:
    """Share of a source's rows that cannot be used; blank lines are no rows."""
    blank = sum(finding.kind == "blank_line" for finding in findings)
    rows: int = source["rows"] - blank
    return len(unusable(findings)) / max(1, rows)


def unusable(findings: list[Finding]) -> list[Finding]:
    """Findings on rows that are no records; a blank line holds no row that could be missed."""
    return [f for f in findings if f.kind in UNUSABLE and f.kind != "blank_line"]


def _refuse(data: Data, examined: Examined, where: str) -> None:
    """Stop when too many rows of a source cannot be used, with the places of the first ones."""
    for number, source in enumerate(examined.described):
        findings = _of_source(examined.findings, source)
        bad = unusable(findings)
        rows = source["rows"] - sum(finding.kind == "blank_line" for finding in findings)
        has_records = bool((examined.sources == number).any())
        if not rows:
            raise UserError(f"{where}.source={source['source']!r} has no rows")
        share = len(bad) / rows
        if has_records and share <= data.max_bad_fraction:
            continue
        shown = "; ".join(finding.detail for finding in bad[:_SHOWN_PROBLEMS])
        if len(bad) > _SHOWN_PROBLEMS:
            shown += f"; and {len(bad) - _SHOWN_PROBLEMS} more"
        enough = math.ceil(1000 * share) / 1000
        remedy = f"Fix the rows, or drop them with {where}.max_bad_fraction={enough:g}"
        if not has_records:
            remedy = f"Fix the rows, or say how to read them with {where}.format=…"
        raise UserError(
            f"{len(bad)} of {rows} rows in {source['source']} cannot be used "
            f"(limit {100 * data.max_bad_fraction:g} %): {shown}. {remedy}"
        )


def _check_columns(data: Data, facts: Any, sources: Any, where: str) -> None:
    """A column that no row has is a typing error, not an empty column."""
    import numpy as np

    clean = data.clean
    if clean.balance and not facts["group"][sources == 0].any():
        raise UserError(f"{where}.clean.balance={clean.balance!r}: no row has that column")
    if clean.score and not np.isfinite(facts["score"]).any():
        raise UserError(f"{where}.clean.score={clean.score!r}: no row has a number in that column")


def _write(folder: Path, data: Data, examined: Examined, where: str) -> dict[str, Any]:
    """Choose the records, write them and what is known of them; the manifest's content."""
    import numpy as np

    from reward.audit import as_json
    from reward.choose import choose
    from reward.ingest import MASKED, REPAIRED

    choice = choose(examined.facts, examined.sources, examined.findings, data)
    if not len(choice.order):
        steps = ", ".join(f"{step['step']} −{step['removed']}" for step in choice.steps)
        raise UserError(f"{where}: no row of {data.source} is left after cleaning ({steps})")
    fingerprint = _gather(examined.texts, choice.order, folder / RECORDS)
    facts = examined.facts[choice.order]
    np.save(folder / FACTS_FILE, facts)
    write_json(folder / AUDIT, as_json(examined))
    with (folder / REMOVED).open("w", encoding="utf-8") as file:
        for row, step in choice.removed:
            file.write(json.dumps({"row": row, "step": step}) + "\n")
    flags = examined.facts["mended"]
    mended = [
        {"step": name, "changed": int((flags & flag > 0).sum()), "left": len(flags)}
        for name, is_asked, flag in (
            ("repair", data.clean.repair, REPAIRED),
            ("mask", data.clean.mask, MASKED),
        )
        if is_asked
    ]
    return {
        "fingerprint": fingerprint,
        "records": len(facts),
        "examples": int(facts["examples"].sum()),
        "rows": examined.rows,
        "unusable": len(unusable(examined.findings)),
        "sources": examined.described,
        "format": examined.described[0]["format"],
        "steps": mended + choice.steps,
        "part": _part(data),
        "order": _order(data),
        "seed": data.seed or 0,
    }


def _part(data: Data) -> str:
    """The part that a version is, or that it was made from."""
    folder = Path(os.path.expanduser(data.source))
    if data.part is Part.all and is_version(folder):
        return str(Version.load(folder).manifest["part"])
    return data.part.value


def _order(data: Data) -> str:
    """The order that a version has, or that it took over whole."""
    folder = Path(os.path.expanduser(data.source))
    if data.order is Order.source and not data.mix and is_version(folder):
        return str(Version.load(folder).manifest["order"])
    return data.order.value


def _gather(texts: Path, order: Any, out: Path) -> str:
    """Write records in the given order; the hash of their lines."""
    import pyarrow as pa

    digest = hashlib.sha256()
    schema = pa.schema([("record", pa.large_binary())])
    with pa.OSFile(str(out), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for start in range(0, len(order), _AT_ONCE):
            lines = take(texts, "record", order[start : start + _AT_ONCE])
            for line in lines:
                digest.update(line + b"\n")
            for first in range(0, len(lines), _BATCH):
                column = pa.array(lines[first : first + _BATCH], pa.large_binary())
                writer.write_batch(pa.record_batch([column], schema=schema))
    return digest.hexdigest()[:16]
