"""The page about the training data, made from versions of small files that hold known mistakes."""

import html
import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Clean, Data, Part
from evals.report import build_report
from evals.site.datafindings import severities, tables
from evals.site.datapage import gap_meaning
from evals.site.datause import Look
from reward.data import prepare
from reward.findings import KINDS
from reward.pages.plots import Spread, spread_chart
from reward.store import read_json, write_json
from reward.versions import AUDIT, Version

HOSTILE = "<script>alert('data')</script>"


def pair(prompt: str, chosen: str, rejected: str) -> dict[str, str]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.fixture(scope="session")
def version(tmp_path_factory: pytest.TempPathFactory) -> Version:
    """40 good pairs, 2 repeated, 3 that are no pairs, 1 blank line, 1 short answer, 2 with an address."""
    rows = [
        pair(f"What is {n} times {n + 7}, and why?", f"It is {n * (n + 7)}. " * 4, f"{n} {n}, no.")
        for n in range(40)
    ]
    rows += rows[:2]
    rows += [pair("Equal?", "The same.", "The same."), pair("Empty?", "", "Something long.")]
    rows += [{HOSTILE: "of no format"}]  # type: ignore[dict-item]
    rows += [pair("A short answer to this?", "Yes", "No, it is not like that.")]
    rows += [
        pair(f"Whom do I ask {n}?", f"Write to someone{n}@mail-{n}.com about it.", "Nobody at all.")
        for n in range(2)
    ]
    folder = tmp_path_factory.mktemp("data")
    lines = [json.dumps(row) for row in rows]
    (folder / "pairs.jsonl").write_text("\n".join([*lines[:5], "", *lines[5:]]) + "\n", "utf-8")
    clean = Clean(mask=True, drop=["exact_duplicate"], min_chars=5)
    data = Data(source=str(folder / "pairs.jsonl"), max_bad_fraction=1.0, clean=clean)
    return prepare(data, "preference", folder)


def write_run(folder: Path, *stages: str, seed: int = 0, label: str = "") -> None:
    """A run that was measured on nothing."""
    folder.mkdir(parents=True)
    record = {
        "experiment": "demo",
        "arm": f"arm {label}",
        "label": label,
        "seed": seed,
        "margin": 0.03,
        "started": f"2026-11-21T0{seed}:00:00+00:00",
        "policies": ["base", *stages],
        "stages": [{"stage": stage} for stage in stages],
        "evaluations": [],
    }
    write_json(folder / "run.json", record)


def keep_data(
    run: Path, stage: str, version: Version, change: Callable[[Any], None] | None = None
) -> None:
    """What `align` leaves of a stage's data; `change` edits the audit."""
    folder = run / "data" / stage
    folder.mkdir(parents=True)
    shutil.copyfile(version.folder / "manifest.json", folder / "manifest.json")
    audit = read_json(version.folder / AUDIT)
    audit["summary"]["tokens"] = {"examples": 42, "loss": 12345, "no_loss": 0, "truncated": 7}
    if change:
        change(audit)
    (folder / AUDIT).write_text(json.dumps(audit), "utf-8")


def pages(runs: Path, out: Path) -> tuple[str, str]:
    """`index.html` with the pages of the arms, and `data.html`, which is empty when there is none."""
    index = build_report(runs, out)
    data = out / "data.html"
    arms = [path.read_text("utf-8") for path in sorted((out / "arms").iterdir())]
    return "\n".join([index.read_text("utf-8"), *arms]), data.read_text(
        "utf-8"
    ) if data.exists() else ""


def table_rows(text: str) -> list[list[str]]:
    """The cells of each table row as plain text, without examples."""
    text = re.sub(r"<details class=\"examples\">.*?</details>", "", text, flags=re.S)
    return [
        [
            " ".join(html.unescape(re.sub(r"<[^>]+>", " ", cell)).split())
            for cell in re.findall(r"<t[hd].*?>(.*?)</t[hd]>", row, re.S)
        ]
        for row in re.findall(r"<tr>(.*?)</tr>", text, re.S)
    ]


@pytest.fixture
def runs(tmp_path: Path, version: Version) -> Path:
    """One run with one stage."""
    write_run(tmp_path / "runs/a", "dpo")
    keep_data(tmp_path / "runs/a", "dpo", version)
    return tmp_path / "runs"


def test_the_way_from_rows_to_examples_is_the_manifests(
    runs: Path, tmp_path: Path, version: Version
) -> None:
    _, text = pages(runs, tmp_path / "site")
    found = {row[0]: row[1:] for row in table_rows(text)}
    assert found["rows read"][1] == str(version.manifest["rows"]) == "49"
    assert found["blank lines nothing on them"][:2] == ["−1", "48"]
    (unusable,) = (cells for name, cells in found.items() if name.startswith("unusable"))
    assert unusable[:2] == ["−3", "45"]
    assert version.manifest["unusable"] == 3
    steps = {step["step"]: step for step in version.manifest["steps"]}
    shown = {name.split(" ")[0]: cells for name, cells in found.items()}
    assert shown["mask"][:2] == [f"{steps['mask']['changed']} changed", "45"]
    assert shown["mask"][0] == "2 changed"
    assert shown["drop"][:2] == ["−2", str(steps["drop exact_duplicate"]["left"])]
    assert shown["min_chars"][:3] == ["−1", "42", "85.7 %"]
    assert shown["records"][1] == str(version.manifest["records"]) == "42"
    assert shown["training"][1] == str(version.manifest["examples"]) == "42"
    assert "1 × same_pair: chosen and rejected are the same" in text
    # The line of the tokens: examples, with loss, truncated, without, and what was not recorded.
    assert found["dpo"] == ["42", "12 345", "7", "0", "–", "–"]


def test_every_kind_of_finding_has_its_count_share_meaning_and_remedy(
    runs: Path, tmp_path: Path, version: Version
) -> None:
    _, text = pages(runs, tmp_path / "site")
    audit = read_json(version.folder / AUDIT)
    counts = Counter(finding["kind"] for finding in audit["findings"])
    assert {"exact_duplicate", "same_pair", "pii", "blank_line"} <= set(counts)
    found = {row[0].split(" ")[0]: row for row in table_rows(text) if row[0].split(" ")[0] in KINDS}
    assert set(found) == set(counts)
    for kind, number in counts.items():
        name, severity, rows, share, remedy = found[kind]
        assert name == f"{kind} {KINDS[kind].meaning}"
        assert severity == KINDS[kind].severity
        assert (rows, share) == (str(number), f"{100 * number / 49:.1f} %")
        assert remedy.endswith(KINDS[kind].remedy)
    # What the version has dealt with already.
    assert found["exact_duplicate"][4].startswith("dropped ")
    assert found["pii"][4].startswith("masked ")
    assert found["same_pair"][4].startswith("left out ")
    assert re.search(r"row 41</span><bdi>with row 0</bdi>", text)


def test_lengths_gap_and_source_are_told(runs: Path, tmp_path: Path, version: Version) -> None:
    _, text = pages(runs, tmp_path / "site")
    summary = read_json(version.folder / AUDIT)["summary"]
    for part in ("prompt", "chosen", "rejected"):
        (row,) = (row for row in table_rows(text) if row[0] == part)
        assert row[1:] == [f"{number:.0f}" for number in summary["chars"][part].values()]
    assert text.count("<svg") == 1
    assert f"+{summary['length_gap']['correlation']:.2f}" in text
    assert "tendency for the chosen answer to be the longer one" in text
    (row,) = (row for row in table_rows(text) if row[0].endswith("pairs.jsonl"))
    assert row[1:] == ["preference", "49"]
    assert version.fingerprint in text


def test_the_index_leads_to_the_section(runs: Path, tmp_path: Path) -> None:
    index, data = pages(runs, tmp_path / "site")
    assert 'href="data.html"' in index
    targets = set(re.findall(r'href="\.\./data\.html#([^"]+)"', index))
    assert targets == {"data-1"}
    assert 'id="data-1"' in data
    assert 'href="index.html"' in data


def test_old_records_have_no_page_and_no_link(tmp_path: Path, version: Version) -> None:
    write_run(tmp_path / "runs/old", "sft", "dpo", label="old")
    index, data = pages(tmp_path / "runs", tmp_path / "a")
    assert (data, "data.html" in index) == ("", False)
    write_run(tmp_path / "runs/new", "dpo", label="new")
    keep_data(tmp_path / "runs/new", "dpo", version)
    index, data = pages(tmp_path / "runs", tmp_path / "b")
    assert data.count('<section class="version"') == 1
    assert index.count("data.html#") == 1
    assert "Without a record of their data: demo · old, seed 0: sft" in data


def test_runs_share_a_section_and_what_differs_is_told_apart(
    tmp_path: Path, version: Version
) -> None:
    def longer(audit: Any) -> None:
        audit["summary"]["tokens"]["loss"] = 20000
        finding = {"row": 7, "kind": "truncated", "severity": "note", "detail": "9 tokens"}
        audit["findings"].append(finding)

    for seed in (0, 1):
        write_run(tmp_path / f"runs/{seed}", "rm", "dpo", seed=seed)
        keep_data(tmp_path / f"runs/{seed}", "rm", version)
        keep_data(tmp_path / f"runs/{seed}", "dpo", version, longer)
    _, text = pages(tmp_path / "runs", tmp_path / "site")
    assert text.count('<section class="version"') == 1
    assert "<b>rm</b> of demo (seeds 0, 1)" in text
    assert "12\N{NARROW NO-BREAK SPACE}345–20\N{NARROW NO-BREAK SPACE}000" in text
    alone = text.index("Only as seen by dpo of demo (seeds 0, 1)")
    assert text.index("truncated <span") > alone > text.index("same_pair <span")


def test_other_versions_have_their_own_sections(
    runs: Path, tmp_path: Path, version: Version
) -> None:
    source = str(version.folder.parent.parent / "pairs.jsonl")
    data = Data(source=source, max_bad_fraction=1.0, part=Part.train, fractions=[0.5, 0.5, 0.0])
    part = prepare(data, "preference", tmp_path)
    write_run(runs / "b", "rm", "dpo", label="part")
    keep_data(runs / "b", "dpo", part)
    index, text = pages(runs, tmp_path / "site")
    assert text.count('<section class="version"') == 2
    assert {"#data-1", "#data-2"} <= set(re.findall(r'href="(#[^"]+)"', text))
    assert "the split is by prompt, this version is the train part" in text
    assert set(re.findall(r'href="\.\./data\.html#([^"]+)"', index)) == {"data-1", "data-2"}


def test_a_clean_version_says_that_nothing_was_found(tmp_path: Path) -> None:
    version = prepare(Data(source="demo:demonstrations", limit=20), "sft", tmp_path)
    write_run(tmp_path / "runs/a", "sft")
    keep_data(tmp_path / "runs/a", "sft", version, lambda audit: audit.update(findings=[]))
    _, text = pages(tmp_path / "runs", tmp_path / "site")
    assert "Nothing was found" in text
    assert "every row could be read as a record" in text
    assert "Chosen" not in text


def test_hostile_text_is_escaped_and_half_a_surrogate_pair_is_no_crash(
    tmp_path: Path, version: Version
) -> None:
    def spoil(audit: Any) -> None:
        for number, finding in enumerate(audit["findings"]):
            finding["detail"] = f"{HOSTILE}\ud800 <s>{number}</s>\x00" + "x" * 5000
        audit["summary"]["languages"] = {"<i>\ud800": 3}
        audit["findings"].append(
            {"row": 3, "kind": "<u>new</u>", "severity": "note", "detail": "\udfff"}
        )

    write_run(tmp_path / "runs/a", "dpo", label="<img src=x>")
    write_run(tmp_path / "runs/b", "dpo", label="other")
    keep_data(tmp_path / "runs/a", "dpo", version, spoil)
    manifest = version.manifest | {"fingerprint": "<em>"}
    manifest["sources"] = [manifest["sources"][0] | {"source": f"a/{HOSTILE}\udc80"}]
    path = tmp_path / "runs/a/data/dpo/manifest.json"
    path.write_text(json.dumps(manifest), "utf-8")
    index, text = pages(tmp_path / "runs", tmp_path / "site")
    for tag in ("<script>alert", "<img", "<s>", "<i>", "<em>&", "<u>", "\x00", "<em></b>"):
        assert tag not in index + text
    assert html.escape(HOSTILE, quote=False).replace("'", "&#39;") in text
    assert "x" * 1000 not in text


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("audit.json", None, "audit.json cannot be read"),
        ("manifest.json", "{", "no record of data"),
        ("audit.json", "[]", "it holds a list, not an object"),
        ("audit.json", '{"findings": []}', "it has no 'rows'"),
        ("manifest.json", '{"rows": "many"}', "it has no 'fingerprint'"),
    ],
)
def test_a_record_that_cannot_be_read_is_named_and_costs_one_section(
    runs: Path, tmp_path: Path, version: Version, name: str, content: str | None, says: str
) -> None:
    write_run(runs / "b", "dpo", label="lost")
    keep_data(runs / "b", "dpo", version)
    path = runs / "b/data/dpo" / name
    path.unlink() if content is None else path.write_text(content, "utf-8")
    index, text = pages(runs, tmp_path / "site")
    assert says in html.unescape(text)
    assert text.count('<section class="version"') == 1
    assert index.count("data.html#") == 1
    assert str(tmp_path) not in index


def test_equal_records_give_equal_bytes_wherever_they_lie(runs: Path, tmp_path: Path) -> None:
    (runs / "a/data/sft").mkdir()  # a folder of a stage that the run does not name
    before = pages(runs, tmp_path / "a")
    assert pages(runs.rename(tmp_path / "moved"), tmp_path / "b") == before


def test_the_page_asks_nothing_of_the_network(runs: Path, tmp_path: Path) -> None:
    _, text = pages(runs, tmp_path / "site")
    for word in ('src="', "@import", "url(http", "<script", '<link rel="stylesheet'):
        assert word not in text


@pytest.mark.parametrize(
    ("correlation", "says"),
    [
        (0.05, "next to nothing"),
        (-0.05, "next to nothing"),
        (0.2, "weak tendency for the chosen answer to be the longer"),
        (-0.4, "clear tendency for the chosen answer to be the shorter"),
        (0.9, "strong tendency"),
    ],
)
def test_the_correlation_in_words(correlation: float, says: str) -> None:
    assert says in gap_meaning(correlation)


def test_findings_of_another_severity_are_not_shared() -> None:
    """A stage that allows less makes an error of what is a warning to another."""
    finding = {"row": 1, "kind": "no_loss_tokens", "severity": "warning", "detail": "long"}
    looks = [
        Look({"findings": [finding]}, {"sft": {"a": [0]}}),
        Look({"findings": [finding | {"severity": "error"}]}, {"dpo": {"a": [0]}}),
    ]
    found = tables({"rows": 2, "steps": []}, looks)
    told = [(table.users, [row.severity for row in table.rows]) for table in found]
    assert told == [
        ("", []),
        ("sft of a (seed 0)", ["warning"]),
        ("dpo of a (seed 0)", ["error"]),
    ]


def test_lengths_of_nothing_and_of_one_size_can_be_drawn() -> None:
    for quantiles in ([0.0] * 7, [40.0] * 7, [0, 1, 2, 3, 4, 5, 1e6]):
        svg = spread_chart("a", [Spread("prompt", quantiles)], "characters")
        assert "nan" not in svg
        assert f"prompt {quantiles[3]:.0f}" in svg


def test_two_findings_in_one_row_are_one_row() -> None:
    findings = [
        {"row": 1, "kind": "contamination", "severity": "warning", "detail": detail}
        for detail in ("of one document", "of another", "of a third")
    ]
    found = tables({"rows": 2, "steps": []}, [Look({"findings": findings}, {"sft": {"a": [0]}})])
    ((row,),) = (table.rows for table in found)
    assert (row.rows, row.share, row.findings) == (1, 0.5, 3)
    assert severities(found)["warning"] == 3
