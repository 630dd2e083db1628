"""The answer that a report begins with: what is fastest, by how much, and where not; lossless or not; what to change.

A sentence is there only if the intervals carry it. An interval that holds 1, as it is shown, is no speedup and no loss;
two servers whose intervals overlap are not told apart. That is stricter than a test of their difference, so what is
written here is not less certain than its 95 %. The order of the servers in a file changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..bench.results import Interval, Run
from ..method.verification import regime_of
from .entries import Entry, entries, mean_speedup, of_all, slices, speed, tasks_of, times
from .merge import Merged
from .tables import where

SHOWN = 3
"""Of servers or tasks in one sentence; the tables have all."""
SMALL_GAIN = 0.05
"""Of tau: if the last draft adds less, one draft fewer is worth measuring."""


@dataclass(frozen=True)
class Answer:
    """What one temperature and concurrency say, in sentences; the first names the fastest server."""

    where: str
    """`Greedy, one request at a time`."""
    sentences: list[str]


@dataclass(frozen=True)
class _Part:
    """One temperature and concurrency: all that the sentences are made of."""

    results: Merged
    temperature: float
    concurrency: int
    methods: list[Entry]
    """Without the baseline; by K, then by name."""
    tasks: list[str]
    means: dict[int, Interval] = field(default_factory=dict)
    """By place in `methods`, of those that ran all tasks: the mean speedup."""

    def title(self, task: str) -> str:
        return self.results.tasks[task].title

    def ranked(self) -> list[tuple[Entry, Interval]]:
        """Those with a mean, the fastest first."""
        order = sorted(self.means, key=lambda i: (-self.means[i].value, i))
        return [(self.methods[i], self.means[i]) for i in order]

    def ratios(self, task: str) -> list[tuple[Entry, Interval]]:
        """Those with a speedup on a task, the fastest first."""
        known = [(e, r) for e in self.methods if task in e.runs and (r := e.runs[task].speedup)]
        return sorted(known, key=lambda pair: -pair[1].value)


def answers(results: Merged) -> list[Answer]:
    """One for each temperature and concurrency, ascending."""
    given = []
    for of in slices(results):
        sentences = [_one_line(sentence) for sentence in _sentences(_part(results, *of))]
        given.append(Answer(_first_upper(where(*of)), sentences))
    return given


def answer_lines(given: Sequence[Answer]) -> list[str]:
    """For a terminal; with one part only its name is left out."""
    lines = []
    for part in given:
        if len(given) > 1:
            lines.append(f"{part.where}:")
        lines += [f"{'  ' if len(given) > 1 else ''}{sentence}" for sentence in part.sentences]
    return lines


def _part(results: Merged, temperature: float, concurrency: int) -> _Part:
    every = entries(results, temperature, concurrency)
    tasks = tasks_of(results, every)
    methods = [e for e in every if any(run.server != results.baseline for run in e.runs.values())]
    methods.sort(key=lambda e: (e.num_steps, e.name))
    part = _Part(results, temperature, concurrency, methods, tasks)
    for i, entry in enumerate(methods):
        if ratio := mean_speedup(of_all(entry, tasks)):
            part.means[i] = ratio
    return part


def _sentences(part: _Part) -> list[str]:
    """In the order in which a reader needs them."""
    if not part.methods:
        return ["Only the baseline was measured: there is nothing to compare it with."]
    if not any(part.ratios(task) for task in part.tasks):
        return [_without_baseline(part), *_same_answers(part), *_worse_heads(part)]
    if not part.means:
        return [*_task_by_task(part), *_rounds(part), *_same_answers(part), *_not_here(part), *_worse_heads(part)]
    return [
        _fastest(part),
        *_rounds(part),
        *_by_task(part),
        *_alike(part),
        *_same_answers(part),
        *_not_here(part),
        *_best_k(part),
        *_worse_heads(part),
    ]


# Which is fastest.


def _fastest(part: _Part) -> str:
    best, ratio = _best(part)
    ranked = part.ranked()
    over = f"mean of {len(part.tasks)} tasks" if len(part.tasks) > 1 else f"on {part.title(part.tasks[0])}"
    what = "the baseline's speed" if part.concurrency == 1 else "the baseline's speed of one request"
    measured = f"{ratio.value:.2f}× {what} (95 % interval {ratio.low:.2f} to {ratio.high:.2f}), {over}"

    if _is_faster(ratio):
        return f"Fastest: {_named(best)}, {measured}."
    if all(_is_slower(r) for _, r in ranked) and any(_drafts(e) for e, _ in ranked):
        if len(ranked) == 1:
            return f"Do not draft here: {_named(best)} is slower than the baseline, {measured}."
        return f"Do not draft here: each server is slower than the baseline. The best, {_named(best)}, has {measured}."
    if _is_slower(ratio):
        return f"No server is faster than the baseline. The best, {_named(best)}, has {measured}: it is slower."
    return f"No server can be told from the baseline to be faster. The best, {_named(best)}, has {measured}."


def _alike(part: _Part) -> list[str]:
    """Servers that may be as fast."""
    best, ratio = _best(part)
    alike = [f"{_named(e)} ({times(r)})" for e, r in part.ranked() if e is not best and _overlap(r, ratio)]
    return [f"Not told apart from {_named(best)}, as the intervals overlap: {_some(alike)}."] if alike else []


def _best(part: _Part) -> tuple[Entry, Interval]:
    """The fastest of those that are faster than the baseline; if none is, of all."""
    ranked = part.ranked()
    return next(((e, r) for e, r in ranked if _is_faster(r)), ranked[0])


def _without_baseline(part: _Part) -> str:
    """Speeds without intervals: which was highest is all that can be written."""
    speeds = []
    for i, entry in enumerate(part.methods):
        known = [s for run in of_all(entry, part.tasks) if (s := speed(run)) is not None]
        if len(known) == len(part.tasks):
            speeds.append((-sum(known) / len(known), i))
    if not speeds:
        return "How much faster drafting is cannot be told: no server was compared with a baseline on every task."
    value, i = min(speeds)
    return (
        "How much faster drafting is cannot be told: there is no baseline beside these runs. Highest speed: "
        f"{_named(part.methods[i])}, {-value:.1f} token/s."
    )


def _task_by_task(part: _Part) -> list[str]:
    """Where no server ran all tasks."""
    lines = ["No server was compared with the baseline on every task, so there is no fastest one of all."]
    for task in part.tasks:
        ranked = part.ratios(task)
        if not ranked:
            continue
        entry, ratio = next(((e, r) for e, r in ranked if _is_faster(r)), ranked[0])
        text = f"{part.title(task)}: {_named(entry)}, {times(ratio)}"
        if not _is_faster(ratio):
            text += ", slower than the baseline" if _is_slower(ratio) else ", not told from the baseline"
        if any(e is not entry and _overlap(r, ratio) for e, r in ranked):
            text += "; others are not told apart from it"
        lines.append(f"{text}.")
    return lines


# On which tasks it is not.


def _by_task(part: _Part) -> list[str]:
    """The fastest server, task by task: against the baseline, then against the others."""
    if len(part.tasks) == 1:
        return []
    best, ratio = _best(part)
    own = {task: r for task in part.tasks if (r := best.runs[task].speedup)}
    slower = [f"{part.title(task)} ({times(r)})" for task, r in own.items() if _is_slower(r)]
    unknown = [part.title(task) for task, r in own.items() if not _is_slower(r) and not _is_faster(r)]
    faster = [f"{part.title(task)} ({times(r)})" for task, r in own.items() if _is_faster(r)]
    lines = []
    if len(faster) == len(own):
        lines.append("It is faster than the baseline on each of these tasks.")
    elif faster and not _is_faster(ratio):
        lines.append(f"It is faster than the baseline on {_some(faster, all_of=True)}.")
    if slower and len(slower) == len(own):
        lines.append("It is slower than the baseline on each of these tasks.")
    elif slower:
        lines.append(f"It is slower than the baseline on {_some(slower, all_of=True)}.")
    if unknown:
        lines.append(f"It cannot be told from the baseline on {_some(unknown, all_of=True)}.")

    within = []
    for task, r in own.items():
        first, highest = part.ratios(task)[0]
        ahead = [(e, other) for e, other in part.ratios(task) if other.value > r.value and not _overlap(other, r)]
        if ahead:
            entry, other = ahead[0]
            lines.append(f"On {part.title(task)}, {_named(entry)} is faster: {times(other)} against {times(r)}.")
        elif first is not best and highest.value > r.value:
            within.append(part.title(task))
    if within:
        lines.append(f"Others were measured faster, but within the intervals, on {_some(within, all_of=True)}.")
    return lines


def _rounds(part: _Part) -> list[str]:
    """Said once: it holds for all."""
    first = slices(part.results)[0] == (part.temperature, part.concurrency)
    once = any(content.settings.rounds == 1 for _, content in part.results.files)
    if not (first and once):
        return []
    return ["Measured in one round: how much the machine changed meanwhile is not in the intervals."]


# Lossless or not.


def _same_answers(part: _Part) -> list[str]:
    if part.temperature > 0:
        return _same_distribution(part)
    checks = {
        _named(e): [run.lossless for run in e.runs.values() if run.lossless and run.lossless.compared]
        for e in part.methods
    }
    compared = sum(check.compared for of_entry in checks.values() for check in of_entry)
    if not compared:
        return ["Whether the answers are the baseline's was not measured."]
    equal = sum(check.equal for of_entry in checks.values() for check in of_entry)
    if equal == compared:
        return [f"Lossless: {equal} of {compared} answers equal the baseline's."]

    # Which servers, and what the usual reason is.
    differing = []
    for name, of_entry in checks.items():
        different = sum(check.compared - check.equal for check in of_entry)
        if different:
            differing.append((-different, f"{different} of {name}"))
    names = [text for _, text in sorted(differing)]
    return [f"Not every answer is the baseline's: {equal} of {compared} are. Different: {_some(names)}.", _why(part)]


def _same_distribution(part: _Part) -> list[str]:
    """Above temperature 0: texts are drawn, so their distribution is what must not change."""
    tested = [one for one in part.results.distributions if one.temperature == part.temperature]
    if not tested:
        return ["Lossless was not tested here: `fastmtp bench --distribution_samples` compares how answers are drawn."]
    lines = []
    for one in sorted(tested, key=lambda one: (one.p_holm, one.server)):
        if one.differs:
            label = part.results.servers[one.server].label
            lines.append(f"Not lossless: answers of {label} are drawn from another distribution, p = {one.p_holm:.2g}.")
    if lines:
        return lines
    least = min(tested, key=lambda one: one.p_holm)
    amount = f"{least.prompts} × {least.samples} answers"
    return [f"Lossless as far as {amount} tell: drawn as the baseline's are, p = {least.p_holm:.2g} or more."]


def _why(part: _Part) -> str:
    """The likely reason of answers that differ, by what is known of the runs."""
    if part.concurrency > 1:
        return "Likely reason: in batches of another size an engine rounds differently, so near-ties fall differently."
    servers = {run.server for e in part.methods for run in e.runs.values()} | {part.results.baseline}
    commands = [part.results.servers[name].command or [] for name in servers if name]
    if all(_dtype(command) == "float32" for command in commands):
        return "In float32 and one request at a time that is not expected: look at the first difference."
    return "Likely reason: near-ties of 16-bit numbers, which fall differently; a run in float32 shows whether it is."


def _dtype(command: Sequence[str]) -> str:
    """What a server's command asks for, the last one as its parser has it; `` if nothing."""
    words: list[str] = []
    for word in command:
        words += word.split("=", 1) if word.startswith("--dtype=") else [word]
    places = [i for i, word in enumerate(words[:-1]) if word == "--dtype"]
    return words[places[-1] + 1] if places else ""


# What to change.


def _not_here(part: _Part) -> list[str]:
    """Tasks on which all that drafts is slower."""
    if part.means and all(_is_slower(r) for _, r in part.ranked()):
        return []  # the first sentence is this one, for all tasks
    lost = []
    for task in part.tasks:
        drafting = [r for e, r in part.ratios(task) if _drafts(e)]
        if drafting and all(_is_slower(r) for r in drafting):
            lost.append(part.title(task))
    return [f"Do not draft on {_some(lost, all_of=True)}: every server that drafts is slower there."] if lost else []


def _drafts(entry: Entry) -> bool:
    """A running server of another kind does not tell its K, but its method is not the baseline's."""
    return entry.num_steps > 0 or entry.method != "baseline"


def _best_k(part: _Part) -> list[str]:
    """K, of the fastest server's method: which of the measured ones, or which one to measure."""
    best, ratio = _best(part)
    of_k = {e.num_steps: r for e, r in part.ranked() if e.name == best.name and e.num_steps}
    steps = best.num_steps
    if not steps or not _is_faster(ratio):
        return []
    more = [f"K = {k} ({times(r)})" for k, r in sorted(of_k.items()) if k > steps and not _overlap(r, ratio)]
    if more:
        return [f"K = {steps}: more drafts are slower, {_some(more)}."]
    if len(of_k) == 1 and steps > 1:
        return _one_fewer(part, best)
    if len(of_k) > 1 and steps == max(of_k) and not any(_overlap(r, ratio) for k, r in of_k.items() if k != steps):
        return [f"K = {steps} is the fastest of {best.name} and the most that was measured: measure K = {steps + 1}."]
    return []


def _one_fewer(part: _Part, best: Entry) -> list[str]:
    """Only one K was measured, and its last draft is hardly ever accepted."""
    bins = [0] * (best.num_steps + 1)
    for run in best.runs.values():
        for accepted, count in enumerate(run.histogram[: len(bins)]):
            bins[accepted] += count
    total = sum(bins)
    if not total or any(part.results.servers[run.server].schedule for run in best.runs.values()):
        return []
    tau = 1 + sum(accepted * count for accepted, count in enumerate(bins)) / total
    last = bins[-1] / total
    if last >= SMALL_GAIN * tau:
        return []
    k = best.num_steps
    return [f"Draft {k} of {_named(best)} adds {last:.2f} to a τ of {tau:.2f}: measure K = {k - 1} too."]


def _worse_heads(part: _Part) -> list[str]:
    """A tuned head that accepts less than the shipped one: at the largest K of both, with the same map."""
    shipped: dict[object, list[Run]] = {}
    for entry in part.methods:
        for task, run in entry.runs.items():
            if part.results.servers[run.server].method == "vanilla":
                shipped.setdefault(_conditions(part, run, task), []).append(run)

    worse: dict[str, tuple[int, list[str]]] = {}
    for entry in part.methods:  # by K, so a larger one replaces a smaller
        texts, compared = [], False
        for task in (task for task in part.tasks if task in entry.runs):
            run = entry.runs[task]
            others = shipped.get(_conditions(part, run, task), [])
            # Of two shipped heads neither is the one to compare with.
            before = others[0].tau_interval if len(others) == 1 else None
            now = run.tau_interval if part.results.servers[run.server].method.startswith("tuned") else None
            if before and now:
                compared = True
                if _shown(now.high) < _shown(before.low):
                    texts.append(f"{part.title(task)} (τ {_of(now)} against {_of(before)})")
        if compared:
            worse[entry.name] = (entry.num_steps, texts)
    return [
        f"The head of {name} is worse than the shipped one on {_some(texts, all_of=True)}, K = {num_steps}."
        for name, (num_steps, texts) in sorted(worse.items())
        if texts
    ]


def _conditions(part: _Part, run: Run, task: str) -> object:
    """What must be alike for two heads' tau to be compared."""
    server = part.results.servers[run.server]
    regime = regime_of(server.command).title if part.temperature and server.command else ""
    return task, server.num_steps, server.token_map, regime, tuple(sorted((server.schedule or {}).items()))


# Words and numbers.


def _named(entry: Entry) -> str:
    return f"{entry.name} with K = {entry.num_steps}" if entry.num_steps else entry.name


def _some(names: Sequence[str], all_of: bool = False) -> str:
    """`a`, `a and b`, `a, b and c`, `a, b, c and 4 more`."""
    if len(names) > SHOWN + 1 and not all_of:
        names = [*names[:SHOWN], f"{len(names) - SHOWN} more"]
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _shown(value: float) -> float:
    """As the sentences have it: nothing is claimed that the digits do not show."""
    return round(value, 2)


def _is_faster(ratio: Interval) -> bool:
    return _shown(ratio.low) > 1


def _is_slower(ratio: Interval) -> bool:
    return _shown(ratio.high) < 1


def _overlap(one: Interval, other: Interval) -> bool:
    return _shown(one.low) <= _shown(other.high) and _shown(other.low) <= _shown(one.high)


def _of(interval: Interval) -> str:
    return f"{interval.value:.2f} [{interval.low:.2f}, {interval.high:.2f}]"


def _one_line(sentence: str) -> str:
    """Labels and titles are anybody's: no line ends, nothing that a terminal obeys, no second point at the end."""
    plain = "".join(c if c.isprintable() else " " for c in sentence)
    return f"{' '.join(plain.split()).rstrip('.')}."


def _first_upper(text: str) -> str:
    return text[:1].upper() + text[1:]
