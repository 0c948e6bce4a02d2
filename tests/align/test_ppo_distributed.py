"""PPO on two real CPU ranks, under DDP, ZeRO-2 and ZeRO-3, is PPO of one process."""

import json
import math
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ppo_ranks
import pytest
import torch
from test_ppo_stage import ARGS, carried_out

from align import launch
from align.artifact import Job
from align.plan import make_plan
from align.ppo.sharding import require_that_weights_are_saved
from align.ppo.trainer import VALUE_MODEL
from conf.entry import UserError
from conf.schema import PPO, Align, Data, Launch, LaunchKind, Model, Peft, Reward, Term
from reward.store import write_json

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="DeepSpeed builds a CPU extension with g++"
)
Found = tuple[dict[str, torch.Tensor], dict[str, Any]]


def read(folder: Path) -> Found:
    """Weights and notes of a run."""
    from safetensors.torch import load_file

    return load_file(folder / "whole.safetensors"), json.loads((folder / "found.json").read_text())


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Found]:
    """What one process finds."""
    out = tmp_path_factory.mktemp("alone")
    for name in ppo_ranks.RUNS:
        ppo_ranks.run(name, out / name)
    return {name: read(out / name) for name in ppo_ranks.RUNS}


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes found."""
    out = tmp_path_factory.mktemp("together")
    argv = launch.command(
        "ppo_ranks", [str(out)], Launch(kind=LaunchKind.torchrun, nproc_per_node=2)
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{Path(__file__).parents[2]}:{Path(__file__).parent}")
        launch.run(argv, "ranks", out / "log", processes=2)
    return out


@pytest.fixture(params=ppo_ranks.KINDS)
def shared(request: pytest.FixtureRequest, together: Path) -> tuple[str, Path]:
    """A way of sharing, and the folder of what two processes found with it."""
    return request.param, together / request.param


def logged(log: list[dict[str, float]], name: str) -> list[float]:
    return [row[name] for row in log if name in row]


def test_two_processes_take_the_steps_of_one(
    alone: dict[str, Found], shared: tuple[str, Path]
) -> None:
    """T24, T36: uneven responses, micro-batches that do not divide by two, a process without any."""
    for name, (weights, notes) in alone.items():
        found, told = read(shared[1] / name)
        assert found.keys() == weights.keys()
        for key, weight in weights.items():
            torch.testing.assert_close(
                found[key], weight, atol=1e-5, rtol=1e-5, msg=f"{name} {key}"
            )
        assert set(logged(told["log"], "val/first_ratio_off")) == {0.0}
        assert logged(told["log"], "objective/kl")[0] == 0
        lengths = logged(told["log"], "response/length_mean")
        assert lengths == logged(notes["log"], "response/length_mean")
        for number in ("loss", "eval_reward", "objective/kl_coef", "val/advantage_std"):
            ours, theirs = logged(told["log"], number), logged(notes["log"], number)
            assert theirs
            assert ours == pytest.approx(theirs, abs=1e-4)
    assert any(length % 1 for length in logged(told["log"], "response/length_mean"))


def test_what_is_saved_is_what_was_trained(shared: tuple[str, Path]) -> None:
    """T31: two model folders, under each way of sharing."""
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    out = shared[1] / "uneven"
    weights, _ = read(out)
    for part, kind, folder in (
        ("policy", AutoModelForCausalLM, out / "saved"),
        ("value", AutoModelForSequenceClassification, out / "saved" / VALUE_MODEL),
    ):
        for key, parameter in kind.from_pretrained(folder).named_parameters():
            assert torch.equal(parameter, weights[f"{part}.{key}"])


def test_what_is_saved_of_adapters_is_what_was_trained(shared: tuple[str, Path]) -> None:
    from safetensors.torch import load_file

    out = shared[1] / "lora"
    weights, _ = read(out)
    for part, folder in (("policy", out / "saved"), ("value", out / "saved" / VALUE_MODEL)):
        saved = load_file(folder / "adapter_model.safetensors")
        trained = {
            re.sub(rf"^{part}\.|\.default|\.modules_to_save", "", name): weight
            for name, weight in weights.items()
            if name.startswith(f"{part}.") and re.search("lora_|modules_to_save", name)
        }
        assert saved.keys() == trained.keys()
        assert all(torch.equal(saved[name], weight) for name, weight in trained.items())


def test_a_run_goes_on_exactly_in_the_middle_of_a_rollout(shared: tuple[str, Path]) -> None:
    """T30 with two processes."""
    _, told = read(shared[1] / "uneven")
    assert told["resumed_state"]
    assert told["resumed_off"] == 0


def test_zero3_gathers_the_policy_alone_and_survives_a_failure(shared: tuple[str, Path]) -> None:
    """T33: training, which the first test compares, went on after a generation that failed."""
    kind, out = shared
    _, told = read(out / "uneven")
    is_split = kind == "zero3"
    assert told["whole"] == {"policy": [True], "value": [not is_split]}
    assert told["whole_after"] == [not is_split]
    assert told["hooks_meanwhile"] == 0
    assert told["hooks"] == told["hooks_after"]
    assert (told["hooks"] > 0) == is_split


def test_reference_and_policy_agree_in_bfloat16(shared: tuple[str, Path]) -> None:
    """T8: DeepSpeed keeps some of a model in float32, and must do so in both."""
    log = json.loads((shared[1] / "half.json").read_text())["log"]
    assert log[0]["objective/kl"] == 0
    assert log[0]["val/first_ratio_off"] == 0


def test_a_broken_step_is_left_out_by_all_or_ends_the_run_of_all(shared: tuple[str, Path]) -> None:
    kind, out = shared
    for rank in (0, 1):
        found = json.loads((out / f"guard_{rank}.json").read_text())
        if kind == "ddp":
            assert found == {"moved": False, "skipped": 4, "told": ""}
        else:
            assert "step 0: the loss is" in found["told"]


def test_a_model_that_could_not_be_saved_is_not_trained() -> None:
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config={"zero_optimization": {"stage": 3}})
    accelerator = SimpleNamespace(state=SimpleNamespace(deepspeed_plugin=plugin))
    with pytest.raises(UserError, match="gather_16bit_weights_on_model_save must be true"):
        require_that_weights_are_saved(accelerator)


def stage_losses(job: Job, processes: int) -> list[float]:
    """Losses of the stage, run here or by workers."""
    if processes == 1:
        carried_out(job)
    else:
        job.out.mkdir(parents=True)
        given = job.out.parent / "job.json"
        write_json(given, job.to_json(job.out))
        several = Launch(kind=LaunchKind.torchrun, nproc_per_node=processes)
        argv = launch.command("align.worker", [str(given)], several)
        launch.run(argv, "ppo", job.out.parent / "ppo.log", processes)
    assert (job.out / "manifest.json").is_file()
    assert (job.out / VALUE_MODEL / "model.safetensors").is_file()
    rows = [json.loads(line) for line in (job.out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


def test_the_stage_loads_models_that_zero3_splits_at_once(tiny_model: Path, tmp_path: Path) -> None:
    """Models that are read while ZeRO-3 is on never were whole."""
    judge = tmp_path / "judge"
    saved_judge(tiny_model, judge)
    found = []
    for processes in (1, 2):
        config = Align(name="test", model=Model(path=str(tiny_model)), stages=["ppo"])
        config.ppo = PPO(
            Data(source="demo:prompts", limit=8),
            args=ARGS | {"use_cpu": True, "max_grad_norm": 1e4, "value_learning_rate": 1e-3},
            peft=Peft(),
            reward=Reward({"judge": Term("model", 1.0, {"path": str(judge)})}),
            value=str(judge),
        )
        config.paths.root = str(tmp_path / str(processes))
        config.deepspeed = ppo_ranks.deepspeed_of("zero3") if processes > 1 else None
        found.append(stage_losses(make_plan(config).jobs[0], processes))
    assert len(found[0]) == ARGS["num_rollouts"]
    assert all(math.isfinite(loss) for loss in found[0])
    assert found[1] == pytest.approx(found[0], abs=2e-5)


def saved_judge(model: Path, folder: Path) -> None:
    """A reward model with a random head, which is reward and critic at once."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    torch.manual_seed(0)
    judge = AutoModelForSequenceClassification.from_pretrained(
        model, num_labels=1, dtype=torch.float32
    )
    torch.nn.init.normal_(judge.score.weight, std=0.1)
    judge.save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
