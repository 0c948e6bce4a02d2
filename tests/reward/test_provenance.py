"""Where a number comes from."""

import subprocess
from typing import Any

import pytest

from reward import provenance


def test_a_git_that_does_not_answer_leaves_the_commit_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def hang(*command: Any) -> None:
        raise subprocess.TimeoutExpired(command, 20)

    monkeypatch.setattr(provenance, "_git", hang)
    assert provenance.commit.__wrapped__() == {"commit": None, "dirty": None}
