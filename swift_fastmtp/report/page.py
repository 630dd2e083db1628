"""The report as one HTML page that needs nothing else: no script, no font, no picture from anywhere.

It follows the reader's light or dark scheme, fits a phone (wide tables scroll by themselves), and says every picture in
words for those who do not see it.
"""

from collections.abc import Sequence
from html import escape

from ..files.table import Table
from .figure import Plot, inline_svg, page_colors

_CSS = """
:root { color-scheme: light dark; --page: #ffffff; --ink: #1f2328; --soft: #57606a; --grid: #d0d7de; --stripe: #f6f8fa;
  LIGHT }
@media (prefers-color-scheme: dark) { :root { --page: #0d1117; --ink: #e6edf3; --soft: #9da7b3; --grid: #3d444d;
  --stripe: #161b22; DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--page); color: var(--ink);
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 0.5rem 0; }
h2 { font-size: 1.2rem; line-height: 1.3; margin: 2.2rem 0 0.6rem; }
nav ul { padding-left: 1.2rem; columns: 20rem; }
a { color: inherit; }
aside { border-left: 4px solid var(--series-1); padding: 0.1rem 1rem; background: var(--stripe); }
.scroll { overflow-x: auto; }
.scroll:focus-visible { outline: 2px solid var(--series-2); }
table { border-collapse: collapse; font-size: 0.9rem; font-variant-numeric: tabular-nums; }
caption { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.note { color: var(--soft); font-size: 0.9rem; margin: 0.5rem 0 0; max-width: 60rem; }
th, td { padding: 0.25rem 0.4rem; border-bottom: 1px solid var(--grid); text-align: right; white-space: nowrap; }
th[scope=row], th.text, td.text { text-align: left; font-weight: 400; }
td.text { white-space: normal; overflow-wrap: anywhere; min-width: 6rem; }
td.long { min-width: 18rem; }
thead th { font-weight: 600; border-bottom: 2px solid var(--grid); }
thead th[colspan] { text-align: center; }
tbody tr:nth-child(even) { background: var(--stripe); }
.plots { columns: 26rem; column-gap: 2rem; }
figure { margin: 0 0 1.5rem; max-width: 36rem; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { color: var(--soft); font-size: 0.9rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: 0.9rem; }
@media print { .scroll { overflow: visible; } }
"""


def page(title: str, notes: Sequence[str], plots: Sequence[Plot], tables: Sequence[Table], footer: str) -> str:
    """The whole document."""
    css = _CSS.replace("LIGHT", page_colors(False)).replace("DARK", page_colors(True))
    parts = [
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Nothing is loaded, even if a name in the results were to say so.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{escape(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n<main>\n<h1>{escape(title)}</h1>",
    ]
    if notes:
        parts.append('<aside aria-label="Read first"><p><strong>Read first</strong></p>\n<ul>')
        parts += [f"<li>{escape(note)}</li>" for note in notes]
        parts.append("</ul></aside>")
    parts.append('<nav aria-label="Contents"><ul>')
    links = [("plots", "Plots")] if plots else []
    links += [(f"table-{table.name}", table.title) for table in tables]
    parts += [f'<li><a href="#{escape(name)}">{escape(text)}</a></li>' for name, text in links]
    parts.append("</ul></nav>")
    if plots:
        parts.append('<section id="plots"><h2>Plots</h2>\n<div class="plots">')
        parts += [_figure(plot) for plot in plots]
        parts.append("</div></section>")
    parts += [_table(table) for table in tables]
    parts.append(f"</main>\n<footer>{escape(footer)}</footer>\n</body>\n</html>\n")
    return "\n".join(parts)


def _figure(plot: Plot) -> str:
    return f"<figure>{inline_svg(plot)}\n<figcaption>{escape(plot.caption)}</figcaption></figure>"


def _table(table: Table) -> str:
    name, title = f"table-{escape(table.name)}", escape(table.title)
    parts = [f'<section id="{name}"><h2 id="{name}-title">{title}</h2>']
    parts.append(f'<div class="scroll" role="region" tabindex="0" aria-labelledby="{name}-title"><table>')
    # The heading says it to those who see; a caption inside the scrolled box would be cut off on a phone.
    parts.append(f"<caption>{title}</caption>\n<thead>")
    parts += _head(table)
    parts.append("</thead>\n<tbody>")
    for row in table.rows:
        cells = []
        for i, cell in enumerate(row):
            if i < table.num_keys:
                cells.append(f'<th scope="row">{escape(cell)}</th>')
            elif table.is_text:
                cells.append(f'<td class="text{" long" if len(cell) > 60 else ""}">{escape(cell)}</td>')
            else:
                cells.append(f"<td>{escape(cell)}</td>")
        parts.append(f"<tr>{''.join(cells)}</tr>")
    parts.append(f'</tbody></table></div>\n<p class="note">{escape(table.caption)}</p></section>')
    return "\n".join(parts)


def _head(table: Table) -> list[str]:
    """One row of column names, or two where columns stand in groups."""
    two = any(group for group, _ in table.columns)
    upper, lower = [], []
    i = 0
    while i < len(table.columns):
        group, name = table.columns[i]
        text = ' class="text"' if i < table.num_keys or table.is_text else ""
        if not group:
            rows = ' rowspan="2"' if two else ""
            upper.append(f'<th scope="col"{rows}{text}>{escape(name)}</th>')
            i += 1
            continue
        end = i
        while end < len(table.columns) and table.columns[end][0] == group:
            lower.append(f'<th scope="col">{escape(table.columns[end][1])}</th>')
            end += 1
        upper.append(f'<th scope="colgroup" colspan="{end - i}">{escape(group)}</th>')
        i = end
    return [f"<tr>{''.join(row)}</tr>" for row in ([upper, lower] if two else [upper])]
