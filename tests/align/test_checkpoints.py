"""A stage that is killed goes on from its last complete checkpoint, to the same bits."""

import json
import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from align import launch
from align.artifact import METRICS, SAMPLES, Job, Manifest
from align.stages.checkpoints import arguments, latest, resume
from conf.schema import Data, Launch, LaunchKind, Model, Peft, Probe, Reward, Source, Term
from reward.data import prepare
from reward.looks import LOOKS
from reward.store import content_key, fingerprint

LORA = Peft("lora", {"r": 4, "lora_alpha": 8, "lora_dropout": 0.1, "target_modules": "all-linear"})
BRIEF = Reward({"brief": Term("length", 1.0, {"max_chars": 1})})
WATCHED = Probe(Source("demo:held_out", limit=2), BRIEF, BRIEF, steps=3, max_new_tokens=4)
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 2,
    "learning_rate": 1e-3,
    "max_length": 512,
    "max_steps": 8,
    "logging_steps": 1,
    "seed": 0,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "bf16": False,
}
PPO: dict[str, Any] = {
    name: value for name, value in COMMON.items() if name not in ("max_length", "max_steps")
} | {"num_rollouts": 3, "rollout_batch_size": 4, "num_ppo_epochs": 3, "max_new_tokens": 6}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sft": ("demo:demonstrations", COMMON, {"peft": LORA}),
    "dpo": ("demo:preferences", COMMON, {"probe": WATCHED}),
    "rm": ("demo:preferences", COMMON, {}),
    "ppo": ("demo:prompts", PPO, {"peft": LORA, "reward": BRIEF}),
}


def job_of(stage: str, model: Path, folder: Path) -> Job:
    from align.plan import STAGES

    source, args, further = CASES[stage]
    rows = prepare(Data(source=source, limit=12), STAGES[stage].data, folder / "outputs").folder
    whole: dict[str, Any] = {
        "peft": Peft(), "eval_data": None, "deepspeed": None, "parents": {"base": "0"},
    }  # fmt: skip
    return Job(
        stage=stage,
        key=content_key([stage]),
        model=Model(path=str(model)),
        data=rows,
        args=args,
        out=folder / "unbroken" / "out",
        cache=folder / "cache",
        **whole | further,
    )


def begun(job: Job, spec: Path, processes: int) -> "subprocess.Popen[bytes]":
    """The job's own process, or processes, in a group of its own."""
    job.out.mkdir(parents=True)
    spec.write_text(json.dumps(job.to_json(job.out)))
    kind = LaunchKind.inline if processes == 1 else LaunchKind.torchrun
    argv = launch.command("align.worker", [str(spec)], Launch(kind, processes))
    environment = launch.environment(processes)
    return subprocess.Popen(argv, env=environment, start_new_session=True)


def rows_of(file: Path) -> list[dict[str, Any]]:
    """A log without what depends on the clock."""
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    # TRL counts tokens from where it went on.
    clocks = ("time/", "perf/", "train_", "eval_runtime", "eval_s", "total_flos", "num_tokens")
    return [
        {name: x for name, x in row.items() if not name.startswith(clocks)}
        for row in rows
        if "train_runtime" not in row
    ]


@pytest.mark.parametrize(("stage", "processes"), [*((stage, 1) for stage in CASES), ("ppo", 2)])
def test_a_killed_stage_ends_in_the_same_bits(
    stage: str, processes: int, tiny_model: Path, tmp_path: Path
) -> None:
    unbroken = job_of(stage, tiny_model, tmp_path)
    killed = replace(unbroken, out=tmp_path / "killed" / "out", checkpoint_minutes=1e-6)
    first = begun(killed, tmp_path / "job.json", processes)
    while latest(killed) is None and first.poll() is None:
        time.sleep(0.005)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    checkpoint = latest(killed)
    assert checkpoint is not None
    assert not (killed.out / "manifest.json").exists()
    (checkpoint.parent / "checkpoint-99").mkdir()  # half written: it is not looked at
    killed.out.rename(tmp_path / "rest")  # a stage begins with an empty folder
    again = [
        begun(killed, tmp_path / "job.json", processes),
        begun(unbroken, tmp_path / "unbroken.json", processes),
    ]
    assert [process.wait(300) for process in again] == [0, 0]
    for name in (METRICS, LOOKS, SAMPLES):
        assert (killed.out / name).is_file() == (unbroken.out / name).is_file()
        if (unbroken.out / name).is_file():
            assert rows_of(killed.out / name) == rows_of(unbroken.out / name)
    weights = sorted(path.relative_to(unbroken.out) for path in unbroken.out.rglob("*.safetensors"))
    assert weights
    for path in weights:
        assert fingerprint(killed.out / path) == fingerprint(unbroken.out / path), path
    step = int(checkpoint.name.rpartition("-")[2])
    assert Manifest.load(killed.out).metrics["resumed_from_step"] == step
    assert "resumed_from_step" not in Manifest.load(unbroken.out).metrics


def test_processes_that_are_restarted_begin_their_logs_anew(
    tiny_model: Path, tmp_path: Path
) -> None:
    from align.run import _Tail

    job = job_of("sft", tiny_model, tmp_path)
    job.out.mkdir(parents=True)
    log = job.out / METRICS
    log.write_text("".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(9)))
    rows = _Tail(log)
    assert len(rows.new()) == 9
    assert resume(job) is None
    assert not log.exists()
    assert rows.new() == []
    log.write_text(json.dumps({"step": 1, "note": "x" * 999}) + "\n")  # longer than what was read
    assert [row["step"] for row in rows.new()] == [1]
    assert rows.new() == []


def test_the_best_checkpoint_is_saved_when_it_is_evaluated(
    tiny_model: Path, tmp_path: Path
) -> None:
    job = job_of("dpo", tiny_model, tmp_path)
    plain = arguments(job)
    assert plain["save_strategy"] == "no"
    best = {"load_best_model_at_end": True, "eval_strategy": "steps"}
    timed = arguments(replace(job, args=job.args | best | {"eval_steps": 30}))
    assert (timed["save_strategy"], timed["save_steps"]) == ("steps", 30)
    assert arguments(replace(job, args=job.args | best))["save_steps"] == 1  # as it logs
    own = arguments(replace(job, args=job.args | best | {"save_strategy": "epoch"}))
    assert own["save_strategy"] == "epoch"
