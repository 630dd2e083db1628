"""Time of the draft's output matrix, full, with a copied token map, and routed: median microseconds on this GPU.

    python benchmarks/serving/routed_head.py            # about a minute; writes docs/results/routed_head.*

MiMo's matrix in bfloat16, random; maps are random ids, which scatters their rows more than a real map does. Every form
runs from a captured CUDA graph, as in the server, and its logits are compared with the full head's first. A form's
share of bandwidth is the bytes of the weight rows that it has to read, over its time, over that of a large copy.
"""

import argparse
import statistics
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch

from swift_fastmtp.files.provenance import provenance
from swift_fastmtp.serving.routed_head import RoutedHead, fill_value

sys.path.insert(0, str(Path(__file__).parents[1]))
from common import write_result

V, D, M = 151_680, 4096, 32_768
ROWS = (1, 2, 4, 8, 16, 32, 64)
DTYPE = torch.bfloat16
FULL, STATIC, ROUTED, MIXED = "full head", "static map, rows copied", "routed, one language", "routed, two languages"
WEIGHT_ROWS = {FULL: V, STATIC: M, ROUTED: M, MIXED: 2 * M}


def captured(function, calls):
    """A CUDA graph of `calls` calls, so that starting it weighs nothing."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles, and lets cuBLAS allocate
            function()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            function()
    return graph


def microseconds(function, calls=10, repeats=30):
    """Median over `repeats` graphs of the time of one call; the first three warm up."""
    graph, times = captured(function, calls), []
    for _ in range(repeats + 3):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / calls)
    return statistics.median(times[3:])


def copy_bandwidth():
    """Bytes per second, read and written, of a copy of 2 GiB."""
    source = torch.empty(2**31, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / microseconds(lambda: target.copy_(source), calls=2) * 1e6


def measure():
    """{form: {rows: microseconds}} of every form and number of rows; the matrix is read from memory every time."""
    torch.manual_seed(0)
    weight = torch.randn(V, D, dtype=DTYPE, device="cuda") / D**0.5
    maps = {name: torch.randperm(V)[:M] for name in ("first", "second")}
    head = RoutedHead(maps, V, device="cuda")
    copied = weight[maps["first"].sort().values.cuda()]
    found = {form: {} for form in WEIGHT_ROWS}
    for rows in ROWS:
        hidden = torch.randn(rows, D, dtype=DTYPE, device="cuda")
        full, reduced, out = (torch.empty(rows, n, dtype=DTYPE, device="cuda") for n in (V, M, V))
        one = torch.zeros(rows, dtype=torch.int32, device="cuda")
        two = torch.arange(rows, dtype=torch.int32, device="cuda") % 2
        torch.mm(hidden, weight.T, out=full)
        for language in (one, two, one + head.full):
            compare(head, hidden, weight, language, maps, full)
        found[FULL][rows] = microseconds(lambda h=hidden, o=full: torch.mm(h, weight.T, out=o))
        found[STATIC][rows] = microseconds(lambda h=hidden, o=reduced: torch.mm(h, copied.T, out=o))
        found[ROUTED][rows] = microseconds(lambda h=hidden, n=one, o=out: head(h, weight, n, out=o))
        if rows > 1:
            found[MIXED][rows] = microseconds(lambda h=hidden, n=two, o=out: head(h, weight, n, out=o))
    return found


def compare(head, hidden, weight, language, maps, full):
    """A kernel that gives other logits than the full head has no time worth reporting."""
    allowed = torch.ones(head.full + 1, V, dtype=torch.bool, device="cuda")
    for i, ids in enumerate(maps.values()):
        allowed[i] = False
        allowed[i, ids.cuda()] = True
    want = torch.where(allowed[language.long()], full, fill_value(DTYPE))
    torch.testing.assert_close(head(hidden, weight, language), want, atol=2**-6, rtol=2**-6)


def table(record):
    """The result page."""
    found, bandwidth = record["microseconds"], record["copy_bytes_per_second"]
    shape = record["shape"]
    lines = [
        "# The routed head",
        "",
        f"{record['provenance']['hardware']}, {shape['dtype']}: vocabulary {shape['vocab']}, hidden size "
        f"{shape['hidden']}, maps of {shape['map']} random ids; a copy reaches {bandwidth / 1e9:.0f} GB/s. "
        "Made by `benchmarks/serving/routed_head.py`; definitions there.",
        "",
        "| rows | form | µs | full / this | bandwidth of a copy |",
        "|---:|---|---:|---:|---:|",
    ]
    for rows in found[FULL]:
        for form, times in found.items():
            if rows in times:
                size = record["weight_rows"][form] * shape["hidden"] * shape["bytes"]
                share = size / (times[rows] * 1e-6) / bandwidth
                ratio = found[FULL][rows] / times[rows]
                lines.append(f"| {rows} | {form} | {times[rows]:.1f} | {ratio:.2f}× | {share:.0%} |")
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", default="docs/results/routed_head")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("routed_head.py measures a GPU, and PyTorch finds none here; run it on a machine with one")
    started = time.time()
    bandwidth = copy_bandwidth()
    found = measure()
    record = {
        "schema": "swift_fastmtp.routed_head/1",
        "provenance": {**provenance(), "seconds": round(time.time() - started, 1), "triton": version("triton")},
        "shape": {"vocab": V, "hidden": D, "map": M, "dtype": str(DTYPE).split(".")[1], "bytes": DTYPE.itemsize},
        "copy_bytes_per_second": bandwidth,
        "weight_rows": WEIGHT_ROWS,
        "microseconds": found,
    }
    text = table(record)
    print(text)
    write_result(record, text, args.output)


if __name__ == "__main__":
    main()
