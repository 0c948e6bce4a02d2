"""How a rollout comes about: responses are drawn, judged by the models and by the reward, and put together."""

import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor

from align.ppo import batches, core, parity
from align.ppo.batches import Sample, pack, shuffled
from align.ppo.config import PPOConfig
from align.ppo.model import token_logp, without_adapter
from align.ppo.rollout import Judged, Rollout, build
from align.ppo.sampling import Sampler
from align.ppo.scores import shape
from conf.entry import UserError
from reward.answers import Answer
from reward.command import line_of
from reward.prompts import Asked
from reward.rewards import Worth
from reward.store import content_key

_TRIED = 4  # responses that show whether an engine draws from the policy


@dataclass(frozen=True)
class Question:
    """A prompt: its tokens up to where the assistant is to speak, and what a reward reads beside the answer."""

    ids: list[int]
    asked: Asked


@dataclass(frozen=True)
class Collected:
    """A rollout with what is told of it."""

    rollout: Rollout
    log: dict[str, float]
    answers: list[Answer]
    worth: Worth
    kl: list[float] | None  # nats of each response from the reference, where there is one


class Collector:
    """Makes rollouts; every process draws, judges and scores its share, and ends with all of it.

    Args:
        accelerator: of the trainer.
        args: the settings.
        tokenizer: the policy's.
        reference: frozen copy of what the policy started from; None: the policy without its adapter.
        start: an adapter's weights that are the reference in that case, see `align.ppo.model.adapter_start`.
        reward: answers → their worth.
        sampler: what writes the responses.
    """

    def __init__(
        self,
        accelerator: Any,
        args: PPOConfig,
        tokenizer: Any,
        reference: Any,
        reward: Callable[[Sequence[Answer]], Worth],
        sampler: Sampler,
        start: list[Tensor] | None = None,
    ) -> None:
        self.sampler = sampler
        self._start = start
        self._accelerator, self._args, self._tokenizer = accelerator, args, tokenizer
        self._reference, self._reward = reference, reward
        self._rank, self._processes = accelerator.process_index, accelerator.num_processes
        self._is_tried = args.engine == "generate"  # it is the policy: there is nothing to compare

    def collect(
        self,
        model: Any,
        questions: Sequence[Question],
        number: int,
        kl_coef: float,
        running: core.RunningMoments,
    ) -> Collected:
        """The rollout of a number.

        Args:
            model: `PolicyValue`, as the trainer wrapped it.
            questions: one for each response.
            number: of the rollout, which decides what is drawn.
            kl_coef: β, now.
            running: moments of all scores so far; this rollout's are taken in.

        Raises:
            UserError: when the reward says nothing of any response, or the engine does not draw from the policy.
        """
        if not self._is_tried:
            self._try_sampler(model, questions[:_TRIED])
        args, times = self._args, [time.monotonic()]
        samples = self.drawn(questions, ["rollout", number])
        times.append(time.monotonic())
        steps = schedule(number, len(samples), args)
        # Judged in the micro-batches of the first pass, so that the first ratio is exactly 1.
        plan = [
            micro for step in steps[: args.num_mini_batches] for micro in self._cut(step, samples)
        ]
        judged = self._judged(model, samples, plan, args.needs_reference)
        _check_finite(judged, number)
        gap = parity.checked(samples, [one.logp for one in judged], args)
        times.append(time.monotonic())
        worth, answers = self.worths(questions, samples)
        scores = shape(worth.total, samples, args, running)
        if not bool(scores.is_usable.any()):
            raise UserError(
                f"the reward said nothing of any of {len(samples)} responses in rollout {number}; check ppo.reward and "
                "the columns of the prompts that it needs"
            )
        times.append(time.monotonic())
        rollout, log = build(number, samples, steps, judged, scores, kl_coef, args)
        log |= gap.described() if gap else {}
        log |= _reward_facts(worth) | _speed(times, samples, plan)
        kl = None
        if args.needs_reference:
            kl = [math.fsum(one.logp) - math.fsum(one.ref_logp) for one in judged]
        return Collected(rollout, log, answers, worth, kl)

    def drawn(self, questions: Sequence[Question], salt: list[Any]) -> list[Sample]:
        """A response to each question by the present weights, with a seed from the run's, `salt` and its place."""
        self.sampler.sync()
        mine = range(self._rank, len(questions), self._processes)
        seeds = [int(content_key([self._args.seed, *salt, place]), 16) for place in mine]
        # Also with none: all processes gather the weights together.
        own = self.sampler.sample([questions[place].ids for place in mine], seeds)
        return self._gathered(dict(zip(mine, own, strict=True)))

    def _try_sampler(self, model: Any, questions: Sequence[Question]) -> None:
        """Draw a few responses with an engine of its own, before a whole rollout is waited for."""
        samples = self.drawn(questions, ["parity"])
        judged = self._judged(model, samples, self._cut(range(len(samples)), samples), False)
        parity.checked(samples, [one.logp for one in judged], self._args)
        self._is_tried = True

    def worths(
        self, questions: Sequence[Question], samples: Sequence[Sample]
    ) -> tuple[Worth, list[Answer]]:
        """What the responses are worth, each scored by one process; and the responses as the reward saw them."""
        answers = [
            self._answered(question, sample)
            for question, sample in zip(questions, samples, strict=True)
        ]
        mine = list(range(self._rank, len(answers), self._processes))
        own = self._reward([answers[place] for place in mine]) if mine else Worth([], {})
        if len(own.total) != len(mine):
            raise UserError(f"the reward gave {len(own.total)} values for {len(mine)} responses")
        rows = {
            place: (own.total[at], {name: values[at] for name, values in own.terms.items()})
            for at, place in enumerate(mine)
        }
        found = self._gathered(rows)
        terms = {name: [parts[name] for _, parts in found] for name in found[0][1]}
        return Worth([total for total, _ in found], terms), answers

    def micro_batches(self, step: Sequence[int], samples: Sequence[Sample]) -> list[list[int]]:
        """This process' share of the micro-batches of an optimizer step."""
        return batches.share(self._cut(step, samples), self._rank, self._processes)

    def _cut(self, step: Sequence[int], samples: Sequence[Sample]) -> list[list[int]]:
        args, lengths = self._args, [sample.length for sample in samples]
        limits = args.per_device_train_batch_size, args.max_tokens_per_micro_batch
        return batches.micro_batches(step, lengths, *limits)

    def _answered(self, question: Question, sample: Sample) -> Answer:
        text = self._tokenizer.decode(sample.response, skip_special_tokens=True)
        return question.asked.answered(text, len(sample.response), sample.is_ended)

    @torch.no_grad()
    def _judged(
        self, model: Any, samples: list[Sample], plan: list[list[int]], has_reference: bool
    ) -> list[Judged]:
        """What policy, reference and critic say of every token, in the micro-batches of `plan`."""
        model.eval()
        temperature = self._args.temperature
        own: dict[int, Judged] = {}
        for places in batches.share(plan, self._rank, self._processes):
            chosen = [samples[place] for place in places] or [samples[0]]  # all must join in
            batch = pack(chosen, self._tokenizer.pad_token_id, self._args.device)
            inputs = (batch.ids, batch.rows, batch.cols)
            logp = model(*inputs, "policy", temperature).logp
            ref = self._reference_logp(model, inputs) if has_reference else logp
            # The states before each token, then the one after each response.
            last = torch.arange(len(chosen), device=batch.ids.device)
            rows, cols = torch.cat([batch.rows, last]), torch.cat([batch.cols, batch.ends])
            values, after = model(batch.ids, rows, cols, "value").values.split(
                [len(batch.rows), len(chosen)]
            )
            split = [_by_row(x, batch.rows, len(chosen)) for x in (logp, ref, values)]
            for at, place in enumerate(places):
                own[place] = Judged(split[0][at], split[1][at], split[2][at], float(after[at]))
        return self._gathered(own)

    def _reference_logp(self, model: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        temperature = self._args.temperature
        if self._reference is None:
            with without_adapter(self._accelerator.unwrap_model(model).policy, self._start):
                found: Tensor = model(*inputs, "policy", temperature).logp
            return found
        with self._accelerator.autocast():
            return token_logp(self._reference, *inputs, temperature)[0]

    def _gathered(self, own: dict[int, Any]) -> list[Any]:
        """What the processes have by place, as one list in the order of the places."""
        found = dict(gather_object(list(own.items())))
        return [found[place] for place in sorted(found)]


def questions_of(every: Sequence[Question], number: int, args: PPOConfig) -> list[Question]:
    """The prompts of a rollout: all are gone through before one comes again, in a new order each time.

    In their own order where `train_sampling_strategy` is `sequential`, as for a curriculum.
    """
    total, size = len(every), args.rollout_batch_size
    seed = args.seed if args.data_seed is None else args.data_seed
    is_ordered = args.train_sampling_strategy == "sequential"
    places = range(number * size, (number + 1) * size)
    turns = {place // total for place in places}
    orders = {
        turn: range(total) if is_ordered else shuffled(total, seed, "prompts", turn)
        for turn in turns
    }
    return [every[orders[place // total][place % total]] for place in places]


def _check_finite(judged: Sequence[Judged], number: int) -> None:
    """Refuse models that are broken: their responses are noise, and nothing would be learnt from them."""
    if all(math.isfinite(value) for one in judged for value in (*one.logp, *one.values)):
        return
    raise UserError(
        f"rollout {number}: policy or critic no longer give finite numbers; lower ppo.args.learning_rate and "
        "value_learning_rate, or bound the rewards with ppo.args.reward_clip"
    )


def schedule(number: int, size: int, args: PPOConfig) -> list[list[int]]:
    """The responses of each optimizer step of a rollout, by their places."""
    found = []
    each = size // args.num_mini_batches
    for turn in range(args.num_ppo_epochs):
        order = shuffled(size, args.seed, "steps", number, turn)
        found += [order[start : start + each] for start in range(0, size, each)]
    return found


def keep_samples(path: Path, found: Collected, most: int, step: int) -> None:
    """Append the first responses of a rollout to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab") as file:
        for place, answer in enumerate(found.answers[:most]):
            total = found.worth.total[place]
            row = {
                "rollout": found.rollout.number,
                "step": step,
                "prompt": answer.prompt,
                "response": answer.text,
                "score": None if math.isnan(total) else total,
                "kl": None if found.kl is None else found.kl[place],
                "tokens": answer.tokens,
                "is_ended": answer.is_ended,
            }
            file.write(line_of(row))


def _by_row(x: Tensor, rows: Tensor, number: int) -> list[list[float]]:
    """(N,) tokens as a list for each of `number` responses."""
    ends = torch.bincount(rows, minlength=number).cumsum(0).tolist()
    values = x.tolist()
    return [values[start:end] for start, end in zip([0, *ends], ends, strict=False)]


def _reward_facts(worth: Worth) -> dict[str, float]:
    """Mean and standard deviation of what each term said."""
    found = {}
    for name, values in worth.terms.items():
        said = torch.tensor([value for value in values if not math.isnan(value)]).double()
        found[f"rewards/{name}/mean"] = float(said.mean())  # NaN of nothing
        found[f"rewards/{name}/std"] = float(said.std(unbiased=False)) if len(said) else math.nan
    return found


def _speed(
    times: Sequence[float], samples: Sequence[Sample], plan: Sequence[Sequence[int]]
) -> dict[str, float]:
    """Seconds of each phase, response tokens a second of writing, and the share of padding in the micro-batches."""
    names = ("generate", "score", "reward")
    spans = zip(names, itertools.pairwise(times), strict=True)
    found = {f"time/{name}": end - begin for name, (begin, end) in spans}
    widths = [len(micro) * max(samples[place].length for place in micro) for micro in plan]
    written = sum(len(sample.response) for sample in samples)
    return found | {
        "time/rollout": times[-1] - times[0],
        "perf/response_tokens_per_s": written / max(times[1] - times[0], 1e-9),
        "perf/padding_ratio": 1 - sum(sample.length for sample in samples) / sum(widths),
    }
