"""The probe: it changes nothing, and what it writes down is what an independent computation finds."""

import dataclasses
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.artifact import Job
from align.plan import STAGES, make_plan, preflight
from align.probe import Alarm, questions
from conf.entry import UserError
from conf.schema import Align, Data, Model, Peft, Probe, Reward, Source, Stage, Term
from reward.data import prepare
from reward.demo import held_out
from reward.looks import LOOKS, Look, read

PROBE = Probe(
    prompts=Source(source="demo:held_out", limit=6),
    proxy=Reward({"exact": Term("exact", weight=-1.0)}),
    gold=Reward({"exact": Term("exact")}),
    steps=2,
    n=2,
    max_new_tokens=12,
    batch_size=5,
)
LORA = Peft("lora", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "lora_dropout": 0.1})
ARGS: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-2,
    "max_length": 512,
    "max_steps": 3,
    "logging_steps": 1,
    "seed": 0,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "bf16": False,
    "model_init_kwargs": {"dtype": "float32"},
}


def train(model: Path, out: Path, peft: Peft, probe: Probe | None, **args: Any) -> Path:
    """Run DPO in this process."""
    import importlib

    rows = prepare(Data(source="demo:preferences", limit=16), "preference", out.parent / "outputs")
    job = Job(
        stage="dpo",
        key="test",
        model=Model(path=str(model)),
        data=rows.folder,
        eval_data=None,
        args=ARGS | args,
        peft=peft,
        deepspeed=None,
        parents={"base": "0"},
        out=out,
        cache=out.parent / "cache",
        probe=probe,
    )
    out.mkdir(parents=True)
    module, function = STAGES["dpo"].run.split(":")
    again = Job.from_json(json.loads(json.dumps(job.to_json(out))))
    assert again == job
    getattr(importlib.import_module(module), function)(again)
    return out


@pytest.mark.parametrize("peft", [Peft(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("bf16", [False, True], ids=["float32", "autocast"])
def test_training_ends_in_the_same_bits_with_and_without(
    tiny_model: Path, tmp_path: Path, peft: Peft, bf16: bool
) -> None:
    """Dropout draws random numbers at every step: one number more, and the weights would differ."""
    plain = train(tiny_model, tmp_path / "plain", peft, None, bf16=bf16)
    probed = train(tiny_model, tmp_path / "probed", peft, PROBE, bf16=bf16)
    assert not (plain / LOOKS).exists()
    for file in plain.rglob("*.safetensors"):
        assert file.read_bytes() == (probed / file.relative_to(plain)).read_bytes()
    looks = read(probed / LOOKS)
    assert [look.step for look in looks] == [0, 2, 3]
    assert looks[0].kl == [0.0] * 6  # the start is where it starts, to the bit
    assert looks[0].further["kl_per_token_k3"] == 0.0
    assert looks[-1].kl != looks[0].kl
    assert all(look.further["kl_per_token_k3"] > 0 for look in looks[1:])
    assert {value for look in looks for value in look.gold} == {0.0}  # of a random model


def test_random_numbers_and_modes_are_given_back(tiny_model: Path) -> None:
    import random

    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    from align.stages.probe import at_rest, undisturbed

    def draw() -> tuple[float, float, float]:
        return random.random(), float(np.random.random()), float(torch.rand(()))

    with undisturbed():
        first = draw()
    assert draw() == first
    model = AutoModelForCausalLM.from_pretrained(tiny_model).train()
    model.lm_head.eval()
    settings = model.generation_config
    with at_rest(model):
        assert not any(module.training for module in model.modules())
        model.generation_config = None
    assert [name for name, module in model.named_modules() if not module.training] == ["lm_head"]
    assert model.generation_config is settings


def test_kl_is_that_of_the_saved_model_token_by_token(tiny_model: Path, tmp_path: Path) -> None:
    """Another way: the folder that the stage leaves, one unpadded completion at a time, plain softmax."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from evals.generate import Generator, seed_of

    probe = dataclasses.replace(PROBE, temperature=0.7)
    out = train(tiny_model, tmp_path / "out", Peft(), probe)
    last = read(out / LOOKS)[-1]
    tokenizer = AutoTokenizer.from_pretrained(out)
    policy = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    start = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32).eval()
    generator = Generator(policy, tokenizer, 0.7, 1.0, probe.max_new_tokens)
    for place, question in enumerate(questions(probe.prompts)):
        prompt = generator.encode(question)
        divergences, lengths = [], []
        for index in range(probe.n):
            (said,) = generator.tokens([prompt], [seed_of(probe.seed, question, index)])
            total = 0.0
            for number, token in enumerate(said):
                seen = torch.tensor([prompt + said[:number]])
                with torch.inference_mode():
                    after, before = (
                        (model(seen).logits[0, -1].double() / 0.7).softmax(-1)[token].item()
                        for model in (policy, start)
                    )
                total += math.log(after / before)
            divergences.append(total)
            lengths.append(len(said))
        assert last.kl[place] == pytest.approx(sum(divergences) / probe.n, abs=1e-3)
        assert last.length[place] == sum(lengths) / probe.n
    assert max(map(abs, last.kl)) > 0.05  # it has moved


def test_questions_keep_what_their_rows_hold(tmp_path: Path) -> None:
    rows = [
        {"prompt": "a", "reference": "1", "schema": {"type": "object"}},
        {"prompt": "a", "reference": "1"},
        {"prompt": "b"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    first, second = questions(Source(source=str(path)))
    answer = first.answered("text", 3, True)
    assert (answer.references, answer.facts["schema"]) == (("1",), {"type": "object"})
    assert second.answered("text", 3, True).references == ()
    path.write_text('{"prompt": 5}')
    with pytest.raises(UserError, match=r"probe\.prompts: .*rows\.jsonl:1"):
        questions(Source(source=str(path)))


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Align:
    args = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "seed": 0}
    config = Align(name="test", model=Model(path=str(tiny_model)), stages=["sft", "dpo"])
    config.sft = Stage(Data(source="demo:demonstrations", limit=8), args=args, peft=Peft())
    config.dpo = Stage(Data(source="demo:preferences", limit=8), args=dict(args), peft=Peft())
    config.paths.root = str(tmp_path / "root")
    return config


def test_only_a_probed_stage_has_another_key(config: Align) -> None:
    before = make_plan(config)
    config.probe = dataclasses.replace(PROBE)
    after = make_plan(config)
    config.probe.n = 3
    third = make_plan(config)
    assert [job.probe is not None for job in after.jobs] == [False, True]
    keys = [[job.key for job in plan.jobs] for plan in (before, after, third)]
    assert keys[0][0] == keys[1][0] == keys[2][0]
    assert len({key[1] for key in keys}) == 3
    preflight(config, after)


def test_the_weights_of_every_member_are_in_the_key(config: Align, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        (tmp_path / name / "model.safetensors").write_text(name)
    members = [str(tmp_path / name) for name in ("one", "two")]
    gold = Reward({"m": Term("model", 1.0, {"path": members})})
    config.probe = dataclasses.replace(PROBE, gold=gold)
    before = make_plan(config)
    assert make_plan(config).jobs[1].key == before.jobs[1].key
    (tmp_path / "two" / "model.safetensors").write_text("other")
    assert make_plan(config).jobs[1].key != before.jobs[1].key


def test_the_key_looks_for_no_module_that_was_not_allowed(config: Align) -> None:
    gold = Reward({"m": Term("function", 1.0, {"function": "antigravity.x:f"})})
    config.probe = dataclasses.replace(PROBE, gold=gold)
    with pytest.raises(UserError, match=r"probe\.gold.*cannot import code by itself"):
        make_plan(config)


def set_probe(name: str, value: Any) -> Callable[[Align], None]:
    return lambda config: setattr(config.probe, name, value)


def train_on_the_probe(config: Align) -> None:
    path = Path(config.paths.root).parent / "rows.jsonl"
    row = held_out(2)[1]
    pair = {"prompt": row["prompt"], "chosen": "a", "rejected": "b"}
    path.write_text("\n".join(json.dumps(one) for one in [pair, pair | {"prompt": "other"}]))
    config.dpo.data = Data(source=str(path))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (set_probe("steps", 0), "probe.steps=0 must be at least 1"),
        (set_probe("n", 0), "probe.n=0 must be at least 1"),
        (set_probe("temperature", 0.0), "probe.temperature=0.0 must be a positive number"),
        (set_probe("gold", Reward()), "probe.gold.terms is empty"),
        (set_probe("proxy", Reward({"x": Term("exakt")})), "Did you mean 'exact'?"),
        (set_probe("proxy", PROBE.gold), "name another measure"),
        (
            set_probe("proxy", Reward({"x": Term("model", 1.0, {"path": "stage:rm"})})),
            "probe.proxy.terms.x.args.path: there is no reward model 'stage:rm'",
        ),
        (set_probe("prompts", Source(source="demo:held_out", limit=5)), "has 5 distinct prompts"),
        (set_probe("prompts", Source(source="./absent.jsonl")), "probe.prompts.source="),
        (lambda config: setattr(config, "deepspeed", {}) or setattr(config, "deepspeed", {"x": 1}), "launch="),
        (lambda config: setattr(config, "stages", ["sft"]), "no stage of this experiment moves"),
        (train_on_the_probe, "1 of the rows that dpo trains on"),
    ],
)  # fmt: skip
def test_what_a_probe_cannot_be(config: Align, change: Callable[[Align], Any], said: str) -> None:
    config.probe = dataclasses.replace(PROBE)
    change(config)
    with pytest.raises(UserError) as caught:
        preflight(config, make_plan(config))
    assert said in str(caught.value)


def test_the_alarm_is_given_once(capsys: pytest.CaptureFixture[str]) -> None:
    alarm = Alarm("dpo")
    for step in range(4):
        values = [step + place / 100 for place in range(20)]
        look = Look(step, [0.1 * step] * 20, values, [-value * (1 + value / 9) for value in values])
        tracked = alarm.hear(look.to_json())
        assert tracked["probe/proxy"] == pytest.approx(sum(values) / 20)
        assert tracked["probe/proxy_n"] == 20
    said = capsys.readouterr().err
    assert (
        said.count("warning: From step 0 to step 1 the proxy rose while the gold measure fell") == 1
    )
    assert said.count("warning") == 1
