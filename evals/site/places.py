"""Where each page of the site is. No torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evals.contrast import Contrast
from evals.leaderboard import Arm, Board
from evals.results import EvalResult
from evals.runs import Run, Variant
from reward.pages.markup import slug

INDEX, DATA = "index.html", "data.html"
_JUDGED = ("gain", "retention")


class Compared(NamedTuple):
    """Two variants of one run on one task: the subject of a page of samples."""

    before: Variant
    after: Variant
    suite: str
    task: str
    seed: int


@dataclass(frozen=True)
class Place:
    """An arm's pages, as paths from the site's root."""

    arm: Arm
    rank: str
    board: Board
    page: str
    card: str
    samples: dict[Compared, str]
    data: Mapping[tuple[Path, str], str]  # (run's folder, stage) → section of the data page

    @property
    def test(self) -> str:
        """Name of the arm's board."""
        return self.board.test

    def sample_page(
        self, before: Variant, after: Variant, suite: str, task: str, seed: int | None = None
    ) -> str:
        """Path of the page where the documents of a number are; empty when there is none. Default: the first seed."""
        seed = self.arm.first.seed if seed is None else seed
        return self.samples.get(Compared(before, after, suite, task, seed), "")

    def samples_of(self, variant: Variant, suite: str, task: str) -> str:
        """The page with a variant's own answers: against the base, or against the unquantized."""
        before, after = self.arm.base, variant
        if variant == self.arm.base:
            after = self.arm.final
        elif variant.quantizer != self.arm.final.quantizer:
            before = self.arm.final
        return self.sample_page(before, after, suite, task)


def board_title(board: Board) -> str:
    """What a board is headed with; its experiments where nothing was measured that could rank its arms."""
    if any(entry.arm.tasks("gain") for entry in board.entries):
        return f"Ranking on {board.test}"
    if any(entry.arm.rating for entry in board.entries):
        return f"Reward models on {board.test}"
    return ", ".join(dict.fromkeys(entry.arm.first.experiment for entry in board.entries))


def places(found: Sequence[Board], data: Mapping[tuple[Path, str], str]) -> list[Place]:
    """The pages of every arm, in the order of the boards. Names are unique, also where case does not count.

    Args:
        found: the boards.
        data: (run's folder, stage) → path of the section that tells of the stage's rows.
    """
    taken: set[str] = set()
    made = []
    for board in found:
        for entry in board.entries:
            first = entry.arm.first
            name = _free(slug(f"{first.experiment}-{first.arm}") or "arm", taken)
            made.append(
                Place(
                    entry.arm,
                    entry.rank,
                    board,
                    f"arms/{name}.html",
                    f"cards/{name}.md",
                    _samples(entry.arm, f"samples/{name}"),
                    data,
                )
            )
    return made


def _samples(arm: Arm, folder: str) -> dict[Compared, str]:
    """A page for each pair of variants and task of the first seed; of further seeds, what the gain is made of."""
    taken: set[str] = set()
    found = {}
    for run in arm.runs:
        for contrast in [*arm.stages, *arm.quantized]:
            for key in _compared(run, contrast):
                name = f"{key.suite}-{key.task}-{key.before}-{key.after}"
                if run is not arm.first:
                    if run.role(key.suite) != "gain" or contrast.after != arm.final:
                        continue
                    name += f"-seed{run.seed}"
                found[key] = f"{folder}/{_free(slug(name), taken)}.html"
    return found


def _compared(run: Run, contrast: Contrast) -> Iterator[Compared]:
    for suite in run.suites:
        before, after = (
            run.result(variant, suite) for variant in (contrast.before, contrast.after)
        )
        if isinstance(before, EvalResult) and isinstance(after, EvalResult):
            if before.role not in _JUDGED:
                continue
            for task in before.samples:
                if task in after.samples:
                    yield Compared(contrast.before, contrast.after, suite, task, run.seed)


def _free(name: str, taken: set[str]) -> str:
    """`name`, numbered when it is taken; file systems may ignore case."""
    numbered = name
    number = 1
    while numbered.casefold() in taken:
        number += 1
        numbered = f"{name}-{number}"
    taken.add(numbered.casefold())
    return numbered
