"""How many drafts at which load: the K that gives the most tokens per second, by how many answers are decoded at once.

    speed(K, B) = B tau_K / t(K, B),   speed(0, B) = B / t(paused, B)

A schedule's "no drafts" is slower than a server without a head (`step_times.py`), which all speeds are compared with.
tau is the head's, which the load does not change; times are measured or predicted (`step_times.py`). The file that is
written is SGLang's `--speculative-adaptive-config`; `fastmtp serve-args --schedule` makes vLLM's
`num_speculative_tokens_per_batch_size` of it.

SGLang (0.5.23, `speculative/adaptive_spec_params.py`) can also move between several K at one load, by how many drafts
were accepted lately. It goes to the K just above that number, whatever a step costs, so each load has one K here.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import FastMTPError
from ..files.table import terminal_table
from .step_times import StepTimes


@dataclass(frozen=True)
class Depth:
    """What is best at one load.

    Attributes:
        batch_size: answers that are decoded at once.
        num_steps: drafts per step, K; 0 is no drafts.
        speedups: [K + 1] over a server without a head, of every K; None where its time is not known. K = 0 is no drafts
            by schedule; as fast as that server where its own time is not known.
    """

    batch_size: int
    num_steps: int
    speedups: list[float | None]


def depths_by_load(tau: Sequence[float], times: StepTimes) -> list[Depth]:
    """The best K at every load of which the time of a step without drafts is known.

    Args:
        tau: [K], for 1, 2, .. drafts per step.
        times: of steps.

    Raises `FastMTPError` if there is no such load, or no K to choose from.
    """
    depths = []
    for size in times.batch_sizes:
        decode = times.milliseconds[0, size]
        speedups: list[float | None] = [decode / times.paused.get(size, decode)]
        for K, tokens in enumerate(tau, start=1):
            time = times.milliseconds.get((K, size))
            speedups.append(None if time is None else tokens * decode / time)
        if any(speedup is not None for speedup in speedups[1:]):
            best = max(range(len(speedups)), key=lambda K: speedups[K] or 0.0)
            depths.append(Depth(size, best, speedups))
    if not depths:
        raise FastMTPError(
            f"{times.source}: needs steps without drafts (a baseline) and with 1 to {len(tau)} at the same load"
        )
    return depths


def schedule(depths: Sequence[Depth]) -> dict[str, dict[str, list[int]]]:
    """SGLang's adaptive configuration: from each batch size on, up to the next one, the K to use."""
    entries: dict[str, dict[str, list[int]]] = {}
    last = None
    for depth in depths:
        if depth.num_steps != last:
            # The first entry is for all smaller batches, too.
            entries[str(depth.batch_size if entries else 1)] = {"candidate_steps": [depth.num_steps]}
            last = depth.num_steps
    return entries


def schedule_table(depths: Sequence[Depth]) -> str:
    """A line for each load: speed over a server without a head at every K."""
    lines = []
    for depth in depths:
        speeds = [_times(depth.speedups[K]) for K in _known_steps(depths)]
        best = f"K={depth.num_steps}" if depth.num_steps else "no drafts"
        lines.append([str(depth.batch_size), *speeds, best])
    header = [f"K={K}" if K else "no drafts" for K in _known_steps(depths)]
    return terminal_table(["at once", *header, "best"], lines, num_text=1)


def _known_steps(depths: Sequence[Depth]) -> list[int]:
    """The K that have a column: those of which a time is known; no drafts where it is not a server without a head."""
    speeds_of_K = list(zip(*(depth.speedups for depth in depths), strict=True))
    known = [K for K, speeds in enumerate(speeds_of_K) if K and set(speeds) != {None}]
    paused = set(speeds_of_K[0]) != {1.0}
    return [0, *known] if paused else known


def _times(speedup: float | None) -> str:
    return "" if speedup is None else f"{speedup:.2f}x"


def schedule_line(depths: Sequence[Depth]) -> str:
    """From which load on a server without a head is faster, and by how much."""
    best = [depth.speedups[depth.num_steps] or 0.0 for depth in depths]
    last = max((i for i, depth in enumerate(depths) if depth.num_steps and best[i] > 1), default=None)
    if last is None:
        return "schedule: drafts pay at no load; serve without"
    if last + 1 == len(depths):
        return f"schedule: drafts pay at every load that is known, up to {depths[-1].batch_size} answers at once"
    line = f"schedule: from {depths[last + 1].batch_size} answers at once on drafts do not pay"
    lowest = min(best[last + 1 :])
    if lowest < 1:
        line += f"; a server without a head is up to {1 / lowest:.2f}x as fast there"
    return line
