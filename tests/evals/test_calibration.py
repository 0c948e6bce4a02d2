"""The statistics on simulated comparisons whose truth is known; `scripts/calibration.py` prints the whole table."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from evals.stats import seed_effects

SCRIPT = Path(__file__).parents[2] / "scripts" / "calibration.py"
# The share of 2,000 true nulls at 5 % has a standard error of 0.5 points: 3–7 % is ± 4 of them.
LOW, HIGH = 0.03, 0.07


@pytest.fixture(scope="module")
def simulated() -> ModuleType:
    spec = importlib.util.spec_from_file_location("calibration", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("n", [30, 100, 300, 1000])
@pytest.mark.parametrize(("lost", "won"), [(0.15, 0.15), (0.10, 0.20)])
def test_intervals_of_many_flips_cover(
    simulated: ModuleType, n: int, lost: float, won: float
) -> None:
    row = simulated.measure(simulated.binary(n, lost, won))
    assert 0.93 <= row.covered <= 0.97
    assert math.isnan(row.rejected) or row.rejected <= 0.06  # exact McNemar is conservative


@pytest.mark.parametrize("n", [30, 100, 300, 1000])
@pytest.mark.parametrize(("lost", "won"), [(0.01, 0.01), (0.03, 0.0), (0.0, 0.0)])
def test_intervals_of_few_flips_cover_at_least(
    simulated: ModuleType, n: int, lost: float, won: float
) -> None:
    row = simulated.measure(simulated.binary(n, lost, won))
    assert row.covered >= 0.93
    assert math.isnan(row.rejected) or row.rejected <= 0.05


@pytest.mark.parametrize("n", [100, 200, 300])
@pytest.mark.parametrize("kind", ["binary", "graded"])
def test_a_loss_of_the_margin_rarely_passes_for_retained(
    simulated: ModuleType, n: int, kind: str
) -> None:
    # Nominal 2.5 %, in the hardest case: a few losses only, all one way. Of graded ones the size is unknown too.
    setting = simulated.binary(n, 0.03, 0.0) if kind == "binary" else simulated.sparse(n, 0.03)
    assert simulated.measure(setting).above <= (0.04 if kind == "binary" else 0.055)


@pytest.mark.parametrize("n", [10, 100, 300])
def test_graded_metrics(simulated: ModuleType, n: int) -> None:
    row = simulated.measure(simulated.continuous(n))
    assert 0.93 <= row.covered <= 0.97
    assert LOW <= row.rejected <= HIGH


def test_skewed_differences(simulated: ModuleType) -> None:
    row = simulated.measure(simulated.skewed(100))
    assert 0.93 <= row.covered <= 0.97
    assert LOW <= row.rejected <= HIGH


@pytest.mark.parametrize(("groups", "size"), [(20, 5), (60, 5), (40, 10)])
def test_strong_clusters(simulated: ModuleType, groups: int, size: int) -> None:
    row = simulated.measure(simulated.clustered(groups, size))
    assert 0.93 <= row.covered <= 0.97
    assert LOW <= row.rejected <= HIGH
    assert row.ignored < 0.75  # what it would be as if the documents were independent


@pytest.mark.parametrize(
    ("groups", "flips", "most"), [(200, 0.2, 0.97), (40, 0.2, 0.99), (40, 0.02, 1), (200, 0.02, 1)]
)
def test_clusters_of_binary_metrics(
    simulated: ModuleType, groups: int, flips: float, most: float
) -> None:
    row = simulated.measure(simulated.clustered_binary(groups, 5, flips))
    assert 0.93 <= row.covered <= most  # few clusters with a flip: on the safe side
    assert row.rejected <= HIGH


def test_holm_keeps_the_family_wise_error(simulated: ModuleType) -> None:
    adjusted, plain = simulated.family_wise()
    slack = 3 * math.sqrt(0.05 * 0.95 / 2_000)
    assert adjusted <= 0.05 + slack
    assert plain == pytest.approx(1 - 0.95**5, abs=0.03)  # what it is without


@pytest.mark.parametrize("means", [[0.0] * 4, [0.0, 0.0, 0.3, 0.3], [0.0, 0.3, 0.6]])
def test_all_ranks_are_right_at_once(simulated: ModuleType, means: list[float]) -> None:
    boards = 200
    slack = 2 * math.sqrt(0.05 * 0.95 / boards)
    assert simulated.ranks_right(means, boards) >= 0.95 - slack


@pytest.mark.parametrize("training", [0.0, 0.05])
def test_seeds_and_documents_are_told_apart(training: float) -> None:
    rng = np.random.default_rng(0)
    seeds, n, document, noise = 4, 100, 0.3, 0.4
    found = []
    for _ in range(1_000):
        table = rng.normal(0, document, (1, n)) + rng.normal(0, noise, (seeds, n))
        found.append(seed_effects([table + rng.normal(0, training, (seeds, 1))]))
    observed = np.mean([one.observed_sd**2 for one in found])
    assert observed == pytest.approx(training**2 + noise**2 / n, rel=0.08)
    sampling = np.mean([one.stderr**2 for one in found])
    assert sampling == pytest.approx((document**2 + noise**2 / seeds) / n, rel=0.05)
    if training:  # without, the truncation at zero biases it upward
        estimated = np.mean([one.training_sd**2 for one in found])
        assert estimated == pytest.approx(training**2, rel=0.1)
        total = np.mean([one.total_error**2 for one in found])
        assert total == pytest.approx(training**2 + (document**2 + noise**2) / n, rel=0.1)
    else:
        assert np.mean([one.training_sd == 0 for one in found]) > 0.4
