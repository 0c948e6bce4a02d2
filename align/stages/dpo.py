"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), with TRL's DPOTrainer."""

import functools

from align.artifact import Job
from align.stages.common import run_stage
from align.stages.probe import watched


def run(job: Job) -> None:
    """Prefer chosen over rejected. The reference is the model that the stage starts from."""
    from trl import DPOConfig

    from align.stages.references import References
    from align.stages.trainers import SharedPrefixDPOTrainer
    from evals.models import identity

    references = References(job.cache / "references", identity(job.model, job.cache))
    with watched(job) as callbacks:
        run_stage(
            job,
            DPOConfig,
            functools.partial(SharedPrefixDPOTrainer, references),
            task_type="CAUSAL_LM",
            defaults={"precompute_ref_log_probs": _reads_every_pair(job)},
            callbacks=callbacks,
        )


def _reads_every_pair(job: Job) -> bool:
    """Whether a fixed reference is asked about all rows, so that asking before training costs no more."""
    if job.deepspeed or job.args.get("sync_ref_model"):  # split up; follows the policy
        return False
    return bool(job.args.get("max_steps", -1) <= 0 and job.args.get("num_train_epochs", 1) >= 1)
