"""A command line of another package as a child: what it says is passed on, and it ends with its parent."""

import contextlib
import ctypes
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import IO, Any

from conf.entry import UserError, plain

_GRACE_SECONDS = 10


def overrides(values: dict[str, Any], prefix: str = "") -> list[str]:
    """KEY=VALUE arguments that Hydra reads as `values`: JSON-like, with nested keys dotted."""
    found: list[str] = []
    for key, value in values.items():
        if isinstance(value, dict):
            found += overrides(value, f"{prefix}{key}.")
        else:
            found.append(f"{prefix}{key}={_written(plain(value))}")
    return found


def _written(value: Any) -> str:
    if value is None:
        return "null"
    if not isinstance(value, str):
        return str(value).lower() if isinstance(value, bool) else str(value)
    # Hydra's grammar: backslashes mean themselves, except in front of a quote.
    body = re.sub(r"(\\+)(?='|$)", r"\1\1", value).replace("'", "\\'")
    return f"'{body}'"


def run(module: str, arguments: list[str], what: str, every: float, look: Any) -> None:
    """Run `python -m module arguments` to its end.

    Its standard output and its standard error are passed on as they come; the message of a user's mistake is not: it
    is the one that is raised.

    Args:
        module: whose command line it is.
        arguments: of that command line.
        what: what it is started for, for the message of a failure.
        every: seconds between two calls of `look`.
        look: called without arguments while it runs, such as to show progress.

    Raises:
        UserError: when it fails.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        preexec_fn=die_with_parent,
    )
    told: list[str] = []
    assert process.stderr is not None
    reader = threading.Thread(target=_pass_on, args=(process.stderr, told), daemon=True)
    reader.start()
    try:
        with _ended(process):
            while True:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(every)
                    break
                look()
    finally:
        reader.join(_GRACE_SECONDS)
        process.stderr.close()
    if process.returncode:
        raise UserError(f"{what}: {_failure(module, process.returncode, told)}")


def _pass_on(lines: IO[str], told: list[str]) -> None:
    """Copy lines to standard error up to the message of a user's mistake, which is collected."""
    for line in lines:
        if told or line.startswith("error: "):
            told.append(line.rstrip("\n"))
        else:
            print(line, end="", file=sys.stderr, flush=True)


def _failure(module: str, code: int, told: list[str]) -> str:
    if told:
        return "\n".join(told).removeprefix("error: ")
    if code == -signal.SIGKILL:
        return f"python -m {module} was ended by SIGKILL (out of memory, or ended by hand)"
    how = (
        f"was ended by {signal.Signals(-code).name}"
        if code < 0
        else f"failed with exit code {code}"
    )
    return f"python -m {module} {how}; what it said stands above"


@contextlib.contextmanager
def _ended(process: "subprocess.Popen[str]") -> Iterator[None]:
    """End the process when this one is interrupted: politely first."""
    try:
        yield
    except BaseException:
        process.terminate()
        try:
            process.wait(_GRACE_SECONDS)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            process.kill()
            process.wait()
        raise


def die_with_parent() -> None:
    """Ask Linux to kill this process when its parent dies, so that kill -9 leaves no child behind."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
