"""The model card of an arm, in the Hugging Face format: metadata with real scores, then the evidence.

The metadata is built, and can be read back, with huggingface_hub, which loads when a card is made.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evals.contrast import Change, Contrast, Row
from evals.leaderboard import Arm, boards
from evals.rated import rated, rated_text
from evals.results import EvalResult
from evals.runs import load_run
from evals.site.measured import Form, forms, texts
from evals.site.tables import cell, change_text, score_text, table
from reward.pages.markup import MISSING, count, duration, percent, probability, value
from reward.store import read_json

if TYPE_CHECKING:
    from huggingface_hub import EvalResult as HubResult

CARD = "MODEL_CARD.md"

# Names of metrics on the hub, where they differ from ours.
_HUB_METRICS = {"acc": "accuracy", "acc_norm": "accuracy", "acc_bytes": "accuracy"}


def write_card(run: Path) -> Path:
    """Write the card of one run beside its record.

    Args:
        run: its `run.json`.

    Returns:
        The path of the card.
    """
    (board,) = boards([load_run(run)])
    path = run.parent / CARD
    path.write_text(card(board.entries[0].arm), encoding="utf-8", errors="replace", newline="\n")
    return path


def card(arm: Arm) -> str:
    """The card as text: YAML front matter and Markdown; equal records give equal text."""
    from huggingface_hub import ModelCardData

    first = arm.first
    stages = [str(stage.get("stage")) for stage in first.stages]
    methods = [str(stage["method"]) for stage in first.stages if stage.get("method")]
    data = ModelCardData(
        base_model=_hub_id(arm),
        library_name="transformers",
        pipeline_tag="text-classification" if stages == ["rm"] else "text-generation",
        tags=["preference-alignment", *stages, *methods],
        model_name=arm.name,
        eval_results=_results(arm) or None,
    )
    parts = [f"# {cell(arm.name)}", cell(first.title), _base_text(arm)]
    for title, body in (
        ("Scores", _scores(arm)),
        ("Reward model", _rewards(arm)),
        ("Gain", _gain(arm)),
        ("Forgetting", _forgetting(arm)),
        ("Quantization", _quantization(arm)),
        ("Limits", _limits(arm)),
        ("Training", _training(arm)),
        ("Provenance", _provenance(arm)),
        ("How to reproduce", _commands(arm)),
    ):
        parts += [f"## {title}", body] if body else []
    return (
        f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(filter(None, map(str.strip, parts))) + "\n"
    )


def _hub_id(arm: Arm) -> str | None:
    """The base model's name on the hub; None for a local one, which `base_model` must not name."""
    path = str(arm.first.model.get("path", ""))
    for (variant, _), result in arm.first.results.items():
        if variant == arm.base and isinstance(result, EvalResult):
            is_hub = str(result.model.get("weights", "")).startswith(f"{path}@")
            return path if path and is_hub else None
    return None


def _base_text(arm: Arm) -> str:
    model = arm.first.model
    line = f"Started from `{cell(str(model.get('path', 'an unknown model')))}`"
    later = " → ".join(arm.first.policies)
    if arm.stages:
        trained = f"trained as {cell(later)}"
    elif arm.first.stages:  # none of them makes a policy
        trained = (
            f"trained: {cell(', '.join(str(stage.get('stage')) for stage in arm.first.stages))}"
        )
    else:
        trained = "nothing was trained"
    return f"{line} ({model.get('dtype', 'unknown format')}), {trained}."


def _results(arm: Arm) -> "list[HubResult]":
    """Every score of the last policy, seeds averaged, in the metrics' own units."""
    from huggingface_hub import EvalResult as HubResult

    tasks = [key for role in ("gain", "retention") for key in arm.tasks(role)]
    names = [task for _, task in tasks]
    found = []
    for suite, task in tasks:
        name = task if names.count(task) == 1 else f"{suite}/{task}"
        for metric, mean in _means(arm, suite, task).items():
            base = metric.split(",")[0]
            found.append(
                HubResult(
                    task_type="text-generation",
                    dataset_type=name,
                    dataset_name=name,
                    metric_type=_HUB_METRICS.get(base, base),
                    metric_name=metric,
                    metric_value=mean,
                )
            )
    return found


def _means(arm: Arm, suite: str, task: str) -> dict[str, float]:
    values: dict[str, list[float]] = {}
    for run in arm.runs:
        result = run.result(arm.final, suite)
        for score in result.scores if isinstance(result, EvalResult) else []:
            if score.task == task and math.isfinite(score.value):
                values.setdefault(score.metric, []).append(score.value)
    return {metric: math.fsum(each) / len(each) for metric, each in values.items()}


def _scores(arm: Arm) -> str:
    lines = []
    for role in ("gain", "retention"):
        for suite, task in arm.tasks(role):
            score = arm.score(arm.final, suite, task)
            unit = " (%)" if score.is_share else ""
            before = [score_text(arm.score(arm.base, suite, task))] if arm.stages else []
            lines.append(
                [task, score.metric + unit, *before, score_text(score), str(score.n), role]
            )
    if not lines:
        return "" if arm.is_reward_model else "Nothing was measured."
    note = "± is the standard error of sampling."
    if len(arm.runs) > 1:
        note += f" Means over {len(arm.runs)} seeds."
    policies = ["Base ± stderr", f"{arm.final} ± stderr"] if arm.stages else ["Score ± stderr"]
    return table(["Task", "Metric", *policies, "n", "Role"], lines) + "\n" + note


def _rewards(arm: Arm) -> str:
    """A line for each reward model; empty when none was measured."""
    return "\n".join(
        f"- {cell(one.stage)}, seed {one.run.seed}, on held-out pairs: {rated_text(one.figures)}"
        for one in rated(arm.runs)
    )


def _gain(arm: Arm) -> str:
    if not arm.stages:
        return "" if arm.is_reward_model else "No policy was trained."
    lines = [
        _delta(contrast, row)
        for contrast in arm.stages
        for row in contrast.rows("gain", main_only=True)
    ]
    return f"Average: {cell(change_text(arm.average('gain')))}\n\n" + _deltas(lines)


def _forgetting(arm: Arm) -> str:
    if not arm.stages:
        return "" if arm.is_reward_model else "No policy was trained."
    final = arm.stages[-1]
    lines = [_delta(final, row) for row in final.rows("retention", main_only=True)]
    body = f"Average: {cell(change_text(arm.average('retention')))}."
    if any(arm.verdicts().values()):
        counts = ", ".join(f"{number} {name}" for name, number in arm.verdicts().items())
        body += f" Tasks: {counts}. Retained means that a loss of {value(arm.margin)} points is excluded."
    body += "\n\n" + _deltas(lines)
    if found := texts(final):
        each = [[t.task, *(f"{n} {v:.4g}" for n, v in t.divergence.items())] for t in found]
        divergences = "; ".join(f"{cell(one[0])}: {', '.join(one[1:])}" for one in each if one[1:])
        body += (
            f"\nDivergence from the base on held-out text: {divergences}." if divergences else ""
        )
    return body


def _delta(contrast: Contrast, row: Row) -> list[str]:
    name = f"{contrast.before} → {contrast.after}"
    return [name, row.task or row.suite, row.metric, change_text(row.change), probability(row.p)]


def _deltas(lines: list[list[str]]) -> str:
    header = ["Compared", "Task", "Metric", "Change [95 % CI] (points or own unit), verdict", "p"]
    return table(header, lines) if lines else "Nothing was measured."


def _quantization(arm: Arm) -> str:
    found = forms(arm)
    if len(found) == 1 and not found[0].footprint:
        return "" if arm.is_reward_model else "No quantizer was measured."
    kinds = list(dict.fromkeys(name for form in found for name in form.footprint))
    titles = ["Gain tasks", "Retention tasks"] if arm.tasks("gain") else ["Against unquantized"]
    lines = []
    for form in found:
        line = [form.name]
        line += ["reference" if c is None else change_text(c) for c in _changes(arm, form, titles)]
        line += [percent(form.flips), _divergences(form)]
        line += [
            f"{form.footprint[kind]:.0f}" if kind in form.footprint else MISSING for kind in kinds
        ]
        lines.append(line)
    return table(["Format", *titles, "Flips", "KL", *kinds], lines)


def _changes(arm: Arm, form: Form, titles: list[str]) -> list[Change | None]:
    """What a format costs, a change for each column; None for the unquantized itself."""
    if len(titles) == 2:
        return [form.gain, form.retention]
    return [None if form.gain is None else arm.cost(form.name)]


def _divergences(form: Form) -> str:
    found = [f"{t.task} {t.divergence['kl']:.4f}" for t in form.texts if "kl" in t.divergence]
    return ", ".join(found) or MISSING


def _limits(arm: Arm) -> str:
    """One line: what these numbers do not show, because it was not measured."""
    missing = []
    if arm.stages:
        missing += [] if arm.tasks("gain") else ["what training gained (no gain suite)"]
        missing += [] if arm.tasks("retention") else ["what it lost (no retention suite)"]
    if not arm.quantized and not arm.is_reward_model:
        missing.append("quantized forms")
    if not arm.is_reward_model and not any(form.footprint for form in forms(arm)):
        missing.append("size and speed")
    if len(arm.runs) == 1 and arm.first.stages:
        missing.append("the spread between seeds (one seed)")
    missing.append("safety, bias, and every language and task that is not named above")
    return f"Not measured: {'; '.join(missing)}."


def _training(arm: Arm) -> str:
    config = _config(arm.first.folder)
    return "\n".join(line for stage in arm.first.stages for line in _stage(stage, config)) or (
        "Nothing was trained."
    )


def _stage(stage: dict[str, Any], config: dict[str, Any]) -> Iterator[str]:
    name = str(stage.get("stage", "stage"))
    data, parameters = stage.get("data") or {}, stage.get("parameters") or {}
    yield f"- **{cell(name)}**, {cell(str(stage.get('method', 'unknown method')))}, {duration(stage.get('seconds'))}"
    if "rows" in data:
        yield (
            f"  - data: {cell(str(data.get('source', 'unknown')))}, {data['rows']} rows, "
            f"{data.get('dropped', 0)} dropped, fingerprint `{cell(str(data.get('fingerprint', 'unknown')))}`"
        )
    if parameters.get("total"):
        yield f"  - {count(parameters.get('trained', 0))} of {count(parameters['total'])} parameters trained"
    settings = config.get(name) or {}
    for title, found in (("arguments", settings.get("args")), ("peft", settings.get("peft"))):
        if found:
            yield f"  - {title}: `{_code(found)}`"
    if metrics := stage.get("metrics"):
        yield f"  - metrics: `{_code(metrics)}`"


def _code(found: Any) -> str:
    return json.dumps(found, sort_keys=True, ensure_ascii=False).replace("`", "'")


def _config(run: Path) -> dict[str, Any]:
    """The configuration that a run recorded; empty when it kept none."""
    try:
        config = read_json(run / "config.json")
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def _provenance(arm: Arm) -> str:
    lines = []
    for run in arm.runs:
        known = run.provenance
        dirty = " with uncommitted changes" if known.get("dirty") else ""
        lines.append(
            f"- seed {run.seed}, {cell(run.started)}, {duration(run.seconds)}, arm `{cell(run.arm)}`, "
            f"commit {cell(str(known.get('commit') or 'unknown'))}{dirty}"
        )
    versions = arm.first.provenance.get("versions") or {}
    pairs = (f"{name} {version}" for name, version in sorted(versions.items()) if version)
    return "\n".join([*lines, f"- {cell(', '.join(pairs)) or 'versions unknown'}"])


def _commands(arm: Arm) -> str:
    commands = dict.fromkeys(run.command for run in arm.runs if run.command)
    fence = "````"
    return "\n".join([fence, *(command.replace(fence, "") for command in commands), fence])
