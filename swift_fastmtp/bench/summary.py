"""What the terminal shows of a benchmark when it ends: a line per run, and what a reader of it must know."""

from ..files.table import terminal_table
from ..method.verification import regime_of
from .results import Interval, Results, drift, run_title


def table(results: Results) -> str:
    """The terminal's table, one line per run."""
    head = ["server", "task", "T", "at once", "tau", "tok/s each", "tok/s", "speedup", "lossless"]
    with_cpu = any(run.cpu for run in results.runs)
    if with_cpu:
        head += ["tok/CPU-s", "CPU speedup"]
    lines = []
    for run in results.runs:
        lossless = run.lossless
        line = [
            run.server,
            run.task,
            f"{run.temperature:g}",
            str(run.concurrency),
            "" if run.tau_micro is None else f"{run.tau_micro:.3f}",
            f"{run.tokens_per_second_per_request:.1f}",
            f"{run.tokens_per_second:.1f}",
            _times(run.speedup),
            f"{lossless.equal}/{lossless.compared}" if lossless else "",
        ]
        if with_cpu:
            line += [f"{run.cpu.tokens_per_second:.1f}", _times(run.cpu.ratio)] if run.cpu else ["", ""]
        lines.append(line)
    return terminal_table(head, lines, num_text=2)


def _times(ratio: Interval | None) -> str:
    return f"{ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]" if ratio else ""


def regimes(results: Results) -> list[str]:
    """How servers make and verify drafts above temperature 0, as far as their commands are known."""
    sampled = {run.server for run in results.runs if run.temperature > 0}
    lines = []
    for name, server in results.servers.items():
        if name in sampled and server.num_steps and server.command:
            lines.append(f"{name} above temperature 0: {regime_of(server.command).title}")
    return lines


def distributions(results: Results) -> list[str]:
    """Whether answers above temperature 0 have the baseline's distribution, as far as it was tested."""
    return [f"{one.server}, T={one.temperature:g}: distribution: {one}" for one in results.distributions]


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
    if drifted := drift(results.runs, results.baseline):
        lines.append(f"warning: {drifted}")
    return lines
