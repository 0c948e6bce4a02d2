"""Direct preference optimization (Rafailov et al. 2023, arXiv 2305.18290), with TRL's DPOTrainer."""

import functools

from align.artifact import Job
from align.stages.common import run_stage
from align.stages.probe import watched


def run(job: Job) -> None:
    """Prefer chosen over rejected. The reference is the model that the stage starts from."""
    from trl import DPOConfig

    from align.references import References
    from align.trainers import SharedPrefixDPOTrainer
    from evals.models import identity

    references = References(job.cache / "references", identity(job.model, job.cache))
    # DeepSpeed splits the model up, and a reference that follows the policy has to be asked anew.
    is_fixed = not job.deepspeed and not job.args.get("sync_ref_model")
    with watched(job) as callbacks:
        run_stage(
            job,
            DPOConfig,
            functools.partial(SharedPrefixDPOTrainer, references),
            task_type="CAUSAL_LM",
            defaults={"precompute_ref_log_probs": is_fixed},
            callbacks=callbacks,
        )
