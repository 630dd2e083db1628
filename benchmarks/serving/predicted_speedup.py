"""The cost model against measured speed: three times from three servers predict all the others.

    bash recipes/paper/run.sh
    python benchmarks/serving/predicted_speedup.py output/paper/*/results.json

Of each results file: a decoding step from the baseline, a verification and a draft step from the smallest and the
largest K of the first trained head; or, where there is one K only, from the whole vocabulary and the smallest map.
Every other server's speedup is then predicted from its tau, its K and the size of its map (`simulate/cost.py`). tau
is the server's own, which the simulator predicts exactly (tests/serving). Writes docs/results/predicted_speedup.{md,
json}.
"""

import argparse
import time
from pathlib import Path

from swift_fastmtp.bench.results import read_results
from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.staging import write_json
from swift_fastmtp.simulate.cost import read_cost

ROOT = Path(__file__).parents[2]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+")
    parser.add_argument("--model", default="examples/tiny-mimo")
    parser.add_argument("--output", default=str(ROOT / "docs" / "results"))
    args = parser.parse_args()
    started = time.time()
    sections = [predict(path, args.model) for path in args.results]
    record = {"sections": sections, "provenance": {**provenance(), "seconds": round(time.time() - started, 1)}}
    write_json(record, Path(args.output) / "predicted_speedup.json")
    (Path(args.output) / "predicted_speedup.md").write_text(table(record), encoding="utf-8")
    print(table(record))


def predict(path, model):
    results, base = read_results(path), read_cost(model)
    steps = {name: seconds_per_step(results, name) for name in results.servers}
    decode = 1000 * steps[results.baseline][0]
    trained = [n for n, s in results.servers.items() if s.method == "tuned"]
    family = [n for n in trained if results.servers[n].label == results.servers[trained[0]].label]
    fit = sorted(family, key=lambda n: results.servers[n].num_steps)
    if len(fit) > 1:
        few, many = fit[0], fit[-1]
        a, b = (results.servers[n].num_steps for n in (few, many))
        draft = 1000 * (steps[many][0] - steps[few][0]) / (b - a)
        verify = 1000 * steps[few][0] - a * draft
        used = {results.baseline, few, many}
    else:
        maps = [n for n, s in results.servers.items() if s.token_map_size]
        small = min(maps, key=lambda n: results.servers[n].token_map_size)
        K, ids = results.servers[small].num_steps, results.servers[small].token_map_size
        saved = 1 - base.draft_step(ids) / base.draft_step()
        draft = 1000 * (steps[fit[0]][0] - steps[small][0]) / (K * saved)
        verify = 1000 * steps[fit[0]][0] - K * draft
        used = {results.baseline, fit[0], small}
    cost = base.measured(draft, verify, decode)
    rows = []
    for name, server in results.servers.items():
        if name in used or not server.num_steps or (server.token_map and not server.token_map_size):
            continue
        predicted = cost.speedup(steps[name][1], server.num_steps, server.token_map_size)
        measured = decode / (1000 * steps[name][0] / steps[name][1])
        rows.append({"server": name, "K": server.num_steps, "ids": server.token_map_size, "tau": steps[name][1],
                     "predicted": predicted, "measured": measured})  # fmt: skip
    return {"decode_ms": decode, "verify_ms": verify, "draft_ms": draft, "fitted_on": sorted(used), "servers": rows}


def seconds_per_step(results, name):
    """(seconds of one step, tokens of one step), over all tasks, by the speed of decoding."""
    runs = [r for r in results.runs if r.server == name]
    tau = [r.tau_micro or 1.0 for r in runs]
    seconds = [t / r.tokens_per_second_per_request for t, r in zip(tau, runs, strict=True)]
    return sum(seconds) / len(seconds), sum(tau) / len(tau)


def table(record):
    lines = [
        "# Predicted and measured speedup",
        "",
        "From three measured times, each other server's speedup by its τ, K and map size (`fastmtp simulate --draft_ms "
        "--verify_ms --decode_ms`). The tiny model on a CPU, one request at a time. Made by "
        "`benchmarks/serving/predicted_speedup.py`.",
    ]
    for section in record["sections"]:
        errors = [abs(r["predicted"] / r["measured"] - 1) for r in section["servers"]]
        lines += [
            "",
            f"Decoding step {section['decode_ms']:.1f} ms, verification {section['verify_ms']:.1f} ms, draft step "
            f"{section['draft_ms']:.1f} ms, from {', '.join(section['fitted_on'])}. Error of the others: mean "
            f"{100 * sum(errors) / len(errors):.1f} %, largest {100 * max(errors):.1f} %.",
            "",
            "| server | K | ids in the map | τ | predicted | measured | error |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for r in section["servers"]:
            ids = f"{r['ids']:,}" if r["ids"] else "all"
            error = 100 * (r["predicted"] / r["measured"] - 1)
            numbers = f"{r['tau']:.2f} | {r['predicted']:.2f}× | {r['measured']:.2f}× | {error:+.1f}%"
            lines.append(f"| {r['server']} | {r['K']} | {ids} | {numbers} |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
