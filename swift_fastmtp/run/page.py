"""The page at the end: what was done by which commands, and what came of it.

The numbers are those of the stages' own files (`simulate.json`, the benchmark's `results.json`); nothing is computed
here.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import __version__
from ..files.inputs import read_json
from ..files.plot_style import MARKERS, PALETTE, plot_style
from ..files.staging import staged
from ..files.table import NOTHING, Table, number
from ..report.answer import Answer, answers
from ..report.figure import Plot, column_figure, finish, legend
from ..report.merge import load_results, notes
from ..report.page import page
from ..report.plots import plots
from ..report.report import tables
from ..simulate.result import ALL
from .estimate import Need, disk_of, memory_of, time_of, whole
from .measure import logged_steps
from .plan import RunPlan
from .stages import Stage
from .state import State

NAME = "run.html"
TITLE = "fastmtp run"


def write_page(plan: RunPlan, stages: Sequence[Stage], state: State) -> Path:
    """Write the page. Returns its path. Raises `FastMTPError` if it cannot be written."""
    out = plan.out
    drawn: list[Plot] = []
    shown: list[Table] = []
    given: list[Answer] = []
    first: list[str] = []
    results, simulated = out / "bench/results.json", out / "simulate/simulate.json"
    if results.exists():
        merged = load_results([results])
        drawn += plots(merged)
        shown += tables(merged)
        given += answers(merged)
        first += notes(merged)
    if simulated.exists():
        heads = read_json(simulated)["heads"]
        whole = [head for head in heads if not head["token_map"]]
        drawn += [_acceptance(whole), _tau(whole)]
        shown.append(_heads(heads))
        given.append(Answer("Without a server, as simulated", _before_and_after(whole)))
    shown += [_stages(stages, state), _commands(stages)]
    if state.estimate is not None:
        rows = [[line] for line in state.estimate.lines]
        caption = "What was measured before the start, and assumed."
        shown.append(Table("estimate", "Estimate", caption, [("", "")], rows, is_text=True))
    made = f"Made by fastmtp run, swift_fastmtp {__version__}."
    path = out / NAME
    with staged(path) as file:
        title = f"{TITLE}: {Path(plan.keys.model).name}"
        file.write_text(page(title, given, first, drawn, shown, made), encoding="utf-8")
    return path


def _name(head: dict[str, Any]) -> str:
    name = Path(head["head"]).name
    return f"{name} + {Path(head['token_map']).name}" if head["token_map"] else name


def _before_and_after(heads: Sequence[dict[str, Any]]) -> list[str]:
    """The head that the model had, and the trained one, on all answers."""
    groups = [head for head in heads if head["group"] == ALL]
    if len(groups) != 2:
        return []
    before, after = (head["tau_micro"] for head in groups)
    return [
        f"Trained, a verification step gives {after[-1]:.2f} tokens with K = {len(after)}; before it gave "
        f"{before[-1]:.2f}. With one draft: {after[0]:.2f}, before {before[0]:.2f}."
    ]


def _heads(heads: Sequence[dict[str, Any]]) -> Table:
    depths = range(1, len(heads[0]["marginal"]) + 1)
    columns = [("", "head"), ("", "answers")]
    columns += [("all drafts accepted up to depth", str(k)) for k in depths] + [("τ", f"K={k}") for k in depths]
    rows = []
    for head in heads:
        rates = [number(100 * rate, 1, "%") for rate in head["marginal"]]
        rows.append([_name(head), head["group"], *rates, *(number(tau) for tau in head["tau_micro"])])
    caption = "Without a server, by fastmtp simulate; τ is tokens per verification step with K drafts in each."
    return Table("heads", "Acceptance before and after", caption, columns, rows, num_keys=2)


@plot_style()
def _acceptance(heads: Sequence[dict[str, Any]]) -> Plot:
    figure, (axes,) = column_figure(3.4)
    return _lines(figure, axes, heads, "marginal", 100.0, ("Acceptance by draft depth", "%", "draft depth"))


@plot_style()
def _tau(heads: Sequence[dict[str, Any]]) -> Plot:
    figure, (axes,) = column_figure(3.4)
    return _lines(figure, axes, heads, "tau_micro", 1.0, ("Tokens per verification step", "τ", "drafts per step, K"))


def _lines(
    figure: Any, axes: Any, heads: Sequence[dict[str, Any]], key: str, scale: float, names: tuple[str, str, str]
) -> Plot:
    title, unit, below = names
    facts = []
    for place, head in enumerate(heads):
        values = [scale * value for value in head[key]]
        color, marker = PALETTE[place % len(PALETTE)][0], MARKERS[place % len(MARKERS)]
        axes.plot(
            range(1, len(values) + 1), values, marker=marker, color=color, label=f"{_name(head)}, {head['group']}"
        )
        facts.append(f"{_name(head)}, {head['group']}: {', '.join(f'{value:.2f}' for value in values)}")
    axes.set(xlabel=below, ylabel=unit, xticks=range(1, len(heads[0][key]) + 1))
    legend(figure, axes)
    return finish(figure, key.replace("_", "-"), title, "simulated", "By fastmtp simulate.", facts)


def _stages(stages: Sequence[Stage], state: State) -> Table:
    """What was estimated of each stage, beside what it took."""
    needs = {} if state.estimate is None else state.estimate.needs
    rows, estimated, taken = [], [], []
    for stage in stages:
        entry, need = state.record.get(stage.name), needs.get(stage.name, Need())
        took = Need()
        if entry is not None:
            took = Need(seconds=entry.seconds, disk=entry.disk, memory=entry.memory)
        logged = logged_steps(state.out / "train/logging.jsonl") if stage.name == "train" else None
        if logged is not None:
            took.gpu_memory = logged[2]
        starts = NOTHING if entry is None else str(entry.starts)
        made = f"{stage.output}: was there" if entry is None else str(stage.output or "")
        rows.append([stage.name, starts, *_pairs(need, took), made])
        estimated.append(need)
        taken.append(took)
    rows.append(["the whole", "", *_pairs(whole(estimated), whole(taken)), ""])
    caption = (
        "Time: of the starts that ended by themselves; what was killed is not counted. Memory: RAM of a stage's "
        "largest process. Estimated before the start; a dash is what nothing was measured for."
    )
    columns = [("", "stage"), ("", "starts")]
    columns += [(name, which) for name in ("time", "disk", "memory") for which in ("estimated", "taken")]
    return Table("stages", "Stages", caption, [*columns, ("", "made")], rows, is_text=True)


def _pairs(need: Need, took: Need) -> list[str]:
    return [cell for of in (time_of, disk_of, memory_of) for cell in (of(need), of(took))]


def _commands(stages: Sequence[Stage]) -> Table:
    rows = [[stage.name, stage.line] for stage in stages]
    caption = "Each can be run by hand; what is there is taken."
    return Table("commands", "Commands", caption, [("", "stage"), ("", "command")], rows, is_text=True)
