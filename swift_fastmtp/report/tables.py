"""Results as tables, in the paper's layouts. Each function is one table, or None where the data has nothing for it."""

import shlex
from dataclasses import asdict
from typing import Any

from ..bench.results import Percentiles, Run, Server
from ..files.table import NOTHING, Table, number
from ..method.same_distribution import LEVEL
from ..method.verification import regime_of
from .entries import Entry, entries, mean, mean_speedup, of_all, slices, speed, tasks_of, tau, times
from .merge import Merged, engine


def where(temperature: float, concurrency: int | None) -> str:
    """`greedy, one request at a time`, for titles."""
    how = "greedy" if temperature == 0 else f"temperature {temperature:g}"
    if concurrency is None:
        return how
    return f"{how}, {'one request' if concurrency == 1 else f'{concurrency} requests'} at a time"


def main_table(results: Merged, temperature: float, concurrency: int) -> Table:
    """The paper's Table 1: K blocks x methods, per task tau and token/s, mean with speedup."""
    methods = entries(results, temperature, concurrency)
    tasks = tasks_of(results, methods)
    columns = [("", "K"), ("", "method")]
    columns += [(results.tasks[task].title, name) for task in tasks for name in ("τ", "token/s")]
    columns += [("Mean", "τ"), ("Mean", "token/s"), ("Mean", "speedup")]
    rows = []
    for entry in methods:
        runs = [entry.runs.get(task) for task in tasks]
        taus = [tau(run, entry.num_steps) if run else None for run in runs]
        speeds = [speed(run) if run else None for run in runs]
        cells = [number(value) for pair in zip(taus, speeds, strict=True) for value in pair]
        ratio = mean_speedup(of_all(entry, tasks))
        shown = "1.00×" if _is_baseline(results, entry) else number(ratio.value if ratio else None, 2, "×")
        rows.append([f"{entry.num_steps}", entry.name, *cells, number(mean(taus)), number(mean(speeds)), shown])
    return Table(
        f"main-t{temperature:g}-c{concurrency}",
        f"Tokens per verification step and speed ({where(temperature, concurrency)})",
        "K: drafts per verification step. τ: tokens per verification step, all tokens / all steps, the prefill's token "
        "excluded (micro). token/s: of one request, prompt included, median over requests. Speedup: mean of the "
        f"tasks' speedups, weighted as the ratio of two means of token/s is.{_regimes(results, methods, temperature)}",
        columns,
        rows,
        num_keys=2,
    )


def _regimes(results: Merged, methods: list[Entry], temperature: float) -> str:
    """For a note: how drafts were made and verified above temperature 0, by the servers' commands where they are known
    (`method.verification`)."""
    names: dict[str, dict[str, None]] = {}
    for entry in methods if temperature > 0 else ():
        for run in entry.runs.values():
            server = results.servers[run.server]
            if server.num_steps and server.command:
                names.setdefault(regime_of(server.command).title, {})[entry.name] = None
    return "".join(f" {', '.join(of)}: {title}." for title, of in names.items())


def _is_baseline(results: Merged, entry: Entry) -> bool:
    return all(run.server == results.baseline for run in entry.runs.values())


def speedup_table(results: Merged, temperature: float, concurrency: int) -> Table | None:
    """Speedup per task with its interval."""
    methods = [e for e in entries(results, temperature, concurrency) if any(run.speedup for run in e.runs.values())]
    tasks = tasks_of(results, methods)
    rows = []
    for entry in methods:
        runs = [entry.runs.get(task) for task in tasks]
        ratios = [*(run.speedup if run else None for run in runs), mean_speedup(of_all(entry, tasks))]
        rows.append([f"{entry.num_steps}", entry.name, *(times(r) if r else NOTHING for r in ratios)])
    return Table(
        f"speedup-t{temperature:g}-c{concurrency}",
        f"Speedup against the baseline ({where(temperature, concurrency)})",
        "Speed over the baseline's on the same prompts. In brackets: 95 % interval, bootstrap over prompts and rounds; "
        "the mean's takes tasks as independent.",
        [("", "K"), ("", "method"), *(("", results.tasks[task].title) for task in tasks), ("", "Mean")],
        rows,
        num_keys=2,
    ) if rows else None  # fmt: skip


def map_blocks(results: Merged, temperature: float, concurrency: int) -> list[tuple[int, str, list[Entry]]]:
    """(K, task, entries) per task with a map of known size: baseline, whole vocabulary, then maps by size."""
    methods = entries(results, temperature, concurrency)
    blocks = []
    for num_steps in sorted({e.num_steps for e in methods if e.maps}):
        of_k = [e for e in methods if e.num_steps == num_steps]
        for task in tasks_of(results, [e for e in of_k if e.maps]):
            maps = [e for e in of_k if e.maps and task in e.runs]
            maps.sort(key=lambda e: server_of(results, e, task).token_map_size or float("inf"))
            weights = {_weights(server_of(results, e, task)) for e in maps}
            others = [e for e in methods if task in e.runs and not e.maps]
            base = [e for e in others if e.runs[task].server == results.baseline]
            whole = [e for e in others if e in of_k and _weights(server_of(results, e, task)) in weights]
            if any(server_of(results, e, task).token_map_size for e in maps):
                blocks.append((num_steps, task, [*base, *whole, *maps]))
    return blocks


def server_of(results: Merged, entry: Entry, task: str) -> Server:
    return results.servers[entry.runs[task].server]


def _weights(server: Server) -> tuple[str, str | None]:
    return server.model, server.draft_model


def _map_of(server: Server) -> str:
    size = f" ({server.token_map_size:,} ids)" if server.token_map_size else ""
    return f"{server.token_map}{size}" if server.token_map else NOTHING


def map_table(results: Merged, temperature: float, concurrency: int) -> Table | None:
    """The paper's Table 2: per task baseline, whole vocabulary and maps."""
    rows = []
    for num_steps, task, methods in map_blocks(results, temperature, concurrency):
        several = sum(not e.maps and e.num_steps > 0 for e in methods) > 1
        for entry in methods:
            run = entry.runs[task]
            if entry.maps:
                name = _map_of(server_of(results, entry, task))
            elif run.server == results.baseline:
                name = entry.name
            else:
                name = f"whole vocabulary, {entry.name}" if several else "whole vocabulary"
            ratio = run.speedup.value if run.speedup else None
            shown = "1.000×" if run.server == results.baseline else number(ratio, 3, "×")
            length = tau(run, entry.num_steps)
            title = results.tasks[task].title
            rows.append([title, f"{num_steps}", name, number(length, 3), number(speed(run), 3), shown])
    return Table(
        f"maps-t{temperature:g}-c{concurrency}",
        f"Token maps ({where(temperature, concurrency)})",
        "A token map is a smaller vocabulary from which drafts are chosen; verification uses the whole one. τ and "
        "token/s as above.",
        [("", "task"), ("", "K"), ("", "draft vocabulary"), ("", "τ"), ("", "token/s"), ("", "speedup")],
        rows,
        num_keys=3,
    ) if rows else None  # fmt: skip


def acceptance_table(results: Merged, temperature: float) -> Table | None:
    """Marginal and conditional rate per depth and both taus, per task; at the lowest concurrency."""
    lowest = min(c for t, c in slices(results) if t == temperature)
    methods = entries(results, temperature, lowest)
    depth = max(len(run.marginal) for entry in methods for run in entry.runs.values())
    rows = []
    for entry in methods:
        for task in tasks_of(results, [entry]):
            run = entry.runs[task]
            if run.marginal:
                keys = [f"{entry.num_steps}", entry.name, results.tasks[task].title]
                taus = [number(run.tau_micro), number(run.tau_macro)]
                rows.append([*keys, "marginal", *_rates(run.marginal, depth), *taus])
                rows.append([*keys, "conditional", *_rates(run.conditional, depth), "", ""])
    columns = [*(("", name) for name in ("K", "method", "task", "rate"))]
    columns += [("accepted at depth", f"{k}") for k in range(1, depth + 1)]
    return Table(
        f"acceptance-t{temperature:g}",
        f"Acceptance by draft depth ({where(temperature, lowest)})",
        "Marginal: all drafts up to this depth were accepted. Conditional: this one was, given that those before were. "
        "τ micro: all tokens / all steps = 1 + the sum of the marginal rates; macro: mean over requests.",
        [*columns, ("τ", "micro"), ("τ", "macro")],
        rows,
        num_keys=4,
    ) if rows else None  # fmt: skip


def _rates(values: list[float], depth: int) -> list[str]:
    return [f"{100 * value:.1f}%" for value in values] + [""] * (depth - len(values))


def concurrency_table(results: Merged, temperature: float) -> Table | None:
    """Total and single speed and speedup by concurrency, means over tasks; None with one concurrency only."""
    levels = [c for t, c in slices(results) if t == temperature]
    rows = []
    for level in levels if len(levels) > 1 else []:
        methods = entries(results, temperature, level)
        tasks = tasks_of(results, methods)
        for entry in methods:
            runs = of_all(entry, tasks)
            ratio = mean_speedup(runs)
            cells = [number(mean([run.tokens_per_second for run in runs])), number(mean([speed(run) for run in runs]))]
            shown = "1.00×" if _is_baseline(results, entry) else times(ratio) if ratio else NOTHING
            rows.append([f"{level}", f"{entry.num_steps}", entry.name, *cells, shown])
    names = ("requests at a time", "K", "method", "total token/s", "token/s", "speedup")
    return Table(
        f"concurrency-t{temperature:g}",
        f"Speed by concurrency ({where(temperature, None)})",
        "Means over tasks. Total: tokens of all requests per second of the run. token/s and speedup: of one request.",
        [("", name) for name in names],
        rows,
        num_keys=3,
    ) if rows else None  # fmt: skip


def latency_table(results: Merged) -> Table | None:
    """Percentiles of the time to the first token and between tokens; None where nothing was streamed."""
    rows = []
    for temperature, concurrency in slices(results):
        for entry in entries(results, temperature, concurrency):
            for task in tasks_of(results, [entry]):
                run = entry.runs[task]
                if run.ttft or run.itl:
                    keys = [f"{temperature:g}", f"{concurrency}", f"{entry.num_steps}", entry.name]
                    cells = [*_milliseconds(run.ttft), *_milliseconds(run.itl), f"{run.num_requests - run.num_failed}"]
                    rows.append([*keys, results.tasks[task].title, *cells])
    columns = [("", name) for name in ("temperature", "requests at a time", "K", "method", "task")]
    for what in ("time to first token (ms)", "between tokens (ms)"):
        columns += [(what, name) for name in ("p50", "p90", "p99")]
    return Table(
        "latency",
        "Latency",
        "As the client saw them. Drafting servers send several tokens at once, so the time between tokens is uneven.",
        [*columns, ("", "answers")],
        rows,
        num_keys=5,
    ) if rows else None  # fmt: skip


def _milliseconds(values: Percentiles | None) -> list[str]:
    return [f"{1000 * v:.1f}" for v in (values.p50, values.p90, values.p99)] if values else [NOTHING] * 3


def cpu_table(results: Merged) -> Table | None:
    """Tokens per CPU second and its ratio; None where it is known of no server."""
    rows = []
    for temperature, concurrency in slices(results):
        for entry in entries(results, temperature, concurrency):
            for task in tasks_of(results, [entry]):
                if cpu := entry.runs[task].cpu:
                    keys = [f"{temperature:g}", f"{concurrency}", f"{entry.num_steps}", entry.name]
                    shown = "1.00×" if _is_baseline(results, entry) else times(cpu.ratio) if cpu.ratio else NOTHING
                    rows.append([*keys, results.tasks[task].title, number(cpu.tokens_per_second), shown])
    names = ("temperature", "requests at a time", "K", "method", "task", "token per CPU second", "against the baseline")
    return Table(
        "cpu",
        "CPU time",
        "Tokens per second of CPU time, user and system, of all processes of a server. Other work on the machine moves "
        "it less than the time on the wall. Of a model on a GPU it is only what the server's processes cost.",
        [("", name) for name in names],
        rows,
        num_keys=5,
    ) if rows else None  # fmt: skip


def lossless_table(results: Merged) -> Table | None:
    """Greedy answers equal to the baseline's; None where nothing was compared."""
    rows = []
    for run in results.runs:
        if run.lossless:
            server = results.servers[run.server]
            keys = [f"{server.num_steps}", f"{server.label} ({run.server})", results.tasks[run.task].title]
            equal = f"{run.lossless.equal} of {run.lossless.compared}"
            rows.append([*keys, f"{run.concurrency}", equal, divergence(run) or "none"])
    return Table(
        "lossless",
        "The same answers as the baseline",
        "Greedy answers against the baseline's, token by token. Engines may round differently in batches of another "
        "size, so only equal batches must give equal answers.",
        [("", name) for name in ("K", "server", "task", "requests at a time", "equal answers", "first difference")],
        rows,
        num_keys=3,
    ) if rows else None  # fmt: skip


def distribution_table(results: Merged) -> Table | None:
    """Sampled answers beside the baseline's; None where that was not tested."""
    rows = []
    for one in results.distributions:
        server = results.servers[one.server]
        keys = [f"{one.temperature:g}", f"{server.num_steps}", f"{server.label} ({one.server})"]
        verdict = "differs from the baseline's" if one.differs else "same as the baseline's"
        rows.append([*keys, verdict, f"{one.p_holm:.2g}", f"{one.prompts} × {one.samples}", f"{one.tokens}"])
    names = ("temperature", "K", "server", "distribution", "p", "samples", "tokens each")
    return Table(
        "distribution",
        "The same distribution as the baseline",
        "Short sampled answers to the same prompts: permutation test of how often each prefix comes up, p adjusted for "
        f"all rows of one benchmark (Holm); below {LEVEL:g} it differs. No difference found is no proof that there is "
        "none: more samples find smaller ones.",
        [("", name) for name in names],
        rows,
        num_keys=3,
    ) if rows else None  # fmt: skip


def divergence(run: Run) -> str:
    """Where the first answer that differs does; `` where none does."""
    first = run.lossless.first_divergence if run.lossless else None
    return f"request {first.id}, turn {first.turn}, token {first.token}" if first else ""


def task_table(results: Merged) -> Table:
    """What was asked."""
    rows = [
        [name, t.title, t.language, t.source, t.licence, f"{t.num_rows}", t.sha256[:12]]
        for name, t in results.tasks.items()
    ]
    names = ("task", "title", "language", "source", "licence", "prompts", "SHA-256")
    caption = "SHA-256 of the prompts: its first 12 digits."
    return Table("tasks", "Tasks", caption, [("", n) for n in names], rows, is_text=True)


def server_table(results: Merged) -> Table:
    """What was compared."""
    rows = [
        [name, s.label, f"{s.num_steps}", s.model, s.draft_model or NOTHING, _map_of(s),
         shlex.join(s.command) if s.command else NOTHING]
        for name, s in results.servers.items()
    ]  # fmt: skip
    names = ("server", "method", "K", "model", "draft model", "token map", "command")
    caption = (
        "Speedups are against " + (results.baseline if results.baseline else "nothing: there is no baseline") + "."
    )
    return Table("servers", "Servers", caption, [("", n) for n in names], rows, is_text=True)


def file_table(results: Merged) -> Table:
    """Provenance and settings of every file."""
    facts = []
    for _, content in results.files:
        settings = {name: value for name, value in asdict(content.settings).items() if name != "tasks"}
        facts.append({**content.provenance, "engine": engine(content.provenance), **settings})
    names = list(dict.fromkeys(name for of_file in facts for name in of_file))
    rows = [[name, *(_setting_text(of_file.get(name)) for of_file in facts)] for name in names]
    return Table(
        "provenance",
        "Where the numbers come from",
        "As fastmtp bench wrote it.",
        [("", "of"), *(("", path) for path, _ in results.files)],
        rows,
        is_text=True,
    )


def _setting_text(value: Any) -> str:
    if isinstance(value, list):
        return shlex.join(map(str, value))
    return NOTHING if value in (None, "", {}) else str(value)
