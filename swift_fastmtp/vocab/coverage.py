"""How much of what the model says a map holds: of each language and domain, on rows that the map was not made from.

A draft can never propose a token outside its map, so coverage bounds acceptance from above, and a map that is made for
one domain can be slower than none in another.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files.plot_style import PALETTE, new_figure, plot_style
from ..files.table import markdown_table, terminal_table
from ..files.templates import render
from .counts import Counts

Ints = NDArray[np.int64]

OUT_OF_DOMAIN = 0.02
"""A map that covers a cell worse than its own ones by more than this is reported."""
MAX_COLUMNS = 8


@dataclass(frozen=True)
class TokenMap:
    """One map."""

    name: str
    ids: Ints
    """[size], ascending."""
    filled: int
    """How many of them were never counted for this name, and are not in every map."""


def covered(order: Ints, held_V: Ints) -> NDArray[np.float64]:
    """[len(order)]: the share of the tokens in `held_V` that the first 1, 2, .. ids hold. There must be tokens."""
    shares: NDArray[np.float64] = np.cumsum(held_V[order]) / held_V.sum()
    return shares


def coverage_report(maps: Sequence[TokenMap], own: Mapping[str, Sequence[str]], counts: Counts) -> dict[str, Any]:
    """`cells`: their tokens; `maps`: coverage of every cell's held-out tokens, null where there are none, and of the
    map's own cells together; `unions`: how many ids the maps of one size hold together."""
    cells = sorted(counts.counted)
    entries = []
    for token_map in maps:
        # A map is out of its domain where it covers clearly less than where it was made for.
        mine = own[token_map.name]
        coverage = {cell: _share(counts.held_out[cell], token_map.ids) for cell in cells}
        of_own = _share(np.sum([counts.held_out[cell] for cell in mine], axis=0), token_map.ids)
        worse = [
            cell
            for cell, share in coverage.items()
            if cell not in mine and share is not None and of_own is not None and share < of_own - OUT_OF_DOMAIN
        ]
        entries.append(
            {
                "name": token_map.name,
                "size": len(token_map.ids),
                "cells": list(mine),
                "counted_tokens": int(sum(counts.counted[cell].sum() for cell in mine)),
                "ids_never_counted": token_map.filled,
                "coverage_of_own": of_own,
                "coverage": coverage,
                "out_of_domain": worse,
            }
        )
    return {
        "cells": {
            cell: {
                "counted_tokens": int(counts.counted[cell].sum()),
                "distinct_ids": int((counts.counted[cell] > 0).sum()),
                "held_out_tokens": int(counts.held_out[cell].sum()),
            }
            for cell in cells
        },
        "out_of_domain": OUT_OF_DOMAIN,
        "maps": entries,
        "unions": _unions(maps),
    }


def _share(held_V: Ints, ids: Ints) -> float | None:
    total = int(held_V.sum())
    return int(held_V[ids].sum()) / total if total else None


def _unions(maps: Sequence[TokenMap]) -> list[dict[str, Any]]:
    """What a server that switches between maps of one size keeps rows for."""
    by_size: dict[int, list[TokenMap]] = {}
    for token_map in maps:
        if token_map.name != "mixed":
            by_size.setdefault(len(token_map.ids), []).append(token_map)
    return [
        {"size": size, "names": [m.name for m in of], "ids": len(np.unique(np.concatenate([m.ids for m in of])))}
        for size, of in sorted(by_size.items())
        if len(of) > 1
    ]


def _columns(report: dict[str, Any]) -> list[str]:
    """The cells with the most held-out tokens."""
    tokens = {cell: entry["held_out_tokens"] for cell, entry in report["cells"].items()}
    largest = sorted((cell for cell in tokens if tokens[cell]), key=lambda cell: (-tokens[cell], cell))
    return sorted(largest[:MAX_COLUMNS])


def _lines(report: dict[str, Any]) -> list[tuple[str, ...]]:
    cells = _columns(report)
    lines = [("map", "ids", "filled up", "its own", *cells)]
    for entry in report["maps"]:
        shares = (_percent(share) for share in (entry["coverage_of_own"], *(entry["coverage"][cell] for cell in cells)))
        lines.append((entry["name"], f"{entry['size']}", f"{entry['ids_never_counted']}", *shares))
    return lines


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f}%"


def coverage_table(report: dict[str, Any]) -> str:
    """For the terminal."""
    header, *lines = _lines(report)
    return terminal_table(header, lines)


def outside_lines(report: dict[str, Any]) -> list[str]:
    """One line for each map that is noticeably worse outside its own cells."""
    lines = []
    for entry in report["maps"]:
        worse = sorted(entry["out_of_domain"], key=lambda cell: (entry["coverage"][cell], cell))
        if worse:
            named = ", ".join(f"{cell} {_percent(entry['coverage'][cell])}" for cell in worse[:MAX_COLUMNS])
            more = f" and {len(worse) - MAX_COLUMNS} more" if len(worse) > MAX_COLUMNS else ""
            lines.append(
                f"warning: {entry['name']}-{entry['size']} is out of its domain in {named}{more}: over "
                f"{100 * OUT_OF_DOMAIN:g} points below its own {_percent(entry['coverage_of_own'])}; drafts of these "
                "are cut short, serve them with another map or with `mixed`"
            )
    return lines


def markdown(report: dict[str, Any], about: dict[str, Any]) -> str:
    """coverage.md, `templates/coverage.md.j2`."""
    header, *lines = _lines(report)
    counted_how = about["messages_whose_tokens_come_from"]
    counted = [
        (cell, f"{n['counted_tokens']}", f"{n['distinct_ids']}", f"{n['held_out_tokens']}")
        for cell, n in report["cells"].items()
    ]
    made_from = {entry["name"]: ", ".join(entry["cells"]) for entry in report["maps"]}
    return render(
        __file__,
        "coverage.md",
        count=about["count"],
        held_out_percent=f"{100 * about['held_out']:g}",
        sources_of_counts=", ".join(f"{how} ({n} messages)" for how, n in counted_how.items()),
        must_keep=about["must_keep"],
        coverage=markdown_table(header, lines),
        cells_left_out=len(report["cells"]) > len(_columns(report)),
        warnings=outside_lines(report),
        counted=markdown_table(("cell", "tokens", "distinct ids", "held-out tokens"), counted),
        made_from=markdown_table(("map", "made from"), list(made_from.items()), num_text=2),
        unions=report["unions"],
        bad_rows=about["bad_rows"],
    )


@plot_style()
def plot_coverage(
    parts: Sequence[tuple[str, Sequence[str], Ints]], counts: Counts, sizes: Mapping[str, Sequence[int]], path: Path
) -> None:
    """Coverage against size: of each name's own cells in its own maps, and in `mixed`.

    Args:
        parts: (name, its cells, its ranking of ids).
        sizes: those that were written, per name; marked.
    """
    mixed = next((order for name, _, order in parts if name == "mixed"), None)
    if mixed is None:
        figure, panels = new_figure(5, 3.8)
    else:
        figure, panels = new_figure(9, 3.8, columns=2, sharey=True)
    lowest, drawn = 1.0, False
    for panel, axes in enumerate(panels[0]):
        own = [part for part in parts if part[0] != "mixed"][: len(PALETTE)]
        for i, (name, cells, ranking) in enumerate(own):
            color = f"C{i}"
            held_V = np.sum([counts.held_out[cell] for cell in cells], axis=0)
            if not held_V.any():
                continue
            order = ranking if panel == 0 or mixed is None else mixed
            share = covered(order, held_V)
            first = min(min(of) for of in sizes.values()) // 4
            size = np.unique(np.geomspace(max(first, 64), len(order), 200).astype(int)).clip(1, len(order))
            axes.plot(size, 100 * share[size - 1], color=color, linewidth=2, label=name)
            marks = list(sizes[name if panel == 0 else "mixed"])
            axes.plot(marks, [100 * share[s - 1] for s in marks], "o", color=color, markersize=4)
            lowest, drawn = min(lowest, float(share[size[0] - 1])), True
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
        axes.set(xlabel="ids in the map", title="Each with its own map" if panel == 0 else "All with `mixed`")
        axes.grid(True)
    panels[0][0].set_ylabel("held-out tokens covered (%)")
    panels[0][0].set_ylim(100 * lowest - 1, 100.5)
    if drawn:
        panels[0][0].legend(loc="lower right")
    figure.savefig(path)
