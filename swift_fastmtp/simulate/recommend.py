"""Which token map for whom, and how many drafts: the paper's Table 2, from predictions."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..files.table import terminal_table
from .result import HeadResult

FEW_TOKENS = 1000


@dataclass(frozen=True)
class Recommendation:
    """K for a server, and the token map of each group at that K (None: the whole vocabulary)."""

    num_steps: int
    token_maps: dict[str, str | None]
    speedup: float
    """Of all answers together."""


def recommend(results: Sequence[HeadResult], tokens: Mapping[str, int]) -> Recommendation:
    """The K at which all answers together take the least time, every group with its fastest map.

    Args:
        results: of one head and one kind of drafts, any groups that do not overlap.
        tokens: of each group.
    """
    groups: dict[str, list[HeadResult]] = defaultdict(list)
    for result in results:
        groups[result.group].append(result)
    recommendations = []
    for k in range(len(results[0].speedup)):
        best = {group: max(of, key=lambda r: r.speedup[k]) for group, of in groups.items()}
        seconds = sum(tokens[group] / r.speedup[k] for group, r in best.items())
        total = sum(tokens[group] for group in groups) / seconds
        recommendations.append(Recommendation(k + 1, {group: r.token_map for group, r in best.items()}, total))
    return max(recommendations, key=lambda r: r.speedup)


def advice_line(advice: Recommendation) -> str:
    """One line for the terminal."""
    if advice.speedup <= 1:
        return f"recommended: no drafts; the best, K={advice.num_steps}, is predicted at {advice.speedup:.2f}x"
    maps = [f"{group}: {Path(path).name if path else 'no map'}" for group, path in advice.token_maps.items()]
    if not any(advice.token_maps.values()):
        maps = []
    return f"recommended: {', '.join([f'K={advice.num_steps}', *maps])}; predicted speedup {advice.speedup:.2f}x"


def warnings(results: Sequence[HeadResult], advice: Recommendation, tokens: Mapping[str, int]) -> list[str]:
    """A line for every group with too few tokens to choose on, and for every map with which a group is slower than with
    the whole vocabulary, at the recommended K."""
    k = advice.num_steps - 1
    full = {r.group: r for r in results if r.token_map is None}
    lines = [
        f"warning: {group}: {tokens[group]} tokens are few to choose a map on; measure on more answers"
        for group, path in advice.token_maps.items()
        if path and tokens[group] < FEW_TOKENS
    ]
    for r in results:
        whole = full[r.group]
        if r.token_map and r.speedup[k] < whole.speedup[k]:
            lines.append(
                f"warning: {Path(r.token_map).name} slows {r.group} down: {r.speedup[k]:.2f}x against "
                f"{whole.speedup[k]:.2f}x without a map (tau {r.tau_micro[k]:.2f} against {whole.tau_micro[k]:.2f})"
            )
    return lines


def map_kind(token_map: str | None) -> str:
    """What a map was made for: its file's name without the size."""
    stem = Path(token_map or "").stem
    return stem.rpartition("-")[0] or stem


def map_table(results: Sequence[HeadResult], advice: Recommendation) -> str:
    """The paper's Table 2 for one group: tau and predicted speedup of every map and K."""
    steps = range(1, len(results[0].tau_micro) + 1)
    results = sorted(results, key=lambda r: (r.token_map is not None, map_kind(r.token_map), r.num_ids))
    names = [Path(r.token_map).stem if r.token_map else "whole vocabulary" for r in results]
    header = ["", "ids", *(f"tau K={k}" for k in steps), *(f"speedup K={k}" for k in steps), ""]
    lines = []
    for name, r in zip(names, results, strict=True):
        taus = [f"{x:.2f}" for x in r.tau_micro]
        speedup = [f"{x:.2f}x" for x in r.speedup]
        best = advice.token_maps.get(r.group) == r.token_map
        lines.append([name, f"{r.num_ids:,}", *taus, *speedup, "recommended" if best else ""])
    return terminal_table(header, lines)
