"""Rows of tables and lines of plots: which runs belong to one method at one K, and what their mean is.

A results file knows servers; a reader thinks in methods. Servers of one label and one K are one method where they ran
different tasks (the paper's FR row: a Chinese map on the Chinese task, an English one on the others); where they ran
the same task they are variants, distinguished by their map.
"""

from dataclasses import dataclass, replace
from math import hypot

from ..bench.results import Interval, Run
from .merge import Merged


@dataclass(frozen=True)
class Entry:
    """One method at one K, at one temperature and concurrency."""

    name: str
    """Unique among the entries of a K."""
    label: str
    """The method's name, the same at every K and with every map."""
    method: str
    num_steps: int
    maps: tuple[str, ...]
    """Token maps of its servers."""
    runs: dict[str, Run]
    """By task."""


def slices(results: Merged) -> list[tuple[float, int]]:
    """Every (temperature, concurrency), ascending."""
    return sorted({(run.temperature, run.concurrency) for run in results.runs})


def entries(results: Merged, temperature: float, concurrency: int) -> list[Entry]:
    """By K, then in the order of the file's servers; servers without a run in this slice are not there."""
    # Servers of one K and one label together.
    groups: dict[tuple[int, str], dict[str, dict[str, Run]]] = {}
    for name, server in results.servers.items():
        runs = {
            run.task: run
            for run in results.runs
            if (run.server, run.temperature, run.concurrency) == (name, temperature, concurrency)
        }
        if runs:
            groups.setdefault((server.num_steps, server.label), {})[name] = runs

    listed = []
    for (num_steps, label), members in sorted(groups.items(), key=lambda item: item[0][0]):
        servers = [results.servers[name] for name in members]
        method = servers[0].method
        maps = tuple(server.token_map for server in servers if server.token_map)
        mapped = len(maps) == len(servers)
        tasks = [task for runs in members.values() for task in runs]

        # One method: a single server, or one map for each task.
        if len(members) == 1 or (mapped and len(tasks) == len(set(tasks))):
            together = {task: run for runs in members.values() for task, run in runs.items()}
            listed.append(Entry(label, label, method, num_steps, maps, together))
            continue

        # Variants of it: named by their maps if these differ, else by their servers.
        by_map = mapped and len(set(maps)) == len(maps)
        for (name, runs), server in zip(members.items(), servers, strict=True):
            unique = f"{label} ({server.token_map if by_map else name})"
            one = (server.token_map,) if server.token_map else ()
            listed.append(Entry(unique, label, server.method, num_steps, one, runs))
    return listed


def fastest_maps(methods: list[Entry]) -> list[Entry]:
    """For plots: one entry for all maps of a label and K, each task with its fastest map."""
    merged: dict[tuple[int, str], Entry] = {}
    for entry in methods:
        place = (entry.num_steps, entry.label if entry.maps else entry.name)
        if place not in merged:
            merged[place] = replace(entry, name=entry.label) if entry.maps else entry
            continue
        before = merged[place]
        runs = dict(before.runs)
        for task, run in entry.runs.items():
            if task not in runs or run.tokens_per_second_per_request > runs[task].tokens_per_second_per_request:
                runs[task] = run
        merged[place] = replace(before, maps=before.maps + entry.maps, runs=runs)
    return list(merged.values())


def tasks_of(results: Merged, methods: list[Entry]) -> list[str]:
    """The tasks that these entries ran, in the files' order."""
    return [task for task in results.tasks if any(task in entry.runs for entry in methods)]


def of_all(entry: Entry, tasks: list[str]) -> list[Run]:
    """The entry's runs of these tasks; nothing unless it ran all of them: a mean over other tasks is another number."""
    return [entry.runs[task] for task in tasks] if all(task in entry.runs for task in tasks) else []


def speed(run: Run) -> float | None:
    """The tables' token/s; None where no request was answered."""
    return run.tokens_per_second_per_request if run.num_failed < run.num_requests else None


def tau(run: Run, num_steps: int) -> float | None:
    """Micro tau; 1 by definition without drafts; None where the server reported none."""
    return 1.0 if run.tau_micro is None and num_steps == 0 else run.tau_micro


def mean_speedup(runs: list[Run]) -> Interval | None:
    """Ratio of the mean speeds over tasks (the paper's `Mean` column); None unless every task has a speedup.

    That ratio is the mean of the tasks' speedups r_t, weighted by the baseline's speeds b_t = s_t / r_t. Its interval
    takes the tasks' prompts as independent, so half-widths add as squares; below and above separately.
    """
    parts = [(run.tokens_per_second_per_request / r.value, r) for run in runs if (r := run.speedup) and r.value > 0]
    total = sum(weight for weight, _ in parts)
    if len(parts) < len(runs) or total <= 0:
        return None
    value = sum(weight * r.value for weight, r in parts) / total
    below = hypot(*(weight * (r.value - r.low) for weight, r in parts)) / total
    above = hypot(*(weight * (r.high - r.value) for weight, r in parts)) / total
    return Interval(value, value - below, value + above)


def times(ratio: Interval) -> str:
    """`1.90× [1.85, 1.96]`."""
    return f"{ratio.value:.2f}× [{ratio.low:.2f}, {ratio.high:.2f}]"


def mean(values: list[float | None]) -> float | None:
    """None unless every value is known."""
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known and len(known) == len(values) else None
