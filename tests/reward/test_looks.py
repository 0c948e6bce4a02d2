"""Looks and their judgement: by hand, against scipy, and by simulation."""

import math
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from reward.looks import (
    FELL,
    LOOKS,
    OVEROPTIMIZED,
    ROSE,
    UNKNOWN,
    Look,
    append,
    change,
    judge,
    mean_of,
    read,
)


def look(step: int, proxy: list[float], gold: list[float]) -> Look:
    return Look(step, [0.1 * step] * len(proxy), proxy, gold)


def test_a_look_survives_its_file(tmp_path: Path) -> None:
    first = Look(0, [0.0, 0.5], [1.0, math.nan], [0.0, 1.0], [3.0, 4.0], {"ended_share": 0.5})
    append(tmp_path / LOOKS, first)
    append(tmp_path / LOOKS, look(5, [2.0, 3.0], [1.0, 1.0]))
    back, second = read(tmp_path / LOOKS)
    assert back.to_json() == first.to_json()
    assert math.isnan(back.proxy[1])
    assert (back.kl, back.gold, back.length, back.further) == (
        first.kl, first.gold, first.length, first.further,
    )  # fmt: skip
    assert second == look(5, [2.0, 3.0], [1.0, 1.0])
    row = first.to_json()
    assert (row["kl"], row["kl_n"], row["proxy"], row["proxy_n"]) == (0.25, 2, 1.0, 1)
    assert row["kl_stderr"] == pytest.approx(0.25)  # sd 0.3536 of two, over √2
    assert row["proxy_stderr"] is None
    (tmp_path / LOOKS).write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="no look"):
        read(tmp_path / LOOKS)


def test_the_change_is_scipys_paired_t_interval() -> None:
    rng = np.random.default_rng(0)
    before, after = rng.normal(size=30), rng.normal(0.3, 1, size=30)
    found = change([*before, math.nan], [*after, 1.0], 0.99)
    expected = stats.ttest_rel(after, before).confidence_interval(0.99)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert (found.difference, found.n) == (pytest.approx((after - before).mean()), 30)


def test_few_prompts_say_nothing() -> None:
    assert math.isnan(change([0.0] * 5, [1.0] * 5, 0.95).low)
    finding = judge([look(0, [0.0] * 5, [1.0] * 5), look(1, [1.0] * 5, [0.0] * 5)])
    assert finding.verdict == UNKNOWN
    assert "5 prompts only" in finding.sentence()
    assert judge([look(0, [0.0] * 9, [0.0] * 9)]).sentence().startswith("There is one look only")
    assert mean_of([]).n == 0


@pytest.mark.parametrize(
    ("golds", "proxies", "verdict", "since"),
    [
        ((0.2, 0.6, 0.1), (0, 1, 2), OVEROPTIMIZED, 1),  # since the best, not since the first
        ((0.2, 0.6, 0.9), (0, 1, 2), ROSE, 0),
        ((0.7, 0.6, 0.1), (2, 2, 0), FELL, 0),
        ((0.5, 0.5, 0.5), (0, 1, 2), UNKNOWN, 0),
    ],
)
def test_verdicts(
    golds: tuple[float, ...], proxies: tuple[float, ...], verdict: str, since: int
) -> None:
    noise = np.random.default_rng(0).normal(0, 0.05, (3, 2, 20))
    looks = [
        look(step, (proxy + one[0]).tolist(), (gold + one[1]).tolist())
        for step, (gold, proxy, one) in enumerate(zip(golds, proxies, noise, strict=True))
    ]
    finding = judge(looks)
    assert (finding.verdict, finding.since, finding.step) == (verdict, since, 2)
    assert finding.is_warning is (verdict == OVEROPTIMIZED)
    assert finding.gold.difference == pytest.approx(golds[2] - golds[since], abs=0.05)
    assert f"From step {since} to step 2" in finding.sentence()
    assert finding.to_json()["gold"]["n"] == 20


def course(rng: np.random.Generator, rates: list[float], prompts: int, n: int) -> list[Look]:
    """Looks whose proxy rises; gold is right or wrong at a rate that differs between prompts."""
    ease, base = rng.normal(0, 1.2, prompts), rng.normal(0, 1, prompts)
    looks = []
    for step, rate in enumerate(rates):
        chance = 1 / (1 + np.exp(-(math.log(rate / (1 - rate)) + ease)))
        gold = (rng.random((prompts, n)) < chance[:, None]).mean(1)
        proxy = base + 0.2 * step + rng.normal(0, 0.5, prompts)
        looks.append(look(step, proxy.tolist(), gold.tolist()))
    return looks


@pytest.mark.parametrize(
    "rates", [[0.5] * 9, [0.2, 0.4, 0.6, 0.6, 0.6, 0.6, 0.6]], ids=["flat", "risen"]
)
def test_chance_alone_warns_in_at_most_5_percent_of_courses(rates: list[float]) -> None:
    """The best of many noisy looks is best by luck too, and a course is judged at every look."""
    rng = np.random.default_rng(1)
    at_the_end = at_any_time = 0
    for _ in range(200):
        looks = course(rng, rates, 40, 1)
        at_the_end += judge(looks).is_warning
        at_any_time += any(
            judge(looks[:count], is_watching=True).is_warning for count in range(2, len(looks) + 1)
        )
    # 5 % of 200 is 10; 17 and more have a chance below 2 % when it is 5 %.
    assert at_the_end < 17
    assert at_any_time < 17


def test_an_over_optimised_course_is_found() -> None:
    rng = np.random.default_rng(2)
    rates = [0.4, 0.5, 0.6, 0.6, 0.5, 0.4, 0.3]
    courses = [course(rng, rates, 64, 4) for _ in range(40)]
    assert sum(judge(looks).is_warning for looks in courses) >= 38
    assert sum(judge(looks, is_watching=True).is_warning for looks in courses) >= 34
