"""The only door to lm-eval: load a suite's tasks, score a model on them, give records."""

import contextlib
import dataclasses
import functools
import json
import os
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.entry import UserError
from conf.passthrough import did_you_mean
from conf.schema import Suite, TaskSource
from evals import clusters, offline, punkt
from evals.answers import is_number, label_of, records, values_of
from evals.generated import Column, check_groups, measured
from evals.metrics import METRICS, summary
from evals.models import dtype_name, identity, open_model
from evals.progress import Answers, answers_file
from evals.results import Score
from evals.run import Measured, Subject, reader_of
from reward.store import canonical, content_key

TASKS_DIR = Path(__file__).parent / "tasks"

# lm-eval scores in the model's own format unless told otherwise: in bfloat16 that rounds log-likelihoods to half a nat,
# and differences between models drown in it.
SOFTMAX_DTYPE = "float32"

# The metric by which a task is ranked when it has several; else its first.
_PREFERRED = ("acc_norm", "acc", "exact_match")


@dataclass
class Group:
    """What a suite calls a task: one lm-eval task, or a group of them whose documents are pooled."""

    name: str
    tasks: dict[str, Any]  # lm-eval Task objects by name
    documents: dict[str, list[int]]  # chosen document numbers by task name

    @property
    def size(self) -> int:
        """Number of chosen documents."""
        return sum(len(numbers) for numbers in self.documents.values())


def load_groups(suite: Suite) -> list[Group]:
    """The suite's tasks with the documents that it samples: `limit` of each, by `sample_seed`.

    Raises:
        UserError: when a task does not exist or its documents cannot be had.
    """
    include = [str(TASKS_DIR)] + ([suite.include_path] if suite.include_path else [])
    own = {path.stem for folder in include for path in Path(folder).rglob("*.yaml")}
    manager = _manager(tuple(include), not own.issuperset(suite.tasks))
    groups = []
    for name in suite.tasks:
        tasks = _load(manager, name, suite)
        for task in tasks.values():
            _configure(task, suite)
        groups.append(Group(name, *_sampled(tasks, suite)))
    groups += _prompt_groups(suite)
    check_groups(suite, groups)
    leaves = [leaf for group in groups for leaf in group.tasks]
    if twice := sorted({leaf for leaf in leaves if leaves.count(leaf) > 1}):
        raise UserError(f"suite.tasks names {', '.join(twice)} twice, once as part of a group")
    return groups


def _prompt_groups(suite: Suite) -> Iterator[Group]:
    """The tasks made of the user's own prompts."""
    if suite.prompts:
        from evals.tasks.prompts import PromptTask

        for name, source in suite.prompts.items():
            task = PromptTask(name, source)
            _configure(task, suite)
            yield Group(name, *_sampled({name: task}, suite))


@functools.cache
def _manager(include: tuple[str, ...], has_published: bool) -> Any:
    """lm-eval's index of tasks. That of the published ones takes seconds."""
    from lm_eval.tasks import TaskManager

    punkt.spare_downloads()
    return TaskManager(include_path=list(include), include_defaults=has_published)


def _load(manager: Any, name: str, suite: Suite) -> dict[str, Any]:
    if suite.source is TaskSource.offline:
        overrides = offline.members(name)
        # lm-eval applies the fields of an inline group's members over the registered task.
        spec: Any = {
            "group": "offline",
            "task": [{"task": task, **fields} for task, fields in overrides.items()],
        }
    elif name in manager.task_index:
        spec = name
    else:
        hint = did_you_mean(name, manager.task_index)
        raise UserError(f"suite.tasks: lm-eval has no task {name!r}.{hint}")
    try:
        return dict(manager.load([spec])["tasks"])
    except UserError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"task {name!r} cannot be loaded: {reason}. If this machine has no network, choose a suite with "
            "source: offline, or run `python -m evals.prefetch` with this suite where there is one"
        ) from error


def _configure(task: Any, suite: Suite) -> None:
    if suite.num_fewshot is not None and task.get_config("num_fewshot") != 0:
        task.set_config(key="num_fewshot", value=suite.num_fewshot)
    elif task.get_config("num_fewshot") is None:
        task.set_config(key="num_fewshot", value=0)
    if suite.gen_kwargs and task.get_config("output_type") == "generate_until":
        task.set_config(key="generation_kwargs", value=dict(suite.gen_kwargs), update=True)
    _keep_documents(task)


def _keep_documents(task: Any) -> None:
    """Prepare a task's documents once; lm-eval maps the whole split anew at each access."""
    documents = task.eval_docs
    name = "test_docs" if task.has_test_docs() else "validation_docs"
    setattr(task, name, lambda: documents)


def _sampled(tasks: dict[str, Any], suite: Suite) -> tuple[dict[str, Any], dict[str, list[int]]]:
    every = [
        (name, number) for name, task in tasks.items() for number in range(len(task.eval_docs))
    ]
    if suite.limit is not None and suite.limit < len(every):
        every = random.Random(f"{suite.sample_seed}").sample(every, suite.limit)
    documents: dict[str, list[int]] = {}
    for name, number in sorted(every):
        documents.setdefault(name, []).append(number)
    return {name: tasks[name] for name in documents}, documents


def documents(suite: Suite) -> Iterator[tuple[str, int, str]]:
    """Task, number and text of the documents that the suite scores.

    The text is the question as a model sees it without examples, and the right answer below it.

    Raises:
        UserError: as `load_groups`.
    """
    for group in load_groups(suite):
        for name, numbers in group.documents.items():
            task = group.tasks[name]
            for number in numbers:
                yield name, number, _leaked(task, task.eval_docs[number])


def _leaked(task: Any, document: Any) -> str:
    """A document as it would stand in training data."""
    question, target = task.doc_to_text(document), task.doc_to_target(document)
    choices = task.doc_to_choice(document) if task.get_config("doc_to_choice") else []
    if isinstance(question, int):  # WinoGrande: the choice goes before the target, into a gap
        filled = choices[question]
        gap = os.path.commonprefix(choices)  # noqa: RUF071 (of texts, not of paths)
        return f"{filled} {target}\n{gap.rstrip()} {target}"
    answers = target if isinstance(target, list) else [target]
    if choices:
        answers = [choices[answer] if isinstance(answer, int) else answer for answer in answers]
    # A bare number is the target of tasks that check an answer without having one (IFEval).
    parts = [question, *(str(answer) for answer in answers if not isinstance(answer, int))]
    return "\n".join(part.strip() for part in parts).strip()


def settings(
    suite: Suite, groups: list[Group], tokenizer: Any, dtype: str, device: str
) -> dict[str, Any]:
    """All that must be equal for two results to be comparable; see `EvalResult.settings`."""
    import lm_eval

    template = tokenizer.chat_template if suite.apply_chat_template else None
    return {
        "backend": f"lm-eval {lm_eval.__version__} hf",
        "device": device,
        "dtype": dtype,
        "softmax_dtype": SOFTMAX_DTYPE,
        "batch_size": suite.batch_size,
        **({"tokens_at_once": suite.tokens_at_once} if suite.tokens_at_once else {}),
        "source": suite.source.value,
        "limit": suite.limit,
        "sample_seed": suite.sample_seed,
        "fewshot_as_multiturn": suite.apply_chat_template,
        "chat_template": content_key(template) if template else None,
        "system_instruction": suite.system_instruction,
        "gen_kwargs": suite.gen_kwargs,
        "clusters": clusters.chosen(groups, suite.clusters),
        "metrics": suite.metrics,
        "tasks": {group.name: _task_settings(group) for group in groups},
    }


def _task_settings(group: Group) -> dict[str, Any]:
    first = next(iter(group.tasks.values()))
    return {
        "version": first.VERSION,
        "num_fewshot": first.get_config("num_fewshot"),
        "config": content_key({name: config_of(task) for name, task in group.tasks.items()}),
        "documents": content_key(group.documents),
        "n": group.size,
        **({"left_out": first.left_out} if hasattr(first, "left_out") else {}),
    }


def config_of(task: Any) -> dict[str, Any]:
    """A task's own definition, equal in every process and at every place."""
    config = task.dump_config()
    for key in ("custom_dataset", "dataset_kwargs", "metadata"):  # hold local paths
        config.pop(key, None)
    text = json.dumps(config, sort_keys=True, default=str)
    # lm-eval writes a function whose source it cannot find with its address.
    return dict(json.loads(re.sub(r" at 0x[0-9a-f]+", "", text)))


_LOADED: dict[str, list[Group]] = {}  # by suite: loading tasks costs as much as scoring them


def measure(subject: Subject, out: Path) -> Measured:
    """Score a model on lm-eval tasks; see `evals.run.KINDS`.

    Writes one JSONL a task into `out`, a row a document (and answer filter), see `evals.answers.records`.
    """
    suite = subject.request.suite
    key = canonical(dataclasses.asdict(suite))
    if key not in _LOADED or suite.prompts:  # a file of prompts may have changed, and loads at once
        loaded = load_groups(suite)
        for group in loaded:
            punkt.require(group.name, group.tasks, group.documents)
        _LOADED[key] = loaded
    groups = _LOADED[key]
    model, tokenizer = subject.open()
    dtype = dtype_name(subject.request.model, model.config)
    found = settings(suite, groups, tokenizer, dtype, model.device.type)
    with _reader(subject) as reader:
        scores, samples = score(subject, groups, reader, out)
    if (other := reader_of(suite)) is not None:
        found["perplexity_model"] = identity(other, subject.cache)["weights"]
    return Measured(found, scores, samples)


def _reader(subject: Subject) -> contextlib.AbstractContextManager[tuple[Any, Any]]:
    """The model and tokenizer by which perplexity is measured."""
    other = reader_of(subject.request.suite)
    if other is None:
        return contextlib.nullcontext(subject.open())
    return open_model(other, "none", subject.cache)


def score(
    subject: Subject, groups: list[Group], reader: tuple[Any, Any], out: Path
) -> tuple[list[Score], dict[str, str]]:
    """Score an opened model on loaded groups: the scores, and the name of each group's sample file.

    Every number is lm-eval's own, to the last digit, under its own seeds and defaults; see docs/evaluation.md. With
    `suite.tokens_at_once` log-likelihoods are those of docs/scorer.md.
    """
    import lm_eval
    from lm_eval.defaults import DEFAULT_OTHER_SEED

    from evals.backend import Backend

    suite = subject.request.suite
    model, tokenizer = subject.open()
    for group in groups:  # few-shot examples are drawn anew, and equally, for each model
        for task in group.tasks.values():
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED + suite.sample_seed)
    lm = Backend(
        Answers(answers_file(subject.cache, subject.request.key(subject.cache))),
        tokens=suite.tokens_at_once,
        pretrained=model,
        tokenizer=tokenizer,
        batch_size=suite.batch_size,
        softmax_dtype=SOFTMAX_DTYPE,
    )
    _seed()
    outcome = lm_eval.evaluate(
        lm=lm,
        task_dict={"tasks": {name: task for group in groups for name, task in group.tasks.items()}},
        samples={name: docs for group in groups for name, docs in group.documents.items()},
        system_instruction=suite.system_instruction,
        apply_chat_template=suite.apply_chat_template,
        fewshot_as_multiturn=suite.apply_chat_template,  # as lm-eval's command line does
        bootstrap_iters=1000,
    )
    scores, files = [], {}
    for group in groups:
        rows = [row for name in group.tasks for row in outcome["samples"][name]]
        further = measured(suite, group, rows, reader)
        files[group.name] = f"samples_{group.name}.jsonl"
        with (out / files[group.name]).open("w", encoding="utf-8") as file:
            for row in records(group, rows, lm.chats, suite.clusters, further):
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
        scores += _scores(group, outcome, rows, further)
    return scores, files


def _seed() -> None:
    """Seed what sampled answers are drawn with as `lm_eval.simple_evaluate` does."""
    import numpy as np
    from lm_eval.defaults import DEFAULT_OTHER_SEED, DEFAULT_RANDOM_SEED
    from lm_eval.utils import set_torch_seed

    random.seed(DEFAULT_RANDOM_SEED)
    np.random.seed(DEFAULT_OTHER_SEED)
    set_torch_seed(DEFAULT_OTHER_SEED)


def _scores(
    group: Group, outcome: dict[str, Any], rows: list[dict[str, Any]], further: Sequence[Column]
) -> list[Score]:
    """A group's scores: lm-eval's own, then the further metrics. One of them is the main one."""
    scores = [*_own_scores(group, outcome, rows), *_further_scores(group, further)]
    labels = [score.metric for score in scores]
    own = labels[: len(labels) - len(further)]
    main = next((label for label in _PREFERRED if label in own), labels[0])
    return [dataclasses.replace(score, is_main=score.metric == main) for score in scores]


def _own_scores(
    group: Group, outcome: dict[str, Any], rows: list[dict[str, Any]]
) -> Iterator[Score]:
    """Those that lm-eval has for one task; for several, the mean over their pooled documents."""
    results = {name: outcome["results"][name] for name in group.tasks}
    first = next(iter(group.tasks))
    keys = [key for key in results[first] if "," in key and "_stderr," not in key]
    if len(group.tasks) > 1:  # only what every document has as one number can be pooled
        keys = [key for key in keys if all(is_number(row.get(key.split(",")[0])) for row in rows)]
    for key in keys:
        metric, filter_name = key.split(",", 1)
        filtered = [row for row in rows if row["filter"] == filter_name]
        if len(group.tasks) == 1:
            value = results[first][key]
            stderr = results[first].get(f"{metric}_stderr,{filter_name}")
        else:
            value, stderr = _pooled([float(row[metric]) for row in filtered])
        if not isinstance(stderr, int | float):  # lm-eval has none for sums such as IFEval's
            stderr = _stderr_of_sums(group, filtered, label_of(metric, filter_name))
        yield Score(
            task=group.name,
            metric=label_of(metric, filter_name),
            value=float(value),
            stderr=float(stderr),
            n=group.size,
            higher_is_better=bool(outcome["higher_is_better"][first].get(metric, True)),
            is_main=False,
        )


def _stderr_of_sums(group: Group, rows: list[dict[str, Any]], label: str) -> float:
    """The standard error of a metric that is formed from sums over the documents; NaN for any other."""
    task = next(iter(group.tasks.values()))
    values = [values_of(task, row).get("weighted", {}).get(label) for row in rows]
    return summary([tuple(value) for value in values if value])[1]


def _further_scores(group: Group, further: Sequence[Column]) -> Iterator[Score]:
    for column in further:
        yield Score(
            task=group.name,
            metric=column.label,
            value=column.whole.value,
            stderr=column.whole.stderr,
            n=column.whole.n,
            higher_is_better=METRICS[column.metric].higher_is_better,
            is_main=False,
        )


def _pooled(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean."""
    n = len(values)
    mean = sum(values) / n
    variance = sum((value - mean) ** 2 for value in values) / max(1, n - 1)
    return mean, (variance / n) ** 0.5
