"""Sampling from a tiny model, against transformers by hand on single unpadded prompts."""

import copy
import dataclasses
import importlib.util
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from conf.schema import Dtype, Model, Paths, Sampling
from evals.generate import Generator, race
from evals.journal import continued
from evals.sample import read_prompts, sample
from reward.prompts import prompt_of
from reward.records import NORMALISERS, Prompt
from reward.turns import BadRow

ROOT = Path(__file__).parents[2]
QUESTIONS = ["Hi", "Tell me about the weather in Porto, please.", "1+1?", "Why is the sky blue?"]


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def read_rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def config(lively_model: Path, tmp_path: Path) -> Sampling:
    """Four prompts of different lengths, two completions of each, in float32."""
    rows = [{"prompt": user(text)} for text in QUESTIONS]
    return Sampling(
        model=Model(path=str(lively_model), dtype=Dtype.float32),
        source=str(write_rows(tmp_path / "prompts.jsonl", rows)),
        out=str(tmp_path / "out.jsonl"),
        n=2,
        max_new_tokens=24,
        batch_size=3,  # cuts the completions of a prompt in two
        paths=Paths(root=str(tmp_path / "outputs")),
    )


def sampled(config: Sampling, **changes: Any) -> list[dict[str, Any]]:
    changed = dataclasses.replace(config, **changes)
    sample(changed)
    return read_rows(Path(changed.out))


@pytest.fixture(scope="module")
def loaded(lively_model: Path) -> tuple[Any, Any]:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(lively_model, dtype=torch.float32)
    return model.eval(), AutoTokenizer.from_pretrained(lively_model)


def greedy_by_hand(loaded: tuple[Any, Any], text: str, max_new_tokens: int) -> list[int]:
    """The likeliest token again and again, from one forward pass over the whole text for each."""
    import torch

    model, tokenizer = loaded
    rendered = f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt").input_ids
    start = ids.shape[1]
    with torch.inference_mode():
        while ids.shape[1] < start + max_new_tokens:
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
            if ids[0, -1] == tokenizer.eos_token_id:
                break
    return list(ids[0, start:].tolist())


def test_greedy_equals_unpadded_forward_passes_by_hand(
    config: Sampling, loaded: tuple[Any, Any]
) -> None:
    rows = sampled(config, n=1, temperature=0.0, batch_size=4)
    assert [row["prompt"] for row in rows] == [user(text) for text in QUESTIONS]
    for text, row in zip(QUESTIONS, rows, strict=True):
        (completion,) = row["completions"]
        expected = greedy_by_hand(loaded, text, 24)
        assert completion["text"] == loaded[1].decode(expected, skip_special_tokens=True)
        assert completion["tokens"] == len(expected)
        assert len(set(expected)) > len(expected) / 2  # not one token again and again
    assert len({row["completions"][0]["text"] for row in rows}) == len(rows)


def test_a_completion_does_not_depend_on_its_batch(config: Sampling, tmp_path: Path) -> None:
    alone = sampled(config, batch_size=1)
    together = sampled(config, batch_size=8, out=str(tmp_path / "8.jsonl"))
    assert alone == together
    texts = [completion["text"] for row in alone for completion in row["completions"]]
    assert len(set(texts)) == len(texts)  # each has random numbers of its own
    assert sampled(config, seed=1, out=str(tmp_path / "seed.jsonl")) != alone


def test_draws_follow_the_softmax() -> None:
    import torch
    from scipy.stats import chisquare

    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    n = 4000
    scores = race([torch.Generator().manual_seed(seed) for seed in range(n)])(
        None, probabilities.log().expand(n, -1)
    )
    counts = scores.argmax(-1).bincount(minlength=5)
    assert counts[4] == 0
    assert chisquare(counts[:4], n * probabilities[:4]).pvalue > 0.001


def test_temperature_and_top_p_are_those_of_the_formula(loaded: tuple[Any, Any]) -> None:
    """Next tokens of one prompt: none from outside the nucleus, the likeliest as often as it should be."""
    import torch

    model, tokenizer = loaded
    generator = Generator(model, tokenizer, temperature=0.3, top_p=0.4, max_new_tokens=1)
    ids = generator.encode(Prompt(user("Hi")))
    n = 300
    drawn = [item.text for item in generator.complete([ids] * n, range(n))]
    with torch.inference_mode():
        logits = model(torch.tensor([ids])).logits[0, -1].double()
    order = sorted(
        ((logits / 0.3).softmax(-1)[token].item(), token) for token in range(len(logits))
    )
    nucleus, mass = {}, 0.0
    for probability, token in reversed(order):
        if mass >= 0.4:
            break
        nucleus[tokenizer.decode([token], skip_special_tokens=True)] = probability
        mass += probability
    assert set(drawn) <= set(nucleus)
    likeliest, probability = next(iter(nucleus.items()))
    expected = probability / mass
    error = (expected * (1 - expected) / n) ** 0.5
    assert drawn.count(likeliest) / n == pytest.approx(expected, abs=4 * error)


def test_a_completion_ends_at_the_models_own_end(config: Sampling) -> None:
    rows = sampled(config, n=16, max_new_tokens=300, batch_size=64)
    completions = [completion for row in rows for completion in row["completions"]]
    ended = [item for item in completions if item["finish"] == "eos"]
    assert 0 < len(ended) < len(completions)
    for item in completions:
        assert "<|im_end|>" not in item["text"]
        assert 1 <= item["tokens"] <= 300
        assert item["finish"] == "eos" or item["tokens"] == 300


def test_what_the_generation_config_asks_for_is_not_applied(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    model.generation_config.repetition_penalty = 5.0
    generator = Generator(model, tokenizer, temperature=0, top_p=1, max_new_tokens=12)
    (completion,) = generator.complete([generator.encode(Prompt(user("Hi")))], [0])
    assert completion.text == tokenizer.decode(
        greedy_by_hand(loaded, "Hi", 12), skip_special_tokens=True
    )


@pytest.mark.parametrize(
    ("name", "row", "expected"),
    [
        ("messages", {"messages": [*user("a"), {"role": "assistant", "content": "b"}]}, user("a")),
        ("preference", {"prompt": "a", "chosen": "b", "rejected": "c"}, user("a")),
        ("kto", {"prompt": "a", "completion": "b", "label": True}, user("a")),
        ("prompt", {"prompt": "a", "reference": "b"}, user("a")),
    ],
)
def test_every_kind_of_row_gives_its_prompt(
    name: str, row: dict[str, Any], expected: list[dict[str, str]]
) -> None:
    assert prompt_of(NORMALISERS[name](row)).prompt == expected


def test_a_demonstration_gives_all_turns_before_its_last_answer() -> None:
    turns = [{"role": "system", "content": "s"}]
    for text in "abc":
        turns += [*user(text), {"role": "assistant", "content": text}]
    assert prompt_of(NORMALISERS["messages"]({"messages": turns})).prompt == turns[:-1]
    with pytest.raises(BadRow, match="of 'system'"):
        prompt_of(NORMALISERS["messages"]({"messages": [turns[0], turns[2]]}))


def test_repeated_and_unusable_rows_are_counted(config: Sampling, tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": ""}]
    config.source = str(write_rows(tmp_path / "mixed.jsonl", rows))
    with pytest.raises(UserError, match=r"1 of 4 rows.*mixed.jsonl:4: 'prompt' is empty"):
        read_prompts(config)
    config.max_bad_fraction = 0.5
    prompts, left_out = read_prompts(config)
    assert [prompt.prompt for prompt in prompts] == [user("a"), user("b")]
    assert left_out == {"unusable": 1, "repeated": 1, "too_long": 0}


def test_prompts_beyond_the_context_are_counted(config: Sampling, tmp_path: Path) -> None:
    config.source = str(write_rows(tmp_path / "p.jsonl", [{"prompt": "a"}, {"prompt": "b" * 1100}]))
    assert sample(config)["left_out"]["too_long"] == 1
    config.max_new_tokens, config.out = 1020, str(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="lower max_new_tokens"):
        sample(config)


def test_a_run_continues_where_another_stopped(config: Sampling, tmp_path: Path) -> None:
    whole = sampled(config, out=str(tmp_path / "whole.jsonl"))
    out = Path(config.out)
    assert sampled(config, limit=2) == whole[:2]
    out.write_bytes(out.read_bytes() + b'{"prompt": [{"ro')  # as a power cut leaves it
    counts = sample(dataclasses.replace(config, batch_size=5))
    assert (counts["present"], counts["prompts"]) == (2, 4)
    assert read_rows(out) == whole
    before = out.read_bytes()
    assert sample(config)["present"] == 4
    assert out.read_bytes() == before
    assert json.loads((tmp_path / "out.jsonl.manifest.json").read_text())["is_complete"]


def test_other_settings_do_not_mix(config: Sampling, tmp_path: Path) -> None:
    sampled(config, limit=1)
    with pytest.raises(UserError, match=r"temperature: 1.0 → 0.5"):
        sampled(config, temperature=0.5)
    (tmp_path / "out.jsonl.manifest.json").unlink()
    with pytest.raises(UserError, match="cannot be continued"):
        sampled(config)


def test_two_writers_and_a_full_disk_leave_whole_rows(tmp_path: Path) -> None:
    import resource

    path = tmp_path / "out.jsonl"
    with continued(path, {}) as journal:
        with pytest.raises(UserError, match="another process"), continued(path, {}):
            pass
        journal.append({"text": "a\u2028b"})
        before = path.read_bytes()
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) + 100, old[1]))
        with pytest.raises(OSError, match="File too large"):
            journal.append({"text": "x" * 1000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)
        signal.signal(signal.SIGXFSZ, ignored)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n=0 must be at least 1"),
        ({"temperature": 0.0}, "2 equal completions"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"format": "alpacca"}, "Did you mean 'alpaca'"),
        ({"quant": "int9"}, "no quantizer 'int9'"),
        ({"source": "nowhere.jsonl"}, "there is no file 'nowhere.jsonl'"),
    ],
)
def test_mistakes_are_named(config: Sampling, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        sampled(config, **changes)


def test_a_model_without_a_chat_template_is_named(
    config: Sampling, tiny_model: Path, tmp_path: Path
) -> None:
    import shutil

    bare = tmp_path / "bare"
    shutil.copytree(tiny_model, bare)
    for file in bare.glob("chat_template*"):
        file.unlink()
    with pytest.raises(UserError, match="has no chat template"):
        sampled(config, model=Model(path=str(bare)))


@pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)
def test_a_quantized_model_is_sampled_too(config: Sampling, tmp_path: Path) -> None:
    plain = sampled(config)
    quantized = sampled(config, quant="nf4", out=str(tmp_path / "nf4.jsonl"))
    assert [row["prompt"] for row in quantized] == [row["prompt"] for row in plain]
    assert quantized != plain


def test_a_killed_command_leaves_whole_rows_and_is_continued(
    config: Sampling, tmp_path: Path
) -> None:
    rows = [{"prompt": f"question {number}"} for number in range(30)]
    write_rows(tmp_path / "many.jsonl", rows)
    command = [
        *(sys.executable, "-m", "evals.sample", f"model.path={config.model.path}"),
        *("model.dtype=float32", f"source={tmp_path / 'many.jsonl'}", f"out={config.out}"),
        *("n=2", "max_new_tokens=32", "batch_size=2", f"paths.root={config.paths.root}"),
    ]
    out = Path(config.out)
    process = subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while process.poll() is None and not (out.exists() and out.stat().st_size):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.returncode == -signal.SIGKILL
    present = len(read_rows(out))
    assert 0 < present < len(rows)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert f"30 prompts ({present} were there), 60 completions" in done.stdout
    assert [row["prompt"] for row in read_rows(out)] == [user(row["prompt"]) for row in rows]
    done = subprocess.run(
        [*command, "temperature=0"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert "2 equal completions" in done.stderr
    assert "Traceback" not in done.stderr


def test_rows_that_have_ended_leave_the_batch(
    loaded: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """When they leave changes no token, and the model computes for those alone that go on."""
    from evals import generate

    model, tokenizer = copy.deepcopy(loaded[0]), loaded[1]
    model.generation_config.eos_token_id = list(range(2, 9))  # so that some rows end early
    prompts, seeds = [[5 + i] * (1 + i % 3) for i in range(8)], list(range(8))
    seen: list[tuple[int, int]] = []
    model.register_forward_pre_hook(
        lambda _, __, named: seen.append(tuple(named["input_ids"].shape)), with_kwargs=True
    )
    found, read = {}, {}
    for stride in (1, 4, 16, 100):
        monkeypatch.setattr(generate, "_STRIDE", stride)
        seen.clear()
        found[stride] = generate.Generator(model, tokenizer, 1.0, 1.0, 40).tokens(prompts, seeds)
        read[stride] = sum(rows for rows, _ in seen)
    lengths = {len(ids) for ids in found[16]}
    assert len(lengths) > 2
    assert max(lengths) > 16
    assert found[1] == found[4] == found[16] == found[100]
    assert read[1] < read[4] < read[16] < read[100]
    assert read[1] == sum(map(len, found[1]))
