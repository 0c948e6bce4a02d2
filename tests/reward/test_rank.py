"""Ranked completions, against brute force, rewards computed one by one, and the loaders of the stages."""

import dataclasses
import json
import math
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from itertools import combinations
from pathlib import Path
from typing import Any

import psutil
import pytest
from safetensors.torch import load_file, save_file

from conf.entry import UserError
from conf.schema import Data, Dtype, Model, Paths, Pick, Ranking, Reward, Term
from reward.model import RewardModel
from reward.picks import Ranked, pick
from reward.prompts import Asked
from reward.rank import rank
from reward.samples import Completion, Sample
from reward.verifiers import aside

ROOT = Path(__file__).parents[2]
EXACT = Reward({"exact": Term("exact")})
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path | str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def samples_of(texts: dict[str, list[str]]) -> list[dict[str, Any]]:
    """Rows as evals.sample writes them; a text that ends with … was cut off."""
    return [
        {
            "prompt": user(prompt),
            "completions": [
                {"text": text, "tokens": 9, "finish": "length" if text.endswith("…") else "eos"}
                for text in completions
            ],
        }
        for prompt, completions in texts.items()
    ]


@pytest.fixture(scope="module")
def judge(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reward model with a random head."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, dtype=torch.float32
    )
    torch.nn.init.normal_(model.score.weight, std=1.0)
    out = tmp_path_factory.mktemp("judge")
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(out)
    return out


@pytest.fixture
def config(tmp_path: Path) -> Ranking:
    """Two prompts with known answers, four completions each."""
    prompts = [{"prompt": "1+1?", "reference": "2"}, {"prompt": "2+2?", "reference": "4"}]
    rows = samples_of({"1+1?": ["1", "2", "2", "2…"], "2+2?": ["5", "6", "", "7"]})
    return Ranking(
        source=str(write_rows(tmp_path / "prompts.jsonl", prompts)),
        samples=str(write_rows(tmp_path / "samples.jsonl", rows)),
        reward=EXACT,
        out=str(tmp_path / "out.jsonl"),
        paths=Paths(str(tmp_path / "outputs")),
    )


def ranked(config: Ranking, **changes: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    changed = dataclasses.replace(config, **changes)
    facts = rank(changed)
    return read_rows(changed.out), facts


def test_best_is_the_first_of_the_best(config: Ranking) -> None:
    rows, facts = ranked(config)
    assert [row["messages"][-1]["content"] for row in rows] == ["2", "5"]
    assert rows[0] == {
        "messages": [*user("1+1?"), {"role": "assistant", "content": "2"}],
        "score": 1.0,
        "terms": {"exact": 1.0},
        "rank": 1,
        "of": 4,
        "row": "samples.jsonl:1#2",
    }
    assert (rows[1]["of"], rows[1]["score"]) == (3, 0.0)  # one completion is empty
    assert (facts["mean"], facts["best_mean"]) == (0.25, 0.5)
    counts = facts["counts"]
    assert {name: counts[name] for name in ("prompts", "completions", "cut", "empty", "undecided")} == {
        "prompts": 2, "completions": 8, "cut": 1, "empty": 1, "undecided": 1
    }  # fmt: skip


def test_all_keeps_every_completion_with_its_rewards(config: Ranking, tmp_path: Path) -> None:
    config.reward.terms["brief"] = Term("length", 0.0, {"max_chars": 1})  # recorded, not summed
    rows, facts = ranked(config, pick=Pick.all)
    assert [len(row["completions"]) for row in rows] == [4, 4]
    assert {item["finish"] for row in rows for item in row["completions"]} <= {
        "eos",
        "length",
        None,
    }
    for row in rows:
        for item in row["completions"]:
            assert item["score"] == item["terms"]["exact"]
            assert item["terms"]["brief"] <= 0
    assert (facts["mean"], facts["best_mean"]) == (0.25, 0.5)


def test_accept_keeps_distinct_texts_above_the_limit(config: Ranking) -> None:
    write_rows(Path(config.samples or ""), samples_of({"1+1?": ["2", " 2", "3", "2"]}))
    rows, facts = ranked(config, pick=Pick.accept, min_score=1.0, keep=5)
    assert [row["messages"][-1]["content"] for row in rows] == ["2", " 2"]
    assert facts["accepted_share"] == 0.75
    assert facts["counts"]["repeated"] == facts["counts"]["below_min_score"] == 1
    rows, facts = ranked(config, pick=Pick.accept, min_score=1.0)
    assert (len(rows), facts["counts"]["above_keep"]) == (1, 1)
    with pytest.raises(UserError, match=r"no demonstrations of 1 prompts.*4 below min score"):
        ranked(config, pick=Pick.accept, min_score=1.5)


def test_cut_completions_can_be_dropped(config: Ranking) -> None:
    write_rows(Path(config.samples or ""), samples_of({"1+1?": ["2…", "3…"], "2+2?": ["4…", "5"]}))
    rows, facts = ranked(config, drop_cut=True)
    assert [row["messages"][-1]["content"] for row in rows] == ["5"]
    assert facts["counts"]["prompts_without_a_usable_completion"] == 1
    assert facts["counts"]["cut"] == 3


def test_gaps_are_counted_and_never_zero(config: Ranking, tmp_path: Path) -> None:
    """The second prompt has no reference, so nothing can be said of its completions."""
    write_rows(
        tmp_path / "prompts.jsonl", [{"prompt": "1+1?", "reference": "2"}, {"prompt": "2+2?"}]
    )
    rows, facts = ranked(config)
    assert [row["score"] for row in rows] == [1.0]
    assert facts["counts"]["gaps"] == 4
    assert facts["counts"]["prompts_without_a_usable_completion"] == 1
    assert (facts["mean"], facts["best_mean"]) == (0.5, 1.0)


def test_any_reference_of_a_repeated_prompt_is_right(config: Ranking, tmp_path: Path) -> None:
    said = {"role": "assistant", "content": "5"}
    extra = [{"prompt": "2+2?", "reference": "7"}, {"messages": [*user("2+2?"), said]}]
    rows = [*read_rows(tmp_path / "prompts.jsonl"), *extra]
    write_rows(tmp_path / "prompts.jsonl", rows)
    found, _ = ranked(config, pick=Pick.accept, min_score=1.0, keep=9)
    assert [row["messages"][-1]["content"] for row in found] == ["2", "5", "7"]


def test_samples_of_other_prompts_are_left_out(config: Ranking) -> None:
    rows, facts = ranked(config, limit=1)
    assert (len(rows), facts["counts"]["other_prompts"]) == (1, 1)
    source = str(
        write_rows(Path(config.out).with_name("x.jsonl"), [{"prompt": "x", "answer": "y"}])
    )
    with pytest.raises(UserError, match=r"samples.jsonl has no row with a prompt of"):
        ranked(config, source=source)


def random_case(rng: random.Random) -> tuple[Sample, list[Ranked]]:
    """Completions with ties, gaps, blanks, repeats and cuts."""
    ranked = []
    for number in range(rng.randint(1, 7)):
        completion = Completion(
            rng.choice(["a", "b", "c", "d ", "d", " ", ""]),
            f"s:1#{number + 1}",
            9,
            rng.choice(["eos", "length"]),
        )
        reward = rng.choice([0.0, 0.25, 0.5, 1.0, -1.0, math.nan])
        ranked.append(Ranked(completion, reward, {"x": reward}))
    return Sample(Asked(user("q")), [item.completion for item in ranked]), ranked


def brute_usable(ranked: list[Ranked], drop_cut: bool) -> list[int]:
    return [
        place
        for place, item in enumerate(ranked)
        if item.reward == item.reward
        and item.completion.text.strip() != ""
        and not (drop_cut and item.completion.finish == "length")
    ]


@pytest.mark.parametrize("drop_cut", [False, True])
def test_picks_equal_brute_force(drop_cut: bool) -> None:
    rng = random.Random(5)
    for _ in range(400):
        sample, items = random_case(rng)
        usable = brute_usable(items, drop_cut)
        config = Ranking(pick=Pick.best, drop_cut=drop_cut, out="x")
        found = pick(sample, items, config, Counter())
        tops = [i for i in usable if all(items[i].reward >= items[j].reward for j in usable)]
        assert [row["row"] for row in found.rows] == [f"s:1#{i + 1}" for i in tops[:1]]
        rewards = [item.reward for item in items if item.reward == item.reward]
        assert math.isnan(found.mean) if not rewards else found.mean == sum(rewards) / len(rewards)

        config = dataclasses.replace(config, pick=Pick.accept, min_score=0.25, keep=2)
        found = pick(sample, items, config, Counter())
        good = [i for i in usable if items[i].reward >= 0.25]
        firsts = [  # no better one, and no earlier equal one, has the same text
            i
            for i in good
            if not any(
                items[j].completion.text == items[i].completion.text
                and (items[j].reward, -j) > (items[i].reward, -i)
                for j in good
            )
        ]
        firsts.sort(key=lambda i: (-items[i].reward, i))
        assert [row["row"] for row in found.rows] == [f"s:1#{i + 1}" for i in firsts[:2]]

        config = dataclasses.replace(config, pick=Pick.pairs, pairing="all", min_margin=0.5)
        counts: Counter[str] = Counter()
        found = pick(sample, items, config, counts)
        expected = set()
        for pair in combinations(usable, 2):
            low, high = sorted(pair, key=lambda i: items[i].reward)
            is_apart = items[high].reward - items[low].reward >= 0.5
            if (
                is_apart
                and items[low].completion.text.strip() != items[high].completion.text.strip()
            ):
                expected.add((f"s:1#{high + 1}", f"s:1#{low + 1}"))
        assert {(row["row_chosen"], row["row_rejected"]) for row in found.rows} == expected
        for row in found.rows:
            assert row["margin"] == row["score_chosen"] - row["score_rejected"]
            assert row["terms_chosen"] == {"x": row["score_chosen"]}
        if len(usable) > 1:
            reasons = ("rows", "ties", "below_min_margin", "equal_texts")
            total = len(expected) + sum(counts[reason] for reason in reasons)
            assert total == math.comb(len(usable), 2)

        config = dataclasses.replace(config, pairing="margin", max_pairs=2)
        widest = pick(sample, items, config, Counter()).rows
        margins = sorted((row["margin"] for row in found.rows), reverse=True)
        assert [row["margin"] for row in widest] == margins[:2]


def test_rewards_of_a_model_are_those_of_each_answer_alone(
    judge: Path, config: Ranking, tmp_path: Path
) -> None:
    rng = random.Random(0)
    words = ["yes", "no", "maybe", "rain", "sun"]
    texts = {f"q{i}": [" ".join(rng.choices(words, k=4)) for _ in range(5)] for i in range(70)}
    texts["q1"][2] = "long " * 60
    reward = Reward({
        "model": Term("model", 2.0, {"path": str(judge), "max_length": 120}),
        "right": Term("exact", -0.5),
    })  # fmt: skip
    samples = samples_of(texts)
    samples[3]["tools"] = [TOOL]
    prompts = [{**row, "reference": row["completions"][0]["text"]} for row in samples]
    for row in prompts:
        del row["completions"]
    rows, facts = ranked(
        config,
        source=str(write_rows(tmp_path / "p.jsonl", prompts)),
        samples=str(write_rows(tmp_path / "s.jsonl", samples)),
        reward=reward,
    )
    model = RewardModel.load(str(judge))
    assert facts["counts"]["gaps"] == 1
    means = []
    for row, sample in zip(rows, samples, strict=True):
        prompt, tools = sample["prompt"], sample.get("tools")
        assert row.get("tools") == tools
        scores = [
            2
            * model.score([prompt], [[{"role": "assistant", "content": item["text"]}]], [tools])[0]
            - 0.5 * (item["text"] == sample["completions"][0]["text"])
            for item in sample["completions"]
            if len(item["text"]) < 100
        ]
        means.append(sum(scores) / len(scores))
        assert row["score"] == pytest.approx(max(scores), abs=1e-4)
        assert row["score"] == pytest.approx(
            2 * row["terms"]["model"] - 0.5 * row["terms"]["right"], abs=1e-12
        )
    assert facts["mean"] == pytest.approx(sum(means) / len(means), abs=1e-4)
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert manifest["settings"]["reward"]["terms"]["model"]["weights"] == [model.identity]


def test_rewards_are_kept_for_other_picks_and_more_samples(
    judge: Path, config: Ranking, tmp_path: Path
) -> None:
    judge = shutil.copytree(judge, tmp_path / "judge")
    (judge / "manifest.json").write_text('{"key": "of its training"}')
    texts = {f"q{number}": ["a", "b", "c"] for number in range(100)}
    samples = write_rows(tmp_path / "s.jsonl", samples_of(texts))
    given = {
        "samples": str(samples),
        "source": "",
        "reward": Reward({"m": Term("model", 1.0, {"path": str(judge)})}),
    }
    _, facts = ranked(config, **given)
    assert facts["rewards_present"] == 0
    _, facts = ranked(config, **given, pick=Pick.pairs)
    assert facts["rewards_present"] == 300
    write_rows(samples, samples_of(texts | {"new": ["a", "b"]}))
    _, facts = ranked(config, **given)
    assert facts["rewards_present"] == 64 * 3  # whole chunks of 64 prompts
    before = read_rows(config.out)
    weights = load_file(judge / "model.safetensors")
    weights["score.weight"] = -weights["score.weight"]
    save_file(weights, judge / "model.safetensors", {"format": "pt"})
    rows, facts = ranked(config, **given)
    assert facts["rewards_present"] == 0
    assert [row["score"] for row in rows] != [row["score"] for row in before]


def test_a_verifier_that_was_stopped_may_do_better_next_time(
    config: Ranking, monkeypatch: pytest.MonkeyPatch
) -> None:
    config.reward = Reward({"x": Term("regex", 1.0, {"pattern": "(a|a)*c"})})
    samples = samples_of({"1+1?": ["c"], "2+2?": ["a" * 40 + "b", "c"]})  # 2^40 ways to fail
    write_rows(Path(config.samples or ""), samples)
    monkeypatch.setattr("reward.rank._CHUNK", 1)
    monkeypatch.setattr("reward.verifiers.aside.SECONDS", 0.5)
    assert ranked(config)[1]["rewards_present"] == 0
    assert ranked(config)[1]["rewards_present"] == 1  # the prompt with which nothing was stopped


def test_rewards_of_a_chunk_in_which_a_check_was_given_up_are_not_kept(
    config: Ranking, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(aside, "SECONDS", 1.0)
    bomb = "a" * 5000 + "!"
    texts = {f"q{number}": ["a", "b"] for number in range(64)}
    rows = samples_of(texts | {"late": ["a", bomb]})  # the last one is in a chunk of its own
    given = {
        "samples": str(write_rows(tmp_path / "s.jsonl", rows)),
        "source": "",
        "reward": Reward({"r": Term("regex", 1.0, {"pattern": "(a|a)*", "full": True})}),
    }
    first, facts = ranked(config, **given)
    assert facts["rewards_present"] == 0
    again, facts = ranked(config, **given)
    assert facts["rewards_present"] == 64 * 2
    assert again == first
    assert again[-1]["score"] == 1.0


@pytest.mark.parametrize("kind", [Pick.best, Pick.accept, Pick.pairs])
def test_stages_take_the_rows(kind: Pick, judge: Path, config: Ranking, tmp_path: Path) -> None:
    from reward.data import prepare
    from reward.versions import RECORDS, read_lines

    texts = {f"What is {number}?": ["one", "two", "three…"] for number in range(20)}
    out = str(tmp_path / f"{kind.value}.jsonl")
    rows, _ = ranked(
        config,
        source="",
        samples=str(write_rows(tmp_path / "s.jsonl", samples_of(texts))),
        reward=Reward({"m": Term("model", 1.0, {"path": str(judge)})}),
        pick=kind,
        keep=2 if kind is Pick.accept else 1,
        min_score=-1e9 if kind is Pick.accept else None,
        out=out,
    )
    feedback = "preference" if kind is Pick.pairs else "sft"
    version = prepare(Data(source=out), feedback, tmp_path / "root")
    records = [json.loads(line) for line in read_lines(version.folder / RECORDS)]
    assert len(records) == len(rows) == (40 if kind is Pick.accept else 20)
    keys = ("prompt", "chosen", "rejected", "margin") if kind is Pick.pairs else ("messages",)
    for record, row in zip(records, rows, strict=True):
        assert {key: record[key] for key in keys} == {key: row[key] for key in keys}


@pytest.fixture
def drawing(config: Ranking, tiny_model: Path, judge: Path) -> Ranking:
    """The same prompts, completed by the tiny model and judged by the other one."""
    return dataclasses.replace(
        config,
        samples=None,
        model=Model(str(tiny_model), dtype=Dtype.float32),
        reward=Reward({"m": Term("model", 1.0, {"path": str(judge)})}),
        n=3,
        max_new_tokens=8,
    )


@pytest.mark.parametrize("kind", [Pick.best, Pick.accept, Pick.pairs])
def test_from_prompts_to_rows(
    kind: Pick, drawing: Ranking, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    rows, facts = ranked(drawing, pick=kind, min_score=-1e9 if kind is Pick.accept else None)
    assert "2 prompts (0 were there), 6 completions" in capfd.readouterr().out
    assert len(rows) == 2
    samples = read_rows(tmp_path / "out.samples.jsonl")
    texts = [[item["text"] for item in row["completions"]] for row in samples]
    for row, known in zip(rows, texts, strict=True):
        turn = row["chosen"][0] if kind is Pick.pairs else row["messages"][-1]
        assert turn["content"] in known
    assert facts["best_mean"] > facts["mean"]
    manifest = json.loads((tmp_path / "out.jsonl.manifest.json").read_text())
    assert manifest["settings"]["samples"]["settings"]["n"] == 3


def test_a_failed_child_is_one_message(drawing: Ranking, tmp_path: Path) -> None:
    drawing.model.path = str(tmp_path / "absent")
    with pytest.raises(UserError, match=r"could not be drawn: model.path: there is no folder"):
        rank(drawing)
    assert not Path(drawing.out).exists()


def start(argv: list[str]) -> "subprocess.Popen[bytes]":
    return subprocess.Popen(
        argv, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )


def killed(process: "subprocess.Popen[bytes]", once: Path) -> list[psutil.Process]:
    """Kill a command, not its children, when there is something in a file; the children that it had."""
    while not (once.exists() and once.stat().st_size):
        assert process.poll() is None
        time.sleep(0.01)
    children = psutil.Process(process.pid).children()
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    return children


def test_killed_while_it_draws(drawing: Ranking, tmp_path: Path) -> None:
    """No child is left, and the same command continues."""
    rows = [{"prompt": f"question {number}", "reference": "x"} for number in range(30)]
    source = write_rows(tmp_path / "many.jsonl", rows)
    argv = [
        *(sys.executable, "-m", "reward.rank", f"out={drawing.out}", f"source={source}"),
        *(f"model.path={drawing.model.path}", "model.dtype=float32", "n=2", "max_new_tokens=16"),
        *("batch_size=2", "reward=exact", f"paths.root={drawing.paths.root}"),
    ]
    samples = tmp_path / "out.samples.jsonl"
    (child,) = killed(start(argv), samples)
    child.wait(10)
    present = len(read_rows(samples))
    assert 0 < present < len(rows)
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"30 prompts ({present} were there), 60 completions" in done.stdout
    assert f"{drawing.out}: 30 demonstrations of 30 prompts with 60 completions" in done.stdout


def test_killed_while_it_scores(config: Ranking, judge: Path, tmp_path: Path) -> None:
    """The file is that of an undisturbed command, byte by byte."""
    rng = random.Random(2)
    texts = {f"q{i}": ["".join(rng.choices("abc ", k=40)) + "x" for _ in "12"] for i in range(640)}
    samples = write_rows(tmp_path / "s.jsonl", samples_of(texts))
    argv = [
        *(sys.executable, "-m", "reward.rank", f"out={config.out}", f"samples={samples}"),
        *(
            "reward=model",
            f"reward.terms.model.args.path={judge}",
            f"paths.root={config.paths.root}",
        ),
    ]
    book = tmp_path / ".out.jsonl.rewards"
    killed(start(argv), book)
    assert not Path(config.out).exists()
    present = len(read_rows(book))
    assert 0 < present < 10
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"({present * 128:,} had their reward)" in done.stdout
    whole = str(tmp_path / "whole.jsonl")
    reward = Reward({"model": Term("model", 1.0, {"path": str(judge)})})
    _, facts = ranked(config, samples=str(samples), source="", reward=reward, out=whole)
    assert facts["rewards_present"] == 0
    assert Path(whole).read_bytes() == Path(config.out).read_bytes()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples": None}, "either model.path is set"),
        ({"model": Model("x")}, "either model.path is set"),
        ({"model": Model("x"), "samples": None, "source": ""}, "source must be set"),
        ({"model": Model("x"), "samples": None, "n": 1}, "n=1 leaves nothing to choose from"),
        ({"model": Model("x"), "samples": None, "top_p": 0.0}, "top_p=0.0"),
        ({"reward": Reward()}, "reward.terms is empty"),
        ({"reward": Reward({"a": Term("exakt")})}, "Did you mean 'exact'"),
        ({"min_score": 0.5}, "min_score belongs to pick=accept"),
        ({"pick": Pick.accept}, "pick=accept needs min_score"),
        ({"pick": Pick.accept, "max_pairs": 2}, "max_pairs belongs to pick=pairs"),
        ({"pick": Pick.pairs, "pairing": "best"}, "Did you mean 'best_rest'"),
        ({"pick": Pick.pairs, "pairing": "margin"}, "pairing=margin needs min_margin"),
        ({"pick": Pick.pairs, "min_margin": -1.0}, "min_margin=-1.0"),
        ({"pick": Pick.accept, "min_score": 0.0, "keep": 0}, "keep=0 must be at least 1"),
        ({"pick": Pick.accept, "min_score": math.nan}, "min_score=nan"),
        ({"source": ""}, "samples without their source=: .* no prompt has references"),
        ({"source": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
        ({"samples": "nowhere.jsonl"}, "there is no file nowhere.jsonl"),
        ({"format": "alpacca"}, "Did you mean 'alpaca'"),
    ],
)
def test_mistakes_are_named(config: Ranking, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ranked(config, **changes)
    assert not Path(config.out).exists()


def test_files_are_checked(config: Ranking, tmp_path: Path) -> None:
    for out, message in (
        (str(tmp_path), "must end in .jsonl"),
        (config.source, "is part of the input"),
        (str(config.samples), "is part of the input"),
    ):
        with pytest.raises(UserError, match=message):
            ranked(config, out=out)
    empty = write_rows(tmp_path / "empty.jsonl", [])
    with pytest.raises(UserError, match="has no rows"):
        ranked(config, source=str(empty))
    with pytest.raises(UserError, match=r"empty.jsonl has no row with a prompt"):
        ranked(config, samples=str(empty))
    write_rows(empty, [{"prompt": user("1+1?"), "completions": [{"text": 3}]}])
    with pytest.raises(UserError, match=r"empty.jsonl:1: completion 1 is a number"):
        ranked(config, samples=str(empty))
    write_rows(empty, [{"prompt": user("1+1?"), "completions": [{"text": "2", "tokens": "1"}]}])
    with pytest.raises(UserError, match=r"empty.jsonl:1: 'tokens' of completion 1 is text"):
        ranked(config, samples=str(empty))
    write_rows(empty, [{"prompt": "1+1?"}])
    with pytest.raises(UserError, match="no prompt has references"):
        ranked(config, source=str(empty))


def test_a_failure_leaves_the_earlier_file(config: Ranking) -> None:
    ranked(config)
    before = Path(config.out).read_bytes()
    with Path(config.samples or "").open("a") as file:
        file.write("{broken\n")
    with pytest.raises(UserError, match=r"samples.jsonl:3: it is not JSON"):
        ranked(config, pick=Pick.accept, min_score=0.0)
    assert Path(config.out).read_bytes() == before
