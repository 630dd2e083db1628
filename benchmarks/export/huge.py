"""Time and memory of inspect, graft and export on a checkpoint of hundreds of gigabytes that takes no disk.

    python benchmarks/export/huge.py      # writes docs/results/huge_checkpoint.{json,md}; needs 10 GB of free disk

The shards have true headers and true lengths, but no data: files with a hole instead of bytes, which read as zeros.
So reading, linking, copying and writing are what they are for a real checkpoint, except that the backbone's pages come
from no disk. Each verb is a process of its own; its peak resident memory is the kernel's (`VmHWM`). The same verbs on a
small checkpoint show what Python, torch and transformers take by themselves.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from swift_fastmtp.checkpoint.checkpoint import Checkpoint
from swift_fastmtp.checkpoint.shards import pack_header
from swift_fastmtp.families.table import FAMILIES
from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.files.staging import write_json
from swift_fastmtp.model.loading import head_shapes

TINY = Path(__file__).parents[2] / "examples" / "tiny-mimo"
SIZES = {
    "small": {"num_hidden_layers": 4, "hidden_size": 192, "intermediate_size": 512, "vocab_size": 6144},
    "huge": {
        "num_hidden_layers": 100,
        "hidden_size": 8192,
        "intermediate_size": 32768,
        "vocab_size": 151680,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
}
SHARD_BYTES = {"small": 2**20, "huge": 4 * 10**9}
VERBS = {
    "inspect": ["inspect", "{base}"],
    "graft": ["graft", "--model", "{tuned}", "--donor", "{base}", "--output_dir", "{out}"],
    "graft, no donor": ["graft", "--model", "{tuned}", "--init_from_last_layer", "--output_dir", "{out}"],
    "export": ["export", "--adapters", "{trained}", "--output_dir", "{out}"],
    "export, draft only": ["export", "--adapters", "{trained}", "--output_dir", "{out}", "--draft_only"],
}
_CHILD = """
import sys, time
start = time.perf_counter()
from swift_fastmtp.cli import main
main(sys.argv[1:])
seconds = time.perf_counter() - start
peak = next(line for line in open("/proc/self/status") if line.startswith("VmHWM"))
print(seconds, int(peak.split()[1]) * 1024)
"""


def backbone_shapes(config, family):
    """Names and shapes of a checkpoint of `family` without its head, on the meta device."""
    from swift_fastmtp.model.modeling import build_class

    with torch.device("meta"):
        model = build_class(family)(config)
    return {n: tuple(p.shape) for n, p in model.named_parameters() if not n.startswith(family.names.prefix)}


def hollow_file(path, shapes, mark=False):
    """A bf16 safetensors file whose data is a hole; with `mark` each tensor's first value is 0.5."""
    header, offset = {}, 0
    for name, shape in shapes.items():
        end = offset + 2 * torch.Size(shape).numel()
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    packed = pack_header(header)
    with open(path, "wb") as file:
        file.write(packed)
        file.truncate(len(packed) + offset)
        for entry in header.values() if mark else ():
            file.seek(len(packed) + entry["data_offsets"][0])
            file.write(b"\x00\x3f")
    return offset


def hollow_checkpoint(folder, shapes, config, shard_bytes):
    """A folder of hollow shards with an index. Returns the bytes of its tensors."""
    folder.mkdir()
    shards, size = [{}], 0
    for name in sorted(shapes):
        length = 2 * torch.Size(shapes[name]).numel()
        if size + length > shard_bytes and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = shapes[name]
        size += length
    weight_map, total = {}, 0
    for i, part in enumerate(shards):
        file = f"model-{i + 1:05}-of-{len(shards):05}.safetensors"
        total += hollow_file(folder / file, part)
        weight_map.update(dict.fromkeys(part, file))
    write_json({"metadata": {"total_size": total}, "weight_map": weight_map}, folder / "model.safetensors.index.json")
    write_json(config, folder / "config.json")
    for name in ("configuration_mimo.py", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copyfile(TINY / name, folder / name)
    return total


def make(folder, sizes, shard_bytes):
    """`base` with a head, `tuned` without one, and `trained`, a head-only checkpoint of base. Returns their facts."""
    from transformers import AutoConfig

    family = FAMILIES[0]
    config = {**json.loads((TINY / "config.json").read_text()), **sizes}
    (folder / "config").mkdir(parents=True)
    write_json({k: v for k, v in config.items() if k != "auto_map"}, folder / "config" / "config.json")
    rest = backbone_shapes(AutoConfig.from_pretrained(folder / "config"), family)
    head = head_shapes(Checkpoint(folder / "config"))
    total = hollow_checkpoint(folder / "base", {**rest, **head}, config, shard_bytes)
    hollow_checkpoint(folder / "tuned", rest, config, shard_bytes)
    (folder / "trained").mkdir()
    hollow_file(folder / "trained" / "model.safetensors", head, mark=True)
    write_json({"base_model": str(folder / "base")}, folder / "trained" / "fastmtp.json")
    numbers = [torch.Size(s).numel() for s in head.values()]
    files = sorted((folder / "base").glob("*.safetensors"))
    return {
        "checkpoint_bytes": total,
        "disk_bytes": sum(512 * p.stat().st_blocks for p in folder.rglob("*") if p.is_file()),
        "tensors": len(rest) + len(head),
        "shards": len(files),
        "head_bytes": 2 * sum(numbers),
        "largest_tensor_bytes": 2 * max(numbers),
    }


def measure(verb, folder):
    """Seconds, peak resident bytes, and what was linked and written, of one verb in a fresh process."""
    places = {name: str(folder / name) for name in ("base", "tuned", "trained", "out")}
    words = [word.format(**places) for word in VERBS[verb]]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", _CHILD, *words], env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{words}\n{done.stderr[-2000:]}")
    seconds, peak = done.stdout.splitlines()[-1].split()
    found = {"seconds": round(float(seconds), 2), "peak_bytes": int(peak)}
    if (folder / "out").exists():
        files = [p.stat() for p in (folder / "out").glob("*.safetensors")]
        found["linked_files"] = sum(f.st_nlink > 1 for f in files)
        found["linked_bytes"] = sum(f.st_size for f in files if f.st_nlink > 1)
        found["written_files"] = sum(f.st_nlink == 1 for f in files)
        found["written_bytes"] = sum(f.st_size for f in files if f.st_nlink == 1)
        shutil.rmtree(folder / "out")
    return found


def gigabytes(number):
    return f"{number / 1e9:.2f}"


def page(results):
    """The Markdown page."""
    huge, small = results["sizes"]["huge"], results["sizes"]["small"]
    lines = [
        "# A checkpoint of hundreds of gigabytes",
        "",
        f"A synthetic MiMo of {gigabytes(huge['checkpoint_bytes'])} GB in {huge['shards']} shards, "
        f"{huge['tensors']} tensors, whose head is {gigabytes(huge['head_bytes'])} GB and whose largest head tensor is "
        f"{gigabytes(huge['largest_tensor_bytes'])} GB. Its shards are files with holes "
        f"({huge['disk_bytes'] / 1e6:.0f} MB of disk), so the seconds leave out a disk's reading of the data; "
        "torch had one thread of a machine with other work, so they are upper bounds. Memory "
        "is a process's peak, and includes Python, torch and transformers, which the small model shows.",
        "",
        "| | seconds | peak memory, GB | small model, GB | shards linked | GB written |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for verb in VERBS:
        row, floor = huge["verbs"][verb], small["verbs"][verb]
        lines.append(
            f"| {verb} | {row['seconds']:.1f} | {gigabytes(row['peak_bytes'])} | {gigabytes(floor['peak_bytes'])} | "
            f"{row.get('linked_files', '')} | {gigabytes(row['written_bytes']) if 'written_bytes' in row else ''} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "`inspect` reads headers only. `graft` and `export` read, cast, check and write one tensor of the head at "
            "a time. Shards without MTP tensors are hard-linked by both; `export` reads the first row of every matrix "
            "besides, to know the backbone by it.",
            "",
            "    python benchmarks/export/huge.py",
            "",
        ]
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("docs/results/huge_checkpoint"), help="without suffix")
    parser.add_argument("--sizes", nargs="+", default=list(SIZES), choices=list(SIZES))
    parser.add_argument("--work", help="folder for the checkpoints; default: the system's for temporary files")
    args = parser.parse_args()
    started, sizes = time.time(), {}
    for name in args.sizes:
        with tempfile.TemporaryDirectory(dir=args.work) as work:
            facts = make(Path(work) / name, SIZES[name], SHARD_BYTES[name])
            facts["verbs"] = {verb: measure(verb, Path(work) / name) for verb in VERBS}
            sizes[name] = facts
            print(name, json.dumps(facts, indent=2))
    results = {"sizes": sizes, "provenance": {**provenance(), "seconds": round(time.time() - started, 1)}}
    results["provenance"]["command"] = ["benchmarks/export/huge.py"]  # --work is a folder of the machine
    write_json(results, args.output.with_suffix(".json"))
    if set(sizes) == set(SIZES):
        args.output.with_suffix(".md").write_text(page(results), encoding="utf-8")


if __name__ == "__main__":
    main()
