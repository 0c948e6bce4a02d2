"""What a reward model is worth on its stage's held-out pairs: `python -m reward.report`, once for each content."""

from pathlib import Path
from typing import Any

from align import launch
from align.artifact import Job
from evals.rated import main_figures
from reward.child import overrides
from reward.classifier import identity
from reward.store import build_once, content_key, source_key
from reward.versions import Version

_REWARD = Path(__file__).parent.parent / "reward"


def rate(job: Job, root: Path, log: Path) -> Path | None:
    """The folder of the report on a reward model, made unless it is there.

    Args:
        job: the finished stage that trained it.
        root: `paths.root`.
        log: file for what the report's process prints.

    Returns:
        None where the stage makes no reward model or has no held-out pairs.
    """
    if job.stage != "rm" or job.eval_data is None:
        return None
    data = job.eval_data
    key = content_key(
        {
            "model": identity(str(job.out), cache=root / "cache"),
            "data": Version.load(data).fingerprint,
            "code": source_key(_REWARD),
        }
    )

    def build(partial: Path) -> dict[str, Any]:
        made = partial / "report"  # of its own: it may keep a manifest there, as this folder does
        paths = {"model.path": job.out, "data.source": data, "out": made, "paths.root": root}
        kept = "the reward model is kept, and the same command continues"
        arguments = overrides({key: str(path) for key, path in paths.items()})
        argv = launch.command("reward.report", arguments)
        launch.run(argv, "rm report", log, kept=lambda: kept)
        return {"key": key, "model": job.out.name, "data": data.name} | main_figures(made)

    return build_once(root / "rewards" / f"rm-{key}", build) / "report"
