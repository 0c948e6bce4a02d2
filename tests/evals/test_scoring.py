"""The scorer against separate forward passes of every family, in float32."""

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from conf.entry import UserError
from evals import lmhead, trees
from evals.scoring import Scorer
from evals.treeattention import Form, inputs
from evals.treereader import TreeReader

SIZES = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # Large enough for attention to matter, and for the likeliest token to change.
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 8},
    "gemma": {"head_dim": 8},
    "mistral": {"sliding_window": None},
    "phi": {"num_key_value_heads": 4},
    "gpt2": {"activation_function": "gelu_new"},
    "gpt_neox": {},
    "gemma2": {"head_dim": 8, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 5.0},
    "cohere": {"logit_scale": 0.0625},
    "granite": {"logits_scaling": 8.0, "attention_multiplier": 0.3},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
}
ISSUE = ["llama", "qwen2", "qwen3", "gemma", "mistral", "phi", "gpt2"]


def model_of(family: str, **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    settings = SIZES | FAMILIES.get(family, {}) | options
    implementation = settings.pop("attn_implementation", None)
    config = AutoConfig.for_model(family, **settings)
    return AutoModelForCausalLM.from_config(config, attn_implementation=implementation).eval()


def questions(seed: int = 0) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Prompts with a common preamble, long and short, and completions: one token, equal ones, ones within others."""
    draw = np.random.default_rng(seed)

    def ids(size: int) -> list[int]:
        return draw.integers(3, 97, size).tolist()

    preamble, short = ids(90), ids(4)
    prompts = [preamble + ids(70), preamble + ids(9), preamble, short + ids(3), [1], ids(80)]
    start = ids(5)
    completions = [
        [ids(7), ids(12), ids(1), ids(30)],
        [start, start, start + ids(4), start[:2]],
        [[5], [6], [7], [8]],
        [ids(3)],
        [ids(6), ids(2)],
        [ids(70), ids(66)],
    ]
    return prompts, completions


def separately(model: Any, prompt: list[int], completion: list[int]) -> tuple[Tensor, bool]:
    """A completion's log-probabilities by a forward pass of its own."""
    logits = model(input_ids=torch.tensor([prompt + completion]), use_cache=False).logits
    logp = logits[0, len(prompt) - 1 : -1].float().log_softmax(-1)
    tokens = torch.tensor(completion)
    return logp.gather(-1, tokens[:, None])[:, 0], bool((logp.argmax(-1) == tokens).all())


def assert_equal(model: Any, scorer: Scorer, seed: int = 0) -> None:
    prompts, completions = questions(seed)
    found = scorer.score(prompts, completions)
    for prompt, options, scored in zip(prompts, completions, found, strict=True):
        for option, ours in zip(options, scored, strict=True):
            with torch.no_grad():
                theirs, is_greedy = separately(model, prompt, option)
            assert ours.sum == pytest.approx(float(theirs.double().sum()), rel=1e-5)
            assert ours.per_token == pytest.approx(theirs.tolist(), rel=1e-5, abs=2e-6)
            assert ours.is_greedy == is_greedy


@pytest.mark.parametrize("family", FAMILIES)
def test_equals_separate_passes(family: str, capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of(family)
    assert_equal(model, Scorer(model, tokens=300))
    assert "common prompts" not in capsys.readouterr().err  # none of them falls back


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_equal_those_of_separate_passes(family: str) -> None:
    model = model_of(family)
    prompts, completions = questions()
    theirs = gradient_of(
        model,
        torch.cat(
            [
                separately(model, prompt, option)[0]
                for prompt, options in zip(prompts, completions, strict=True)
                for option in options
            ]
        ),
    )
    found = Scorer(model, tokens=500).log_probs(prompts, completions)
    ours = gradient_of(model, torch.cat([logp for options in found for logp in options]))
    assert torch.cosine_similarity(ours, theirs, dim=0) >= 0.99999
    assert ours.norm() == pytest.approx(theirs.norm().item(), rel=1e-5)


def gradient_of(model: Any, logp: Tensor) -> Tensor:
    """Of a sum in which no token counts as much as another; float64."""
    weights = torch.linspace(-1, 1, len(logp))
    model.zero_grad()
    (logp * weights).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).double()


def test_the_order_changes_no_bit_and_the_packing_only_the_last() -> None:
    model = model_of("llama")
    prompts, completions = questions()
    usual = Scorer(model).score(prompts, completions)
    turned = Scorer(model).score(prompts[::-1], [options[::-1] for options in completions[::-1]])
    assert [options[::-1] for options in turned[::-1]] == usual
    for tokens in (1, 200, 333):
        again = Scorer(model, tokens=tokens).score(prompts, completions)
        for one, other in zip(usual, again, strict=True):
            assert [x.sum for x in one] == pytest.approx([x.sum for x in other], rel=1e-5)
            assert [x.is_greedy for x in one] == [x.is_greedy for x in other]


def test_a_greedy_answer_is_recognised() -> None:
    model = model_of("llama")
    prompt = questions()[0][0]
    tokens: list[int] = []
    for _ in range(5):
        logits = model(input_ids=torch.tensor([prompt + tokens])).logits
        tokens.append(int(logits[0, -1].argmax()))
    other = [*tokens[:-1], (tokens[-1] + 1) % 97]
    ((greedy, not_greedy, first),) = Scorer(model).score([prompt], [[tokens, other, tokens[:1]]])
    assert (greedy.is_greedy, not_greedy.is_greedy, first.is_greedy) == (True, False, True)


def test_every_common_token_is_read_once_and_the_head_sees_no_other_state() -> None:
    model = model_of("llama")
    stem, ends = list(range(3, 63)), [[70, 71], [72, 73], [72, 74]]
    scorer = Scorer(model)
    scorer.score([stem], [ends])  # looks at the model first
    read: list[int] = []
    headed: list[int] = []
    hooks = [
        model.get_input_embeddings().register_forward_hook(lambda _, i, o: read.append(o.shape[1])),
        model.lm_head.register_forward_hook(lambda _, i, o: headed.append(len(o))),
    ]
    scorer.score([stem, [*stem, 70]], [ends, [[71]]])
    for hook in hooks:
        hook.remove()
    assert read == [len(stem) + 2]  # 70 and 72; nobody asks for the states behind the last tokens
    assert headed == [1]


def test_dense_masks_and_blocks_agree() -> None:
    model = model_of("llama")
    eager = model_of("llama", attn_implementation="eager")
    assert_equal(model, Scorer(eager, tokens=300))
    assert_equal(model, Scorer(eager, tokens=4096))


@pytest.mark.filterwarnings("ignore:.*flex_attention.*:UserWarning")
@pytest.mark.parametrize("family", ["llama", "phi", "gpt2"])
def test_flex_attention_is_the_same(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, but computed by the reference. It has no backward pass here, which is found out."""
    model = model_of(family)
    monkeypatch.setattr("evals.treereader.forms_of", lambda _: [Form.flex, Form.blocks])
    scorer = Scorer(model, tokens=300)
    assert_equal(model, scorer)
    with torch.no_grad():
        assert scorer._reader.form(1) is Form.flex
    assert scorer._reader.form(1) is Form.blocks


def test_layers_that_run_twice_give_the_same_gradient() -> None:
    model = model_of("llama").train()
    prompts, completions = questions()
    gradients = []
    for _ in range(2):
        found = Scorer(model).log_probs(prompts, completions)
        gradients.append(gradient_of(model, torch.cat([x for each in found for x in each])))
        model.activation_checkpointing_enable({"use_reentrant": False})
    assert torch.cosine_similarity(*gradients, dim=0) >= 0.99999


def test_the_model_is_left_as_it_was() -> None:
    model = model_of("gpt2", attn_pdrop=0.5, resid_pdrop=0.5).train()
    model.transformer.h[1].eval()
    before = [module.training for module in model.modules()]
    assert_equal(copy.deepcopy(model).eval(), Scorer(model))  # without dropout
    assert [module.training for module in model.modules()] == before
    assert model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("family", "options", "reason"),
    [
        ("mistral", {"sliding_window": 64}, "slides over 64 tokens"),
        ("gpt_neo", {"attention_types": [[["global", "local"], 1]], "window_size": 64}, "slides"),
        ("bloom", {"n_layer": 2, "n_head": 4}, "tree"),
        ("falcon", {"alibi": True, "new_decoder_architecture": False}, "ALiBi"),
        ("mamba", {"state_size": 4}, "recurrent"),
        ("recurrent_gemma", {"attention_window_size": 64, "lru_width": 32}, "recurrent"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
             "max_position_embeddings": 512},
            None,
        ),
    ],
)  # fmt: skip
def test_others_fall_back_and_say_so_once(
    family: str, options: dict[str, Any], reason: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    model = model_of(family, **options)
    scorer = Scorer(model, tokens=300)
    for seed in range(2):
        assert_equal(model, scorer, seed)
        scorer.shares(150 + seed)
    said = [line for line in capsys.readouterr().err.splitlines() if "common prompts" in line]
    if reason is None:
        assert said == []
    else:
        (line,) = said
        assert reason in line


def test_a_window_longer_than_every_sequence_is_none(capsys: pytest.CaptureFixture[str]) -> None:
    model = model_of("mistral", sliding_window=400)
    assert_equal(model, Scorer(model))
    assert "common prompts" not in capsys.readouterr().err


def test_noise_on_embeddings_is_left_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    """NEFTune's grows with the length of a row; it is there in training only."""
    model = model_of("llama")
    model.get_input_embeddings().neftune_noise_alpha = 5.0
    assert Scorer(model).shares(100)
    assert not Scorer(model.train()).shares(100)
    assert "NEFTune" in capsys.readouterr().err


def test_an_adapter_on_the_embeddings_is_scored() -> None:
    from peft import LoraConfig, get_peft_model

    for options in (
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    ):
        config = LoraConfig(r=4, init_lora_weights=False, **options)
        model = get_peft_model(model_of("llama"), config).eval()
        assert_equal(model, Scorer(model))


def test_tokens_that_an_adapter_puts_before_are_refused() -> None:
    from peft import PromptTuningConfig, get_peft_model

    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(model_of("llama"), config).eval()
    with pytest.raises(UserError, match="prompt tuning"):
        Scorer(model).score([[1, 2, 3]], [[[4, 5]]])


def test_an_adapter_is_scored_and_trained() -> None:
    from peft import LoraConfig, get_peft_model

    for saved in (None, ["lm_head"]):  # a head that PEFT wraps goes through the model's own logits
        config = LoraConfig(
            r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, modules_to_save=saved
        )
        model = get_peft_model(model_of("llama"), config).eval()
        assert_equal(model, Scorer(model))
        found = Scorer(model).log_probs(*questions())
        ours = gradient_of(model, torch.cat([x for each in found for x in each]))
        theirs = gradient_of(
            model,
            torch.cat(
                [
                    separately(model, prompt, option)[0]
                    for prompt, options in zip(*questions(), strict=True)
                    for option in options
                ]
            ),
        )
        assert torch.cosine_similarity(ours, theirs, dim=0) >= 0.99999


def test_half_precision_is_as_near_as_the_model_itself() -> None:
    exact = model_of("llama")
    model = copy.deepcopy(exact).to(torch.bfloat16)
    prompts, completions = questions()
    ours, theirs = [], []
    for prompt, options, found in zip(
        prompts, completions, Scorer(model).score(prompts, completions), strict=True
    ):
        for option, scored in zip(options, found, strict=True):
            with torch.no_grad():
                truth = separately(exact, prompt, option)[0]
                theirs.append((separately(model, prompt, option)[0] - truth).abs().mean().item())
            ours.append((torch.tensor(scored.per_token) - truth).abs().mean().item())
    assert np.mean(ours) <= 1.2 * np.mean(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_trial_minds_every_token_but_the_first_in_16_bits(dtype: torch.dtype) -> None:
    """Rounding moves the first tokens' states of real models by more than a wrong tree would move others."""
    model = model_of("llama").to(dtype)

    def trouble(moved: int) -> str | None:
        def states(given: dict[str, Any], places: Tensor | None) -> Tensor:
            with torch.no_grad():
                found = model.model(**given).last_hidden_state
            if "tree" in given:
                found[:, moved] *= 1.1
            found = found.flatten(0, 1)
            return found if places is None else found[places]

        return TreeReader(model, states)._trouble(Form.blocks, with_gradient=False)

    assert (trouble(1) is None) == (dtype == torch.bfloat16)
    said = "its states in a tree are not those of separate sequences"
    assert [trouble(place) for place in (10, 95, 100, 104)] == [said] * 4


def test_what_cannot_be_scored_is_refused() -> None:
    scorer = Scorer(model_of("llama"))
    with pytest.raises(UserError, match="prompt 1: its prompt has no token"):
        scorer.score([[1], []], [[[2]], [[2]]])
    with pytest.raises(UserError, match="prompt 0: its completion has no token"):
        scorer.score([[1]], [[[2], []]])
    with pytest.raises(UserError, match="not one of the model's 97"):
        scorer.score([[1]], [[[97]]])
    with pytest.raises(UserError, match="the model reads 512"):
        scorer.score([[1] * 512], [[[2, 2]]])
    with pytest.raises(UserError, match="1 prompts with completions for 2"):
        scorer.score([[1]], [[[2]], [[2]]])
    assert scorer.score([], []) == []
    assert scorer.score([[1], []], [[[2]], []])[1] == []


def test_an_encoder_decoder_is_refused() -> None:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(d_model=8, d_ff=8, d_kv=4, num_layers=1, num_heads=2, vocab_size=11)
    with pytest.raises(UserError, match="encoder-decoder"):
        Scorer(T5ForConditionalGeneration(config))


class TestHead:
    """The head alone, against autograd through all logits."""

    @pytest.fixture(autouse=True)
    def _small_steps(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(lmhead, "_PRODUCT_BYTES", 7 * 50 * 4)
        monkeypatch.setitem(lmhead._BLOCK_BYTES, "cpu", 3 * 50 * 4)

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize(
        "shaping", [lmhead.Shaping(), lmhead.Shaping(0.3), lmhead.Shaping(2.0, 1.5)]
    )
    def test_value_and_gradient(self, bias: bool, shaping: lmhead.Shaping) -> None:
        torch.manual_seed(0)
        head = torch.nn.Linear(8, 50, bias=bias)
        states = torch.randn(10, 8, requires_grad=True)
        # Several tokens of one state, and a state of which none is asked.
        wanted = lmhead.Wanted(
            torch.arange(10),
            np.array([0, 0, 1, 3, 4, 5, 5, 9]),
            torch.tensor([4, 4, 7, 1, 0, 2, 49, 3]),
            with_statistics=True,
        )
        weights = torch.linspace(-1, 2, 8)
        found = lmhead.by_head(head, shaping, states, wanted)
        logits = head(states) * shaping.scale
        if shaping.cap is not None:
            logits = shaping.cap * torch.tanh(logits / shaping.cap)
        every = logits.log_softmax(-1)
        expected = every[torch.from_numpy(wanted.pairs), wanted.tokens]
        torch.testing.assert_close(found.logp, expected)
        entropy, square = -(every.exp() * every).sum(-1), (2 * every).logsumexp(-1)
        statistics = torch.stack([entropy, logits.mean(-1), square], -1).detach()
        torch.testing.assert_close(found.statistics, statistics[torch.from_numpy(wanted.pairs)])
        best = logits.argmax(-1)[torch.from_numpy(wanted.pairs)] == wanted.tokens
        assert found.is_best.tolist() == best.tolist()
        inputs = [states, *head.parameters()]
        ours = torch.autograd.grad((found.logp * weights).sum(), inputs)
        theirs = torch.autograd.grad((expected * weights).sum(), inputs)
        for one, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(one, other)

    def test_a_large_vocabulary_is_summed_exactly(self) -> None:
        """Where float32 log-softmax is off by 1e-5 a token, which adds up over a long completion."""
        torch.manual_seed(0)
        head = torch.nn.Linear(16, 50_000)
        states, tokens = torch.randn(64, 16), torch.arange(64) * 500
        wanted = lmhead.Wanted(torch.arange(64), np.arange(64), tokens)
        with torch.no_grad():
            found = lmhead.by_head(head, lmhead.Shaping(), states, wanted).logp
            truth = copy.deepcopy(head).double()(states.double()).log_softmax(-1)
        assert (found - truth[torch.arange(64), tokens]).abs().max() <= 3e-6

    def test_no_logits_are_kept_between_the_passes(self) -> None:
        head = torch.nn.Linear(8, 50, bias=False)
        states = torch.randn(40, 8, requires_grad=True)
        wanted = lmhead.Wanted(torch.arange(40), np.arange(40), torch.arange(40))
        kept: list[int] = []

        def note(tensor: Tensor) -> Tensor:
            kept.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            lmhead.by_head(head, lmhead.Shaping(), states, wanted)
        assert kept
        assert max(kept) < 40 * 50

    def test_an_unknown_shaping_is_noticed(self) -> None:
        head = torch.nn.Linear(8, 50)
        states = torch.randn(4, 8)
        logits = head(states).detach()
        assert lmhead.agrees(head, lmhead.Shaping(), states, logits)
        assert not lmhead.agrees(head, lmhead.Shaping(), states, logits * 1.01)

    def test_a_shaping_in_half_precision_is_known(self) -> None:
        """Autocast: float32 states, a bfloat16 product that the model caps in bfloat16."""
        head, shaping = torch.nn.Linear(8, 50), lmhead.Shaping(0.07, 3.0)
        states = 5 * torch.randn(4, 8)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            logits = 3 * torch.tanh(head(states) * 0.07 / 3)
            assert lmhead.agrees(head, shaping, states, logits)
            assert not lmhead.agrees(head, lmhead.Shaping(), states, logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_unknown_cap_is_noticed_also_where_logits_are_small(dtype: torch.dtype) -> None:
    """The largest logit of the trial is a third of the cap: in 16 bits it shows on larger states alone."""
    model = model_of("llama", tie_word_embeddings=False).to(dtype)
    ids = torch.arange(1, 60)[None]
    with torch.no_grad():
        model.lm_head.weight *= 10 / model(ids).logits.abs().max()
        usual, plain = model.forward, model(ids).logits

    def capped(*args: Any, **kwargs: Any) -> Any:
        output = usual(*args, **kwargs)
        output.logits = 30 * torch.tanh(output.logits / 30)
        return output

    scorer = Scorer(model)
    scorer.score([[1, 2]], [[[3]]])
    assert scorer._is_plain_head
    model.forward = capped
    scorer = Scorer(model)
    scorer.score([[1, 2]], [[[3]]])
    assert not scorer._is_plain_head
    assert plain.abs().max() < 11


def test_a_model_that_shapes_its_logits_its_own_way_is_scored_by_its_logits() -> None:
    model = model_of("llama")
    usual = model.forward

    def shaped(*args: Any, **kwargs: Any) -> Any:
        output = usual(*args, **kwargs)
        output.logits = output.logits * 0.5 + output.logits.sin()
        return output

    model.forward = shaped
    assert_equal(model, Scorer(model, tokens=300))


def test_another_attention_than_that_of_the_blocks_fails() -> None:
    """As where layers run again behind the scorer's back: never a gradient of something else."""
    model = model_of("llama")
    (row,) = trees.pack([np.arange(1, 9), np.array([1, 2, 3, 11])], 100)
    with pytest.raises(RuntimeError, match="size"):
        model(**inputs([row], Form.blocks, model))


def test_a_model_in_ddp_is_scored_and_trained(tmp_path: Path) -> None:
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = model_of("llama")
        wrapped = torch.nn.parallel.DistributedDataParallel(model)
        assert_equal(model, Scorer(wrapped))
        gradients = []
        for each in (model, wrapped):
            found = Scorer(each, tokens=4096).log_probs(*questions())
            gradients.append(gradient_of(model, torch.cat([x for part in found for x in part])))
        assert torch.equal(*gradients)
    finally:
        torch.distributed.destroy_process_group()
