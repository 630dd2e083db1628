"""Memory of loading a model for training and of one step: whole, with layers on disk, and under ZeRO-3.

    python benchmarks/training/loading.py      # writes docs/results/loading_memory.{json,md}; needs 6 GB of memory

The checkpoint is the hollow one of benchmarks/export/huge.py in bf16, loaded as float32, so that every weight that is
in memory is a copy there and no page of a file. Each way is a process of its own (ZeRO-3: two), which samples its
anonymous memory (`RssAnon`) every 5 ms.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "export"))
import huge

from swift_fastmtp.bench.servers import free_port
from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.staging import write_json

SIZE = {
    "num_hidden_layers": 16,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "vocab_size": 32768,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
SHARD_BYTES = 10**9
WAYS = {"whole": 1, "layers on disk": 1, "ZeRO-3": 2}
_CHILD = """
import json, os, sys, threading, time
import torch
from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.model import placement
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.model.loading import model_class
way, folder = sys.argv[1:]
if way == "ZeRO-3":
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed
    deepspeed.init_distributed("gloo")
    from transformers.integrations import HfDeepSpeedConfig
    keep = HfDeepSpeedConfig({"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}})
def anonymous():
    line = next(l for l in open("/proc/self/status") if l.startswith("RssAnon"))
    return int(line.split()[1]) * 1024
peak = [0]
def sample():
    while True:
        peak[0] = max(peak[0], anonymous())
        time.sleep(0.005)
cls = model_class(Checkpoint(folder))
config = cls.config_class.from_pretrained(folder)
start = [anonymous(), time.perf_counter()]
threading.Thread(target=sample, daemon=True).start()
options = {}
if way == "layers on disk":
    with torch.device("meta"):
        model = cls(config)
    pieces = placement.pieces(model, set(model._no_split_modules))
    options["device_map"] = {name: "disk" if moves else "cpu" for name, _, moves in pieces}
model = cls.from_pretrained(folder, dtype=torch.float32, **options)
loaded, seconds = peak[0], time.perf_counter() - start[1]
found = {"load_seconds": seconds, "load_peak_bytes": loaded - start[0], "kept_bytes": anonymous() - start[0]}
if way != "ZeRO-3":
    model.fastmtp = FastMTPConfig()
    model.freeze_backbone()
    model.train()
    ids = torch.arange(64)[None]
    begin = time.perf_counter()
    model(input_ids=ids, labels=ids).loss.backward()
    found |= {"step_seconds": time.perf_counter() - begin, "step_peak_bytes": peak[0] - start[0]}
print(json.dumps({k: round(v, 2) for k, v in found.items()}), flush=True)
if way == "ZeRO-3":
    os._exit(0)  # gloo may abort at the interpreter's end; the others have a temporary folder to remove
"""


def make(folder, size, shard_bytes):
    """The checkpoint. Returns its facts; bytes as float32."""
    from transformers import AutoConfig

    family = huge.FAMILIES[0]
    config = {**json.loads((huge.TINY / "config.json").read_text()), **size}
    (folder / "config").mkdir(parents=True)
    write_json({k: v for k, v in config.items() if k != "auto_map"}, folder / "config" / "config.json")
    rest = huge.backbone_shapes(AutoConfig.from_pretrained(folder / "config"), family)
    head = huge.head_shapes(huge.Checkpoint(folder / "config"))
    huge.hollow_checkpoint(folder / "base", {**rest, **head}, config, shard_bytes)
    numbers = {n: torch.Size(s).numel() * 4 for n, s in {**rest, **head}.items()}
    layer = sum(size for n, size in numbers.items() if n.startswith("model.layers.0."))
    layers = layer * size["num_hidden_layers"]
    facts = {"model_bytes": sum(numbers.values()), "layer_bytes": layer, "rest_bytes": sum(numbers.values()) - layers}
    return {**facts, "head_bytes": sum(numbers[n] for n in head), "largest_tensor_bytes": max(numbers.values())}


def measure(way, folder):
    """Peak and time of one way; of ZeRO-3 those of the rank that takes most."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", _CHILD, way, str(folder / "base")],
            env={**env, "RANK": str(i), "LOCAL_RANK": str(i), "WORLD_SIZE": str(WAYS[way])},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(WAYS[way])
    ]
    found = []
    for rank in ranks:
        out, err = rank.communicate()
        if rank.returncode:
            raise RuntimeError(f"{way}\n{err[-2000:]}")
        found.append(json.loads(out.splitlines()[-1]))
    return {key: max(f[key] for f in found) for key in found[0]}


def page(results):
    """The Markdown page."""
    facts, gb = results["checkpoint"], huge.gigabytes
    lines = [
        "# Memory of loading for training",
        "",
        f"A synthetic MiMo of {gb(facts['model_bytes'])} GB in float32: {SIZE['num_hidden_layers']} decoder layers of "
        f"{gb(facts['layer_bytes'])} GB, and {gb(facts['rest_bytes'])} GB of embedding, output matrix and head (head "
        f"{gb(facts['head_bytes'])} GB); the largest tensor is {gb(facts['largest_tensor_bytes'])} GB. "
        "Stored as bf16, loaded as float32. Anonymous memory above what Python, torch and transformers take; pages of "
        "the checkpoint's files, which the kernel drops when it needs the memory, are left out. One thread of a "
        "machine with other work, so the seconds are upper bounds; a step is one forward and backward of 64 tokens, "
        "before the optimizer.",
        "",
        "| | peak while loading, GB | kept, GB | peak of a step, GB | load, s | step, s |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for way in WAYS:
        row = results["ways"][way]
        step = gb(row["step_peak_bytes"]) if "step_peak_bytes" in row else ""
        seconds = f"{row['step_seconds']:.1f}" if "step_seconds" in row else ""
        name = f"{way}, a rank of {WAYS[way]}" if WAYS[way] > 1 else way
        lines.append(
            f"| {name} | {gb(row['load_peak_bytes'])} | {gb(row['kept_bytes'])} | {step} | {row['load_seconds']:.1f} | "
            f"{seconds} |"
        )
    return "\n".join([*lines, "", "    python benchmarks/training/loading.py", ""])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/loading_memory"), help="without suffix")
    parser.add_argument("--work", help="folder for the checkpoint; default: the system's for temporary files")
    args = parser.parse_args()
    started = time.time()
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        results = {"checkpoint": make(Path(work) / "model", SIZE, SHARD_BYTES), "ways": {}}
        for way in WAYS:
            results["ways"][way] = measure(way, Path(work) / "model")
            print(way, json.dumps(results["ways"][way]))
    results["provenance"] = {
        **provenance(),
        "seconds": round(time.time() - started, 1),
        "command": ["benchmarks/training/loading.py"],
    }
    write_json(results, args.output.with_suffix(".json"))
    args.output.with_suffix(".md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
