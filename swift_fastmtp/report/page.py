"""The report as one HTML page that needs nothing else: no script, no font, no picture from anywhere.

It follows the reader's light or dark scheme, fits a phone (wide tables scroll by themselves), and has every picture as
text for those who do not see it. The page itself is `templates/report.html.j2`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from ..files.table import Table
from ..files.templates import render
from .answer import Answer
from .figure import Plot, inline_svg, page_colors


@dataclass
class HeaderCell:
    """A cell of a header's upper line."""

    start: int
    """The first column below it."""
    group: str
    """Empty for a column of its own."""
    names: list[str]
    """The columns below it."""


def page(
    title: str,
    answers: Sequence[Answer],
    notes: Sequence[str],
    plots: Sequence[Plot],
    tables: Sequence[Table],
    footer: str,
) -> str:
    """The whole document."""
    return render(
        __file__,
        "report.html",
        title=title,
        answers=answers,
        notes=notes,
        figures=[(inline_svg(plot), plot.caption) for plot in plots],
        tables=tables,
        grouped=grouped,
        footer=footer,
        light=page_colors(dark=False),
        dark=page_colors(dark=True),
    )


def grouped(columns: Sequence[tuple[str, str]]) -> list[HeaderCell]:
    """The upper line over these columns: neighbors of one group stand under one cell."""
    cells: list[HeaderCell] = []
    for place, (group, name) in enumerate(columns):
        if group and cells and cells[-1].group == group:
            cells[-1].names.append(name)
        else:
            cells.append(HeaderCell(place, group, [name]))
    return cells
