"""Quantizers: name → how the same weights are held in fewer bits.

A quantizer whose library is missing, or does not work here, is a skip with that reason, never a score of zero.
"""

import contextlib
import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from conf.entry import UserError
from conf.passthrough import did_you_mean
from evals.gguf import LLAMA_CPP_HINT
from evals.provenance import versions

Options = dict[str, Any]  # keyword arguments for `from_pretrained`


class QuantizerUnavailable(Exception):
    """This quantizer cannot run here; the text says why."""


@dataclass(frozen=True)
class Quantizer:
    """A format of the weights: loaded with `options`, then changed in place by `convert`; both import the library.

    `library` is the distribution on whose version the numbers depend, or `llama.cpp`. An adapter is merged into the
    weights first, so that what is quantized is what would be shipped, unless `merges` is False.
    """

    library: str | None
    options: Callable[[], Options] = dict
    convert: Callable[[Any], None] | None = None
    merges: bool = True


def _int8() -> Options:
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}


def _bitsandbytes_4bit(kind: str) -> Options:
    import torch
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=kind, bnb_4bit_compute_dtype=torch.bfloat16
        )
    }


def _torchao_int8() -> Options:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(version=2))}


def _hqq(bits: int) -> Options:
    """Symmetric integers, a scale for 32 weights that half-quadratic splitting finds. By torchao: transformers 5.23
    refuses its own `HqqConfig`, and where the library hqq is installed PEFT imports it, and with it torch's compiler.
    """
    import torch
    from torchao.quantization import IntxWeightOnlyConfig, PerGroup
    from torchao.quantization.quantize_.workflows import IntxChooseQParamsAlgorithm
    from transformers import TorchAoConfig

    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=PerGroup(32),
        intx_choose_qparams_algorithm=IntxChooseQParamsAlgorithm.HQQ_SCALE_ONLY,
    )
    return {"quantization_config": TorchAoConfig(config)}


def _gguf(model: Any, kind: str) -> None:
    from evals.gguf import through_file

    through_file(model, kind)


# What errors of no type of their own say that another try may not meet: torch's allocators, libraries that write files.
_PASSING = ("DefaultCPUAllocator", "out of memory", os.strerror(errno.ENOSPC))

QUANTIZERS: dict[str, Quantizer] = {
    "none": Quantizer(None),
    "unmerged": Quantizer("peft", merges=False),  # the adapter beside the weights
    "int8": Quantizer("bitsandbytes", _int8),  # LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339
    # QLoRA's NormalFloat, Dettmers et al. 2023, 2305.14314, and the plain 4-bit float beside it
    "nf4": Quantizer("bitsandbytes", lambda: _bitsandbytes_4bit("nf4")),
    "fp4": Quantizer("bitsandbytes", lambda: _bitsandbytes_4bit("fp4")),
    "torchao_int8": Quantizer("torchao", _torchao_int8),  # weights only
    # Half-quadratic quantization, Badri and Shaji 2023, https://mobiusml.github.io/hqq_blog/
    "hqq4": Quantizer("torchao", lambda: _hqq(4)),
    "hqq3": Quantizer("torchao", lambda: _hqq(3)),
    # llama.cpp's formats, scored by this backend: written to a file, read back, dequantized
    "gguf_q8_0": Quantizer("gguf", convert=lambda model: _gguf(model, "Q8_0")),
    "gguf_q4_k_m": Quantizer("llama.cpp", convert=lambda model: _gguf(model, "Q4_K_M")),
}


def find(name: str) -> Quantizer:
    """The quantizer of that name.

    Raises:
        UserError: when there is none.
    """
    if name not in QUANTIZERS:
        raise UserError(
            f"there is no quantizer {name!r}.{did_you_mean(name, QUANTIZERS)} "
            f"There are: {', '.join(QUANTIZERS)}"
        )
    return QUANTIZERS[name]


def loading_options(name: str) -> Options:
    """Arguments for `from_pretrained` that load quantized weights.

    Raises:
        QuantizerUnavailable: when the library is not installed or does not work here.
    """
    quantizer = find(name)
    if quantizer.library and versions(quantizer.library)[quantizer.library] is None:
        hint = f": {LLAMA_CPP_HINT}" if quantizer.library == "llama.cpp" else ""
        raise QuantizerUnavailable(f"{quantizer.library} is not installed{hint}")
    with trying(name):
        return quantizer.options()


@contextlib.contextmanager
def trying(name: str) -> Iterator[None]:
    """Turn what a quantizer's library says against this machine or model into the reason of a skip.

    Files that cannot be read and memory that is not there are no fault of the format, and pass.

    Raises:
        QuantizerUnavailable: with the library's own words.
    """
    import torch

    try:
        yield
    except (UserError, QuantizerUnavailable, OSError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        if name == "none" or any(words in str(error) for words in _PASSING):
            raise
        said = str(error).strip().splitlines() or [type(error).__name__]
        raise QuantizerUnavailable(f"{name} cannot run here: {said[0]}") from error
