"""Run command lines as processes of their own, and account for all that they use."""

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from conf.entry import UserError

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
ARMS = ("peer", "ours")
_TAIL_CHARACTERS = 2500
_Found = TypeVar("_Found")

Argv = Sequence[str]


@dataclass
class Run:
    """What the commands of one side used, one after the other."""

    wall: float = 0.0  # seconds
    cpu: float = 0.0  # seconds of the processes with all their children
    memory: float = 0.0  # MiB that the largest process held at most
    load: float = 0.0  # load average over one minute, the highest at an end of a command
    clock: list[dict[str, Any]] = field(default_factory=list)  # see clock/sitecustomize.py
    answers: list[Any] = field(default_factory=list)  # of an evaluation: `answers.Answer`s by model

    def of(self, kind: str) -> list[dict[str, Any]]:
        """The clock's rows of a kind."""
        return [row for row in self.clock if row["kind"] == kind]

    def by_process(self, kind: str) -> list[list[dict[str, Any]]]:
        """The same, process by process in the order of their first row."""
        found: dict[int, list[dict[str, Any]]] = {}
        for row in self.of(kind):
            found.setdefault(row["pid"], []).append(row)
        return list(found.values())

    @property
    def gpu_memory(self) -> float:
        """MiB that torch held on the GPU at most; 0 without one."""
        return max((row.get("gpu_memory", 0.0) for row in self.of("exit")), default=0.0)

    @property
    def threads(self) -> set[int]:
        """Threads of the processes that read tokens."""
        return {row["threads"] for row in self.of("exit")}


def has_gpu() -> bool:
    """Whether this machine has one; torch is not asked, which would take memory and seconds."""
    return shutil.which("nvidia-smi") is not None


def program(name: str) -> str:
    """A console script of this environment.

    Raises:
        UserError: when the peer is not installed.
    """
    path = Path(sys.executable).with_name(name)
    if not path.is_file():
        raise UserError(
            f"there is no {path}: install the peer, `make install` brings trl and lm-eval"
        )
    return str(path)


def environment(scratch: Path, threads: int) -> dict[str, str]:
    """The same for both sides; nothing that one run leaves in a cache helps another."""
    paths = [str(HERE / "clock"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return dict(os.environ) | {
        "BENCH_CLOCK": str(scratch / "clock.jsonl"),
        "HF_DATASETS_CACHE": str(scratch / "datasets"),
        "HF_DATASETS_OFFLINE": "1",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "PYTHONPATH": os.pathsep.join(paths),
        "PYTHONUNBUFFERED": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "TRL_DISABLE_TELEMETRY": "1",
        "WANDB_MODE": "disabled",
    }


def run(commands: Sequence[Argv], scratch: Path, threads: int) -> Run:
    """Run commands one after the other.

    Args:
        commands: of one side.
        scratch: empty folder for what they write beside their results.
        threads: of OpenMP, in each process.

    Raises:
        UserError: when one fails, with the end of what it wrote.
    """
    found = Run()
    env = environment(scratch, threads)
    for number, argv in enumerate(commands):
        log = scratch / f"{number}.log"
        started = time.perf_counter()
        code, usage = _waited(argv, env, log)
        found.wall += time.perf_counter() - started
        if code:
            end = log.read_text(encoding="utf-8", errors="replace")[-_TAIL_CHARACTERS:]
            raise UserError(f"`{' '.join(argv)}` ended with code {code}:\n{end}")
        found.cpu += usage.ru_utime + usage.ru_stime
        found.memory = max(found.memory, usage.ru_maxrss / 1024)
        found.load = max(found.load, os.getloadavg()[0])
    clock = scratch / "clock.jsonl"
    if clock.is_file():
        found.clock = [json.loads(line) for line in clock.read_text(encoding="utf-8").splitlines()]
    return found


def _waited(argv: Argv, env: Mapping[str, str], log: Path) -> tuple[int, Any]:
    """Exit code and what the process with all its children used."""
    with log.open("wb") as file:
        process = subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, env=env, cwd=ROOT,
            start_new_session=True,
        )  # fmt: skip
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            process.wait()
            raise
        process.returncode = os.waitstatus_to_exitcode(status)
    return process.returncode, usage


def apart(function: Callable[..., _Found], *arguments: Any) -> _Found:
    """What a function gives, called in a process of its own.

    Linux counts the memory that a process had when it started another as the other's: this one must stay small, so
    whatever imports torch is called so.
    """
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def matmul(threads: int) -> dict[str, Any]:
    """What this machine multiplies now, see `matmul.py`."""
    env = dict(os.environ) | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
    done = subprocess.run(
        [sys.executable, str(HERE / "matmul.py")],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise UserError(f"matmul.py failed:\n{done.stderr[-_TAIL_CHARACTERS:]}")
    return dict(json.loads(done.stdout))
