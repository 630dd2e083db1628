"""Pictures of results."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .simulate import HeadResult

_COLOURS = ("#9aa5b1", "#1f77b4", "#e4572e", "#2a9d8f", "#8e6bbf", "#d4a017")


def plot_acceptance(results: Sequence["HeadResult"], path: Path) -> None:
    """Marginal acceptance per depth and tau per K, one colour per head."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    depths = list(range(1, len(results[0].marginal) + 1))
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), constrained_layout=True)
    bar = 0.8 / len(results)
    for i, result in enumerate(results):
        colour = _COLOURS[i % len(_COLOURS)]
        label = Path(result.name).name
        places = [d + (i - (len(results) - 1) / 2) * bar for d in depths]
        bars = left.bar(places, [100 * m for m in result.marginal], bar * 0.95, color=colour, label=label)
        left.bar_label(bars, fmt="%.0f", fontsize=8)
        right.plot(depths, result.tau_micro, "o-", color=colour, label=label)
        right.annotate(f"{result.tau_micro[-1]:.2f}", (depths[-1], result.tau_micro[-1]), xytext=(6, -3),
                       textcoords="offset points", fontsize=9, color=colour)  # fmt: skip
    left.set(xlabel="draft depth", ylabel="accepted (%)", xticks=depths, ylim=(0, 105), title="Acceptance by depth")
    right.set(xlabel="drafts per step, K", ylabel="tokens per step (τ)", xticks=depths, title="Acceptance length")
    right.set_xlim(depths[0] - 0.2, depths[-1] + 0.45)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    left.legend(frameon=False)
    staged = path.with_name(f".{path.name}")
    figure.savefig(staged, dpi=150, format=path.suffix[1:])
    plt.close(figure)
    staged.replace(path)
