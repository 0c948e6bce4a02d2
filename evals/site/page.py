"""The leaderboard as one self-contained HTML page. jinja2 loads when it is made."""

from collections.abc import Sequence
from typing import NamedTuple

from evals.contrast import Change
from evals.leaderboard import Arm, Board, MeanScore
from evals.runs import Run
from evals.site.graphs import Spot, trade_chart
from evals.site.markup import environment, shared_note
from evals.site.measured import texts
from evals.site.places import Place, board_title
from reward.pages.markup import TABLES, script

_JOINT = " · "  # between an experiment's name and what tells its arms apart


def render(places: Sequence[Place], data_page: str = "") -> str:
    """The page of all arms; equal records give equal text.

    Args:
        places: the arms in the order of their boards.
        data_page: file name of the page about the training data; empty when there is none.
    """
    tests = dict.fromkeys(place.test for place in places)
    boards = [
        BoardView(number, [Line(place) for place in places if place.test == test])
        for number, test in enumerate(tests, 1)
    ]
    return (
        environment()
        .get_template("leaderboard.html.jinja")
        .render(
            boards=boards,
            is_trained=any(board.is_trained for board in boards),
            is_rated=any(board.is_rated for board in boards),
            experiments=list(dict.fromkeys(place.arm.first.experiment for place in places)),
            arms=len(places),
            provenance=_provenance([place.arm for place in places]),
            data_page=data_page,
            script=script(TABLES),
            up="",
        )
    )


class Line:
    """An arm as its line of the table shows it."""

    def __init__(self, place: Place) -> None:
        self.place = place
        self.arm = arm = place.arm
        self.score: MeanScore = arm.final_score()
        self.gain = arm.average("gain")
        self.retention = arm.average("retention")
        self.verdicts = arm.verdicts()
        self.rating = arm.rating
        self.texts = {text.task: text for text in (texts(arm.stages[-1]) if arm.stages else [])}

    @property
    def words(self) -> str:
        """What the filter by verdict finds the arm by."""
        retained, judged = self.verdicts["retained"], sum(self.verdicts.values())
        kept = "kept" if judged and retained == judged else ""  # inconclusive is never "kept"
        lost = "forgot" if self.verdicts["forgotten"] else ""
        return " ".join(filter(None, (self.gain.verdict, kept, lost)))

    @property
    def gain_page(self) -> str:
        """The samples of the gain; the arm's own page where it is an average over tasks."""
        return self._page() or self.section("gain")

    def section(self, name: str) -> str:
        """A section of the arm's page; the page where it has no such section, because nothing was trained."""
        own = {"gain": self.arm.tasks("gain"), "rewards": self.rating}
        is_there = bool(self.arm.stages or own.get(name))
        return f"{self.place.page}#{name}" if is_there else self.place.page

    @property
    def report(self) -> str:
        """The report on the reward model; the arm's page where the run lost it."""
        return (self.rating.page if self.rating else "") or self.section("rewards")

    def cost_page(self, quantizer: str) -> str:
        """The samples of a quantizer's cost, as `gain_page`."""
        return self._page(quantizer) or f"{self.place.page}#quantization"

    def _page(self, quantizer: str = "") -> str:
        tasks = self.arm.tasks("gain")
        if len(tasks) != 1:
            return ""
        before, after = self.arm.base, self.arm.final
        if quantizer:
            before, after = after, after._replace(quantizer=quantizer)
        return self.place.sample_page(before, after, *tasks[0])


class BoardView(NamedTuple):
    """Arms that are ranked on one test."""

    number: int
    lines: list[Line]

    @property
    def board(self) -> Board:
        """What is shown."""
        return self.lines[0].place.board

    @property
    def title(self) -> str:
        """What the board is headed with."""
        return board_title(self.board)

    @property
    def is_scored(self) -> bool:
        """Whether there is a gain suite."""
        return any(line.arm.tasks("gain") for line in self.lines)

    @property
    def is_trained(self) -> bool:
        """Whether an arm trained a policy, which alone can gain or lose."""
        return any(line.arm.stages for line in self.lines)

    @property
    def is_rated(self) -> bool:
        """Whether a reward model was measured."""
        return any(line.rating for line in self.lines)

    @property
    def notes(self) -> list[str]:
        """What holds for the whole table, and is said once below it."""
        changes = [change for line in self.lines for change in (line.gain, line.retention)]
        changes += [line.arm.cost(name) for line in self.lines for name in self.board.quantizers]
        found = [f"An average is {note}." for c in changes if (note := shared_note(c.note))]
        if self.board.note:
            found.append(f"{self.board.note[0].upper()}{self.board.note[1:]}.")
        return list(dict.fromkeys(found))

    @property
    def texts(self) -> list[str]:
        """Every set of held-out text that an arm was measured on."""
        return list(dict.fromkeys(task for line in self.lines for task in line.texts))

    @property
    def has_verdicts(self) -> bool:
        """Whether a retention task was judged."""
        return any(any(line.verdicts.values()) for line in self.lines)

    @property
    def chart(self) -> str:
        """Gain against forgetting; empty with fewer than two arms that have both."""
        spots = [
            Spot(
                line.arm.name,
                line.retention.difference * 100,
                line.gain.difference * 100,
                (line.retention.ci_low * 100, line.retention.ci_high * 100),
                (line.gain.ci_low * 100, line.gain.ci_high * 100),
            )
            for line in self.lines
            if _is_drawn(line.gain) and _is_drawn(line.retention)
        ]
        if len(spots) < 2:
            return ""
        names = ("retention, average change (points)", "gain vs base (points)")
        return trade_chart(f"board-{self.number}", without_experiment(spots), names)


def without_experiment(spots: Sequence[Spot]) -> list[Spot]:
    """The spots named without the experiment's name where all share it."""
    heads = {spot.label.partition(_JOINT)[0] for spot in spots}
    if len(heads) > 1 or not all(_JOINT in spot.label for spot in spots):
        return list(spots)
    return [spot._replace(label=spot.label.partition(_JOINT)[2]) for spot in spots]


def _is_drawn(change: Change) -> bool:
    return not change.is_missing and change.is_share


def _provenance(arms: Sequence[Arm]) -> dict[str, list[str]]:
    """What made the numbers, each distinct value once."""
    runs = sorted((run for arm in arms for run in arm.runs), key=lambda run: run.started)
    known = {
        "Commit": [_commit(run) for run in runs],
        "Versions": [_versions(run) for run in runs],
        "Command": [run.command for run in runs],
        "Date": [run.started for run in runs],
    }
    return {key: list(dict.fromkeys(filter(None, values))) for key, values in known.items()}


def _commit(run: Run) -> str:
    commit = run.provenance.get("commit")
    if not commit:
        return "unknown (not run from a checkout)"
    return f"{commit} with uncommitted changes" if run.provenance.get("dirty") else str(commit)


def _versions(run: Run) -> str:
    versions = run.provenance.get("versions") or {}
    return ", ".join(f"{name} {version}" for name, version in sorted(versions.items()) if version)
