"""Several results files as one, or one line that says why not.

`fastmtp bench` writes one file per run; a table of the paper needs many runs, perhaps of different days. What may be
put side by side is decided here: a measurement is there once, a server name means one server, a task name one set of
prompts. What a reader must know before believing the tables (other hardware, failed requests) becomes a note.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..bench.distribution import Distribution
from ..bench.results import Results, Run, RunKey, Server, TaskInfo, drift, read_results
from ..errors import FastMTPError


@dataclass
class Merged:
    """What tables and plots are made of; insertion order is the files'."""

    files: list[tuple[str, Results]]
    """Path and content."""
    tasks: dict[str, TaskInfo]
    servers: dict[str, Server]
    baseline: str | None
    runs: list[Run]
    distributions: list[Distribution] = field(default_factory=list)


def load_results(paths: Sequence[str | Path]) -> Merged:
    """Read, validate and merge results files.

    Raises `FastMTPError` for an invalid file and for files that contradict each other.
    """
    return merge([(str(path), read_results(path)) for path in paths])


def key(run: Run) -> RunKey:
    """What a run measured."""
    return run.server, run.task, run.temperature, run.concurrency


def describe(run: RunKey) -> str:
    """A run in a sentence."""
    server, task, temperature, concurrency = run
    return f"{server} on {task} (temperature {temperature:g}, concurrency {concurrency})"


def merge(files: Sequence[tuple[str, Results]]) -> Merged:
    """One of several.

    Raises `FastMTPError` if a run is there twice, or if servers, tasks or baselines of one name differ.
    """
    if not files:
        raise FastMTPError("no results file; name at least one results.json of fastmtp bench")
    merged = Merged(list(files), {}, {}, None, [])
    path_of: dict[Any, str] = {}
    for path, results in files:
        for run in results.runs:
            if before := path_of.get(key(run)):
                where = "twice in it" if before == path else f"also in {before}"
                raise FastMTPError(f"{path}: {describe(key(run))} is {where}; leave one of them out")
            path_of[key(run)] = path
        _add(merged.servers, results.servers, "server", path, path_of)
        _add(merged.tasks, results.settings.tasks, "task", path, path_of)
        if results.baseline is not None:
            if merged.baseline not in (None, results.baseline):
                raise FastMTPError(
                    f"{path}: its speedups are against {results.baseline!r}, in {path_of['baseline']} against "
                    f"{merged.baseline!r}; report them apart"
                )
            path_of.setdefault("baseline", path)
            merged.baseline = results.baseline
        merged.runs += results.runs
        merged.distributions += results.distributions
    if not merged.runs:
        raise FastMTPError(f"{files[0][0]}: holds no run; finish the benchmark first")
    return merged


def _add(merged: dict[str, Any], these: dict[str, Any], kind: str, path: str, path_of: dict[Any, str]) -> None:
    for name, value in these.items():
        before = path_of.setdefault((kind, name), path)
        if merged.setdefault(name, value) != value:
            raise FastMTPError(f"{path}: {kind} {name!r} is another one than in {before}; rename one of them")


def notes(results: Merged) -> list[str]:
    """What a reader must know before believing the tables, a sentence each; empty if there is nothing."""
    lines = []
    if different := differences([content for _, content in results.files]):
        lines.append(f"The files differ in {'; '.join(different)}. Compare across them with care.")
    if results.baseline is None:
        lines.append("There is no baseline in these results, so no speedup and no check that answers stayed the same.")
    for run in results.runs:
        if run.num_failed:
            lines.append(
                f"{run.num_failed} of {run.num_requests} requests failed: {describe(key(run))}. "
                "Its numbers are of the others."
            )
        if run.tau_micro is None and results.servers[run.server].num_steps:
            lines.append(f"The server did not tell how many drafts it accepted: {describe(key(run))}.")
    if drifted := drift(results.runs, results.baseline):
        lines.append(f"{drifted[0].upper()}{drifted[1:]}.")
    unequal = sum(run.lossless is not None and run.lossless.equal < run.lossless.compared for run in results.runs)
    if unequal:
        lines.append(f"Some answers differ from the baseline's in {unequal} of {len(results.runs)} runs; see below.")
    for one in results.distributions:
        if one.differs:
            lines.append(f"{one.server} at temperature {one.temperature:g}: the distribution of its answers {one}.")
    return lines


def differences(files: Sequence[Results]) -> list[str]:
    """Hardware, engine and settings in which results were made differently, each with the values."""
    differing = []
    values: dict[str, list[str]] = {}
    for results in files:
        settings = {k: v for k, v in asdict(results.settings).items() if k != "tasks"}
        facts = {"hardware": results.provenance.get("hardware"), "engine": engine(results.provenance), **settings}
        for name, value in facts.items():
            values.setdefault(name, []).append("unknown" if value in (None, "") else str(value))
    for name, of_files in values.items():
        if len(set(of_files)) > 1:
            differing.append(f"{name} ({', '.join(dict.fromkeys(of_files))})")
    return differing


def engine(provenance: dict[str, Any]) -> str:
    """`sglang 0.5.23`, or `` where it is not known."""
    value = provenance.get("engine") or {}
    return " ".join(str(value[k]) for k in ("name", "version") if value.get(k))
