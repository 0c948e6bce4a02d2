"""`python -m reward.report model.path=… data.source=…`: what a reward model is worth on pairs it was not trained on."""

import dataclasses
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.entry import UserError, entry, plain
from conf.schema import RewardReport, Scorer
from reward import network
from reward.quiet import quiet

if TYPE_CHECKING:
    from reward.heldpairs import Held, Scores

REPORT, PAIRS, PAGE = "report.json", "pairs.jsonl", "report.html"
_KIND = "reward_report"  # in the manifest
_LIBRARIES = ("torch", "transformers", "tokenizers", "numpy", "scipy")


@entry("report", RewardReport)
def main(config: RewardReport, overrides: list[str]) -> float | None:
    """Score the pairs, print the main numbers, and leave `report.json`, `pairs.jsonl` and `report.html`."""
    if config.offline:
        network.close()
    network.inherit()
    quiet()
    del overrides
    folder = made(config)
    # Here, not above: --help and a config error must not wait for it.
    from reward.store import read_json

    report = read_json(folder / REPORT)
    print(summary(report))
    print(folder / PAGE)
    return float(report["accuracy"]["value"])


def made(config: RewardReport) -> Path:
    """The folder of the report, made unless it is there.

    Raises:
        UserError: if an option would do nothing, there is no such model or no pair, or no pair has a score.
    """
    from reward import heldpairs
    from reward.store import build_once, content_key

    root = Path(config.paths.root)
    _check_out(config.out)
    _check_options(config)
    models = [
        config.model,
        *(dataclasses.replace(config.model, path=path, revision=None) for path in config.others),
    ]
    held = heldpairs.read(config.data, root, config.subset)
    inputs = _inputs(config, models, held, root)
    key = content_key({name: part for name, part in inputs.items() if name != "commit"})

    def build(partial: Path) -> dict[str, Any]:
        found = [heldpairs.score(model, held.records) for model in models]
        _check_scores(found[0], config.model)
        _write(partial, held, found, config, inputs)
        return {"key": key, "kind": _KIND}

    folder = build_once(root / "rewards" / key, build)
    return _copied(folder, Path(config.out)) if config.out else folder


def _check_options(config: RewardReport) -> None:
    """Refuse options of a model that would do nothing, as `python -m reward.score` does."""
    from reward.ensemble import check_options

    unset = plain(Scorer(config.model.path))
    given = {name: value for name, value in plain(config.model).items() if value != unset[name]}
    revision = {name: given.pop(name) for name in ("revision",) if name in given}
    check_options([config.model.path], revision)  # which the others do not share
    check_options([config.model.path, *config.others], given)


def _inputs(config: RewardReport, models: list[Scorer], held: "Held", root: Path) -> dict[str, Any]:
    """What the numbers depend on."""
    from reward.ensemble import identity
    from reward.provenance import commit, installed
    from reward.store import source_key

    manifest = held.version.manifest
    described = [
        plain(one) | {"weights": identity(one.path, one.revision, root / "cache")} for one in models
    ]
    return {
        "model": described[0],
        "others": described[1:],
        "data": {
            "source": config.data.source,
            "key": manifest["key"],
            "fingerprint": held.version.fingerprint,
            "pairs": len(held.records),
            "rows": manifest["rows"],
            "unusable": manifest["unusable"],
            "steps": manifest["steps"],
        },
        "settings": {"data": plain(config.data), "subset": config.subset},
        "versions": installed(*_LIBRARIES),
        "code": source_key(Path(__file__).parent),
        "commit": commit(),
    }


def _check_scores(scores: "Scores", model: Scorer) -> None:
    if scores.too_long == len(scores.scores):
        raise UserError(
            f"{model.path} scores none of the {len(scores.scores):,} pairs: each has an answer that, with its prompt, "
            f"is longer than {scores.max_length} tokens (model.max_length)"
        )


def _write(
    folder: Path, held: "Held", found: list["Scores"], config: RewardReport, inputs: dict[str, Any]
) -> None:
    import orjson

    from reward.assessment import assess, line
    from reward.heldpairs import as_pairs
    from reward.pages.rewardpage import render
    from reward.store import write_json

    own, others = found[0], dict(zip(config.others, found[1:], strict=True))
    report = assess(held, own, others) | {"inputs": inputs}
    write_json(folder / REPORT, report)
    pairs = as_pairs(held, own)
    lines = (line(held, pairs, at) for at in range(len(held.records)))
    text = b"".join(orjson.dumps(one, option=orjson.OPT_APPEND_NEWLINE) for one in lines)
    (folder / PAIRS).write_bytes(text)
    (folder / PAGE).write_text(render(report), encoding="utf-8")


def _check_out(out: str | None) -> None:
    from reward.store import MANIFEST, is_complete, read_json

    folder = Path(out) if out else None
    if folder is None or not folder.exists():
        return
    if is_complete(folder) and read_json(folder / MANIFEST).get("kind") == _KIND:
        return
    if not folder.is_dir() or any(folder.iterdir()):
        raise UserError(
            f"out={out} is not an empty folder and no earlier report: choose another one"
        )


def _copied(folder: Path, out: Path) -> Path:
    """A copy in the place of what is at `out`, there whole or not at all."""
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial)
    shutil.rmtree(out, ignore_errors=True)
    os.replace(partial, out)
    return out


def summary(report: dict[str, Any]) -> str:
    """The main numbers, a line each; above them the warning when many pairs have no score."""
    accuracy, over, ece = report["accuracy"], report["over_length"], report["ece"]
    gaps = f", {accuracy['gaps']:,} without a score" if accuracy["gaps"] else ""
    pairs = f"%  {accuracy['n']:,} pairs of {accuracy['clusters']:,} prompts{gaps}"
    expected = f"points  {100 * ece['expected_if_calibrated']:.1f} if calibrated"
    rows = [
        ("accuracy", accuracy, 100, pairs),
        ("the longer answer wins", report["length_baseline"], 100, "%"),
        ("accuracy over length", over | {"value": over["difference"]}, 100, "points"),
        ("calibration error (ECE)", ece, 100, expected),
        ("Brier score", report["brier"], 1, " 0.25 is a coin"),
    ]
    if bench := report["rewardbench"]:
        sections = f"%  of {len(bench['sections'])} sections"
        rows.append(("RewardBench score", bench["score"], 100, sections))
    for one in report["subsets"]:
        rows.append(
            (f"  {one['name']}", one["accuracy"], 100, f"%  {one['accuracy']['n']:,} pairs")
        )
    width = max(len(name) for name, *_ in rows)
    lines = [f"warning: {report['warning']}"] if report["warning"] else []
    lines += [
        f"{name:{width}}  {_number(figure['value'], scale)} "
        f"[{_number(figure['ci_low'], scale)}, {_number(figure['ci_high'], scale)}] {unit}"
        for name, figure, scale, unit in rows
    ]
    return "\n".join(lines)


def _number(value: float | None, scale: int) -> str:
    if value is None:
        return "    –"
    return f"{scale * value:5.1f}" if scale > 1 else f"{value:5.3f}"


if __name__ == "__main__":
    main()
