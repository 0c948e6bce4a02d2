"""The door: compose the YAML over the schema, check it, hand dataclasses to the program.

Below this module nobody sees a `DictConfig`. Every mistake in a configuration is answered here, before anything heavy
is imported, in one message without a traceback.
"""

import contextlib
import dataclasses
import errno
import os
import re
import shutil
import sys
import typing
from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

from conf.arguments import arranged, key_paths, problem
from conf.choices import CONF_DIR, groups, listing, names_in
from conf.passthrough import DELEGATES, PEFT_METHODS, did_you_mean, problems
from conf.schema import Stage


class UserError(Exception):
    """Something that the user can put right. Shown as one message, without a traceback."""


class _Told(SystemExit):
    """The end of a program, or of one arm of a sweep, after a message."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


def entry(
    name: str, schema: type[Any]
) -> Callable[[Callable[[Any, list[str]], float | None]], Callable[[], None]]:
    """Make a program of `run(config, overrides)`, where `config` is a `schema` composed from `conf/NAME.yaml`.

    Args:
        name: the primary config's name; its schema is stored as `NAME_schema`.
        schema: the dataclass that the composed config must fit.

    Returns:
        A decorator. The decorated function takes no arguments, reads `sys.argv`, and exits with 0, with 2 after a
        user's mistake, or with 130 after Ctrl-C. What `run` returns is the objective that a Hydra sweeper sees.
    """

    def decorate(run: Callable[[Any, list[str]], float | None]) -> Callable[[], None]:
        def main() -> None:
            _let_help_list_choices(name, schema)
            with plainly(schema):
                if {"-h", "--help"} & set(sys.argv[1:]):
                    return print(_helped(name))
                if wrong := problem(sys.argv[1:], name, schema):
                    raise UserError(wrong)
                sys.argv[1:] = arranged(sys.argv[1:])
                _composed(name, schema, run)

        return main

    return decorate


def _composed(name: str, schema: type[Any], run: Callable[[Any, list[str]], float | None]) -> None:
    """Let Hydra read the command line, and run; once for each arm of a sweep."""
    import hydra
    from hydra.core.config_store import ConfigStore
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    failed: set[str] = set()

    def task(composed: Any) -> float | None:
        settings = HydraConfig.get()
        try:
            with plainly(schema):  # here too, or Hydra puts a line of its own before the message
                return run(typed(composed, schema), list(settings.overrides.task))
        except _Told as end:
            # The next arm may fare better, unless it is told the same.
            if settings.mode is not RunMode.MULTIRUN or end.message in failed:
                raise
            failed.add(end.message)
            raise UserError(
                "the sweep has arms that failed, as said above; the others are done"
            ) from end

    # Lets the exception reach `plainly` instead of Hydra's own printer.
    os.environ["HYDRA_FULL_ERROR"] = "1"
    ConfigStore.instance().store(name=f"{name}_schema", node=schema)
    hydra.main(version_base="1.3", config_path=str(CONF_DIR), config_name=name)(task)()


@contextlib.contextmanager
def plainly(schema: type[Any] | None = None) -> Iterator[None]:
    """Turn errors that a user can put right into one message on stderr and an exit code."""
    try:
        yield
    except UserError as error:
        _exit(str(error))
    except KeyboardInterrupt:
        print(
            "\ninterrupted: what is complete is kept, nothing is half made; the same command continues",
            file=sys.stderr,
        )
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(1)
    except Exception as error:
        message = _config_message(error, schema) or _disk_message(error)
        if message is None:
            raise
        _exit(message)


def _exit(message: str) -> typing.NoReturn:
    print(f"error: {message}", file=sys.stderr)
    raise _Told(message)


def _helped(name: str) -> str:
    """A program's help, from its own YAML alone: Hydra would compose everything, and read every group twice."""
    from omegaconf import OmegaConf

    return str(OmegaConf.load(CONF_DIR / f"{name}.yaml").hydra.help.template)


def _let_help_list_choices(name: str, schema: type[Any]) -> None:
    """What a program can choose from, and the names in a table of the code, as resolvers for the help in its YAML."""
    from omegaconf import OmegaConf

    OmegaConf.register_new_resolver("choices", lambda: listing(name, schema), replace=True)
    OmegaConf.register_new_resolver(
        "names", lambda *table: ", ".join(names_in(*table)), replace=True
    )


def typed(composed: Any, schema: type[Any]) -> Any:
    """The dataclass of a composed config, its passed-through arguments checked.

    Raises:
        UserError: naming every missing value and every argument that TRL or PEFT does not have.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import InterpolationResolutionError

    if "_target_" in _keys(OmegaConf.to_container(composed, resolve=False)):
        raise UserError(
            "a configuration may not contain _target_: it would let a config file run code"
        )
    for key in _unknown_keys(composed, schema):
        groups = sorted(path.name for path in CONF_DIR.iterdir() if path.is_dir())
        raise UserError(
            f"there is no key {key!r}.{did_you_mean(key, [*key_paths(schema), *groups])}"
        )
    missing = OmegaConf.missing_keys(composed) - _unused(composed)
    if missing:
        raise UserError(f"{_listed(missing)} must be set{_advice(missing, schema)}")
    for key in OmegaConf.missing_keys(composed):
        OmegaConf.update(composed, key, "", force_add=True)
    try:
        config = OmegaConf.to_object(composed)
    except InterpolationResolutionError as error:
        raise UserError(_first_line(error)) from error
    found = list(dict.fromkeys(_delegate_problems(config)))
    if found:
        raise UserError("\n       ".join(found))
    return config


def _advice(missing: set[str], schema: type[Any]) -> str:
    """What to choose, where a choice is what sets a missing key."""
    if "name" in missing:
        return "; choose a complete configuration with +experiment=NAME"
    if "suite.name" in missing:
        return f"; choose one with suite=NAME: {', '.join(groups(schema)['suite'])}"
    return ""


def plain(value: Any) -> Any:
    """A dataclass as JSON-like values, enums by value."""
    if isinstance(value, Enum):
        return value.value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)
        }
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [plain(item) for item in value]
    return value


def built(schema: type[Any], values: dict[str, Any]) -> Any:
    """The dataclass of which `plain` made `values`, with its enums and nested dataclasses."""
    from omegaconf import OmegaConf

    return OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(schema), values))


def _keys(value: Any) -> Iterator[str]:
    """Every key of nested dictionaries and lists."""
    if isinstance(value, dict):
        yield from (str(key) for key in value)
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from _keys(item)


def _unknown_keys(node: Any, schema: type[Any], prefix: str = "") -> Iterator[str]:
    """Keys that no field takes. Hydra lets `+key=value` add them, even to typed nodes."""
    fields = {field.name for field in dataclasses.fields(schema)}
    for key in node:
        if key not in fields:
            yield f"{prefix}{key}"
            continue
        yield from _unknown_below(node._get_node(key), f"{prefix}{key}.")


def _unknown_below(child: Any, prefix: str) -> Iterator[str]:
    """The same in a dataclass, and in a dictionary of them."""
    from omegaconf import DictConfig, OmegaConf

    if not isinstance(child, DictConfig) or child._is_none() or child._is_interpolation():
        return
    kind = OmegaConf.get_type(child)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        yield from _unknown_keys(child, kind, prefix)
        return
    for name in child:
        yield from _unknown_below(child._get_node(name), f"{prefix}{name!s}.")


def _unused(composed: Any) -> set[str]:
    """Missing keys below stages that the experiment does not run."""
    from omegaconf import OmegaConf

    if "stages" not in composed:
        return set()
    idle = [key for key in DELEGATES if key in composed and key not in composed.stages]
    return {key for key in OmegaConf.missing_keys(composed) if key.split(".")[0] in idle}


def _delegate_problems(config: Any) -> Iterator[str]:
    kinds = [
        field.name
        for field in dataclasses.fields(config)
        if isinstance(field.type, type) and issubclass(field.type, Stage)
    ]
    for stage in getattr(config, "stages", []):
        if stage not in kinds:
            hint = did_you_mean(stage, kinds)
            yield f"stages: there is no stage {stage!r}.{hint} There are: {', '.join(kinds)}"
            continue
        part = getattr(config, stage)
        yield from problems(stage, part.args, f"{stage}.args")
        if not (is_own := part.peft.method != config.peft.method):
            yield from _peft_problems(config.peft.method, config.peft.args, "peft")
        shared = {} if is_own else config.peft.args
        own = {k: v for k, v in part.peft.args.items() if k not in shared or shared[k] != v}
        if is_own or own:
            yield from _peft_problems(part.peft.method, own, f"{stage}.peft")


def _peft_problems(method: str, args: dict[str, Any], where: str) -> Iterator[str]:
    if method in PEFT_METHODS:
        yield from problems(method, args, f"{where}.args")
    elif method != "none":
        yield f"{where}.method: there is no method {method!r}. There are: none, {', '.join(PEFT_METHODS)}"
    elif args:
        yield f"{where}.args has no meaning without a method: choose one with peft=NAME, or all weights with peft=none"


def _config_message(error: BaseException, schema: type[Any] | None) -> str | None:
    """One message for an error of Hydra or OmegaConf; None when it is something else."""
    from hydra.errors import HydraException, MissingConfigException
    from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException
    from yaml import YAMLError

    if isinstance(error, ValueError) and "--multirun, --cfg" in str(error):
        return _first_line(error)
    if isinstance(error, YAMLError):
        place = getattr(error, "problem_mark", None)
        where = f"{place.name}, line {place.line + 1}" if place else "a configuration file"
        return f"{where} is not YAML: {getattr(error, 'problem', None) or _first_line(error)}"
    if isinstance(error, AssertionError) and "Unexpected type for root" in str(error):
        return (
            "a part of something optional is set, which is null until it is chosen: "
            "such as model@reference=path reference.path=PATH"
        )
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return None
    cause = error.__cause__ if isinstance(error.__cause__, OmegaConfBaseException) else error
    if isinstance(error, MissingConfigException):
        return _missing_option(error)
    text = _first_line(error)
    if group := re.match(r"Could not override '(\w+)'\. No match in the defaults list", text):
        return f"nothing is chosen from {group[1]!r} yet that could be replaced: write +{group[1]}=NAME"
    if isinstance(cause, ConfigKeyError | ConfigAttributeError) and schema is not None:
        wrong = str(getattr(cause, "full_key", "") or getattr(cause, "key", ""))
        full = re.search(r"Could not override '([^']+)'", str(error))
        key = full.group(1) if full else wrong
        paths = key_paths(schema)
        hint = did_you_mean(wrong, [path for path in paths if path.count(".") == wrong.count(".")])
        return f"there is no key {key!r}.{hint or did_you_mean(key, paths)}"
    if cause is not error:
        key = getattr(cause, "full_key", None)
        text = f"{key}: {_first_line(cause)}" if key else f"{text}: {_first_line(cause)}"
    return text


def _disk_message(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        place = error.filename or "while writing"
        return f"the disk is full ({place}): free some space or set paths.root to another disk"
    if isinstance(error, shutil.Error) and os.strerror(errno.ENOSPC) in str(error):  # of copytree
        return "the disk is full: free some space or set paths.root to another disk"
    if isinstance(
        error, PermissionError | NotADirectoryError | IsADirectoryError | FileExistsError
    ):
        return f"{error.filename} cannot be used: {error.strerror}; name another place or put its rights in order"
    return None


def _missing_option(error: Exception) -> str:
    """`+experiment=dpo_qwenn` → the nearest experiment, and the whole list."""
    asked = re.search(r"Could not find '([^']+)'", str(error))
    listed = re.search(r"Available options in '[^']*':\n((?:\t.*\n?)+)", str(error))
    if not asked or not listed:
        return _first_line(error)
    options = listed.group(1).split()
    group, _, name = asked.group(1).rpartition("/")
    hint = did_you_mean(name, options)
    return (
        f"there is no {group or 'config'} {name!r}.{hint} There are: {', '.join(sorted(options))}"
    )


def _first_line(error: BaseException) -> str:
    first, *rest = str(error).strip().splitlines()
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names))
