"""Reward models out of what is on disk: a folder, a LoRA adapter with its head, or a hub id."""

import json
import os
from pathlib import Path
from typing import Any

from conf.entry import UserError
from reward.store import content_key
from reward.weights import content, hub_commit, is_local

DTYPES = ("float32", "bfloat16")

_ADAPTER = "adapter_model.safetensors"
_PREFIX = "base_model.model."  # of PEFT, before the names of the weights that it wraps


def open_classifier(path: str, revision: str | None, dtype: str) -> tuple[Any, Any]:
    """A sequence classifier with one label on the accelerator if there is one, and its tokenizer.

    An adapter is merged into its base in float32 and rounded afterwards.

    Raises:
        UserError: when there is no such model, or it is no reward model.
    """
    check(path, dtype)
    adapter = Path(os.path.expanduser(path))
    is_adapter = (adapter / "adapter_config.json").is_file()
    try:
        model, tokenizer = _merged(adapter, dtype) if is_adapter else _load(path, revision, dtype)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} cannot be loaded as a reward model: {reason}") from error
    if tokenizer.chat_template is None:
        raise UserError(
            f"the tokenizer of {path} has no chat template; add the one with which the model was trained"
        )
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    if tokenizer.pad_token is None:
        raise UserError(
            f"the tokenizer of {path} has neither a pad nor an EOS token, by which the last token is found; "
            "set the pad token with which the model was trained"
        )
    return model.eval(), tokenizer


def identity(
    path: str, revision: str | None = None, cache: Path | None = None, commit: str | None = None
) -> str:
    """What names a reward model's bytes: a hash of what is loaded from a folder, the commit of a hub id.

    An adapter's base is in it. Of a model behind a server see `reward.ensemble.identity`.

    Args:
        path: a folder, an adapter or a hub id.
        revision: hub branch, tag or commit.
        cache: folder that remembers hashes of files.
        commit: of a hub id, where it is known; None: asked.

    Raises:
        UserError: when it is an adapter of something else than a reward model.
    """
    if not is_local(path):
        return f"{path}@{commit or hub_commit(path, revision)}"
    own = content(path, None, cache)
    folder = Path(os.path.expanduser(path))
    if not (folder / "adapter_config.json").is_file():
        return own
    config = _adapter_config(folder)
    base = identity(config["base_model_name_or_path"], config.get("revision"), cache)
    return content_key([own, base])


def check(path: str, dtype: str) -> None:
    """Refuse what is no model folder, adapter or hub id. Looks at file names only.

    Raises:
        UserError: saying what it is instead.
    """
    if dtype not in DTYPES:
        raise UserError(f"there is no dtype {dtype!r}. There are: {', '.join(DTYPES)}")
    folder = Path(os.path.expanduser(path))
    if folder.is_dir():
        if not any((folder / name).is_file() for name in ("config.json", "adapter_config.json")):
            raise UserError(f"{path} is not a Hugging Face model folder: config.json is missing")
    elif path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"there is no reward model {path!r}: give a model folder or a hub id (owner/name)"
        )


def _load(path: str, revision: str | None, dtype: str) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoTokenizer

    source = _source(path, revision)
    config = AutoConfig.from_pretrained(**source)
    kind = ", ".join(config.architectures or ["model without a known architecture"])
    if "ForSequenceClassification" not in kind or config.num_labels != 1:
        raise UserError(
            f"{path} is a {kind} with {config.num_labels} labels, not a reward model (a sequence classifier with one "
            "label); train one with the rm stage"
        )
    model, missing = _classifier(source, dtype)
    if missing:  # they would be random numbers
        raise UserError(f"{path} lacks weights: {', '.join(missing[:3])}")
    return model, AutoTokenizer.from_pretrained(**source)


def _merged(adapter: Path, dtype: str) -> tuple[Any, Any]:
    """An adapter's base model with its change in the weights, and the score head that was saved with it."""
    import torch
    from peft import PeftModel
    from transformers import AutoTokenizer

    config = _adapter_config(adapter)
    base = config["base_model_name_or_path"]
    source = _source(base, config.get("revision"))
    try:
        model, missing = _classifier(source, "float32")
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UserError(
            f"{adapter} is an adapter of {base}, which cannot be loaded: {reason}; put the path right in "
            "adapter_config.json (base_model_name_or_path)"
        ) from error
    saved = _names(adapter / _ADAPTER)
    if lost := [name for name in missing if _PREFIX + name not in saved]:
        raise UserError(
            f"{adapter} is an adapter without its score head ({', '.join(lost)}), and {base} has none: a fresh one "
            f"would be random numbers; train again with modules_to_save={[lost[0].split('.')[0]]}"
        )
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    has_tokenizer = (adapter / "tokenizer_config.json").is_file()
    tokenizer = AutoTokenizer.from_pretrained(
        **(_source(str(adapter), None) if has_tokenizer else source)
    )
    if tokenizer.pad_token_id is not None:  # as in training: TRL sets it, PEFT does not save it
        merged.config.get_text_config().pad_token_id = tokenizer.pad_token_id
    return merged.to(getattr(torch, dtype)), tokenizer


def _adapter_config(adapter: Path) -> dict[str, Any]:
    """The configuration of an adapter of a reward model.

    Raises:
        UserError: when it is something else, or has no weights that are safe to load.
    """
    try:
        config = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"{adapter / 'adapter_config.json'} is not JSON: {error}") from error
    if config.get("task_type") != "SEQ_CLS" or not config.get("base_model_name_or_path"):
        raise UserError(
            f"{adapter} is an adapter with task_type={config.get('task_type')!r} of "
            f"{config.get('base_model_name_or_path')!r}, not of a reward model (task_type SEQ_CLS with its base)"
        )
    if not (adapter / _ADAPTER).is_file():
        raise UserError(
            f"{adapter} has no {_ADAPTER}; save it with `save_pretrained` of a recent PEFT "
            "(pickled weights are not loaded)"
        )
    return dict(config)


def _names(file: Path) -> set[str]:
    """Names of the weights in a safetensors file."""
    from safetensors import safe_open

    with safe_open(file, framework="pt") as weights:
        return set(weights.keys())


def _source(path: str, revision: str | None) -> dict[str, Any]:
    return {
        "pretrained_model_name_or_path": str(Path(os.path.expanduser(path))),
        "revision": revision,
        "trust_remote_code": False,
    }


def _classifier(source: dict[str, Any], dtype: str) -> tuple[Any, list[str]]:
    """The model, and the names of weights that are not on disk."""
    import torch
    from transformers import AutoModelForSequenceClassification

    model, report = AutoModelForSequenceClassification.from_pretrained(
        **source,
        num_labels=1,
        dtype=getattr(torch, dtype),
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        use_safetensors=True,
        output_loading_info=True,
    )
    return model, sorted(report["missing_keys"])
