"""The ids of a request: a base that every request has, what its prompt holds, and what it has answered so far.

Ids are named by rank here: 0 is the most frequent one, so a base of B ids is the ranks below B. The set at answer token
t, the last one that was accepted, is what a server has there: prompt and answer up to and with t.
"""

import numpy as np


def ranking(counts):
    """Ids by frequency, the most frequent first, lower ids before others that are as frequent.

    Args:
        counts: of each part, as a language, int [V]. Each part weighs the same, however much of it there is.

    Returns (order, rank): the id of each rank and the rank of each id, int64 [V].
    """
    shares_PV = [counts_V / counts_V.sum() for counts_V in counts]
    order_V = np.argsort(-np.mean(shares_PV, axis=0), kind="stable")
    rank_V = np.empty_like(order_V)
    rank_V[order_V] = np.arange(len(order_V))
    return order_V, rank_V


def first_places(ids):
    """The distinct ids of a text, and where each stands first."""
    return np.unique(np.asarray(ids, dtype=np.int64), return_index=True)


def mean_sizes(texts, rank_V):
    """How many ids a request's set holds, over all answer tokens at which a server may draft, by the size of its base.

    Args:
        texts: with `ids`, `start` and `end`, as `simulate.acceptance.Text`.

    Returns float [V + 1]: `[B]` with a base of B ids. It never falls as B grows.
    """
    held_V = np.zeros(len(rank_V))
    drafted = 0
    for text in texts:
        answer = text.end - text.start
        ids, first = first_places(text.ids[: text.end])
        # An id of the prompt is there from the first draft on, one of the answer from where it was accepted.
        missed = np.maximum(first - text.start, 0)
        held_V[rank_V[ids]] += np.maximum(answer - 1 - missed, 0)
        drafted += answer - 1
    beyond = np.concatenate([held_V[::-1].cumsum()[::-1], [0.0]])
    return np.arange(len(rank_V) + 1) + beyond / drafted


def base_of(size, sizes):
    """The largest base whose sets hold `size` ids in the mean at most; None if those without a base hold more.

    Args:
        sizes: of `mean_sizes`.
    """
    if sizes[0] > size:
        return None
    return int(np.searchsorted(sizes, size, side="right")) - 1
