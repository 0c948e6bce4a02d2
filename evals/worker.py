"""One process that answers a list of evaluation requests: `python -m evals.worker REQUESTS.json ROOT`."""

import sys
from pathlib import Path
from typing import Any

from conf.entry import built, plain, plainly
from conf.schema import Model, Suite
from evals.run import Request, evaluate
from reward import network
from reward.quiet import quiet
from reward.store import read_json


def request_to_json(request: Request, cache: Path) -> dict[str, Any]:
    """A request as JSON, its key pinned; `request_from_json` reads it."""
    return dict(plain(request) | {"pinned": request.key(cache)})


def request_from_json(value: dict[str, Any]) -> Request:
    """The request that `request_to_json` wrote."""
    reference = value["reference"]
    return Request(
        **value
        | {
            "model": built(Model, value["model"]),
            "suite": built(Suite, value["suite"]),
            "reference": reference and built(Model, reference),
        }
    )


def main() -> None:
    """Evaluate every request of the file; a line on stdout for each result."""
    with plainly():
        network.inherit()
        quiet()
        requests = [request_from_json(item) for item in read_json(Path(sys.argv[1]))]
        for request, result in zip(requests, evaluate(requests, Path(sys.argv[2])), strict=True):
            said = f"skipped: {result.skipped}" if result.skipped else summary(result)
            print(
                f"{request.suite.name} {request.quantizer} {request.model.path}: {said}", flush=True
            )


def summary(result: Any) -> str:
    """The main scores in one line."""
    return ", ".join(
        f"{score.task} {score.metric} {score.value:.3f} ± {score.stderr:.3f} (n={score.n})"
        for score in result.scores
        if score.is_main
    )


if __name__ == "__main__":
    main()
