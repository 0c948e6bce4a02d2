"""Combinations against the formulas written as loops, and ensembles of tiny models against their members."""

import json
import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.entry import UserError
from reward import ensemble as models
from reward.ensemble import Ensemble, Scale, open_models
from reward.model import RewardModel

PROMPTS = [[{"role": "user", "content": text}] for text in ("Hi", "Why?", "x" * 40)]
COMPLETIONS = [[{"role": "assistant", "content": text}] for text in ("Hello!", "So.", "y")]


class Fixed:
    """A member that says what it was told."""

    def __init__(self, scores: list[float]) -> None:
        self.scores = scores

    def score(self, prompts: Any, completions: Any, tools: Any = None) -> list[float]:
        return self.scores


def by_loops(row: list[float], how: str, k: float) -> float:
    if any(math.isnan(score) for score in row):
        return math.nan
    if how == "min":
        return min(row)
    spread = statistics.pstdev(row) if how == "mean_minus_std" else 0.0
    return statistics.fmean(row) - k * spread


@pytest.mark.parametrize("how", models.COMBINATIONS)
@pytest.mark.parametrize("members", [1, 2, 5])
def test_combinations_are_the_formulas(how: str, members: int) -> None:
    scores = np.random.default_rng(members).normal(3, 10, (40, members))
    scores[5, -1] = math.nan
    found = models.combine(scores, how, 0.7)
    expected = [by_loops(row, how, 0.7) for row in scores.tolist()]
    assert found.tolist() == pytest.approx(expected, abs=1e-12, nan_ok=True)
    assert np.isnan(found).tolist() == [place == 5 for place in range(40)]


def test_disagreement_and_order() -> None:
    first = np.array([[1.0, 2.0], [3.0, 0.0], [1.0, 1.0], [1.0, 2.0], [math.nan, 1.0]])
    second = np.array([[0.0, 0.0], [2.0, 1.0], [1.0, 1.0], [1.0, 1.0], [0.0, 0.0]])
    assert models.disagreement(first).tolist() == pytest.approx(
        [0.5, 1.5, 0.0, 0.5, math.nan], nan_ok=True
    )
    # agreed; at odds; both tie; one ties; unknown
    assert models.are_at_odds(first, second).tolist() == pytest.approx(
        [0, 1, 0, 1, math.nan], nan_ok=True
    )


@pytest.mark.parametrize("how", models.COMBINATIONS)
@pytest.mark.parametrize("copies", [1, 3, 7])
def test_copies_of_one_model_score_exactly_as_it_does(how: str, copies: int) -> None:
    """Also where n·x / n is not x in floating point."""
    scores = [*np.random.default_rng(0).normal(0, 3, 200).tolist(), 0.1, -0.7, 1 / 3, math.nan]
    k = 2.0 if how == "mean_minus_std" else models.K
    together = Ensemble([(str(n), Fixed(scores)) for n in range(copies)], how, k)
    turns = [PROMPTS[0]] * len(scores)
    assert together.score(turns, turns)[:-1] == scores[:-1]
    assert math.isnan(together.score(turns, turns)[-1])
    assert models.disagreement(together.members(turns, turns))[:-1].tolist() == [0.0] * 203


def test_an_ensemble_of_models(seeded_reward_model: Callable[[int], Path]) -> None:
    paths = [str(seeded_reward_model(seed)) for seed in (1, 2)]
    columns = [RewardModel.load(path).score(PROMPTS, COMPLETIONS) for path in paths]
    both = open_models(paths, "min", max_length=200, batch_tokens=100)
    assert both.names == paths
    assert both.max_length == 200
    assert len(set(both.identities)) == 2
    members = both.members(PROMPTS, COMPLETIONS)
    assert members.T.tolist() == [pytest.approx(column, abs=1e-5) for column in columns]
    assert both.score(PROMPTS, COMPLETIONS) == members.min(axis=1).tolist()
    twice = open_models(paths[:1] * 2, "mean_minus_std", k=3.0)
    assert twice.score(PROMPTS, COMPLETIONS) == columns[0]
    short = open_models(paths, max_length=30)  # in tokens, which are bytes here
    assert [math.isnan(score) for score in short.score(PROMPTS, COMPLETIONS)].count(True) > 0
    assert both.score([], []) == []
    assert both.members([], []).shape == (0, 2)


def test_scales_put_members_into_their_own_units(tmp_path: Path) -> None:
    members = [("a", Fixed([1.0, 3.0])), ("b", Fixed([100.0, 0.0]))]
    scaled = Ensemble(members, "mean", scales={"a": Scale(1.0, 2.0), "b": Scale(50.0, 25.0)})
    assert scaled.members(PROMPTS[:2], COMPLETIONS[:2]).tolist() == [[0.0, 2.0], [1.0, -2.0]]
    assert scaled.score(PROMPTS[:2], COMPLETIONS[:2]) == [1.0, -0.5]
    with pytest.raises(UserError, match="do not hold b with these weights"):
        Ensemble(members, scales={"a": Scale(1.0, 2.0)})
    with pytest.raises(UserError, match="no spread"):
        Ensemble(members, scales={"a": Scale(1.0, 0.0), "b": Scale(0.0, 1.0)})
    file = tmp_path / "manifest.json"
    file.write_text(json.dumps({"members": [{"identity": "a", "mean": 1, "std": 2}]}))
    assert models.read_scales(file) == {"a": Scale(1.0, 2.0)}
    for content in ("{}", "nothing", '{"members": [{"identity": "a"}]}'):
        file.write_text(content)
        with pytest.raises(UserError, match="holds no scales"):
            models.read_scales(file)
    with pytest.raises(UserError, match="cannot read the scales"):
        models.read_scales(tmp_path / "absent.json")


def test_what_cannot_be_combined_is_refused_before_loading() -> None:
    with pytest.raises(UserError, match=r"no combination 'mena'.*mean"):
        open_models(["./absent"], "mena")
    for k in (-1.0, math.nan):
        with pytest.raises(UserError, match="0 or more"):
            open_models(["./absent"], k=k)
    with pytest.raises(UserError, match="k=2 is of mean_minus_std: min does not use it"):
        open_models(["./absent"], "min", k=2.0)
    with pytest.raises(UserError, match="at least one reward model"):
        open_models([])
    with pytest.raises(UserError, match="there is no reward model"):
        open_models(["./absent"])
