"""Is a service what `fastmtp simulate --request_rates` says? Open-loop load on real servers, at two rates.

    python benchmarks/serving/service.py

The real SGLang on a CPU (tests/serving), the tiny model: what steps cost is measured (`fastmtp bench --costs`), tau is
simulated. Then requests are sent at random times that do not wait for answers, to a server without a head and to one
with K drafts, at a light and at a heavy rate, and what users see is put beside what was predicted from their own
arrivals. One server is up at a time.

Writes docs/results/service.{md,json}.
"""

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "benchmarks")]
from common import write_result  # noqa: E402
from helpers.engine import Server, engine_python  # noqa: E402
from helpers.paths import TINY  # noqa: E402

from swift_fastmtp.bench.bench import bench  # noqa: E402
from swift_fastmtp.bench.costs import read_step_times  # noqa: E402
from swift_fastmtp.bench.engines import Engine  # noqa: E402
from swift_fastmtp.data.chat_template import load_tokenizer  # noqa: E402
from swift_fastmtp.data.client import Sampling  # noqa: E402
from swift_fastmtp.files.provenance import provenance  # noqa: E402
from swift_fastmtp.files.table import markdown_table  # noqa: E402
from swift_fastmtp.serving.flags import command  # noqa: E402
from swift_fastmtp.serving.launch import serve_flags  # noqa: E402
from swift_fastmtp.simulate.service import Drafting, Load, Service, capacity, play  # noqa: E402
from swift_fastmtp.simulate.simulate import simulate  # noqa: E402

PROMPTS = ROOT / "examples/prompts/eval.jsonl"
SIZES = [1, 2, 4, 8, 16]
SHARES = (0.3, 0.7)
"""Of what a server without a head can answer at the most."""


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num_steps", type=int, default=2, help="K of the server that drafts")
    parser.add_argument("--requests", type=int, default=150)
    parser.add_argument("--max_new_tokens", type=int, default=48)
    parser.add_argument("--output", default=str(ROOT / "docs/results/service"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        measure(args, Path(work))


def measure(args, work):
    # What is known before anything is served: times of steps, rates of drafts, lengths.
    plan = work / "plan.yaml"
    plan.write_text(yaml.safe_dump(costs_plan(args.num_steps)))
    bench(str(work / "costs"), plan=str(plan), costs=True, rounds=2)
    times = read_step_times(str(work / "costs/results.json"))
    out = work / "simulate"
    (head,) = simulate(
        str(TINY),
        [],
        str(PROMPTS),
        output_dir=str(out),
        num_steps=args.num_steps,
        max_new_tokens=args.max_new_tokens,
        answers=str(work / "answers.jsonl"),
    )
    answers = [json.loads(line) for line in (work / "answers.jsonl").read_text().splitlines()[1:]]
    lengths = [(len(answer["prompt"]), len(answer["answer"])) for answer in answers]
    rates = [tau - before for before, tau in zip([1.0, *head.tau_micro], head.tau_micro, strict=False)]
    ways = {"no head": Drafting({1: 0}, rates), f"K={args.num_steps}": Drafting({1: args.num_steps}, rates)}
    most = capacity(Load(1.0, lengths, SIZES[-1]), ways["no head"], times)
    # What users see.
    cells = []
    for name, drafting in ways.items():
        with serve(name, args.num_steps, work) as server:
            for share in SHARES:
                load = Load(share * most, lengths, SIZES[-1])
                seen = asyncio.run(open_loop(server, load.rate, args))
                predicted = play(load, drafting, times)
                cells.append({"way": name, "rate": load.rate, "seen": asdict(seen), "predicted": asdict(predicted)})
                print(json.dumps(cells[-1]), flush=True)
    milliseconds = {f"K={K}, {size} at once": ms for (K, size), ms in times.milliseconds.items()}
    settings = {name: value for name, value in vars(args).items() if name != "output"}
    record = {"provenance": provenance(), "settings": settings, "milliseconds": milliseconds, "cells": cells}
    write_result(record, page(record), args.output)


def costs_plan(num_steps):
    cpu = yaml.safe_load((ROOT / "tests/serving/cpu_plan.yaml").read_text())
    paths = {"PYTHONPATH": str(ROOT / "tests/serving/stand_in")}
    return {
        "model": str(TINY),
        "python": engine_python(),
        "flags": [*cpu["flags"], "--max-running-requests", str(SIZES[-1]), "--disable-cuda-graph"],
        "environment": {**cpu["environment"], **paths},
        "num_steps": [num_steps],
        "concurrency": SIZES,
        "servers": {"baseline": {}, "fixed": {"folder": str(TINY)}},
    }


def serve(name, num_steps, work):
    flags = command(serve_flags(TINY, num_steps=num_steps))
    if name == "no head":
        flags = [*flags[: flags.index("--speculative-algorithm")]]
    return Server([*flags, "--max-running-requests", str(SIZES[-1])], work / f"{name}.log")


async def open_loop(server, rate, args):
    """Requests at random times; what is seen of all but the first tenth."""
    sampling = Sampling(max_new_tokens=args.max_new_tokens)
    engine = Engine(f"http://127.0.0.1:{server.port}", load_tokenizer(str(TINY)), sampling, concurrency=args.requests)
    await engine.connect()
    rows = [json.loads(line) for line in PROMPTS.read_text().splitlines()]
    generator = random.Random(0)
    try:
        for row in rows[:4]:  # not timed
            await engine.answer(row["messages"], 0.0, 0)
        await engine.flush()
        waiting, next_at = [], time.time()
        for _ in range(args.requests):
            next_at += generator.expovariate(rate)
            await asyncio.sleep(max(0.0, next_at - time.time()))
            waiting.append(asyncio.create_task(engine.answer(generator.choice(rows)["messages"], 0.0, 0)))
        answers = await asyncio.gather(*waiting)
    finally:
        await engine.close()
    counted = answers[args.requests // 10 :]
    seconds = max(a.start + a.latency for a in answers) - min(a.start for a in answers)
    return Service(
        tokens_per_second=sum(a.completion_tokens for a in answers) / seconds,
        at_once=sum(a.latency - a.ttft for a in answers) / seconds,
        first_token=spread([a.ttft for a in counted]),
        answer=spread([a.latency for a in counted]),
    )


def spread(seconds):
    ordered = sorted(seconds)
    return sum(ordered) / len(ordered), ordered[len(ordered) // 2], ordered[int(0.95 * len(ordered))]


def page(record):
    lines = []
    for cell in record["cells"]:
        seen, predicted = cell["seen"], cell["predicted"]
        line = [f"{cell['rate']:.1f}/s", cell["way"]]
        for key, place in (("tokens_per_second", None), ("first_token", 1), ("answer", 1), ("answer", 2)):
            pair = [of[key] if place is None else 1000 * of[key][place] for of in (predicted, seen)]
            line.append(" / ".join(f"{value:.0f}" for value in pair))
        lines.append(line)
    header = ["requests", "drafts", "token/s", "first token, ms", "answer, ms, half", "95 %"]
    about = __doc__.split("\n\n")[2]
    title = "# A service: predicted and served"
    return "\n\n".join([title, about, "Each cell: predicted / seen.", markdown_table(header, lines, num_text=2)]) + "\n"


if __name__ == "__main__":
    main()
