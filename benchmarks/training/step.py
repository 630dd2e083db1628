"""Time and memory of one training step: ours, the reference's, and the arithmetic floor, side by side in one run.

    python benchmarks/training/step.py                    # CPU, about ten minutes; writes docs/results/training_step.*
    python benchmarks/training/step.py --device cuda --shape mimo-7b --dtype bfloat16

A random model at MiMo's proportions (36 layers, an output matrix worth 3.5 of them), one sequence, three quarters of
its rows supervised. Variants take turns, and a figure is the median over the turns, as a ratio to the reference's
median. Memory is the peak of the process above what it held with the model loaded, each variant in its own process.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from reference_step import prepare, reference_loss

from swift_fastmtp.families.mimo import MiMoConfig
from swift_fastmtp.families.table import FAMILIES
from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.method.config import FastMTPConfig
from swift_fastmtp.method.rollout import segment_ids
from swift_fastmtp.model.hidden_cache import HiddenCache
from swift_fastmtp.model.modeling import build_class

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import write_result

SHAPES = {
    "small": {"hidden_size": 512, "intermediate_size": 1376, "num_attention_heads": 4, "num_key_value_heads": 1},
    "mimo-7b": {"hidden_size": 4096, "intermediate_size": 11008, "num_attention_heads": 32, "num_key_value_heads": 8},
}
VOCAB = {"small": 19_200, "mimo-7b": 151_680}
MAP = {"small": 4_096, "mimo-7b": 32_768}
SUPERVISED = 0.75
OURS = {
    "exact, ce": {"loss": "ce"},
    "paper, ce": {"loss": "ce", "rollout": "paper"},
    "exact, kl": {"loss": "kl"},
    "exact, lk": {"loss": "lk"},
    "exact, ce, in the map": {"loss": "ce", "token_map": True},
    "exact, kl, in the map": {"loss": "kl", "token_map": True},
}


def build(shape, vocab, layers, device, dtype):
    torch.manual_seed(0)
    config = MiMoConfig(
        vocab_size=vocab,
        num_hidden_layers=layers,
        head_dim=128,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 640000.0},
        architectures=["MiMoForCausalLM"],
        max_position_embeddings=32768,
        **SHAPES[shape],
    )
    with torch.device(device):
        model = build_class(FAMILIES[0])._from_config(config, dtype=dtype)
    model.freeze_backbone()
    return model.train()


def batch(model, length):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, model.config.vocab_size, (1, length), generator=generator).to(model.device)
    return ids, ids.masked_fill(torch.arange(length, device=ids.device) < (1 - SUPERVISED) * length, -100)


def ours(model, settings, map_file):
    settings = {**settings, "token_map": str(map_file)} if settings.get("token_map") else settings
    model.fastmtp, model._mapped = FastMTPConfig(**settings), None
    _ = model.draft_vocabulary  # the map's rows are copied once per run, not per step
    return lambda ids, labels: model(input_ids=ids, labels=labels).loss.backward()


def reference(model):
    model.fastmtp = FastMTPConfig()
    prepare(model)
    return lambda ids, labels: reference_loss(model, ids, labels).backward()


def floor(model, ids, labels, steps=3, rows_of_map=None):
    """The backbone's forward and the matrix products that the head cannot do without, and nothing else."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    model.backbone_states(ids, None, positions, segment_ids(positions))
    T, N = ids.shape[1], int((labels != -100).sum())
    weights = {n: p.detach() for n, p in model.head.named_parameters() if p.ndim == 2}
    for k in range(steps):
        for name, weight in weights.items():
            rows = N if k or "mlp" in name else T
            x, g = (torch.empty(rows, n, dtype=weight.dtype, device=weight.device) for n in weight.shape[::-1])
            x @ weight.T
            g.T @ x
            if k or "input_proj" not in name:
                g @ weight
        head = model.lm_head.weight.detach()[:rows_of_map]
        x, z = (torch.empty(N, n, dtype=head.dtype, device=head.device) for n in head.shape[::-1])
        torch.mm(x, head.T, out=z)
        z @ head


def turns(functions, repeats, device):
    """Median seconds of each function, called in turns."""
    found = {name: [] for name in functions}
    for turn in range(repeats + 1):
        for name, function in functions.items():
            function.prepare()
            sync(device)
            started = time.perf_counter()
            function.call()
            sync(device)
            if turn:  # the first turn warms up
                found[name].append(time.perf_counter() - started)
    return {name: statistics.median(times) for name, times in found.items()}


def sync(device):
    if device == "cuda":
        torch.cuda.synchronize()


class Step:
    """One variant on one model: settings are restored before every call, gradients dropped."""

    def __init__(self, model, make, data):
        self.model, self.make, self.data = model, make, data

    def prepare(self):
        self.model.zero_grad()
        self.model.train()
        self.model.model.gradient_checkpointing_disable()
        self.step = self.make()

    def call(self):
        self.step(*self.data)


def compare(args, map_file):
    """Seconds of every variant, and of three epochs with and without the hidden-state cache."""
    model = build(args.shape, VOCAB[args.shape], args.layers, args.device, getattr(torch, args.dtype))
    data = batch(model, args.length)
    functions = {"reference": Step(model, lambda: reference(model), data)}
    for name, settings in OURS.items():
        functions[name] = Step(model, lambda s=settings: ours(model, s, map_file), data)
    functions["floor"] = Step(model, lambda: lambda i, y: floor(model, i, y), data)
    functions["floor, in the map"] = Step(model, lambda: lambda i, y: floor(model, i, y, 3, MAP[args.shape]), data)
    seconds = turns(functions, args.repeats, args.device)
    for name in ("exact, ce", "exact, ce, in the map"):
        seconds[f"three epochs, {name}, hidden-state cache"] = epochs(model, ours(model, OURS[name], map_file), data)
    return seconds


def epochs(model, step, data, sequences=4, count=3):
    """Seconds per sequence of `count` epochs over `sequences` sequences, the first of which writes the cache."""
    with tempfile.TemporaryDirectory() as folder:
        model.train()
        width, dtype = model.config.hidden_size, model.dtype
        model.hidden_cache = HiddenCache(folder, {"backbone": "random"}, width, dtype, 2**34)
        started = time.perf_counter()
        for _ in range(count):
            for i in range(sequences):
                step(data[0].roll(i, 1), data[1])
                model.zero_grad()
        sync(model.device.type)
        model.hidden_cache = None
        return (time.perf_counter() - started) / sequences


def peak(args, variant, vocab, length, layers, steps, map_file):
    """Peak memory in bytes of one step above what the process holds with the model, in a process of its own."""
    command = [sys.executable, __file__, "--one", variant, "--map", str(map_file), "--shape", args.shape]
    sizes = {"vocab": vocab, "length": length, "layers": layers, "steps": steps}
    command += [x for k, v in sizes.items() for x in (f"--{k}", str(v))]
    command += ["--device", args.device, "--dtype", args.dtype]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])


def extra_memory(args, map_file):
    """Peak bytes of the variants at two vocabularies, 4 layers."""
    found = {}
    for vocab in (VOCAB[args.shape], 151_680):
        for variant in ("reference", "exact, ce", "exact, lk", "exact, ce, in the map"):
            found[f"{vocab} {variant}"] = peak(args, variant, vocab, args.length, 4, 3, map_file)["bytes"]
    return found


def sweep(args, map_file):
    """Seconds and peak bytes against T, K and V, one at a time."""
    found = {}
    default = {"vocab": VOCAB[args.shape], "length": args.length, "layers": 4, "steps": 3}
    sweeps = {"length": (512, 1024, 2048, 4096), "steps": (1, 2, 3, 5), "vocab": (19_200, 76_800, 151_680)}
    for key, values in sweeps.items():
        for value in values:
            for variant in ("reference", "exact, ce"):
                sizes = {**default, key: value}
                found[f"{key} {value} {variant}"] = peak(args, variant, map_file=map_file, **sizes)
    return found


def one(args):
    """Print {"bytes", "seconds"} of one step of `args.one`."""
    model = build(args.shape, args.vocab, args.layers, args.device, getattr(torch, args.dtype))
    data = batch(model, args.length)
    if args.one == "reference":
        step = reference(model)
    else:
        step = ours(model, {**OURS[args.one], "num_speculative_steps": args.steps}, args.map)
    model.fastmtp = FastMTPConfig(**{**model.fastmtp.to_dict(), "num_speculative_steps": args.steps})
    for parameter in model.head_parameters().values():
        parameter.grad = torch.zeros_like(parameter)  # gradients are the same in every variant
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    else:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak that VmHWM reports
        before = status("VmRSS")
    started = time.perf_counter()
    step(*data)
    sync(args.device)
    seconds = time.perf_counter() - started
    after = torch.cuda.max_memory_allocated() if args.device == "cuda" else status("VmHWM")
    print(json.dumps({"bytes": after - before, "seconds": seconds}))


def status(key):
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(key))
    return int(line.split()[1]) * 1024


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="small")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--layers", type=int, default=36)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--no_memory", action="store_true", help="times only, without memory and growth")
    parser.add_argument("--output", default="docs/results/training_step")
    for hidden in ("--one", "--map"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    for hidden in ("--vocab", "--steps"):
        parser.add_argument(hidden, type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        one(args)
        return
    started = time.time()
    with tempfile.TemporaryDirectory() as folder:
        map_file = Path(folder) / "map.pt"
        torch.save(list(range(MAP[args.shape])), map_file)
        seconds = compare(args, map_file)
        memory, growth = ({}, {}) if args.no_memory else (extra_memory(args, map_file), sweep(args, map_file))
    record = {
        "schema": "swift_fastmtp.training_step/1",
        "provenance": {**provenance(), "seconds": round(time.time() - started, 1)},
        "shape": {**SHAPES[args.shape], "layers": args.layers, "vocab": VOCAB[args.shape], "map": MAP[args.shape]},
        "length": args.length,
        "supervised": SUPERVISED,
        "dtype": args.dtype,
        "seconds": seconds,
        "extra_bytes_4_layers": memory,
        "growth_4_layers": growth,
    }
    text = table(record)
    print(text)
    write_result(record, text, args.output)


def table(record):
    """The result page."""
    seconds, reference_time = record["seconds"], record["seconds"]["reference"]
    shape, vocab = record["shape"], record["shape"]["vocab"]
    lines = [
        "# One training step",
        "",
        f"Random model: {shape['layers']} layers, hidden {shape['hidden_size']}, vocabulary {vocab}, map "
        f"{shape['map']} ids; {record['length']} tokens, {record['supervised']:.0%} supervised, {record['dtype']}, "
        f"{record['provenance']['num_threads']} threads. Made by `benchmarks/training/step.py`; definitions there. "
        "Ratios of two runs on one machine may differ by a tenth.",
        "",
        "| step | seconds | reference / this | this / floor |",
        "|---|---:|---:|---:|",
    ]
    for name, value in seconds.items():
        epochs = 3 if name.startswith("three") else 1
        least = seconds["floor, in the map" if "map" in name else "floor"]
        share = f"{value / least:.2f}" if epochs == 1 and name != "reference" else ""
        lines.append(f"| {name} | {value:.3f} | {epochs * reference_time / value:.2f}× | {share} |")
    lines += ["", "Peak memory above the model (4 layers; the head's gradients exist before and are not counted):", ""]
    lines += ["| vocabulary | step | MB | reference / this |", "|---:|---|---:|---:|"]
    memory = record["extra_bytes_4_layers"]
    for name, value in memory.items():
        size, variant = name.split(" ", 1)
        lines.append(f"| {size} | {variant} | {value / 1e6:.0f} | {memory[f'{size} reference'] / value:.1f}× |")
    lines += ["", "Growth, 4 layers, one cold step each:", ""]
    lines += ["| | reference s | ours s | reference MB | ours MB |", "|---|---:|---:|---:|---:|"]
    growth = record["growth_4_layers"]
    for name in growth:
        if name.endswith(" reference"):
            label = name.removesuffix(" reference")
            a, b = growth[name], growth[f"{label} exact, ce"]
            lines.append(
                f"| {label.replace('steps', 'K =').replace('length', 'T =').replace('vocab', 'V =')} "
                f"| {a['seconds']:.2f} | {b['seconds']:.2f} | {a['bytes'] / 1e6:.0f} | {b['bytes'] / 1e6:.0f} |"
            )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
