"""With offline=true nothing leaves the machine: every attempt of every process is recorded, and there are none."""

import http.server
import ipaddress
import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from reward import network

ROOT = Path(__file__).parents[2]
# Installed by Python itself at the start of each process below, before any of the project's code.
RECORDER = """
import json, os, sys
EVENTS = {"socket.connect", "socket.sendto", "socket.sendmsg", "socket.getaddrinfo", "socket.gethostbyname",
          "socket.gethostbyaddr"}
def record(event, arguments):
    if event in EVENTS:
        about = arguments[0] if event.startswith("socket.get") else arguments[1]
        if isinstance(about, tuple):
            about = about[0]
        if isinstance(about, bytes):
            about = about.decode("utf-8", "replace")
        line = json.dumps([os.getpid(), event, about]) + "\\n"
        with open(os.environ["RECORD"], "a") as file:
            file.write(line)
sys.addaudithook(record)
"""


def run(
    tmp_path: Path, *argv: str, offline: bool = True, **environment: str
) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """A command in an environment that by itself forbids nothing, and the hosts that its processes asked for."""
    (tmp_path / "site").mkdir(exist_ok=True)
    (tmp_path / "site" / "sitecustomize.py").write_text(RECORDER)
    record = tmp_path / "record.jsonl"
    record.unlink(missing_ok=True)
    switches = ("HF_", "TRANSFORMERS_", "WANDB_", "TRL_", "NLTK_")
    env = {name: value for name, value in os.environ.items() if not name.startswith(switches)}
    env |= {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "RECORD": str(record)}
    env |= {"HF_HOME": str(tmp_path / "hf"), "WANDB_API_KEY": "0" * 40} | environment
    more = ["offline=true"] if offline else []
    done = subprocess.run(
        [sys.executable, *argv, *more],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=env,
        check=False,
    )
    lines = record.read_text().splitlines() if record.exists() else []
    return done, [host for _, _, host in map(json.loads, lines) if leaves(host)]


def leaves(host: str | None) -> bool:
    if not host or host.startswith(("/", "\0")) or host in ("localhost", socket.gethostname()):
        return False
    try:
        return not ipaddress.ip_address(host).is_loopback
    except ValueError:
        return True


def test_the_recorder_sees_an_attempt(tmp_path: Path) -> None:
    code = "import urllib.request as u; u.urlopen('http://example.invalid/', timeout=1)"
    assert run(tmp_path, "-c", code, offline=False)[1] == ["example.invalid"]


def test_an_evaluation_connects_to_nothing(
    tiny_model: Path, tmp_path: Path, shared_data: Path
) -> None:
    """With IFEval's checks, which download NLTK's data when imported, and with W&B."""
    done, hosts = run(
        tmp_path,
        *("-m", "evals", f"model.path={tiny_model}", "suite=local", "suite.limit=2"),
        f"suite.include_path={shared_data / 'lm_eval_tasks'}",
        *("suite.tasks=[ifeval_local,hellaswag_local]", "suite.gen_kwargs.max_gen_toks=8"),
        *(f"paths.root={tmp_path / 'out'}", "track.wandb=true"),
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "W&B is off" not in done.stderr
    assert list((tmp_path / "out" / "wandb").glob("offline-run-*"))
    assert hosts == []


def test_an_experiment_connects_to_nothing(tiny_model: Path, tmp_path: Path) -> None:
    """Data, training, evaluation in a worker, tracking; torchrun's processes meet on the loopback."""
    done, hosts = run(
        tmp_path,
        *("-m", "align", "+experiment=demo", f"model.path={tiny_model}", "stages=[sft]"),
        *("sft.data.limit=16", "sft.args.max_length=512", "sft.args.max_steps=1"),
        *("~evaluation.suites.forgetting", "evaluation.suites.json.limit=2"),
        "evaluation.quantizers=[]",
        *(f"paths.root={tmp_path / 'out'}", "launch=torchrun", "launch.nproc_per_node=2"),
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (record,) = (tmp_path / "out").glob("runs/*/*/run.json")
    assert "offline" not in record.parent.name  # no arm of its own
    assert hosts == []


REFUSALS = {
    "connect": "import socket; socket.create_connection(('93.184.216.34', 80))",
    "name": "import socket; socket.getaddrinfo('huggingface.co', 443)",
    "datagram": "import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.sendto(b'x', ('10.0.0.1', 53))",
    "IPv6": "import socket; socket.socket(socket.AF_INET6).connect(('2606:2800:220:1::1', 80))",
    "library": "import requests; requests.get('https://huggingface.co', timeout=3)",
    "client": "import httpx; httpx.get('https://huggingface.co', timeout=3)",
}


@pytest.mark.parametrize("name", REFUSALS)
def test_an_attempt_is_refused_by_name(tmp_path: Path, name: str) -> None:
    code = (
        "from conf.entry import plainly\nfrom reward import network\nwith plainly():\n"
        "    network.close()\n    " + REFUSALS[name]
    )
    done, _ = run(tmp_path, "-c", code, offline=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: offline=true, but __main__ tried to reach ")
    assert "python -m evals.prefetch" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_loopback_stays_open(tmp_path: Path) -> None:
    code = (
        "import socket\nfrom reward import network\nnetwork.close()\n"
        "server = socket.create_server(('127.0.0.1', 0))\n"
        "socket.create_connection(('localhost', server.getsockname()[1]), timeout=5)\n"
        "first, second = socket.socketpair()\nfirst.send(b'x')\nassert second.recv(1) == b'x'\n"
    )
    done, hosts = run(tmp_path, "-c", code, offline=False)
    assert done.returncode == 0, done.stderr
    assert hosts == []


def prefetch(tmp_path: Path, *argv: str, offline: bool) -> subprocess.CompletedProcess[str]:
    return run(tmp_path, "-m", "evals.prefetch", *argv, offline=offline)[0]


def test_prefetch_lists_and_proves_what_is_there(
    tiny_model: Path, tmp_path: Path, shared_data: Path
) -> None:
    done = prefetch(
        tmp_path,
        *("suite=local", f"suite.include_path={shared_data / 'lm_eval_tasks'}"),
        *("suite.tasks=[piqa_local]", f"model.path={tiny_model}"),
        offline=False,
    )
    assert done.returncode == 0, done.stderr
    model, task, last = done.stdout.splitlines()
    assert model.startswith(f"model {tiny_model}")
    assert model.endswith(str(tiny_model))
    assert "task piqa_local" in task
    assert last == "ready offline"


@pytest.mark.parametrize(
    ("argv", "missing"),
    [
        (["suite=gsm8k"], "task 'gsm8k' cannot be loaded"),
        (["suite=demo_json", "model.path=nobody/nothing"], "nobody/nothing is not here"),
    ],
)
def test_prefetch_says_what_is_missing(tmp_path: Path, argv: list[str], missing: str) -> None:
    done = prefetch(tmp_path, *argv, offline=True)
    assert done.returncode == 2
    assert missing in done.stderr
    assert "ready" not in done.stdout
    assert "Traceback" not in done.stderr


def test_prefetch_without_a_hub_says_so_at_once(tmp_path: Path) -> None:
    """The address is asked for once, by this project; no client tries after it."""
    done, hosts = run(
        tmp_path,
        *("-m", "evals.prefetch", "suite=demo_json", "model.path=nobody/nothing"),
        offline=False,
        HF_ENDPOINT="http://hub.invalid",
        NO_PROXY="*",
    )
    assert done.returncode == 2
    assert hosts == ["hub.invalid"]
    notice, error = done.stderr.splitlines()
    assert notice.startswith("http://hub.invalid does not answer (")
    assert "nobody/nothing is not here" in error
    assert error.endswith("set HTTPS_PROXY or HF_ENDPOINT")


def test_a_hub_that_answers_with_an_error_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    assert network.hub_trouble() is None  # 501: the handler has no do_HEAD
    thread.join()
    server.server_close()
    assert "refused" in str(network.hub_trouble())


def test_ifeval_without_its_data_is_refused_before_anything_is_generated(
    tiny_model: Path, tmp_path: Path, shared_data: Path
) -> None:
    for file in (shared_data / "lm_eval_tasks").glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    task = tmp_path / "ifeval_local.yaml"
    task.write_text(
        task.read_text().replace("process_docs: !function local_tasks.ifeval_docs\n", "")
    )
    done, hosts = run(
        tmp_path,
        *("-m", "evals", f"model.path={tiny_model}", "suite=local", "suite.tasks=[ifeval_local]"),
        *(f"suite.include_path={tmp_path}", f"paths.root={tmp_path / 'out'}"),
        LOCAL_DATA_DIR=str(shared_data),
        NLTK_DATA=str(tmp_path / "empty"),
    )
    if done.returncode == 0:
        pytest.skip("NLTK's punkt_tab is installed for the whole machine")
    assert done.returncode == 2
    assert "needs NLTK's punkt_tab" in done.stderr
    assert hosts == []
