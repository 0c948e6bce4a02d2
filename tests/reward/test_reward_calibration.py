"""Statistics of a reward model against hand values, brute force, scipy and simulation."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from reward import calibration, figures, ordering
from reward.intervals import combined, share
from reward.ordering import Pairs
from reward.rewardbench import sections

LOG = math.log


def margins_of(confidence: float, right: int, wrong: int) -> list[float]:
    """Margins of pairs of one confidence, some in the right order and some not."""
    margin = LOG(confidence / (1 - confidence))
    return [margin] * right + [-margin] * wrong


def alone(n: int) -> list[str | None]:
    return [str(at) for at in range(n)]


def pairs_of(scores: list[list[float]], chars: list[list[int]] | None = None) -> Pairs:
    lengths = np.array(chars or [[1, 1]] * len(scores))
    return Pairs(np.array(scores, dtype=float), lengths, alone(len(scores)))


def test_bins_whose_accuracy_is_their_confidence_have_no_calibration_error() -> None:
    margins = np.array(margins_of(0.6, 6, 4) + margins_of(0.75, 15, 5) + margins_of(0.9, 9, 1))
    for edges in (calibration.equal_width(), calibration.equal_mass(margins)):
        found = calibration.calibration(margins, alone(40), edges)
        assert found.ece.value == pytest.approx(0, abs=1e-12)
        assert found.ece.ci_low == 0
        assert found.p == 1
    assert [one.n for one in found.bins if one.n] == [10, 20, 10]


def test_calibration_error_by_hand() -> None:
    # 90 % sure and right in 5 of 10, 60 % sure and right in 8 of 10: (10 · 0.4 + 10 · 0.2) / 20
    margins = np.array(margins_of(0.9, 5, 5) + margins_of(0.6, 8, 2))
    found = calibration.calibration(margins, alone(20), calibration.equal_width(5))
    assert found.ece.value == pytest.approx(0.3)
    assert [(one.n, round(one.accuracy, 9)) for one in found.bins if one.n] == [
        (10, 0.8),
        (10, 0.5),
    ]
    assert found.bins[3].confidence == pytest.approx(0.9)
    tie = calibration.calibration(np.zeros(4), alone(4), calibration.equal_width())
    assert tie.ece.value == 0
    assert tie.bins[0].accuracy == 0.5


def test_brier_and_nll_by_hand_are_those_of_the_preferred_answer() -> None:
    margins = np.array([LOG(4), -LOG(4), 0.0, 2000.0])
    assert calibration.brier(margins, alone(4)).value == pytest.approx((0.04 + 0.64 + 0.25) / 4)
    loss = (-LOG(0.8) - LOG(0.2) - LOG(0.5)) / 4
    assert calibration.nll(margins, alone(4)).value == pytest.approx(loss)
    sure, right = calibration.confidence(margins[:2]), calibration.correct(margins[:2])
    assert ((sure - right) ** 2).mean() == pytest.approx(
        calibration.brier(margins[:2], alone(2)).value
    )


def test_calibration_interval_covers_the_truth_and_noise_is_named() -> None:
    rng = np.random.default_rng(0)
    edges = calibration.equal_width()
    covered = {}
    for true in (1.0, 3.0):
        large = np.abs(rng.normal(0, 1.5, 400_000))
        chance = 1 / (1 + np.exp(-large / true))
        place = np.digitize(calibration.confidence(large), edges[1:-1], right=True)
        gaps = np.bincount(place, chance - calibration.confidence(large), 10)
        truth = np.abs(gaps).sum() / large.size if true > 1 else 0.0
        hits = []
        for _ in range(30):
            sure = np.abs(rng.normal(0, 1.5, 400))
            signs = np.where(rng.random(400) < 1 / (1 + np.exp(-sure / true)), 1, -1)
            found = calibration.calibration(sure * signs, alone(400), edges)
            hits.append(found.ece.ci_low <= truth <= found.ece.ci_high)
            assert found.expected > 0
        covered[true] = np.mean(hits)
    assert min(covered.values()) >= 0.8  # 0.9 in the long run


def test_calibration_error_lies_in_its_interval() -> None:
    rng = np.random.default_rng(5)
    for n in (2, 3, 5, 10, 40):
        for _ in range(20):
            margins = rng.normal(0, 2, n)
            found = calibration.calibration(margins, alone(n), calibration.equal_width()).ece
            assert 0 <= found.ci_low <= found.value <= found.ci_high


@pytest.mark.parametrize(("size", "rho"), [(1, 0.0), (4, 0.4)])
def test_interval_of_accuracy_covers_with_clusters(size: int, rho: float) -> None:
    rng = np.random.default_rng(1)
    groups, truth, hits = 60, 0.72, 0
    draws = 1500
    clusters = [str(at // size) for at in range(groups * size)]
    for _ in range(draws):
        common = (rng.random(groups) < truth).repeat(size)
        own = rng.random(groups * size) < truth
        values = np.where(rng.random(groups * size) < math.sqrt(rho), common, own).astype(float)
        low, high = share(values, clusters)
        hits += low <= truth <= high
    assert 0.93 <= hits / draws <= 0.97


def test_share_is_wilsons_and_one_prompt_tells_as_much_as_one_pair() -> None:
    values = np.array([1.0] * 7 + [0.0] * 3)
    wilson = stats.binomtest(7, 10).proportion_ci(method="wilson")
    assert share(values) == pytest.approx((wilson.low, wilson.high))
    assert share(values, ["one"] * 10)[1] - share(values, ["one"] * 10)[0] > 0.6
    assert all(map(math.isnan, share(np.array([]), [])))


def test_accuracy_counts_ties_half_and_leaves_gaps_out() -> None:
    found = ordering.accuracy(pairs_of([[1, 0], [2, 1], [0, 1], [3, 3], [math.nan, 1]]))
    assert (found["value"], found["n"], found["ties"], found["gaps"]) == (2.5 / 4, 4, 1, 1)


def test_length_baseline_and_the_paired_difference_by_hand() -> None:
    pairs = pairs_of([[1, 0], [1, 0], [0, 1], [1, 0]], [[9, 3], [2, 5], [8, 1], [4, 4]])
    assert ordering.baseline(pairs, pairs.chars).value == 2.5 / 4
    over = ordering.over_length(pairs, pairs.chars)
    assert over["difference"] == pytest.approx(0.75 - 0.625)
    assert over["ci_low"] < over["difference"] < over["ci_high"]
    extreme = pairs_of([[1, 0], [1, 0], [2, 2]], [[1, 2]] * 3)  # +1, +1, +½
    over = ordering.over_length(extreme, extreme.chars)
    assert -1 <= over["ci_low"] < over["difference"] < over["ci_high"] == 1
    split = ordering.by_length(pairs)
    assert [split[f"chosen_{name}"]["value"] for name in ("longer", "shorter", "equal")] == [
        0.5,
        1,
        1,
    ]


def test_auc_is_the_share_of_all_couples() -> None:
    rng = np.random.default_rng(2)
    scores = rng.integers(0, 6, (40, 2)).astype(float)
    wins = [(a > b) + (a == b) / 2 for a, b in itertools.product(*scores.T)]
    found = ordering.auc(pairs_of(scores.tolist()))
    assert found.value == pytest.approx(np.mean(wins))
    assert found.ci_low < found.value < found.ci_high


def test_correlations_are_scipys() -> None:
    rng = np.random.default_rng(3)
    x = rng.normal(size=80).round(1)
    y = x + rng.normal(size=80)
    pearson = figures.correlation(x, y, alone(80))
    assert pearson.value == pytest.approx(stats.pearsonr(x, y).statistic)
    low, high = stats.pearsonr(x, y).confidence_interval()
    assert (pearson.ci_low, pearson.ci_high) == pytest.approx((low, high), abs=0.06)
    assert figures.rank_correlation(x, y, alone(80)).value == pytest.approx(
        stats.spearmanr(x, y).statistic
    )
    assert math.isnan(figures.correlation(np.ones(80), y, alone(80)).value)


def test_temperature_is_found_again_and_refused_where_there_is_none() -> None:
    rng = np.random.default_rng(4)
    true = rng.normal(0, 2, 6000)
    margins = 3 * np.abs(true) * np.where(rng.random(6000) < 1 / (1 + np.exp(-np.abs(true))), 1, -1)
    found = calibration.temperature(margins, alone(6000))
    assert found["ci_low"] < 3 < found["ci_high"]
    assert found["after"]["nll"]["value"] < found["before"]["nll"]["value"]
    assert found["after"]["ece"]["value"] < 0.3 * found["before"]["ece"]["value"]
    assert found["n"] + found["tried_on"] == 6000
    unsure = calibration.temperature(np.array([1, -0.999] * 2), alone(4))
    assert unsure["value"] is not None
    assert unsure["ci_high"] is None  # beyond every number
    assert "chance" in calibration.temperature(-margins, alone(6000))["note"]
    assert "wrong order" in calibration.temperature(np.abs(margins), alone(6000))["note"]


def test_agreement_by_hand() -> None:
    own = pairs_of([[1, 0], [1, 0], [0, 1], [0, 1], [math.nan, 0]])
    other = pairs_of([[2, 0], [0, 3], [0, 1], [4, 0], [1, 0]])
    found = ordering.agreement(own, other)
    assert found["agreement"]["value"] == 0.5
    assert found["kappa"]["value"] == pytest.approx(0)  # both say "chosen" half of the time
    assert found["accuracy_where_agreed"]["value"] == found["accuracy_where_not"]["value"] == 0.5
    same = ordering.agreement(own, own)
    assert (same["kappa"]["value"], same["spearman"]["value"]) == pytest.approx((1, 1))
    assert same["accuracy_where_not"]["n"] == 0


def test_the_difference_of_two_accuracies_is_paired() -> None:
    """Four pairs that both scored: 1, 1, 0, 0 against 1, 0, ½, 1."""
    own = pairs_of([[1, 0], [1, 0], [0, 1], [0, 1], [math.nan, 0]])
    other = pairs_of([[2, 0], [0, 3], [1, 1], [4, 0], [1, 0]])
    found = ordering.agreement(own, other)["difference"]
    assert found["value"] == pytest.approx((0 + 1 - 0.5 - 1) / 4)
    assert (found["n"], found["clusters"]) == (4, 4)
    assert -1 <= found["ci_low"] < found["value"] < found["ci_high"] <= 1
    assert found["value"] == pytest.approx(-ordering.agreement(other, own)["difference"]["value"])
    nothing = ordering.agreement(own, pairs_of([[math.nan, 0]] * 5))["difference"]
    assert math.isnan(nothing["value"])
    assert nothing["n"] == 0


def test_the_difference_minds_that_pairs_share_a_prompt() -> None:
    """Each pair fourfold, under its own prompt, tells as much as once: by prompt the interval does not shrink."""
    rng = np.random.default_rng(4)
    right = rng.random((200, 2)) < (0.7, 0.6)
    scores = [np.stack([side, ~side], axis=1).astype(float) for side in right.T]
    once = [ordering.Pairs(side, np.ones((200, 2)), alone(200)) for side in scores]
    prompts = [str(at // 4) for at in range(800)]
    fourfold = [
        ordering.Pairs(side.repeat(4, axis=0), np.ones((800, 2)), prompts) for side in scores
    ]
    width = [
        found["ci_high"] - found["ci_low"]
        for own, other in (once, fourfold)
        for found in [ordering.agreement(own, other)["difference"]]
    ]
    assert width[1] == pytest.approx(width[0], rel=0.03)


def test_histogram_splits_at_zero() -> None:
    found = calibration.histogram(np.array([-1.0, -0.5, 0.0, 0.5, 1.0]), bins=4)
    assert found["edges"][2] == 0
    assert sum(found["counts"][2:]) + found["beyond"] >= 2
    assert sum(found["counts"]) + found["beyond"] == 5


def subset(name: str, value: float, n: int) -> dict[str, object]:
    figure = {"value": value, "ci_low": value - 0.1, "ci_high": value + 0.1, "n": n}
    return {"name": name, "accuracy": figure}


def test_rewardbench_weighs_subsets_by_pairs_and_prior_sets_by_half() -> None:
    table = sections(
        [
            subset("alpacaeval-easy", 1.0, 100),
            subset("mt-bench-easy", 0.5, 25),
            subset("math-prm", 0.8, 447),
            subset("hep-cpp", 0.5, 164),
            subset("shp", 0.6, 1000),
            subset("summarize", 0.8, 10),
            subset("mine", 0.1, 10),
        ]
    )
    assert table is not None
    values = {one["name"]: one["value"] for one in table["sections"]}
    reasoning = (984 * 0.8 + 164 * 0.5) / (984 + 164)
    assert values == pytest.approx({"Chat": 0.9, "Reasoning": reasoning, "Prior Sets": 0.7})
    assert table["score"]["value"] == pytest.approx((0.9 + reasoning + 0.5 * 0.7) / 2.5)
    assert table["missing_sections"] == ["Chat Hard", "Safety"]
    assert table["left_out"] == ["mine"]
    assert sections([subset("mine", 0.1, 10)]) is None


def test_combined_interval_of_equal_errors_shrinks_with_the_root() -> None:
    assert combined([(0.5, 0.4, 0.6)] * 4, [1.0] * 4) == pytest.approx((0.5, 0.45, 0.55))
