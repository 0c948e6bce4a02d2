"""Open a model for measurement, in the format asked for, and free the device afterwards."""

import contextlib
import gc
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from conf.entry import UserError
from conf.schema import Model
from evals.gguf import convert, converted_folder
from evals.quantize import find, loading_options, trying
from reward.gguf import gguf_file, is_gguf
from reward.store import fingerprint
from reward.weights import content, is_local

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "spiece.model")
_WEIGHT_FILES = ("*.safetensors", "*.safetensors.index.json")


def check(model: Model, quantizer: str = "none") -> None:
    """Refuse a model that cannot be loaded in a format, before anything is. Looks at file names only.

    Raises:
        UserError: naming the file that is missing.
    """
    if not find(quantizer).merges and not model.adapter:
        raise UserError(
            f"the quantizer {quantizer!r} keeps an adapter apart from the weights, but model.adapter is not set"
        )
    if is_gguf(model.path):
        gguf_file(model.path)
    elif is_local(model.path):
        _check_folder(Path(model.path).expanduser())
    elif "/" not in model.path:
        raise UserError(f"model.path={model.path!r} is no folder here and no hub id (owner/name)")
    if model.chat_template and not Path(model.chat_template).is_file():
        raise UserError(f"model.chat_template: there is no file {model.chat_template}")
    if model.adapter and is_local(model.adapter):
        config = Path(model.adapter).expanduser() / "adapter_config.json"
        if not config.is_file():
            raise UserError(
                f"model.adapter={model.adapter} is not a PEFT adapter: {config} is missing"
            )
        if not (config.parent / "adapter_model.safetensors").is_file():
            raise UserError(
                f"model.adapter={model.adapter} has no adapter_model.safetensors; save it with "
                "`save_pretrained` of a recent PEFT (pickled weights are not loaded)"
            )


def _check_folder(folder: Path) -> None:
    if not folder.is_dir():
        raise UserError(f"model.path: there is no folder {folder}")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"model.path={folder} is not a Hugging Face model folder: config.json is missing"
        )
    if not any(any(folder.glob(pattern)) for pattern in _WEIGHT_FILES):
        raise UserError(
            f"model.path={folder} has no safetensors weights; convert them with "
            "`AutoModel.from_pretrained(folder).save_pretrained(folder)` (pickled weights are not loaded)"
        )
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES):
        raise UserError(
            f"model.path={folder} has no tokenizer (one of {', '.join(_TOKENIZER_FILES)}); "
            "copy the tokenizer files of its base model into the folder"
        )
    with (folder / "config.json").open(encoding="utf-8") as file:
        try:
            config = json.load(file)
        except ValueError as error:
            raise UserError(f"{folder / 'config.json'} is not JSON: {error}") from error
    if "auto_map" in config:
        raise UserError(
            f"model.path={folder} wants to run its own code (auto_map); that is not supported"
        )


def identity(model: Model, cache: Path) -> dict[str, Any]:
    """What a result depends on in a model: content hashes for local files, the commit for a hub id."""
    if is_gguf(model.path):
        weights = converted_folder(model.path, cache).name
    else:
        weights = content(model.path, model.revision, cache)
    return {
        "weights": weights,
        "adapter": model.adapter and content(model.adapter, None, cache),
        "dtype": model.dtype.value,
        "chat_template": model.chat_template and fingerprint(Path(model.chat_template)),
    }


def local_path(model: Model, cache: Path) -> str:
    """The path or hub id that `from_pretrained` understands; converts a GGUF on first use."""
    if is_gguf(model.path):
        return str(convert(model.path, cache))
    return os.path.expanduser(model.path)


def load_tokenizer(model: Model, cache: Path) -> Any:
    """The tokenizer, with the model's chat template replaced where the config says so, and a pad token."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(local_path(model, cache), revision=model.revision)
    if model.chat_template:
        tokenizer.chat_template = Path(model.chat_template).read_text(encoding="utf-8")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


@contextlib.contextmanager
def open_model(model: Model, quantizer: str, cache: Path) -> Iterator[tuple[Any, Any]]:
    """`(model, tokenizer)` on the accelerator if there is one, in evaluation mode.

    Call `free_device` when the last reference is gone.

    Raises:
        QuantizerUnavailable: when the quantizer cannot run here.
    """
    import torch

    with prepared(model, quantizer, cache) as ready:
        loaded = load(ready, quantizer)
        if quantizer != "none":  # some formats load, and only then find that they cannot run
            with trying(quantizer), torch.inference_mode():
                loaded(input_ids=torch.zeros((1, 8), dtype=torch.long, device=loaded.device))
        yield loaded, load_tokenizer(ready, cache)


@contextlib.contextmanager
def prepared(model: Model, quantizer: str, cache: Path) -> Iterator[Model]:
    """The model as `load` takes it: a GGUF as a folder, an adapter merged unless the format keeps it apart.

    Raises:
        QuantizerUnavailable: when the quantizer cannot run here; said before anything is converted.
    """
    check(model, quantizer)
    loading_options(quantizer)
    with contextlib.ExitStack() as stack:
        if model.adapter:
            model = replace(model, adapter=os.path.expanduser(model.adapter))
        if model.adapter and find(quantizer).merges:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="merged-"))
            merge_adapter(model, Path(folder), cache)
            model = replace(model, path=folder, revision=None, adapter=None)
        yield replace(model, path=local_path(model, cache))


def load(model: Model, quantizer: str, **further: Any) -> Any:
    """A `prepared` model in a format, in evaluation mode; `further` arguments go to `from_pretrained`.

    Raises:
        QuantizerUnavailable: when the quantizer cannot make it.
        UserError: when the files cannot be read.
    """
    import torch
    from transformers import AutoModelForCausalLM

    options = loading_options(quantizer) | further
    dtype = "auto" if model.dtype.value == "auto" else getattr(torch, model.dtype.value)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with trying(quantizer):
        try:
            loaded = AutoModelForCausalLM.from_pretrained(
                model.path, revision=model.revision, dtype=dtype, device_map=device, **options
            )
        except OSError as error:
            reason = str(error).strip().splitlines()[0]
            raise UserError(f"model.path={model.path} cannot be loaded: {reason}") from error
        if model.adapter:
            from peft import PeftModel

            # The model itself, with the adapter's layers inside: it is used like any other.
            loaded = PeftModel.from_pretrained(loaded, model.adapter).get_base_model()
        if convert := find(quantizer).convert:
            with torch.inference_mode():
                convert(loaded)
    return loaded.eval()


def free_device() -> None:
    """Give back the memory of models that nothing refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def dtype_name(model: Model, config: Any) -> str:
    """The number format of a model's weights, such as `bfloat16`: for `auto`, that in which they are stored.

    Args:
        model: as asked for.
        config: its transformers config.
    """
    if model.dtype.value != "auto":
        return model.dtype.value
    return str(getattr(config, "dtype", None) or "float32").removeprefix("torch.")


def merge_adapter(model: Model, out: Path, cache: Path, is_classifier: bool = False) -> None:
    """Write `model` with its adapter merged to `out`. The sum is formed in float32, then rounded once to the dtype."""
    import torch
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

    source = local_path(model, cache)
    options: dict[str, Any] = {"revision": model.revision, "dtype": torch.float32}
    if is_classifier:
        base = AutoModelForSequenceClassification.from_pretrained(source, num_labels=1, **options)
    else:
        base = AutoModelForCausalLM.from_pretrained(source, **options)
    merged = PeftModel.from_pretrained(base, model.adapter).merge_and_unload(safe_merge=True)
    config = AutoConfig.from_pretrained(source, revision=model.revision)
    dtype = getattr(torch, dtype_name(model, config))
    tokenizer = load_tokenizer(model, cache)
    if is_classifier:  # it finds the last token by its pad id, and refuses batches without one
        merged.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    merged.to(dtype).save_pretrained(out)
    tokenizer.save_pretrained(out)
