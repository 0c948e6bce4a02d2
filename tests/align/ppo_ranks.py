"""PPO on a toy, as each of several processes does it: `python -m ppo_ranks FOLDER`, through torchrun."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import ppo_toys as toys
import torch
import yaml

from align.ppo.trainer import PPOTrainer
from conf.choices import CONF_DIR
from conf.entry import UserError
from reward.store import write_json

KINDS = ["ddp", "zero2", "zero3"]
PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11], [12, 13]]
STEP = 6  # of a checkpoint in the middle of the second rollout
# A micro-batch is one response. So of three, two processes take two and one; of one, one and none.
RUNS: dict[str, dict[str, Any]] = {
    "uneven": {
        "num_rollouts": 2,
        "rollout_batch_size": 6,
        "num_mini_batches": 2,
        "target_kl_per_sequence": 0.01,
        "scale_rewards": True,
        "critic_warmup_steps": 2,
        "save_strategy": "steps",
        "save_steps": STEP,
    },
    "empty": {
        "num_rollouts": 1,
        "rollout_batch_size": 3,
        "num_mini_batches": 3,
        "num_ppo_epochs": 1,
    },
    "lora": {"num_rollouts": 2, "rollout_batch_size": 3, "num_mini_batches": 1},
}


class Broken(Exception):
    """What the first generation of a run ends with."""


def deepspeed_of(kind: str) -> dict[str, Any] | None:
    """The project's own configuration; here ZeRO-3 also splits weights as small as a toy's."""
    if kind == "ddp":
        return None
    config: dict[str, Any] = yaml.safe_load((CONF_DIR / "deepspeed" / f"{kind}.yaml").read_text())
    if kind == "zero3":
        config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    return config


def make(name: str, out: Path, kind: str = "ddp") -> PPOTrainer:
    """The trainer of a run."""
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()  # of the run before; and before the settings: random weights cannot be drawn split
    policy, value, reference = toys.models()
    if name == "lora":
        policy, value, reference = adapted(policy, "CAUSAL_LM"), adapted(value, "SEQ_CLS"), None
    given: dict[str, Any] = RUNS.get(name, {"num_rollouts": 1, "rollout_batch_size": 6})
    if name == "guard":
        given |= {"ratio_threshold": 0.5}
    elif name == "half":
        given |= {"bf16": True, "num_ppo_epochs": 1, "num_mini_batches": 1}
    args = toys.settings(
        out,
        per_device_train_batch_size=1,
        max_grad_norm=100.0,  # never reached: DeepSpeed clips both models by one norm
        deepspeed=deepspeed_of(kind),
        **given,
    )
    return PPOTrainer(
        policy,
        value,
        reference,
        toys.tokenizer(),
        toys.questions(PROMPTS),
        toys.rewarded(toys.share_of(7)),
        args,
        toys.questions([[3, 9]]),  # one, so that a second process has none
    )


def adapted(model: Any, task_type: str) -> Any:
    """With a fresh adapter, and a head of its own where there is one."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    head = ["score"] if task_type == "SEQ_CLS" else None
    return get_peft_model(
        model,
        LoraConfig(task_type=task_type, r=4, target_modules="all-linear", modules_to_save=head),
    )


def whole(trainer: PPOTrainer) -> dict[str, torch.Tensor]:
    """All weights, gathered where they are split."""
    with contextlib.ExitStack() as stack:
        parameters = dict(trainer.model.named_parameters())
        if any(hasattr(parameter, "ds_id") for parameter in parameters.values()):
            import deepspeed

            stack.enter_context(deepspeed.zero.GatheredParameters(list(parameters.values())))
        return {name: parameter.detach().clone() for name, parameter in parameters.items()}


def run(name: str, out: Path, kind: str = "ddp") -> None:
    """Train, fail once while generating, save, and go on from a checkpoint. What was found lies in `out`."""
    from safetensors.torch import save_file

    trainer = make(name, out, kind)
    found: dict[str, Any] = {}
    with failing_once(trainer, found):
        trainer.train()
    trainer.evaluate()
    trainer.save_model(str(out / "saved"))
    weights = whole(trainer)
    if name == "uneven":
        again = make(name, out / "again", kind)
        again.train(resume_from_checkpoint=str(out / f"checkpoint-{STEP}"))
        resumed = whole(again)
        found["resumed_off"] = max(
            float((resumed[key] - weights[key]).abs().max()) for key in weights
        )
        found["resumed_state"] = vars(again.ppo)["episodes"] == trainer.ppo.episodes
    if trainer.is_world_process_zero():
        save_file(weights, out / "whole.safetensors")
        write_json(out / "found.json", found | {"log": trainer.state.log_history})


@contextlib.contextmanager
def failing_once(trainer: PPOTrainer, found: dict[str, Any]) -> Iterator[None]:
    """Let the first generation fail when it is done, generate again, and note which weights were whole meanwhile."""
    sampler: Any = trainer.collector.sampler
    generator, sample = sampler._generator, sampler.sample
    tokens: Callable[..., Any] = generator.tokens

    def hooks() -> int:
        engine = trainer.model_wrapped
        offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
        return 0 if offload is None else len(offload.forward_hooks)

    def is_whole(part: Any) -> list[bool]:
        return sorted({parameter.numel() > 0 for parameter in part.parameters()})

    def broken(*given: Any) -> Any:
        tokens(*given)
        found["whole"] = {
            part: is_whole(getattr(trainer.model, part)) for part in ("policy", "value")
        }
        found["hooks_meanwhile"] = hooks()
        raise Broken

    def twice(*given: Any) -> Any:
        if "hooks" in found:
            return sample(*given)
        found["hooks"] = hooks()
        generator.tokens = broken
        with contextlib.suppress(Broken):
            sample(*given)
        generator.tokens = tokens
        found["hooks_after"] = hooks()
        found["whole_after"] = is_whole(trainer.model.policy)
        return sample(*given)

    sampler.sample = twice
    yield
    sampler.sample = sample


def guard(out: Path, kind: str) -> None:
    """Take steps that the guard must not let pass, and write what each process saw in `out`."""
    trainer = make("guard", out, kind)
    before, told = whole(trainer), ""
    try:
        trainer.train()
    except UserError as error:
        told = str(error)
    after = whole(trainer)
    is_moved = any(not torch.equal(before[name], after[name]) for name in before)
    found = {"moved": is_moved, "skipped": trainer.ppo.skipped_steps, "told": told}
    write_json(out / f"guard_{trainer.args.process_index}.json", found)


def half(out: Path, kind: str) -> None:
    """Take one step in bfloat16."""
    trainer = make("half", out, kind)
    trainer.train()
    if trainer.is_world_process_zero():
        write_json(out / "half.json", {"log": trainer.state.log_history})


def main() -> None:
    """Every run under every way of sharing."""
    import torch.distributed

    for kind in KINDS:
        for name in RUNS:
            run(name, Path(sys.argv[1]) / kind / name, kind)
        guard(Path(sys.argv[1]) / kind, kind)
        half(Path(sys.argv[1]) / kind, kind)
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
