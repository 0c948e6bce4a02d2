"""ZeRO-2 and ZeRO-3 on two real CPU ranks give the single-process result."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from align import launch
from align.artifact import Job
from conf.choices import CONF_DIR
from conf.schema import Data, Launch, LaunchKind, Model, Peft
from reward.data import prepare
from reward.store import write_json

pytestmark = pytest.mark.skipif(
    shutil.which("g++") is None, reason="DeepSpeed builds a CPU extension with g++"
)


def run(
    model: Path, folder: Path, processes: int, deepspeed: dict[str, Any] | None, peft: Peft
) -> list[float]:
    """Losses of two steps over 8 rows a step, whatever the number of processes."""
    out = folder / "out"
    out.mkdir(parents=True)
    job = Job(
        stage="dpo",
        key="test",
        model=Model(path=str(model)),
        data=prepare(Data(source="demo:preferences", limit=16), "preference", folder).folder,
        eval_data=None,
        args={
            "per_device_train_batch_size": 8 // processes,
            "max_steps": 2,
            "learning_rate": 1e-2,
            "max_length": 512,
            "logging_steps": 1,
            "seed": 0,
            "bf16": False,
            "gradient_checkpointing": False,
            "model_init_kwargs": {"dtype": "float32"},
        },
        peft=peft,
        deepspeed=deepspeed,
        parents={},
        out=out,
        cache=folder / "cache",
    )
    write_json(folder / "job.json", job.to_json(out))
    kind = LaunchKind.torchrun if processes > 1 else LaunchKind.inline
    argv = launch.command(
        "align.worker", [str(folder / "job.json")], Launch(kind=kind, nproc_per_node=processes)
    )
    launch.run(argv, "dpo", folder / "dpo.log", processes)
    assert (out / "manifest.json").is_file()
    assert (out / "model.safetensors").stat().st_size > 10_000
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [row["loss"] for row in rows if "loss" in row]


@pytest.mark.parametrize(
    ("stage", "peft"),
    [(2, Peft()), (3, Peft()), (3, Peft("lora", {"r": 4, "target_modules": "all-linear"}))],
    ids=["zero2", "zero3", "zero3-lora"],
)
def test_two_ranks_equal_one_process(
    tiny_model: Path, tmp_path: Path, stage: int, peft: Peft
) -> None:
    deepspeed = yaml.safe_load((CONF_DIR / "deepspeed" / f"zero{stage}.yaml").read_text())
    single = run(tiny_model, tmp_path / "single", 1, None, peft)
    double = run(tiny_model, tmp_path / "double", 2, deepspeed, peft)
    assert len(single) == 2
    assert single[0] != single[1]
    assert double == pytest.approx(single, abs=2e-5)
