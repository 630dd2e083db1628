"""The keys that sparse attention picks, in both rollouts.

In DeepSeek Sparse Attention an indexer scores the keys s that a query t may see, and the query attends to the
`index_topk` best of them (DeepSeek-V3.2, section 2.1; transformers `modeling_deepseek_v32.py`; SGLang
`dsa_indexer.py`):

    score(t, s) = sum_h w_th relu(q_th · k_s)

Which keys a query may see is the rollout's (`attention.py`): in `exact` those that the draft has in its cache, of
step 1 and of the row's own chain. Where no document is longer than `index_topk` all of them are picked, and no score
is computed.

A pick has no gradient, so the indexer is not trained: its tensors are carried along as they are.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..checkpoint.compat_deepspeed import whole_shape
from .flash import Documents

_BLOCK = 128  # queries that are scored at once


@dataclass
class Index:
    """What an indexer makes of the rows of one step.

    Attributes:
        queries: [B, T, H, d].
        keys: [B, T, d], one for all heads.
        weights: [B, T, H], of the heads; scales that would not change the order are left out.
    """

    queries: Tensor
    keys: Tensor
    weights: Tensor


class Indexer(nn.Module):
    """In place of transformers' indexer, which picks keys by itself and from one step only.

    Args:
        stock: that indexer, whose tensors become buffers of the same names: no optimizer, gradient or weight decay
            reaches them.
        turn: transformers' rotary embedding of its queries and keys.
    """

    def __init__(self, stock: Any, turn: Callable[..., tuple[Tensor, Tensor]]) -> None:
        super().__init__()
        self.n_heads, self.turn = stock.n_heads, turn
        for part, child in stock.named_children():
            for name, parameter in list(child.named_parameters()):
                delattr(child, name)
                # ZeRO-3 has partitioned the parameter already; buffers are whole on every rank, and filled from files.
                shape = whole_shape(parameter)
                child.register_buffer(name, torch.empty(shape, dtype=parameter.dtype, device=parameter.device))
            self.add_module(part, child)

    @torch.no_grad()
    def forward(
        self, hidden_BTD: Tensor, latent_BTR: Tensor, position_embeddings: tuple[Tensor, Tensor], *_: Any, **__: Any
    ) -> Index:
        """As transformers calls its own. In at least float32, whatever the tensors' dtypes, and under autocast too: a
        near tie would be picked otherwise."""
        given = (hidden_BTD, latent_BTR, *position_embeddings)
        hidden, latent, cos, sin = (x.to(_wide(hidden_BTD)) for x in given)
        with torch.autocast(hidden.device.type, enabled=False):
            queries = self._part("wq_b", latent).unflatten(-1, (self.n_heads, -1))
            keys = self._part("k_norm", self._part("wk", hidden))[:, :, None]
            halves = [x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1) for x in (queries, keys)]
            turned = self.turn(*(turning for turning, _ in halves), cos, sin, unsqueeze_dim=2)
            queries, keys = (torch.cat([x, rest], dim=-1) for x, (_, rest) in zip(turned, halves, strict=True))
            return Index(queries, keys[:, :, 0], self._part("weights_proj", hidden))

    def _part(self, name: str, x: Tensor) -> Tensor:
        part = self.get_submodule(name)
        out: Tensor = functional_call(part, {n: t.to(x.dtype) for n, t in part.named_buffers()}, x)
        return out


@torch.no_grad()
def pick(
    index: Index, keys: list[Tensor], rows: Tensor | None, documents: Documents, top: int
) -> tuple[Tensor | None, Tensor | None]:
    """Which keys the queries of one step attend to.

    Args:
        index: of this step's N rows.
        keys: index keys of step 1, [B, T, d], and of each step of the chain so far, this one's last.
        rows: flat indices into [B * T] of the step's rows; None is all.
        top: `index_topk`.

    Returns `(visible [B, T, T], chain [M, B or 1, 1, T or N])`: for each query the keys of step 1, none for rows not
    asked for, and the keys of its chain; `(None, None)` where every query whose chain ends within its document picks
    all that it may see.
    """
    if documents.longest <= top:
        return None, None
    (first, *chain), segments = keys, documents.segments
    B, T, _ = first.shape
    flat = torch.arange(B * T, device=first.device) if rows is None else rows
    queries, weights = index.queries.flatten(0, 1), index.weights.flatten(0, 1)
    visible = torch.zeros(B * T, T, dtype=torch.bool, device=first.device)
    own = torch.zeros(len(chain), len(flat), dtype=torch.bool, device=first.device)
    for b in range(B):
        for part in (flat // T == b).nonzero().squeeze(1).split(_BLOCK):
            position = flat[part] % T
            q, w = queries[part], weights[part]
            allowed = torch.arange(T, device=first.device) <= position[:, None]
            allowed &= segments[b] == segments[b, position, None]
            scores = [_score(torch.einsum("nhd,td->nth", q, first[b]), w[:, None]).masked_fill(~allowed, -torch.inf)]
            scores += [_score(torch.einsum("nhd,nd->nh", q, k.flatten(0, 1)[part]), w)[:, None] for k in chain]
            every = torch.cat(scores, dim=1)
            best = torch.zeros_like(every, dtype=torch.bool)
            best.scatter_(1, every.topk(min(top, every.shape[1]), dim=1).indices, True)
            visible[flat[part]], own[:, part] = best[:, :T] & allowed, best[:, T:].T
    return visible.view(B, T, T), own.view(len(chain), len(index.queries), 1, index.queries.shape[1])


def _score(products: Tensor, weights: Tensor) -> Tensor:
    """[..., H] and [..., H] → [...]."""
    return (products.relu() * weights).sum(-1)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)
