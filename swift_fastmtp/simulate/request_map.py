"""A token map of each request: a base that all of them have, the ids of its prompt, and those it has answered so far.

What a server has when a round begins is what drafts of that round choose from: prompt and answer up to and with the
token just committed. No engine drafts so; here it is measured before anyone builds it (MicroSpec, arXiv 2605.26444, and
DynaSpec, 2510.13847, choose ids by the context too).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class RequestMap(NamedTuple):
    """Where a token map would stand."""

    base_M: Tensor
    """Ids that every request has."""


class RequestVocabulary:
    """As `DraftVocabulary`, for rows that have ids of their own; columns and ids of the whole vocabulary stay.

    Args:
        base_M: ids that all rows have.
        request_NV: bool, those of each row's request.
    """

    def __init__(self, base_M: Tensor, request_NV: Tensor) -> None:
        self.allowed_NV = request_NV.clone()
        self.allowed_NV[:, base_M.to(request_NV.device)] = True

    def columns(self, logits_NV: Tensor) -> Tensor:
        """Logits with -inf outside a row's ids."""
        return logits_NV.masked_fill(~self.allowed_NV, -torch.inf)

    def encode(self, tokens_N: Tensor) -> Tensor:
        """The tokens; -1 where a row does not have its own."""
        return torch.where(self.allowed_NV.gather(1, tokens_N[:, None])[:, 0], tokens_N, -1)

    def decode(self, draft_ids_N: Tensor) -> Tensor:
        return draft_ids_N


def request_ids(ids_BT: Tensor, rows_N: Tensor, vocab_size: int) -> Tensor:
    """Bool [N, V]: the ids of each base row's text up to and with the token after it, the one just committed.

    Args:
        ids_BT: token ids, padded on the right.
        rows_N: base rows, flat indices of [B, T].
    """
    T = ids_BT.shape[1]
    row_N, position_N = rows_N // T, rows_N % T
    known_NT = torch.arange(T, device=ids_BT.device) <= position_N[:, None] + 1
    ids_NT = ids_BT[row_N]
    present_NV = torch.zeros(len(rows_N), vocab_size, dtype=torch.bool, device=ids_BT.device)
    present_NV.scatter_(1, torch.where(known_NT, ids_NT, ids_NT[:, :1]), True)
    return present_NV


def mean_size(texts: Sequence[Any], base_M: Tensor) -> float:
    """How many ids a request has, over all answer tokens at which a server may draft.

    Args:
        texts: as `acceptance.Text`.
    """
    base = set(base_M.tolist())
    extra = drafted = 0
    for text in texts:
        last = text.end - text.start - 1
        first: dict[int, int] = {}
        for place, token in enumerate(text.ids[: text.end]):
            first.setdefault(token, place)
        # An id of the prompt is there from the first draft on, one of the answer from where it was committed.
        extra += sum(max(last - max(place - text.start, 0), 0) for token, place in first.items() if token not in base)
        drafted += last
    return len(base) + extra / drafted
