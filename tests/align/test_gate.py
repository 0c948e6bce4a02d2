"""What a run cannot slip past: data that cannot teach a stage, before any model is loaded."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align.gate import pass_gate, suites_index
from align.plan import make_plan
from conf.entry import UserError
from conf.schema import Align, Data, Kind, Model, Part, Peft, Role, Source, Stage, Suite
from reward import demo
from reward.versions import AUDIT


def rows_file(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Align:
    args = {"per_device_train_batch_size": 2, "max_length": 512}
    config = Align(name="test", model=Model(path=str(tiny_model)), stages=["sft"])
    config.sft = Stage(Data(source="demo:demonstrations", limit=20), args=args, peft=Peft())
    config.paths.root = str(tmp_path / "root")
    return config


def gate(config: Align) -> dict[str, Any]:
    [job] = make_plan(config).jobs
    folder = pass_gate(job, config, suites_index(config))
    audit: dict[str, Any] = json.loads((folder / AUDIT).read_text())
    return audit


def refusal(config: Align) -> str:
    with pytest.raises(UserError) as caught:
        gate(config)
    return str(caught.value)


def kinds(audit: dict[str, Any]) -> set[str]:
    return {finding["kind"] for finding in audit["findings"]}


def test_good_rows_pass_and_are_counted_as_the_trainer_counts_them(
    config: Align, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    from align.stages.common import dataset

    audit = gate(config)
    assert kinds(audit) == set()
    [job] = make_plan(config).jobs
    trainer = SFTTrainer(
        model=config.model.path,
        args=SFTConfig(str(tmp_path), max_length=512, use_cpu=True, bf16=False, report_to="none"),
        train_dataset=dataset(make_plan(config).data["sft"], tmp_path),
        processing_class=AutoTokenizer.from_pretrained(config.model.path),
    )
    labels = [label for row in trainer.train_dataset for label in row["labels"]]
    assert audit["summary"]["tokens"]["loss"] == sum(label != -100 for label in labels)
    assert audit["summary"]["tokens"]["examples"] == 20
    assert job.data.is_dir()


def test_rows_without_a_token_to_learn_from_stop_the_run(config: Align) -> None:
    config.sft.args["max_length"] = 20
    message = refusal(config)
    assert "20 × no_loss_tokens" in message
    assert "the prompt has " in message
    assert "raise args.max_length" in message


def test_a_few_such_rows_are_a_warning(config: Align, tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(199)]
    rows.append({"question": "Why? " * 200, "answer": "So."})
    config.sft.data = Data(source=rows_file(tmp_path / "a.jsonl", rows))
    audit = gate(config)
    found = [f for f in audit["findings"] if f["kind"] == "no_loss_tokens"]
    assert [(f["row"], f["severity"]) for f in found] == [(199, "warning")]
    assert audit["summary"]["tokens"]["no_loss"] == 1


def test_the_evaluations_own_documents_stop_the_run(config: Align, tmp_path: Path) -> None:
    rows = [{"prompt": row["prompt"], "completion": row["reference"]} for row in demo.held_out(80)]
    config.sft.data = Data(source=rows_file(tmp_path / "rows.jsonl", rows))
    config.evaluation.suites = {"json": Suite(name="json", role=Role.gain, tasks=["demo_json"])}
    message = refusal(config)
    assert "1 × eval_split, the rows are an evaluation split" in message
    assert "80 of 80 documents of demo_json are in the data" in message


def test_other_rows_of_the_same_task_pass(config: Align) -> None:
    config.evaluation.suites = {"json": Suite(name="json", role=Role.gain, tasks=["demo_json"])}
    assert "eval_split" not in kinds(gate(config))


def test_documents_are_written_once_and_not_again_for_other_settings(config: Align) -> None:
    suite = Suite(name="json", role=Role.gain, tasks=["demo_json"], limit=3)
    config.evaluation.suites = {"json": suite}
    first = suites_index(config)
    suite.batch_size = 2
    assert suites_index(config) == first
    suite.limit = 4
    assert suites_index(config) != first


def test_prompts_of_ones_own_are_in_the_index(config: Align, tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    suite = Suite(name="own", role=Role.gain, prompts={"own": Source(source=str(file))})
    config.evaluation.suites = {"own": suite, "cost": Suite(name="cost", kind=Kind.footprint)}
    found = set()
    for name in ("one", "another"):
        file.write_text(json.dumps({"prompt": f"Say {name}", "answer": name}) + "\n")
        found.add(suites_index(config))
    assert len(found) == 2


def test_a_suite_without_documents_has_no_index(config: Align) -> None:
    config.evaluation.suites = {"cost": Suite(name="cost", kind=Kind.footprint)}
    assert suites_index(config) is None


def test_held_out_prompts_in_the_rows_stop_the_run(config: Align) -> None:
    config.sft.eval_data = Data(source="demo:demonstrations", limit=5)
    message = refusal(config)
    assert "5 × split_overlap, the prompt is in the held-out rows too (row 0: " in message
    assert "data.part=train" in message
    for data, part in ((config.sft.data, Part.train), (config.sft.eval_data, Part.validation)):
        data.limit, data.part, data.fractions = 20, part, [0.5, 0.5, 0.0]
    assert kinds(gate(config)) == set()


def named_test(config: Align, tmp_path: Path) -> None:
    rows = [{"question": "a", "answer": "b"}] * 3
    config.sft.data = Data(source=rows_file(tmp_path / "gsm8k.test.jsonl", rows))


def hub_split(config: Align, tmp_path: Path) -> None:
    config.sft.data = Data(source="owner/name", split="test_sft")


def test_part(config: Align, tmp_path: Path) -> None:
    config.sft.data.part = Part.test


def part_of_hub_split(config: Align, tmp_path: Path) -> None:
    config.sft.data = Data(source="owner/name", split="train+test[:50%]")


def file_in_a_test_folder(config: Align, tmp_path: Path) -> None:
    (tmp_path / "test").mkdir()
    rows = [{"question": "a", "answer": "b"}] * 3
    config.sft.data = Data(source=rows_file(tmp_path / "test" / "rows.jsonl", rows))


def version_of_a_test_file(config: Align, tmp_path: Path) -> None:
    from reward.data import prepare

    named_test(config, tmp_path)
    version = prepare(config.sft.data, "sft", tmp_path)
    config.sft.data = Data(source=str(version.folder))


def version_of_test_part(config: Align, tmp_path: Path) -> None:
    from reward.data import prepare

    data = Data(source="demo:demonstrations", part=Part.test, fractions=[0.5, 0.0, 0.5])
    config.sft.data = Data(source=str(prepare(data, "sft", tmp_path).folder))


@pytest.mark.parametrize(
    "change",
    [
        named_test,
        hub_split,
        part_of_hub_split,
        test_part,
        file_in_a_test_folder,
        version_of_a_test_file,
        version_of_test_part,
    ],
    ids=lambda f: f.__name__,
)
def test_an_evaluation_split_is_refused_by_its_name(
    config: Align, tmp_path: Path, change: Callable[[Align, Path], None]
) -> None:
    change(config, tmp_path)
    with pytest.raises(UserError, match="is an evaluation split") as caught:
        make_plan(config)
    assert "sft.data.allow_eval_split=true" in str(caught.value)
    if change is named_test:
        config.sft.data.allow_eval_split = True
        assert len(make_plan(config).data["sft"]) == 3


def test_a_mostly_malformed_file_stops_the_plan(config: Align, tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"question": "a", "answer": "b"}\n' * 3 + "{broken\n" * 5)
    config.sft.data = Data(source=str(path))
    with pytest.raises(UserError, match=r"5 of 8 rows .* a\.jsonl:4: it is not JSON"):
        make_plan(config)


def test_a_leaked_row_is_dropped_when_asked(config: Align, tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(9)]
    leak = demo.held_out(1)[0]
    rows.append({"question": leak["prompt"], "answer": leak["reference"]})
    config.sft.data = Data(source=rows_file(tmp_path / "a.jsonl", rows))
    config.evaluation.suites = {"json": Suite(name="json", role=Role.gain, tasks=["demo_json"])}
    assert "contamination" in kinds(gate(config))
    config.sft.data.clean.drop = ["contamination"]
    assert make_plan(config).data["sft"].manifest["steps"] == [
        {"step": "drop contamination", "removed": 1, "left": 9}
    ]


def test_the_trainers_own_limit_counts_where_none_is_given(config: Align, tmp_path: Path) -> None:
    del config.sft.args["max_length"]  # TRL's default is 1024
    rows = [{"question": f"Why {n}? " * 400, "answer": "So."} for n in range(3)]
    config.sft.data = Data(source=rows_file(tmp_path / "a.jsonl", rows))
    assert "3 × no_loss_tokens" in refusal(config)
    config.sft.args |= {"packing": True}  # its default strategy cuts too
    assert "3 × no_loss_tokens" in refusal(config)
    config.sft.args |= {"packing_strategy": "bfd_split"}
    assert "no_loss_tokens" not in kinds(gate(config))


def test_leaked_rows_that_are_dropped_do_not_stop_the_run(config: Align, tmp_path: Path) -> None:
    rows = [{"question": f"What is {n} + 1?", "answer": str(n + 1)} for n in range(9)]
    rows += [{"question": r["prompt"], "answer": r["reference"]} for r in demo.held_out(80)]
    config.sft.data = Data(source=rows_file(tmp_path / "a.jsonl", rows))
    config.evaluation.suites = {"json": Suite(name="json", role=Role.gain, tasks=["demo_json"])}
    assert "eval_split" in refusal(config)
    config.sft.data.allow_eval_split = True
    assert "eval_split" not in kinds(gate(config))
    config.sft.data.allow_eval_split = False
    config.sft.data.clean.drop = ["contamination"]
    assert "eval_split" not in kinds(gate(config))
    config.evaluation.suites = {}
    with pytest.raises(UserError, match="drops text of the suites in use, and there is none"):
        make_plan(config)
