"""Tables of text cells, in a terminal and in Markdown. `report/page.py` makes HTML of the same."""

from collections.abc import Sequence
from dataclasses import dataclass

NOTHING = "–"
"""A cell whose number was not measured; nothing is filled in."""


@dataclass(frozen=True)
class Table:
    """Text cells under columns that may stand in groups (a task over its τ and token/s)."""

    name: str
    """For anchors: letters, digits, dots and hyphens."""
    title: str
    caption: str
    columns: list[tuple[str, str]]
    """(group, name); group is empty for a column of its own."""
    rows: list[list[str]]
    num_keys: int = 1
    """Leading columns that say what a row is; the others are numbers unless `is_text`."""
    is_text: bool = False


def number(value: float | None, digits: int = 2, unit: str = "") -> str:
    return NOTHING if value is None else f"{value:.{digits}f}{unit}"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def markdown(table: Table, level: int = 2) -> str:
    """Title, table and caption."""
    header = [" ".join(part for part in column if part) for column in table.columns]
    num_text = len(header) if table.is_text else table.num_keys
    parts = [
        f"{'#' * level} {escape(table.title)}",
        markdown_table(header, table.rows, num_text),
        escape(table.caption),
    ]
    return "\n\n".join(parts) + "\n"


def terminal_table(header: Sequence[str], rows: Sequence[Sequence[str]], num_text: int = 1) -> str:
    """Columns two spaces apart; the first `num_text` hold text, the others numbers. A short row ends in empty cells."""
    # The header goes in as a row: around one of its own tabulate leaves four spaces.
    return _tabulate([header, *rows], (), "plain", num_text, len(header))


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[str]], num_text: int = 1, raw: bool = False) -> str:
    """As `terminal_table`, in Markdown. Cells are text and escaped here; with `raw` they are Markdown already."""
    if not raw:
        header = [escape(cell) for cell in header]
        rows = [[escape(cell) for cell in row] for row in rows]
    return _tabulate(rows, header, "pipe", num_text, len(header))


def _tabulate(rows: Sequence[Sequence[str]], header: Sequence[str], style: str, num_text: int, width: int) -> str:
    from tabulate import tabulate

    sides = ["left" if i < num_text else "right" for i in range(width)]
    # Cells are as their functions rounded them: tabulate would read them as numbers and round again.
    return tabulate(rows, header, tablefmt=style, colalign=sides, disable_numparse=True)


def escape(text: str) -> str:
    """Text for a line of Markdown or a cell: one line, no column break, no tag, no picture."""
    for character, written in (
        ("\\", "\\\\"),
        ("&", "&amp;"),
        ("<", "&lt;"),
        ("|", "\\|"),
        ("![", "!\\["),
        ("](", "]\\("),
    ):
        text = text.replace(character, written)
    return " ".join(text.split())
