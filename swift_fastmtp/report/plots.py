"""The paper's figures from a results file, and those that a server's owner asks for.

Each function draws one, or returns None where the data has nothing for it: `plots` tries them all. Every figure says in
words, for readers who do not see it, what it shows (`facts`).
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from math import pi
from typing import Any, Literal

from ..bench.results import Interval, Part, Run
from ..files.plot_style import GRID, INK, MARKERS, PAGE, PALETTE, plot_style
from .entries import Entry, entries, fastest_maps, mean, mean_speedup, of_all, slices, speed, tasks_of, tau, times
from .figure import Plot, column_figure, finish, legend, paints, short
from .merge import Merged
from .tables import map_blocks, server_of, where


def plots(results: Merged) -> list[Plot]:
    """Every plot that the data has something for, by temperature; at the lowest concurrency where that is no axis."""
    drawn = []
    temperatures = sorted({t for t, _ in slices(results)})
    for temperature in temperatures:
        suffix = f"-t{temperature:g}" if len(temperatures) > 1 else ""
        for draw in (_radar, _by_task, _by_steps, _by_depth, _maps, _concurrency, _histogram, _by_position, _by_context):
            plot = draw(results, temperature, suffix)
            if plot:
                drawn.append(plot)
    return drawn


def _first_slice(results: Merged, temperature: float) -> tuple[int, list[Entry]]:
    lowest = min(c for t, c in slices(results) if t == temperature)
    return lowest, fastest_maps(entries(results, temperature, lowest))


def _of_one_k(shown: list[Entry], fastest: bool) -> list[Entry]:
    """The entries of the K that most methods were run with; of several such the fastest or the largest."""
    of_k: dict[int, list[Entry]] = {}
    for entry in shown:
        if entry.num_steps:
            of_k.setdefault(entry.num_steps, []).append(entry)

    def rank(num_steps: int) -> tuple[int, float, int]:
        ratios = [r.value for e in of_k[num_steps] if (r := mean_speedup(list(e.runs.values())))]
        return len(of_k[num_steps]), max(ratios, default=0.0) if fastest else 0.0, num_steps

    return of_k[max(of_k, key=rank)] if of_k else []


def _alike(shown: list[Entry]) -> list[Entry]:
    """The entries that ran the tasks that most of them ran, cut to those: means must be of the same prompts."""
    sets = [frozenset(e.runs) for e in shown if e.num_steps]
    if not sets:
        return []
    tasks = max(sets, key=lambda one: (sum(one <= other for other in sets), len(one), sorted(one)))
    return [
        replace(e, runs={task: run for task, run in e.runs.items() if task in tasks})
        for e in shown
        if tasks <= e.runs.keys()
    ]


def _over(results: Merged, shown: list[Entry], offered: list[Entry], what: str = "Mean over") -> str:
    """`Mean over 7 tasks.`, and whether a method is missing for having run others."""
    tasks = tasks_of(results, shown)
    names = ", ".join(results.tasks[task].title for task in tasks) if len(tasks) < 4 else f"{len(tasks)} tasks"
    missing = {e.name for e in offered} - {e.name for e in shown}
    left = f" Not drawn, as they ran other tasks: {', '.join(sorted(missing))}." if missing else ""
    return f"{what if len(tasks) > 1 else 'Task:'} {names.rstrip('.')}.{left}"


def _maps_note(shown: list[Entry]) -> str:
    return " Of several token maps each task's fastest is drawn." if any(len(e.maps) > 1 for e in shown) else ""


def _error(s: Interval) -> list[list[float]]:
    """matplotlib's form of an interval."""
    return [[max(0.0, s.value - s.low)], [max(0.0, s.high - s.value)]]


def _line(axes: Any, points: Sequence[tuple[float, float | Interval]], color: str, marker: str, label: str) -> None:
    """A line through (x, value); a value with an interval has a bar."""
    values = [value.value if isinstance(value, Interval) else value for _, value in points]
    axes.plot([x for x, _ in points], values, color=color, marker=marker, label=label)
    for x, value in points:
        if isinstance(value, Interval):
            axes.errorbar(x, value.value, yerr=_error(value), color=color, capsize=3, elinewidth=1.6, fmt="none")


@plot_style()
def _radar(results: Merged, temperature: float, suffix: str) -> Plot | None:
    """Speedup per task, the paper's Figure 2. A radar needs three axes; `_by_task` has the same data otherwise."""
    from matplotlib.ticker import MaxNLocator

    level, shown = _first_slice(results, temperature)
    shown = _of_one_k(shown, fastest=True)
    shown = [e for e in shown if any(run.speedup for run in e.runs.values())]
    tasks = tasks_of(results, shown)
    if len(tasks) < 3:
        return None

    # One spoke per task, clockwise from the top; the baseline is the circle of radius 1.
    drawing, (axes,) = column_figure(5.4, subplot_kw={"projection": "polar"})
    angles = [2 * pi * i / len(tasks) for i in range(len(tasks))]
    axes.set_theta_zero_location("N")
    axes.set_theta_direction(-1)
    circle = [2 * pi * i / 120 for i in range(121)]
    axes.plot(circle, [1.0] * 121, "--", color=INK, linewidth=1.2, label="baseline, 1×")

    # A line per method, closed unless it lacks a task.
    looks = paints(results, shown)
    facts = []
    top = 1.0
    for entry in shown:
        values = {task: run.speedup.value for task, run in entry.runs.items() if run.speedup}
        color, marker = looks[entry.name]
        points = [(angle, values[task]) for angle, task in zip(angles, tasks, strict=True) if task in values]
        closed = [*points, points[0]] if len(points) == len(tasks) else points
        _line(axes, closed, color, marker, entry.name)
        top = max(top, *values.values())
        facts.append(
            f"{entry.name}: " + ", ".join(f"{results.tasks[t].title} {values[t]:.2f}×" for t in tasks if t in values)
        )

    # Scale and names; the scale's numbers stand on white, between two spokes.
    axes.set_ylim(0, 1.08 * top)
    axes.set_xticks(angles, [short(results.tasks[task].title, 16) for task in tasks])
    axes.tick_params(axis="x", pad=8)
    axes.yaxis.set_major_formatter(lambda y, _: f"{y:g}×")
    axes.yaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 2.5, 5, 10]))
    for tick in axes.get_yticklabels():
        tick.set_bbox({"facecolor": PAGE, "edgecolor": "none", "pad": 1})
    axes.set_rlabel_position(180 / len(tasks))
    axes.grid(True)
    axes.spines["polar"].set_color(GRID)
    legend(drawing, axes)
    return finish(
        drawing,
        f"speedup-radar{suffix}",
        f"Speedup per task, K={shown[0].num_steps}",
        where(temperature, level),
        f"The paper's Figure 2. The dashed circle is the baseline.{_maps_note(shown)}",
        facts,
    )


@plot_style()
def _by_task(results: Merged, temperature: float, suffix: str) -> Plot | None:
    """Speedup per task with its interval."""
    level, shown = _first_slice(results, temperature)
    shown = _of_one_k(shown, fastest=True)
    shown = [e for e in shown if any(run.speedup for run in e.runs.values())]
    tasks = tasks_of(results, shown)
    if not shown:
        return None

    # A row per task, then one for the mean; in each row a point per method.
    rows = [*tasks, None] if len(tasks) > 1 else [*tasks]
    drawing, (axes,) = column_figure(1.6 + len(rows) * (0.16 + 0.17 * len(shown)))
    looks = paints(results, shown)
    facts = []
    for i, entry in enumerate(shown):
        color, marker = looks[entry.name]
        offset = (i - (len(shown) - 1) / 2) * 0.8 / len(shown)
        label: str | None = entry.name
        texts = []
        for row, task in enumerate(rows):
            if task is None:
                s = mean_speedup(of_all(entry, tasks))
            else:
                s = entry.runs[task].speedup if task in entry.runs else None
            if s:
                axes.errorbar(s.value, row + offset, xerr=_error(s), fmt=marker, color=color, label=label, capsize=3,
                              elinewidth=1.6, markersize=5.5)  # fmt: skip
                label = None
                texts.append(f"{results.tasks[task].title if task else 'mean'} {times(s)}")
        facts.append(f"{entry.name}: {', '.join(texts)}")

    # The baseline, the rows' names, thin lines between them.
    axes.axvline(1, color=INK, linestyle="--", linewidth=1.2)
    axes.set_yticks(range(len(rows)), [short(results.tasks[task].title, 16) if task else "Mean" for task in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    for row in range(1, len(rows)):
        axes.axhline(row - 0.5, color=GRID, linewidth=0.8)
    axes.tick_params(axis="y", length=0)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}×")
    axes.set_xlabel("speedup")
    axes.grid(False, axis="y")
    axes.grid(True, axis="x")
    legend(drawing, axes)
    return finish(
        drawing,
        f"speedup-by-task{suffix}",
        f"Speedup per task with 95 % intervals, K={shown[0].num_steps}",
        where(temperature, level),
        f"The dashed line is the baseline. Bars: bootstrap over prompts and rounds.{_maps_note(shown)}",
        facts,
    )


@plot_style()
def _by_steps(results: Merged, temperature: float, suffix: str) -> Plot | None:
    """Tau and speed against K, means over tasks, the paper's Figure 3."""
    level, shown = _first_slice(results, temperature)
    swept = [e for e in shown if e.num_steps == 0 or sum(other.name == e.name for other in shown) > 1]
    shown = _alike(swept)
    base = [e for e in shown if e.num_steps == 0]
    names = list(dict.fromkeys(e.name for e in shown if e.num_steps))
    lines = {name: [e for e in shown if e.name == name] for name in names}
    if not any(len(line) > 1 for line in lines.values()):
        return None

    # Above τ, below token/s: a line per method, which begins at the baseline.
    looks = paints(results, shown)
    drawing, (upper, lower) = column_figure(5.6, 2, sharex=True)
    facts = []
    for name, line in lines.items():
        color, marker = looks[name]
        points = [*base[:1], *line]
        steps = [e.num_steps for e in points]
        taus = [mean([tau(run, e.num_steps) for run in e.runs.values()]) for e in points]
        speeds = [mean([speed(run) for run in e.runs.values()]) for e in points]
        known = [(k, t) for k, t in zip(steps, taus, strict=True) if t is not None]
        if known:
            _line(upper, known, color, marker, name)
        lower.plot(steps, [float("nan") if s is None else s for s in speeds], color=color, marker=marker, label=name)
        texts = []
        for k, t, s in zip(steps, taus, speeds, strict=True):
            tau_text = "unknown" if t is None else f"{t:.2f}"
            texts.append(f"K={k} τ {tau_text}, {s or 0:.1f} token/s")
        facts.append(f"{name}: {'; '.join(texts)}")

    # The baseline's speed across the lower axes; the scales.
    if base:
        value = mean([speed(run) for run in base[0].runs.values()]) or 0.0
        lower.axhline(value, color=INK, linestyle="--", linewidth=1.2)
    upper.set(ylabel="tokens per step (τ)")
    upper.set_ylim(bottom=0.9)
    lower.set(ylabel="token/s", xlabel="drafts per step, K")
    lower.set_ylim(bottom=0)
    lower.locator_params(axis="x", integer=True)
    legend(drawing, lower)
    return finish(
        drawing,
        f"tau-and-speed-by-k{suffix}",
        "Acceptance length and speed against K",
        where(temperature, level),
        f"The paper's Figure 3. {_over(results, shown, swept)} K=0 is the baseline, whose speed is the dashed line."
        f"{_maps_note(shown)}",
        facts,
    )


@plot_style()
def _by_depth(results: Merged, temperature: float, suffix: str) -> Plot | None:
    """Marginal acceptance by depth, the paper's Figure 4a."""
    level, shown = _first_slice(results, temperature)
    offered = [e for e in _of_one_k(shown, fastest=False) if all(run.marginal for run in e.runs.values())]
    shown = _alike(offered)
    if not shown:
        return None

    # A group of bars per depth, a bar per method: the mean over tasks, which are the dots.
    depths = range(1, shown[0].num_steps + 1)
    drawing, (axes,) = column_figure(3.9)
    looks = paints(results, shown)
    width = 0.8 / len(shown)
    facts = []
    many = len(shown) * len(depths) > 16
    for i, entry in enumerate(shown):
        rates = [[100 * run.marginal[k - 1] for run in entry.runs.values()] for k in depths]
        means = [sum(r) / len(r) for r in rates]
        places = [k + (i - (len(shown) - 1) / 2) * width for k in depths]
        bars = axes.bar(places, means, width * 0.92, color=looks[entry.name][0], label=entry.name)
        if len(entry.runs) > 1:
            for place, of_tasks in zip(places, rates, strict=True):
                axes.plot([place] * len(of_tasks), of_tasks, "o", markersize=3.5, color=PAGE, markeredgecolor=INK,
                          markeredgewidth=0.8)  # fmt: skip
        if not many:
            tops = [max(r) for r in rates]
            for bar, value, top in zip(bars, means, tops, strict=True):
                axes.annotate(f"{value:.0f}", (bar.get_x() + bar.get_width() / 2, top), xytext=(0, 4),
                              textcoords="offset points", ha="center", fontsize=9)  # fmt: skip
        facts.append(f"{entry.name}: " + ", ".join(f"depth {k} {m:.0f} %" for k, m in zip(depths, means, strict=True)))

    # Scales.
    axes.set(xlabel="draft depth", ylabel="accepted (%), marginal", xticks=list(depths), ylim=(0, 109))
    axes.set_yticks(range(0, 101, 20))
    legend(drawing, axes)
    return finish(
        drawing,
        f"acceptance-by-depth{suffix}",
        f"Acceptance by draft depth, K={shown[0].num_steps}",
        where(temperature, level),
        "The paper's Figure 4a: all drafts up to this depth accepted. Dots are the tasks. "
        f"{_over(results, shown, offered)}{_maps_note(shown)}",
        facts,
    )


@plot_style()
def _maps(results: Merged, temperature: float, suffix: str) -> Plot | None:
    """Tau and speedup against the size of the token map, a line per task."""
    lowest = min(c for t, c in slices(results) if t == temperature)
    blocks = map_blocks(results, temperature, lowest)
    if not blocks:
        return None

    # A line per task and method: (size of the map, τ, speedup); its last point is the whole vocabulary.
    steps = max(num_steps for num_steps, _, _ in blocks)
    facts = []
    drawing, (upper, lower) = column_figure(5.6, 2, sharex=True)
    sizes: set[int] = set()
    lines = []
    for num_steps, task, shown in blocks:
        if num_steps != steps:
            continue
        whole: list[Any] = []
        by_label: dict[str, list[Any]] = defaultdict(list)
        for entry in shown:
            run, server = entry.runs[task], server_of(results, entry, task)
            size = server.token_map_size if entry.maps else None
            if entry.num_steps and (size or not entry.maps):
                point = (size, tau(run, entry.num_steps), run.speedup)
                (by_label[server.label] if size else whole).append(point)
                sizes |= {size} if size else set()
        title = results.tasks[task].title
        names = {label: f"{title}, {label}" if len(by_label) > 1 else title for label in by_label}
        lines += [(names[label], points + whole) for label, points in by_label.items()]
    if not sizes:
        return None

    # Above τ, below the speedup; sizes stand at equal distances, the whole vocabulary at the end.
    order: list[int | None] = [*sorted(sizes), None]
    # Tasks are not methods, so their colors are the palette's other half.
    for i, (name, points) in enumerate(lines):
        color, marker = PALETTE[(4 + i) % len(PALETTE)][0], MARKERS[i % len(MARKERS)]
        texts = []
        for axes, column in ((upper, 1), (lower, 2)):
            known = [(order.index(p[0]), p[column]) for p in points if p[column] is not None]
            known.sort(key=lambda point: point[0])
            if not known:
                continue
            _line(axes, known, color, marker, name)
        for size, length, ratio in points:
            length_text = "" if length is None else f" τ {length:.2f}"
            texts.append(f"{f'{size:,}' if size else 'whole'}{length_text}{f' {times(ratio)}' if ratio else ''}")
        facts.append(f"{name}: {', '.join(texts)}")

    # Scales.
    lower.set_xticks(range(len(order)), [_thousands(size) if size else "whole" for size in order])
    upper.set(ylabel="tokens per step (τ)")
    lower.set(xlabel="ids in the draft's vocabulary", ylabel="speedup")
    lower.yaxis.set_major_formatter(lambda y, _: f"{y:g}×")
    for axes in (upper, lower):
        axes.margins(y=0.12)
    legend(drawing, upper)
    return finish(
        drawing,
        f"map-sizes{suffix}",
        f"Token maps: acceptance length and speedup, K={steps}",
        where(temperature, lowest),
        "The paper's Table 2 as a picture. Bars: 95 % interval, bootstrap over prompts and rounds. "
        "The axes do not start at zero.",
        facts,
    )


def _thousands(size: int) -> str:
    return f"{size // 1024}k" if size % 1024 == 0 else f"{size:,}"


@plot_style()
def _concurrency(results: Merged, temperature: float, suffix: str) -> Plot | None:
    """Speedup of one request and speed of all, against requests at a time; means over tasks."""
    levels = [c for t, c in slices(results) if t == temperature]
    if len(levels) < 2:
        return None

    # The methods of one K, and at each level only the tasks that most of them ran.
    by_level = {level: fastest_maps(entries(results, temperature, level)) for level in levels}
    every = [e for shown in by_level.values() for e in shown]
    chosen = {(e.name, e.num_steps) for e in _of_one_k(by_level[levels[0]], fastest=True)}
    offered = [e for e in every if e.num_steps == 0 or (e.name, e.num_steps) in chosen]
    by_level = {level: _alike([e for e in by_level[level] if e in offered]) for level in levels}
    shown = [e for of_level in by_level.values() for e in of_level]

    # Above the speedup of one request, below the speed of all: a line per method.
    looks = paints(results, shown)
    drawing, (upper, lower) = column_figure(5.6, 2, sharex=True)
    facts = []
    for name, num_steps in dict.fromkeys((e.name, e.num_steps) for e in shown):
        color, marker = looks[name]
        ratios, totals = [], []
        for level in levels:
            for entry in by_level[level]:
                if (entry.name, entry.num_steps) == (name, num_steps):
                    runs = list(entry.runs.values())
                    totals.append((level, sum(run.tokens_per_second for run in runs) / len(runs)))
                    ratio = mean_speedup(runs)
                    if ratio:
                        ratios.append((level, ratio))
        if num_steps and ratios:
            _line(upper, ratios, color, marker, name)
        if totals:
            _line(lower, totals, color, marker, name)
            speedups = dict(ratios)
            facts.append(f"{name}: " + ", ".join(
                f"{x} at a time {total:.0f} token/s{f' {times(speedups[x])}' if x in speedups else ''}"
                for x, total in totals
            ))  # fmt: skip
    if not facts:
        return None

    # The baseline; the scales.
    upper.axhline(1, color=INK, linestyle="--", linewidth=1.2)
    upper.set(ylabel="speedup of one request")
    upper.yaxis.set_major_formatter(lambda y, _: f"{y:g}×")
    lower.set(ylabel="token/s, all requests", xlabel="requests at a time")
    lower.set_ylim(bottom=0)
    lower.set_xscale("log", base=2)
    lower.set_xticks(levels, [str(level) for level in levels])
    lower.minorticks_off()
    legend(drawing, lower)
    steps = max((k for _, k in chosen), default=0)
    return finish(
        drawing,
        f"concurrency{suffix}",
        f"Speedup against concurrency, K={steps}",
        where(temperature, None),
        f"{_over(results, shown, offered)} Dashed: the baseline at the same concurrency. Bars: 95 % interval."
        f"{_maps_note(shown)}",
        facts,
    )


@plot_style()
def _histogram(results: Merged, temperature: float, suffix: str) -> Plot | None:
    """How many drafts a verification step accepts, all tasks together."""
    level, shown = _first_slice(results, temperature)
    offered = [e for e in _of_one_k(shown, fastest=False) if all(sum(run.histogram) for run in e.runs.values())]
    shown = _alike(offered)
    if not shown:
        return None

    # A group of bars per number of accepted drafts, a bar per method: the share of its steps in all tasks.
    drawing, (axes,) = column_figure(3.7)
    looks = paints(results, shown)
    width = 0.8 / len(shown)
    facts = []
    for i, entry in enumerate(shown):
        bins = [0] * (entry.num_steps + 1)
        for run in entry.runs.values():
            for accepted, count in enumerate(run.histogram[: len(bins)]):
                bins[accepted] += count
        shares = [100 * count / max(1, sum(bins)) for count in bins]
        places = [c + (i - (len(shown) - 1) / 2) * width for c in range(len(bins))]
        bars = axes.bar(places, shares, width * 0.92, color=looks[entry.name][0], label=entry.name)
        if len(shown) * len(bins) <= 18:
            axes.bar_label(bars, fmt="%.0f", fontsize=9, padding=2)
        facts.append(f"{entry.name}: " + ", ".join(f"{c} accepted {share:.0f} %" for c, share in enumerate(shares)))

    # Scales.
    axes.set(xlabel="drafts accepted in a step", ylabel="verification steps (%)")
    axes.set_xticks(range(shown[0].num_steps + 1))
    axes.margins(y=0.1)
    legend(drawing, axes)
    return finish(
        drawing,
        f"accepted-per-step{suffix}",
        f"Drafts accepted per verification step, K={shown[0].num_steps}",
        where(temperature, level),
        f"{_over(results, shown, offered, 'Steps of')}{_maps_note(shown)}",
        facts,
    )


def _by_position(results: Merged, temperature: float, suffix: str) -> Plot | None:
    """Tau by position in the answer, all tasks together, weighted by their steps."""
    return _along(results, temperature, suffix, "answer")


def _by_context(results: Merged, temperature: float, suffix: str) -> Plot | None:
    """Tau by position in prompt and answer together, likewise."""
    return _along(results, temperature, suffix, "context")


@plot_style()
def _along(results: Merged, temperature: float, suffix: str, of: Literal["answer", "context"]) -> Plot | None:
    def parts_of(run: Run) -> list[Part]:
        return run.tau_by_position if of == "answer" else run.tau_by_context

    level, shown = _first_slice(results, temperature)
    offered = [e for e in _of_one_k(shown, fastest=False) if any(parts_of(run) for run in e.runs.values())]
    shown = _alike(offered)

    # A line per method: τ of each stretch, all tasks together.
    looks = paints(results, shown)
    drawing, (axes,) = column_figure(3.7)
    facts = []
    ends: list[float] = []
    for entry in shown:
        sums: dict[tuple[int, int], list[float]] = {}
        for run in entry.runs.values():
            for part in parts_of(run):
                if part.steps:
                    at = sums.setdefault((part.start, part.end), [0.0, 0.0])
                    at[0] += part.tau * part.steps
                    at[1] += part.steps
        if len(sums) < 2:
            continue
        points = [((start + end) / 2, total / steps) for (start, end), (total, steps) in sorted(sums.items())]
        color, marker = looks[entry.name]
        _line(axes, points, color, marker, entry.name)
        ends += [end for _, end in sums]
        facts.append(f"{entry.name}: " + ", ".join(
            f"{start} to {end} {total / steps:.2f}" for (start, end), (total, steps) in sorted(sums.items())
        ))  # fmt: skip
    if not facts:
        return None

    # Scales.
    place = "answer" if of == "answer" else "prompt and answer"
    axes.set(xlabel=f"position in the {place} (tokens)", ylabel="tokens per step (τ)", xlim=(0, max(ends)))
    if of == "context":  # its parts double
        axes.set_xscale("log", base=2)
        axes.set_xlim(None, None)
    highest = max(axes.dataLim.y1, 1.1)
    axes.set_ylim(1.0, highest + 0.08 * (highest - 1.0))
    legend(drawing, axes)
    return finish(
        drawing,
        f"tau-by-{'position' if of == 'answer' else 'context'}{suffix}",
        f"Acceptance length along the {of}, K={shown[0].num_steps}",
        where(temperature, level),
        f"All steps that began in a stretch of the {place}, drawn at its middle. "
        f"{_over(results, shown, offered, 'Steps of')}{_maps_note(shown)}",
        facts,
    )
