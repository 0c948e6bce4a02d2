"""`python -m evals model.path=… suite=… [quant=…]`: evaluate one model on one suite."""

import shutil
from pathlib import Path

from conf.entry import entry
from conf.schema import Evals
from reward import network


@entry("evals", Evals)
def main(config: Evals, overrides: list[str]) -> float | None:
    """Evaluate, print a table, and leave `results.json` with one JSONL a task."""
    if config.offline:
        network.close()
    # Here, not above: --help and a config error must not wait for it.
    from evals.run import Request, check_request, evaluate
    from reward.quiet import quiet

    del overrides
    root = Path(config.paths.root)
    request = Request(
        config.model, config.quant, config.suite, config.reference, config.reference_quant
    )
    check_request(request)
    quiet()
    result = next(evaluate([request], root))
    folder = request.folder(root)
    if config.out:
        shutil.copytree(folder, config.out, dirs_exist_ok=True)
        folder = Path(config.out)
    if config.track.wandb:
        from evals.track import Tracker

        Tracker(config.track, "evals", root).evaluation(
            f"{config.suite.name}-{config.quant}", result
        )
    if result.skipped:
        print(f"skipped: {result.skipped}")
    for score in result.scores:
        mark = "*" if score.is_main else " "
        print(
            f"{mark} {score.task:24} {score.metric:16} {score.value:.4f} ± {score.stderr:.4f}  n={score.n}"
        )
    print(folder / "results.json")
    return next((score.value for score in result.scores if score.is_main), None)


if __name__ == "__main__":
    main()
