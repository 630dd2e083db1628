"""Is it faster by the clock? Plain against drafting, behind a real SGLang or vLLM on this machine's CPU, in turns.

    python benchmarks/smollm2/clock.py --work output/smollm2 --questions questions.jsonl --heads vanilla head --map 8192
    python benchmarks/smollm2/clock.py --work output/smollm2 --questions questions.jsonl --heads head --engine vllm

`--work` is the folder of `study.py`, whose heads are served. A plan for `fastmtp bench` is written there: the model
without drafts as baseline, and each head with every `--num_steps`, with and without a map of the study.
All servers are up at once, about 1.5 GB each (vLLM's 2.5 GB), and take turns, so the machine's moods hit all of them;
with `--one_at_a_time` they are started one after another. Answers are greedy and compared with the baseline's, token by
token. In float32 they must be the same; in bfloat16 near-ties fall differently for one row and for several.

vLLM gives MiMo's layer the state before the backbone's final norm, for which the study's heads were not trained. So a
head is served beside the plain model, a Llama, where vLLM gives it the state after the norm, as SGLang does, and, with
`--both_graphs`, in the checkpoint of MiMo's layout too. Stock vLLM has no token map.
"""

import argparse
import os
import sys
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.engine import VLLM_ENVIRONMENT, engine_folder, engine_python  # noqa: E402

from swift_fastmtp.bench.bench import bench  # noqa: E402
from swift_fastmtp.export.folders import export_full  # noqa: E402
from swift_fastmtp.export.graft import graft  # noqa: E402

CPU = ROOT / "tests" / "serving" / "cpu_plan.yaml"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True)
    parser.add_argument("--questions", required=True, help="JSONL with messages")
    parser.add_argument("--heads", nargs="+", required=True, help="names of the study's")
    parser.add_argument("--map", type=int, default=8192, help="one of the study's; 0: none")
    parser.add_argument("--engine", default="sglang", choices=("sglang", "vllm"))
    parser.add_argument("--model", help="the plain model that vLLM drafts for, instead of the study's")
    parser.add_argument("--both_graphs", action="store_true", help="vLLM: the checkpoint that is served as MiMo too")
    parser.add_argument("--num_steps", type=int, nargs="+", default=[2, 3])
    parser.add_argument("--num_questions", type=int, default=24)
    parser.add_argument("--max_new_tokens", type=int, default=192)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one_at_a_time", action="store_true", help="where memory is short")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--threads", type=int, default=1, help="of each server; only one of them works at a time")
    args = parser.parse_args()
    os.chdir(ROOT)  # the plan's paths
    work = Path(args.work)
    plan = {
        "tasks": [f"questions={args.questions}"],
        "num_questions": args.num_questions,
        "max_new_tokens": args.max_new_tokens,
        "num_steps": args.num_steps,
        "rounds": args.rounds,
        "together": not args.one_at_a_time,
        **(sglang if args.engine == "sglang" else vllm)(args, work),
    }
    folder = work / (f"clock-{args.dtype}" if args.engine == "sglang" else f"clock-vllm-{args.dtype}")
    folder.mkdir(exist_ok=True)
    file = folder / "plan.yaml"
    file.write_text(yaml.safe_dump(plan))
    bench(str(folder / "bench"), plan=[*([str(CPU)] if args.engine == "sglang" else []), str(file)])


def sglang(args, work):
    """What a plan says of SGLang: the heads with every map, in checkpoints of their own."""
    maps = ["none", *([str(work / "maps" / f"mixed-{args.map}.pt")] if args.map else [])]
    servers = {"plain": {"method": "baseline"}}
    for head in args.heads:
        servers[head] = {"folder": str(served(work, head)), "token_map": maps, "method": method(head)}
    return {
        "model": str(work / "fitted"),
        "python": engine_python(),
        "environment": {"OMP_NUM_THREADS": str(args.threads)},
        "flags": ["--dtype", args.dtype, "--mem-fraction-static", "0.2", "--max-total-tokens", "4096"],
        "servers": servers,
    }


def vllm(args, work):
    """What a plan says of vLLM: the layers beside the plain model and, if asked for, in checkpoints of their own."""
    model = Path(args.model) if args.model else work / "model"
    drafts = {head: draft(work, head, model) for head in args.heads}
    servers = {"plain": {"method": "baseline", "folder": str(drafts[args.heads[0]])}}
    for head, folder in drafts.items():
        servers[head] = {"folder": str(folder), "token_map": "none", "method": method(head)}
        if args.both_graphs:
            servers[f"{head}-as-mimo"] = {**servers[head], "folder": str(served(work, head))}
    programs = f"{engine_folder('setup_vllm.sh')}/bin"
    flags = ["--dtype", args.dtype, "--enforce-eager", "--max-model-len", "2048", "--max-num-seqs", "8"]
    return {
        "model": str(model),
        "engine": "vllm",
        "environment": {
            **VLLM_ENVIRONMENT,
            "OMP_NUM_THREADS": str(args.threads),
            "PATH": os.pathsep.join([programs, os.environ["PATH"]]),
        },
        "flags": [*flags, "--kv-cache-memory-bytes", str(2**28)],
        "servers": servers,
    }


def method(head):
    return "vanilla" if head == "vanilla" else "tuned"


def served(work, head):
    """A checkpoint with the head in it."""
    folder = work / "served" / head
    if not folder.exists():
        export_full(work / "heads" / head, folder)
    return folder


def draft(work, head, model):
    """The layer alone, for the plain model."""
    folder = work / "drafts" / head
    if not folder.exists():
        graft(model, folder, donor=work / "heads" / head, draft_only=True)
    return folder


if __name__ == "__main__":
    main()
