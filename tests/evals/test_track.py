"""W&B is a mirror: it gets no secrets, and its failures change nothing."""

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from conf.schema import Track
from evals.track import REDACTED, Tracker, _has_login, redact


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


def test_a_commit_is_no_secret_and_a_secret_inside_a_command_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SOME_API_KEY", "canary-canary")
    commit = "0123456789abcdef" * 2 + "01234567"
    for public in (f"x model.revision={commit}", f"/hub/snapshots/{commit}/config.json"):
        assert redact(public) == public
    assert redact(f"key={commit} token=canary-canary;") == f"key={REDACTED} token={REDACTED};"


def test_a_stage_that_failed_is_not_finished_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    run = types.SimpleNamespace(finish=lambda exit_code: codes.append(exit_code), summary={})
    module = types.SimpleNamespace(Settings=lambda **_: None, init=lambda **_: run)
    monkeypatch.setitem(sys.modules, "wandb", module)  # type: ignore[arg-type]
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(Track(), "group", tmp_path)
    with tracker.run("sft", "train"):
        pass
    with pytest.raises(KeyboardInterrupt), tracker.run("sft", "train"):
        raise KeyboardInterrupt
    assert codes == [0, 1]


def test_a_login_at_a_server_of_ones_own_counts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine wandb.example login user password x\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not _has_login()
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    assert _has_login()
