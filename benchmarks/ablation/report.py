"""Table and plot of the ablation's runs.

    python benchmarks/ablation/report.py --output_dir output/ablation     # writes docs/results/losses.*

tau counts tokens per verification step at K = 3. `argmax` drafts are what SGLang's chain drafting proposes, at every
temperature of the verification; `sampled` drafts are those of speculative sampling, at the temperature of the text.
Intervals are 95 % bootstrap over test prompts, seeds pooled; differences are paired, prompt by prompt.
"""

import argparse
import json
import time
from pathlib import Path

import numpy as np

from swift_fastmtp.files.plot_style import new_figure, plot_style
from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.staging import write_json

LANGUAGES = ("en", "zh", "code")
COLUMNS = {
    "greedy": ("0.0", "rounds"),
    "T=0.6 argmax": ("0.6", "rounds"),
    "T=1.0 argmax": ("1.0", "rounds"),
    "T=0.6 sampled": ("0.6", "sampled"),
    "T=1.0 sampled": ("1.0", "sampled"),
}
BASELINE = ("self", "exact", "ce")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", default="output/ablation", help="of run.py")
    parser.add_argument("--output", default="docs/results/losses")
    args = parser.parse_args()
    started = time.time()
    groups = {}
    for path in sorted((Path(args.output_dir) / "runs").glob("*.json")):
        run = json.loads(path.read_text())
        groups.setdefault((run["data"], run["rollout"], run["loss"]), []).append(run)
    rng = np.random.default_rng(0)
    base = {name: counts(groups[BASELINE], *where) for name, where in COLUMNS.items()}
    draws = rng.integers(0, len(base["greedy"][0]), (2000, len(base["greedy"][0])))
    rows = []
    for (data, rollout, loss), runs in groups.items():
        row = {"data": data, "rollout": rollout, "loss": loss, "rate": runs[0].get("rate"), "seeds": len(runs)}
        for name, where in COLUMNS.items():
            found = counts(runs, *where)
            row[name] = interval(found, draws)
            difference = tau(found, draws) - tau(base[name], draws)
            row[f"{name}, minus exact ce"] = np.percentile(difference, [2.5, 97.5]).tolist()
            row[f"{name}, by seed"] = [float(tau(counts([r], *where))) for r in runs]
        row["marginal"] = marginal(runs)
        row["by language"] = {lang: float(tau(counts(runs, "0.0", "rounds", (lang,)))) for lang in LANGUAGES}
        rows.append(row)
    rows.sort(key=lambda r: (r["data"], r["rollout"], -r["greedy"][0]))
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    prompts = {lang: len(groups[BASELINE][0]["test"][f"0.0-{lang}"]["rounds"]) for lang in LANGUAGES}
    record = {
        "schema": "swift_fastmtp.ablation/1",
        "provenance": {**provenance(), "seconds": round(time.time() - started, 1)},
        "prompts": prompts,
        "rows": rows,
    }
    write_json(record, output.with_suffix(".json"))
    text = table(rows)
    output.with_name(output.name + "_table.md").write_text(text)
    print(text)
    plot(rows, output.with_suffix(".png"))


def counts(runs, temperature, kind, languages=LANGUAGES):
    """Numerators and denominators per prompt, seeds summed: [P] for rounds, [P, K] for sampled drafts."""
    above, below = 0, 0
    for run in runs:
        cells = [run["test"][f"{temperature}-{lang}"] for lang in languages]
        if kind == "rounds":
            found = np.concatenate([np.array(c["rounds"], float) for c in cells])
            above, below = above + found[:, 0], below + found[:, 1]
        else:
            above = above + np.concatenate([np.array(c["sampled"]["sums"]) for c in cells])
            below = below + np.concatenate([np.array(c["sampled"]["rows"]) for c in cells])
    return above, below


def tau(found, draws=None):
    """Micro tau, of all prompts or of every bootstrap draw [R, P]."""
    above, below = found
    if draws is None:
        draws = np.arange(len(above))[None]
    ratio = above[draws].sum(1) / below[draws].sum(1)
    values = ratio if ratio.ndim == 1 else 1 + ratio.sum(-1)
    return values[0] if len(values) == 1 else values


def interval(found, draws):
    low, high = np.percentile(tau(found, draws), [2.5, 97.5])
    return [float(tau(found)), float(low), float(high)]


def marginal(runs):
    """Greedy acceptance of depths 1..K, all prompts and seeds."""
    cells = [run["test"][f"0.0-{lang}"] for run in runs for lang in LANGUAGES]
    return (np.sum([c["accepted"] for c in cells], 0) / np.sum([c["eligible"] for c in cells], 0)).tolist()


def table(rows):
    names = list(COLUMNS)
    header = ["data", "rollout", "loss", "lr", *(f"τ {n}" for n in names), "depth 1 / 2 / 3", "τ en / zh / code"]
    lines = ["| " + " | ".join(header) + " |", "|---|---|---|---:|" + "---:|" * (len(header) - 4)]
    for row in rows:
        cells = [row["data"], row["rollout"], row["loss"], f"{row['rate']:g}" if row["rate"] else "-"]
        for name in names:
            value, low, high = row[name]
            worse, better = row[f"{name}, minus exact ce"]
            sign = "+" if worse > 0 else "−" if better < 0 else ""
            cells.append(f"{value:.2f}{sign} ({low:.2f}–{high:.2f})")
        cells.append(" / ".join(f"{100 * m:.0f}" for m in row["marginal"]))
        cells.append(" / ".join(f"{row['by language'][lang]:.2f}" for lang in LANGUAGES))
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


@plot_style()
def plot(rows, path):
    """A panel per kind of tau, a dot with its interval per loss, a color per rollout; empty: original answers."""
    colors = {"paper": "C0", "exact": "C1", "on-policy": "C2"}
    losses = ["ce", "kl", "topk_kl", "lk", "tv", "e2e"]
    columns = ["greedy", "T=1.0 argmax", "T=1.0 sampled"]
    figure, (panels,) = new_figure(12, 4, columns=len(columns))
    for axes, name in zip(panels, columns, strict=True):
        for row in rows:
            if row["rollout"] not in colors:
                axes.axhline(row[name][0], color="#555555", lw=1, ls=":", label="as shipped")
                continue
            place = losses.index(row["loss"]) + {"paper": -0.2, "exact": 0, "on-policy": 0.2}[row["rollout"]]
            value, low, high = row[name]
            own, color = row["data"] == "self", colors[row["rollout"]]
            axes.errorbar(
                place + (0 if own else 0.07), value, [[value - low], [high - value]], fmt="o", ms=6, capsize=2,
                color=color, mfc=color if own else "white", lw=1,
                label=row["rollout"] if own and row["loss"] == "ce" else None,
            )  # fmt: skip
        axes.set_xticks(range(len(losses)), losses)
        axes.set_title(f"τ, {name}")
    panels[0].legend(fontsize=8)
    figure.savefig(path)


if __name__ == "__main__":
    main()
