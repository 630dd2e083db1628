"""What measured acceptance says of an MTP layer: sound, weak, as good as random, or broken in a known way.

The limits are from measurements: docs/results/probe.md has them.
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
Strict, because some fifteen repairs are tried, and neighboring positions share their drafts."""


@dataclass(frozen=True)
class Measured:
    """What a layer reached on the texts."""

    name: str
    counts: AcceptanceCounts
    tau: float
    """Tokens per verification step, micro average (`metrics.micro_tau`)."""
    lengths: torch.Tensor
    """Drafts accepted at each position of the texts, of the largest depth; where positions are alike, at the first."""

    @property
    def rate(self) -> float:
        """Acceptance at depth 1."""
        return self.counts.marginal[0]

    @property
    def text(self) -> str:
        """The rate with the numbers behind it."""
        return f"{self.rate:.1%} of the time ({int(self.counts.accepted[0])} of {int(self.counts.eligible[0])})"


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
    random: Measured,
    start: Measured | None,
    own: Measured | None,
    base: str,
) -> tuple[list[Verdict], Measured | None]:
    """Findings, and the repair that helps most, if one does.

    Args:
        as_it_is: the layer as it is stored.
        tried: each known repair, and what the layer reached with it.
        random: a layer of the same shape with random weights.
        start: one made of the last decoder layer, untrained; None where it cannot be made.
        own: the one that the base model has, where the layer is kept apart from it.
        base: the model's folder, for the command that trains.
    """
    as_random = as_it_is.rate < random.rate + OVER_RANDOM
    helping = [(repair, after) for repair, after in tried if helps(as_it_is, after)]
    train = f"swift sft --model_type fastmtp --model {base} --dataset ..."
    first = f"the head's first draft is accepted {as_it_is.text}"
    verdicts = []
    helped = None
    if helping:
        repair, helped = max(helping, key=lambda each: int(each[1].lengths.sum()))
        # What is computed is the engine's choice; what is stored is the checkpoint's fault.
        level = "error" if as_random or repair.change else "warning"
        what = f"as it is, {first}, tau {as_it_is.tau:.2f}; {repair.name} {helped.text}, tau {helped.tau:.2f}"
        verdicts.append(Verdict(level, what, repair.cause, repair.fix))
    elif as_random:
        what = f"{first}: no better than random weights, {random.text}"
        why = f"it is random, or of another model: none of {len(tried)} known single faults explains it"
        fix = f"take the original model's MTP layer (`fastmtp graft`), then train it: {train}"
        verdicts.append(Verdict("error", what, why, fix))
    elif as_it_is.rate < WEAK:
        why = "published heads reach 70 to 90 %: it was trained too little, or for another state of the model"
        if start and start.rate >= as_it_is.rate:
            why += f"; a copy of the last decoder layer, untrained, reaches {start.text}"
        verdicts.append(Verdict("warning", f"weak: {first}", why, f"heal it: {train}"))
    if own and not helping and not as_random and helps(as_it_is, own):
        what = f"the base model's own head does better: its first draft is accepted {own.text}, tau {own.tau:.2f}"
        verdicts.append(
            Verdict("warning", what, "training made it worse", "serve the base model's own, or train again")
        )
    return verdicts, helped
