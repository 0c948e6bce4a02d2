"""W&B is a mirror: it gets no secrets, and its failures change nothing."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Track
from evals.track import REDACTED, Tracker, redact


def test_secrets_are_redacted_by_name_by_look_and_by_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "canary-canary")
    found = redact(
        {
            "wandb": {"api_key": "x", "project": "align"},
            "note": "token hf_abcdefghijklmnopqrstuvwxyz here",
            "list": ["canary-canary", 3, None],
            "beta": 0.1,
        }
    )
    assert found == {
        "wandb": {"api_key": REDACTED, "project": "align"},
        "note": f"token {REDACTED} here",
        "list": [REDACTED, 3, None],
        "beta": 0.1,
    }


def test_offline_runs_lie_in_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(Track(), "group", tmp_path, {"api_key": "canary-in-config"})
    with tracker.run("sft", "train") as live:
        live.log({"loss": 1.0}, step=1)
        live.summarise({"train_loss": 1.0})
    tracker.leaderboard([{"name": "a", "gain": 0.5}])
    files = list((tmp_path / "wandb").glob("offline-run-*/run-*.wandb"))
    assert len(files) == 2
    for path in (tmp_path / "wandb").rglob("*"):
        if path.is_file():
            assert b"canary-in-config" not in path.read_bytes()


@pytest.mark.parametrize("broken", ["import", "init", "log"])
def test_a_broken_wandb_is_said_once_and_ignored(
    broken: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise RuntimeError("down")

    run = types.SimpleNamespace(log=fail, finish=fail, summary={})
    module = types.SimpleNamespace(
        Settings=lambda **_: None, init=fail if broken == "init" else lambda **_: run
    )
    monkeypatch.setitem(sys.modules, "wandb", None if broken == "import" else module)  # type: ignore[arg-type]
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(Track(), "group", tmp_path)
    for _ in range(2):
        with tracker.run("sft", "train") as live:
            live.log({"loss": 1.0}, step=1)
    assert capsys.readouterr().err.count("W&B is off") == 1


def test_what_the_caller_raises_passes_through(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with pytest.raises(KeyError), Tracker(Track(), "group", tmp_path).run("sft", "train"):
        raise KeyError("mine")
