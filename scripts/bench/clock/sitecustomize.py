"""One clock for both sides of a comparison.

Python imports a `sitecustomize` that stands on PYTHONPATH by itself: so the clock runs inside the processes that `trl`,
`lm_eval` and `python -m align` start, whoever wrote their code. It appends JSON lines to the file that
$BENCH_CLOCK names and changes no number.

| kind | of | holds |
|---|---|---|
| step | an optimizer step | CPU and wall seconds, token ids of its sequences, how many are scored, tokens read |
| loss | a logged loss | |
| score | a call for log-likelihoods | CPU and wall seconds, token ids, how many are scored, tokens read |
| exit | a process that read tokens | with gradients and without, threads, peak memory of the GPU |
"""

import atexit
import importlib.machinery
import json
import os
import sys
import time
from collections import Counter

_FILE = os.environ.get("BENCH_CLOCK")
_read = (
    Counter()
)  # (words in the table, whether gradients were wanted) → tokens that an embedding read
_steps = []


def _write(*rows):
    with open(_FILE, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def _tokens(wants_gradients):
    """Tokens read by the largest embedding: others hold positions or types."""
    sizes = [size for size, _ in _read]
    return _read[max(sizes), wants_gradients] if sizes else 0


def _now():
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.process_time(), time.perf_counter()


def _count_tokens(functional):
    import torch

    inner = functional.embedding

    def embedding(input, weight, *args, **kwargs):
        _read[weight.shape[0], torch.is_grad_enabled()] += input.numel()
        return inner(input, weight, *args, **kwargs)

    functional.embedding = embedding


def _time_steps(trainer):
    from transformers import TrainerCallback

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            self.read = _tokens(True), _tokens(False)
            _steps.append({"kind": "step", "pid": os.getpid(), "step": len(_steps), "inputs": []})
            self.cpu, self.wall = _now()

        def on_step_end(self, args, state, control, **_):
            cpu, wall = _now()
            with_gradients, without = self.read
            _steps[-1] |= {
                "cpu": cpu - self.cpu,
                "wall": wall - self.wall,
                "read": _tokens(True) - with_gradients,
                "reference": _tokens(False) - without,
            }

        def on_log(self, args, state, control, logs=None, **_):
            if logs and "loss" in logs:
                row = {"kind": "loss", "pid": os.getpid(), "loss": float(logs["loss"])}
                _write(row | {"step": state.global_step})

        def on_train_end(self, args, state, control, **_):
            _write(*map(_described, _steps))
            _steps.clear()

    trainer.DEFAULT_CALLBACKS.append(Clock)
    inner = trainer.Trainer.training_step

    def training_step(self, model, inputs, *args, **kwargs):
        if _steps:  # looked at when training has ended
            _steps[-1]["inputs"].append(dict(inputs))
        return inner(self, model, inputs, *args, **kwargs)

    trainer.Trainer.training_step = training_step


def _described(step):
    """What a step's batches hold; without `sequences` where they are not laid out as transformers' are."""
    batches = step.pop("inputs")
    if not batches or any("input_ids" not in b or "attention_mask" not in b for b in batches):
        return step
    sequences, padded, scored = [], 0, 0
    for batch in batches:
        ids, mask = batch["input_ids"].cpu(), batch["attention_mask"].cpu().bool()
        if ids.dim() != 2 or mask.shape != ids.shape:
            return step
        padded += ids.numel()
        sequences += [row[seen].tolist() for row, seen in zip(ids, mask, strict=True)]
        if "completion_mask" in batch:
            scored += int(batch["completion_mask"].sum())
        elif "labels" in batch:
            scored += int((batch["labels"][:, 1:] != -100).sum())
        else:
            scored += len(ids)  # a score for each sequence
    return step | {"sequences": sequences, "padded": padded, "scored": scored}


def _time_scoring(module):
    inner = module.TemplateLM.loglikelihood

    def loglikelihood(self, requests, *args, **kwargs):
        asked, ask = [], self._loglikelihood_tokens

        def keep(tokenised, *args, **kwargs):
            asked.extend((context, continuation) for _, context, continuation in tokenised)
            return ask(tokenised, *args, **kwargs)

        self._loglikelihood_tokens = keep
        before, (cpu, wall) = _tokens(False), _now()
        try:
            found = inner(self, requests, *args, **kwargs)
        finally:
            del self._loglikelihood_tokens
        ended = _now()
        row = {"kind": "score", "pid": os.getpid(), "cpu": ended[0] - cpu, "wall": ended[1] - wall}
        row |= {"read": _tokens(False) - before, "scored": sum(len(end) for _, end in asked)}
        _write(row | {"sequences": [[*start, *end] for start, end in asked]})
        return found

    module.TemplateLM.loglikelihood = loglikelihood


def _end():
    if not _read:
        return
    import torch

    row = {"kind": "exit", "pid": os.getpid(), "threads": torch.get_num_threads()}
    row |= {"trained": _tokens(True), "reference": _tokens(False)}
    if torch.cuda.is_initialized():
        row["gpu_memory"] = torch.cuda.max_memory_allocated() / 2**20
    _write(row)


_AFTER = {
    "torch.nn.functional": _count_tokens,
    "transformers.trainer": _time_steps,
    "lm_eval.api.model": _time_scoring,
}


class _Finder:
    """Calls what is in `_AFTER` when a module of that name has been imported."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name not in _AFTER:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module):
            execute(module)
            _AFTER[name](module)

        spec.loader.exec_module = exec_module
        return spec


if _FILE:
    sys.meta_path.insert(0, _Finder)
    atexit.register(_end)
