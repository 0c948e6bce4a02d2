"""The reward-model stage: loss and gradient by hand, batch arithmetic, starts, heads, and what saving could lose."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from align import plan
from align.artifact import Job, Manifest
from align.plan import make_plan, preflight
from align.run import _Run
from align.stages import common, rescore, rm
from conf.entry import UserError
from conf.schema import Align, Data, Model, Paths, Peft, Stage, Track
from reward.data import prepare
from reward.model import RewardModel
from reward.store import read_json
from reward.versions import Version, to_trl

ROOT = Path(__file__).parents[2]
FLOAT32: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "max_length": 1024,
    "max_steps": 2,
    "logging_steps": 1,
    "seed": 0,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "bf16": False,
    "model_init_kwargs": {"dtype": "float32"},
}
# What a step changes then is the gradient itself.
SGD: dict[str, Any] = {
    "optim": "sgd",
    "learning_rate": 0.05,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
}
LORA = Peft("lora", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"})


def train(model: Path, out: Path, data: Path, peft: Peft | None = None, **args: Any) -> Path:
    """Run the stage in this process; `data` is the folder of a data version."""
    out.mkdir(parents=True)
    parents = {"base": "0"}
    cache = out.parent / "cache"
    start = Model(path=str(model))
    arguments = FLOAT32 | args
    rm.run(
        Job("rm", "test", start, data, None, arguments, peft or Peft(), None, parents, out, cache)
    )
    return out


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def scores(folder: Path, data: Path) -> list[float]:
    """Of every conversation of a data version."""
    rows = [row for record in Version.load(data).records() for row in to_trl(record)]
    turns = [row["prompt"] + row[name] for row in rows for name in ("chosen", "rejected")]
    return RewardModel.load(str(folder)).score([[] for _ in turns], turns)


@pytest.fixture(scope="module")
def start(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny reward model in float32, whose head is no small one."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, dtype=torch.float32
    )
    torch.nn.init.normal_(model.score.weight, std=1.0)
    out = tmp_path_factory.mktemp("start")
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def pairs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen pairs of unequal lengths, each with a margin."""
    root = tmp_path_factory.mktemp("pairs")
    rows = [
        {
            "prompt": f"Question {n}" + "?" * (n % 5),
            "chosen": f"yes {n} " * (1 + n % 3),
            "rejected": "no" * (1 + n % 4),
            "margin": n / 8,
        }
        for n in range(16)
    ]
    file = root / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    return prepare(Data(source=str(file)), "preference", root).folder


def by_hand(model: Any, tokenizer: Any, rows: list[Any], centring: float) -> Any:
    """Bradley and Terry's loss with margins (Llama 2, eq. 2), and the square of the sums (TRL's centring)."""
    import torch

    total = torch.zeros(())
    for row in rows:
        each = []
        for name in ("chosen", "rejected"):
            text = "".join(
                f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n"
                for turn in row["prompt"] + row[name]
            )
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
            each.append(model.model(ids).last_hidden_state[0, -1] @ model.score.weight[0])
        chosen, rejected = each
        probability = 1 / (1 + torch.exp(-(chosen - rejected - row["margin"])))
        total = total - torch.log(probability) + centring * (chosen + rejected) ** 2
    return total / len(rows)


@pytest.mark.parametrize("centring", [0.0, 0.3])
def test_loss_and_gradient_equal_the_formula(
    start: Path, pairs: Path, tmp_path: Path, centring: float
) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    options = SGD | {"max_steps": 1, "per_device_train_batch_size": 16}
    out = train(start, tmp_path / "rm", pairs, **options, center_rewards_coefficient=centring)
    model = AutoModelForSequenceClassification.from_pretrained(start).eval()
    rows = [row for record in Version.load(pairs).records() for row in to_trl(record)]
    assert [row["margin"] for row in rows] == [n / 8 for n in range(16)]
    loss = by_hand(model, AutoTokenizer.from_pretrained(start), rows, centring)
    assert losses(out) == pytest.approx([loss.item()], rel=1e-5)
    loss.backward()
    after = weights(out)
    for name, parameter in model.named_parameters():
        moved = (parameter.detach() - after[name]) / SGD["learning_rate"]
        torch.testing.assert_close(moved, parameter.grad, rtol=1e-3, atol=2e-5, msg=name)


def test_batch_1_times_8_takes_the_steps_of_8_times_1(
    start: Path, pairs: Path, tmp_path: Path
) -> None:
    import torch

    def run(name: str, size: int) -> Path:
        batch = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 8 // size}
        options = SGD | batch | {"max_steps": 4, "learning_rate": 1e-3}
        return train(start, tmp_path / name, pairs, **options, center_rewards_coefficient=0.01)

    wide, deep = run("wide", 8), run("deep", 1)
    assert losses(wide) == pytest.approx(losses(deep), rel=1e-6, abs=1e-6)
    before, left, right = weights(start), weights(wide), weights(deep)
    assert max((left[name] - before[name]).abs().max().item() for name in before) > 1e-4
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=0, atol=1e-6)


def test_a_seed_gives_one_trajectory_and_another_data_seed_another_order(
    start: Path, pairs: Path, tmp_path: Path
) -> None:
    first, again, other = (
        losses(train(start, tmp_path / f"{n}", pairs, max_steps=4, data_seed=seed))
        for n, seed in enumerate([1, 1, 2])
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("peft", [Peft(), LORA], ids=["full", "lora"])
def test_a_reward_model_goes_on_from_its_own_scores(
    start: Path, pairs: Path, tmp_path: Path, peft: Peft
) -> None:
    """Nothing learned, nothing moved: its head is kept, and its weights are not rounded."""
    options: dict[str, Any] = {"learning_rate": 0.0, "max_steps": 1, "model_init_kwargs": None}
    out = train(start, tmp_path / "rm", pairs, peft, **options, bf16=True)
    assert scores(out, pairs) == pytest.approx(scores(start, pairs), abs=1e-6)
    found = rescore.check(out)
    assert found["max_difference"] < 1e-4


def test_the_head_that_lora_trains_is_float32(
    tiny_model: Path, pairs: Path, tmp_path: Path
) -> None:
    """The frozen weights are bfloat16, of which one step of 1e-5 would change nearly none."""
    import torch
    from safetensors.torch import load_file

    options: dict[str, Any] = {"learning_rate": 1e-5, "model_init_kwargs": None, "bf16": True}
    out = train(tiny_model, tmp_path / "rm", pairs, LORA, **options)
    saved = load_file(out / "adapter" / "adapter_model.safetensors")
    (head,) = [value for name, value in saved.items() if "score" in name]
    assert head.dtype == torch.float32
    assert (head != head.bfloat16().float()).float().mean() > 0.9


@pytest.mark.parametrize("peft", [Peft(), LORA], ids=["full", "lora"])
@pytest.mark.parametrize("kind", ["Llama", "Qwen2", "GPT2"])
def test_a_head_on_any_causal_model(
    tiny_model: Path, pairs: Path, tmp_path: Path, kind: str, peft: Peft
) -> None:
    import transformers

    config = {
        "GPT2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 512},
    }.get(kind) or {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
    }
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_model)
    shape = getattr(transformers, f"{kind}Config")(
        vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=1, **config
    )
    base = tmp_path / "base"
    getattr(transformers, "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM")(
        shape
    ).save_pretrained(base)
    tokenizer.save_pretrained(base)
    if kind == "GPT2" and peft.args:  # its layers are stored transposed, as PEFT must be told
        peft = Peft("lora", peft.args | {"fan_in_fan_out": True})
    out = train(base, tmp_path / "rm", pairs, peft, max_length=512)
    assert rescore.check(out)["max_difference"] < 1e-4


# What saving could lose.


@pytest.fixture(scope="module", params=[Peft(), LORA], ids=["full", "lora"])
def trained(
    tiny_model: Path,
    pairs: Path,
    tmp_path_factory: pytest.TempPathFactory,
    request: pytest.FixtureRequest,
) -> Path:
    """A reward model of which the trainer's scores are written down."""
    return train(
        tiny_model,
        tmp_path_factory.mktemp("trained") / "rm",
        pairs,
        request.param,
        model_init_kwargs=None,
        bf16=True,
        max_steps=4,
    )


def copied(folder: Path, to: Path) -> Path:
    import shutil

    return Path(shutil.copytree(folder, to))


def rechecked(folder: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "align.stages.rescore", str(folder)]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ}
    )


def change(folder: Path, by: Any) -> None:
    """Rewrite the head's weights."""
    from safetensors.torch import save_file

    found = weights(folder)
    found["score.weight"] = by(found["score.weight"]).contiguous()
    save_file(found, folder / "model.safetensors", metadata={"format": "pt"})


def test_a_fresh_process_finds_the_trainers_scores(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "rm")
    done = rechecked(folder)
    assert done.returncode == 0, done.stderr
    found = read_json(folder / rescore.RESCORE)
    assert found["pairs"] == 16
    assert 0 <= found["max_difference"] < 1e-4
    assert found["dtype"] == "float32"


def test_a_random_head_is_found(trained: Path, tmp_path: Path) -> None:
    import torch

    folder = copied(trained, tmp_path / "rm")
    change(folder, lambda head: 0.02 * torch.randn(head.shape))
    done = rechecked(folder)
    assert done.returncode == 2
    assert "does not give the trainer's scores" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_head_that_moved_a_little_is_found(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "rm")
    change(folder, lambda head: 1.01 * head + 1e-3)
    with pytest.raises(UserError, match="does not give the trainer's scores"):
        rescore.check(folder)


def test_a_lost_head_is_found(trained: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    folder = copied(trained, tmp_path / "rm")
    kept = {name: value for name, value in weights(folder).items() if name != "score.weight"}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights: score\.weight"):
        rescore.check(folder)


def test_an_adapter_saved_without_its_head_is_found(
    tiny_model: Path, pairs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Merging then takes a base whose head is random."""
    import peft

    def headless(job: Job, task_type: str) -> Any:
        return peft.LoraConfig(**job.peft.args, exclude_modules=["score"])

    monkeypatch.setattr(common, "peft_config", headless)
    out = train(tiny_model, tmp_path / "rm", pairs, LORA)
    with pytest.raises(UserError, match="does not give the trainer's scores"):
        rescore.check(out)


def test_another_chat_template_is_found(trained: Path, tmp_path: Path) -> None:
    folder = copied(trained, tmp_path / "rm")
    template = folder / "chat_template.jinja"
    template.write_text(template.read_text().replace("<|im_end|>", "<|im_end|><|im_end|>"))
    with pytest.raises(UserError, match="makes other tokens of a conversation"):
        rescore.check(folder)
    template.unlink()
    with pytest.raises(UserError, match="no chat template"):
        rescore.check(folder)


def test_another_pad_token_is_found(tiny_model: Path, pairs: Path, tmp_path: Path) -> None:
    """The score is read at the last token that is no pad token: here the template ends with the pad token."""
    from transformers import AutoTokenizer

    base = copied(tiny_model, tmp_path / "base")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>\n", "<|im_end|>")
    tokenizer.save_pretrained(base)
    out = train(base, tmp_path / "rm", pairs)
    assert rescore.check(out)["max_difference"] < 1e-4
    config = read_json(out / "config.json")
    assert config["pad_token_id"] == tokenizer.eos_token_id
    (out / "config.json").write_text(json.dumps(config | {"pad_token_id": 5}))
    with pytest.raises(UserError, match="does not give the trainer's scores"):
        rescore.check(out)


def test_scores_are_compared_by_size_and_by_order() -> None:
    trained = [3.0, 1.0, 0.5, 0.4995]
    assert rescore.compare(trained, trained, "float32")["max_difference"] == 0
    near_tie = [3.0, 1.0, 0.4995, 0.5]  # turned, but nothing was between them
    assert rescore.compare(trained, near_tie, "float32")["pairs"] == 2
    for found in ([3.0, 1.004, 0.5, 0.4995], [3.0, math.nan, 0.5, 0.4995]):
        with pytest.raises(UserError, match="differ by up to"):
            rescore.compare(trained, found, "float32")
    turned = [3.0, 1.0, 0.45, 0.8]
    with pytest.raises(UserError, match="1 of 2 pairs changed their order"):
        rescore.compare([3.0, 1.0, 0.81, 0.45], turned, "bfloat16")


# The stage in an experiment.


def experiment(model: Path, root: Path) -> Align:
    data = Data(source="demo:preferences", limit=8)
    stage = Stage(data=data, args=FLOAT32 | {"max_steps": 1}, peft=Peft())
    return Align(
        name="rm",
        model=Model(path=str(model)),
        stages=["rm"],
        rm=stage,
        paths=Paths(str(root)),
        track=Track(wandb=False),
    )


def test_a_stage_whose_scores_are_lost_keeps_nothing(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tiny_model, tmp_path)
    planned = make_plan(config)
    run = _Run(config, [], planned)
    trained = _Run._start

    def spoilt(self: _Run, job: Job, partial: Path, *watch: Any) -> None:
        trained(self, job, partial, *watch)
        change(partial, lambda head: -head)

    with monkeypatch.context() as patch:
        patch.setattr(_Run, "_start", spoilt)
        with pytest.raises(UserError, match="rm check: the saved reward model does not give"):
            run.train(planned.jobs[0])
    assert [path for path in (tmp_path / "artifacts").iterdir() if path.is_dir()] == []
    rescored = run.train(planned.jobs[0])["rescored"]
    assert rescored["pairs"] == 8
    assert rescored["max_difference"] < 1e-4
    manifest = Manifest.load(planned.jobs[0].out)
    assert manifest.rescored == rescored
    assert not (planned.jobs[0].out / rescore.RESCORE).exists()


def test_a_sweep_over_reward_models_needs_pairs_to_measure_them(
    tiny_model: Path, tmp_path: Path
) -> None:
    config = experiment(tiny_model, tmp_path)
    config.evaluation.objective = "rewards/rm/accuracy"
    with pytest.raises(UserError, match=r"needs the rm stage, and rm\.eval_data"):
        preflight(config, make_plan(config))
    config.rm.eval_data = Data(source="demo:preferences", limit=4)
    preflight(config, make_plan(config))


def test_what_checks_a_reward_model_is_in_its_key(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = experiment(tiny_model, tmp_path)
    before = make_plan(config).jobs[0].key
    assert make_plan(config).jobs[0].key == before
    monkeypatch.setattr(plan, "_FURTHER_CODE", {"rm": (ROOT / "reward" / "model.py",)})
    assert make_plan(config).jobs[0].key != before


def test_an_sft_policy_becomes_a_reward_model_with_a_report(
    tiny_model: Path, tmp_path: Path
) -> None:
    """The whole program: SFT, a head on its result, the check, the report; and nothing twice."""
    root = tmp_path / "k=v, (x)"  # such as a sweep's folders
    command = [
        *(sys.executable, "-m", "align", "+experiment=rm_smollm2", "stages=[sft,rm]"),
        *(f"model.path={tiny_model}", f"paths.root='{root}'", "track.wandb=false"),
        *("sft.data.source=demo:demonstrations", "sft.data.limit=8", "+sft.args.max_steps=1"),
        *("rm.data.source=demo:preferences", "rm.data.limit=16", "rm.eval_data.limit=16"),
        *("rm.eval_data.source=demo:preferences", "rm.data.max_bad_fraction=1"),
        "rm.args.bf16=false",  # in bfloat16 a random model's scores are full of ties
        "evaluation.objective=rewards/rm/accuracy",
    ]

    def run() -> str:
        done = subprocess.run(
            command, capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ}
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run()
    (line,) = [line for line in first.splitlines() if line.startswith("reward model: accuracy ")]
    assert line.endswith("n=16")
    (record,) = (root / "runs" / "rm_smollm2").glob("*/run.json")
    stages = {stage["stage"]: stage for stage in read_json(record)["stages"]}
    assert stages["rm"]["rescored"]["max_difference"] < 1e-3
    sft, reward_model = (next((root / "artifacts").glob(f"{name}-*")) for name in ("sft", "rm"))
    assert Manifest.load(reward_model).parents == {"sft": Manifest.load(sft).key}
    figures = read_json(record)["rewards"]["rm"]
    assert figures["n"] == 16
    kept = record.parent / "rewards" / "rm"
    report = read_json(kept / "report.json")
    assert report["accuracy"]["value"] == figures["accuracy"]
    ranked = stages["rm"]["metrics"]["eval_accuracy"]
    assert figures["accuracy"] == pytest.approx(ranked, abs=1 / 16)  # one near tie may turn
    assert (kept / "pairs.jsonl").is_file()
    site = root / "report" / "rm_smollm2"
    (page,) = (site / "rewards").glob("*.html")
    (arm,) = (site / "arms").glob("*.html")
    assert f"../rewards/{page.name}" in arm.read_text("utf-8")
    assert line.removeprefix("reward model: ") in (record.parent / "MODEL_CARD.md").read_text(
        "utf-8"
    )
    made = {path: path.stat().st_mtime_ns for path in (root / "rewards").glob("*/manifest.json")}
    assert len(made) == 2  # the report, and what of it is this stage's
    assert line in run()
    assert made == {path: path.stat().st_mtime_ns for path in made}
