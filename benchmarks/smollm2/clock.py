"""Is it faster by the clock? Plain against drafting, behind a real SGLang on this machine's CPU, in turns.

    python benchmarks/smollm2/clock.py --work output/smollm2 --heads vanilla head --map 8192

`--work` is the folder of `study.py`, whose heads are served. A plan for `fastmtp bench` is written there: the model
without drafts as baseline, and each head with every `--num_steps`, with and without a map of the study.
All servers are up at once, about 1.5 GB each, and take turns, so the machine's moods hit all of them. Answers are
greedy and compared with the baseline's, token by token. In float32 they must be the same; in bfloat16 near-ties fall
differently for one row and for several.
"""

import argparse
import os
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.engine import engine_python  # noqa: E402

from swift_fastmtp.bench.bench import bench  # noqa: E402
from swift_fastmtp.export.folders import export_full  # noqa: E402

CPU = ROOT / "tests" / "serving" / "cpu_plan.yaml"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--questions", required=True, help="JSONL with messages")
    parser.add_argument("--heads", nargs="+", required=True, help="names of the study's")
    parser.add_argument("--map", type=int, default=8192, help="one of the study's; 0: none")
    parser.add_argument("--num_steps", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--num_questions", type=int, default=24)
    parser.add_argument("--max_new_tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1, help="of each server; only one of them works at a time")
    args = parser.parse_args()
    os.chdir(ROOT)  # the plan's paths
    work = Path(args.work)
    maps = ["none", *([str(work / "maps" / f"mixed-{args.map}.pt")] if args.map else [])]
    servers = {"plain": {"method": "baseline"}}
    for head in args.heads:
        method = "vanilla" if head == "vanilla" else "tuned"
        servers[head] = {"folder": str(served(work, head)), "token_map": maps, "method": method}
    plan = {
        "model": str(work / "fitted"),
        "tasks": [f"questions={args.questions}"],
        "num_questions": args.num_questions,
        "max_new_tokens": args.max_new_tokens,
        "num_steps": args.num_steps,
        "rounds": args.rounds,
        "together": True,
        "python": engine_python(),
        "environment": {"OMP_NUM_THREADS": str(args.threads)},
        "flags": ["--dtype", args.dtype, "--mem-fraction-static", "0.2", "--max-total-tokens", "4096"],
        "servers": servers,
    }
    folder = work / f"clock-{args.dtype}"
    folder.mkdir(exist_ok=True)
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(plan))
    bench(str(folder / "bench"), plan=[str(CPU), str(file)])


def served(work, head):
    """A checkpoint with the head in it."""
    folder = work / "served" / head
    if not folder.exists():
        export_full(work / "heads" / head, folder)
    return folder


if __name__ == "__main__":
    main()
