"""A reward model: Bradley–Terry on preference pairs, with TRL's RewardTrainer."""

from align.artifact import Job
from align.stages.common import run_stage


def run(job: Job) -> None:
    """Train a scalar head (and what `rm.peft` leaves trainable) to score chosen above rejected."""
    from trl import RewardConfig, RewardTrainer

    run_stage(job, RewardConfig, RewardTrainer, task_type="SEQ_CLS")
