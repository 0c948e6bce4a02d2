"""TRL's trainers with common prefixes read once, beside TRL's own: losses, gradients, metrics, references."""

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from align.stages.prefixes import share_in_classifier, share_in_language_model
from conf.schema import Data
from reward.data import prepare

if TYPE_CHECKING:
    from collections.abc import Callable

LOSSES = [
    "sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot", "aot_unpaired",
    "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm"
]  # fmt: skip
OPTIONS: dict[str, Any] = {
    "use_cpu": True,
    "bf16": False,
    "report_to": "none",
    "per_device_train_batch_size": 6,
    "gradient_checkpointing": False,
    "max_length": 300,
    "disable_tqdm": True,
}


def rows(kind: str, folder: Path, limit: int = 12) -> Any:
    from align.stages.common import dataset

    sources = {"sft": "demo:demonstrations", "preference": "demo:preferences"}
    return dataset(prepare(Data(source=sources[kind], limit=limit), kind, folder), folder / "arrow")


def model_of(tiny_model: Path, kind: type[Any], **options: Any) -> Any:
    """In float32; the same weights each time."""
    torch.manual_seed(0)
    return kind.from_pretrained(tiny_model, dtype=torch.float32, **options)


def trainer_of(trainer: Any, config: Any, model: Any, data: Any, out: Path, **further: Any) -> Any:
    from transformers import AutoTokenizer

    options = OPTIONS | {"output_dir": str(out)} | further.pop("options", {})
    tokenizer = AutoTokenizer.from_pretrained(model.config.name_or_path)
    return trainer(
        model=model,
        args=config(**options),
        train_dataset=data,
        processing_class=tokenizer,
        **further,
    )


def gradient(trainer: Any, number: int | None = None) -> tuple[float, torch.Tensor]:
    """Loss and gradient of the trainer's first batch."""
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch), num_items_in_batch=number)
    loss.backward()
    found = [p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None]
    return float(loss.detach()), torch.cat(found).double()


def assert_equal(ours: Any, theirs: Any) -> None:
    (loss, own), (usual, other) = gradient(ours), gradient(theirs)
    assert loss == pytest.approx(usual, rel=1e-5)
    assert torch.cosine_similarity(own, other, dim=0) >= 0.99999
    assert own.norm() == pytest.approx(float(other.norm()), rel=1e-4)
    metrics, others = ours._metrics["train"], theirs._metrics["train"]
    assert metrics.keys() == others.keys()
    for name in metrics:
        assert metrics[name][-1] == pytest.approx(others[name][-1], rel=1e-4, abs=1e-5), name


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    """Our DPO trainer and TRL's, with a reference that is not the policy."""
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig, DPOTrainer

    from align.stages.references import References
    from align.stages.trainers import SharedPrefixDPOTrainer

    out = tmp_path_factory.mktemp("dpo")
    data = rows("preference", out)
    found = []
    for kind in (
        functools.partial(SharedPrefixDPOTrainer, References(out / "references", {})),
        DPOTrainer,
    ):
        model, reference = (model_of(tiny_model, AutoModelForCausalLM) for _ in range(2))
        with torch.no_grad():
            for parameter in reference.parameters():
                parameter.add_(0.02 * torch.randn_like(parameter))
        options = {"beta": 0.3, "label_smoothing": 0.1, "use_weighting": False}
        found.append(
            trainer_of(kind, DPOConfig, model, data, out, ref_model=reference, options=options)
        )
    return found[0], found[1]


@pytest.mark.parametrize("loss", LOSSES)
def test_every_dpo_loss_has_trls_value_and_gradient(pair: tuple[Any, Any], loss: str) -> None:
    for trainer in pair:
        trainer.loss_types, trainer.loss_weights = [loss], [1.0]
    assert_equal(*pair)


def test_weights_and_length_desensitizing_are_trls(pair: tuple[Any, Any]) -> None:
    from trl.trainer.utils import add_fused_lm_head

    for trainer in pair:
        trainer.loss_types, trainer.loss_weights = ["sigmoid", "ipo"], [1.0, 0.5]
        trainer.use_weighting, trainer.ld_alpha = True, 0.4
    # TRL's head says nothing of Σ p² unless it is built for it; ours always does.
    pair[1].model.forward = type(pair[1].model).forward.__get__(pair[1].model)
    add_fused_lm_head(
        pair[1].model,
        outputs=("log_probs", "entropy", "mean_logits", "is_top1", "log_sum_sq_probs"),
    )
    assert_equal(*pair)


@pytest.mark.parametrize("is_rounded", [False, True])
def test_the_prompt_is_read_once(pair: tuple[Any, Any], is_rounded: bool) -> None:
    batch = next(iter(pair[0].get_train_dataloader()))
    read: list[int] = []
    counter = pair[0].model.model.embed_tokens.register_forward_hook(
        lambda _, given, __: read.append(given[0].numel())
    )
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=is_rounded):
        pair[0].compute_loss(pair[0].model, dict(batch))
        read.clear()  # the first call tries out how the model takes trees
        pair[0].compute_loss(pair[0].model, dict(batch))
    counter.remove()
    # Two answers of each row: the prompt was there twice, with padding.
    assert sum(read) < 0.6 * batch["input_ids"].numel()


@pytest.mark.filterwarnings("ignore::Warning")  # of Dynamo
@pytest.mark.parametrize("is_compiled", [False, True])
@pytest.mark.parametrize("kind", ["sft", "preference"])
def test_sft_and_reward_model_have_trls_values_and_gradients(
    tiny_model: Path, tmp_path: Path, kind: str, is_compiled: bool
) -> None:
    from torch._dynamo.utils import counters
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
    from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

    from align.stages.trainers import SharedPrefixRewardTrainer, SharedPrefixSFTTrainer

    data = rows(kind, tmp_path)
    make: Callable[..., Any]
    if kind == "sft":
        classes, config = (SharedPrefixSFTTrainer, SFTTrainer), SFTConfig
        make = functools.partial(model_of, tiny_model, AutoModelForCausalLM)
    else:
        classes, config = (SharedPrefixRewardTrainer, RewardTrainer), RewardConfig
        make = functools.partial(
            model_of, tiny_model, AutoModelForSequenceClassification, num_labels=1
        )
    options = {"torch_compile": True, "torch_compile_backend": "aot_eager"} if is_compiled else {}
    ours = trainer_of(classes[0], config, make(), data, tmp_path, options=options)
    usual = trainer_of(classes[1], config, make(), data, tmp_path)
    read: list[int] = []
    ours.model.model.embed_tokens.register_forward_hook(
        lambda _, given, __: read.append(given[0].numel())
    )
    torch.compiler.reset()
    counters.clear()
    assert_equal(ours, usual)
    assert bool(counters["stats"]["unique_graphs"]) is is_compiled
    # Layers are compiled, not the whole model, so its rows are still packed.
    assert read[-1] < next(iter(ours.get_train_dataloader()))["input_ids"].numel()


def test_a_call_that_says_more_goes_the_usual_way(
    tiny_model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Padding on the left, positions of the caller: trees do not express them."""

    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    ids = torch.randint(3, 200, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    labels = ids.masked_fill(torch.arange(9) < 6, -100)
    found = []
    for is_shared in (False, True):
        model = model_of(tiny_model, AutoModelForCausalLM)
        add_fused_lm_head(model, outputs=("log_probs", "entropy"))
        if is_shared:
            share_in_language_model(model)
        call = functools.partial(model, input_ids=ids, labels=labels, fused_lm_head=True)
        positions = torch.arange(9).expand(2, 9) + 1
        found.append(
            [
                call(attention_mask=mask),
                call(position_ids=positions),
                model(input_ids=ids, attention_mask=mask),
            ]
        )
    for usual, shared in zip(*found, strict=True):
        for name in usual:
            assert torch.equal(usual[name], shared[name]) if torch.is_tensor(usual[name]) else True
    call(attention_mask=mask)
    said = [line for line in capsys.readouterr().err.splitlines() if "common prompts" in line]
    assert len(said) == 2  # once each
    assert "padded on the right" in said[0]
    assert "position_ids" in said[1]


def dpo(tiny_model: Path, out: Path, root: Path, data: Any, **options: Any) -> Any:
    """A DPO trainer that takes its reference from the store."""
    from transformers import AutoModelForCausalLM
    from trl import DPOConfig

    from align.stages.references import References
    from align.stages.trainers import SharedPrefixDPOTrainer

    dtype = options.pop("dtype", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype)
    kind = functools.partial(
        SharedPrefixDPOTrainer, References(root, {"weights": options.pop("weights", "a")})
    )
    further = {"peft_config": options.pop("peft_config", None)}
    options["precompute_ref_log_probs"] = True
    return trainer_of(kind, DPOConfig, model, data, out, options=options, **further)


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
def test_arms_share_a_reference_pass_and_other_inputs_do_not(
    tiny_model: Path, tmp_path: Path
) -> None:
    data, root = rows("preference", tmp_path), tmp_path / "references"

    def stored() -> int:
        return len([place for place in root.glob("*") if place.is_dir()])

    make = functools.partial(dpo, tiny_model, root=root, data=data)
    make(tmp_path / "a")
    assert stored() == 1
    for same in (
        {"beta": 0.5},
        {"learning_rate": 1.0},
        {"seed": 3},
        {"loss_type": "ipo"},
        {"ld_alpha": 0.5},
    ):
        make(tmp_path / "b", **same)  # fmt: skip
        assert stored() == 1, same
    others: list[dict[str, Any]] = [
        {"max_length": 250},
        {"max_length": 250, "truncation_mode": "keep_end"},
        {"dtype": torch.bfloat16},
        {"weights": "b"},
    ]
    for number, other in enumerate(others):
        make(tmp_path / "c", **other)
        assert stored() == 2 + number, other


@pytest.mark.filterwarnings("ignore:The `'keep_end'` truncation mode:FutureWarning")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_length": 250},
        {"max_length": 250, "truncation_mode": "keep_end"},
        {"ld_alpha": 0.3},
        {"max_length": 20, "truncation_mode": "keep_end"},
    ],
)
def test_references_are_trls_and_the_first_loss_is_ln_2(
    tiny_model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    data = rows("preference", tmp_path)
    trainer = dpo(tiny_model, tmp_path / "out", tmp_path / "references", data, **options)
    batch = next(iter(trainer.get_train_dataloader()))
    theirs = trainer.compute_ref_log_probs(trainer.model, batch)
    for name, expected in zip(("ref_chosen_logps", "ref_rejected_logps"), theirs, strict=True):
        torch.testing.assert_close(batch[name], expected, rtol=1e-5, atol=1e-4)
    loss = trainer.compute_loss(trainer.model, dict(batch))
    assert float(loss.detach()) == pytest.approx(0.6931472, abs=1e-5)


def test_a_pair_whose_answer_has_no_token_has_a_reference_of_0(
    tiny_model: Path, tmp_path: Path
) -> None:
    from datasets import Dataset

    said = list(range(3, 30))
    data = Dataset.from_dict(
        {"prompt_ids": [said, said], "chosen_ids": [[], [5, 1]], "rejected_ids": [[7, 1], [1]]}
    )
    usual = rows("preference", tmp_path)
    trainer = dpo(tiny_model, tmp_path / "out", tmp_path / "references", usual)
    found = trainer._precompute_ref_logps(data, "train", 1)["ref_chosen_logps"]
    assert found[0] == 0
    assert found[1] < 0


def test_weights_that_an_adapter_moves_have_a_reference_of_their_own(
    tiny_model: Path, tmp_path: Path
) -> None:
    """PiSSA takes the adapter's start out of the frozen weights, KaSA the directions in which they are small."""
    from peft import KasaConfig, LoraConfig

    data = rows("preference", tmp_path)
    options: list[dict[str, Any]] = [
        {},
        {"init_lora_weights": "pissa"},
        {"kasa_config": KasaConfig()},
    ]
    for further in options:
        adapter = LoraConfig(task_type="CAUSAL_LM", r=4, **further)
        trainer = dpo(tiny_model, tmp_path / "out", tmp_path / "r", data, peft_config=adapter)
        batch = next(iter(trainer.get_train_dataloader()))
        chosen, _ = trainer.compute_ref_log_probs(trainer.model, batch)
        torch.testing.assert_close(batch["ref_chosen_logps"], chosen, rtol=1e-5, atol=1e-4)


@pytest.mark.filterwarnings("ignore::Warning")  # of Dynamo, about the head of TRL
def test_a_compiled_model_goes_the_usual_way(tiny_model: Path) -> None:
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model = model_of(tiny_model, AutoModelForCausalLM)
    add_fused_lm_head(model)
    ids = torch.randint(3, 200, (2, 9))
    said = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    expected = model(**said, fused_lm_head=True).log_probs
    share_in_language_model(model)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(**said, fused_lm_head=True).log_probs, expected)


def test_a_classifier_with_a_head_of_another_name_goes_the_usual_way() -> None:
    from transformers import CTRLConfig, CTRLForSequenceClassification

    config = CTRLConfig(vocab_size=50, n_positions=64, n_embd=16, dff=32, n_layer=1, n_head=2)
    config.pad_token_id = 1
    model = CTRLForSequenceClassification(config).eval()
    ids = torch.randint(3, 50, (2, 9))
    said = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model(**said).logits
    share_in_classifier(model)
    assert torch.equal(model(**said).logits, expected)
