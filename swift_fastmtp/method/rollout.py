"""The K-step recursion of the MTP head: pure tensors in, hidden states out.

With x the tokens, h the frozen backbone's last hidden state after its final norm, and base row i:

    step k consumes x_{i+k} and predicts x_{i+k+1};   g^0 = h
    u^k_i = fuse(g^{k-1}_i, embed(x_{i+k}));   g^k_i = final_norm(block(u^k_i))

The two rollouts differ in who sees whom (`attention.py`) and in the RoPE position of step k: `paper` uses the base
row's position at every step and no position-0 mask; `exact` uses position + (k - 1), which is the KV slot the
server writes, and follows the engine that will serve the layer where engines differ (`families.family.Graph`): which
h step 1 gets, whether g is fed back before or after the final norm, and the embedding at position 0.
"""

from collections.abc import Callable
from typing import Protocol

import torch

from ..families.family import Graph
from .attention import RolloutState
from .flash import Documents

RotaryEmbedding = Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class MTPLayer(Protocol):
    """What the recursion needs of the one MTP layer: u = fuse(g, embed), g = final_norm(block(u)) (`model/head.py`)."""

    @property
    def graph(self) -> Graph:
        """What the engine computes that will serve the layer."""

    def __call__(
        self,
        hidden_BTD: torch.Tensor,
        embeds_BTD: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        state: RolloutState,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """g of one draft step after and before its final norm, [B, T, D]; of `rows` (flat indices into [B * T]) only:
        [1, N, D]."""


def segment_ids(position_ids_BT: torch.Tensor, attention_mask_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Document number of every row, [B, T]; padding is -1.

    A new document starts where the position does not continue the one before it (packed rows carry positions that
    restart at 0), so packing and plain padding need no separate code.
    """
    starts = position_ids_BT.diff(dim=-1, prepend=position_ids_BT[:, :1] - 1) != 1
    segments = starts.long().cumsum(-1)
    if attention_mask_BT is not None:
        segments = segments.masked_fill(attention_mask_BT == 0, -1)
    return segments


def places(segment_ids_BT: torch.Tensor) -> torch.Tensor:
    """Of every row the rows before it in its own document, [B, T]."""
    row_T = torch.arange(segment_ids_BT.shape[1], device=segment_ids_BT.device)
    is_first = segment_ids_BT.diff(dim=-1, prepend=segment_ids_BT[:, :1] - 1) != 0
    start_BT = torch.where(is_first, row_T, 0).cummax(-1).values
    return row_T - start_BT


def shift_left(x: torch.Tensor, steps: int, fill: float = 0) -> torch.Tensor:
    """Row i becomes row i + steps of dimension 1; rows past the end become `fill`."""
    out = torch.full_like(x, fill)
    if steps < x.shape[1]:
        out[:, : x.shape[1] - steps] = x[:, steps:]
    return out


def step_targets(
    input_ids_BT: torch.Tensor,
    segment_ids_BT: torch.Tensor,
    labels_BT: torch.Tensor | None,
    num_steps: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Targets of every step and which rows count.

    Returns `(targets_KBT, valid_KBT)`: `targets[k-1, b, i] = x_{i+k+1}`, valid where that token exists, lies in the
    row's own document and is supervised (`labels` not -100).
    """
    supervised = segment_ids_BT >= 0 if labels_BT is None else (labels_BT != -100) & (segment_ids_BT >= 0)
    targets, valid = [], []
    for k in range(1, num_steps + 1):
        targets.append(shift_left(input_ids_BT, k + 1))
        same = shift_left(segment_ids_BT, k + 1, fill=-2) == segment_ids_BT
        valid.append(shift_left(supervised, k + 1) & same)
    return torch.stack(targets), torch.stack(valid)


def rollout(  # noqa: PLR0913
    mtp: MTPLayer,
    hidden_BTD: torch.Tensor,
    embeds_BTD: torch.Tensor,
    position_ids_BT: torch.Tensor,
    segment_ids_BT: torch.Tensor,
    rotary_emb: RotaryEmbedding,
    num_steps: int,
    mode: str,
    rows: torch.Tensor | None = None,
) -> torch.Tensor:
    """g^1..g^K of the rows asked for, [K, N, D].

    Args:
        hidden_BTD: h, the backbone's hidden state after its final norm (before it where `mtp.graph` says so).
        embeds_BTD: embed(x), unshifted.
        position_ids_BT: position of every row in its document.
        segment_ids_BT: from `segment_ids`.
        rotary_emb: the backbone's, `(x, position_ids) → (cos, sin)`.
        num_steps: K.
        mode: `exact` or `paper`.
        rows: flat indices into [B * T]; None is all B * T. In `exact` no other row is computed past the keys and
            values of step 1, because no other row sees more of it; `paper` needs them all.
    """
    exact = mode == "exact"
    flat = rows if exact else None
    state = RolloutState(mode, Documents(segment_ids_BT), flat)
    hidden = hidden_BTD
    outputs: list[torch.Tensor] = []
    for k in range(1, num_steps + 1):
        positions = position_ids_BT + (k - 1) if exact else position_ids_BT
        embeds = shift_left(embeds_BTD, k)
        if k > 1 and flat is not None:
            positions, embeds = positions.flatten()[flat][None], embeds.flatten(0, 1)[flat][None]
        if exact and mtp.graph.mask_position_zero:
            embeds = embeds.masked_fill((positions == 0)[..., None], 0)
        normed, before_norm = mtp(hidden, embeds, rotary_emb(hidden_BTD, positions), state, flat if k == 1 else None)
        hidden = before_norm if exact and mtp.graph.feedback_before_norm else normed
        chosen = normed.flatten(0, 1)
        outputs.append(chosen if exact or rows is None else chosen[rows])
    return torch.stack(outputs)
