"""Lets TRL's trainers read what the rows of a batch have in common once, and score no token that nobody asks for.

TRL calls a language model with `fused_lm_head=True` and gets log-probabilities and statistics of the labelled tokens; a
reward model it calls as it is. Both calls are answered here from rows of trees (`evals.trees`), so losses, metrics and
arguments stay TRL's own. A call that says something else than ids, padding on the right and labels goes the usual way.
"""

import contextlib
import sys
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evals.scoring import Labelled, Scorer
from evals.treeattention import Form, unwrapped
from evals.treereader import TreeReader

# What a call may have besides; it says nothing of how the tokens are read.
_HARMLESS = {"use_cache", "return_dict", "num_items_in_batch", "output_router_logits", "margin"}

Autocast = Callable[[], contextlib.AbstractContextManager[Any]]


def share_in_language_model(model: Any, autocast: Autocast = contextlib.nullcontext) -> None:
    """Answer TRL's calls with `fused_lm_head=True` from trees, once TRL has given the model its own fused head.

    Args:
        model: causal language model of transformers, also within PEFT.
        autocast: gives the context of a forward pass where nothing else does, as around a reference.
    """
    core = unwrapped(model)
    usual = core.forward
    scorer = Scorer(core, tokens=None, forward=usual)
    told: set[str] = set()

    def forward(
        self: Any,
        *given: Any,
        labels: Tensor | None = None,
        fused_lm_head: bool = False,
        **further: Any,
    ) -> Any:
        is_asked = fused_lm_head and labels is not None and not given
        if labels is not None and is_asked and _is_plain(core, further, told):
            sequences = _labelled(further["input_ids"], labels)
            with autocast():
                if sequences and scorer.shares(max(len(each.read) for each in sequences)):
                    return _fused_output(scorer, sequences, labels, further)
        if fused_lm_head:
            further["fused_lm_head"] = True
        if labels is not None:
            further["labels"] = labels
        return usual(*given, **further)

    _replace_forward(core, forward)


def share_in_classifier(model: Any) -> None:
    """Score sequences from trees: the head sees the last token of each.

    Args:
        model: sequence classifier of transformers, also within PEFT.
    """
    from transformers.modeling_outputs import SequenceClassifierOutputWithPast

    core = unwrapped(model)
    usual = core.forward

    def states(arguments: dict[str, Any], places: Tensor | None) -> Tensor:
        found: Tensor = core.base_model(**arguments).last_hidden_state.flatten(0, -2)
        return found if places is None else found[places]

    reader = TreeReader(core, states)
    told: set[str] = set()

    def forward(self: Any, *given: Any, **further: Any) -> Any:
        if not given and hasattr(core, "score") and _is_plain(core, further, told):
            input_ids = further["input_ids"]
            ends = _ends(input_ids, core.config.get_text_config().pad_token_id)
            form = reader.form(int(ends.max()) + 1)
            if form is not Form.plain:
                last = _last_states(reader, form, input_ids, ends)
                return SequenceClassifierOutputWithPast(logits=core.score(last))
        return usual(*given, **further)

    _replace_forward(core, forward)


def _replace_forward(core: Any, forward: Callable[..., Any]) -> None:
    """With the signature of the model's own: `generate` and PEFT look at it."""
    forward.__wrapped__ = type(core).forward  # type: ignore[attr-defined]
    core.forward = types.MethodType(forward, core)


def _is_plain(model: Any, said: dict[str, Any], told: set[str]) -> bool:
    """Whether a call says no more than which tokens each row has, from its left end; why not is told once."""
    if torch.compiler.is_compiling():  # rows of trees are laid out anew for every batch
        return False
    reason = _hindrance(said)
    if reason is not None and reason not in told:
        told.add(reason)
        print(
            f"{type(model).__name__}: common prompts are read as TRL does, because {reason}",
            file=sys.stderr,
        )
    return reason is None


def _hindrance(said: dict[str, Any]) -> str | None:
    """What in a call rows of trees do not express."""
    names = {name for name, value in said.items() if value is not None} - _HARMLESS
    if different := names ^ {"input_ids", "attention_mask"}:
        return f"its calls differ in {', '.join(sorted(different))}"
    if said.get("output_router_logits"):
        return "losses of its router are asked for"
    mask = said["attention_mask"]
    if mask.dim() != 2 or not (mask[:, 1:] <= mask[:, :-1]).all():
        return "its rows are not padded on the right"
    return None


def _labelled(input_ids: Tensor, labels: Tensor) -> list[Labelled]:
    """The rows that have a label, each as far as a labelled token needs it."""
    found = []
    for ids, row in zip(input_ids.cpu().numpy(), labels[:, 1:].cpu().numpy(), strict=True):
        states = np.flatnonzero(row != -100)
        if len(states):
            found.append(Labelled(ids[: states[-1] + 1].astype(np.int64), states, row[states]))
    return found


def _fused_output(
    scorer: Scorer, sequences: list[Labelled], labels: Tensor, said: dict[str, Any]
) -> Any:
    """TRL's output: per-token tensors (B, S − 1) that are zero where there is no label."""
    from trl.trainer.utils import FusedCausalLMOutput

    mask = labels[:, 1:] != -100
    found = scorer.labelled(sequences, with_statistics=True)

    def placed(parts: list[Tensor]) -> Tensor:
        values = torch.cat(parts)
        return values.new_zeros(mask.shape).masked_scatter(mask, values)

    logp = placed([each.logp for each in found])
    entropy, mean_logits, log_sum_sq = (
        placed([each.statistics[:, column] for each in found]) for column in range(3)
    )
    number = said.get("num_items_in_batch")
    return FusedCausalLMOutput(
        loss=-logp.sum() / (mask.sum() if number is None else number),
        log_probs=logp,
        entropy=entropy,
        log_sum_sq_probs=log_sum_sq,
        mean_logits=mean_logits,
        is_top1=placed([each.is_best for each in found]),
        label_mask=mask,
    )


def _ends(input_ids: Tensor, pad: int | None) -> Tensor:
    """The token of each row that a classifier reads: the last one that is no pad token."""
    if pad is None:
        return torch.full((len(input_ids),), input_ids.shape[1] - 1, device=input_ids.device)
    number = torch.arange(input_ids.shape[1], device=input_ids.device)
    ends: Tensor = (number * (input_ids != pad)).argmax(dim=-1)
    return ends


def _last_states(reader: TreeReader, form: Form, input_ids: Tensor, ends: Tensor) -> Tensor:
    """The state (B, H) of each row's last token."""
    sequences = [
        ids[: end + 1].astype(np.int64)
        for ids, end in zip(input_ids.cpu().numpy(), ends.tolist(), strict=True)
    ]
    (rows,) = reader.batches(sequences, form, tokens=None)
    width = max(len(row.ids) for row in rows)
    places = np.empty(len(sequences), np.int64)
    for number, row in enumerate(rows):
        for member, place in zip(row.members, row.places, strict=True):
            places[member] = number * width + place[-1]
    return reader.states(rows, form, torch.from_numpy(places).to(input_ids.device))
