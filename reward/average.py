"""`python -m reward.average OUT MODEL MODEL…`: the weights of several models, averaged.

Reward models that were fine-tuned from one checkpoint can be averaged weight by weight: at the cost of one model, the
average keeps what the members have in common and forgets what each learnt by heart (WARM: Ramé et al. 2024,
arXiv:2401.12187). Models of different ancestry have no such average, which no check can tell from the files.
"""

import argparse
import math
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from conf.entry import UserError, plainly
from reward.classifier import identity
from reward.store import MANIFEST, build_once, content_key, is_complete, read_json

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_COPIED = {".json", ".jinja", ".model", ".txt", ".tiktoken"}  # endings of what is not weights
# Of config.json, what says nothing about the function that the weights compute.
_INCIDENTAL = {"_name_or_path", "transformers_version", "use_cache"}


def average(out: Path, folders: Sequence[Path], weights: Sequence[float] | None = None) -> Path:
    """Write the average of models to `out`, complete or not at all; the tensors of one file are in memory at a time.

    Args:
        out: folder of the new model, which must not be there; one that the same call made is left as it is.
        folders: of models with safetensors weights.
        weights: of each model, in any unit; None: all alike.

    Raises:
        UserError: when the models do not fit together, naming the difference, or `out` is something else.
    """
    shares = _shares(weights, len(folders))
    for folder in folders:
        if not (folder / "config.json").is_file():
            raise UserError(f"{folder} is not a Hugging Face model folder: config.json is missing")
    files = [_files(folder) for folder in folders]
    for folder, other in zip(folders[1:], files[1:], strict=True):
        if found := [*_differences(folders[0], folder), *_other_tensors(files[0], other)]:
            raise UserError(
                f"{folder} and {folders[0]} cannot be averaged:\n  " + "\n  ".join(found)
            )
    models = [identity(str(folder)) for folder in folders]
    key = content_key(["average", models, shares])
    if out.exists() and not (is_complete(out) and read_json(out / MANIFEST).get("key") == key):
        raise UserError(
            f"{out} is there and is not the average of these models: choose another folder"
        )

    def build(partial: Path) -> dict[str, Any]:
        _copy(folders[0], partial)
        _write(partial, files, shares)
        parts = zip(folders, models, shares, strict=True)
        members = [{"model": str(f), "weights": name, "share": s} for f, name, s in parts]
        return {"key": key, "stage": "average", "members": members}

    return build_once(out, build)


def _shares(weights: Sequence[float] | None, models: int) -> list[float]:
    """The weights with the sum one."""
    if models < 2:
        raise UserError("an average needs at least two models")
    given = [1.0] * models if weights is None else list(weights)
    if len(given) != models:
        raise UserError(f"there are {len(given)} weights for {models} models")
    total = math.fsum(given)
    if not (all(math.isfinite(w) and w >= 0 for w in given) and total > 0):
        raise UserError(f"the weights {given} must be numbers, 0 or more, and not all 0")
    return [weight / total for weight in given]


def _files(folder: Path) -> dict[str, Path]:
    """Name of each tensor → the safetensors file that holds it.

    Raises:
        UserError: when there is none, or one is missing or cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    index = folder / _INDEX
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else [_WHOLE]
    found: dict[str, Path] = {}
    for name in names:
        path = folder / name
        try:
            with safe_open(path, framework="pt") as file:
                found |= dict.fromkeys(file.keys(), path)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path} is missing or cannot be read: {error}") from error
    return found


def _differences(first: Path, other: Path) -> Iterator[str]:
    """What keeps the tokens of one model from meaning the same to the other."""
    configs = [read_json(folder / "config.json") for folder in (first, other)]
    yield from _unequal("config.json", configs[0], configs[1], _INCIDENTAL)
    ours, theirs = _tokenizer(first), _tokenizer(other)
    yield from (f"the {name} differs" for name in ours if ours[name] != theirs[name])


def _unequal(name: str, one: Any, other: Any, ignored: set[str]) -> Iterator[str]:
    """Keys of two objects whose values differ, with the values."""
    for key in sorted((one.keys() | other.keys()) - ignored):
        values = [str(side.get(key, "absent")) for side in (one, other)]
        if values[0] != values[1]:
            yield f"{name}: {key} is {values[1][:60]}, not {values[0][:60]}"


def _tokenizer(folder: Path) -> dict[str, Any]:
    """What decides which tokens a conversation becomes."""
    import json

    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"the tokenizer of {folder} cannot be loaded: {reason}") from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = json.loads(backend.to_str()) if backend is not None else {}
    for state in ("padding", "truncation"):  # of the last call, not of the tokenizer
        rules.pop(state, None)
    return {
        "tokenizer's vocabulary": tokenizer.get_vocab(),
        "tokenizer's set of special tokens": tokenizer.special_tokens_map,
        "tokenizer's rules": rules,
        "chat template": tokenizer.chat_template,
    }


def _other_tensors(ours: Mapping[str, Path], theirs: Mapping[str, Path]) -> Iterator[str]:
    """Tensors that only one has, or that have another shape or number format; the first few."""
    if one_sided := sorted(ours.keys() ^ theirs.keys()):
        yield f"tensors that only one has: {', '.join(one_sided[:3])} ({len(one_sided)} in all)"
    kinds = [_kinds(files) for files in (ours, theirs)]
    different = [name for name in ours if name in theirs and kinds[0][name] != kinds[1][name]]
    for name in different[:3]:
        yield f"tensor {name} is {kinds[1][name]}, not {kinds[0][name]}"


def _kinds(files: Mapping[str, Path]) -> dict[str, str]:
    """Number format and shape of each tensor."""
    from safetensors import safe_open

    found = {}
    for path in sorted(set(files.values())):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  # it is no dictionary
                part = file.get_slice(name)
                found[name] = f"{part.get_dtype()} {part.get_shape()}"
    return found


def _copy(folder: Path, out: Path) -> None:
    """All of the first model that is not weights."""
    for file in folder.iterdir():
        if file.is_file() and file.suffix in _COPIED and file.name != MANIFEST:
            shutil.copyfile(file, out / file.name)
    if (templates := folder / "additional_chat_templates").is_dir():
        shutil.copytree(templates, out / templates.name)


def _write(out: Path, files: Sequence[Mapping[str, Path]], shares: Sequence[float]) -> None:
    """The averaged tensors, in files like those of the first model."""
    from contextlib import ExitStack

    from safetensors import safe_open
    from safetensors.torch import save_file

    with ExitStack() as stack:
        paths = {path for each in files for path in each.values()}
        open_files = {p: stack.enter_context(safe_open(p, framework="pt")) for p in sorted(paths)}
        for path in sorted(set(files[0].values())):
            tensors = {}
            for name in open_files[path].keys():  # noqa: SIM118  # it is no dictionary
                sides = [open_files[each[name]].get_tensor(name) for each in files]
                tensors[name] = _mean(name, sides, shares)
            save_file(tensors, out / path.name, open_files[path].metadata())


def _mean(name: str, tensors: Sequence[Any], shares: Sequence[float]) -> Any:
    """The weighted mean, summed in float32 (float64 for float64) from the first one on: equals stay bit by bit."""
    import torch

    first = tensors[0]
    if not first.is_floating_point():
        if not all(torch.equal(first, other) for other in tensors[1:]):
            raise UserError(
                f"tensor {name} holds {first.dtype} numbers that differ: they have no average"
            )
        return first
    wide = torch.promote_types(first.dtype, torch.float32)
    start = first.to(wide)
    off = torch.zeros_like(start)
    for tensor, share in zip(tensors[1:], shares[1:], strict=True):
        off += share * (tensor.to(wide) - start)
    if not bool(torch.isfinite(start + off).all()):
        raise UserError(f"tensor {name} is not finite in every model: leave out the broken one")
    return torch.where(off == 0, start, start + off).to(first.dtype)  # −0 + 0 would be +0


def main() -> None:
    """Average the weights of models that were fine-tuned from one checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m reward.average",
        description=main.__doc__,
        epilog="example: python -m reward.average rm-average rm-seed0 rm-seed1 rm-seed2",
    )
    parser.add_argument("out", metavar="OUT", type=Path, help="folder of the new model")
    parser.add_argument("models", metavar="MODEL", nargs="+", type=Path, help="model folder")
    parser.add_argument(
        "--weights", type=float, nargs="+", metavar="W", help="of each model; default: all alike"
    )
    given = parser.parse_args()
    with plainly():
        folders = [Path(os.path.expanduser(folder)) for folder in given.models]
        print(average(Path(os.path.expanduser(given.out)), folders, given.weights))


if __name__ == "__main__":
    main()
