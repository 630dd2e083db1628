"""What measured acceptance says of an MTP layer: sound, weak, as good as random, or broken in a known way.

The limits are from measurements: docs/doctor.md has them.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..method.metrics import AcceptanceCounts
from .repairs import Repair

WEAK = 0.5
"""Acceptance at depth 1 below which a layer is called weak: published ones have 70 to 90 % on text of their own model,
those put on a model that they were not trained for 20 to 40 %."""
OVER_RANDOM = 0.05
"""By how much acceptance at depth 1 must be above that of random weights."""
GAIN = 1.25
"""A repair must multiply the number of accepted drafts by this."""
DEVIATIONS = 4.0
"""By how many standard deviations a repair must have helped at more positions than it harmed, were both as likely.
Strict, because some fifteen repairs are tried, and neighboring positions are alike."""


@dataclass(frozen=True)
class Measured:
    """What a layer reached on the texts."""

    name: str
    counts: AcceptanceCounts
    tau: float
    """Tokens per verification step, micro average (`metrics.micro_tau`)."""
    lengths: torch.Tensor
    """Drafts accepted at each position of the texts, of the largest depth."""

    @property
    def rate(self) -> float:
        """Acceptance at depth 1."""
        return self.counts.marginal[0]

    @property
    def text(self) -> str:
        """The rate with the numbers behind it."""
        return f"{self.rate:.1%} ({int(self.counts.accepted[0])} of {int(self.counts.eligible[0])})"


class Verdict(NamedTuple):
    """One finding; the doctor's `Finding` has the same fields."""

    level: str
    what: str
    why: str
    fix: str


def helps(before: Measured, after: Measured) -> bool:
    """Whether a repair helped, by more than chance: a sign test over positions."""
    difference = after.lengths - before.lengths
    better, worse = int((difference > 0).sum()), int((difference < 0).sum())
    deviations = (better - worse) / max(1, better + worse) ** 0.5
    return deviations >= DEVIATIONS and int(after.lengths.sum()) >= GAIN * int(before.lengths.sum())


def judge(
    as_it_is: Measured,
    tried: list[tuple[Repair, Measured]],
    random: list[Measured],
    start: Measured | None,
    base: str,
) -> tuple[list[Verdict], Measured | None]:
    """Findings, and the repair that helps most, if one does.

    Args:
        as_it_is: the layer as it is stored.
        tried: each known repair, and what the layer reached with it.
        random: layers of the same shape with random weights.
        start: one made of the last decoder layer, untrained; None where it cannot be made.
        base: the model's folder, for the command that trains.
    """
    chance = max(random, key=lambda measured: measured.rate)
    as_random = as_it_is.rate < chance.rate + OVER_RANDOM
    helping = [(repair, after) for repair, after in tried if helps(as_it_is, after)]
    train = f"swift sft --model_type fastmtp --model {base} --dataset ..."
    first = f"the head's first draft is accepted in {as_it_is.text}"
    if helping:
        repair, after = max(helping, key=lambda each: int(each[1].lengths.sum()))
        level = "error" if as_random or repair.change else "warning"
        what = f"as it is, {first}, tau {as_it_is.tau:.2f}; {repair.name} in {after.text}, tau {after.tau:.2f}"
        return [Verdict(level, what, repair.cause, repair.fix)], after
    if as_random:
        what = f"{first}: no better than random weights, {chance.text}"
        why = f"it is random, or of another model: none of {len(tried)} known single faults explains it"
        fix = f"take the original model's MTP layer (`fastmtp graft`), then train it: {train}"
        return [Verdict("error", what, why, fix)], None
    if as_it_is.rate < WEAK:
        why = (
            "it drafts, but published heads reach 70 % and more: trained too little, or for another state of the model"
        )
        if start and start.rate >= as_it_is.rate:
            why += f"; a copy of the last decoder layer, untrained, reaches {start.text}"
        return [Verdict("warning", f"weak: {first}", why, f"heal it: {train}")], None
    return [], None
