"""Rewards out of a configuration: sums by hand, options refused, functions of the user's own, a reward model."""

import asyncio
import json
import math
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from conf.schema import Reward, Term
from reward.answers import Answer
from reward.origin import origin
from reward.prompts import Asked
from reward.records import Prompt
from reward.rewards import Worth, check_needs, check_reward, open_reward

ASK = [{"role": "user", "content": "Two and two?"}]
ANSWERS = [
    Answer(ASK, "4", ["4"], tokens=1, is_ended=True),
    Answer(ASK, "It is 4.", ["4"], tokens=10, is_ended=False),
    Answer(ASK, "5", ["4"], tokens=1, is_ended=True),
    Answer(ASK, "4", (), tokens=1, is_ended=True),
]


def reward_of(**terms: Term) -> Reward:
    return Reward(terms)


def worth(reward: Reward, answers: list[Answer] = ANSWERS) -> Worth:
    check_reward(reward, "reward")
    with open_reward(reward) as function:
        return function(answers)


def test_a_weighted_sum_by_hand() -> None:
    found = worth(
        reward_of(
            right=Term("math", 2.0),
            whole=Term("exact", 0.5),
            short=Term("length", 0.25, {"max_tokens": 12, "soft_tokens": 8}),
            digits=Term("regex", -1.0, {"pattern": r"^\d$"}),
            seen=Term("ended", 0.0),
        )
    )
    assert found.terms["right"][:3] == [1, 1, 0]
    assert found.terms["whole"][:3] == [1, 0, 0]
    assert found.terms["short"] == [0, -0.75, 0, 0]  # (4 − 10) / 8
    assert found.terms["digits"] == [1, 0, 1, 1]
    assert found.terms["seen"] == [0, -1, 0, 0]
    assert found.total[:3] == [2 + 0.5 - 1, 2 - 0.25 * 0.75, -1]
    assert math.isnan(found.total[3])  # without a reference nothing is said, which is no zero


def test_a_term_of_weight_zero_is_only_recorded() -> None:
    found = worth(reward_of(seen=Term("math", 0.0), right=Term("regex", 1.0, {"pattern": "4"})))
    assert math.isnan(found.terms["seen"][3])
    assert found.total == [1, 1, 0, 1]


def test_no_answers_are_worth_nothing() -> None:
    assert worth(reward_of(right=Term("math")), []) == Worth([], {"right": []})


@pytest.mark.parametrize(
    ("term", "message"),
    [
        (Term("maths"), r"reward\.terms\.t\.kind: there is no kind 'maths'\. Did you mean 'math'"),
        (Term("exact", math.nan), r"reward\.terms\.t\.weight=nan must be a finite number"),
        (Term("exact", 1.0, {"strip": True}), r"reward\.terms\.t\.args: verifier 'exact' has no"),
        (Term("regex", 1.0, {"pattern": "["}), r"reward\.terms\.t\.args: regex: '\['"),
        (Term("model"), r"reward\.terms\.t\.args needs path"),
        (Term("model", 1.0, {"path": "a/b", "batch_token": 1}), "Did you mean 'batch_tokens'"),
        (Term("model", 1.0, {"path": []}), "must be a folder, hub id or address"),
        (Term("model", 1.0, {"path": "a/b", "dtype": "float31"}), "dtype='float31' must be one of"),
        (Term("model", 1.0, {"path": "a/b", "combine": "min"}), "combine is of several models"),
        (Term("model", 1.0, {"path": "a/b", "scales": "x"}), "scales is of several models"),
        (
            Term("model", 1.0, {"path": ["a/b"], "combine": "median"}),
            r"terms\.t\.args: there is no combination 'median'",
        ),
        (Term("model", 1.0, {"path": ["a/b"], "combine": 3}), "no combination 3"),
        (Term("model", 1.0, {"path": ["a/b"], "k": "half"}), "k='half' must be a number"),
        (Term("model", 1.0, {"path": ["a/b"], "k": True}), "k=True must be a number"),
        (
            Term("model", 1.0, {"path": ["a/b"], "combine": "min", "k": 2}),
            "k=2 is of mean_minus_std",
        ),
        (Term("model", 1.0, {"path": ["a/b"], "scales": "no.json"}), "cannot read the scales in"),
        (Term("model", 1.0, {"path": ["a/b"], "scales": 3}), "scales=3 must be a file"),
        (Term("model", 1.0, {"path": ["a/b", "c/d"], "revision": "v1"}), "revision is of one"),
        (
            Term("model", 1.0, {"path": ["http://x", "http://y"], "dtype": "bfloat16"}),
            "set where it is served",
        ),
        (Term("model", 1.0, {"path": "a/b", "max_length": 0}), "max_length=0 must be a whole"),
        (Term("model", 1.0, {"path": "http://x", "dtype": "bfloat16"}), "set where it is served"),
        (Term("function", 1.0, {}), "needs function"),
        (Term("function", 1.0, {"function": "os.system"}), "must be a module and a function in it"),
        (Term("function", 1.0, {"function": "os:system"}), "ALIGN_REWARD_MODULES=os before it"),
        (Term("function", 1.0, {"function": "os:system", "x": 1}), "has no option 'x'"),
    ],
)
def test_what_is_wrong_is_said_before_anything_loads(term: Term, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_reward(reward_of(t=term), "reward")


def test_a_reward_needs_a_term() -> None:
    with pytest.raises(UserError, match=r"probe\.gold\.terms is empty"):
        check_reward(Reward(), "probe.gold")


def test_a_reward_needs_a_weight() -> None:
    with pytest.raises(UserError, match=r"probe\.gold: every weight is 0"):
        check_reward(reward_of(a=Term("exact", 0.0), b=Term("json_valid", -0.0)), "probe.gold")


def test_prompts_without_what_a_verifier_needs_are_refused() -> None:
    reward = reward_of(right=Term("math"), shape=Term("json_schema"))
    bare, full = Prompt(ASK), Prompt(ASK, "4", facts={"schema": {}})
    with pytest.raises(UserError, match="'math' can say nothing, because no prompt has references"):
        check_needs(reward, [bare], "prompts")
    with pytest.raises(UserError, match="no prompt has schema"):
        check_needs(reward, [Prompt(ASK, "4")], "prompts")
    check_needs(reward, [bare, full], "prompts")
    check_needs(reward_of(shape=Term("json_schema", 1.0, {"schema": {}})), [bare], "prompts")


def test_answers_to_a_prompt() -> None:
    asked = Asked(ASK, references=["4"], facts={"unit": "kg"})
    assert asked.answered("5", 2, False) == Answer(ASK, "5", ("4",), {"unit": "kg"}, None, 2, False)
    several = Prompt(ASK, facts={"references": ["4", "four", ""]})
    assert several.references == ["4", "four"]


# --- Functions of the user's own ------------------------------------------------------------------

MODULE = """
import asyncio, threading

def brevity(completions, **kwargs):
    return [-len(completion[0]["content"]) for completion in completions]

def everything(prompts, completions, references, answer, unit, log_metric, **kwargs):
    log_metric("seen", 1.0)
    assert prompts[0][-1]["role"] == "user"
    return [None if u is None else float(r == [a]) for r, a, u in zip(references, answer, unit)]

def short_list(completions):
    return [1.0]

def infinite(completions):
    return [float("inf")] * len(completions)

def texts(completions):
    return ["1"] * len(completions)

def one_number(completions):
    return 1.0

def gaps(completions):
    return [float("nan")] * len(completions)

def failing(completions):
    raise KeyError("solution")

def asks(completions, solution):
    return [0.0] * len(completions)

def counting(completions):
    yield from range(len(completions))

def failing_late(completions):
    yield 1.0
    raise KeyError("solution")

def endless_late(completions):
    yield threading.Event().wait(60)

async def failing_later(completions):
    return failing_late(completions)

class Served:
    async def __call__(self, completions, **kwargs):
        return [2.0] * len(completions)

served = Served()
loops, waiting = set(), []

async def first(completions, **kwargs):
    loops.add(id(asyncio.get_running_loop()))
    waiting.append(1)
    while len(waiting) < 2:  # until the other one runs too
        await asyncio.sleep(0.001)
    return [1.0] * len(completions)

async def second(completions, **kwargs):
    loops.add(id(asyncio.get_running_loop()))
    waiting.append(2)
    while len(waiting) < 2:
        await asyncio.sleep(0.001)
    return [None] + [10.0] * (len(completions) - 1)

def endless(completions, **kwargs):
    threading.Event().wait(60)

async def slow(completions, **kwargs):
    await asyncio.sleep(60)

async def own_timeout(completions, **kwargs):
    raise TimeoutError("of the server")

constant = 3
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_rewards.py").write_text(textwrap.dedent(MODULE))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("ALIGN_REWARD_MODULES", "some.other, my_rewards")
    monkeypatch.delitem(sys.modules, "my_rewards", raising=False)


def own_term(name: str, weight: float = 1.0, **options: Any) -> Term:
    return Term("function", weight, {"function": f"my_rewards:{name}", **options})


def test_a_function_is_called_as_trl_calls_it() -> None:
    answers = [Answer(ASK, "4", ["4"], {"unit": "kg"}), Answer(ASK, "55", ["4"])]
    found = worth(
        reward_of(short=own_term("brevity", 0.5), all=own_term("everything", 0.0)), answers
    )
    assert found.terms["short"] == [-1, -2]
    assert found.terms["all"][0] == 1
    assert math.isnan(found.terms["all"][1])  # None: a gap
    assert found.total == [-0.5, -1]


def test_a_reward_of_trl_runs_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    from trl.rewards import think_format_reward

    monkeypatch.setenv("ALIGN_REWARD_MODULES", "trl.rewards")
    texts = ["<think>\na\n</think>\nb", "b"]
    answers = [Answer(ASK, text) for text in texts]
    reward = reward_of(t=Term("function", 1.0, {"function": "trl.rewards:think_format_reward"}))
    expected = think_format_reward([[{"role": "assistant", "content": text}] for text in texts])
    assert worth(reward, answers).total == expected == [1, 0]


def test_asynchronous_functions_run_together_on_one_loop() -> None:
    reward = reward_of(a=own_term("first"), b=own_term("second"), c=own_term("served"))
    with open_reward(reward) as function:
        found, again = function(ANSWERS), function(ANSWERS)
    assert math.isnan(found.total[0])
    assert found.total[1:] == again.total[1:] == [13, 13, 13]
    assert len(sys.modules["my_rewards"].loops) == 1
    assert not any(thread.name == "reward functions" for thread in threading.enumerate())


def test_asynchronous_functions_run_where_a_loop_runs_already() -> None:
    async def inside() -> Worth:
        return worth(reward_of(a=own_term("served")))

    assert asyncio.run(inside()).total == [2, 2, 2, 2]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("short_list", "my_rewards:short_list returned 1 values for 4 completions"),
        ("infinite", "returned inf, expected a finite number"),
        ("texts", "returned '1', expected a finite number"),
        ("one_number", "returned float, expected a list of numbers"),
        ("failing", r"my_rewards:failing failed in .*my_rewards\.py:\d+: KeyError: 'solution'"),
        ("failing_late", r"failed in .*my_rewards\.py:\d+: KeyError: 'solution'"),
        ("failing_later", r"failed in .*my_rewards\.py:\d+: KeyError: 'solution'"),
        ("asks", "asks for solution, and the prompts' rows have only reference, answer, prompts"),
        ("own_timeout", "TimeoutError: of the server"),
        ("missing", "my_rewards has no function 'missing'"),
        ("constant", "my_rewards has no function 'constant'"),
    ],
)
def test_a_function_that_fails_is_named(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        worth(reward_of(t=own_term(name)))


def test_a_function_that_takes_too_long_is_ended() -> None:
    start = time.monotonic()
    for name in ("slow", "endless", "endless_late"):
        with pytest.raises(UserError, match=rf"my_rewards:{name} took longer than 0\.05 s"):
            worth(reward_of(t=own_term(name, timeout=0.05)))
    assert time.monotonic() - start < 30


def test_a_plain_function_may_have_a_limit_too() -> None:
    assert (
        worth(reward_of(t=own_term("brevity", timeout=30))).total
        == worth(reward_of(t=own_term("brevity"))).total
    )
    with pytest.raises(UserError, match=r"failed in .*my_rewards\.py:\d+: KeyError: 'solution'"):
        worth(reward_of(t=own_term("failing", timeout=30)))


def test_values_may_come_from_a_generator() -> None:
    assert worth(reward_of(t=own_term("counting"))).total == [0, 1, 2, 3]


def test_nan_of_a_function_is_a_gap() -> None:
    assert all(map(math.isnan, worth(reward_of(t=own_term("gaps"))).total))


def test_only_modules_that_were_allowed_are_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    reward = reward_of(t=own_term("brevity"))
    for allowed in ("", "my_rewards.inner", "my_reward"):
        monkeypatch.setenv("ALIGN_REWARD_MODULES", allowed)
        for use in (
            lambda: check_reward(reward, "reward"),
            lambda: open_reward(reward).__enter__(),
        ):
            with pytest.raises(UserError, match="cannot import code by itself"):
                use()
    assert "my_rewards" not in sys.modules


# --- Reward models --------------------------------------------------------------------------------


def test_a_reward_model_is_a_term(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoTokenizer, LlamaForSequenceClassification

    from reward.model import RewardModel

    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(tiny_model, num_labels=1)
    LlamaForSequenceClassification(config).to(torch.float32).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(tmp_path)
    args = {"path": str(tmp_path), "dtype": "float32", "max_length": 64}
    found = worth(reward_of(model=Term("model", 2.0, args), right=Term("exact")), ANSWERS[:3])
    turns = [[{"role": "assistant", "content": answer.text}] for answer in ANSWERS[:3]]
    scores = RewardModel.load(str(tmp_path), max_length=64).score([ASK] * 3, turns)
    assert found.terms["model"] == pytest.approx(scores, abs=1e-6)
    assert found.total == pytest.approx([2 * scores[0] + 1, 2 * scores[1], 2 * scores[2]], abs=1e-5)


def test_members_in_their_own_units(
    seeded_reward_model: Callable[[int], Path], tmp_path: Path
) -> None:
    from reward.model import RewardModel

    paths = [str(seeded_reward_model(seed)) for seed in (1, 2)]
    members = [RewardModel.load(path) for path in paths]
    scales = [(0.5, 2.0), (-1.0, 0.25)]
    file = tmp_path / "manifest.json"
    known = [
        {"identity": member.identity, "mean": mean, "std": std}
        for member, (mean, std) in zip(members, scales, strict=True)
    ]
    file.write_text(json.dumps({"members": known}))
    args = {"path": paths, "combine": "min", "scales": str(file)}
    turns = [[{"role": "assistant", "content": answer.text}] for answer in ANSWERS]
    columns = [
        [(score - mean) / std for score in member.score([ASK] * 4, turns)]
        for member, (mean, std) in zip(members, scales, strict=True)
    ]
    expected = [min(row) for row in zip(*columns, strict=True)]
    assert worth(reward_of(t=Term("model", 1.0, args))).total == pytest.approx(expected, abs=1e-4)


# --- What names a reward --------------------------------------------------------------------------


def key_of(term: Term, tmp_path: Path) -> str:
    return json.dumps(origin(reward_of(t=term), tmp_path / "cache"), sort_keys=True)


def test_a_model_is_named_by_its_bytes(tmp_path: Path) -> None:
    """Every member's, whatever the manifest of its folder says; a file of scales too."""
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text(name)
        (tmp_path / name / "manifest.json").write_text(f'{{"key": "{name}"}}')
    (tmp_path / "scales.json").write_text("1")
    paths = [str(tmp_path / "one"), str(tmp_path / "two")]
    term = Term("model", 1.0, {"path": paths, "scales": str(tmp_path / "scales.json")})
    keys = [key_of(term, tmp_path)]
    for file in ("two/model.safetensors", "one/config.json", "scales.json"):
        assert key_of(term, tmp_path) == keys[-1]
        (tmp_path / file).write_text("[]")
        keys.append(key_of(term, tmp_path))
    (tmp_path / "one" / "README.md").write_text("not loaded")
    assert key_of(term, tmp_path) == keys[-1]
    assert len({*keys}) == 4


def test_a_function_is_named_by_its_module(tmp_path: Path) -> None:
    before = key_of(own_term("brevity"), tmp_path)
    (tmp_path / "my_rewards.py").write_text("brevity = len")
    assert key_of(own_term("brevity"), tmp_path) != before


@pytest.mark.parametrize("pattern", ["~x", ".", "a" * 5000, "\0"])
def test_an_option_is_no_path(
    pattern: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    term = Term("regex", 1.0, {"pattern": pattern})
    before = key_of(term, tmp_path)
    (tmp_path / "new").write_text("a file beside")
    assert key_of(term, tmp_path) == before


def test_all_code_behind_a_reward_is_in_its_key() -> None:
    from reward.origin import _CODE

    assert all(path.exists() for path in _CODE)
    names = {path.stem for path in _CODE}
    assert {"sandbox", "inside", "seccomp", "remote", "ensemble", "classifier"} <= names
