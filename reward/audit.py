"""`python -m reward.audit PATH --kind sft|preference|rated|prompts`: what is in a data set.

The JSON (`--json OUT`) is `{"rows", "findings": [{"row", "kind", "severity", "detail"}], "summary"}`; the table
and the report's data page are made from it.
"""

import argparse
import dataclasses
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

from conf.entry import UserError, plainly
from conf.schema import Data
from reward.command import at_least_one, check_file
from reward.data import Examined, check, examine
from reward.findings import KINDS as FINDING_KINDS
from reward.findings import Finding, Severity, escalate
from reward.leaks import build_index
from reward.records import KINDS
from reward.store import write_json
from reward.versions import read_lines, record_of, take

_SAMPLE = 2000  # texts for the language statistics
_SHOWN = 90  # characters of an example


def as_json(examined: Examined, more: list[Finding] | None = None) -> dict[str, Any]:
    """The audit of a source as JSON-like values."""
    from reward import compare

    findings = sorted(examined.findings + (more or []), key=lambda f: (f.row, f.kind))
    return {
        "rows": examined.rows,
        "findings": [dataclasses.asdict(finding) for finding in findings],
        "summary": {
            "sources": examined.described,
            **compare.figures(examined.facts, _sample(examined)),
        },
    }


def table(audit: dict[str, Any]) -> str:
    """The audit as text: figures, then a line for each kind of finding with an example."""
    summary = audit["summary"]
    lines = []
    for source in summary["sources"]:
        lines.append(f"{source['source']}: {source['rows']:,} rows, format {source['format']}")
    lines += _figure_lines(summary)
    found = Counter((f["kind"], f["severity"]) for f in audit["findings"])
    first = {f["kind"]: f for f in reversed(audit["findings"])}
    if found:
        lines += ["", f"{'severity':9} {'finding':16} {'rows':>7} {'share':>7}  example"]
    order = list(FINDING_KINDS)
    for kind, severity in sorted(found, key=lambda key: (_RANK[key[1]], order.index(key[0]))):
        count, example = found[kind, severity], first[kind]
        text = f"row {example['row']}: {' '.join(example['detail'].split())}"
        if len(text) > _SHOWN:
            text = text[: _SHOWN - 1] + "…"
        share = count / max(1, audit["rows"])
        lines.append(f"{severity:9} {kind:16} {count:7,} {share:7.2%}  {text}")
    lines += ["", _verdict(audit)]
    return "\n".join(lines)


_RANK = {severity.value: rank for rank, severity in enumerate(Severity)}


def _figure_lines(summary: dict[str, Any]) -> list[str]:
    lines = [f"{summary['records']:,} records, {summary['prompts']:,} different prompts"]
    if languages := summary["languages"]:
        total = sum(languages.values())
        most = sorted(languages.items(), key=lambda item: -item[1])[:5]
        shown = ", ".join(f"{name} {count / total:.0%}" for name, count in most)
        lines.append(f"languages of {total:,} sampled records: {shown}")
    for name, chars in summary.get("chars", {}).items():
        lines.append(
            f"{name:9} characters: median {chars['50']:,.0f}, 5–95 % {chars['5']:,.0f}–{chars['95']:,.0f}, "
            f"longest {chars['100']:,.0f}"
        )
    if gap := summary.get("length_gap"):
        margin = gap["correlation_with_margin"]
        more = "" if margin is None else f", with the margin {margin:+.2f}"
        lines.append(
            f"chosen − rejected: {gap['mean']:+.0f} characters (standard error {gap['standard_error'] or 0:.0f}), "
            f"chosen is longer in {gap['chosen_is_longer']:.0%}; correlation of choice and length "
            f"{gap['correlation']:+.2f}{more}"
        )
    if tokens := summary.get("tokens"):
        lines.append(
            f"{tokens['examples']:,} examples, {tokens['loss']:,} tokens with loss; "
            f"longest prompt {tokens['longest_prompt']:,} tokens, answer {tokens['longest_answer']:,}; "
            f"truncated {tokens['truncated']:,}, without loss {tokens['no_loss']:,}"
        )
    return lines


def _verdict(audit: dict[str, Any]) -> str:
    if not audit["summary"]["records"]:
        return "no row can be used: a run would stop"
    errors = sum(f["severity"] == "error" for f in audit["findings"])
    warnings = sum(f["severity"] == "warning" for f in audit["findings"])
    if errors:
        kinds = dict.fromkeys(f["kind"] for f in audit["findings"] if f["severity"] == "error")
        fixes = "; ".join(dict.fromkeys(FINDING_KINDS[kind].remedy for kind in kinds))
        return f"{errors:,} errors: a run would stop. To put it right: {fixes}"
    return f"no error, {warnings:,} warnings: a run would go on"


def _sample(examined: Examined) -> list[str]:
    """Texts spread evenly over the set."""
    count = len(examined.facts)
    return take(examined.texts, "text", range(0, count, max(1, count // _SAMPLE)))


def token_figures(counts: Any) -> dict[str, int]:
    """Totals of a `TokenAudit`."""
    return {
        "examples": counts.examples,
        "loss": counts.loss,
        "no_loss": counts.no_loss,
        "truncated": counts.truncated,
        "longest_prompt": max(counts.prompt, default=0),
        "longest_answer": max(counts.answer, default=0),
    }


def audit(
    data: Data,
    kind: str,
    model: str | None = None,
    max_length: int | None = None,
    index: Path | None = None,
) -> dict[str, Any]:
    """Everything that can be said of a source, as JSON-like values.

    Raises:
        UserError: if it cannot be read.
    """
    from reward.tokens import audit_tokens, open_tokenizer

    check(data, "data")
    tokenizer = open_tokenizer(model) if model else None
    with tempfile.TemporaryDirectory() as scratch:
        examined = examine(data, kind, Path(scratch), "data", index)
        more: list[Finding] = []
        counts = None
        if tokenizer is not None:
            rows = examined.facts["row"].tolist()
            records = (record_of(line) for line in read_lines(examined.texts))
            counts = audit_tokens(zip(rows, records, strict=True), tokenizer, max_length)
            share = counts.no_loss / max(1, counts.examples)
            more += escalate(counts.findings, {"no_loss_tokens"}, share, data.max_bad_fraction)
        result = as_json(examined, more)
        if counts is not None:
            result["summary"]["tokens"] = token_figures(counts)
    return result


def main() -> None:
    """Audit a data set; exit code 2 when it cannot be read, 1 when --fail-on finds something."""
    parser = argparse.ArgumentParser(prog="python -m reward.audit", description=main.__doc__)
    parser.add_argument("path", help="file, folder, glob, hub id, demo:NAME or data version")
    parser.add_argument(
        "--kind", required=True, choices=list(KINDS), help="what a stage would train on"
    )
    parser.add_argument("--format", default="auto", help="how to read the rows; default: detected")
    parser.add_argument("--split", default="train", help="split of a hub data set")
    parser.add_argument("--name", help="configuration of a hub data set")
    parser.add_argument("--limit", type=int, help="first N usable rows")
    parser.add_argument(
        "--model", help="hub id, folder, .gguf or package:NAME whose tokenizer counts the tokens"
    )
    parser.add_argument(
        "--max-length", type=at_least_one, help="tokens that training keeps, with --model"
    )
    parser.add_argument(
        "--against",
        nargs="+",
        default=[],
        metavar="SUITE",
        help="suites by name, or benchmark files and folders, whose text must not be in the data",
    )
    parser.add_argument("--json", type=Path, metavar="OUT", help="write everything as JSON")
    parser.add_argument(
        "--fail-on", choices=["error", "warning"], help="exit with 1 if there is such a finding"
    )
    given = parser.parse_args()
    with plainly():
        if given.max_length and not given.model:
            raise UserError("--max-length counts tokens: it needs --model")
        if given.json:
            check_file(given.json, given.path, "audit.json")
        data = Data(
            source=given.path,
            name=given.name,
            split=given.split,
            format=given.format,
            limit=given.limit,
        )
        with tempfile.TemporaryDirectory() as folder:
            index = build_index(given.against, Path(folder)) if given.against else None
            result = audit(data, given.kind, given.model, given.max_length, index)
        if given.json:
            try:
                given.json.parent.mkdir(parents=True, exist_ok=True)
                write_json(given.json, result)
            except OSError as error:
                raise UserError(f"cannot write {given.json}: {error.strerror}") from error
        print(table(result))
        severities = {f["severity"] for f in result["findings"]}
    if given.fail_on and severities & {"error", given.fail_on}:
        sys.exit(1)


if __name__ == "__main__":
    main()
