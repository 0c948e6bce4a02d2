"""Engines beside `generate`: parity with the trainer, importance weights, a vLLM server and its failures."""

import copy
import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ppo_toys as toys
import pytest
import torch
from ppo_server import Server, serving

from align.ppo import core, parity
from align.ppo.batches import Sample, pack
from align.ppo.model import merged_weights, token_logp
from align.ppo.trainer import PPOTrainer
from conf.entry import UserError

NAN = math.nan
SIZE = 32
PROMPTS = [
    [3, 4, 5],
    [6],
    [7, 8, 9, 10, 11],
    list(range(2, 30)) + list(range(2, 14)),
]  # the last fills a cache block


def peaked(seed: int = 0) -> tuple[Any, Any, Any]:
    """Toy models whose next token is not any of them alike; heads are as wide as vLLM wants them on a CPU."""
    policy, value, _ = toys.models(SIZE, seed, width=128)
    with torch.no_grad():
        policy.lm_head.weight.mul_(20)
    return policy, value, copy.deepcopy(policy)


def adapted(model: Any, seed: int = 0) -> Any:
    """With an adapter that does something."""
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    torch.manual_seed(seed)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options))


def trainer(out: Path, url: str, is_adapted: bool = False, **given: Any) -> PPOTrainer:
    """A trainer whose responses come from a server."""
    policy, value, reference = peaked()
    options: dict[str, Any] = {
        "engine": "vllm",
        "vllm_url": url,
        "num_rollouts": 2,
        "rollout_batch_size": 8,
        "max_prompt_length": 48,
        "temperature": 0.7,
    }
    return PPOTrainer(
        adapted(policy) if is_adapted else policy,
        value,
        reference,
        toys.tokenizer(SIZE),
        toys.questions(PROMPTS),
        toys.rewarded(lambda ids: sum(ids) / SIZE),
        toys.settings(out, **options | given),
    )


def logged(trained: PPOTrainer, name: str) -> list[float]:
    return [row[name] for row in trained.state.log_history if name in row]


# --- parity and weights ---


def sample(logp: list[float] | None, length: int = 2) -> Sample:
    return Sample([3], [4] * length, True, logp)


def test_the_gap_is_over_the_tokens_that_have_a_number() -> None:
    samples = [sample([-1.0, NAN]), sample(None), sample([-2.0, -3.0])]
    found = parity.gap(samples, [[-1.25, -9.0], [-9.0, -9.0], [-1.0, -3.0]])
    assert found == parity.Gap(pytest.approx(1.25 / 3), 1.0, 3)
    assert parity.gap([sample(None)], [[-1.0, -1.0]]) is None


@pytest.mark.parametrize(
    ("correction", "weights", "clipped"),
    [
        ("none", None, 0.0),
        ("truncate", [[math.exp(0.1), 2.0], [1.0, math.exp(-3)]], 0.25),
        ("mask", [[math.exp(0.1), 0.0], [1.0, 0.0]], 0.5),
    ],
)
def test_tokens_are_weighed_by_who_drew_them(
    tmp_path: Path, correction: str, weights: list[list[float]] | None, clipped: float
) -> None:
    args = toys.settings(tmp_path, importance_correction=correction, importance_cap=2.0)
    samples = [sample([-1.1, -9.0, -5.0], 3), sample([NAN, -1.0])]
    logp = torch.tensor([[-1.0, -1.0, -1.0], [-1.0, -4.0, NAN]])
    mask = torch.tensor([[True, True, False], [True, True, False]])
    found, log = parity.weights(samples, logp, mask, args)
    if weights is None:
        assert found is None
    else:
        assert found is not None
        torch.testing.assert_close(found, torch.tensor([[*row, 0.0] for row in weights]))
    ratios = [math.exp(0.1), math.exp(8), 1.0, math.exp(-3)]
    assert log["sampling/is_ratio_mean"] == pytest.approx(sum(ratios) / 4)
    assert log["sampling/is_clipfrac"] == clipped
    assert parity.weights([sample(None)], logp[:1], mask[:1], args) == (None, {})


def test_weights_make_a_biased_sampler_unbiased() -> None:
    """The gradient from another distribution, weighed, is the one from the policy's own: sums over all five tokens."""
    torch.manual_seed(0)
    policy, engine = torch.randn(2, 5, dtype=torch.float64).log_softmax(-1)
    worth, mask = torch.randn(1, 5, dtype=torch.float64), torch.ones(1, 5).bool()
    own = policy.clone()[None].requires_grad_()
    weights = core.importance_weights(policy[None], engine[None], mask, math.inf)
    loss = core.policy_loss(own, policy[None], worth, mask, weights=weights).loss
    (loss * engine.exp()).sum().backward()
    assert own.grad is not None
    torch.testing.assert_close(own.grad, -worth * policy.exp())


def test_the_scores_of_generate_are_those_of_the_trainer(tmp_path: Path) -> None:
    """T9. With the key-value cache and padding on the left, at a temperature; without it they are refused."""
    policy, _, _ = peaked()
    args = toys.settings(tmp_path, temperature=0.7)
    width = max(map(len, PROMPTS))
    ids = torch.tensor([[toys.PAD] * (width - len(row)) + row for row in PROMPTS])
    options = {"do_sample": True, "top_k": 0, "temperature": 0.7, "max_new_tokens": 6}
    torch.manual_seed(0)
    drawn = policy.generate(
        ids, attention_mask=(ids != toys.PAD).long(), eos_token_id=None, output_scores=True,
        return_dict_in_generate=True, **options,
    )  # fmt: skip
    said = policy.compute_transition_scores(drawn.sequences, drawn.scores, normalize_logits=True)
    responses = drawn.sequences[:, width:].tolist()
    samples = [
        Sample(prompt, response, False, theirs.tolist())
        for prompt, response, theirs in zip(PROMPTS, responses, said, strict=True)
    ]
    batch = pack(samples, toys.PAD)

    def judged(temperature: float) -> list[list[float]]:
        with torch.no_grad():
            logp, _ = token_logp(policy, batch.ids, batch.rows, batch.cols, temperature)
        return logp.view(len(samples), -1).tolist()  # type: ignore[no-any-return]

    found = parity.checked(samples, judged(0.7), args)
    assert found is not None
    assert found.largest < 1e-4
    with pytest.raises(UserError, match=r"24 tokens of 4 responses .* processed_logprobs"):
        parity.checked(samples, judged(1.0), args)


# --- handing over weights ---


def test_an_adapter_is_merged_into_copies(tmp_path: Path) -> None:
    """T34. What is handed over is what `merge_and_unload` makes; the policy in training keeps every bit."""
    policy = adapted(peaked()[0])
    before = {name: x.clone() for name, x in policy.state_dict().items()}
    found = merged_weights(policy)
    policy.get_base_model().save_pretrained(tmp_path, state_dict=dict(found))
    assert all(torch.equal(x, before[name]) for name, x in policy.state_dict().items())

    from transformers import AutoModelForCausalLM

    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.no_grad():
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits
        torch.testing.assert_close(loaded, policy(ids).logits, rtol=1e-4, atol=1e-4)
        with policy.disable_adapter():
            assert (loaded - policy(ids).logits).abs().max() > 0.1
    expected = policy.merge_and_unload().state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)


# --- a server ---


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    """A server that holds another model than the one in training, until it is told."""
    other, _, _ = peaked(seed=1)
    other.save_pretrained(tmp_path / "other")
    with serving(tmp_path / "other", toys.tokenizer(SIZE)) as running:
        yield running


@pytest.mark.parametrize("is_adapted", [False, True])
def test_a_policy_is_trained_on_what_a_server_writes(
    tmp_path: Path, server: Server, is_adapted: bool
) -> None:
    """Every rollout is drawn from the weights of its time: they move far, and the gap stays that of rounding."""
    ours = trainer(tmp_path / "out", server.url, is_adapted, num_rollouts=3, learning_rate=0.05)
    ours.train()
    assert max(logged(ours, "sampling/logp_diff_max")) < 1e-3
    assert max(logged(ours, "objective/kl_k3")) > 0.1
    assert logged(ours, "sampling/is_clipfrac") == [0.0] * len(
        logged(ours, "sampling/is_ratio_mean")
    )
    assert server.loads == 4  # the trial, then each rollout
    assert not list((tmp_path / "out").glob("weights-*"))
    asked = server.asked[-1]
    assert asked["stop_token_ids"] == [toys.END]
    assert (asked["temperature"], asked["top_p"], asked["top_k"]) == (0.7, 1.0, 0)
    assert len({one["seed"] for one in server.asked}) == len(server.asked) == 4 + 3 * 8
    ours.collector.sampler.close()


def test_what_a_server_writes_is_what_generate_would(tmp_path: Path, server: Server) -> None:
    """With the draws of `generate` behind it, and in another order, nothing in the training differs."""
    ends = []
    choices: list[dict[str, Any]] = [{}, {"engine": "generate", "vllm_url": None}]
    for options in choices:
        options |= {"importance_correction": "none"}  # the weights of rounding
        ours = trainer(tmp_path / f"out{len(ends)}", server.url, **options)
        ours.train()
        ends.append(toys.weights(ours.model))
    assert torch.equal(*ends)


def test_a_policy_is_evaluated_with_its_present_weights(tmp_path: Path, server: Server) -> None:
    ours = trainer(tmp_path / "out", server.url, num_rollouts=1)
    ours.train()
    loads = server.loads
    ours.evaluate(toys.questions(PROMPTS))
    assert server.loads == loads + 1
    held = {name: x for name, x in server.model.state_dict().items()}
    trained = ours.model.policy.state_dict()
    assert all(torch.equal(x, trained[name]) for name, x in held.items())


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("stale", r"does not draw from the policy .* differ .* nats on average"),
        ("raw", r"does not draw from the policy .* processed_logprobs"),
        ("short", r"stopped after 1 of ppo.args.max_new_tokens=8 tokens .* --max-model-len"),
        ("blind", r"/collective_rpc answered 500: .* no such folder.*ppo.args.vllm_sync_dir"),
        ("no development mode", r"takes no weights: start it as VLLM_SERVER_DEV_MODE=1"),
        ("refused", r"/v1/completions answered 400: .*out of vocabulary"),
        ("no ids", r"does not answer as vLLM .* without token ids"),
        ("another prompt", r"it read \d+ prompt tokens"),
        ("slow", r"did not answer /v1/completions within ppo.args.vllm_timeout=0.5 seconds"),
    ],
)
def test_a_wrong_server_is_refused_before_anything_is_learnt(
    tmp_path: Path, server: Server, fault: str, message: str
) -> None:
    ours = trainer(tmp_path / "out", server.url, vllm_timeout=0.5 if fault == "slow" else 60)
    server.fault = fault
    before = toys.weights(ours.model)
    with pytest.raises(UserError, match=message):
        ours.train()
    assert torch.equal(toys.weights(ours.model), before)
    assert ours.ppo.rollouts == 0
    ours.collector.sampler.close()


def test_weights_that_no_longer_arrive_are_noticed(tmp_path: Path, server: Server) -> None:
    """Each rollout is compared, not only the first: here the server stops loading after it."""
    ours = trainer(tmp_path / "out", server.url, num_rollouts=4, learning_rate=0.05)
    stop(server, ours.collector._try_sampler, ours)
    with pytest.raises(UserError, match="does not draw from the policy"):
        ours.train()
    assert ours.ppo.rollouts == 1


def stop(server: Server, tried: Callable[..., None], ours: PPOTrainer) -> None:
    """Let a server ignore new weights once it has been tried."""

    def then_stale(*given: Any) -> None:
        tried(*given)
        server.fault = "stale"

    ours.collector._try_sampler = then_stale  # type: ignore[method-assign]


def test_a_server_that_is_not_there_is_named(tmp_path: Path, server: Server) -> None:
    with pytest.raises(UserError, match=r"127.0.0.1:\d+ cannot be reached .* start it"):
        trainer(tmp_path, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match="sees 64 tokens"):
        trainer(tmp_path, server.url, max_prompt_length=60)
    server.fault = "another program"
    with pytest.raises(UserError, match="/v1/models answered 200: <html>"):
        trainer(tmp_path, server.url)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"engine": "sglang"}, "engine=sglang must be generate or vllm"),
        ({"engine": "vllm"}, "vllm_url=None must be the server's address"),
        ({"vllm_url": "http://127.0.0.1:1"}, "left out, or ppo.args.engine be vllm"),
        ({"importance_correction": "tis"}, "none, truncate or mask"),
        ({"importance_cap": 0.5}, "importance_cap=0.5 must be at least 1"),
        ({"sampler_tolerance": 0.0}, "sampler_tolerance=0.0 must be above 0"),
    ],
)
def test_settings_that_mean_nothing_are_refused(
    tmp_path: Path, given: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        toys.settings(tmp_path, **given)


# --- vLLM itself ---


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return int(one.getsockname()[1])


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A vLLM server with another model than the one in training."""
    python = os.environ.get("VLLM_PYTHON")
    if not python:
        pytest.skip("VLLM_PYTHON names no Python that has vLLM, see docs/ppo.md")
    folder = tmp_path_factory.mktemp("vllm")
    other, _, _ = peaked(seed=1)
    other.save_pretrained(folder / "model")
    toys.tokenizer(SIZE).save_pretrained(folder / "model")
    port = free_port()
    command = [
        python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder / "model"), "--host", "127.0.0.1",
        "--port", str(port), "--dtype", "float32", "--max-model-len", "64", "--logprobs-mode", "processed_logprobs",
        "--enforce-eager", "--block-size", "32",
    ]  # fmt: skip
    environment = os.environ | {"VLLM_SERVER_DEV_MODE": "1", "VLLM_NO_USAGE_STATS": "1"}
    environment.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=log, start_new_session=True
        )
        try:
            wait_until_ready(process, f"http://127.0.0.1:{port}", folder / "log")
            yield f"http://127.0.0.1:{port}"
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            process.wait(60)


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    import httpx

    for _ in range(300):
        assert process.poll() is None, log.read_text(encoding="utf-8")[-3000:]
        try:
            if httpx.get(f"{url}/health").status_code == 200:
                return
        except httpx.HTTPError:
            time.sleep(1)
    raise AssertionError(log.read_text(encoding="utf-8")[-3000:])


@pytest.mark.parametrize("is_adapted", [False, True])
def test_vllm_draws_from_the_policy_of_every_rollout(
    tmp_path: Path, vllm: str, is_adapted: bool
) -> None:
    ours = trainer(tmp_path / "out", vllm, is_adapted, num_rollouts=3, learning_rate=0.05)
    ours.train()
    print("vLLM: ", logged(ours, "sampling/logp_diff_mean"), logged(ours, "sampling/logp_diff_max"))
    assert max(logged(ours, "sampling/logp_diff_max")) < 1e-3
    assert max(logged(ours, "objective/kl_k3")) > 0.1
    # The same prompts with the same seeds, at once and one by one.
    sampler, seeds = ours.collector.sampler, [5, 6, 7, 8]
    drawn = sampler.sample(PROMPTS, seeds)
    again = [
        sampler.sample([prompt], [seed])[0] for prompt, seed in zip(PROMPTS, seeds, strict=True)
    ]
    assert [one.response for one in drawn] == [one.response for one in again]
    assert all(one.is_ended == (one.response[-1] == toys.END) for one in drawn)
    sampler.close()


def test_vllm_without_the_policys_weights_is_refused(
    tmp_path: Path, vllm: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server keeps what the last training left there."""
    ours = trainer(tmp_path / "out", vllm)
    monkeypatch.setattr(ours.collector.sampler, "_hand_over", lambda: None)
    with pytest.raises(UserError, match="does not draw from the policy"):
        ours.train()
    ours.collector.sampler.close()
