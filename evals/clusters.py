"""Which documents of a benchmark belong together, such as questions about one passage.

Their scores are not independent: a standard error that takes them for so is too small (Miller 2024, arXiv 2411.00640,
section 2.2, finds up to three times). No torch.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from conf.entry import UserError
from reward.store import content_key

if TYPE_CHECKING:
    from evals.harness import Group

# lm-eval task → the field that documents drawn together share. A task that asks one question of each passage (race and
# coqa, as lm-eval builds them) has no clusters, nor has one whose documents share a topic only (mmlu's subjects).
FIELDS = {
    "boolq": "passage",
    "boolq-seq2seq": "passage",
    "drop": "passage",
    "hellaswag": "source_id",  # the video or the article from which several endings were asked
    "multirc": "paragraph",
    "qasper_bool": "title",
    "qasper_freeform": "title",
    "record": "passage",
    "squadv2": "context",
}
# By the first word of families with a task for each language.
_FAMILIES = {"belebele": "flores_passage", "mlqa": "context", "xquad": "context"}


def field_of(task: str, overrides: Mapping[str, str], group: str = "") -> str | None:
    """The field that clusters a task's documents: the override of the task or its group, else the table's.

    An empty override means that every document stands alone.
    """
    for name in (task, group):
        if name in overrides:
            return overrides[name] or None
    name = task.removesuffix("_local")
    return FIELDS.get(name) or _FAMILIES.get(name.split("_")[0])


def cluster_of(
    task: str, document: Mapping[str, Any], overrides: Mapping[str, str], group: str = ""
) -> str | None:
    """Names the cluster of a document; None when it stands alone, as one with an empty field does.

    Raises:
        UserError: when an override names a field that the document does not have.
    """
    field = field_of(task, overrides, group)
    if field is None:
        return None
    if field not in document and (task in overrides or group in overrides):
        raise UserError(
            f"suite.clusters: the documents of {task} have no field {field!r}; they have {', '.join(document)}"
        )
    value = document.get(field)
    return content_key(value) if value not in (None, "", [], {}) else None


def chosen(groups: "list[Group]", overrides: Mapping[str, str]) -> dict[str, str]:
    """The field of every task that has one, for a result's settings; looks at each task's first document.

    Raises:
        UserError: when an override names no task of the suite, or no field of its documents.
    """
    names = {name for group in groups for name in (group.name, *group.tasks)}
    if unknown := [name for name in overrides if name not in names]:
        raise UserError(
            f"suite.clusters names {', '.join(unknown)}, but the suite's tasks are {', '.join(sorted(names))}"
        )
    found = {}
    for group in groups:
        for name, task in group.tasks.items():
            first = task.eval_docs[group.documents[name][0]]
            cluster_of(name, first, overrides, group.name)
            if (field := field_of(name, overrides, group.name)) is not None and field in first:
                found[name] = field
    return found
