"""Checkpoints of a stage: what was killed goes on from the last complete one when the same command is given again.

They are written by the clock, so a short stage writes none, and lie beside the artifact until it is there. The logs of
a stage are part of them: a run that went on has the log of one that was never interrupted.
"""

import os
import shutil
import time
from pathlib import Path
from typing import Any

from align.artifact import METRICS, SAMPLES, Job
from conf.passthrough import default_of
from reward.looks import LOOKS
from reward.store import settle

_LOGS = (
    "logs"  # a folder in a checkpoint that is made last: without it, the checkpoint is not complete
)
_KEPT = 2  # the last one may be half written when the process ends


def folder_of(job: Job) -> Path:
    """Where the checkpoints of a job lie, whatever process makes them."""
    return job.out.parent / f".{job.key}.checkpoints"


def latest(job: Job) -> Path | None:
    """The last complete checkpoint of a job."""
    found = [place for place in folder_of(job).glob("checkpoint-*") if (place / _LOGS).is_dir()]
    return max(found, key=step_of, default=None)


def arguments(job: Job) -> dict[str, Any]:
    """The user's arguments, with what a trainer is told of checkpoints."""
    return {
        "save_strategy": "no",  # the clock says when
        **(_with_evaluations(job) if job.args.get("load_best_model_at_end") else {}),
        **job.args,
        "output_dir": str(folder_of(job)),
        # The Trainer removes the oldest before the newest is complete.
        "save_total_limit": max(_KEPT, job.args.get("save_total_limit") or _KEPT),
    }


def _with_evaluations(job: Job) -> dict[str, Any]:
    """A checkpoint at every evaluation: the best one must be there to be loaded."""
    steps = job.args.get("eval_steps") or job.args.get("logging_steps")
    return {
        "save_strategy": job.args.get("eval_strategy", "no"),
        "save_steps": steps or default_of(job.stage, "logging_steps"),
    }


def resume(job: Job) -> Path | None:
    """The last complete checkpoint, with the logs put back as they were then; what is not complete is removed.

    The first process decides for all.
    """
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    said: list[str | None] = [None]
    if PartialState().is_main_process:
        found = latest(job)
        for place in folder_of(job).glob("*"):
            if place.is_dir() and not (place / _LOGS).is_dir():
                shutil.rmtree(place, ignore_errors=True)
        for name in (METRICS, LOOKS, SAMPLES):  # of processes that torchrun restarted
            (job.out / name).unlink(missing_ok=True)
        if found is None:
            shutil.rmtree(folder_of(job), ignore_errors=True)
        else:
            for log in (found / _LOGS).iterdir():
                shutil.copyfile(log, job.out / log.name)
            print(f"going on from step {step_of(found)}", flush=True)
            said = [str(found)]
    broadcast_object_list(said)
    return None if said[0] is None else Path(said[0])


def step_of(checkpoint: Path) -> int:
    """Optimizer steps before a checkpoint."""
    return int(checkpoint.name.rpartition("-")[2])


def keeper(job: Job) -> Any:
    """A trainer callback that asks for a checkpoint every `job.checkpoint_minutes`, and completes each."""
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def __init__(self) -> None:
            self._last = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = 60 * job.checkpoint_minutes
            is_time = bool(seconds) and time.monotonic() - self._last >= seconds
            # Else the clock would decide which of the evaluated steps can be the best one.
            is_time = is_time and not (args.load_best_model_at_end and control.should_evaluate)
            if args.world_size > 1:  # all processes save, or none
                said = [is_time]
                broadcast_object_list(said)
                is_time = said[0]
            if is_time and state.global_step < state.max_steps:
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._last = time.monotonic()
            PartialState().wait_for_everyone()  # each process writes a part
            if state.is_world_process_zero and not args.save_only_model:
                _complete(job, Path(args.output_dir) / f"checkpoint-{state.global_step}")

    return Keeper()


def _complete(job: Job, checkpoint: Path) -> None:
    """Copy the logs into a checkpoint; the folder appears at once."""
    partial = checkpoint / f"{_LOGS}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    for name in (METRICS, LOOKS, SAMPLES):
        if (job.out / name).is_file():
            shutil.copyfile(job.out / name, partial / name)
    shutil.rmtree(checkpoint / _LOGS, ignore_errors=True)  # of a step that is saved twice
    settle(checkpoint)
    os.replace(partial, checkpoint / _LOGS)
