"""PPO as a `transformers.Trainer`: one ticket of the data loader is one optimizer step.

The loop, the optimizer, mixed precision, sharding, checkpoints, evaluation and callbacks are the Trainer's own. What is
PPO's happens inside `training_step`: write a rollout when the last one is used up, then learn from a mini-batch of it.

Nothing is drawn from a running random state: the prompts of rollout n, the responses and the order of the mini-batches
follow from the seed and n. So a run that is resumed in the middle of a rollout goes on exactly, and two processes see
what one would.
"""

import contextlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from torch import Tensor
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.integrations import is_deepspeed_zero3_enabled

from align.artifact import SAMPLES
from align.ppo import core, inputs
from align.ppo.alarms import Alarms
from align.ppo.batches import pack
from align.ppo.collect import Collector, Question, keep_samples, questions_of
from align.ppo.config import PPOConfig
from align.ppo.model import PolicyValue, Wanted, adapter_start, disable_dropout, load_weights
from align.ppo.rollout import Rollout
from align.ppo.sampling import open_sampler
from align.ppo.sharding import frozen, gathered, require_that_weights_are_saved, zero_stage
from align.ppo.update import Sums, TokenWeights, highest, micro_loss, token_weights
from conf.entry import UserError
from reward.answers import Answer
from reward.rewards import Worth
from reward.store import nan_to_null, read_json, write_json

STATE = "ppo_state.json"
VALUE_MODEL = "value_model"
_RATES = {"learning_rate": "policy", "learning_rate_value": "value"}
# Of the last rollout, among the last numbers of a run.
LAST = ("objective/scores", "objective/kl", "response/length_mean", "response/eos_rate")


@dataclass
class State:
    """What goes on from rollout to rollout."""

    rollouts: int = 0  # that were begun
    episodes: int = 0
    skipped_steps: int = 0
    coef: float = 0.0
    last: dict[str, float] = field(default_factory=dict)  # rollout's numbers, see LAST
    running: core.RunningMoments = field(default_factory=core.RunningMoments)
    alarms: Alarms = field(default_factory=Alarms)


class PPOTrainer(Trainer):  # type: ignore[misc]  # transformers is untyped here
    """Proximal policy optimization of a language model (Ziegler et al. 2019, Huang et al. 2024).

    Args:
        policy: causal language model, or a PEFT model of one.
        value: sequence classifier with one label, the critic, or a PEFT model of one.
        reference: a frozen copy of what the policy started from; None for a PEFT policy, which is its own reference:
            without its adapter where that is fresh, else with the adapter's weights of the start. None too where
            nothing is asked of it (`PPOConfig.needs_reference`).
        tokenizer: the policy's.
        questions: to learn from.
        eval_questions: to evaluate on.
        reward: answers → their worth, see `reward.rewards.open_reward`.
        args: the settings.
        callbacks: as a Trainer's.
    """

    def __init__(
        self,
        policy: Any,
        value: Any,
        reference: Any,
        tokenizer: Any,
        questions: Sequence[Question],
        reward: Callable[[Sequence[Answer]], Worth],
        args: PPOConfig,
        eval_questions: Sequence[Question] | None = None,
        callbacks: Sequence[Any] | None = None,
    ) -> None:
        if reference is policy:
            raise ValueError("the reference is the policy itself: give a frozen copy of it")
        is_own = args.needs_reference and reference is None
        if is_own and not hasattr(policy, "disable_adapter"):
            raise ValueError("a policy without an adapter needs a reference: a frozen copy of it")
        self.questions = list(questions)
        every = [one.ids for one in (*self.questions, *(eval_questions or []))]
        inputs.check(policy, value, tokenizer, every, args)
        self.facts: dict[str, float] = {}  # of the whole run, told with its last numbers
        self._bare = policy.get_base_model() if hasattr(policy, "get_base_model") else policy
        self._generation_config = self._bare.generation_config  # a sampler puts its own there
        for model in (policy, value):  # or the first ratio is not 1
            disable_dropout(model)
        self.ppo = State(coef=args.kl_coef)
        self.rollout: Rollout | None = None
        self._metrics: defaultdict[str, list[float]] = defaultdict(list)
        self._rates: dict[str, float] = {}
        super().__init__(
            model=PolicyValue(policy, value),
            args=args,
            train_dataset=self.questions,
            eval_dataset=list(eval_questions) if eval_questions is not None else None,
            processing_class=tokenizer,
            callbacks=list(callbacks or []),
        )
        require_that_weights_are_saved(self.accelerator)
        if reference is not None:
            reference = frozen(reference, self.accelerator)
        self.samples_path = Path(args.output_dir) / SAMPLES
        self.optimizer: Any
        self.control: Any
        sampler = open_sampler(policy, tokenizer, args, self.accelerator, self._generating)
        # Under ZeRO-3 no process has the weights to look at, and an adapter is taken for a fresh one.
        start = adapter_start(policy) if is_own and not is_deepspeed_zero3_enabled() else None
        self.collector = Collector(
            self.accelerator, args, tokenizer, reference, reward, sampler, start
        )

    # --- rollouts ---

    @contextlib.contextmanager
    def _generating(self) -> Iterator[None]:
        """Mixed precision as in training, and under ZeRO-3 the policy's weights on every process."""
        with self.accelerator.autocast(), contextlib.ExitStack() as stack:
            if zero_stage(self.accelerator) == 3:
                stack.enter_context(gathered(self.model_wrapped, self.model.policy))
            yield

    def _next_rollout(self) -> Rollout:
        """Write a rollout, take note of it, and adjust what follows from it."""
        args, state = self.args, self.ppo
        questions = questions_of(self.questions, state.rollouts, args)
        found = self.collector.collect(
            self.model_wrapped, questions, state.rollouts, state.coef, state.running
        )
        controller = core.AdaptiveKL(state.coef, args.target_kl_per_sequence, args.kl_horizon)
        controller.update(found.log.get("objective/kl", math.nan), len(found.answers))
        state.coef = controller.coef
        state.alarms.hear_rollout(found.log, self.state.global_step, self.is_world_process_zero())
        state.last = {name: found.log[name] for name in LAST if name in found.log}
        for name, value in found.log.items():
            self._metrics[name].append(value)
        if self.is_world_process_zero() and args.log_samples:
            keep_samples(self.samples_path, found, args.log_samples, self.state.global_step)
        state.rollouts += 1
        state.episodes += len(found.answers)
        return found.rollout

    # --- learning ---

    def get_train_dataloader(self) -> Any:
        """A ticket for each optimizer step, the same on every process."""
        tickets = self.args.num_rollouts * self.args.steps_per_rollout
        return DataLoader([{"ticket": i} for i in range(tickets)], collate_fn=lambda rows: rows[0])  # type: ignore[arg-type]

    def training_step(
        self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None
    ) -> Tensor:
        """Take one mini-batch of the present rollout; write a new one first when it is used up."""
        if self.rollout is None or self.rollout.is_used_up:
            self.rollout = self._next_rollout()
        started, args = time.monotonic(), self.args
        rates = {group.get("part"): group["lr"] for group in self.optimizer.param_groups}
        self._rates = {name: rates[part] for name, part in _RATES.items() if part in rates}
        rollout = self.rollout
        model.train()
        places = rollout.schedule[rollout.step]
        batches = self.collector.micro_batches(places, rollout.samples)
        weights = token_weights(rollout, places, args)
        sums = []
        for number, micro in enumerate(batches):
            is_last = number == len(batches) - 1
            self.accelerator.gradient_state._set_sync_gradients(is_last)
            apart = contextlib.nullcontext() if is_last else self.accelerator.no_sync(model)
            with apart:
                sums.append(self._learn(model, rollout, weights, micro))
        total = self._summed(sums)
        self._note(total, rollout)
        self._metrics["time/update"].append(time.monotonic() - started)
        rollout.step += 1
        return self._checked(model, total, rollout)

    def _learn(
        self, model: Any, rollout: Rollout, weights: TokenWeights, places: Sequence[int]
    ) -> Sums:
        """Add the gradient of a micro-batch; a process that has none left joins in with one that teaches nothing."""
        args = self.args
        chosen = [rollout.samples[place] for place in places] or [rollout.samples[0]]
        batch = pack(chosen, self.processing_class.pad_token_id, args.device)
        entropy_learns = args.entropy_coef != 0
        is_measured = entropy_learns or self.state.global_step % args.entropy_every == 0
        # One after the other where nothing waits for both, so that only one model's activations are held.
        is_alone = self.accelerator.num_processes == 1 and not self.is_deepspeed_enabled
        wanted: tuple[Wanted, ...] = ("policy", "value") if is_alone else ("both",)
        where = torch.tensor(list(places) or [0])[batch.rows.cpu()], batch.places.cpu()
        # DDP and ZeRO average over processes what is a sum here.
        options = {"scale_wrt_gas": False} if self.is_deepspeed_enabled else {}
        sums = []
        for part in wanted:
            scored = model(
                *(batch.ids, batch.rows, batch.cols),
                *(part, args.temperature, is_measured, entropy_learns),
            )
            loss, said = micro_loss(scored, rollout, weights, where, bool(places), args)
            self.accelerator.backward(loss * self.accelerator.num_processes, **options)
            sums.append(said)
        return Sums.added(sums)

    def _summed(self, sums: Sequence[Sums]) -> Sums:
        """The sums over all micro-batches of all processes."""
        total = Sums.added(sums)
        if self.accelerator.num_processes == 1:
            return total
        added = torch.tensor(total, dtype=torch.float64).to(self.args.device)
        farthest = highest(gather_object([total.farthest]))
        added = self.accelerator.reduce(added, reduction="sum").cpu()
        return Sums(*added.tolist())._replace(farthest=farthest)

    def _note(self, total: Sums, rollout: Rollout) -> None:
        """Keep a step's numbers for the log."""
        numbers = total.described()
        if self.state.global_step % self.args.entropy_every:
            del numbers["policy/entropy_avg"]
        if rollout.step == 0:
            numbers["val/first_ratio_off"] = total.farthest
        for name, value in numbers.items():
            self._metrics[name].append(value)
        is_half = self.args.bf16 or self.args.fp16
        told = self.is_world_process_zero()
        self.ppo.alarms.hear_step(numbers, self.state.global_step, is_half, told)

    def _checked(self, model: Any, total: Sums, rollout: Rollout) -> Tensor:
        """The loss; a step that is broken teaches nothing, and a policy that went far enough leaves its rollout."""
        args = self.args
        loss, limit = total.loss, args.early_stop_kl
        if limit is not None and total.mean_k3 > 1.5 * limit:
            self._metrics["policy/early_stop_step"].append(float(rollout.step))
            rollout.step = len(rollout.schedule)
        if math.isfinite(loss) and total.mean_ratio <= args.ratio_threshold:
            return torch.tensor(loss, device=args.device, dtype=torch.float32)
        if self.is_deepspeed_enabled:
            raise UserError(
                f"step {self.state.global_step}: the loss is {loss:g} and the mean ratio {total.mean_ratio:g}; lower "
                "ppo.args.learning_rate (under DeepSpeed such a step cannot be left out)"
            )
        self._skip(model)
        return torch.zeros((), device=args.device)

    def _skip(self, model: Any) -> None:
        """Let the optimizer's next step change nothing."""
        model.zero_grad()
        self.ppo.skipped_steps += 1

    # --- optimizer ---

    def create_optimizer(self, model: Any = None) -> Any:
        """Policy and critic, each with and without weight decay, in one optimizer with a learning rate each."""
        if self.optimizer is not None:
            return self.optimizer
        decayed = set(self.get_decay_parameter_names(self.model))
        groups = []
        for part, rate in (
            ("policy", self.args.learning_rate),
            ("value", self.args.critic_learning_rate),
        ):
            for is_decayed in (True, False):
                chosen = [
                    parameter
                    for name, parameter in self.model.named_parameters()
                    if name.startswith(f"{part}.")
                    and parameter.requires_grad
                    and (name in decayed) == is_decayed
                ]
                decay = self.args.weight_decay if is_decayed else 0.0
                if chosen:
                    groups.append(
                        {"params": chosen, "lr": rate, "weight_decay": decay, "part": part}
                    )
        kind, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
        options = {name: value for name, value in options.items() if name != "lr"}
        self.optimizer = kind(groups, lr=self.args.learning_rate, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The Trainer's schedule; while the critic warms up, the policy's rate is 0."""
        is_new = self.lr_scheduler is None
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        if is_new and self.args.critic_warmup_steps:
            warmup = self.args.get_warmup_steps(num_training_steps)
            _hold_policy(scheduler, self.args.critic_warmup_steps, warmup)
        return scheduler

    def _clip_grad_norm(self, model: Any) -> Any:
        """Clip policy and critic apart, so that a wild critic does not shrink the policy's step."""
        step, told = self.state.global_step, self.is_world_process_zero()
        if self.is_deepspeed_enabled:
            norm = super()._clip_grad_norm(model)
            self.ppo.alarms.hear_gradient(float(norm), step, told)
            if not math.isfinite(float(norm)):  # DeepSpeed leaves the step out
                self.ppo.skipped_steps += 1
            return norm
        limit = self.args.max_grad_norm or math.inf
        norms = []
        for name, part in (("policy", self.model.policy), ("value", self.model.value)):
            norm = self.accelerator.clip_grad_norm_(part.parameters(), limit)
            self._metrics[f"grad_norm/{name}"].append(float(norm))
            self.ppo.alarms.hear_gradient(float(norm), step, told)
            norms.append(torch.as_tensor(norm))
        whole = torch.linalg.vector_norm(torch.stack(norms))
        if not torch.isfinite(whole):  # one such step would leave no weight as it was
            self._skip(model)
        return whole

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        """As `_clip_grad_norm`, which the Trainer leaves out where `max_grad_norm` is 0."""
        norm = self._clip_grad_norm(model) if grad_norm is None else grad_norm
        return super()._get_grad_norm(model, grad_norm=norm)

    # --- evaluation, logging ---

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: Sequence[Question] | None = None,
        ignore_keys: Any = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Answer the held-out prompts, always with the same draws, and score the answers.

        Returns:
            `eval_reward` with its standard error over prompts, the length and how many answers ended.
        """
        questions = list(self.eval_dataset if eval_dataset is None else eval_dataset)
        samples = self.collector.drawn(questions, ["eval"])
        worth, _ = self.collector.worths(questions, samples)
        said = [value for value in worth.total if not math.isnan(value)]
        mean = sum(said) / len(said) if said else math.nan
        spread = math.sqrt(sum((x - mean) ** 2 for x in said) / max(len(said) - 1, 1))
        metrics = {
            "reward": mean,
            "reward_stderr": spread / math.sqrt(len(said)) if len(said) > 1 else math.nan,
            "reward_missing": len(worth.total) - len(said),
            "length_mean": sum(len(s.response) for s in samples) / len(samples),
            "eos_rate": sum(s.is_ended for s in samples) / len(samples),
        }
        metrics = {f"{metric_key_prefix}_{name}": float(x) for name, x in metrics.items()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """The Trainer's log with the means of all that was noted since the last one."""
        if "loss" in logs:
            for name, values in self._metrics.items():
                finite = [value for value in values if not math.isnan(value)]
                logs[name] = sum(finite) / len(finite) if finite else math.nan
            self._metrics.clear()
            logs |= self._rates
            logs["policy/skipped_steps"] = self.ppo.skipped_steps
            logs["episode"] = self.ppo.episodes
        is_end = "train_runtime" in logs  # the last numbers; `train` returns this very dictionary
        if is_end:
            logs |= self.facts | self.ppo.alarms.described()
        super().log(logs, start_time)
        if is_end:  # not logged again, or a curve would have a rollout too many
            logs |= self.ppo.last

    # --- checkpoints ---

    def _save(
        self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None
    ) -> None:
        """The policy as a model folder, the critic in one inside it; during training, all that PPO goes on with."""
        if not self.args.should_save:
            return
        out = Path(output_dir or self.args.output_dir)
        weights = self.model.state_dict() if state_dict is None else state_dict
        for name, folder in (("policy", out), ("value", out / VALUE_MODEL)):
            own = {
                key.removeprefix(f"{name}."): tensor
                for key, tensor in weights.items()
                if key.startswith(f"{name}.")
            }
            with self._own_generation_config():
                getattr(self.model, name).save_pretrained(folder, state_dict=own)
            self.processing_class.save_pretrained(folder)
        if self.is_in_train:
            write_json(out / STATE, asdict(self.ppo) | {"noted": nan_to_null(dict(self._metrics))})
            if self.rollout is not None:
                self.rollout.save(out)

    @contextlib.contextmanager
    def _own_generation_config(self) -> Iterator[None]:
        """The policy with the settings of generation that it came with, not those of the sampler."""
        of_sampler = self._bare.generation_config
        self._bare.generation_config = self._generation_config
        try:
            yield
        finally:
            self._bare.generation_config = of_sampler

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Both models' weights."""
        folder = Path(resume_from_checkpoint)
        for part, place in ((self.model.policy, folder), (self.model.value, folder / VALUE_MODEL)):
            load_weights(part, place)

    def _load_best_model(self) -> None:
        """The best checkpoint's weights, at the end of training."""
        if self.is_deepspeed_enabled:  # which keeps its own
            super()._load_best_model()
            return
        self._load_from_checkpoint(self.state.best_model_checkpoint)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        """With them, the state of PPO: this is called however the weights were restored."""
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        path = Path(checkpoint) / STATE
        if not path.is_file():
            raise UserError(f"{checkpoint} is no checkpoint of PPO: {STATE} is missing")
        found = read_json(path)
        for name, values in found.pop("noted").items():
            self._metrics[name] = [math.nan if value is None else value for value in values]
        running, alarms = core.RunningMoments(**found["running"]), Alarms(**found["alarms"])
        self.ppo = State(**found | {"running": running, "alarms": alarms})
        self.rollout = Rollout.load(Path(checkpoint))


def _hold_policy(scheduler: Any, steps: int, warmup: int) -> None:
    """Keep the policy's learning rate at 0 for the first steps, and let it rise after them, not meanwhile."""

    def held(rate: Callable[[int], float]) -> Callable[[int], float]:
        def factor(step: int) -> float:
            rise = min(1.0, (step - steps + 1) / max(warmup, 1))
            return 0.0 if step < steps else rise * rate(max(step, warmup))

        return factor

    if not hasattr(scheduler, "lr_lambdas"):
        raise UserError(
            "ppo.args.critic_warmup_steps needs a schedule that is a function of the step: choose another "
            "ppo.args.lr_scheduler_type, such as linear or cosine, or set critic_warmup_steps=0"
        )
    for place, group in enumerate(scheduler.optimizer.param_groups):
        if group.get("part") == "policy":
            scheduler.lr_lambdas[place] = held(scheduler.lr_lambdas[place])
            group["lr"] = 0.0
