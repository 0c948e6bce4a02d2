"""`python -m evals.winrate JUDGEMENTS.jsonl… [--difficulty FILE] [--json OUT]`: raw and length-controlled win rates."""

import argparse
import dataclasses
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.entry import UserError, plainly
from evals.difficulty import read_difficulties
from evals.judgements import Judged, Pair, load
from reward.command import check_file
from reward.intervals import share
from reward.store import write_json

if TYPE_CHECKING:
    from evals.lengthcontrol import Controlled

_LEAST_SHARED = (
    0.5  # of a model's instructions that another model must share to estimate their difficulty
)
_UNKNOWN = 20.0  # points of standard error: a controlled rate with it says nothing
_LISTED = 5  # of models at most, every two are compared


@dataclass
class WinRate:
    """A model against the baseline. Rates, errors and intervals are in percent, lengths in characters.

    `win_rate` is the mean preference, `standard_error` its standard error (ddof 1), `discrete_win_rate` counts a win
    as 1 and a draw as ½, as AlpacaEval does; `n` pairs were judged, `n_missing` were not and are left out.
    `difficulty_source` is `joint`, `file` or `none`, in which case `is_length_only` holds. NaN is unknown.
    """

    win_rate: float
    standard_error: float
    ci_low: float
    ci_high: float
    discrete_win_rate: float
    n: int
    n_wins: int
    n_wins_base: int
    n_draws: int
    n_missing: int
    share_longer: float
    avg_length: float
    avg_length_baseline: float
    length_controlled_win_rate: float = math.nan
    length_controlled_standard_error: float = math.nan
    length_controlled_ci_low: float = math.nan
    length_controlled_ci_high: float = math.nan
    difficulty_source: str = "none"
    is_length_only: bool = True
    coefficients: dict[str, float | None] | None = None
    note: str = ""


def describe(pairs: list[Pair]) -> WinRate:
    """The raw win rate of a model.

    Raises:
        UserError: when no pair has a preference.
    """
    import numpy as np
    from scipy import stats

    y = np.array([pair.preference for pair in pairs if math.isfinite(pair.preference)])
    if not y.size:
        raise UserError(
            f"none of {len(pairs):,} judgements has a preference: the judge never answered"
        )
    n = y.size
    mean = 100 * float(y.mean())
    stderr = 100 * float(y.std(ddof=1)) / math.sqrt(n) if n > 1 else math.nan
    if stderr > 0:
        half = float(stats.t.ppf(0.975, n - 1)) * stderr
        low, high = max(0.0, mean - half), min(100.0, mean + half)
    else:  # one judgement, or all alike, which is not certainty
        low, high = (100 * end for end in share(y))
    wins, losses, draws = (int(found.sum()) for found in (y > 0.5, y < 0.5, y == 0.5))
    return WinRate(
        mean,
        stderr,
        low,
        high,
        100 * (wins + draws / 2) / n,
        n,
        wins,
        losses,
        draws,
        len(pairs) - n,
        100 * sum(pair.length > pair.length_baseline for pair in pairs) / len(pairs),
        sum(pair.length for pair in pairs) / len(pairs),
        sum(pair.length_baseline for pair in pairs) / len(pairs),
    )


def win_rates(
    judged: Judged, difficulties: dict[str, float] | None = None
) -> tuple[dict[str, WinRate], dict[str, float]]:
    """The win rates of every model, raw and length-controlled.

    Args:
        judged: from `evals.judgements.load`.
        difficulties: of instructions by index; None: estimated jointly where several models share instructions.

    Returns:
        Win rates by model, and the difficulties by index that were estimated or given.
    """
    import numpy as np

    from evals.lengthcontrol import fit_alone, length_terms

    found = {model: describe(pairs) for model, pairs in judged.models.items()}
    terms = {}
    for model, pairs in judged.models.items():
        if model == judged.baseline:  # by construction, as in the reference
            found[model].length_controlled_win_rate = 50.0
            found[model].length_controlled_standard_error = 0.0
            found[model].note = "the baseline itself"
            continue
        term = length_terms(np.array([pair.length - pair.length_baseline for pair in pairs]))
        if term is None:
            found[model].note = "the lengths differ by the same in every pair: nothing to control"
        else:
            terms[model] = term
    if difficulties is not None:
        used, together = difficulties, []
    else:
        together = _sharing({model: judged.models[model] for model in terms})
        used = _fit_together(judged, terms, together, found) if together else {}
    for model, term in terms.items():
        if model in together:
            continue
        pairs = judged.models[model]
        y = np.array([pair.preference for pair in pairs])
        if difficulties is None:
            _add(found[model], fit_alone(y, term), "none")
        else:
            known = np.array([_known(used, pair.index) for pair in pairs])
            _add(found[model], fit_alone(y, term, known), "file")
    return found, used


def _fit_together(
    judged: Judged, terms: dict[str, Any], together: list[str], found: dict[str, WinRate]
) -> dict[str, float]:
    """Add the rates of models that are fitted jointly; the difficulties by index."""
    import numpy as np

    from evals.lengthcontrol import fit_jointly

    indices = list(dict.fromkeys(pair.index for m in together for pair in judged.models[m]))
    place = {index: number for number, index in enumerate(indices)}
    shape = (len(indices), len(together))
    preferences, lengths = np.full(shape, np.nan), np.zeros(shape)
    is_row = np.zeros(shape, dtype=bool)
    for column, model in enumerate(together):
        rows = [place[pair.index] for pair in judged.models[model]]
        preferences[rows, column] = [pair.preference for pair in judged.models[model]]
        lengths[rows, column] = terms[model]
        is_row[rows, column] = True
    fits, gamma = fit_jointly(preferences, lengths, is_row)
    for model, fit in zip(together, fits, strict=True):
        _add(found[model], fit, "joint")
    return dict(zip(indices, map(float, gamma), strict=True))


def _sharing(models: dict[str, list[Pair]]) -> list[str]:
    """The models of which enough instructions are judged for another one too."""
    judged = {m: {p.index for p in ps if math.isfinite(p.preference)} for m, ps in models.items()}
    together = list(models)
    while True:  # one that leaves may take the instructions of another with it
        kept = []
        for model in together:
            others = set().union(*(judged[other] for other in together if other != model))
            if len(judged[model] & others) >= _LEAST_SHARED * len(judged[model]):
                kept.append(model)
        if kept == together:
            return kept
        together = kept


def _known(difficulties: dict[str, float], index: str) -> float:
    if index not in difficulties:
        raise UserError(
            f"--difficulty has none for index {index} and gives {len(difficulties):,} others; give the file that "
            "belongs to these instructions"
        )
    return difficulties[index]


def _add(rate: WinRate, fit: "Controlled", source: str) -> None:
    rate.length_controlled_win_rate = 100 * fit.rate
    rate.length_controlled_standard_error = 100 * fit.stderr
    low, high = fit.interval()
    rate.length_controlled_ci_low, rate.length_controlled_ci_high = 100 * low, 100 * high
    rate.difficulty_source, rate.is_length_only = source, source == "none"
    rate.coefficients = {
        "quality": fit.quality,
        "length": fit.length,
        "difficulty": fit.difficulty,
    }


def comparisons(judged: Judged) -> Iterator[dict[str, Any]]:
    """Two models on the instructions that both were judged on, paired; in percent."""
    from evals.stats import paired

    for first, second in itertools.combinations(judged.models, 2):
        one, two = (
            {p.index: p.preference for p in judged.models[m] if math.isfinite(p.preference)}
            for m in (first, second)
        )
        if shared := [index for index in one if index in two]:
            found = paired([one[i] for i in shared], [two[i] for i in shared])
            record = {"baseline": first, "candidate": second, "n": found.n, "p": found.p}
            for name in ("difference", "stderr", "ci_low", "ci_high"):
                record[name] = 100 * getattr(found, name)
            yield record


def report(
    judged: Judged, given: str | None = None
) -> tuple[dict[str, Any], dict[str, float], list[str]]:
    """The record of a set of judgements, and lines for the user.

    Args:
        judged: from `evals.judgements.load`.
        given: file with difficulties.

    Returns:
        A record like JSON, its `models` by name in percent; the difficulties by index; the lines.
    """
    rates, difficulties = win_rates(judged, read_difficulties(given) if given else None)
    versus = list(comparisons(judged)) if len(rates) <= _LISTED else []
    record = {
        "baseline": judged.baseline,
        "models": {model: dataclasses.asdict(rate) for model, rate in rates.items()},
        "comparisons": versus,
        "difficulty_file": given,
        "rows_left_out": judged.left_out,
    }
    lines = [f"baseline: {judged.baseline}", table(rates), *_notes(rates, judged.left_out, given)]
    for found in versus:
        lines.append(
            f"{found['candidate']} − {found['baseline']}: {found['difference']:+.2f} points, 95 % interval "
            f"[{found['ci_low']:+.2f}, {found['ci_high']:+.2f}], p {found['p']:.4f}, n {found['n']} (raw win rates, "
            "paired by instruction)"
        )
    return record, difficulties, lines


def table(rates: dict[str, WinRate]) -> str:
    """The win rates as aligned text; `*` marks a rate that is controlled for length alone."""
    width = max(5, *map(len, rates))
    lines = [
        f"{'model':{width}} {'win rate':>9} {'± se':>5} {'discrete':>9} {'LC':>7} {'± se':>6} {'95 % interval':>16} "
        f"{'wins':>6} {'losses':>6} {'draws':>6} {'n':>6} {'longer':>7} {'length':>7}"
    ]
    for model, rate in rates.items():
        controlled = f"{rate.length_controlled_win_rate:.2f}"
        mark = "*" if rate.is_length_only and not rate.note else " "
        interval = f"[{rate.length_controlled_ci_low:.1f}, {rate.length_controlled_ci_high:.1f}]"
        lines.append(
            f"{model:{width}} {rate.win_rate:9.2f} {rate.standard_error:5.2f} {rate.discrete_win_rate:9.2f} "
            f"{controlled:>6}{mark} {rate.length_controlled_standard_error:6.2f} {interval:>16} {rate.n_wins:6} "
            f"{rate.n_wins_base:6} {rate.n_draws:6} {rate.n:6} {rate.share_longer:6.1f}% {rate.avg_length:7.0f}"
        )
    return "\n".join(lines)


def _notes(rates: dict[str, WinRate], left_out: int, given: str | None) -> Iterator[str]:
    sources = {rate.difficulty_source for rate in rates.values() if not rate.note}
    if "joint" in sources:
        count = sum(rate.difficulty_source == "joint" for rate in rates.values())
        yield (
            f"LC: instruction difficulty estimated jointly over {count} models. Do not set it beside a leaderboard's, "
            "which is estimated over its own models: it can be off by many points unless --difficulty gives those"
        )
    if "file" in sources:
        yield f"LC: instruction difficulty from {given}"
    if "none" in sources:
        yield (
            "LC with *: length-only, a fit without instruction difficulty, which one model alone cannot tell; it can "
            "be many points from the published kind: judge several models, or give --difficulty"
        )
    for model, rate in rates.items():
        if rate.note:
            yield f"{model}: {rate.note}"
        if rate.length_controlled_standard_error > _UNKNOWN:
            yield f"{model}: the judge's preferences follow length so closely that quality cannot be told from it"
        if rate.n_missing:
            yield f"{model}: {rate.n_missing:,} of {rate.n + rate.n_missing:,} pairs have no preference: left out"
    if left_out:
        yield f"{left_out:,} rows of another baseline left out"


def main() -> None:
    """Win rates against a baseline from pairwise judgements, raw and controlled for the length of the answers."""
    parser = argparse.ArgumentParser(
        prog="python -m evals.winrate",
        description=main.__doc__,
        epilog="example: python -m evals.winrate judgements.jsonl --json winrates.json",
    )
    add = parser.add_argument
    add("judgements", nargs="+", metavar="JUDGEMENTS.jsonl", help="JSONL or JSON, also .gz")
    add("--difficulty", metavar="FILE", help="of instructions: CSV, JSONL, or OUT of another run")
    add("--baseline", metavar="NAME", help="default: the generator that every row names")
    add("--json", type=Path, metavar="OUT", help="write the numbers as JSON too")
    given = parser.parse_args()
    with plainly():
        if given.json:
            check_file(given.json, None, "rates.json")
        record, difficulties, lines = report(
            load(given.judgements, given.baseline), given.difficulty
        )
        print("\n".join(lines))
        if given.json:
            given.json.parent.mkdir(parents=True, exist_ok=True)
            write_json(given.json, record | {"difficulties": difficulties})


if __name__ == "__main__":
    main()
