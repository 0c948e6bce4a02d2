"""Child processes: what they are told, what they say, and when they end."""

import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st

from conf.entry import UserError
from reward import child

ROOT = Path(__file__).parents[2]
WAITING = "import os, pathlib, time\npathlib.Path({}).write_text(str(os.getpid())); time.sleep(60)"


@given(st.text(alphabet=st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc"])))
def test_any_text_reaches_the_child_as_it_is(text: str) -> None:
    (written,) = child.overrides({"key": text})
    value = OverridesParser.create().parse_override(written).value()
    assert getattr(value, "text", value) == text  # an empty one is no QuotedString


def test_values_keep_their_types_and_nested_keys_are_dotted() -> None:
    values = {"a": {"b": None, "c": 1e-5}, "n": 3, "is_it": True}
    read = [OverridesParser.create().parse_override(text) for text in child.overrides(values)]
    assert {item.key_or_group: item.value() for item in read} == {
        "a.b": None, "a.c": 1e-5, "n": 3, "is_it": True
    }  # fmt: skip


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run the given code as a module in a child."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def start(code: str, looks: list[int] | None = None) -> None:
        (tmp_path / "a_child.py").write_text(code)
        looked: list[int] = [] if looks is None else looks
        child.run("a_child", [], "it failed", 0.05, lambda: looked.append(1))

    return start


def test_what_it_says_is_passed_on(run: Any, capfd: pytest.CaptureFixture[str]) -> None:
    looks: list[int] = []
    run("import sys, time; print('out'); print('err', file=sys.stderr); time.sleep(0.3)", looks)
    assert capfd.readouterr() == ("out\n", "err\n")
    assert looks


@pytest.mark.parametrize(
    ("code", "message", "said"),
    [
        (
            "import sys; print('warning', file=sys.stderr); sys.exit('error: no file\\n  x: 1 → 2') ",
            "it failed: no file\n  x: 1 → 2",
            "warning\n",
        ),
        ("raise SystemExit(3)", "it failed: python -m a_child failed with exit code 3", ""),
        ("import os; os.kill(os.getpid(), 9)", "was ended by SIGKILL (out of memory", ""),
        ("import os; os.kill(os.getpid(), 15)", "was ended by SIGTERM", ""),
    ],
)
def test_a_failure_is_one_message(
    run: Any, capfd: pytest.CaptureFixture[str], code: str, message: str, said: str
) -> None:
    with pytest.raises(UserError) as caught:
        run(code)
    assert message in str(caught.value)
    assert capfd.readouterr().err == said


def test_an_interrupt_ends_the_child(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pid = tmp_path / "pid"

    def stop() -> None:
        if pid.exists() and pid.read_text():
            raise KeyboardInterrupt

    (tmp_path / "a_child.py").write_text(WAITING.format(repr(str(pid))))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    with pytest.raises(KeyboardInterrupt):
        child.run("a_child", [], "it failed", 0.05, stop)
    assert not Path(f"/proc/{pid.read_text()}").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_it_does_not_outlive_its_parent(tmp_path: Path) -> None:
    pid = tmp_path / "pid"
    (tmp_path / "a_child.py").write_text(WAITING.format(repr(str(pid))))
    code = "from reward import child; child.run('a_child', [], 'it failed', 1, lambda: None)"
    parent = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, env={**os.environ, "PYTHONPATH": str(tmp_path)}
    )
    while not (pid.exists() and pid.read_text()):
        assert parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    process = Path(f"/proc/{pid.read_text()}")
    deadline = time.monotonic() + 10
    while process.exists() and "(zombie)" not in (process / "status").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
