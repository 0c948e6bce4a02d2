"""The leaderboard as records, CSV and Markdown. No torch."""

import csv
import io
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

from evals.contrast import Change
from evals.leaderboard import Arm, Board, MeanScore, rows_of
from evals.rated import Rating
from evals.site.markup import brief, interval
from evals.site.measured import Text, forms, texts
from evals.site.places import board_title
from reward.pages.markup import MISSING, signed, value

# Figures of a reward model whose spread between seeds is told.
_SPREAD = ("accuracy", "over_length", "ece")


def records(found: Sequence[Board]) -> list[dict[str, Any]]:
    """The flat records of the leaderboard with those of reward models, held-out text and number formats; equal keys.

    A missing number is None. Beside those of `leaderboard.rows_of`: reward_FIGURE of `rated.main_figures`, with
    reward_FIGURE_seed_sd of accuracy, over_length and ece, and reward_report, the path of its page; TASK_loss_change
    with interval and TASK_kl (nats a token, the last policy against the base); QUANTIZER_retention, QUANTIZER_flips,
    QUANTIZER_TASK_kl and _kl_p99, QUANTIZER_TASK_perplexity, and QUANTIZER_METRIC of its footprint, also of the format
    `unquantized`.
    """
    arms = [entry.arm for board in found for entry in board.entries]
    extras = [_extras(arm) for arm in arms]
    keys = dict.fromkeys(key for extra in extras for key in extra)
    return [
        row | {key: extra.get(key) for key in keys}
        for row, extra in zip(rows_of(found), extras, strict=True)
    ]


def _extras(arm: Arm) -> dict[str, Any]:
    found = _rating(arm)
    for text in _texts(arm):
        found[f"{text.task}_loss_change"] = text.loss.difference
        found[f"{text.task}_loss_change_ci_low"] = text.loss.ci_low
        found[f"{text.task}_loss_change_ci_high"] = text.loss.ci_high
        found |= {f"{text.task}_{name}": number for name, number in text.divergence.items()}
    for form in forms(arm):
        if form.retention is not None:
            found[f"{form.name}_retention"] = form.retention.difference
            found[f"{form.name}_flips"] = form.flips
        for text in form.texts:
            found |= {
                f"{form.name}_{text.task}_{name}": number
                for name, number in text.divergence.items()
            }
        found |= {f"{form.name}_{task}_perplexity": n for task, n in form.perplexity.items()}
        found |= {f"{form.name}_{name}": number for name, number in form.footprint.items()}
    known = {key: None if math.isnan(number) else number for key, number in found.items()}
    return known | ({"reward_report": arm.rating.page} if arm.rating else {})


def _rating(arm: Arm) -> dict[str, float]:
    if not arm.rating:
        return {}
    found = {f"reward_{name}": number for name, number in arm.rating.figures.items()}
    spreads = arm.rating.spreads
    return found | {f"reward_{name}_seed_sd": spreads[name] for name in _SPREAD}


def as_csv(rows: Sequence[dict[str, Any]]) -> str:
    """Records as CSV with a header."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def as_markdown(found: Sequence[Board]) -> str:
    """Every board as a table."""
    return "\n".join(f"## {cell(board_title(board))}\n\n{_board(board)}" for board in found)


def _board(board: Board) -> str:
    arms = [entry.arm for entry in board.entries]
    columns = {"Rank": [entry.rank for entry in board.entries], "Arm": [arm.name for arm in arms]}
    columns["Seeds"] = [str(len(arm.runs)) for arm in arms]
    if any(arm.tasks("gain") for arm in arms):
        scores = [arm.final_score() for arm in arms]
        columns[f"Score ({_unit(scores, '%')})"] = [_score(score) for score in scores]
    if any(arm.stages for arm in arms):
        gains = [arm.average("gain") for arm in arms]
        columns[f"Gain ({_unit(gains, 'pp')}, 95 % CI)"] = [_brief(gain) for gain in gains]
        retentions = [arm.average("retention") for arm in arms]
        columns[f"Retention ({_unit(retentions, 'pp')}, 95 % CI)"] = [
            _retention(arm) for arm in arms
        ]
        columns["Forgotten"] = [_forgotten(arm) for arm in arms]
    if any(arm.rating for arm in arms):
        columns["Reward model accuracy (%, 95 % CI)"] = [_accuracy(arm) for arm in arms]
        columns["Over longest wins (pp, 95 % CI)"] = [_over_length(arm) for arm in arms]
        columns["ECE (points)"] = [_ece(arm) for arm in arms]
    for task in dict.fromkeys(text.task for arm in arms for text in _texts(arm)):
        name = f"Loss on {task} (nats/token, lower is better, 95 % CI), KL from base"
        columns[name] = [_text(arm, task) for arm in arms]
    for name in board.quantizers:
        costs = [arm.cost(name) for arm in arms]
        columns[f"{name} ({_unit(costs, 'pp')}, 95 % CI), footprint"] = [
            _form(arm, name) for arm in arms
        ]
    return table(list(columns), list(zip(*columns.values(), strict=True)))


def _unit(measured: Sequence[MeanScore] | Sequence[Change], of_shares: str) -> str:
    """What a column is headed with: nats and perplexities are no shares."""
    units = {True: of_shares, False: "own unit"}
    found = {one.is_share for one in measured if not one.is_missing}
    return " or ".join(units[is_share] for is_share in sorted(found, reverse=True)) or of_shares


def _score(score: MeanScore) -> str:
    return brief(score.note) if score.is_missing else f"{score_text(score)}, n = {score.n}"


def _brief(change: Change) -> str:
    """As `change_text`, a reason in few words."""
    return brief(change.note) if change.is_missing else change_text(change)


def _retention(arm: Arm) -> str:
    summary = ", ".join(f"{number} {name}" for name, number in arm.verdicts().items() if number)
    return f"{_brief(arm.average('retention'))} {summary}".strip()


def _forgotten(arm: Arm) -> str:
    counts = arm.verdicts()
    judged = sum(counts.values())
    return f"{counts['forgotten']} of {judged}" if judged else MISSING


def _accuracy(arm: Arm) -> str:
    if not arm.rating:
        return MISSING
    r, seeds = arm.rating.figures, len(arm.rating.seeds)
    few = f", {seeds} seed(s) only" if seeds < len(arm.runs) else ""
    n = MISSING if math.isnan(r["n"]) else f"{r['n']:.0f}"
    ends = f" [{value(r['ci_low'])}, {value(r['ci_high'])}]"
    return Own(f"{_reported(arm.rating, 'accuracy', value, ends)}, n = {n}{few}")


def _over_length(arm: Arm) -> str:
    if not arm.rating:
        return MISSING
    r = arm.rating.figures
    ends = f" [{signed(r['over_length_ci_low'])}, {signed(r['over_length_ci_high'])}]"
    return _reported(arm.rating, "over_length", signed, ends)


def _ece(arm: Arm) -> str:
    return _reported(arm.rating, "ece", value) if arm.rating else MISSING


def _reported(found: Rating, name: str, show: Callable[[float], str], ends: str = "") -> str:
    """A figure that leads to its report, its interval, and what seeds show."""
    text = show(found.figures[name])
    linked = f"[{text}]({found.page})" if found.page else text
    spread = found.spreads[name]
    return Own(linked + ends + ("" if math.isnan(spread) else f", seed sd {value(spread)}"))


def _texts(arm: Arm) -> list[Text]:
    return texts(arm.stages[-1]) if arm.stages else []


def _text(arm: Arm, task: str) -> str:
    for text in _texts(arm):
        if text.task == task:
            kl = text.divergence.get("kl", math.nan)
            return change_text(text.loss) + ("" if math.isnan(kl) else f", KL {kl:.4f}")
    return MISSING


def _form(arm: Arm, quantizer: str) -> str:
    parts = [_brief(arm.cost(quantizer))]
    for form in forms(arm):
        if form.name == quantizer and "size_mb" in form.footprint:
            parts.append(f"{form.footprint['size_mb']:.0f} MB")
    return ", ".join(parts)


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A Markdown table of foreign text."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(f"| {' | '.join(map(cell, row))} |" for row in rows) + "\n"


class Own(str):
    """Markdown of this program's own, which a table leaves as it is."""


def cell(text: str) -> str:
    """Foreign text on one line of Markdown: no HTML, no link, no image, no column of its own."""
    if isinstance(text, Own):
        return text
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace("|", "\\|")
    text = re.sub(r"\](?=[(\[:])", "&#93;", text)  # a character reference never makes a link
    return re.sub(r"\s+", " ", text)


def score_text(score: MeanScore) -> str:
    """`63.5 ± 2.1`, or why there is no score."""
    if score.is_missing:
        return score.note
    return f"{value(score.value, score.is_share)} ± {value(score.stderr, score.is_share)}"


def change_text(change: Change) -> str:
    """`+2.0 [+0.5, +3.5] better`, or why there is no difference."""
    if change.is_missing:
        return change.note
    spread = f", seed sd {value(change.spread, change.is_share)}" if change.seeds > 1 else ""
    difference = signed(change.difference, change.is_share)
    return f"{difference} {interval(change)}{spread} {change.verdict}".strip()
