"""A table of text cells, and how it becomes Markdown. `page.py` makes HTML of the same."""

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


def markdown(table: Table, level: int = 2) -> str:
    """Title, table and caption."""
    header = [" ".join(part for part in column if part) for column in table.columns]
    align = ["---" if i < table.num_keys or table.is_text else "---:" for i in range(len(header))]
    lines = [f"{'#' * level} {escape(table.title)}\n", _line(header), f"|{'|'.join(align)}|"]
    lines += [_line(row) for row in table.rows]
    return "\n".join(lines) + f"\n\n{escape(table.caption)}\n"


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(escape(cell) for cell in cells)} |"


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
