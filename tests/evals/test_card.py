"""The model card against the records, read back with the hub's own library."""

from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from test_report import BASE, GENERAL, TASK, marks, write_evaluation, write_run, write_task

from evals.leaderboard import leaderboard_rows
from evals.report import build_report
from evals.site.card import CARD, write_card
from reward.store import read_json, write_json


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """2 of 8 right before, 6 of 8 after; a general task that keeps; a quantizer that loses one document."""
    folder = tmp_path / "runs/one"
    tuned = marks(1, 1, 1, 1, 0, 0, 1, 1)
    write_task(folder, BASE, tuned)
    for policy in ("base", "dpo"):
        tasks = {"kept": marks(*[1] * 8)}
        write_evaluation(folder / f"evals/{policy}-none-general", "general", "retention", tasks)
    worse = {"json": marks(0, 1, 1, 1, 0, 0, 1, 1)}
    write_evaluation(folder / "evals/dpo-int8-task", "task", "gain", worse, quantizer="int8")
    write_run(
        folder,
        [*TASK, *GENERAL, ("dpo", "int8", "task")],
        title="Title | with *marks* <b> ![](http://x/y.png)",
    )
    write_json(folder / "config.json", {"dpo": {"args": {"beta": 0.1}, "peft": {"method": "lora"}}})
    return folder


def test_a_card_is_read_back_with_the_scores_of_the_records(run: Path) -> None:
    card = ModelCard.load(write_card(run / "run.json"))
    scores = {result.dataset_name: result for result in card.data.eval_results}
    assert scores["json"].metric_value == pytest.approx(6 / 8)
    assert scores["kept"].metric_value == 1.0
    assert {result.metric_type for result in scores.values()} == {"accuracy"}
    assert {result.task_type for result in scores.values()} == {"text-generation"}
    assert card.data.library_name == "transformers"
    assert card.data.tags == ["preference-alignment", "dpo", "lora"]
    assert card.data.model_name == "demo"


def test_the_text_holds_deltas_settings_and_commands(run: Path) -> None:
    text = ModelCard.load(write_card(run / "run.json")).text
    (row,) = leaderboard_rows(run.parent)
    interval = f"[{100 * row['gain_ci_low']:+.1f}, {100 * row['gain_ci_high']:+.1f}]".replace(
        "-", "−"
    )
    assert f"+50.0 {interval} {row['gain_verdict']}" in text
    assert "| int8 | −12.5 [" in text
    assert "12.5 %" in text  # one document of eight flipped
    assert '`{"beta": 0.1}`' in text
    assert "192 rows" in text
    assert "python -m align +experiment=demo" in text
    assert "| json | acc (%) | 25.0 ± 16.4 | 75.0 ± 16.4 | 8 | gain |" in text
    assert "Not measured: size and speed; the spread between seeds (one seed)" in text
    assert "Title \\| with *marks* &lt;b> ![&#93;(http" in text


def test_a_base_model_is_named_only_where_it_is_one_of_the_hub(run: Path) -> None:
    write_card(run / "run.json")
    assert ModelCard.load(run / CARD).data.base_model is None  # `tiny` is a local folder
    path = run / "evals/base-none-task/results.json"
    record = read_json(path)
    record["model"] |= {"path": "org/tiny", "weights": "org/tiny@0123"}
    write_json(path, record)
    write_json(run / "run.json", read_json(run / "run.json") | {"model": {"path": "org/tiny"}})
    write_card(run / "run.json")
    assert ModelCard.load(run / CARD).data.base_model == "org/tiny"


def test_the_site_has_the_card_of_each_arm(run: Path, tmp_path: Path) -> None:
    build_report(run.parent, tmp_path / "site")
    (card,) = (tmp_path / "site/cards").iterdir()
    assert ModelCard.load(card).content == ModelCard.load(write_card(run / "run.json")).content


def test_a_run_that_measured_nothing_has_a_card(tmp_path: Path) -> None:
    write_run(tmp_path / "run", [], stages=[], policies=["base"])
    card = ModelCard.load(write_card(tmp_path / "run/run.json"))
    assert card.data.eval_results is None
    assert "Nothing was measured." in card.text
    assert "0 retained" not in card.text
    assert "quantized forms" in card.text


def test_a_card_without_retention_tasks_counts_none(tmp_path: Path) -> None:
    write_task(tmp_path / "run", BASE, BASE)
    write_run(tmp_path / "run", TASK)
    text = ModelCard.load(write_card(tmp_path / "run/run.json")).text
    assert "retained" not in text
    assert "what it lost (no retention suite)" in text
