"""`python -m evals.documents suite=NAME out=FILE.jsonl`: the documents that a suite scores.

No model is loaded. The file is what a search for leaked benchmarks in training data compares with.
"""

import json
import os
from collections import Counter
from pathlib import Path

from conf.entry import UserError, entry
from conf.schema import Documents, Kind, Suite


def write_documents(suite: Suite, out: Path) -> Counter[str]:
    """Write the documents that a suite scores, one JSON object a line: task, doc, text.

    Args:
        suite: its tasks, where they come from and how many are scored; the prompt's settings do not matter.
        out: replaced as a whole, or left as it is when something fails.

    Returns:
        How many documents each task has.

    Raises:
        UserError: when a task does not exist or its documents cannot be had.
    """
    import datasets

    from evals import harness, heldout
    from reward.quiet import quiet

    quiet()
    datasets.disable_progress_bars()
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    written: Counter[str] = Counter()
    try:
        with partial.open("w", encoding="utf-8") as file:
            read = heldout.documents if suite.kind is Kind.text else harness.documents
            for task, number, text in read(suite):
                row = {"task": task, "doc": number, "text": text}
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written[task] += 1
        os.replace(partial, out)
    finally:
        partial.unlink(missing_ok=True)
    return written


@entry("documents", Documents)
def main(config: Documents, overrides: list[str]) -> float | None:
    """Write the documents and print how many each task has."""
    # Here, not above: --help and a config error must not wait for it.
    from evals.run import check_suite

    del overrides
    out = Path(config.out)
    if out.suffix != ".jsonl":
        raise UserError(f"out={config.out!r}: the file is JSON Lines, name it *.jsonl")
    check_suite(config.suite)
    for task, count in write_documents(config.suite, out).items():
        print(f"{task:40} {count:6} documents")
    print(out)
    return None


if __name__ == "__main__":
    main()
