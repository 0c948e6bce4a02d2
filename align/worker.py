"""The process of one training stage: `python -m align.worker JOB.json`."""

import importlib
import sys
from pathlib import Path

from align.artifact import Job
from align.plan import STAGES
from conf.entry import plainly
from reward import network
from reward.child import die_with_parent
from reward.store import read_json


def main() -> None:
    """Run the job's stage; exit code 2 and one message when the user can put the failure right."""
    die_with_parent()
    with plainly():
        network.inherit()
        job = Job.from_json(read_json(Path(sys.argv[1])))
        module, function = STAGES[job.stage].run.split(":")
        getattr(importlib.import_module(module), function)(job)
        _leave_group()


def _leave_group() -> None:
    """End together: a rank that exits while another still talks to it makes torchrun report a failure."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
