"""The KV cache of conversations that begin and end at different times.

transformers' cache grows by a copy of everything at every token, and its conversations begin together. Here each
conversation has a slot. All slots share one last column, which the next token of each is written to, and a prompt that
takes over a slot is laid so that it ends there:

    column      0 1 2 3 4 5 6 7
    slot 0      . . a a a a a a     began at column 2
    slot 1      b b b b b b b b
    slot 2      . . . . . c c c     took over later

What stands before a slot's first column is masked, as padding on the left is.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache

from .compat_transformers import (
    DynamicIndexedLayer,
    DynamicLayer,
    LinearAttentionLayer,
    attention_of,
    sdpa_attention_forward,
    sdpa_mask,
)

GROUPED = "fastmtp_grouped"
"""The name of `grouped_attention`, for `set_attn_implementation`."""

ROOM = 256
"""Columns that a full buffer grows by."""


def grouped_attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' `sdpa` for one query per conversation, without its copy of the keys for every attention head.

    The G query heads that share a key head stand where a sequence of G queries would.

    Args:
        module: the attention layer.
        query: [B, H * G, 1, D]; anything longer goes to `sdpa`.
        key: [B, H, T, D].
        value: [B, H, T, D].
        attention_mask: [B, 1, 1, T].
        kwargs: `sdpa`'s.

    Returns the output, [B, 1, H * G, D], and None, as attention functions do.
    """
    groups = getattr(module, "num_key_value_groups", 1)
    if query.shape[2] > 1 or groups == 1:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    B, H, _, D = key.shape
    output = F.scaled_dot_product_attention(
        query.view(B, H, groups, D), key, value, attention_mask, scale=kwargs.get("scaling")
    )
    return output.reshape(B, 1, H * groups, output.shape[-1]), None


AttentionInterface.register(GROUPED, grouped_attention)
AttentionMaskInterface.register(GROUPED, sdpa_mask)


@contextmanager
def grouped_attention_in(model: Any) -> Iterator[None]:
    """`grouped_attention` instead of `sdpa`, where that is what the model uses."""
    if attention_of(model.config) != "sdpa":
        yield
        return
    model.set_attn_implementation(GROUPED)
    try:
        yield
    finally:
        model.set_attn_implementation("sdpa")


class Buffer:
    """Keys, values, or an indexer's keys of one layer: a tensor with a column for each token, written in place."""

    def __init__(self, states: torch.Tensor) -> None:
        """`states` [B, ..., T, D] are the first columns."""
        self.whole, self.first, self.end = states, 0, states.shape[-2]

    @property
    def columns(self) -> torch.Tensor:
        """Those in use [B, ..., T, D], a view."""
        return self.whole.narrow(-2, self.first, self.end - self.first)

    def append(self, states: torch.Tensor) -> torch.Tensor:
        """`columns`, with more of them at the end."""
        width = states.shape[-2]
        if self.end + width > self.whole.shape[-2]:
            self._move(self.columns, before=0, after=width + ROOM)
        self.whole.narrow(-2, self.end, width).copy_(states)
        self.end += width
        return self.columns

    def put(self, slots: torch.Tensor, states: torch.Tensor) -> None:
        """Lay states [len(slots), ..., T, D] into slots, so that they end at the last column."""
        width = states.shape[-2]
        missing = width - (self.end - self.first)
        if missing > 0:
            self._move(self.columns, before=missing, after=ROOM)
        self.whole.narrow(-2, self.end - width, width)[slots] = states

    def drop_columns(self, count: int) -> None:
        self.first += count

    def keep(self, slots: torch.Tensor) -> None:
        self._move(self.columns[slots], before=0, after=ROOM)

    def _move(self, columns: torch.Tensor, before: int, after: int) -> None:
        """Into a buffer of their own, with room before and after them; what is before counts as in use."""
        self.first, self.end = 0, before + columns.shape[-2]
        self.whole = F.pad(columns, (0, 0, before, after))


class SlotLayer(DynamicIndexedLayer):
    """A layer of the cache whose states lie in buffers.

    One with a sliding window keeps the whole context: the mask says what the window hides.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        """From a layer that has been through a prompt."""
        super().__init__()
        self.dtype, self.device, self.is_initialized = layer.dtype, layer.device, True
        self.buffers = {name: Buffer(getattr(layer, name)) for name in ("keys", "values")}
        if getattr(layer, "indexer_keys", None) is not None:
            self.buffers["indexer_keys"] = Buffer(layer.indexer_keys)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.buffers["keys"].append(key_states), self.buffers["values"].append(value_states)

    def update_indexer(self, indexer_key_states: torch.Tensor) -> torch.Tensor:
        return self.buffers["indexer_keys"].append(indexer_key_states)

    def get_seq_length(self) -> int:
        return self.buffers["keys"].columns.shape[-2]


class Slots:
    """What the model has seen of each conversation.

    Attributes:
        cache: for `past_key_values`.
        starts: [B] int64, the column that each slot's prompt begins at.
    """

    def __init__(self, prompts: DynamicCache, lengths: torch.Tensor) -> None:
        """From a `prompt_cache` that has been through prompts of `lengths` [B], padded on the left."""
        self.cache = prompts
        self.cache.layers = [layer if _is_linear(layer) else SlotLayer(layer) for layer in prompts.layers]
        self.starts = self.columns - lengths

    @property
    def columns(self) -> int:
        """How many columns are in use."""
        return int(self.cache.get_seq_length())

    @property
    def lengths(self) -> torch.Tensor:
        """Tokens of each slot [B]: the position of its next one."""
        return self.columns - self.starts

    def mask(self) -> torch.Tensor:
        """Attention mask for the next token of each slot, [B, columns + 1] int64."""
        column = torch.arange(self.columns + 1, device=self.starts.device)
        return (column >= self.starts[:, None]).long()

    def put(self, slots: list[int], prompts: DynamicCache, lengths: torch.Tensor) -> None:
        """Other conversations take over slots: those of a `prompt_cache` that has been through `lengths` tokens."""
        places = torch.tensor(slots, device=self.starts.device)
        before = self.columns
        for mine, new in zip(self.cache.layers, prompts.layers, strict=True):
            if _is_linear(mine):
                for states in ("conv_states", "recurrent_states"):
                    for number, state in getattr(mine, states).items():
                        if state is not None:
                            state[places] = getattr(new, states)[number]
            else:
                for name, buffer in mine.buffers.items():
                    buffer.put(places, getattr(new, name))
        self.starts += self.columns - before  # a prompt longer than all there was moved the others
        self.starts[places] = self.columns - lengths
        self._drop_columns()

    def keep(self, slots: list[int]) -> None:
        """Drop the other slots."""
        places = torch.tensor(slots, device=self.starts.device)
        self.starts = self.starts[places]
        self._drop_columns()
        for layer in self.cache.layers:
            if _is_linear(layer):
                layer.reorder_cache(places)
            else:
                for buffer in layer.buffers.values():
                    buffer.keep(places)

    def _drop_columns(self) -> None:
        """Columns before the first that a slot uses."""
        unused = int(self.starts.min())
        self.starts = self.starts - unused
        for layer in self.cache.layers:
            if not _is_linear(layer):
                for buffer in layer.buffers.values():
                    buffer.drop_columns(unused)


def prompt_cache(config: Any) -> DynamicCache:
    """An empty cache for prompts that will be put into slots: it keeps what lies outside a sliding window too."""
    cache = DynamicCache(config=config)
    cache.layers = [
        DynamicLayer() if slides else layer for layer, slides in zip(cache.layers, cache.is_sliding, strict=True)
    ]
    return cache


def _is_linear(layer: Any) -> bool:
    """Linear attention: one state for each conversation, whatever its length."""
    return isinstance(layer, LinearAttentionLayer)
