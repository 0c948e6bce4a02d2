"""Weights & Biases, a mirror of the local records. Absent or down, it changes nothing in them."""

import contextlib
import os
import re
import sys
from collections.abc import Iterator
from typing import Any

from conf.schema import Track
from evals.results import EvalResult

_SECRET_KEY = re.compile(r"(api[_-]?key|token|secret|password|credential)", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(hf_[A-Za-z0-9]{20,}|sk-[A-Za-z0-9_-]{16,}|[0-9a-f]{40})\b")
REDACTED = "(redacted)"


def redact(value: Any, key: str = "") -> Any:
    """`value` without secrets: by the name of a key, by the look of a value, and by the environment's own secrets."""
    if isinstance(value, dict):
        return {name: redact(item, str(name)) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact(item, key) for item in value]
    if isinstance(value, str) and value:
        if _SECRET_KEY.search(key) or value in _environment_secrets():
            return REDACTED
        return _SECRET_VALUE.sub(REDACTED, value)
    return value


def _environment_secrets() -> set[str]:
    return {
        value for name, value in os.environ.items() if _SECRET_KEY.search(name) and len(value) >= 8
    }


class Tracker:
    """One W&B group for an experiment, one run for each stage and each evaluation.

    Respects `WANDB_MODE`. Without it and without a login, runs are kept offline. Every failure is said once on stderr
    and then ignored.
    """

    def __init__(self, track: Track, group: str, config: dict[str, Any] | None = None) -> None:
        self._track = track
        self._group = group
        self._config = redact(config or {})
        self._is_off = not track.wandb or os.environ.get("WANDB_MODE") == "disabled"

    def evaluation(self, name: str, result: EvalResult) -> None:
        """An evaluation's scores with their errors."""
        with self.run(name, "eval") as run:
            for score in result.scores:
                prefix = f"{result.suite}/{score.task}/{score.metric}"
                run.summary.update(
                    {prefix: score.value, f"{prefix}_stderr": score.stderr, f"{prefix}_n": score.n}
                )
            if result.skipped:
                run.summary.update({"skipped": result.skipped})

    def leaderboard(self, rows: list[dict[str, Any]]) -> None:
        """The leaderboard as a table."""
        if not rows:
            return
        with self.run("leaderboard", "report") as run:
            import wandb

            columns = list(rows[0])
            data = [[_cell(row.get(column)) for column in columns] for row in rows]
            run.log({"leaderboard": wandb.Table(columns=columns, data=data)})

    @contextlib.contextmanager
    def run(self, name: str, job_type: str) -> Iterator[Any]:
        """A W&B run with `log` and `summary`, or something that takes both and does nothing."""
        if self._is_off:
            yield _Nothing()
            return
        run = self._start(name, job_type)
        try:
            yield run
        except Exception as error:
            self._give_up(error)
        finally:
            with contextlib.suppress(Exception):
                run.finish()

    def _start(self, name: str, job_type: str) -> Any:
        try:
            import wandb

            mode = os.environ.get("WANDB_MODE") or ("online" if _has_login() else "offline")
            return wandb.init(
                project=self._track.project,
                entity=self._track.entity,
                group=self._group,
                name=name,
                job_type=job_type,
                config=self._config,
                mode=mode,
                dir=os.environ.get("WANDB_DIR"),
                settings=wandb.Settings(silent=True, init_timeout=30, x_disable_stats=True),
            )
        except Exception as error:
            self._give_up(error)
            return _Nothing()

    def _give_up(self, error: Exception) -> None:
        print(f"W&B is off for this run ({error}); the local records are complete", file=sys.stderr)
        self._is_off = True


def _has_login() -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    with contextlib.suppress(OSError):
        netrc = os.path.expanduser(os.environ.get("NETRC", "~/.netrc"))
        with open(netrc, encoding="utf-8") as file:
            return "api.wandb.ai" in file.read()
    return False


def _cell(value: Any) -> Any:
    return value if isinstance(value, str | int | float | bool | None) else str(value)


class _Nothing:
    """Takes what a W&B run takes and does nothing."""

    def __init__(self) -> None:
        self.summary: dict[str, Any] = {}

    def log(self, *_: Any, **__: Any) -> None:
        """Ignore."""

    def finish(self) -> None:
        """Ignore."""
