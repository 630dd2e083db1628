"""The attention kernels of this device against float64: output, log-sum-exp and gradients.

    python benchmarks/gpu/attention.py [--device cuda]

On a GPU that is PyTorch's flash kernel, called by its private name, with one document per row, with several, with
grouped heads and with MLA's width; on a CPU its counterpart. The reference is the same algorithm in plain PyTorch and
float64. Writes one JSON file: the largest difference of each, and milliseconds of forward and backward. Exits with 1
where a difference is larger than the dtype explains.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.method.flash import Documents, _blocked, _blocked_backward, flash, flash_backward

# (batch, heads, key heads, width, lengths of the documents in a row)
SHAPES = [
    (2, 4, 4, 64, [96]),
    (2, 8, 2, 128, [96]),
    (2, 8, 2, 128, [40, 17, 39]),
    (1, 4, 4, 192, [33, 95]),
    (1, 32, 8, 128, [2048]),
]
TOLERANCE = {"bfloat16": 0.03, "float16": 0.004, "float32": 1e-4}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--output", default="output/gpu/attention.json")
    args = parser.parse_args()
    record = {"provenance": provenance(), "device": args.device, "cases": []}
    failed = False
    for dtype in ("bfloat16", "float16") if args.device == "cuda" else ("float32",):
        for shape in SHAPES if args.device == "cuda" else SHAPES[:-1]:
            case = compare(shape, getattr(torch, dtype), args.device)
            case |= {"shape": shape, "dtype": dtype, "sound": max(case["differences"].values()) < TOLERANCE[dtype]}
            failed |= not case["sound"]
            record["cases"].append(case)
            print(json.dumps(case), flush=True)
    output = Path(args.output)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(record, indent=2))
    sys.exit(int(failed))


def compare(shape, dtype, device):
    """Largest differences to float64, as a share of the largest value, and milliseconds."""
    batch, heads, kv_heads, width, lengths = shape
    T = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    sizes = [
        (batch, heads, T, width),
        (batch, kv_heads, T, width),
        (batch, kv_heads, T, width),
        (batch, heads, T, width),
    ]
    q, k, v, grad = (torch.randn(size, generator=generator).to(device, dtype) for size in sizes)
    segments = torch.cat([torch.full((n,), number) for number, n in enumerate(lengths)]).expand(batch, -1)
    documents, scale = Documents(segments.to(device)), width**-0.5

    out, lse = flash(q, k, v, documents, scale)
    grads = flash_backward(grad, q, k, v, out, lse, documents, scale)
    same = segments[:, :, None] == segments[:, None, :]
    visible = (same & torch.ones(T, T, dtype=torch.bool).tril()).to(device)
    wide = [x.double() for x in (q, k, v)]
    want, want_lse = _blocked(*wide, scale, visible)
    want_grads = _blocked_backward(grad.double(), *wide, want, want_lse, scale, visible)
    pairs = {"output": (out, want), "log-sum-exp": (lse, want_lse)}
    pairs |= {f"d_{name}": pair for name, pair in zip("qkv", zip(grads, want_grads, strict=True), strict=True)}
    differences = {name: float((a.double() - b).abs().max() / b.abs().max()) for name, (a, b) in pairs.items()}

    def step():
        out, lse = flash(q, k, v, documents, scale)
        flash_backward(grad, q, k, v, out, lse, documents, scale)

    return {"differences": differences, "milliseconds": milliseconds(step, device)}


def milliseconds(step, device, repeats=10):
    """Of one call, the best of ten."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return min(times)


if __name__ == "__main__":
    main()
