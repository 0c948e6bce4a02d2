"""What a program in the sandbox can reach, use and leave behind; and what an answer can forge."""

import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import psutil
import pytest

from conf.entry import UserError
from reward import sandbox
from reward.sandbox import Limits, Run, judge, run

ROOT = Path(__file__).parents[2]


def _missing() -> str | None:
    if (bwrap := shutil.which("bwrap")) is None:
        return "bubblewrap is not installed"
    return sandbox._problem(bwrap)


_MISSING = _missing()
contained = pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING))


@pytest.fixture(autouse=True)
def _allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(sandbox.SWITCH, "1")


def printed(source: str, **limits: float) -> str:
    """What a program prints; it ends by itself."""
    done = run(textwrap.dedent(source), limits=Limits(**limits))  # type: ignore[arg-type]
    assert done.code == 0, done
    return done.output.decode().strip()


def descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


OTHERS: set[psutil.Process] = set()  # those of earlier tests, such as the ones that verifiers keep


@pytest.fixture(autouse=True, scope="module")
def _others() -> None:
    OTHERS.update(descendants())


def survivors(seconds: float = 5) -> set[psutil.Process]:
    """Descendants of this process that do not go away."""
    deadline = time.monotonic() + seconds
    while (left := descendants() - OTHERS) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


class TestRefusal:
    def test_without_the_switch_nothing_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for value in (None, "0", "true"):
            if value is None:
                monkeypatch.delenv(sandbox.SWITCH)
            else:
                monkeypatch.setenv(sandbox.SWITCH, value)
            for attempt in (lambda: run("print(1)"), lambda: judge("f = len", ["f([])"])):
                with pytest.raises(UserError, match="set HF_ALLOW_CODE_EVAL=1"):
                    attempt()

    def test_without_bubblewrap_nothing_runs(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("PATH", "")
        with pytest.raises(UserError, match=r"reward needs bubblewrap .*apt-get install"):
            sandbox.check("reward")
        with pytest.raises(UserError, match="bubblewrap"):
            run("print(1)")

    def test_a_bubblewrap_that_cannot_make_namespaces(
        self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
    ) -> None:
        broken = tmp_path / "bwrap"
        broken.write_text(
            "#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n"
        )
        broken.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}")
        with pytest.raises(UserError, match="No permissions to create new namespace"):
            sandbox.check("here")

    def test_a_failure_may_pass(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runs = [OSError(24, "Too many open files"), Run(b"", 1), Run(b"42\n", 0)]

        def first(*_: object) -> Run:
            found = runs.pop(0)
            if isinstance(found, OSError):
                raise found
            return found

        monkeypatch.setattr(sandbox, "_run", first)
        monkeypatch.setattr(sandbox, "_sound", set())
        assert "Too many open files" in str(sandbox._problem("bwrap"))
        assert "a first program ended" in str(sandbox._problem("bwrap"))
        assert sandbox._problem("bwrap") is None
        assert sandbox._problem("bwrap") is None  # not tried again

    def test_other_systems(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(sys, "platform", "darwin")
        with pytest.raises(UserError, match="only on Linux"):
            sandbox.check("here")


@contained
class TestReach:
    def test_no_network(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.settimeout(0.2)
            port = server.getsockname()[1]
            assert (
                printed(f"""
                import socket
                for family in (socket.AF_INET, socket.AF_INET6, socket.AF_UNIX, socket.AF_NETLINK, 40):
                    try:
                        with socket.socket(family) as end:
                            end.connect(("127.0.0.1", {port}))
                        print("reached", family)
                    except OSError:
                        pass
                """)
                == ""
            )
            with pytest.raises(TimeoutError):
                server.accept()

    def test_no_network_even_without_the_filter(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The namespace holds by itself: it has no interface but a loopback of its own."""
        allow_all = b"\x06\0\0\0" + (0x7FFF0000).to_bytes(4, "little")
        monkeypatch.setattr(sandbox.seccomp, "program", lambda: allow_all)
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
            assert printed(f"""
                import socket
                print([name for _, name in socket.if_nameindex()])
                for host in ("127.0.0.1", "1.1.1.1"):
                    print(socket.socket().connect_ex((host, {port})) != 0)
                """).splitlines() == ["['lo']", "True", "True"]

    def test_no_files_but_libraries(self, tmp_path: Path) -> None:
        (tmp_path / "secret.txt").write_text("secret")
        hidden = [Path.home() / ".ssh", Path.home() / ".cache", ROOT, ROOT / "outputs", tmp_path]
        hidden += map(
            Path, ["/etc/passwd", "/etc/shadow", "/proc", "/sys", "/home", "/var", "/run"]
        )
        hidden += map(Path, ["/usr/bin/sh", "/bin/sh", "/usr/src", "/opt", "/etc/hostname"])
        assert printed(f"""
            import os
            print([path for path in {list(map(str, hidden))} if os.path.lexists(path)])
            found = []
            for folder, folders, names in os.walk("/"):
                folders[:] = [name for name in folders if not name.startswith("lib")]
                found += [name for name in names if not name.startswith("python3")]
            print(sorted(found))
            """).splitlines() == [
            "[]",
            "['inside.py', 'ld.so.cache', 'null', 'random', 'urandom', 'zero']",
        ]

    def test_no_packages(self) -> None:
        assert (
            printed("""
            import sys
            for folder in ("site-packages", "dist-packages"):
                sys.path += [f"{path}/{folder}" for path in sys.path]
            for name in ("pip", "setuptools", "torch", "numpy", "reward"):
                try:
                    __import__(name)
                    print(name)
                except ImportError:
                    pass
            """)
            == ""
        )

    def test_no_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        seen = printed("import os; print(dict(os.environ))")
        assert set(eval(seen)) <= {"PATH", "LANG", "HOME", "PWD", "LC_CTYPE"}

    def test_no_file_descriptors(self, tmp_path: Path) -> None:
        with (tmp_path / "open.txt").open("w") as file:
            os.set_inheritable(file.fileno(), True)
            assert (
                printed("""
                import os
                found = []
                for fd in range(3, 1024):
                    try:
                        os.fstat(fd)
                        found.append(fd)
                    except OSError:
                        pass
                print(found)
                """)
                == "[]"
            )

    def test_links_lead_nowhere(self) -> None:
        assert (
            printed("""
            import os
            os.symlink("/../../../../etc/passwd", "link")
            os.symlink("/", "root")
            for path in ("link", "root/etc/shadow", "/proc/self/root/etc/passwd", "/proc/1/environ",
                         "/dev/fd/0", "/dev/mem", "/dev/sda", "/dev/kmsg", "../../../etc/passwd"):
                try:
                    open(path)
                    print(path)
                except OSError:
                    pass
            """)
            == ""
        )

    def test_no_way_out_through_the_kernel(self) -> None:
        """Each call fails with EPERM (1), clone3 with ENOSYS (38), whatever the user's rights are."""
        assert (
            printed("""
            import ctypes, os, platform
            libc = ctypes.CDLL(None, use_errno=True)
            names = ["fork", "clone", "clone3", "unshare", "setns", "mount", "chroot", "ptrace", "bpf", "keyctl"]
            numbers = {"x86_64": [57, 56, 435, 272, 308, 165, 161, 101, 321, 250],
                       "aarch64": [None, 220, 435, 97, 268, 40, 51, 117, 280, 219]}[platform.machine()]
            for name, number in zip(names, numbers):
                if number is not None and libc.syscall(number, 0x10000000, 0, 0, 0, 0) != -1:
                    print("allowed", name)
                elif number is not None:
                    expected = 38 if name == "clone3" else 1
                    assert ctypes.get_errno() == expected, (name, ctypes.get_errno())
            for path in ("/new", "/dev/new", "/usr/lib/new", "/inside.py", "/etc/new"):
                try:
                    open(path, "w")
                    print("wrote", path)
                except OSError:
                    pass
            """)
            == ""
        )

    def test_no_process_outside_can_be_killed(self) -> None:
        assert (
            printed("""
            import os
            for pid in (os.getppid(), 1, -1):
                try:
                    os.kill(pid, 9)
                except OSError:
                    pass
            print("alive", os.getppid())
            """)
            == "alive 1"
        )
        with pytest.raises(AssertionError, match="code=137"):
            printed("import os; os.killpg(0, 9)")


@contained
class TestLimits:
    def test_processes(self) -> None:
        assert printed("""
            import multiprocessing, os, subprocess
            for attempt in (os.fork, lambda: subprocess.run(["/inside.py"]), lambda: os.system("true"),
                            multiprocessing.Process(target=print).start):
                try:
                    print(attempt())
                except OSError as error:
                    print(error.errno)
            """).splitlines() == ["1", "1", str(127 << 8), "1"]

    def test_threads_work_and_a_bomb_of_them_ends(self) -> None:
        assert (
            printed("""
            import threading
            threading.stack_size(1 << 25)
            thread = threading.Thread(target=print, args=("ran",))
            thread.start(); thread.join()
            """)
            == "ran"
        )
        bomb = """
            import threading, time, os
            threading.stack_size(1 << 20)
            started = 0
            try:
                while True:
                    threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
                    started += 1
            except (RuntimeError, MemoryError):
                os.write(1, str(started).encode())
                os._exit(0)
            """
        assert 10 < int(printed(bomb, memory=512, seconds=30)) < 512

    def test_memory(self) -> None:
        assert (
            printed(
                """
            import mmap, os
            for attempt in (lambda: bytearray(300 << 20), lambda: mmap.mmap(-1, 300 << 20),
                            lambda: os.memfd_create("more")):
                try:
                    attempt()
                    print("got it")
                except (MemoryError, OSError):
                    pass
            """,
                memory=256,
            )
            == ""
        )

    @pytest.mark.parametrize(
        "source",
        ["while True: pass", "import time; time.sleep(60)", "import signal\nsignal.pause()"],
    )
    def test_time(self, source: str) -> None:
        started = time.monotonic()
        assert run(source, limits=Limits(seconds=0.5)) == Run(b"", None)
        assert time.monotonic() - started < 30
        assert survivors() == set()

    def test_output(self) -> None:
        done = run("while True: print('x' * (1 << 20))", limits=Limits(output=2, seconds=30))
        assert (done.code, len(done.output)) == (None, 2 << 20)
        flood = "import sys\nfor _ in range(300): sys.stderr.write('x' * (1 << 20))\nprint('end')"
        assert run(flood, limits=Limits(seconds=30)) == Run(b"end\n", 0)

    def test_files(self) -> None:
        assert (
            printed(
                """
            def fill(name, size):
                try:
                    with open(name, "wb") as file:
                        for _ in range(size):
                            file.write(bytes(1 << 20))
                    return True
                except OSError:
                    return False
            print(fill("fits", 3), fill("too_big", 9), [fill(str(n), 3) for n in range(5)].count(False) > 0)
            """,
                disk=8,
            )
            == "True False True"
        )

    def test_nothing_is_left_behind(self) -> None:
        threads = "import threading, time\nthreading.Thread(target=time.sleep, args=(60,)).start()"
        assert run(threads, limits=Limits(seconds=0.5)).code is None
        assert run("import os; os.write(1, b'x'); os._exit(7)") == Run(b"x", 7)
        assert run("open('kept', 'w').write('x')").code == 0
        assert printed("import os; print(os.listdir())") == "[]"
        assert survivors() == set()

    def test_the_sandbox_ends_with_its_parent(self) -> None:
        program = "from reward import sandbox\nsandbox.run('import time; time.sleep(60)')"
        parent = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT)
        deadline = time.monotonic() + 20
        inner: list[psutil.Process] = []
        while len(inner) < 3 and time.monotonic() < deadline:  # bwrap, its first process, Python
            inner = psutil.Process(parent.pid).children(recursive=True)
            time.sleep(0.02)
        assert len(inner) == 3
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert psutil.wait_procs(inner, timeout=10)[1] == []

    @pytest.mark.parametrize(
        "source",
        ["\0", "print(1)\0", "\ud800", "x = '\udfff'", "(" * 100_000, "x = " + "9" * 1_000_000,
         "#" * 1_000_000 + "\n1/0", "def f(:", "raise BaseException", "import os; os.abort()", "\ufeff1/0",
         "class E(Exception):\n def __str__(s): import os; os._exit(0)\nraise E"],
    )  # fmt: skip
    def test_hostile_source(self, source: str) -> None:
        done = run(source)
        assert done.code != 0 or done.output == b""
        assert judge(source, ["assert f(1) == 2"]) in ([False], [])


_CHEATS = {
    "leaves at once": "import sys; sys.exit(0)",
    "leaves later": "import sys\ndef f(x): sys.exit(0)",
    "leaves for good": "import os; os._exit(0)",
    "leaves for good later": "import os\ndef f(x): os._exit(0)",
    "writes verdicts": """
        import os
        for fd in range(64):
            try: os.write(fd, b"1" * 99)
            except OSError: pass
        print("1" * 99, "." * 99)
        def f(x): return 0""",
    "equals everything": """
        class Any:
            def __eq__(self, other): return True
            def __ne__(self, other): return False
            __lt__ = __le__ = __sub__ = __rsub__ = __contains__ = __eq__
            def __abs__(self): return 0
            def __hash__(self): return 0
        def f(x): return Any()""",
    "a number that equals everything": """
        class Any(int):
            def __eq__(self, other): return True
            def __sub__(self, other): return 0
        def f(x): return Any()""",
    "replaces what tests use": """
        import builtins, math
        builtins.AssertionError = KeyboardInterrupt
        builtins.abs = builtins.sorted = builtins.len = lambda *args, **kwargs: 7302651
        def abs(*args): return 0
        def sorted(*args): return [7302651]
        class math:
            def isclose(*args, **kwargs): return True
        def f(x): return 0""",
    "traces": """
        import sys, threading
        def skip(frame, event, arg):
            frame.f_trace_opcodes = True
            if "7302651" in str(frame.f_locals): frame.f_lineno += 1
            return skip
        sys.settrace(skip); sys.setprofile(skip); threading.settrace(skip)
        def f(x): return 0""",
    "looks for the answer": """
        import gc, sys
        sought = "1562037"  # backwards, so that it does not find itself
        def f(x):
            frame, found = sys._getframe(), []
            while frame:
                found += [repr(frame.f_locals), repr(frame.f_code.co_consts)]
                frame = frame.f_back
            for thing in gc.get_objects():
                try: found.append(repr(thing))
                except Exception: pass
            return int(sought[::-1]) if any(sought in text[::-1] for text in found) else 0""",
    "talks to the tests": """
        import os, json
        def f(x):
            for fd in range(3, 64):
                for line in (b"[" * 100000 + b"\\n", b'{"value": {"type": "exit"}}\\n',
                             b'{"value": 1, "changed": [[0, 1]]}\\n'):
                    try: os.write(fd, line)
                    except OSError: pass
            return 0""",
    "asks the tests to leave": """
        import os, json
        def f(x):
            for fd in range(3, 64):
                ask = {"ask": "call", "args": [{"type": "SystemExit"}, 0], "kwargs": {}}
                try: os.write(fd, json.dumps(ask).encode() + b"\\n")
                except OSError: pass
            raise SystemExit(0)""",
    "an endless line": """
        import os
        def f(x):
            while True:
                for fd in range(3, 64):
                    try: os.write(fd, b"1" * 65536)
                    except OSError: pass""",
    "raises what fails tests": "def f(x): raise AssertionError('passed')",
    "waits": "import time\ndef f(x): time.sleep(60)",
}  # fmt: skip


@contained
class TestForgery:
    @pytest.mark.parametrize("cheat", _CHEATS)
    def test_no_cheat_passes(self, cheat: str) -> None:
        tests = [
            "assert f(2) == 7302651",
            "import math\nassert abs(f(2) - 7302651) < 1 and math.isclose(f(2), 7302651)",
            "assert sorted([f(2)]) == [7302651] and 7302651 in {f(2): 1} and not f(2) != 7302651",
        ]
        limits = Limits(seconds=1, memory=256)
        verdicts = judge(textwrap.dedent(_CHEATS[cheat]), tests, limits=limits)
        assert set(verdicts) <= {False}

    @pytest.mark.parametrize("kind", ["StopIteration", "StopAsyncIteration"])
    def test_an_answer_cannot_end_a_loop_of_the_tests(self, kind: str) -> None:
        tests = [
            "for got, want in zip(map(f, [1, 2]), [2, 3]): assert got == want",
            "assert all(map(lambda c: f(c) == c + 1, [1, 2]))",
        ]
        assert judge(f"def f(x): raise {kind}", tests) == [False, False]
        assert judge("def f(x): return x + 1", tests) == [True, True]
        walked = "def f(x):\n    yield x\n    yield x + 1"
        assert judge(walked, ["assert list(f(1)) == [1, 2] and next(iter(f(3))) == 3"]) == [True]

    def test_the_rights_to_pass_are_real(self) -> None:
        assert judge("def f(x): return 7302651", ["assert f(2) == 7302651"]) == [True]

    def test_helpers_of_the_row_cannot_be_replaced(self) -> None:
        """HumanEval/32 checks a root with `poly`, which its prompt defines."""
        prelude = "def poly(x): return x - 3\ndef find_zero(): pass"
        test = "def check(candidate):\n    assert poly(candidate()) == 0"
        cheat = "def poly(x): return 0\ndef find_zero(): return 1"
        honest = "def find_zero(): return 3"
        assert judge(cheat, [test], prelude=prelude, entry="find_zero") == [False]
        assert judge(honest, [test], prelude=prelude, entry="find_zero") == [True]


@contained
class TestConversation:
    """What answers may do as if the tests were beside them."""

    @pytest.mark.parametrize(
        ("source", "test"),
        [
            ("def f(x): return x", "for v in (None, True, -0.5, 10**5000, 'é\\ud800\\0', b'\\xff', 2j, range(3),"
             " (1, (2,)), [[]], {1, 2}, frozenset(), {(1, 2): [3]}): assert f(v) == v and type(f(v)) is type(v)"),
            ("def f(): return float('nan')", "assert f() != f()"),
            ("def f(): return float('-inf')", "assert f() == -float('inf')"),
            ("from fractions import Fraction as F\ndef f(x): return F(1, 3) + x",
             "from fractions import Fraction\nassert f(Fraction(2, 3)) == 1"),
            ("from decimal import Decimal\ndef f(): return Decimal('0.10')", "assert str(f()) == '0.10'"),
            ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
            ("def f(x): x.sort(); x.append(x[0])", "v = [2, 1]; f(v); assert v == [1, 2, 1]"),
            ("def f(x): x['b'] = x.pop('a')", "v = {'a': [1]}; f(v); assert v == {'b': [1]}"),
            ("def f(x, *, y): y.update(x); x.clear()", "v, w = [1], set(); f(x=v, y=w); assert (v, w) == ([], {1})"),
            ("def f(self, operation, remote, function): return operation",
             "assert f(self=0, operation=1, remote=2, function=3) == 1"),
            ("def f(n):\n for i in range(n): yield i", "assert list(f(3)) == [0, 1, 2]; assert next(f(1)) == 0"),
            ("def f(g, xs): return [g(x) for x in xs]", "assert f(lambda x: x * 2, iter([1, 2])) == [2, 4]"),
            ("def f(t, x): return isinstance(x, t)", "assert f(int, 1) and not f(str, 1)"),
            ("def f(x): raise ValueError('no')", "try: f(1)\nexcept ValueError as e: assert str(e) == 'no'\nelse: 1/0"),
            ("class E(KeyError): pass\ndef f(): raise E", "try: f()\nexcept LookupError: pass\nelse: 1/0"),
            ("def f(k): raise KeyError(k)",
             "for k in ('x', 3, (1, [2])):\n try: f(k)\n except KeyError as e: assert e.args == (k,)\n else: 1/0"),
            ("class E(ValueError):\n def __str__(s): return f'code {s.args[0]}'\ndef f(): raise E(3)",
             "try: f()\nexcept ValueError as e: assert str(e) == 'code 3'\nelse: 1/0"),
            ("class A:\n def __str__(s): return 'an A'\ndef f(): raise ValueError(A())",
             "try: f()\nexcept ValueError as e: assert str(e) == 'an A'\nelse: 1/0"),
            ("def f(v): v.append(v); raise ValueError(v)", "try: f([])\nexcept ValueError: pass\nelse: 1/0"),
            ("def f(b): return b.decode()",
             "try: f(b'a\\xff')\nexcept UnicodeDecodeError as e: assert e.start == 1\nelse: 1/0"),
            ("class Stack:\n def __init__(s): s.v = []\n def push(s, x): s.v.append(x); return s\n"
             " def pop(s): return s.v.pop()",
             "s = Stack(); assert s.push(1).push(2).pop() == 2; assert s.v == [1]"),
            ("class Node:\n def __init__(s, v, n=None): s.v, s.n = v, n\ndef f(n): return n.v + (f(n.n) if n.n else 0)",
             "n = Node(1, Node(2)); assert f(n) == 3; n.n.v = 5; assert f(n) == 6"),
            ("class P:\n def __init__(s, x): s.x = x\n def __add__(s, o): return P(s.x + o.x)\n"
             " def __eq__(s, o): return s.x == o.x",
             "assert P(1) + P(2) == P(3); assert not P(1) == P(2)"),
            ("def sum(a, b): return a * b", "assert sum(2, 5) == 10"),
            ("import math\ndef f(x): return x / 3", "assert math.isclose(f(1), 1 / 3)"),
            ("def copy(x): return x + x", "assert copy([1]) == [1, 1]"),
            ("from dataclasses import dataclass\n@dataclass\nclass A:\n x: 'int'\ndef f(): return A(3).x",
             "assert f() == 3"),
            ("def f(): return 1\nif __name__ == '__main__': 1/0", "assert f() == 1"),
            ("def f(): return 1", "import unittest\nclass T(unittest.TestCase):\n def test(s): s.assertEqual(f(), 1)"),
            ("def f(): return 1", "import unittest\nclass T(unittest.TestCase):\n def test(s): s.assertEqual(f(), 1)\n"
             "if __name__ == '__main__': unittest.main()"),
            ("def f(): return 1", "def test_f(): assert f() == 1"),
        ],
    )  # fmt: skip
    def test_right_answers_pass(self, source: str, test: str) -> None:
        assert judge(source, [test]) == [True]

    @pytest.mark.parametrize(
        "test",
        ["import unittest\nclass T(unittest.TestCase):\n def test(s): s.assertEqual(f(), 2)",
         "import unittest\nclass T(unittest.TestCase):\n def test(s): s.assertEqual(f(), 2)\nunittest.main()",
         "def test_f(): assert f() == 2", "assert g() == 1", "f(1)"],
    )  # fmt: skip
    def test_wrong_answers_fail(self, test: str) -> None:
        assert judge("def f(): return 1", [test]) == [False]

    @pytest.mark.parametrize(
        "test",
        ["import unittest\nclass T(unittest.TestCase):\n def test(s): s.assertEqual(g(), 1)",
         "import unittest\nclass T(unittest.TestCase):\n def test(s): s.assertEqual(g(), 1)\nunittest.main()",
         "import unittest\nclass T(unittest.TestCase):\n value = G\n def test(s): pass",
         "try:\n x = g(1)\nexcept Exception:\n x = None\nassert x == 1",
         "def run(n):\n try: return [g(m) for m in range(n)]\n except NameError: pass\nassert run(1)"],
    )  # fmt: skip
    def test_an_answer_without_the_function_fails(self, test: str) -> None:
        """Also where the test, or unittest, catches the NameError."""
        assert judge("def f(): return 1", [test]) == [False]

    @pytest.mark.parametrize(
        "test",
        ["assert 1 == 2", "import json, absent\nassert f", "x = 1\ndef h(y): return [x + y + z for z in y]\nassert 0",
         "def h():\n global a\n a = 1\nassert not a if h() else 0", "class A:\n b = 1\n c = b\nassert not __name__"],
    )  # fmt: skip
    def test_a_test_that_fails_by_itself_says_nothing(self, test: str) -> None:
        """All that it names is its own, a built-in, or the answer's."""
        assert judge("def f(): return 1", [test], prelude="import math") == [None]

    @pytest.mark.parametrize(
        "test",
        ["assert True", "def helper(): f()", "import absent_package", "class A: pass\nf(A())", "assert 1 =="],
    )  # fmt: skip
    def test_a_test_that_says_nothing_of_the_answer(self, test: str) -> None:
        assert judge("def f(*args): return 1", [test]) == [None]

    def test_what_takes_too_long_is_counted(self) -> None:
        before = sandbox.stopped.total()
        slow = "import time\ndef f(x): time.sleep(9)"
        assert judge(slow, ["f(1)"], limits=Limits(seconds=0.5)) == []
        assert run("while True: pass", limits=Limits(seconds=0.5)).code is None
        assert sandbox.stopped.total() == before + 2

    def test_verdicts_end_where_the_answer_does(self) -> None:
        source = "import os\ndef f(x): return x if x < 2 else os._exit(0)"
        tests = [f"assert f({n}) == {n}" for n in range(4)]
        assert judge(source, tests) == [True, True]
