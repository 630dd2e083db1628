"""Hidden states from a real SGLang server on a CPU: how fast, how large, and what a run on them saves.

    pip install --no-deps --target PLUGIN .
    python benchmarks/data/hidden.py --model output/smollm2/study/fitted --dataset rows.jsonl --plugin PLUGIN
    python benchmarks/data/hidden.py --wide 4096 --dataset rows.jsonl --plugin PLUGIN --output docs/results/hidden_wide

A CPU takes so long for a prompt that the wire hardly counts; `--wide` is a random model of one small layer and that
width, whose prompts cost next to nothing, so that the wire of a large model on a GPU shows.

One server answers everything, in turns: prompts alone (one new token, no states), states as lists of numbers (what
SGLang writes without our plugin) and as bytes (with it). Both take the path of `fastmtp hidden`, into a new folder each
time. Then two real `swift sft` on the same rows and steps: the whole model, and the last folder without a backbone.

Other work may run beside it, so CPU seconds count: of the server's processes, and of the one that asks. Ratios are
medians over rounds. Writes docs/results/hidden.{json,md}.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from statistics import median
from unittest import mock

from tabulate import tabulate

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
from common import write_result  # noqa: E402
from helpers.engine import HalfServer, Server  # noqa: E402

from swift_fastmtp.checkpoint.checkpoint import Checkpoint  # noqa: E402
from swift_fastmtp.data import hidden, state_wire  # noqa: E402
from swift_fastmtp.data.client import Sampling, Servers, all_or_first_failure  # noqa: E402
from swift_fastmtp.data.state_sources import SGLANG_FLAGS, SGLangStates  # noqa: E402
from swift_fastmtp.files.provenance import provenance  # noqa: E402
from swift_fastmtp.files.rows import iter_rows  # noqa: E402
from swift_fastmtp.files.staging import write_json  # noqa: E402
from swift_fastmtp.model.config import load_config  # noqa: E402
from swift_fastmtp.model.loading import model_class  # noqa: E402

TICK = os.sysconf("SC_CLK_TCK")
WAYS = ("prompts alone", "lists", "bytes")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder with an MTP layer")
    parser.add_argument("--wide", type=int, help="in its place, a random model of one layer and that width")
    parser.add_argument("--dataset", required=True)
    parser.add_argument("--plugin", required=True, help="folder that the package is installed in")
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--steps", type=int, default=8, help="of each training run; 0: none")
    parser.add_argument("--output", default=str(ROOT / "docs" / "results" / "hidden"))
    args = parser.parse_args()
    record = {"provenance": provenance(), "settings": vars(args) | {"plugin": "..."}}
    with tempfile.TemporaryDirectory() as work:
        if args.wide:
            args.model, args.steps = wide_model(args.wide, Path(work) / "model"), 0
        rows = first_rows(args.dataset, args.rows, Path(work) / "rows.jsonl")
        launch = ["python", "-m", "sglang.launch_server", "--model-path", args.model, "--trust-remote-code"]
        kind = Server if args.dtype == "float32" else HalfServer
        where = {"PYTHONPATH": str(Path(args.plugin).resolve())}
        documents = [*dict.fromkeys(hidden._documents(args.model, [rows], 10**9, args.max_length, "stop"))]
        with kind([*launch, *SGLANG_FLAGS.split()], Path(work) / "log", where) as server:
            record["rounds"] = rounds(server, args, documents, Path(work))
            record["wire_bytes_per_token"] = {way: wire_bytes(server, documents[0], way) for way in WAYS[1:]}
        record["documents"] = {"number": len(documents), "tokens": sum(map(len, documents))}
        cache = Path(work) / "cache"
        record["disk_bytes_per_token"] = cache_bytes(cache) / record["documents"]["tokens"]
        if args.steps:
            record["training"] = training(args, rows, cache, Path(work))
    write_result(record, page(record), args.output)


def wide_model(width, folder):
    """As the tiny model, but for one layer of that width with a narrow MLP."""
    shutil.copytree(ROOT / "examples" / "tiny-mimo", folder)
    (folder / "model.safetensors").unlink()
    # SGLang's class takes the width over the number of heads, whatever head_dim says.
    narrow = {"num_attention_heads": width // 128, "num_key_value_heads": 1, "head_dim": 128, "intermediate_size": 64}
    config = json.loads((folder / "config.json").read_text())
    write_json({**config, **narrow, "hidden_size": width, "num_hidden_layers": 1}, folder / "config.json")
    checkpoint = Checkpoint(folder)
    model_class(checkpoint)._from_config(load_config(checkpoint)).save_pretrained(folder)
    return str(folder)


def first_rows(dataset, number, path):
    with open(path, "w") as file:
        for _, (_, row) in zip(range(number), iter_rows(dataset), strict=False):
            file.write(json.dumps(row) + "\n")
    return str(path)


# Servers


def rounds(server, args, documents, work):
    asyncio.run(prompts_alone(server, documents[:2], 1))  # the first request is slow
    found = []
    for number in range(args.rounds):
        for concurrency in args.concurrency:
            for way in WAYS:
                found.append({"round": number, "concurrency": concurrency, "way": way})
                found[-1] |= measure(server, args.model, documents, way, concurrency, work / "cache")
                print(json.dumps(found[-1]), flush=True)
    return found


def measure(server, model, documents, way, concurrency, folder):
    """Tokens and seconds of one pass over all documents."""
    shutil.rmtree(folder, ignore_errors=True)
    wall, ours, theirs = time.perf_counter(), time.process_time(), cpu_of(server)
    if way == "prompts alone":
        asyncio.run(prompts_alone(server, documents, concurrency))
    else:
        with parameter(way):
            servers, source = client(server, concurrency), SGLangStates(Checkpoint(model).target)
            asyncio.run(hidden._fill(servers, source, None, documents, str(folder), 100.0, concurrency))
    seconds = {
        "seconds": time.perf_counter() - wall,
        "client_cpu_seconds": time.process_time() - ours,
        "server_cpu_seconds": cpu_of(server) - theirs,
    }
    return {"tokens": sum(map(len, documents)), **{name: round(s, 2) for name, s in seconds.items()}}


def parameter(way):
    """A server without the plugin does not know the parameter, as ours does not know this one."""
    return mock.patch.object(state_wire, "PARAMETER", state_wire.PARAMETER if way == "bytes" else "no_such_parameter")


def client(server, concurrency):
    return Servers([f"http://127.0.0.1:{server.port}"], Sampling(max_new_tokens=1), concurrency=concurrency)


async def prompts_alone(server, documents, concurrency, path="/generate", body_of=None):
    """One new token to each; `body_of` token ids is what the engine's `path` is asked."""
    servers = client(server, concurrency)
    stream = iter(documents)

    async def ask(one, _hear, *, ids):
        return await one.post(path, (body_of or generate_body)(ids))

    async def work():
        for ids in stream:
            await servers.ask_any(partial(ask, ids=ids))

    await all_or_first_failure(work() for _ in range(concurrency))
    await servers.close()


def generate_body(ids):
    return {"input_ids": list(ids), "sampling_params": {"max_new_tokens": 1, "temperature": 0}}


def wire_bytes(server, ids, way):
    """Of an answer, for each token of its prompt."""
    body = generate_body(ids) | {"return_hidden_states": True}
    with parameter(way):
        body["sampling_params"]["custom_params"] = {state_wire.PARAMETER: True}
    command = ["curl", "-s", "-d", "@-", "-H", "Content-Type: application/json"]
    command.append(f"http://127.0.0.1:{server.port}/generate")
    done = subprocess.run(command, input=json.dumps(body).encode(), capture_output=True, check=True)
    return round(len(done.stdout) / len(ids), 1)


def cpu_of(server):
    """CPU seconds of the server's processes, which are one group."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # ended meanwhile
            continue
        if int(fields[2]) == server.process.pid:
            ticks += int(fields[11]) + int(fields[12])
    return ticks / TICK


def cache_bytes(folder):
    return sum(path.stat().st_size for path in folder.glob("*.bin"))


# Training


def training(args, rows, cache, work):
    """Peak memory and CPU seconds of a run with and without the backbone, once as long as asked and once of one step,
    so that the cost of a step is their difference."""
    found = {}
    for way in ("whole model", "without backbone"):
        knobs = [] if way == "whole model" else ["--model_kwargs", json.dumps({"fastmtp_hidden_cache": str(cache)})]
        found[way] = {}
        for steps in (1, args.steps + 1):
            out = work / f"{way}-{steps}".replace(" ", "-")
            options = {
                **{"model_type": "fastmtp", "model": args.model, "dataset": rows, "output_dir": out},
                **{"torch_dtype": "float32", "fp16": "false", "max_length": args.max_length, "max_steps": steps},
                **{"save_steps": steps, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 1},
                **{"add_version": "false", "split_dataset_ratio": 0, "dataloader_num_workers": 0},
                **{"check_model": "false", "seed": 0},
            }
            words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
            found[way][f"{steps} steps"] = resources(
                [str(Path(sys.executable).parent / "swift"), "sft", *words, *knobs]
            )
            print(way, steps, found[way], flush=True)
    return found


def resources(command):
    """CPU seconds of a command with everything it starts, and the peak memory of the largest of its processes."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with open(os.devnull, "wb") as nothing:
        process = subprocess.Popen(command, env=environment, stdout=nothing, stderr=nothing, start_new_session=True)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = status
    assert status == 0, command
    return {
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_rss_mb": round(usage.ru_maxrss / 1000),
    }


# The page


def page(record):
    rounds, documents = record["rounds"], record["documents"]
    lines = []
    for concurrency in dict.fromkeys(r["concurrency"] for r in rounds):
        for way in WAYS:
            chosen = [r for r in rounds if r["concurrency"] == concurrency and r["way"] == way]
            alone = [r for r in rounds if r["concurrency"] == concurrency and r["way"] == WAYS[0]]
            lines.append(
                {
                    "way": way,
                    "rows at a time": concurrency,
                    "tokens/s": median(r["tokens"] / r["seconds"] for r in chosen),
                    "tokens per CPU s, server": median(r["tokens"] / r["server_cpu_seconds"] for r in chosen),
                    "tokens per CPU s, client": median(r["tokens"] / r["client_cpu_seconds"] for r in chosen),
                    "server's CPU / prompts alone": median(
                        a["server_cpu_seconds"] / b["server_cpu_seconds"] for a, b in zip(chosen, alone, strict=True)
                    ),
                    "both sides' CPU / prompts alone": median(
                        both(a) / both(b) for a, b in zip(chosen, alone, strict=True)
                    ),
                }
            )
    wire, disk = record["wire_bytes_per_token"], record["disk_bytes_per_token"]
    settings = record["settings"]
    what = f"A random layer of width {settings['wide']}" if settings["wide"] else f"`{settings['model']}`"
    text = [
        "# Hidden states from an engine",
        "",
        f"{what}, {settings['dtype']}, SGLang on a CPU with one thread; {documents['number']} documents, "
        f"{documents['tokens']} tokens; medians of {settings['rounds']} rounds. Made by `benchmarks/data/hidden.py`.",
        "",
        tabulate(lines, headers="keys", tablefmt="pipe", floatfmt=("", "", ".0f", ".0f", ".0f", ".2f", ".2f")),
        "",
        f"Bytes of a token: {wire['lists']:.0f} on the wire as lists, {wire['bytes']:.0f} as bytes, "
        f"{disk:.0f} on disk.",
    ]
    if "training" in record:
        text += ["", "## A run on them", "", training_table(record["training"])]
    return "\n".join(text) + "\n"


def both(one):
    return one["server_cpu_seconds"] + one["client_cpu_seconds"]


def training_table(training):
    lines = []
    for way, runs in training.items():
        (_, one), (name, many) = runs.items()
        steps = int(name.split()[0]) - 1
        lines.append(
            {
                "run": way,
                "peak RSS, MB": many["peak_rss_mb"],
                "CPU s of a step": (many["cpu_seconds"] - one["cpu_seconds"]) / steps,
                f"CPU s of the run, {name}": many["cpu_seconds"],
            }
        )
    return tabulate(lines, headers="keys", tablefmt="pipe", floatfmt=("", ".0f", ".2f", ".1f"))


if __name__ == "__main__":
    main()
