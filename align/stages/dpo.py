"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), with TRL's DPOTrainer."""

from align.artifact import Job
from align.stages.common import run_stage
from align.stages.probe import watched


def run(job: Job) -> None:
    """Prefer chosen over rejected. The reference is the model that the stage starts from."""
    from trl import DPOConfig, DPOTrainer

    with watched(job) as callbacks:
        run_stage(job, DPOConfig, DPOTrainer, task_type="CAUSAL_LM", callbacks=callbacks)
