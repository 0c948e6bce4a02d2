"""Looks at a policy while it is trained: proxy reward, gold measure and KL, on the same prompts with the same seeds.

A look changes nothing: with the probe and without it, training ends in the same bits.
"""

import contextlib
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from align.artifact import Job
from align.probe import questions
from conf.entry import UserError
from conf.schema import Probe
from evals.generate import Generator, seed_of
from evals.models import free_device, local_path
from reward.looks import LOOKS, Look, append, judge, mean_of, read
from reward.rewards import RewardFunction, open_reward


@dataclass(frozen=True)
class Said:
    """A completion: the place of its question, and token ids."""

    question: int
    prompt: list[int]
    completion: list[int]


@contextlib.contextmanager
def watched(job: Job) -> Iterator[list[Any]]:
    """Callbacks for the trainer of `job`: the probe where one is set, else none."""
    if job.probe is None:
        yield []
        return
    with contextlib.ExitStack() as stack:
        with undisturbed():
            proxy = stack.enter_context(open_reward(job.probe.proxy))
            gold = stack.enter_context(open_reward(job.probe.gold))
        yield [_callback(Watch(job, job.probe, proxy, gold))]


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Give back the states of every random number generator as they were."""
    import numpy as np
    import torch

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if devices:
            torch.cuda.set_rng_state_all(devices)


@contextlib.contextmanager
def at_rest(model: Any) -> Iterator[None]:
    """`model` in evaluation mode; afterwards each module's mode and the settings of generation are as they were."""
    modes = [(module, module.training) for module in model.modules()]
    settings = model.generation_config
    model.eval()
    try:
        yield
    finally:
        model.generation_config = settings
        for module, mode in modes:
            module.training = mode


class Watch:
    """Looks at one policy.

    Args:
        job: its stage; the looks are written into `job.out`.
        probe: what to look at.
        proxy, gold: the rewards, open.
    """

    def __init__(self, job: Job, probe: Probe, proxy: RewardFunction, gold: RewardFunction) -> None:
        self.probe = probe
        self.looks: list[Look] = []
        self.file = job.out / LOOKS
        self._job = job
        self._proxy, self._gold = proxy, gold
        self._questions = questions(probe.prompts)

    def look(self, step: int, model: Any, tokenizer: Any, precision: Any) -> None:
        """Look at `model` after `step` steps, and write down what is seen.

        Args:
            step: optimizer steps so far.
            model: the policy in training, as the trainer holds it; it may have an adapter.
            tokenizer: of the policy.
            precision: what the trainer's forward passes are cast to, a torch dtype or None.
        """
        import torch

        bare = model.get_base_model() if hasattr(model, "peft_config") else model
        kind = bare.device.type
        with (
            undisturbed(),
            torch.no_grad(),
            torch.autocast(kind, precision) if precision else contextlib.nullcontext(),
            at_rest(bare),
        ):
            said, ended, texts = self._sample(bare, tokenizer)
            policy = self._log_probabilities(bare, said)
            with start_of(model, self._job) as start:
                reference = self._log_probabilities(start, said)
            answers = [
                self._questions[one.question].answered(text, len(one.completion), is_ended)
                for one, text, is_ended in zip(said, texts, ended, strict=True)
            ]
            proxy, gold = self._proxy(answers).total, self._gold(answers).total
        free_device()
        ratios = [after - before for after, before in zip(policy, reference, strict=True)]
        look = Look(
            step=step,
            kl=self._by_question(said, [float(ratio.sum()) for ratio in ratios]),
            proxy=self._by_question(said, proxy),
            gold=self._by_question(said, gold),
            length=self._by_question(said, [float(len(one.completion)) for one in said]),
            further={
                "kl_per_token_k3": _k3(ratios),
                "ended_share": sum(ended) / len(ended),
            },
        )
        self.looks.append(look)
        append(self.file, look)
        print(look.line(), flush=True)
        if (finding := judge(self.looks, is_watching=True)).is_warning:
            print(finding.sentence(), flush=True)  # `align.probe.Alarm` says it on the terminal

    def _sample(self, model: Any, tokenizer: Any) -> tuple[list[Said], list[bool], list[str]]:
        """Completions of every prompt, whether the model ended them, and their texts."""
        probe = self.probe
        generator = Generator(model, tokenizer, probe.temperature, 1.0, probe.max_new_tokens)
        prompts = [generator.encode(question) for question in self._questions]
        _check_fit(max(map(len, prompts)), probe.max_new_tokens, generator.context)
        work = [(place, index) for place in range(len(prompts)) for index in range(probe.n)]
        said = []
        for start in range(0, len(work), probe.batch_size):
            batch = work[start : start + probe.batch_size]
            seeds = [seed_of(probe.seed, self._questions[p], index) for p, index in batch]
            ids = generator.tokens([prompts[place] for place, _ in batch], seeds)
            said += [Said(p, prompts[p], row) for (p, _), row in zip(batch, ids, strict=True)]
        found = [generator.completion(one.completion) for one in said]
        return said, [one.finish == "eos" for one in found], [one.text for one in found]

    def _log_probabilities(self, model: Any, said: list[Said]) -> list[Any]:
        """log π of every token of every completion, at the probe's temperature; tensors (tokens,)."""
        size = self.probe.batch_size
        return [
            row
            for start in range(0, len(said), size)
            for row in _forward(model, said[start : start + size], self.probe.temperature)
        ]

    def _by_question(self, said: list[Said], values: list[float]) -> list[float]:
        """Means over the completions of each question; NaN where none has a value."""
        groups: list[list[float]] = [[] for _ in self._questions]
        for one, value in zip(said, values, strict=True):
            groups[one.question].append(value)
        return [mean_of(group).value for group in groups]


def _forward(model: Any, said: list[Said], temperature: float) -> list[Any]:
    import torch

    rows = [one.prompt + one.completion for one in said]
    width = max(map(len, rows))
    padded = [row + [0] * (width - len(row)) for row in rows]  # the mask hides what it is
    is_token = [[1] * len(row) + [0] * (width - len(row)) for row in rows]
    logits = model(
        input_ids=torch.tensor(padded, device=model.device),
        attention_mask=torch.tensor(is_token, device=model.device),
        use_cache=False,
    ).logits  # (batch, width, vocabulary)
    found = []
    for one, scores in zip(said, logits, strict=True):
        first, last = len(one.prompt) - 1, len(one.prompt) + len(one.completion) - 1
        every = (scores[first:last].float() / temperature).log_softmax(-1)
        chosen = torch.tensor(one.completion, device=every.device)[:, None]
        found.append(every.gather(-1, chosen)[:, 0].double().cpu())
    return found


def _k3(ratios: list[Any]) -> float:
    """Mean over tokens of r − 1 − log r with r = π_start / π: never negative (Schulman 2020, "Approximating KL")."""
    import torch

    ratio = torch.cat(ratios)
    return float((torch.expm1(-ratio) + ratio).mean())


@contextlib.contextmanager
def start_of(model: Any, job: Job) -> Iterator[Any]:
    """The model that the stage started from: `model` without its adapter, or loaded for as long as it is needed."""
    if hasattr(model, "peft_config"):
        with model.disable_adapter():
            yield model.get_base_model()
        return
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(
        local_path(job.model, job.cache),
        revision=job.model.revision,
        dtype=model.dtype,
        attn_implementation=model.config._attn_implementation,
    )
    yield loaded.to(model.device).eval()


def _check_fit(prompt: int, completion: int, context: int | None) -> None:
    if context and prompt + completion > context:
        raise UserError(
            f"a prompt of the probe has {prompt} tokens, which with probe.max_new_tokens={completion} is more than the "
            f"{context} that the model can see; shorten one of them"
        )


def _callback(watch: Watch) -> Any:
    import torch
    from transformers import TrainerCallback

    class Probing(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        """Looks before the first step, every `steps` steps, and after the last one."""

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if state.global_step:  # goes on from a checkpoint
                watch.looks = read(watch.file)
            else:
                self._look(args, state, given)

        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            # Of the last step here: at the end of training other weights may have been loaded.
            if state.global_step % watch.probe.steps == 0 or control.should_training_stop:
                self._look(args, state, given)

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            if watch.looks[-1].step != state.global_step:
                self._look(args, state, given)

        def _look(self, args: Any, state: Any, given: dict[str, Any]) -> None:
            precision = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
            model = getattr(given["model"], "policy", given["model"])  # PPO's holds a critic too
            watch.look(state.global_step, model, given["processing_class"], precision)

    return Probing()
