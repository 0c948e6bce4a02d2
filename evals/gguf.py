"""GGUF files as ordinary model folders: dequantized once, kept, reused."""

from pathlib import Path
from typing import Any

from reward.gguf import gguf_file
from reward.store import build_once, fingerprint, is_complete


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
