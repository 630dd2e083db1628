"""Hidden states from a real vLLM server on a CPU: what they cost it, beside the prompts alone.

    pip install --no-deps --target PLUGIN .
    python benchmarks/data/hidden_vllm.py --wide 4096 --dataset rows.jsonl --plugin PLUGIN

As `hidden.py`, whose model of one small layer and that width it takes; two servers, one after the other, because vLLM
extracts states with all requests or with none. Writes docs/results/hidden_vllm.{json,md}.
"""

import argparse
import asyncio
import json
import shlex
import shutil
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

from tabulate import tabulate

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
from common import write_result  # noqa: E402
from helpers.engine import VLLMServer  # noqa: E402
from hidden import both, cache_bytes, client, cpu_of, first_rows, prompts_alone, wide_model  # noqa: E402

from swift_fastmtp.checkpoint.checkpoint import Checkpoint  # noqa: E402
from swift_fastmtp.data import hidden  # noqa: E402
from swift_fastmtp.data.state_sources import VLLMStates  # noqa: E402
from swift_fastmtp.files.provenance import provenance  # noqa: E402

ALONE, STATES = "prompts alone", "states"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with an MTP layer")
    parser.add_argument("--wide", type=int, help="in its place, a random model of one layer and that width")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--plugin", required=True, help="folder that the package is installed in")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--output", default=str(ROOT / "docs" / "results" / "hidden_vllm"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        if args.wide:
            args.model = wide_model(args.wide, work / "model")
        rows = first_rows(args.dataset, args.rows, work / "rows.jsonl")
        documents = [*dict.fromkeys(hidden._documents(args.model, [rows], 10**9, args.max_length, "stop"))]
        source = VLLMStates(Checkpoint(args.model), str(work / "states"))
        launch = ["vllm", "serve", args.model, "--trust-remote-code", "--no-enable-prefix-caching"]
        where = {"PYTHONPATH": str(Path(args.plugin).resolve())}
        found = []
        for way, more in ((ALONE, []), (STATES, shlex.split(source.start.partition(" with ")[2]))):
            with VLLMServer([*launch, *more], work / "log", where) as server:
                alone(server, args.model, documents[:2], 1)  # the first request is slow
                for number in range(args.rounds):
                    for concurrency in args.concurrency:
                        found.append({"round": number, "concurrency": concurrency, "way": way})
                        found[-1] |= measure(server, source, args.model, documents, way, concurrency, work)
                        print(json.dumps(found[-1]), flush=True)
        tokens = sum(map(len, documents))
        record = {
            "provenance": provenance(),
            "settings": {k: v for k, v in vars(args).items() if k not in ("plugin", "output", "dataset", "model")},
            "rounds": found,
            "documents": {"number": len(documents), "tokens": tokens},
            "disk_bytes_per_token": cache_bytes(work / "cache") / tokens,
        }
    write_result(record, page(record), args.output)


def measure(server, source, model, documents, way, concurrency, work):
    """Tokens and seconds of one pass over all documents."""
    shutil.rmtree(work / "cache", ignore_errors=True)
    wall, ours, theirs = time.perf_counter(), time.process_time(), cpu_of(server)
    if way == ALONE:
        alone(server, model, documents, concurrency)
    else:
        servers, cache = client(server, concurrency), str(work / "cache")
        asyncio.run(hidden._fill(servers, source, None, documents, cache, 100.0, concurrency))
    seconds = {
        "seconds": time.perf_counter() - wall,
        "client_cpu_seconds": time.process_time() - ours,
        "server_cpu_seconds": cpu_of(server) - theirs,
    }
    return {"tokens": sum(map(len, documents)), **{name: round(s, 2) for name, s in seconds.items()}}


def alone(server, model, documents, concurrency):
    """The prompts without states."""

    def body_of(ids):
        return {"model": model, "prompt": list(ids), "max_tokens": 1}

    asyncio.run(prompts_alone(server, documents, concurrency, "/v1/completions", body_of))


def page(record):
    rounds, documents, settings = record["rounds"], record["documents"], record["settings"]
    lines = []
    for concurrency in settings["concurrency"]:
        without = [r for r in rounds if r["concurrency"] == concurrency and r["way"] == ALONE]
        for way in (ALONE, STATES):
            chosen = [r for r in rounds if r["concurrency"] == concurrency and r["way"] == way]
            lines.append(
                {
                    "way": way,
                    "rows at a time": concurrency,
                    "tokens/s": median(r["tokens"] / r["seconds"] for r in chosen),
                    "tokens per CPU s, server": median(r["tokens"] / r["server_cpu_seconds"] for r in chosen),
                    "both sides' CPU / prompts alone": median(map(both, chosen)) / median(map(both, without)),
                }
            )
    what = f"A random layer of width {settings['wide']}" if settings["wide"] else "A model"
    return "\n".join(
        [
            "# Hidden states from vLLM",
            "",
            f"{what}, float32, vLLM on a CPU with one thread, files in a folder; {documents['number']} documents, "
            f"{documents['tokens']} tokens; medians of {settings['rounds']} rounds, one server after the other. "
            "Made by `benchmarks/data/hidden_vllm.py`.",
            "",
            tabulate(lines, headers="keys", tablefmt="pipe", floatfmt=("", "", ".0f", ".0f", ".2f")),
            "",
            f"Bytes of a token: {record['disk_bytes_per_token']:.0f} on disk.",
            "",
        ]
    )


if __name__ == "__main__":
    main()
