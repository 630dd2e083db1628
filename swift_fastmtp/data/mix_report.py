"""What a mix holds, before and after: tables by group, source and language, and the lengths of its rows."""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..files.plot_style import new_figure, plot_style
from ..files.table import markdown_table, terminal_table
from ..files.templates import render
from .mix_index import Index

Ints = NDArray[np.int64]
MAX_SOURCES = 100
"""In the report; the others are one line."""


def make_report(
    index: Index, shares: dict[str, float], count: str, total: int, repeats_N: Ints, val_N: Ints
) -> dict[str, Any]:
    """Rows and tokens (answers' and all) of input, training and validation, by group, source and language, and how
    many training rows of each group have 2**b to 2**(b+1) - 1 counted tokens.

    `repeats_N`: how often each row is in the training set; `val_N`: 1 where it is in the validation set. `share` is of
    the tokens that `count` names.
    """
    answer_N, all_N = np.array(index.answer_tokens_N), np.array(index.all_tokens_N)
    counted_N = answer_N if count == "answers" else all_N
    sets = {"input": np.ones_like(repeats_N), "train": repeats_N, "val": val_N}
    sum_of = {name: int((times_N * counted_N).sum()) for name, times_N in sets.items()}

    def parts(names: dict[str, int], part_N: Ints) -> dict[str, Any]:
        """One entry per name."""

        def sums(value_N: Ints) -> list[int]:
            # bincount adds in float64, exact below 2**53.
            return np.bincount(part_N, value_N, minlength=len(names)).astype(np.int64).tolist()

        columns = {
            name: (sums(times_N), sums(times_N * answer_N), sums(times_N * all_N), sums(times_N * counted_N))
            for name, times_N in sets.items()
        }
        used = sums(np.minimum(repeats_N, 1))
        most = np.zeros(len(names), dtype=np.int64)
        np.maximum.at(most, part_N, repeats_N)
        entries: dict[str, Any] = {}
        for part, i in sorted(names.items()):
            entries[part] = {
                name: {"rows": rows[i], "answer_tokens": answer[i], "all_tokens": every[i],
                       "share": counted[i] / max(sum_of[name], 1)}
                for name, (rows, answer, every, counted) in columns.items()
            }  # fmt: skip
            rows = entries[part]["train"]["rows"]
            entries[part]["train"] |= {
                "different_rows": used[i],
                "mean_repeats": rows / max(used[i], 1),
                "max_repeats": int(most[i]),
            }
        return entries

    report: dict[str, Any] = {
        "count": count,
        "tokens_aimed_at": total,
        "all": parts({"all": 0}, np.zeros(len(repeats_N), dtype=np.int64))["all"],
        "groups": parts(index.groups.numbers, np.array(index.group_N)),
        "sources": parts(*_largest(index.sources.numbers, np.array(index.source_N))),
        "languages": parts(index.languages.numbers, np.array(index.language_N)),
    }
    for name, entry in report["groups"].items():
        entry["target_share"] = shares.get(name, 0.0)
    bin_N = np.floor(np.log2(counted_N)).astype(np.int64)
    group_N = np.array(index.group_N)
    report["lengths"] = {
        name: np.bincount(bin_N, repeats_N * (group_N == i), minlength=int(bin_N.max()) + 1).astype(int).tolist()
        for name, i in sorted(index.groups.numbers.items())
    }
    return report


HEADER = ("", "rows in", "tokens in", "share in", "target", "rows", "tokens", "share", "repeats", "val rows")


def _largest(names: dict[str, int], part_N: Ints) -> tuple[dict[str, int], Ints]:
    """Names and numbers with all but the names of most rows put together: every row may have a source of its own."""
    if len(names) <= MAX_SOURCES:
        return names, part_N
    rows = np.bincount(part_N)
    kept = sorted(names, key=lambda name: (-rows[names[name]], name))[:MAX_SOURCES]
    number = np.full(len(names), MAX_SOURCES)
    number[[names[name] for name in kept]] = np.arange(MAX_SOURCES)
    others = f"({len(names) - MAX_SOURCES} other sources)"
    return {name: i for i, name in enumerate([*kept, others])}, number[part_N]


def _lines(report: dict[str, Any], key: str) -> list[tuple[str, ...]]:
    tokens = "answer_tokens" if report["count"] == "answers" else "all_tokens"
    lines: list[tuple[str, ...]] = []
    for name, entry in [*report[key].items(), ("all", report["all"])]:
        before, train, val = entry["input"], entry["train"], entry["val"]
        target = f"{100 * entry['target_share']:.2f}%" if "target_share" in entry else ""
        was = (f"{before['rows']}", f"{before[tokens]}", f"{100 * before['share']:.2f}%", target)
        now = (f"{train['rows']}", f"{train[tokens]}", f"{100 * train['share']:.2f}%", f"{train['mean_repeats']:.2f}")
        lines.append((name, *was, *now, f"{val['rows']}"))
    return lines


def table(report: dict[str, Any], key: str) -> str:
    """For the terminal."""
    return terminal_table(HEADER, _lines(report, key))


def markdown(report: dict[str, Any]) -> str:
    """report.md, `templates/mix.md.j2`."""
    sets = []
    for name in ("input", "train", "val"):
        entry = report["all"][name]
        sets.append((name, f"{entry['rows']}", f"{entry['answer_tokens']}", f"{entry['all_tokens']}"))
    by_length = []
    for b, of_groups in enumerate(zip(*report["lengths"].values(), strict=True)):
        by_length.append((f"{2**b} to {2 ** (b + 1) - 1}", *(f"{rows}" for rows in of_groups)))
    counted_how = report["messages_whose_tokens_come_from"]
    return render(
        __file__,
        "mix.md",
        **report,
        sources_of_counts=", ".join(f"{how} ({n} messages)" for how, n in counted_how.items()),
        sets=markdown_table(("set", "rows", "answer tokens", "all tokens"), sets),
        parts={key[:-1]: markdown_table(HEADER, _lines(report, key)) for key in ("groups", "sources", "languages")},
        by_length=markdown_table(("tokens", *report["lengths"]), by_length),
    )


@plot_style()
def plot_lengths(report: dict[str, Any], path: Path) -> None:
    """Training rows by length, one line per group."""
    figure, ((axes,),) = new_figure(7, 3.8)
    filled = [b for rows in report["lengths"].values() for b, n in enumerate(rows) if n]
    bins = range(min(filled), max(filled) + 1)
    shown = [(name, rows) for name, rows in report["lengths"].items() if sum(rows)]
    for i, (name, rows) in enumerate(shown):
        percent = [100 * rows[b] / sum(rows) for b in bins]
        label = f"{name} ({sum(rows):,} rows)"
        axes.stairs(percent, [2**b for b in (*bins, bins[-1] + 1)], color=f"C{i}", label=label, linewidth=2)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:,.0f}")
    what = "answer tokens" if report["count"] == "answers" else "tokens"
    axes.set(xlabel=f"{what} of a row", ylabel="rows of the group (%)", title="Lengths of the training rows")
    axes.legend()
    figure.savefig(path)
