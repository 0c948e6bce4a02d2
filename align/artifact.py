"""What a stage makes: an ordinary Hugging Face model folder with a manifest.

A `Job` is named by what it depends on, so equal work is found again; a `Manifest` tells where a folder came from.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from conf.entry import built
from conf.schema import Dtype, Model, Peft, Probe, Reward
from reward.store import MANIFEST, read_json

SAMPLES = "samples.jsonl"  # what a policy wrote while it was trained


@dataclass(frozen=True)
class Job:
    """One training stage, ready to run: JSON in, a model folder out.

    `model` is what the stage starts from, `key` names the result, `out` is the folder that it belongs in.
    """

    stage: str
    key: str
    model: Model
    data: Path  # folders of data versions
    eval_data: Path | None
    args: dict[str, Any]
    peft: Peft
    deepspeed: dict[str, Any] | None
    parents: dict[str, str]
    out: Path
    cache: Path
    probe: Probe | None = None  # what is watched while the policy moves
    reward: Reward | None = None  # what the policy is moved toward
    value: str | None = None  # what the critic starts from; None: the policy

    def to_json(self, out: Path) -> dict[str, Any]:
        """The job as JSON, writing to `out`."""
        value = dataclasses.asdict(self)
        value["model"]["dtype"] = self.model.dtype.value
        paths = {name: value[name] and str(value[name]) for name in ("data", "eval_data", "cache")}
        return value | paths | {"out": str(out)}

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> "Job":
        """The job that `to_json` wrote."""
        fields = dict(value)
        fields["model"] = Model(**fields["model"] | {"dtype": Dtype(fields["model"]["dtype"])})
        fields["peft"] = Peft(**fields["peft"])
        fields["probe"] = fields.get("probe") and built(Probe, fields["probe"])
        fields["reward"] = fields.get("reward") and built(Reward, fields["reward"])
        for name in ("data", "eval_data", "out", "cache"):
            fields[name] = fields[name] and Path(fields[name])
        return cls(**fields)


@dataclass(frozen=True)
class Manifest:
    """Where a folder came from.

    `metrics` are the trainer's last values, `seconds` the stage's wall time, `rescored` how well the saved reward model
    gives the trainer's scores again.
    """

    stage: str
    key: str
    parents: dict[str, str]
    config: dict[str, Any]
    data: dict[str, Any]
    metrics: dict[str, float]
    parameters: dict[str, int]
    seconds: float
    provenance: dict[str, Any]
    rescored: dict[str, Any] | None = None

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """The manifest of a finished stage."""
        return cls(**read_json(folder / MANIFEST))
