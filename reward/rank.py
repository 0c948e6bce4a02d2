"""`python -m reward.rank model.path=… source=… reward=… out=…`: what a stage trains on, from a model and a reward."""

import dataclasses
import math
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from conf.entry import UserError, entry, plain
from conf.passthrough import did_you_mean
from conf.schema import Pick, Ranking
from reward.quiet import quiet

if TYPE_CHECKING:
    from reward.picks import Picked, Ranked
    from reward.prompts import Asked
    from reward.rewards import RewardFunction
    from reward.samples import Sample
    from reward.scorebook import Scorebook

_CHUNK = 64  # prompts whose completions are scored together; what a killed command loses
# Keys that one way of picking has, and no other.
_BELONGS = {
    "min_score": Pick.accept,
    "keep": Pick.accept,
    "pairing": Pick.pairs,
    "min_margin": Pick.pairs,
    "max_pairs": Pick.pairs,
}
_NOUNS = {
    Pick.best: "demonstrations",
    Pick.accept: "demonstrations",
    Pick.pairs: "pairs",
    Pick.all: "rows",
}


@dataclass
class Tally:
    """What was found on the way."""

    counts: "Counter[str]" = field(default_factory=Counter)
    means: list[float] = field(default_factory=list)  # of the prompts with a usable completion
    bests: list[float] = field(default_factory=list)
    margins: list[float] = field(default_factory=list)

    def add(self, picked: "Picked") -> None:
        """Take note of what one prompt gave."""
        self.counts["rows"] += len(picked.rows)
        self.margins += [row["margin"] for row in picked.rows if "margin" in row]
        if math.isfinite(picked.best):
            self.means.append(picked.mean)
            self.bests.append(picked.best)

    def facts(self, pick: Pick) -> dict[str, Any]:
        """Counts and means, as they stand in the manifest."""
        from reward.pairs import quantiles

        found: dict[str, Any] = {
            "counts": dict(self.counts),
            "mean": _mean(self.means),
            "best_mean": _mean(self.bests),
        }
        if pick is Pick.accept:
            found["accepted_share"] = self.counts["accepted"] / self.counts["completions"]
        if self.margins:
            found["margin"] = quantiles(self.margins)
        return found


def rank(config: Ranking) -> dict[str, Any]:
    """Write the rows that `config.pick` asks for, to `config.out`, which appears when it is whole.

    Returns:
        What was done: counts and means, as they also stand in the manifest beside the file.

    Raises:
        UserError: when the settings, the source, the model, the reward or the samples do not allow it.
    """
    from reward.command import written_whole
    from reward.origin import origin
    from reward.rewards import open_reward
    from reward.scorebook import opened
    from reward.store import write_json

    check(config)
    known = _known_prompts(config)
    samples = _samples(config, known)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    cache = Path(config.paths.root) / "cache"
    manifest, tally = out.with_name(f"{out.name}.manifest.json"), Tally()
    identity = origin(config.reward, cache)
    with opened(out, identity) as book, open_reward(config.reward) as reward:
        with written_whole(out) as write:
            for picked in _picked(config, samples, known, reward, book, tally.counts):
                tally.add(picked)
                for row in picked.rows:
                    write(row)
            _refuse_nothing(config, samples, tally)
            manifest.unlink(missing_ok=True)  # of an earlier file
        facts = tally.facts(config.pick) | {"rewards_present": book.present}
        write_json(manifest, {**facts, **_made_with(config, samples, identity, cache)})
    return facts


def check(config: Ranking) -> None:
    """Check what can be checked without reading or loading anything.

    Raises:
        UserError: naming the key.
    """
    from reward.command import check_out
    from reward.pairs import METHODS
    from reward.rewards import check_reward
    from reward.samples import check_sampling

    if bool(config.model.path) == bool(config.samples):
        raise UserError(
            "either model.path is set, which draws completions, or samples=FILE, which holds them already"
        )
    if config.model.path and not config.source:
        raise UserError("source must be set: the prompts that the model completes")
    check_reward(config.reward, "reward")
    for key, pick in _BELONGS.items():
        if config.pick is not pick and getattr(config, key) != _default(key):
            raise UserError(
                f"{key} belongs to pick={pick.value}, and pick={config.pick.value} is set"
            )
    if config.pairing not in METHODS:
        hint = did_you_mean(config.pairing, METHODS)
        raise UserError(
            f"there is no pairing {config.pairing!r}.{hint} There are: {', '.join(METHODS)}"
        )
    if config.pairing == "margin" and config.min_margin == 0:
        raise UserError("pairing=margin needs min_margin: how far apart two rewards must be")
    if not 0 <= config.min_margin < math.inf:
        raise UserError(f"min_margin={config.min_margin} must be 0 or a positive number")
    if config.pick is Pick.accept and config.min_score is None:
        raise UserError("pick=accept needs min_score: the least reward of what is kept")
    if config.min_score is not None and not math.isfinite(config.min_score):
        raise UserError(f"min_score={config.min_score} must be a finite number")
    if config.model.path:
        check_sampling(config)
    for key in ("keep", "max_pairs"):
        number = getattr(config, key)
        if number is not None and number < 1:
            raise UserError(f"{key}={number} must be at least 1")
    if config.model.path and config.n == 1 and config.pick in (Pick.best, Pick.pairs):
        raise UserError(
            f"n=1 leaves nothing to choose from: pick={config.pick.value} needs n=2 or more"
        )
    for source in filter(None, (config.source, config.samples)):
        check_out(Path(config.out), source)


def _default(key: str) -> Any:
    return next(item.default for item in dataclasses.fields(Ranking) if item.name == key)


def _known_prompts(config: Ranking) -> "Mapping[str, Asked] | None":
    """The prompts of the source by their key, with references and facts; None without a source.

    Raises:
        UserError: when a verifier needs what no prompt comes with.
    """
    from reward.prompts import read_prompts
    from reward.rewards import check_needs

    known = None
    if config.source:
        known, _ = read_prompts(config, "rank", config.max_bad_fraction)
    where = config.source or "samples without their source="
    check_needs(config.reward, (known or {}).values(), where)
    return known


def _samples(config: Ranking, known: "Mapping[str, Asked] | None") -> Path:
    """The file of completions, drawn where the configuration names none."""
    from reward.rewards import open_reward
    from reward.samples import draw
    from reward.sources import local_files

    if config.samples is not None:
        if not local_files(config.samples):
            raise UserError(f"there is no file {config.samples}: python -m evals.sample writes it")
        return Path(os.path.expanduser(config.samples))
    path = Path(config.out).with_suffix(".samples.jsonl")
    with open_reward(config.reward):  # a reward that cannot be had is known before hours of drawing
        pass
    draw(config, path, len(known or {}))
    return path


def _picked(
    config: Ranking,
    samples: Path,
    known: "Mapping[str, Asked] | None",
    reward: "RewardFunction",
    book: "Scorebook",
    counts: "Counter[str]",
) -> "Iterator[Picked]":
    """What each prompt gives, in the order of the samples."""
    from tqdm import tqdm

    from reward.picks import pick
    from reward.samples import read_samples

    rows = read_samples(str(samples), known, counts)
    with tqdm(unit="prompt", desc="score", disable=None) as bar:
        while chunk := list(islice(rows, _CHUNK)):
            for sample, ranked in zip(chunk, _ranked(chunk, reward, book), strict=True):
                yield pick(sample, ranked, config, counts)
            bar.update(len(chunk))


def _ranked(
    chunk: "list[Sample]", reward: "RewardFunction", book: "Scorebook"
) -> "Iterator[list[Ranked]]":
    """The completions of each sample with their rewards."""
    from reward.picks import Ranked

    worth = book.score([answer for sample in chunk for answer in sample.answers()], reward)
    place = 0
    for sample in chunk:
        ranked = []
        for completion in sample.completions:
            terms = {name: values[place] for name, values in worth.terms.items()}
            ranked.append(Ranked(completion, worth.total[place], terms))
            place += 1
        yield ranked


def _refuse_nothing(config: Ranking, samples: Path, tally: Tally) -> None:
    """Stop when there is no row to write."""
    if tally.counts["completions"] and tally.counts["gaps"] == tally.counts["completions"]:
        raise UserError(
            f"no completion in {samples} has a reward ({_left_out(tally.counts)}): give the prompts what the terms need"
        )
    if tally.counts["rows"]:
        return
    if not tally.counts["prompts"]:
        raise UserError(
            f"{samples} has no row"
            + (f" with a prompt of {config.source}" if config.source else "")
        )
    raise UserError(
        f"{samples} gave no {_NOUNS[config.pick]} of {tally.counts['prompts']:,} prompts (left out: "
        f"{_left_out(tally.counts)})"
    )


def _made_with(
    config: Ranking, samples: Path, identity: dict[str, Any], cache: Path
) -> dict[str, Any]:
    """All that the file depends on."""
    from reward import sources
    from reward.samples import settings_of
    from reward.store import content_key, fingerprint

    keys = [
        "pick",
        "drop_cut",
        "seed",
        *(key for key, pick in _BELONGS.items() if pick is config.pick),
    ]
    settings = {
        **{key: plain(getattr(config, key)) for key in keys},
        "reward": identity,
        "samples": {
            "file": samples.name,
            "fingerprint": fingerprint(samples, cache / "fingerprints.json"),
            "settings": settings_of(samples),
        },
        "source": config.source
        and {"name": config.source, "identity": sources.identity(config, "rank", cache)},
    }
    return {"settings_hash": content_key(settings), "settings": settings}


def _mean(values: list[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


# Counts that say how much there was; the others say what was left out, and why.
_WHOLE = ("rows", "prompts", "undecided", "completions", "cut", "accepted")


def _left_out(counts: Mapping[str, int]) -> str:
    from reward.command import counts as in_words

    return in_words(
        {name.replace("_", " "): n for name, n in counts.items() if n and name not in _WHOLE}
    )


def described(config: Ranking, facts: Mapping[str, Any]) -> str:
    """The facts of a run, in a few lines."""
    found = Counter(facts["counts"])
    noun = _NOUNS[config.pick] + (f" by {config.pairing}" if config.pick is Pick.pairs else "")
    lines = [
        f"{config.out}: {found['rows']:,} {noun} of {found['prompts']:,} prompts with "
        f"{found['completions']:,} completions ({facts['rewards_present']:,} had their reward)",
        f"reward: mean {facts['mean']:.4g} of one completion, {facts['best_mean']:.4g} of the best of "
        f"{found['completions'] / found['prompts']:.3g}",
    ]
    if "accepted_share" in facts:
        lines.append(f"accepted: {facts['accepted_share']:.1%} of the completions")
    if "margin" in facts:
        quantiles = ", ".join(f"{name} {value:.4g}" for name, value in facts["margin"].items())
        lines.append(f"margin: {quantiles}")
    if found["undecided"]:
        lines.append(
            f"prompts whose completions have one and the same reward: {found['undecided']:,}"
        )
    what = "left out" if config.drop_cut else "kept"
    lines.append(f"cut off by the limit on tokens: {found['cut']:,} completions, {what}")
    lines.append(f"left out: {_left_out(found)}")
    return "\n".join(lines)


@entry("rank", Ranking)
def main(config: Ranking, overrides: list[str]) -> float | None:
    """Rank, and print what came of it; the mean reward of the best is what a sweeper sees."""
    del overrides
    quiet()
    facts = rank(config)
    print(described(config, facts))
    best: float = facts["best_mean"]
    return best


if __name__ == "__main__":
    main()
