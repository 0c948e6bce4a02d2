"""The ranks that arms may have, from their final policies' answers to the same documents. No torch."""

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from conf.entry import UserError
from evals import stats
from evals.contrast import is_share, with_one_unit
from evals.deltas import samples_of
from evals.pairing import Samples, column
from evals.results import EvalResult, Score

if TYPE_CHECKING:
    from evals.leaderboard import Arm


def paired_ranks(arms: "Sequence[Arm]") -> list[tuple[float, tuple[int, int]]]:
    """Each arm's score, + is better, and the ranks that it may have; see `stats.rank_intervals`.

    A document's value is its mean over the arm's seeds. Gain tasks weigh the same.

    Raises:
        UserError: when the arms' documents cannot be paired.
    """
    settings = dict(arms[0].first.test())  # suites may have other names in other arms
    names = [(settings[suite], task) for suite, task in arms[0].tasks("gain")]
    tasks = [[_by_document(arm, *name) for arm in arms] for name in names]
    kinds = [(task[0][0].metric, _are_shares(task)) for task in tasks]
    kept = [task for task, is_kept in zip(tasks, with_one_unit(kinds), strict=True) if is_kept]
    if not kept:
        raise UserError("the gain tasks have no common unit")
    parts, clusters = [], []
    for number, task in enumerate(kept):
        documents = list(task[0][1])
        if any(values.keys() != task[0][1].keys() for _, values, _ in task):
            raise UserError("the arms were not measured on the same documents")
        parts.append(np.array([[values[name] for name in documents] for _, values, _ in task]))
        samples = task[0][2]
        clusters += [
            None if (cluster := samples[name].cluster) is None else f"{number} {cluster}"
            for name in documents
        ]
    total = sum(part.shape[1] for part in parts)
    # So weighted, the mean over all documents is the mean of the tasks' means.
    weighted = [part * (total / part.shape[1] / len(parts)) for part in parts]
    values = np.concatenate(weighted, axis=1)
    return list(
        zip(values.mean(axis=1).tolist(), stats.rank_intervals(values, clusters), strict=True)
    )


_Column = tuple[Score, dict[str, float], Samples]


def _are_shares(task: Sequence[_Column]) -> bool:
    return all(is_share(score.metric, score.value) for score, _, _ in task)


def _by_document(arm: "Arm", settings: str, task: str) -> _Column:
    """The main score of the final policy, each document's mean over seeds, + is better, and the documents."""
    suite = next(name for name, its_settings in arm.first.test() if its_settings == settings)
    found: list[_Column] = []
    for run in arm.runs:
        result = run.result(arm.final, suite)
        if isinstance(result, str):
            continue  # the arm's gain leaves this seed out too, and says so
        found.append(_column(result, task))
    if not found:
        raise UserError(f"{arm.name} has no result on {task}")
    score, first, samples = found[0]
    if any(values.keys() != first.keys() for _, values, _ in found):
        raise UserError(f"the seeds of {arm.name} were not measured on the same documents")
    sign = 1 if score.higher_is_better else -1
    mean = {name: sign * statistics.fmean(values[name] for _, values, _ in found) for name in first}
    return score, mean, samples


def _column(result: EvalResult, task: str) -> _Column:
    score = next((one for one in result.scores if one.task == task and one.is_main), None)
    if score is None:
        raise UserError(f"{task} was not measured")
    samples = samples_of(result, task)
    found = column(score, samples)
    if isinstance(found, str):
        raise UserError(f"{task} {found}")
    return score, found, samples
