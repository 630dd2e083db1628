"""Tau of a real head that drafts from the ids of its request, of every size in one pass.

The logits of a position are computed once, their columns in the order of the ids' frequency. The largest logit of a
static map is then a running maximum, that of a request's set the larger one of its base's and of its own ids', so every
size costs a comparison.
"""

import numpy as np
import torch

from swift_fastmtp.method.frozen_head import project
from swift_fastmtp.method.metrics import expected_rounds
from swift_fastmtp.simulate.acceptance import _batches

STATIC, CONTEXT = "static", "context"
ROWS = 128
"""Whose logits exist at a time."""


@torch.no_grad()
def acceptance(model, texts, pad, batch_size, ranking, forms):
    """Which greedy drafts a server would accept, as `simulate.acceptance.greedy_acceptance`.

    Args:
        ranking: of `context_sets.ranking`.
        forms: pairs of `STATIC` or `CONTEXT` and a size: that of the map, or of the base.

    Returns, per form and text, bool [K, A].
    """
    order_V, rank_V = (torch.from_numpy(part) for part in ranking)
    weight = model.lm_head.weight[order_V]
    bounds = sorted({size for _, size in forms} | {len(order_V)})
    found = [[None] * len(texts) for _ in forms]
    for batch in _batches(model, texts, pad, batch_size, "the ids of requests"):
        B, T = batch.exists.shape[1:]
        ranks_BT = torch.zeros(B, T, dtype=torch.int64)
        for row, place in enumerate(batch.places):
            ids = torch.tensor(texts[place].ids)
            ranks_BT[row, : len(ids)] = rank_V[ids]
        accepted = torch.zeros(len(forms), *batch.exists.flatten(1).shape, dtype=torch.bool)
        going_on = batch.wanted[:1].expand(len(forms), -1)
        for k, wanted in enumerate(batch.wanted):
            chosen = wanted & going_on.any(0)
            rows = batch.rows[chosen]
            states = batch.outputs[k][chosen]
            targets = rank_V[batch.targets[k].flatten()[rows]]
            parts = []
            for part in torch.arange(len(rows)).split(ROWS):
                row, position = rows[part] // T, rows[part] % T
                logits = project(states[part], weight)
                parts.append(_accepted(logits, targets[part], ranks_BT[row], position, bounds, forms))
            if parts:
                accepted[:, k, rows] = torch.cat(parts, 1) & going_on[:, chosen]
            going_on = accepted[:, k, batch.rows]
        accepted = accepted.view(len(forms), *batch.exists.shape)
        for row, place in enumerate(batch.places):
            text = texts[place]
            for number in range(len(forms)):
                found[number][place] = accepted[number, :, row, text.start - 1 : text.end - 1].clone()
    return found


def _accepted(logits_NV, target_N, ranks_NT, position_N, bounds, forms):
    """[forms, N]: whether the largest logit of each form's ids is the target's.

    Args:
        logits_NV: columns are ranks.
        ranks_NT: of each row's text, as far as its batch is wide.
        position_N: of the base rows: the token after it is the last one that was accepted.
        bounds: every size, ascending.
    """
    of_target_N = logits_NV.gather(1, target_N[:, None])[:, 0]
    known_NT = torch.arange(ranks_NT.shape[1])[None] <= position_N[:, None] + 1
    of_text_N = logits_NV.gather(1, ranks_NT).masked_fill(~known_NT, -torch.inf).amax(1)
    in_text_N = ((ranks_NT == target_N[:, None]) & known_NT).any(1)
    largest = {}
    running_N = torch.full_like(of_target_N, -torch.inf)
    begin = 0
    for bound in bounds:
        if bound > begin:
            running_N = torch.maximum(running_N, logits_NV[:, begin:bound].amax(1))
        largest[bound], begin = running_N, bound
    accepted = []
    for form, size in forms:
        inside_N, best_N = target_N < size, largest[size]
        if form == CONTEXT:
            inside_N, best_N = inside_N | in_text_N, torch.maximum(best_N, of_text_N)
        accepted.append(inside_N & (of_target_N >= best_N))
    return torch.stack(accepted)


DRAWS = 2000


def compared(accepted, whole, K):
    """Tau with K drafts, and its share of the whole vocabulary's with a 95 % interval: a bootstrap over questions, the
    same ones for both."""
    mine_Q2, theirs_Q2 = (np.array([expected_rounds(each, K) for each in of]) for of in (accepted, whole))
    rng = np.random.default_rng(0)
    drawn_SQ = rng.multinomial(len(mine_Q2), np.full(len(mine_Q2), 1 / len(mine_Q2)), DRAWS)
    ratios = _tau(drawn_SQ @ mine_Q2) / _tau(drawn_SQ @ theirs_Q2)
    low, high = np.percentile(ratios, [2.5, 97.5])
    tau, of_whole = _tau(mine_Q2.sum(0)), _tau(theirs_Q2.sum(0))
    return {"tau": round(float(tau), 4), "share": [round(float(x), 4) for x in (tau / of_whole, low, high)]}


def _tau(totals):
    """Tokens over rounds; `totals` is [.., 2]."""
    return totals[..., 0] / totals[..., 1]
