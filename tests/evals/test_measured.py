"""What the pages take from suites of text and footprint, from logs, and the front of a trade-off."""

import itertools
import json
import math
import random
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from test_report import BASE, TASK, marks, write_evaluation, write_run, write_task

from evals.leaderboard import Arm, boards
from evals.report import build_report
from evals.results import EvalResult, Score
from evals.runs import load_runs
from evals.site.armpage import ArmView
from evals.site.curves import metrics_file, stage_curves
from evals.site.graphs import Box, Spot, front, trade_chart, write_names
from evals.site.measured import forms, texts
from evals.site.places import places
from evals.site.tables import records


def write_text(folder: Path, quantizer: str, losses: list[float], kl: float | None) -> None:
    """A suite of held-out text: documents of 10 tokens each."""
    folder.mkdir(parents=True)
    rows = [
        {
            "doc_id": i,
            "doc_hash": str(i),
            "metrics": {},
            "weighted": {"loss": [10 * loss, 10, "mean"]}
            | ({} if kl is None else {"kl": [10 * kl * (i + 1) / 2, 10, "mean"]}),
        }
        for i, loss in enumerate(losses)
    ]
    (folder / "wiki.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    mean = sum(losses) / len(losses)
    scores = [Score("wiki", "loss", mean, 0.1, len(losses), False, True)]
    scores += [Score("wiki", "perplexity", math.exp(mean), 0.1, len(losses), False, False)]
    if kl is not None:
        scores += [Score("wiki", "kl", kl, 0.1, len(losses), False, False, neutral=0.0)]
        scores += [Score("wiki", "kl_p99", 9.0, math.nan, len(losses), False, False, neutral=0.0)]
    model = {"path": "tiny" if kl is None else "dpo"}
    EvalResult(
        model, quantizer, "text", "retention", {}, scores, {"wiki": "wiki.jsonl"}, {},
        reference=None if kl is None else {"path": "dpo" if quantizer != "none" else "tiny"},
    ).save(folder)  # fmt: skip


def write_footprint(folder: Path, quantizer: str, size: float) -> None:
    folder.mkdir(parents=True)
    scores = [Score("footprint", "size_mb", size, math.nan, 1, False, True)]
    EvalResult({}, quantizer, "footprint", "cost", {}, scores, {}, {}).save(folder)


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    run = tmp_path / "runs"
    write_task(run, BASE, marks(*[1] * 8))
    worse = {"json": marks(*[1] * 6, 0, 0)}
    write_evaluation(run / "evals/dpo-int8-task", "task", "gain", worse, quantizer="int8")
    write_text(run / "evals/base-none-text", "none", [2.0, 3.0, 4.0], None)
    write_text(run / "evals/dpo-none-text", "none", [2.1, 3.3, 4.2], 0.5)
    write_text(run / "evals/dpo-int8-text", "int8", [2.1, 3.3, 4.5], 0.25)
    write_footprint(run / "evals/dpo-none-footprint", "none", 260.0)
    write_footprint(run / "evals/dpo-int8-footprint", "int8", 140.0)
    more = [(policy, "none", "text") for policy in ("base", "dpo")]
    more += [("dpo", "int8", suite) for suite in ("task", "text", "footprint")]
    write_run(run, [*TASK, *more, ("dpo", "none", "footprint")])
    return run


def only_arm(runs: Path) -> Arm:
    (board,) = boards(load_runs(runs))
    return board.entries[0].arm


def test_held_out_text_has_its_change_of_loss_and_its_divergence(runs: Path) -> None:
    (text,) = texts(only_arm(runs).stages[-1])
    assert text.loss.difference == pytest.approx((0.1 + 0.3 + 0.2) / 3)
    assert text.divergence == {"kl": pytest.approx(0.5), "kl_p99": 9.0}


def test_each_format_has_its_cost_and_its_footprint(runs: Path) -> None:
    plain, int8 = forms(only_arm(runs))
    assert (plain.name, plain.footprint, plain.gain) == ("unquantized", {"size_mb": 260.0}, None)
    assert int8.gain is not None
    assert int8.gain.difference == pytest.approx(-0.25)
    assert int8.flips == pytest.approx(2 / 8)
    assert int8.footprint == {"size_mb": 140.0}
    assert int8.texts[0].divergence["kl"] == pytest.approx(0.25)
    assert int8.perplexity["wiki"] == pytest.approx(math.exp(9.9 / 3))


def test_a_cost_is_neither_gain_nor_retention_and_the_tables_hold_all(
    runs: Path, tmp_path: Path
) -> None:
    (row,) = records(boards(load_runs(runs)))
    assert row["gain"] == pytest.approx(0.75)
    assert (
        row["retention_retained"] + row["retention_forgotten"] + row["retention_inconclusive"] == 1
    )
    assert row["wiki_kl"] == pytest.approx(0.5)
    assert row["wiki_loss_change"] == pytest.approx(0.2)
    assert (row["unquantized_size_mb"], row["int8_size_mb"]) == (260.0, 140.0)
    assert row["int8_flips"] == pytest.approx(0.25)
    build_report(runs, tmp_path / "site")
    assert "KL 0.5000" in (tmp_path / "site/leaderboard.md").read_text("utf-8")
    assert ", 140 MB" in (tmp_path / "site/leaderboard.md").read_text("utf-8")


def test_the_front_is_what_no_other_point_beats() -> None:
    assert front([(0, 0), (1, 2), (2, 1), (1, 1), (2, 1)]) == [1, 2, 4]
    drawn = random.Random(3)
    for _ in range(50):
        points = [(drawn.randint(0, 4), drawn.randint(0, 4)) for _ in range(6)]
        beaten = {
            i
            for i, j in itertools.permutations(range(6), 2)
            if points[i] != points[j]
            and all(a <= b for a, b in zip(points[i], points[j], strict=True))
        }
        assert front(points) == [i for i in range(6) if i not in beaten]


def spots(count: int) -> list[Spot]:
    drawn = random.Random(7)
    return [Spot(f"setting {i}", drawn.random(), drawn.random()) for i in range(count)]


def texts_of(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)


def test_few_points_are_named_and_many_are_numbered_with_a_list() -> None:
    few = trade_chart("few", spots(3), ("x", "y"))
    assert {f"setting {i}" for i in range(3)} <= set(texts_of(few))
    assert "<ol" not in few
    many = trade_chart("many", spots(60), ("x", "y"), margin=3)
    assert not any("setting" in text for text in texts_of(many))
    assert {str(i) for i in range(1, 61)} <= set(texts_of(many))
    assert many.count("<li>setting") == 60
    assert many.count("<title>setting") == 60  # what the pointer shows
    assert "margin −3" in texts_of(many)


def test_names_lie_on_no_other_name() -> None:
    from matplotlib.figure import Figure

    axes = Figure(figsize=(7.4, 3.6)).add_axes((0.1, 0.15, 0.75, 0.8))
    points = spots(12)
    for spot in points:
        axes.plot(spot.x, spot.y, "o")
    assert write_names(axes, points, [spot.label for spot in points], [])
    boxes = []
    for text in axes.texts:
        x, y = axes.transData.transform(text.xy) * 72 / axes.figure.dpi
        left, bottom = x + text.xyann[0], y + text.xyann[1]
        boxes.append(Box(left, bottom, left + 40, bottom + 7))
    assert len(boxes) == 12
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_held_out_text_has_a_higher_or_a_lower_loss(runs: Path, tmp_path: Path) -> None:
    build_report(runs, tmp_path / "site")
    (path,) = (tmp_path / "site").rglob("text-wiki-base-dpo.html")
    text = path.read_text("utf-8")
    assert "3 higher loss" in text
    assert ">lost" not in text
    assert "3 lost" not in text


def test_numbers_of_a_text_lead_to_its_documents(runs: Path, tmp_path: Path) -> None:
    build_report(runs, tmp_path / "site")
    (path,) = (tmp_path / "site/arms").iterdir()
    links = re.findall(
        r'href="\.\./(samples/[^"]*text-wiki[^"]*)">([^<]*)<', path.read_text("utf-8")
    )
    numbers = {number for _, number in links}
    assert {"0.5000", "0.2500", f"{math.exp(9.9 / 3):.3f}"} <= numbers


def log(runs: Path, rows: Iterator[dict[str, float]], stage: str = "dpo") -> None:
    path = metrics_file(runs, stage)
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")


def test_curves_are_the_logged_rows_thinned_to_means(runs: Path) -> None:
    rows = [{"step": step, "loss": float(step % 2), "note": "text"} for step in range(1, 1001)]
    log(runs, iter([*rows, {"step": 1000, "eval_loss": 0.25}]))
    (stage,) = stage_curves(only_arm(runs), "x")
    (chart,) = stage.charts
    assert stage.note == ""
    assert "training from 0.6 to 0.4; held-out from 0.25 to 0.25" in chart  # means of 5 rows
    assert chart.count(" L ") < 500


def trained_by_ppo(runs: Path, **metrics: float | None) -> None:
    record = json.loads((runs / "run.json").read_text("utf-8"))
    record["stages"][0] |= {"stage": "ppo", "metrics": metrics}
    (runs / "run.json").write_text(json.dumps(record), "utf-8")


def facts_of_ppo(runs: Path, **metrics: float | None) -> list[str]:
    trained_by_ppo(runs, **metrics)
    (place,) = places(boards(load_runs(runs)), {})
    # After method, rows, source and parameters, before the time.
    return ArmView(place).steps[-1].facts[4:-1]


def test_the_box_of_ppo_has_its_last_rollout(runs: Path) -> None:
    last = {"objective/scores": 0.85, "objective/kl": 1.3, "response/length_mean": 24.0}
    told = "last rollout: reward 0.85, KL 1.3 nats a response, 24 tokens a response"
    held_out = {"eval_reward": 0.8125, "eval_reward_stderr": 0.03, "alarm/few_ended": 12.0}
    assert facts_of_ppo(runs, **last) == [told]
    assert facts_of_ppo(runs, **last, **held_out, **{"response/eos_rate": 0.05}) == [
        f"{told}, 5.0 % ended",
        "held-out reward 0.812 ± 0.03",
        "warning: few_ended at step 12",
    ]
    assert facts_of_ppo(runs, **{"objective/scores": None, "train_loss": 0.1}) == []


def test_ppo_is_shown_by_its_reward_and_not_by_its_loss(runs: Path) -> None:
    """Only the first step of a rollout has the rollout's numbers."""
    trained_by_ppo(runs)
    rows = [{"step": step, "loss": 9.0, "policy/clipfrac_avg": 0.1 * step} for step in range(1, 5)]
    rows[0] |= {"objective/scores": 0.5, "objective/kl": 0.0, "val/explained_variance": math.nan}
    rows[2] |= {"objective/scores": 0.75, "objective/kl": 2.5, "val/explained_variance": 0.3}
    held_out = {"step": 4, "eval_reward": 0.6, "eval_length_mean": 20.0, "eval_loss": 9.0}
    log(runs, iter([*rows, held_out]), "ppo")
    (stage,) = stage_curves(only_arm(runs), "x")
    told = [re.findall(r'aria-label="([^"]*)"', chart)[0] for chart in stage.charts]
    assert told == [
        "reward over steps: training from 0.5 to 0.75; held-out from 0.6 to 0.6",
        "KL, nats a response over steps: training from 0 to 2.5",
        "tokens a response over steps: held-out from 20 to 20",
        "critic: variance explained over steps: training from 0.3 to 0.3",
        "share of clipped ratios over steps: training from 0.1 to 0.4",
    ]
    assert stage.note == "1 logged rows hold a number that is not finite, which is not drawn"


def test_a_run_without_a_log_says_so(runs: Path) -> None:
    (stage,) = stage_curves(only_arm(runs), "x")
    assert (stage.charts, stage.note) == ([], "seed 0 kept no log of this stage")
    log(runs, iter([]))
    metrics_file(runs, "dpo").write_text("{", "utf-8")
    (stage,) = stage_curves(only_arm(runs), "x")
    assert stage.note == "the log of seed 0 cannot be read: JSONDecodeError"
