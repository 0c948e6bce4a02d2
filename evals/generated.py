"""A suite's further metrics: what a task generated, against its references."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from conf.entry import UserError
from conf.schema import Suite
from evals import metrics
from evals.metrics import METRICS, Measurement, Value

if TYPE_CHECKING:
    from evals.harness import Group

DEFAULT = ("exact_match",)  # of a task from prompts, in a suite without metrics


@dataclass(frozen=True)
class Column:
    """One metric of the answers of one filter: the whole, and the value of each row, by its number."""

    label: str
    metric: str
    whole: Measurement
    values: dict[int, Value]


def wanted(suite: Suite, group: "Group") -> list[str]:
    """The further metrics of a task: none where it generates nothing."""
    if any(str(task.OUTPUT_TYPE) != "generate_until" for task in group.tasks.values()):
        return []
    return list(suite.metrics or (DEFAULT if group.name in suite.prompts else ()))


def check_groups(suite: Suite, groups: list["Group"]) -> None:
    """Refuse metrics that would say nothing, before a model is loaded.

    Raises:
        UserError: when nothing is generated, or a task has no reference or column for a metric that needs one.
    """
    if suite.metrics and not any(wanted(suite, group) for group in groups):
        raise UserError(
            f"suite.metrics={suite.metrics} are of generated answers, and no task of suite {suite.name!r} "
            "generates any; remove them or add a task that does"
        )
    for group in groups:
        needing = [name for name in wanted(suite, group) if METRICS[name].needs_reference]
        if needing and not any(
            references_of(task, task.eval_docs[number])
            for name, task in group.tasks.items()
            for number in group.documents[name]
        ):
            free = ", ".join(name for name in METRICS if not METRICS[name].needs_reference)
            raise UserError(
                f"{group.name}: {', '.join(needing)} compare answers with references, and none of its "
                f"{group.size} documents has one; give the rows a `reference`, or set suite.metrics to some of {free}"
            )
        for name in wanted(suite, group):
            column = METRICS[name].needs_column
            if column and not any(column in document for document in _documents(group)):
                raise UserError(
                    f"{group.name}: {name} needs the column {column!r}, and none of its {group.size} documents has it; "
                    f"give the rows that column, or leave {name} out of suite.metrics"
                )


def _documents(group: "Group") -> Iterator[dict[str, Any]]:
    """What is known of the documents that are scored."""
    for name, task in group.tasks.items():
        for number in group.documents[name]:
            yield facts_of(task.eval_docs[number])


def references_of(task: Any, document: Any) -> list[str]:
    """The right answers of a document as texts; none where the task only checks an answer (IFEval)."""
    target = task.doc_to_target(document)
    if task.get_config("doc_to_choice") and isinstance(target, int):
        return [str(task.doc_to_choice(document)[target])]
    if isinstance(task.get_config("doc_to_target"), int):  # what stands for none in a task file
        return []
    targets = target if isinstance(target, list) else [target]
    return [text for text in map(str, targets) if text]


def facts_of(document: dict[str, Any]) -> dict[str, Any]:
    """The columns of a document; of a prompt's, those that its row had besides, see `reward.records.Prompt`."""
    if not (packed := document.get("facts")):
        return document
    return document | dict(json.loads(packed))


def answer_of(row: dict[str, Any]) -> str | None:
    """The text that is scored: what the filter made of the answer, the first of several; None if there is none."""
    response: Any = row["filtered_resps"][0]
    while isinstance(response, list | tuple):
        response = response[0] if response else None
    return None if response is None else str(response)


def measured(
    suite: Suite, group: "Group", rows: list[dict[str, Any]], reader: tuple[Any, Any]
) -> list[Column]:
    """The further metrics of a task, for each filter of its answers.

    Args:
        rows: lm-eval's samples of the group, a row a document and filter.
        reader: model and tokenizer by which perplexity is measured.

    A metric that the task already has, under the same label, stays the task's own.
    """
    from evals.answers import label_of

    columns = []
    tasks = _task_of_rows(group, rows)
    for filter_name in dict.fromkeys(row["filter"] for row in rows):
        numbers = [i for i, row in enumerate(rows) if row["filter"] == filter_name]
        answers = [answer_of(rows[i]) for i in numbers]
        references = [references_of(tasks[i], rows[i]["doc"]) for i in numbers]
        facts = [facts_of(rows[i]["doc"]) for i in numbers]
        for name in wanted(suite, group):
            if name in rows[numbers[0]]["metrics"]:
                continue
            options = dict(zip(("model", "tokenizer"), reader, strict=True))
            further = options if name == "perplexity" else {}
            whole = metrics.measure(name, answers, references, facts, **further)
            values = dict(zip(numbers, whole.values, strict=True))
            columns.append(Column(label_of(name, filter_name), name, whole, values))
    return columns


def _task_of_rows(group: "Group", rows: Sequence[dict[str, Any]]) -> list[Any]:
    """The task of each row; rows come task by task, filter by filter."""
    per_filter = len(rows) // group.size
    return [
        task
        for name, task in group.tasks.items()
        for _ in range(per_filter * len(group.documents[name]))
    ]


def row_values(columns: Sequence[Column], number: int) -> dict[str, dict[str, Any]]:
    """What a row adds to each further metric, as `evals.pairing.Sample` keeps it; nothing for a gap."""
    found = {column.label: column.values.get(number) for column in columns}
    return {
        "metrics": {label: v for label, v in found.items() if isinstance(v, float)},
        "weighted": {label: list(v) for label, v in found.items() if isinstance(v, tuple)},
    }
