"""Keys hold what a stage reads, no more and no less."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from align import plan as plan_module
from align.plan import NOT_READ, Plan, make_plan, preflight
from conf.entry import UserError
from conf.schema import Align, Data, Kind, LaunchKind, Model, Peft, Role, Stage, Suite, Text


@pytest.fixture
def config(tiny_model: Path, tmp_path: Path) -> Align:
    def stage(source: str) -> Stage:
        args = {"per_device_train_batch_size": 2, "learning_rate": 1e-3, "seed": 0}
        return Stage(data=Data(source=source, limit=8), args=args, peft=Peft())

    config = Align(name="test", model=Model(path=str(tiny_model)), stages=["sft", "dpo"])
    config.sft, config.dpo = stage("demo:demonstrations"), stage("demo:preferences")
    config.paths.root = str(tmp_path / "root")
    config.evaluation.suites = {"json": Suite(role=Role.gain, tasks=["demo_json"], limit=2)}
    return config


def keys(config: Align) -> dict[str, str]:
    return {job.stage: job.key for job in make_plan(config).jobs}


def set_arg(stage: str, key: str, value: Any) -> Callable[[Align], None]:
    def change(config: Align) -> None:
        getattr(config, stage).args[key] = value

    return change


def change_launch(config: Align) -> None:
    config.launch.kind, config.launch.nproc_per_node = LaunchKind.torchrun, 2


READ_BY_BOTH = {
    "sft learning rate": set_arg("sft", "learning_rate", 2e-3),
    "sft seed": set_arg("sft", "seed", 1),
    "sft rows": lambda config: setattr(config.sft.data, "limit", 9),
    "sft peft": lambda config: setattr(config.sft, "peft", Peft("lora", {"r": 2})),
    "processes": change_launch,
    "deepspeed": lambda config: setattr(config, "deepspeed", {"zero_optimization": {"stage": 2}}),
}
READ_BY_DPO = {
    "dpo beta": set_arg("dpo", "beta", 0.3),
    "dpo max_length": set_arg("dpo", "max_length", 77),
    "dpo eval data": lambda config: setattr(
        config.dpo, "eval_data", Data(source="demo:preferences", limit=3)
    ),
    "dpo start": lambda config: setattr(config.dpo, "start", "base"),
}
READ_BY_NONE = {
    "name": lambda config: setattr(config, "name", "other"),
    "title": lambda config: setattr(config, "title", "other"),
    "margin": lambda config: setattr(config.evaluation, "margin", 0.1),
    "suites": lambda config: config.evaluation.suites.clear(),
    "tracking": lambda config: setattr(config.track, "wandb", False),
    "unused stage": set_arg("rm", "learning_rate", 5.0),
    "node rank": lambda config: setattr(config.launch, "node_rank", 1),
    **{f"dpo {key}": set_arg("dpo", key, 3) for key in sorted(NOT_READ)},
}


@pytest.mark.parametrize("change", READ_BY_BOTH.values(), ids=READ_BY_BOTH)
def test_what_sft_reads_changes_both_keys(config: Align, change: Callable[[Align], None]) -> None:
    before = keys(config)
    change(config)
    after = keys(config)
    assert after["sft"] != before["sft"]
    assert after["dpo"] != before["dpo"]


@pytest.mark.parametrize("change", READ_BY_DPO.values(), ids=READ_BY_DPO)
def test_what_dpo_alone_reads_keeps_the_sft_key(
    config: Align, change: Callable[[Align], None]
) -> None:
    before = keys(config)
    change(config)
    after = keys(config)
    assert after["sft"] == before["sft"]
    assert after["dpo"] != before["dpo"]


@pytest.mark.parametrize("change", READ_BY_NONE.values(), ids=READ_BY_NONE)
def test_what_no_stage_reads_changes_no_key(config: Align, change: Callable[[Align], None]) -> None:
    before = keys(config)
    change(config)
    assert keys(config) == before


def test_logging_decides_where_it_says_when_to_evaluate(config: Align) -> None:
    config.dpo.args["eval_strategy"] = "steps"
    before = keys(config)
    config.dpo.args["logging_steps"] = 7
    after = keys(config)
    assert after["dpo"] != before["dpo"]
    config.dpo.args["eval_steps"] = 5
    timed = keys(config)
    config.dpo.args["logging_steps"] = 8
    assert keys(config) == timed


def test_the_code_of_losses_is_in_the_key(config: Align, monkeypatch: pytest.MonkeyPatch) -> None:
    before = keys(config)
    read: list[str] = []
    monkeypatch.setattr(
        plan_module, "source_key", lambda *files: read.extend(each.name for each in files) or "x"
    )
    assert keys(config) != before
    assert {"trainers.py", "prefixes.py", "references.py", "lmhead.py", "scoring.py"} <= set(read)


def test_root_and_file_name_do_not_matter_but_content_does(config: Align, tmp_path: Path) -> None:
    from reward.demo import demonstrations

    rows = [json.dumps(row) for row in demonstrations(8)]
    for name in ("a.jsonl", "b.jsonl"):
        (tmp_path / name).write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "c.jsonl").write_text("\n".join(rows[::-1]), encoding="utf-8")
    found = {}
    for name in ("a", "b", "c"):
        config.sft.data.source = str(tmp_path / f"{name}.jsonl")
        found[name] = keys(config)
    config.paths.root = str(tmp_path / "elsewhere")
    assert found["a"] == found["b"] != found["c"] == keys(config)


def test_weights_of_the_base_matter(config: Align, tiny_model: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    before = keys(config)
    config.model.path = str(copy)
    assert keys(config) == before  # the same content at another place
    weights = bytearray((copy / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (copy / "model.safetensors").write_bytes(bytes(weights))
    assert keys(config)["sft"] != before["sft"]


def test_every_policy_is_evaluated_and_the_last_one_quantized(config: Align) -> None:
    config.evaluation.quantizers = ["int8", "nf4"]
    plan = make_plan(config)
    assert [(policy, request.quantizer) for policy, request in plan.evaluations] == [
        ("base", "none"),
        ("sft", "none"),
        ("dpo", "none"),
        ("dpo", "int8"),
        ("dpo", "nf4"),
    ]
    assert plan.final == "dpo"


def test_each_policy_diverges_from_the_base_and_a_quantized_form_from_its_weights(
    config: Align, tmp_path: Path
) -> None:
    texts = {"notes": Text(source=str(tmp_path / "notes.txt"))}
    config.evaluation.suites = {"heldout": Suite(kind=Kind.text, texts=texts)}
    config.evaluation.quantizers = ["int8"]
    plan = make_plan(config)
    base, final = plan.policies["base"], plan.policies["dpo"]
    found = [(policy, r.quantizer, r.reference) for policy, r in plan.evaluations]
    assert found == [
        ("base", "none", base),
        ("sft", "none", base),
        ("dpo", "none", base),
        ("dpo", "int8", final),
    ]
    assert {r.reference_quantizer for _, r in plan.evaluations} == {"none"}
    first, _, _, quantized = (request for _, request in plan.evaluations)
    assert first.is_its_own_reference(tmp_path)
    assert not quantized.is_its_own_reference(tmp_path)
    assert "notes.txt" in refusal(config)  # before any training
    (tmp_path / "notes.txt").write_text("Held out.", encoding="utf-8")
    preflight(config, make_plan(config))


def test_a_reward_model_is_no_policy(config: Align) -> None:
    config.rm = dataclasses.replace(config.dpo)
    config.stages = ["sft", "rm", "dpo"]
    plan = make_plan(config)
    assert list(plan.policies) == ["base", "sft", "dpo"]
    assert plan.jobs[2].parents.keys() == {"sft"}


def refusal(config: Align, plan: Plan | None = None) -> str:
    with pytest.raises(UserError) as caught:
        preflight(config, plan or make_plan(config))
    return str(caught.value)


def test_preflight_passes(config: Align) -> None:
    preflight(config, make_plan(config))


def test_unknown_stage(config: Align) -> None:
    config.stages = ["sft", "dpoo"]
    assert "Did you mean 'dpo'?" in refusal(config)


def test_stage_named_twice(config: Align) -> None:
    config.stages = ["sft", "sft"]
    assert "named twice" in refusal(config)


def test_unknown_start(config: Align) -> None:
    config.dpo.start = "sftt"
    assert "Did you mean 'sft'?" in refusal(config)


def test_unknown_quantizer(config: Align) -> None:
    config.evaluation.quantizers = ["nf5"]
    assert "Did you mean 'nf4'?" in refusal(config)


def test_data_of_the_wrong_kind(config: Align) -> None:
    config.dpo.data.source = "demo:demonstrations"
    message = refusal(config)
    assert message.startswith("dpo.data.source='demo:demonstrations'")
    assert "pairs of a chosen and a rejected answer" in message


def test_step_larger_than_the_data(config: Align) -> None:
    config.sft.args["gradient_accumulation_steps"] = 16
    assert "one step takes 32 rows" in refusal(config)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda config: setattr(config.launch, "node_rank", 1), "node_rank=1 must be below launch.nnodes=1"),
        (lambda config: setattr(config.evaluation, "objective", "json/jsn/exact"), "'jsn/exact' names no task"),
        (set_arg("dpo", "eval_on_start", True), "dpo.args.eval_on_start=True needs held-out rows"),
        (set_arg("dpo", "load_best_model_at_end", True), "needs evaluations to choose by"),
    ],
)  # fmt: skip
def test_what_would_fail_only_later(
    config: Align, change: Callable[[Align], None], said: str
) -> None:
    change(config)
    assert said in refusal(config)


def test_deepspeed_needs_a_launcher(config: Align) -> None:
    config.deepspeed = {"zero_optimization": {"stage": 2}}
    assert "launch=torchrun" in refusal(config)


@pytest.mark.parametrize(
    ("missing", "said"),
    [
        ("tokenizer.json", "has no tokenizer"),
        ("config.json", "config.json is missing"),
        ("model.safetensors", "no safetensors weights"),
        ("chat_template.jinja", "no chat template"),
    ],
)
def test_incomplete_model_folder(
    config: Align, tiny_model: Path, tmp_path: Path, missing: str, said: str
) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(tiny_model, copy)
    (copy / missing).unlink()
    config.model.path = str(copy)
    message = refusal(config)
    assert said in message
    assert str(copy) in message


def test_missing_model_folder(config: Align, tmp_path: Path) -> None:
    config.model.path = str(tmp_path / "nowhere")
    with pytest.raises(UserError, match="there is no folder"):
        preflight(config, make_plan(config))


def test_full_disk_is_refused_before_training(
    config: Align, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    assert "MB are free" in refusal(config)


@pytest.mark.parametrize("margin", [-0.01, float("nan")])
def test_a_margin_is_no_negative_number(config: Align, margin: float) -> None:
    config.evaluation.margins = {"acc": margin}
    assert "evaluation.margins.acc" in refusal(config)
    config.evaluation.margins, config.evaluation.margin = {"acc": 0.0}, margin
    assert "evaluation.margin=" in refusal(config)


def test_a_margin_of_an_unknown_task_is_refused(config: Align) -> None:
    config.evaluation.margins = {"demo_jsn/exact": 0.1}
    assert "Did you mean 'demo_json'?" in refusal(config)


def test_a_family_names_tasks_of_the_suites(config: Align) -> None:
    config.evaluation.suites["text"] = Suite(
        kind=Kind.text, texts={"everyday": Text(source="offline:hellaswag")}
    )
    config.evaluation.suites["size"] = Suite(kind=Kind.footprint)
    config.evaluation.family = ["demo_json", "everyday/bits_per_byte", "footprint"]
    preflight(config, make_plan(config))
    config.evaluation.family.append("demo_jsn/exact")
    assert "Did you mean 'demo_json'?" in refusal(config)
