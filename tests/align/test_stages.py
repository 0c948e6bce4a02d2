"""The trainers as this project calls them: masks, step-0 loss, batch arithmetic, adapters, saving."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from align.artifact import Job, Manifest
from conf.schema import Data, Model, Peft
from reward.data import prepare

LN2 = math.log(2)
COMMON: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 1e-3,
    "max_length": 512,
    "max_steps": 2,
    "logging_steps": 1,
    "seed": 0,
    "disable_tqdm": True,
    "gradient_checkpointing": False,
    "bf16": False,  # float32: equalities hold to rounding
    "model_init_kwargs": {"dtype": "float32"},
}
SOURCES = {"sft": "demo:demonstrations", "dpo": "demo:preferences", "rm": "demo:preferences"}
LORA = Peft("lora", {"r": 4, "lora_alpha": 8, "target_modules": "all-linear"})


def train(stage: str, model: Path, out: Path, peft: Peft | None = None, **args: Any) -> Path:
    """Run a stage in this process."""
    import importlib

    from align.plan import STAGES

    job = Job(
        stage=stage,
        key="test",
        model=Model(path=str(model)),
        data=prepare(
            Data(source=SOURCES[stage], limit=16), STAGES[stage].data, out.parent / "outputs"
        ).folder,
        eval_data=None,
        args=COMMON | args,
        peft=peft or Peft(),
        deepspeed=None,
        parents={"base": "0"},
        out=out,
        cache=out.parent / "cache",
    )
    out.mkdir(parents=True)
    module, function = STAGES[stage].run.split(":")
    getattr(importlib.import_module(module), function)(
        Job.from_json(json.loads(json.dumps(job.to_json(out))))
    )
    return out


def losses(folder: Path) -> list[float]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def weights(folder: Path) -> dict[str, Any]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


def test_eos_carries_loss_although_it_is_the_pad_token(tiny_model: Path, tmp_path: Path) -> None:
    """With pad == EOS, masking by token id would hide the EOS, and the model would never learn to stop."""
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from align.stages.common import dataset

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    rows = prepare(Data(source="demo:demonstrations", limit=3), "sft", tmp_path)
    trainer = SFTTrainer(
        model=str(tiny_model),
        args=SFTConfig(
            output_dir="unused", use_cpu=True, bf16=False, report_to="none", max_length=512
        ),
        train_dataset=dataset(rows, tmp_path),
        processing_class=tokenizer,
    )
    batch = next(iter(trainer.get_train_dataloader()))
    for row, labels in zip(batch["input_ids"].tolist(), batch["labels"].tolist(), strict=True):
        trained = [token for token, label in zip(row, labels, strict=True) if label != -100]
        answer = tokenizer.decode(trained)
        assert answer.startswith("{")  # the prompt carries no loss
        assert trained.count(tokenizer.eos_token_id) == 1
        assert answer.rstrip("\n").endswith(tokenizer.eos_token)
        assert [label for label in labels if label != -100] == trained


@pytest.mark.parametrize("peft", [Peft(), LORA], ids=["full", "lora"])
def test_dpo_loss_at_step_0_is_ln_2(tiny_model: Path, tmp_path: Path, peft: Peft) -> None:
    out = train("dpo", tiny_model, tmp_path / "dpo", peft, max_steps=1)
    assert losses(out)[0] == pytest.approx(LN2, abs=1e-6)


@pytest.mark.parametrize("stage", ["sft", "dpo", "rm"])
def test_batch_1_times_8_equals_8_times_1(tiny_model: Path, tmp_path: Path, stage: str) -> None:
    import torch

    # SGD without momentum: the weights then are a linear function of the gradients, so that their
    # difference is the gradients' difference. (Adam's first step only sees the gradients' signs.)
    options: dict[str, Any] = {"optim": "sgd", "learning_rate": 0.05, "max_grad_norm": 0.0}
    wide = train(stage, tiny_model, tmp_path / "wide", per_device_train_batch_size=8, **options)
    deep = train(
        stage,
        tiny_model,
        tmp_path / "deep",
        per_device_train_batch_size=1,
        gradient_accumulation_steps=8,
        **options,
    )
    before, left, right = weights(tiny_model), weights(wide), weights(deep)
    moved = max((left[name] - before[name].float()).abs().max().item() for name in before)
    assert moved > 1e-4
    for name, value in left.items():
        torch.testing.assert_close(value, right[name], rtol=1e-4, atol=1e-3 * moved)


def test_an_answers_last_token_is_kept_with_an_adapter(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig

    before = AutoTokenizer.from_pretrained(tiny_model)
    other = before.convert_ids_to_tokens(5)
    assert other != before.eos_token
    folders = [
        train("sft", tiny_model, tmp_path / kind / "sft", peft, max_steps=1, eos_token=other)
        for kind, peft in (("full", Peft()), ("lora", LORA))
    ]
    for folder in folders:
        assert AutoTokenizer.from_pretrained(folder).eos_token == other
        assert AutoConfig.from_pretrained(folder).eos_token_id == 5
    full, lora = (GenerationConfig.from_pretrained(folder).eos_token_id for folder in folders)
    assert full == lora
    assert 5 in lora


def test_without_autocast_an_adapter_is_on_float32(tiny_model: Path, tmp_path: Path) -> None:
    from align.stages.common import arguments

    def frozen(**args: Any) -> str:
        model = Model(path=str(tiny_model))
        folders: dict[str, Any] = {"data": tmp_path, "out": tmp_path, "cache": tmp_path}
        job = Job(
            "sft",
            "key",
            model,
            eval_data=None,
            args=args,
            peft=LORA,
            deepspeed=None,
            parents={},
            **folders,
        )
        return str(arguments(job, "CAUSAL_LM")["model_init_kwargs"]["dtype"])

    assert frozen() == frozen(bf16=False, fp16=True) == "bfloat16"
    assert frozen(bf16=False) == "float32"


def test_lora_result_is_the_merged_model_and_the_adapter(tiny_model: Path, tmp_path: Path) -> None:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    out = train("sft", tiny_model, tmp_path / "sft", LORA)
    manifest = Manifest.load(out)
    assert 0 < manifest.parameters["trained"] < manifest.parameters["total"]
    assert (out / "tokenizer.json").is_file()
    assert not list(out.rglob("*.bin")), "a pickle was left behind"
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    expected = PeftModel.from_pretrained(base, out / "adapter")
    merged = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokens = torch.arange(2, 60)[None]
    with torch.inference_mode():
        # The merged weights are rounded to bfloat16 once: 8 bits of mantissa.
        torch.testing.assert_close(
            merged(tokens).logits, expected(tokens).logits, rtol=0.05, atol=0.02
        )


def test_reward_head_survives_saving(tiny_model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    out = train("rm", tiny_model, tmp_path / "rm", LORA)
    model = AutoModelForSequenceClassification.from_pretrained(out)
    assert model.config.num_labels == 1
    assert "score.weight" in weights(out)


def test_tool_calls_reach_the_trainer_as_they_were(tmp_path: Path) -> None:
    """Columns of structs would give each call the arguments of all others, filled with null."""
    from align.stages.common import dataset

    def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
        function = {"name": name, "arguments": arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}

    calls = [call("add", {"a": 1}), call("find", {"text": "x", "deep": {"b": [1]}})]
    tools = [{"type": "function", "function": {"name": "add"}}]
    rows = [
        {"messages": [{"role": "user", "content": "q"}, calls[0]], "tools": tools},
        {"messages": [{"role": "user", "content": "r"}, calls[1]]},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    made = dataset(prepare(Data(source=str(path)), "sft", tmp_path), tmp_path)
    assert [row["completion"] for row in made] == [[calls[0]], [calls[1]]]
    assert json.loads(made[0]["tools"]) == tools
    assert made[1]["tools"] is None


def test_margins_reach_the_trainer_when_every_row_has_one(tmp_path: Path) -> None:
    from align.stages.common import dataset

    rows = [{"prompt": f"q{i}", "chosen": "a", "rejected": "b", "margin": i} for i in range(3)]
    path = tmp_path / "rows.jsonl"
    for has_all in (True, False):
        if not has_all:
            del rows[1]["margin"]
        path.write_text("\n".join(map(json.dumps, rows)))
        made = dataset(prepare(Data(source=str(path)), "preference", tmp_path), tmp_path)
        assert ("margin" in made.column_names) is has_all


def test_a_curriculum_is_kept_by_the_trainer(tiny_model: Path, tmp_path: Path) -> None:
    from align.stages.common import arguments

    job = Job("sft", "", Model(), tmp_path, None, {}, Peft(), None, {}, tmp_path, tmp_path)
    assert arguments(job, "CAUSAL_LM", is_ordered=True)["train_sampling_strategy"] == "sequential"
    assert "train_sampling_strategy" not in arguments(job, "CAUSAL_LM")
