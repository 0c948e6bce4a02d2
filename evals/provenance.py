"""What a number was made with: commit, library versions, machine."""

import os
import platform
from typing import Any

from evals.gguf import llama_cpp_version
from reward.provenance import commit, installed

LIBRARIES = (
    "torch", "transformers", "trl", "peft", "accelerate", "datasets", "lm-eval", "deepspeed", "bitsandbytes", "torchao"
)  # fmt: skip
_LLAMA_CPP = "llama.cpp"  # no distribution: its version is a hash of the program that is found


def versions(*names: str) -> dict[str, str | None]:
    """Installed versions of the named distributions and of `llama.cpp`, None for one that is absent."""
    names = names or LIBRARIES
    found = installed(*names)
    return found | {_LLAMA_CPP: llama_cpp_version()} if _LLAMA_CPP in names else found


def provenance() -> dict[str, Any]:
    """Commit, versions and machine, as stored beside every result."""
    return {
        **commit(),
        "versions": versions(),
        "python": platform.python_version(),
        "machine": {
            "processor": platform.machine(),
            "cores": os.cpu_count(),
            "system": platform.system(),
        },
    }
