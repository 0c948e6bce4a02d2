"""`python -m reward.score MODEL… IN OUT.jsonl`: what reward models think of completions."""

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.entry import plainly
from conf.schema import Source
from reward.classifier import DTYPES, check
from reward.command import (
    MAX_BAD_FRACTION,
    Reading,
    at_least_one,
    at_least_zero,
    check_out,
    fraction,
    written_whole,
)
from reward.completions import Task, task_of
from reward.origin import MODEL_CODE, device
from reward.quiet import quiet
from reward.resume import Journal, resumed
from reward.sources import identity
from reward.store import fingerprint, read_json, source_key, write_json
from reward.tally import Scored, Tally

if TYPE_CHECKING:
    from reward.ensemble import Array, Ensemble

_OPTIONS = ("revision", "dtype", "batch_tokens", "max_length")  # of loading a model
_HERE = Path(__file__)
_CODE = [_HERE, _HERE.with_name("completions.py"), _HERE.with_name("records.py"), *MODEL_CODE]
_CHUNK = (
    128  # rows whose completions are sorted by length together; what a killed run loses at most
)


def score_tasks(
    ensemble: "Ensemble", tasks: Iterable[Task], pieces: "Pieces | None" = None
) -> Iterator[Scored]:
    """The tasks with their scores, in their order.

    Args:
        ensemble: what scores.
        tasks: of any number.
        pieces: keeps what was scored, and knows what an earlier run scored.
    """
    import numpy as np

    tasks, number = iter(tasks), 0
    while chunk := list(islice(tasks, _CHUNK)):
        found = pieces.known(number) if pieces else None
        if found is None:
            flat = [(task, completion) for task in chunk for completion in task.completions]
            found = ensemble.members(
                [task.prompt for task, _ in flat],
                [completion for _, completion in flat],
                [task.tools for task, _ in flat],
            )
            if pieces:
                pieces.keep(found, len(chunk))
        scores, start = ensemble.combined(found), 0
        for task in chunk:
            part = slice(start, start := start + len(task.completions))
            yield Scored(task, scores[part], np.asarray(found[part]))
        number += 1


class Pieces:
    """Scores of the chunks so far, on disk, with the progress on stderr."""

    def __init__(self, journal: Journal, rows: int) -> None:
        from tqdm import tqdm

        self._journal = journal
        there = min(rows, _CHUNK * len(journal.pieces))
        self._bar = tqdm(total=rows, initial=there, unit="row", disable=None)

    def known(self, number: int) -> "Array | None":
        """(completions, members) of a chunk that an earlier run scored."""
        import numpy as np

        pieces = self._journal.pieces
        return np.array(pieces[number]) if number < len(pieces) else None

    def keep(self, scores: "Array", rows: int) -> None:
        """Keep the scores of the next chunk."""
        self._journal.add(scores.tolist())
        self._bar.update(rows)

    def close(self) -> None:
        """End the line of the progress."""
        self._bar.close()


def run(given: argparse.Namespace) -> list[str]:
    """Score a source into a file, which appears when it is whole; the summary.

    Raises:
        UserError: when a model or the source cannot be used, or the output was begun in another way.
    """
    from reward.ensemble import open_models

    _check(given)
    reading = Reading(given.source, task_of, "score")
    for _ in reading:  # before any model is loaded
        pass
    reading.check(given.max_bad_fraction)
    options = {name: getattr(given, name) for name in _OPTIONS}
    ensemble = open_models(given.models, given.combine, given.k, given.scales, **options)
    settings = _settings(given, ensemble)
    manifest = given.out.with_name(f"{given.out.name}.manifest.json")
    with resumed(given.out, settings) as journal:
        if _is_complete(given.out, manifest, settings):
            journal.remove()
            return [f"{given.out} is complete: the same command wrote it"]
        tally = _write(given, ensemble, Pieces(journal, reading.rows - len(reading.bad)))
        facts = tally.facts() | {"bad": len(reading.bad)}
        record = {"settings": settings, "members": _members(given, ensemble, tally), **facts}
        write_json(manifest, record | {"output": fingerprint(given.out)})
        journal.remove()
    return [*_summary(facts, ensemble), *filter(None, [reading.described()]), str(given.out)]


def _check(given: argparse.Namespace) -> None:
    """Refuse what is wrong before anything is loaded."""
    from reward import ensemble

    check_out(given.out, given.source)
    ensemble.check(given.combine, given.k, len(given.models))
    unset, options = parser(), {name: getattr(given, name) for name in _OPTIONS}
    ensemble.check_options(
        given.models,
        {name: value for name, value in options.items() if value != unset.get_default(name)},
    )
    for path in given.models:
        if not ensemble.is_remote(path):
            check(path, given.dtype)


def _settings(given: argparse.Namespace, ensemble: "Ensemble") -> dict[str, Any]:
    """All that the scores depend on."""
    from importlib.metadata import version

    with tempfile.TemporaryDirectory() as cache:
        content = identity(Source(source=given.source), "score", Path(cache))
    return {
        "weights": ensemble.identities,
        "combine": given.combine,
        "k": given.k,
        "scales": given.scales and fingerprint(given.scales),
        "source": content,
        "dtype": given.dtype,
        "max_length": ensemble.max_length,
        "batch_tokens": given.batch_tokens,  # rounding depends on what stands beside a conversation
        "rows_together": _CHUNK,
        "device": device(given.models),
        "code": source_key(*_CODE),
        "versions": {name: version(name) for name in ("torch", "transformers")},
    }


def _is_complete(out: Path, manifest: Path, settings: dict[str, Any]) -> bool:
    """Whether the output is there, whole, and made with these settings."""
    if not (out.is_file() and manifest.is_file()):
        return False
    try:
        record = read_json(manifest)
        return bool(record["settings"] == settings and record["output"] == fingerprint(out))
    except (ValueError, KeyError, TypeError):
        return False  # of something else: it is written anew


def _write(given: argparse.Namespace, ensemble: "Ensemble", pieces: Pieces) -> Tally:
    """Score the rows that can be used."""
    tally, is_one = Tally(), len(ensemble.names) == 1
    with written_whole(given.out) as put:
        for found in score_tasks(ensemble, Reading(given.source, task_of, "score"), pieces):
            tally.add(found)
            put(found.task.scored(found.scores, None if is_one else found.members))
    pieces.close()
    return tally


def _members(given: argparse.Namespace, ensemble: "Ensemble", tally: Tally) -> list[dict[str, Any]]:
    """Who said it, and on which scale, unless it was put on another one already."""
    named = zip(ensemble.names, ensemble.identities, tally.scales(), strict=True)
    return [
        {"model": name, "identity": key, **({} if given.scales else scale)}
        for name, key, scale in named
    ]


def _summary(facts: dict[str, Any], ensemble: "Ensemble") -> Iterator[str]:
    limit = (
        f"longer than {ensemble.max_length} tokens" if ensemble.max_length else "without a score"
    )
    yield (
        f"{facts['rows']:,} rows, {facts['scored']:,} completions scored, {facts['too_long']:,} {limit} (null)"
    )
    if "disagreement" in facts:
        line = f"{len(ensemble.names)} members, {facts['disagreement']:.3f} apart (standard deviation) on average"
        if facts["pairs"]:
            line += f"; they disagree about the order of {facts['at_odds']:.1%} of {facts['pairs']:,} pairs"
        yield line


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m reward.score",
        description=main.__doc__,
        epilog="example: python -m reward.score rm-seed0 rm-seed1 rm-seed2 prefs.jsonl scored.jsonl --combine min",
    )
    add = made.add_argument
    add(
        "models",
        metavar="MODEL",
        nargs="+",
        help="reward model: folder, adapter, hub id, or http(s)://HOST:PORT; several score as one",
    )
    add("source", metavar="IN", help="file, folder, glob, hub id or demo:NAME")
    add("out", metavar="OUT.jsonl", type=Path, help="file to write")
    add(
        "--combine",
        default="mean",
        metavar="HOW",
        help="of several models: mean (default), min, or mean_minus_std",
    )
    add(
        "--k",
        type=at_least_zero,
        default=1.0,
        help="standard deviations that mean_minus_std takes off (%(default)s)",
    )
    add(
        "--scales",
        type=Path,
        metavar="MANIFEST",
        help="OUT.jsonl.manifest.json of the same models on reference data: compare members in their own units",
    )
    add(
        "--batch-tokens",
        type=at_least_one,
        default=4096,
        metavar="N",
        help="tokens scored together, padding among them (%(default)s)",
    )
    add(
        "--max-length",
        type=at_least_one,
        metavar="N",
        help="longer conversations, in tokens, get null; default: the model's context",
    )
    add("--dtype", default="float32", choices=DTYPES, help="of the weights (%(default)s)")
    add("--revision", help="hub branch, tag or commit of the model")
    add(
        "--max-bad-fraction",
        type=fraction,
        default=MAX_BAD_FRACTION,
        metavar="SHARE",
        help="share of unusable rows that may be left out (%(default)s)",
    )
    return made


def main() -> None:
    """Add a `score` to every completion; pairs get `score_chosen`, `score_rejected` and `margin`."""
    given = parser().parse_args()
    quiet()
    with plainly():
        for line in run(given):
            print(line, flush=True)


if __name__ == "__main__":
    main()
