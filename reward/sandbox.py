"""Programs that nobody has read, run by bubblewrap where they can reach nothing. See docs/sandbox.md."""

import contextlib
import fcntl
import json
import math
import os
import platform
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any

from conf.entry import UserError
from reward import seccomp

SWITCH = "HF_ALLOW_CODE_EVAL"  # that of the `evaluate` library's code_eval, which lm-eval obeys too
_DOC = "docs/sandbox.md"
_MIB = 1 << 20

stopped: Counter[str] = (
    Counter()
)  # what took too long, or printed too much, as in `verifiers.aside`
_lock = threading.Lock()
_sound: set[str] = set()  # bubblewraps that made a sandbox; what kept one from it may pass
_START = 60.0  # seconds that a sandbox may take to start on a busy machine
_THREADS = 128
_INSIDE = Path(__file__).with_name("inside.py")


@dataclass(frozen=True)
class Limits:
    """What a sandbox may use."""

    seconds: float = 10.0  # of wall clock for a program, or for each test
    memory: int = 1024  # MiB of address space
    disk: int = 64  # MiB in /tmp, the one place to write to, which is memory
    output: int = 4  # MiB of standard output; a program that prints more is ended


@dataclass(frozen=True)
class Run:
    """How a program ended."""

    output: bytes  # standard output, at most `Limits.output`
    # exit code, 128 + the signal that ended it; None: it was ended for its time or output
    code: int | None


def check(where: str) -> None:
    """Refuse to run code unless it was allowed and can be contained.

    Args:
        where: the place in the configuration that asks for it, for messages.

    Raises:
        UserError: with what to set or install.
    """
    if os.environ.get(SWITCH) != "1":
        raise UserError(
            f"{where} runs programs that a model wrote, which is off until you allow it: set {SWITCH}=1 in the"
            f" environment (not in a configuration). They run in a sandbox only; {_DOC} says what it keeps from them"
        )
    if sys.platform != "linux" or platform.machine() not in seccomp.MACHINES:
        raise UserError(
            f"{where} runs programs that a model wrote, for which there is a sandbox only on Linux on"
            f" {' and '.join(seccomp.MACHINES)}, not on {sys.platform} on {platform.machine()}: run it there"
        )
    if (bwrap := shutil.which("bwrap")) is None:
        raise UserError(
            f"{where} needs bubblewrap (bwrap) to contain the programs that a model wrote, and nothing runs without"
            " it: install it (apt-get install bubblewrap, or dnf install bubblewrap)"
        )
    if found := _problem(bwrap):
        raise UserError(
            f"{where} cannot contain programs: bubblewrap is there, but {found}. It needs version 0.7 or newer and the"
            " right to make user namespaces: in a container run it with --security-opt seccomp=unconfined, elsewhere"
            f" see sysctl user.max_user_namespaces and kernel.apparmor_restrict_unprivileged_userns ({_DOC})"
        )


def run(source: str, stdin: str = "", limits: Limits | None = None) -> Run:
    """Run a Python program on a standard input.

    Raises:
        UserError: when code is not allowed or the sandbox cannot start.
    """
    check("a program")
    found = _run(_bwrap(), source, stdin, limits or Limits())
    if found.code is None:
        _gave_up("a program")
    return found


def judge(
    source: str,
    tests: Sequence[str],
    *,
    prelude: str = "",
    entry: str | None = None,
    limits: Limits | None = None,
) -> list[bool | None]:
    """Run test programs against the functions of an answer, in two sandboxes that exchange data alone.

    Args:
        source: the answer's code.
        tests: programs that use its names; a failed assertion, or any exception, is a failed test.
        prelude: code that runs before each test, whose names the answer cannot replace.
        entry: the function to hand to `check(candidate)`, where a test defines one.

    Returns:
        A verdict for each test that came to an end, in order. None: the test never looked at the answer, or hands it
        what cannot leave the tests. Shorter than `tests` when one took too long or the answer's process ended.

    Raises:
        UserError: when code is not allowed or the sandbox cannot start.
    """
    check("a test")
    limits = limits or Limits()
    ours, theirs = socket.socketpair()
    with contextlib.ExitStack() as stack:
        stack.enter_context(ours)
        stack.enter_context(theirs)
        verdicts, out = (stack.enter_context(end) for end in _pipe())
        common: dict[str, Any] = {"limits": _rlimits(limits, len(tests))}
        answer = common | {"role": "answer", "source": source, "fd": theirs.fileno()}
        trial = common | {"role": "tests", "fd": ours.fileno(), "out": out.fileno()}
        trial |= {"tests": list(tests), "prelude": prelude, "entry": entry}
        processes = [
            stack.enter_context(_process(_bwrap(), answer, limits, [theirs.fileno()])),
            stack.enter_context(_process(_bwrap(), trial, limits, [ours.fileno(), out.fileno()])),
        ]
        for end in (ours, theirs, out):
            end.close()  # or nobody would see another end
        _await_start(processes, verdicts)
        found = b""
        while len(found) < len(tests):
            deadline = time.monotonic() + limits.seconds
            if not (more := _read(verdicts.fileno(), deadline)):
                if time.monotonic() >= deadline:
                    _gave_up("a test")
                break
            found += more
    return [{b"1": True, b"0": False}.get(bytes([verdict])) for verdict in found[: len(tests)]]


def _gave_up(what: str) -> None:
    with _lock:  # answers are judged in threads
        stopped[what] += 1


def _run(bwrap: str, source: str, stdin: str, limits: Limits) -> Run:
    with contextlib.ExitStack() as stack:
        ready, out = (stack.enter_context(end) for end in _pipe())
        task = {"role": "program", "source": source, "out": out.fileno()}
        task |= {"limits": _rlimits(limits, 1)}
        given = stack.enter_context(_sealed(stdin.encode("utf-8", "surrogatepass")))
        process = stack.enter_context(
            _process(bwrap, task, limits, [out.fileno()], stdin=given, stdout=subprocess.PIPE)
        )
        out.close()
        _await_start([process], ready)
        deadline = time.monotonic() + limits.seconds
        assert process.stdout is not None
        output = b""
        while more := _read(process.stdout.fileno(), deadline):
            output += more
            if len(output) > limits.output * _MIB:
                return Run(output[: limits.output * _MIB], None)
        try:
            return Run(output, process.wait(max(deadline - time.monotonic(), 0)))
        except subprocess.TimeoutExpired:
            return Run(output, None)


@contextlib.contextmanager
def _process(
    bwrap: str, task: dict[str, Any], limits: Limits, fds: list[int], **streams: int
) -> Iterator[subprocess.Popen[bytes]]:
    """A sandbox at work; at the end it and all in it are killed."""
    with _sealed(json.dumps(task).encode()) as text, _sealed(seccomp.program()) as rules:
        standard = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL} | streams
        process: subprocess.Popen[bytes] = subprocess.Popen(
            [bwrap, "--seccomp", str(rules), *_walls(limits), *_python(), str(text)],
            stderr=subprocess.PIPE,
            pass_fds=[text, rules, *fds],
            env={},
            cwd="/",
            start_new_session=True,
            stdin=standard["stdin"],
            stdout=standard["stdout"],
        )
    with process:
        try:
            yield process
        finally:
            _kill(process)


def _walls(limits: Limits) -> list[str]:
    """What bubblewrap shows of the machine: system libraries and the interpreter, read-only."""
    base = Path(sys.base_prefix).resolve()
    libraries = [Path(path) for path in ("/usr/lib", "/usr/lib64", "/lib", "/lib64")]
    shown = dict.fromkeys(
        path for path in [*libraries, base / "lib", base / "lib64"] if path.is_dir()
    )
    standard = Path(sysconfig.get_path("stdlib"))
    hidden = [standard / "site-packages", standard / "dist-packages"]
    hidden += [Path("/usr/lib/python3/dist-packages")]
    walls = ["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session", "--clearenv"]
    walls += ["--uid", "65534", "--gid", "65534", "--hostname", "sandbox"]
    for name, value in {"PATH": "/usr/bin", "LANG": "C.UTF-8", "HOME": "/tmp"}.items():
        walls += ["--setenv", name, value]
    for path in shown:
        walls += ["--ro-bind", str(path), str(path)]
    for path in hidden:
        if path.is_dir():
            walls += ["--size", "4096", "--tmpfs", str(path), "--remount-ro", str(path)]
    executable = os.path.realpath(sys.executable)
    walls += ["--ro-bind", executable, executable, "--ro-bind", str(_INSIDE), "/inside.py"]
    walls += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    for name in ("null", "zero", "random", "urandom"):
        walls += ["--dev-bind", f"/dev/{name}", f"/dev/{name}"]
    # Without /proc and /sys: nothing there is needed, and much of it has been a way out.
    walls += ["--size", str(limits.disk * _MIB), "--tmpfs", "/tmp", "--chdir", "/tmp"]
    return [*walls, "--remount-ro", "/"]  # what is not mounted is a file system in memory too


def _python() -> list[str]:
    return [os.path.realpath(sys.executable), "-I", "-S", "/inside.py"]


def _rlimits(limits: Limits, tests: int) -> dict[str, int]:
    found = {
        "RLIMIT_CPU": math.ceil(limits.seconds * tests) + 1,
        "RLIMIT_AS": limits.memory * _MIB,
        "RLIMIT_FSIZE": limits.disk * _MIB,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
        "RLIMIT_MEMLOCK": 0,
    }
    # Before Linux 5.14 all processes of the user counted, not only those of the user namespace.
    version = tuple(int(part) for part in re.findall(r"\d+", platform.release())[:2])
    return found | ({"RLIMIT_NPROC": _THREADS} if version >= (5, 14) else {})


def _bwrap() -> str:
    return shutil.which("bwrap") or "bwrap"


def _problem(bwrap: str) -> str | None:
    """Why a sandbox cannot be made, found by making one; None when it can."""
    if bwrap in _sound:
        return None
    try:
        done = _run(bwrap, "print(6 * 7)", "", Limits())
    except (UserError, OSError) as error:
        return str(error)
    if done != Run(b"42\n", 0):
        return f"a first program ended with {done}"
    _sound.add(bwrap)
    return None


def _await_start(processes: list[subprocess.Popen[bytes]], ready: FileIO) -> None:
    if _read(ready.fileno(), time.monotonic() + _START, 1) == b".":
        return
    said = []
    for process in processes:
        _kill(process)
        assert process.stderr is not None
        said += process.stderr.read(4096).decode(errors="replace").strip().splitlines()[-1:]
    raise UserError(f"a sandbox did not start: {'; '.join(said) or 'it said nothing'}")


def _kill(process: subprocess.Popen[bytes]) -> None:
    # With it the sandbox's first process is killed, and with that one every other (PID namespace).
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _read(fd: int, deadline: float, size: int = 1 << 16) -> bytes:
    """What there is to read; nothing at the end of the file or at the deadline."""
    poll = select.poll()  # select() knows no file descriptor above 1024
    poll.register(fd, select.POLLIN)
    left = max(deadline - time.monotonic(), 0)
    return os.read(fd, size) if poll.poll(left * 1000) else b""


def _pipe() -> tuple[FileIO, FileIO]:
    """The end to read from and the end to write to."""
    reading, writing = os.pipe()
    return FileIO(reading, "rb"), FileIO(writing, "wb")


@contextlib.contextmanager
def _sealed(content: bytes) -> Iterator[int]:
    """A file in memory that nobody can change any more."""
    fd = os.memfd_create("sandbox", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        view = memoryview(content)
        while view:
            view = view[os.write(fd, view) :]
        os.lseek(fd, 0, os.SEEK_SET)
        seals = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
        yield fd
    finally:
        os.close(fd)
