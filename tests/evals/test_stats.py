"""The statistics against hand values and simulated truth."""

import math

import numpy as np
import pytest

from evals.stats import holm, macro, mcnemar, paired, permutation


def test_mcnemar_by_hand() -> None:
    # 10 discordant documents, 8 lost: 2 · P(X ≤ 2), X ~ Binomial(10, ½) = 2 · (1 + 10 + 45) / 1024
    assert mcnemar(lost=8, won=2) == pytest.approx(2 * 56 / 1024)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0


def test_paired_by_hand() -> None:
    found = paired([1, 0, 1, 1], [0, 0, 1, 0])
    # differences −1, 0, 0, −1: mean −½, variance 1/3, t(3) = 3.1824
    stderr = math.sqrt(1 / 3 / 4)
    assert found.difference == -0.5
    assert found.stderr == pytest.approx(stderr)
    assert found.ci_low == pytest.approx(-0.5 - 3.182446 * stderr, rel=1e-6)
    assert found.ci_high == pytest.approx(-0.5 + 3.182446 * stderr, rel=1e-6)
    assert found.p == pytest.approx(0.5)
    assert found.flips == 0.5
    assert found.n == 4


def test_equal_sides_are_zero() -> None:
    found = paired([0.1, 0.7, 0.3], [0.1, 0.7, 0.3])
    assert (found.difference, found.stderr, found.ci_low, found.ci_high, found.flips) == (
        0,
        0,
        0,
        0,
        0,
    )
    assert found.p == 1.0


@pytest.mark.parametrize("bad", [([1], [1, 0]), ([], []), ([math.nan], [0.0])])
def test_impossible_input_is_refused(bad: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="paired values must be"):
        paired(*bad)


def test_permutation_agrees_with_full_enumeration() -> None:
    delta = np.array([0.3, 0.1, -0.2, 0.5, 0.4, 0.2, -0.1, 0.6])
    signs = np.array(np.meshgrid(*[(-1, 1)] * delta.size)).reshape(delta.size, -1).T
    exact = float((np.abs(signs @ delta) >= abs(delta.sum()) - 1e-12).mean())
    assert permutation(delta) == pytest.approx(exact, abs=0.01)


def test_nulls_are_rejected_at_the_nominal_rate_and_intervals_cover() -> None:
    rng = np.random.default_rng(1)
    rejected = covered = 0
    for _ in range(1000):
        skill = rng.uniform(0.2, 0.8, 300)
        base = (rng.random(300) < skill).astype(float)
        candidate = (rng.random(300) < skill).astype(float)
        found = paired(base, candidate)
        rejected += found.p < 0.05
        covered += found.ci_low <= 0 <= found.ci_high
    assert rejected / 1000 < 0.07  # the exact test is conservative
    assert 0.93 <= covered / 1000 <= 0.97


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert math.isnan(holm([0.02, math.nan])[1])
    assert holm([0.02, math.nan])[0] == pytest.approx(0.02)


def test_macro_by_hand() -> None:
    mean, low, high = macro([0.1, -0.1], [0.03, 0.04])
    assert mean == pytest.approx(0)
    assert high == pytest.approx(1.959964 * 0.05 / 2)
    assert low == -high
