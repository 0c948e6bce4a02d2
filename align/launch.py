"""Start a process (group) for a piece of work, show its progress, keep its log, end it with its parent."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

from conf.entry import UserError
from conf.schema import Launch, LaunchKind
from reward.child import die_with_parent

_PROGRESS = re.compile(rb"\d+%\|")  # a tqdm bar
# Of lines; a bar has none of its own, so what is written next stands right behind it.
_END = re.compile(rb"[\r\n]+|(?<=it/s\])(?=[^\r\n])|(?<=s/it\])(?=[^\r\n])")
_TAIL_LINES = 15
_GRACE_SECONDS = 10
_QUIET_SECONDS = 30  # between progress lines when stderr is no terminal
# Tensors come and go: their memory is kept and used again, and comes from the kernel in huge pages. By default every
# tensor above 32 MiB is given back at once and cleared again for the next one. Other C libraries do not look here.
_MALLOC = f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_max=0:glibc.malloc.trim_threshold={1 << 40}"

# What the system says, and torch.save, which does not ask it.
_FULL_DISK = ("No space left on device", "inline_container.cc")

_Show = Callable[[str, bool], None]  # a line, and whether it stays


def command(module: str, arguments: list[str], launch: Launch | None = None) -> list[str]:
    """The command line that runs `python -m module arguments`, through torchrun where the launch says so."""
    if launch is None or launch.kind is LaunchKind.inline:
        return [sys.executable, "-m", module, *arguments]
    rendezvous = (
        ["--standalone"]
        if launch.nnodes == 1
        else [
            "--rdzv-backend=c10d",
            f"--rdzv-endpoint={launch.rdzv_endpoint}",
            f"--node-rank={launch.node_rank}",
        ]
    )
    return [
        *(sys.executable, "-m", "torch.distributed.run"),
        f"--nnodes={launch.nnodes}",
        f"--nproc-per-node={launch.nproc_per_node}",
        *rendezvous,
        *launch.extra,
        *("-m", module),
        *arguments,
    ]


def environment(processes: int = 1) -> dict[str, str]:
    """The environment of a worker: passive OpenMP waits, cores shared out, and DeepSpeed told about a CPU machine.

    One process gets one GPU: where it saw several, TRL would cut the model into a piece for each.

    Memory of tensors comes in huge pages, see `_MALLOC`.
    """
    env = dict(os.environ)
    # Spinning OpenMP threads take the cores that the other processes need: six times slower when shared.
    env.setdefault("OMP_WAIT_POLICY", "passive")
    env.setdefault("GLIBC_TUNABLES", _MALLOC)
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("TRL_DISABLE_TELEMETRY", "1")
    env.setdefault("PYTHONUNBUFFERED", "1")
    env.pop("HYDRA_FULL_ERROR", None)
    if processes > 1:
        env.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // processes)))
    else:
        env["CUDA_VISIBLE_DEVICES"] = env.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if shutil.which("nvidia-smi") is None:
        env.setdefault("DS_ACCELERATOR", "cpu")
    return env


def run(
    argv: list[str],
    label: str,
    log: Path,
    processes: int = 1,
    watch: Callable[[], None] = lambda: None,
    kept: Callable[[], str] = lambda: "nothing was kept of it",
) -> None:
    """Run `argv` to its end in a process group of its own.

    What it prints goes to the log; shown are bars, and once each the lines that begin with `warning: ` or the label.

    Args:
        argv: the command line.
        label: what the progress line is called.
        log: file that receives everything the process prints.
        processes: how many share this machine's cores.
        watch: called a few times a second while the process runs.
        kept: what a failure leaves, for its message.

    Raises:
        UserError: when it fails, with its last lines and the log's name.
    """
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file, _progress(label) as show:
        process = subprocess.Popen(
            argv,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment(processes),
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        tail: deque[str] = deque(maxlen=_TAIL_LINES)
        told: list[
            str
        ] = []  # what the worker says of a user's mistake; torchrun writes much after it
        reader = threading.Thread(
            target=_read,
            args=(process, file, tail, told, show, ("warning: ", f"{label}: ")),
            daemon=True,
        )
        reader.start()
        try:
            while process.poll() is None:
                watch()
                time.sleep(0.2)
        except BaseException:
            _end(process)
            raise
        reader.join(timeout=_GRACE_SECONDS)
        assert process.stdout is not None
        process.stdout.close()
        watch()
    if process.returncode:
        raise UserError(_failure(label, process.returncode, list(tail), told, log, kept()))


def _read(
    process: "subprocess.Popen[bytes]",
    file: BinaryIO,
    tail: deque[str],
    told: list[str],
    show: _Show,
    shown: tuple[str, ...],
) -> None:
    """Copy output to the log; show tqdm bars, and once each the lines that begin so; remember all but bars."""
    assert process.stdout is not None
    rest, said = b"", set[str]()
    while chunk := os.read(process.stdout.fileno(), 1 << 16):
        with contextlib.suppress(
            OSError
        ):  # a full disk must not stop the reading, or the worker hangs
            file.write(chunk)
            file.flush()
        *lines, rest = _END.split(rest + chunk)
        for line in lines:
            text = line.decode("utf-8", "replace").strip()
            if _PROGRESS.search(line):
                show(text, False)
            elif text:
                tail.append(text)
                if text.startswith("error: "):
                    told.append(text.removeprefix("error: "))
                elif text.startswith(shown) and text not in said:
                    said.add(text)
                    show(text, True)
    if text := rest.decode("utf-8", "replace").strip():
        tail.append(text)


def _failure(label: str, code: int, tail: list[str], told: list[str], log: Path, kept: str) -> str:
    """One message: the worker's own `error:` line if it gave one, else its last lines."""
    if told:
        return f"{label}: {told[-1]} (log: {log})"
    if any(said in line for line in tail for said in _FULL_DISK):
        return f"{label}: the disk is full: free some space or set paths.root to another disk (log: {log})"
    why = (
        f"was ended by {signal.Signals(-code).name}"
        if code < 0
        else f"failed with exit code {code}"
    )
    if code == -signal.SIGKILL:
        why += " (out of memory, or ended by hand)"
    shown = "\n".join(f"    {line}" for line in tail)
    return f"{label} {why}; {kept}. The end of {log}:\n{shown}"


def _end(process: "subprocess.Popen[bytes]") -> None:
    """End the process group: politely first."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    try:
        process.wait(_GRACE_SECONDS)
    except (subprocess.TimeoutExpired, KeyboardInterrupt):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@contextlib.contextmanager
def _progress(label: str) -> Iterator[_Show]:
    """A function that shows a line: one of progress in place on a terminal, now and then elsewhere; one that stays."""
    is_terminal = sys.stderr.isatty()
    started = last = time.monotonic()

    clear = "\r\x1b[K" if is_terminal else ""

    def show(text: str, stays: bool) -> None:
        nonlocal last
        if stays:
            line = f"{label:10} {text.removeprefix(f'{label}: ')}"
            print(clear + line, file=sys.stderr, flush=True)
        elif is_terminal:
            width = shutil.get_terminal_size().columns
            print(clear + f"{label:10} {text}"[: width - 1], end="", file=sys.stderr, flush=True)
        elif time.monotonic() - last >= _QUIET_SECONDS:
            last = time.monotonic()
            print(f"{label:10} {text}", file=sys.stderr, flush=True)

    print(f"{label:10} …", end="" if is_terminal else "\n", file=sys.stderr, flush=True)
    try:
        yield show
    finally:
        print(f"{clear}{label:10} {time.monotonic() - started:.0f} s", file=sys.stderr, flush=True)
