"""Does `fastmtp bench` find a server as fast as itself, on a machine that also does other things?

    python benchmarks/serving/same_server.py

The tiny model's baseline is served twice by the real SGLang on the CPU (tests/serving), so the true speedup is 1. It
is measured several times each way: one server after the other in one round, as `fastmtp bench` did at first; one after
the other with the baseline once more at the end; and both up together, in turn. Meanwhile other processes keep the
machine busy for seconds at a time, at random. Writes docs/results/same_server.{md,json}.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.engine import engine_python  # noqa: E402

from swift_fastmtp.bench.bench import bench  # noqa: E402
from swift_fastmtp.bench.results import drift  # noqa: E402
from swift_fastmtp.files.provenance import provenance  # noqa: E402
from swift_fastmtp.files.staging import write_json  # noqa: E402

WAYS = {
    "A B": {"rounds": 1},
    "A B A": {"rounds": 2},
    "A B, B A, A B together": {"rounds": 3, "together": True},
}
# Burns one core in bursts, so that a pass of a server is hit and the next one may not be.
BURSTS = """
import random, time
while True:
    end = time.monotonic() + random.uniform(2, 15)
    while time.monotonic() < end:
        pass
    time.sleep(random.uniform(2, 15))
"""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--questions", type=int, default=8)
    parser.add_argument("--others", type=int, default=1, help="processes that keep a core busy in bursts")
    parser.add_argument("--output", default=str(ROOT / "docs" / "results" / "same_server"))
    args = parser.parse_args()
    os.chdir(ROOT)
    started = time.time()
    record = {"questions": args.questions, "others": args.others, "measured": []}
    output = Path(args.output)
    with tempfile.TemporaryDirectory() as folder, busy(args.others):
        for i, way in enumerate([*WAYS] * args.repeats):
            record["measured"].append(measure(way, args.questions, Path(folder) / str(i)))
            record["provenance"] = {**provenance(), "seconds": round(time.time() - started, 1)}
            write_json(record, output.with_suffix(".json"))
            output.with_suffix(".md").write_text(table(record), encoding="utf-8")
    print(table(record))


@contextlib.contextmanager
def busy(number):
    others = [subprocess.Popen([sys.executable, "-c", BURSTS]) for _ in range(number)]
    try:
        yield
    finally:
        for process in others:
            process.kill()
            process.wait()


def measure(way, questions, folder):
    folder.mkdir()
    plan = {
        "model": "examples/tiny-mimo",
        "tasks": ["smoke"],
        "num_questions": questions,
        "max_new_tokens": 64,
        "python": engine_python(),
        "servers": {"A": {"method": "baseline"}, "B": {"method": "baseline"}},
        **WAYS[way],
    }
    (folder / "plan.yaml").write_text(yaml.safe_dump(plan))
    begin = time.time()
    results = bench(str(folder / "out"), plan=[str(folder / "plan.yaml"), "tests/serving/cpu_plan.yaml"])
    base, again = results.runs
    return {
        "way": way,
        "speedup": vars(again.speedup),
        "cpu_speedup": vars(again.cpu.ratio),
        "round_speeds": {"A": base.round_speeds, "B": again.round_speeds},
        "drifted": drift(results.runs, results.baseline) is not None,
        "seconds": round(time.time() - begin, 1),
    }


def table(record):
    lines = [
        "# The same server twice",
        "",
        f"The tiny model's baseline against itself, real SGLang on a CPU, {record['questions']} questions, one request "
        f"at a time; other work ran on the same two cores, and {record['others']} process that keeps a core busy in "
        "bursts of 2 to 15 seconds. The true ratio is 1. Made by `benchmarks/serving/same_server.py`.",
        "",
        "| order | speedup by the clock | by CPU time | A's token/s in its rounds | drift reported |",
        "|---|---|---|---|---|",
    ]
    for way in WAYS:
        of_way = [one for one in record["measured"] if one["way"] == way]
        for one in of_way:
            speeds = ", ".join(f"{speed:.0f}" for speed in one["round_speeds"]["A"])
            cells = [way, times(one["speedup"]), times(one["cpu_speedup"]), speeds, "yes" if one["drifted"] else "no"]
            lines.append(f"| {' | '.join(cells)} |")
    lines.append("")
    for way in WAYS:
        of_way = [one for one in record["measured"] if one["way"] == way]
        held = [sum(holds(one[which]) for one in of_way) for which in ("speedup", "cpu_speedup")]
        lines.append(
            f"* {way}: the interval holds 1 in {held[0]} of {len(of_way)} by the clock, in {held[1]} by CPU time"
        )
    return "\n".join([*lines, ""])


def times(ratio):
    mark = "" if holds(ratio) else " (not 1)"
    return f"{ratio['value']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]{mark}"


def holds(ratio):
    return ratio["low"] <= 1 <= ratio["high"]


if __name__ == "__main__":
    main()
