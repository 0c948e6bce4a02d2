"""Log-probabilities by the model that a stage starts from, computed once for all arms that ask for the same.

They are filed under everything that they depend on: the weights, their number format, the token ids after truncation.
What they are used for (β, the loss, the learning rate, the seed) is no part of it, so a sweep has one reference pass.
"""

import contextlib
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import evals
from conf.entry import UserError
from evals.provenance import versions
from evals.run import SCORER_CODE
from evals.scoring import Labelled, Scorer
from evals.treeattention import unwrapped
from reward.store import build_once, content_key, is_complete, source_key

_FILE = "log_probs.safetensors"
_PAIRS = 256  # that are packed into rows together
_TOKENS = 4096  # read at once
_EVALS = Path(evals.__path__[0])


class Half(NamedTuple):
    """A prompt with one of its answers, as the trainer reads it."""

    ids: np.ndarray  # (T,)
    is_answer: np.ndarray  # (T,) bool

    def labelled(self) -> Labelled | None:
        """The answer's tokens, each by the state before it; None where truncation left none."""
        states = np.flatnonzero(self.is_answer[1:])
        return Labelled(self.ids[:-1], states, self.ids[1:][states]) if len(states) else None


@dataclass(frozen=True)
class References:
    """Where reference log-probabilities are kept.

    Args:
        folder: of all of them.
        model: what the reference depends on, besides its number format.
    """

    folder: Path
    model: dict[str, Any]

    def add(self, trainer: Any, dataset: Any) -> Any:
        """The dataset with TRL's columns `ref_chosen_logps` and `ref_rejected_logps`.

        Args:
            trainer: a DPO trainer whose model has not been trained yet.
            dataset: with `prompt_ids`, `chosen_ids` and `rejected_ids`.

        Raises:
            UserError: when truncation has left no pair.
        """
        if not len(dataset):
            raise UserError("every prompt is longer than max_length: raise it, or shorten prompts")
        place = self.folder / self._key(trainer, dataset)
        if not _all_agree(is_complete(place)):
            self._compute(trainer, dataset, place)
        per_token = _read(place / _FILE)
        sums = [
            _sums(chosen, rejected, trainer.ld_alpha)
            for chosen, rejected in zip(per_token, per_token, strict=True)  # by turns, of one list
        ]
        dataset = dataset.add_column("ref_chosen_logps", [chosen for chosen, _ in sums])
        return dataset.add_column("ref_rejected_logps", [rejected for _, rejected in sums])

    def _key(self, trainer: Any, dataset: Any) -> str:
        digest = hashlib.sha256()
        for halves in _halves(trainer, dataset):
            for half in halves:
                digest.update(np.int64(len(half.ids)).tobytes())
                digest.update(half.ids.tobytes() + half.is_answer.tobytes())
        core = unwrapped(trainer.model)
        return content_key(
            {
                "model": self.model,
                "loaded": str(trainer.args.model_init_kwargs),
                "moved": _moved(trainer),
                "dtype": str(core.dtype),
                "autocast": trainer.accelerator.mixed_precision,
                "attention": core.config._attn_implementation,
                "device": trainer.accelerator.device.type,
                "rows": digest.hexdigest(),
                "code": source_key(Path(__file__), *(_EVALS / name for name in SCORER_CODE)),
                "versions": versions("torch", "transformers", "peft"),
            }
        )

    def _compute(self, trainer: Any, dataset: Any, place: Path) -> None:
        """Every process a share of the pairs; the first one writes."""
        from accelerate.utils import gather_object
        from tqdm import tqdm

        rank, world = trainer.accelerator.process_index, trainer.accelerator.num_processes
        scorer = Scorer(unwrapped(trainer.model), _TOKENS)
        found = []
        slices = list(enumerate(_halves(trainer, dataset)))[rank::world]
        with torch.no_grad(), _untrained(trainer.model), trainer.accelerator.autocast():
            for number, halves in tqdm(
                slices, desc="reference log-probabilities", disable=rank > 0
            ):
                found.append((number, _scored(scorer, halves)))
        every = sorted(gather_object(found), key=lambda one: one[0])
        if trainer.accelerator.is_main_process:
            build_once(
                place, lambda partial: _write(partial, [x for _, part in every for x in part])
            )
        trainer.accelerator.wait_for_everyone()


def _scored(scorer: Scorer, halves: list[Half]) -> list[np.ndarray]:
    """Log-probabilities (M,) of each half's answer."""
    wanted = [half.labelled() for half in halves]
    found = iter(scorer.labelled([each for each in wanted if each is not None]))
    nothing = np.empty(0, np.float32)
    return [nothing if each is None else next(found).logp.cpu().numpy() for each in wanted]


def _halves(trainer: Any, dataset: Any) -> Iterator[list[Half]]:
    """Chosen and rejected by turns, cut as TRL's collator cuts them; some pairs at a time."""
    collator = trainer.data_collator
    kept = slice(None)
    if collator.max_length is not None:
        is_start = collator.truncation_mode == "keep_start"
        kept = slice(collator.max_length) if is_start else slice(-collator.max_length, None)
    for start in range(0, len(dataset), _PAIRS):
        rows = dataset[start : start + _PAIRS]
        halves = []
        for prompt, *answers in zip(
            rows["prompt_ids"], rows["chosen_ids"], rows["rejected_ids"], strict=True
        ):
            for answer in answers:
                is_answer = np.arange(len(prompt) + len(answer)) >= len(prompt)
                halves.append(Half(np.array([*prompt, *answer], np.int64)[kept], is_answer[kept]))
        yield halves


def _sums(chosen: np.ndarray, rejected: np.ndarray, ld_alpha: float | None) -> tuple[float, float]:
    """Sums over tokens; with LD-DPO's α (Liu et al. 2024, arXiv 2409.06411), that of what the longer one has more."""
    shared = min(len(chosen), len(rejected))
    alpha = 1.0 if ld_alpha is None else ld_alpha
    return tuple(float(x[:shared].sum() + alpha * x[shared:].sum()) for x in (chosen, rejected))  # type: ignore[return-value]


def _write(folder: Path, per_token: list[np.ndarray]) -> dict[str, Any]:
    from safetensors.numpy import save_file

    lengths = np.array([len(each) for each in per_token], np.int64)
    save_file({"log_probs": np.concatenate(per_token), "lengths": lengths}, folder / _FILE)
    return {"halves": len(lengths), "tokens": int(lengths.sum())}


def _read(file: Path) -> Iterator[np.ndarray]:
    """Log-probabilities (M,) of each half in float64."""
    from safetensors.numpy import load_file

    stored = load_file(file)
    ends = np.cumsum(stored["lengths"])[:-1]
    return iter(np.split(stored["log_probs"].astype(np.float64), ends))


def _untrained(model: Any) -> contextlib.AbstractContextManager[Any]:
    """The model without its adapter, which is fresh."""
    return model.disable_adapter() if hasattr(model, "peft_config") else contextlib.nullcontext()


def _moved(trainer: Any) -> dict[str, Any] | None:
    """What the frozen weights depend on where an adapter changes them as it starts."""
    configs = getattr(trainer.model, "peft_config", {})
    if not any(map(_moves, configs.values())):
        return None
    said = {name: {k: str(v) for k, v in vars(c).items()} for name, c in configs.items()}
    return {"adapters": said, "seed": trainer.args.seed}


def _moves(adapter: Any) -> bool:
    """Whether its start is taken out of the frozen weights (PiSSA, OLoRA, CorDA, LoftQ), cuts or repeats them."""
    is_named = isinstance(getattr(adapter, "init_lora_weights", None), str)
    return is_named or any(
        getattr(adapter, n, None) is not None for n in ("kasa_config", "layer_replication")
    )


def _all_agree(is_there: bool) -> bool:
    """What the first process sees: on another one a file may appear later."""
    from accelerate.utils import broadcast_object_list

    said = [is_there]
    broadcast_object_list(said)
    return said[0]
