"""Log-probabilities and entropies from logits, against PyTorch's own."""

import pytest
import torch

from align.ppo import logprobs


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("chunk", [5, 1 << 22])
def test_values_and_gradients_are_those_of_autograd(
    temperature: float, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(logprobs._CHUNK_VALUES, "cpu", 11 * chunk)
    draw = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(13, 11, generator=draw)
    tokens = torch.randint(11, (13,), generator=draw)
    along_logp, along_entropy = torch.randn(2, 13, generator=draw)

    exact = logits.double().requires_grad_()
    every = (exact / temperature).log_softmax(-1)
    logp, entropy = every.gather(-1, tokens[:, None])[:, 0], -(every.exp() * every).sum(-1)
    (along_logp @ logp.float() + along_entropy @ entropy.float()).backward()  # type: ignore[no-untyped-call]

    ours = logits.clone().requires_grad_()
    found = logprobs.token_logp_and_entropy(ours, tokens, temperature)
    (along_logp @ found[0] + along_entropy @ found[1]).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(found, (logp.float(), entropy.float()))
    torch.testing.assert_close(ours.grad, exact.grad.float() if exact.grad is not None else None)

    alone = logits.clone().requires_grad_()
    (along_logp @ logprobs.token_logp(alone, tokens, temperature)).backward()  # type: ignore[no-untyped-call]
    exact = logits.double().requires_grad_()
    (
        along_logp.double()
        @ (exact / temperature).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    ).backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(alone.grad, exact.grad.float() if exact.grad is not None else None)


def test_a_row_does_not_depend_on_its_company() -> None:
    """Or the first ratio of a rollout's tokens would not be exactly 1."""
    logits = torch.randn(40, 5003)
    tokens = torch.randint(5003, (40,))
    together = logprobs.token_logp(logits, tokens)
    apart = torch.cat([logprobs.token_logp(logits[n, None], tokens[n, None]) for n in range(40)])
    assert torch.equal(together, apart)


def test_half_precision_keeps_its_type_and_is_computed_in_float32() -> None:
    logits = torch.randn(4, 300, dtype=torch.bfloat16, requires_grad=True)
    tokens = torch.randint(300, (4,))
    found = logprobs.token_logp(logits, tokens)
    assert torch.equal(found, logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0])
    found.sum().backward()  # type: ignore[no-untyped-call]
    assert logits.grad is not None
    assert logits.grad.dtype == torch.bfloat16


def test_the_gradient_takes_the_place_of_a_product_and_of_nothing_else() -> None:
    states = torch.randn(6, 8)
    weight = torch.randn(300, 8)
    tokens = torch.randint(300, (6,))
    for cap in (False, True):
        found = []
        for is_ours in (False, True):
            head = torch.nn.Linear(8, 300, bias=False)
            head.load_state_dict({"weight": weight})
            product = head(states)
            logits = torch.tanh(product) if cap else product  # tanh needs its result
            before = logits.detach().clone()
            every = logits.log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
            logp = logprobs.token_logp(logits, tokens) if is_ours else every
            logp.square().sum().backward()  # type: ignore[no-untyped-call]
            found.append(head.weight.grad)
            assert torch.equal(logits, before) is not (is_ours and not cap)
        torch.testing.assert_close(found[0], found[1])
