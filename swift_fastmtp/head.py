"""The MTP head: one decoder block that reads a hidden state and the next token, at its native checkpoint path.

    u = proj(cat[norm_h(h), norm_e(embed)])     the order and the names come from the family's row
    g = final_norm(block(u))                    g gives the logits, and is fed back as the next step's h

The head has no embedding and no output matrix of its own: it shares the backbone's (frozen) ones.
"""

import copy
from importlib import import_module
from typing import Any

import torch
from torch import nn

from . import attention
from .families import Family


def import_class(path: str) -> Any:
    """'module:Class' → the class."""
    module, name = path.split(":")
    return getattr(import_module(module), name)


class MTPHead(nn.Module):
    """One MTP layer whose parameter names equal the checkpoint's, relative to `family.prefix`.

    Args:
        config: the backbone's transformers config.
        family: the checkpoint's row in `families.py`.
    """

    def __init__(self, config: Any, family: Family) -> None:
        super().__init__()
        block_config = copy.deepcopy(config)
        block_config._attn_implementation = attention.NAME
        block = import_class(family.block)(block_config, layer_idx=0)
        norm_type = type(block.input_layernorm)
        width, eps = config.hidden_size, config.rms_norm_eps
        self.family = family
        self.add_module(family.hidden_norm, norm_type(width, eps=eps))
        self.add_module(family.token_norm, norm_type(width, eps=eps))
        self.add_module(family.proj, nn.Linear(2 * width, width, bias=False))
        # The block's parts, not the block: they carry the checkpoint's names; rows can be dropped between attention
        # and MLP; and gradient checkpointing, which wraps blocks, cannot reach them. With a module that is called
        # K times it raises under ZeRO-2 and gives wrong gradients, silently, under ZeRO-3.
        for name, child in block.named_children():
            self.add_module(name, child)
        self.add_module(family.final_norm, norm_type(width, eps=eps))

    def fuse(self, hidden_BTD: torch.Tensor, embeds_BTD: torch.Tensor) -> torch.Tensor:
        """Block input u from the previous hidden state and the embedding of the next token, [B, T, D]."""
        hidden = self.get_submodule(self.family.hidden_norm)(hidden_BTD)
        embeds = self.get_submodule(self.family.token_norm)(embeds_BTD)
        pair = (hidden, embeds) if self.family.hidden_first else (embeds, hidden)
        out: torch.Tensor = self.get_submodule(self.family.proj)(torch.cat(pair, dim=-1))
        return out

    def forward(
        self,
        hidden_BTD: torch.Tensor,
        embeds_BTD: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        state: "attention.RolloutState",
        rows: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """One draft step for every row. Returns g [B, T, D], after the final norm.

        `state` carries the keys and values of the steps before and gains this step's. With `rows` (flat indices into
        [B * T]) every row gives keys and values, but only those rows are taken further: g is [1, N, D].
        """
        children = dict(self.named_children())
        u = self.fuse(hidden_BTD, embeds_BTD)
        attended, _ = children["self_attn"](
            hidden_states=children["input_layernorm"](u),
            position_embeddings=position_embeddings,
            attention_mask=None,
            rollout=state,
        )
        u = u + attended
        if rows is not None:
            u = u.flatten(0, 1)[rows][None]
        u = u + children["mlp"](children["post_attention_layernorm"](u))
        out: torch.Tensor = self.get_submodule(self.family.final_norm)(u)
        return out
