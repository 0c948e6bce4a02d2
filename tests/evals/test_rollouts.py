"""What PPO's policy wrote, on an arm's page."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from test_report import BASE, TASK, marks, page, write_run, write_task

from evals.leaderboard import boards
from evals.runs import load_runs
from evals.site.rollouts import RESPONSES, Rollouts, samples_file, stage_rollouts


def row(rollout: int, place: int, **fields: Any) -> dict[str, Any]:
    found = {"rollout": rollout, "step": 4 * rollout, "tokens": 7, "is_ended": True, "score": 0.5}
    prompt = [{"role": "user", "content": f"question {place} of {rollout}"}]
    return found | {"kl": 1.25, "prompt": prompt, "response": f"answer {place}"} | fields


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    run = tmp_path / "runs"
    write_task(run, BASE, marks(*[1] * 8))
    write_run(run, TASK)
    return run


def keep(run: Path, rows: list[dict[str, Any]]) -> None:
    path = samples_file(run, "dpo")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(one) + "\n" for one in rows), "utf-8")


def only(run: Path) -> Rollouts:
    (board,) = boards(load_runs(run))
    (found,) = stage_rollouts(board.entries[0].arm)
    return found


def test_the_first_and_the_last_rollout_are_shown(runs: Path) -> None:
    keep(runs, [row(rollout, place) for rollout in range(3) for place in range(RESPONSES + 2)])
    shown = [(one.rollout, one.step, one.prompt) for one in only(runs).responses]
    assert shown == [
        (rollout, 4 * rollout, f"question {place} of {rollout}")
        for rollout in (0, 2)
        for place in range(RESPONSES)
    ]
    keep(runs, [row(0, 0)])
    assert len(only(runs).responses) == 1


def test_a_conversation_is_told_by_its_roles_and_a_gap_is_no_number(runs: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "x" * 5000}]
    keep(runs, [row(0, 0, prompt=turns, score=None, kl=None)])
    (response,) = only(runs).responses
    assert response.prompt.startswith("system: Be brief.\n\nuser: xxx")
    assert "characters left out" in response.prompt
    assert math.isnan(response.score)
    assert math.isnan(response.kl)


def test_the_page_escapes_what_was_written(runs: Path, tmp_path: Path) -> None:
    hostile = "</pre></td><script>alert(1)</script>"
    asked = [{"role": "user", "content": f"{hostile}?"}]
    keep(runs, [row(0, 0, prompt=asked, response=hostile, score=-0.5, is_ended=False)])
    page(runs, tmp_path / "site")
    (arm,) = (tmp_path / "site/arms").glob("*.html")
    text = arm.read_text("utf-8")
    assert "<script>alert" not in text
    (table,) = re.findall(r'<table class="written">.*?</table>', text, re.S)
    assert table.count("&lt;script&gt;alert(1)") == 2
    assert "−0.5" in table
    assert "cut off" in table


@pytest.mark.parametrize("line", ["{", "[]", '{"rollout": 0}', json.dumps(row(0, 0, prompt=3))])
def test_what_cannot_be_read_is_said(runs: Path, tmp_path: Path, line: str) -> None:
    keep(runs, [])
    assert only(runs)[2:] == ([], "")
    samples_file(runs, "dpo").write_text(line, "utf-8")
    assert only(runs).note.startswith("what seed 0 wrote cannot be read: ")
    page(runs, tmp_path / "site")
    (arm,) = (tmp_path / "site/arms").glob("*.html")
    assert "dpo: what seed 0 wrote cannot be read" in arm.read_text("utf-8")
