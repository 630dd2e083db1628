"""Every rate that a user sees, defined once.

For a base row (the row whose next token has just been committed) a draft of depth K is a chain: depth k counts only
if depths 1..k-1 matched.

    marginal_k     P(depths 1..k all match)                    the paper's 81 / 56 / 36 %
    conditional_k  P(depth k matches | depths 1..k-1 matched)
    tau            1 + sum_k marginal_k                        tokens per verification step, the bonus token included

A server counts verification steps instead of base rows; with steps in the place of rows the definitions are the same.
Micro averages are over all steps, macro averages over answers. The first token of an answer comes from the prefill and
is in none of them.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch  # takes seconds, and what reads results has no tensors


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
    import torch

    eligible = (valid_KBT & base_BT).cumprod(dim=0).bool()
    accepted = eligible & match_KBT.cumprod(dim=0).bool()
    previous = torch.cat([torch.ones_like(match_KBT[:1]), match_KBT.cumprod(dim=0).bool()[:-1]])
    reached = eligible & previous
    return AcceptanceCounts(*(x.sum(dim=(1, 2)) for x in (eligible, reached, accepted)))


def counts_by_context(
    match_KBT: torch.Tensor, valid_KBT: torch.Tensor, base_BT: torch.Tensor, place_BT: torch.Tensor
) -> torch.Tensor:
    """What `count_acceptance` sums, by part of the context (`part_of_context`): int64 [parts, 2, K], accepted and
    eligible; counts of batches and ranks add up.

    Args:
        match_KBT, valid_KBT, base_BT: as there.
        place_BT: rows before each in its document (`rollout.places`). What is drafted at row i stands behind tokens
            0 to i + 1 of it.
    """
    import torch

    eligible = (valid_KBT & base_BT).cumprod(dim=0)
    accepted = eligible * match_KBT.cumprod(dim=0)
    counts_N2K = torch.stack([accepted, eligible]).flatten(2).permute(2, 0, 1)
    ends = torch.tensor([64 << part for part in range(_PARTS - 1)], device=place_BT.device)
    part_N = torch.bucketize((place_BT + 2).flatten(), ends, right=True)
    return counts_N2K.new_zeros(_PARTS, 2, len(match_KBT)).index_add_(0, part_N, counts_N2K)


def taus_of_context(counts_P2K: Any) -> list[tuple[int, int, float, int]]:
    """(start, end, tau, base rows) of the parts that have base rows, of `counts_by_context`."""
    counts = np.asarray(counts_P2K, dtype=float)
    parts = []
    for number, (tau, rows) in enumerate(zip(_tau(counts).tolist(), counts[:, 1, 0].tolist(), strict=True)):
        if rows:
            start, end = _part(number)
            parts.append((start, end, tau, int(rows)))
    return parts


def row_counts(match_KBT: torch.Tensor, valid_KBT: torch.Tensor, base_BT: torch.Tensor) -> torch.Tensor:
    """What `count_acceptance` sums, by batch row: int64 [B, 2, K], accepted and eligible. Arguments as there."""
    import torch

    eligible = (valid_KBT & base_BT).cumprod(dim=0).bool()
    accepted = eligible & match_KBT.cumprod(dim=0).bool()
    return torch.stack([accepted.sum(dim=2).T, eligible.sum(dim=2).T], dim=1)


def text_counts(accepted: Sequence[torch.Tensor]) -> AcceptanceCounts:
    """Counts over all positions of texts.

    Args:
        accepted: per text [K, A]: `[k-1, t]`: with answer token t just committed, whether (or with which probability)
            depth k's draft of answer token t + k is accepted, if those before it were. Drafts past the end do not
            count.
    """
    import torch

    K = len(accepted[0])
    eligible, reached, counted = (torch.zeros(K, dtype=torch.float64) for _ in range(3))
    for accepted_KA in accepted:
        A = accepted_KA.shape[1]
        chain = torch.cat([torch.ones(1, A, dtype=torch.float64), accepted_KA.double().cumprod(0)])
        for k in range(1, min(K, A - 1) + 1):
            eligible[k - 1] += A - k
            reached[k - 1] += chain[k - 1, : A - k].sum()
            counted[k - 1] += chain[k, : A - k].sum()
    return AcceptanceCounts(eligible, reached, counted)


def expected_rounds(accepted_KA: torch.Tensor, depth: int) -> tuple[float, float]:
    """Tokens and verification steps that a server needs on average for one answer, by the chance with which it stops
    at each of its tokens; for drafts that are surely accepted or not, exactly those of `verify_rounds`.

    Args:
        accepted_KA: as in `text_counts`.
        depth: drafts per round, at most K.
    """
    import torch

    A = accepted_KA.shape[1]
    at_least = torch.cat([torch.ones(1, A, dtype=torch.float64), accepted_KA[:depth].double().cumprod(0)]).numpy()
    exactly = at_least - np.concatenate([at_least[1:], np.zeros((1, A))])
    visits = np.zeros(A + depth + 1)
    visits[0] = 1.0
    for t in range(A - 1):
        visits[t + 1 : t + depth + 2] += visits[t] * exactly[:, t]
    here = visits[: A - 1]
    return float((here * at_least[:, : A - 1].sum(0)).sum()), float(here.sum())


def taus_of_answers(accepted: Sequence[torch.Tensor], depth: int) -> tuple[float, float]:
    """Micro and macro tau of answers, with `depth` drafts per round: over all their rounds, and the mean over answers.

    Args:
        accepted: of each answer, as in `text_counts`.
        depth: drafts per round, at most K.
    """
    answers = [expected_rounds(accepted_KA, depth) for accepted_KA in accepted]
    micro = sum(tokens for tokens, _ in answers) / sum(rounds for _, rounds in answers)
    macro = sum(tokens / rounds for tokens, rounds in answers) / len(answers)
    return micro, macro


def verify_rounds(match_KA: torch.Tensor, depth: int) -> list[int]:
    """Of a greedy server's verification rounds on one answer, the drafts accepted in each; as `verify_steps`."""
    return [accepted for _, accepted in verify_steps(match_KA, depth)]


def verify_steps(match_KA: torch.Tensor, depth: int) -> list[tuple[int, int]]:
    """The verification rounds of a greedy server on one answer: (answer tokens before it, drafts accepted) of each.

    Args:
        match_KA: bool [K, A]; `[k-1, t]`: with answer token t just committed, the depth-k draft equals answer token
            t + k. False past the end of the answer.
        depth: drafts per round, at most K.

    The prefill yields token 0; a round that accepts c drafts commits c + 1 tokens (SGLang `eagle_worker_v2.py`).
    """
    prefix = match_KA[:depth].cumprod(dim=0).sum(dim=0).tolist()
    steps, t, last = [], 0, match_KA.shape[1] - 1
    while t < last:
        steps.append((t + 1, int(prefix[t])))
        t += steps[-1][1] + 1
    return steps


def tau_interval(answers: Sequence[tuple[int, int]], seed: int = 0, samples: int = 2000) -> tuple[float, float] | None:
    """95 % of micro tau, by drawing answers with replacement; None of fewer than two.

    Args:
        answers: (accepted drafts, verification steps) of each.
        seed: of the bootstrap.

    Of R answers R - 1 are drawn and Student's factor widens it, as in `speedup`.
    """
    if len(answers) < 2:
        return None
    counts_R2 = np.asarray(answers, dtype=float)
    total = counts_R2.sum(0)
    drawn_S2 = _draw_rounds(np.random.default_rng(seed), len(answers), samples) @ counts_R2
    half = _student(len(answers) - 1) * float((drawn_S2[:, 0] / drawn_S2[:, 1]).std())
    tau = 1 + float(total[0] / total[1])
    return max(1.0, tau - half), tau + half


def micro_tau(rounds: list[list[int]]) -> float:
    """Tokens per verification step over all answers, the prefill's token excluded; 0 if there were no steps."""
    return micro_tau_of([(sum(r), len(r)) for r in rounds]) or 0.0


def macro_tau(rounds: list[list[int]]) -> float:
    """Mean over answers of each answer's tokens per verification step; 0 if there were no steps."""
    return macro_tau_of([(sum(r), len(r)) for r in rounds]) or 0.0


def marginal_rates(histogram: Sequence[int]) -> list[float]:
    """Share of verification steps that accepted at least k drafts, for k = 1..K.

    Args:
        histogram: `[j]` steps that accepted exactly j drafts, j = 0..K (SGLang's `spec_correct_drafts_histogram`).
    """
    steps = sum(histogram)
    return [sum(histogram[k:]) / steps for k in range(1, len(histogram))] if steps else []


def conditional_rates(histogram: Sequence[int]) -> list[float]:
    """Share of the steps that accepted k - 1 drafts or more that accepted the k-th too, for k = 1..K; 0 if none did."""
    if not sum(histogram):
        return []
    return [sum(histogram[k:]) / (sum(histogram[k - 1 :]) or 1) for k in range(1, len(histogram))]


def micro_tau_of(counts: Sequence[tuple[int, int]]) -> float | None:
    """1 + all accepted drafts / all verification steps; None if there were no steps.

    Args:
        counts: (accepted drafts, steps) of every answer, as a server reports them.
    """
    steps = sum(s for _, s in counts)
    return 1 + sum(a for a, _ in counts) / steps if steps else None


def macro_tau_of(counts: Sequence[tuple[int, int]]) -> float | None:
    """Mean over answers of 1 + accepted drafts / steps; answers without a step do not count."""
    taus = [1 + a / s for a, s in counts if s]
    return sum(taus) / len(taus) if taus else None


def steps_by_chunk(chunk_tokens: Sequence[int], accepted: int, steps: int) -> list[tuple[int, int]] | None:
    """(answer tokens before it, accepted drafts) of every verification step, from a streamed answer.

    Args:
        chunk_tokens: new tokens of each chunk; the first is the prefill's token. A server that sends every step sends
            one chunk for each; the last may be cut off at the end of the answer, but what it accepted is what is
            missing in the sum.
        accepted: drafts accepted in all, of `steps` steps.

    Returns None where chunks are not steps (the server or the network put some together).
    """
    if len(chunk_tokens) != steps + 1 or chunk_tokens[0] != 1 or not steps:
        return None
    before, rounds = 1, []
    for new in chunk_tokens[1:-1]:
        rounds.append((before, new - 1))
        before += new
    last = accepted - sum(a for _, a in rounds)
    return [*rounds, (before, last)] if last >= chunk_tokens[-1] - 1 and min(chunk_tokens) > 0 else None


def tau_by_position(steps: Sequence[tuple[int, int]], width: int) -> list[tuple[int, int, float, int]]:
    """(start, end, tau, steps) of each part, `width` tokens long, of the answers.

    Args:
        steps: (answer tokens before it, accepted drafts) of verification steps; a step counts where it starts.
    """
    return _tau_by_part(steps, lambda before: before // width * width, lambda start: start + width)


def tau_by_context(steps: Sequence[tuple[int, int]]) -> list[tuple[int, int, float, int]]:
    """(start, end, tau, steps) of parts of the context that double in length (`part_of_context`).

    Args:
        steps: (tokens of prompt and answer before it, accepted drafts) of verification steps.
    """
    return _tau_by_part(steps, lambda before: part_of_context(before)[0], lambda start: part_of_context(start)[1])


def part_of_context(tokens: int) -> tuple[int, int]:
    """The part of contexts that a place with so many tokens before it is in: 0 to 64, to 128, to 256 ..; doubling,
    because acceptance changes by the factor in length, not by the token."""
    return _part((tokens // 64).bit_length())


def _part(number: int) -> tuple[int, int]:
    end = 64 << number
    return (end // 2 if number else 0), end


_PARTS = 26
"""The last begins at 2^30 tokens."""


def _tau_by_part(
    steps: Sequence[tuple[int, int]], start_of: Callable[[int], int], end_of: Callable[[int], int]
) -> list[tuple[int, int, float, int]]:
    parts: dict[int, list[int]] = {}
    for before, accepted in steps:
        parts.setdefault(start_of(before), []).append(accepted)
    return [(start, end_of(start), 1 + sum(a) / len(a), len(a)) for start, a in sorted(parts.items())]


def token_gaps(chunk_tokens: Sequence[int], chunk_seconds: Sequence[float]) -> list[float]:
    """Inter-token latency in seconds, one value per token after the first chunk: tokens that arrive together share the
    time since the chunk before (as SGLang's `bench_serving.py` counts it)."""
    return [s / n for n, s in zip(chunk_tokens[1:], chunk_seconds[1:], strict=True) for _ in range(n)]


def step_seconds(answers: Sequence[tuple[float, Sequence[float]]], concurrency: int) -> list[float]:
    """What a server's step takes while it decodes `concurrency` answers: of each answer the mean time between two of
    its chunks, with a chunk for each step. The mean, because a client that reads late gets several chunks at once.

    Args:
        answers: of each, when it was asked, in seconds, and the seconds before each of its chunks.
        concurrency: only gaps at whose both ends so many answers had begun and not ended count.
    """
    chunks_of = [list(accumulate(seconds, initial=start))[1:] for start, seconds in answers if len(seconds)]
    begun = sorted(chunks[0] for chunks in chunks_of)
    ended = sorted(chunks[-1] for chunks in chunks_of)

    def decoded_at(moment: float) -> int:
        return bisect_right(begun, moment) - bisect_left(ended, moment)

    means = []
    for chunks in chunks_of:
        gaps = [b - a for a, b in pairwise(chunks) if decoded_at(a) == decoded_at(b) == concurrency]
        if gaps:
            means.append(sum(gaps) / len(gaps))
    return means


def percentiles(values: Sequence[float]) -> tuple[float, float, float] | None:
    """The 50th, 90th and 99th, linearly interpolated; None of nothing."""
    if not len(values):
        return None
    p50, p90, p99 = np.percentile(np.asarray(values, dtype=float), [50, 90, 99]).tolist()
    return p50, p90, p99


def busy_seconds(spans: Sequence[tuple[float, float]]) -> float:
    """Length of the union of (start, end): the time in which at least one request was on its way. A run that was
    stopped and started again does not count the time between."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


_STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
_NORMAL = 1.960
"""Within how many standard errors 95 % lie: of Student's distribution with 1, 2, .. degrees of freedom; of many."""
MAX_ROUNDS = 10
_MOST = 1e6
"""Of an interval's end: a machine that slept through one of two rounds tells nothing, in numbers that nobody reads."""


def speedup(
    baseline: Sequence[Sequence[tuple[float, float]]],
    other: Sequence[Sequence[tuple[float, float]]],
    seed: int = 0,
    samples: int = 2000,
    paired: bool = True,
) -> tuple[float, float, float] | None:
    """Speed of `other` over the baseline's, and the ends of its 95 % interval.

    A bootstrap of two levels (percentile interval, Efron). Prompts are drawn with replacement, the same for both
    servers and in all rounds. Of R rounds R - 1 are drawn, which gives their mean the variance that it has (Rao and Wu,
    1988), and by how much the ratio of these rounds differs is widened by Student's factor, since a few rounds show
    their spread badly. A draw is the ratio of its prompts times the difference of its rounds.

    Args:
        baseline: of each round, (tokens, seconds) of each prompt.
        other: the same of the other server, with the same prompts in the same order.
        seed: of the bootstrap.
        paired: both were measured in the same rounds, one right after the other, so a round is drawn for both at once;
            else each server's rounds are drawn by themselves.

    Returns None if there is nothing to divide by.
    """
    base_RP2, other_RP2 = np.asarray(baseline, dtype=float), np.asarray(other, dtype=float)
    if not all(x.size and (x.sum((0, 1)) > 0).all() for x in (base_RP2, other_RP2)):
        return None

    # Prompts: sums over those that were drawn, in all rounds.
    rng = np.random.default_rng(seed)
    totals_P4 = np.concatenate([base_RP2.sum(0), other_RP2.sum(0)], axis=1)
    num_prompts = len(totals_P4)
    chance_P = np.full(num_prompts, 1 / num_prompts)
    drawn_S4 = np.stack([rng.multinomial(num_prompts, chance_P) @ totals_P4 for _ in range(samples)])
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = _speed(drawn_S4[:, 2:]) / _speed(drawn_S4[:, :2])
    value = float(_speed(other_RP2.sum((0, 1))) / _speed(base_RP2.sum((0, 1))))

    # Rounds, where there are several: sums over those that were drawn, of all prompts.
    base_R2, other_R2 = base_RP2.sum(1), other_RP2.sum(1)
    freedom = len(base_R2) - 1 if paired else len(base_R2) + len(other_R2) - 2
    if freedom:
        base_SR = _draw_rounds(rng, len(base_R2), samples)
        other_SR = base_SR if paired else _draw_rounds(rng, len(other_R2), samples)
        with np.errstate(divide="ignore", invalid="ignore"):
            differences = _speed(other_SR @ other_R2) / _speed(base_SR @ base_R2) / value
            ratios = ratios * differences ** (_student(freedom) / _NORMAL)
        ratios = np.where(ratios > _MOST, _MOST, ratios)

    low, high = np.percentile(ratios[np.isfinite(ratios)], [2.5, 97.5]).tolist()
    return value, low, high


def tau_of_rows(counts_R2K: Any) -> float:
    """tau of rows' counts (`row_counts`), all rows together."""
    return float(_tau(np.asarray(counts_R2K, dtype=float).sum(0)))


def tau_change(before_R2K: Any, now_R2K: Any, seed: int = 0, samples: int = 2000) -> tuple[float, float, float]:
    """tau of one head less that of another on the same rows, and the ends of its 95 % interval.

    Rows are drawn again, the same for both heads: tokens of one row are not independent, and two heads err at the same
    tokens. Of R rows R - 1 are drawn, as in `speedup`; the interval is Student's factor times their spread. One row
    alone tells nothing: its interval is all there is.

    Args:
        before_R2K: `row_counts` of the one head.
        now_R2K: of the other, on the same rows in the same order.
        seed: of the bootstrap.
    """
    before, now = np.asarray(before_R2K, dtype=float), np.asarray(now_R2K, dtype=float)
    change = tau_of_rows(now) - tau_of_rows(before)
    num_rows, depth = len(before), before.shape[2]
    if num_rows < 2:
        return change, -float(depth), float(depth)
    drawn_SR = _draw_rounds(np.random.default_rng(seed), num_rows, samples)
    changes = _tau(np.tensordot(drawn_SR, now, 1)) - _tau(np.tensordot(drawn_SR, before, 1))
    # Student's interval about the change: percentiles of a few rows end at the rows' own extremes.
    half = _student(num_rows - 1) * float(changes.std())
    return change, change - half, change + half


def _tau(counts: Any) -> Any:
    """1 + the sum of marginal rates; `counts` is [.., 2, K]."""
    accepted, eligible = counts[..., 0, :], counts[..., 1, :]
    return 1 + (accepted / np.maximum(eligible, 1)).sum(-1)


def _speed(totals: Any) -> Any:
    """Tokens over seconds; `totals` is [.., 2]."""
    return totals[..., 0] / totals[..., 1]


def _draw_rounds(rng: Any, num_rounds: int, samples: int) -> Any:
    """How often each round is drawn: [samples, num_rounds]."""
    return rng.multinomial(max(1, num_rounds - 1), np.full(num_rounds, 1 / num_rounds), samples)


def _student(freedom: int) -> float:
    """The factor of a 95 % interval; beyond the table an approximation that is off by less than 0.02."""
    return _STUDENT[freedom - 1] if freedom <= len(_STUDENT) else _NORMAL + 2.5 / freedom


def first_difference(one: Sequence[Any] | str, other: Sequence[Any] | str) -> int | None:
    """Where two answers (token ids, or characters) first differ; None if they are equal."""
    if one == other:
        return None
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
