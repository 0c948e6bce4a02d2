"""Check the arguments that are passed through to TRL and PEFT, without importing either.

Importing one TRL config class costs seconds, so the fields are read from the installed source with `ast`. A test pins
that the list equals `dataclasses.fields`.
"""

import ast
import difflib
import functools
import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

# The config classes, as (module path, class), from the class itself up to the last base that has fields.
_TRAINING_ARGUMENTS = ("transformers.training_args", "TrainingArguments")
_TRL_BASE = ("trl.trainer.base_config", "_BaseConfig")

DELEGATES: dict[str, list[tuple[str, str]]] = {
    "sft": [("trl.trainer.sft_config", "SFTConfig"), _TRL_BASE, _TRAINING_ARGUMENTS],
    "rm": [("trl.trainer.reward_config", "RewardConfig"), _TRL_BASE, _TRAINING_ARGUMENTS],
    "dpo": [("trl.trainer.dpo_config", "DPOConfig"), _TRL_BASE, _TRAINING_ARGUMENTS],
    "ppo": [("align.ppo.config", "PPOConfig"), _TRAINING_ARGUMENTS],
    "lora": [
        ("peft.tuners.lora.config", "LoraConfig"),
        ("peft.config", "PeftConfig"),
        ("peft.config", "PeftConfigMixin"),
    ],
}

PEFT_METHODS = ["lora"]  # which of them are PEFT's

# What the harness sets itself; a value from the user would be overwritten or break the artifact.
OWNED: dict[str, str] = {
    "output_dir": "the artifact cache decides where a stage writes; set paths.root",
    "run_name": "a run is named after its experiment and stage; set name",
    "deepspeed": "choose it with deepspeed=zero1|zero2|zero3",
    "report_to": "W&B is fed from the records; set track.wandb",
    "do_train": "a stage always trains",
    "chat_template_path": "set model.chat_template, which every stage and evaluation then uses",
    "resume_from_checkpoint": "a stage that was killed goes on by itself from its last checkpoint",
    "push_to_hub": "publish the artifact folder with `hf upload`",
    "hub_token": "nothing is pushed; hubs are read with HF_TOKEN from the environment",
    "task_type": "the stage decides it",
    "inference_mode": "the stage decides it",
    "base_model_name_or_path": "the stage decides it",
    "peft_type": "choose it with peft=…",
}

_BASIC: dict[str, tuple[type, ...]] = {
    "float": (int, float),
    "int": (int,),
    "bool": (bool,),
    "str": (str,),
    "None": (type(None),),
    "dict": (dict,),
    "list": (list,),
}


def fields_of(delegate: str) -> dict[str, ast.expr]:
    """Field names of a delegate's config class, with their annotations."""
    return {name: item.annotation for name, item in _items_of(delegate).items()}


def default_of(delegate: str, field: str) -> Any:
    """The plain default (number, text, truth, None) of a delegate's field.

    Raises:
        LookupError: if the field does not exist or its default is not plain.
    """
    value = _items_of(delegate)[field].value
    if isinstance(value, ast.Call):  # dataclasses.field(default=…)
        value = next((word.value for word in value.keywords if word.arg == "default"), None)
    if not isinstance(value, ast.Constant):
        raise LookupError(f"{delegate}.{field} has no plain default")
    return value.value


def _items_of(delegate: str) -> dict[str, ast.AnnAssign]:
    found: dict[str, ast.AnnAssign] = {}
    for module, name in DELEGATES[delegate]:
        for field, item in _class_fields(module, name).items():
            found.setdefault(field, item)
    return found


@functools.cache
def _class_fields(module: str, name: str) -> dict[str, ast.AnnAssign]:
    package, _, rest = module.partition(".")
    spec = importlib.util.find_spec(package)  # a top-level name: nothing is imported
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"{package} is not installed; run `make install`")
    path = Path(spec.origin).parent.joinpath(*rest.split(".")).with_suffix(".py")
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return {
                item.target.id: item
                for item in node.body
                if isinstance(item, ast.AnnAssign)
                and isinstance(item.target, ast.Name)
                and not ast.unparse(item.annotation).startswith("ClassVar")
            }
    raise LookupError(f"{path} has no class {name}")


def problems(delegate: str, args: Mapping[str, Any], where: str) -> list[str]:
    """What is wrong with `args`, one sentence each; empty when all is well.

    Args:
        delegate: a key of `DELEGATES`.
        args: the arguments under the delegate's own names.
        where: the dotted path that the user wrote, such as `dpo.args`.
    """
    known = fields_of(delegate)
    found = []
    for key, value in args.items():
        if key in OWNED:
            found.append(f"{where}.{key} is set by the harness: {OWNED[key]}.")
        elif key not in known:
            owner = DELEGATES[delegate][0][1]
            found.append(
                f"{where}.{key}: {owner} has no argument {key!r}.{did_you_mean(key, known)}"
            )
        elif value is False and key.endswith("_strategy"):
            found.append(f"{where}.{key}: YAML reads a bare no as false; write it as 'no'.")
        elif not _fits(value, known[key]):
            found.append(f"{where}.{key}={value!r} is not of type {ast.unparse(known[key])}.")
    return found


def _fits(value: Any, annotation: ast.expr) -> bool:
    """Whether a YAML value can be of the annotated type; True where the annotation is not a plain one."""
    if isinstance(annotation, ast.BinOp) and isinstance(annotation.op, ast.BitOr):
        return _fits(value, annotation.left) or _fits(value, annotation.right)
    if isinstance(annotation, ast.Subscript):
        outer = ast.unparse(annotation.value)
        if outer in ("Optional", "typing.Optional"):
            return value is None or _fits(value, annotation.slice)
        if outer in ("Union", "typing.Union") and isinstance(annotation.slice, ast.Tuple):
            return any(_fits(value, option) for option in annotation.slice.elts)
        annotation = annotation.value  # list[str] → list, dict[str, Any] → dict
    types = _BASIC.get(ast.unparse(annotation))
    if types is None:
        return True
    if isinstance(value, bool):  # bool is an int in Python, not in a config
        return bool in types
    return isinstance(value, types)


def did_you_mean(wrong: str, known: Any) -> str:
    """` Did you mean 'beta'?`, or an empty string when nothing is near."""
    near = difflib.get_close_matches(wrong, list(known), n=1, cutoff=0.6)
    return f" Did you mean {near[0]!r}?" if near else ""
