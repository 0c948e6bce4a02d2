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
from reward.looks import LOOKS

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
    return max(found, key=lambda place: int(place.name.rpartition("-")[2]), default=None)


def arguments(job: Job) -> dict[str, Any]:
    """What a trainer is told of checkpoints, where the user did not."""
    return {
        "output_dir": str(folder_of(job)),
        "save_strategy": "no",  # the clock says when
        "save_total_limit": _KEPT,
    }


def resume(job: Job, is_first: bool) -> Path | None:
    """Put the logs back as they were at the last complete checkpoint; without one, begin anew.

    Args:
        job: to go on with.
        is_first: whether this process is the one that writes.

    Returns:
        The checkpoint.
    """
    found = latest(job)
    if not is_first:
        return found
    if found is None:
        shutil.rmtree(folder_of(job), ignore_errors=True)
        return None
    for log in (found / _LOGS).iterdir():
        shutil.copyfile(log, job.out / log.name)
    print(f"going on from step {found.name.rpartition('-')[2]}", flush=True)
    return found


def keeper(job: Job) -> Any:
    """A trainer callback that asks for a checkpoint every `job.checkpoint_minutes`, and completes each."""
    from accelerate.utils import broadcast_object_list
    from transformers import TrainerCallback

    class Keeper(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def __init__(self) -> None:
            self._last = time.monotonic()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            seconds = 60 * job.checkpoint_minutes
            is_time = bool(seconds) and time.monotonic() - self._last >= seconds
            if args.world_size > 1:  # all processes save, or none
                said = [is_time]
                broadcast_object_list(said)
                is_time = said[0]
            if is_time and state.global_step < state.max_steps:
                control.should_save = True

        def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self._last = time.monotonic()
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
    os.replace(partial, checkpoint / _LOGS)
