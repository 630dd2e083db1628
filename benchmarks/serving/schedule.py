"""Is the schedule of `fastmtp simulate --costs` the best of those that can be served, at every load?

    python benchmarks/serving/schedule.py

With the real SGLang on the CPU (tests/serving): the costs of steps are measured (`fastmtp bench --costs`), the head's
tau is simulated on half of the example prompts, and the schedule that follows is served. Then all servers, without
drafts, with each K and with the schedule, are up together and take turns at every load, with the other half.

A second schedule is for a server that does not fill the draft's cache where it makes no drafts (`SKIP`).

Writes docs/results/schedule.{md,json}.
"""

import argparse
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
from common import write_result  # noqa: E402
from helpers.engine import engine_python  # noqa: E402

from swift_fastmtp.bench.bench import bench  # noqa: E402
from swift_fastmtp.bench.costs import read_step_times  # noqa: E402
from swift_fastmtp.bench.results import read_results  # noqa: E402
from swift_fastmtp.files.inputs import read_json  # noqa: E402
from swift_fastmtp.files.provenance import provenance  # noqa: E402
from swift_fastmtp.files.staging import write_json  # noqa: E402
from swift_fastmtp.simulate.schedule import depths_by_load, schedule, schedule_table  # noqa: E402
from swift_fastmtp.simulate.simulate import simulate  # noqa: E402

CPU_PLAN = "tests/serving/cpu_plan.yaml"
# Without graphs, of which adaptive SGLang would capture one for each K; it has none on a CPU.
ADAPTIVE = ["--disable-cuda-graph"]
PAUSED = ROOT / "swift_fastmtp/bench/paused.json"
SKIP = {"SGLANG_SPEC_SKIP_ZERO_STEP_DRAFT_EXTEND": "1"}
SCHEDULES = ("scheduled", "skipping")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="examples/tiny-mimo", help="a folder with an MTP layer")
    parser.add_argument("--num_steps", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32])
    parser.add_argument("--questions", type=int, default=32, help="of each run")
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", help="a folder to keep the runs in, and to go on in after a kill")
    parser.add_argument("--output", default=str(ROOT / "docs" / "results" / "schedule"))
    args = parser.parse_args()
    os.chdir(ROOT)
    with tempfile.TemporaryDirectory() as temporary:
        measure(args, Path(args.work or temporary))


def measure(args, work):
    work.mkdir(parents=True, exist_ok=True)
    prompts = (ROOT / "examples/prompts/eval.jsonl").read_text().splitlines(keepends=True)
    for number, half in enumerate(("simulated.jsonl", "asked.jsonl")):
        (work / half).write_text("".join(prompts[number::2]))
    # What steps cost.
    fixed = {"baseline": {}, "fixed": {"folder": args.model}}
    no_drafts = {"folder": args.model, "schedule": str(PAUSED), "environment": SKIP}
    plan = write_plan(work / "costs.yaml", args, {**fixed, "skipping": no_drafts})
    bench(str(work / "costs"), plan=plan, costs=True, rounds=args.rounds, concurrency=args.concurrency)
    times = read_step_times(str(work / "costs/results.json"))
    measured = read_results(str(work / "costs/results.json"))
    paused = {
        name: {run.concurrency: 1000 * run.step.p50 for run in measured.runs if run.server == server}
        for name, server in zip(SCHEDULES, ("fixed-paused", "skipping"), strict=True)
    }
    # What follows from them and from the head's tau.
    if not (work / "simulate").exists():
        simulate(
            args.model,
            [],
            str(work / "simulated.jsonl"),
            output_dir=str(work / "simulate"),
            num_steps=max(args.num_steps),
            max_new_tokens=args.max_new_tokens,
        )
    tau = read_json(work / "simulate/simulate.json")["heads"][0]["tau_micro"]
    predicted = {name: depths_by_load(tau, replace(times, paused=paused[name])) for name in SCHEDULES}
    # All of them, served.
    scheduled = {}
    for name, depths in predicted.items():
        print(schedule_table(depths))
        write_json(schedule(depths), work / f"{name}.json")
        scheduled[name] = {"folder": args.model, "schedule": str(work / f"{name}.json"), "label": "by load"}
    scheduled["skipping"]["environment"] = SKIP
    plan = write_plan(work / "served.yaml", args, {**fixed, **scheduled})
    served = bench(
        str(work / "served"),
        plan=plan,
        tasks=[f"prompts={work / 'asked.jsonl'}"],
        num_questions=args.questions,
        max_new_tokens=args.max_new_tokens,
        rounds=args.rounds,
    )
    by_server = {}
    for run in served.runs:
        by_server.setdefault(run.server, {})[run.concurrency] = run
    record = {
        "provenance": provenance(),
        "settings": {name: value for name, value in vars(args).items() if name not in ("work", "output")},
        "milliseconds": {
            f"K={K}, {size} at once": round(ms, 2) for (K, size), ms in sorted(times.milliseconds.items())
        },
        "paused": paused,
        "predicted": {name: [vars(depth) for depth in depths] for name, depths in predicted.items()},
        "served": served.as_json()["runs"],
    }
    page = table(predicted, by_server)
    write_result(record, page, args.output)
    print(page)


def write_plan(path, args, servers):
    """Servers that are up together and take turns, for a CPU."""
    cpu = yaml.safe_load(Path(CPU_PLAN).read_text())
    flags = [
        *cpu["flags"],
        "--max-running-requests",
        str(max(args.concurrency)),
        "--mem-fraction-static",
        "0.4",
        *ADAPTIVE,
    ]
    plan = {
        "model": args.model,
        "python": engine_python(),
        "flags": flags,
        "environment": {**cpu["environment"], "PYTHONPATH": str(ROOT / "tests/serving/stand_in")},
        "num_steps": args.num_steps,
        "concurrency": args.concurrency,
        "together": True,
        "servers": servers,
    }
    path.write_text(yaml.safe_dump(plan))
    return str(path)


def table(predicted, by_server):
    """Speed over no drafts at each load: predicted, and served with its interval; the schedule's last."""
    names = [name for name in by_server if name != "baseline"]
    lines = ["# The best number of drafts by load", "", __doc__.split("\n\n")[2], ""]
    lines += ["Speed over no drafts: tokens over seconds; predicted, then served with its 95 % interval."]
    lines += [f"`skipping` is the schedule with `{next(iter(SKIP))}=1`.", ""]
    lines.append("| at once | K by schedule | " + " | ".join(names) + " |")
    lines.append("|---:" * (2 + len(names)) + "|")
    for depths in zip(*predicted.values(), strict=True):
        of_schedule = dict(zip(predicted, depths, strict=True))
        size = depths[0].batch_size
        cells = [str(size), ", ".join(str(depth.num_steps) for depth in depths)]
        for name in names:
            ratio = by_server[name][size].speedup
            depth = of_schedule.get(name, depths[0])
            K = depth.num_steps if name in of_schedule else int(name.rpartition("k")[2])
            cells.append(f"{depth.speedups[K]:.2f}, {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    main()
