"""What there is to choose from, read from files: the options of the groups, and the names in a table of the code.

Nothing is imported for it, so that `--help` and messages are as quick as they are complete.
"""

import ast
import dataclasses
from pathlib import Path
from typing import Any

from conf.schema import Scorer

CONF_DIR = Path(__file__).parent


def groups(schema: type[Any]) -> dict[str, list[str]]:
    """The groups that a program's configuration has a place for, each with its options, sorted.

    An experiment may set any key of a configuration with stages, so it has no field of its own.
    """
    # A reward model (Scorer) is a field `model` too, but none of the models in the group.
    fields = {field.name for field in dataclasses.fields(schema) if field.type is not Scorer}
    places = fields | ({"experiment", "data", "suite"} if "stages" in fields else set())
    return {
        folder.name: sorted(path.stem for path in folder.glob("*.yaml"))
        for folder in sorted(CONF_DIR.iterdir())
        if folder.name in places and folder.is_dir()
    }


def spelled(program: str, group: str, option: str) -> str:
    """A choice as it is written on the command line: `suite=local`, or `+experiment=demo` where none is the default."""
    from omegaconf import OmegaConf

    config: Any = OmegaConf.load(CONF_DIR / f"{program}.yaml")
    has_default = any(group in entry for entry in config.defaults if not isinstance(entry, str))
    return f"{'' if has_default else '+'}{group}={option}"


def listing(program: str, schema: type[Any]) -> str:
    """The groups for `--help`, a line each."""
    return "\n".join(
        f"{spelled(program, group, 'NAME')}: {', '.join(options)}"
        for group, options in groups(schema).items()
    )


def names_in(file: str, table: str) -> list[str]:
    """The keys of a dictionary that a module of this repository writes out, such as `evals/quantize.py`, `QUANTIZERS`.

    Raises:
        LookupError: when the file has no such dictionary.
    """
    path = CONF_DIR.parent / file
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.AnnAssign | ast.Assign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if ast.unparse(targets[0]) == table and isinstance(node.value, ast.Dict):
                keys = [key for key in node.value.keys if isinstance(key, ast.Constant)]
                return [str(key.value) for key in keys]
    raise LookupError(f"{path} has no dictionary {table}")
