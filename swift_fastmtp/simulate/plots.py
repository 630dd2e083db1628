"""Pictures of results."""

from collections.abc import Sequence
from pathlib import Path

from ..files.plot_style import new_figure, plot_style
from .recommend import map_kind
from .result import HeadResult


@plot_style()
def plot_acceptance(results: Sequence[HeadResult], path: Path) -> None:
    """Marginal acceptance per depth and tau per K, one color per head."""
    depths = list(range(1, len(results[0].marginal) + 1))
    figure, ((left, right),) = new_figure(9, 3.6, columns=2)
    bar = 0.8 / len(results)
    for i, result in enumerate(results):
        color = f"C{i}"
        label = Path(result.name).name
        places = [d + (i - (len(results) - 1) / 2) * bar for d in depths]
        bars = left.bar(places, [100 * m for m in result.marginal], bar * 0.95, color=color, label=label)
        left.bar_label(bars, fmt="%.0f", fontsize=8)
        right.plot(depths, result.tau_micro, "o-", color=color, label=label)
        right.annotate(f"{result.tau_micro[-1]:.2f}", (depths[-1], result.tau_micro[-1]), xytext=(6, -3),
                       textcoords="offset points", fontsize=9, color=color)  # fmt: skip
    left.set(xlabel="draft depth", ylabel="accepted (%)", xticks=depths, ylim=(0, 105), title="Acceptance by depth")
    right.set(xlabel="drafts per step, K", ylabel="tokens per step (τ)", xticks=depths, title="Acceptance length")
    right.set_xlim(depths[0] - 0.2, depths[-1] + 0.45)
    left.legend()
    figure.savefig(path)


@plot_style()
def plot_maps(results: Sequence[HeadResult], num_steps: int, path: Path) -> None:
    """Tau and predicted speedup against the size of the token map, one column per group, one line per kind of map."""
    groups = list(dict.fromkeys(r.group for r in results))
    kinds = list(dict.fromkeys(map_kind(r.token_map) for r in results if r.token_map))
    figure, grid = new_figure(1.2 + 2.9 * len(groups), 5.2, 2, len(groups), sharex=True, sharey="row")
    for column, group in enumerate(groups):
        own = [r for r in results if r.group == group]
        (full,) = [r for r in own if r.token_map is None]
        for axes, of in zip(grid[:, column], (_tau, _speedup), strict=True):
            axes.axhline(of(full, num_steps), color="C0", linestyle="--", linewidth=1, label="whole vocabulary")
            for i, kind in enumerate(kinds):
                line = sorted(
                    (r.num_ids, of(r, num_steps)) for r in own if r.token_map and map_kind(r.token_map) == kind
                )
                axes.plot(*zip(*line, strict=True), "o-", color=f"C{1 + i}", markersize=4, label=kind)
            axes.set_xscale("log", base=2)
            sizes = sorted({r.num_ids for r in own if r.token_map})
            axes.set_xticks(sizes, [f"{n / 1024:g}k" for n in sizes], fontsize=8)
            axes.minorticks_off()
        grid[0, column].set_title(f"{group} answers")
        grid[1, column].set_xlabel("ids in the token map")
    grid[0, 0].set_ylabel(f"tokens per step (τ), K={num_steps}")
    grid[1, 0].set_ylabel("predicted speedup")
    grid[0, -1].legend(title="map", fontsize=8)
    figure.savefig(path)


def _tau(result: HeadResult, num_steps: int) -> float:
    return result.tau_micro[num_steps - 1]


def _speedup(result: HeadResult, num_steps: int) -> float:
    return result.speedup[num_steps - 1]
