"""The page about the training data: where rows came from, what became of them, what was found.

It is made from the manifest and the audit that each run keeps of its stages' data. No torch; jinja2
and matplotlib load when the page is made.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from evals.leaderboard import Board
from evals.site.datafindings import FoundBy, kind_of, severities, tables
from evals.site.datause import Used, arms_text, read_usage
from evals.site.markup import environment
from reward.findings import KINDS, UNUSABLE
from reward.pages.markup import count, percent, whole
from reward.pages.plots import Spread, spread_chart

_QUANTILES = ("0", "5", "25", "50", "75", "95", "100")
_LANGUAGES = 8

# Why a step of `reward.choose` leaves a row out; {} is the step's value.
_STEPS = {
    "repair": "text that was decoded with the wrong encoding is put right",
    "mask": "personal data and secrets are replaced by [EMAIL], [SECRET]…",
    "min_chars": "the answer, or the shorter one of a pair, has fewer than {} characters",
    "max_chars": "prompt and answer, the longer one of a pair, have more than {} characters",
    "min_score": "the score is below {}, or there is none",
    "max_score": "the score is above {}, or there is none",
    "balance": "surplus of the larger groups, drawn at random",
    "mix": "more than the weight of a further set allows, drawn at random",
    "part": "rows of the other parts: the split is by prompt, this version is the {} part",
}


class Step(NamedTuple):
    """One line of the way from rows to records."""

    name: str
    why: list[str]
    change: str
    left: int
    share: float  # of the rows that were read


class Tokens(NamedTuple):
    """What a stage's tokenizer and lengths make of the examples."""

    users: str
    counts: dict[str, int]


@dataclass(frozen=True)
class Section:
    """A data version as the page shows it."""

    id: str
    title: str
    users: dict[str, list[str]]  # stage → arms with their seeds
    facts: dict[str, str]
    sources: list[dict[str, Any]]
    rows: int
    records: int
    examples: int
    read: int  # records before cleaning, of which the figures tell
    steps: list[Step]
    tokens: list[Tokens]
    lengths: dict[str, list[float]]
    chart: str
    gap: list[tuple[str, str, str]]
    gap_meaning: str
    turns: str
    languages: list[tuple[str, int, float]]
    found: list[FoundBy]

    @property
    def loss_tokens(self) -> str:
        """Tokens with loss; a range where the stages differ."""
        counts = sorted({one.counts["loss"] for one in self.tokens if "loss" in one.counts})
        return "–".join(count(one) for one in dict.fromkeys(counts[:1] + counts[-1:]))

    @property
    def severities(self) -> dict[str, int]:
        """How many findings there are of each severity, for the stage that has most."""
        return severities(self.found)


@dataclass(frozen=True)
class DataPage:
    """The whole page. It is false when the records tell nothing of data."""

    sections: list[Section]
    problems: list[str]
    without: list[str]
    links: dict[tuple[Path, str], str]  # (run's folder, stage) → id of a section

    def __bool__(self) -> bool:
        return bool(self.sections or self.problems)


def read_data(found: Sequence[Board]) -> DataPage:
    """What the records of the boards' runs tell of their data."""
    usage = read_usage(found)
    problems = list(usage.problems)
    sections: list[Section] = []
    links: dict[tuple[Path, str], str] = {}
    for used in usage.versions:
        try:
            section = _section(used, f"data-{len(sections) + 1}")
        except (AttributeError, KeyError, IndexError, TypeError, ValueError) as error:
            name = ", ".join(look.named() for look in used.looks.values())
            problems.append(f"{name}: no record of data: {type(error).__name__} {error}")
            continue
        sections.append(section)
        links |= dict.fromkeys(used.uses, section.id)
    return DataPage(sections, problems, usage.without, links)


def render(page: DataPage, home: str) -> str:
    """The page as HTML; equal pages give equal text. `home` is the page to go back to."""
    return environment().get_template("data.html.jinja").render(page=page, home=home, script="")


def _section(used: Used, name: str) -> Section:
    manifest, looks = used.manifest, list(used.looks.values())
    summary = looks[0].audit["summary"]  # all but the tokens is the version's own
    sources = [_source(source) for source in manifest["sources"]]
    lengths = {
        part: [float(quantiles[key]) for key in _QUANTILES]
        for part, quantiles in summary.get("chars", {}).items()
    }
    spreads = [Spread(part, quantiles) for part, quantiles in lengths.items()]
    gap = summary.get("length_gap") or {}
    users: dict[str, dict[str, list[int]]] = {}
    for look in looks:
        for stage, arms in look.users.items():
            for arm, seeds in arms.items():
                users.setdefault(stage, {}).setdefault(arm, []).extend(seeds)
    return Section(
        id=name,
        title=_title(sources),
        users={stage: arms_text(arms) for stage, arms in users.items()},
        facts={
            "Feedback": str(manifest["kind"]),
            "Part": str(manifest["part"]),
            "Order": str(manifest["order"]).replace("_", " "),
            "Data seed": str(manifest["seed"]),
            "Fingerprint": str(manifest["fingerprint"]),
        },
        sources=sources,
        rows=int(manifest["rows"]),
        records=int(manifest["records"]),
        examples=int(manifest["examples"]),
        read=int(summary["records"]),
        steps=_steps(manifest, looks[0].audit),
        tokens=[
            Tokens(
                look.named(),
                {key: int(value) for key, value in look.audit["summary"].get("tokens", {}).items()},
            )
            for look in looks
        ],
        lengths=lengths,
        chart=spread_chart(f"{name}-lengths", spreads, "characters (logarithmic)")
        if spreads
        else "",
        gap=_gap(gap) if gap else [],
        gap_meaning=gap_meaning(float(gap["correlation"])) if gap else "",
        turns=_turns(summary.get("turns", {})),
        languages=_languages(summary["languages"]),
        found=tables(manifest, looks),
    )


def _title(sources: list[dict[str, Any]]) -> str:
    first = str(sources[0]["source"]).rstrip("/").rsplit("/", 1)[-1]
    more = len(sources) - 1
    if not more:
        return first
    return f"{first} and {more} more source{'s' if more > 1 else ''}"


def _source(source: dict[str, Any]) -> dict[str, Any]:
    # `train` is what a file has too, which knows no splits.
    split = source["split"] if source["split"] != "train" else None
    told = {"configuration": source["name"], "split": split, "revision": source["revision"]}
    return {
        "source": str(source["source"]),
        "more": ", ".join(f"{key} {value}" for key, value in told.items() if value),
        "format": str(source["format"] or "none"),
        "rows": int(source["rows"]),
    }


def _steps(manifest: dict[str, Any], audit: dict[str, Any]) -> list[Step]:
    rows, unusable = int(manifest["rows"]), int(manifest["unusable"])
    found = Counter(finding["kind"] for finding in audit["findings"])
    reasons = [
        f"{whole(found[kind])} × {kind}: {KINDS[kind].meaning}"
        for kind in UNUSABLE
        if found[kind] and kind != "blank_line"
    ]
    read = int(audit["summary"]["records"])
    lines: list[tuple[str, list[str], str, int]] = [("rows read", [], "", rows)]
    if blank := rows - unusable - read:
        lines.append(("blank lines", ["nothing on them"], f"−{whole(blank)}", rows - blank))
    why = reasons or ["every row could be read as a record"]
    lines.append(("unusable", why, _removed(unusable), read))
    for step in manifest["steps"]:
        name = str(step["step"])
        change = (
            _removed(step["removed"]) if "removed" in step else f"{whole(step['changed'])} changed"
        )
        lines.append((name, [_why(name)], change, int(step["left"])))
    return [Step(*line, line[3] / max(1, rows)) for line in lines]


def _removed(rows: int) -> str:
    return f"−{whole(rows)}" if rows else "0"


def _why(step: str) -> str:
    name, _, detail = step.partition(" ")
    if name == "drop":
        more = "; nobody knows which is right, so both go" if detail == "label_conflict" else ""
        return kind_of(detail).meaning + more
    return _STEPS.get(name, "").format(detail)


def _gap(gap: dict[str, Any]) -> list[tuple[str, str, str]]:
    """Name, number and what follows it."""
    error, margin = gap["standard_error"], gap["correlation_with_margin"]
    spread = "" if error is None else f"± {whole(error)} "
    shown = [
        ("Mean gap", _plus(gap["mean"]), f"{spread}characters"),
        ("Chosen is longer", percent(gap["chosen_is_longer"]), "of the pairs"),
        ("Correlation of choice and length", _correlation(gap["correlation"]), ""),
    ]
    if margin is not None:
        shown.append(("Correlation of gap and margin", _correlation(margin), ""))
    return shown


def _correlation(number: float) -> str:
    return f"{round(number, 2) + 0.0:+.2f}".replace("-", "−")  # no −0.00


def _plus(number: float) -> str:
    return f"+{whole(number)}" if round(number) > 0 else whole(round(number))


def gap_meaning(correlation: float) -> str:
    """What the correlation of being chosen with the length means, in one sentence."""
    size = abs(correlation)
    if size < 0.1:
        return "Length says next to nothing about which answer is chosen."
    strength = "weak" if size < 0.3 else "clear" if size < 0.5 else "strong"
    way, lesson = ("longer", "more") if correlation > 0 else ("shorter", "less")
    return (
        f"There is a {strength} tendency for the chosen answer to be the {way} one, so a model may "
        f"learn to write {lesson}, whatever it says."
    )


def _turns(turns: dict[str, int]) -> str:
    if not turns:
        return ""
    first, *others = [f"{whole(number)} have {name}" for name, number in turns.items()]
    word = "turn" if list(turns) == ["1"] else "turns"
    return ", ".join([f"{first} {word}", *others])


def _languages(counts: dict[str, int]) -> list[tuple[str, int, float]]:
    total = max(1, sum(counts.values()))
    most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    if rest := most[_LANGUAGES:]:
        most = [*most[:_LANGUAGES], (f"{len(rest)} others", sum(number for _, number in rest))]
    return [(name, number, number / total) for name, number in most]
