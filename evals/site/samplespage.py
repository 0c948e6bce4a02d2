"""Pages of samples: what two variants of a model answered to the same documents. jinja2 loads when one is made."""

import itertools
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from conf.entry import UserError
from evals.pairing import Sample
from evals.results import EvalResult, Score
from evals.runs import Run
from evals.site.markup import TEMPLATES, environment
from evals.site.measured import LOSS
from evals.site.places import INDEX, Compared, Place
from reward.pages.markup import script, shortened

# What a page holds at most. Documents that are scored differently come first, gained and lost in turn.
DOCUMENTS = 200
CHARACTERS = 500_000
LONGEST_TEXT = 4000  # characters of one text: a runaway generation must not swell the page

OUTCOMES = ("gained", "lost", "same", "unscored")
_UNITS = {"acc_norm": "character", "acc_bytes": "byte"}
_NUMBERED = re.compile(r"(-?(?:\d+\.\d+|inf)|nan) ")


class Option(NamedTuple):
    """A choice with its log-likelihoods."""

    text: str
    before: float
    after: float
    is_reference: bool
    is_picked_before: bool
    is_picked_after: bool
    length: int = 0  # by which the metric divides the log-likelihood; 0 where it does not

    @property
    def rated(self) -> tuple[float, float]:
        """What the metric compares the options by, before and after; NaN where it is the log-likelihood itself."""
        if not self.length:
            return math.nan, math.nan
        return self.before / self.length, self.after / self.length


class Document(NamedTuple):
    """A document with both answers. `values` has each metric before and after; NaN where it has none."""

    name: str
    outcome: str
    prompt: str
    target: str
    before: str
    after: str
    options: list[Option]
    values: list[tuple[str, float, float]]


class SamplePage(NamedTuple):
    """What a page shows of a task, and of how much."""

    metric: str
    documents: list[Document]
    totals: dict[str, int]  # outcome → documents of the whole task
    files: list[str]  # where all of them are, from the folder of the runs
    higher_is_better: bool = True
    note: str = ""  # why there are none
    is_text: bool = False  # held-out text, which has a loss and no answer

    @property
    def labels(self) -> dict[str, str]:
        """What each outcome is called; a loss is neither gained nor lost."""
        words = {name: name for name in OUTCOMES}
        if self.is_text:
            up, down = ("gained", "lost") if self.higher_is_better else ("lost", "gained")
            words |= {up: f"higher {self.metric}", down: f"lower {self.metric}"}
        return words

    @property
    def has_picks(self) -> bool:
        """Whether it is known which option was taken for the answer."""
        return any(
            option.is_picked_before or option.is_picked_after
            for document in self.documents
            for option in document.options
        )

    @property
    def unit(self) -> str:
        """What the metric divides an option's log-likelihood by; empty where it does not."""
        is_divided = any(o.length for document in self.documents for o in document.options)
        return _UNITS.get(self.metric, "") if is_divided else ""

    @property
    def total(self) -> int:
        """Documents of the whole task."""
        return sum(self.totals.values())


def render(place: Place, subject: Compared, runs: Path) -> str:
    """One page as HTML; equal records give equal text.

    Args:
        place: the arm.
        subject: what is compared.
        runs: the folder of the runs, from which files are named.
    """
    (run,) = (run for run in place.arm.runs if run.seed == subject.seed)
    page = read_page(run, subject, runs)
    return (
        environment()
        .get_template("samples.html.jinja")
        .render(
            place=place,
            subject=subject,
            page=page,
            home=f"../../{INDEX}",
            arm_page=f"../../{place.page}",
            longest=LONGEST_TEXT,
            script=script(TEMPLATES / "samples.js") if page.documents else "",
        )
    )


def read_page(run: Run, subject: Compared, runs: Path = Path()) -> SamplePage:
    """The documents of a task that both variants were scored on."""
    results = [run.result(variant, subject.suite) for variant in (subject.before, subject.after)]
    try:
        before, after = (_readable(result) for result in results)
        ours, theirs = (result.read_samples(subject.task) for result in (before, after))
        score = _main_score(before, after, subject.task)
        pairs = [(ours[name], theirs[name]) for name in ours if name in theirs]
        documents = [_document(left, right, score) for left, right in pairs]
    except (UserError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error) if isinstance(error, UserError) else "the sample files cannot be read"
        return SamplePage("", [], {}, [], note=reason)
    counts = Counter(document.outcome for document in documents)
    totals = {name: counts[name] for name in OUTCOMES if counts[name]}
    files = [
        (result.folder / result.samples[subject.task]).relative_to(runs).as_posix()
        for result in (before, after)
    ]
    is_text = score.metric == LOSS or any(
        left.row.get("kind") == "loglikelihood_rolling" for left, _ in pairs[:1]
    )
    return SamplePage(
        score.metric, chosen(documents), totals, files, score.higher_is_better, is_text=is_text
    )


def _readable(result: EvalResult | str) -> EvalResult:
    if isinstance(result, str):
        raise UserError(result)
    return result


def _main_score(before: EvalResult, after: EvalResult, task: str) -> Score:
    for score in (*before.scores, *after.scores):
        if score.task == task and score.is_main:
            return score
    raise UserError(f"{task} has no main metric")


def chosen(documents: Sequence[Document]) -> list[Document]:
    """What a page shows: first the differing documents, the largest differences first, gained and lost in turn."""
    by_size = sorted(documents, key=_size, reverse=True)
    places: Counter[str] = Counter()
    turns = []
    for document in by_size:
        places[document.outcome] += 1
        is_undecided = document.outcome not in ("gained", "lost")
        has_same_answer = document.before == document.after
        turns.append((is_undecided, is_undecided and has_same_answer, places[document.outcome]))
    ranked = [by_size[place] for place in sorted(range(len(turns)), key=turns.__getitem__)]
    lengths = itertools.accumulate(_length(document) for document in ranked[:DOCUMENTS])
    fitting = sum(length <= CHARACTERS for length in lengths)
    return ranked[: max(1, fitting)]


def _size(document: Document) -> float:
    """How far the main metric moved; the first of the values is its."""
    _, before, after = document.values[0]
    return abs(after - before) if document.outcome in ("gained", "lost") else 0.0


def _length(document: Document) -> int:
    texts = (document.prompt, document.target, document.before, document.after)
    return sum(map(len, texts)) + sum(len(option.text) for option in document.options)


def _document(left: Sample, right: Sample, score: Score) -> Document:
    names = dict.fromkeys(
        [score.metric, *left.metrics, *left.weighted, *right.metrics, *right.weighted]
    )
    values = [(name, _value(left, name), _value(right, name)) for name in names]
    _, before, after = values[0]
    return Document(
        name=str(left.row.get("doc_id", "")),
        outcome=_outcome(before, after, score.higher_is_better),
        prompt=shortened(left.row.get("prompt", ""), LONGEST_TEXT),
        target=shortened(left.row.get("target", ""), LONGEST_TEXT),
        before=_answer(left.row),
        after=_answer(right.row),
        options=_options(left.row, right.row, score.metric),
        values=values,
    )


def _outcome(before: float, after: float, higher_is_better: bool) -> str:
    if math.isnan(before) or math.isnan(after):
        return "unscored"
    if before == after:
        return "same"
    return "gained" if (after > before) == higher_is_better else "lost"


def _value(sample: Sample, metric: str) -> float:
    """A document's own value of a metric, as the score is formed."""
    if metric not in sample.weighted:
        value = sample.metrics.get(metric)
        return math.nan if value is None else float(value)
    total, weight, scale = sample.weighted[metric]
    if not weight:
        return math.nan
    mean = total / weight
    if scale == "perplexity":
        return math.exp(min(700.0, -mean))
    return -mean / math.log(2) if scale == "bits_per_byte" else mean


def _answer(row: dict[str, Any]) -> str:
    answer, whole = row.get("answer", ""), row.get("generated")
    text = shortened("" if answer is None else answer, LONGEST_TEXT)
    if whole:  # a filter took the answer out of it
        return f"{shortened(whole, LONGEST_TEXT)}\n\n→ taken as the answer: {text}"
    return text


def _options(left: dict[str, Any], right: dict[str, Any], metric: str) -> list[Option]:
    """The choices side by side; none where the document is not one of multiple choice."""
    ours, theirs = likelihoods(left), likelihoods(right)
    texts = [text for text, _ in ours]
    # Where the choices are put into the prompt (Winogrande), all options have the one continuation for their text.
    if len(set(texts)) < 2 or texts != [text for text, _ in theirs]:
        return []
    picks = [_picked(row, found, metric) for row, found in ((left, ours), (right, theirs))]
    gold = _reference(str(left.get("target", "")), texts)
    return [
        Option(
            shortened(text, LONGEST_TEXT),
            before,
            after,
            is_reference=number == gold,
            is_picked_before=picks[0] == number,
            is_picked_after=picks[1] == number,
            length=_length_of(text, metric),
        )
        for number, ((text, before), (_, after)) in enumerate(zip(ours, theirs, strict=True))
    ]


def _reference(target: str, texts: Sequence[str]) -> int | None:
    """The number of the right option. Digits are its number, also where the options are numbers themselves."""
    if target.isdecimal() and int(target) < len(texts):
        return int(target)
    return next((number for number, text in enumerate(texts) if text.strip() == target), None)


def _length_of(option: str, metric: str) -> int:
    """By what the metric divides: characters or bytes of the choice without the space that leads to it."""
    choice = option.removeprefix(" ")
    lengths = {"acc_norm": len(choice), "acc_bytes": len(choice.encode("utf-8", "replace"))}
    return lengths.get(metric, 0)


def _picked(row: dict[str, Any], found: Sequence[tuple[str, float]], metric: str) -> int | None:
    """The number of the option that the metric takes for the answer; by likelihood where no record tells."""
    picked = row.get("picked") or {}
    if metric in picked:
        return int(picked[metric])
    if metric != "acc":
        return None
    return max(range(len(found)), key=lambda number: found[number][1])


def likelihoods(row: dict[str, Any]) -> list[tuple[str, float]]:
    """The options of a document and their log-likelihoods, as `evals.answers` wrote them into its answer."""
    answer = row.get("answer")
    if row.get("kind") == "generate_until" or not isinstance(answer, str):
        return []
    texts = row.get("options") or [line.partition(" ")[2] for line in answer.split("\n")]
    found, rest = [], answer
    for text in texts:  # an option may hold line breaks
        number = _NUMBERED.match(rest)
        if not number or not rest[number.end() :].startswith(text):
            return []
        found.append((text, float(number[1])))
        rest = rest[number.end() + len(text) :].removeprefix("\n")
    return found if len(found) > 1 and not rest else []
