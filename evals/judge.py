"""`python -m evals.judge BASELINE ANSWERS OUT.jsonl`: two sets of answers, judged pair by pair.

The judge is a chat model behind an OpenAI-compatible endpoint, which sees every pair in both orders, or a local reward
model, which sees one answer at a time. OUT is what `python -m evals.winrate` reads.
"""

import argparse
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.entry import UserError, plainly
from evals.matches import Answers, Match, align, read_answers
from evals.verdicts import ORDERS, Bench, preference_of
from evals.winrate import report
from reward.chat import Endpoint, check_url, key_of
from reward.command import at_least_one, at_least_zero, check_out, written_whole
from reward.intervals import wilson
from reward.store import write_json
from reward.turns import Row, make_turn


@dataclass
class Sitting:
    """What a judge said: for each pair what goes into its row, and the numbers about the judge itself."""

    rows: list[Row]  # preference (0 to 1, None for a gap) and what it is made of
    facts: dict[str, Any]
    reasons: list[str]  # why there are gaps, an example of each kind


def by_endpoint(bench: Bench, matches: list[Match], concurrency: int) -> Sitting:
    """Judge with a chat model; a pair counts when both orders have a verdict."""
    found = bench.judge(matches, concurrency)
    rows: list[Row] = []
    for verdicts in found:
        values = [preference_of(v, order) for order, v in verdicts.items() if v is not None]
        is_whole = len(values) == len(ORDERS)
        rows.append({"preference": sum(values) / 2 if is_whole else None, "orders": verdicts})
    facts = order_facts(found) | {
        "asked": bench.asked,
        "remembered": bench.remembered,
        "retries": bench.retries,
        "unanswered": len(bench.unanswered),
        "unparsable": len(bench.unparsable),
    }
    reasons = [f"no answer: {reason}" for reason in bench.unanswered[:1]]
    reasons += [f"no verdict in the reply {reply[:80]!r}" for reply in bench.unparsable[:1]]
    return Sitting(rows, facts, reasons)


def order_facts(found: list[dict[str, str | None]]) -> dict[str, Any]:
    """How far the judge goes by the order, in percent.

    `flip_rate` is the share of whole pairs whose outcome differs between the orders, `tie_rate` of verdicts that are
    ties, `first_rate` of the other verdicts that prefer the reply which stands first. Its interval is Wilson's for as
    many independent verdicts as there are pairs: two verdicts on one pair may say no more than one.
    """
    whole = [v for v in found if all(v.values())]
    flips = sum(len({preference_of(str(v[order]), order) for order in ORDERS}) > 1 for v in whole)
    verdicts = [[v for v in pair.values() if v is not None] for pair in found]
    said = sum(map(len, verdicts))
    ties = sum(pair.count("tie") for pair in verdicts)
    first = sum(pair.count("A") for pair in verdicts)
    pairs = sum(any(v != "tie" for v in pair) for pair in verdicts)
    rate = first / (said - ties) if said > ties else math.nan
    low, high = wilson(rate, pairs)
    return {
        "flip_rate": 100 * flips / len(whole) if whole else math.nan,
        "tie_rate": 100 * ties / said if said else math.nan,
        "first_rate": 100 * rate,
        "first_ci_low": 100 * low,
        "first_ci_high": 100 * high,
    }


def by_reward_model(model: Any, matches: list[Match]) -> Sitting:
    """Judge with a reward model: the preference is the logistic of the difference of the scores.

    That is the Bradley–Terry probability on which such a model is trained. A conversation that is longer than the model
    can see has no score: a gap.
    """
    prompts = [match.prompt for match in matches for _ in range(2)]
    texts = [text for match in matches for text in (match.baseline, match.answer)]
    scores = model.score(prompts, [[make_turn("assistant", text)] for text in texts])
    rows: list[Row] = []
    for base, ours in zip(scores[::2], scores[1::2], strict=True):
        is_scored = math.isfinite(base) and math.isfinite(ours)
        margin = ours - base
        preference = 0.5 * (1 + math.tanh(margin / 2)) if is_scored else None
        pair = {"baseline": base, "model": ours}
        scored = {name: score if math.isfinite(score) else None for name, score in pair.items()}
        rows.append({"preference": preference, "scores": scored})
    judged = [row["preference"] for row in rows if row["preference"] is not None]
    too_long = len(rows) - len(judged)
    ties = 100 * judged.count(0.5) / len(judged) if judged else math.nan
    reasons = [f"longer than {model.max_length} tokens"] if too_long else []
    return Sitting(rows, {"tie_rate": ties, "too_long": too_long}, reasons)


def write(
    sitting: Sitting, matches: list[Match], names: tuple[str, str], judge: str, out: Path
) -> None:
    """Write the judgements, a row a pair in the baseline's order of prompts."""
    with written_whole(out) as put:
        for match, row in zip(matches, sitting.rows, strict=True):
            preference = row["preference"]
            common = {
                "index": match.index,
                "generator_1": names[0],
                "generator_2": names[1],
                "len_1": len(match.baseline),
                "len_2": len(match.answer),
                "preference": None if preference is None else 1 + preference,
                "judge": judge,
            }
            put(common | {key: value for key, value in row.items() if key != "preference"})


_MOST_FLIPS = 50.0  # percent; above it the order decides more outcomes than the replies


def summary(sitting: Sitting, n_pairs: int, gaps: int) -> list[str]:
    """The numbers about the judge as lines."""
    facts = sitting.facts
    lines = [f"{n_pairs:,} pairs, {n_pairs - gaps:,} judged, {gaps:,} gaps"]
    if "flip_rate" in facts:
        lines.append(
            f"{facts['asked']:,} questions asked, {facts['remembered']:,} remembered, {facts['retries']:,} retries, "
            f"{facts['unanswered']:,} unanswered, {facts['unparsable']:,} unparsable"
        )
        lines.append(
            f"flip rate {facts['flip_rate']:.1f} % (the outcome changes with the order), tie rate "
            f"{facts['tie_rate']:.1f} %, first reply preferred {facts['first_rate']:.1f} % "
            f"[{facts['first_ci_low']:.1f}, {facts['first_ci_high']:.1f}]"
        )
        if facts["flip_rate"] > _MOST_FLIPS:
            lines.append(
                "warning: most outcomes change with the order, so the judge goes by the place of a reply; the rate "
                "below is near 50 % whatever the answers are, and its error does not show that"
            )
    else:
        lines.append(f"tie rate {facts['tie_rate']:.1f} %, {facts['too_long']:,} too long")
    return lines + [f"gaps: {reason}" for reason in sitting.reasons]


def run(given: argparse.Namespace) -> list[str]:
    """Judge, write, and tell.

    Raises:
        UserError: when the answers do not match, the judge cannot be asked, or judged nothing.
    """
    _check_judge(given)
    check_out(given.out, None)
    names = given.names or (None, None)
    sides = [
        read_answers(path, name)
        for path, name in zip((given.baseline, given.answers), names, strict=True)
    ]
    matches = align(sides[0], sides[1])
    judge, sitting = _sit(given, matches)
    pair = (sides[0].name, sides[1].name)
    write(sitting, matches, pair, judge, given.out)
    gaps = sum(row["preference"] is None for row in sitting.rows)
    if gaps == len(matches):
        raise UserError(
            f"nothing could be judged: all of {gaps:,} pairs are gaps ({'; '.join(sitting.reasons)}); check the "
            "judge, then give the same command again"
        )
    from evals.judgements import load

    record, difficulties, lines = report(load([str(given.out)], pair[0]))
    facts = {"pairs": len(matches), "gaps": gaps, **sitting.facts}
    path = given.out.with_name(f"{given.out.name}.summary.json")
    write_json(path, {"judge": judge, **facts, **record, "difficulties": difficulties})
    notes = [_further(side) for side in sides if side.further]
    return [*notes, *summary(sitting, len(matches), gaps), *lines, str(given.out)]


def _further(side: Answers) -> str:
    return f"{side.name}: the first completion of each prompt is judged, {side.further:,} others are not"


def _check_judge(given: argparse.Namespace) -> None:
    if (given.endpoint is None) == (given.reward_model is None):
        raise UserError("give one judge: --endpoint URL with --model NAME, or --reward-model PATH")
    if given.reward_model is not None:
        from reward.ensemble import check_options

        check_options([given.reward_model], _options(given))
    if given.endpoint is not None and not given.model:
        raise UserError("--endpoint needs --model NAME, the judge's name there")


def _options(given: argparse.Namespace) -> dict[str, Any]:
    """What was set of the options of a reward model."""
    named = {"batch_tokens": given.batch_tokens, "max_length": given.max_length}
    return {name: value for name, value in named.items() if value is not None}


def _sit(given: argparse.Namespace, matches: list[Match]) -> tuple[str, Sitting]:
    """The judge's name and what it said."""
    if given.reward_model is not None:
        from reward.ensemble import close, open_model

        model = open_model(given.reward_model, **_options(given))
        try:
            return given.reward_model, by_reward_model(model, matches)
        finally:
            close(model)
    endpoint = Endpoint(
        check_url(given.endpoint),
        given.model,
        key_of(given.api_key_env),
        given.timeout,
        given.retries,
        given.pause,
        is_json_asked=not given.no_json_mode,
        temperature=None if given.no_temperature else given.temperature,
    )
    cache = given.cache or given.out.with_name(f"{given.out.name}.verdicts")
    bench = Bench(endpoint, cache, {"temperature": endpoint.temperature})
    return given.model, by_endpoint(bench, matches, given.concurrency)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m evals.judge",
        description=main.__doc__,
        epilog="example: python -m evals.judge base.jsonl tuned.jsonl judgements.jsonl "
        "--endpoint http://localhost:8000/v1 --model NAME",
    )
    add = made.add_argument
    add("baseline", metavar="BASELINE", help="answers of the baseline (JSONL or JSON, also .gz)")
    add("answers", metavar="ANSWERS", help="answers of the model to the same prompts")
    add("out", metavar="OUT.jsonl", type=Path, help="judgements, for python -m evals.winrate")
    add("--names", nargs=2, metavar=("BASELINE", "MODEL"), help="default: from the files")
    add(
        "--reward-model",
        metavar="PATH",
        help="judge with a reward model: folder, hub id, or http(s)://HOST:PORT",
    )
    add(
        "--batch-tokens",
        type=at_least_one,
        metavar="N",
        help="tokens that a reward model scores together, padding among them (4096)",
    )
    add(
        "--max-length",
        type=at_least_one,
        help="tokens that a reward model scores at most; default: all that it can see",
    )
    add("--endpoint", metavar="URL", help="judge with a chat model: OpenAI-compatible, up to /v1")
    add("--model", metavar="NAME", help="the chat model's name there")
    add(
        "--api-key-env",
        metavar="NAME",
        help="environment variable that holds the API key; default: no key",
    )
    add(
        "--temperature",
        type=at_least_zero,
        default=0.0,
        metavar="T",
        help="of the judge (%(default)s)",
    )
    add("--no-temperature", action="store_true", help="for models that take none")
    add("--no-json-mode", action="store_true", help="for servers without response_format")
    add("--cache", type=Path, metavar="FILE", help="of verdicts; default: OUT.jsonl.verdicts")
    add(
        "--concurrency",
        type=at_least_one,
        default=4,
        metavar="N",
        help="requests at a time (%(default)s)",
    )
    add(
        "--timeout",
        type=at_least_zero,
        default=120.0,
        metavar="SECONDS",
        help="of a request (%(default)s)",
    )
    add(
        "--retries",
        type=at_least_one,
        default=5,
        metavar="N",
        help="after 429, 5xx, timeouts (%(default)s)",
    )
    add(
        "--pause",
        type=at_least_zero,
        default=1.0,
        metavar="SECONDS",
        help="before the first one (%(default)s)",
    )
    return made


def main() -> None:
    """Judge two sets of answers to the same prompts pair by pair, in both orders."""
    given = parser().parse_args()
    with plainly():
        for line in run(given):
            print(line, flush=True)


if __name__ == "__main__":
    main()
