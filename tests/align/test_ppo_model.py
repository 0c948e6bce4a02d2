"""Response-only scoring against the model's own full forward pass, over families of models."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from align.ppo.batches import Sample, micro_batches, pack, share, shuffled
from align.ppo.model import PolicyValue, token_logp, token_values, without_adapter

SIZE = {"vocab_size": 97, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gpt_neox": LLAMA,
    "opt": LLAMA | {"word_embed_proj_dim": 16, "ffn_dim": 48},
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "gemma2": LLAMA | {"num_key_value_heads": 2, "head_dim": 8, "final_logit_softcapping": 2.0},
    "cohere": LLAMA | {"logit_scale": 0.25},
    "granite": LLAMA | {"logits_scaling": 3.0},
    "qwen2": LLAMA | {"num_key_value_heads": 2},
}
NO_CRITIC = ("cohere", "granite")  # transformers has no sequence classifier of these
SAMPLES = [
    Sample([5, 6, 7], [8, 9, 10, 2], is_ended=True),
    Sample([11], [12], is_ended=False),
    Sample([13, 14, 15, 16, 17, 18], [19, 20], is_ended=False),
]


def make(family: str, seed: int = 0) -> tuple[Any, Any]:
    """A random model of a family and a critic of it, without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **SIZE | FAMILIES[family])
    policy = AutoModelForCausalLM.from_config(config).eval()
    if family in NO_CRITIC:
        return policy, None
    config.num_labels = 1
    return policy, AutoModelForSequenceClassification.from_config(config).eval()


def by_hand(model: Any, sample: Sample, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies of one response, unpadded, from the full logits."""
    ids = torch.tensor([sample.prompt + sample.response])
    logits = model(input_ids=ids).logits[0].float() / temperature
    logp = logits.log_softmax(-1)[len(sample.prompt) - 1 : -1]
    chosen = logp.gather(-1, torch.tensor(sample.response)[:, None]).squeeze(-1)
    return chosen, -(logp.exp() * logp).sum(-1)


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_padding_and_selection_change_nothing(family: str) -> None:
    policy, value = make(family)
    batch = pack(SAMPLES, pad=0)
    logp, entropy = token_logp(policy, batch.ids, batch.rows, batch.cols, 0.7, with_entropy=True)
    assert entropy is not None
    wanted = [by_hand(policy, sample, 0.7) for sample in SAMPLES]
    torch.testing.assert_close(logp, torch.cat([one for one, _ in wanted]), atol=2e-6, rtol=1e-5)
    torch.testing.assert_close(entropy, torch.cat([one for _, one in wanted]), atol=2e-6, rtol=1e-5)
    if value is None:
        return
    values = token_values(value, batch.ids, batch.rows, batch.cols)
    for row, sample in enumerate(SAMPLES):
        # A classifier reads its score at the last token: cut off there, it says V of that state.
        for place in range(len(sample.response)):
            ids = torch.tensor([(sample.prompt + sample.response)[: len(sample.prompt) + place]])
            found = values[(batch.rows == row) & (batch.places == place)]
            torch.testing.assert_close(value(input_ids=ids).logits[0], found, atol=2e-6, rtol=1e-5)


def gradient(model: Any, loss: Tensor) -> Tensor:
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def test_gradients_are_those_of_the_full_logits() -> None:
    policy, _ = make("llama")
    batch = pack(SAMPLES, pad=0)
    logp, entropy = token_logp(
        policy, batch.ids, batch.rows, batch.cols, with_entropy=True, entropy_learns=True
    )
    assert entropy is not None
    found = gradient(policy, logp.sum() - 0.1 * entropy.sum())
    whole = [by_hand(policy, sample, 1.0) for sample in SAMPLES]
    wanted = gradient(policy, sum((p.sum() - 0.1 * e.sum() for p, e in whole), torch.zeros(())))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-4)


def test_checkpointing_changes_no_gradient() -> None:
    policy, value = make("llama")
    both = PolicyValue(policy, value).train()
    batch = pack(SAMPLES, pad=0)

    def loss() -> Tensor:
        scored = both(batch.ids, batch.rows, batch.cols)
        return scored.logp.sum() + scored.values.pow(2).sum()

    plain = gradient(both, loss())
    both.activation_checkpointing_enable(activation_checkpointing_kwargs={"use_reentrant": False})
    assert policy.is_gradient_checkpointing
    assert value.is_gradient_checkpointing
    torch.testing.assert_close(gradient(both, loss()), plain, atol=1e-7, rtol=1e-5)


def test_policy_and_critic_do_not_touch_each_other() -> None:
    policy, value = make("llama")
    both = PolicyValue(policy, value)
    batch = pack(SAMPLES, pad=0)
    both(batch.ids, batch.rows, batch.cols).logp.sum().backward()
    assert all(p.grad is None for p in value.parameters())
    both.zero_grad()
    both(batch.ids, batch.rows, batch.cols).values.sum().backward()
    assert all(p.grad is None for p in policy.parameters())


def test_the_logits_of_all_positions_are_never_made() -> None:
    """T26: no tensor of B·S·V numbers, in the forward or the backward pass."""
    from torch.utils._python_dispatch import TorchDispatchMode

    policy, _ = make("llama")
    batch = pack([Sample([5] * 40, [6, 7], is_ended=False)] * 4, pad=0)
    most = batch.ids.numel() * SIZE["vocab_size"]

    class Largest(TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            out = func(*args, **(kwargs or {}))
            if isinstance(out, Tensor):
                self.seen = max(self.seen, out.numel())
            return out

    with Largest() as spy:
        token_logp(policy, batch.ids, batch.rows, batch.cols)[0].sum().backward()
    assert 0 < spy.seen < most


@torch.no_grad()
def test_without_its_adapter_a_policy_is_the_base() -> None:
    from peft import LoraConfig, get_peft_model

    policy, value = make("llama")
    batch = pack(SAMPLES, pad=0)
    before = token_logp(policy, batch.ids, batch.rows, batch.cols)[0]
    values = token_values(value, batch.ids, batch.rows, batch.cols)
    tuned = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear"))
    critic = get_peft_model(
        value,
        LoraConfig(task_type="SEQ_CLS", target_modules="all-linear", modules_to_save=["score"]),
    )
    torch.testing.assert_close(token_values(critic, batch.ids, batch.rows, batch.cols), values)
    for name, parameter in tuned.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert not torch.equal(token_logp(tuned, batch.ids, batch.rows, batch.cols)[0], before)
    with without_adapter(tuned):
        assert torch.equal(token_logp(tuned, batch.ids, batch.rows, batch.cols)[0], before)


def test_micro_batches_hold_everything_once_and_keep_their_limits() -> None:
    lengths = [9, 3, 30, 4, 4, 8, 2, 7, 12]
    for most_rows, most_tokens in itertools.product((1, 2, 4), (None, 12, 24)):
        found = micro_batches(range(1, 9), lengths, most_rows, most_tokens)
        assert sorted(place for batch in found for place in batch) == list(range(1, 9))
        for batch in found:
            widest = max(lengths[place] for place in batch)
            assert len(batch) <= most_rows
            assert most_tokens is None or widest * len(batch) <= most_tokens or len(batch) == 1
        for processes in (1, 2, 3):
            shares = [share(found, rank, processes) for rank in range(processes)]
            assert len({len(one) for one in shares}) == 1
            assert sorted(tuple(batch) for one in shares for batch in one if batch) == sorted(
                map(tuple, found)
            )


def test_a_permutation_can_be_drawn_again() -> None:
    assert shuffled(50, 1, 2, 3) == shuffled(50, 1, 2, 3)
    assert sorted(shuffled(50, 1, 2, 3)) == list(range(50))
    assert shuffled(50, 1, 2, 3) != shuffled(50, 1, 2, 4)
