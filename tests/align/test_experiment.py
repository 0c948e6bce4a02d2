"""The whole program on a tiny random model: train, evaluate, report; reuse; failures that leave nothing behind."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from reward.store import is_complete

ROOT = Path(__file__).parents[2]


NO_EVALUATION = (
    "~evaluation.suites.json",
    "~evaluation.suites.forgetting",
    "~evaluation.suites.heldout",
    "evaluation.quantizers=[]",
)
_SMALL_SUITES = (
    "evaluation.suites.json.limit=4",
    "evaluation.suites.forgetting.tasks=[piqa]",
    "evaluation.suites.forgetting.limit=4",
    "evaluation.suites.heldout.limit=2",
)


def arguments(model: Path, root: Path, *more: str) -> list[str]:
    return [
        *(sys.executable, "-m", "align", "+experiment=demo"),
        f"model.path={model}",
        f"paths.root={root}",
        "sft.data.limit=16",
        "dpo.data.limit=16",
        "sft.args.max_length=512",
        "dpo.args.max_length=512",
        "evaluation.quantizers=[int8]",
        *(() if NO_EVALUATION[0] in more else _SMALL_SUITES),
        *more,
    ]


def run(model: Path, root: Path, *more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        arguments(model, root, *more),
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        env={**os.environ},
    )


def test_demo_end_to_end_then_a_sweep_that_shares_its_stages(
    tiny_model: Path, tmp_path: Path
) -> None:
    done = run(tiny_model, tmp_path)
    assert done.returncode == 0, done.stderr
    page = Path(done.stdout.splitlines()[-1])
    assert page.name == "index.html"
    text = page.read_text(encoding="utf-8")
    assert "demo_json" in text
    (arm,) = (page.parent / "arms").glob("*.html")
    assert "piqa" in arm.read_text("utf-8")
    (record,) = (tmp_path / "runs" / "demo").glob("*/run.json")
    assert (record.parent / "stages/dpo/metrics.jsonl").read_text("utf-8").startswith('{"step": ')
    assert "model-index:" in (record.parent / "MODEL_CARD.md").read_text("utf-8")
    run_record = json.loads(record.read_text(encoding="utf-8"))
    assert [stage["stage"] for stage in run_record["stages"]] == ["sft", "dpo"]
    assert run_record["policies"] == ["base", "sft", "dpo"]
    assert len(run_record["evaluations"]) == 12  # three policies and one quantized, on three suites
    for artifact in (tmp_path / "artifacts").glob("[sd]*"):
        assert is_complete(artifact)
    sft_metrics = next((tmp_path / "artifacts").glob("sft-*")) / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in sft_metrics.read_text().splitlines()][:2] == [1, 2]

    # Another arm: SFT and the evaluations of base and SFT are found, DPO is trained.
    before = {path.name for path in (tmp_path / "artifacts").glob("[sd]*")}
    evaluated = {path.name for path in (tmp_path / "evals").glob("[jfh]*")}
    done = run(tiny_model, tmp_path, "-m", "dpo.args.beta=0.1,0.5")
    assert done.returncode == 0, done.stderr
    new = {path.name for path in (tmp_path / "artifacts").glob("[sd]*")} - before
    assert [name.split("-")[0] for name in new] == ["dpo"]
    assert len({path.name for path in (tmp_path / "evals").glob("[jfh]*")} - evaluated) == 6
    rows = json.loads(
        (tmp_path / "report" / "demo" / "leaderboard.json").read_text(encoding="utf-8")
    )
    assert len(json.dumps(rows).split('"name"')) >= 3

    # The record is of what was made, whatever another content of the same name left there.
    made = run_record["made_of"]
    record.write_text(json.dumps(run_record | {"made_of": "other", "stages": []}))

    # Nothing to do: no stage runs, nothing heavy loads.
    started = time.monotonic()
    done = run(tiny_model, tmp_path)
    assert done.returncode == 0, done.stderr
    assert "sft        done" in done.stdout
    assert "evaluate   0 of 12 to do" in done.stdout
    assert time.monotonic() - started < 20
    again = json.loads(record.read_text(encoding="utf-8"))
    assert (again["made_of"], len(again["stages"])) == (made, 2)


def test_a_failed_stage_shows_why_and_leaves_no_artifact(tiny_model: Path, tmp_path: Path) -> None:
    # Only the optimizer knows that this is no learning rate.
    done = run(tiny_model, tmp_path / "root", "sft.args.learning_rate=-1")
    assert done.returncode == 2
    assert "sft failed with exit code 1; nothing was kept of it" in done.stderr
    assert "Invalid learning rate: -1" in done.stderr
    assert "Traceback (most recent call last):\n" not in done.stderr.split("error: ")[0]
    left = [path.name for path in (tmp_path / "root" / "artifacts").iterdir() if path.is_dir()]
    assert left == []


def test_ctrl_c_ends_everything_and_leaves_no_artifact(tiny_model: Path, tmp_path: Path) -> None:
    process = subprocess.Popen(
        arguments(tiny_model, tmp_path, "sft.args.num_train_epochs=1000"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        start_new_session=True,
        # A shell starts background jobs with SIGINT ignored, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = None
    for _ in range(300):
        time.sleep(0.2)
        log = next(tmp_path.glob("runs/demo/*/logs/sft.log"), None)
        if log and "1/" in log.read_text(errors="replace"):
            break
    assert log is not None
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command continues" in stderr
    assert "Traceback" not in stderr
    assert [path for path in (tmp_path / "artifacts").iterdir() if path.is_dir()] == []
    assert not _processes_naming(str(tmp_path)), "a worker outlived its parent"


@pytest.mark.skipif(sys.platform != "linux", reason="prctl is Linux's")
def test_kill_9_leaves_no_worker_and_the_next_run_continues(
    tiny_model: Path, tmp_path: Path
) -> None:
    process = subprocess.Popen(
        arguments(tiny_model, tmp_path, "sft.args.max_steps=100000"),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        cwd=ROOT,
    )
    for _ in range(300):
        time.sleep(0.2)
        if any(tmp_path.glob("artifacts/.sft-*.partial/metrics.jsonl")):
            break
    process.kill()
    process.wait()
    for _ in range(50):
        if not _processes_naming(str(tmp_path)):
            break
        time.sleep(0.1)
    assert not _processes_naming(str(tmp_path)), "a worker outlived its parent"
    done = run(tiny_model, tmp_path, "stages=[sft]", *NO_EVALUATION)
    assert done.returncode == 0, done.stderr


def _processes_naming(text: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if text in command and "align.worker" in command:
            found.append(command)
    return found


def test_two_machines_train_one_artifact(tiny_model: Path, tmp_path: Path) -> None:
    """The same command on two machines, here two process groups on one, over a shared folder."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    machines = [
        subprocess.Popen(
            arguments(
                tiny_model,
                tmp_path,
                "stages=[sft]",
                *NO_EVALUATION,
                "launch=torchrun",
                "launch.nnodes=2",
                f"launch.node_rank={rank}",
                f"launch.rdzv_endpoint=127.0.0.1:{port}",
                "sft.args.per_device_train_batch_size=4",
            ),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for rank in (0, 1)
    ]
    for machine in machines:
        _, stderr = machine.communicate(timeout=240)
        assert machine.returncode == 0, stderr
    (artifact,) = (path for path in (tmp_path / "artifacts").iterdir() if path.is_dir())
    assert is_complete(artifact)
    steps = [json.loads(line) for line in (artifact / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in row for row in steps) == 2  # 16 rows in steps of 2 × 4


def test_a_probe_is_recorded_beside_the_run(tiny_model: Path, tmp_path: Path) -> None:
    """Its looks lie in the run's folder, its finding in the record, the last lines and the page."""
    done = run(
        tiny_model,
        tmp_path,
        *NO_EVALUATION,
        "+probe=demo",
        "stages=[dpo]",
        "probe.proxy.terms.length.kind=exact",
        "probe.proxy.terms.length.weight=-1.0",
        "~probe.proxy.terms.length.args.min_chars",
        "probe.prompts.limit=6",
        "probe.max_new_tokens=4",
    )
    assert done.returncode == 0, done.stderr
    (record,) = (tmp_path / "runs" / "demo").glob("*/run.json")
    looks = record.parent / "stages/dpo/overoptimization.jsonl"
    steps = [json.loads(line)["step"] for line in looks.read_text("utf-8").splitlines()]
    assert steps == [0, 4]
    (stage,) = json.loads(record.read_text("utf-8"))["stages"]
    assert stage["overoptimization"]["verdict"] == "not known"
    assert "dpo        not known: From step 0 to step 4" in done.stdout
    (arm,) = (tmp_path / "report" / "demo" / "arms").glob("*.html")
    assert 'id="overoptimization"' in arm.read_text("utf-8")
    assert "step 0 " in (record.parent / "logs" / "dpo.log").read_text("utf-8")


def test_what_ppo_did_is_on_the_terminal_in_the_record_and_on_the_page(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The tiny model never ends a response in two tokens, which is an alarm."""
    command = [
        *(sys.executable, "-m", "align", "+experiment=ppo_smollm2", "stages=[ppo]"),
        *(f"model.path={tiny_model}", f"paths.root={tmp_path}", "~evaluation.suites.json"),
        *("ppo.data.limit=8", "ppo.args.num_rollouts=2", "ppo.args.rollout_batch_size=4"),
        *("ppo.args.num_mini_batches=1", "ppo.args.max_new_tokens=2", "ppo.args.bf16=false"),
        *("ppo.args.critic_warmup_steps=0", "ppo.args.max_prompt_length=240"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr
    said = [" ".join(line.split()) for line in done.stderr.splitlines()]
    assert sum(line.startswith("ppo 1 prompts are left out") for line in said) == 1
    assert sum(line.startswith("ppo warning: ppo, step 0: only 0%") for line in said) == 1
    (record,) = (tmp_path / "runs").glob("*/*/run.json")
    log = record.parent / "logs/ppo.log"
    assert f"warning: alarm/few_ended: {log} says what went wrong" in done.stdout
    (stage,) = json.loads(record.read_text("utf-8"))["stages"]
    assert stage["metrics"]["response/length_mean"] == 2
    assert '"objective/kl"' in (record.parent / "MODEL_CARD.md").read_text("utf-8")
    samples = record.parent / "stages/ppo/samples.jsonl"
    rows = [json.loads(line) for line in samples.read_text("utf-8").splitlines()]
    (arm,) = (tmp_path / "report/ppo_smollm2/arms").glob("*.html")
    text = arm.read_text("utf-8")
    assert f"KL {stage['metrics']['objective/kl']:.3g} nats a response, 2 tokens a response" in text
    assert "warning: few_ended at step 0" in text
    assert "what it wrote in its first rollout and in its last" in text
    assert [row["rollout"] for row in rows] == [0] * 4 + [1] * 4
