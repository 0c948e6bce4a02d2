"""Quantizers: name → how to load the same weights in fewer bits.

A quantizer whose library is missing is a skip with that reason, never a score of zero.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from conf.entry import UserError
from conf.passthrough import did_you_mean

Options = dict[str, Any]  # keyword arguments for `from_pretrained`


class QuantizerUnavailable(Exception):
    """This quantizer cannot run here; the text says why."""


@dataclass(frozen=True)
class Quantizer:
    """`options` imports the library and gives the loading arguments."""

    library: str | None
    options: Callable[[], Options]


def _none() -> Options:
    return {}


def _int8() -> Options:
    from transformers import BitsAndBytesConfig

    return {"quantization_config": BitsAndBytesConfig(load_in_8bit=True)}


def _nf4() -> Options:
    import torch
    from transformers import BitsAndBytesConfig

    return {
        "quantization_config": BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
        )
    }


def _torchao_int8() -> Options:
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return {"quantization_config": TorchAoConfig(Int8WeightOnlyConfig(version=2))}


QUANTIZERS: dict[str, Quantizer] = {
    "none": Quantizer(None, _none),
    "int8": Quantizer("bitsandbytes", _int8),  # LLM.int8(), Dettmers et al. 2022, arXiv 2208.07339
    "nf4": Quantizer("bitsandbytes", _nf4),  # QLoRA's NormalFloat, Dettmers et al. 2023, 2305.14314
    "torchao_int8": Quantizer("torchao", _torchao_int8),  # weights only
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
    if quantizer.library and importlib.util.find_spec(quantizer.library) is None:
        raise QuantizerUnavailable(f"{quantizer.library} is not installed")
    try:
        return quantizer.options()
    except ImportError as error:
        raise QuantizerUnavailable(f"{quantizer.library} cannot be used here: {error}") from error
