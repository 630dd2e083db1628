"""`fastmtp report`: results files → the answer, tables, plots and one HTML page."""

from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..files.staging import new_folder, try_output
from ..files.table import Table
from ..files.templates import render
from .answer import answer_lines, answers
from .entries import slices
from .figure import write_plot
from .merge import Merged, load_results, notes
from .page import page
from .plots import plots
from .tables import (
    acceptance_table,
    concurrency_table,
    cpu_table,
    distribution_table,
    file_table,
    latency_table,
    lossless_table,
    main_table,
    map_table,
    server_table,
    speedup_table,
    task_table,
)

TITLE = "Multi-token prediction, measured"


def report(results: Sequence[str | Path], output_dir: str | Path) -> list[str]:
    """Write report.md, report.html and plots/*.png, *.svg to a new folder. Returns the answer, a line a sentence.

    Args:
        results: results.json of `fastmtp bench`; several, which must not overlap, are put together
        output_dir: folder to write; must not exist

    Raises `FastMTPError` for invalid or contradicting files.
    """
    try_output(output_dir)
    merged = load_results(results)
    with new_folder(output_dir) as folder:
        write_report(merged, folder)
    return [*answer_lines(answers(merged)), *(f"note: {note}" for note in notes(merged))]


def write_report(results: Merged, folder: Path) -> None:
    """The files of `report` for results that are merged already (`merge.merge`)."""
    given, drawn, shown, warnings = answers(results), plots(results), tables(results), notes(results)
    (folder / "plots").mkdir()
    for plot in drawn:
        write_plot(plot, folder / "plots")
    text = render(__file__, "report.md", title=TITLE, answers=given, notes=warnings, tables=shown, plots=drawn)
    (folder / "report.md").write_text(text, encoding="utf-8")
    made = f"Made by fastmtp report, swift_fastmtp {__version__}."
    (folder / "report.html").write_text(page(TITLE, given, warnings, drawn, shown, made), encoding="utf-8")


def tables(results: Merged) -> list[Table]:
    """Every table that the data has something for, in the order of the report."""
    possible: list[Table | None] = []
    every = slices(results)
    possible += [make(results, t, c) for t, c in every for make in (main_table, speedup_table, map_table)]
    temperatures = sorted({t for t, _ in every})
    possible += [make(results, t) for t in temperatures for make in (acceptance_table, concurrency_table)]
    possible += [latency_table(results), cpu_table(results), lossless_table(results), distribution_table(results)]
    possible += [task_table(results), server_table(results), file_table(results)]
    return [table for table in possible if table]
