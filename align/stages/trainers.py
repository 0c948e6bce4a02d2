"""TRL's trainers, with what the rows of a batch have in common read once."""

from typing import Any

from accelerate.utils import DynamoBackend, compile_regions_deepspeed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from trl import DPOTrainer, RewardTrainer, SFTTrainer

from align.stages.prefixes import share_in_classifier, share_in_language_model
from align.stages.references import References
from evals.treeattention import unwrapped


def _is_split(trainer: Any) -> bool:
    """Whether processes hold parts of the weights: then all must make the same passes, and trying forms is one more."""
    return bool(trainer.is_fsdp_enabled) or is_deepspeed_zero3_enabled()


def _compile_layers(trainer: Any) -> None:
    """Compile each layer for itself (`torch_compile`): rows of trees are laid out outside of compiled code."""
    args = trainer.args
    if not args.torch_compile:
        return
    options = {"backend": args.torch_compile_backend, "mode": args.torch_compile_mode}
    # It compiles in place, which is why the wrappers of DeepSpeed need it, and our forward pass, too.
    compile_regions_deepspeed(unwrapped(trainer.model), dynamic=True, **options)
    trainer.accelerator.state.dynamo_plugin.backend = DynamoBackend.NO  # not once more as a whole


class SharedPrefixDPOTrainer(DPOTrainer):  # type: ignore[misc]  # trl is untyped here
    """`trl.DPOTrainer`: the same losses, arguments and metrics; a pair's prompt is read once.

    Args:
        references: where reference log-probabilities are kept, for `precompute_ref_log_probs`.
        given: TRL's own arguments.
    """

    def __init__(self, references: References, **given: Any) -> None:
        self._references = references
        super().__init__(**given)
        if _is_split(self):
            return
        share_in_language_model(self.model)
        if self.ref_model is not None and not self.is_deepspeed_enabled:
            share_in_language_model(self.ref_model, self.accelerator.autocast)
        _compile_layers(self)

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        if self.is_deepspeed_enabled or self.is_fsdp_enabled or self.ref_model is not None:
            return super()._precompute_ref_logps(dataset, name, batch_size)
        return self._references.add(self, dataset)


class SharedPrefixSFTTrainer(SFTTrainer):  # type: ignore[misc]  # trl is untyped here
    """`trl.SFTTrainer`: no padding is computed, and the head sees labelled tokens only."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if not _is_split(self):
            share_in_language_model(self.model)
            _compile_layers(self)


class SharedPrefixRewardTrainer(RewardTrainer):  # type: ignore[misc]  # trl is untyped here
    """`trl.RewardTrainer`: a pair's prompt is read once, and no padding is computed."""

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        if not _is_split(self):
            share_in_classifier(self.model)
            _compile_layers(self)
