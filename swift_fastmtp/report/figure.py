"""How the report's figures look, and how a figure becomes files.

Each is narrow (one column, so that it stays readable on a phone) and becomes a PNG and an SVG on white; the HTML page
takes the same SVG with its colors turned into CSS variables, so it follows the reader's light or dark scheme. A method
has one color and one marker in all of them.
"""

import io
import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from ..files.plot_style import GRID, INK, MARKERS, PAGE, PALETTE, new_figure
from .entries import Entry
from .merge import Merged

_OF_METHOD = {"baseline": 0, "vanilla": 1, "tuned": 2, "tuned+map": 3}


@dataclass
class Plot:
    """A finished figure. `svg` is a whole document; `alt` is the picture's content as text."""

    name: str
    title: str
    caption: str
    alt: str
    svg: str
    png: bytes


def write_plot(plot: Plot, folder: Path) -> None:
    """NAME.png and NAME.svg."""
    (folder / f"{plot.name}.png").write_bytes(plot.png)
    (folder / f"{plot.name}.svg").write_text(plot.svg, encoding="utf-8")


def inline_svg(plot: Plot) -> str:
    """The SVG for an HTML page: no XML header, ids of its own, colors as CSS variables (`page_colors`)."""
    svg = plot.svg[plot.svg.index("<svg") :]
    for i, (light, _) in enumerate(PALETTE):
        svg = svg.replace(light, f"var(--series-{i})")
    return svg.replace(INK, "currentColor").replace(GRID, "var(--grid)").replace(PAGE, "var(--page)")


def page_colors(dark: bool) -> str:
    """CSS declarations of the variables that `inline_svg` uses, but for --page and --grid."""
    return " ".join(f"--series-{i}: {colors[dark]};" for i, colors in enumerate(PALETTE))


def _places(results: Merged) -> dict[str, int]:
    """Label to place in the palette: a method's own for its first label, the spare ones for others."""
    places: dict[str, int] = {}
    for server in results.servers.values():
        if server.label in places:
            continue
        own = _OF_METHOD.get(server.method)
        spare = [i for i in range(len(PALETTE)) if i not in places.values() and i not in _OF_METHOD.values()]
        free = own is not None and own not in places.values()
        places[server.label] = own if own is not None and free else spare[0] if spare else len(places) % len(PALETTE)
    return places


def paints(results: Merged, shown: list[Entry]) -> dict[str, tuple[str, str]]:
    """Entry name to color and marker; variants of one label share the color and differ in the marker."""
    places, seen, looks = _places(results), dict[str, int](), dict[str, tuple[str, str]]()
    for entry in shown:
        if entry.name not in looks:
            again = seen.get(entry.label, 0)
            seen[entry.label] = again + 1
            place = places[entry.label]
            looks[entry.name] = (PALETTE[place][0], MARKERS[(place + 4 * again) % len(MARKERS)])
    return looks


def column_figure(height: float, rows: int = 1, **kwargs: Any) -> tuple[Any, list[Any]]:
    """A figure of `height` inches and its axes, one above the other."""
    figure, axes = new_figure(5.4, height, rows, **kwargs)
    return figure, list(axes[:, 0])


def short(text: str, length: int) -> str:
    """A user's label, cut so that it leaves room for the picture; tables have it whole."""
    text = " ".join(text.split())
    return text if len(text) <= length else text[: length - 1] + "…"


def legend(figure: Any, axes: Any) -> None:
    """Below the figure, where it covers nothing."""
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        labels = [short(label, 55) for label in labels]
        wide = max(map(len, labels)) > 26
        figure.legend(handles, labels, loc="outside lower center", ncols=1 if wide else 2)


def finish(figure: Any, name: str, title: str, how: str, caption: str, facts: Iterable[str]) -> Plot:
    """The figure with its title, as bytes and text; `facts` become the description for those who do not see it."""
    figure.suptitle(f"{title}\n{how}", x=0.02, ha="left", fontsize=10.5)
    figure.get_layout_engine().set(w_pad=0.09, h_pad=0.07)
    title = f"{title} ({how})"
    png, svg = io.BytesIO(), io.StringIO()
    nothing = dict.fromkeys(("Date", "Creator", "Type", "Format"))
    with warnings.catch_warnings():
        # Without a Chinese font a PNG has boxes for Chinese labels; SVG and page have the text.
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        figure.savefig(png, format="png")
        figure.savefig(svg, format="svg", metadata=nothing)
    alt = f"{title}. {'; '.join(facts)}."
    return Plot(name, title, caption, alt, _named(svg.getvalue(), name, title, alt), png.getvalue())


def _named(svg: str, name: str, title: str, alt: str) -> str:
    """An SVG with title and description for screen readers, with ids that no other plot on a page has."""
    svg = re.sub(r"<!DOCTYPE.*?>\s*", "", svg, flags=re.S)
    svg = re.sub(r"\s*<metadata>.*?</metadata>", "", svg, flags=re.S)
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(#|href="#)', rf"\g<1>{name}-", svg)
    svg = svg.replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")
    svg = svg.replace("<svg ", f'<svg role="img" aria-labelledby="{name}-title {name}-desc" ', 1)
    names = f'<title id="{name}-title">{escape(title)}</title>\n<desc id="{name}-desc">{escape(alt)}</desc>'
    return re.sub(r"(<svg [^>]*>)", lambda m: f"{m[1]}\n{names}", svg, count=1)
