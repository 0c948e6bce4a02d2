"""What every TRL stage does: arguments, data, training, saving."""

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from align.artifact import METRICS, Job, Manifest
from align.stages import checkpoints
from conf.entry import UserError
from conf.passthrough import DELEGATES
from conf.schema import Dtype
from evals.models import load_tokenizer, local_path, merge_adapter
from evals.provenance import provenance
from reward.store import MANIFEST, write_json
from reward.versions import Version, to_trl

ADAPTER = "adapter"
HEAD = "score"  # transformers' name of the scalar head on a causal model


def run_stage(
    job: Job,
    config_class: type[Any],
    trainer_class: Callable[..., Any],
    task_type: str,
    defaults: Mapping[str, Any] = MappingProxyType({}),
    callbacks: Sequence[Any] = (),
    finish: Callable[[Any], None] = lambda trainer: None,
) -> None:
    """Train `job` with a TRL trainer and leave a model folder with a manifest in `job.out`.

    Args:
        job: what to train; `job.out` exists and is empty.
        config_class, trainer_class: TRL's, or made from TRL's.
        task_type: PEFT's name of the task, CAUSAL_LM or SEQ_CLS.
        defaults: arguments where the user gives none.
        callbacks: further ones for the trainer.
        finish: what else is done with the trainer, on every rank, before its model is saved.
    """
    started = time.monotonic()
    tokenizer = chat_tokenizer(job)
    rows = Version.load(job.data)
    held_out = Version.load(job.eval_data) if job.eval_data else None
    trainer = trainer_class(
        model=local_path(job.model, job.cache),
        args=config_class(**{**defaults, **arguments(job, task_type, rows.is_ordered)}),
        train_dataset=dataset(rows, job.out / "trainer"),
        eval_dataset=dataset(held_out, job.out / "trainer") if held_out else None,
        processing_class=tokenizer,
        peft_config=peft_config(job, task_type),
        callbacks=[ledger(job.out / METRICS), checkpoints.keeper(job), *callbacks],
    )
    if task_type == "SEQ_CLS" and job.peft.method != "none" and not job.deepspeed:
        _widen_trained(trainer)
    carry_out(trainer, job, task_type, rows, started, finish)


def chat_tokenizer(job: Job) -> Any:
    """The tokenizer of what a job starts from.

    Raises:
        UserError: when it cannot write a conversation.
    """
    tokenizer = load_tokenizer(job.model, job.cache)
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {job.model.path} has no chat template; set model.chat_template to a Jinja file"
        )
    return tokenizer


def carry_out(
    trainer: Any,
    job: Job,
    task_type: str,
    rows: Version,
    started: float,
    finish: Callable[[Any], None] = lambda trainer: None,
) -> None:
    """Train, evaluate, save, and write the manifest last.

    Args:
        trainer: ready to train.
        job: whose trainer it is.
        task_type: PEFT's name of the task, CAUSAL_LM or SEQ_CLS.
        rows: that it trains on.
        started: when the stage began, by `time.monotonic`.
        finish: what else is done with the trainer, on every rank, before its model is saved.
    """
    parameters = _count(trainer.model)
    checkpoint = checkpoints.resume(job)
    outcome = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    metrics = dict(outcome.metrics)
    if checkpoint:
        metrics["resumed_from_step"] = checkpoints.step_of(checkpoint)
    if job.eval_data:
        metrics |= trainer.evaluate()
    finish(trainer)
    save(trainer, job, task_type)
    if trainer.is_world_process_zero():
        manifest = Manifest(
            stage=job.stage,
            key=job.key,
            parents=job.parents,
            config=json.loads(
                json.dumps({"args": job.args, "peft": vars(job.peft), "deepspeed": job.deepspeed})
            ),
            data={
                "source": rows.manifest["sources"][0]["source"],
                "version": rows.folder.name,
                "rows": len(rows),
                "dropped": rows.manifest["unusable"],
                "format": rows.manifest["format"],
                "fingerprint": rows.fingerprint,
            },
            metrics={
                key: float(value)
                for key, value in metrics.items()
                if isinstance(value, int | float)
            },
            parameters=parameters,
            seconds=round(time.monotonic() - started, 1),
            provenance=provenance(),
        )
        write_json(job.out / MANIFEST, vars(manifest))


def dataset(rows: Version, cache: Path) -> Any:
    """The rows of a version as TRL takes them, in Arrow files below `cache`: nothing is whole in memory."""
    import numpy as np
    from datasets import Dataset, Features, Json, List, Value

    first = next(row for record in rows.records() for row in to_trl(record))
    # Messages may have further keys (tool calls) that differ from row to row: columns of structs
    # would fill them with null.
    types = {list: List(Json()), str: Value("string"), float: Value("float64"), bool: Value("bool")}
    features = {name: types[type(value)] for name, value in first.items()} | {
        "tools": Value("string")
    }
    if not np.isfinite(rows.facts()["margin"]).all():  # a trainer wants all margins or none
        features.pop("margin", None)

    def examples() -> Iterator[Any]:
        for record in rows.records():
            for row in to_trl(record):
                yield {name: row.get(name) for name in features}

    return Dataset.from_generator(
        examples, features=Features(features), cache_dir=str(cache), fingerprint=rows.fingerprint
    )


def arguments(job: Job, task_type: str, is_ordered: bool = False) -> dict[str, Any]:
    """TRL's arguments of a job: the user's own, and what the harness and the machine decide."""
    import torch

    on_cpu = not torch.cuda.is_available()
    args: dict[str, Any] = {
        "use_cpu": on_cpu,
        **checkpoints.arguments(job),
        "report_to": "none",  # the parent process mirrors metrics.jsonl to W&B
        "deepspeed": job.deepspeed,
    }
    if is_ordered:  # a curriculum is an order, which the trainer would shuffle
        args.setdefault("train_sampling_strategy", "sequential")
    if on_cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        args.setdefault("ddp_backend", "gloo")
    init = dict(args.get("model_init_kwargs") or {})
    if job.peft.method != "none":
        init.setdefault("dtype", _frozen_dtype(args, task_type))
    if job.model.revision:
        init.setdefault("revision", job.model.revision)
    args["model_init_kwargs"] = init or None
    return args


def _frozen_dtype(args: dict[str, Any], task_type: str) -> str:
    """The number format of weights that an adapter leaves as they are; the adapter itself is float32 by PEFT."""
    if args.get("bf16") is False and not args.get("fp16"):
        return "float32"  # no autocast: what is added to the weights is float32
    # A reward model that goes on from another must start with its scores, so what is stored is not rounded.
    return "auto" if task_type == "SEQ_CLS" else "bfloat16"


def _widen_trained(trainer: Any) -> None:
    """Make what is trained float32, as long as autocast fits its input to it.

    PEFT leaves a module that it trains whole, such as the head, in the format of the frozen weights: in bfloat16, most
    updates are too small to change a weight. (DeepSpeed wants one format.)
    """
    import torch

    if not (trainer.args.bf16 or trainer.args.fp16):
        return
    for parameter in trainer.model.parameters():
        if parameter.requires_grad and parameter.dtype in (torch.bfloat16, torch.float16):
            parameter.data = parameter.data.float()


def peft_config(job: Job, task_type: str) -> Any:
    """PEFT's config of a job, or None when every weight is trained."""
    if job.peft.method == "none":
        return None
    import peft

    options = dict(job.peft.args)
    if task_type == "SEQ_CLS":  # the head must be trained and saved whole
        options["modules_to_save"] = sorted({*(options.get("modules_to_save") or []), HEAD})
    config_class = getattr(peft, DELEGATES[job.peft.method][0][1])
    return config_class(task_type=task_type, **options)


def ledger(path: Path) -> Any:
    """A trainer callback that appends every log entry to a JSONL file, on the first process."""
    from transformers import TrainerCallback

    class Ledger(TrainerCallback):  # type: ignore[misc]  # transformers is untyped here
        def on_log(
            self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **_: Any
        ) -> None:
            if state.is_world_process_zero and logs:
                values = {key: _number(value) for key, value in logs.items()}
                with path.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": state.global_step, **values}) + "\n")

    return Ledger()


def _number(value: Any) -> Any:
    try:
        return float(value)
    except (TypeError, ValueError):
        return str(value)


def _count(model: Any) -> dict[str, int]:
    """Parameters in all and trained ones; ZeRO-3 keeps the true size in `ds_numel`."""
    total = trained = 0
    for parameter in model.parameters():
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        total += size
        trained += size if parameter.requires_grad else 0
    return {"total": total, "trained": trained}


def save(trainer: Any, job: Job, task_type: str) -> None:
    """Leave a plain model folder in `job.out`; with an adapter, the merged weights and the adapter beside them."""
    if job.peft.method == "none":
        trainer.save_model(str(job.out))
    else:
        trainer.save_model(str(job.out / ADAPTER))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        if job.peft.method != "none":
            _forget_zero3()
            is_classifier = task_type == "SEQ_CLS"
            merging = replace(job.model, adapter=str(job.out / ADAPTER))
            if is_classifier:  # rounding to bfloat16 would move the scores: docs/reward_models.md
                merging = replace(merging, dtype=Dtype.float32)
            merge_adapter(merging, job.out, job.cache, is_classifier)
            if job.args.get("eos_token"):
                _keep_eos(trainer, job.out)
        shutil.rmtree(job.out / "trainer", ignore_errors=True)
        for leftover in job.out.rglob("training_args.bin"):  # a pickle that nothing reads
            leftover.unlink()
    trainer.accelerator.wait_for_everyone()


def _keep_eos(trainer: Any, folder: Path) -> None:
    """Give a merged model the `eos_token` that TRL set in the trainer, not in the files that were merged."""
    from transformers import AutoConfig, GenerationConfig

    trainer.processing_class.save_pretrained(folder)
    config = AutoConfig.from_pretrained(folder)
    config.get_text_config().eos_token_id = trainer.processing_class.eos_token_id
    config.save_pretrained(folder)
    if (folder / "generation_config.json").is_file():
        generation = GenerationConfig.from_pretrained(folder)
        generation.eos_token_id = trainer.model.generation_config.eos_token_id
        generation.save_pretrained(folder)


def _forget_zero3() -> None:
    """Let `from_pretrained` load whole weights again.

    Under ZeRO-3 it would split them among all ranks, and wait for ranks that do not take part.
    """
    from transformers.integrations.deepspeed import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()
