"""Best-of-n against the enumeration of every subset, and the command from file to page."""

import json
import math
import random
import sys
from itertools import combinations
from pathlib import Path
from statistics import fmean

import pytest

from reward.bestofn import divergence, expected, sizes
from reward.looks import LOOKS, read
from reward.overoptimization import main


def by_enumeration(proxy: list[float], gold: list[float], n: int) -> float:
    """The mean over all subsets; among equal proxies each is picked equally often."""
    picks = []
    for subset in combinations(range(len(proxy)), n):
        best = max(proxy[place] for place in subset)
        picks.append(fmean(gold[place] for place in subset if proxy[place] == best))
    return fmean(picks)


@pytest.mark.parametrize("levels", [2, 4, 1000], ids=["many ties", "some ties", "no ties"])
def test_every_subset_counts_once(levels: int) -> None:
    rng = random.Random(levels)
    for total in range(1, 9):
        proxy = [float(rng.randrange(levels)) for _ in range(total)]
        gold = [rng.gauss(0, 1) for _ in range(total)]
        for n in range(1, total + 1):
            assert expected(proxy, gold, n) == pytest.approx(by_enumeration(proxy, gold, n))
    with pytest.raises(ValueError, match="best of 3"):
        expected([1.0, 2.0], [1.0, 2.0], 3)


def test_divergence_is_that_of_the_order_statistic() -> None:
    """The best of n uniform ranks has density n uⁿ⁻¹, whose KL from the uniform one is a plain integral."""
    for n in (1, 2, 5, 64):
        steps = 20_000
        middles = [(place + 0.5) / steps for place in range(steps)]
        density = [n * u ** (n - 1) for u in middles]
        integral = fmean(d * math.log(d) for d in density if d > 0)
        assert divergence(n) == pytest.approx(integral, abs=1e-3)


def test_sizes() -> None:
    assert [sizes(n) for n in (1, 2, 6, 8)] == [[1], [1, 2], [1, 2, 4, 6], [1, 2, 4, 8]]


def hacked(rng: random.Random) -> dict[str, object]:
    """A completion; a few have found what the proxy likes and gold does not."""
    quality, is_hack = rng.gauss(0, 1), rng.random() < 0.12
    gold = float(quality + rng.gauss(0, 1) > 0 and not is_hack)
    return {"text": "x", "proxy": quality + 4 * is_hack, "terms": {"gold": gold}}


def run(monkeypatch: pytest.MonkeyPatch, *argv: object) -> int:
    monkeypatch.setattr(sys, "argv", ["prog", *map(str, argv)])
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    return 0


def test_from_scored_completions_to_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = random.Random(0)
    rows = [
        {"prompt": f"p{number}", "completions": [hacked(rng) for _ in range(8)]}
        for number in range(60)
    ]
    rows[0]["completions"][0]["proxy"] = None  # type: ignore[index]
    # The other form: a completion a row, those of one prompt in several.
    flat = [{"prompt": row["prompt"], **one} for row in rows for one in row["completions"]]  # type: ignore[attr-defined]
    found = []
    for name, written in (("nested", rows), ("flat", flat)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("\n".join(map(json.dumps, written)))
        options = ("--proxy", "proxy", "--gold", "terms.gold")
        assert run(monkeypatch, path, tmp_path / name, *options) == 0
        found.append(json.loads((tmp_path / name / "report.json").read_text()))
    nested, one_each = found
    assert nested["looks"] == one_each["looks"]
    assert (nested["prompts"], nested["left_out"], nested["unscored"]) == (59, 1, 1)
    assert [row["step"] for row in nested["looks"]] == [1, 2, 4, 8]
    assert nested["finding"]["verdict"] == "over-optimized"
    golds = [one["terms"]["gold"] for row in rows[1:] for one in row["completions"]]  # type: ignore[attr-defined]
    assert nested["looks"][0]["gold"] == pytest.approx(fmean(golds))  # best of one is any
    assert len(read(tmp_path / "nested" / LOOKS)[0].proxy) == 59
    assert "warning: From n = " in capsys.readouterr().out
    page = (tmp_path / "nested" / "report.html").read_text("utf-8")
    assert "over-optimized" in page
    before = {file: file.read_bytes() for file in (tmp_path / "nested").iterdir()}
    assert run(monkeypatch, tmp_path / "nested.jsonl", tmp_path / "nested", *options) == 0
    assert before == {file: file.read_bytes() for file in (tmp_path / "nested").iterdir()}


@pytest.mark.parametrize(
    ("rows", "options", "said"),
    [
        ([{"prompt": "a", "completions": [{"x": 1, "y": 2}]}], (), "1 of 1 prompts have fewer"),
        ([{"prompt": "a", "completions": [{"x": 1}]}], (), "no field 'y'"),
        ([{"prompt": "a", "completions": [{"x": "1", "y": 2}]}], (), "expected a number"),
        ([{"prompt": str(i), "completions": [{"x": 1, "y": 2}] * 4} for i in range(5)], (), "needs 6"),
        ([{"prompt": str(i), "completions": [{"x": 1, "y": 2}] * 4} for i in range(9)], ("--n", 8), "0 prompts with 8"),
    ],
)  # fmt: skip
def test_what_cannot_be_estimated(
    rows: list[dict[str, object]],
    options: tuple[object, ...],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    argv = (path, tmp_path / "out", "--proxy", "x", "--gold", "y", *options)
    assert run(monkeypatch, *argv) == 2
    message = capsys.readouterr().err
    assert said in message
    assert not (tmp_path / "out").exists()
