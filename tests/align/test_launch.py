"""A process that fails says what it leaves; the environment of a worker."""

import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from align import launch
from conf.entry import UserError


def failure(tmp_path: Path, code: str, **options: Callable[[], str]) -> str:
    with pytest.raises(UserError) as caught:
        launch.run([sys.executable, "-c", code], "evaluate", tmp_path / "log", **options)
    return str(caught.value)


def test_a_failure_says_what_is_kept_and_the_last_lines(tmp_path: Path) -> None:
    code = "print('so far'); raise SystemExit(3)"
    told = failure(tmp_path, code, kept=lambda: "the answers so far are kept")
    assert told.startswith("evaluate failed with exit code 3; the answers so far are kept. The end")
    assert told.endswith("    so far")
    assert "nothing was kept of it" in failure(tmp_path, code)
    torch_says = (
        "RuntimeError: [enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
    )
    assert "the disk is full" in failure(tmp_path, f"print({torch_says!r}); raise SystemExit(1)")


def test_an_error_behind_a_progress_bar_is_told(tmp_path: Path) -> None:
    """A bar ends without a newline, so that what is said next stands on its line."""
    code = (
        "import sys; sys.stderr.write('\\r  0%|          | 0/8 [00:00<?, ?it/s]error: it is too long\\n'"
        "'\\r 12%|#         | 1/8 [00:02<00:09,  1.3s/it]\\n'); sys.exit(2)"
    )
    assert failure(tmp_path, code).startswith("evaluate: it is too long (log: ")


def test_warnings_and_what_a_stage_says_of_itself_are_shown_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = (
        "print('ppo: 3 prompts are left out'); print('loading'); print('ppo_run: no'); print('a warning: no')\n"
        "for _ in range(3): print('warning: ppo, step 2: few responses end')"
    )
    launch.run([sys.executable, "-c", code], "ppo", tmp_path / "log")
    said = capsys.readouterr().err.splitlines()
    assert said[1:-1] == [
        "ppo        3 prompts are left out",
        "ppo        warning: ppo, step 2: few responses end",
    ]
    assert (tmp_path / "log").read_text().count("warning: ppo, step 2") == 3


_HUGE = """
block = b"x" * (64 << 20)
rows = open("/proc/self/smaps_rollup").read().splitlines()
print(int(next(row for row in rows if row.startswith("AnonHugePages")).split()[1]) // 1024)
"""
_KERNEL = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc"
    or "[madvise]" not in (_KERNEL.read_text() if _KERNEL.is_file() else ""),
    reason="huge pages are not asked for by glibc here, or not given when asked",
)
def test_a_workers_memory_comes_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    argv = [sys.executable, "-c", _HUGE]
    plain, huge = (
        int(subprocess.run(argv, env=env, capture_output=True, check=True).stdout)
        for env in (dict(os.environ), launch.environment())
    )
    assert plain < 10 < huge  # MiB


def test_settings_of_the_user_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    monkeypatch.setenv("OMP_WAIT_POLICY", "active")
    found = launch.environment()
    assert found["GLIBC_TUNABLES"] == "glibc.malloc.arena_max=2"
    assert found["OMP_WAIT_POLICY"] == "active"


@pytest.mark.parametrize(
    ("given", "one", "several"),
    [(None, "0", None), ("2,3", "2", "2,3"), ("GPU-a", "GPU-a", "GPU-a"), ("", "", "")],
)
def test_one_process_sees_one_gpu(
    given: str | None, one: str, several: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if given is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", given)
    assert launch.environment()["CUDA_VISIBLE_DEVICES"] == one
    assert launch.environment(2).get("CUDA_VISIBLE_DEVICES") == several
