"""Signs that a run is going wrong, each said once: what it is, and what to do."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

_ROLLOUTS_BELOW = 3
_MOST_RATIO_OFF = {False: 1e-3, True: 0.05}  # by whether numbers are of half precision

_TOLD = {
    "negative_kl": "the KL from the reference has been below 0 by more than twice its standard error for {rollouts} "
    "rollouts, and a KL cannot be: what is sampled is not what is scored; let nothing but ppo.args.temperature change "
    "the sampler's distribution",
    "first_ratio": "before any update of a rollout, a ratio is {value:.2g} off 1: the policy scores its own responses "
    "otherwise than when they were judged; look for dropout, or use float32",
    "value_clipped": "{value:.0%} of the values are clipped, so that the critic hardly learns: "
    "ppo.args.cliprange_value is in units of the reward; raise it, or set ppo.args.scale_rewards=true",
    "few_ended": "only {value:.0%} of the responses end by themselves: raise ppo.args.max_new_tokens, or ask for "
    "shorter answers",
    "gradient": "the norm of a gradient is not finite ({value}): lower the learning rates, or bound rewards by "
    "ppo.args.reward_clip",
}


@dataclass
class Alarms:
    """What was raised so far; goes on with a checkpoint."""

    raised: dict[str, int] = field(default_factory=dict)  # by name, the optimizer step
    rollouts_below: int = 0  # rollouts in a row whose KL was clearly below 0

    def hear_rollout(self, numbers: Mapping[str, float], step: int, is_told: bool) -> None:
        """Look at a rollout's numbers.

        Args:
            numbers: by the names of the log.
            step: optimizer steps so far.
            is_told: whether this process prints.
        """
        # Before the policy has moved, its estimate is noise around 0.
        is_below = numbers.get("objective/kl", 0.0) < -2 * numbers.get("objective/kl_stderr", 0.0)
        self.rollouts_below = self.rollouts_below + 1 if is_below else 0
        if self.rollouts_below >= _ROLLOUTS_BELOW:
            self._raise("negative_kl", step, is_told, rollouts=self.rollouts_below)
        if (rate := numbers["response/eos_rate"]) < 0.1:
            self._raise("few_ended", step, is_told, value=rate)

    def hear_step(
        self, numbers: Mapping[str, float], step: int, is_half: bool, is_told: bool
    ) -> None:
        """Look at an optimizer step's numbers; `is_half`: the models compute in half precision."""
        off = numbers.get("val/first_ratio_off", 0.0)
        if not off <= _MOST_RATIO_OFF[is_half]:
            self._raise("first_ratio", step, is_told, value=off)
        if (clipped := numbers["val/clipfrac_avg"]) > 0.5:
            self._raise("value_clipped", step, is_told, value=clipped)

    def hear_gradient(self, norm: float, step: int, is_told: bool) -> None:
        """Look at the norm of a gradient."""
        if not math.isfinite(norm):
            self._raise("gradient", step, is_told, value=norm)

    def described(self) -> dict[str, float]:
        """The step at which each alarm was raised, for the log."""
        return {f"alarm/{name}": float(step) for name, step in self.raised.items()}

    def _raise(self, name: str, step: int, is_told: bool, **facts: float) -> None:
        if name in self.raised:
            return
        self.raised[name] = step
        if is_told:
            told = _TOLD[name].format(**facts)
            print(f"warning: ppo, step {step}: {told}", file=sys.stderr, flush=True)
