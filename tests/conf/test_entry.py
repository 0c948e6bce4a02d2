"""Every experiment composes, and every mistake in a configuration gets one message."""

import dataclasses
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra.core.config_store import ConfigStore

from conf.arguments import FLAGS, FLAGS_WITH_VALUE, arranged, problem
from conf.choices import CONF_DIR
from conf.entry import UserError, plainly, typed
from conf.passthrough import DELEGATES, fields_of, problems
from conf.schema import Align, Evals

ROOT = Path(__file__).parents[2]
EXPERIMENTS = sorted(path.stem for path in (CONF_DIR / "experiment").glob("*.yaml"))
# Experiments on local data have no default source.
REQUIRED = {
    "sft_smollm2": ["sft.data.source=demos.jsonl"],
    "rm_smollm2": ["rm.data.source=train.jsonl", "rm.eval_data.source=test.jsonl"],
}


def compose(name: str, *overrides: str) -> Any:
    schema = {"align": Align, "evals": Evals}[name]
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    with hydra.initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        return typed(hydra.compose(name, list(overrides)), schema)


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", *argv]
    return subprocess.run(
        command, capture_output=True, text=True, cwd=ROOT, check=False, env={**os.environ}
    )


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_composes_and_its_arguments_construct_the_real_dataclass(
    name: str, tmp_path: Path
) -> None:
    import peft
    import trl

    from align.ppo.config import PPOConfig

    config = compose("align", f"+experiment={name}", *REQUIRED.get(name, []))
    assert config.name == name
    assert config.title
    classes = {"sft": trl.SFTConfig, "rm": trl.RewardConfig, "dpo": trl.DPOConfig}
    classes["ppo"] = PPOConfig
    for stage in config.stages:
        part = getattr(config, stage)
        arguments = classes[stage](
            output_dir=str(tmp_path), use_cpu=True, report_to="none", **part.args
        )
        for key, value in part.args.items():
            assert getattr(arguments, key) == value, key
        if part.peft.method == "lora":
            peft.LoraConfig(**part.peft.args)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_names_its_command_on_the_second_line(name: str) -> None:
    lines = (CONF_DIR / "experiment" / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "# @package _global_"
    assert lines[1].startswith(f"# python -m align +experiment={name}")


@pytest.mark.parametrize("delegate", sorted(DELEGATES))
def test_fields_read_from_source_are_the_dataclass_fields(delegate: str) -> None:
    import peft
    import trl

    from align.ppo.config import PPOConfig

    classes = {
        "sft": trl.SFTConfig,
        "rm": trl.RewardConfig,
        "dpo": trl.DPOConfig,
        "ppo": PPOConfig,
        "lora": peft.LoraConfig,
    }
    real = {
        field.name
        for field in dataclasses.fields(classes[delegate])
        if not field.name.startswith("_")
    }
    read = {name for name in fields_of(delegate) if not name.startswith("_")}
    assert read == real


def test_every_stage_field_of_the_schema_has_a_delegate() -> None:
    from align.plan import STAGES

    fields = {field.name for field in dataclasses.fields(Align)}
    assert set(STAGES) <= fields
    assert set(STAGES) <= set(DELEGATES)


def test_problems_judge_types() -> None:
    assert (
        problems(
            "dpo",
            {"beta": 1, "bf16": None, "loss_type": ["ipo"], "model_init_kwargs": {}},
            "dpo.args",
        )
        == []
    )
    for bad in (
        {"beta": "much"},
        {"num_train_epochs": "two"},
        {"bf16": 1},
        {"beta": True},
        {"max_steps": 1.5},
    ):
        (key,) = bad
        assert problems("dpo", bad, "dpo.args")[0].startswith(f"dpo.args.{key}=")
    (told,) = problems("dpo", {"save_strategy": False}, "dpo.args")
    assert "write it as 'no'" in told


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]), "the disk is full"),
        (FileExistsError(17, "File exists", "there"), "there cannot be used: File exists"),
    ],
)
def test_what_the_disk_says_is_one_message(error: OSError, told: str) -> None:
    with pytest.raises(SystemExit), plainly():
        raise error


def test_seed_reaches_stages_and_can_be_fixed() -> None:
    config = compose("align", "+experiment=dpo_qwen", "seed=7")
    assert config.dpo.args["seed"] == 7
    assert config.sft.args["seed"] == 0


def test_a_stages_own_adapter_is_no_other_stages() -> None:
    config = compose(
        "align", "+experiment=demo", *arranged(["dpo.peft.args.r=3", "rm.peft.method=none"])
    )
    shared = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
    assert config.peft.args == config.sft.peft.args == shared
    assert config.dpo.peft.args == shared | {"r": 3}
    assert (config.rm.peft.method, config.rm.peft.args) == ("none", {})
    config = compose("align", "+experiment=sft_smollm2", "sft.data.source=x", "+peft@sft.peft=lora")
    assert (config.sft.peft.method, config.sft.peft.args) == ("lora", shared)
    assert (config.peft.method, config.peft.args) == ("none", {})


def test_margins_and_clusters_are_set_by_name_without_a_plus() -> None:
    config = compose("align", "+experiment=demo", *arranged(["evaluation.margins.acc=0.1"]))
    assert config.evaluation.margins["acc"] == 0.1
    config = compose("evals", "model.path=x", *arranged(["suite.clusters.boolq=passage"]))
    assert config.suite.clusters == {"boolq": "passage"}


def test_target_is_refused_anywhere() -> None:
    with pytest.raises(UserError, match="_target_"):
        compose("align", "+experiment=demo", "+dpo.args._target_=os.system")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+experiment=demoo"], "there is no experiment 'demoo'. Did you mean 'demo'?"),
        (["+experimnt=demo"], "Did you mean 'experiment'?"),
        (
            ["+experiment=demo", "dpo.args.betta=1"],
            "DPOConfig has no argument 'betta'. Did you mean 'beta'?",
        ),
        (["+experiment=demo", "dpo.argz.beta=1"], "Did you mean 'dpo.args'?"),
        (["+experiment=demo", "dpo.data.sorce=x"], "Did you mean 'dpo.data.source'?"),
        (["+experiment=demo", "+dpo.foo=1"], "there is no key 'dpo.foo'"),
        (
            ["+experiment=demo", "+evaluation.suites.json.limitt=3"],
            "there is no key 'evaluation.suites.json.limitt'",
        ),
        (
            ["+experiment=demo", "seed=abc"],
            "seed: Value 'abc' of type 'str' could not be converted to Integer",
        ),
        (
            ["+experiment=demo", "model.dtype=fp8"],
            "expected one of [auto, float32, bfloat16, float16]",
        ),
        (["+experiment=demo", "peft=lorra"], "there is no peft 'lorra'. Did you mean 'lora'?"),
        (
            ["+experiment=demo", "peft.args.rr=8"],
            "LoraConfig has no argument 'rr'. Did you mean 'r'?",
        ),
        (
            ["+experiment=demo", "peft.method=dora"],
            "there is no method 'dora'. There are: none, lora",
        ),
        (
            ["+experiment=demo", "dpo.peft.args.rr=8"],
            "dpo.peft.args.rr: LoraConfig has no argument",
        ),
        (
            ["+experiment=sft_smollm2", "sft.data.source=x", "peft.args.r=8"],
            "peft.args has no meaning",
        ),
        (["+experiment=demo", "dpo.args.output_dir=x"], "set paths.root"),
        (["+experiment=demo", "-m", "seed=1,x"], "seed: Value 'x'"),
        (["+experiment=demo", "seed=["], "error: "),
        ([], "model.path, name must be set"),
        (["demo"], "options are KEY=VALUE, not 'demo'. Did you mean +experiment=demo?"),
        (["demoo"], "Did you mean +experiment=demo?"),
        (["--experiment", "demo"], "Did you mean +experiment=demo?"),
        (["experiment=demo"], "write +experiment=NAME"),
        (["xyz"], "Choose a complete configuration with +experiment=NAME: ablation_hh, demo"),
    ],
)
def test_config_error_is_one_message(overrides: list[str], message: str) -> None:
    done = run("align", *overrides)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr + done.stdout
    assert done.stderr.startswith("error: ")


def test_an_arm_that_fails_does_not_end_the_sweep(tiny_model: Path, tmp_path: Path) -> None:
    models = f"model.path=./none,{tiny_model},./neither"
    planned = ["stages=[sft]", "sft.data.limit=16", "plan_only=true", f"paths.root={tmp_path}"]
    done = run("align", "+experiment=demo", *planned, "-m", models)
    assert done.returncode == 2
    assert done.stdout.count("from base, 16 rows") == 1
    assert done.stderr.count("error: model.path: there is no folder") == 2
    assert done.stderr.endswith(
        "error: the sweep has arms that failed, as said above; the others are done\n"
    )
    assert "Traceback" not in done.stderr


def test_a_sweep_ends_where_two_arms_are_told_the_same() -> None:
    done = run(
        "align", "+experiment=demo", "plan_only=true", "dpo.args.betta=1", "-m", "seed=1,2,3"
    )
    assert done.stderr.count("has no argument 'betta'") == 2


@pytest.mark.parametrize(
    ("given", "better"),
    [
        (["--model", "x"], "model.path=x"),
        (["--model.path=x"], "model.path=x"),
        (["--path", "x"], "model.path=x"),
        (["--suite", "local"], "suite=local"),
        (["local"], "suite=local"),
        (["model.path=x", "--quant", "int8"], "quant=int8"),
        (["./models/mine"], "model.path=./models/mine"),
        (["offline"], "offline=VALUE"),
        (["--unheard"], None),
    ],
)
def test_an_argument_that_is_no_option_is_answered_with_what_to_write(
    given: list[str], better: str | None
) -> None:
    told = problem(given, "evals", Evals)
    assert told is not None
    assert told.endswith(f"Did you mean {better}?" if better else "--help shows examples")


@pytest.mark.parametrize(
    "given",
    [
        ["+experiment=demo", "-m", "seed=1,2"],
        ["--cfg", "job", "-p", "dpo.args", "--resolve"],
        ["--info", "+experiment=demo"],
        ["~peft", "++a.b=1"],
        ["--help"],
    ],
)
def test_what_hydra_takes_passes(given: list[str]) -> None:
    assert problem(given, "align", Align) is None


def test_the_flags_are_hydras() -> None:
    from hydra._internal.utils import get_args_parser

    actions = [action for action in get_args_parser()._actions if action.option_strings]
    flags = {name for action in actions for name in action.option_strings if action.nargs == 0}
    valued = {name for action in actions for name in action.option_strings if action.nargs != 0}
    assert (flags, valued) == (FLAGS, FLAGS_WITH_VALUE)


def test_help_lists_what_the_program_can_choose() -> None:
    from evals.metrics import METRICS
    from evals.quantize import QUANTIZERS

    told = run("evals", "--help").stdout.splitlines()
    listed = dict(line.split(": ", 1) for line in told if "NAME" in line.split(": ")[0])
    for group in ("suite", "model"):
        options = sorted(path.stem for path in (CONF_DIR / group).glob("*.yaml"))
        assert listed[f"{group}=NAME"].split(", ") == options
    assert listed["quant=NAME"].split(", ") == list(QUANTIZERS)
    assert listed["suite.metrics=[NAME]"].split(", ") == list(METRICS)
    assert not any(line.startswith(("data", "deepspeed", "experiment", "peft")) for line in told)
