"""What the study measures of a head, and the tables it prints.

Every rate is of teacher-forced texts that the model itself gave (`swift_fastmtp/simulate/acceptance.py`): what a server
would accept, at every depth, in every token map, with greedy and with sampled drafts.
"""

from itertools import accumulate, pairwise
from operator import mul
from types import SimpleNamespace

import torch

from swift_fastmtp.files.table import markdown_table
from swift_fastmtp.method.metrics import expected_rounds, text_counts
from swift_fastmtp.simulate.acceptance import greedy_acceptance, sampled_acceptance
from swift_fastmtp.simulate.plots import plot_acceptance

DEPTH = 7
"""Measured; the paper's tables stop at 3."""
POSITIONS = (0, 64, 128, 256, 512, 1024)
"""Bounds of the parts of an answer that are told apart."""
BATCH = 16
DRAWS = 2000
"""Of the bootstrap."""


def measure_greedy(model, texts, kinds, pad, maps):
    """Cells of greedy drafts: for all texts, for each kind, and inside each map.

    Args:
        texts: greedy answers.
        kinds: of each text.
        maps: ids by size; 0 is the whole vocabulary, None.
    """
    by_map = greedy_acceptance(model, texts, pad, BATCH, list(maps.values()))
    of_all = by_map[list(maps).index(0)]
    found = {"all": cell(of_all)}
    for kind in sorted(set(kinds)):
        found[kind] = cell([a for a, k in zip(of_all, kinds, strict=True) if k == kind])
    inside = {size: cell(of_map) for size, of_map in zip(maps, by_map, strict=True) if size}
    return {"kinds": found, "maps": inside}


def measure_positions(model, texts, pad):
    """Greedy drafts by position in the answer, of long ones."""
    (of_all,) = greedy_acceptance(model, texts, pad, BATCH)
    return positions(of_all)


def measure_sampled(model, texts, pad, temperature, maps):
    """Cells of drafts that are sampled at `temperature`, as the texts were, by map."""
    by_map = sampled_acceptance(model, texts, pad, BATCH, temperature, list(maps.values()))
    return {size: cell(of_map) for size, of_map in zip(maps, by_map, strict=True)}


def cell(accepted):
    """Rates by depth, tau by K, and each text's tokens and rounds at K = 3, which intervals are drawn from.

    `accepted` are tensors [depth, answer tokens], of 0 and 1 or of probabilities.
    """
    counts = text_counts(accepted)
    rounds = {k: [expected_rounds(a, k) for a in accepted] for k in range(1, len(accepted[0]) + 1)}
    tau = [sum(tokens for tokens, _ in rounds[k]) / max(1.0, sum(steps for _, steps in rounds[k])) for k in rounds]
    return {"answers": len(accepted), "conditional": counts.conditional, "tau": tau, "rounds": rounds[3]}


def positions(accepted):
    """Of every part of the answers: rows, and how many of them drafts of depths 1..3 reach."""
    parts = []
    for low, high in pairwise(POSITIONS):
        chains = [a[:3, low:high].double().cumprod(0) for a in accepted if a.shape[1] > low]
        if chains:
            whole = torch.cat(chains, 1)
            parts.append({"from": low, "to": high, "rows": whole.shape[1], "marginal": whole.mean(1).tolist()})
    return parts


def tau_interval(found, other=None):
    """95 % of tau at K = 3, or of its difference from another's on the same texts, by bootstrap over texts."""
    rounds = [torch.tensor(c["rounds"]).double() for c in (found, other) if c]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(len(rounds[0]), (DRAWS, len(rounds[0])), generator=generator)
    taus = [r[drawn, 0].sum(1) / r[drawn, 1].sum(1) for r in rounds]
    value = taus[0] - taus[1] if other else taus[0]
    return [float(value.quantile(q)) for q in (0.025, 0.975)]


def plot(heads, names, path):
    """Acceptance by depth, up to 5, and tau by K, of the heads with these names, drafting from the whole vocabulary."""
    results = []
    for head in heads:
        if head["name"] in names:
            found = cell_of(head, 0)
            marginal = list(accumulate(found["conditional"][:5], mul))
            results.append(SimpleNamespace(name=head["name"], marginal=marginal, tau_micro=found["tau"][:5]))
    plot_acceptance(results, path)


def tables(heads, trained_in):
    """Markdown. `heads` are measured, in order; arms were trained inside the map of size `trained_in` (0: none)."""
    parts = [f"## Heads\n\n{in_a_map(trained_in)}\n\n{heads_table(heads, trained_in)}"]
    if trained_in:
        parts.append(f"## Heads, drafting from the whole vocabulary\n\n{heads_table(heads, 0)}")
    parts.append(f"## By kind of question, tau at K = 3\n\n{kinds_table(heads)}")
    if any(head["greedy"]["maps"] for head in heads):
        parts.append(f"## By map, tau at K = 3\n\n{maps_table(heads)}")
    if any("long" in head for head in heads):
        title = "By position in a long answer: first draft, and drafts of a chain of three"
        parts.append(f"## {title}\n\n{position_table(heads)}")
    if temperatures := sorted({key for head in heads for key in head if key.startswith("T=")}):
        parts.append(f"## Sampled drafts, tau at K = 3\n\n{sampled_table(heads, temperatures)}")
    return "\n\n".join(parts) + "\n"


def in_a_map(size):
    if not size:
        return "Drafts from the whole vocabulary."
    return f"Drafts from a map of {size} tokens, inside which the arms were trained."


def cell_of(head, size):
    return head["greedy"]["maps"][str(size)] if size else head["greedy"]["kinds"]["all"]


def heads_table(heads, size):
    """Conditional rates, tau, and how far tau at K = 3 lies above the control's with the same seed."""
    taus = (1, 2, 3, DEPTH)
    lines = [[f"depth {k}" for k in range(1, 6)] + [f"tau K={k}" for k in taus] + ["K=3, 95 %", "above the control"]]
    controls = {head["name"]: cell_of(head, size) for head in heads}
    for head in heads:
        found = cell_of(head, size)
        arm, _, seed = head["name"].rpartition("-")
        control = controls.get(f"control-{seed}") if arm and arm != "control" else None
        rates = [f"{100 * rate:.1f} %" for rate in found["conditional"][:5]]
        low, high = tau_interval(found)
        gain = "{:+.3f} to {:+.3f}".format(*tau_interval(found, control)) if control else ""
        lines.append([*rates, *(f"{found['tau'][k - 1]:.3f}" for k in taus), f"{low:.2f} to {high:.2f}", gain])
    rows = [[head["name"], *line] for head, line in zip(heads, lines[1:], strict=True)]
    return markdown_table(["head", *lines[0]], rows, raw=True)


def kinds_table(heads):
    kinds = list(heads[0]["greedy"]["kinds"])
    rows = []
    for head in heads:
        rows.append([head["name"], *(f"{head['greedy']['kinds'][kind]['tau'][2]:.3f}" for kind in kinds)])
    return markdown_table(["head", *kinds], rows, raw=True)


def maps_table(heads):
    sizes = list(heads[0]["greedy"]["maps"])
    rows = []
    for head in heads:
        taus = [head["greedy"]["maps"][size]["tau"][2] for size in sizes]
        rows.append([head["name"], *(f"{tau:.3f}" for tau in taus), f"{head['greedy']['kinds']['all']['tau'][2]:.3f}"])
    return markdown_table(["head", *sizes, "all"], rows, raw=True)


def position_table(heads):
    heads = [head for head in heads if "long" in head]
    columns = [f"{part['from']}-{part['to'] - 1}" for part in heads[0]["long"]]
    rows = []
    for head in heads:
        rows.append(
            [head["name"], *(f"{100 * p['marginal'][0]:.1f} %, {sum(p['marginal']):.2f}" for p in head["long"])]
        )
    return markdown_table(["head", *columns], rows, raw=True)


def sampled_table(heads, temperatures):
    heads = [head for head in heads if all(t in head for t in temperatures)]
    sizes = list(heads[0][temperatures[0]])
    columns = [f"{t}, {'all' if size == '0' else size}" for t in temperatures for size in sizes]
    rows = []
    for head in heads:
        taus = [head[t][size]["tau"][2] for t in temperatures for size in sizes]
        rows.append([head["name"], *(f"{tau:.3f}" for tau in taus)])
    return markdown_table(["head", *columns], rows, raw=True)
