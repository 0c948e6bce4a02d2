"""How a model of transformers reads rows of trees: which models can, and in which form they are told.

Every form goes through public doors: `position_ids`, a four-dimensional `attention_mask`, or an attention function
registered by name. No model code is touched.
"""

import contextlib
import functools
from collections.abc import Iterator, Sequence
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from evals import cpuattention
from evals.trees import Row, blocks, sees

_NAME = "align_trees"
_ARGUMENT = "tree"


class Form(Enum):
    """How rows are given to a model."""

    flex = "flex"  # one row, its attention by FlexAttention (Dong et al. 2024, arXiv 2412.05496)
    blocks = "blocks"  # one row, its attention computed block by block
    dense = "dense"  # rows with a mask of every token against every token
    plain = "plain"  # a sequence a row, all of one length: what every model takes


def unwrapped(model: Any) -> Any:
    """The model of transformers inside DDP, DeepSpeed and PEFT."""
    while hasattr(model, "module"):
        model = model.module
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def vocabulary(model: Any) -> int:
    """Number of token ids that a model reads, also where PEFT has an adapter on their embedding."""
    modules = model.get_input_embeddings().modules()
    return next(int(each.num_embeddings) for each in modules if hasattr(each, "num_embeddings"))


def obstacle(model: Any, longest: int) -> str | None:
    """Why a model cannot read trees whose longest sequence has this many tokens, as far as its configuration tells."""
    model = unwrapped(model)
    config = model.config.get_text_config()
    embedding = model.get_input_embeddings()
    if embedding.training and getattr(embedding, "neftune_noise_alpha", None):
        return "the noise on its embeddings depends on the length of a row (NEFTune)"
    if getattr(model, "_is_stateful", False):
        return "it is recurrent"
    if getattr(config, "alibi", False):
        return "its attention counts distances in the row (ALiBi)"
    kinds = set(getattr(config, "layer_types", None) or [])
    if other := kinds - {"full_attention", "sliding_attention"}:
        return f"it has layers of {', '.join(sorted(other))}"
    window = _window(config, kinds)
    if window is not None and longest > window:
        return f"its attention slides over {window} tokens, and a sequence is longer"
    original = _changing_from(config)
    if original is not None and longest > original:
        return f"its positions change with the length of a batch beyond {original} tokens"
    if config._attn_implementation not in ("sdpa", "eager"):
        return f"attention by {config._attn_implementation} takes no mask of trees (sdpa does)"
    return None


def _window(config: Any, kinds: set[str]) -> int | None:
    """Tokens that the attention of some layer reaches back; None: all."""
    if "local" in (getattr(config, "attention_layers", None) or []):  # GPT-Neo
        return int(config.window_size)
    if kinds and "sliding_attention" not in kinds:
        return None
    window = getattr(config, "sliding_window", None)
    return None if window is None else int(window)


def _changing_from(config: Any) -> int | None:
    """The length from which rotary positions depend on a batch's longest row."""
    rope = getattr(config, "rope_parameters", None) or {}
    for part in (rope, *(value for value in rope.values() if isinstance(value, dict))):
        if part.get("rope_type") in ("dynamic", "longrope"):
            known = part.get("original_max_position_embeddings")
            return int(known or config.max_position_embeddings)
    return None


def forms_of(model: Any) -> list[Form]:
    """The forms in which a model without an obstacle may take trees now, the fastest first."""
    model = unwrapped(model)
    # Checkpointed layers run again in the backward pass, when the attention function is no longer in place.
    runs_twice = torch.is_grad_enabled() and getattr(model, "is_activation_checkpointing", False)
    is_text = model.config.get_text_config() is model.config
    if model.config._attn_implementation != "sdpa" or not is_text or runs_twice:
        return [Form.dense]
    # Elsewhere FlexAttention has no compiled backward pass, and nowhere dropout.
    drops = any(
        "att" in name and "drop" in name and rate for name, rate in vars(model.config).items()
    )
    takes_flex = model.device.type == "cuda" and not drops
    return [*([Form.flex] if takes_flex else []), Form.blocks, Form.dense]


def inputs(rows: Sequence[Row], form: Form, model: Any) -> dict[str, Any]:
    """The arguments of a model's call that reads rows.

    Args:
        rows: one of them in the forms of flex and blocks; of one length in the plain form.
        form: see `Form`.
        model: gives device and number format.
    """
    device = unwrapped(model).device
    width = max(len(row.ids) for row in rows)
    ids = np.stack([np.pad(row.ids, (0, width - len(row.ids))) for row in rows])
    found: dict[str, Any] = {"input_ids": torch.from_numpy(ids).to(device), "use_cache": False}
    if form is Form.plain:
        return found
    positions = np.stack([np.pad(row.positions, (0, width - len(row.ids))) for row in rows])
    found["position_ids"] = torch.from_numpy(positions).to(device)
    if form in (Form.flex, Form.blocks):
        found[_ARGUMENT] = (_Flex if form is Form.flex else _Blocks)(rows[0], device)
        # Fits no attention but ours, which ignores it: wherever another one runs instead, it fails.
        found["attention_mask"] = torch.ones(1, 1, 0, 0, dtype=torch.bool, device=device)
    else:
        found["attention_mask"] = _mask(rows, width, unwrapped(model))
    return found


def _mask(rows: Sequence[Row], width: int, model: Any) -> Tensor:
    """Which token sees which, (B, 1, S, S); padding sees itself."""
    own = np.arange(1, width + 1)
    ends = [np.concatenate([row.ends, own[len(row.ends) :]]) for row in rows]
    seen = torch.from_numpy(np.stack([sees(each) for each in ends])[:, None]).to(model.device)
    if model.config._attn_implementation != "eager":
        return seen
    lowest = torch.finfo(model.dtype).min  # eager attention adds its mask
    return torch.zeros(seen.shape, dtype=model.dtype, device=model.device).masked_fill(
        ~seen, lowest
    )


class _Flex:
    """A row for FlexAttention: tiles in which nothing is seen are skipped."""

    def __init__(self, row: Row, device: torch.device) -> None:
        from torch.nn.attention.flex_attention import create_block_mask

        ends = torch.from_numpy(row.ends).to(device)

        def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return (key <= query) & (query < ends[key])

        size = len(row.ends)
        self._mask = create_block_mask(sees, None, None, size, size, device=device.type)

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float
    ) -> Tensor:
        """Attention (1, heads, T, D); there is no dropout, see `forms_of`."""
        attention = _flex_attention(query.device.type)
        found: Tensor = attention(
            query, key, value, block_mask=self._mask, scale=scale, enable_gqa=True
        )
        return found


@functools.cache
def _flex_attention(device: str) -> Any:
    """Compiled on a GPU; elsewhere the reference, which makes every weight and is for tests."""
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention


class _Blocks:
    """A row's blocks with their masks on a device."""

    def __init__(self, row: Row, device: torch.device) -> None:
        self.blocks = blocks(row.ends)
        self.sizes = [block.stop - block.start for block in self.blocks]
        self.sees: list[Tensor] = []  # of each block, which of its tokens sees which
        for block, size in zip(self.blocks, self.sizes, strict=True):
            own = np.tri(size, dtype=bool) if block.sees is None else block.sees
            self.sees.append(torch.from_numpy(own).to(device))

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, dropout: float
    ) -> Tensor:
        """Attention (1, heads, T, D), block by block."""
        if cpuattention.is_meant(query, dropout):
            tree = cpuattention.Tree(self.blocks, self.sees)
            return cpuattention.attend(query, key, value, tree, scale)
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            key, value = (part.repeat_interleave(groups, dim=1) for part in (key, value))
        # Split, not sliced: the backward pass of a slice writes a gradient of the whole row.
        queries, keys, values = (torch.split(x, self.sizes, dim=2) for x in (query, key, value))
        found = []
        for number, block in enumerate(self.blocks):
            seen = (*block.before, number)
            mask = self._masks[number]
            found.append(
                scaled_dot_product_attention(
                    queries[number],
                    _joined([keys[each] for each in seen]),
                    _joined([values[each] for each in seen]),
                    attn_mask=mask,
                    dropout_p=dropout,
                    is_causal=mask is None,
                    scale=scale,
                )
            )
        return torch.cat(found, dim=2)

    @functools.cached_property
    def _masks(self) -> list[Tensor | None]:
        """What the tokens of a block see of the blocks before and of its own; None: what `is_causal` says."""
        masks: list[Tensor | None] = []
        for block, own in zip(self.blocks, self.sees, strict=True):
            shared = sum(self.sizes[each] for each in block.before)
            is_causal = block.sees is None and not shared
            every = own.new_ones(len(own), shared)
            masks.append(None if is_causal else torch.cat([every, own], dim=1))
        return masks


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention of one row; the signature is that of transformers' attention functions.

    Args:
        module: the attention layer.
        query, key, value: (1, heads, T, D), of key and value maybe fewer heads.
        attention_mask: ignored, see `inputs`.
        dropout, scaling: as in `scaled_dot_product_attention`.
        kwargs: the row among them.
    """
    for name in ("softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise ValueError(f"attention with {name} is not computed for trees")
    found = kwargs[_ARGUMENT].attend(query, key, value, scaling, dropout)
    return found.transpose(1, 2).contiguous(), None


@functools.cache
def _outside_graphs() -> Any:
    """The same in a compiled layer: a graph of one row's blocks would serve no other row."""
    return torch.compiler.disable(_attention)  # type: ignore[no-untyped-call]


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


@contextlib.contextmanager
def reading(model: Any, form: Form) -> Iterator[None]:
    """Let a model's attention be that of a form, for the time of a call."""
    if form not in (Form.flex, Form.blocks):
        yield
        return
    from transformers import AttentionInterface

    AttentionInterface.register(_NAME, _outside_graphs())
    model = unwrapped(model)
    usual = model.config._attn_implementation
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)
