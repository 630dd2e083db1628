"""What the terminal shows of a benchmark when it ends: a line per run, and what a reader of it must know."""

from ..files.table import terminal_table
from .results import Results, run_title


def table(results: Results) -> str:
    """The terminal's table, one line per run."""
    head = ("server", "task", "T", "at once", "tau", "tok/s each", "tok/s", "speedup", "lossless")
    lines = []
    for run in results.runs:
        ratio, lossless = run.speedup, run.lossless
        lines.append(
            (
                run.server,
                run.task,
                f"{run.temperature:g}",
                str(run.concurrency),
                "" if run.tau_micro is None else f"{run.tau_micro:.3f}",
                f"{run.tokens_per_second_per_request:.1f}",
                f"{run.tokens_per_second:.1f}",
                f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio else "",
                f"{lossless.equal}/{lossless.compared}" if lossless else "",
            )
        )
    return terminal_table(head, lines, num_text=2)


def warnings(results: Results) -> list[str]:
    """What a reader of the table must know."""
    lines = []
    for run in results.runs:
        where = run_title((run.server, run.task, run.temperature, run.concurrency))
        if run.num_failed:
            lines.append(f"warning: {where}: {run.num_failed} of {run.num_requests} requests refused")
        if run.tau_micro is None and results.servers[run.server].num_steps:
            lines.append(f"warning: {where}: the server does not tell what it accepted; tau is not known")
        if run.lossless and run.lossless.first_divergence:
            first = run.lossless.first_divergence
            other = run.lossless.compared - run.lossless.equal
            lines.append(
                f"warning: {where}: {other} of {run.lossless.compared} answers are not the baseline's; "
                f"first: {first.id}, turn {first.turn}, token {first.token}"
            )
    return lines
