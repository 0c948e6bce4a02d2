"""Supervised fine-tuning on demonstrations, with TRL's SFTTrainer."""

from align.artifact import Job
from align.stages.common import run_stage


def run(job: Job) -> None:
    """Maximise the likelihood of the assistant's turns; the prompt carries no loss."""
    from trl import SFTConfig

    from align.stages.trainers import SharedPrefixSFTTrainer

    run_stage(job, SFTConfig, SharedPrefixSFTTrainer, task_type="CAUSAL_LM")
