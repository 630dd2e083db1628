"""Every rate that a user sees, defined once.

For a base row (the row whose next token has just been committed) a draft of depth K is a chain: depth k counts only
if depths 1..k-1 matched.

    marginal_k     P(depths 1..k all match)                    the paper's 81 / 56 / 36 %
    conditional_k  P(depth k matches | depths 1..k-1 matched)
    tau            1 + sum_k marginal_k                        tokens per verification step, the bonus token included
"""

from dataclasses import dataclass

import torch


@dataclass
class AcceptanceCounts:
    """Row counts per depth, each [K]; counts of batches and ranks add up.

    Attributes:
        eligible: base rows whose answer is long enough for depths 1..k.
        reached: of those, rows where depths 1..k-1 matched.
        accepted: of those, rows where depth k matched too.
    """

    eligible: torch.Tensor
    reached: torch.Tensor
    accepted: torch.Tensor

    @property
    def marginal(self) -> list[float]:
        return _ratio(self.accepted, self.eligible)

    @property
    def conditional(self) -> list[float]:
        return _ratio(self.accepted, self.reached)

    @property
    def tau(self) -> float:
        return 1.0 + sum(self.marginal)


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> list[float]:
    return (part.double() / whole.double().clamp(min=1)).tolist()


def count_acceptance(match_KBT: torch.Tensor, valid_KBT: torch.Tensor, base_BT: torch.Tensor) -> AcceptanceCounts:
    """Counts over all base rows of a teacher-forced pass.

    Args:
        match_KBT: depth k's draft equals the text (`losses.StepLosses`).
        valid_KBT: depth k's target exists and is supervised (`rollout.step_targets`).
        base_BT: rows where a server starts a draft: the row's next token belongs to the answer.
    """
    eligible = (valid_KBT & base_BT).cumprod(dim=0).bool()
    accepted = eligible & match_KBT.cumprod(dim=0).bool()
    previous = torch.cat([torch.ones_like(match_KBT[:1]), match_KBT.cumprod(dim=0).bool()[:-1]])
    reached = eligible & previous
    return AcceptanceCounts(*(x.sum(dim=(1, 2)) for x in (eligible, reached, accepted)))


def verify_rounds(match_KA: torch.Tensor, depth: int) -> list[int]:
    """The verification rounds of a greedy server on one answer: drafts accepted in each.

    Args:
        match_KA: bool [K, A]; `[k-1, t]`: with answer token t just committed, the depth-k draft equals answer token
            t + k. False past the end of the answer.
        depth: drafts per round, at most K.

    The prefill yields token 0; a round that accepts c drafts commits c + 1 tokens (SGLang `eagle_worker_v2.py`).
    """
    prefix = match_KA[:depth].cumprod(dim=0).sum(dim=0).tolist()
    rounds, t, last = [], 0, match_KA.shape[1] - 1
    while t < last:
        rounds.append(int(prefix[t]))
        t += rounds[-1] + 1
    return rounds


def micro_tau(rounds: list[list[int]]) -> float:
    """Tokens per verification step over all answers, the prefill's token excluded."""
    steps = sum(map(len, rounds))
    return (sum(map(sum, rounds)) + steps) / max(1, steps)


def macro_tau(rounds: list[list[int]]) -> float:
    """Mean over answers of each answer's tokens per verification step."""
    taus = [1 + sum(r) / len(r) for r in rounds if r]
    return sum(taus) / max(1, len(taus))
