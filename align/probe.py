"""What a probe needs before anything is loaded: its prompts, its checks, and what its looks depend on."""

import math
import sys
from pathlib import Path
from typing import Any

from conf.entry import UserError, plain
from conf.schema import Align, Probe, Source
from reward import sources
from reward.looks import FEWEST, LOOKS, Finding, Look, judge, read
from reward.origin import origin
from reward.prompts import Asked, key_of, prompt_of, read_prompts
from reward.rewards import check_models, check_needs, check_reward, model_paths
from reward.store import canonical, source_key
from reward.versions import Version

_ROOT = Path(__file__).parent.parent
# What a look is computed by, besides its rewards.
_CODE = [
    _ROOT / "align" / "probe.py",
    _ROOT / "align" / "stages" / "probe.py",
    _ROOT / "evals" / "generate.py",
    _ROOT / "reward" / "looks.py",
    _ROOT / "reward" / "prompts.py",
]


def questions(source: Source) -> list[Asked]:
    """The distinct prompts of a source, up to its limit.

    Raises:
        UserError: naming the first row that cannot be used: a probe is small enough to be right.
    """
    found, _ = read_prompts(source, "probe.prompts", 0.0)
    return list(found.values())


def check_probe(config: Align, trained: dict[str, Version]) -> None:
    """Check a probe before the first stage starts.

    Args:
        config: an experiment with a probe.
        trained: the rows of the stages that it watches, by stage.

    Raises:
        UserError: naming the key, and what would be right.
    """
    probe = config.probe
    assert probe is not None
    if not trained:
        raise UserError("probe: no stage of this experiment moves a policy toward a preference")
    for name in ("steps", "n", "max_new_tokens", "batch_size"):
        if (number := getattr(probe, name)) < 1:
            raise UserError(f"probe.{name}={number} must be at least 1")
    if not 0 < probe.temperature < math.inf:
        raise UserError(
            f"probe.temperature={probe.temperature} must be a positive number: KL is measured on what is sampled"
        )
    if config.deepspeed or config.launch.nnodes * config.launch.nproc_per_node > 1:
        raise UserError(
            "a probe needs the whole policy in one process: set launch=inline and deepspeed=off, or probe=null"
        )
    for stage in trained:
        if getattr(config, stage).args.get("load_best_model_at_end"):
            raise UserError(
                f"a probe judges the last policy, and {stage}.args.load_best_model_at_end keeps another one: "
                "set one of them off"
            )
    _check_rewards(probe)
    if canonical(plain(probe.proxy)) == canonical(plain(probe.gold)):
        raise UserError("probe.gold is probe.proxy: nothing would be seen; name another measure")
    asked = questions(probe.prompts)
    if len(asked) < FEWEST:
        raise UserError(
            f"probe.prompts has {len(asked)} distinct prompts, and an interval over prompts needs {FEWEST} or more"
        )
    for name in ("proxy", "gold"):
        check_needs(getattr(probe, name), asked, f"probe.{name}")
    for stage, rows in trained.items():
        _check_apart(asked, rows, stage)


def _check_apart(asked: list[Asked], rows: Version, stage: str) -> None:
    keys = {key_of(one.prompt, one.tools) for one in asked}
    trained = (prompt_of(record) for record in rows.records())
    shared = sum(key_of(prompt.prompt, prompt.tools) in keys for prompt in trained)
    if shared:
        raise UserError(
            f"probe.prompts: {shared} of the rows that {stage} trains on have a prompt of the probe; "
            "name prompts that are held out"
        )


def _check_rewards(probe: Probe) -> None:
    for where, reward in (("probe.proxy", probe.proxy), ("probe.gold", probe.gold)):
        check_reward(reward, where)
        check_models(model_paths(reward, where))


def identity(probe: Probe, cache: Path) -> dict[str, Any]:
    """What the looks of a probe depend on besides the policy.

    Raises:
        UserError: when a reward is wrong, or its model's server cannot be reached.
    """
    _check_rewards(probe)  # before a module is looked for: only one that was allowed may be
    return {
        "settings": plain(probe),
        "prompts": sources.identity(probe.prompts, "probe.prompts", cache),
        "proxy": origin(probe.proxy, cache),
        "gold": origin(probe.gold, cache),
        "code": source_key(*_CODE),
    }


class Alarm:
    """Says on stderr, once, that a policy in training is over-optimized."""

    def __init__(self, stage: str) -> None:
        self._stage = stage
        self._looks: list[Look] = []
        self._is_said = False

    def hear(self, row: dict[str, Any]) -> dict[str, float]:
        """Take a new row of looks; its numbers by the names under which a tracker shows them."""
        self._looks.append(Look.from_json(row))
        finding = judge(self._looks, is_watching=True)
        if finding.is_warning and not self._is_said:
            self._is_said = True
            print(f"{self._stage:10} warning: {finding.sentence()}", file=sys.stderr, flush=True)
        values = {key: row[key] for key in row if key not in ("step", "per_prompt")}
        return {f"probe/{key}": value for key, value in values.items() if value is not None}


def finding_of(artifact: Path) -> Finding | None:
    """What the looks of a finished stage amount to; None where none were taken."""
    path = artifact / LOOKS
    return judge(read(path)) if path.is_file() else None
