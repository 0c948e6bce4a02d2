"""Every setting of PPO. Those of the optimizer, logging and checkpoints are `transformers.TrainingArguments`'."""

from dataclasses import dataclass

from transformers import TrainingArguments

from align.ppo import limits


@dataclass
class PPOConfig(TrainingArguments):  # type: ignore[misc]  # transformers is untyped here
    """Settings of `align.ppo.trainer.PPOTrainer`; defaults mostly as in Huang et al. 2024 (arXiv 2403.17031)."""

    # --- how much ---
    num_rollouts: int = (
        100  # each with the steps below; with early_stop_kl more of them, of fewer steps
    )
    rollout_batch_size: int = 64  # responses of a rollout, on all processes together
    num_ppo_epochs: int = 4  # passes over a rollout
    num_mini_batches: int = 1  # optimizer steps of a pass
    per_device_train_batch_size: int = 8  # responses of a micro-batch at most
    max_tokens_per_micro_batch: int | None = None  # of prompts and responses, padding among them

    # --- sampling ---
    max_prompt_length: int = 512  # tokens; longer prompts are left out and counted
    max_new_tokens: int = 128  # of a response
    temperature: float = 1.0
    generation_batch_size: int = 32  # prompts that are continued together
    engine: str = (
        "generate"  # what writes the responses: the policy's own `generate`, or a `vllm` server
    )
    vllm_url: str | None = None  # of a server that is running, `http://HOST:PORT`
    vllm_timeout: float = 600.0  # seconds for one answer of it; its first may take a minute
    vllm_sync_dir: str | None = None  # folder that both see, for the weights; None: output_dir
    sampler_tolerance: float = 0.1  # mean |Δ log p| of a token, engine against trainer, in nats
    # what a token weighs that the engine drew with another probability than the trainer gives it: `truncate`, their
    # ratio, at most the cap; `mask`, their ratio, or nothing where it is beyond the cap or below its inverse; `none`, 1
    importance_correction: str = "truncate"
    importance_cap: float = 2.0

    # --- reward ---
    kl_coef: float = 0.05  # β of the divergence from the reference, a part of the reward
    kl_in_reward: str = "k1"  # of each token: `k1`; `abs`, |k1|; `none`
    kl_loss_coef: float = 0.0  # of a divergence in the loss
    kl_loss_type: str = "k2"  # or `k3_is`, k3 times the ratio: both have the gradient of the KL
    target_kl_per_sequence: float | None = None  # nats of a whole response; β then follows it
    kl_horizon: int = 10_000  # episodes within which β follows
    missing_eos_penalty: float | None = 1.0  # of a response that was cut off
    missing_eos_mode: str = (
        "subtract"  # the penalty from its score; `replace`: its score is −penalty
    )
    # what a response that was cut off means: `terminal`, it is over; `bootstrap`, its score is replaced by the value of
    # what would follow; `mask`, the policy does not learn from it, the critic does
    truncation: str = "terminal"
    overlong_buffer: int = 0  # tokens before the limit in which a growing penalty is taken; 0: none
    overlong_penalty: float = 1.0
    reward_bias: float = 0.0  # scores become (score − bias) / gain
    reward_gain: float = 1.0
    scale_rewards: bool = False  # divide scores by their running standard deviation
    reward_clip: float | None = None  # scores are cut to ± this, after all of the above
    whiten_rewards: bool = (
        False  # scale the rewards of all tokens to a variance of 1, and keep their mean
    )

    # --- advantages ---
    gamma: float = 1.0
    lam: float = 0.95
    lam_value: float | None = None  # λ of the critic's targets; None: `lam`
    lam_adaptive: float | None = None  # α of VAPO's λ by length, for the policy; None: `lam`
    whiten_advantages: bool = True

    # --- loss ---
    cliprange: float = 0.2
    cliprange_high: float | None = None  # upper side; None: as the lower one
    dual_clip: float | None = None  # c of dual clipping
    cliprange_value: float | None = 0.2  # in units of the reward; None: not clipped
    vf_coef: float = 0.1
    entropy_coef: float = 0.0
    loss_aggregation: str = "token_mean"  # or `seq_mean`: every response weighs the same

    # --- optimization ---
    learning_rate: float = 3e-6
    value_learning_rate: float | None = None  # None: three times the policy's
    critic_warmup_steps: int = 0  # optimizer steps in which only the critic learns
    early_stop_kl: float | None = (
        None  # nats a token from the sampling policy; beyond 1.5 × it the rollout is left
    )
    ratio_threshold: float = 10.0  # a step whose mean ratio is beyond it is skipped
    adam_beta2: float = 0.95
    adam_epsilon: float = 1e-5

    # --- what is watched ---
    logging_steps: float = 1  # a step is long
    measure_kl: bool = True  # also where nothing depends on it, at the price of the reference
    log_samples: int = 4  # responses of each rollout that are kept in samples.jsonl
    entropy_every: int = 1  # optimizer steps between two measurements of the entropy

    # --- what the loop itself decides ---
    num_train_epochs: float = 1.0
    gradient_accumulation_steps: int = 1
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = False  # a step uses all of both models

    def __post_init__(self) -> None:
        """Refuse what means nothing, before anything is loaded.

        Raises:
            UserError: naming the argument.
        """
        super().__post_init__()
        limits.check(vars(self))
        self._n_gpu = min(self.n_gpu, 1)  # nn.DataParallel would cut what belongs together

    @property
    def needs_reference(self) -> bool:
        """Whether anything asks how far the policy has gone from its start."""
        is_in_reward = self.kl_in_reward != "none" and bool(self.kl_coef)
        return self.measure_kl or bool(self.kl_loss_coef) or is_in_reward

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps that learn from one rollout."""
        return self.num_ppo_epochs * self.num_mini_batches

    @property
    def policy_clip(self) -> tuple[float, float]:
        """ε below and above."""
        high = self.cliprange if self.cliprange_high is None else self.cliprange_high
        return self.cliprange, high

    @property
    def critic_learning_rate(self) -> float:
        """The learning rate of the critic."""
        own = self.value_learning_rate
        return 3 * self.learning_rate if own is None else own
