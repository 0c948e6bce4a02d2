"""The command line: what is neither KEY=VALUE nor a flag of Hydra's is answered with what to write instead."""

import dataclasses
import difflib
import itertools
import re
import types
import typing
from typing import Any

from conf.choices import groups, spelled

# Hydra's own; a test compares them with its parser.
FLAGS = {
    "--help", "-h", "--hydra-help", "--version", "--resolve", "--run", "-r", "--multirun", "-m", "--shell-completion",
    "-sc",
}  # fmt: skip
FLAGS_WITH_VALUE = {
    "--cfg", "-c", "--package", "-p", "--config-path", "-cp", "--config-name", "-cn", "--config-dir", "-cd",
    "--experimental-rerun", "--info", "-i",
}  # fmt: skip

# `dpo.args.weight_decay=0.1` must work without Hydra's `+`: these dictionaries take any key, a delegate's own or the
# name of a task or metric.
_PASSTHROUGH = re.compile(r"^(?=[a-z_.0-9]+\.(?:args|gen_kwargs|margins|clusters)\.)")

# An entry by a name of the user's, such as `suite.prompts.mine.source=FILE` or `reward.terms.mine.args.path=FOLDER`:
# OmegaConf can make a typed entry of a dictionary out of a whole value only.
_NAMED = re.compile(
    r"^\+{0,2}([a-z_.0-9-]+\.(?:prompts|texts|terms))\.([\w-]+)\.(\w+(?:\.\w+)*)=(.*)$", re.DOTALL
)


def arranged(given: list[str]) -> list[str]:
    """The command line as Hydra's parser takes it: flags first, passed-through keys with `++`."""
    overrides = [argument for argument in given if _is_override(argument)]
    flags = [argument for argument in given if argument not in overrides]
    if "--info" in flags:  # its value is optional: what follows would be taken for it
        flags[flags.index("--info")] = "--info=all" if flags[-1] == "--info" else "--info"
    return flags + [_PASSTHROUGH.sub("++", override) for override in _gathered(overrides)]


def _is_override(argument: str) -> bool:
    return argument.startswith(("+", "~")) or ("=" in argument and not argument.startswith("-"))


def _gathered(overrides: list[str]) -> list[str]:
    """The overrides, those of one named set as one: `++suite.prompts={mine:{source:FILE,limit:9}}`.

    Several values of a key become several such sets, which Hydra takes for a sweep.
    """
    kept: list[str] = []
    named: dict[tuple[str, str], dict[str, list[str]]] = {}
    for override in overrides:
        if found := _NAMED.match(override):
            place, name, key, value = found.groups()
            named.setdefault((place, name), {})[key] = _values(value)
        else:
            kept.append(override)
    for (place, name), given in named.items():
        sets = [
            f"{{{name}:{_braced(_nested(dict(zip(given, values, strict=True))))}}}"
            for values in itertools.product(*given.values())
        ]
        kept.append(f"++{place}={','.join(sets)}")
    return kept


def _values(text: str) -> list[str]:
    """The values of a discrete sweep, each as it was typed; anything else as it is."""
    if "," not in text and "(" not in text:
        return [text]
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    try:
        override = OverridesParser.create().parse_override(f"key={text}")
    except HydraException:  # it is said where the whole command line is read
        return [text]
    return list(override.sweep_string_iterator()) if override.is_discrete_sweep() else [text]


def _nested(values: dict[str, str]) -> dict[str, Any]:
    """Values by their dotted keys, as dictionaries in one another."""
    tree: dict[str, Any] = {}
    for key, value in values.items():
        *parents, leaf = key.split(".")
        node = tree
        for parent in parents:
            inner = node.get(parent)
            node[parent] = node = inner if isinstance(inner, dict) else {}
        node[leaf] = value
    return tree


def _braced(value: Any) -> str:
    """Nested dictionaries as Hydra writes them; what is in them is as it was typed."""
    if not isinstance(value, dict):
        return str(value)
    return "{" + ",".join(f"{key}:{_braced(inner)}" for key, inner in value.items()) + "}"


def problem(given: list[str], program: str, schema: type[Any]) -> str | None:
    """What to write instead of the first argument that Hydra would not take; None when there is none.

    Args:
        given: the command line after the program's name.
        program: the primary config's name.
        schema: the dataclass that it must fit.
    """
    for before, argument, after in zip(["", *given], given, [*given[1:], ""], strict=False):
        flag, _, value = argument.partition("=")
        if flag in FLAGS | FLAGS_WITH_VALUE or before in FLAGS_WITH_VALUE:
            continue
        if argument.startswith("-"):
            following = "" if after.startswith("-") or _is_override(after) else after
            better = _for_flag(flag.strip("-"), value or following, program, schema)
        elif "=" not in argument and not argument.startswith("~"):
            better = _for_word(argument.lstrip("+"), program, schema)
        else:
            continue
        hint = f"Did you mean {better}?" if better else _first_steps(program, schema)
        return f"options are KEY=VALUE, not {argument!r}. {hint}"
    return None


def _for_flag(name: str, value: str, program: str, schema: type[Any]) -> str | None:
    """`--model x` → `model.path=x`."""
    name, paths, choices = name.replace("-", "_"), key_paths(schema), groups(schema)
    if name not in paths and name not in choices:
        leaves = [path for path in paths if path.endswith(f".{name}")]
        near = leaves or difflib.get_close_matches(name, [*paths, *choices], n=1)
        if not near:
            return None
        name = near[0]
    if name in choices and (value in choices[name] or name not in paths):
        return spelled(program, name, value or "NAME")
    return (
        f"{name}.path={value or 'PATH'}"
        if f"{name}.path" in paths
        else f"{name}={value or 'VALUE'}"
    )


def _for_word(word: str, program: str, schema: type[Any]) -> str | None:
    """`demo` → `+experiment=demo`."""
    choices, paths = groups(schema), key_paths(schema)
    # A complete configuration first: it is what one starts with.
    ordered = sorted(choices.items(), key=lambda item: item[0] != "experiment")
    for cutoff in (1.0, 0.6):
        for group, options in ordered:
            if near := difflib.get_close_matches(word, options, n=1, cutoff=cutoff):
                return spelled(program, group, near[0])
        if word in paths or word in choices:
            return _for_flag(word, "", program, schema)
    if "/" in word and "model.path" in paths:
        return f"model.path={word}"
    return None


def _first_steps(program: str, schema: type[Any]) -> str:
    if experiments := groups(schema).get("experiment"):
        chosen = spelled(program, "experiment", "NAME")
        return f"Choose a complete configuration with {chosen}: {', '.join(experiments)}"
    return "--help shows examples"


def key_paths(schema: type[Any], prefix: str = "") -> list[str]:
    """Every dotted key of a schema dataclass, such as `dpo.data.source`."""
    paths = []
    for name, hint in typing.get_type_hints(schema).items():
        paths.append(prefix + name)
        options = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
        for option in options:
            if dataclasses.is_dataclass(option) and isinstance(option, type):
                paths += key_paths(option, f"{prefix}{name}.")
    return paths
