"""From a source to a data version: read, looked through, cleaned, written, named by its content."""

import hashlib
import inspect
import json
import re
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from conf.entry import UserError
from conf.passthrough import did_you_mean
from conf.schema import Data, Part, Source
from reward import sources
from reward.findings import UNUSABLE, Finding, escalate
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
)
from reward.workers import cores

_SHOWN_PROBLEMS = 5
_BATCH = 1000  # records; fixed, so that equal records are equal bytes

# What to say when a stage is given records of another kind.
_NEEDS = {
    "sft": "demonstrations (messages, sharegpt, alpaca, completion, reasoning or qa)",
    "preference": "pairs of a chosen and a rejected answer (preference, preference_implicit, hh or "
    "ultrafeedback)",
    "rated": "answers that are wanted or not (kto)",
    "prompts": "prompts alone (prompt)",
}
_EVAL_NAME = re.compile(
    r"(^|[._-])(test|validation|valid|val|dev|eval|held[._-]?out)([._-]|$)", re.I
)


@dataclass(frozen=True)
class Examined:
    """A source that was read whole, into a scratch folder."""

    texts: Path  # Arrow file with the columns `record` and `text`
    facts: Any  # (records,) see `reward.ingest.FACTS`
    sources: Any  # (records,) number of the source
    described: list[dict[str, Any]]  # of each source: where, format, rows
    findings: list[Finding]
    repaired: int
    masked: int

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
    all_sources = [data, *data.mix.values()]
    key = content_key(
        {
            "data": _settings(data),
            "kind": kind,
            "content": [sources.identity(s, where, root / "cache") for s in all_sources],
            "index": index and index.name,
            "code": source_key(Path(__file__).parent),
        }
    )
    name = re.sub(r"[^A-Za-z0-9]+", "-", Path(data.source).name.split(".")[0]).strip("-")[:40]
    folder = root / "data" / f"{name or 'data'}-{key}"

    def build(partial: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory(dir=partial) as scratch:
            examined = examine(data, kind, Path(scratch), where, index)
            _refuse(data, examined, where)
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
    repaired = masked = start = 0
    texts = scratch / "texts.arrow"
    schema = pa.schema([("record", pa.large_binary()), ("text", pa.large_string())])
    with pa.OSFile(str(texts), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        for number, source in enumerate([data, *data.mix.values()]):
            reading = ingest.Reading(
                None if source.format == "auto" else source.format,
                source.format == "auto",
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
                repaired, masked = repaired + batch.repaired, masked + batch.masked
                columns = [
                    pa.array(batch.records, pa.large_binary()),
                    pa.array(batch.texts, pa.large_string()),
                ]
                writer.write_batch(pa.record_batch(columns, schema=schema))
            described.append(_described(source, found, start - first))
    table = np.concatenate(facts) if facts else np.empty(0, ingest.FACTS)
    findings += compare.compare_rows(table, texts, cores())
    if index is not None:
        findings += leaks.find_leaks(read_column(texts, "text"), table["row"].tolist(), index)
    findings = _with_severity(findings, start, data.max_bad_fraction)
    return Examined(texts, table, np.array(owners), described, findings, repaired, masked)


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
    for source in (data, *data.mix.values()):
        folder = Path(source.source).expanduser()
        made_of = Version.load(folder).manifest["part"] if is_version(folder) else "all"
        local = sources.local_files(source.source) if not source.source.startswith("demo:") else []
        names = [path.name.split(".jsonl")[0].split(".json")[0] for path in local]
        called = [source.split] if not local and "/" in source.source else names
        called += [source.source.removeprefix("demo:")] if source.source.startswith("demo:") else []
        called += [part for part in (data.part.value, made_of) if part not in ("all", "train")]
        if bad := [name for name in called if _EVAL_NAME.search(name)]:
            raise UserError(
                f"{where}: {bad[0]!r} of {source.source} is an evaluation split, and what is trained on cannot be "
                f"evaluated on. Use the train split, or set {where}.allow_eval_split=true if these rows are in no "
                "evaluation of yours"
            )


def _settings(data: Data) -> dict[str, Any]:
    """What `data` asks for, without what does not change the result."""
    settings = asdict(data)
    del settings["allow_eval_split"]
    settings["seed"] = data.seed or 0
    return settings


def _described(source: Source, found: str | None, rows: int) -> dict[str, Any]:
    return {
        "source": source.source,
        "name": source.name,
        "split": source.split,
        "revision": source.revision,
        "format": found,
        "rows": rows,
    }


def _check_kind(source: Source, kind: str, name: str, where: str) -> None:
    made = inspect.signature(NORMALISERS[name]).return_annotation
    if made is KINDS[kind]:
        return
    found = "was detected" if source.format == "auto" else "was asked for"
    raise UserError(
        f"{where}.source={source.source!r}: format {name!r} {found}, but this stage needs "
        f"{_NEEDS[kind]}. Choose another source, or another reading with {where}.format"
    )


def _with_severity(findings: list[Finding], rows: int, allowed: float) -> list[Finding]:
    """Sorted by row, one a row and kind; unusable rows are errors when there are more than allowed."""
    unique = {(finding.row, finding.kind): finding for finding in reversed(findings)}
    ordered = [unique[key] for key in sorted(unique)]
    bad = unusable(ordered)
    return escalate(ordered, {f.kind for f in bad}, len(bad) / max(1, rows), allowed)


def unusable(findings: list[Finding]) -> list[Finding]:
    """Findings on rows that are no records; a blank line holds no row that could be missed."""
    return [f for f in findings if f.kind in UNUSABLE and f.kind != "blank_line"]


def _refuse(data: Data, examined: Examined, where: str) -> None:
    """Stop when too many rows cannot be used, with the places of the first ones."""
    bad, rows = unusable(examined.findings), examined.rows
    if not rows:
        raise UserError(f"{where}.source={data.source!r} has no rows")
    if len(examined.facts) and len(bad) / rows <= data.max_bad_fraction:
        return
    shown = "; ".join(finding.detail for finding in bad[:_SHOWN_PROBLEMS])
    if len(bad) > _SHOWN_PROBLEMS:
        shown += f"; and {len(bad) - _SHOWN_PROBLEMS} more"
    share = -(-1000 * len(bad) // rows) / 1000  # rounded up, so that it is enough
    remedy = f"Fix the rows, or drop them with {where}.max_bad_fraction={share:g}"
    if not len(examined.facts):
        remedy = f"Fix the rows, or say how to read them with {where}.format=…"
    raise UserError(
        f"{len(bad)} of {rows} rows in {data.source} cannot be used "
        f"(limit {100 * data.max_bad_fraction:g} %): {shown}. {remedy}"
    )


def _write(folder: Path, data: Data, examined: Examined, where: str) -> dict[str, Any]:
    """Choose the records, write them and what is known of them; the manifest's content."""
    import numpy as np

    from reward.audit import as_json
    from reward.choose import choose

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
    mended = [
        {"step": name, "changed": count, "left": len(examined.facts)}
        for name, is_asked, count in (
            ("repair", data.clean.repair, examined.repaired),
            ("mask", data.clean.mask, examined.masked),
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
        "order": data.order.value,
        "seed": data.seed or 0,
    }


def _part(data: Data) -> str:
    """The part that a version is, or that it was made from."""
    folder = Path(data.source).expanduser()
    if data.part is Part.all and is_version(folder):
        return str(Version.load(folder).manifest["part"])
    return data.part.value


def _gather(texts: Path, order: Any, out: Path) -> str:
    """Write records in the given order; the hash of their lines."""
    import pyarrow as pa

    digest = hashlib.sha256()
    schema = pa.schema([("record", pa.large_binary())])
    with (
        pa.memory_map(str(texts)) as source,
        pa.OSFile(str(out), "wb") as file,
        pa.ipc.new_file(file, schema) as writer,
    ):
        column = pa.ipc.open_file(source).read_all().column("record")
        for start in range(0, len(order), _BATCH):
            chosen = column.take(pa.array(order[start : start + _BATCH])).combine_chunks()
            for line in chosen:
                digest.update(line.as_buffer())
                digest.update(b"\n")
            writer.write_batch(pa.record_batch([chosen], schema=schema))
    return digest.hexdigest()[:16]
