"""Weights & Biases, a mirror of the local records. Absent or down, it changes nothing in them."""

import contextlib
import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from conf.schema import Track
from evals.results import EvalResult

_SECRET_KEY = re.compile(
    r"(api[_-]?key|secret|password|credential|(^|[_-])(access|auth|api|hf|hub|wandb)[_-]?token$)",
    re.IGNORECASE,
)
# A commit has 40 hexadecimal digits, as a W&B key has.
_SECRET_VALUE = re.compile(
    r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|(?<!revision=)(?<!commit=)(?<!snapshots/)[0-9a-f]{40})\b"
)
REDACTED = "(redacted)"
_PUBLIC_KEYS = {"commit", "revision"}


def redact(value: Any, key: str = "") -> Any:
    """`value` without secrets: by the name of a key, by the look of a value, and by the environment's own secrets."""
    if isinstance(value, dict):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if isinstance(value, str) and value and key not in _PUBLIC_KEYS:
        if _SECRET_KEY.search(key):
            return REDACTED
        for secret in _environment_secrets():
            value = value.replace(secret, REDACTED)
        return _SECRET_VALUE.sub(REDACTED, value)
    return value


def _environment_secrets() -> list[str]:
    """The longest first: one may be part of another."""
    named = (value for name, value in os.environ.items() if _SECRET_KEY.search(name))
    return sorted((value for value in named if len(value) >= 8), key=len, reverse=True)


class Tracker:
    """One W&B group for an experiment, one run for each stage and each evaluation.

    Respects `WANDB_MODE`; without it and without a login, runs are kept offline in `folder`/wandb.
    A failure of W&B is said once on stderr and then ignored.
    """

    def __init__(
        self, track: Track, group: str, folder: Path, config: dict[str, Any] | None = None
    ) -> None:
        self._track = track
        self._group = group
        self._folder = folder
        self._config = redact(config or {})
        self._is_off = not track.wandb or os.environ.get("WANDB_MODE") == "disabled"

    @contextlib.contextmanager
    def run(self, name: str, job_type: str) -> Iterator["Live"]:
        """A run to log to. What the caller raises passes through; what W&B raises does not."""
        live = Live(None if self._is_off else self._start(name, job_type), self._give_up)
        try:
            yield live
        except BaseException:
            live.finish(exit_code=1)
            raise
        live.finish()

    def evaluation(self, name: str, result: EvalResult) -> None:
        """An evaluation's scores with their errors."""
        found: dict[str, Any] = {"skipped": result.skipped} if result.skipped else {}
        for score in result.scores:
            prefix = f"{result.suite}/{score.task}/{score.metric}"
            found |= {prefix: score.value, f"{prefix}_stderr": score.stderr, f"{prefix}_n": score.n}
        with self.run(name, "eval") as live:
            live.summarise(found)

    def reward_model(self, name: str, figures: dict[str, float]) -> None:
        """What a reward model is worth on held-out pairs."""
        with self.run(name, "reward") as live:
            live.summarise({f"reward/{key}": value for key, value in figures.items()})

    def leaderboard(self, rows: list[dict[str, Any]]) -> None:
        """The leaderboard as a table."""
        if rows:
            with self.run("leaderboard", "report") as live:
                live.table("leaderboard", rows)

    def _start(self, name: str, job_type: str) -> Any:
        try:
            import wandb

            mode: Any = os.environ.get("WANDB_MODE") or ("online" if _has_login() else "offline")
            return wandb.init(
                project=self._track.project,
                entity=self._track.entity,
                group=self._group,
                name=name,
                job_type=job_type,
                config=self._config,
                mode=mode,
                dir=os.environ.get("WANDB_DIR", str(self._folder)),
                settings=wandb.Settings(silent=True, init_timeout=30, x_disable_stats=True),
            )
        except Exception as error:  # anything: tracking must not stop a run
            self._give_up(error)
            return None

    def _give_up(self, error: Exception) -> None:
        if not self._is_off:
            said = f"W&B is off for this run ({error}); the local records are complete"
            print(said, file=sys.stderr)
        self._is_off = True


class Live:
    """A W&B run that cannot fail; without one, it takes everything and does nothing."""

    def __init__(self, run: Any, give_up: Callable[[Exception], None]) -> None:
        self._run = run
        self._give_up = give_up

    def log(self, row: dict[str, Any], step: int | None = None) -> None:
        """Values at a step."""
        self._safely(lambda run: run.log(row, step=step))

    def summarise(self, values: dict[str, Any]) -> None:
        """Final values, without secrets."""
        self._safely(lambda run: run.summary.update(redact(values)))

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Rows with equal keys as a table."""

        def put(run: Any) -> None:
            import wandb

            columns = list(rows[0])
            data = [[_cell(row.get(column)) for column in columns] for row in rows]
            run.log({name: wandb.Table(columns=columns, data=data)})

        self._safely(put)

    def finish(self, exit_code: int = 0) -> None:
        """Close the run, as failed where the code is not 0."""
        self._safely(lambda run: run.finish(exit_code=exit_code))

    def _safely(self, act: Callable[[Any], Any]) -> None:
        if self._run is None:
            return
        try:
            act(self._run)
        except Exception as error:  # anything: tracking must not stop a run
            self._run = None
            self._give_up(error)


def _has_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = (
        urlsplit(os.environ.get("WANDB_BASE_URL") or "https://api.wandb.ai").hostname
        or "api.wandb.ai"
    )
    with contextlib.suppress(OSError):
        netrc = os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))
        with open(netrc, encoding="utf-8") as file:
            return host in file.read()
    return False


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)
