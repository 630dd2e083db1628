"""`fastmtp compare A B`: did B get worse? For continuous integration, so the answer is also an exit status.

Compared is what both files measured, run by run: server, task, temperature, concurrency. A run, or a measure of one,
that only one file has is named and judged by nobody.
"""

from dataclasses import dataclass, field
from pathlib import Path

from ..bench.results import Lossless, Run, RunKey, drift
from ..errors import FastMTPError
from ..files.table import NOTHING, number, terminal_table
from .entries import speed, tau
from .merge import Merged, describe, differences, key, load_results
from .tables import divergence

HEADER = ("server", "task", "temp.", "conc.", "τ A", "τ B", "change", "token/s A", "token/s B", "change",
          "total A", "total B", "change", "equal A", "equal B", "")  # fmt: skip


@dataclass
class Comparison:
    """B against A; without `regressions` B is as good as A within the limits."""

    rows: list[list[str]] = field(default_factory=list)
    regressions: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Limits:
    """What B may lose without being worse: the arguments of `compare`."""

    tau_drop: float
    speed_drop: float
    equal_drop: float


def compare(
    a: str | Path,
    b: str | Path,
    *,
    max_tau_drop: float = 0.02,
    max_speed_drop: float = 0.05,
    max_equal_drop: float = 0.0,
) -> Comparison:
    """B against A, two results.json of `fastmtp bench`.

    Args:
        a: results.json of before
        b: results.json of now
        max_tau_drop: fraction of A's micro tau
        max_speed_drop: fraction of A's token/s, of one request and of the run
        max_equal_drop: of the share of answers equal to the baseline's

    Raises `FastMTPError` for invalid files, limits outside [0, 1), or files that have no run in common.
    """
    limits = Limits(max_tau_drop, max_speed_drop, max_equal_drop)
    for name, value in vars(limits).items():
        if not 0 <= value < 1:
            raise FastMTPError(f"--max_{name} {value:g}: a fraction, from 0 to below 1")
    return compare_results(load_results([a]), load_results([b]), limits)


def compare_results(a: Merged, b: Merged, limits: Limits) -> Comparison:
    """`compare` for loaded results."""
    runs_a, runs_b = ({key(run): run for run in results.runs} for results in (a, b))
    common = [place for place in runs_a if place in runs_b]
    if not common:
        raise FastMTPError("the files have no run (server, task, temperature, concurrency) in common")
    comparison = Comparison()

    # What makes the numbers of A and B hard to compare.
    for what in differences([a.files[0][1], b.files[0][1]]):
        comparison.remarks.append(f"A and B differ in {what}")
    for name, results in (("A", a), ("B", b)):
        if drifted := drift(results.runs, results.baseline):
            comparison.remarks.append(f"{name}: {drifted}")
    for task in a.tasks:
        if task in b.tasks and a.tasks[task].sha256 != b.tasks[task].sha256:
            comparison.remarks.append(f"A and B differ in the prompts of {task}")
    for name, these, others in (("A", runs_a, runs_b), ("B", runs_b, runs_a)):
        comparison.remarks += [f"only in {name}: {describe(place)}" for place in these if place not in others]

    for place in common:
        steps = a.servers[place[0]].num_steps, b.servers[place[0]].num_steps
        worse = _judge(comparison, place, runs_a[place], runs_b[place], steps, limits)
        comparison.regressions += [f"{describe(place)}: {text}" for text in worse]
    return comparison


def _judge(
    comparison: Comparison, place: RunKey, a: Run, b: Run, num_steps: tuple[int, int], limits: Limits
) -> list[str]:
    """Adds a row, and the measures that one side lacks, to `comparison`. Returns the regressions."""
    server, task, temperature, concurrency = place

    # Measures of one number: the change, and whether B lost more than it may.
    row, worse = [server, task, f"{temperature:g}", f"{concurrency}"], []
    for what, old, new, digits, limit in (
        ("τ", tau(a, num_steps[0]), tau(b, num_steps[1]), 3, limits.tau_drop),
        ("token/s of one request", speed(a), speed(b), 2, limits.speed_drop),
        ("token/s of the run", _total(a), _total(b), 2, limits.speed_drop),
    ):
        row += [number(old, digits), number(new, digits)]
        row.append(NOTHING if not old or new is None else f"{100 * (new - old) / old:+.1f}%")
        if (old is None) != (new is None):
            comparison.remarks.append(f"only in {'B' if old is None else 'A'}: {what} of {describe(place)}")
        # A drop of exactly the limit is allowed, whatever its last bit.
        elif old and new is not None and (old - new) / old > limit + 1e-9:
            worse.append(f"{what} fell by {100 * (old - new) / old:.1f}%, from {old:.{digits}f} to {new:.{digits}f}")

    # Answers equal to the baseline's, shown as a count.
    equal = [_share(run.lossless) for run in (a, b)]
    row += [f"{run.lossless.equal}/{run.lossless.compared}" if run.lossless else NOTHING for run in (a, b)]
    if (equal[0] is None) != (equal[1] is None):
        comparison.remarks.append(f"only in {'B' if equal[0] is None else 'A'}: losslessness of {describe(place)}")
    elif equal[0] is not None and equal[1] is not None and equal[0] - equal[1] > limits.equal_drop + 1e-9:
        worse.append(f"answers equal to the baseline's fell from {row[-2]} to {row[-1]}, first at {divergence(b)}")

    # Failures: more of them are worse, whatever the numbers of the answers that came.
    if b.num_failed > a.num_failed:
        worse.append(f"failed requests rose from {a.num_failed} to {b.num_failed}")
    comparison.rows.append([*row, "WORSE" if worse else ""])
    return worse


def _total(run: Run) -> float | None:
    return run.tokens_per_second if run.num_failed < run.num_requests else None


def _share(check: Lossless | None) -> float | None:
    return check.equal / check.compared if check and check.compared else None


def text(comparison: Comparison) -> str:
    """For the terminal: the answer with the regressions, the table, what only one file has, and a line of counts."""
    lines = [_answer(comparison)]
    lines += [f"WORSE: {regression}" for regression in comparison.regressions]
    lines.append(terminal_table(HEADER, comparison.rows, num_text=2))
    lines += [f"note: {remark}" for remark in comparison.remarks]
    lines.append(f"{len(comparison.rows)} runs compared, {len(comparison.regressions)} regressions")
    return "\n".join(lines)


def _answer(comparison: Comparison) -> str:
    worse = sum(row[-1] != "" for row in comparison.rows)
    number = len(comparison.rows)
    if not worse:
        return f"B is not worse than A, within the limits, in {'the one run' if number == 1 else f'all {number} runs'}."
    return f"B is worse than A in {worse} of {number} runs."
