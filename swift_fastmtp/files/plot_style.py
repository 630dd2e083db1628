"""How every plot looks, whatever the user's matplotlibrc says; what a plot shows is its own module's.

Nothing here imports matplotlib before a plot is drawn.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

INK, GRID, PAGE = "#1f2328", "#d0d7de", "#ffffff"
# (on white, on #0d1117): Okabe and Ito's hues made darker or lighter. Every pair is at least 11 apart (CIE76) for full
# color sight and for its three kinds of blindness (Machado 2009), and has a contrast of 3 with its background.
PALETTE = (
    ("#6e7781", "#a0a8b2"),
    ("#d55e00", "#f0884a"),
    ("#0072b2", "#58b1ec"),
    ("#00855f", "#34c795"),
    ("#5e0fc9", "#7b2de7"),
    ("#803413", "#985132"),
    ("#410404", "#f8f82a"),
    ("#0a0934", "#026996"),
)
"""On white they are also matplotlib's `C0` to `C7`; `C0` is for what the others are compared with."""
MARKERS = "osD^vPX*"


@contextmanager
def plot_style() -> Iterator[None]:
    """For a `with` or, as `@plot_style()`, for a function that draws and saves."""
    from matplotlib import style

    with style.context(_style(), after_reset=True):
        yield


def new_figure(width: float, height: float, rows: int = 1, columns: int = 1, **kwargs: Any) -> tuple[Any, Any]:
    """A figure of so many inches and the array [rows, columns] of its axes; `kwargs` are `Figure.subplots`'."""
    # Not pyplot's: that keeps every figure until it is closed, and picks a window system.
    from matplotlib.figure import Figure

    figure: Any = Figure(figsize=(width, height))
    return figure, figure.subplots(rows, columns, squeeze=False, **kwargs)


def _style() -> dict[str, Any]:
    from matplotlib import font_manager, rcsetup

    # Labels are the user's; DejaVu has no Chinese. A family that is not installed would be a warning per label.
    installed = set(font_manager.get_font_names())
    wide = ("Noto Sans CJK SC", "Noto Sans SC", "WenQuanYi Zen Hei", "Source Han Sans SC", "PingFang SC", "SimHei")
    return {
        "font.family": ["DejaVu Sans", *(name for name in wide if name in installed)],
        "font.size": 10.5,
        "text.color": INK,
        "text.parse_math": False,
        # No frame but the two axes, and a faint grid behind the data.
        "axes.titlesize": 11,
        "axes.labelcolor": INK,
        "axes.edgecolor": INK,
        "axes.facecolor": "none",
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.prop_cycle": rcsetup.cycler("color", [on_white for on_white, _ in PALETTE]),
        "grid.color": GRID,
        "xtick.color": INK,
        "ytick.color": INK,
        "legend.fontsize": 9.5,
        "legend.frameon": False,
        "lines.linewidth": 2,
        "lines.markersize": 6,
        "figure.facecolor": PAGE,
        "figure.constrained_layout.use": True,
        "savefig.dpi": 150,
        "svg.fonttype": "none",
        "svg.hashsalt": "fastmtp",
    }
