"""Ours against what TRL 1.12.0 made of the same recorded responses (`scripts/compare_trl_ppo.py --golden FILE`)."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from align.ppo.batches import pack
from reward.rewards import Worth

ROOT = Path(__file__).parents[2]
PEER = load_file(ROOT / "tests/align/golden/trl_ppo.safetensors")


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The comparison and the two trainers' common case."""
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import compare_trl_ppo
    import ppo_peer

    return SimpleNamespace(compare=compare_trl_ppo, peer=ppo_peer)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw_torch"])
def test_weights_are_those_of_trl(scripts: Any, optimizer: str, tmp_path: Path) -> None:
    case = scripts.compare.case_of(optimizer)
    made = scripts.peer.models(case)
    before = scripts.compare.weights_of(made.policy, made.value)
    own = scripts.compare.run_ours(case, str(tmp_path))
    for name, weights in own.items():
        golden = PEER[f"{optimizer}.{name}"]
        assert (golden - before[name]).abs().max() > 1e-2
        assert (weights - golden).abs().max() < 1e-6


def test_population_variance_is_the_only_difference(scripts: Any, tmp_path: Path) -> None:
    """Without the correction by n − 1, which `compare` puts in for TRL's sake, weights differ visibly."""
    compare = scripts.compare
    case = compare.case_of("sgd")
    made = scripts.peer.models(case)
    trainer = scripts.peer.ours(case, made, str(tmp_path))
    trainer.collector.sampler = compare.Recorded(is_ended=False)
    trainer.train()
    off = (compare.weights_of(made.policy, made.value)["policy"] - PEER["sgd.policy"]).abs().max()
    assert 1e-5 < off < 1e-2


def test_ended_responses_differ_from_trl_by_the_closed_form(scripts: Any, tmp_path: Path) -> None:
    """TRL puts the score s of an ended response one token after its end, where it keeps a value V′.

    So its last advantage is γV′ − V_L + γλ(s − V′) and not s − V_L, which reaches token t times (γλ)^(L − t). With
    γ = 1 that is A_TRL − A = λ^(L − t) (1 − λ)(V′ − s). A response of full length has no such token: there both agree.
    """
    case = scripts.compare.case_of("sgd")
    made = scripts.peer.models(case)
    trainer = scripts.peer.ours(case, made, str(tmp_path), whiten_advantages=False)
    trainer.collector.sampler = scripts.compare.Recorded(is_ended=True)
    # TRL's reward model reads the end token, ours a text.
    trainer.collector.worths = lambda _, samples: (
        Worth(after_the_end(made, samples)[1].tolist(), {}),
        [],
    )
    rollout = trainer._next_rollout()
    golden, width = PEER["ended.advantages"], rollout.mask.shape[1]
    lengths = rollout.mask.sum(dim=1)
    values, scores = after_the_end(made, rollout.samples)
    steps = lengths[:, None] - 1 - torch.arange(width)
    excess = 0.95 ** steps.clamp(min=0) * 0.05 * (values - scores)[:, None]
    excess = torch.where(rollout.mask & (lengths < case.response_length)[:, None], excess, 0.0)
    assert excess.abs().max() > 1e-3
    assert (lengths < case.response_length).sum() > 3
    torch.testing.assert_close(rollout.advantages + excess, golden[:, :width], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def after_the_end(made: Any, samples: Any) -> tuple[Tensor, Tensor]:
    """The critic's value of the state after each response, and the reward model's score there."""
    batch = pack(samples, 0)
    rows = torch.arange(len(samples))
    value, reward = (
        model.score(model.model(batch.ids).last_hidden_state)[rows, batch.ends, 0]
        for model in (made.value, made.reward)
    )
    return value, reward
