"""What is kept of each scored document, made from lm-eval's own samples."""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from evals.clusters import cluster_of
from evals.generated import Column, answer_of, row_values
from reward.store import content_key

if TYPE_CHECKING:
    from evals.harness import Group


def records(
    group: "Group",
    rows: list[dict[str, Any]],
    chats: dict[str, Any],
    clusters: Mapping[str, str] = MappingProxyType({}),
    further: Sequence[Column] = (),
) -> Iterator[dict[str, Any]]:
    """What is kept of each document: id, hash, prompt, target, answer, metrics, and what `evals.mine` needs.

    `clusters` are the suite's own; a row has a `cluster` only where others may share it. `further` are the metrics
    beside lm-eval's own.
    """
    per_filter = len(rows) // group.size  # a task with several answer filters has a row for each
    names = [name for name in group.tasks for _ in range(per_filter * len(group.documents[name]))]
    for number, (name, row) in enumerate(zip(names, rows, strict=True)):
        prompt = str(row["arguments"][0][0])
        kind = str(group.tasks[name].OUTPUT_TYPE)
        cluster = cluster_of(name, row["doc"], clusters, group.name)
        yield {
            "doc_id": row["doc_id"] if len(group.tasks) == 1 else f"{name}/{row['doc_id']}",
            "doc_hash": content_key([row["doc_hash"], row["prompt_hash"], row["target_hash"]]),
            "kind": kind,
            **({"cluster": cluster} if cluster else {}),
            "prompt": prompt,
            **({"messages": chats[prompt]} if prompt in chats else {}),
            "target": str(row["target"]),
            "answer": (answer := _answer(row, kind)),
            **(_picked(group.tasks[name], row) if kind == "multiple_choice" else {}),
            **_generated(row, kind, answer),
            **_merged(values_of(group.tasks[name], row), row_values(further, number)),
        }


# lm-eval's aggregations of a value and its weight for each document → how `EvalResult` forms them again.
WEIGHTED = {
    "perplexity": "perplexity",
    "weighted_perplexity": "perplexity",
    "bits_per_byte": "bits_per_byte",
}


def _merged(own: dict[str, Any], further: dict[str, Any]) -> dict[str, Any]:
    merged = {key: own.get(key, {}) | further[key] for key in ("metrics", "weighted")}
    return {key: values for key, values in merged.items() if values or key == "metrics"}


def values_of(task: Any, row: dict[str, Any]) -> dict[str, Any]:
    """What the document adds to each metric; see `evals.pairing.Sample`."""
    aggregations = task.aggregation()
    metrics: dict[str, float] = {}
    weighted: dict[str, list[Any]] = {}
    for metric in row["metrics"]:
        value, label = row[metric], label_of(metric, row["filter"])
        scale = WEIGHTED.get(getattr(aggregations.get(metric), "__name__", ""))
        if scale is not None:
            pair = value if isinstance(value, tuple | list) else (value, 1)
            weighted[label] = [float(pair[0]), float(pair[1]), scale]
        elif is_number(value):
            metrics[label] = float(value)
        elif isinstance(value, list) and value and all(map(is_number, value)):
            # IFEval's instructions: the score is the mean over those of all documents.
            weighted[label] = [float(sum(value)), float(len(value)), "mean"]
    return {"metrics": metrics} | ({"weighted": weighted} if weighted else {})


def _picked(task: Any, row: dict[str, Any]) -> dict[str, Any]:
    """The options' texts after the prompt, and the number of the one that each metric takes for the answer.

    Nothing where the options are put into the prompt (Winogrande): there is no one prompt with two answers.
    """
    import numpy as np

    choices = task.doc_to_choice(row["doc"])
    arguments = row["arguments"][: len(choices)]
    if len({prompt for prompt, _ in arguments}) > 1:
        return {}
    # As `ConfigurableTask.process_results` of lm-eval 0.4 divides them.
    likelihoods = np.array([response[0] for response in row["filtered_resps"][: len(choices)]])
    lengths = {
        "acc": np.ones(len(choices)),
        "acc_norm": np.array([len(choice) for choice in choices]),
        "acc_bytes": np.array([len(choice.encode()) for choice in choices]),
    }
    return {
        "options": [str(option) for _, option in arguments],
        "picked": {
            metric: int(np.argmax(likelihoods / length))
            for metric, length in lengths.items()
            if metric in row["metrics"]
        },
    }


def _generated(row: dict[str, Any], kind: str, answer: str) -> dict[str, str]:
    """The text as it was generated, where a filter took the answer out of it."""
    if kind != "generate_until" or (text := str(row["resps"][0][0])) == answer:
        return {}
    return {"generated": text}


def _answer(row: dict[str, Any], kind: str) -> str:
    """The generated text, or the options with their log-likelihoods."""
    responses = row["filtered_resps"]
    if kind == "generate_until":
        return answer_of(row) or ""
    if all(isinstance(response, str) for response in responses):
        return "\n".join(responses)
    options = [
        "".join(map(str, arguments[1:2])) for arguments in row["arguments"]
    ]  # a text has none
    pairs = zip(responses, options, strict=False)
    return "\n".join(
        f"{float(r[0] if isinstance(r, tuple | list) else r):.3f} {o}" for r, o in pairs
    )


def label_of(metric: str, filter_name: str) -> str:
    """A metric's name in a result: with the filter of the answer, if there is one."""
    return metric if filter_name == "none" else f"{metric},{filter_name}"


def is_number(value: Any) -> bool:
    """Whether a metric's value for one document is a number that can be averaged."""
    return isinstance(value, bool | int | float)
