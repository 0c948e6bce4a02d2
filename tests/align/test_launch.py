"""A process that fails says what it leaves."""

import sys
from pathlib import Path

import pytest

from align import launch
from conf.entry import UserError


def failure(tmp_path: Path, code: str, **options: str) -> str:
    with pytest.raises(UserError) as caught:
        launch.run([sys.executable, "-c", code], "evaluate", tmp_path / "log", **options)
    return str(caught.value)


def test_a_failure_says_what_is_kept_and_the_last_lines(tmp_path: Path) -> None:
    code = "print('so far'); raise SystemExit(3)"
    told = failure(tmp_path, code, kept="the answers so far are kept")
    assert told.startswith("evaluate failed with exit code 3; the answers so far are kept. The end")
    assert told.endswith("    so far")
    assert "nothing was kept of it" in failure(tmp_path, code)
