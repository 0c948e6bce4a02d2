"""PPO's arithmetic against values worked by hand, brute force, and whatever may stand in masked slots."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from align.ppo import core

NAN = math.nan


def tensor(rows: object) -> Tensor:
    return torch.tensor(rows, dtype=torch.float64)


MASK = torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]]).bool()
VALUES = tensor([[0.5, 0.4, 0.3, 9.0], [0.1, 0.2, 0.3, 0.4]])
LOGP = tensor([[-1, -2, -0.5, 7], [-0.1, -0.2, -0.3, -0.4]])
REF = tensor([[-1.2, -1.9, -0.9, 7], [-0.3, -0.1, -0.3, -0.8]])
SCORES = tensor([1.0, -0.5])


def rewards() -> Tensor:
    return core.token_rewards(core.k1(LOGP, REF, MASK), SCORES, MASK, 0.1)


def close(found: Tensor, wanted: object, atol: float = 1e-6) -> None:
    torch.testing.assert_close(found, tensor(wanted), atol=atol, rtol=0)


def test_divergence_by_hand() -> None:
    close(core.k1(LOGP, REF, MASK), [[0.2, -0.1, 0.4, 0], [0.2, -0.1, 0, 0.4]])
    close(
        core.k3(LOGP, REF, MASK),
        [[0.018731, 0.005171, 0.070320, 0], [0.018731, 0.005171, 0, 0.070320]],
    )


def test_rewards_by_hand() -> None:
    close(rewards(), [[-0.02, 0.01, 0.96, 0], [-0.02, 0.01, 0, -0.54]])


def test_a_score_stands_on_the_last_token_that_the_policy_wrote() -> None:
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 0, 0]]).bool()
    found = core.token_rewards(torch.zeros(3, 4), torch.tensor([2.0, 5.0, 3.0]), mask, 0.1)
    assert found.tolist() == [[0, 0, 2, 0], [0, 0, 0, 0], [3, 0, 0, 0]]


def test_scores_of_tokens_are_added_where_they_stand() -> None:
    dense = torch.tensor([[1.0, 2.0, NAN]])
    mask = torch.tensor([[True, True, False]])
    found = core.token_rewards(torch.ones(1, 3), dense, mask, 0.5)
    assert found.tolist() == [[0.5, 1.5, 0.0]]


def test_advantages_by_hand() -> None:
    advantages, returns = core.gae(rewards(), VALUES, MASK)
    close(advantages, [[0.39015, 0.537, 0.66, 0], [-0.5311825, -0.64335, -0.793, -0.94]])
    close(returns, [[0.89015, 0.937, 0.96, 0], [-0.4311825, -0.44335, -0.493, -0.54]])


def test_a_cut_off_response_takes_the_value_of_what_would_follow() -> None:
    advantages, _ = core.gae(rewards(), VALUES, MASK, bootstrap=tensor([0.0, 0.6]))
    close(advantages[1], [-0.0167575, -0.10185, -0.223, -0.34])
    close(advantages[0], [0.39015, 0.537, 0.66, 0])


def test_with_lambda_one_the_return_is_what_was_earned() -> None:
    _, returns = core.gae(rewards(), VALUES, MASK, lam=1.0)
    close(returns, [[0.95, 0.97, 0.96, 0], [-0.55, -0.53, -0.54, -0.54]])


def test_time_stands_still_over_tokens_of_a_tool() -> None:
    mask = torch.tensor([[1, 0, 0, 1, 1]]).bool()
    rewards_, values = tensor([[0.1, 5, NAN, 0.3, 1.0]]), tensor([[0.2, NAN, 7, 0.4, 0.6]])
    found = core.gae(rewards_, values, mask, gamma=0.9, lam=0.8)
    dense = core.gae(
        rewards_[mask][None], values[mask][None], torch.ones(1, 3).bool(), gamma=0.9, lam=0.8
    )
    for one, other in zip(found, dense, strict=True):
        torch.testing.assert_close(one[mask], other[0])


@given(st.integers(0, 10_000), st.floats(0.5, 1.0), st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_advantages_are_the_sum_that_defines_them(seed: int, gamma: float, lam: float) -> None:
    rng = np.random.default_rng(seed)
    length = int(rng.integers(1, 7))
    reward, value = rng.normal(size=length), rng.normal(size=length)
    ahead = [*value[1:], 0.0]
    delta = [reward[t] + gamma * ahead[t] - value[t] for t in range(length)]
    wanted = [
        sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, length)) for t in range(length)
    ]
    mask = torch.ones(1, length).bool()
    found = core.gae(tensor(reward[None]), tensor(value[None]), mask, gamma=gamma, lam=lam)
    np.testing.assert_allclose(found.advantages[0].numpy(), wanted, atol=1e-12)


def test_each_response_may_have_a_lambda_of_its_own() -> None:
    lam = tensor([0.3, 0.9])
    found = core.gae(rewards(), VALUES, MASK, lam=lam).advantages
    for row in range(2):
        alone = core.gae(rewards(), VALUES, MASK, lam=float(lam[row])).advantages
        torch.testing.assert_close(found[row], alone[row])


def test_lambda_grows_with_the_length() -> None:
    found = core.adaptive_lambda(torch.tensor([1, 20, 40, 10**6]))
    close(found.double(), [0.0, 0.0, 0.5, 0.999])


def test_whitening_by_hand() -> None:
    advantages = core.gae(rewards(), VALUES, MASK).advantages
    found = core.moments(advantages, MASK)
    assert float(found.mean) == pytest.approx(-0.188626, abs=1e-6)
    assert float(found.variance) == pytest.approx(0.405090, abs=1e-6)
    close(core.whiten(advantages, MASK)[0], [0.909358, 1.140085, 1.333339, 0])


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_whitening_survives_hard_inputs(offset: float) -> None:
    everything = torch.ones(1, 3).bool()
    constant = torch.full((1, 3), 7.0)
    assert core.whiten(constant + offset, everything).tolist() == [[0, 0, 0]]
    found = core.whiten(torch.tensor([[-1.0, 0.0, 1.0]]) + offset, everything)
    assert found.tolist()[0] == pytest.approx([-(1.5**0.5), 0, 1.5**0.5], rel=1e-4)
    assert core.whiten(torch.tensor([[offset]]), torch.ones(1, 1).bool()).tolist() == [[0]]
    assert core.whiten(constant, torch.zeros(1, 3).bool()).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize(
    ("advantage", "log_ratio", "options", "loss"),
    [
        (+1, 0.3, {}, -1.2),
        (+1, 0.3, {"clip_high": 0.28}, -1.28),
        (+1, -0.3, {}, -0.740818),
        (-1, 0.3, {}, 1.349859),
        (-1, -0.3, {}, 0.8),
        (-1, 2.0, {}, 7.389056),
        (-1, 2.0, {"dual_clip": 3.0}, 3.0),
    ],
)
def test_policy_loss_by_hand(
    advantage: float, log_ratio: float, options: dict[str, float], loss: float
) -> None:
    one = torch.ones(1, 1).bool()
    found = core.policy_loss(
        tensor([[log_ratio]]), tensor([[0.0]]), tensor([[advantage]]), one, **options
    )
    close(found.loss, [[loss]])
    assert bool(found.is_clipped_high) == (loss in (-1.2, -1.28))
    assert bool(found.is_clipped_low) == (loss == 0.8)
    assert bool(found.is_dual_clipped) == (loss == 3.0)


@pytest.mark.parametrize(
    ("value", "loss", "is_clipped"), [(1.0, 0.02, True), (0.4, 0.125, False), (0.5, 0.08, False)]
)
def test_value_loss_by_hand(value: float, loss: float, is_clipped: bool) -> None:
    one = torch.ones(1, 1).bool()
    found, clipped = core.value_loss(tensor([[value]]), tensor([[0.5]]), tensor([[0.9]]), one)
    close(found, [[loss]])
    assert bool(clipped) == is_clipped


def test_nothing_is_learnt_where_it_is_clipped() -> None:
    logp = tensor([[0.3, 0.1]]).requires_grad_()
    both = torch.ones(1, 2).bool()
    core.policy_loss(logp, tensor([[0.0, 0.0]]), tensor([[1.0, 1.0]]), both).loss.sum().backward()
    assert logp.grad is not None
    close(logp.grad, [[0.0, -math.exp(0.1)]])
    value = tensor([[1.0]]).requires_grad_()
    one = torch.ones(1, 1).bool()
    core.value_loss(value, tensor([[0.5]]), tensor([[0.9]]), one)[0].sum().backward()
    assert value.grad is not None
    close(value.grad, [[0.0]])


def everything(fill: float) -> list[Tensor]:
    """All outputs and gradients, with `fill` in every masked slot."""
    logp, ref, values = (torch.where(MASK, x, fill) for x in (LOGP, REF, VALUES))
    kl = core.k1(logp, ref, MASK)
    reward = core.token_rewards(kl, SCORES, MASK, 0.1)
    reward = torch.where(MASK, reward, fill)
    advantages, returns = core.gae(reward, values, MASK)
    advantages, returns = (torch.where(MASK, x, fill) for x in (advantages, returns))
    white = core.whiten(advantages, MASK)
    new = (logp + 0.05).requires_grad_()
    new_values = (values + 0.1).requires_grad_()
    weights = core.importance_weights(new.detach(), logp, MASK, 2.0)
    policy = core.policy_loss(new, logp, advantages, MASK, dual_clip=3.0, weights=weights)
    value, clipped = core.value_loss(new_values, values, returns, MASK)
    (policy.loss + value).sum().backward()
    grads = [x.grad for x in (new, new_values) if x.grad is not None]
    assert len(grads) == 2
    ev = core.explained_variance(values, returns, MASK)
    return [kl, core.k3(logp, ref, MASK), white, *policy, value, clipped, weights, ev, *grads]


@pytest.mark.parametrize("fill", [NAN, math.inf, -1e30])
def test_what_stands_in_masked_slots_is_never_read(fill: float) -> None:
    for clean, dirty in zip(everything(0.0), everything(fill), strict=True):
        assert torch.isfinite(dirty.double()).all()
        assert torch.equal(clean, dirty)


def test_a_mask_is_bool() -> None:
    with pytest.raises(TypeError, match="a mask is bool"):
        core.gae(VALUES, VALUES, MASK.float())


def test_explained_variance_by_hand() -> None:
    returns = core.gae(rewards(), VALUES, MASK).returns
    assert float(core.explained_variance(VALUES, returns, MASK)) == pytest.approx(
        0.165630, abs=1e-6
    )
    assert math.isnan(core.explained_variance(VALUES, torch.ones_like(VALUES), MASK))


def test_an_unlikely_sampler_is_weighed_and_bounded() -> None:
    mask = torch.tensor([[1, 1, 1, 0]]).bool()
    found = core.importance_weights(
        tensor([[-1, -1, -1, NAN]]), tensor([[-1.1, -9, NAN, 0]]), mask, 2.0
    )
    close(found, [[math.exp(0.1), 2.0, 1.0, 0.0]])


@pytest.mark.parametrize(
    ("kl", "coef"), [(12.0, 0.201024), (6.6, 0.200512), (3.0, 0.198976), (0.0, 0.198976)]
)
def test_the_coefficient_follows_the_target(kl: float, coef: float) -> None:
    controller = core.AdaptiveKL(0.2, target=6.0)
    controller.update(kl, 256)
    assert controller.coef == pytest.approx(coef, abs=1e-9)
    fixed = core.AdaptiveKL(0.2)
    fixed.update(kl, 256)
    assert fixed.coef == 0.2


def test_running_moments_are_those_of_everything_so_far() -> None:
    rollouts = [torch.tensor([1e4 + 1, 1e4 + 2]), torch.tensor([1e4 - 3.0]), torch.randn(7) + 1e4]
    running = core.RunningMoments()
    assert running.std == 1.0
    for rollout in rollouts:
        running.update(torch.cat([rollout, torch.tensor([NAN])]))
    everything_ = torch.cat(rollouts).double()
    assert running.count == 10
    assert running.mean == pytest.approx(float(everything_.mean()))
    assert running.std == pytest.approx(float(everything_.std(unbiased=False)), rel=1e-6)


def test_overlong_penalty_by_hand() -> None:
    found = core.overlong_penalty(torch.tensor([10, 80, 90, 100, 120]), limit=100, buffer=20)
    assert found.tolist() == [0, 0, -0.5, -1, -1]
