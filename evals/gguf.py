"""GGUF files: as ordinary model folders, dequantized once, kept and reused; and as a format to pass weights through."""

import errno
import os
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from reward.gguf import gguf_file
from reward.provenance import installed
from reward.store import build_once, content_key, fingerprint, is_complete, source_key


def converted_folder(path: str, cache: Path) -> Path:
    """Where the converted model of a GGUF path lives; it may not exist yet."""
    file = gguf_file(path)
    read = [fingerprint(file, cache / "fingerprints.json"), source_key(Path(__file__))]
    return cache / "models" / f"{file.stem}-{content_key([*read, installed('transformers')])}"


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


LLAMA_CPP_HINT = "put its program llama-quantize on PATH, or its folder into $LLAMA_CPP"

# transformers' model_type → gguf's name of the architecture
_ARCHITECTURES = {"llama": "LLAMA", "qwen2": "QWEN2", "qwen3": "QWEN3"}
# number format → the type that holds it as it is
_EXACT = {"torch.bfloat16": "BF16", "torch.float16": "F16", "torch.float32": "F32"}


def through_file(model: Any, kind: str) -> None:
    """Write the weights of an opened model to a GGUF file of a type, and put back what the file holds, dequantized.

    `model.file_bytes` then says how large the file was. It has no vocabulary: it is the weights.

    Args:
        model: of an architecture in `_ARCHITECTURES`.
        kind: a type that gguf-py can write (`Q8_0`, `Q4_0`, `F16`…), or one that llama.cpp makes (`Q4_K_M`…).

    Raises:
        NotImplementedError: for another architecture.
        ImportError: when llama.cpp is needed and absent.
    """
    import gguf

    with tempfile.TemporaryDirectory(prefix="gguf-") as folder:
        file = Path(folder) / "weights.gguf"
        if hasattr(gguf.GGMLQuantizationType, kind):
            write(model, file, kind)
        else:
            exact = Path(folder) / "exact.gguf"
            write(model, exact, _EXACT[str(model.dtype)])
            llama_cpp_quantize(exact, file, kind)
        read_into(model, file)
        model.file_bytes = file.stat().st_size


def write(model: Any, file: Path, kind: str) -> None:
    """Write a model's weights and shape as GGUF. Vectors stay in float32, as llama.cpp keeps them.

    Rows that are no multiple of the type's block are written in float16.
    """
    import gguf

    config, names = model.config, _tensor_names(model)
    architecture = gguf.MODEL_ARCH[_ARCHITECTURES[config.model_type]]
    wanted = gguf.GGMLQuantizationType[kind]
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[architecture])
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(_head_size(config))
    writer.add_value_length(_head_size(config))
    writer.add_rope_dimension_count(_head_size(config))
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    state = model.state_dict()
    for name, stored in names.items():
        data = _rotary_order(state[name], name, config).float().cpu().numpy()
        block = gguf.GGML_QUANT_SIZES[wanted][0]
        fitting = wanted if data.shape[-1] % block == 0 else gguf.GGMLQuantizationType.F16
        as_type = gguf.GGMLQuantizationType.F32 if data.ndim == 1 else fitting
        writer.add_tensor(stored, gguf.quants.quantize(data, as_type), raw_dtype=as_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def read_into(model: Any, file: Path) -> None:
    """Overwrite a model's weights with those of a GGUF file of the same shape, rounded to the model's number format."""
    import gguf
    import torch

    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(file).tensors}
    state = model.state_dict()
    for name, other in _tensor_names(model).items():
        tensor = stored[other]
        values = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type))
        values = values.reshape(state[name].shape)
        state[name].copy_(_rotary_order(values, name, model.config, is_stored=True))


def _tensor_names(model: Any) -> dict[str, str]:
    """Name of each distinct weight here → its name in a GGUF file."""
    import gguf

    config = model.config
    is_plain = getattr(config, "rope_parameters", {}).get("rope_type", "default") == "default"
    if config.model_type not in _ARCHITECTURES or not is_plain:
        raise NotImplementedError(
            f"GGUF is written here for {', '.join(_ARCHITECTURES)} with plain rotary positions, not for "
            f"{config.model_type} as configured; convert the model with llama.cpp and give the file as model.path"
        )
    architecture = gguf.MODEL_ARCH[_ARCHITECTURES[config.model_type]]
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    return {
        name: names.get_name(name, try_suffixes=(".weight", ".bias"))
        for name in model.state_dict()
        if not (name == "lm_head.weight" and config.tie_word_embeddings)
    }


def _head_size(config: Any) -> int:
    size = getattr(config, "head_dim", None)
    return int(size or config.hidden_size // config.num_attention_heads)


def _rotary_order(tensor: Any, name: str, config: Any, is_stored: bool = False) -> Any:
    """Rows of a Llama's query and key weights in llama.cpp's order, which rotates neighbours, not halves; or back."""
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    projection = name.split(".")[-2]
    if config.model_type != "llama" or projection not in heads:
        return tensor
    pairs = (_head_size(config) // 2, 2) if is_stored else (2, _head_size(config) // 2)
    split = tensor.reshape(heads[projection], *pairs, *tensor.shape[1:])
    return split.transpose(1, 2).reshape(tensor.shape)


def llama_quantize() -> Path | None:
    """llama.cpp's program that makes the types which gguf-py cannot write, where there is one."""
    place = os.environ.get("LLAMA_CPP")
    folders = [place, f"{place}/bin", f"{place}/build/bin"] if place else []
    found = shutil.which("llama-quantize", path=os.pathsep.join([*folders, os.environ["PATH"]]))
    return Path(found) if found else None


def llama_cpp_version() -> str | None:
    """Hash of `llama-quantize`, which has no version to ask for; None without it."""
    program = llama_quantize()
    return fingerprint(program) if program else None


def llama_cpp_quantize(source: Path, target: Path, kind: str) -> None:
    """Make a GGUF file of another type with llama.cpp.

    Raises:
        ImportError: when llama.cpp is not here.
        OSError: when it was killed, or memory or disk ran out: another try may succeed.
        RuntimeError: when it fails, with its last words.
    """
    program = llama_quantize()
    if program is None:
        raise ImportError(f"{kind} needs llama.cpp: {LLAMA_CPP_HINT}")
    argv = [str(program), str(source), str(target), kind]
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        said = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
        # Full disks are an "iostream error" of the C++ streams that it writes with. Other signals are its own crashes.
        passing = ("iostream error", "bad_alloc", os.strerror(errno.ENOSPC))
        is_killed = -done.returncode in (signal.SIGKILL, signal.SIGTERM)
        if is_killed or any(words in done.stderr for words in passing):
            raise OSError(f"llama-quantize ran out of memory or disk, or was killed: {said}")
        raise RuntimeError(f"llama-quantize failed: {said}")
