"""Where acceptance is lost: tau by position in the answer, and by position in the context.

Content and position look alike: what stands late may be easier or harder to draft wherever it stands. So a part says of
how many answers it is, how far tau would move with other answers, and what tau the same answers have outside of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from ..files.table import terminal_table
from ..method.metrics import part_of_context, tau_interval, verify_steps
from .acceptance import Text


@dataclass(frozen=True)
class PartResult:
    """The verification steps that begin in one part of the answers, or of the contexts (prompt and answer)."""

    of: str
    """`answer` or `context`: what `start` and `end` count in."""
    start: int
    """Tokens before the step, at least."""
    end: int
    """Tokens before the step, fewer than."""
    answers: int
    """That have a step here."""
    steps: int
    first: float
    """Share of these steps whose first draft was accepted."""
    tau: float
    interval: tuple[float, float] | None
    """95 %, by drawing answers; None of one answer."""
    elsewhere: float | None
    """tau of the same answers' other steps."""


def parts_of(texts: Sequence[Text], accepted: Sequence[torch.Tensor]) -> list[PartResult]:
    """Of one head: the parts that have steps, of the answers and then of the contexts.

    Args:
        texts: prompts and answers.
        accepted: bool [K, A] of each, of greedy drafts (`acceptance.greedy_acceptance`).
    """
    depth = len(accepted[0])
    steps_of = [verify_steps(accepted_KA, depth) for accepted_KA in accepted]
    results = []
    for of in ("answer", "context"):
        # Of each part and text: the drafts that its steps accepted there.
        by_part: dict[tuple[int, int], dict[int, list[int]]] = {}
        for number, (text, steps) in enumerate(zip(texts, steps_of, strict=True)):
            for before, count in steps:
                place = part_of_context(before + text.start if of == "context" else before)
                by_part.setdefault(place, {}).setdefault(number, []).append(count)
        for (start, end), counts_of in sorted(by_part.items()):
            everywhere = [count for number in counts_of for _, count in steps_of[number]]
            results.append(_part(of, start, end, list(counts_of.values()), everywhere))
    return results


def _part(of: str, start: int, end: int, inside: list[list[int]], everywhere: list[int]) -> PartResult:
    """`inside`: of each answer, the drafts that its steps accepted here; `everywhere`: that all steps of these answers
    did."""
    accepted = list(chain.from_iterable(inside))
    other_steps = len(everywhere) - len(accepted)
    return PartResult(
        of,
        start,
        end,
        answers=len(inside),
        steps=len(accepted),
        first=sum(count > 0 for count in accepted) / len(accepted),
        tau=1 + sum(accepted) / len(accepted),
        interval=tau_interval([(sum(counts), len(counts)) for counts in inside]),
        elsewhere=1 + (sum(everywhere) - sum(accepted)) / other_steps if other_steps else None,
    )


def parts_table(parts: Sequence[PartResult], depth: int) -> str:
    """For the terminal; nothing where all answers and contexts are short."""
    lines = []
    for of in ("answer", "context"):
        own = [part for part in parts if part.of == of]
        if len(own) < 2:
            continue
        for part in own:
            interval = "" if part.interval is None else f"{part.interval[0]:.2f} to {part.interval[1]:.2f}"
            elsewhere = "" if part.elsewhere is None else f"{part.elsewhere:.2f}"
            place = f"{of}, {part.start} to {part.end - 1}"
            counts = [str(part.answers), str(part.steps)]
            lines.append([place, *counts, f"{100 * part.first:.1f}%", f"{part.tau:.2f}", interval, elsewhere])
    if not lines:
        return ""
    header = ["tokens before", "answers", "steps", "first draft", f"tau K={depth}", "95 %", "same answers elsewhere"]
    return terminal_table(header, lines)
