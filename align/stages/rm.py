"""A reward model: Bradley–Terry on preference pairs, with TRL's RewardTrainer."""

from typing import Any

from align.artifact import Job
from align.stages import rescore
from align.stages.common import run_stage


def run(job: Job) -> None:
    """Train a scalar head (and what `rm.peft` leaves trainable) to score chosen above rejected.

    A start that is a reward model keeps its head; any other gets a new one. What was learned is written down for the
    check that follows: see `align.stages.rescore`.
    """
    from trl import RewardConfig

    from align.stages.trainers import SharedPrefixRewardTrainer

    def finish(trainer: Any) -> None:
        rescore.record(trainer, job.out)

    run_stage(job, RewardConfig, SharedPrefixRewardTrainer, task_type="SEQ_CLS", finish=finish)
