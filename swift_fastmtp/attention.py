"""Attention of the two rollouts, as one transformers attention function.

The head's block is a stock transformers decoder layer; its config names the function registered here. So
projections, norms, RoPE and grouped heads are transformers' own, and only "who sees whom" is ours:

* `paper`: step k is ordinary causal attention over step-k keys.
* `exact`: query (k, i) sees the step-1 keys (1, j), j ≤ i, and its own chain (m, i), m = 2..k; one softmax over
  both. This is what a server computes: the draft's KV cache holds step-1 entries for committed tokens, and a
  draft chain adds its own (SGLang `eagle_worker_v2.py`; EAGLE-3 calls it training-time test).

In both, rows see only their own document (`segment_ids`).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AttentionInterface

NAME = "fastmtp_rollout"


@dataclass
class RolloutState:
    """What the steps of one rollout share.

    Attributes:
        rollout: `exact` or `paper`.
        visible_BTT: bool [B, 1, T, T], true where row i may see row j; None means plain causal.
        keys, values: [B, H_kv, T, d] of each step so far (`exact` only).
    """

    rollout: str
    visible_BTT: torch.Tensor | None
    keys: list[torch.Tensor] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)


def visibility(segment_ids_BT: torch.Tensor) -> torch.Tensor | None:
    """Causal and same-document mask [B, 1, T, T], or None where plain causal attention is the same.

    It is the same when every row holds one document with padding (-1) at its end only: no real row can see that
    padding, and what padding rows see does not matter.
    """
    real = segment_ids_BT >= 0
    one_document = (segment_ids_BT == segment_ids_BT[:, :1]) | ~real
    padding_last = real[:, :1].all() & (real[:, 1:] <= real[:, :-1]).all()
    if bool(one_document.all() & padding_last):
        return None
    T = segment_ids_BT.shape[1]
    causal = torch.ones(T, T, dtype=torch.bool, device=segment_ids_BT.device).tril()
    return (segment_ids_BT[:, None, :, None] == segment_ids_BT[:, None, None, :]) & causal


def rollout_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    rollout: RolloutState,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface: q [B, H, T, d], k and v [B, H_kv, T, d] → [B, T, H, d]."""
    if rollout.rollout == "exact":
        rollout.keys.append(key)
        rollout.values.append(value)
    if len(rollout.keys) > 1:
        out = chain_attention(query, rollout.keys, rollout.values, rollout.visible_BTT, scaling)
    else:
        out = torch.nn.functional.scaled_dot_product_attention(
            query,
            key,
            value,
            attn_mask=rollout.visible_BTT,
            is_causal=rollout.visible_BTT is None,
            scale=scaling,
            enable_gqa=query.shape[1] != key.shape[1],
        )
    return out.transpose(1, 2), None


def chain_attention(
    query: torch.Tensor,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    visible_BTT: torch.Tensor | None,
    scaling: float,
) -> torch.Tensor:
    """Step k ≥ 2 of the exact rollout: one softmax over the step-1 context and the row's own chain.

    Args:
        query: [B, H, T, d] of step k.
        keys, values: k tensors [B, H_kv, T, d], one per step; the last is this step's own.
        visible_BTT: see `RolloutState`.

    Returns [B, H, T, d].
    """
    groups = query.shape[1] // keys[0].shape[1]
    keys = [k.repeat_interleave(groups, dim=1) for k in keys]
    values = [v.repeat_interleave(groups, dim=1) for v in values]
    T = query.shape[2]
    if visible_BTT is None:
        visible_BTT = torch.ones(T, T, dtype=torch.bool, device=query.device).tril()
    context = (query @ keys[0].transpose(-1, -2)).masked_fill(~visible_BTT, float("-inf"))
    chain = torch.stack([(query * k).sum(-1) for k in keys[1:]], dim=-1)
    scores = torch.cat([context, chain], dim=-1) * scaling
    # float32 only for half precision: float64 tests must not be rounded.
    weights = scores.softmax(-1, dtype=torch.promote_types(scores.dtype, torch.float32)).to(query.dtype)
    out = weights[..., :T] @ values[0]
    for m, v in enumerate(values[1:]):
        out = out + weights[..., T + m, None] * v
    return out


AttentionInterface.register(NAME, rollout_attention)
