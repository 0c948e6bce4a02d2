"""The statistics against hand values, enumeration and the laws that they must obey."""

import itertools
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.stats import (
    documents_needed,
    holm,
    macro,
    mcnemar,
    paired,
    permutation,
    rank_intervals,
    seed_effects,
)
from reward.intervals import Proportions, stderr
from reward.resampling import bootstrap, bootstrap_means, sign_flips

Z = 1.959964


def test_mcnemar_by_hand() -> None:
    # 10 discordant documents, 8 lost: 2 · P(X ≤ 2), X ~ Binomial(10, ½) = 2 · (1 + 10 + 45) / 1024
    assert mcnemar(lost=8, won=2) == pytest.approx(2 * 56 / 1024)
    assert mcnemar(0, 0) == 1.0
    assert mcnemar(3, 3) == 1.0


def test_a_graded_metric_by_hand() -> None:
    found = paired([1, 0.5, 1, 1], [0, 0.5, 1, 0])
    # differences −1, 0, 0, −1: mean −½, variance 1/3, t(3) = 3.1824
    error = math.sqrt(1 / 3 / 4)
    assert found.difference == -0.5
    assert found.stderr == pytest.approx(error)
    assert found.ci_low == pytest.approx(-0.5 - 3.182446 * error, rel=1e-6)
    assert found.ci_high == pytest.approx(-0.5 + 3.182446 * error, rel=1e-6)
    assert found.mde == pytest.approx((3.182446 + 0.978472) * error, rel=1e-6)  # t(3) at 0.8
    assert (found.p, found.flips, found.n, found.clusters) == (0.5, 0.5, 4, None)


def test_a_binary_metric_by_hand() -> None:
    # 7 lost and 1 won of 21: Fagerland, Lydersen and Laake 2014, "Recommended tests and confidence intervals for paired
    # binomial proportions", give −0.517 to −0.026 for Tango's interval.
    base = [1.0] * 7 + [0.0] + [1.0] * 13
    candidate = [0.0] * 7 + [1.0] + [1.0] * 13
    found = paired(base, candidate)
    assert found.difference == pytest.approx(-6 / 21)
    assert (found.ci_low, found.ci_high) == pytest.approx((-0.517, -0.026), abs=5e-4)
    assert found.p == pytest.approx(mcnemar(7, 1))


def test_flips_all_one_way_by_hand() -> None:
    # Without a loss, Tango's equation is (won − n δ) / (1 + δ) = z² below the estimate, and above it
    # the score test of one proportion: Wilson's interval.
    won, n = 6, 25
    found = paired([0.0] * n, [1.0] * won + [0.0] * (n - won))
    assert found.ci_low == pytest.approx((won - Z**2) / (n + Z**2), rel=1e-6)
    assert found.ci_high == pytest.approx(wilson_upper(won, n), rel=1e-6)


def wilson_upper(won: float, n: float) -> float:
    share = won / n
    spread = Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n**2))
    return (share + Z**2 / (2 * n) + spread) / (1 + Z**2 / n)


@pytest.mark.parametrize(
    ("lost", "won", "n"), [(7, 1, 21), (12, 5, 60), (3, 0, 100), (2.5, 4.2, 33.3)]
)
def test_the_ends_are_where_the_constrained_likelihood_says(
    lost: float, won: float, n: float
) -> None:
    """At an end, z = deviation / √variance, with the nuisance share that maximizes the likelihood there."""
    for sign, end in zip((1, -1), Proportions(lost, won, n).interval(), strict=True):
        lost_share = np.linspace(max(0, -end) + 1e-9, (1 - end) / 2 - 1e-9, 400_001)
        won_share = lost_share + end
        same = 1 - lost_share - won_share
        inside = (won_share > 0) & (same > 0)
        lost_share, won_share, same = lost_share[inside], won_share[inside], same[inside]
        likelihood = (
            lost * np.log(lost_share) + won * np.log(won_share) + (n - lost - won) * np.log(same)
        )
        best = int(np.argmax(likelihood))
        variance = n * (lost_share[best] + won_share[best] - end**2)
        assert (won - lost - n * end) / math.sqrt(variance) == pytest.approx(sign * Z, abs=2e-3)


def test_few_changes_of_a_graded_metric_are_no_certainty() -> None:
    # Three of 100 lose 0.8, 0.8 and 0.4. Two more are added, of ± 0.8.
    delta = np.array([-0.8, -0.8, -0.4] + [0.0] * 97)
    found = paired(np.full(100, 0.9), np.full(100, 0.9) + delta)
    mean = -2.0 / 102
    error = math.sqrt(((0.64 * 4 + 0.16) / 102 - mean**2) / 102)
    assert found.ci_low == pytest.approx(mean - 1.983731 * error, rel=1e-6)  # t(101)
    assert found.difference == pytest.approx(-0.02)
    # A constant difference has no spread, but three documents do not make it certain.
    constant = paired([0.5] * 3, [0.4] * 3)
    assert constant.ci_low < -0.1 < constant.ci_high
    assert paired([0.5] * 50, [0.4] * 50).ci_high < 0
    # Two seeds that say the same of each document say no more than one.
    twice = paired(
        [0.9] * 200, np.tile(0.9 + delta, 2), clusters=[f"{n % 100}" for n in range(200)]
    )
    assert (twice.ci_low, twice.ci_high) == pytest.approx((found.ci_low, found.ci_high))


def test_no_flip_is_no_certainty_but_the_same_output_is() -> None:
    values = [1.0, 0.0, 1.0, 1.0] * 10
    found = paired(values, values)
    half = Z**2 / (40 + Z**2)
    assert (found.difference, found.stderr, found.flips, found.p) == (0, 0, 0, 1)
    assert (found.ci_low, found.ci_high) == pytest.approx((-half, half), rel=1e-6)
    assert found.mde > 0.03
    same = paired(values, values, is_identical=True)
    assert (same.difference, same.stderr, same.ci_low, same.ci_high, same.flips) == (0, 0, 0, 0, 0)
    assert (same.p, same.n) == (1, 40)


def test_no_change_of_a_graded_metric_is_bounded_by_the_rule_of_three() -> None:
    values = np.random.default_rng(0).random(100)
    found = paired(values, values)
    # The share p of documents that change fails to show in n = 100 with probability (1 − p)¹⁰⁰ = 2.5 %
    assert found.ci_high == pytest.approx(1 - 0.025**0.01)
    assert found.ci_low == -found.ci_high
    unbounded = paired(values * 7, values * 7)
    assert (unbounded.ci_low, unbounded.ci_high) == (
        0,
        0,
    )  # equal to the last bit, on each document


def test_a_clustered_error_by_hand() -> None:
    # Clusters (1, 3), (−2), (0, 0, 4) of 6 documents with mean 1: their sums of deviations are 2, −3, 1.
    base, candidate = [0.0] * 6, [1.0, 3, -2, 0, 0, 4]
    found = paired(base, candidate, clusters=["a", "a", None, "c", "c", "c"])
    error = math.sqrt(3 / 2 * (4 + 9 + 1)) / 6
    assert found.stderr == pytest.approx(error)
    assert found.clusters == 3
    assert found.ci_high == pytest.approx(1 + 4.302653 * error, rel=1e-6)  # t(2)
    # Miller 2024, equation 4: the usual variance plus the covariances within clusters, without G / (G − 1)
    deviations = np.array(candidate) - 1
    of = ["a", "a", "b", "c", "c", "c"]
    within = sum(
        x * y
        for (x, g), (y, h) in itertools.product(zip(deviations, of, strict=True), repeat=2)
        if g == h
    )
    assert found.stderr**2 == pytest.approx(within / 36 * 3 / 2)
    # The clusters sum to 4, −2 and 4, in all 6. Of 8 flips, |±4 ± 2 ± 4| ≥ 6 where the fours agree: 4.
    assert found.p == 0.5


@pytest.mark.parametrize("bad", [([1], [1, 0]), ([], []), ([math.nan], [0.0])])
def test_impossible_input_is_refused(bad: tuple[list[float], list[float]]) -> None:
    with pytest.raises(ValueError, match="paired values must be"):
        paired(*bad)


@pytest.mark.parametrize("n", [8, 16])  # all flips are taken, or some are drawn
def test_permutation_agrees_with_full_enumeration(n: int) -> None:
    delta = np.random.default_rng(2).normal(0.2, 0.4, n).round(1)
    signs = np.array(list(itertools.product((-1, 1), repeat=n)))
    exact = float((np.abs(signs @ delta) >= abs(delta.sum()) - 1e-9).mean())
    assert permutation(delta) == pytest.approx(exact, abs=1e-12 if n == 8 else 0.015)
    both = sign_flips(np.stack([delta, -2 * delta], axis=1))
    assert both[0] == both[1] == permutation(delta)


def test_the_bootstrap_agrees_with_all_resamples() -> None:
    sums, sizes = np.array([1.0, 0.0, 6.0, -2.0]), np.array([1.0, 2.0, 3.0, 1.0])
    every = [list(drawn) for drawn in itertools.product(range(4), repeat=4)]
    means = np.array([sums[drawn].sum() / sizes[drawn].sum() for drawn in every])
    found = bootstrap_means(sums, sizes)
    assert found.mean() == pytest.approx(means.mean(), abs=4 * means.std() / math.sqrt(found.size))
    assert found.std() == pytest.approx(means.std(), rel=0.06)
    assert set(found.round(9)) <= set(means.round(9))
    assert bootstrap(sums, sizes) == pytest.approx(
        tuple(np.quantile(means, [0.025, 0.975])), abs=0.1
    )


def test_the_bootstrap_agrees_with_the_normal_interval_at_large_n() -> None:
    rng = np.random.default_rng(0)
    base = rng.random(2_000)
    found = paired(base, base + rng.normal(0.1, 1, 2_000))
    assert found.bootstrap_low == pytest.approx(found.ci_low, abs=0.1 * found.stderr * 2)
    assert found.bootstrap_high == pytest.approx(found.ci_high, abs=0.1 * found.stderr * 2)


values = st.lists(
    st.tuples(st.integers(0, 1), st.integers(0, 1), st.integers(0, 3)), min_size=2, max_size=30
)


@given(values)
@settings(max_examples=60, deadline=None)
def test_the_other_way_round_is_the_negative(rows: list[tuple[int, int, int]]) -> None:
    base, candidate, groups = (np.array(side, dtype=float) for side in zip(*rows, strict=True))
    for clusters in (None, [str(group) for group in groups]):
        one, other = (
            paired(base, candidate, clusters=clusters),
            paired(candidate, base, clusters=clusters),
        )
        assert one.difference == -other.difference
        for found, mirrored in ((one.ci_low, -other.ci_high), (one.ci_high, -other.ci_low)):
            assert found == pytest.approx(mirrored, nan_ok=True)
        assert one.p == pytest.approx(other.p)
        assert one.mde == pytest.approx(other.mde, nan_ok=True)
        if not math.isnan(one.ci_low):
            assert one.ci_low <= one.difference <= one.ci_high


@given(values)
@settings(max_examples=60, deadline=None)
def test_clusters_of_one_are_no_clusters(rows: list[tuple[int, int, int]]) -> None:
    base, candidate, _ = (np.array(side, dtype=float) for side in zip(*rows, strict=True))
    alone = [str(number) for number in range(len(rows))]
    assert paired(base, candidate) == paired(base, candidate, clusters=alone)
    assert paired(base / 2, candidate) == paired(base / 2, candidate, clusters=alone)


@given(st.lists(st.floats(-5, 5), min_size=3, max_size=20), st.floats(-3, 3))
@settings(max_examples=60, deadline=None)
def test_a_shift_of_both_sides_changes_nothing(candidate: list[float], shift: float) -> None:
    base, moved = np.full(len(candidate), 10.0), np.array(candidate)
    one, other = paired(base, moved), paired(base + shift, moved + shift)
    assert one.difference == pytest.approx(other.difference, abs=1e-9)
    assert (one.ci_low, one.ci_high) == pytest.approx((other.ci_low, other.ci_high), abs=1e-6)


def test_documents_needed_by_hand() -> None:
    # Half the standard error needs four times the documents.
    assert documents_needed(mde=0.06, n=100, margin=0.03) == 400
    assert documents_needed(math.nan, 100, 0.03) is None
    assert documents_needed(0.06, 100, 0.0) is None


def test_the_minimum_detectable_effect_is_found_in_four_of_five() -> None:
    rng = np.random.default_rng(0)
    n, error = 100, 1 / math.sqrt(100)
    effect = (1.984217 + 0.845288) * error  # t(99)
    found = [paired(np.zeros(n), rng.normal(effect, 1, n)) for _ in range(10)]
    assert np.mean([one.mde for one in found]) == pytest.approx(effect, rel=0.1)
    samples = rng.normal(effect, 1, (4_000, n))
    errors = [stderr(row, np.ones(n)) for row in samples]
    power = np.mean(samples.mean(axis=1) > 1.984217 * np.array(errors))
    assert power == pytest.approx(0.8, abs=0.025)


def test_holm_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.5, 0.9]) == pytest.approx([1.0, 1.0])
    assert math.isnan(holm([0.02, math.nan])[1])
    assert holm([0.02, math.nan])[0] == pytest.approx(0.02)


def test_macro_by_hand() -> None:
    # Normal intervals with standard errors 0.03 and 0.04: that of the mean is 0.05 / 2.
    normal = [(d, d - Z * e, d + Z * e) for d, e in ((0.1, 0.03), (-0.1, 0.04))]
    assert macro(normal) == pytest.approx((0, -Z * 0.025, Z * 0.025))
    # An interval that reaches further down than up
    assert macro([(0.0, -0.3, 0.1), (0.2, -0.2, 0.2)]) == pytest.approx((0.1, -0.15, 0.15))


def test_ranks_by_hand() -> None:
    base = np.random.default_rng(0).normal(size=60)
    arms = np.stack([base, base + 1, base, base - 1])
    # The second is surely best, the last surely worst, the first and third are equal on each document.
    assert rank_intervals(arms) == [(2, 3), (1, 1), (2, 3), (4, 4)]
    assert rank_intervals(arms[:1]) == [(1, 1)]
    # As 3 clusters, no pair can reach 5 %: the smallest p of 2³ flips is ¼.
    assert rank_intervals(arms, [str(i % 3) for i in range(60)]) == [(1, 4)] * 4


def test_seed_effects_by_hand() -> None:
    table = np.array([[1.0, 0.0, 2.0], [3.0, 2.0, 1.0]])  # means 1 and 2, of documents 2, 1, 1.5
    found = seed_effects([table])
    assert found.mean == 1.5
    assert found.stderr == pytest.approx(0.5 / math.sqrt(3))
    assert found.observed_sd == pytest.approx(math.sqrt(0.5))
    # residuals ± ½, ± ½, ∓ 1: mean square 3 / ((2 − 1) (3 − 1)) over 3 documents
    assert found.training_sd == 0  # 0.5 − 1.5 / 3
    alone = seed_effects([table[:1]])
    assert alone.stderr == pytest.approx(1 / math.sqrt(3))
    assert all(math.isnan(x) for x in (alone.observed_sd, alone.training_sd, alone.total_error))
    constant = seed_effects([np.array([[0.0] * 3, [1.0] * 3])])
    assert constant.training_sd == constant.observed_sd == pytest.approx(math.sqrt(0.5))
