"""What ZeRO-3 asks of PPO, where no process has a whole weight: gather to generate, split the reference too."""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from conf.entry import UserError

_GATHER_TO_SAVE = "stage3_gather_16bit_weights_on_model_save"


def zero_stage(accelerator: Any) -> int:
    """DeepSpeed's stage; 0 without DeepSpeed."""
    plugin = getattr(accelerator.state, "deepspeed_plugin", None)
    return 0 if plugin is None else int(plugin.zero_stage)


def require_that_weights_are_saved(accelerator: Any) -> None:
    """Refuse a DeepSpeed configuration that would leave no model behind.

    Raises:
        UserError: naming the key.
    """
    if zero_stage(accelerator) < 3:
        return
    options = accelerator.state.deepspeed_plugin.deepspeed_config["zero_optimization"]
    if not options.get(_GATHER_TO_SAVE):
        raise UserError(
            f"deepspeed.zero_optimization.{_GATHER_TO_SAVE} must be true: no process has the whole weights under "
            "ZeRO-3, and without it none could be saved"
        )


def frozen(reference: Any, accelerator: Any) -> Any:
    """The reference, ready to judge. Under DeepSpeed in an engine of its own, so that its format is the policy's.

    Under ZeRO-3 it is split as the policy is, else whole on each device.
    """
    reference.eval().requires_grad_(False)
    if zero_stage(accelerator) == 0:
        return reference.to(accelerator.device)
    import deepspeed

    config = _without_training(accelerator.state.deepspeed_plugin.deepspeed_config)
    engine, *_ = deepspeed.initialize(model=reference, config=config)
    engine.eval()
    return engine


def _without_training(config: dict[str, Any]) -> dict[str, Any]:
    """What judging needs of a configuration: nothing of the optimizer, nothing that is yet to be filled in."""
    kept = _filled({key: config[key] for key in config if key not in ("optimizer", "scheduler")})
    zero = kept["zero_optimization"]
    zero.pop("offload_optimizer", None)
    if zero["stage"] < 3:  # these split what an optimizer holds
        kept["zero_optimization"] = {"stage": 0}
    return kept | {"train_micro_batch_size_per_gpu": 1}


def _filled(config: dict[str, Any]) -> dict[str, Any]:
    return {
        key: _filled(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if value != "auto"
    }


@contextlib.contextmanager
def gathered(engine: Any, policy: Any) -> Iterator[None]:
    """Under ZeRO-3, the policy's weights whole on every process, to generate with; the critic's stay split.

    Gathered once, not at every token (trl#1483). DeepSpeed's hooks would split each layer again after its first call,
    so they are off meanwhile, and on again however the generation ends: an exception must not leave an engine that
    trains on nothing.

    Args:
        engine: DeepSpeed's, or the bare model before there is one. Nothing may be called through it meanwhile.
        policy: the part of its model that generates.
    """
    import deepspeed

    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    with deepspeed.zero.GatheredParameters(list(policy.parameters())):
        if offload is None:
            yield
            return
        _remove_hooks(offload)
        try:
            yield
        finally:
            _restore_hooks(offload)


def _remove_hooks(offload: Any) -> None:
    for parameter in offload.module.parameters():
        parameter.ds_active_sub_modules.clear()  # or what was gathered could not be given back
    for hook in [*offload.forward_hooks, *offload.backward_hooks]:
        hook.remove()
    offload.forward_hooks, offload.backward_hooks = [], []


def _restore_hooks(offload: Any) -> None:
    """Hooks, and a new record of the order of the layers: the old one names hooks that are gone."""
    coordinator = offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    offload._register_deepspeed_module(offload.module)


@contextlib.contextmanager
def loaded_whole(args: Any) -> Iterator[None]:
    """Let models that are read meanwhile be whole: ZeRO-3 would split them too, and a reward model has no engine.

    Args:
        args: the trainer's, which turn DeepSpeed on for all that is read after them.
    """
    from transformers.integrations.deepspeed import (
        set_hf_deepspeed_config,
        unset_hf_deepspeed_config,
    )

    if not args.deepspeed:
        yield
        return
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        set_hf_deepspeed_config(args.hf_deepspeed_config)


@contextlib.contextmanager
def writable(parameters: Iterable[Any]) -> Iterator[None]:
    """Let weights be set that a model was loaded with: under ZeRO-3 they are split from the start."""
    from transformers.integrations import is_deepspeed_zero3_enabled

    with contextlib.ExitStack() as stack:
        if is_deepspeed_zero3_enabled():
            import deepspeed

            stack.enter_context(
                deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0)
            )
        yield
