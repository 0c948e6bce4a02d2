"""From an experiment to its jobs, and the checks that come before the first one starts. Loads no model."""

import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from align.artifact import Job
from align.gate import suites_index
from align.ppo import limits
from align.probe import check_probe
from align.probe import identity as identity_of_probe
from conf.entry import UserError
from conf.passthrough import did_you_mean
from conf.schema import PPO, Align, Kind, LaunchKind, Model, Stage, Suite, Term
from evals.gguf import converted_folder
from evals.models import check, identity
from evals.provenance import versions
from evals.results import UNQUANTIZED
from evals.run import SCORER_CODE, Request, check_request
from reward.classifier import identity as identity_of_classifier
from reward.data import check_training_split, prepare
from reward.gguf import is_gguf
from reward.origin import origin
from reward.records import Prompt
from reward.rewards import check_models, check_needs, check_reward, model_paths
from reward.store import content_key, fingerprint, is_complete, source_key
from reward.versions import Version
from reward.weights import is_local


@dataclass(frozen=True)
class StageKind:
    """A kind of stage: where its code is, what data it takes, and whether a later stage may start from its result."""

    run: str
    data: str
    makes_policy: bool
    is_probed: bool = False  # it moves a policy toward a preference, which can be overdone
    check: str | None = None  # program that looks at the result, in a fresh process


STAGES = {
    "sft": StageKind("align.stages.sft:run", "sft", makes_policy=True),
    "rm": StageKind(
        "align.stages.rm:run", "preference", makes_policy=False, check="align.stages.rescore"
    ),
    "dpo": StageKind("align.stages.dpo:run", "preference", makes_policy=True, is_probed=True),
    "ppo": StageKind("align.stages.ppo:run", "prompts", makes_policy=True, is_probed=True),
}

_STAGE = "stage:"  # before the name of a stage whose result is meant

ACCURACY = "rewards/rm/accuracy"  # the objective of a sweep over reward models

# Trainer arguments that change how a stage is watched, not what it makes.
NOT_READ = frozenset(
    {
        "dataloader_num_workers",
        "dataloader_persistent_workers",
        "dataloader_pin_memory",
        "dataloader_prefetch_factor",
        "dataset_num_proc",
        "disable_tqdm",
        "log_level",
        "log_on_each_node",
        "logging_dir",
        "logging_first_step",
        "logging_steps",
        "logging_strategy",
        "log_samples",
        "sampler_tolerance",
        "vllm_sync_dir",
        "vllm_timeout",
        "vllm_url",
    }
)

_HERE = Path(__file__).parent
_REWARD = _HERE.parent / "reward"
_EVALS = _HERE.parent / "evals"
# What a kind of stage reads besides the code of all stages.
_LOSSES = (
    *(_HERE / "stages" / f"{module}.py" for module in ("trainers", "prefixes", "references")),
    *(_EVALS / name for name in SCORER_CODE),
)
_FURTHER_CODE = {
    "sft": _LOSSES,
    "rm": (
        *_LOSSES,
        _HERE / "stages" / "rescore.py",
        _REWARD / "model.py",
        _REWARD / "classifier.py",
    ),
    "dpo": _LOSSES,
    "ppo": (_HERE / "ppo", _EVALS / "generate.py"),
}


@dataclass(frozen=True)
class Plan:
    """The jobs in order, the policies that they make (name → model, `base` first) and the evaluations of them."""

    jobs: list[Job]
    policies: dict[str, Model]
    evaluations: list[tuple[str, Request]]  # (policy, request)
    data: dict[str, Version]  # training rows by stage

    @property
    def final(self) -> str:
        """The policy that the experiment is about."""
        return list(self.policies)[-1]


def make_plan(config: Align) -> Plan:
    """Resolve an experiment into jobs whose keys hold everything that their stage reads.

    Raises:
        UserError: for unknown stages or starts, and for data that cannot be read.
    """
    check(config.model)
    root = Path(config.paths.root)
    policies = {"base": config.model}
    keys = {"base": content_key(identity(config.model, root / "cache"))}
    for name in config.stages:
        _check_stage(name, config)
    if "ppo" in config.stages:
        _check_ppo_settings(config.ppo)
    index = _index(config)
    jobs: list[Job] = []
    data: dict[str, Version] = {}
    for name in config.stages:
        stage: Stage = getattr(config, name)
        start = stage.start or list(policies)[-1]
        if start not in policies:
            raise UserError(
                f"{name}.start={start!r} is no policy made before it.{did_you_mean(start, policies)} "
                f"There are: {', '.join(policies)}"
            )
        check_training_split(stage.data, f"{name}.data")
        data[name] = prepare(stage.data, STAGES[name].data, root, f"{name}.data", index)
        held_out = None
        if stage.eval_data is not None:
            # One seed for both, or two parts of one source would overlap.
            held = replace(stage.eval_data, seed=stage.data.seed)
            held_out = prepare(held, STAGES[name].data, root, f"{name}.eval_data", index)
        parents = {start: keys[start]}
        if isinstance(stage, PPO):
            stage, used = _with_artifacts(stage, jobs)
            parents |= {job.stage: job.key for job in used}
        job = _job(
            name, getattr(config, name), config, policies[start], parents, data[name], held_out
        )
        if isinstance(stage, PPO):
            job = replace(job, reward=stage.reward, value=stage.value)
        jobs.append(job)
        keys[name] = job.key
        if STAGES[name].makes_policy:
            policies[name] = Model(
                path=str(job.out),
                dtype=config.model.dtype,
                chat_template=config.model.chat_template,
            )
    return Plan(jobs, policies, _evaluations(config, policies), data)


def _with_artifacts(stage: PPO, jobs: list[Job]) -> tuple[PPO, list[Job]]:
    """The stage with folders in the place of `stage:NAME`, and the jobs that make them.

    Raises:
        UserError: when no stage of that name comes before it, or it makes no reward model.
    """
    made = {job.stage: job for job in jobs}
    used: list[Job] = []

    def resolved(path: Any, where: str) -> Any:
        if isinstance(path, list):
            return [resolved(item, where) for item in path]
        if not (isinstance(path, str) and path.startswith(_STAGE)):
            return path
        name = path.removeprefix(_STAGE)
        if name not in made:
            known = ", ".join(made) or "none"
            fix = f"Put {name} before ppo in stages, or give a folder"
            raise UserError(
                f"{where}: {path!r} names no stage before ppo, there are: {known}."
                + (f" {fix}" if name in STAGES else did_you_mean(name, STAGES))
            )
        if STAGES[name].makes_policy:
            raise UserError(f"{where}: {path!r} makes a policy; a reward model is made by rm")
        used.append(made[name])
        return str(made[name].out)

    terms = {
        name: replace(
            term,
            args=term.args
            | {"path": resolved(term.args["path"], f"ppo.reward.terms.{name}.args.path")},
        )
        if "path" in term.args
        else term
        for name, term in stage.reward.terms.items()
    }
    found = replace(
        stage, reward=replace(stage.reward, terms=terms), value=resolved(stage.value, "ppo.value")
    )
    return found, used


def _check_stage(name: str, config: Align) -> None:
    if name not in STAGES:
        known = ", ".join(STAGES)
        raise UserError(
            f"stages: there is no stage {name!r}.{did_you_mean(name, STAGES)} There are: {known}"
        )
    if config.stages.count(name) > 1:
        raise UserError(
            f"stages: {name!r} is named twice; each stage can run once in an experiment"
        )


def _index(config: Align) -> Path | None:
    """The index of the benchmarks in use, when a stage wants their text out of its data."""
    stages = [getattr(config, name) for name in config.stages]
    used = [data for stage in stages for data in (stage.data, stage.eval_data) if data is not None]
    if any("contamination" in data.clean.drop for data in used):
        return suites_index(config)
    return None


def _job(
    name: str,
    stage: Stage,
    config: Align,
    model: Model,
    parents: dict[str, str],
    rows: Version,
    held_out: Version | None,
) -> Job:
    root = Path(config.paths.root)
    probe = config.probe if STAGES[name].is_probed else None
    libraries = ["torch", "transformers", "trl", "accelerate", "peft"]
    key = content_key(
        {
            "stage": name,
            "parents": list(parents.values()),
            "dtype": model.dtype.value,
            "chat_template": model.chat_template and fingerprint(Path(model.chat_template)),
            "data": rows.fingerprint,
            "eval_data": held_out and held_out.fingerprint,
            "is_ordered": rows.is_ordered,
            "args": _read(stage.args),
            "peft": dataclasses.asdict(stage.peft),
            "deepspeed": config.deepspeed,
            "processes": config.launch.nnodes * config.launch.nproc_per_node,
            "code": source_key(
                _HERE / "stages" / f"{name}.py",
                _HERE / "stages" / "common.py",
                *(_REWARD / f"{module}.py" for module in ("versions", "records", "turns")),
                *(_EVALS / f"{module}.py" for module in ("gguf", "models")),
                *_FURTHER_CODE.get(name, ()),
            ),
            "versions": versions(*libraries, *(["deepspeed"] if config.deepspeed else [])),
            **({"probe": identity_of_probe(probe, root / "cache")} if probe else {}),
            **(_reward_key(stage, root / "cache") if isinstance(stage, PPO) else {}),
        }
    )
    return Job(
        stage=name,
        key=key,
        model=model,
        data=rows.folder,
        eval_data=held_out.folder if held_out else None,
        args=stage.args,
        peft=stage.peft,
        deepspeed=config.deepspeed,
        parents=parents,
        out=root / "artifacts" / f"{name}-{key}",
        cache=root / "cache",
        probe=probe,
        checkpoint_minutes=config.launch.checkpoint_minutes,
    )


def _read(args: dict[str, Any]) -> dict[str, Any]:
    """The arguments that decide what a stage makes."""
    # Where nothing else says when to evaluate, logging does, and the best checkpoint may be what is kept.
    is_rhythm = str(args.get("eval_strategy")) == "steps" and args.get("eval_steps") is None
    left_out = NOT_READ - ({"logging_steps"} if is_rhythm else set())
    return {key: value for key, value in args.items() if key not in left_out}


def _is_stage(path: Any) -> bool:
    return isinstance(path, str) and path.startswith(_STAGE)


def _without_stages(term: Term) -> Term:
    """A term without the models that earlier stages make."""
    path = term.args.get("path")
    paths = path if isinstance(path, list) else [path]
    if not any(map(_is_stage, paths)):
        return term
    return replace(term, args=term.args | {"path": [one for one in paths if not _is_stage(one)]})


def _reward_key(stage: PPO, cache: Path) -> dict[str, Any]:
    """What a reward and a critic depend on; what an earlier stage makes is named here, and is among the parents."""
    others = {name: _without_stages(term) for name, term in stage.reward.terms.items()}
    value = stage.value
    if value is not None and not _is_stage(value):
        value = identity_of_classifier(value, cache=cache)
    return {
        "reward": origin(replace(stage.reward, terms=others), cache),
        "terms": {name: dataclasses.asdict(term) for name, term in stage.reward.terms.items()},
        "value": value,
    }


def _evaluations(config: Align, policies: dict[str, Model]) -> list[tuple[str, Request]]:
    """Every policy as it is on every suite, and the last one once more for each quantizer."""
    final = list(policies)[-1]
    suites = [replace(suite, name=name) for name, suite in config.evaluation.suites.items()]
    # What each is compared with, and so diverges from: the base, or the unquantized weights.
    variants = [(policy, UNQUANTIZED, "base") for policy in policies]
    variants += [
        (final, quantizer, final)
        for quantizer in config.evaluation.quantizers
        if quantizer != UNQUANTIZED
    ]
    return [
        (policy, Request(policies[policy], quantizer, suite, policies[reference]))
        for policy, quantizer, reference in variants
        for suite in suites
    ]


def preflight(config: Align, plan: Plan) -> None:
    """Check every stage and evaluation before the first one starts.

    Raises:
        UserError: naming the file, value or machine limit that stands in the way.
    """
    _check_template(config, plan)
    _check_start(config)
    _check_objective(config)
    _check_margins(config)
    _check_family(config)
    _check_launch(config)
    if config.probe:
        check_probe(config, {job.stage: plan.data[job.stage] for job in plan.jobs if job.probe})
    for job in plan.jobs:
        _check_evaluation(job)
        if job.stage == "ppo":
            _check_ppo(config.ppo, plan.data["ppo"])
        else:
            _check_batch(job, config, plan.data[job.stage].manifest["examples"])
    for policy, request in plan.evaluations:
        # Policies that training will make have no files yet.
        later = replace(request, model=config.model, reference=None)
        check_request(request if policy == "base" else later)
    _check_disk(config, plan)


def _check_template(config: Align, plan: Plan) -> None:
    """Rows are conversations, so the tokenizer of a local model must know how to write one."""
    path = config.model.path
    if not plan.jobs or config.model.chat_template or is_gguf(path) or not is_local(path):
        return
    folder = Path(path).expanduser()
    settings = folder / "tokenizer_config.json"
    has_template = (folder / "chat_template.jinja").is_file() or (
        settings.is_file() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    )
    if not has_template:
        raise UserError(
            f"the tokenizer in {folder} has no chat template; set model.chat_template to a Jinja file, "
            "such as the chat_template.jinja of the model's instruct version"
        )


def _check_objective(config: Align) -> None:
    wanted = config.evaluation.objective
    suites = config.evaluation.suites
    if wanted == ACCURACY:
        if "rm" not in config.stages or config.rm.eval_data is None:
            raise UserError(
                f"evaluation.objective={wanted!r} needs the rm stage, and rm.eval_data to measure it on"
            )
        return
    if wanted and (wanted.count("/") != 2 or wanted.split("/")[0] not in suites):
        raise UserError(
            f"evaluation.objective={wanted!r} must be SUITE/TASK/METRIC with a suite of this "
            f"experiment ({', '.join(suites) or 'it has none'})"
            + (f", or {ACCURACY}" if "rm" in config.stages else "")
        )
    if wanted:
        _check_tasks(config, "objective", [wanted.partition("/")[2]])


def _check_margins(config: Align) -> None:
    margins = {"evaluation.margin": config.evaluation.margin} | {
        f"evaluation.margins.{name}": margin for name, margin in config.evaluation.margins.items()
    }
    for name, margin in margins.items():
        if not margin >= 0:
            raise UserError(
                f"{name}={margin} must be a number from 0 up: the loss that is still accepted"
            )
    _check_tasks(config, "margins", [name for name in config.evaluation.margins if "/" in name])


def _check_family(config: Align) -> None:
    _check_tasks(config, "family", config.evaluation.family)


def _check_tasks(config: Align, where: str, names: Sequence[str]) -> None:
    """That TASK or TASK/METRIC names a task. Which metrics it has is known when it is measured."""
    known = {name for suite in config.evaluation.suites.values() for name in _tasks(suite)}
    for name in names:
        task = name.split("/")[0]
        if task not in known:
            raise UserError(
                f"evaluation.{where}: {name!r} names no task of this experiment's suites."
                f"{did_you_mean(task, known)} There are: {', '.join(sorted(known)) or 'none'}"
            )


def _tasks(suite: Suite) -> list[str]:
    """The names under which a suite's scores are filed."""
    if suite.kind is Kind.footprint:
        return [Kind.footprint.value]
    return [*suite.tasks, *suite.prompts] if suite.kind is Kind.tasks else list(suite.texts)


def _check_start(config: Align) -> None:
    if config.model.adapter and config.stages:
        raise UserError(
            "training cannot start from model.adapter; merge it first with "
            "`PeftModel.merge_and_unload().save_pretrained(FOLDER)` and set model.path=FOLDER"
        )


def _check_launch(config: Align) -> None:
    launch = config.launch
    if launch.kind is LaunchKind.inline and (
        config.deepspeed or launch.nproc_per_node * launch.nnodes > 1
    ):
        raise UserError("deepspeed and several processes need launch=torchrun")
    if not 0 <= launch.node_rank < launch.nnodes:
        raise UserError(
            f"launch.node_rank={launch.node_rank} must be below launch.nnodes={launch.nnodes}: "
            "machines are numbered from 0"
        )
    if launch.nnodes > 1 and not launch.rdzv_endpoint:
        raise UserError(
            "launch.nnodes > 1 needs launch.rdzv_endpoint=HOST:PORT of the machine with node_rank 0"
        )


def _check_evaluation(job: Job) -> None:
    """Evaluation while training needs rows, and the best of several checkpoints an evaluation."""
    strategy = str(job.args.get("eval_strategy", "no"))
    wanted = {
        "eval_strategy": strategy if strategy != "no" else None,
        "eval_on_start": job.args.get("eval_on_start"),
    }
    for name, value in wanted.items():
        if value and job.eval_data is None:
            raise UserError(
                f"{job.stage}.args.{name}={value} needs held-out rows: "
                f"+data@{job.stage}.eval_data=file {job.stage}.eval_data.source=FILE"
            )
    if job.args.get("load_best_model_at_end") and strategy == "no":
        raise UserError(
            f"{job.stage}.args.load_best_model_at_end=true needs evaluations to choose by: set "
            f"{job.stage}.args.eval_strategy=epoch, or steps"
        )


def _check_batch(job: Job, config: Align, rows: int) -> None:
    per_device = int(job.args.get("per_device_train_batch_size", 8))
    accumulation = int(job.args.get("gradient_accumulation_steps", 1))
    processes = config.launch.nnodes * config.launch.nproc_per_node
    batch = per_device * accumulation * processes
    if batch > rows:
        raise UserError(
            f"{job.stage}: one step takes {batch} rows ({per_device} a device × {accumulation} accumulated × "
            f"{processes} processes), but there are {rows}; lower {job.stage}.args.per_device_train_batch_size "
            f"or gradient_accumulation_steps"
        )


def _check_ppo(stage: PPO, rows: Version) -> None:
    """Prompts of which the reward can say something."""
    check_needs(stage.reward, (r for r in rows.records() if isinstance(r, Prompt)), "ppo.data")


def _check_ppo_settings(stage: PPO) -> None:
    """What can be known of PPO without its data: settings that mean something, a reward, models that are there."""
    limits.check(limits.settings_of(stage.args))
    check_reward(stage.reward, "ppo.reward")
    for where, named in [
        ("ppo.value", stage.value),
        *model_paths(stage.reward, "ppo.reward").items(),
    ]:
        paths = named if isinstance(named, list) else [named]
        check_models({where: [path for path in paths if path and not _is_stage(path)]})


def _check_disk(config: Align, plan: Plan) -> None:
    """A stage writes its weights once (in float32 when all are trained) and, with an adapter, the merged result."""
    missing = [job for job in plan.jobs if not is_complete(job.out)]
    weights = _weights_bytes(config)
    root = Path(config.paths.root)
    root.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(root).free
    needed = 2 * weights * len(missing)
    if needed > free:
        raise UserError(
            f"{len(missing)} stages need about {needed / 1e6:,.0f} MB under {root}, but {free / 1e6:,.0f} MB are free; "
            "free some space or set paths.root to another disk"
        )


def _weights_bytes(config: Align) -> int:
    path = config.model.path
    folder = (
        converted_folder(path, Path(config.paths.root) / "cache")
        if is_gguf(path)
        else Path(path).expanduser()
    )
    return (
        sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else 0
    )
