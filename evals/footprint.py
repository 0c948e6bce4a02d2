"""What it costs to run a model in a format: bytes on disk, peak memory, tokens a second.

Each measurement is a process of its own, `python -m evals.footprint SPEC.json RESULT.json`, so that nothing that its
parent holds or has warmed up is counted. Sizes are in MB = 10⁶ bytes.

- `size_mb`: the distinct weights as the format stores them, with its scales; of a GGUF format, the file.
- `load_peak_mb`, `peak_mb`: the highest memory while loading and while running after that. On a GPU, what torch has
  allocated. On a CPU, resident memory above that of the interpreter with its libraries; the 16-bit file is read
  whole, so that loading holds it beside what is made of it.
- `prefill_tokens_per_s`: one prompt of `PROMPT` tokens, up to the logits of the next one.
- `decode_tokens_per_s`: `NEW` greedy tokens after the first, with the key-value cache, batch 1.

Speeds are medians of `REPEATS` after a warm-up; their standard error is that of a median of normal values.

A GGUF format is only dequantized here, so what running it takes is not measured: that would be a 16-bit model's.
"""

import contextlib
import ctypes
import functools
import gc
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conf.entry import UserError, built, plain, plainly
from conf.schema import Model
from evals.models import load, prepared
from evals.quantize import QuantizerUnavailable, loading_options, trying
from evals.results import Score
from evals.run import Measured, Subject
from reward.quiet import quiet
from reward.store import read_json, write_json

PROMPT = 256
NEW = 8
REPEATS = 5

_MB = 1e6
_STATUS = Path("/proc/self/status")


def measure(subject: Subject, out: Path) -> Measured:
    """Take the footprint of a model in a format in a fresh process; see `evals.run.KINDS`.

    Raises:
        QuantizerUnavailable: when the format cannot run here.
        UserError: when the process fails, with its last words.
    """
    request = subject.request
    with (
        prepared(request.model, request.quantizer, subject.cache) as ready,
        tempfile.TemporaryDirectory(prefix="footprint-") as folder,
    ):
        spec, result = Path(folder) / "spec.json", Path(folder) / "result.json"
        write_json(spec, {"model": plain(ready), "quantizer": request.quantizer})
        _run([sys.executable, "-m", "evals.footprint", str(spec), str(result)])
        found = read_json(result)
    if "unavailable" in found:
        raise QuantizerUnavailable(found["unavailable"])
    return Measured(found["settings"], [_score(*row) for row in found["scores"].items()], {})


def _run(argv: list[str]) -> None:
    """Run the child from where this package is; its last words are the message when it fails."""
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    env = os.environ | {
        "PYTHONPATH": path,
        "OMP_WAIT_POLICY": "passive",
        # One weight after another: with threads, the peak depends on how far reading gets ahead of quantizing.
        "HF_DEACTIVATE_ASYNC_LOAD": "1",
    }
    done = subprocess.run(argv, env=env, capture_output=True, text=True, check=False)
    if done.returncode == -2 or done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode != 0:
        said = (done.stderr.strip() or f"ended with {done.returncode}").splitlines()[-1]
        raise UserError(f"the footprint could not be measured: {said.removeprefix('error: ')}")


def _score(metric: str, values: list[float]) -> Score:
    spread = statistics.stdev(values) if len(values) > 1 else math.nan
    return Score(
        task="footprint",
        metric=metric,
        value=statistics.median(values),
        stderr=math.sqrt(math.pi / 2) * spread / math.sqrt(len(values)),
        n=len(values),
        higher_is_better=metric.endswith("_per_s"),
        is_main=metric == "size_mb",
    )


def main() -> None:
    """The child: measure what the file of the first argument asks for, write the result to the second."""
    with plainly():
        quiet()
        spec = read_json(Path(sys.argv[1]))
        try:
            found = _measured(built(Model, spec["model"]), spec["quantizer"])
        except QuantizerUnavailable as error:
            found = {"unavailable": str(error)}
        write_json(Path(sys.argv[2]), found)


def _measured(model: Model, quantizer: str) -> dict[str, Any]:
    import torch

    _import_libraries(model, quantizer)
    memory = _Memory()
    # Read, not mapped: which pages of a mapped file count depends on what else the machine does.
    loaded = load(model, quantizer, disable_mmap=not torch.cuda.is_available())
    scores = {"size_mb": [stored_bytes(loaded) / _MB]}  # now: some formats repack when they run
    if not hasattr(loaded, "file_bytes"):
        scores["load_peak_mb"] = [memory.peak_mb()]
        memory.restart()
        with trying(quantizer), torch.inference_mode():
            speeds = _speeds(loaded)
        scores |= {"peak_mb": [memory.peak_mb()], **speeds}
    settings = {
        "device": loaded.device.type,
        "processor": _processor(loaded.device),
        "threads": torch.get_num_threads(),
        "dtype": model.dtype.value,
        "memory": memory.source,
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "repeats": REPEATS,
    }
    return {"settings": settings, "scores": scores}


def _import_libraries(model: Model, quantizer: str) -> None:
    """Load the code that loading will use, so that only the weights count."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    loading_options(quantizer)
    with torch.device("meta"):
        AutoModelForCausalLM.from_config(
            AutoConfig.from_pretrained(model.path, revision=model.revision)
        )


def stored_bytes(model: Any) -> int:
    """Bytes of the weights as the format stores them: each tensor once, with scales and code books; no vocabulary."""
    import torch

    if hasattr(model, "file_bytes"):
        return int(model.file_bytes)
    counted: dict[int, float] = {}
    for value in model.state_dict().values():
        if isinstance(value, torch.Tensor):
            counted |= _bytes_by_place(value)
    return math.ceil(sum(counted.values()))


def _bytes_by_place(tensor: Any) -> dict[int, float]:
    """Address → bytes of a plain tensor, or of those inside a tensor subclass; integers of n bits count n bits."""
    if not hasattr(tensor, "__tensor_flatten__"):
        return {tensor.data_ptr(): tensor.numel() * tensor.element_size()}
    found: dict[int, float] = {}
    for name in tensor.__tensor_flatten__()[0]:
        found |= _bytes_by_place(getattr(tensor, name))
    if hasattr(tensor, "target_dtype"):  # torchao keeps int4 and int3 in a byte each
        bits = int(str(tensor.target_dtype).removeprefix("torch.int"))
        found[tensor.qdata.data_ptr()] = tensor.qdata.numel() * bits / 8
    return found


class _Memory:
    """The highest memory since it was made or restarted, above what there was at first."""

    def __init__(self) -> None:
        import torch

        self._is_cuda = torch.cuda.is_available()
        self.source = "torch.cuda.max_memory_allocated" if self._is_cuda else "ru_maxrss"
        if not self._is_cuda and _reset_peak():
            self.source = "VmHWM"
        self.restart()
        self._before = self._peak()

    def restart(self) -> None:
        """Forget the peak so far, and what was freed since; where the system cannot (no Linux), it stays."""
        import torch

        gc.collect()
        if self._is_cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            return
        with contextlib.suppress(OSError, AttributeError):  # glibc's alone
            ctypes.CDLL("libc.so.6").malloc_trim(0)
        _reset_peak()

    def peak_mb(self) -> float:
        return (self._peak() - self._before) / _MB

    def _peak(self) -> int:
        import torch

        if self._is_cuda:
            return int(torch.cuda.max_memory_allocated())
        if self.source == "VmHWM":
            line = _STATUS.read_text().split("VmHWM:")[1].split("\n")[0]
            return int(line.split()[0]) * 1024
        import resource

        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _reset_peak() -> bool:
    """Tell Linux to count the peak of resident memory anew; False where that cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _speeds(model: Any) -> dict[str, list[float]]:
    """Tokens a second of `REPEATS` prefills and of as many decodings."""
    import torch

    config = model.config.get_text_config()
    room = getattr(config, "max_position_embeddings", None) or PROMPT + NEW
    generator = torch.Generator().manual_seed(0)
    shape = (1, min(PROMPT, room - NEW - 1))
    ids = torch.randint(config.vocab_size, shape, generator=generator).to(model.device)

    def prefill() -> Any:
        return model(input_ids=ids, use_cache=True, logits_to_keep=1)

    def decode(after: Any, tokens: int) -> Any:
        for _ in range(tokens):
            token = after.logits[:, -1:].argmax(-1)
            after = model(input_ids=token, past_key_values=after.past_key_values, use_cache=True)
        return after

    decode(prefill(), 2)
    found: dict[str, list[float]] = {"prefill_tokens_per_s": [], "decode_tokens_per_s": []}
    for _ in range(REPEATS):
        seconds, after = _timed(prefill)
        found["prefill_tokens_per_s"].append(ids.numel() / seconds)
        seconds, _ = _timed(functools.partial(decode, after, NEW))
        found["decode_tokens_per_s"].append(NEW / seconds)
    return found


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    import torch

    is_cuda = torch.cuda.is_available()
    if is_cuda:
        torch.cuda.synchronize()
    started = time.perf_counter()
    result = work()
    if is_cuda:
        torch.cuda.synchronize()
    return time.perf_counter() - started, result


def _processor(device: Any) -> str:
    """The name of the GPU, or of the CPU."""
    import torch

    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    for line in Path("/proc/cpuinfo").read_text().splitlines() if _STATUS.exists() else []:
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
