"""Win rates against AlpacaEval's published rows, against scikit-learn, and on data simulated from the model."""

import gzip
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.entry import UserError
from evals import winrate
from evals.judgements import load
from evals.lengthcontrol import fit_alone, fit_jointly, length_terms, logistic

Row = dict[str, Any]


def row(index: object, preference: object, model: str = "m", **more: Any) -> Row:
    found = {"index": index, "generator_1": "b", "generator_2": model, "len_1": 100, "len_2": 150}
    return found | {"preference": preference} | more


def written(path: Path, rows: list[Row]) -> str:
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    return str(path)


@pytest.fixture
def of(tmp_path: Path) -> Callable[..., winrate.WinRate]:
    """The win rate of model `m` in rows."""

    def rate(rows: list[Row], **options: Any) -> winrate.WinRate:
        return winrate.win_rates(load([written(tmp_path / "j.jsonl", rows)], **options))[0]["m"]

    return rate


def test_published_rows_are_reproduced(shared_data: Path, tmp_path: Path) -> None:
    """`win_rate`, its standard error, the discrete one and the counts, of all four models."""
    published = json.loads((shared_data / "eval/alpaca_eval_leaderboard.json").read_text())
    judged = load([str(shared_data / "eval/alpaca_eval_judgements.jsonl.gz")])
    rates, _ = winrate.win_rates(judged)
    assert judged.baseline == "gpt4_1106_preview"
    assert set(rates) == set(published)
    for model, want in published.items():
        found = rates[model]
        for name in ("win_rate", "standard_error", "discrete_win_rate"):
            assert getattr(found, name) == pytest.approx(want[name], abs=1e-6)
        for name in ("n_wins", "n_wins_base", "n_draws"):
            assert getattr(found, name) == want[name]
        assert found.n == want["n_total"]
        assert int(found.avg_length) == want["avg_length"]
        assert found.difficulty_source == "joint"
        assert not found.is_length_only
        # The judge likes length and these models are brief: control moves every one up.
        assert found.length_controlled_win_rate > want["win_rate"]


def test_one_model_alone_is_labelled(
    shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The known value of a fit on length alone, far from the published 25.25, and its label in text and JSON."""
    path = shared_data / "eval/alpaca_eval_judgements.jsonl.gz"
    with gzip.open(path, "rt") as file:
        rows = [one for one in map(json.loads, file) if one["generator_2"] == "claude-2.1"]
    out = tmp_path / "out.json"
    argv = ["winrate", written(tmp_path / "claude.jsonl", rows), "--json", str(out)]
    monkeypatch.setattr(sys, "argv", argv)
    winrate.main()
    found = json.loads(out.read_text())["models"]["claude-2.1"]
    assert found["length_controlled_win_rate"] == pytest.approx(32.41, abs=0.01)
    assert found["is_length_only"]
    assert found["difficulty_source"] == "none"
    text = capsys.readouterr().out
    assert "32.41*" in text
    assert "length-only" in text


def test_the_fit_is_that_of_scikit_learn() -> None:
    """A soft label is a pair of weighted rows for a library that knows classes only."""
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(0)
    y, x, gamma = random.random(300), np.tanh(random.normal(size=300)), random.normal(size=300)
    design = np.column_stack([np.ones(300), x, gamma])
    model = LogisticRegression(C=1e6, fit_intercept=False, tol=1e-10, max_iter=1000)
    model.fit(np.vstack([design, design]), np.repeat([1, 0], 300), np.concatenate([y, 1 - y]))
    found = fit_alone(y, x, gamma)
    assert [found.quality, found.length, found.difficulty] == pytest.approx(
        list(model.coef_[0]), abs=1e-3
    )
    equal = design * [1, 0, 1]
    assert found.rate == pytest.approx(model.predict_proba(equal)[:, 1].mean(), abs=1e-4)


Simulated = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def simulated(instructions: int, models: int, seed: int, together: float = 0.0) -> Simulated:
    """Preference probabilities, length terms, difficulties and true rates (percent).

    `together` is the correlation of difficulty with the difference in length.
    """
    random = np.random.default_rng(seed)
    gamma = random.normal(size=instructions)
    theta, phi = random.normal(-1, 0.8, models), random.uniform(0.8, 2.2, models)
    psi = random.uniform(0.5, 1.3, models)
    noise = math.sqrt(1 - together**2) * random.normal(size=(instructions, models))
    lengths = random.normal(-0.8, 0.5, models) + together * gamma[:, None] + noise
    terms = np.column_stack([length_terms(column) for column in lengths.T])
    p = logistic(theta + phi * terms + np.outer(gamma, psi))
    return p, terms, gamma, 100 * logistic(theta + np.outer(gamma, psi)).mean(0)


@pytest.mark.parametrize("together", [0.0, 0.5])
def test_joint_fit_recovers_the_rates(together: float) -> None:
    """Graded preferences: within 0.5 points each. A fit on length alone is off where difficulty goes with length."""
    p, terms, gamma, truth = simulated(600, 8, 1, together)
    found, difficulties = fit_jointly(p, terms, np.isfinite(p))
    assert [100 * one.rate for one in found] == pytest.approx(list(truth), abs=0.5)
    assert np.corrcoef(difficulties, gamma)[0, 1] > 0.99
    assert difficulties.mean() == pytest.approx(0, abs=1e-9)
    assert difficulties.std() == pytest.approx(1)
    alone = [100 * fit_alone(p[:, m], terms[:, m]).rate for m in range(8)]
    assert np.abs(np.array(alone) - truth).max() > (5 if together else 0.6)


def test_joint_fit_is_unbiased_under_noise_and_its_error_honest() -> None:
    """Verdicts of 0 or 1: the mean error over 18 models is below 0.5 points, and the errors are as large as said."""
    errors, z = [], []
    for seed in range(3):
        p, terms, _, truth = simulated(2000, 6, seed)
        y = (np.random.default_rng(seed + 100).random(p.shape) < p).astype(float)
        found, _ = fit_jointly(y, terms, np.isfinite(y))
        for one, true in zip(found, truth, strict=True):
            errors.append(100 * one.rate - true)
            z.append(errors[-1] / (100 * one.stderr))
    assert abs(float(np.mean(errors))) < 0.5
    assert 0.5 < float(np.std(z)) < 1.3


def test_known_difficulties_are_used(tmp_path: Path) -> None:
    p, terms, gamma, truth = simulated(2000, 1, 3)
    found = fit_alone(p[:, 0], terms[:, 0], gamma)
    assert 100 * found.rate == pytest.approx(truth[0], abs=0.1)
    lengths = np.arctanh(terms[:, 0]) * 100
    rows = [
        row(i, 1 + float(p[i, 0]), len_1=1000, len_2=1000 + float(lengths[i])) for i in range(2000)
    ]
    source = written(tmp_path / "j.jsonl", rows)
    files = {
        "d.csv": ",instruction_difficulty\n" + "".join(f"{i},{g!r}\n" for i, g in enumerate(gamma.tolist())),
        "d.json": json.dumps({"models": {}, "difficulties": dict(enumerate(gamma.tolist()))}),
        "d.jsonl": "".join(json.dumps({"index": i, "difficulty": g}) + "\n" for i, g in enumerate(gamma.tolist())),
    }  # fmt: skip
    for name, content in files.items():
        (tmp_path / name).write_text(content)
        record, _, lines = winrate.report(load([source]), str(tmp_path / name))
        assert record["models"]["m"]["length_controlled_win_rate"] == pytest.approx(
            100 * found.rate
        )
        assert record["models"]["m"]["difficulty_source"] == "file"
        assert any("difficulty from" in line for line in lines)
    (tmp_path / "d.csv").write_text("index,instruction_difficulty\n0,1.5\n")
    with pytest.raises(UserError, match="none for index 1 "):
        winrate.report(load([source]), str(tmp_path / "d.csv"))


def test_a_longer_equal_model_is_set_right() -> None:
    """A judge that goes by length alone: raw far from 50, controlled near it, for one model and jointly."""
    random = np.random.default_rng(0)
    differences = random.normal(300, 300, size=(2000, 2))
    terms = np.column_stack([length_terms(column) for column in differences.T])
    y = (random.random(terms.shape) < logistic(2 * terms)).astype(float)
    assert y.mean() > 0.65
    for m in range(2):
        alone = fit_alone(y[:, m], terms[:, m])
        assert 100 * alone.rate == pytest.approx(50, abs=3 * 100 * alone.stderr)
        assert alone.stderr < 0.02
    for one in fit_jointly(y, terms, np.isfinite(y))[0]:
        assert 100 * one.rate == pytest.approx(50, abs=3 * 100 * one.stderr)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("is_always_longer", [False, True])
def test_a_judge_without_exception_says_little(seed: int, is_always_longer: bool) -> None:
    """Longer always wins, so quality cannot be seen: near 50, with an interval that says so."""
    random = np.random.default_rng(seed)
    differences = random.normal(200, 300, size=(150, 2))
    if is_always_longer:
        differences = np.abs(differences)
    y = (differences > 0).astype(float)
    terms = np.column_stack([length_terms(column) for column in differences.T])
    fits = [fit_alone(y[:, 0], terms[:, 0]), *fit_jointly(y, terms, np.isfinite(y))[0]]
    for found in fits:
        assert 100 * found.rate == pytest.approx(50, abs=5)
        low, high = found.interval()
        assert high - low > 0.2


def test_error_alone_is_that_of_the_bootstrap() -> None:
    p, terms, gamma, _ = simulated(600, 1, 5)
    random = np.random.default_rng(1)
    y = (random.random(600) < p[:, 0]).astype(float)
    found = fit_alone(y, terms[:, 0], gamma)
    rates = []
    for _ in range(200):
        at = random.integers(0, 600, 600)
        rates.append(fit_alone(y[at], terms[at, 0], gamma[at]).rate)
    assert found.stderr == pytest.approx(np.std(rates), rel=0.2)
    low, high = found.interval()
    assert 0 < low < found.rate < high < 1


def test_draws_missing_and_orders(of: Callable[..., winrate.WinRate]) -> None:
    """0 and 1.5 are draws, null and NaN are left out, the other order is turned and averaged."""
    turned = {"generator_1": "m", "generator_2": "b", "len_1": 150, "len_2": 100}
    rows = [row(0, 2), row(1, 1.25), row(2, 0), row(3, 1.5), row(4, None), row(5, math.nan)]
    rows += [row(6, 1.75), row(6, 1.75) | turned]  # 0.75 and 0.25
    rows += [row(7, 1) | turned, row(8, 2), row(8, None) | turned]
    found = of(rows)
    values = np.array([1, 0.25, 0.5, 0.5, 0.5, 1])
    assert found.win_rate == pytest.approx(100 * values.mean())
    assert found.standard_error == pytest.approx(100 * values.std(ddof=1) / math.sqrt(6))
    assert (found.n, found.n_wins, found.n_wins_base, found.n_draws) == (6, 2, 1, 3)
    assert found.n_missing == 3
    assert found.discrete_win_rate == pytest.approx(100 * 3.5 / 6)
    assert found.share_longer == 100
    assert (found.avg_length, found.avg_length_baseline) == (150, 100)
    assert math.isnan(found.length_controlled_win_rate)  # +50 in every pair
    assert "nothing to control" in found.note


def test_extremes_stay_finite(of: Callable[..., winrate.WinRate]) -> None:
    """A judge that always prefers the model; one pair; the baseline against itself."""
    found = of([row(i, 2, len_2=75 + i) for i in range(50)])
    assert found.win_rate == 100
    assert 99 < found.length_controlled_win_rate <= 100
    longer = of([row(i, 2, len_2=101 + i) for i in range(50)])
    assert longer.length_controlled_standard_error > 20  # always better, or just always longer?
    single = of([row(0, 2)])
    assert (single.win_rate, single.n) == (100, 1)
    assert math.isnan(single.standard_error)
    three = of([row(i, 2) for i in range(3)])
    assert (three.ci_low, three.ci_high) == pytest.approx((43.85, 100), abs=0.01)  # Wilson's
    itself, _ = winrate.win_rates(load_rows([row(0, 1.5, "b"), row(0, 2, "m")]))
    assert itself["b"].length_controlled_win_rate == 50


def load_rows(rows: list[Row]) -> Any:
    from tempfile import TemporaryDirectory

    with TemporaryDirectory() as folder:
        return load([written(Path(folder) / "j.jsonl", rows)])


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (json.dumps(row(1, 2.5)), "'preference' is 2.5, expected 1"),
        (json.dumps(row(1, -1)), "'preference' is -1"),
        (json.dumps(row(1, "2")), "'preference' is '2'"),
        (json.dumps(row(1, True)), "'preference' is"),
        (json.dumps({k: v for k, v in row(1, 2).items() if k != "preference"}), "is missing"),
        (json.dumps(row(1, 2, len_2="long")), "'len_2' is 'long'"),
        (json.dumps(row(1, 2, len_1=-3)), "'len_1' is -3"),
        (json.dumps(row(1, 2, len_1=None)), "'len_1' is null"),
        (json.dumps(row(1, 2, generator_1=None)), "'generator_1' is null"),
        (json.dumps(row(None, 2)), "'index' is null"),
        ('{"index": 1, "preference": NaN', "it is not JSON"),
        ("[1]", "not an object"),
        (json.dumps(row(0, 1)), "for the second time in this order"),
    ],
)
def test_a_bad_line_is_named(line: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "j.jsonl"
    path.write_text(json.dumps(row(0, 2)) + "\n\n" + line + "\n")
    with pytest.raises(UserError) as error:
        load([str(path)])
    assert f"{path}:3: " in str(error.value)
    assert message in str(error.value)


def test_empty_files_and_failed_judges_are_refused(tmp_path: Path) -> None:
    (tmp_path / "j.jsonl").write_text("")
    with pytest.raises(UserError, match="no judgements"):
        load([str(tmp_path / "j.jsonl")])
    with pytest.raises(UserError, match="there is no file"):
        load([str(tmp_path / "no.jsonl")])
    with pytest.raises(UserError, match="none of 2 judgements has a preference"):
        winrate.win_rates(load_rows([row(0, None), row(1, None)]))


def test_several_baselines_are_refused_or_chosen(tmp_path: Path) -> None:
    rows = [row(0, 2), row(0, 1, "m", generator_1="other")]
    with pytest.raises(UserError, match=r"no baseline in common .*--baseline NAME") as error:
        load_rows([*rows, row(1, 2, "n")])
    assert "b (2 rows), other (1 rows)" in str(error.value)
    source = written(tmp_path / "j.jsonl", [*rows, row(1, 2, "n")])
    judged = load([source], "other")
    assert list(judged.models) == ["m"]
    assert judged.left_out == 2
    with pytest.raises(UserError, match="no row names the baseline 'x'"):
        load([source], "x")


def test_models_with_other_instructions_are_not_fitted_jointly(tmp_path: Path) -> None:
    """Difficulty can only be told from what two models have in common."""
    random = np.random.default_rng(0)

    def rows(model: str, start: int) -> list[Row]:
        draws = random.random((60, 2))
        return [
            row(start + i, 1 + draws[i, 0], model, len_2=100 + 99 * draws[i, 1]) for i in range(60)
        ]

    judged = load([written(tmp_path / "j.jsonl", rows("m", 0) + rows("n", 0) + rows("o", 1000))])
    rates, _ = winrate.win_rates(judged)
    assert [rates[m].difficulty_source for m in "mno"] == ["joint", "joint", "none"]
    compared = list(winrate.comparisons(judged))
    assert [(c["baseline"], c["candidate"], c["n"]) for c in compared] == [("m", "n", 60)]
    difference = rates["n"].win_rate - rates["m"].win_rate
    assert compared[0]["difference"] == pytest.approx(difference)


def test_full_annotations_are_read(tmp_path: Path) -> None:
    """AlpacaEval's own annotations hold the texts, and may lack an index."""
    path = tmp_path / "annotations.json"
    one = {"instruction": "Hi", "output_1": "abc", "output_2": "défg", "preference": 1.2}
    path.write_text(json.dumps([one | {"generator_1": "b", "generator_2": "m"}]))
    (pair,) = load([str(path)]).models["m"]
    assert (pair.index, pair.length_baseline, pair.length) == ("Hi", 3, 4)
    assert pair.preference == pytest.approx(0.2)
