"""Does a saved reward model give the scores that its trainer gave? `python -m align.stages.rescore FOLDER`.

A reward model can be lost in being saved, and nothing notices: an adapter without its head, which the next loader fills
with random numbers; a pad token or a chat template that changed, so that the score is read at another token. So the
trainer writes down its scores of some pairs, and a fresh process loads the folder as every user will, tokenizes the
pairs again, and must arrive at the same numbers.
"""

import contextlib
import json
import math
import sys
from pathlib import Path
from typing import Any

from conf.entry import UserError, plainly
from reward import network
from reward.store import read_json, write_json

RESCORE = "rescore.json"
PAIRS = 32
_BATCH = 4  # pairs scored together

# Largest accepted difference of two scores, for each standard deviation of the trained ones: what a score means is how
# far it is from others. In float32 both sides compute the same function, up to the order of sums. In bfloat16 the
# padding of a batch alone moves scores. Measured figures: docs/reward_models.md.
TOLERANCES = {"float32": 1e-3, "bfloat16": 0.25}
# The same for each unit of the largest score: what rounding does to scores that lie far from 0 and close together.
_ROUNDING = {"float32": 1e-5, "bfloat16": 2.0**-7}
_CORRELATION = 0.9  # least accepted, where scores differ by more than rounding


def record(trainer: Any, out: Path) -> None:
    """Write the trainer's own scores of some pairs, held-out ones where it kept any, to `out`/rescore.json.

    The weights are taken as float32, which loses nothing, and computed with as such: what is compared is what was
    learned. Sharded weights, and weights that would not fit, are used as they were trained, and compared loosely. To
    be called when the trainer has nothing left to compute: its weights keep the format. Every rank takes part.
    """
    rows = trainer.eval_dataset or trainer.train_dataset  # it may have left out every held-out row
    rows = [rows[place] for place in range(min(PAIRS, len(rows)))]
    is_exact = _widen(trainer)
    scores = [
        pair
        for start in range(0, len(rows), _BATCH)
        for pair in _scores(trainer, rows[start : start + _BATCH], is_exact)
    ]
    if trainer.is_world_process_zero():
        pairs = [
            {
                "tools": row.get("tools"),
                **{
                    name: {"turns": row[name], "ids": row[f"{name}_ids"], "score": score}
                    for name, score in zip(("chosen", "rejected"), pair, strict=True)
                },
            }
            for row, pair in zip(rows, scores, strict=True)
        ]
        dtype = "float32" if is_exact else "bfloat16"
        write_json(out / RESCORE, {"dtype": dtype, "pairs": pairs})


def _widen(trainer: Any) -> bool:
    """Make the trainer's weights float32; False, and nothing done, where that cannot be."""
    import torch

    model = trainer.accelerator.unwrap_model(trainer.model)
    if trainer.is_deepspeed_enabled or "flash" in str(model.config._attn_implementation):
        return False
    if model.device.type == "cuda":
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(model.device)
        if 3 * sum(p.numel() for p in model.parameters() if p.element_size() < 4) > free:
            return False
    model.float()
    return True


def _scores(trainer: Any, rows: list[Any], is_exact: bool) -> list[tuple[float, float]]:
    """The scores of some pairs, chosen and rejected."""
    import torch

    model = trainer.model
    if is_exact:  # accelerate's wrapper would compute in the trainer's number format
        model = trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        torch.backends.cuda.matmul.allow_tf32 = False
    model.eval()
    batch = trainer._prepare_inputs(trainer.data_collator(rows))
    batch.pop("margin", None)
    computed = contextlib.nullcontext() if is_exact else trainer.compute_loss_context_manager()
    with torch.no_grad(), computed:
        logits = model(**batch, use_cache=False).logits  # (2 × pairs, 1): chosen, then rejected
    chosen, rejected = logits.float().squeeze(-1).cpu().chunk(2)
    return list(zip(chosen.tolist(), rejected.tolist(), strict=True))


def check(folder: Path) -> dict[str, Any]:
    """Score the recorded pairs with the model in `folder`, and compare.

    Returns:
        What was found, for the manifest.

    Raises:
        UserError: when the saved model is not the one that was trained.
    """
    from reward.model import RewardModel

    recorded = read_json(folder / RESCORE)
    answers = [pair[name] for pair in recorded["pairs"] for name in ("chosen", "rejected")]
    tools = [
        pair["tools"] and json.loads(pair["tools"]) for pair in recorded["pairs"] for _ in range(2)
    ]
    model = RewardModel.load(str(folder), dtype=recorded["dtype"])
    turns = [answer["turns"] for answer in answers]
    for answer, offered in zip(answers, tools, strict=True):
        if model.tokenize([], answer["turns"], offered) != answer["ids"]:
            raise UserError(
                "the saved tokenizer makes other tokens of a conversation than the trainer had: its chat template or "
                "its vocabulary was lost or changed in saving"
            )
    found = model.score([[] for _ in turns], turns, tools)
    return compare([answer["score"] for answer in answers], found, recorded["dtype"])


def compare(trained: list[float], found: list[float], dtype: str) -> dict[str, Any]:
    """Demand that two lists of scores (chosen, rejected, chosen, …) agree.

    Args:
        trained: the trainer's.
        found: those of the saved model.
        dtype: the number format in which both were computed, a key of `TOLERANCES`.

    Raises:
        UserError: with the largest difference, when it is too large, a pair changed its order or the scores no longer
            go together; or when there are none.
    """
    if not trained:
        raise UserError("there is no pair to compare: every row is longer than rm.args.max_length")
    spread, correlation = _compared(trained, found)
    rounding = _ROUNDING[dtype] * max(map(abs, trained))
    tolerance = max(TOLERANCES[dtype] * spread, rounding)
    differences = [abs(a - b) for a, b in zip(trained, found, strict=True)]
    largest = max(differences, key=lambda value: (math.isnan(value), value))
    before, after = _margins(trained), _margins(found)
    turned = sum(abs(a) > tolerance and not a * b > 0 for a, b in zip(before, after, strict=True))
    is_alike = spread <= rounding or correlation >= _CORRELATION
    if not largest <= tolerance or turned or not is_alike:  # NaN is not within it
        raise UserError(
            f"the saved reward model does not give the trainer's scores: they differ by up to {largest:.3g} where "
            f"{tolerance:.2g} is accepted, {turned} of {len(before)} pairs changed their order, and the correlation is "
            f"{correlation:.3g}. Its head, its pad token or its weights were lost or changed in saving"
        )
    return {
        "pairs": len(before),
        "max_difference": largest,
        "tolerance": tolerance,
        "dtype": dtype,
    }


def _margins(scores: list[float]) -> list[float]:
    return [a - b for a, b in zip(scores[::2], scores[1::2], strict=True)]


def _compared(trained: list[float], found: list[float]) -> tuple[float, float]:
    """The standard deviation of what was trained, and Pearson's correlation; NaN where one side is constant."""
    import numpy as np

    with np.errstate(invalid="ignore", divide="ignore"):
        return float(np.std(trained)), float(np.corrcoef(trained, found)[0, 1])


def main() -> None:
    """Check the reward model in a folder; what was found replaces what the trainer wrote down."""
    from reward.child import die_with_parent

    die_with_parent()
    with plainly():
        network.inherit()
        folder = Path(sys.argv[1])
        write_json(folder / RESCORE, check(folder))


if __name__ == "__main__":
    main()
